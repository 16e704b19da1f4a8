"""What feedback on the policy's own samples is worth: value models refreshed along the run, against frozen ones of as many pairs."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dvpo_ray.config import Config
from dvpo_ray.config.options import whole_number
from dvpo_ray.errors import InputError
from dvpo_ray.experiments.advantage_modes import add_kl_option
from dvpo_ray.experiments.curves import Curve, read_curve
from dvpo_ray.experiments.results import Result, Statistic, over_seeds
from dvpo_ray.experiments.study import Run, Study, override, variants
from dvpo_ray.monitoring.run_files import read_json_lines

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Refresh(Study):
    name = "refresh"
    help = "semi-online preferences: gold against feedback, with value models refreshed along the run and with frozen ones"
    example = "dvpo experiment refresh cluster_configs/stories-cpu.yaml evaluation.every_steps=5 --pairs 100 --every 5 10 --seeds 0"

    @classmethod
    def add_options(cls, parser: ArgumentParser) -> None:
        help = "training pairs of the first value model (default: 100)"
        parser.add_argument("--pairs", type=whole_number(at_least=1), default=100, metavar="N", help=help)
        help = "steps between two refreshes, a variant for each (default: 5 10)"
        parser.add_argument("--every", type=whole_number(at_least=1), nargs="+", default=[5, 10], metavar="STEPS", help=help)
        add_kl_option(parser)

    def runs(self) -> list[Run]:
        self.require("data.preferences.path", "data.prompts.path")
        self.require_curves()
        for every in self.options.every:
            if every >= self.config.train.steps:
                raise InputError(f"--every {every}: expected less than train.steps, which is {self.config.train.steps}; else there is no refresh")
        return [run for seed in self.seeds for run in self._of_seed(seed)]

    @property
    def training_pairs(self) -> tuple[str, int]:
        most = self._most_pairs
        return f"--pairs {self.options.pairs}, with the {most - self.options.pairs} that refreshes can collect {most}", most

    @property
    def _most_pairs(self) -> int:
        """Pairs of the frozen value model that has as much feedback as the one that is refreshed most often."""
        return self.options.pairs + max(map(self._most_feedback, self.options.every))

    def _of_seed(self, seed: int) -> Iterator[Run]:
        few, many = self.options.pairs, self._most_pairs
        for pairs in (few, many):
            yield self.run("gvm", f"gvm-{pairs}", seed, override("data.preferences.limit", pairs))
        yield self._policy(f"frozen-{few}", seed, few)
        for every in dict.fromkeys(self.options.every):
            settings = [override("gvm.refresh_every_steps", every)]
            if self.config.gvm.refresh.source is None:
                settings.append(override("gvm.refresh.source", "judge"))
            yield self._policy(f"every-{every}", seed, few, *settings)
        yield self._policy(f"frozen-{many}", seed, many)

    def _most_feedback(self, every: int) -> int:
        """Pairs that a run's refreshes can collect; responses of the same score leave fewer."""
        refreshes = (self.config.train.steps - 1) // every  # none after the last step
        return refreshes * self.config.gvm.refresh.prompts * self.config.gvm.refresh.pairs_per_prompt

    def _policy(self, variant: str, seed: int, pairs: int, *overrides: str) -> Run:
        value_model = self.out / f"gvm-{pairs}-seed{seed}" / "final"
        settings = [override("gvm.path", str(value_model)), override("data.preferences.limit", pairs), *overrides]
        return self.run("policy", variant, seed, *settings)

    def result(self, runs: Sequence[Run]) -> Result:
        rows = {variant: [read_feedback(run) for run in of_variant] for variant, of_variant in variants(runs, stage="policy").items()}
        table = [{"value model": variant} | _columns(of_variant, self.options.kl) for variant, of_variant in rows.items()]
        every = [one for of_variant in rows.values() for one in of_variant]
        details = {"steps": self.config.train.steps, "curves": [one.curve.as_json() | {"pairs": one.pairs} for one in every]}
        return Result(table, lambda figure: draw(figure, every), details)


@dataclass(frozen=True)
class Feedback:
    """A policy run and the preference pairs that its value models have learnt from.

    Attributes:
        pairs: float64 [n], labelled pairs used until each evaluation of the curve, those of the first value model included.
        accuracy_before, accuracy: by the last value, on the held-out pairs of the last refresh, of the value model before it and
            after it; NaN without a refresh.
        refresh_seconds: of all refreshes.
    """

    curve: Curve
    pairs: np.ndarray
    accuracy_before: float
    accuracy: float
    refresh_seconds: float


def read_feedback(run: Run) -> Feedback:
    """The feedback of a finished policy run."""
    rows, _ = read_json_lines(run.folder / "metrics.jsonl")
    by_step = {row["step"]: row.get("refresh/pairs_total", 0.0) for row in rows}
    curve = read_curve(run)
    collected = [by_step.get(int(step), 0.0) for step in curve.step]
    last = rows[-1]
    return Feedback(
        curve=curve,
        pairs=_pairs_before(run.config) + np.array(collected, dtype=np.float64),
        accuracy_before=last.get("refresh/heldout_accuracy_before", np.nan),
        accuracy=last.get("refresh/heldout_accuracy", np.nan),
        refresh_seconds=sum(row.get("time/refresh_seconds", 0.0) for row in rows),
    )


def _pairs_before(config: Config) -> int:
    """Pairs that the first value model was trained on."""
    from dvpo_ray.gvm.artifact import read_manifest

    return read_manifest(Path(config.gvm.path)).training_data.pairs


def _columns(of_variant: Sequence[Feedback], kl_grid: Sequence[float]) -> dict[str, Statistic]:
    columns = {
        "feedback, pairs": [one.pairs[-1] for one in of_variant],
        "gold before": [one.curve.gold[0] for one in of_variant],
        "final gold": [one.curve.gold[-1] for one in of_variant],
        **{f"gold at {kl:g} nats": [one.curve.gold_at_kl(kl) for one in of_variant] for kl in kl_grid},
        "final KL": [one.curve.kl[-1] for one in of_variant],
        "accuracy on the last new pairs, before": [one.accuracy_before for one in of_variant],
        "and after their refresh": [one.accuracy for one in of_variant],
        "refreshing, seconds": [one.refresh_seconds for one in of_variant],
    }
    return {name: over_seeds(values) for name, values in columns.items()}


def draw(figure: Figure, every: Sequence[Feedback]) -> None:
    """Gold against KL, and against the feedback used until then; a line for each run, a colour for each variant."""
    names = list(dict.fromkeys(one.curve.variant for one in every))
    figure.set_size_inches(10, 4.5)
    panels = figure.subplots(1, 2, sharey=True)
    for one in every:
        colour = f"C{names.index(one.curve.variant) % 10}"
        label = one.curve.variant if one.curve.seed == every[0].curve.seed else None
        for axes, x in zip(panels, (one.curve.kl, one.pairs), strict=True):
            axes.plot(x, one.curve.gold, marker="o", markersize=3, color=colour, label=label, alpha=0.8)
    for axes, name in zip(panels, ("KL from the reference (nats per response)", "preference pairs used until then"), strict=True):
        axes.set_xlabel(name)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("gold, held-out prompts")
    panels[0].legend()
