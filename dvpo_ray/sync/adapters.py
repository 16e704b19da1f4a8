"""LoRA adapters alone, through the Ray object store: the learner's end. The engine has the base model, and its backend takes the adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import ray
import torch
from peft import LoraConfig as PeftLoraConfig

from dvpo_ray.config.schema import WeightSyncConfig
from dvpo_ray.sync.client import EngineClient
from dvpo_ray.sync.object_store import pack

AdapterStream = Callable[[], Iterable[tuple[str, torch.Tensor]]]
"""The learner's adapters under peft's names."""


class AdapterSender:
    """All adapters together in one bucket, with peft's description of them."""

    def __init__(self, client: EngineClient, adapters: AdapterStream, description: PeftLoraConfig, is_sender: bool, sync: WeightSyncConfig) -> None:
        self.client, self.adapters, self.description = client, adapters, description
        self.is_sender, self.checksum = is_sender, sync.checksum

    def send(self, version: int, *, changing_only: bool) -> None:
        """As a `WeightSender`. The adapters are all that ever changes, so they travel each time."""
        weights = list(self.adapters())  # gathering sharded ones is a collective of all ranks
        if self.is_sender:
            self.client.begin()
            self.client.start_weight_update()
            (bucket,) = pack(weights, sum(tensor.nbytes for _, tensor in weights), self.checksum)
            self.client.update_weights(ray.put({"description": self.description, **bucket}))
            self.client.finish_weight_update()
            self.client.set_policy_version(version)
