"""Which actor gets which CPUs and GPUs, derived from the config alone.

A GPU is a slot. Actors are mapped onto slots, several to a slot, and each sees the GPUs of its own slots only. `runtime/room.py` finds a
GPU for each slot.
"""

from __future__ import annotations

import difflib
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from glob import glob

from dvpo_ray.config.algorithms import ALGORITHMS, ROLE_SECTIONS
from dvpo_ray.config.arithmetic import counted
from dvpo_ray.config.schema import Config, LoraConfig, PreferenceTraining, RayConfig, RoleConfig
from dvpo_ray.errors import InputError

GROUPS = (("rollout",), ("scorer", "reward_model", "reference"), ("learner", "critic"))
"""Roles that share GPUs with `placement: separate`: engines, frozen models, trained models."""
ADAPTER_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks that vLLM has room for in an engine with adapters; it takes adapters up to that rank."""
_TRAINERS = {"gvm": "gvm_trainer", "reward_model": "rm_trainer"}
"""The role that trains a value or reward model, by its section of the config."""


# The makers' figures: usable GiB, dense bfloat16 TFLOP/s, GB/s of memory.
GPUS = {
    "h200": (139.8, 989, 4800),
    "h100-80gb": (79.1, 989, 3350),
    "a100-80gb": (79.2, 312, 2039),
    "a100-40gb": (39.4, 312, 1555),
    "l40s": (44.4, 362, 864),
    "a10g": (22.0, 70, 600),
    "l4": (22.0, 121, 300),
    "rtx-4090": (23.5, 165, 1008),
}

_GPU_DEVICES = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/dxg")
"""Devices of a machine with a GPU: of NVIDIA, of AMD, or under Windows."""


@dataclass(frozen=True)
class Seat:
    """Where one actor is and what it takes.

    Attributes:
        role: `rollout`, `scorer`, `reward_model`, `reference`, `learner`, `critic`, `experience`, `gvm_trainer` or
            `rm_trainer`.
        index: of the actor within its role, from 0.
        cpus: Ray CPUs.
        slots: numbers of the GPUs that it sits on, from 0; empty for an actor without a GPU.
    """

    role: str
    index: int
    cpus: float
    slots: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.role}-{self.index}"


def plan_placement(config: Config) -> list[Seat]:
    """Seats of policy optimisation, role by role.

    With `placement: colocated` the actors of every role begin at slot 0; with `separate` each of `GROUPS` has slots of its own. The
    experience builder only waits and adds, so it takes nothing.
    """
    algorithm = ALGORITHMS[config.algorithm]
    seats = _seats("rollout", config.rollout, config.rollout.tensor_parallel_size)
    for role in (algorithm.scorer, "reference", "learner", *(["critic"] if algorithm.has_critic else [])):
        seats += _seats(role, getattr(config, ROLE_SECTIONS[role]))
    return [*(_apart(seats) if config.placement == "separate" else seats), Seat("experience", 0, cpus=0.0)]


def plan_training_placement(settings: PreferenceTraining) -> list[Seat]:
    """Seats of the training of a value or reward model: its data-parallel workers."""
    return _seats(_TRAINERS[settings.section], settings)


def _seats(role: str, settings: RoleConfig, shards: int = 1) -> list[Seat]:
    width = settings.gpus_per_actor * shards
    return [Seat(role, index, settings.cpus_per_actor, tuple(range(index * width, (index + 1) * width))) for index in range(settings.num_actors)]


def _apart(seats: Sequence[Seat]) -> list[Seat]:
    """The seats with each of `GROUPS` on slots behind those of the groups before it."""
    first, moved = 0, []
    for roles in GROUPS:
        group = [seat for seat in seats if seat.role in roles]
        moved += [replace(seat, slots=tuple(first + slot for slot in seat.slots)) for seat in group]
        first += total_resources(group)[1]
    return moved


def shares_gpus(seats: Iterable[Seat]) -> bool:
    """Whether engines and trained models sit on the same GPUs, and so take turns."""
    seats = list(seats)
    engines, trained = ({slot for seat in seats if seat.role in roles for slot in seat.slots} for roles in (GROUPS[0], GROUPS[2]))
    return bool(engines & trained)


def check_device(config: Config, name: str | None) -> None:
    """Refuse a device of `dvpo plan --device` that is not known, or on which the config does not compute.

    Raises:
        InputError: names the device that may be meant, or those that would do.
    """
    gpus, on_gpu = ", ".join(GPUS), config.policy.gpus_per_actor > 0
    if name not in (None, "cpu", *GPUS):
        near = [gpu for gpu in GPUS if name and gpu.startswith(name.lower())] or difflib.get_close_matches(name.lower(), GPUS, n=1)
        meant = f"did you mean {' or '.join(near)}? " if near else ""
        raise InputError(f"--device {name!r}: not known; {meant}{'Expected' if near else 'expected'} cpu or one of {gpus}")
    if name is not None and (name != "cpu") != on_gpu:
        right = f"name a GPU: {gpus}" if on_gpu else "this config computes on the CPU, so leave --device out"
        raise InputError(f"--device is {name}, but policy.gpus_per_actor is {config.policy.gpus_per_actor:g}; {right}")


def choose_transport(config: Config) -> str:
    """`object_store`, `nccl`, `ipc` or `adapters`: how weights travel with this placement.

    CUDA IPC needs a rank of the learner on the GPU of each engine. NCCL refuses two of its processes on one GPU, so engines and
    learner must share none. Adapters alone travel only where the config asks for it, because vLLM samples more slowly with them.

    Raises:
        InputError: `weight_sync.transport` names one that this placement does not allow; says which actor is in its way.
    """
    asked = config.weight_sync.transport
    seats = plan_placement(config)
    problems = {"object_store": None, "ipc": _no_ipc(config, seats), "nccl": _no_nccl(config, seats), "adapters": _no_adapters(config)}
    if asked == "auto":
        return next(name for name in ("ipc", "nccl", "object_store") if problems[name] is None)
    if problems[asked] is not None:
        raise InputError(f"weight_sync.transport is {asked}, but {problems[asked]}; set weight_sync.transport=auto")
    return asked


def _no_ipc(config: Config, seats: Sequence[Seat]) -> str | None:
    """Why weights can't travel by CUDA IPC; None if they can."""
    without = _no_vllm_on_gpus(config)
    if without is not None:
        return without
    if config.rollout.tensor_parallel_size > 1:
        return f"rollout.tensor_parallel_size is {config.rollout.tensor_parallel_size}, and CUDA IPC takes engines of one GPU"
    learners = {slot for seat in seats if seat.role == "learner" for slot in seat.slots[:1]}
    alone = next((seat for seat in seats if seat.role == "rollout" and not learners.issuperset(seat.slots)), None)
    return f"{alone.name} is on GPU {alone.slots[0]}, where no rank of the learner is" if alone else None


def _no_nccl(config: Config, seats: Sequence[Seat]) -> str | None:
    """Why weights can't travel by NCCL; None if they can."""
    without = _no_vllm_on_gpus(config)
    if without is not None:
        return without
    engines = {slot: seat.name for seat in seats if seat.role == "rollout" for slot in seat.slots}
    both = next(((slot, seat.name) for seat in seats if seat.role == "learner" for slot in seat.slots if slot in engines), None)
    return f"{engines[both[0]]} and {both[1]} are both on GPU {both[0]} (placement: {config.placement})" if both else None


def _no_adapters(config: Config) -> str | None:
    """Why adapters can't travel alone; None if they can."""
    lora = config.policy.lora
    if lora is None:
        return "policy.lora is not set"
    return _no_vllm(config) or (
        f"policy.lora.rank is {lora.rank}, and vLLM takes at most {ADAPTER_RANKS[-1]}" if lora.rank > ADAPTER_RANKS[-1] else None
    )


def adapter_rank(lora: LoraConfig) -> int:
    """The rank that an engine has room for."""
    return next(rank for rank in ADAPTER_RANKS if rank >= lora.rank)


def _no_vllm(config: Config) -> str | None:
    return f"rollout.backend is {config.rollout.backend}" if config.rollout.backend != "vllm" else None


def _no_vllm_on_gpus(config: Config) -> str | None:
    if no_vllm := _no_vllm(config):
        return no_vllm
    without = next((section for section in ("rollout", "policy") if getattr(config, section).gpus_per_actor == 0), None)
    return f"{without}.gpus_per_actor is 0" if without else None


def joined_address(settings: RayConfig) -> str | None:
    """Address of the cluster that a run joins: `ray.address`, else RAY_ADDRESS, which a Ray job has. None when it starts Ray on this machine."""
    address = settings.address or os.environ.get("RAY_ADDRESS")
    return address if address != "local" else None


def check_local_cluster(config: Config, seats: Iterable[Seat]) -> None:
    """Refuse actors that don't fit the local cluster of the config. The size of a cluster at an address is known only there.

    Raises:
        InputError: `ray.num_cpus` or `ray.num_gpus` is below what the actors take together.
    """
    if joined_address(config.ray) or config.ray.autoscaling:
        return
    seats = list(seats)
    amounts = {"cpus": [seat.cpus for seat in seats], "gpus": [len(seat.slots) for seat in seats]}
    for name, there, wanted in zip(("cpus", "gpus"), (config.ray.num_cpus, config.ray.num_gpus), total_resources(seats), strict=True):
        if there is not None and wanted > there:
            counts = Counter(zip((seat.role for seat in seats), amounts[name], strict=True))
            shares = ", ".join(f"{role} {count} x {amount:g}" for (role, amount), count in counts.items() if amount)
            raise InputError(
                f"ray.num_{name} is {there}, but the actors need {counted(wanted, name.upper()[:-1])} ({shares}); "
                f"set it to {math.ceil(wanted)} or more, or lower their num_actors or {name}_per_actor"
            )


def wanted_gpus(config: Config, seats: Iterable[Seat]) -> dict[str, int]:
    """GPUs of each actor, by the key that asks for them; only keys that ask for any."""
    of_roles = ROLE_SECTIONS | {role: section for section, role in _TRAINERS.items()}
    sections = dict.fromkeys(of_roles[seat.role] for seat in seats if seat.slots)
    return {f"{section}.gpus_per_actor": getattr(config, section).gpus_per_actor for section in sections}


def no_gpu(wanted: Mapping[str, float]) -> str:
    """The line about keys that ask for GPUs which this machine does not have, with the remedy."""
    key = next(iter(wanted))
    return (
        f"{key} is {wanted[key]:g}, but this machine has no GPU that torch can use; set {' '.join(f'{key}=0' for key in wanted)} "
        "(cluster_configs/local-cpu.yaml is for CPUs), or ray.address to a cluster with GPUs"
    )


def gpus_not_here(config: Config, seats: Iterable[Seat]) -> list[str]:
    """A line if the actors need GPUs, would run on this machine, and its devices show none. torch, which knows for certain, takes seconds to load."""
    wanted = wanted_gpus(config, seats)
    if not wanted or joined_address(config.ray) or any(glob(pattern) for pattern in _GPU_DEVICES):
        return []
    return [no_gpu(wanted)]


def total_resources(seats: Iterable[Seat]) -> tuple[float, int]:
    """CPUs and GPUs that all actors take together."""
    seats = list(seats)
    return math.fsum(seat.cpus for seat in seats), len({slot for seat in seats for slot in seat.slots})


def placement_lines(seats: Sequence[Seat]) -> list[str]:
    """What each role takes and who is on which GPU, for people; nothing where there are no actors."""
    if not seats:
        return []
    actors = Counter(seat.role for seat in seats)
    lines = [
        f"{seat.role:<12} {actors[seat.role]} x ({counted(seat.cpus, 'CPU')}, {counted(len(seat.slots), 'GPU')})" for seat in seats if seat.index == 0
    ]
    cpus, gpus = total_resources(seats)
    on_slot = {slot: [seat.name for seat in seats if slot in seat.slots] for slot in sorted({slot for seat in seats for slot in seat.slots})}
    return [
        *lines,
        f"{'total':<12} {counted(cpus, 'CPU')}, {counted(gpus, 'GPU')}",
        *(f"GPU {slot}: {', '.join(names)}" for slot, names in on_slot.items()),
    ]
