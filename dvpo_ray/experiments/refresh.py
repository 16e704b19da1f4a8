"""What feedback on the policy's own samples is worth: value models refreshed along the run, against frozen ones trained on as many pairs."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from dvpo_ray.errors import InputError
from dvpo_ray.experiments.readings import Curve, draw_gold, metrics_of, read_curve
from dvpo_ray.experiments.results import Result, columns
from dvpo_ray.experiments.study import Run, Study, add_kl_option, add_numbers, override, variants


class Refresh(Study):
    name = "refresh"
    help = "semi-online preferences: gold against feedback, with value models refreshed along the run and with frozen ones"
    example = "dvpo experiment refresh cluster_configs/stories-cpu.yaml evaluation.every_steps=5 --pairs 100 --every 5 10 --seeds 0"

    @classmethod
    def add_options(cls, parser: ArgumentParser) -> None:
        add_numbers(parser, "--pairs", 100, "training pairs of the first value model")
        add_numbers(parser, "--every", [5, 10], "steps between two refreshes, a variant for each", metavar="STEPS")
        add_kl_option(parser)

    def runs(self) -> list[Run]:
        self.require("data.preferences.path", "data.prompts.path", curves=True)
        for every in self.options.every:
            if every >= self.config.train.steps:
                raise InputError(f"--every {every}: expected less than train.steps, which is {self.config.train.steps}; else there is no refresh")
        return [run for seed in self.seeds for run in self._of_seed(seed)]

    @property
    def training_pairs(self) -> tuple[str, int]:
        first, most = self.options.pairs, self._most_pairs
        return f"--pairs {first} + {most - first} that refreshes can collect = {most}", most

    @property
    def _most_pairs(self) -> int:
        """Pairs of the larger frozen value model: as many as the model that is refreshed most often can get.

        A refresh collects fewer where responses have the same score. There is none after the last step.
        """
        refreshes = (self.config.train.steps - 1) // min(self.options.every)
        return self.options.pairs + refreshes * self.config.gvm.refresh.prompts * self.config.gvm.refresh.pairs_per_prompt

    def _of_seed(self, seed: int) -> Iterator[Run]:
        few, many = (
            self.run("gvm", f"gvm-{pairs}", seed, override("data.preferences.limit", pairs)) for pairs in (self.options.pairs, self._most_pairs)
        )
        yield from (few, many)
        yield self._policy(f"frozen-{self.options.pairs}", few)
        for every in dict.fromkeys(self.options.every):
            settings = [override("gvm.refresh_every_steps", every)]
            if self.config.gvm.refresh.source is None:
                settings.append(override("gvm.refresh.source", "judge"))
            yield self._policy(f"every-{every}", few, *settings)
        yield self._policy(f"frozen-{self._most_pairs}", many)

    def _policy(self, variant: str, value_model: Run, *overrides: str) -> Run:
        """A refresh mixes in the pairs that the value model was trained on, and no others: they would be feedback that nobody counts."""
        return self.run("policy", variant, value_model.seed, override("gvm.path", value_model.final), *value_model.overrides, *overrides)

    def result(self, runs: Sequence[Run]) -> Result:
        table, curves = [], []
        for variant, of_variant in variants(runs, stage="policy").items():
            measured = [read_feedback(run, self.options.kl) for run in of_variant]
            curves += [curve for curve, _ in measured]
            table.append({"value model": variant} | columns([numbers for _, numbers in measured]))
        return Result(table, lambda figure: draw_gold(figure, curves, against=("kl", "pairs")), self.details(curves))


def read_feedback(run: Run, kl_grid: Sequence[float]) -> tuple[Curve, dict[str, float]]:
    """The curve of a finished policy run with its `pairs`, and the row of the table.

    Accuracies are by the last value, on the held-out pairs of the last refresh; NaN without a refresh.
    """
    from dvpo_ray.gvm.artifact import read_manifest

    curve, rows = read_curve(run), metrics_of(run.folder)
    collected = {row["step"]: row.get("refresh/pairs_total", 0.0) for row in rows}
    before = read_manifest(Path(run.config.gvm.path)).training_data.pairs
    curve = replace(curve, pairs=before + np.array([collected.get(int(step), 0.0) for step in curve.step], dtype=np.float64))
    return curve, {
        "feedback, pairs": curve.pairs[-1],
        "gold before": curve.gold[0],
        "final gold": curve.gold[-1],
        **curve.golds_at(kl_grid),
        "final KL": curve.kl[-1],
        "accuracy on the last new pairs, before": rows[-1].get("refresh/heldout_accuracy_before", np.nan),
        "and after their refresh": rows[-1].get("refresh/heldout_accuracy", np.nan),
        "refreshing, seconds": sum(row.get("time/refresh_seconds", 0.0) for row in rows),
    }
