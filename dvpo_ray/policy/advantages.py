"""Token advantages: DVPO's, from a frozen value model's values (arXiv 2502.16944), and the baselines'; docs/method.md has the formulas.

Notation of one row: T response tokens, v[0..T] the values after 0..T of them, kl_t = log pi(y_t) - log pi_ref(y_t).
The credit of choosing y_t, before whitening:

    static_q    v[t] - beta * (kl_t + ... + kl_T)
    td          v[t] - v[t-1] - beta * kl_t
    gae         sum over l of lambda^l * td_{t+l}
    release     gae with lambda = 0.95 on whitened values with no value after the last token, as in the authors' released code

The modes of `dvpo_ray.policy.outcome_advantages` start from a reward per response instead.
Everything is computed in float64, so that neither the order of the rows nor their sharding shows in the result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dvpo_ray.batch import RaggedBatch
from dvpo_ray.policy import outcome_advantages as outcome
from dvpo_ray.policy.mode_inputs import ModeInputs
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


@dataclass(frozen=True)
class Mode:
    """How advantages are computed.

    Attributes:
        compute: maps the inputs to the advantage of every response token before whitening, float64 [n].
        reads: fields of the batch beside the log-probs.
        whitening: `always`, `never`, or `asked`: as the caller says.
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
    truncated: TruncatedHandling,
    truncation_penalty: float = 0.0,
    samples_per_prompt: int = 1,
) -> AdvantageResult:
    """Advantages of a whole rollout batch. Whitening spans the batch, so pass all of it at once.

    Args:
        batch: needs the token fields `log_probs` and `reference_log_probs`, and the fields that the mode reads.
        mode: a key of `MODES`.
        gae_lambda: trace decay of `gae` and `ppo`; no other mode reads it.
        kl_coefficient: beta of the per-token KL penalty; 0 when KL isn't in the reward.
        whiten: whiten over the response tokens in the loss, where the mode leaves it open.
        truncated: what happens to a response that was cut off. `bootstrap`: its last value stands in for the unknown outcome;
            `release` never reads that value and treats the row like any other, and so do the modes with rewards, whose outcome is
            known. `mask`: the row is as if it weren't in the batch, in every whitening too. `penalty`: `truncation_penalty` is
            subtracted from its last value, or from its reward.
        truncation_penalty: in units of value (in `release`, of whitened value) or of reward; only `penalty` reads it.
        samples_per_prompt: rows of one prompt, which have consecutive row ids within a step.

    Raises:
        ValueError: unknown mode or handling, a missing field, or a number that is not finite.
    """
    _check_choice("advantage mode", mode, MODES)
    _check_choice("truncated", truncated, ("bootstrap", "mask", "penalty"))
    chosen = MODES[mode]
    _check_fields(batch, ("log_probs", "reference_log_probs", *chosen.reads))

    token_kl = np.where(batch.response_mask, batch.by_token["log_probs"].astype(np.float64) - batch.by_token["reference_log_probs"], 0.0)
    in_loss = ~batch.truncated if truncated == "mask" else np.ones(batch.num_rows, dtype=bool)
    loss_mask = batch.response_mask & np.repeat(in_loss, batch.lengths)

    rows = batch.select(np.flatnonzero(in_loss))
    penalty = truncation_penalty if truncated == "penalty" else 0.0
    inputs = ModeInputs(
        batch=rows,
        values=rows.by_token["values"].astype(np.float64) if "values" in chosen.reads else None,
        kl_penalty=kl_coefficient * token_kl[loss_mask],
        truncation_penalty=_last_token_penalty(rows, penalty),
        gae_lambda=gae_lambda,
        rewards=rows.by_row["rewards"] - penalty * rows.truncated if "rewards" in chosen.reads else None,
        group=_prompt_groups(rows, samples_per_prompt),
    )
    unwhitened = np.zeros(batch.num_tokens, dtype=np.float64)
    unwhitened[loss_mask] = chosen.compute(inputs)
    whitens = chosen.whitening == "always" or (whiten and chosen.whitening == "asked")
    advantages = masked_whiten(unwhitened, loss_mask) if whitens else unwhitened
    return AdvantageResult(
        advantages=advantages.astype(np.float32),
        loss_mask=loss_mask,
        unwhitened=unwhitened.astype(np.float32),
        kl=token_kl.astype(np.float32),
    )


def value_targets(batch: RaggedBatch, unwhitened: np.ndarray) -> np.ndarray:
    """What a critic's value of the state before each response token is regressed on: the advantage plus that value, as in PPO.

    Args:
        batch: with the critic's `values` of before the update.
        unwhitened: float32 [N], of `AdvantageResult`.

    Returns:
        float32 [N], 0 on prompts.
    """
    position = np.flatnonzero(batch.response_mask)
    targets = np.zeros(batch.num_tokens, dtype=np.float32)
    targets[position] = unwhitened[position] + batch.by_token["values"][position - 1]
    return targets


def _prompt_groups(batch: RaggedBatch, samples_per_prompt: int) -> np.ndarray:
    """A number for the prompt of each row, int64 [R], from 0; rows of one step and prompt share it."""
    _, group = np.unique(np.stack([batch.steps, batch.row_ids // samples_per_prompt]), axis=1, return_inverse=True)
    return group.reshape(-1)


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
    fields = batch.by_row | batch.by_token
    for name in names:
        if name not in fields:
            raise ValueError(f"advantages need the field {name!r}; the batch has {', '.join(sorted(fields))}")
        bad = np.flatnonzero(~np.isfinite(fields[name]))
        if len(bad) and name in batch.by_row:
            raise ValueError(f"field {name!r} of row {batch.row_ids[bad[0]]} is not finite")
        if len(bad):
            row = batch.row_of_token[bad[0]]
            raise ValueError(f"field {name!r} of row {batch.row_ids[row]} is not finite at token {bad[0] - batch.offsets[row]}")
