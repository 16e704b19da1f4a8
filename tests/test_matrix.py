"""Every algorithm, dtype, kind of training, ZeRO stage and layout on the real loop; each pair at least once but for algorithm and ZeRO stage.

Two steps each: they end, every number is finite, and engine, frozen models and learner compute the same within the dtype's bounds.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from gvm_artifacts import make_gvm
from loop_runs import rollouts, run, values_by_hand

from dvpo_ray.gvm.artifact import ObjectiveSpec
from dvpo_ray.policy.mismatch import START_BOUNDS
from dvpo_ray.runtime import checkpoints

pytestmark = pytest.mark.slow

REWARD_MODEL = ObjectiveSpec(name="bradley_terry", td_lambda=0.95, bradley_terry_weight=0.0, bradley_terry_value="last")
ALGORITHMS = ("dvpo", "ppo", "grpo", "rloo", "remax", "reinforce")
TRAINED = {"all": {}, "adapters": {"lora": {"rank": 4}}, "last layers": {"trainable_layers": 1}}
CASES = [
    (ALGORITHMS[i % 6], ("float32", "bfloat16")[(i // 6 + i) % 2], list(TRAINED)[i // 4], i % 4, ("sdpa", "varlen")[i // 2 % 2]) for i in range(12)
]
VALUE_BOUNDS = {"float32": 1e-5, "bfloat16": 0.1}


def test_the_cases_have_every_pair():
    for one, other, pairs in ((0, 1, 12), (1, 2, 6), (1, 3, 8), (2, 3, 12), (1, 4, 4), (2, 4, 6)):
        assert len({(case[one], case[other]) for case in CASES}) == pairs


@pytest.fixture(scope="module")
def models(loop_settings, tiny_model, tmp_path_factory) -> dict:
    path = str(make_gvm(tmp_path_factory.mktemp("rm") / "rm", tiny_model, bias=2.0, objective=REWARD_MODEL))
    return loop_settings | {"reward_model": {"path": path}, "critic": {"learning_rate": 3e-3}, "train": {"steps": 2, "trackers": []}}


@pytest.mark.parametrize(("algorithm", "dtype", "trained", "zero_stage", "attention"), CASES, ids=lambda part: str(part).replace(" ", "-"))
def test_two_steps(models, tmp_path, monkeypatch, algorithm, dtype, trained, zero_stage, attention):
    expected = []
    monkeypatch.setattr(checkpoints, "check_room", lambda folder, size, *what: expected.append(size))
    deepspeed = {"deepspeed": {"zero_stage": zero_stage}}
    two_ranks = {"num_actors": 2} if zero_stage == 3 else {}
    settings = models | {"algorithm": algorithm, "model": models["model"] | {"dtype": dtype, "attention": attention}}
    changes = {
        "policy": TRAINED[trained] | deepspeed | two_ranks,
        "critic": deepspeed,
        "batch": {"prompts_per_step": 8, "samples_per_prompt": 2},
        "kl": {"placement": "loss", "estimator": "k3"} if algorithm == "dvpo" else {},
    }
    metrics = run(settings, tmp_path / "run", **changes)
    assert [row["step"] for row in metrics] == [1, 2]
    assert all(value is not None and math.isfinite(value) for row in metrics for value in row.values())
    for row in metrics:
        assert row["mismatch/log_prob_abs_max"] < START_BOUNDS[dtype][1]
    assert abs(metrics[0]["kl/reference_mean"]) < START_BOUNDS[dtype][1]
    assert abs(metrics[1]["kl/reference_mean"] - metrics[0]["kl/reference_mean"]) > 1e-4  # the engine has other weights than before
    check_roles(tmp_path / "run", metrics, settings)
    size = sum(file.stat().st_size for file in (tmp_path / "run" / "checkpoints" / "step_000002").rglob("*.pt"))
    assert expected[0] == expected[1] and 0 < size - expected[0] < 0.02 * size + 500_000  # names and settings of DeepSpeed
    check_values(tmp_path / "run", settings, VALUE_BOUNDS[dtype])


def check_roles(folder: Path, metrics: list[dict], settings: dict) -> None:
    own = {"dvpo": {"scorer"}, "ppo": {"reward_model", "critic"}}.get(settings["algorithm"], {"reward_model"})
    logs = {file.stem.rpartition("-")[0] for file in (folder / "logs").iterdir()}
    assert logs == {"rollout", "reference", "learner", "experience"} | own
    rows = rollouts(folder, 1)
    assert ("values" in rows[0]) == (settings["algorithm"] in ("dvpo", "ppo"))
    assert ("critic/loss" in metrics[0]) == (settings["algorithm"] == "ppo")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["state"] == "finished" and summary["algorithm"] == settings["algorithm"]
    assert ("gvm" in summary) == (settings["algorithm"] == "dvpo")


def check_values(folder: Path, settings: dict, bound: float) -> None:
    """What the frozen model said of the first rollouts, against a direct forward pass in float32 of each row alone."""
    rows = rollouts(folder, 1)
    if settings["algorithm"] == "dvpo":
        for row in rows[:3]:
            np.testing.assert_allclose(row["values"], values_by_hand(settings["gvm"]["path"], row), atol=bound)
    else:
        for row in rows[:3]:
            assert row["reward"] == pytest.approx(values_by_hand(settings["reward_model"]["path"], row)[-1], abs=bound)
