"""The ragged batch refuses what is malformed and loses nothing when rows are taken apart and put together."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dvpo_ray.batch import RaggedBatch, balanced_shards

rows = st.lists(st.tuples(st.lists(st.integers(0, 99), min_size=1, max_size=5), st.lists(st.integers(0, 99), max_size=6)), min_size=1, max_size=8)


def make(pairs) -> RaggedBatch:
    prompts, responses = zip(*pairs, strict=True)
    return RaggedBatch.from_rows(prompts, responses, response_fields={"log_probs": [[-float(t) for t in r] for r in responses]})


def same(a: RaggedBatch, b: RaggedBatch) -> bool:
    arrays = ("tokens", "offsets", "prompt_lengths", "row_ids", "truncated", "policy_version")
    return all(np.array_equal(getattr(a, n), getattr(b, n)) for n in arrays) and all(np.array_equal(a.fields[n], b.fields[n]) for n in a.fields)


def test_positions_of_a_row():
    batch = RaggedBatch.from_rows([[1, 2], [3]], [[4, 5, 6], [7]], response_fields={"log_probs": [[-1, -2, -3], [-4]]})
    assert batch.tokens.tolist() == [1, 2, 4, 5, 6, 3, 7]
    assert batch.tokens[batch.response(0)].tolist() == [4, 5, 6]
    assert batch.tokens[batch.states(0)].tolist() == [2, 4, 5, 6]  # T + 1 states, the first after the last prompt token
    assert batch.fields["log_probs"].tolist() == [0, 0, -1, -2, -3, 0, -4]
    assert batch.response_mask.tolist() == [False, False, True, True, True, False, True]
    assert batch.row_of_token.tolist() == [0, 0, 0, 0, 0, 1, 1]


@given(rows, st.randoms(use_true_random=False))
def test_taking_apart_and_putting_together_keeps_every_row(pairs, random):
    batch = make(pairs)
    order = list(range(batch.num_rows))
    random.shuffle(order)
    cut = random.randint(0, batch.num_rows)
    halves = [batch.select(order[:cut]), batch.select(order[cut:])]
    assert same(RaggedBatch.concatenate(halves).sorted_by_row_id(), batch)


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
        ({"fields": {"values": np.zeros(3, np.float32)}}, "field values"),
    ],
)
def test_a_malformed_batch_is_refused(change, message):
    good = {
        "tokens": np.array([5, 6]),
        "offsets": np.array([0, 2]),
        "prompt_lengths": np.array([1]),
        "row_ids": np.array([0]),
        "truncated": np.array([False]),
        "policy_version": np.array([0]),
    }
    RaggedBatch(**good)
    with pytest.raises(ValueError, match=message):
        RaggedBatch(**(good | change))


def test_batches_with_different_fields_do_not_mix():
    with pytest.raises(ValueError, match="different fields"):
        RaggedBatch.concatenate([make([([1], [2])]), RaggedBatch.from_rows([[1]], [[2]])])


@given(st.lists(st.integers(1, 500), min_size=1, max_size=20), st.integers(1, 4))
def test_shards_hold_every_row_once_and_like_numbers_of_tokens(lengths, shards):
    lengths = np.array(lengths * shards)
    parts = balanced_shards(lengths, shards)
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(lengths)))
    assert {len(part) for part in parts} == {len(lengths) // shards}
    tokens = [int(lengths[part].sum()) for part in parts]
    assert max(tokens) - min(tokens) <= lengths.max()  # dealing back and forth never drifts by more than one row


def test_uneven_shards_are_refused():
    with pytest.raises(ValueError, match="3 rows can't be shared evenly by 2"):
        balanced_shards(np.array([1, 2, 3]), 2)
