"""What finished runs say, read from their folders: gold and KL along `dvpo train`, and the held-out accuracy of value models."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dvpo_ray.experiments.results import first_reaching, half_width
from dvpo_ray.experiments.study import Run
from dvpo_ray.monitoring.run_files import read_json_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAIN_VIEWS = ("mean", "last", "p10", "p50", "p90", "position_25", "position_50", "position_75", "length_matched_mean", "length_matched_last")
"""Columns of a markdown table; result.json has all views."""
POSITIONS = (25, 50, 75, 100)
EXPLAINED = "explained variance"


def metrics_of(folder: Path) -> list[dict]:
    """The rows of metrics.jsonl, one for each step."""
    return read_json_lines(folder / "metrics.jsonl")[0]


def training_seconds(folder: Path) -> float:
    """Seconds that all steps of a run took, of a policy's or a value model's training."""
    return float(sum({row["step"]: row["time/step_seconds"] for row in metrics_of(folder)}.values()))


# ----------------------------------------------------------------------------------------------------------- curves


@dataclass(frozen=True)
class Curve:
    """Held-out evaluations of one run, in the order of its steps.

    Attributes:
        step: int64 [n], 0 first.
        seconds: float64 [n], spent on steps until then; evaluations, checkpoints, refreshes and the start of the actors don't count.
        kl: float64 [n], mean sequence KL from the reference in nats.
        gold: float64 [n], mean gold score.
        pairs: float64 [n], labelled pairs that the run's value models have seen until then: the training pairs of the first one, and all
            pairs of the refreshes, held-out ones included; None where nobody asks.
    """

    variant: str
    seed: int
    step: np.ndarray
    seconds: np.ndarray
    kl: np.ndarray
    gold: np.ndarray
    pairs: np.ndarray | None = None

    def gold_at_kl(self, nats: float) -> float:
        """Gold where the run first reaches a KL, linear between evaluations; NaN when it never does."""
        return first_reaching(self.kl, self.gold, nats)

    def golds_at(self, kl_grid: Iterable[float]) -> dict[str, float]:
        """Columns of gold at equal KL."""
        return {f"gold at {kl:g} nats": self.gold_at_kl(kl) for kl in kl_grid}

    def as_json(self) -> dict:
        return {name: value for name, value in vars(self).items() if value is not None}


def read_curve(run: Run) -> Curve:
    """The curve of a finished policy run."""
    evaluations = {int(step): point for step, point in run.summary["evaluations"].items()}
    steps = sorted(evaluations)
    seconds = {row["step"]: row["time/step_seconds"] for row in metrics_of(run.folder)}
    return Curve(
        variant=run.variant,
        seed=run.seed,
        step=np.array(steps),
        seconds=np.array([sum(spent for at, spent in seconds.items() if at <= step) for step in steps], dtype=np.float64),
        kl=np.array([evaluations[step]["kl"] for step in steps]),
        gold=np.array([evaluations[step]["gold"] for step in steps]),
    )


def draw_gold(figure: Figure, curves: Sequence[Curve], *, against: Sequence[str] = ("kl",)) -> None:
    """One panel for each of `against`, a line for each run, a colour for each variant."""
    names = {
        "kl": "KL from the reference (nats per response)",
        "step": "step",
        "seconds": "seconds of training",
        "pairs": "preference pairs used until then",
    }
    variants = list(dict.fromkeys(curve.variant for curve in curves))
    figure.set_size_inches(4 + 3 * len(against), 4.5)
    panels = figure.subplots(1, len(against), sharey=True, squeeze=False)[0]
    for axes, field in zip(panels, against, strict=True):
        axes.set_xlabel(names[field])
        axes.grid(alpha=0.3)
        for curve in curves:
            place = variants.index(curve.variant)
            axes.plot(getattr(curve, field), curve.gold, marker="o", markersize=3, color=f"C{place % 10}", label=curve.variant, alpha=0.8)
    panels[0].set_ylabel("gold, held-out prompts")
    lines, labels = panels[0].get_legend_handles_labels()
    panels[0].legend(handles=dict(zip(labels, lines, strict=True)).values())  # one entry for each variant


# ------------------------------------------------------------------------------------------------- value models


def accuracies(run: Run) -> dict[str, float]:
    """Held-out accuracy of a value model in every view, and the explained variance of the outcomes by the values of all states.

    The variance is NaN where all outcomes are equal.
    """
    report = json.loads((run.folder / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))
    explained = report["regression"]["explained_variance"]
    return report["heldout_accuracy"] | {EXPLAINED: float("nan") if explained is None else explained}


def draw_bars(axes: Axes, rows: Sequence[dict], columns: Sequence[str], label: str) -> None:
    """A group of bars for each row with one bar for each column, and the intervals over seeds."""
    width = 0.8 / len(columns)
    for i, column in enumerate(columns):
        place = [r + (i + 0.5) * width - 0.4 for r in range(len(rows))]
        cells = [row[column] for row in rows]
        axes.bar(place, [cell["mean"] for cell in cells], width, yerr=[half_width(cell) for cell in cells], label=column, capsize=2)
    axes.set_xticks(range(len(rows)), [str(row[label]) for row in rows], rotation=40, ha="right", fontsize=8)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8)


def draw_cells(axes: Axes, x: Sequence[float], rows: Sequence[dict], column: str) -> None:
    """A line through one column of some rows, with its intervals over seeds."""
    cells = [row[column] for row in rows]
    errors = [half_width(cell) for cell in cells]
    axes.errorbar(x, [cell["mean"] for cell in cells], yerr=errors, marker="o", markersize=4, capsize=2, label=column)
