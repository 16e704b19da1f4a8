"""What a run gained on held-out prompts: means and gains with bootstrap confidence intervals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

FAR_NATS = 5.0
"""KL per response. A policy that has come this far without a clear gain has moved enough for one."""
_DRAWS_AT_ONCE = 1 << 22  # limits the drawn values to 32 MiB, however many prompts there are


def mean_ci(values: Sequence[float] | np.ndarray, resamples: int = 10_000) -> tuple[float, float, float]:
    """The mean with its 95 % percentile-bootstrap confidence interval (Efron 1979). Equal values give equal intervals.

    Args:
        values: one number per prompt, [n], n at least 1.
        resamples: bootstrap samples, each of n prompts drawn with replacement.

    Returns:
        (mean, low, high) in the unit of the values.
    """
    values, rng = np.asarray(values, dtype=np.float64), np.random.default_rng(0)
    rows = max(1, _DRAWS_AT_ONCE // len(values))
    sizes = [(min(rows, resamples - done), len(values)) for done in range(0, resamples, rows)]
    means = np.concatenate([rng.choice(values, size).mean(axis=1) for size in sizes])
    low, high = np.quantile(means, [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


def gain_of(before: Sequence[float], after: Sequence[float]) -> dict:
    """Scores of the same prompts before and after training, compared prompt by prompt.

    Prompts are resampled with both of their scores, so the spread between prompts cancels in the gain.

    Args:
        before, after: scores in the same order of prompts, [n] each.

    Returns:
        `prompts` (n), `before` and `after` (`mean` and `ci95` each), `gain` (the mean of after - before) and `gain_ci95`.
    """
    gain, *gain_ci95 = mean_ci(np.subtract(after, before))
    sides = {name: mean_ci(scores) for name, scores in (("before", before), ("after", after))}
    return {
        "prompts": len(before),
        **{name: {"mean": mean, "ci95": [low, high]} for name, (mean, low, high) in sides.items()},
        "gain": gain,
        "gain_ci95": gain_ci95,
    }


def read_evaluation(run_folder: Path, step: int) -> list[dict]:
    """The rows of evaluation/step_*.jsonl: `prompt`, `response`, `gold` (None without a judge) and `kl`."""
    path = run_folder / "evaluation" / f"step_{step:06d}.jsonl"
    with path.open(encoding="utf-8") as lines:  # str.splitlines would also cut within a text that has a line separator of Unicode
        return [json.loads(line) for line in lines]


def gold_gain(run_folder: Path, last_step: int) -> dict:
    """The `gold` entry of summary.json: `gain_of` the evaluations at step 0 and at the last step."""
    return gain_of(*([row["gold"] for row in read_evaluation(run_folder, step)] for step in (0, last_step)))


def verdict(gold: dict, kl: float | None = None, alarms: Sequence[str] = ()) -> str:
    """What a gain and its interval say.

    Args:
        gold: `gain_of` the scores.
        kl: of the policy from the reference, in nats per response, where it is known. Far away, or after an alarm, more steps are no advice.
        alarms: names of the alarms that doubt the estimate.
    """
    low, high = gold["gain_ci95"]
    if low > 0:
        return "The policy got better on prompts it was never trained on: the interval of the gain is clear of 0."
    if high < 0:
        return "The policy got worse: the interval of the gain is below 0."
    unclear = "No clear change: the interval of the gain contains 0."
    if alarms:
        return f"{unclear} More steps would not mend what the alarm {alarms[-1]} found: do what it advises first (docs/health.md)."
    if kl is not None and kl > FAR_NATS:
        return f"{unclear} The policy is far from the reference already: raise kl.coefficient, improve the value model, or judge more prompts."
    return f"{unclear} More steps or a larger policy.learning_rate move the policy further."
