"""The ragged batch refuses malformed arrays and loses nothing when rows are split and joined."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dvpo_ray.batch import Fields, RaggedBatch

rows = st.lists(st.tuples(st.lists(st.integers(0, 99), min_size=1, max_size=5), st.lists(st.integers(0, 99), max_size=6)), min_size=1, max_size=8)


def make(pairs) -> RaggedBatch:
    prompts, responses = zip(*pairs, strict=True)
    log_probs = {"log_probs": [[-float(t) for t in r] for r in responses]}
    gold = {"gold": [float(len(r)) for r in responses]}
    return RaggedBatch.from_rows(prompts, responses, step=7, policy_version=6, by_response_token=log_probs, by_row=gold)


def same(a: RaggedBatch, b: RaggedBatch) -> bool:
    arrays = ("tokens", "offsets", "prompt_lengths", "steps", "row_ids", "policy_versions")
    own = all(np.array_equal(getattr(a, n), getattr(b, n)) for n in arrays)
    fields = ((a.by_token, b.by_token), (a.by_row, b.by_row))
    return own and all(left.keys() == right.keys() and all(np.array_equal(left[n], right[n]) for n in left) for left, right in fields)


def test_positions_of_a_row():
    batch = RaggedBatch.from_rows([[1, 2], [3]], [[4, 5, 6], [7]], by_response_token={"log_probs": [[-1, -2, -3], [-4]]})
    assert batch.tokens.tolist() == [1, 2, 4, 5, 6, 3, 7]
    assert batch.tokens[batch.response(0)].tolist() == [4, 5, 6]
    assert batch.tokens[batch.states(0)].tolist() == [2, 4, 5, 6]  # T + 1 states, the first after the last prompt token
    assert batch.by_token["log_probs"].tolist() == [0, 0, -1, -2, -3, 0, -4]
    assert batch.response_mask.tolist() == [False, False, True, True, True, False, True]
    assert batch.row_of_token.tolist() == [0, 0, 0, 0, 0, 1, 1]


def test_rows_are_told_apart_by_step_and_row():
    """A row that was started in an earlier step keeps its identity."""
    earlier = RaggedBatch.from_rows([[1], [1]], [[2], [3]], step=4, row_ids=[1, 0], policy_version=3)
    later = RaggedBatch.from_rows([[1], [1]], [[4], [5]], step=5, row_ids=[0, 1], policy_version=4)
    batch = RaggedBatch.concatenate([later, earlier]).sorted_by_id()
    assert list(zip(batch.steps.tolist(), batch.row_ids.tolist(), strict=True)) == [(4, 0), (4, 1), (5, 0), (5, 1)]
    assert batch.tokens[batch.response_mask].tolist() == [3, 2, 4, 5]
    assert batch.policy_versions.tolist() == [-1, 3, -1, 3, -1, 4, -1, 4]  # prompt tokens have no version


def test_what_a_role_says_is_added_by_token_and_by_row():
    batch = RaggedBatch.from_rows([[1], [1]], [[2], [3, 4]])
    scored = batch.with_fields(Fields(by_token={"values": np.arange(5.0)}), Fields(by_row={"rewards": np.array([1.0, 2.0])}))
    assert scored.by_token["values"].tolist() == [0, 1, 2, 3, 4] and scored.by_row["rewards"].tolist() == [1.0, 2.0]
    assert scored.only().by_token == {} and scored.only().by_row.keys() == {"truncated", "rewards"}
    with pytest.raises(ValueError, match="rewards has shape .* one number per row"):
        batch.with_fields(Fields(by_row={"rewards": np.zeros(5)}))


@given(rows, st.randoms(use_true_random=False))
def test_taking_apart_and_putting_together_keeps_every_row(pairs, random):
    batch = make(pairs)
    order = list(range(batch.num_rows))
    random.shuffle(order)
    cut = random.randint(0, batch.num_rows)
    halves = [batch.select(order[:cut]), batch.select(order[cut:])]
    assert same(RaggedBatch.concatenate(halves).sorted_by_id(), batch)


@given(rows)
def test_every_token_is_prompt_or_response(pairs):
    batch = make(pairs)
    assert batch.response_mask.sum() == batch.response_lengths.sum() == sum(len(r) for _, r in pairs)
    assert batch.num_tokens == sum(len(p) + len(r) for p, r in pairs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offsets": np.array([0, 3])}, "offsets"),
        ({"prompt_lengths": np.array([3])}, "prompt tokens"),
        ({"prompt_lengths": np.array([0])}, "prompt token"),
        ({"row_ids": np.array([0, 1])}, "row_ids"),
        ({"steps": np.array([0, 1])}, "steps"),
        ({"policy_versions": np.array([0])}, "policy_versions has shape .* one number per token"),
        ({"by_token": {"values": np.zeros(3, np.float32)}}, "values has shape .* one number per token"),
        ({"by_row": {"truncated": np.array([False]), "gold": np.zeros(2)}}, "gold has shape .* one number per row"),
        ({"by_row": {}}, "truncated is missing"),
    ],
)
def test_a_malformed_batch_is_refused(change, message):
    good = {
        "tokens": np.array([5, 6]),
        "offsets": np.array([0, 2]),
        "prompt_lengths": np.array([1]),
        "steps": np.array([1]),
        "row_ids": np.array([0]),
        "policy_versions": np.array([-1, 0]),
        "by_row": {"truncated": np.array([False])},
    }
    RaggedBatch(**good)
    with pytest.raises(ValueError, match=message):
        RaggedBatch(**(good | change))


def test_batches_with_different_fields_do_not_mix():
    with pytest.raises(ValueError, match="different fields"):
        RaggedBatch.concatenate([make([([1], [2])]), RaggedBatch.from_rows([[1]], [[2]])])
