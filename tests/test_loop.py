"""The whole loop on real Ray, vLLM (or transformers) and DeepSpeed: weights arrive, scores are right, it learns, it resumes exactly."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from loop_runs import ON_ONE_GPU, gae_by_hand, rollouts, run, values_by_hand, without_times

from dvpo_ray.errors import InputError, ResourceError

pytestmark = pytest.mark.slow

needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


@pytest.fixture(scope="module")
def uninterrupted(loop_settings, tmp_path_factory) -> tuple[Path, list[dict]]:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, run(loop_settings, folder)


def test_the_run_folder_is_complete(uninterrupted):
    folder, metrics = uninterrupted
    names = (
        "config.yaml",
        "metrics.jsonl",
        "summary.json",
        "report.html",
        "final/model.safetensors",
        "final/tokenizer.json",
        "checkpoints/step_000004",
    )
    assert [name for name in names if not (folder / name).exists()] == []
    assert {f.name for f in (folder / "logs").iterdir()} == {f"{r}-0.log" for r in ("rollout", "scorer", "reference", "learner", "experience")}
    assert [row["step"] for row in metrics] == [1, 2, 3, 4] == [row["policy_version"] for row in metrics]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["state"] == "finished" and summary["gvm"]["heldout_accuracy"]["last"] == 0.75
    low, high = summary["gold"]["gain_ci95"]
    assert low <= summary["gold"]["after"]["mean"] - summary["gold"]["before"]["mean"] <= high


def test_scores_in_the_rollouts_are_those_of_a_direct_forward(loop_settings, uninterrupted):
    folder, _ = uninterrupted
    rows = rollouts(folder, 3)
    assert [row["row_id"] for row in rows] == list(range(16)) and {row["policy_version"] for row in rows} == {2}
    for row in rows[:4]:
        np.testing.assert_allclose(row["values"], values_by_hand(loop_settings["gvm"]["path"], row), atol=1e-5)


def test_advantages_in_the_rollouts_are_those_of_the_formula(uninterrupted):
    """From the values and log-probs beside them."""
    folder, _ = uninterrupted
    rows = rollouts(folder, 2)
    np.testing.assert_allclose(np.concatenate([row["advantages"] for row in rows]), gae_by_hand(rows), atol=1e-4)


def test_resuming_repeats_the_remaining_steps_exactly_with_all_roles_on_one_gpu(loop_settings, uninterrupted, tmp_path):
    folder, whole = uninterrupted
    stopped = tmp_path / "stopped"
    shutil.copytree(folder, stopped)
    for gone in ("checkpoints/step_000004", "final"):
        shutil.rmtree(stopped / gone)
    resumed = run(loop_settings, stopped, resume=True, **ON_ONE_GPU)
    assert without_times(resumed) == without_times(whole)
    assert (stopped / "final" / "model.safetensors").read_bytes() == (folder / "final" / "model.safetensors").read_bytes()


def test_a_refused_resume_touches_no_file(loop_settings, uninterrupted, tmp_path):
    folder, _ = uninterrupted
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for changes, line in (
        ({"batch": {"prompts_per_step": 8}}, "batch.prompts_per_step was 16 and is 8 now"),
        ({"policy": {"num_actors": 2}}, "policy.num_actors was 1 and is 2 now"),
        ({"train": {"steps": 3}}, "the run is finished and its result is in final/; --resume with a larger train.steps goes on"),
    ):
        with pytest.raises(InputError, match=line):
            run(loop_settings, folder, resume=True, **changes)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_policy_that_diverges_is_stopped(loop_settings, tmp_path):
    with pytest.raises(ResourceError, match="diverged: policy/(loss|grad_norm) is (nan|inf) at step 1; lower policy.learning_rate"):
        run(loop_settings, tmp_path / "run", policy={"learning_rate": 1e30}, train={"steps": 2}, batch={"minibatches_per_epoch": 4})
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["state"] == "failed" and not (tmp_path / "run" / "final").exists()


def check_that_engines_follow(metrics: list[dict]) -> None:
    """After each sync the engines sample from the learner's very weights, and these are others than before."""
    assert metrics[0]["kl/reference_mean"] == pytest.approx(0.0, abs=1e-3)
    assert metrics[1]["kl/reference_mean"] != pytest.approx(0.0, abs=1e-4)
    assert max(row["mismatch/log_prob_abs_max"] for row in metrics) < 1e-3


# test_matrix.py has weights in shards and weights that are partly frozen.


def test_adapters_reach_two_engines_and_their_fresh_rollouts_are_the_value_models_examples(loop_settings, tiny_model, tmp_path):
    from gvm_artifacts import make_gvm

    from dvpo_ray.gvm.artifact import ContextSpec

    conditioned = str(make_gvm(tmp_path / "gvm", tiny_model, context=ContextSpec(examples=2, max_tokens=64)))
    changes = {
        "gvm": {"path": conditioned, "context": {"pool": 4}},
        "rollout": {"num_actors": 2},
        "policy": {"lora": {"rank": 4}, "old_log_probs": "rollout", "deepspeed": {"zero_stage": 2}},
        "advantage": {"mode": "static_q"},
    }
    check_that_engines_follow(run(loop_settings, tmp_path / "run", train={"steps": 2}, **changes))
    rows = rollouts(tmp_path / "run", 2)
    alone = [values_by_hand(conditioned, row) for row in rows]
    assert all(np.isfinite(row["values"]).all() for row in rows)
    assert not any(np.allclose(row["values"], values, atol=1e-4) for row, values in zip(rows, alone, strict=True))


@needs_vllm
def test_adapters_alone_reach_an_engine_at_every_version(loop_settings, tmp_path):
    fast = {"learning_rate": 3e-2, "schedule": "constant", "lora": {"rank": 4, "target_modules": ["q_proj", "o_proj", "down_proj"]}}
    metrics = run(
        loop_settings, tmp_path / "run", rollout={"backend": "vllm"}, train={"steps": 3}, policy=fast, weight_sync={"transport": "adapters"}
    )
    assert max(row["mismatch/log_prob_abs_max"] for row in metrics) < 1e-3
    assert metrics[-1]["kl/reference_mean"] > 0.01  # far from the model that the engine began with


@needs_vllm
def test_vllm_samples_from_the_learners_weights_at_every_version_and_value_rises(loop_settings, tmp_path):
    fast = {"learning_rate": 1e-2, "schedule": "constant"}
    metrics = run(loop_settings, tmp_path / "vllm", rollout={"backend": "vllm"}, train={"steps": 15}, policy=fast, batch={"prompts_per_step": 32})
    assert max(row["mismatch/log_prob_abs_max"] for row in metrics) < 1e-3
    spread = metrics[0]["value/std"]
    assert metrics[-1]["value/terminal_mean"] > metrics[0]["value/terminal_mean"] + spread
