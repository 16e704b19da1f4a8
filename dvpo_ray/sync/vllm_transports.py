"""The learner's end of vLLM's own transports: NCCL broadcast between GPUs and CUDA IPC on a shared one."""

from __future__ import annotations

import math
from collections.abc import Iterator

import ray
import torch
from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
from vllm.utils.network_utils import get_open_port

from dvpo_ray.config.schema import WeightSyncConfig
from dvpo_ray.sync.client import Descriptions, EngineClient, WeightStream


class LearnerWeights(WeightSource):
    """The learner's full weights as vLLM's trainer engines read them. The stream gathers ZeRO-3 shards and merges LoRA."""

    def __init__(self, weights: WeightStream, descriptions: Descriptions) -> None:
        self._weights, self._descriptions = weights, descriptions
        self.changing_only = False

    def metadata(self) -> list[ParamMeta]:
        """Names, dtypes and shapes of the stream; nothing is gathered for them."""
        return [ParamMeta(*description) for description in self._descriptions(self.changing_only)]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self._weights(self.changing_only))


class VLLMSender:
    """One of vLLM's trainer-side weight-transfer engines, with versions and the client's time limit."""

    def __init__(
        self, transport: str, client: EngineClient, weights: WeightStream, descriptions: Descriptions, rank: int, sync: WeightSyncConfig
    ) -> None:
        self.client = client
        self.is_sender, self.source = rank == 0, LearnerWeights(weights, descriptions)
        largest = max(math.prod(weight.shape) * weight.dtype.itemsize for weight in self.source.metadata())
        bucket_bytes = max(int(sync.bucket_mib * 2**20), largest)  # CUDA IPC has one buffer, and cuts no weight
        if transport == "nccl":
            init_info = NCCLTrainerInitInfo(
                master_address=ray.util.get_node_ip_address(),
                master_port=get_open_port(),
                world_size=1 + len(client.engines) * client.ranks_per_engine,
                packed_buffer_size_bytes=bucket_bytes,
                rank=rank,
            )
        else:
            init_info = IPCTrainerInitInfo(packed=True, packed_buffer_size_bytes=bucket_bytes, rank=rank)
        self.engine = WeightTransferTrainerFactory.trainer_init(init_info, client=client, source=self.source)

    def send(self, version: int, *, changing_only: bool) -> None:
        self.source.changing_only = changing_only
        self.client.begin()
        self.engine.send_weights()
        if self.is_sender:
            self.client.set_policy_version(version)
