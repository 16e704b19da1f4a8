"""Means and gains of held-out prompts with their bootstrap confidence intervals."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dvpo_ray.evaluation import gain
from dvpo_ray.evaluation.gain import gain_of, gold_gain, mean_ci

scores = st.lists(st.floats(-1, 1), min_size=1, max_size=20)


def test_interval_of_a_large_sample_is_the_normal_one():
    values = np.random.default_rng(1).normal(0.3, 0.5, size=4000)
    mean, low, high = mean_ci(values)
    half = 1.96 * values.std(ddof=1) / np.sqrt(len(values))
    assert mean == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.05 * half)


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(400):
        _, low, high = mean_ci(rng.normal(size=50), resamples=1000)
        covered += low <= 0.0 <= high
    assert 0.91 <= covered / 400 <= 0.98


def test_pairing_cancels_the_spread_between_prompts():
    rng = np.random.default_rng(3)
    before = rng.normal(scale=10.0, size=200)
    after = before + rng.normal(0.2, 0.1, size=200)
    result = gain_of(before, after)
    low, high = result["gain_ci95"]
    assert result["gain"] == pytest.approx((after - before).mean())
    assert 0.1 < low < result["gain"] < high < 0.3


def test_no_change_gives_an_interval_around_zero():
    before = np.random.default_rng(4).normal(size=300)
    result = gain_of(before, before + np.tile([0.5, -0.5], 150))
    assert result["gain"] == pytest.approx(0.0, abs=1e-12)
    assert result["gain_ci95"][0] < 0.0 < result["gain_ci95"][1]


def test_the_gain_of_a_run_is_read_from_its_evaluations(tmp_path):
    (tmp_path / "evaluation").mkdir()
    for step, gold in ((0, [0.1, 0.2]), (30, [0.5, 0.8])):
        rows = [json.dumps({"prompt": "p", "response": "a\u2028b\x85", "gold": score, "kl": 0.0}, ensure_ascii=False) for score in gold]
        (tmp_path / "evaluation" / f"step_{step:06d}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    assert gold_gain(tmp_path, 30) == gain_of([0.1, 0.2], [0.5, 0.8])
    assert gold_gain(tmp_path, 30)["prompts"] == 2


def test_many_prompts_are_resampled_in_pieces(monkeypatch):
    values = np.random.default_rng(6).normal(size=100)
    whole = mean_ci(values)
    monkeypatch.setattr(gain, "_DRAWS_AT_ONCE", 1000)
    assert mean_ci(values) == pytest.approx(whole, abs=0.02)


@settings(max_examples=30, deadline=None)
@given(scores, st.floats(-5, 5))
def test_shifting_every_score_shifts_the_interval(values, shift):
    shifted = mean_ci(np.array(values) + shift, resamples=200)
    np.testing.assert_allclose(shifted, np.array(mean_ci(values, resamples=200)) + shift, atol=1e-9)


@settings(max_examples=30, deadline=None)
@given(scores)
def test_interval_holds_between_the_extremes(values):
    mean, low, high = mean_ci(values, resamples=200)
    assert min(values) - 1e-12 <= low <= high <= max(values) + 1e-12
    assert min(values) - 1e-12 <= mean <= max(values) + 1e-12
