"""Bootstrap confidence intervals."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dvpo_ray.evaluation import intervals
from dvpo_ray.evaluation.intervals import mean_ci, paired_bootstrap_ci

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
    gain, low, high = paired_bootstrap_ci(before, after)
    assert gain == pytest.approx((after - before).mean())
    assert 0.1 < low < gain < high < 0.3


def test_no_change_gives_an_interval_around_zero():
    before = np.random.default_rng(4).normal(size=300)
    after = before + np.tile([0.5, -0.5], 150)
    gain, low, high = paired_bootstrap_ci(before, after)
    assert gain == pytest.approx(0.0, abs=1e-12)
    assert low < 0.0 < high


def test_seed_decides_the_interval():
    before, after = np.random.default_rng(5).normal(size=(2, 30))
    assert paired_bootstrap_ci(before, after, seed=7) == paired_bootstrap_ci(before, after, seed=7)
    assert paired_bootstrap_ci(before, after, seed=7) != paired_bootstrap_ci(before, after, seed=8)


def test_many_prompts_are_resampled_in_pieces(monkeypatch):
    values = np.random.default_rng(6).normal(size=100)
    whole = mean_ci(values)
    monkeypatch.setattr(intervals, "_DRAWS_AT_ONCE", 1000)
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


@pytest.mark.parametrize(
    ("values", "message"),
    [([], "one number per prompt"), ([[1.0]], "one number per prompt"), ([0.0, float("nan")], "value 1 is not finite")],
)
def test_refuses_what_has_no_mean(values, message):
    with pytest.raises(ValueError, match=message):
        mean_ci(values)


def test_refuses_unequal_lengths():
    with pytest.raises(ValueError, match="the same prompts"):
        paired_bootstrap_ci([1.0, 2.0], [1.0])


def test_refuses_an_impossible_confidence():
    with pytest.raises(ValueError, match="confidence"):
        mean_ci([1.0], confidence=1.0)
