"""Gold and KL along a run of `dvpo train`, from its folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dvpo_ray.experiments.results import first_reaching
from dvpo_ray.experiments.study import Run
from dvpo_ray.monitoring.run_files import read_json_lines

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Curve:
    """Held-out evaluations of one run, in the order of its steps.

    Attributes:
        step: int64 [n], 0 first.
        seconds: float64 [n], spent on steps until then; evaluations, checkpoints and the start of the actors don't count.
        kl: float64 [n], mean sequence KL from the reference in nats.
        gold: float64 [n], mean gold score.
    """

    variant: str
    seed: int
    step: np.ndarray
    seconds: np.ndarray
    kl: np.ndarray
    gold: np.ndarray

    def gold_at_kl(self, nats: float) -> float:
        """Gold where the run first reaches a KL, linear between evaluations; NaN when it never does."""
        return first_reaching(self.kl, self.gold, nats)

    def as_json(self) -> dict:
        return {name: getattr(self, name) for name in ("variant", "seed", "step", "seconds", "kl", "gold")}


def read_curve(run: Run) -> Curve:
    """The curve of a finished policy run."""
    evaluations = run.summary["evaluations"]
    steps = sorted(map(int, evaluations))
    seconds = _seconds_by_step(run.folder)
    points = [evaluations[str(step)] for step in steps]
    return Curve(
        variant=run.variant,
        seed=run.seed,
        step=np.array(steps),
        seconds=np.array([sum(spent for at, spent in seconds.items() if at <= step) for step in steps], dtype=np.float64),
        kl=np.array([point["kl"] for point in points]),
        gold=np.array([point["gold"] for point in points]),
    )


def training_seconds(folder: Path) -> float:
    """Seconds that all steps of a run took, of a policy's or a value model's training."""
    return float(sum(_seconds_by_step(folder).values()))


def _seconds_by_step(folder: Path) -> dict[int, float]:
    rows, _ = read_json_lines(folder / "metrics.jsonl")
    return {row["step"]: row["time/step_seconds"] for row in rows}


def last_metric(run: Run, name: str) -> float:
    """A metric of a policy run's last step."""
    rows, _ = read_json_lines(run.folder / "metrics.jsonl")
    return float(rows[-1][name])


def draw_gold(figure: Figure, curves: Sequence[Curve], *, against: Sequence[str] = ("kl",)) -> None:
    """One panel for each of `against`, a line for each run, a colour for each variant."""
    names = {"kl": "KL from the reference (nats per response)", "step": "step", "seconds": "seconds of training"}
    colours = {variant: f"C{i % 10}" for i, variant in enumerate(dict.fromkeys(curve.variant for curve in curves))}
    figure.set_size_inches(4 + 3 * len(against), 4.5)
    panels = figure.subplots(1, len(against), sharey=True, squeeze=False)[0]
    for axes, field in zip(panels, against, strict=True):
        axes.set_xlabel(names[field])
        axes.grid(alpha=0.3)
        labelled = set()
        for curve in curves:
            label = None if curve.variant in labelled else curve.variant
            labelled.add(curve.variant)
            axes.plot(getattr(curve, field), curve.gold, marker="o", markersize=3, color=colours[curve.variant], label=label, alpha=0.8)
    panels[0].set_ylabel("gold, held-out prompts")
    panels[0].legend()
