"""Held-out accuracy of value models over seeds, from the folders of their training or evaluation."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dvpo_ray.experiments.results import Statistic, half_width, over_seeds
from dvpo_ray.experiments.study import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAIN_VIEWS = ("mean", "last", "p10", "p50", "p90", "position_25", "position_50", "position_75", "length_matched_mean", "length_matched_last")
"""Columns of a markdown table; result.json has all views."""

POSITIONS = (25, 50, 75, 100)


def read_report(run: Run) -> dict:
    """The evaluation.json of a value model."""
    return json.loads((run.folder / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))


def accuracy_columns(runs: Sequence[Run]) -> dict[str, Statistic]:
    """Accuracy of one variant's runs in every view that all of them have."""
    reports = [read_report(run)["heldout_accuracy"] for run in runs]
    return {view: over_seeds([report[view] for report in reports]) for view in reports[0] if all(view in report for report in reports)}


def explained_variance(runs: Sequence[Run]) -> Statistic:
    """Explained variance of the outcomes by the values of all states; NaN where all outcomes are equal."""
    measured = [read_report(run)["regression"]["explained_variance"] for run in runs]
    return over_seeds([float("nan") if value is None else value for value in measured])


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


def draw_positions(axes: Axes, rows: Sequence[dict], label: str) -> None:
    """Accuracy by the relative position in the response, one line for each row."""
    for row in rows:
        axes.plot(POSITIONS, [row[f"position_{percent}"]["mean"] for percent in POSITIONS], marker="o", markersize=3, label=str(row[label]))
    axes.set_xticks(POSITIONS)
    axes.set_xlabel("share of the response read (%)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
