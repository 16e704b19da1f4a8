"""What is added to vLLM's workers: the receiving end of the object-store transport, beside its NCCL and CUDA IPC engines; seeds; sleep on a
GPU that others use at the same time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import numpy as np
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform
from vllm.utils.torch_utils import set_random_seed
from vllm.v1.worker.gpu_worker import Worker

from dvpo_ray.sync.object_store import unpack


@dataclass
class ObjectStoreInitInfo(WeightTransferInitInfo):
    """Empty: a bucket describes itself."""


@dataclass
class ObjectStoreUpdateInfo(WeightTransferUpdateInfo):
    """One bucket, as `dvpo_ray.sync.object_store.pack` makes it."""

    names: list[str]
    dtypes: list[str]
    shapes: list[tuple[int, ...]]
    data: list[np.ndarray]
    crc32: int | None


class ObjectStoreWeightTransferEngine(WeightTransferEngine[ObjectStoreInitInfo, ObjectStoreUpdateInfo]):
    """Loads checkpoint-format weights from buckets that Ray has already brought into this process."""

    init_info_cls = ObjectStoreInitInfo
    update_info_cls = ObjectStoreUpdateInfo

    def init_transfer_engine(self, init_info: ObjectStoreInitInfo) -> None:
        pass

    def start_weight_update(self) -> None:
        self.loaded: set[str] = set()
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: ObjectStoreUpdateInfo) -> None:
        weights: Any = unpack(update_info.names, update_info.dtypes, update_info.shapes, update_info.data, update_info.crc32)
        self.loaded |= set(self.model.load_weights(weights) or ())

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        # A head that is tied to the embedding receives no weights of its own, so the reload does not pack it again. On CPU it would
        # compute with a packed copy of the old embedding.
        for module in self.model.modules():
            if isinstance(module, ParallelLMHead):
                module.quant_method.process_weights_after_loading(module)
        if current_platform.is_cpu():
            self._pack_experts()

    def _pack_experts(self) -> None:
        """Pack new weights of mixtures of experts for the CPU's kernel. vLLM does it at the first loading only, and a reload leaves
        plain weights where the kernel reads packed ones."""
        for name, module in self.model.named_modules():
            kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
            if kernel is not None and any(loaded.startswith(f"{name}.") for loaded in self.loaded):
                kernel.fused_experts.process_weights_after_loading(module)

    def shutdown(self) -> None:
        pass


WeightTransferEngineFactory.register_engine("object_store", ObjectStoreWeightTransferEngine)


def _beside_others(sleep: Callable[[Worker, int], None]) -> Callable[[Worker, int], None]:
    """vLLM's sleep without its last look at the whole GPU: others on it may have taken memory meanwhile, more than the engine gave back."""

    @wraps(sleep)
    def sleep_beside_others(worker: Worker, level: int = 1) -> None:
        try:
            sleep(worker, level)
        except AssertionError as error:
            if "Memory usage increased" not in str(error):
                raise

    return sleep_beside_others


if not hasattr(Worker.sleep, "__wrapped__"):
    Worker.sleep = _beside_others(Worker.sleep)


class WorkerExtension:
    """Added to vLLM's worker. Every process that computes for an engine imports it before it loads the model, and so knows the transport."""

    def seed_sampling(self, seed: int) -> None:
        """Seed all sampling from now on that has no seed of its own."""
        set_random_seed(seed)

    def idle_adapters(self, number: int) -> list[str]:
        """Names of the matrices in a set of adapters that the model of this worker does not have: vLLM leaves them out without a word."""
        manager = self.model_runner.lora_manager._adapter_manager
        return sorted(set(manager.get_adapter(number).loras) - set(manager.modules))
