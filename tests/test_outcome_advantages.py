"""Advantages from one reward per response, against hand-computed numbers and invariants."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dvpo_ray.batch import RaggedBatch
from dvpo_ray.policy.advantages import compute_advantages, value_targets

OUTCOME_MODES = ["ppo", "grpo", "rloo", "remax", "reinforce"]


def make_batch(rewards, kls, values=None, truncated=None, row_ids=None, greedy=0.0) -> RaggedBatch:
    """Rows with a prompt of 2 tokens; `kls[r]` has one number per response token, `values[r]` one more.

    `greedy` is the reward of the greedy response, one number for all prompts or one per row.
    """
    batch = RaggedBatch.from_rows(
        [[1, 1]] * len(rewards),
        [[2] * len(kl) for kl in kls],
        truncated=truncated,
        row_ids=row_ids,
        by_response_token={"log_probs": kls, "reference_log_probs": [[0.0] * len(kl) for kl in kls]},
    )
    batch = batch.with_row_fields(rewards=np.array(rewards, np.float64), greedy_rewards=np.broadcast_to(greedy, len(rewards)).astype(np.float64))
    flat = [9.0] * batch.num_tokens if values is None else [v for row in values for v in [9.0, *row]]
    return batch.with_token_fields(values=np.array(flat, np.float32))


SETTINGS = dict(gae_lambda=1.0, kl_coefficient=0.0, whiten=False, value_whitening="batch", truncated="bootstrap", samples_per_prompt=2)


def advantages_of(batch, mode, **changes) -> list[list[float]]:
    result = compute_advantages(batch, mode=mode, **(SETTINGS | changes))
    return [result.advantages[batch.response(r)].tolist() for r in range(batch.num_rows)]


# One prompt, two samples of 3 and 1 tokens.
KLS = [[0.5, -0.5, 1.0], [2.0]]
REWARDS = [1.0, 3.0]
VALUES = [[0.1, 0.3, 0.2, 7.0], [0.4, 7.0]]  # the last value is after the end and must not matter


@pytest.mark.parametrize(
    ("mode", "changes", "expected"),
    [
        ("ppo", {"gae_lambda": 0.0}, [[0.2, -0.1, 0.8], [2.6]]),
        ("ppo", {"gae_lambda": 1.0}, [[0.9, 0.7, 0.8], [2.6]]),
        ("ppo", {"gae_lambda": 0.5}, [[0.35, 0.3, 0.8], [2.6]]),
        ("ppo", {"gae_lambda": 1.0, "kl_coefficient": 0.1}, [[0.8, 0.65, 0.7], [2.4]]),
        ("rloo", {}, [[-2.0] * 3, [2.0]]),
        ("rloo", {"kl_coefficient": 0.1}, [[-1.9] * 3, [1.9]]),  # S = 0.9 and 2.8
        ("remax", {"greedy": 0.5}, [[0.5] * 3, [2.5]]),
        ("remax", {"greedy": 0.5, "kl_coefficient": 0.1}, [[0.4, 0.45, 0.4], [2.3]]),
        ("reinforce", {}, [[-1.0] * 3, [1.0]]),
        ("reinforce", {"kl_coefficient": 0.1}, [[-0.95, -0.9, -0.95], [0.95]]),  # mean S = 1.85
    ],
)
def test_by_hand(mode, changes, expected):
    greedy = changes.pop("greedy", 0.0)
    found = advantages_of(make_batch(REWARDS, KLS, VALUES, greedy=greedy), mode, **changes)
    for row, numbers in zip(found, expected, strict=True):
        np.testing.assert_allclose(row, numbers, atol=1e-6)


def test_grpo_by_hand():
    # rewards 1 3 5 of one prompt: mean 3, unbiased deviation 2; the other prompt has a single sample
    found = advantages_of(make_batch([1.0, 3.0, 5.0, 8.0], [[0.0]] * 4), "grpo", samples_per_prompt=3)
    np.testing.assert_allclose([row[0] for row in found], [-2 / 2.0001, 0.0, 2 / 2.0001, 0.0], atol=1e-6)


def test_samples_that_score_alike_teach_nothing():
    for mode in ("grpo", "rloo"):
        assert advantages_of(make_batch([2.0, 2.0], KLS), mode) == [[0.0] * 3, [0.0]]


def test_returns_of_ppo_are_the_rewards_to_go_at_lambda_one():
    batch = make_batch(REWARDS, KLS, VALUES)
    result = compute_advantages(batch, mode="ppo", **(SETTINGS | {"kl_coefficient": 0.1, "whiten": True}))
    targets = value_targets(batch, result.unwhitened)
    np.testing.assert_allclose([targets[batch.response(0)], np.repeat(targets[batch.response(1)], 3)], [[0.9, 0.95, 0.9], [2.8] * 3], atol=1e-6)
    assert not targets[~batch.response_mask].any()


def test_a_penalty_for_cut_off_responses_lowers_their_reward():
    for mode in ("ppo", "rloo", "reinforce", "remax"):
        cut = make_batch(REWARDS, KLS, VALUES, truncated=[False, True])
        lower = make_batch([1.0, 2.5], KLS, VALUES)
        penalised = advantages_of(cut, mode, truncated="penalty", truncation_penalty=0.5)
        assert penalised == advantages_of(lower, mode)


def test_a_masked_sample_is_no_baseline():
    found = advantages_of(make_batch([1.0, 3.0, 8.0], [[0.0]] * 3, truncated=[False, False, True]), "rloo", samples_per_prompt=3, truncated="mask")
    assert found == [[-2.0], [2.0], [0.0]]


def test_samples_of_two_steps_are_never_one_prompt():
    first, second = make_batch([1.0, 3.0], [[0.0]] * 2), make_batch([10.0, 20.0], [[0.0]] * 2)
    both = RaggedBatch.concatenate([first, replace(second, steps=second.steps + 1)])
    assert advantages_of(both, "rloo") == [[-2.0], [2.0], [-10.0], [10.0]]


numbers = st.floats(-3, 3, width=32)


@st.composite
def groups(draw) -> tuple[list[float], list[list[float]], list[list[float]]]:
    """Two prompts with two samples each."""
    kls = [draw(st.lists(numbers, min_size=1, max_size=5)) for _ in range(4)]
    values = [draw(st.lists(numbers, min_size=len(kl) + 1, max_size=len(kl) + 1)) for kl in kls]
    return draw(st.lists(numbers, min_size=4, max_size=4)), kls, values


@settings(max_examples=100, deadline=None)
@given(groups(), st.sampled_from(OUTCOME_MODES), st.booleans(), st.permutations(range(4)), st.integers(0, 4))
def test_order_and_sharding_of_rows_change_nothing(rows, mode, whiten, order, cut):
    batch = make_batch(*rows, greedy=[0.3, 0.3, -1.0, -1.0])
    settings_ = SETTINGS | {"mode": mode, "gae_lambda": 0.9, "kl_coefficient": 0.1, "whiten": whiten}
    shuffled = RaggedBatch.concatenate([batch.select(order[cut:]), batch.select(order[:cut])])
    result = compute_advantages(shuffled, **settings_)
    restored = shuffled.with_token_fields(advantages=result.advantages).sorted_by_id()
    np.testing.assert_allclose(restored.by_token["advantages"], compute_advantages(batch, **settings_).advantages, atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(groups(), st.sampled_from(["grpo", "rloo"]))
def test_the_samples_of_a_prompt_cancel(rows, mode):
    found = advantages_of(make_batch(*rows), mode, kl_coefficient=0.1)
    assert found[0][0] + found[1][0] == pytest.approx(0.0, abs=1e-5) == found[2][0] + found[3][0]


@pytest.mark.parametrize("mode", OUTCOME_MODES)
def test_a_batch_with_nothing_in_the_loss(mode):
    batch = make_batch([1.0, 2.0], KLS, truncated=[True, True])
    result = compute_advantages(batch, mode=mode, **(SETTINGS | {"kl_coefficient": 0.1, "whiten": True, "truncated": "mask"}))
    assert not result.advantages.any() and not result.loss_mask.any()
