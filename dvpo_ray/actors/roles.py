"""The roles of policy optimisation: which class each one is, and all of a run's actors, started together."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from ray import ObjectRef
from ray.actor import ActorHandle

from dvpo_ray.actors.critic import Critic
from dvpo_ray.actors.experience_builder import ExperienceBuilder
from dvpo_ray.actors.frozen import ReferenceModel, RewardScorer, ValueScorer
from dvpo_ray.actors.policy_learner import PolicyLearner
from dvpo_ray.actors.rollout_engine import RolloutEngine
from dvpo_ray.config import override_config
from dvpo_ray.config.algorithms import ROLE_SECTIONS
from dvpo_ray.config.schema import Config, RoleConfig
from dvpo_ray.planning.memory import RolePlan, predict_roles
from dvpo_ray.planning.placement import Seat, choose_transport, plan_placement, shares_gpus, total_resources
from dvpo_ray.planning.report import check_fit
from dvpo_ray.planning.slots import SlotPlan, plan_slots
from dvpo_ray.runtime.process import Actor, environment
from dvpo_ray.runtime.room import Room, reserved, spawn, stop, wait_until_ready
from dvpo_ray.runtime.waiting import get

CLASSES: dict[str, type[Actor]] = {
    cls.role: cls for cls in (RolloutEngine, ValueScorer, RewardScorer, ReferenceModel, PolicyLearner, Critic, ExperienceBuilder)
}
FROZEN = ("scorer", "reward_model", "reference")
TRAINED = ("learner", "critic")
T = TypeVar("T")


@dataclass(frozen=True)
class Roles:
    """Handles of the actors of a run.

    Attributes:
        by_role: all of them under the names that metrics and logs use.
        local_pids: process ids of those on the driver's node.
        room: what they occupy.
        run_folder: where their logs go.
        slots: the memory of their GPUs; None without GPUs, or where the size of the GPUs is not known.
    """

    by_role: dict[str, list[ActorHandle]]
    local_pids: list[int]
    room: Room
    run_folder: str
    slots: SlotPlan | None = None

    @property
    def takes_turns(self) -> bool:
        """Whether engines and trained models share GPUs."""
        return shares_gpus(self.room.seats)

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
        return {role: self.by_role[role] for role in TRAINED if role in self.by_role}

    @property
    def learners(self) -> list[ActorHandle]:
        return self.by_role["learner"]

    @property
    def critics(self) -> list[ActorHandle]:
        """Empty unless the algorithm trains a value model online."""
        return self.by_role.get("critic", [])

    @property
    def builder(self) -> ActorHandle:
        return self.by_role["experience"][0]

    def retire(self, role: str) -> Room:
        """Stop the actors of a frozen role, and return the room that they leave."""
        stop(self.by_role[role])
        return self.room.of_role(role)

    def restart(self, role: str, config: Config) -> list[int]:
        """Start the actors of a retired role again, with another config; returns the process ids of those on this node."""
        self.by_role[role] = [_start(config, seat, self.room, self.run_folder) for seat in self.room.of_role(role).free]
        return wait_until_ready({role: self.by_role[role]}, config.rollout.start_timeout_seconds)[role]


@contextmanager
def started_roles(
    config: Config,
    run_folder: str,
    stop_token_ids: frozenset[int],
    max_sequence_tokens: int,
    only: Collection[str] | None = None,
    show: Callable[[Mapping[str, str]], None] = lambda states: None,
) -> Iterator[Roles]:
    """All actors of a run, ready, for the time of a `with` block. Engines that share GPUs with trained models are asleep.

    Args:
        run_folder: gets their logs.
        stop_token_ids: tokens that end a response.
        max_sequence_tokens: longest prompt and response together.
        only: the roles to start; all that the algorithm has when not given.
        show: as in `wait_until_ready`.

    Raises:
        ResourceError: the cluster has no room for them, or one did not start in time.
    """
    seats = [seat for seat in plan_placement(config) if only is None or seat.role in only]
    transport, patience = choose_transport(config), config.rollout.start_timeout_seconds
    actors: dict[str, list[ActorHandle]] = {}
    gets_weights = only is None or "learner" in only
    sizes = _beside(predict_roles, config) if gets_weights and total_resources(seats)[1] else None
    with reserved(seats, config.ray) as room:
        try:
            slots = plan_memory(config, room, sizes.result()) if sizes else None
            if slots is not None and slots.cache_gib:
                config = override_config(config, [f"rollout.kv_cache_gib={slots.cache_gib}"])
            more_of = {
                # Engines beside a learner start with random weights: the first sync brings all of them, and the check of the first
                # rollouts then shows that every part arrives. Adapters need the model that they belong to.
                "rollout": (stop_token_ids, transport, max_sequence_tokens, not gets_weights or transport == "adapters", shares_gpus(seats)),
                "reference": (stop_token_ids,),
                "learner": (stop_token_ids,),
            }
            for seat in seats:
                more = more_of.get(seat.role, ())
                actors.setdefault(seat.role, []).append(_start(config, seat, room, run_folder, *more))
            loaded = _load_trained(actors, shares_gpus(seats), slots)
            pids = wait_until_ready(actors, patience, show, loaded)
            roles = Roles(actors, [pid for role in pids.values() for pid in role], room, run_folder, slots)
            if gets_weights:
                channels = [rank.open_channel.remote(roles.engines, transport) for rank in roles.learners]
                get(channels, what="the channel to the engines", timeout_seconds=patience)
            yield roles
        finally:
            stop([handle for handles in actors.values() for handle in handles])


def _load_trained(actors: Mapping[str, list[ActorHandle]], takes_turns: bool, slots: SlotPlan | None) -> list[ObjectRef]:
    """Have the ranks of the trained models meet and load: beside the engines' start, or, where memory is short, once the engines sleep.

    Returns:
        What to wait for.
    """
    slept = [engine.sleep.remote() for engine in actors["rollout"]] if takes_turns else []
    first = slept if slots is not None and slots.offloads_trained else []
    loaded = []
    for ranks in [actors[role] for role in TRAINED if role in actors]:
        meeting = ranks[0].rendezvous.remote(*first)
        loaded += [rank.connect.remote(meeting) for rank in ranks]
    return [*slept, *loaded]


def _beside(work: Callable[..., T], *args) -> Future[T]:
    """Work in a thread, while this one waits for Ray."""
    pool = ThreadPoolExecutor(max_workers=1)
    begun = pool.submit(work, *args)
    pool.shutdown(wait=False)
    return begun


def plan_memory(config: Config, room: Room, roles: Mapping[str, RolePlan]) -> SlotPlan | None:
    """The memory of the GPUs of some actors; None where NVIDIA's library does not tell their size.

    Args:
        roles: of `predict_roles`.

    Raises:
        ResourceError: the actors are too large for their GPUs.
    """
    sizes = [card.memory_gib for card in room.cards.values()]
    if None in sizes:
        return None
    slots = plan_slots(config, [seat for seat in room.seats if seat.role in roles], roles, min(sizes))
    check_fit(slots, roles, config)
    return slots


def _start(config: Config, seat: Seat, room: Room, run_folder: str, *more) -> ActorHandle:
    section = ROLE_SECTIONS.get(seat.role)
    settings = RoleConfig() if section is None else getattr(config, section)
    return spawn(CLASSES[seat.role], seat, room, environment(settings), config, seat.index, run_folder, *more, run_folder=run_folder)
