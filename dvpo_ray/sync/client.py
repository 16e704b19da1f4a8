"""Weight sync: one protocol (init, start, update, finish) over any transport, as the learner calls it.

The protocol is vLLM's own. Every call to an engine has a time limit. When it passes, the error names the engine and the phase.
An engine takes its new version number only when all of its weights have arrived.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import ray
import torch
from ray import ObjectRef
from ray.actor import ActorHandle

from dvpo_ray.errors import ResourceError

WeightStream = Callable[[bool], Iterable[tuple[str, torch.Tensor]]]
"""The learner's weights under their checkpoint names: all of them, or (with True) those that training changes."""
Description = tuple[str, torch.dtype, tuple[int, ...]]
"""Name, dtype and shape of a weight."""
Descriptions = Callable[[bool], Iterable[Description]]
"""What a `WeightStream` yields, in its order, without the weights."""


class EngineClient:
    """The four phases, fanned out to all rollout engines; has the methods of vLLM's `VLLMWeightSyncClient` protocol.

    An engine does what it is asked in order. So only the phases after which the learner needs an answer wait, for all that was asked before.
    """

    def __init__(self, engines: list[ActorHandle], ranks_per_engine: int, timeout_seconds: float) -> None:
        self.engines = engines
        self.ranks_per_engine = ranks_per_engine
        self.timeout_seconds = timeout_seconds
        self._deadline = float("inf")
        self._asked: dict[ObjectRef, tuple[int, str]] = {}

    def begin(self) -> None:
        """Start the time limit of one whole sync."""
        self._deadline = time.monotonic() + self.timeout_seconds

    def _ask(self, phase: str, *arguments: Any) -> None:
        """Begin a phase on all engines."""
        for index, engine in enumerate(self.engines):
            self._asked[getattr(engine, phase).remote(*arguments)] = index, phase

    def _wait(self) -> None:
        """Wait for all that was asked."""
        asked, self._asked = self._asked, {}
        _, late = ray.wait(list(asked), num_returns=len(asked), timeout=max(0.0, self._deadline - time.monotonic()))
        if late:
            index, phase = asked[late[0]]
            raise ResourceError(
                f"weight sync: rollout engine {index} did not answer {phase} within weight_sync.timeout_seconds="
                f"{self.timeout_seconds:g}; see logs/rollout-{index}.log"
            )
        ray.get(list(asked))

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Open the channel. Each engine gets its own first rank in the transfer group."""
        self.begin()
        for index, engine in enumerate(self.engines):
            own = dict(init_info)
            if "rank_offset" in own:
                own["rank_offset"] += index * self.ranks_per_engine
            self._asked[engine.init_weight_transfer_engine.remote(own)] = index, "init_weight_transfer_engine"
        self._wait()

    def start_weight_update(self) -> None:
        self._ask("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        """Send one bucket: a dict, or an object reference to one (then it travels through the object store)."""
        self.start_bucket(update_info)()

    def start_bucket(self, update_info: Any) -> Callable[[], None]:
        """Begin what `update_weights` does; what it returns waits for the engines."""
        self._ask("update_weights", update_info)
        return self._wait

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._ask("finish_weight_update")

    def set_policy_version(self, version: int) -> None:
        """Tell the engines the version of the weights that have arrived, and wait until all of it is done."""
        self._ask("set_policy_version", version)
        self._wait()


class WeightSender(Protocol):
    """The learner's end of a transport. Every learner rank calls `send`; rank 0 talks to the engines."""

    def send(self, version: int, *, changing_only: bool) -> None:
        """Replace the engines' weights by the learner's current ones, as policy version `version`.

        Args:
            changing_only: leave out the weights that training does not change, because the engines have them.
        """
