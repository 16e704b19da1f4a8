"""All transports by name. A new one is a `WeightSender` here, and a receiving end in the rollout backends that can take it."""

from __future__ import annotations

from functools import partial

from ray.actor import ActorHandle

from dvpo_ray.config.schema import Config
from dvpo_ray.models.deepspeed import TrainingEngine
from dvpo_ray.sync.adapters import AdapterSender
from dvpo_ray.sync.client import EngineClient, WeightSender
from dvpo_ray.sync.object_store import ObjectStoreSender


def make_sender(transport: str, config: Config, engines: list[ActorHandle], training: TrainingEngine, rank: int) -> WeightSender:
    """Open a transport between the learner and all rollout engines; a collective of all learner ranks."""
    sync = config.weight_sync
    client = EngineClient(engines, config.rollout.tensor_parallel_size, sync.timeout_seconds)
    if transport == "adapters":
        return AdapterSender(client, training.adapters, training.model.peft_config["default"], rank == 0, sync)
    weights = partial(training.weights, bucket_bytes=int(sync.bucket_mib * 2**20))
    if transport == "object_store":
        return ObjectStoreSender(client, weights, rank == 0, sync)

    from dvpo_ray.sync.vllm_transports import VLLMSender

    return VLLMSender(transport, client, weights, training.describe_weights, rank, sync)
