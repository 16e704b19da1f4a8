"""`dvpo bench ledger`: equal work for every algorithm, bytes of live tensors, ratios and verdicts, random checkpoints, and all of it once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cli_runs import without_loading
from test_bench import write_config
from torch import nn

from dvpo_ray import cli
from dvpo_ray.bench.ledger import config_for
from dvpo_ray.bench.ledger_results import algorithm_results, ledger_results, lines, markdown, training_cost
from dvpo_ray.bench.memory import PeakMeter, TensorBytes, measured, parameter_bytes
from dvpo_ray.bench.overhead import StepProfile, StepTime
from dvpo_ray.bench.random_weights import byte_tokenizer, with_random_weights
from dvpo_ray.config import load_config
from dvpo_ray.config.arithmetic import derive_batch
from dvpo_ray.config.schema import Config
from dvpo_ray.errors import InputError
from dvpo_ray.gvm.artifact import read_manifest
from dvpo_ray.planning.memory import ActorMemory
from dvpo_ray.training.policy_inputs import load_inputs

CPU = torch.device("cpu")

# --------------------------------------------------------------------------------------------------- measurement


def test_tied_weights_and_views_count_once():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10, bias=False))
    model[1].weight = model[0].weight
    assert parameter_bytes(model, CPU) == TensorBytes(160, 0)
    flat = torch.zeros(100)
    assert TensorBytes.of([flat[:10], flat[50:]], CPU) == TensorBytes(400, 0)
    assert TensorBytes.of([flat], torch.device("cuda", 0)) == TensorBytes(0, 400)  # offloaded


def test_growth_of_model_state_is_no_activation():
    before = {"parameters": TensorBytes(100)}
    after = {"parameters": TensorBytes(100), "gradients": TensorBytes(40, 5), "optimizer": TensorBytes(0, 80)}
    entry = measured(before, after, growth=100)
    assert entry == ActorMemory(parameters=100, gradients=45, optimizer=80, activations=60, offloaded=85)
    assert (entry.model_state, entry.peak) == (225, 225 - 85 + 60)
    assert measured(before, after, growth=None).activations is None
    assert (entry + measured(before, after, None)).activations is None


def test_the_peak_of_the_resident_set_is_seen_after_it_is_gone():
    meter = PeakMeter()
    block = torch.ones(64 * 2**20 // 4)
    del block
    growth = meter.growth()
    if growth is None:
        pytest.skip("this system does not let a process reset its peak")
    assert 60 * 2**20 < growth < 96 * 2**20


# ----------------------------------------------------------------------------------------------------- equal work


@pytest.mark.parametrize(("algorithm", "prompts", "samples"), [("dvpo", 8, 1), ("ppo", 8, 1), ("grpo", 2, 4), ("rloo", 2, 4)])
def test_every_algorithm_has_equal_samples_of_equal_length(algorithm, prompts, samples):
    config = Config.model_validate({"model": {"path": "m"}, "batch": {"prompts_per_step": 8}, "advantage": {"truncated": "mask"}})
    changed = config_for(config, algorithm, group_size=4)
    assert (changed.algorithm, changed.batch.prompts_per_step, changed.batch.samples_per_prompt) == (algorithm, prompts, samples)
    assert derive_batch(changed).samples_per_step == 8
    assert changed.rollout.min_response_tokens == changed.rollout.max_response_tokens
    assert changed.advantage.truncated == "bootstrap"


def test_samples_that_make_no_groups_are_refused():
    config = Config.model_validate({"model": {"path": "m"}, "batch": {"prompts_per_step": 6}})
    with pytest.raises(InputError, match="--group-size is 4, but a step of grpo has 6 samples; give a divisor"):
        config_for(config, "grpo", group_size=4)
    grouped = Config.model_validate({"model": {"path": "m"}, "batch": {"prompts_per_step": 6, "samples_per_prompt": 3}})
    assert config_for(grouped, "grpo", group_size=4).batch == grouped.batch


# ---------------------------------------------------------------------------------------------------------- results


def _profile(*seconds: float, peak: float = 1.0) -> StepProfile:
    return StepProfile([StepTime(one, {"generate": one, "step": one}, 0.0) for one in seconds], peak)


def _algorithm(seconds: float, state: int, predicted: int) -> dict:
    memory, plan = ({"learner": ActorMemory(parameters, activations=state)} for parameters in (state, predicted))
    return algorithm_results(10, [_profile(seconds)], memory, plan)


ALGORITHMS = {"ppo": _algorithm(10.0, 1000, 1000), "dvpo": _algorithm(6.0, 700, 560), "reinforce": _algorithm(5.0, 600, 600)}


def test_ratios_verdicts_and_break_even():
    training = {"gvm": {"seconds": 50.0, "steps": 5, "peak_memory_gib": 1.0}, "reward_model": {"seconds": 30.0, "steps": 5, "peak_memory_gib": 1.0}}
    results = ledger_results(ALGORITHMS, training, on_gpu=False)
    assert results["ratio_to_ppo"]["dvpo"] == {"step": 0.6, "model_state": 0.7, "peak": 0.7}
    assert [(t["quantity"], t["baseline"], t["met"]) for t in results["targets"]] == [
        ("step", "ppo", True),
        ("model_state", "ppo", False),
        ("step", "reinforce", False),
    ]
    assert results["break_even_steps"] == (50 - 30) / (10 - 6)
    assert results["algorithms"]["dvpo"]["prediction_error"]["model_state"] == pytest.approx(-0.2)
    assert results["paper_ratio_to_ppo"]["paper, 3B, ZeRO-1"]["step"] == pytest.approx(0.565, abs=1e-3)
    text = "\n".join(lines(results))
    assert "model state of dvpo / ppo: 0.700, target <= 0.65, MISSED" in text
    assert "step of dvpo / ppo: 0.600, target <= 0.65, met" in text
    assert "dvpo: the predicted model state is off by -20%" in text
    assert "training the value model beforehand: 50 s, 5 steps, 1.00 GiB at most" in text
    assert "| dvpo | 0.600 | 0.700 | 0.700 |" in markdown(results)


def test_rounds_are_compared_each_by_itself():
    """The machine is slow in the second round, and for DVPO in the third: steps of all rounds together would say otherwise."""
    memory = {"learner": ActorMemory(600)}
    ppo = algorithm_results(10, [_profile(10.0, 10.0, 11.0), _profile(30.0), _profile(10.0, 12.0, 10.0, peak=3.0)], memory, memory)
    dvpo = algorithm_results(10, [_profile(6.0, 6.0, 9.0), _profile(15.0), _profile(7.0)], memory, memory)
    results = ledger_results({"ppo": ppo, "dvpo": dvpo}, {}, on_gpu=False)
    assert results["step_ratio_to_ppo_by_round"]["dvpo"] == pytest.approx([0.6, 0.5, 0.7])
    assert results["ratio_to_ppo"]["dvpo"]["step"] == pytest.approx(0.6)
    assert ppo["step_seconds"] == {"median": 10.0, "low": 10.0, "high": 30.0} and dvpo["step_seconds"] == {"median": 7.0, "low": 6.0, "high": 15.0}
    assert dvpo["stage_seconds"]["generate"] == 7.0 and dvpo["samples_per_second"] == pytest.approx(10 / 7)
    text = "\n".join(lines(results))
    assert "step of dvpo / ppo: 0.600 (by round: 0.600, 0.500, 0.700), target <= 0.65, met" in text
    assert "model state of dvpo / ppo: 1.000, target" in text
    assert [one["median"] for one in dvpo["step_seconds_by_round"]] == [6.0, 15.0, 7.0]
    assert ppo["peak_of_all_processes_gib"] == 3.0


def test_what_was_not_measured_is_no_verdict():
    alone = ledger_results({"dvpo": ALGORITHMS["dvpo"]}, {"gvm": None}, on_gpu=True)
    assert alone["targets"] == [] and alone["break_even_steps"] is None
    assert "unknown" in markdown(alone)


def test_the_cost_of_training_is_read_from_the_run_folder(tmp_path):
    (tmp_path / "final").mkdir()
    assert training_cost(tmp_path / "final") is None
    (tmp_path / "summary.json").write_text(json.dumps({"duration_seconds": 12.5, "steps": 3, "peak_memory_gib": 0.5}))
    assert training_cost(tmp_path / "final") == {"seconds": 12.5, "steps": 3, "peak_memory_gib": 0.5}
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(InputError, match="not the summary of a training run"):
        training_cost(tmp_path / "final")


# --------------------------------------------------------------------------------------------------- random weights


def test_random_checkpoints_are_what_a_run_loads(tiny_model, tmp_path):
    """From config.json alone: without a tokenizer there, tokens are bytes."""
    (tmp_path / "shape").mkdir()
    (tmp_path / "shape" / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    config = load_config(write_config(tmp_path, tiny_model), ["gvm.num_layers=1"])
    made = with_random_weights(config, tmp_path / "shape" / "config.json", tmp_path / "made")
    inputs = load_inputs(made)
    assert {len(prompt) for prompt in inputs.prompts} == {config.data.max_prompt_tokens}
    assert len(inputs.prompts) >= config.batch.prompts_per_step
    assert inputs.manifest.num_layers == 1
    assert read_manifest(tmp_path / "made" / "reward_model").objective.name == "bradley_terry"
    assert read_manifest(tmp_path / "made" / "reward_model").num_layers == 2


def test_bytes_are_tokens():
    tokenizer = byte_tokenizer()
    assert len(tokenizer) == 259
    ids = tokenizer("Zoë!")["input_ids"]
    assert len(ids) == 5 and tokenizer.decode(ids) == "Zoë!"


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--repeats", "0"], "argument --repeats: '0' is "),
        (["--group-size", "1"], "argument --group-size: '1' is "),
        (["--tokenizer", "."], "--tokenizer is for --random-weights CONFIG_JSON"),
        (["--algorithms", "sarsa"], "argument --algorithms: 'sarsa' is not an algorithm; expected some of dvpo,ppo,"),
        (["--random-weights", "nowhere"], "nowhere: no config.json there"),
        ([], "{config}: reward_model.path is not set, and ppo needs rewards"),
        (["--algorithms", "dvpo", "gvm.path=null"], "{config}: gvm.path is not set"),
        (["reward_model.path=nowhere"], "reward_model.path nowhere: no such folder"),
        (["--random-weights", "{model}", "--set", "dvpo:rollout.max_response_tokens=9"], "dvpo differs from ppo in rollout.max_response_tokens"),
        (["--set", "dvpo:batch.update_epochs=2"], "dvpo differs from ppo in batch.update_epochs, which must be equal in all that are compared"),
        (
            ["--algorithms", "dvpo,reinforce", "reward_model.path=r", "--set", "reinforce:batch.prompts_per_step=24"],
            "reinforce differs from dvpo in batch.prompts_per_step x batch.samples_per_prompt, which must be equal in all that are compared",
        ),
    ],
)
def test_bad_input_is_one_line(tiny_model, tmp_path, monkeypatch, capsys, argv, line):
    monkeypatch.chdir(tmp_path)
    config = write_config(tmp_path, tiny_model, critic={"cpus_per_actor": 0})
    assert cli.main(["bench", "ledger", str(config), *(text.format(model=tiny_model) for text in argv)]) == 2
    out, err = capsys.readouterr()
    assert without_loading(out) == "" and err.count("\n") == 1
    assert err.startswith(f"dvpo: {line.format(config=config)}")
    assert not Path("runs").exists()


# ------------------------------------------------------------------------------------------------------ all of it


@pytest.mark.slow
def test_the_ledger_of_ppo_and_dvpo(ray_session, tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = write_config(tmp_path, tiny_model, critic={"cpus_per_actor": 0, "deepspeed": {"zero_stage": 1}})
    argv = ["bench", "ledger", str(config), "--algorithms", "ppo,dvpo", "--repeats", "1", "--rounds", "2"]
    argv += ["--random-weights", str(tiny_model), "--out", "results"]
    assert cli.main(argv) == 0
    shown = capsys.readouterr().out
    results = json.loads((tmp_path / "results" / "ledger.json").read_text(encoding="utf-8"))
    ppo, dvpo = (results["algorithms"][name] for name in ("ppo", "dvpo"))
    assert len(results["step_ratio_to_ppo_by_round"]["dvpo"]) == len(dvpo["step_seconds_by_round"]) == 2
    assert all((tmp_path / "results" / "dvpo" / folder / "metrics.jsonl").is_file() for folder in ("round-1", "round-2"))
    assert list(ppo["bytes"]) == ["rollout", "reward_model", "reference", "learner", "critic", "all"]
    learner, critic = ppo["bytes"]["learner"], ppo["bytes"]["critic"]
    weights = ppo["bytes"]["reference"]["parameters"]
    assert learner["parameters"] == pytest.approx(weights, rel=0.01)
    assert learner["gradients"] == pytest.approx(weights, rel=0.01) and learner["optimizer"] == pytest.approx(2 * weights, rel=0.01)
    assert critic["optimizer"] == pytest.approx(3 * critic["parameters"], rel=0.01)  # ZeRO's master weights
    assert learner["activations"] is None or learner["activations"] > 0
    for algorithm in (ppo, dvpo):
        assert abs(algorithm["prediction_error"]["model_state"]) < 0.05
        assert algorithm["samples_per_step"] == 8
        assert algorithm["stage_seconds"].keys() == {"generate", "score", "reference", "advantage", "update", "sync", "logging"}
    assert results["ratio_to_ppo"]["dvpo"]["model_state"] < 0.7
    assert "model state of dvpo / ppo" in shown and "Ratio to PPO" in (tmp_path / "results" / "ledger.md").read_text(encoding="utf-8")
    assert results["training_before"] == {"gvm": None, "reward_model": None}
