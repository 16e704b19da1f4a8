"""Monte-Carlo values: what a policy makes of the states in the middle of its responses, and how far estimates are from that.

The protocol is VinePPO's (arXiv 2410.01679). A response of T tokens has the states t = 0..T, after t of its tokens. The value of a
state under a judge is the mean score of whole responses that begin with those t tokens and that the policy finished.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dvpo_ray.batch import RaggedBatch

CONTINUATIONS_STREAM = 1
"""Stream of random numbers that makes continuations independent of the responses they begin with."""


@dataclass(frozen=True)
class States:
    """S states of the responses of a batch.

    Attributes:
        row: int64 [S], row of the batch.
        tokens: int64 [S], response tokens before the state, 0 to T.
        share: float64 [S], the share of the response that was asked for.
    """

    row: np.ndarray
    tokens: np.ndarray
    share: np.ndarray

    def flat_index(self, batch: RaggedBatch) -> np.ndarray:
        """Position of each state's last token in the batch's flat arrays, where per-token values have the value of the state, int64 [S]."""
        return batch.offsets[self.row] + batch.prompt_lengths[self.row] + self.tokens - 1


def states_at(batch: RaggedBatch, shares: Sequence[float]) -> States:
    """The state of every row after each share of its response, rounded up to a token; row after row."""
    tokens = np.ceil(np.outer(batch.response_lengths, shares) - 1e-9).astype(np.int64)
    rows = np.repeat(np.arange(batch.num_rows), len(shares))
    return States(rows, tokens.reshape(-1), np.tile(np.asarray(shares, dtype=np.float64), batch.num_rows))


def finish(
    batch: RaggedBatch, states: States, count: int, max_response_tokens: int, sample: Callable[[Sequence[list[int]], int], RaggedBatch]
) -> list[list[list[int]]]:
    """Whole responses from every state on, `count` for each.

    Nothing can follow a state at the end of a response: its responses are that response itself.

    Args:
        max_response_tokens: at which a response is cut off, its beginning included.
        sample: samples one response to each prompt, given token ids and a stream of random numbers; the rows keep their order.

    Returns:
        [S][count] token ids of responses, without their prompts.
    """
    prompts = [batch.tokens[batch.offsets[r] : batch.response(r).start].tolist() for r in range(batch.num_rows)]
    responses = [batch.tokens[batch.response(r)].tolist() for r in range(batch.num_rows)]
    beginnings = [responses[row][:tokens] for row, tokens in zip(states.row, states.tokens, strict=True)]
    is_open = states.tokens < batch.response_lengths[states.row]
    requests = [prompts[states.row[s]] + beginnings[s] for s in np.flatnonzero(is_open) for _ in range(count)]
    if not requests:
        return [[beginning] * count for beginning in beginnings]
    sampled = sample(requests, CONTINUATIONS_STREAM)
    # A sample that goes on past the limit and is cut there equals one that was stopped there.
    endings = iter(sampled.tokens[sampled.response(i)].tolist() for i in range(sampled.num_rows))
    return [
        [(beginning + next(endings))[:max_response_tokens] for _ in range(count)] if unfinished else [beginning] * count
        for beginning, unfinished in zip(beginnings, is_open, strict=True)
    ]


# ----------------------------------------------------------------------------------------------------------- errors


def fit_affine(values: np.ndarray, targets: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Least squares of targets on values, both [n]: maps the unit of one to that of the other. A constant value gets slope 0."""
    values, targets = np.asarray(values, dtype=np.float64), np.asarray(targets, dtype=np.float64)
    variance = values.var()
    slope = float(np.cov(values, targets, bias=True)[0, 1] / variance) if variance > 0 else 0.0
    offset = float(targets.mean() - slope * values.mean())
    return lambda more: offset + slope * np.asarray(more, dtype=np.float64)


def error_metrics(estimates: np.ndarray, samples: np.ndarray) -> dict[str, float]:
    """Bias, root mean squared error and correlation of estimates against the means of samples.

    The mean of m samples is noisy itself; on average (variance of the samples) / m of the squared error is that noise, which is
    subtracted. It also lowers the correlation.

    Args:
        estimates: [n]; samples: [n, m] with m of at least 2.

    Returns:
        `bias`: mean of estimate minus target; `rmse`: 0 where the noise explains all of the error; `correlation`: NaN where one side is constant.
    """
    samples = np.asarray(samples, dtype=np.float64)
    means = samples.mean(axis=1)
    noise = (samples.var(axis=1, ddof=1) / samples.shape[1]).mean()
    error = np.asarray(estimates, dtype=np.float64) - means
    varies = np.std(estimates) > 0 and means.std() > 0
    return {
        "bias": float(error.mean()),
        "rmse": float(np.sqrt(max(0.0, np.mean(error**2) - noise))),
        "correlation": float(np.corrcoef(estimates, means)[0, 1]) if varies else float("nan"),
    }
