"""What in a run's metrics deserves attention, by the metrics' bounds and by comparing metrics."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean

from dvpo_ray.health.alarms import trend
from dvpo_ray.monitoring.catalogue import find_metric
from dvpo_ray.monitoring.charts import number
from dvpo_ray.monitoring.run_data import RunData

LAST_STEPS = 5
LEAST_STEPS = 12
LEAST_TREND = 2.0
LOW_GVM_ACCURACY = 0.6


@dataclass(frozen=True)
class Finding:
    """Something that deserves attention, and what to do about it."""

    text: str
    advice: str


def findings(run: RunData) -> Iterator[Finding]:
    """Everything in a run that deserves attention, the worst first."""
    # The value rises while the gold score falls: the policy exploits errors of the GVM.
    value, gold = (run.column(name)[len(run.metrics) // 2 :] for name in ("value/terminal_mean", "reward/gold_mean"))
    if len(run.metrics) >= LEAST_STEPS and None not in (*value, *gold) and trend(value) > LEAST_TREND and trend(gold) < -LEAST_TREND:
        text = "The value rises while the gold score falls over the second half of the run: the policy exploits errors of the GVM."
        yield Finding(text, find_metric("reward/gold_mean").advice)

    accuracy = run.summary_number("gvm.heldout_accuracy.mean")
    if accuracy is not None and accuracy < LOW_GVM_ACCURACY:
        text = f"The GVM orders only {accuracy:.0%} of held-out pairs correctly by its mean value, less than {LOW_GVM_ACCURACY:.0%}."
        yield Finding(text, "Train it on more pairs, for more epochs, or with gvm.bradley_terry_weight.")

    for name in run.names():
        metric, last = find_metric(name), [value for value in run.column(name)[-LAST_STEPS:] if value is not None]
        if metric and last and metric.is_trouble(fmean(last)):
            yield Finding(f"{name} is {number(fmean(last))} on average over the last {len(last)} steps. {metric.trouble}", metric.advice)

    for name in run.names():
        steps = [row["step"] for row in run.metrics if name in row and row[name] is None]
        if steps:
            text = f"{name} was not finite at {len(steps)} of {len(run.metrics)} steps, first at step {steps[0]}."
            yield Finding(text, "Look at policy/grad_norm and mismatch/ at the steps before. Lower policy.learning_rate.")
