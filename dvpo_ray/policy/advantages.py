"""Token advantages from a frozen value model's values (DVPO, arXiv 2502.16944); docs/method.md has the formulas.

Notation of one row: T response tokens, v[0..T] the values after 0..T of them, kl_t = log pi(y_t) - log pi_ref(y_t).
The credit of choosing y_t, before whitening:

    static_q    v[t] - beta * (kl_t + ... + kl_T)
    td          v[t] - v[t-1] - beta * kl_t
    gae         sum over l of lambda^l * td_{t+l}
    release     gae with lambda = 0.95 on whitened values with no value after the last token, as in the authors' released code

Everything is computed in float64, so that neither the order of the rows nor their sharding shows in the result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from dvpo_ray.batch import RaggedBatch
from dvpo_ray.policy.whitening import masked_whiten

RELEASE_LAMBDA = 0.95

TruncatedHandling = Literal["bootstrap", "mask", "penalty"]


@dataclass(frozen=True)
class AdvantageResult:
    """Advantages of a batch, and what they were made of.

    Attributes:
        advantages: float32 [N], the credit of choosing each response token; 0 on prompts and outside the loss.
        loss_mask: bool [N], response tokens that count in the loss.
        unwhitened: float32 [N], the advantages before the last whitening, in units of value (of whitened value in `release`).
        kl: float32 [N], log pi - log pi_ref of every response token, rows outside the loss included; 0 on prompts.
    """

    advantages: np.ndarray
    loss_mask: np.ndarray
    unwhitened: np.ndarray
    kl: np.ndarray


@dataclass(frozen=True)
class ModeInputs:
    """What an advantage mode may read: the rows in the loss, in float64.

    Attributes:
        batch: R rows of N tokens, of which n are response tokens.
        values: float64 [N], value of the state after each token, prompt included.
        kl_penalty: float64 [n], beta * kl_t of each response token.
        truncation_penalty: float64 [n], what the value after a token loses: 0 but at the last token of a penalised row.
        gae_lambda: trace decay.
    """

    batch: RaggedBatch
    values: np.ndarray
    kl_penalty: np.ndarray
    truncation_penalty: np.ndarray
    gae_lambda: float

    @cached_property
    def position(self) -> np.ndarray:
        """Position of each response token in the batch, int64 [n]. The position before it belongs to the same row."""
        return np.flatnonzero(self.batch.response_mask)

    @property
    def value_before(self) -> np.ndarray:
        """v[t-1] of each response token, float64 [n]."""
        return self.values[self.position - 1]

    @property
    def value_after(self) -> np.ndarray:
        """v[t] of each response token, less the penalty of a cut-off response, float64 [n]."""
        return self.values[self.position] - self.truncation_penalty

    def to_go(self, per_token: np.ndarray, decay: float) -> np.ndarray:
        """Discounted sum from each response token to the end of its row, float64 [n]."""
        return discounted_to_go(per_token, self.batch.response_lengths, decay)


def static_q(inputs: ModeInputs) -> np.ndarray:
    """Q(s_t, y_t) itself, less the KL still to come. The paper's advantage; it has no baseline."""
    return inputs.value_after - inputs.to_go(inputs.kl_penalty, decay=1.0)


def td(inputs: ModeInputs) -> np.ndarray:
    """What the token changed in value, less its KL."""
    return inputs.value_after - inputs.value_before - inputs.kl_penalty


def gae(inputs: ModeInputs) -> np.ndarray:
    """Generalised advantage estimation (Schulman et al. 2016) with gamma 1; lambda 1 telescopes to v[T] - v[t-1] - KL to go."""
    return inputs.to_go(td(inputs), inputs.gae_lambda)


def release(inputs: ModeInputs) -> np.ndarray:
    """The authors' released code: GAE with lambda 0.95 on values whitened over every position, and zero after the last token.

    Position j's output serves as the value of the state before token j+1. The output at the last token is never read, except
    that it takes part in the whitening. Without KL the result is -V_t + 0.05 * sum over l of 0.95^l * V_{t+1+l}.
    """
    whitened = masked_whiten(inputs.values, np.ones(len(inputs.values), dtype=bool))
    is_last = np.zeros(len(whitened), dtype=bool)
    is_last[inputs.batch.offsets[1:] - 1] = True
    after = np.where(is_last, 0.0, whitened)[inputs.position] - inputs.truncation_penalty
    deltas = after - whitened[inputs.position - 1] - inputs.kl_penalty
    return inputs.to_go(deltas, RELEASE_LAMBDA)


MODES: dict[str, Callable[[ModeInputs], np.ndarray]] = {"static_q": static_q, "td": td, "gae": gae, "release": release}
"""Each mode maps its inputs to the advantage of every response token before whitening, float64 [n]."""


def compute_advantages(
    batch: RaggedBatch,
    *,
    mode: str,
    gae_lambda: float,
    kl_coefficient: float,
    whiten: bool,
    truncated: TruncatedHandling,
    truncation_penalty: float = 0.0,
    values_field: str = "values",
) -> AdvantageResult:
    """Advantages of a whole rollout batch. Whitening spans the batch, so pass all of it at once.

    Args:
        batch: needs the fields `log_probs`, `reference_log_probs` and `values_field`.
        mode: a key of `MODES`.
        gae_lambda: trace decay of `gae`; no other mode reads it.
        kl_coefficient: beta of the per-token KL penalty; 0 when KL isn't in the reward.
        whiten: whiten over the response tokens in the loss. `release` always does.
        truncated: what happens to a response that was cut off. `bootstrap`: its last value stands in for the unknown outcome;
            `release` never reads that value and treats the row like any other. `mask`: the row is as if it weren't in the
            batch, in every whitening too. `penalty`: `truncation_penalty` is subtracted from its last value.
        truncation_penalty: in units of value (in `release`, of whitened value); only `penalty` reads it.
        values_field: the field that holds the values.

    Raises:
        ValueError: unknown mode or handling, a missing field, or a number that is not finite.
    """
    _check_choice("advantage mode", mode, MODES)
    _check_choice("truncated", truncated, ("bootstrap", "mask", "penalty"))
    _check_fields(batch, ("log_probs", "reference_log_probs", values_field))

    token_kl = np.where(batch.response_mask, batch.fields["log_probs"].astype(np.float64) - batch.fields["reference_log_probs"], 0.0)
    in_loss = ~batch.truncated if truncated == "mask" else np.ones(batch.num_rows, dtype=bool)
    loss_mask = batch.response_mask & np.repeat(in_loss, batch.lengths)

    rows = batch.select(np.flatnonzero(in_loss))
    inputs = ModeInputs(
        batch=rows,
        values=rows.fields[values_field].astype(np.float64),
        kl_penalty=kl_coefficient * token_kl[loss_mask],
        truncation_penalty=_last_token_penalty(rows, truncation_penalty if truncated == "penalty" else 0.0),
        gae_lambda=gae_lambda,
    )
    unwhitened = np.zeros(batch.num_tokens, dtype=np.float64)
    unwhitened[loss_mask] = MODES[mode](inputs)
    advantages = masked_whiten(unwhitened, loss_mask) if whiten or mode == "release" else unwhitened
    return AdvantageResult(
        advantages=advantages.astype(np.float32),
        loss_mask=loss_mask,
        unwhitened=unwhitened.astype(np.float32),
        kl=token_kl.astype(np.float32),
    )


def discounted_to_go(per_token: np.ndarray, lengths: np.ndarray, decay: float) -> np.ndarray:
    """Sum over l >= 0 of decay^l * x_{t+l}, within each row.

    Args:
        per_token: float64 [n], the rows one after the other.
        lengths: int64 [R], their lengths; they sum to n, and a row may be empty.
        decay: 0 gives x itself, 1 the plain sum to the end of the row.

    Returns:
        float64 [n]. A row's numbers depend on no other row.
    """
    longest_first = np.argsort(-lengths, kind="stable")
    last = np.cumsum(lengths)[longest_first] - 1
    steps = np.arange(lengths.max(initial=0))
    rows_reaching = np.searchsorted(-lengths[longest_first], -steps, side="left")  # rows of more than `step` tokens
    result = np.empty(len(per_token), dtype=np.float64)
    to_go = np.zeros(len(lengths), dtype=np.float64)
    for step, rows in zip(steps, rows_reaching, strict=True):
        at = last[:rows] - step
        to_go[:rows] = per_token[at] + decay * to_go[:rows]
        result[at] = to_go[:rows]
    return result


def _last_token_penalty(batch: RaggedBatch, penalty: float) -> np.ndarray:
    """The penalty at the last token of every cut-off response and 0 elsewhere, float64 [n]."""
    per_token = np.zeros(batch.num_tokens, dtype=np.float64)
    per_token[batch.offsets[1:][batch.truncated] - 1] = penalty
    return per_token[batch.response_mask]


def _check_choice(what: str, value: str, choices) -> None:
    if value not in choices:
        raise ValueError(f"unknown {what} {value!r}; choose one of {', '.join(choices)}")


def _check_fields(batch: RaggedBatch, names: tuple[str, ...]) -> None:
    """One number that isn't finite would reach every advantage through the whitening, so it is named here."""
    for name in names:
        if name not in batch.fields:
            raise ValueError(f"advantages need the field {name!r}; the batch has {', '.join(sorted(batch.fields)) or 'none'}")
        bad = np.flatnonzero(~np.isfinite(batch.fields[name]))
        if len(bad):
            row = batch.row_of_token[bad[0]]
            raise ValueError(f"field {name!r} of row {batch.row_ids[row]} is not finite at token {bad[0] - batch.offsets[row]}")
