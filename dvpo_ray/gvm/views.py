"""How well values rank and predict held-out responses: pure functions of numpy arrays."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dvpo_ray.gvm.pairs import PairBatch

PERCENTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99)
POSITIONS = (25, 50, 75, 100)
LENGTH_TOLERANCE = 0.1
CALIBRATION_BINS = 10
_Z95 = 1.959964


@dataclass(frozen=True)
class HeldoutValues:
    """Values of all states of P held-out pairs, flat; chosen and rejected rows alternate.

    Attributes:
        values: float32 [S], `values[0..T]` of each row, row after row.
        lengths: int64 [2P], T + 1 of each row.
        outcomes: float32 [2P], r of each row.
    """

    values: np.ndarray
    lengths: np.ndarray
    outcomes: np.ndarray

    @classmethod
    def from_parts(cls, pairs: PairBatch, parts: list[tuple[np.ndarray, np.ndarray]]) -> HeldoutValues:
        """Join the results of several workers; each part has the indices of some pairs and the flat values of all their states."""
        lengths = pairs.batch.state_lengths
        rows: list[np.ndarray] = [np.zeros(0, np.float32)] * len(lengths)
        for chosen, flat in parts:
            index = (2 * chosen[:, None] + np.array([0, 1])).reshape(-1)
            for row, values in zip(index, np.split(flat, np.cumsum(lengths[index])[:-1]), strict=True):
                rows[row] = values
        return cls(np.concatenate(rows), lengths, pairs.outcomes)

    @property
    def num_pairs(self) -> int:
        return len(self.lengths) // 2

    @cached_property
    def rows(self) -> list[np.ndarray]:
        """`values[0..T]` of each row."""
        return np.split(self.values, np.cumsum(self.lengths)[:-1])

    @cached_property
    def state_outcomes(self) -> np.ndarray:
        """r of every state, float32 [S]."""
        return np.repeat(self.outcomes, self.lengths)


# --------------------------------------------------------------------------------------------------------- ranking


def ranked_right(scores: np.ndarray) -> np.ndarray:
    """For each pair 1 if the chosen row has the higher score, 0.5 on a tie, else 0; in scores [2P] chosen and rejected alternate."""
    chosen, rejected = np.asarray(scores, dtype=np.float64).reshape(-1, 2).T
    return np.where(chosen == rejected, 0.5, chosen > rejected)


def response_scores(heldout: HeldoutValues) -> dict[str, np.ndarray]:
    """One number per response, [2P], for each view of its values[1..T].

    `mean` and `last`; the percentiles `p1` .. `p99`; `position_25` .. `position_100`, the value after this percentage of
    the response tokens, rounded up.
    """
    rows = [row[1:] for row in heldout.rows]
    views = {"mean": np.array([row.mean() for row in rows]), "last": np.array([row[-1] for row in rows])}
    percentiles = np.array([np.percentile(row, PERCENTILES) for row in rows])
    views |= {f"p{p}": percentiles[:, i] for i, p in enumerate(PERCENTILES)}
    for percent in POSITIONS:
        views[f"position_{percent}"] = np.array([row[-(-percent * len(row) // 100) - 1] for row in rows])
    return views


def length_matched(heldout: HeldoutValues) -> np.ndarray:
    """True for pairs whose responses differ in length by at most a tenth of the longer one, bool [P]."""
    tokens = (heldout.lengths - 1).reshape(-1, 2)
    return np.abs(tokens[:, 0] - tokens[:, 1]) <= LENGTH_TOLERANCE * tokens.max(axis=1)


def accuracies(heldout: HeldoutValues) -> dict[str, np.ndarray]:
    """`ranked_right` of each pair, by view.

    The views are those of `response_scores`, `mean` and `last` of length-matched pairs, and the baseline `longer_wins`.
    """
    views = {name: ranked_right(scores) for name, scores in response_scores(heldout).items()}
    matched = length_matched(heldout)
    if matched.any():
        views |= {f"length_matched_{name}": views[name][matched] for name in ("mean", "last")}
    views["longer_wins"] = ranked_right(heldout.lengths)
    return views


def wilson_interval(share: float, n: int) -> tuple[float, float]:
    """95 % interval of a share of n pairs (Wilson 1927); a tie counts as half a success.

    Pairs count as independent, also those of one prompt. On the quickstart's held-out pairs, three or four a prompt of different samples,
    the variance of the share over prompts differs from this by less than a fifth.
    """
    centre = share + _Z95**2 / (2 * n)
    spread = _Z95 * np.sqrt(share * (1 - share) / n + _Z95**2 / (4 * n * n))
    scale = 1 + _Z95**2 / n
    return max(0.0, float((centre - spread) / scale)), min(1.0, float((centre + spread) / scale))


# ------------------------------------------------------------------------------------------------------ regression


def regression_metrics(values: np.ndarray, outcomes: np.ndarray) -> dict[str, float | None]:
    """Mean squared error, and 1 - Var(r - V) / Var(r), which is None if all outcomes are equal; both arrays are [n]."""
    error = outcomes.astype(np.float64) - values
    variance = float(np.var(outcomes, dtype=np.float64))
    return {"mse": float(np.mean(error**2)), "explained_variance": 1.0 - float(np.var(error)) / variance if variance > 0 else None}


def value_spread(heldout: HeldoutValues) -> float:
    """Standard deviation of the values of all states, in standard deviations of their outcomes; infinite if all outcomes are equal."""
    outcomes = float(np.std(heldout.state_outcomes, dtype=np.float64))
    return float(np.std(heldout.values, dtype=np.float64)) / outcomes if outcomes else float("inf")


def regression_by_decile(heldout: HeldoutValues) -> list[dict]:
    """`regression_metrics` of the states in each tenth of the response: tenth d has d/10 <= t/T < (d + 1)/10, the last one t = T too."""
    # In whole numbers: t / T times ten would round some states at the start of a tenth down to the one before.
    decile = np.concatenate([np.minimum(10 * np.arange(length) // (length - 1), 9) for length in heldout.lengths])
    bins = []
    for d in np.unique(decile):
        inside = decile == d
        metrics = regression_metrics(heldout.values[inside], heldout.state_outcomes[inside])
        bins.append({"from": float(d / 10), "to": float((d + 1) / 10), "states": int(inside.sum())} | metrics)
    return bins


# ----------------------------------------------------------------------------------------------------- calibration


def binary_calibration(values: np.ndarray, outcomes: np.ndarray) -> dict:
    """Predicted against observed probability of being the chosen response, P = (V + 1) / 2 clipped to [0, 1], in equal bins.

    Args:
        values: [n]; outcomes: [n], +1 or -1.

    Returns:
        `error`: the expected calibration error (Naeini et al. 2015), the mean of |predicted - observed| weighted by states;
        `bins`: mean prediction, observed share and number of states of every bin that is not empty.
    """
    predicted = np.clip((values.astype(np.float64) + 1) / 2, 0.0, 1.0)
    observed = (outcomes.astype(np.float64) + 1) / 2
    return _binned(predicted, observed, np.minimum((predicted * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1))


def score_calibration(values: np.ndarray, outcomes: np.ndarray) -> dict:
    """Mean value against mean outcome, as in `binary_calibration`, in bins of equal numbers of states; `error` is in units of outcome."""
    ranks = np.argsort(np.argsort(values, kind="stable"), kind="stable")
    return _binned(values.astype(np.float64), outcomes.astype(np.float64), ranks * CALIBRATION_BINS // len(values))


def _binned(predicted: np.ndarray, observed: np.ndarray, index: np.ndarray) -> dict:
    rows = [
        {"predicted": float(predicted[inside].mean()), "observed": float(observed[inside].mean()), "states": int(inside.sum())}
        for inside in (index == b for b in np.unique(index))
    ]
    error = sum(abs(row["predicted"] - row["observed"]) * row["states"] for row in rows) / len(predicted)
    return {"error": error, "bins": rows}
