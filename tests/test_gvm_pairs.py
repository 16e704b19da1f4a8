"""Pairs as ragged rows, and the split of minibatches over workers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dvpo_ray.data.encoding import EncodedPair
from dvpo_ray.errors import InputError
from dvpo_ray.gvm.pairs import build_pairs, minibatches


def pair(prompt, chosen, rejected, scores=(None, None)):
    return EncodedPair(prompt, chosen, rejected, False, True, *scores, where="pairs.jsonl:3")


PAIRS = [pair([1, 5], [6, 7, 2], [8]), pair([1], [9, 2], [9, 9, 9])]


def test_rows_alternate_chosen_and_rejected():
    pairs = build_pairs(PAIRS, "binary", 1.0)
    batch = pairs.batch
    assert [batch.tokens[batch.row(r)].tolist() for r in range(4)] == [[1, 5, 6, 7, 2], [1, 5, 8], [1, 9, 2], [1, 9, 9, 9]]
    assert pairs.outcomes.tolist() == [1.0, -1.0, 1.0, -1.0]
    assert batch.truncated.tolist() == [False, True, False, True]
    assert pairs.pair_tokens.tolist() == [10, 8]
    assert pairs.pair_states.tolist() == [6, 7]


def test_all_states_are_supervised_from_the_last_prompt_token_to_the_last_response_token():
    batch = build_pairs(PAIRS, "binary", 1.0).batch
    expected = np.concatenate([np.arange(batch.num_tokens)[batch.states(r)] for r in range(batch.num_rows)])
    assert batch.state_index.tolist() == expected.tolist() == [1, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12, 13, 14]


def test_selected_pairs_keep_their_rows_and_outcomes():
    pairs = build_pairs(PAIRS, "binary", 1.0)
    swapped = pairs.select(np.array([1, 0]))
    assert swapped.batch.tokens.tolist() == [1, 9, 2, 1, 9, 9, 9, 1, 5, 6, 7, 2, 1, 5, 8]
    assert swapped.outcomes.tolist() == [1.0, -1.0, 1.0, -1.0]


def test_score_outcomes_are_scaled():
    pairs = build_pairs([pair([1], [2], [3], (4.0, -1.5))], "score", 0.5)
    assert pairs.outcomes.tolist() == [2.0, -0.75]


def test_score_outcomes_need_scores():
    with pytest.raises(InputError, match=r"pairs.jsonl:3: gvm.outcome is score, but .* gvm.outcome=binary"):
        build_pairs(PAIRS, "score", 1.0)


@given(st.integers(1, 200), st.integers(1, 50), st.integers(0, 3))
def test_an_epoch_holds_every_pair_once_in_nearly_equal_minibatches(pairs, per_step, epoch):
    parts = minibatches(pairs, per_step, epoch, seed=7)
    assert sorted(np.concatenate(parts).tolist()) == list(range(pairs))
    sizes = [len(part) for part in parts]
    assert max(sizes) <= per_step and max(sizes) - min(sizes) <= 1


def test_epochs_and_seeds_shuffle_differently_and_repeatably():
    def order(epoch, seed):
        return np.concatenate(minibatches(50, 8, epoch, seed)).tolist()

    assert order(0, 1) == order(0, 1)
    assert order(0, 1) != order(1, 1) and order(0, 1) != order(0, 2)
