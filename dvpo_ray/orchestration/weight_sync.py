"""Weight sync: the learner's side of one protocol (init, start, update, finish) over any transport.

The protocol is vLLM's own. Every call to an engine has a time limit and names the engine and the phase when it passes,
and an engine takes its new version number only when all of its weights have arrived.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import ray
import torch
from ray.actor import ActorHandle

from dvpo_ray.config.schema import Config, WeightSyncConfig
from dvpo_ray.errors import ResourceError
from dvpo_ray.orchestration.buckets import pack

WeightStream = Callable[[], Iterable[tuple[str, torch.Tensor]]]


def choose_transport(config: Config) -> str:
    """`object_store`, `nccl` or `ipc`: what `weight_sync.transport: auto` stands for with this placement."""
    if config.weight_sync.transport != "auto":
        return config.weight_sync.transport
    gpus = (config.rollout.gpus_per_actor, config.policy.gpus_per_actor)
    if config.rollout.backend != "vllm" or min(gpus) == 0:
        return "object_store"
    return "ipc" if max(gpus) < 1 else "nccl"


class EngineClient:
    """The four phases, fanned out to all rollout engines; has the methods of vLLM's `VLLMWeightSyncClient` protocol."""

    def __init__(self, engines: list[ActorHandle], ranks_per_engine: int, timeout_seconds: float) -> None:
        self.engines = engines
        self.ranks_per_engine = ranks_per_engine
        self.timeout_seconds = timeout_seconds
        self._deadline = float("inf")

    def begin(self) -> None:
        """Start the time limit of one whole sync."""
        self._deadline = time.monotonic() + self.timeout_seconds

    def _all(self, phase: str, arguments: list[tuple]) -> None:
        pending = {getattr(e, phase).remote(*args): i for i, (e, args) in enumerate(zip(self.engines, arguments, strict=True))}
        ready, late = ray.wait(list(pending), num_returns=len(pending), timeout=max(0.0, self._deadline - time.monotonic()))
        if late:
            index = pending[late[0]]
            raise ResourceError(
                f"weight sync: rollout engine {index} did not answer {phase} within weight_sync.timeout_seconds="
                f"{self.timeout_seconds:g}; see logs/rollout-{index}.log"
            )
        ray.get(ready)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Open the channel; each engine gets its own first rank of the transfer group."""
        self.begin()
        infos = [dict(init_info) for _ in self.engines]
        for index, info in enumerate(infos):
            if "rank_offset" in info:
                info["rank_offset"] += index * self.ranks_per_engine
        self._all("init_weight_transfer_engine", [(info,) for info in infos])

    def start_weight_update(self) -> None:
        self._all("start_weight_update", [()] * len(self.engines))

    def update_weights(self, update_info: Any) -> None:
        """Send one bucket: a dict, or an object reference to one (then it travels through the object store)."""
        self._all("update_weights", [(update_info,)] * len(self.engines))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._all("finish_weight_update", [()] * len(self.engines))

    def set_policy_version(self, version: int) -> None:
        """All weights have arrived: what the engines sample from now on is of this version."""
        self._all("set_policy_version", [(version,)] * len(self.engines))


class WeightSender(Protocol):
    """The learner's end of a transport. Every learner rank calls `send`; rank 0 talks to the engines."""

    def send(self, version: int) -> None:
        """Replace the engines' weights by the learner's current ones, as policy version `version`."""


class ObjectStoreSender:
    """Buckets through the Ray object store: one copy per node, whatever the number of engines on it."""

    def __init__(self, client: EngineClient, weights: WeightStream, is_sender: bool, sync: WeightSyncConfig) -> None:
        self.client, self.weights, self.is_sender = client, weights, is_sender
        self.bucket_bytes = int(sync.bucket_mib * 2**20)
        self.checksum = sync.checksum
        if is_sender:
            client.init_weight_transfer_engine({})

    def send(self, version: int) -> None:
        if not self.is_sender:
            for _ in self.weights():  # gathering sharded weights is a collective of all ranks
                pass
            return
        self.client.begin()
        self.client.start_weight_update()
        for bucket in pack(self.weights(), self.bucket_bytes, self.checksum):
            self.client.update_weights(ray.put(bucket))
        self.client.finish_weight_update()
        self.client.set_policy_version(version)


def make_sender(transport: str, config: Config, engines: list[ActorHandle], weights: WeightStream, rank: int) -> WeightSender:
    """Open a transport between the learner and all rollout engines; a collective of all learner ranks."""
    sync = config.weight_sync
    client = EngineClient(engines, config.rollout.tensor_parallel_size, sync.timeout_seconds)
    if transport == "object_store":
        return ObjectStoreSender(client, weights, rank == 0, sync)
    from dvpo_ray.orchestration.vllm_sender import VLLMSender

    return VLLMSender(transport, client, weights, rank, sync)
