"""The health of the estimate: every formula against numbers by hand, every alarm on a run that deserves it and on one that does not."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dvpo_ray.batch import RaggedBatch
from dvpo_ray.config.schema import HealthConfig
from dvpo_ray.health.alarms import RULES, HealthMonitor, cut_off_note, trend
from dvpo_ray.health.diagnostics import (
    against_gold,
    along_the_response,
    calibration_error,
    confidence,
    correlation,
    ensemble_std,
    health_statistics,
    quantile_bins,
)
from dvpo_ray.monitoring.catalogue import find_metric

floats = st.floats(-10, 10)


def batch_of(
    values: list[list[float]] | None = None,
    rewards: list[float] | None = None,
    kl: list[float] | None = None,
    gold: list[float] | None = None,
    **fields,
) -> RaggedBatch:
    """Rows of two prompt tokens and as many response tokens as fit the T + 1 values, three where there are none."""
    count = len(values or rewards)
    lengths = [len(v) - 1 for v in values] if values else [3] * count
    batch = RaggedBatch.from_rows([[1, 2]] * count, [[7] * n for n in lengths])
    zeros = np.zeros(batch.num_tokens, np.float32)
    last = batch.offsets[1:] - 1
    own = {"log_probs": zeros.copy(), "reference_log_probs": zeros}
    own["log_probs"][last] = kl or 0.0
    if values is not None:
        own["values"] = np.concatenate([[99.0, *v] for v in values]).astype(np.float32)  # nothing may read the first prompt token
    by_row = {name: np.array(numbers) for name, numbers in (("rewards", rewards), ("gold", gold)) if numbers is not None}
    return batch.with_token_fields(**own, **fields).with_row_fields(**by_row)


# ---------------------------------------------------------------------------------------------------- diagnostics


def test_calibration_error_by_hand():
    # two bins: predictions 0, 0.2 (mean 0.1) against outcomes 0, 1 (mean 0.5), and 0.6, 0.8 (mean 0.7) against 1, 0 (mean 0.5)
    error = calibration_error(np.array([0.8, 0.0, 0.2, 0.6]), np.array([0.0, 0.0, 1.0, 1.0]), bins=2)
    assert error == pytest.approx((0.4 + 0.2) / 2)


@given(st.lists(floats, min_size=1, max_size=40), floats)
def test_a_constant_offset_is_the_calibration_error(predictions, offset):
    x = np.array(predictions)
    assert calibration_error(x, x + offset) == pytest.approx(abs(offset), abs=1e-9)


def test_values_along_the_response_by_hand():
    metrics = along_the_response([np.array([0.0, 0.25, 0.75, 1.0]), np.array([0.5, 0.5, 0.5, -1.0])], np.array([1.0, -1.0]))
    assert metrics == pytest.approx(
        {
            # one state of each row in each third; two predictions, two bins of one
            "health/calibration_error_early": (1.0 + 1.5) / 2,
            "health/calibration_error_mid": (0.75 + 1.5) / 2,
            "health/calibration_error_late": (0.25 + 1.5) / 2,
            "health/value_drift": (1.0 - 1.5) / 2,
        }
    )


def test_a_response_of_one_token_has_an_early_state_only():
    metrics = along_the_response([np.array([0.25, 1.0])], np.array([1.0]))
    assert metrics == {"health/calibration_error_early": 0.75, "health/value_drift": 0.75}


def test_against_gold_by_hand():
    """z(estimate) is -1, 1, -1, 1 and z(gold) -1, -1, 1, 1: errors 0, 2, -2, 0."""
    estimates, gold = np.array([0.0, 2.0, 0.0, 2.0]), np.array([-5.0, -5.0, 5.0, 5.0])
    metrics = against_gold(estimates, gold, kl=np.array([3.0, 9.0, 5.0, 4.0]), values=None)
    # by KL: rows 0 and 3 in the low bin, row 2 in the middle, row 1 in the high one
    expected = {"gold_correlation": 0.0, "value_error_kl_low": 0.0, "value_error_kl_mid": 2.0, "value_error_kl_high": 2.0, "value_bias_kl_high": 2.0}
    assert metrics == pytest.approx({f"health/{name}": value for name, value in expected.items()})


@given(st.lists(st.tuples(floats, floats), min_size=2, max_size=30), st.floats(0.1, 10), floats)
def test_comparison_with_gold_has_no_units(rows, scale, shift):
    estimates, gold = np.array(rows).T
    if min(estimates.std(), gold.std()) < 1e-3:
        return
    kl = np.arange(len(rows), dtype=float)
    plain = against_gold(estimates, gold, kl, None)
    assert against_gold(scale * estimates + shift, gold, kl, None) == pytest.approx(plain, abs=1e-6)
    assert plain["health/gold_correlation"] == pytest.approx(np.corrcoef(estimates, gold)[0, 1], abs=1e-9)


def test_nothing_is_said_where_gold_does_not_vary():
    assert against_gold(np.array([1.0, 2.0]), np.array([3.0, 3.0]), np.zeros(2), None) == {}
    assert correlation(np.ones(3), np.arange(3.0)) == 0.0


@given(st.lists(floats, min_size=1, max_size=20))
def test_bins_hold_every_row_once_in_order(x):
    bins = quantile_bins(np.array(x), 3)
    assert sorted(np.concatenate(bins).tolist()) == list(range(len(x)))
    assert max(map(len, bins)) - min(map(len, bins)) <= 1
    assert np.all(np.diff(np.array(x)[np.concatenate(bins)]) >= 0)


VALUES = [[0.0, 0.5, 1.0], [0.0, -0.5, -1.0], [0.0, 0.25, 0.5]]


def test_a_value_model_with_gold_has_every_metric():
    metrics = health_statistics(batch_of(VALUES, kl=[1.0, 2.0, 3.0], gold=[1.0, -1.0, 0.5]))
    assert metrics["health/estimate_mean"] == pytest.approx(0.5 / 3)
    assert metrics["health/gold_correlation"] == pytest.approx(1.0)
    assert metrics["health/gold_correlation_half"] == pytest.approx(1.0)
    assert metrics["health/value_error_kl_high"] == pytest.approx(0.0, abs=1e-7)
    assert {find_metric(name).name for name in metrics} == set(metrics)


def test_without_a_judge_what_remains_is_the_values_own():
    names = {name.removeprefix("health/") for name in health_statistics(batch_of(VALUES))}
    assert names == {"estimate_mean", "estimate_std", "calibration_error_early", "calibration_error_mid", "value_drift"}


def test_a_baseline_without_values_compares_its_rewards():
    metrics = health_statistics(batch_of(rewards=[1.0, 2.0, 6.0], kl=[1, 2, 3], gold=[0.1, 0.2, 0.6]))
    assert metrics["health/estimate_mean"] == 3.0 and metrics["health/gold_correlation"] == pytest.approx(1.0)
    assert not any("calibration" in name or "half" in name for name in metrics)


def test_with_a_critic_the_reward_is_the_estimate():
    metrics = health_statistics(batch_of(VALUES, rewards=[3.0, 3.0, 3.0]))
    assert metrics["health/estimate_mean"] == 3.0 and metrics["health/value_drift"] == 3.0


# --------------------------------------------------------------------------------------------------- disagreement


def test_disagreement_is_the_standard_deviation_over_the_models():
    std = ensemble_std([np.array([1.0, 2.0], np.float32), np.array([3.0, 2.0], np.float32)])
    assert std.tolist() == [1.0, 0.0] and std.dtype == np.float32


def test_confidence_by_hand():
    """Values -1 and 1 have standard deviation 1: with c = 2, a disagreement of 0.5 halves the advantage."""
    batch = batch_of([[-1.0, 1.0]], disagreement=np.array([9.0, 0.0, 0.5], np.float32))
    assert confidence(batch, 2.0).tolist() == [1 / 19, 1.0, 0.5]
    assert confidence(batch, 0.0).tolist() == [1.0, 1.0, 1.0]
    assert health_statistics(batch)["health/disagreement"] == 0.25  # over the two states of the response


# --------------------------------------------------------------------------------------------------------- alarms


def test_trend_by_hand():
    # slope 0.8, residuals -0.3 0.9 -0.9 0.3: standard error sqrt(1.8 / 2 / 5) = 0.424264
    assert trend([0.0, 2.0, 1.0, 3.0]) == pytest.approx(0.8 / math.sqrt(0.18))
    assert trend([1.0, 2.0, 3.0]) == math.inf and trend([3.0, 2.0, 1.0]) == -math.inf
    assert trend([2.0, 2.0, 2.0]) == 0.0 == trend([1.0, 2.0])


HEALTHY = {
    "health/estimate_mean": 0.0,
    "health/estimate_std": 1.0,
    "reward/gold_mean": 0.0,
    "reward/gold_std": 0.5,
    "health/gold_correlation": 0.6,
    "health/value_bias_kl_high": 0.0,
    "health/calibration_error_late": 0.05,
    "response_length/truncated_fraction": 0.1,
}


def watch(steps: int, settings: dict | None = None, **by_step) -> HealthMonitor:
    """A monitor after some steps; `by_step` gives a metric (with _ for /) as a function of the step."""
    monitor = HealthMonitor(HealthConfig(**{"window_steps": 5} | (settings or {})))
    for step in range(1, steps + 1):
        changed = {name.replace("__", "/"): value(step) for name, value in by_step.items()}
        monitor.observe(step, HEALTHY | changed)
    return monitor


def noisy(slope: float):
    return lambda step: slope * step + 0.01 * (-1) ** step


def test_a_healthy_run_raises_no_alarm():
    assert watch(40, {"max_calibration_error": 0.1}, health__estimate_mean=noisy(0.02), reward__gold_mean=noisy(0.01)).alarms == []


@pytest.mark.parametrize(
    ("name", "by_step", "settings"),
    [
        ("opposite_trends", {"health__estimate_mean": noisy(0.05), "reward__gold_mean": noisy(-0.02)}, {"max_gold_divergence": None}),
        ("gold_divergence", {"health__estimate_mean": lambda step: 2.0 * (step > 1)}, {}),
        ("gold_correlation", {"health__gold_correlation": lambda step: 0.05}, {}),
        ("value_bias", {"health__value_bias_kl_high": lambda step: 0.7}, {}),
        ("calibration", {"health__calibration_error_late": lambda step: 0.2}, {"max_calibration_error": 0.1}),
    ],
)
def test_each_rule_raises_its_own_alarm(name, by_step, settings):
    alarms = watch(5, settings, **by_step).alarms
    assert [(alarm.step, alarm.name) for alarm in alarms] == [(5, name)]
    assert "\n" not in str(alarms[0]) and alarms[0].advice in str(alarms[0])
    assert watch(5, settings | {RULES[name].setting: None}, **by_step).alarms == []  # a null threshold turns the rule off
    assert watch(4, settings, **by_step).alarms == []  # half a window is not judged


def test_responses_that_are_mostly_cut_off_are_said_at_once_and_once():
    def cut(step: int) -> float:
        return 0.97 if step > 1 else 0.5

    monitor = watch(20, response_length__truncated_fraction=cut)
    assert [(alarm.step, alarm.name) for alarm in monitor.alarms] == [(2, "cut_off")]
    line = str(monitor.alarms[0])
    assert line.startswith("step 2: 97% of the responses are cut off at rollout.max_response_tokens (health.max_cut_off_fraction 0.5).")
    assert "Raise rollout.max_response_tokens" in line and "\n" not in line
    later = HealthMonitor(HealthConfig())
    later.load_state_dict(json.loads(json.dumps(monitor.state_dict())))
    later.restart()
    assert later.observe(21, HEALTHY | {"response_length/truncated_fraction": 1.0})[1] == []
    assert watch(5, {"max_cut_off_fraction": None}, response_length__truncated_fraction=cut).alarms == []
    assert cut_off_note(0.97, HealthConfig()) == [line.removeprefix("step 2: ")]
    assert cut_off_note(0.5, HealthConfig()) == cut_off_note(1.0, HealthConfig(max_cut_off_fraction=None)) == []


def test_divergence_is_measured_in_spreads_of_the_start():
    monitor = HealthMonitor(HealthConfig())
    assert monitor.observe(1, HEALTHY)[0] == {"health/gold_divergence": 0.0}
    later = HEALTHY | {"health/estimate_mean": 2.0, "reward/gold_mean": 0.25, "health/estimate_std": 0.1}
    assert monitor.observe(2, later)[0] == {"health/gold_divergence": pytest.approx(2.0 / 1.0 - 0.25 / 0.5)}


def test_an_alarm_repeats_after_another_window_only():
    monitor = watch(17, health__gold_correlation=lambda step: 0.0)
    assert [alarm.step for alarm in monitor.alarms] == [5, 10, 15]


def test_after_a_restart_the_next_estimate_is_judged_by_itself():
    monitor = watch(5, health__gold_correlation=lambda step: 0.0)
    monitor.restart()
    for step in range(6, 10):
        added, raised = monitor.observe(step, HEALTHY | {"health/gold_correlation": 0.0, "health/estimate_mean": 5.0})
        assert raised == [] and added["health/gold_divergence"] == 0.0
    assert len(monitor.observe(10, HEALTHY | {"health/gold_correlation": 0.0})[1]) == 1
    assert [alarm.step for alarm in monitor.alarms] == [5, 10]


def test_without_gold_only_the_rules_that_need_none_judge():
    monitor = HealthMonitor(HealthConfig(window_steps=3, max_calibration_error=0.01))
    for step in (1, 2, 3):
        assert monitor.observe(step, {"health/calibration_error_late": 0.02, "health/estimate_mean": float(step)})[0] == {}
    assert [alarm.name for alarm in monitor.alarms] == ["calibration"]


def test_a_resumed_monitor_raises_the_same_alarms():
    def bad(step: int) -> dict:
        return HEALTHY | {"health/gold_correlation": 0.0, "health/estimate_mean": 0.3 * step}

    whole, first, second = (HealthMonitor(HealthConfig(window_steps=4)) for _ in range(3))
    for step in range(1, 15):
        whole.observe(step, bad(step))
    for step in range(1, 7):
        first.observe(step, bad(step))
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for step in range(7, 15):
        second.observe(step, bad(step))
    assert second.alarms == whole.alarms and len(whole.alarms) > 3


def test_advice_and_thresholds_name_settings_that_exist():
    assert {rule.setting for rule in RULES.values()} <= set(HealthConfig.model_fields)
    assert {find_metric(name).name for rule in RULES.values() for name in rule.reads} == {name for rule in RULES.values() for name in rule.reads}
