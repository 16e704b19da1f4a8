"""The memory of a step, observed from outside: model state from an actor's live tensors, and the peak of the step above it.

`start_ledger` and `read_ledger` run inside an actor, through `Actor.observe`.
"""

from __future__ import annotations

import ctypes
import ctypes.util
from dataclasses import dataclass, replace
from functools import singledispatch
from pathlib import Path

import psutil
import torch

from dvpo_ray.actors.deepspeed_rank import DeepSpeedRank
from dvpo_ray.actors.frozen import FrozenModel
from dvpo_ray.actors.rollout_engine import RolloutEngine
from dvpo_ray.bench.tensor_bytes import TensorBytes, engine_gradient_bytes, engine_optimizer_bytes, engine_parameter_bytes, parameter_bytes
from dvpo_ray.models.loading import default_device
from dvpo_ray.planning.memory import ActorMemory
from dvpo_ray.runtime.process import Actor

_CLEAR_PEAK = "5"  # of /proc/PID/clear_refs, see proc(5)


@dataclass(frozen=True)
class ModelState:
    """Tensors that outlive a micro-batch.

    Attributes:
        parameters: weights and buffers, as they are sharded on this actor.
        gradients: at their largest in the step.
        optimizer: moments and float32 master weights.
        cache: of keys and values, as the generation library reserves it.
    """

    parameters: TensorBytes = TensorBytes()
    gradients: TensorBytes = TensorBytes()
    optimizer: TensorBytes = TensorBytes()
    cache: TensorBytes = TensorBytes()

    @property
    def on_device(self) -> int:
        return self.parameters.device + self.gradients.device + self.optimizer.device + self.cache.device


# ------------------------------------------------------------------------------------------------- inside an actor


def start_ledger(actor: Actor) -> None:
    """Begin to measure the memory of a step."""
    actor.gradients = GradientWatch(actor.engine) if isinstance(actor, DeepSpeedRank) else None
    actor.ledger = model_state(actor), PeakMeter()


def read_ledger(actor: Actor) -> ActorMemory:
    """Memory of the step since `start_ledger`, its peak included."""
    before, meter = actor.ledger
    growth = meter.growth()
    after = model_state(actor)
    if actor.gradients is not None:
        after = replace(after, gradients=actor.gradients.end())
    return measured(before, after, growth)


@singledispatch
def model_state(actor: Actor) -> ModelState:
    """Parameters, gradients, optimizer and cache that an actor holds now; nothing where it has no model."""
    return ModelState()


@model_state.register
def _(actor: FrozenModel) -> ModelState:
    return ModelState(parameters=parameter_bytes(actor.model, default_device()))


@model_state.register
def _(actor: DeepSpeedRank) -> ModelState:
    engine, device = actor.engine, default_device()
    return ModelState(engine_parameter_bytes(engine, device), engine_gradient_bytes(engine, device), engine_optimizer_bytes(engine, device))


@model_state.register
def _(actor: RolloutEngine) -> ModelState:
    """Keys and values count as a cache where the library reserves them for good (vLLM), else as activations (transformers)."""
    if not hasattr(actor.backend, "llm"):
        return ModelState(parameters=parameter_bytes(actor.backend.model, default_device()))
    shards = actor.backend.llm.collective_rpc(_worker_bytes)
    parameters, caches = zip(*shards, strict=True)
    return ModelState(parameters=sum(parameters, TensorBytes()), cache=sum(caches, TensorBytes()))


def _worker_bytes(worker) -> tuple[TensorBytes, TensorBytes]:
    """Weights and key-value cache of one tensor-parallel worker of vLLM."""
    runner = worker.model_runner
    return parameter_bytes(runner.model, worker.device), TensorBytes.of(runner.kv_caches, worker.device)


class GradientWatch:
    """The gradients of a DeepSpeed engine at their largest, seen after each backward pass and as the optimizer's step begins.

    Inside its step DeepSpeed makes a float32 copy of gradients of a lower precision.
    """

    def __init__(self, engine) -> None:
        self.engine = engine
        self.most = TensorBytes()
        self._hook = engine.basic_optimizer.register_step_pre_hook(lambda *_: self._note())
        backward = engine.backward

        def watched(*args, **kwargs):
            result = backward(*args, **kwargs)
            self._note()
            return result

        engine.backward = watched  # of this object alone; `end` brings the class's back

    def _note(self) -> None:
        self.most = max(self.most, engine_gradient_bytes(self.engine, default_device()), key=lambda size: size.total)

    def end(self) -> TensorBytes:
        """Stop watching."""
        self._note()
        self._hook.remove()
        del self.engine.backward
        return self.most


# ------------------------------------------------------------------------------------------------------ measuring


class PeakMeter:
    """Growth of this process's memory from one point to its peak: allocated tensors on a GPU, else the resident set size.

    Linux keeps the peak of the resident set itself and lets it be reset, so that nothing is sampled and no peak is missed. Free
    memory that the allocator kept from earlier steps is given back first; it would hide what the step takes from it.
    """

    def __init__(self) -> None:
        self._on_gpu = torch.cuda.is_available()
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
            self._start: int | None = torch.cuda.memory_allocated()
        else:
            self._start = _reset_resident_peak()

    def growth(self) -> int | None:
        """Bytes from the start to the peak since; None where the system does not tell."""
        if self._start is None:
            return None
        peak = torch.cuda.max_memory_allocated() if self._on_gpu else _resident_peak()
        return max(0, peak - self._start)


def measured(before: ModelState, after: ModelState, growth: int | None) -> ActorMemory:
    """The ledger entry of a step.

    Args:
        before: at the step's start, with the gradients that were alive then.
        after: at its end, with the gradients at their largest.
        growth: of the process's memory to its peak; what of it is no growth of model state is activations.
    """
    parts = {name: getattr(after, name).total for name in ("parameters", "gradients", "optimizer", "cache")}
    activations = None if growth is None else max(0, growth - (after.on_device - before.on_device))
    offloaded = sum(getattr(after, name).offloaded for name in ("parameters", "gradients", "optimizer"))
    return ActorMemory(**parts, activations=activations, offloaded=offloaded)


def _reset_resident_peak() -> int | None:
    """Resident bytes now, with the peak reset to them."""
    library = ctypes.util.find_library("c")
    if library is not None and hasattr(libc := ctypes.CDLL(library), "malloc_trim"):
        libc.malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text(_CLEAR_PEAK)
    except OSError:
        return None  # another system, or a container that forbids it
    return psutil.Process().memory_info().rss


def _resident_peak() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")
