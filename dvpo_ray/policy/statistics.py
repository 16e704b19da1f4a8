"""The `reward/`, `value/`, `advantage/`, `kl/` and `response_length/` metrics of a step's batch."""

from __future__ import annotations

import numpy as np

from dvpo_ray.batch import RaggedBatch


def sequence_kl(batch: RaggedBatch) -> np.ndarray:
    """Sum of log pi - log pi_ref over the response tokens of each row, in nats, float64 [R]: a one-sample estimate of the KL."""
    kl = (batch.by_token["log_probs"].astype(np.float64) - batch.by_token["reference_log_probs"])[batch.response_mask]
    return np.bincount(batch.row_of_token[batch.response_mask], kl, minlength=batch.num_rows)


def explained_variance(values: list[np.ndarray]) -> float:
    """1 - Var(V_T - V_t) / Var(V_T) over all states t < T: how well earlier values predict the terminal one.

    Args:
        values: the T + 1 values of each row.

    Returns:
        The fraction, at most 1; NaN if all terminal values are equal.
    """
    earlier = np.concatenate([v[:-1] for v in values]).astype(np.float64)
    terminal = np.concatenate([np.full(len(v) - 1, v[-1]) for v in values]).astype(np.float64)
    variance = terminal.var()
    return float(1.0 - (terminal - earlier).var() / variance) if variance > 0 else float("nan")


def batch_statistics(batch: RaggedBatch) -> dict[str, float]:
    """Metrics of a batch with the token fields `advantages`, `loss_mask`, `log_probs` and `reference_log_probs`.

    Metrics of the token field `values` and the row fields `rewards` and `gold` are added if the batch has them.
    """
    advantages = batch.by_token["advantages"][batch.by_token["loss_mask"] > 0].astype(np.float64)
    kl = sequence_kl(batch)
    lengths = batch.response_lengths
    metrics = {
        "kl/reference_mean": kl.mean(),
        "kl/reference_max": kl.max(),
        "response_length/mean": lengths.mean(),
        "response_length/max": lengths.max(),
        "response_length/truncated_fraction": batch.truncated.mean(),
    }
    if len(advantages):
        metrics |= {f"advantage/{name}": getattr(np, name)(advantages) for name in ("mean", "std", "min", "max")}
    if "values" in batch.by_token:
        metrics |= _value_statistics(batch)
    if "rewards" in batch.by_row:
        rewards = batch.by_row["rewards"]
        metrics |= {"reward/model_mean": rewards.mean(), "reward/model_std": rewards.std()}
    if "gold" in batch.by_row:
        gold = batch.by_row["gold"]
        metrics |= {"reward/gold_mean": gold.mean(dtype=np.float64), "reward/gold_std": gold.std(dtype=np.float64)}
    return {name: float(value) for name, value in metrics.items()}


def _value_statistics(batch: RaggedBatch) -> dict[str, float]:
    values = [batch.by_token["values"][batch.states(r)] for r in range(batch.num_rows)]
    all_values = np.concatenate(values).astype(np.float64)
    return {
        "value/mean": all_values.mean(),
        "value/std": all_values.std(),
        "value/terminal_mean": np.mean([v[-1] for v in values], dtype=np.float64),
        "value/explained_variance": explained_variance(values),
    }
