"""Which charts a report has. A chart is drawn if the run has numbers for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

from dvpo_ray.evaluation.gain import mean_ci
from dvpo_ray.monitoring.catalogue import find_metric
from dvpo_ray.monitoring.charts import Interval, Series, line_chart, number, path_chart, stacked_chart
from dvpo_ray.monitoring.run_data import RunData

MOST_POINTS = 240
_STAGES = {"generate": "c1", "score": "c2", "reference": "c3", "advantage": "c4", "update": "c5", "sync": "c6"}


@dataclass(frozen=True)
class Lines:
    """A chart with one line per metric.

    Attributes:
        title: heading of the chart.
        metrics: their labels by their names; `<role>` stands for every role.
        caption: by default what the first metric means.
        from_zero: the y axis includes 0.
        spread: metric that is the standard deviation around the first line.
        dashed: metrics of secondary lines.
        unit: by default that of the first metric.
    """

    title: str
    metrics: dict[str, str]
    caption: str = ""
    from_zero: bool = True
    spread: str = ""
    dashed: dict[str, str] = field(default_factory=dict)
    unit: str | None = None


DISTANCE = Lines(
    "Distance from the reference", {"kl/reference_mean": "mean sequence KL"}, "How far the policy has moved from the SFT model that it started from."
)
VALUE = Lines(
    "Value",
    {"value/mean": "mean", "value/terminal_mean": "after the last token"},
    "What the value model predicts for the rollouts. It is what the policy is optimised for, so it should rise.",
    spread="value/std",
    unit="",
)
REWARD = Lines(
    "Reward",
    {"reward/model_mean": "mean"},
    "What the reward model gives the rollouts, before KL. It is what the policy is optimised for, so it should rise.",
    from_zero=False,
    spread="reward/model_std",
    unit="",
)
VALUE_MODEL = (
    Lines(
        "GVM loss",
        {"gvm/loss": "loss", "gvm/regression_loss": "value regression", "gvm/bradley_terry_loss": "Bradley-Terry"},
        "On the training pairs. The Bradley-Terry loss is measured even if it has no weight.",
    ),
    Lines(
        "Training pairs ordered correctly",
        {"gvm/accuracy": "accuracy"},
        "In each minibatch. If it is far above the held-out accuracy, the GVM has memorised the pairs.",
        from_zero=False,
    ),
    Lines(
        "Estimate against gold",
        {
            "health/gold_correlation": "correlation, end of the response",
            "health/gold_correlation_half": "at half of it",
            "health/gold_divergence": "divergence in standard deviations",
        },
        "Whether the estimate still ranks the policy's responses, and how much more it has gained than the gold score.",
    ),
    Lines(
        "Error by distance",
        {f"health/value_error_kl_{name}": f"{name} KL" for name in ("low", "mid", "high")} | {"health/value_bias_kl_high": "overrated, high KL"},
        "Error of the estimate against the gold score, in thirds of the rollouts by their KL from the reference.",
    ),
    Lines(
        "Calibration along the response",
        {f"health/calibration_error_{name}": f"{name} third" for name in ("early", "mid", "late")}
        | {"health/value_drift": "drift from prompt to end"},
        "How far values before the end are from the final estimate. It grows as the policy leaves the texts that the GVM was trained on.",
    ),
    Lines(
        "Refreshed GVM",
        {"refresh/heldout_accuracy": "new", "refresh/heldout_accuracy_before": "the one it replaced"},
        "Share of the last refresh's held-out pairs that the value model orders correctly by the last value.",
        from_zero=False,
    ),
    Lines("Disagreement", {"health/disagreement": "standard deviation over the ensemble"}),
    Lines("GVM gradient norm", {"gvm/grad_norm": "before clipping"}),
)
TRAINER = (
    Lines("SFT loss", {"sft/loss": "loss"}),
    Lines("SFT gradient norm", {"sft/grad_norm": "before clipping"}),
    Lines("DPO loss", {"dpo/loss": "loss"}),
    Lines("Pairs ordered correctly", {"dpo/accuracy": "accuracy"}, from_zero=False),
    Lines("Rewards", {"dpo/chosen_reward": "chosen", "dpo/rejected_reward": "rejected", "dpo/margin": "margin"}),
    Lines("DPO gradient norm", {"dpo/grad_norm": "before clipping"}),
)
UPDATE = (
    Lines(
        "Advantage",
        {"advantage/mean": "mean"},
        "Per response token, as the learner uses it.",
        spread="advantage/std",
        dashed={"advantage/max": "largest", "advantage/min": "smallest"},
    ),
    Lines("Policy loss", {"policy/loss": "loss"}, "By construction it stays near 0; look for jumps."),
    Lines("Clipped tokens", {"policy/clip_fraction": "clip fraction"}),
    Lines("Entropy", {"policy/entropy": "entropy"}, "Uncertainty about the next token. Near 0 the policy has collapsed onto few texts."),
    Lines("Response length", {"response_length/mean": "mean", "response_length/max": "longest"}, "Sampled responses, including EOS."),
    Lines("Cut-off responses", {"response_length/truncated_fraction": "cut off at the limit"}),
    Lines("Gradient norm", {"policy/grad_norm": "before clipping"}),
    Lines(
        "Engine against learner",
        {"mismatch/log_prob_abs_max": "largest difference of a log-prob", "mismatch/log_prob_abs_mean": "mean"},
        "The same tokens under the same weights, in the rollout engine and in the learner.",
    ),
)
RESOURCES = (
    Lines(
        "Throughput",
        {"throughput/generated_tokens_per_second": "generated", "throughput/trained_tokens_per_second": "trained"},
        "Tokens divided by the time of their stage.",
    ),
    Lines("Memory", {"memory/<role>_gib": ""}, "Largest actor of each role: the most that torch has held on its GPU, else host memory."),
    Lines("Idle", {"idle/<role>_fraction": ""}, "Share of the step that each role waited."),
)


def chart_sections(run: RunData) -> dict[str, dict]:
    """The charts of a run with metrics: by section its title, the question that it answers, and its figures."""
    curves = Curves(run)
    sections = {
        "learning": (
            "Learning",
            "Is the policy better, and how far has it moved to get there?",
            [curves.gold(), curves.lines(DISTANCE), curves.gold_against_kl(), curves.optimised(REWARD), curves.value()],
        ),
        "trainer": ("Training", "Does the model learn its rows?", list(map(curves.lines, TRAINER))),
        "value_model": (
            "Reward model" if run.stage == "rm" else "Global Value Model",
            "How good is the model that training takes its values or rewards from?",
            [curves.accuracy_by_position(), *map(curves.value_model, VALUE_MODEL)],
        ),
        "update": ("Update", "Is each policy update sound?", list(map(curves.lines, UPDATE))),
        "resources": ("Resources", "Where do time and memory go?", [curves.time(), *map(curves.lines, RESOURCES)]),
    }
    return {
        name: {"title": title, "question": question, "figures": list(filter(None, figures))} for name, (title, question, figures) in sections.items()
    }


class Curves:
    """The metrics of a run, thinned to at most `MOST_POINTS` positions; each is the mean of `self.width` steps.

    Args:
        run: with metrics for at least one step.
    """

    def __init__(self, run: RunData) -> None:
        self.run = run
        self.width = -(-len(run.metrics) // MOST_POINTS)
        self.steps = [chunk[-1] for chunk in self._chunks(run.steps)]
        self.names = run.names()

    def column(self, name: str) -> list[float | None]:
        known = [[value for value in chunk if value is not None] for chunk in self._chunks(self.run.column(name))]
        return [fmean(chunk) if chunk else None for chunk in known]

    def _chunks(self, values: Sequence) -> list[Sequence]:
        return [values[i : i + self.width] for i in range(0, len(values), self.width)]

    def series(self, labels: dict[str, str], **style) -> list[Series]:
        """A line for each of these metrics that the run has."""
        known = [(name, label) for name, label in labels.items() if name in self.names]
        return [Series(label, self.column(name), **{"color": f"c{i % 8 + 1}", **style}) for i, (name, label) in enumerate(known)]

    def figure(self, title: str, svg: str, caption: str, keys: Sequence = (), *, unit: str = "", shown: Sequence = (), thinned: bool = True) -> dict:
        """A chart with its heading.

        Args:
            keys: the legend: label, colour and shape of each entry.
            shown: values whose first and last known stand beside the heading.
            thinned: the points are those of `self.steps`.
        """
        known = [number(value) for value in shown if value is not None]
        now = " → ".join(known[:: max(len(known) - 1, 1)])
        caption += f" Each point is the mean of {self.width} steps." if thinned and self.width > 1 else ""
        return {"title": title, "unit": unit, "now": now, "keys": keys, "svg": svg, "caption": caption}

    def lines(self, chart: Lines) -> dict | None:
        labels = {}
        for pattern, label in chart.metrics.items():
            start, role, end = pattern.partition("<role>")
            found = [name for name in self.names if name.startswith(start) and name.endswith(end)] if role else [pattern]
            labels |= {name: label or name.removeprefix(start).removesuffix(end).replace("_", " ") for name in found}
        series = self.series(labels) + self.series(chart.dashed, color="c8", dashed=True)
        if not series:
            return None
        first = find_metric(next(name for name in (*labels, *chart.dashed) if name in self.names))
        spread = self.column(chart.spread) if chart.spread in self.names else []
        alone = len(series) == 1
        limit = first.above if alone else None
        svg = line_chart(self.steps, series, spread=spread, name=chart.title, from_zero=chart.from_zero, limit=limit)
        keys = [] if alone and not spread else _keys(series) + [("± 1 standard deviation", "c1", "area")][: len(spread)]
        unit = first.unit if chart.unit is None else chart.unit
        return self.figure(chart.title, svg, chart.caption or first.meaning, keys, unit=unit, shown=series[0].ys if alone or spread else ())

    def optimised(self, chart: Lines) -> dict | None:
        """What the policy is optimised for."""
        beside_gold = " With the gold score, not instead of it." if "reward/gold_mean" in self.names else ""
        return self.lines(replace(chart, caption=chart.caption + beside_gold))

    def value(self) -> dict | None:
        if "reward/model_mean" in self.names:  # the values are those of PPO's critic
            return self.lines(replace(VALUE, caption="What the critic predicts for the rollouts; it is trained beside the policy."))
        return self.optimised(VALUE)

    def value_model(self, chart: Lines) -> dict | None:
        """A chart of the training of a GVM or, under its own name, of a reward model."""
        if self.run.stage == "rm":
            chart = replace(chart, title=chart.title.replace("GVM", "Reward model"), caption=chart.caption.replace("GVM", "reward model"))
        return self.lines(chart)

    def gold(self) -> dict | None:
        series = self.series({"reward/gold_mean": "rollouts"})
        marks = self._heldout_gold()
        if not series and not marks:
            return None
        svg = line_chart(self.steps, series, marks=marks, name="Gold score")
        keys = _keys(series) + ([("held-out prompts, with 95 % interval", "c2", "box")] if marks else [])
        return self.figure("Gold score", svg, "By the gold judge, which training never sees.", keys, shown=series[0].ys if series else ())

    def _heldout_gold(self) -> list[tuple[float, Interval]]:
        gold = {step: [row["gold"] for row in rows if row.get("gold") is not None] for step, rows in self.run.evaluations.items()}
        return [(step, mean_ci(scores, resamples=2000)) for step, scores in sorted(gold.items()) if scores]

    def gold_against_kl(self) -> dict | None:
        if not {"reward/gold_mean", "kl/reference_mean"} <= set(self.names):
            return None
        kl, gold, title = self.column("kl/reference_mean"), self.column("reward/gold_mean"), "Gold score against KL"
        svg = path_chart(kl, gold, self.steps, name=title, x_label="KL (nats per response)", y_label="gold")
        caption = "The price of the gain: up is better, right is farther from the SFT model. The hollow point is the first step."
        return self.figure(title, svg, caption)

    def accuracy_by_position(self) -> dict | None:
        known = {percent: self.run.summary_number(f"gvm.heldout_accuracy.position_{percent}") for percent in (25, 50, 75, 100)}
        if None in known.values():
            return None
        series = [Series("by the value there", list(known.values()))]
        longer = self.run.summary_number("gvm.heldout_accuracy.longer_wins")
        if longer is not None:
            series.append(Series("the longer response wins", [longer] * len(known), "c8", dashed=True))
        svg = line_chart(list(known), series, name="Held-out accuracy", x_label="% of the response read")
        caption = "Share of held-out pairs whose better response has the higher value at this point. 0.5 is chance."
        return self.figure("Held-out accuracy by position", svg, caption, _keys(series), shown=series[0].ys, thinned=False)

    def time(self) -> dict | None:
        layers = [layer for stage, color in _STAGES.items() for layer in self.series({f"time/{stage}_seconds": stage}, color=color)]
        if "time/step_seconds" in self.names:
            whole = self.column("time/step_seconds")
            rest = [max(0.0, (total or 0.0) - sum(layer.ys[i] or 0.0 for layer in layers)) for i, total in enumerate(whole)]
            layers.append(Series("rest" if layers else "step", rest, "c8"))
        if not layers:
            return None
        svg = stacked_chart(self.steps, layers, name="Time of a step")
        totals = [sum(layer.ys[i] or 0.0 for layer in layers) for i in range(len(self.steps))]
        caption = "The frozen models' work during generation costs no time here." if len(layers) > 1 else ""
        return self.figure("Time of a step", svg, caption, _keys(layers, "box"), unit="s", shown=totals)


def _keys(series: Sequence[Series], kind: str = "") -> list[tuple[str, str, str]]:
    return [(s.label, s.color, "dots" if s.dashed else kind) for s in series]
