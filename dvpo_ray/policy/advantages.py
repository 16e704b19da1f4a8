"""Token advantages: those of DVPO, from the values of a frozen value model (arXiv 2502.16944), and those of the baselines.

docs/method.md has the formulas. Notation for one row: T response tokens, v[0..T] the values after 0..T of them,
kl_t = log pi(y_t) - log pi_ref(y_t). The credit for choosing y_t, before whitening:

    static_q    v[t] - beta * (kl_t + ... + kl_T)
    td          v[t] - v[t-1] - beta * kl_t
    gae         sum over l of lambda^l * td_{t+l}
    release     gae with lambda = 0.95 on whitened values with no value after the last token, as in the authors' released code;
                the values are whitened row by row, as its authors ran it, or over the batch

The modes in `dvpo_ray.policy.outcome_advantages` start from one reward per response instead.
Everything is computed in float64, so the result does not depend on the order or the sharding of the rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dvpo_ray.batch import RaggedBatch
from dvpo_ray.policy import outcome_advantages as outcome
from dvpo_ray.policy.mode_inputs import ModeInputs, ValueWhitening, masked_whiten

RELEASE_LAMBDA = 0.95

TruncatedHandling = Literal["bootstrap", "mask", "penalty"]


@dataclass(frozen=True)
class AdvantageResult:
    """The advantages of a batch.

    Attributes:
        advantages: float32 [N], the credit for choosing each response token; 0 on prompts and outside the loss.
        loss_mask: bool [N], True on the response tokens that count in the loss.
        unwhitened: float32 [N], the advantages before the last whitening, in units of value (of whitened value in `release`).
    """

    advantages: np.ndarray
    loss_mask: np.ndarray
    unwhitened: np.ndarray


def static_q(inputs: ModeInputs) -> np.ndarray:
    """Q(s_t, y_t) minus the KL from y_t on. This is the paper's advantage; it has no baseline."""
    return inputs.value_after - inputs.to_go(inputs.kl_penalty, decay=1.0)


def td(inputs: ModeInputs) -> np.ndarray:
    """The change in value that the token made, minus its KL."""
    return inputs.value_after - inputs.value_before - inputs.kl_penalty


def gae(inputs: ModeInputs) -> np.ndarray:
    """Generalised advantage estimation (Schulman et al. 2016) with gamma 1. With lambda 1 it is v[T] - v[t-1] - KL to go."""
    return inputs.to_go(td(inputs), inputs.gae_lambda)


def release(inputs: ModeInputs) -> np.ndarray:
    """As in the authors' released code: GAE with lambda 0.95 on values whitened over every position, and zero after the last token.

    The values are whitened within each row, as the authors ran it, or over the batch. The output at position j serves as the
    value of the state before token j+1. The output at the last token is used in the whitening only. Without KL the result is
    -V_t + 0.05 * sum over l of 0.95^l * V_{t+1+l}.
    """
    whitened = inputs.whitened_values
    after = np.where(inputs.is_last, 0.0, whitened[inputs.position]) - inputs.truncation_penalty
    deltas = after - whitened[inputs.position - 1] - inputs.kl_penalty
    return inputs.to_go(deltas, RELEASE_LAMBDA)


@dataclass(frozen=True)
class Mode:
    """How advantages are computed.

    Attributes:
        compute: returns the advantage of every response token before whitening, float64 [n].
        reads: the fields that it needs besides the log-probs.
        whitening: `always`, `never`, or `asked`: the caller decides.
    """

    compute: Callable[[ModeInputs], np.ndarray]
    reads: tuple[str, ...]
    whitening: Literal["always", "never", "asked"] = "asked"


MODES: dict[str, Mode] = {
    "static_q": Mode(static_q, ("values",)),
    "td": Mode(td, ("values",)),
    "gae": Mode(gae, ("values",)),
    "release": Mode(release, ("values",), "always"),
    "ppo": Mode(outcome.ppo, ("values", "rewards")),
    "grpo": Mode(outcome.grpo, ("rewards",), "never"),
    "rloo": Mode(outcome.rloo, ("rewards",), "never"),
    "remax": Mode(outcome.remax, ("rewards", "greedy_rewards"), "never"),
    "reinforce": Mode(outcome.reinforce, ("rewards",)),
}


def compute_advantages(
    batch: RaggedBatch,
    *,
    mode: str,
    gae_lambda: float,
    kl_coefficient: float,
    whiten: bool,
    value_whitening: ValueWhitening,
    truncated: TruncatedHandling,
    truncation_penalty: float = 0.0,
    samples_per_prompt: int = 1,
) -> AdvantageResult:
    """Advantages of a whole rollout batch. The last whitening is over the batch, so pass all of it at once.

    Args:
        batch: needs the token fields `log_probs` and `reference_log_probs`, and the fields that the mode reads.
        mode: a key of `MODES`.
        gae_lambda: trace decay of `gae` and `ppo`; no other mode uses it.
        kl_coefficient: beta of the per-token KL penalty; 0 when KL isn't in the reward.
        whiten: whiten over the response tokens in the loss, where the mode leaves it to the caller.
        value_whitening: `row`: `release` whitens the values of each row by themselves. `batch`: it whitens those of all rows
            together. No other mode uses it.
        truncated: how to treat a response that was cut off. `bootstrap`: its last value stands in for the unknown outcome;
            `release`, which never reads that value, and the modes with rewards, whose outcome is known, treat the row like any
            other. `mask`: the row is left out of the loss and of every whitening. `penalty`: `truncation_penalty` is
            subtracted from its last value, or from its reward.
        truncation_penalty: in units of value (in `release`, of whitened value) or of reward; only `penalty` uses it.
        samples_per_prompt: rows per prompt; they have consecutive row ids within a step.

    Raises:
        ValueError: a number in a field is not finite.
    """
    chosen = MODES[mode]
    _check_finite(batch, ("log_probs", "reference_log_probs", *chosen.reads))

    token_kl = batch.by_token["log_probs"].astype(np.float64) - batch.by_token["reference_log_probs"]
    in_loss = ~batch.truncated if truncated == "mask" else np.ones(batch.num_rows, dtype=bool)
    loss_mask = batch.response_mask & np.repeat(in_loss, batch.lengths)

    rows = batch.select(np.flatnonzero(in_loss))
    penalty = truncation_penalty if truncated == "penalty" else 0.0
    inputs = ModeInputs(
        batch=rows,
        values=rows.by_token["values"].astype(np.float64) if "values" in chosen.reads else None,
        kl_penalty=kl_coefficient * token_kl[loss_mask],
        penalty=penalty,
        gae_lambda=gae_lambda,
        value_whitening=value_whitening,
        rewards=rows.by_row["rewards"] - penalty * rows.truncated if "rewards" in chosen.reads else None,
        group=_prompt_groups(rows, samples_per_prompt),
    )
    unwhitened = np.zeros(batch.num_tokens, dtype=np.float64)
    unwhitened[loss_mask] = chosen.compute(inputs)
    whitens = chosen.whitening == "always" or (whiten and chosen.whitening == "asked")
    advantages = masked_whiten(unwhitened, loss_mask) if whitens else unwhitened
    return AdvantageResult(advantages.astype(np.float32), loss_mask, unwhitened.astype(np.float32))


def value_targets(batch: RaggedBatch, unwhitened: np.ndarray) -> np.ndarray:
    """Regression targets of a critic for the state before each response token: the advantage plus the old value, as in PPO.

    Args:
        batch: has the critic's `values` from before the update.
        unwhitened: float32 [N], from `AdvantageResult`.

    Returns:
        float32 [N], 0 on prompts.
    """
    position = np.flatnonzero(batch.response_mask)
    targets = np.zeros(batch.num_tokens, dtype=np.float32)
    targets[position] = unwhitened[position] + batch.by_token["values"][position - 1]
    return targets


def _prompt_groups(batch: RaggedBatch, samples_per_prompt: int) -> np.ndarray:
    """A number for the prompt of each row, int64 [R], from 0; rows of the same step and prompt have the same number."""
    _, group = np.unique(np.stack([batch.steps, batch.row_ids // samples_per_prompt]), axis=1, return_inverse=True)
    return group.reshape(-1)


def _check_finite(batch: RaggedBatch, names: tuple[str, ...]) -> None:
    """Refuse numbers that are not finite: through the whitening a single one would spoil every advantage."""
    fields = batch.by_row | batch.by_token
    for name in names:
        bad = np.flatnonzero(~np.isfinite(fields[name]))
        if len(bad) and name in batch.by_row:
            raise ValueError(f"field {name!r} of row {batch.row_ids[bad[0]]} is not finite")
        if len(bad):
            row = batch.row_of_token[bad[0]]
            raise ValueError(f"field {name!r} of row {batch.row_ids[row]} is not finite at token {bad[0] - batch.offsets[row]}")
