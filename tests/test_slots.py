"""The memory plan of GPUs: who has how much of each, the size of the cache, and who goes to host memory meanwhile."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dvpo_ray.config.schema import Config
from dvpo_ray.errors import ResourceError
from dvpo_ray.planning.architecture import Architecture
from dvpo_ray.planning.memory import (
    GIB,
    PROCESS_BYTES,
    ActorMemory,
    RolePlan,
)
from dvpo_ray.planning.placement import plan_placement
from dvpo_ray.planning.report import check_fit, in_host_memory, on_gpus
from dvpo_ray.planning.slots import GENERATE, SCORE, SYNC, UPDATE, plan_slots

SIZES = Architecture(1000, 1000, 40, 800, 2, 2, 8, 8, 16, 10)


def _role(size: int) -> RolePlan:
    return RolePlan(SIZES, 1, ActorMemory(parameters=size))


def plan_of(gpu_memory_gib: float, roles: dict[str, RolePlan], **settings):
    gpus = {role: {"gpus_per_actor": 1} for role in ("rollout", "scorer", "reference", "policy")}
    config = Config(model={"path": "m"}, **{name: value | settings.pop(name, {}) for name, value in gpus.items()}, **settings)
    return config, plan_slots(config, [seat for seat in plan_placement(config) if seat.role in roles], roles, gpu_memory_gib)


LEARNER = RolePlan(SIZES, 1, ActorMemory(parameters=2 * GIB, gradients=GIB, optimizer=6 * GIB, activations=GIB))
ENGINE = RolePlan(SIZES, 1, ActorMemory(parameters=2 * GIB, cache=8 * GIB), sequences=4, sequences_at_most=8, sleeps=True)
ON_ONE_GPU = {"rollout": ENGINE, "scorer": _role(2 * GIB), "reference": _role(2 * GIB), "learner": LEARNER}
OWN = PROCESS_BYTES["gpu"]


def test_roles_on_gpus_of_their_own_have_all_they_need_at_once():
    _, plan = plan_of(16, ON_ONE_GPU, placement="separate", rollout={"tensor_parallel_size": 2})
    assert [(place.name, place.contents) for place in on_gpus(plan)] == [
        ("GPU 0", {"rollout-0": 5 * GIB + OWN}),
        ("GPU 1", {"rollout-0": 5 * GIB + OWN}),
        ("GPU 2", {"scorer-0": 2 * GIB + OWN, "reference-0": 2 * GIB + OWN}),
        ("GPU 3", {"learner-0": 10 * GIB + OWN}),
    ]
    assert plan.cache_gib is None and not plan.lines and not plan.away


def test_on_a_shared_gpu_the_cache_is_what_the_others_leave():
    _, plan = plan_of(40, ON_ONE_GPU)
    assert plan.cache_gib == 8 and not plan.away  # all that it needs
    assert plan.phases[GENERATE][0] == {
        "rollout-0": 10 * GIB + OWN,
        "scorer-0": 2 * GIB + OWN,
        "reference-0": 2 * GIB + OWN,
        "learner-0": 8 * GIB + OWN,
    }
    assert plan.phases[UPDATE][0] == {"rollout-0": OWN, "scorer-0": 2 * GIB + OWN, "reference-0": 2 * GIB + OWN, "learner-0": 10 * GIB + OWN}
    assert plan.phases[SYNC][0]["rollout-0"] == 2 * GIB + OWN
    assert plan.phases[SCORE][0] == plan.phases[GENERATE][0] | {"rollout-0": OWN}
    assert plan.resting[UPDATE][0]["learner-0"] == 8 * GIB + OWN  # without gradients and activations
    _, tighter = plan_of(20, ON_ONE_GPU)
    assert 20 * 0.95 - tighter.used(GENERATE, 0) / GIB == pytest.approx(0, abs=1e-6) and not tighter.away
    assert tighter.cache_gib == pytest.approx(19 - 14 - 4 * OWN / GIB)
    _, given = plan_of(40, ON_ONE_GPU, rollout={"kv_cache_gib": 8})
    assert given.cache_gib == 8


def test_who_is_in_host_memory_follows_from_the_memory_of_the_gpu():
    larger = ON_ONE_GPU | {"learner": RolePlan(SIZES, 1, ActorMemory(2 * GIB, GIB, 6 * GIB, activations=6 * GIB))}
    config, plan = plan_of(20.5, larger)  # the update would not fit beside the frozen models
    assert plan.offloads_frozen and not plan.offloads_trained and plan.phases[UPDATE][0]["scorer-0"] == OWN
    assert "in host memory: frozen models during the update" in plan.lines[0]
    assert plan.phases[SCORE][0]["scorer-0"] == 2 * GIB + OWN  # they leave when they have scored
    _, plan = plan_of(16.5, ON_ONE_GPU)  # beside the learner the cache would hold fewer than half of a step's sequences
    assert plan.offloads_trained and plan.cache_gib > 2 and plan.phases[GENERATE][0]["learner-0"] == OWN
    assert "in host memory: trained models while engines sample" in plan.lines[0]
    assert plan_of(80, ON_ONE_GPU, offload="always")[1].away == ("scorer", "reward_model", "reference", "learner", "critic")
    _, never = plan_of(16.5, ON_ONE_GPU, offload="never")
    assert not never.away and never.cache_gib == pytest.approx(2)  # two sequences of 8, the least
    lora = {"policy": {"lora": {}}, "weight_sync": {"transport": "adapters"}}
    _, alone = plan_of(40, ON_ONE_GPU, **lora)
    assert alone.away == ("rollout",) and "in host memory: engines in their sleep" in alone.lines[0]
    seats = plan_placement(config)
    host = in_host_memory(seats, ON_ONE_GPU, 100, plan.away)
    assert host.contents["learner-0"] == 9 * GIB + PROCESS_BYTES["cpu"]


def test_roles_that_cannot_fit_are_refused_with_the_largest():
    config, plan = plan_of(10, ON_ONE_GPU)
    with pytest.raises(ResourceError, match=r"^[\d.]+ GiB too much on GPU 0 in the scoring: learner-0 takes most \(8\.60 GiB\), .*policy\.deepspeed"):
        check_fit(plan, ON_ONE_GPU, config)
    check_fit(plan_of(40, ON_ONE_GPU)[1], ON_ONE_GPU, config)
    engine_alone = ON_ONE_GPU | {"learner": _role(GIB)}  # its cache, which it would like to have larger than its weights, is no remedy
    config, plan = plan_of(6, engine_alone)
    with pytest.raises(ResourceError, match="GPU 0 in the rollouts: rollout-0 takes most .* GiB\\), raise rollout.tensor_parallel_size, or set"):
        check_fit(plan, engine_alone, config)


def test_an_engine_keeps_its_cuda_graphs_in_its_sleep():
    plain = plan_of(40, ON_ONE_GPU)[1]
    graphs = plan_of(40, ON_ONE_GPU | {"rollout": replace(ENGINE, graphs=GIB)})[1]
    for contents in ("phases", "resting"):
        for phase, slots in getattr(plain, contents).items():
            assert getattr(graphs, contents)[phase][0] == slots[0] | {"rollout-0": slots[0]["rollout-0"] + GIB}


def test_an_engine_that_cannot_sleep_keeps_its_weights():
    _, plan = plan_of(40, ON_ONE_GPU | {"rollout": RolePlan(SIZES, 1, ActorMemory(parameters=2 * GIB, activations=GIB))})
    assert plan.phases[UPDATE][0]["rollout-0"] == 2 * GIB + OWN and plan.cache_gib == 0
