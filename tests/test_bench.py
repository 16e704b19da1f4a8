"""`dvpo bench step`: fair baselines, right arithmetic, and the whole of it on a tiny model."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from gvm_artifacts import make_gvm
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from dvpo_ray import cli
from dvpo_ray.batch import RaggedBatch
from dvpo_ray.bench.bare import LAYOUTS, BareScorer, lay_out, response_log_probs
from dvpo_ray.bench.measure import Sample, Spread, compare, take_turns
from dvpo_ray.bench.overhead import StepProfile, StepTime, take_rounds
from dvpo_ray.config.schema import Config, ModelConfig
from dvpo_ray.models.forward import batch_log_probs, batch_values
from dvpo_ray.models.loading import load_policy
from dvpo_ray.monitoring.console import RunConsole

SIZES = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 12)), min_size=1, max_size=9)


def batch_of(sizes: list[tuple[int, int]], seed: int = 0) -> RaggedBatch:
    """Rows of random tokens with the given numbers of prompt and response tokens."""
    random = np.random.default_rng(seed)
    prompts, responses = zip(*((random.integers(5, 200, p).tolist(), random.integers(5, 200, r).tolist()) for p, r in sizes), strict=True)
    return RaggedBatch.from_rows(prompts, responses)


# ------------------------------------------------------------------------------------------------ measurement


def test_contestants_take_turns_and_the_first_round_is_not_kept():
    calls = []

    def contestant(name: str):
        def work(round_: int) -> Sample:
            calls.append((round_, name))
            return Sample(tokens=10 * round_, seconds=1.0)

        return work

    samples = take_turns({"a": contestant("a"), "b": contestant("b")}, 2)
    assert calls == [(0, "a"), (0, "b"), (1, "a"), (1, "b"), (2, "a"), (2, "b")]
    assert [sample.tokens for sample in samples["a"]] == [10, 20]


def test_a_ratio_is_of_medians_and_to_the_fastest_bare_implementation():
    product = [Sample(100, 1.0), Sample(100, 2.0), Sample(100, 10.0)]
    slow, fast = [Sample(100, 4.0)] * 3, [Sample(200, 1.0), Sample(200, 2.0), Sample(200, 4.0)]
    result = compare("learner", 0.85, {"product": product, "packed": slow, "padded": fast})
    assert result["product"] == {"median": 50.0, "low": 10.0, "high": 100.0}
    assert f"{Spread(**result['product']):.1f}" == "50.0 (10.0–100.0)"
    assert (result["baseline"], result["ratio"]) == ("padded", 0.5)


def test_every_second_round_goes_the_other_way_round(tmp_path):
    calls = []

    def contestant(name: str):
        return lambda folder, after_step: calls.append(folder.relative_to(tmp_path).as_posix()) or (name, folder.is_dir())

    contestants = {name: contestant(name) for name in ("ppo", "dvpo")}
    with RunConsole(Console(file=io.StringIO())) as console:
        measured = take_rounds(contestants, console, tmp_path, rounds=2, steps=1)
        take_rounds(contestants, console, tmp_path, rounds=1, steps=1)
    assert measured == {name: [(name, True)] * 2 for name in contestants}
    assert calls == ["ppo/round-1", "dvpo/round-1", "dvpo/round-2", "ppo/round-2", "ppo", "dvpo"]


def test_overhead_is_what_the_computing_stages_leave_of_the_step():
    stages = {"generate": 4.0, "score": 1.0, "reference": 0.5, "advantage": 0.25, "update": 3.0, "sync": 0.5, "step": 9.5}
    metrics = {f"time/{name}_seconds": value for name, value in stages.items()}
    metrics |= {"idle/rollout_fraction": 1 - 3.75 / 9.5, "idle/learner_fraction": 1 - 3.25 / 9.5, "kl/reference_mean": 1.0}
    step = StepTime.of(metrics, total=10.0)
    assert step.overhead == pytest.approx(0.1)  # 10 - (4 + 1 + 0.5 + 3 + 0.5)
    assert step.waiting == pytest.approx(0.25 + 0.25)
    profile = StepProfile([step, StepTime(20.0, stages, 0.5)], peak_memory_gib=1.0)
    assert profile.as_json()["overhead"]["median"] == pytest.approx((0.1 + 0.55) / 2)
    del stages["step"]
    assert profile.stage_seconds() == pytest.approx(stages | {"logging": (0.75 + 10.75) / 2})


# ---------------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("layout", LAYOUTS)
@given(sizes=SIZES, max_tokens=st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_a_layout_holds_every_token_once_within_the_budget(layout, sizes, max_tokens):
    batch = batch_of(sizes)
    laid_out = lay_out(batch, np.arange(batch.num_rows), layout, max_tokens, "cpu")
    assert all(inputs.input_ids.numel() <= max(max_tokens, batch.lengths.max()) for inputs in laid_out)
    predicted = torch.cat([inputs.token_index for inputs in laid_out]).numpy()
    assert sorted(predicted) == np.flatnonzero(batch.response_mask).tolist()
    if layout == "packed":
        assert sum(inputs.input_ids.numel() for inputs in laid_out) == batch.num_tokens


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_bare_loop_computes_the_log_probs_that_the_learner_computes(tiny_model, layout, temperature):
    model = load_policy(ModelConfig(path=str(tiny_model), dtype="float32"))
    batch = batch_of([(3, 5), (1, 9), (7, 2), (4, 0), (2, 12)])
    log_probs = np.zeros(batch.num_tokens, np.float32)
    with torch.no_grad():
        for inputs in lay_out(batch, np.arange(batch.num_rows), layout, 24, "cpu"):
            log_probs[inputs.token_index.numpy()] = response_log_probs(model, inputs, temperature).numpy()
    np.testing.assert_allclose(log_probs, batch_log_probs(model, batch, 24, temperature), atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_bare_scorer_computes_the_values_also_where_the_scorer_packs(tiny_model, tmp_path, layout):
    gvm = make_gvm(tmp_path / "gvm", tiny_model)
    config = Config(model={"path": str(tiny_model), "dtype": "float32", "attention": "varlen"}, gvm={"path": str(gvm)})
    model = BareScorer.load(None, config)
    (inputs,) = lay_out(batch_of([(3, 5)]), np.arange(1), layout, 24, "cpu")
    values = BareScorer.run(SimpleNamespace(model=model), inputs).detach().flatten()
    np.testing.assert_allclose(values, batch_values(model, batch_of([(3, 5)]), 24), atol=1e-6)


# ---------------------------------------------------------------------------------------------------- command


def write_config(folder, model, **sections):
    """A config that trains a tiny model with two optimizer steps a batch."""
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Tell me a story about day {n}"}) + "\n" for n in range(12)), encoding="utf-8")
    content = {
        "name": "tiny",
        "model": {"path": str(model), "dtype": "float32", "chat_template": "plain"},
        "data": {"prompts": {"path": str(prompts)}, "max_prompt_tokens": 24},
        "gvm": {"path": str(make_gvm(folder / "gvm", model, chat_template="plain"))},
        "rollout": {"backend": "transformers", "max_response_tokens": 8, "rollouts_per_chunk": 3, "cpus_per_actor": 1},
        "scorer": {"cpus_per_actor": 0},
        "reference": {"cpus_per_actor": 0},
        "batch": {"prompts_per_step": 8, "minibatches_per_epoch": 2, "micro_batch_tokens": 64},
        "ray": {"num_cpus": 2},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content | sections), encoding="utf-8")
    return path


@pytest.mark.parametrize(("setting", "line"), [("gvm.path=null", "gvm.path is not set"), ("data.prompts=null", "data.prompts.path is not set")])
def test_what_is_missing_is_named(tiny_model, tmp_path, capsys, setting, line):
    config = write_config(tmp_path, tiny_model)
    assert cli.main(["bench", "step", str(config), setting]) == 2
    assert capsys.readouterr().err.startswith(f"dvpo: {config}: {line}")


@pytest.mark.slow
def test_bench_step_measures_every_part_and_writes_json(ray_session, tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = write_config(tmp_path, tiny_model)
    assert cli.main(["bench", "step", str(config), "--repeats", "1", "--out", "results"]) == 0
    shown = capsys.readouterr().out
    results = json.loads((tmp_path / "results" / "bench.json").read_text(encoding="utf-8"))
    comparisons = {entry["name"]: entry for entry in results["comparisons"]}
    assert list(comparisons) == ["rollout", "scorer", "reference", "learner", "learner, old log-probs recomputed"]
    for name, entry in comparisons.items():
        assert name in shown
        assert entry["ratio"] == entry["product"]["median"] / entry["bare"][entry["baseline"]]["median"]
    assert set(comparisons["learner"]["bare"]) == {"packed", "padded"}
    assert comparisons["learner, old log-probs recomputed"]["ratio"] < comparisons["learner"]["ratio"]
    assert results["workload"]["rows"] == 8
    assert results["step"]["stage_seconds"].keys() == {"generate", "score", "reference", "advantage", "update", "sync", "logging"}
    assert len(results["step"]["steps"]) == 1
    assert results["machine"]["cores"] >= 1 and results["threads"]["rollout"] == 1 and "torch" in results["versions"]
