"""The memory of each GPU: who has how much of it, and, where engines and trained models share GPUs, how they take turns.

    rollouts   engines awake, frozen models at work; trained models wait
    scoring    engines asleep; frozen models still at work, trained models are back
    sync       the learner's weights beside the engines' new ones
    update     trained models at work; engines asleep

The plan sizes the KV cache and decides who goes to host memory meanwhile. Ray knows nothing of this memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from dvpo_ray.config.schema import Config
from dvpo_ray.planning.memory import GIB, PROCESS_BYTES, RolePlan
from dvpo_ray.planning.placement import GROUPS, Seat, choose_transport, shares_gpus

GENERATE, SCORE, SYNC, UPDATE, STEP = "rollouts", "scoring", "sync", "update", "step"
"""Phases; `step` is all of them where nobody takes turns."""
SPARE_SHARE = 0.05
"""Of a GPU, for what no arithmetic sees: fragments, buffers of libraries."""

Contents = dict[int, dict[str, int]]
"""Bytes of each actor, by its name, on each slot."""


@dataclass(frozen=True)
class SlotPlan:
    """Who has how much of each GPU.

    Attributes:
        capacity: bytes of one GPU.
        phases: the contents of the GPUs in each phase at their largest.
        resting: the same while nobody works: models and caches alone.
        cache_gib: KV cache on each GPU of an engine; None where engines measure what they can have.
        offloads_trained: trained models are in host memory while engines sample.
        offloads_frozen: frozen models are in host memory from the end of scoring to the next rollouts.
        offloads_engines: engines that sleep have their weights in host memory, else they have none.
    """

    capacity: int
    phases: dict[str, Contents]
    resting: dict[str, Contents]
    cache_gib: float | None = None
    offloads_trained: bool = False
    offloads_frozen: bool = False
    offloads_engines: bool = False

    @property
    def fullest(self) -> tuple[str, int]:
        """Phase and slot of the GPU that has least left."""
        return max(((phase, slot) for phase in self.phases for slot in self.phases[phase]), key=lambda place: self.used(*place))

    def used(self, phase: str, slot: int) -> int:
        return sum(self.phases[phase][slot].values())

    @property
    def fits(self) -> bool:
        return self.used(*self.fullest) <= self.capacity

    @property
    def away(self) -> tuple[str, ...]:
        """Roles whose models are in host memory in a part of each step."""
        leaves = (self.offloads_engines, self.offloads_frozen, self.offloads_trained)
        return tuple(role for roles, away in zip(GROUPS, leaves, strict=True) if away for role in roles)

    @property
    def lines(self) -> list[str]:
        """The turns, for people; nothing where there are none."""
        if self.cache_gib is None:
            return []
        waiting = {
            "engines in their sleep": self.offloads_engines,
            "trained models while engines sample": self.offloads_trained,
            "frozen models during the update": self.offloads_frozen,
        }
        away = " and ".join(who for who, leaves in waiting.items() if leaves)
        return [f"engines sleep during the update; cache {self.cache_gib:.2f} GiB; in host memory: {away or 'nobody'}"]


def plan_slots(config: Config, seats: Sequence[Seat], roles: Mapping[str, RolePlan], gpu_memory_gib: float) -> SlotPlan:
    """The plan for the GPUs of some seats.

    Models stay where they are if there is memory. With `offload: auto` trained models are off-loaded where the cache would else hold
    fewer than half of the sequences that an engine decodes together in a step, and frozen models where the rest would else not fit.

    Args:
        roles: of `predict_roles`; its cache is the most that an engine needs.
        gpu_memory_gib: of each GPU.
    """
    capacity = round(gpu_memory_gib * GIB)
    usable = round((1 - SPARE_SHARE) * capacity)
    if not shares_gpus(seats):
        return SlotPlan(capacity, *({STEP: _contents(seats, roles, STEP, at_work=at_work)} for at_work in (True, False)))
    either = {"auto": (False, True), "always": (True,), "never": (False,)}[config.offload]
    engine = roles["rollout"]
    wanted = engine.per_actor.cache // (config.rollout.gpus_per_actor * config.rollout.tensor_parallel_size)
    engines = [(slot, seat.name) for seat in seats if seat.role in GROUPS[0] for slot in seat.slots]
    for trained, frozen in product(either, either):
        gone = GROUPS[1] if frozen else ()
        away = {GENERATE: GROUPS[2] if trained else (), SCORE: (), SYNC: gone, UPDATE: gone}
        phases, resting = ({phase: _contents(seats, roles, phase, away[phase], at_work=at_work) for phase in away} for at_work in (True, False))
        left = usable - max(sum(phases[GENERATE][slot].values()) for slot, _ in engines)
        # At least for two sequences, because vLLM keeps a block for itself.
        cache = wanted if config.rollout.kv_cache_gib is not None else min(wanted, max(2 * wanted // engine.sequences_at_most, left))
        for slot, name in engines:
            phases[GENERATE][slot][name] += cache
            resting[GENERATE][slot][name] += cache
        plan = SlotPlan(capacity, phases, resting, cache / GIB, trained, frozen, choose_transport(config) == "adapters")
        if plan.used(*plan.fullest) <= usable and 2 * cache * engine.sequences_at_most >= wanted * engine.sequences:
            break
    return plan


def _contents(seats: Sequence[Seat], roles: Mapping[str, RolePlan], phase: str, away: Sequence[str] = (), *, at_work: bool) -> Contents:
    """Who has how much in a phase, without the cache where engines take turns.

    Args:
        away: roles that are in host memory.
        at_work: with activations and gradients, else only what stays.
    """
    contents: Contents = {slot: {} for slot in sorted({slot for seat in seats for slot in seat.slots})}
    for seat in seats:
        for slot in seat.slots:
            held = 0 if seat.role in away else _held(seat.role, roles[seat.role], phase, at_work)
            contents[slot][seat.name] = round(held / len(seat.slots)) + PROCESS_BYTES["gpu"] + roles[seat.role].graphs
    return contents


def _held(role: str, plan: RolePlan, phase: str, at_work: bool) -> int:
    memory = plan.per_actor
    most = memory.model_state - memory.offloaded + (memory.activations or 0)
    at_rest = min(memory.parameters + memory.optimizer, memory.model_state - memory.offloaded)  # gradients are in the update alone
    if phase == STEP:
        return (most if at_work else at_rest) + memory.cache
    if role in GROUPS[0] and phase in (SCORE, UPDATE) and plan.sleeps:
        return 0
    works = {GENERATE: (*GROUPS[0], *GROUPS[1]), SCORE: GROUPS[1], SYNC: GROUPS[0], UPDATE: GROUPS[2]}[phase]
    return most if at_work and role in works else at_rest
