"""What an actor's memory is spent on: model state from its live tensors, and the peak of a step above it."""

from __future__ import annotations

import ctypes
import ctypes.util
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
import torch

from dvpo_ray.models.memory import TensorBytes

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


@dataclass(frozen=True)
class ActorMemory:
    """Bytes of one actor, or of all actors of a role or of a run.

    Attributes:
        parameters, gradients, optimizer, cache: see `ModelState`, in device and in host memory together.
        activations: peak of the step above model state and cache: what forward and backward passes keep, logits, and the buffers of
            communication; None where it could not be measured.
        offloaded: the part of parameters, gradients and optimizer that is in host memory while a GPU computes.
    """

    parameters: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int | None = 0
    cache: int = 0
    offloaded: int = 0

    @property
    def model_state(self) -> int:
        """Parameters, gradients and optimizer."""
        return self.parameters + self.gradients + self.optimizer

    @property
    def peak(self) -> int:
        """Model state on the device that computes, and activations; the cache is left out, as its size is a setting."""
        return self.model_state - self.offloaded + (self.activations or 0)

    def __add__(self, other: ActorMemory) -> ActorMemory:
        mine, theirs = asdict(self), asdict(other)
        return ActorMemory(**{name: None if None in (mine[name], theirs[name]) else mine[name] + theirs[name] for name in mine})


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
