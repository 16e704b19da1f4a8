"""Turns on GPUs that engines and trained models share, between the stages of a step. Nothing happens where they share none, as on a CPU.

    sampled    engines sleep; trained models come back
    scored     frozen models leave                          before the update
    updated    engines take memory for new weights          before the sync
    synced     trained models leave, frozen ones come back; engines take memory for their cache

Models leave for host memory, and only where the plan says that GPU memory is short. Those that stay give back what torch keeps for
later.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from ray.actor import ActorHandle

from dvpo_ray.actors.roles import Roles
from dvpo_ray.errors import ResourceError
from dvpo_ray.planning.memory import GIB, PROCESS_BYTES
from dvpo_ray.planning.slots import GENERATE, UPDATE
from dvpo_ray.runtime.waiting import get, say

TOLERANCE = 0.08
"""Share of a GPU that may be in use beyond the plan before a line says so."""


class Turns:
    """Who has the memory of the GPUs, as the roles' plan says. At the start the engines are asleep.

    Attributes:
        engines_are_whole: they have all weights. An engine loses its own in its sleep.
        trained_are_away: the trained models are in host memory.

    Args:
        may_offload: everybody may go to host memory when the GPUs are lent.
    """

    def __init__(self, roles: Roles, may_offload: bool = True) -> None:
        self.roles = roles
        self.plan = roles.slots
        self.may_offload = may_offload and self.plan is not None
        self.engines_are_whole = False
        self.trained_are_away = False
        self._slot_of = {seat.name: seat.slots[0] for seat in roles.room.seats if seat.slots}
        self._warned: set[str] = set()

    def sampled(self) -> None:
        """The engines have no more prompts."""
        if self.roles.takes_turns:
            self._sleep()
            self.trained_return()

    def trained_return(self) -> None:
        """Trained models come back, where the plan has them away; the engines' memory is free."""
        if self._offloads("trained"):
            _all(self._on_gpus(self.roles.trained), "reload")
        self.trained_are_away = False

    def scored(self) -> None:
        """The frozen models have no more rollouts."""
        if self.roles.takes_turns:
            _all(self._on_gpus(self.roles.frozen), "offload" if self._offloads("frozen") else "release")
            self._check(UPDATE)

    def updated(self) -> None:
        """The engines are to have new weights."""
        if self.roles.takes_turns:
            _all(self._on_gpus(self.roles.trained), "release")
            _all({"rollout": self.roles.engines}, "wake", "weights")

    def synced(self) -> None:
        """The engines have the new weights."""
        self.engines_are_whole = True
        if self.roles.takes_turns:
            self.trained_are_away = self._offloads("trained")
            _all(self._on_gpus(self.roles.trained), "offload" if self.trained_are_away else "release")
            if self._offloads("frozen"):
                _all(self._on_gpus(self.roles.frozen), "reload")
            _all({"rollout": self.roles.engines}, "wake", "cache")
            self._check(GENERATE)

    @contextmanager
    def lent(self) -> Iterator[None]:
        """For the time of a `with` block others have the memory of the GPUs. The engines sleep, so they need a sync afterwards."""
        self._sleep()
        if self.may_offload:
            _all(self._on_gpus(({} if self.trained_are_away else self.roles.trained) | self.roles.frozen), "offload")
        yield
        if self.may_offload:
            _all(self._on_gpus(self.roles.trained | self.roles.frozen), "reload")  # some may be new
            self.trained_are_away = False

    def _on_gpus(self, actors: Mapping[str, list[ActorHandle]]) -> dict[str, list[ActorHandle]]:
        return {role: handles for role, handles in actors.items() if f"{role}-0" in self._slot_of}

    def _offloads(self, models: str) -> bool:
        return self.plan is not None and getattr(self.plan, f"offloads_{models}")

    def _sleep(self) -> None:
        if any(_all({"rollout": self.roles.engines}, "sleep")):
            self.engines_are_whole = False

    def _check(self, phase: str) -> None:
        """Look whether what should be free before a phase is free.

        Raises:
            ResourceError: so little is free that the phase would fail; names who has the memory.
        """
        if self.plan is None:
            return
        # Of engines nobody is asked: their memory comes and goes below torch, and they are the rest.
        others = self._on_gpus(self.roles.frozen | self.roles.trained)
        names = [f"{role}-{index}" for role, handles in others.items() for index in range(len(handles))]
        found = dict(zip(names, _all(others, "gpu_memory"), strict=True))
        for slot, planned in self.plan.resting[phase].items():
            here = [name for name in names if self._slot_of[name] == slot]
            if not here:
                continue
            free, total, _ = found[here[0]]
            beyond = total - free - sum(planned.values())
            if beyond < TOLERANCE * total:
                continue
            more = {name: found[name][2] + PROCESS_BYTES["gpu"] - planned[name] for name in here}
            more |= {name: beyond - sum(more.values()) for name in planned if name not in names}
            holder = max(more, key=more.__getitem__)
            needed = self.plan.used(phase, slot) - sum(planned.values())
            line = (
                f"GPU {slot} has {free / GIB:.1f} GiB free before the {phase}, where {(total - sum(planned.values())) / GIB:.1f} were planned: "
                f"{holder} has {more[holder] / GIB:.1f} GiB more than planned"
            )
            if free < needed:
                raise ResourceError(f"{line}, and the {phase} needs {needed / GIB:.1f} GiB; set offload=always, or lower micro_batch_tokens")
            if holder not in self._warned:
                self._warned.add(holder)
                say(line)


def _all(actors: Mapping[str, list[ActorHandle]], method: str, *args) -> list:
    """What a method of all actors returns, in their order."""
    pending = [getattr(handle, method).remote(*args) for handles in actors.values() for handle in handles]
    return get(pending, what=f"`{method}` of {', '.join(actors)}")
