"""Starting the actors of a run in one placement group, and waiting for them by name."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from dvpo_ray.actors.critic import Critic
from dvpo_ray.actors.experience_builder import ExperienceBuilder
from dvpo_ray.actors.frozen import ReferenceModel, RewardScorer, ValueScorer
from dvpo_ray.actors.policy_learner import PolicyLearner
from dvpo_ray.actors.process import Actor, driver_folders, environment
from dvpo_ray.actors.rollout_engine import RolloutEngine
from dvpo_ray.config.schema import Config, RayConfig, RoleConfig
from dvpo_ray.errors import ResourceError
from dvpo_ray.orchestration.cluster import get
from dvpo_ray.orchestration.placement import Bundle, plan_placement, total_resources
from dvpo_ray.orchestration.weight_sync import choose_transport

CLASSES: dict[str, type[Actor]] = {
    cls.role: cls for cls in (RolloutEngine, ValueScorer, RewardScorer, ReferenceModel, PolicyLearner, Critic, ExperienceBuilder)
}
FROZEN = ("scorer", "reward_model", "reference")


@dataclass(frozen=True)
class Room:
    """Reserved resources that actors can be started in.

    Attributes:
        group: the placement group.
        bundles: all that it was made of.
        free: those of them that new actors may take.
    """

    group: PlacementGroup
    bundles: list[Bundle]
    free: list[Bundle]


@dataclass(frozen=True)
class Roles:
    """Handles of the actors of a run.

    Attributes:
        by_role: all of them under the names that metrics and logs use.
        local_pids: process ids of those on the driver's node.
        room: what they occupy.
        run_folder: where their logs go.
    """

    by_role: dict[str, list[ActorHandle]]
    local_pids: list[int]
    room: Room
    run_folder: str

    @property
    def engines(self) -> list[ActorHandle]:
        return self.by_role["rollout"]

    @property
    def frozen(self) -> dict[str, list[ActorHandle]]:
        """The frozen models that score each finished rollout, by role."""
        return {role: self.by_role[role] for role in FROZEN if role in self.by_role}

    @property
    def trained(self) -> dict[str, list[ActorHandle]]:
        """The models that change, by role: what a checkpoint holds."""
        return {role: self.by_role[role] for role in ("learner", "critic") if role in self.by_role}

    @property
    def learners(self) -> list[ActorHandle]:
        return self.by_role["learner"]

    @property
    def critics(self) -> list[ActorHandle]:
        """None but with an algorithm that trains a value model online."""
        return self.by_role.get("critic", [])

    @property
    def builder(self) -> ActorHandle:
        return self.by_role["experience"][0]


@contextmanager
def start_roles(config: Config, run_folder: str, stop_token_ids: frozenset[int], max_sequence_tokens: int) -> Iterator[Roles]:
    """All actors of a run, ready, for the time of a `with` block.

    Raises:
        ResourceError: the cluster has no room for them, or one did not start in time.
    """
    bundles = plan_placement(config)
    transport = choose_transport(config)
    group = reserve(bundles, config.ray)
    room = Room(group, bundles, [])
    actors: dict[str, list[ActorHandle]] = {}
    try:
        for bundle in bundles:
            more = (stop_token_ids, transport, max_sequence_tokens) if bundle.role == "rollout" else ()
            actors.setdefault(bundle.role, []).append(_start(config, bundle, room, run_folder, *more))
        patience = config.rollout.start_timeout_seconds
        pids = wait_until_ready(actors, patience)
        roles = Roles(actors, [pid for role in pids.values() for pid in role], room, run_folder)
        for role, ranks in roles.trained.items():
            address = get(ranks[0].rendezvous.remote(), what=f"{role} rendezvous")
            channel = (roles.engines, transport) if role == "learner" else ()
            get([rank.connect.remote(*address, *channel) for rank in ranks], what=f"the start of the {role}", timeout_seconds=patience)
        yield roles
    finally:
        for handle in [handle for handles in actors.values() for handle in handles]:
            ray.kill(handle)
        remove_placement_group(group)


def _start(config: Config, bundle: Bundle, room: Room, run_folder: str, *more) -> ActorHandle:
    settings = {"rollout": config.rollout, "reference": config.reference, "learner": config.policy, "critic": config.critic}
    env = environment(RoleConfig() if bundle.role == "experience" else settings.get(bundle.role, config.scorer))
    return spawn(CLASSES[bundle.role], bundle, room.group, room.bundles, env, config, bundle.index, run_folder, *more)


def retire(roles: Roles, role: str) -> Room:
    """Stop the actors of a frozen role, and return the room that they leave."""
    handles = roles.by_role[role]
    for handle in handles:
        ray.kill(handle)
    for handle in handles:
        _wait_until_dead(handle)  # only then are its name and its resources free
    return replace(roles.room, free=[bundle for bundle in roles.room.bundles if bundle.role == role])


def _wait_until_dead(handle: ActorHandle) -> None:
    while True:
        try:
            ray.get(handle.ready.remote())
        except RayActorError:
            return
        time.sleep(0.05)


def restart(roles: Roles, role: str, config: Config) -> list[int]:
    """Start the actors of a retired role again, with another config; returns the process ids of those on this node."""
    bundles = [bundle for bundle in roles.room.bundles if bundle.role == role]
    roles.by_role[role] = [_start(config, bundle, roles.room, roles.run_folder) for bundle in bundles]
    return wait_until_ready({role: roles.by_role[role]}, config.rollout.start_timeout_seconds)[role]


@contextmanager
def reserved(bundles: list[Bundle], settings: RayConfig) -> Iterator[Room]:
    """Room for the bundles, for the time of a `with` block.

    Raises:
        ResourceError: as in `reserve`.
    """
    group = reserve(bundles, settings)
    try:
        yield Room(group, bundles, bundles)
    finally:
        remove_placement_group(group)


def reserve(bundles: list[Bundle], settings: RayConfig) -> PlacementGroup:
    """A placement group for the bundles that reserve anything.

    Raises:
        ResourceError: the cluster didn't have the room within `ray.placement_timeout_seconds`.
    """
    resources = [_resources(bundle) for bundle in bundles if _resources(bundle)]
    group = placement_group(resources, strategy=settings.placement_strategy)
    ready, _ = ray.wait([group.ready()], timeout=_patience(bundles, settings))
    if not ready:
        remove_placement_group(group)
        cpus, gpus = total_resources(bundles)
        have = ray.cluster_resources()
        raise ResourceError(
            f"the run needs {cpus:g} CPUs and {gpus:g} GPUs, but the Ray cluster has {have.get('CPU', 0):g} CPUs and {have.get('GPU', 0):g} GPUs "
            "in all; lower cpus_per_actor, gpus_per_actor or num_actors of a role, or free resources (waited "
            f"{_patience(bundles, settings):g} s, ray.placement_timeout_seconds)"
        )
    return group


def _patience(bundles: list[Bundle], settings: RayConfig) -> float:
    """Seconds to wait for room: none to speak of when the whole cluster, empty, would not have it and can't grow by itself."""
    cpus, gpus = total_resources(bundles)
    have = ray.cluster_resources()
    fits = have.get("CPU", 0) >= cpus and have.get("GPU", 0) >= gpus
    return settings.placement_timeout_seconds if fits or settings.autoscaling else 1.0


def _resources(bundle: Bundle) -> dict[str, float]:
    return {name: amount for name, amount in (("CPU", bundle.cpus), ("GPU", bundle.gpus)) if amount > 0}


def spawn(
    cls: type[Actor], bundle: Bundle, group: PlacementGroup, bundles: list[Bundle], env: dict[str, str], *args, role: str | None = None
) -> ActorHandle:
    """Create one named actor in its bundle. It works in this process's folder, so that relative paths mean the same to both.

    Args:
        role: for the actor's name, where it is not the bundle's own.
    """
    env = env | driver_folders()
    name = f"{role or bundle.role}-{bundle.index}"
    options: dict = {"name": name, "num_cpus": bundle.cpus, "num_gpus": bundle.gpus, "runtime_env": {"env_vars": env}}
    if _resources(bundle):
        place = [b for b in bundles if _resources(b)].index(bundle)
        options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=place)
    return ray.remote(cls).options(**options).remote(*args)


def wait_until_ready(actors: dict[str, list[ActorHandle]], timeout_seconds: float) -> dict[str, list[int]]:
    """Wait for the constructors of all actors and return, by role, the process ids of those on this node."""
    pending = {role: [handle.ready.remote() for handle in handles] for role, handles in actors.items()}
    here = ray.get_runtime_context().get_node_id()
    found = {role: get(refs, what=f"the start of {role}", timeout_seconds=timeout_seconds) for role, refs in pending.items()}
    return {role: [pid for node, pid in places if node == here] for role, places in found.items()}
