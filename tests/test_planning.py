"""`dvpo plan`: byte counts by hand, ZeRO shards, what is trained, times, and whether it fits."""

from __future__ import annotations

import json
import re

import pytest
import torch
import yaml
from cli_runs import LOCAL_CPU, without_loading
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig

from dvpo_ray import cli
from dvpo_ray.actors.roles import plan_memory
from dvpo_ray.config.schema import Config, DeepSpeedConfig, ModelConfig
from dvpo_ray.errors import ResourceError
from dvpo_ray.models.loading import load_policy
from dvpo_ray.monitoring.console import duration
from dvpo_ray.planning.architecture import Architecture, ModelPlan, critic_plan, policy_plan, value_plan
from dvpo_ray.planning.memory import (
    GIB,
    PROCESS_BYTES,
    ActorMemory,
    RolePlan,
    communication_buffers,
    logit_bytes,
    predict_roles,
    rows_together,
    scoring_activations,
    trained_state,
    training_activations,
)
from dvpo_ray.planning.placement import Seat, plan_placement
from dvpo_ray.planning.report import in_host_memory
from dvpo_ray.planning.times import Device, calibrate, choose_device, forward_flops, logit_flops, stage_seconds
from dvpo_ray.runtime.room import Card, Room

# A Llama of 2 layers: hidden 8, MLP 12, 2 heads of 4 with 1 of keys and values, 10 words, untied. By hand:
#   a layer   q 8*8, k and v 8*4 each, o 8*8, MLP 3 * 8*12 = 480; two norms of 8
#   the rest  embedding and output 10*8 each, final norm 8
MATRICES, LAYER, OUTPUT, NORM = 2 * 480, 480 + 16, 80, 8
PARAMETERS = 2 * LAYER + 2 * OUTPUT + NORM
PROJECTIONS = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
VALUE_PARAMETERS = 2 * LAYER + OUTPUT + NORM + 9  # head: 8 weights and a bias in place of the output


@pytest.fixture
def llama(tmp_path):
    LlamaConfig(
        vocab_size=10,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=4,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    ).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def config_of(llama, **sections) -> Config:
    base = {
        "model": {"path": str(llama), "dtype": "float32"},
        "data": {"max_prompt_tokens": 6},
        "rollout": {"backend": "transformers", "max_response_tokens": 4, "max_concurrent_sequences": 8},
        "batch": {"prompts_per_step": 8, "micro_batch_tokens": 20},
    }
    return Config.model_validate(
        {name: base.get(name, {}) | sections.get(name, {}) for name in base | sections if name != "algorithm"} | _top(sections)
    )


def _top(sections: dict) -> dict:
    return {"algorithm": sections["algorithm"]} if "algorithm" in sections else {}


# ------------------------------------------------------------------------------------------------- architecture


def test_a_llama_is_counted_as_by_hand(llama):
    policy = policy_plan(config_of(llama), trained=True).architecture()
    assert policy == Architecture(
        parameters=PARAMETERS,
        trained=PARAMETERS,
        kept_whole=PARAMETERS,  # no tensor here is large enough to be cut
        layer_matrices=MATRICES,
        layers=2,
        trained_layers=2,
        hidden=8,
        attention_width=8,
        cache_per_token=2 * 2 * 1 * 4,
        vocabulary=10,
    )
    assert forward_flops(policy, length=5) == 2 * MATRICES + 2 * 2 * 5 * 8  # attention: q·k and weights·v, 2 operations each, half a row
    assert logit_flops(policy) == 2 * 8 * 10


def test_partial_training_counts_what_is_trained(llama):
    last = policy_plan(config_of(llama, policy={"trainable_layers": 1}), trained=True).architecture()
    assert (last.parameters, last.trained, last.trained_layers) == (PARAMETERS, LAYER + NORM, 1)
    lora = policy_plan(config_of(llama, policy={"lora": {"rank": 2, "layers": [1], "target_modules": PROJECTIONS}}), trained=True).architecture()
    adapters = 2 * ((8 + 8) + 2 * (8 + 4) + (8 + 8) + 3 * (8 + 12))  # rank times in + out of q, k and v, o, MLP
    assert (lora.parameters, lora.trained, lora.trained_layers) == (PARAMETERS + adapters, adapters, 1)
    assert lora.layer_matrices == MATRICES


def test_value_models_are_truncated_and_have_a_head(llama):
    config = config_of(llama, gvm={"num_layers": 1}, critic={"init": "policy"})
    assert value_plan(config, "gvm").architecture().parameters == VALUE_PARAMETERS - LAYER
    assert critic_plan(config).architecture().parameters == VALUE_PARAMETERS
    assert value_plan(config, "gvm").architecture().vocabulary == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_saved_bytes_are_those_of_a_real_forward_pass(tiny_model, dtype):
    config = config_of(tiny_model, model={"dtype": dtype})
    model = load_policy(config.model).train()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.base_model(input_ids=torch.zeros(3, 20, dtype=torch.long), use_cache=False)
    real = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert output is not None
    assert policy_plan(config, trained=True).saved_bytes(3, 20) == pytest.approx(real, rel=0.15)


def test_working_bytes_are_those_of_one_layer():
    sizes = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 10}
    config = LlamaConfig(hidden_size=8, intermediate_size=512, num_hidden_layers=3, **sizes)
    plan = ModelPlan(config, False, ModelConfig(path="made", dtype="float32"))
    wide = 4 * 200 * 512  # of the MLP: the activated gate, what it gates, and their product
    assert 3 * wide <= plan.working_bytes(2, 100) < 3.2 * wide
    assert plan.saved_bytes(2, 100) > 3 * 3 * wide  # of all layers


def test_a_frozen_half_keeps_no_activations(tiny_model):
    whole = policy_plan(config_of(tiny_model), trained=True).saved_bytes(3, 20)
    half = policy_plan(config_of(tiny_model, policy={"trainable_layers": 1}), trained=True).saved_bytes(3, 20)
    assert 0.4 * whole < half < 0.7 * whole


# ------------------------------------------------------------------------------------------------------- memory

SIZES = Architecture(1000, 1000, 40, 800, 2, 2, 8, 8, 16, 10)


@pytest.mark.parametrize(
    ("element_bytes", "stage", "ranks", "parameters", "gradients", "optimizer"),
    [
        (4, 0, 1, 4000, 4000, 8000),  # float32: moments only
        (4, 0, 4, 4000, 4000, 8000),  # nothing is sharded
        (4, 1, 1, 4000, 4000, 12000),  # DeepSpeed keeps master weights beside float32 weights too
        (2, 0, 1, 2000, 6000, 12000),  # gradients in bfloat16 and their float32 copy
        (2, 1, 4, 2000, 2000, 3000),  # whole bfloat16 gradients outweigh a quarter in float32
        (2, 2, 4, 2000, 1000, 3000),
        (2, 3, 4, 500 + 80, 500 + 1000, 3000),  # small tensors stay whole beside the shards
        (2, 3, 1, 2000, 6000, 12000),
    ],
)
def test_zero_shards_as_by_hand(element_bytes, stage, ranks, parameters, gradients, optimizer):
    state = trained_state(SIZES, element_bytes, DeepSpeedConfig(zero_stage=stage), ranks)
    assert state == ActorMemory(parameters, gradients, optimizer)


def test_a_step_in_bfloat16_has_a_part_of_the_gradients_in_float32():
    large = Architecture(10**9, 10**9, 0, 10**9, 2, 2, 8, 8, 16, 10)
    assert trained_state(large, 2, DeepSpeedConfig(), 1) == ActorMemory(2 * 10**9, 2 * 10**9 + 4 * 250_000_000, 12 * 10**9)


def test_partial_training_has_gradients_and_moments_of_what_is_trained():
    adapters = Architecture(1000, 50, 40, 800, 2, 2, 8, 8, 16, 10)
    assert trained_state(adapters, 2, DeepSpeedConfig(), 1) == ActorMemory(2000, 300, 600)


def test_offloaded_state_is_not_on_the_device():
    state = trained_state(SIZES, 2, DeepSpeedConfig(zero_stage=2, offload_optimizer=True), 2)
    staging = 1000  # this rank's half of the weights, on their way back to the device
    assert (state.parameters, state.gradients, state.optimizer) == (2000 + staging, 3000, 6000)
    assert state.offloaded == 9000 + staging
    assert state.peak == 2000


@given(stage=st.sampled_from([1, 2, 3]), ranks=st.integers(1, 64), element_bytes=st.sampled_from([2, 4]))
def test_more_ranks_never_take_more_each(stage, ranks, element_bytes):
    large = Architecture(10**7, 10**7, 0, 10**7, 2, 2, 8, 8, 16, 10)
    fewer, more = (trained_state(large, element_bytes, DeepSpeedConfig(zero_stage=stage), n) for n in (ranks, 2 * ranks))
    assert more.model_state < fewer.model_state


def test_activations_by_hand():
    # 2 rows of 10 tokens, 4 of them responses; a forward pass that keeps 6,000 bytes, 3,000 a layer.
    logits = (4 + 4 + 12) * 2 * 4 * 10  # with their gradients, all in one block
    sizes = SIZES, 4, 2, 10, 4
    assert training_activations(6000, *sizes, deepspeed=DeepSpeedConfig(), on_gpu=False) == 6000 + 3000
    assert training_activations(600, *sizes, deepspeed=DeepSpeedConfig(), on_gpu=False) == 600 + logits
    assert training_activations(6000, *sizes, deepspeed=DeepSpeedConfig(gradient_checkpointing=True), on_gpu=False) == 2 * 10 * 8 * 4 * 2 + 3000
    assert scoring_activations(600, SIZES, 4, rows=2, responses=4, on_gpu=False) == (4 + 12) * 2 * 4 * 10
    assert scoring_activations(300, SIZES, 4, rows=2, responses=0, on_gpu=False) == 300
    assert logit_bytes(10**8, 2, gradients=True, on_gpu=True) == 4 * 10**8 + 12 * 2**24
    assert logit_bytes(10**9, 2, gradients=True, on_gpu=True) == 4 * 2**27 + 12 * 2**24  # a block of them at a time
    assert logit_bytes(10**9, 2, gradients=True, on_gpu=True, whole=True) == 4 * 10**9 + 12 * 2**24
    assert [rows_together(tokens, 10) for tokens in (9, 10, 29)] == [1, 1, 2]


def test_zero_3_gathers_what_it_computes_with():
    assert communication_buffers(SIZES, 2, DeepSpeedConfig()) == 0
    assert communication_buffers(SIZES, 2, DeepSpeedConfig(zero_stage=2)) == 2 * 10**8
    assert communication_buffers(SIZES, 2, DeepSpeedConfig(zero_stage=3)) == 2 * 10**8 + 2000


def test_every_role_of_an_algorithm_is_predicted(llama):
    ppo = predict_roles(config_of(llama, algorithm="ppo", critic={"num_actors": 2, "deepspeed": {"zero_stage": 1}}))
    assert list(ppo) == ["rollout", "reward_model", "reference", "learner", "critic"]
    assert ppo["learner"].memory.model_state == 16 * PARAMETERS
    assert ppo["reward_model"].memory.model_state == 4 * VALUE_PARAMETERS
    assert ppo["critic"].memory.optimizer == pytest.approx(12 * VALUE_PARAMETERS, abs=2)  # two halves
    assert list(predict_roles(config_of(llama))) == ["rollout", "scorer", "reference", "learner"]


def test_an_engine_takes_its_share_of_a_gpu(llama):
    config = config_of(llama, rollout={"backend": "vllm", "gpus_per_actor": 1, "gpu_memory_utilization": 0.5})
    engine = predict_roles(config, gpu_memory_gib=10)["rollout"]
    arriving = 4 * PARAMETERS  # new weights, which come on top: all in one bucket
    assert engine.memory.peak + engine.memory.cache + engine.graphs == 5 * GIB + arriving


def test_cuda_graphs_are_counted_by_size_and_layer(llama):
    def graphs(sequences: int, **rollout) -> float:
        rollout = {"backend": "vllm", "gpus_per_actor": 1, "max_concurrent_sequences": sequences} | rollout
        return predict_roles(config_of(llama, rollout=rollout), gpu_memory_gib=10)["rollout"].graphs / (2 * 2**19)

    # 1, 2, 4, 8, 16, … 240, 248, 256, 272, … 512: those up to the sequences for decoding, and up to twice as many for small passes
    assert [graphs(sequences) for sequences in (1, 8, 256, 512, 1024)] == [1 + 2, 4 + 5, 35 + 51, 51 + 51, 83 + 83]
    assert graphs(256, enforce_eager=True) == graphs(256, gpus_per_actor=0) == 0


def test_the_cache_on_a_shared_gpu_is_for_the_sequences_that_an_engine_decodes_together(llama):
    rollout = {"backend": "vllm", "gpus_per_actor": 1, "max_concurrent_sequences": 8}
    engine = predict_roles(config_of(llama, rollout=rollout, policy={"gpus_per_actor": 1}), gpu_memory_gib=10)["rollout"]
    # rows of 10 tokens take a block of 16, and vLLM keeps one; 2 layers of a key and a value of 4
    assert engine.per_actor.cache == 9 * 16 * (2 * 2 * 1 * 4) * 4
    given = {"kv_cache_gib": 2, "tensor_parallel_size": 2}
    both = predict_roles(config_of(llama, rollout=rollout | given, policy={"gpus_per_actor": 1}), gpu_memory_gib=10)["rollout"]
    assert both.per_actor.cache == 4 * GIB  # in each of its two processes


@pytest.mark.parametrize(("bucket_mib", "gpus", "arriving"), [(256, 0, 4 * PARAMETERS), (2**-10, 0, 2**10), (256, 1, 0)])
def test_an_engine_holds_a_bucket_of_new_weights_unless_they_come_by_ipc(llama, bucket_mib, gpus, arriving):
    rollout = {"backend": "vllm", "max_concurrent_sequences": 8, "gpus_per_actor": gpus}
    config = config_of(llama, rollout=rollout, policy={"gpus_per_actor": gpus}, weight_sync={"bucket_mib": bucket_mib})
    engine = predict_roles(config)["rollout"].memory
    layer = 8 * 6 * 4 * MATRICES // (2 * 8)  # on a GPU: what one of two layers computes for 8 prompts of 6 tokens, 8 wide
    assert engine.activations == (layer if gpus else 8 * 10 * 12) + arriving


def test_an_engine_with_adapters_has_room_for_a_rank_of_vllms(llama):
    def engine(rank: int, transport: str):
        return predict_roles(config_of(llama, rollout={"backend": "vllm"}, policy={"lora": {"rank": rank}}, weight_sync={"transport": transport}))[
            "rollout"
        ]

    of_rank_1 = predict_roles(config_of(llama, policy={"lora": {"rank": 1}}))["learner"].model.trained
    assert engine(9, "adapters").memory.parameters - engine(9, "object_store").memory.parameters == 16 * of_rank_1 * 4
    assert engine(9, "object_store").memory.activations - engine(9, "adapters").memory.activations == 4 * PARAMETERS  # no bucket arrives


def test_an_engines_largest_pass_is_that_of_all_prompts_or_the_limit(llama):
    def activations(**rollout) -> int:
        config = config_of(llama, rollout={"backend": "vllm", "gpus_per_actor": 1} | rollout, policy={"gpus_per_actor": 1})
        return predict_roles(config)["rollout"].memory.activations

    assert activations(max_concurrent_sequences=16) == 2 * activations(max_concurrent_sequences=8)
    assert activations(max_concurrent_sequences=10**5) == 16384 * activations(max_concurrent_sequences=1) // 6
    assert activations(max_concurrent_sequences=10**5, max_batched_tokens=10**5) > 6 * activations(max_concurrent_sequences=10**5)


# -------------------------------------------------------------------------------------------------------- times

SLOW = Device("slow", None, 1000.0, 500.0, 100.0)


def test_stage_seconds_by_hand(llama):
    config = config_of(llama, policy={"old_log_probs": "rollout"})
    models = {name: role.model for name, role in predict_roles(config).items()}
    seconds = stage_seconds(config, models, SLOW)
    layers, logits = 10 * (2 * MATRICES + 2 * 2 * 10 * 8), 4 * 160  # of a row of 10 tokens with 4 logits
    assert seconds["score"] == pytest.approx(8 * layers / 500)
    assert seconds["reference"] == pytest.approx(8 * (layers + logits) / 500)
    adam = 28 * PARAMETERS / 100
    assert seconds["update"] == pytest.approx(8 * 3 * (layers + logits) / 1000 + adam)
    assert seconds["step"] == pytest.approx(sum(value for name, value in seconds.items() if name != "step"))


def test_a_step_of_ppo_takes_longer_and_checkpointing_and_epochs_cost(llama):
    def step(**sections):
        config = config_of(llama, **sections)
        return stage_seconds(config, {name: role.model for name, role in predict_roles(config).items()}, SLOW)

    plain = step()
    assert step(algorithm="ppo")["update"] > 1.7 * plain["update"]
    assert step(policy={"deepspeed": {"gradient_checkpointing": True}})["update"] > plain["update"]
    assert step(batch={"update_epochs": 2})["update"] > 2 * plain["update"]  # and the old log-probs
    assert step(policy={"trainable_layers": 1})["update"] < 0.8 * plain["update"]
    assert step(algorithm="remax")["generate"] > plain["generate"]


def test_calibration_measures_this_machine(tiny_model):
    device = calibrate(config_of(tiny_model, batch={"micro_batch_tokens": 200}))
    assert device.measured and device.memory_gib is None
    assert min(device.training_flops, device.scoring_flops, device.bytes_per_second) > 0


# ----------------------------------------------------------------------------------------------------------- fit


def test_a_run_plans_with_the_gpus_that_ray_gave_it(llama):
    roles = {role: {"gpus_per_actor": 1} for role in ("rollout", "scorer", "reference", "policy")}
    config = config_of(llama, **roles | {"rollout": {"backend": "vllm", "gpus_per_actor": 1, "max_concurrent_sequences": 8}})

    def room(*sizes: float | None) -> Room:
        return Room(None, seats := plan_placement(config), seats, {slot: Card("h", "n", str(slot), size, slot) for slot, size in enumerate(sizes)})

    sizes = predict_roles(config)
    assert plan_memory(config, room(80), sizes).cache_gib == 9 * 16 * (2 * 2 * 1 * 4) * 4 / GIB
    assert plan_memory(config, room(None), sizes) is None
    with pytest.raises(ResourceError, match="GiB too much on GPU 0 in the "):
        plan_memory(config, room(1), sizes)


def test_host_memory_holds_all_on_a_cpu_and_what_is_offloaded_from_a_gpu():
    offloading = RolePlan(SIZES, 1, ActorMemory(parameters=5 * GIB, optimizer=2 * GIB, offloaded=2 * GIB))
    place = in_host_memory(
        [Seat("learner", 0, 1, (0,)), Seat("scorer", 0, 1)], {"learner": offloading, "scorer": RolePlan(SIZES, 1, ActorMemory(parameters=3 * GIB))}, 4
    )
    own = PROCESS_BYTES["cpu"]
    assert place.contents == {"learner-0": 2 * GIB + own, "scorer-0": 3 * GIB + own}
    assert not place.fits


# ------------------------------------------------------------------------------------------------------- command


@pytest.fixture
def run_plan(llama, tmp_path, capsys):
    def run_plan(*argv: str) -> tuple[int, str, str]:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(config_of(llama).model_dump(mode="json")), encoding="utf-8")
        status = cli.main(["plan", str(path), *argv])
        out, error = capsys.readouterr()
        return status, without_loading(out), error

    return run_plan


def test_plan_prints_roles_places_and_times(run_plan, tmp_path):
    (tmp_path / "kept.json").write_text("{}")
    status, _, error = run_plan("--json", str(tmp_path / "kept.json"))
    assert status == 2 and "kept.json: already there, and --json would take its place" in error and (tmp_path / "kept.json").read_text() == "{}"
    status, out, _ = run_plan("--json", str(tmp_path / "plan.json"), "--node-memory-gib", "64")
    assert status == 0
    for word in ("rollout", "scorer", "reference", "learner", "host memory", "fits", "update", "from a table"):
        assert word in out
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["fits"] and plan["roles"]["learner"]["bytes_per_actor"]["optimizer"] == 8 * PARAMETERS


def test_a_plan_ends_with_the_time_of_the_run(run_plan, tmp_path):
    _, out, _ = run_plan("train.steps=7000", "--json", str(tmp_path / "plan.json"))
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["run_seconds"] == 7000 * plan["step_seconds"]["step"]
    time = duration(plan["run_seconds"])
    assert f"\nthe run: 7000 steps of train.steps take {time}, without its start, evaluations, checkpoints and refreshes\n" in out


@pytest.mark.parametrize("name", ["h100", "l4"])
def test_a_device_that_will_not_do_is_known_before_anything_is_loaded(name, capsys):
    assert cli.main(["plan", LOCAL_CPU, "--device", name]) == 2
    assert capsys.readouterr().out == ""


def test_what_does_not_fit_is_said_with_what_to_change(run_plan):
    status, out, _ = run_plan("--node-memory-gib", "0.5", "batch.micro_batch_tokens=2000", "batch.prompts_per_step=128")
    assert status == 0
    assert "DOES NOT FIT" in out
    assert re.search(r"GiB too much on host memory: learner-0 takes most \([\d.]+ GiB\), lower batch.micro_batch_tokens", out)


def test_a_plan_says_what_it_takes_for_granted(run_plan, tmp_path):
    def notes(*argv):
        return [line for line in run_plan(*argv)[1].splitlines() if line.startswith("note: ")]

    assert "; host memory is this machine's, and --node-memory-gib gives another\n" in run_plan()[1]
    assert "this machine's" not in run_plan("--node-memory-gib", "64")[1]
    planned = "the plan assumes the GVM artifact that `dvpo gvm train` makes from this config"
    apart = [f"{section}.num_actors=3 {section}.gpus_per_actor=1".split() for section in ("rollout", "scorer", "policy")]
    assert notes("--device", "h100-80gb", "placement=separate", *sum(apart, []))[1:] == [
        "note: 9 GPUs take 2 nodes of 8, a cluster that ray.address joins; host memory is counted as if all actors were on one node"
    ]
    assert notes() == [f"note: gvm.path is not set; {planned}"]
    missing = tmp_path / "missing"
    assert notes(f"gvm.path={missing}", "kl.placement=off", "kl.coefficient=1") == [
        f"note: gvm.path {missing}: no such folder; {planned}",
        "note: kl.coefficient 1 has no effect, since kl.placement is off; set kl.placement to reward or loss for a penalty",
    ]
    assert notes("algorithm=reinforce", "--json", str(tmp_path / "plan.json")) == [
        "note: reward_model.path is not set; the plan assumes the reward model that `dvpo rm train` makes from this config"
    ]
    assert json.loads((tmp_path / "plan.json").read_text())["notes"][0].startswith("reward_model.path is not set")


def test_an_ensemble_is_planned_model_by_model(llama):
    alone, three = (config_of(llama, scorer={"ensemble": ensemble}) for ensemble in ([], ["a", "b"]))
    assert predict_roles(three)["scorer"].per_actor.parameters == 3 * predict_roles(alone)["scorer"].per_actor.parameters
    seconds = [
        stage_seconds(config, {name: role.model for name, role in predict_roles(config).items()}, choose_device(config, None))
        for config in (alone, three)
    ]
    assert seconds[1]["score"] == pytest.approx(3 * seconds[0]["score"]) and seconds[1]["reference"] == seconds[0]["reference"]


def test_columns_stay_apart_whatever_the_size(run_plan):
    _, out, _ = run_plan("batch.prompts_per_step=100000000", "rollout.max_concurrent_sequences=100000000", "batch.micro_batch_tokens=1000000000")
    assert all(len(line.split()) == 9 + (line.split()[3] in "MB") for line in out.splitlines()[2:6])


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["model.path=./nowhere"], "dvpo: model.path ./nowhere: no such checkpoint folder"),
        (["gvm.init_from=/nowhere"], "dvpo: gvm.init_from /nowhere: no such checkpoint folder"),
        (["gvm.path=."], "dvpo: gvm.path .: no gvm.json, so this is not a GVM artifact"),
        (["algorithm=ppo", "reward_model.path=."], "dvpo: reward_model.path .: no gvm.json, so this is not a reward model"),
        (["gvm.num_layers=5"], "dvpo: gvm.num_layers is 5, but"),
        (["policy.trainable_layers=3"], "dvpo: policy.trainable_layers 3: "),
        (["data.max_prompt_tokens=61"], "dvpo: data.max_prompt_tokens 61 + rollout.max_response_tokens 4 = 65 tokens, but "),
        (["--device", "a100-80gb"], "dvpo: --device is a100-80gb, but policy.gpus_per_actor is 0"),
        (["--device", "abacus"], "dvpo: --device 'abacus': not known; expected cpu or one of h200,"),
        (["--device", "h100"], "dvpo: --device 'h100': not known; did you mean h100-80gb? Expected cpu or one of h200,"),
        (["--device", "A100"], "dvpo: --device 'A100': not known; did you mean a100-80gb or a100-40gb? "),
        (["--device", "rtx4090"], "dvpo: --device 'rtx4090': not known; did you mean rtx-4090? "),
        (["--device", ""], "dvpo: --device '': not known; expected cpu or one of h200,"),
        (["--device", "cpu", "policy.gpus_per_actor=1"], "dvpo: --device is cpu, but policy.gpus_per_actor is 1; name a GPU: h200,"),
        (["--device", "l4", "--calibrate"], "dvpo: --calibrate measures this machine and --device l4 names another"),
        (["--node-memory-gib", "0"], "dvpo: argument --node-memory-gib: '0' is "),
        (["--node-memory-gib", "nan"], "dvpo: argument --node-memory-gib: 'nan' is "),
        (["batch.prompts_per_step=7", "batch.minibatches_per_epoch=2"], "dvpo: batch.prompts_per_step 7"),
    ],
)
def test_bad_input_is_one_line(run_plan, argv, line):
    status, out, err = run_plan(*argv)
    assert (status, out) == (2, "")
    assert err.startswith(line) and err.count("\n") == 1
