"""Preference pairs as one ragged batch, two rows with an outcome each per pair; and the minibatches of an epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dvpo_ray.batch import RaggedBatch
from dvpo_ray.data.encoding import EncodedPair, rows_of_pairs
from dvpo_ray.data.preferences import no_scores
from dvpo_ray.errors import InputError


@dataclass(frozen=True)
class PairBatch:
    """P preference pairs.

    Attributes:
        batch: 2P rows; row 2p is the chosen response of pair p, row 2p + 1 the rejected one. The row field `outcome`, float32 [2P], is r.
    """

    batch: RaggedBatch

    @property
    def num_pairs(self) -> int:
        return self.batch.num_rows // 2

    @property
    def outcomes(self) -> np.ndarray:
        """r of each row, float32 [2P]."""
        return self.batch.by_row["outcome"]

    @property
    def pair_tokens(self) -> np.ndarray:
        """Padded tokens of each pair, int64 [P]: twice the length of its longer row, as both are in the same micro-batch."""
        return 2 * self.batch.lengths.reshape(-1, 2).max(axis=1)

    @property
    def pair_lengths(self) -> np.ndarray:
        """Tokens of each pair, int64 [P]."""
        return self.batch.lengths.reshape(-1, 2).sum(axis=1)

    @property
    def pair_states(self) -> np.ndarray:
        """Supervised states of each pair, int64 [P]."""
        return self.batch.state_lengths.reshape(-1, 2).sum(axis=1)

    def select(self, pairs: np.ndarray) -> PairBatch:
        """The given pairs, in the given order."""
        rows = (2 * np.asarray(pairs, dtype=np.int64)[:, None] + np.array([0, 1])).reshape(-1)
        return PairBatch(self.batch.select(rows))


def build_pairs(pairs: Sequence[EncodedPair], outcome: Literal["binary", "score"], scale: float) -> PairBatch:
    """The rows of encoded pairs with their outcomes.

    Args:
        outcome: `binary`: +1 for chosen and -1 for rejected responses; `score`: the score of each response in the data, times `scale`.

    Raises:
        InputError: `outcome` is `score` and a pair has no scores.
    """
    outcomes: list[float] = []
    for pair in pairs:
        scores = (pair.chosen_score, pair.rejected_score)
        if outcome == "score" and None in scores:
            raise InputError(no_scores(pair.where))
        outcomes += (1.0, -1.0) if outcome == "binary" else (scale * score for score in scores)
    return PairBatch(rows_of_pairs(pairs).with_row_fields(outcome=np.array(outcomes, dtype=np.float32)))


def minibatches(num_pairs: int, pairs_per_step: int, epoch: int, seed: int) -> list[np.ndarray]:
    """The pairs of each optimizer step of one epoch: a new shuffle, split into nearly equal parts of at most `pairs_per_step`.

    The parts are nearly equal because a last minibatch of a few pairs would move the weights as far as a full one.
    """
    order = np.random.default_rng([seed, epoch]).permutation(num_pairs)
    return np.array_split(order, -(-num_pairs // pairs_per_step))
