"""Turns on a GPU that engines and trained models share: who sleeps, leaves and comes back when, and a line where memory is still held."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from dvpo_ray.actors.frozen import FrozenModel
from dvpo_ray.actors.roles import Roles
from dvpo_ray.config import Config
from dvpo_ray.errors import ResourceError
from dvpo_ray.planning.memory import GIB, PROCESS_BYTES
from dvpo_ray.planning.placement import Seat
from dvpo_ray.planning.slots import GENERATE, UPDATE, SlotPlan
from dvpo_ray.runtime.room import Room
from dvpo_ray.runtime.waiting import patience
from dvpo_ray.training import stages, turns
from dvpo_ray.training.stages import Stages
from dvpo_ray.training.turns import Turns

OWN = PROCESS_BYTES["gpu"]
PLAN = SlotPlan(
    capacity=80 * GIB,
    phases={phase: {0: {"rollout-0": OWN, "reference-0": 10 * GIB + OWN, "learner-0": 60 * GIB + OWN}} for phase in (GENERATE, UPDATE)},
    resting={phase: {0: {"rollout-0": OWN, "reference-0": 10 * GIB + OWN, "learner-0": 40 * GIB + OWN}} for phase in (GENERATE, UPDATE)},
    cache_gib=4.0,
)


class Handle:
    """Stands in for an actor: writes down what it is asked, and answers at once."""

    def __init__(self, name: str, calls: list[str], memory: tuple[int, int, int]) -> None:
        self.name, self.calls, self.memory = name, calls, memory

    def __getattr__(self, method: str):
        return type("Method", (), {"remote": lambda _, *args: self._answer(method, *args)})()

    def _answer(self, method: str, *args):
        if method == "gpu_memory":
            return self.memory
        self.calls.append(" ".join((self.name, method, *map(str, args))))
        return True


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(turns, "get", lambda refs, *, what: refs)


def actors(plan: SlotPlan | None, slots: tuple[int, ...] = (0,), free: int = 30, reserved: dict[str, int] | None = None) -> tuple[Turns, list[str]]:
    """Actors on a GPU, and the calls that they get."""
    calls: list[str] = []
    seats = [Seat(role, 0, 1, slots) for role in ("rollout", "reference", "learner")] + [Seat("experience", 0, 0)]
    held = {"reference": 10, "learner": 40} | (reserved or {})
    by_role = {seat.role: [Handle(seat.role, calls, (free * GIB, 80 * GIB, held.get(seat.role, 0) * GIB))] for seat in seats}
    return Turns(Roles(by_role, [], Room(None, seats, seats, {}), "run", plan)), calls


def step(turns: Turns) -> None:
    turns.sampled()
    turns.scored()
    turns.updated()
    turns.synced()


def test_without_a_shared_gpu_nobody_is_asked_anything():
    turns, calls = actors(None, slots=())
    step(turns)
    assert calls == [] and turns.engines_are_whole


def test_engines_sleep_from_the_last_rollout_to_the_sync():
    turns, calls = actors(None)
    turns.synced()
    turns.sampled()
    assert not turns.engines_are_whole  # they lost their weights
    turns.scored()
    turns.updated()
    turns.synced()
    assert turns.engines_are_whole
    assert [call for call in calls if call.startswith("rollout")] == [
        *("rollout wake cache", "rollout sleep", "rollout wake weights", "rollout wake cache"),
    ]


def test_memory_that_torch_keeps_goes_to_the_next():
    turns, calls = actors(PLAN, free=30)
    step(turns)
    assert calls == [
        *("rollout sleep", "reference release", "learner release", "rollout wake weights"),
        *("learner release", "rollout wake cache"),
    ]


def test_models_leave_and_come_back_as_the_plan_says():
    turns, calls = actors(replace(PLAN, offloads_trained=True, offloads_frozen=True))
    turns.sampled()
    assert not turns.trained_are_away
    turns.scored()
    turns.updated()
    turns.synced()
    assert turns.trained_are_away
    assert calls == [
        *("rollout sleep", "learner reload", "reference offload", "learner release", "rollout wake weights"),
        *("learner offload", "reference reload", "rollout wake cache"),
    ]


def test_models_that_are_away_come_back_to_be_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "get", lambda refs, **_: refs)
    turns, calls = actors(replace(PLAN, offloads_trained=True))
    loop = object.__new__(Stages)
    loop.config, loop.roles, loop.turns, loop.policy_version = Config(model={"path": "m"}), turns.roles, turns, 3
    loop.sync(3)
    del calls[:]
    loop.save(tmp_path)
    assert [call.split(str(tmp_path))[0].strip() for call in calls] == [
        *("rollout sleep", "learner reload", "learner save_checkpoint", "learner release", "rollout wake weights"),
        *("learner sync_weights 3 True", "learner offload", "rollout wake cache"),
        *("rollout stats", "reference stats", "learner stats", "experience stats"),  # so that nothing of this counts for the next step
    ]


def test_an_interrupted_run_does_not_wait_for_engines_that_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "get", lambda refs, **_: refs)
    turns, calls = actors(replace(PLAN, offloads_trained=True))
    monkeypatch.setattr(stages, "stop", lambda handles: calls.extend(f"{handle.name} stopped" for handle in handles))
    loop = object.__new__(Stages)
    loop.config, loop.roles, loop.turns = Config(model={"path": "m"}), turns.roles, turns
    turns.synced()
    del calls[:]
    loop.save_at_the_end(tmp_path)
    assert calls == ["rollout stopped", "learner reload", f"learner save_checkpoint {tmp_path / 'learner'}"]
    del calls[:]
    loop.save_at_the_end(tmp_path)  # trained models that are there are saved as they are
    assert calls == [f"learner save_checkpoint {tmp_path / 'learner'}"]


def test_lent_gpus_are_empty():
    turns, calls = actors(PLAN)
    with turns.lent():
        assert calls == ["rollout sleep", "learner offload", "reference offload"]
    assert calls[3:] == ["learner reload", "reference reload"] and not turns.engines_are_whole
    turns, calls = actors(replace(PLAN, offloads_trained=True))
    turns.synced()
    with turns.lent():
        assert calls[-2:] == ["rollout sleep", "reference offload"]  # the learner is away already
    assert not turns.trained_are_away


def test_memory_that_is_still_held_is_said_once_with_its_holder():
    said: list[str] = []
    turns, _ = actors(PLAN, free=21, reserved={"reference": 17})
    with patience(say=said.append):
        step(turns)
        step(turns)
    assert said == ["GPU 0 has 21.0 GiB free before the update, where 28.2 were planned: reference-0 has 7.0 GiB more than planned"]


def test_a_phase_that_cannot_fit_is_refused():
    turns, _ = actors(PLAN, free=15)  # what no torch process holds is the engine's, which did not free it
    with pytest.raises(ResourceError, match=r"rollout-0 has 13\.2 GiB more than planned, and the update needs 20\.0 GiB; set offload=always"):
        turns.scored()


def test_an_offloaded_frozen_model_computes_the_same_when_it_is_back(monkeypatch):
    monkeypatch.setattr("dvpo_ray.actors.frozen.default_device", lambda: torch.device("cpu"))
    frozen = object.__new__(FrozenModel)
    frozen.model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    frozen.model[1].weight = frozen.model[0].weight  # tied weights leave and come back together
    rows, weight = torch.randn(2, 3), frozen.model[0].weight
    before = frozen.model(rows).detach().numpy()
    for _ in range(2):
        frozen.offload()
        assert weight.untyped_storage().nbytes() == 0
        frozen.reload()
    np.testing.assert_array_equal(frozen.model(rows).detach().numpy(), before)
    assert frozen.model[1].weight is weight is frozen.model[0].weight
