"""Alarms over the last steps of a run: the model that judges the rollouts is no longer a good guide, or judges half responses; what to do."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from dvpo_ray.config.schema import HealthConfig


@dataclass(frozen=True)
class Alarm:
    """One alarm.

    Attributes:
        step: the last step of the window that raised it.
        name: of the rule.
        text: what was observed, in one sentence.
        advice: what to do.
    """

    step: int
    name: str
    text: str
    advice: str

    def __str__(self) -> str:
        return f"step {self.step}: {self.text} {self.advice}"


@dataclass(frozen=True)
class Rule:
    """A rule over one window.

    Attributes:
        reads: the metrics that it judges. It is silent if a step of the window lacks one.
        setting: key of `health` with the rule's threshold; null turns the rule off.
        observe: gets the columns of the window, in the order of `reads`, and the threshold. Returns a sentence, or None if
            all is well.
        advice: what to do.
        once: it judges every step by itself, is raised once in a run, and is only said: `health.on_alarm` does not apply.
    """

    reads: tuple[str, ...]
    setting: str
    observe: Callable[[list[np.ndarray], float], str | None]
    advice: str
    once: bool = False


def trend(values: Sequence[float] | np.ndarray) -> float:
    """The t statistic of the slope of the least-squares line through equally spaced values: slope / its standard error.

    Returns:
        0 for fewer than three values or no slope; infinite if the values lie exactly on a line with a slope.
    """
    count = len(values)
    if count < 3:
        return 0.0
    x = np.arange(count) - (count - 1) / 2
    y = np.asarray(values, dtype=np.float64) - np.mean(values)
    slope = float(x @ y / (x @ x))
    residual = float(np.sum((y - slope * x) ** 2))
    if residual <= 1e-12 * float(y @ y):
        return math.copysign(math.inf, slope) if slope else 0.0
    return slope / math.sqrt(residual / (count - 2) / float(x @ x))


def _opposite_trends(columns: list[np.ndarray], threshold: float) -> str | None:
    estimate, gold = columns
    if trend(estimate) < threshold or trend(gold) > -threshold:
        return None
    return (
        f"Over {len(gold)} steps the estimate rose from {estimate[0]:.3f} to {estimate[-1]:.3f} "
        f"while the gold score fell from {gold[0]:.3f} to {gold[-1]:.3f}."
    )


def _mean(sentence: str, *, below: bool = False) -> Callable[[list[np.ndarray], float], str | None]:
    """Observes that the mean of a column is above its threshold, or below it."""

    def observe(columns: list[np.ndarray], threshold: float) -> str | None:
        mean = columns[0].mean()
        is_trouble = mean < threshold if below else mean > threshold
        return sentence.format(mean=mean, threshold=threshold, steps=len(columns[0])) if is_trouble else None

    return observe


_LESS_OPTIMISATION = "Raise kl.coefficient, lower policy.learning_rate, or take an earlier checkpoint"

RULES: dict[str, Rule] = {
    "opposite_trends": Rule(
        ("health/estimate_mean", "reward/gold_mean"),
        "trend_significance",
        _opposite_trends,
        f"The policy exploits errors of the estimate. {_LESS_OPTIMISATION}. A refresh teaches the GVM the policy's own texts.",
    ),
    "gold_divergence": Rule(
        ("health/gold_divergence",),
        "max_gold_divergence",
        _mean(
            "Over {steps} steps the estimate has gained {mean:.2f} standard deviations more than the gold score "
            "(health.max_gold_divergence {threshold:g})."
        ),
        f"Part of the gain is not real. {_LESS_OPTIMISATION}, or refresh the GVM.",
    ),
    "gold_correlation": Rule(
        ("health/gold_correlation",),
        "min_gold_correlation",
        _mean(
            "Over {steps} steps the correlation of estimate and gold score is only {mean:.2f} (health.min_gold_correlation {threshold:g}).",
            below=True,
        ),
        "The estimate no longer ranks the policy's responses. Refresh the GVM, or stop here: more steps would follow noise.",
    ),
    "value_bias": Rule(
        ("health/value_bias_kl_high",),
        "max_value_bias",
        _mean(
            "Over {steps} steps the estimate overrates the third of the responses farthest from the reference by {mean:.2f} standard deviations "
            "(health.max_value_bias {threshold:g})."
        ),
        "The estimate rewards distance from the reference. Raise kl.coefficient, set kl.adaptive_target_nats, or refresh the GVM.",
    ),
    "calibration": Rule(
        ("health/calibration_error_late",),
        "max_calibration_error",
        _mean(
            "Over {steps} steps the values in the last third of the responses differ from the final estimate by {mean:.3f} "
            "(health.max_calibration_error {threshold:g})."
        ),
        "The values are those of another policy. Refresh the GVM, or give it examples of the policy (gvm.context).",
    ),
    "cut_off": Rule(
        ("response_length/truncated_fraction",),
        "max_cut_off_fraction",
        _mean("{mean:.0%} of the responses are cut off at rollout.max_response_tokens (health.max_cut_off_fraction {threshold:g})."),
        "They stop before their end. Raise rollout.max_response_tokens, or ask for short answers in the prompts. Where the model only "
        "continues a text, as with the data of the quickstart, this is meant so: set health.max_cut_off_fraction=null.",
        once=True,
    ),
}


def cut_off_note(fraction: float, settings: HealthConfig) -> list[str]:
    """What the rule `cut_off` says of a share of responses, in one line; nothing where it is silent."""
    rule, threshold = RULES["cut_off"], settings.max_cut_off_fraction
    text = rule.observe([np.array([fraction])], threshold) if threshold is not None else None
    return [f"{text} {rule.advice}"] if text is not None else []


class HealthMonitor:
    """Watches the metrics of a run, step by step.

    A rule judges windows of `health.window_steps` steps, from the first one that is whole. The next window that it judges begins after
    its alarm. Those that are said once judge from the first step on.
    """

    def __init__(self, settings: HealthConfig) -> None:
        self.settings = settings
        self.alarms: list[Alarm] = []
        self._start: dict[str, float] | None = None
        self._window: list[dict[str, float]] = []
        self._silent_until: dict[str, int] = {}

    def observe(self, step: int, metrics: dict[str, float]) -> tuple[dict[str, float], list[Alarm]]:
        """Take in the metrics of a step.

        Returns:
            The metrics that depend on earlier steps, and the alarms that this step raises.
        """
        added = self._divergence(metrics)
        read = {name for rule in RULES.values() for name in rule.reads}
        self._window.append({name: float(value) for name, value in (metrics | added).items() if name in read})
        self._window = self._window[-self.settings.window_steps :]
        raised = list(self._raised(step))
        self.alarms += raised
        return added, raised

    def restart(self) -> None:
        """Forget the steps so far, because another model estimates from here on. The alarms stay, and what is said once stays said."""
        self._start, self._window = None, []
        self._silent_until = {name: until for name, until in self._silent_until.items() if RULES[name].once}

    def lasting(self, alarm: Alarm) -> tuple[int, int]:
        """Since which step an alarm that was raised has gone on, and how many times it was raised since, itself included.

        It has ended where its rule was silent for a whole window more.
        """
        steps = [one.step for one in self.alarms if one.name == alarm.name and one.step <= alarm.step]
        first = len(steps) - 1
        while first > 0 and steps[first] - steps[first - 1] <= 2 * self.settings.window_steps:
            first -= 1
        return steps[first], len(steps) - first

    def _divergence(self, metrics: dict[str, float]) -> dict[str, float]:
        """Gain of the estimate since the start minus gain of the gold score, each in units of its spread at the start."""
        names = ("health/estimate_mean", "health/estimate_std", "reward/gold_mean", "reward/gold_std")
        if not all(name in metrics for name in names):
            return {}
        if self._start is None:
            self._start = {name: float(metrics[name]) for name in names}
        estimate, estimate_std, gold, gold_std = (self._start[name] for name in names)
        if not (estimate_std > 0 and gold_std > 0):
            return {}
        gains = (metrics["health/estimate_mean"] - estimate) / estimate_std, (metrics["reward/gold_mean"] - gold) / gold_std
        return {"health/gold_divergence": float(gains[0] - gains[1])}

    def _raised(self, step: int) -> Iterator[Alarm]:
        for name, rule in RULES.items():
            threshold, window = getattr(self.settings, rule.setting), self._window[-1:] if rule.once else self._window
            if threshold is None or step < self._silent_until.get(name, 0) or any(m not in row for row in window for m in rule.reads):
                continue
            if len(window) < self.settings.window_steps and not rule.once:
                continue
            text = rule.observe([np.array([row[metric] for row in window]) for metric in rule.reads], threshold)
            if text is not None:
                self._silent_until[name] = sys.maxsize if rule.once else step + self.settings.window_steps
                yield Alarm(step, name, text, rule.advice)

    # ------------------------------------------------------------------------------------------------ checkpoints

    def state_dict(self) -> dict:
        """The state that a resumed run needs to raise the same alarms."""
        return {
            "start": self._start,
            "window": self._window,
            "silent_until": self._silent_until,
            "alarms": [asdict(alarm) for alarm in self.alarms],
        }

    def load_state_dict(self, state: dict) -> None:
        """Continue from `state_dict`."""
        self._start, self._window, self._silent_until = state["start"], state["window"], state["silent_until"]
        self.alarms = [Alarm(**alarm) for alarm in state["alarms"]]
