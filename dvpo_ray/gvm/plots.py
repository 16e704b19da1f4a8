"""The pictures of a value model's evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dvpo_ray.gvm.views import POSITIONS, HeldoutValues

CHOSEN, REJECTED, NEUTRAL = "#0072b2", "#d55e00", "#666666"  # distinct for colour-blind readers
GRID_POINTS = 41


@contextmanager
def _axes(file: Path, title: str, x: str, y: str) -> Iterator[Axes]:
    """Axes whose figure is saved at the end; no pyplot, so no global state and no display."""
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.25)
    yield axes
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    figure.savefig(file, dpi=120)


def plot_accuracy_by_position(file: Path, report: dict) -> None:
    """Pairwise accuracy of the value after 25, 50, 75 and 100 % of the response, with 95 % intervals and two lines to compare with."""
    names = [f"position_{percent}" for percent in POSITIONS]
    share, interval = (np.array([report[key][name] for name in names]) for key in ("heldout_accuracy", "accuracy_ci95"))
    with _axes(file, f"Accuracy on {report['pairs']} held-out pairs", "response seen, %", "pairs ranked right") as axes:
        axes.errorbar(POSITIONS, share, yerr=np.abs(interval.T - share), fmt="o-", capsize=4, color=CHOSEN, label="value at this position")
        axes.axhline(report["heldout_accuracy"]["mean"], color=NEUTRAL, label="mean value of the response")
        axes.axhline(report["heldout_accuracy"]["longer_wins"], color=NEUTRAL, linestyle=":", label="longer wins")
        axes.set_xticks(POSITIONS)


def plot_calibration(file: Path, report: dict) -> None:
    """What was observed against what the values predict; on the diagonal they can be taken at their word."""
    calibration = report["calibration"]
    predicted, observed, states = (np.array([row[key] for row in calibration["bins"]]) for key in ("predicted", "observed", "states"))
    binary = calibration["outcome"] == "binary"
    x, y = ("P(chosen) = (V + 1) / 2", "share of chosen responses") if binary else ("value", "mean outcome")
    ends = [0.0, 1.0] if binary else [min(predicted.min(), observed.min()), max(predicted.max(), observed.max())]
    with _axes(file, f"Calibration, expected error {calibration['error']:.3f}", x, y) as axes:
        axes.plot(ends, ends, color=NEUTRAL, linestyle=":")
        axes.plot(predicted, observed, color=CHOSEN, alpha=0.5)
        axes.scatter(predicted, observed, s=10 + 190 * states / states.max(), color=CHOSEN, label="area: states in the bin")


def plot_value_trajectories(file: Path, heldout: HeldoutValues) -> None:
    """Mean value along the response, chosen and rejected, each with the band between its quartiles."""
    grid = np.linspace(0.0, 1.0, GRID_POINTS)
    curves = np.array([np.interp(grid, np.linspace(0.0, 1.0, len(row)), row) for row in heldout.rows])
    with _axes(file, "Value along the response, held-out pairs", "response seen, %", "value") as axes:
        for name, rows, colour in (("chosen", curves[0::2], CHOSEN), ("rejected", curves[1::2], REJECTED)):
            low, high = np.quantile(rows, [0.25, 0.75], axis=0)
            axes.fill_between(100 * grid, low, high, color=colour, alpha=0.15, linewidth=0)
            axes.plot(100 * grid, rows.mean(axis=0), color=colour, label=f"{name}: mean, and the middle half of the responses")
