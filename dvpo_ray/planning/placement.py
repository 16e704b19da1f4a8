"""Which actor gets which CPUs and GPUs, derived from the config alone."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from dvpo_ray.config.algorithms import ALGORITHMS, ROLE_SECTIONS
from dvpo_ray.config.schema import Config, PreferenceTraining, RayConfig, RoleConfig
from dvpo_ray.errors import InputError


@dataclass(frozen=True)
class Bundle:
    """What one actor reserves.

    Attributes:
        role: `rollout`, `scorer`, `reward_model`, `reference`, `learner`, `critic`, `experience`, `gvm_trainer` or
            `rm_trainer`.
        index: of the actor within its role, from 0.
        cpus: Ray CPUs.
        gpus: Ray GPUs; below 1 the actor shares a GPU.
    """

    role: str
    index: int
    cpus: float
    gpus: float


def plan_placement(config: Config) -> list[Bundle]:
    """Bundles of policy optimisation, role by role.

    A rollout engine reserves the GPUs of all its tensor-parallel shards. The experience builder only waits and adds, so it
    reserves nothing.

    Raises:
        InputError: an actor would get more than one GPU but not a whole number of them, which Ray can't give.
    """
    algorithm = ALGORITHMS[config.algorithm]
    bundles = _bundles("rollout", "rollout", config.rollout, config.rollout.tensor_parallel_size)
    for role in (algorithm.scorer, "reference", "learner", *(["critic"] if algorithm.has_critic else [])):
        bundles += _bundles(role, ROLE_SECTIONS[role], getattr(config, ROLE_SECTIONS[role]))
    return [*bundles, Bundle("experience", 0, cpus=0.0, gpus=0.0)]


def plan_training_placement(settings: PreferenceTraining) -> list[Bundle]:
    """Bundles of the training of a value or reward model: its data-parallel workers.

    Raises:
        InputError: as in `plan_placement`.
    """
    return _bundles({"gvm": "gvm_trainer", "reward_model": "rm_trainer"}[settings.section], settings.section, settings)


def choose_transport(config: Config) -> str:
    """`object_store`, `nccl` or `ipc`: what `weight_sync.transport: auto` means with this placement."""
    if config.weight_sync.transport != "auto":
        return config.weight_sync.transport
    gpus = (config.rollout.gpus_per_actor, config.policy.gpus_per_actor)
    if config.rollout.backend != "vllm" or min(gpus) == 0:
        return "object_store"
    return "ipc" if max(gpus) < 1 else "nccl"


def joined_address(settings: RayConfig) -> str | None:
    """Address of the cluster that a run joins: `ray.address`, else RAY_ADDRESS, which a Ray job has. None when it starts Ray on this machine."""
    address = settings.address or os.environ.get("RAY_ADDRESS")
    return address if address != "local" else None


def check_local_cluster(config: Config, bundles: Iterable[Bundle]) -> None:
    """Refuse actors that don't fit the local cluster of the config. The size of a cluster at an address is known only there.

    Raises:
        InputError: `ray.num_cpus` or `ray.num_gpus` is below what the actors reserve together.
    """
    if joined_address(config.ray) or config.ray.autoscaling:
        return
    bundles = list(bundles)
    for name, there, wanted in zip(("cpus", "gpus"), (config.ray.num_cpus, config.ray.num_gpus), total_resources(bundles), strict=True):
        if there is not None and wanted > there:
            counts = Counter((bundle.role, getattr(bundle, name)) for bundle in bundles)
            shares = ", ".join(f"{role} {count} x {amount:g}" for (role, amount), count in counts.items() if amount)
            raise InputError(
                f"ray.num_{name} is {there}, but the actors reserve {wanted:g} {name.upper()[:-1]}s ({shares}); "
                f"set it to {math.ceil(wanted)} or more, or lower their {name}_per_actor"
            )


def wanted_gpus(config: Config, bundles: Iterable[Bundle]) -> dict[str, float]:
    """GPUs of each actor of policy optimisation, by the key that asks for them."""
    sections = dict.fromkeys(ROLE_SECTIONS[bundle.role] for bundle in bundles if bundle.gpus)
    return {f"{section}.gpus_per_actor": getattr(config, section).gpus_per_actor for section in sections}


def total_resources(bundles: Iterable[Bundle]) -> tuple[float, float]:
    """CPUs and GPUs that all bundles reserve together. Fractions of a GPU add up exactly to a whole one."""
    bundles = list(bundles)
    return math.fsum(bundle.cpus for bundle in bundles), round(math.fsum(bundle.gpus for bundle in bundles), 4)


def _bundles(role: str, section: str, settings: RoleConfig, shards: int = 1) -> list[Bundle]:
    gpus = settings.gpus_per_actor * shards
    if gpus > 1 and gpus != int(gpus):
        times = f" times rollout.tensor_parallel_size {shards}" if shards > 1 else ""
        raise InputError(
            f"{section}.gpus_per_actor {settings.gpus_per_actor:g}{times} is {gpus:g} GPUs for one actor; "
            "an actor gets a fraction of one GPU or a whole number of GPUs"
        )
    return [Bundle(role, index, settings.cpus_per_actor, gpus) for index in range(settings.num_actors)]
