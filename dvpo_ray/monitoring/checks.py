"""What in a run's metrics deserves attention, found by the bounds of the catalogue and by comparing metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dvpo_ray.monitoring.catalogue import find_metric
from dvpo_ray.monitoring.charts import number
from dvpo_ray.monitoring.run_data import RunData

LAST_STEPS = 5
LOW_GVM_ACCURACY = 0.6


@dataclass(frozen=True)
class Finding:
    """Something that deserves attention, and what to do about it."""

    text: str
    advice: str


def findings(run: RunData) -> list[Finding]:
    """Everything in a run that deserves attention, the gravest first."""
    return [*_hacked_value_model(run), *_weak_value_model(run), *_beyond_bounds(run), *_not_finite(run)]


def _hacked_value_model(run: RunData) -> list[Finding]:
    """The GVM says better and better while the gold judge says worse: the policy exploits the GVM's errors."""
    value, gold = run.column("value/terminal_mean"), run.column("reward/gold_mean")
    if _trend(value) > 0 and _trend(gold) < 0:
        text = "The value rises while the gold score falls over the second half of the run: the policy exploits errors of the GVM."
        return [Finding(text, find_metric("reward/gold_mean").advice)]
    return []


def _trend(values: Sequence[float | None]) -> int:
    """Sign of the change from the third to the last quarter of a run; 0 when it is within two standard errors, or the run short."""
    quarter = len(values) // 4
    before, after = values[-2 * quarter : -quarter], values[-quarter:]
    if quarter < 3 or None in before or None in after:
        return 0
    change = np.mean(after) - np.mean(before)
    error = math.sqrt((np.var(before, ddof=1) + np.var(after, ddof=1)) / quarter)
    return int(np.sign(change)) if abs(change) > 2 * error else 0


def _weak_value_model(run: RunData) -> list[Finding]:
    accuracy = run.summary_number("gvm.heldout_accuracy.mean")
    if accuracy is None or accuracy >= LOW_GVM_ACCURACY:
        return []
    text = f"The GVM orders only {accuracy:.0%} of held-out pairs correctly by its mean value, under {LOW_GVM_ACCURACY:.0%}."
    return [Finding(text, "Train it on more pairs, for more epochs, or with gvm.bradley_terry_weight.")]


def _beyond_bounds(run: RunData) -> list[Finding]:
    found = []
    for name in run.names():
        metric = find_metric(name)
        last = [value for value in run.column(name)[-LAST_STEPS:] if value is not None]
        if metric and last and metric.is_trouble(float(np.mean(last))):
            text = f"{name} is {number(float(np.mean(last)))} on average over the last {len(last)} steps. {metric.trouble}"
            found.append(Finding(text, metric.advice))
    return found


def _not_finite(run: RunData) -> list[Finding]:
    found = []
    for name in run.names():
        steps = [row["step"] for row in run.metrics if name in row and row[name] is None]
        if steps:
            text = f"{name} was not finite at {len(steps)} of {len(run.metrics)} steps, first at step {steps[0]}."
            found.append(Finding(text, "Look at policy/grad_norm and mismatch/ at the steps before; lower policy.learning_rate."))
    return found
