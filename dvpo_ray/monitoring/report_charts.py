"""Which charts a report has: each is drawn when the run has numbers for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean

from dvpo_ray.evaluation.gain import mean_ci
from dvpo_ray.monitoring.catalogue import find_metric
from dvpo_ray.monitoring.charts import Band, Marks, Series, line_chart, number, path_chart, stacked_chart
from dvpo_ray.monitoring.markup import escape, tag
from dvpo_ray.monitoring.run_data import RunData

MOST_POINTS = 240
_STAGES = {"generate": "c1", "score": "c3", "reference": "c7", "advantage": "c4", "update": "c2", "sync": "c6"}


class Curves:
    """The metrics of a run, thinned to at most `MOST_POINTS` positions; each is the mean of `self.width` steps.

    Args:
        run: with metrics for at least one step.
    """

    def __init__(self, run: RunData) -> None:
        self.run = run
        self.width = -(-len(run.metrics) // MOST_POINTS)
        self.steps = [chunk[-1] for chunk in self._chunks(run.steps)]
        self.names = set(run.names())

    def column(self, name: str) -> list[float | None]:
        return [_mean(chunk) for chunk in self._chunks(self.run.column(name))]

    def _chunks(self, values: Sequence) -> list[Sequence]:
        return [values[i : i + self.width] for i in range(0, len(values), self.width)]

    # ------------------------------------------------------------------------------------------------ sections

    def learning(self) -> Iterator[str]:
        """Is the policy better, and how far has it gone?"""
        if "reward/gold_mean" in self.names or self._heldout_gold():
            yield self._gold()
        yield from self._lines(
            "Distance from the reference",
            "nats per response",
            {"kl/reference_mean": "mean sequence KL"},
            "How far the policy has moved from the SFT model it began with.",
            from_zero=True,
        )
        if {"reward/gold_mean", "kl/reference_mean"} <= self.names:
            yield self._gold_against_kl()
        yield from self._spread(
            "Value", "value", "What the frozen GVM says of the rollouts. It should rise with the gold score, not instead of it.", terminal=True
        )

    def value_model(self) -> Iterator[str]:
        """How good is the Global Value Model?"""
        yield from self._accuracy_by_position()
        yield from self._lines(
            "GVM loss",
            "",
            {"gvm/loss": "loss", "gvm/regression_loss": "value regression", "gvm/bradley_terry_loss": "Bradley-Terry"},
            "On the training pairs. The Bradley-Terry loss is measured whether it has a weight or not.",
            from_zero=True,
        )
        yield from self._lines(
            "Training pairs ordered correctly",
            "fraction",
            {"gvm/accuracy": "accuracy"},
            "In each minibatch. Far above the held-out accuracy, the pairs are learnt by heart.",
        )
        yield from self._health()
        yield from self._lines("GVM gradient norm", "", {"gvm/grad_norm": "before clipping"}, "Global norm over all parameters.", from_zero=True)

    def _health(self) -> Iterator[str]:
        yield from self._lines(
            "Estimate against gold",
            "",
            {
                "health/gold_correlation": "correlation, end of the response",
                "health/gold_correlation_half": "at half of it",
                "health/gold_divergence": "divergence in standard deviations",
            },
            "Whether the estimate still orders the policy's responses, and how much more than the gold score it has gained.",
        )
        yield from self._lines(
            "Error by distance",
            "standard deviations",
            {f"health/value_error_kl_{name}": f"{name} KL" for name in ("low", "mid", "high")} | {"health/value_bias_kl_high": "overrated, high KL"},
            "Of the estimate against the gold score, in thirds of the rollouts by their KL from the reference.",
        )
        yield from self._lines(
            "Calibration along the response",
            "value",
            {f"health/calibration_error_{name}": f"{name} third" for name in ("early", "mid", "late")}
            | {"health/value_drift": "drift from prompt to end"},
            "How far values before the end are from the final estimate. It grows as the policy leaves the texts that the GVM was trained on.",
        )
        yield from self._lines(
            "Refreshed GVM",
            "fraction",
            {"refresh/heldout_accuracy": "new", "refresh/heldout_accuracy_before": "the one it replaced"},
            "Held-out pairs of the last refresh that the value model orders correctly by the last value.",
        )
        yield from self._lines("Disagreement", "value", {"health/disagreement": "standard deviation over the ensemble"}, "Mean over all states.")

    def update(self) -> Iterator[str]:
        """Is the update sound?"""
        yield from self._advantage()
        yield from self._lines("Policy loss", "", {"policy/loss": "loss"}, "Hovers around 0 by construction; jumps are what to look for.")
        yield from self._lines(
            "Clipped tokens",
            "fraction",
            {"policy/clip_fraction": "clip fraction"},
            "Share of response tokens whose probability ratio was clipped.",
            from_zero=True,
        )
        yield from self._lines(
            "Entropy",
            "nats per token",
            {"policy/entropy": "entropy"},
            "Uncertainty of the policy's next token. Near 0 it has collapsed onto few texts.",
            from_zero=True,
        )
        yield from self._lines(
            "Response length",
            "tokens",
            {"response_length/mean": "mean", "response_length/max": "longest"},
            "Sampled responses, the end-of-turn token included.",
            from_zero=True,
        )
        yield from self._lines(
            "Cut-off responses",
            "fraction",
            {"response_length/truncated_fraction": "cut off at the limit"},
            "Share of responses that reached rollout.max_response_tokens.",
            from_zero=True,
        )
        yield from self._lines("Gradient norm", "", {"policy/grad_norm": "before clipping"}, "Global norm over all parameters.", from_zero=True)
        yield from self._lines(
            "Engine against learner",
            "nats",
            {"mismatch/log_prob_abs_max": "largest difference of a log-prob", "mismatch/log_prob_abs_mean": "mean"},
            "The same tokens under the same weights, by the rollout engine and by the learner.",
            from_zero=True,
        )

    def resources(self) -> Iterator[str]:
        """Where do time and memory go?"""
        yield from self._time()
        yield from self._lines(
            "Throughput",
            "tokens/s",
            {"throughput/generated_tokens_per_second": "generated", "throughput/trained_tokens_per_second": "trained"},
            "Tokens over the time of their stage.",
            from_zero=True,
        )
        yield from self._lines(
            "Memory", "GiB", self._roles("memory/", "_gib"), "Host memory of the largest actor of each role (PSS).", from_zero=True
        )
        yield from self._lines(
            "Idle", "fraction of the step", self._roles("idle/", "_fraction"), "Share of the step each role waited.", from_zero=True
        )

    # ------------------------------------------------------------------------------------------------ charts

    def _lines(self, title: str, unit: str, names: dict[str, str], caption: str, *, from_zero: bool = False) -> Iterator[str]:
        known = {name: label for name, label in names.items() if name in self.names}
        series = [Series(label, self.column(name), f"c{i % 8 + 1}") for i, (name, label) in enumerate(known.items())]
        if series:
            alone = len(series) == 1
            limit = find_metric(next(iter(known))).above if alone else None
            chart = line_chart(self.steps, series, name=title, from_zero=from_zero, limit=limit)
            yield self._figure(title, unit, chart, caption, "" if alone else _keys(series), series[0].ys if alone else [])

    def _gold(self) -> str:
        series = [Series("rollouts", self.column("reward/gold_mean"), "c1")] if "reward/gold_mean" in self.names else []
        heldout = self._heldout_gold()
        marks = Marks("held out", heldout, "c2") if heldout else None
        chart = line_chart(self.steps, series, marks=marks, name="Gold score")
        keys = _keys(series) + (_key("held-out prompts, with 95 % interval", "c2", "box") if heldout else "")
        return self._figure("Gold score", "", chart, "By the gold judge, which training never sees.", keys, series[0].ys if series else [])

    def _heldout_gold(self) -> list[tuple[float, float, float, float]]:
        points = []
        for step, rows in sorted(self.run.evaluations.items()):
            gold = [row["gold"] for row in rows if row.get("gold") is not None]
            if gold:
                points.append((float(step), *mean_ci(gold, resamples=2000)))
        return points

    def _accuracy_by_position(self) -> Iterator[str]:
        known = [(percent, self.run.summary_number(f"gvm.heldout_accuracy.position_{percent}")) for percent in (25, 50, 75, 100)]
        if any(accuracy is None for _, accuracy in known):
            return
        series = [Series("by the value there", [accuracy for _, accuracy in known])]
        longer = self.run.summary_number("gvm.heldout_accuracy.longer_wins")
        if longer is not None:
            series.append(Series("the longer response wins", [longer] * len(known), "c8", dashed=True))
        chart = line_chart([percent for percent, _ in known], series, name="Held-out accuracy", x_label="% of the response read")
        caption = "Share of held-out pairs whose better response has the higher value after so much of it. 0.5 is chance."
        yield self._figure("Held-out accuracy by position", "", chart, caption, _keys(series), series[0].ys)

    def _gold_against_kl(self) -> str:
        kl, gold = self.column("kl/reference_mean"), self.column("reward/gold_mean")
        chart = path_chart(kl, gold, self.steps, name="Gold score against KL", x_label="KL (nats per response)", y_label="gold")
        caption = "The price of the gain: up is better, right is farther from the SFT model. The hollow point is the first step."
        return self._figure("Gold score against KL", "", chart, caption, "", [])

    def _spread(self, title: str, group: str, caption: str, *, terminal: bool = False) -> Iterator[str]:
        if f"{group}/mean" not in self.names:
            return
        mean = Series("mean", self.column(f"{group}/mean"), "c1")
        series = [mean]
        if terminal and f"{group}/terminal_mean" in self.names:
            series.append(Series("after the last token", self.column(f"{group}/terminal_mean"), "c2"))
        bands = [self._deviation(group)] if f"{group}/std" in self.names else []
        chart = line_chart(self.steps, series, bands=bands, name=title)
        keys = _keys(series) + "".join(_key(band.label, band.color, "area") for band in bands)
        yield self._figure(title, "", chart, caption, keys, mean.ys)

    def _deviation(self, group: str, color: str = "c1") -> Band:
        """One standard deviation to both sides of the mean."""
        both = list(zip(self.column(f"{group}/mean"), self.column(f"{group}/std"), strict=True))
        lows = [None if m is None or s is None else m - s for m, s in both]
        highs = [None if m is None or s is None else m + s for m, s in both]
        return Band("± 1 standard deviation", lows, highs, color)

    def _advantage(self) -> Iterator[str]:
        if not {"advantage/mean", "advantage/std"} <= self.names:
            return
        series = [Series("mean", self.column("advantage/mean"), "c1")]
        series += [
            Series(label, self.column(name), "c8", dashed=True)
            for name, label in (("advantage/max", "largest"), ("advantage/min", "smallest"))
            if name in self.names
        ]
        band = self._deviation("advantage")
        chart = line_chart(self.steps, series, bands=[band], name="Advantage")
        keys = _keys(series[:1]) + _key(band.label, band.color, "area") + (_key("smallest and largest", "c8", "dots") if len(series) > 1 else "")
        yield self._figure("Advantage", "", chart, "Per response token, as the learner uses it.", keys, [])

    def _time(self) -> Iterator[str]:
        layers = [
            Series(stage, self.column(f"time/{stage}_seconds"), f"c{i + 1}")
            for i, stage in enumerate(_STAGES)
            if f"time/{stage}_seconds" in self.names
        ]
        if "time/step_seconds" in self.names:
            whole = self.column("time/step_seconds")
            rest = [max(0.0, (w or 0.0) - sum(layer.ys[i] or 0.0 for layer in layers)) for i, w in enumerate(whole)]
            layers.append(Series("rest" if layers else "step", rest, "c8"))
        if not layers:
            return
        chart = stacked_chart(self.steps, layers, name="Time of a step")
        totals = [sum(layer.ys[i] or 0.0 for layer in layers) for i in range(len(self.steps))]
        keys = "".join(_key(layer.label, layer.color, "box") for layer in layers)
        caption = "What the frozen models do while others generate costs no time here." if len(layers) > 1 else ""
        yield self._figure("Time of a step", "s", chart, caption, keys, totals)

    def _roles(self, prefix: str, suffix: str) -> dict[str, str]:
        names = [name for name in self.run.names() if name.startswith(prefix) and name.endswith(suffix)]
        return {name: name.removeprefix(prefix).removesuffix(suffix).replace("_", " ") for name in names}

    def _figure(self, title: str, unit: str, chart: str, caption: str, keys: str, shown: Sequence[float | None]) -> str:
        known = [value for value in shown if value is not None]
        now = f"{number(known[0])} → {number(known[-1])}" if len(known) > 1 else "".join(map(number, known))
        heading = tag("h3", escape(title) + (tag("span", f" · {escape(unit)}", class_="soft") if unit else ""))
        head = tag("div", heading, tag("span", now, class_="now"), class_="head")
        text = caption + (f" Each point is the mean of {self.width} steps." if self.width > 1 else "")
        return tag("figure", head, tag("div", keys, class_="legend"), chart, tag("figcaption", escape(text)), class_="card")


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _key(label: str, color: str, kind: str = "") -> str:
    return tag("span", tag("i", class_=f"key {color} {kind}".strip()), escape(label))


def _keys(series: Sequence[Series]) -> str:
    return "".join(_key(s.label, s.color) for s in series)
