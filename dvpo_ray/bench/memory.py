"""The memory of a step, observed from outside: model state from an actor's live tensors, and the peak of the step above it.

`start_ledger` and `read_ledger` run inside an actor, through `Actor.observe`. Bytes are counted by storage: tied weights, and the
views that DeepSpeed cuts out of its flat buffers, count once, and DeepSpeed's padding of them counts too.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch
from torch import Tensor, nn

from dvpo_ray.actors.deepspeed_rank import DeepSpeedRank
from dvpo_ray.actors.frozen import FrozenModel
from dvpo_ray.actors.rollout_engine import RolloutEngine
from dvpo_ray.models.loading import default_device
from dvpo_ray.planning.memory import ActorMemory
from dvpo_ray.runtime.process import Actor

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

# Where DeepSpeed's optimizers keep tensors that belong to no parameter. ZeRO 3 and offload have more of them than ZeRO 1 and 2.
_PARAMETER_BUFFERS = ("lp_param_buffer", "param_buffer_of_bit16_for_cpu_offload_groups")
_GRADIENT_BUFFERS = ("averaged_gradients", "grad_partitions_flat_buffer", "accumulated_grads_in_cpu")
_MASTER_WEIGHTS = ("fp32_groups", "single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")
_CLEAR_PEAK = "5"  # of /proc/PID/clear_refs, see proc(5)


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


ModelState = dict[str, TensorBytes]
"""Tensors that outlive a micro-batch: `parameters` with buffers, `gradients`, `optimizer` (moments and float32 master weights) and `cache`
(keys and values that the generation library reserves), as they are sharded on one actor."""


# ------------------------------------------------------------------------------------------------- inside an actor


def start_ledger(actor: Actor) -> None:
    """Begin to measure the memory of a step."""
    watch = GradientWatch(actor.engine) if isinstance(actor, DeepSpeedRank) else None
    actor.ledger = watch, model_state(actor), PeakMeter()


def read_ledger(actor: Actor) -> ActorMemory:
    """Memory of the step since `start_ledger`, its peak included."""
    watch, before, meter = actor.ledger
    growth, after = meter.growth(), model_state(actor)
    if watch is not None:
        after["gradients"] = watch.end()
    return measured(before, after, growth)


def model_state(actor: Actor) -> ModelState:
    """What an actor holds now.

    Keys and values of a rollout engine are a cache where the library reserves them for good (vLLM), else they are activations
    (transformers).
    """
    if isinstance(actor, DeepSpeedRank):
        return engine_state(actor.engine)
    if isinstance(actor, RolloutEngine) and hasattr(actor.backend, "llm"):
        parameters, caches = zip(*actor.backend.llm.collective_rpc(_worker_bytes), strict=True)
        return {"parameters": sum(parameters, TensorBytes()), "cache": sum(caches, TensorBytes())}
    if isinstance(actor, FrozenModel | RolloutEngine):
        return {"parameters": parameter_bytes(actor.model if isinstance(actor, FrozenModel) else actor.backend.model, default_device())}
    return {}


def _worker_bytes(worker) -> tuple[TensorBytes, TensorBytes]:
    """Weights and key-value cache of one tensor-parallel worker of vLLM."""
    runner = worker.model_runner
    return parameter_bytes(runner.model, worker.device), TensorBytes.of(runner.kv_caches, worker.device)


def parameter_bytes(model: nn.Module, device: torch.device) -> TensorBytes:
    """Parameters and buffers of a model outside of DeepSpeed."""
    return TensorBytes.of([*model.parameters(), *model.buffers()], device)


def measured(before: ModelState, after: ModelState, growth: int | None) -> ActorMemory:
    """The ledger entry of a step.

    Args:
        before: at the step's start, with the gradients that were alive then.
        after: at its end, with the gradients at their largest.
        growth: of the process's memory to its peak; what is not growth of model state is activations.
    """
    state_growth = sum(size.device for size in after.values()) - sum(size.device for size in before.values())
    activations = None if growth is None else max(0, growth - state_growth)
    offloaded = sum(size.offloaded for size in after.values())
    return ActorMemory(**{name: size.total for name, size in after.items()}, activations=activations, offloaded=offloaded)


# -------------------------------------------------------------------------------------------------------- DeepSpeed


def engine_state(engine: DeepSpeedEngine) -> ModelState:
    """The model state of one rank. With ZeRO 3 it holds its own part of each parameter, and the small ones whole.

    Master weights are counted where the optimizer keeps a copy of the parameters.
    """
    device, parameters = default_device(), list(engine.module.parameters())
    shards = [p.ds_tensor for p in parameters if getattr(p, "ds_tensor", None) is not None]
    weights = [*(p.data for p in parameters), *shards, *engine.module.buffers(), *_attributes(engine, _PARAMETER_BUFFERS)]
    storages = {p.untyped_storage().data_ptr() for p in weights}
    masters = (t for t in [*_optimized(engine), *_attributes(engine, _MASTER_WEIGHTS)] if t.untyped_storage().data_ptr() not in storages)
    return {
        "parameters": TensorBytes.of(weights, device),
        "gradients": gradient_bytes(engine),
        "optimizer": TensorBytes.of([*_tensors(list(engine.basic_optimizer.state.values())), *masters], device),
    }


def gradient_bytes(engine: DeepSpeedEngine) -> TensorBytes:
    """Gradients that are alive now, in the dtype of the model and in the optimizer's float32."""
    grads = [p.grad for p in [*engine.module.parameters(), *_optimized(engine)] if p.grad is not None]
    return TensorBytes.of([*grads, *_attributes(engine, _GRADIENT_BUFFERS)], default_device())


def _optimized(engine: DeepSpeedEngine) -> list[Tensor]:
    """What torch's optimizer steps on: the parameters themselves, or DeepSpeed's float32 copies of them."""
    return [parameter for group in engine.basic_optimizer.param_groups for parameter in group["params"]]


def _attributes(engine: DeepSpeedEngine, names: Iterable[str]) -> Iterator[Tensor]:
    return _tensors([getattr(engine.optimizer, name, None) for name in names])


def _tensors(value: object) -> Iterator[Tensor]:
    """All tensors in nested lists and dictionaries."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


class GradientWatch:
    """The gradients of a DeepSpeed engine at their largest, seen after each backward pass and as the optimizer's step begins.

    Inside its step DeepSpeed makes a float32 copy of gradients of a lower precision.
    """

    def __init__(self, engine: DeepSpeedEngine) -> None:
        self.engine = engine
        self.most = TensorBytes()
        self._hook = engine.basic_optimizer.register_step_pre_hook(lambda *_: self._note())
        backward = engine.backward
        # Of this object alone; `end` brings the class's back.
        engine.backward = lambda *args, **kwargs: (backward(*args, **kwargs), self._note())[0]

    def _note(self) -> None:
        self.most = max(self.most, gradient_bytes(self.engine), key=lambda size: size.total)

    def end(self) -> TensorBytes:
        """Stop watching."""
        self._note()
        self._hook.remove()
        del self.engine.backward
        return self.most


# ------------------------------------------------------------------------------------------------------------- peak


class PeakMeter:
    """Growth of this process's memory from one point to its peak: allocated tensors on a GPU, else the resident set size.

    Linux keeps the peak of the resident set itself and lets it be reset, so that nothing is sampled and no peak is missed. Free
    memory that the allocator kept from earlier steps is given back first; it would hide what the step takes from it.
    """

    def __init__(self) -> None:
        self._start: int | None = None
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self._start = torch.cuda.memory_allocated()
            return
        try:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text(_CLEAR_PEAK)
        except (OSError, AttributeError):
            return  # another system, or a container that forbids it
        self._start = psutil.Process().memory_info().rss

    def growth(self) -> int | None:
        """Bytes from the start to the peak since; None where the system does not tell."""
        if self._start is None:
            return None
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated() - self._start
        lines = Path("/proc/self/status").read_text().splitlines()
        peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
        return max(0, peak - self._start)
