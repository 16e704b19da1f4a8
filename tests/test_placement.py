"""GPU slots: which actor is on which GPU, how weights travel between them, and the GPUs that Ray gives."""

from __future__ import annotations

import os

import pytest

from dvpo_ray.config import Config
from dvpo_ray.config.schema import GVMConfig, PolicyConfig, RayConfig, RoleConfig, RolloutConfig, ScorerConfig
from dvpo_ray.errors import HeadGone, InputError, ResourceError
from dvpo_ray.planning.placement import (
    Seat,
    choose_transport,
    placement_lines,
    plan_placement,
    plan_training_placement,
    shares_gpus,
    total_resources,
)
from dvpo_ray.runtime import room as rooms
from dvpo_ray.runtime.process import Actor, environment
from dvpo_ray.runtime.room import Card, reserved, spawn, stop, wait_until_ready
from dvpo_ray.runtime.waiting import get, patience


def make(**sections) -> Config:
    return Config(model={"path": "some/model"}, **sections)


def on_gpus(learners: int = 2, engines: int = 2, shards: int = 1, **settings) -> Config:
    return make(
        rollout={"num_actors": engines, "tensor_parallel_size": shards, "gpus_per_actor": 1, "cpus_per_actor": 3},
        scorer={"gpus_per_actor": 1},
        reference={"gpus_per_actor": 1},
        policy={"num_actors": learners, "gpus_per_actor": 1},
        **settings,
    )


# ------------------------------------------------------------------------------------------------- who is where


def test_colocated_roles_begin_at_the_first_gpu():
    seats = plan_placement(on_gpus(shards=2))
    assert seats == [
        Seat("rollout", 0, 3, (0, 1)),
        Seat("rollout", 1, 3, (2, 3)),
        Seat("scorer", 0, 1, (0,)),
        Seat("reference", 0, 1, (0,)),
        Seat("learner", 0, 1, (0,)),
        Seat("learner", 1, 1, (1,)),
        Seat("experience", 0, 0),
    ]
    assert total_resources(seats) == (10, 4) and shares_gpus(seats)
    assert placement_lines(seats)[-4:] == ["GPU 0: rollout-0, scorer-0, reference-0, learner-0", "GPU 1: rollout-0, learner-1"] + [
        f"GPU {slot}: rollout-1" for slot in (2, 3)
    ]


def test_separate_groups_have_gpus_of_their_own():
    seats = plan_placement(on_gpus(shards=2, placement="separate", algorithm="ppo", critic={"num_actors": 3, "gpus_per_actor": 1}))
    slots = {seat.name: seat.slots for seat in seats}
    assert slots == {
        "rollout-0": (0, 1),
        "rollout-1": (2, 3),
        "reward_model-0": (4,),
        "reference-0": (4,),
        "learner-0": (5,),
        "learner-1": (6,),
        "critic-0": (5,),
        "critic-1": (6,),
        "critic-2": (7,),
        "experience-0": (),
    }
    assert total_resources(seats)[1] == 8 and not shares_gpus(seats)


def test_no_two_ranks_of_a_role_share_a_gpu():
    """NCCL refuses two of its processes on one GPU."""
    for seats in (plan_training_placement(GVMConfig(num_actors=3, gpus_per_actor=2, cpus_per_actor=2)), plan_placement(on_gpus(3, 2))):
        for role in {seat.role for seat in seats}:
            slots = [slot for seat in seats if seat.role == role for slot in seat.slots]
            assert len(slots) == len(set(slots))
    assert plan_training_placement(GVMConfig(num_actors=2, gpus_per_actor=2)) == [
        Seat("gvm_trainer", 0, 1, (0, 1)),
        Seat("gvm_trainer", 1, 1, (2, 3)),
    ]


def test_a_cpu_run_has_no_slots():
    seats = plan_placement(make())
    assert all(not seat.slots for seat in seats) and not shares_gpus(seats) and placement_lines(seats)[-1] == "total        4 CPUs, 0 GPUs"


# ---------------------------------------------------------------------------------------------------- transport


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (make(), "object_store"),
        (on_gpus(learners=2, engines=2), "ipc"),
        (on_gpus(learners=3, engines=2), "ipc"),
        (on_gpus(learners=1, engines=2), "object_store"),  # the second engine has no rank beside it, and NCCL can't have the first GPU twice
        (on_gpus(learners=4, engines=1, shards=2), "object_store"),
        (on_gpus(placement="separate"), "nccl"),
        (on_gpus(placement="separate", shards=2), "nccl"),
        (make(rollout={"gpus_per_actor": 1, "backend": "transformers"}, policy={"gpus_per_actor": 1}), "object_store"),
        (make(rollout={"gpus_per_actor": 1}), "object_store"),
        (on_gpus(weight_sync={"transport": "object_store"}), "object_store"),
        (make(policy={"lora": {"rank": 512}}, weight_sync={"transport": "adapters"}), "adapters"),
    ],
)
def test_transport_follows_from_who_shares_a_gpu(config, expected):
    assert choose_transport(config) == expected


@pytest.mark.parametrize(
    ("transport", "config", "problem"),
    [
        ("ipc", on_gpus(learners=1), "rollout-1 is on GPU 1, where no rank of the learner is"),
        ("ipc", on_gpus(placement="separate"), "rollout-0 is on GPU 0, where no rank of the learner is"),
        ("ipc", on_gpus(shards=2), "rollout.tensor_parallel_size is 2, and CUDA IPC takes engines of one GPU"),
        ("nccl", on_gpus(), "rollout-0 and learner-0 are both on GPU 0 (placement: colocated)"),
        ("nccl", make(), "rollout.gpus_per_actor is 0"),
        ("adapters", make(), "policy.lora is not set"),
        ("adapters", make(policy={"lora": {"rank": 8}}, rollout={"backend": "transformers"}), "rollout.backend is transformers"),
        ("adapters", make(policy={"lora": {"rank": 513}}), "policy.lora.rank is 513, and vLLM takes at most 512"),
    ],
)
def test_a_transport_that_the_placement_does_not_allow_is_refused(transport, config, problem):
    asked = config.model_copy(update={"weight_sync": config.weight_sync.model_copy(update={"transport": transport})})
    with pytest.raises(InputError) as refused:
        choose_transport(asked)
    assert str(refused.value) == f"weight_sync.transport is {transport}, but {problem}; set weight_sync.transport=auto"


# -------------------------------------------------------------------------------------------------- processes


def test_settings_of_the_allocator_are_those_of_the_device():
    on_cpu, on_gpu = (environment(RoleConfig(gpus_per_actor=gpus)) for gpus in (0, 1))
    assert "MALLOC_MMAP_MAX_" in on_cpu and "PYTORCH_CUDA_ALLOC_CONF" not in on_cpu
    assert "MALLOC_MMAP_MAX_" not in on_gpu and on_gpu["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert on_cpu["OMP_NUM_THREADS"] == on_gpu["OMP_NUM_THREADS"] == "1"
    assert environment(ScorerConfig(gpus_per_actor=1)) == on_gpu
    for role in (RolloutConfig(gpus_per_actor=1), PolicyConfig(gpus_per_actor=1)):  # vLLM's sleep, and CUDA IPC
        assert "PYTORCH_CUDA_ALLOC_CONF" not in environment(role)
    assert not [name for name in environment(RolloutConfig(gpus_per_actor=1)) if name.startswith("VLLM_CPU")]


def test_gpus_are_ordered_by_node_and_number():
    cards = [Card(*place, None, bundle) for bundle, place in enumerate([("10.0.0.10", "b", "0"), ("10.0.0.9", "a", "10"), ("10.0.0.9", "a", "9")])]
    assert [card.bundle for card in sorted(cards, key=lambda card: card.order)] == [2, 1, 0]


def test_the_gpus_of_an_actor_are_on_one_node():
    cards = {slot: Card(f"10.0.0.{slot // 2}", str(slot // 2), str(slot % 2), None, slot) for slot in range(4)}
    rooms._check_nodes([Seat("rollout", 0, 1, (0, 1)), Seat("rollout", 1, 1, (2, 3))], cards)
    with pytest.raises(
        ResourceError, match=r"^rollout-1 needs 2 GPUs of one node, but Ray gave 1 on 10\.0\.0\.0, 1 on 10\.0\.0\.1; lower rollout\.tensor"
    ):
        rooms._check_nodes([Seat("rollout", 0, 1, (0,)), Seat("rollout", 1, 1, (1, 2))], cards)


def test_the_start_of_actors_ends_with_the_head(monkeypatch):
    monkeypatch.setattr(rooms, "HEAD_PERIOD_SECONDS", 0.0)
    monkeypatch.setattr(rooms.ray, "wait", lambda refs, **_: ([], list(refs)))
    monkeypatch.setattr(rooms, "get", lambda refs, **_: refs)
    monkeypatch.setattr("dvpo_ray.runtime.waiting.time.sleep", lambda seconds: None)

    class Silent:
        class ready:  # noqa: N801
            remote = staticmethod(object)

    monkeypatch.setattr(rooms, "known", lambda handle: ("learner-0", rooms.Path("no log")))
    with patience(head="127.0.0.1:9"), pytest.raises(HeadGone, match="was gone during the start of the actors"):
        wait_until_ready({"learner": [Silent()]}, timeout_seconds=60)


# ------------------------------------------------------------------------------------------------------ on Ray


class Looker(Actor):
    """An actor that tells what it sees."""

    def sees(self) -> tuple[str | None, int]:
        return os.environ.get("CUDA_VISIBLE_DEVICES"), os.getpid()


def look(seats: list[Seat], settings: RayConfig, folder) -> tuple[list[str], list]:
    """What the actors of some seats see, and the cards of their slots; afterwards their processes are gone."""
    with reserved(seats, settings) as room:
        handles = {seat: spawn(Looker, seat, room, {}, seat.index, str(folder), run_folder=str(folder)) for seat in seats}
        try:
            pids = wait_until_ready({seat.name: [handle] for seat, handle in handles.items()}, 120)
            seen = [get(handle.sees.remote(), what="a look") for handle in handles.values()]
            assert [[pid] for _, pid in seen] == list(pids.values())
        finally:
            stop(list(handles.values()))
        assert not [pid for _, pid in seen if os.path.exists(f"/proc/{pid}")]
        return [visible for visible, _ in seen], list(room.cards.values())


@pytest.mark.slow
def test_each_actor_sees_the_gpus_of_its_slots(tmp_path):
    from dvpo_ray.runtime.cluster import connect

    settings = RayConfig(num_cpus=4, num_gpus=2, object_store_gib=0.1)
    seats = [
        Seat("rollout", 0, 1, (0, 1)),
        Seat("learner", 0, 1, (0,)),
        Seat("learner", 1, 1.5, (1,)),
        Seat("scorer", 0, 0.5),
        Seat("experience", 0, 0),
    ]
    with connect(settings):
        visible, cards = look(seats, settings, tmp_path)
        assert visible == ["0,1", "0", "1", "", ""]
        assert [card.gpu for card in cards] == ["0", "1"] and cards[0].node == cards[1].node
        assert look(seats, settings, tmp_path)[0] == visible  # their names and their room are free again
        with pytest.raises(ResourceError, match=r"^the run needs 1 CPU and 3 GPUs, but the Ray cluster has 4 CPUs and 2 GPUs in all; "):
            look([Seat("rollout", 0, 1, (0, 1, 2))], settings, tmp_path)
