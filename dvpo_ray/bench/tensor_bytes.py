"""Bytes of the tensors that a model and its training keep alive, read from the live objects.

Bytes are counted by storage: tied weights, and the views that DeepSpeed cuts out of its flat buffers, count once, and what
DeepSpeed pads them with counts too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

# Where DeepSpeed's optimizers keep tensors that hang on no parameter. ZeRO 3 and offload have more of them than ZeRO 1 and 2.
_PARAMETER_BUFFERS = ("lp_param_buffer", "param_buffer_of_bit16_for_cpu_offload_groups")
_GRADIENT_BUFFERS = ("averaged_gradients", "grad_partitions_flat_buffer", "accumulated_grads_in_cpu")
_MASTER_WEIGHTS = ("fp32_groups", "single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")


@dataclass(frozen=True)
class TensorBytes:
    """Bytes of some tensors by where they are.

    Attributes:
        device: on the device that computes (the CPU where there is no GPU).
        offloaded: in host memory while a GPU computes.
    """

    device: int = 0
    offloaded: int = 0

    @classmethod
    def of(cls, tensors: Iterable[Tensor], device: torch.device) -> TensorBytes:
        """The storages behind some tensors, each once."""
        storages = {(t.device.type, t.untyped_storage().data_ptr()): t.untyped_storage().nbytes() for t in tensors}
        here = sum(size for (kind, _), size in storages.items() if kind == device.type)
        return cls(here, sum(storages.values()) - here)

    def __add__(self, other: TensorBytes) -> TensorBytes:
        return TensorBytes(self.device + other.device, self.offloaded + other.offloaded)

    @property
    def total(self) -> int:
        return self.device + self.offloaded


def parameter_bytes(model: nn.Module, device: torch.device) -> TensorBytes:
    """Parameters and buffers of a model outside of DeepSpeed."""
    return TensorBytes.of([*model.parameters(), *model.buffers()], device)


def engine_parameter_bytes(engine: DeepSpeedEngine, device: torch.device) -> TensorBytes:
    """Parameters that this rank holds: with ZeRO 3 its own part of each and the small ones that stay whole."""
    return TensorBytes.of(_parameters(engine), device)


def engine_gradient_bytes(engine: DeepSpeedEngine, device: torch.device) -> TensorBytes:
    """Gradients that are alive now, in the dtype of the model and in the optimizer's float32."""
    grads = [p.grad for p in [*engine.module.parameters(), *_optimized(engine)] if p.grad is not None]
    return TensorBytes.of([*grads, *_attributes(engine, _GRADIENT_BUFFERS)], device)


def engine_optimizer_bytes(engine: DeepSpeedEngine, device: torch.device) -> TensorBytes:
    """Adam's moments, and the float32 master weights where the optimizer keeps a copy of the parameters."""
    parameters = {p.untyped_storage().data_ptr() for p in _parameters(engine)}
    masters = (t for t in [*_optimized(engine), *_attributes(engine, _MASTER_WEIGHTS)] if t.untyped_storage().data_ptr() not in parameters)
    return TensorBytes.of([*_tensors(list(engine.basic_optimizer.state.values())), *masters], device)


def _parameters(engine: DeepSpeedEngine) -> list[Tensor]:
    parameters = list(engine.module.parameters())
    shards = [p.ds_tensor for p in parameters if getattr(p, "ds_tensor", None) is not None]
    return [*(p.data for p in parameters), *shards, *engine.module.buffers(), *_attributes(engine, _PARAMETER_BUFFERS)]


def _optimized(engine: DeepSpeedEngine) -> list[Tensor]:
    """What torch's optimizer steps on: the parameters themselves, or DeepSpeed's float32 copies of them."""
    return [parameter for group in engine.basic_optimizer.param_groups for parameter in group["params"]]


def _attributes(engine: DeepSpeedEngine, names: Iterable[str]) -> Iterator[Tensor]:
    for name in names:
        yield from _tensors(getattr(engine.optimizer, name, None))


def _tensors(value: object) -> Iterator[Tensor]:
    """All tensors in nested lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
