"""Which actor gets which CPUs and GPUs, derived from the config alone."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from dvpo_ray.baselines.algorithms import ALGORITHMS
from dvpo_ray.config.schema import Config, RoleConfig
from dvpo_ray.errors import InputError


@dataclass(frozen=True)
class Bundle:
    """What one actor reserves.

    Attributes:
        role: `rollout`, `scorer`, `reward_model`, `reference`, `learner`, `critic`, `experience`, `gvm_trainer` or
            `rm_trainer`.
        index: number of the actor within its role, from 0.
        cpus: Ray CPUs.
        gpus: Ray GPUs; below 1 the actor shares a GPU.
    """

    role: str
    index: int
    cpus: float
    gpus: float


def plan_placement(config: Config) -> list[Bundle]:
    """Bundles of policy optimisation, role by role.

    A rollout engine reserves the GPUs of all its tensor-parallel shards. The experience builder only waits and
    adds, so it reserves nothing.

    Raises:
        InputError: an actor would get more than one GPU but not a whole number of them, which Ray can't give.
    """
    shards, algorithm = config.rollout.tensor_parallel_size, ALGORITHMS[config.algorithm]
    return [
        *_bundles("rollout", "rollout", config.rollout, shards),
        *_bundles(algorithm.scorer, "scorer", config.scorer),
        *_bundles("reference", "reference", config.reference),
        *_bundles("learner", "policy", config.policy),
        *(_bundles("critic", "critic", config.critic) if algorithm.has_critic else []),
        Bundle("experience", 0, cpus=0.0, gpus=0.0),
    ]


def plan_gvm_placement(config: Config) -> list[Bundle]:
    """Bundles of Global Value Model training: its data-parallel workers.

    Raises:
        InputError: as in `plan_placement`.
    """
    return _bundles("gvm_trainer", "gvm", config.gvm)


def plan_reward_model_placement(config: Config) -> list[Bundle]:
    """Bundles of reward-model training, which is that of a value model by the settings of `reward_model`.

    Raises:
        InputError: as in `plan_placement`.
    """
    return _bundles("rm_trainer", "reward_model", config.reward_model)


def check_local_cluster(config: Config, bundles: Iterable[Bundle]) -> None:
    """Refuse actors that would not fit the local cluster as the config sizes it; what a cluster at an address has is known only there.

    Raises:
        InputError: `ray.num_cpus` or `ray.num_gpus` is below what the actors reserve together.
    """
    if config.ray.address is not None or "RAY_ADDRESS" in os.environ or config.ray.autoscaling:
        return
    bundles = list(bundles)
    for name, there, wanted in zip(("cpus", "gpus"), (config.ray.num_cpus, config.ray.num_gpus), total_resources(bundles), strict=True):
        if there is not None and wanted > there:
            shares = ", ".join(f"{role} {count} x {amount:g}" for (role, amount), count in _counted(bundles, name).items())
            raise InputError(
                f"ray.num_{name} is {there}, but the actors reserve {wanted:g} {name.upper()[:-1]}s ({shares}); "
                f"set it to {math.ceil(wanted)} or more, or lower their {name}_per_actor"
            )


def _counted(bundles: Iterable[Bundle], resource: str) -> Counter[tuple[str, float]]:
    """How many actors of each role reserve how much of a resource."""
    reserved = ((bundle.role, getattr(bundle, resource)) for bundle in bundles)
    return Counter((role, amount) for role, amount in reserved if amount)


def wanted_gpus(config: Config, bundles: Iterable[Bundle]) -> dict[str, float]:
    """GPUs of each actor of policy optimisation, by the key that asks for them."""
    sections = dict.fromkeys(_SECTIONS.get(bundle.role, bundle.role) for bundle in bundles if bundle.gpus)
    return {f"{section}.gpus_per_actor": getattr(config, section).gpus_per_actor for section in sections}


_SECTIONS = {"reward_model": "scorer", "learner": "policy"}
"""Sections of the config that have another name than the role they set up."""


def total_resources(bundles: Iterable[Bundle]) -> tuple[float, float]:
    """CPUs and GPUs that all bundles reserve together; fractions of a GPU add up exactly to a whole one."""
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
