"""Value health on the real loop: an alarm ends a run in order, and an ensemble that disagrees makes advantages smaller."""

from __future__ import annotations

import json

import numpy as np
import pytest
from gvm_artifacts import make_gvm
from loop_runs import gae_by_hand, rollouts, run, values_by_hand

from dvpo_ray.config.schema import Config
from dvpo_ray.errors import InputError
from dvpo_ray.gvm.artifact import OutcomeSpec
from dvpo_ray.training.policy_inputs import load_inputs

pytestmark = pytest.mark.slow


def test_an_alarm_stops_the_run_in_order_and_resuming_goes_on(loop_settings, tmp_path):
    others_off = {"trend_significance": None, "max_gold_divergence": None, "min_gold_correlation": None, "max_value_bias": None}
    health = others_off | {"window_steps": 3, "on_alarm": "stop", "max_calibration_error": 1e-9}
    settings = loop_settings | {"health": health, "train": {"steps": 5, "trackers": []}, "checkpoint": {"every_steps": 100}}
    out = tmp_path / "run"
    metrics = run(settings, out)
    assert [row["step"] for row in metrics] == [1, 2, 3]
    assert metrics[2]["health/calibration_error_late"] > 0 and "health/estimate_mean" in metrics[0]
    assert (out / "checkpoints" / "step_000003").is_dir() and (out / "final" / "model.safetensors").is_file()
    summary = json.loads((out / "summary.json").read_text())
    assert summary["state"] == "stopped" and summary["steps"] == 3 and set(summary["evaluations"]) == {"0", "3"}
    assert [(alarm["step"], alarm["name"]) for alarm in summary["alarms"]] == [(1, "cut_off"), (3, "calibration")]  # only the second stops the run
    for text in ("differ from the final estimate", "are cut off at rollout.max_response_tokens"):
        assert text in (out / "report.html").read_text()
    resumed = run(settings, out, resume=True)
    assert [row["step"] for row in resumed] == [1, 2, 3, 4, 5]
    summary = json.loads((out / "summary.json").read_text())
    assert summary["state"] == "finished" and len(summary["alarms"]) == 2


def test_disagreement_of_an_ensemble_scales_advantages(loop_settings, tiny_model, tmp_path):
    other = str(make_gvm(tmp_path / "other", tiny_model, bias=0.75))  # the same values, shifted by 0.5: they differ by 0.25 each way
    ensemble = {"scorer": {"ensemble": [other]}, "train": {"steps": 1, "trackers": []}}
    (metrics,) = run(loop_settings | ensemble, tmp_path / "run", advantage={"disagreement_coefficient": 2.0})
    assert metrics["health/disagreement"] == pytest.approx(0.25, abs=1e-6)
    rows = rollouts(tmp_path / "run", 1)
    spread = np.concatenate([values_by_hand(loop_settings["gvm"]["path"], row) for row in rows]).std(dtype=np.float64)
    scaled = gae_by_hand(rows) / (1 + 2.0 * 0.25 / spread)
    np.testing.assert_allclose(np.concatenate([row["advantages"] for row in rows]), scaled, rtol=1e-3, atol=1e-4)


def test_an_ensemble_on_another_scale_is_refused(loop_settings, tiny_model, tmp_path):
    other = str(make_gvm(tmp_path / "other", tiny_model, bias=0.75, outcome=OutcomeSpec(kind="score", scale=1.0)))
    with pytest.raises(InputError, match=r"scorer\.ensemble: .*other was trained with another outcome than"):
        load_inputs(Config.model_validate(loop_settings | {"scorer": {"ensemble": [other]}}))
