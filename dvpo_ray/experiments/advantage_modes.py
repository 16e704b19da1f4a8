"""Which advantage mode is best: gold against KL, every mode, several seeds, the same samples."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Iterator, Sequence

from dvpo_ray.config.options import finite_number
from dvpo_ray.errors import InputError
from dvpo_ray.experiments.curves import Curve, draw_gold, read_curve
from dvpo_ray.experiments.results import Result, Statistic, over_seeds, with_deviation
from dvpo_ray.experiments.study import Run, Study, override

MODES = ("static_q", "td", "gae", "release")


class AdvantageModes(Study):
    name = "advantage-modes"
    help = "gold against KL for every advantage mode"
    example = "dvpo experiment advantage-modes cluster_configs/stories-cpu.yaml evaluation.every_steps=4 --seeds 0 1 2"

    @classmethod
    def add_options(cls, parser: ArgumentParser) -> None:
        parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), metavar="MODE", help=f"of {', '.join(MODES)} (default: all)")
        add_kl_option(parser)

    def runs(self) -> list[Run]:
        self.require("gvm.path", "data.prompts.path")
        self.require_curves()
        if self.config.algorithm != "dvpo":
            raise InputError(f"{self.source.path}: algorithm is {self.config.algorithm}, which has no advantage modes to compare; set algorithm=dvpo")
        return [self.run("policy", mode, seed, override("advantage.mode", mode)) for seed in self.seeds for mode in self.options.modes]

    def result(self, runs: Sequence[Run]) -> Result:
        curves = [read_curve(run) for run in runs]
        batch = self.config.batch
        details = {
            "steps": self.config.train.steps,
            "samples_per_step": batch.prompts_per_step * batch.samples_per_prompt,
            "curves": [curve.as_json() for curve in curves],
        }
        return Result(list(summarise(curves, self.options.kl)), lambda figure: draw_gold(figure, curves), details)

    def cell(self, statistic: Statistic) -> str:
        return with_deviation(statistic)


def add_kl_option(parser: ArgumentParser) -> None:
    """`--kl`: the KLs of a comparison at equal KL."""
    help = "KLs at which gold is compared (default: 4 8 12)"
    parser.add_argument("--kl", type=finite_number(at_least=0), nargs="+", default=[4.0, 8.0, 12.0], metavar="NATS", help=help)


def summarise(curves: Sequence[Curve], kl_grid: Sequence[float]) -> Iterator[dict]:
    """One row per mode: gold at each KL, gold before and at the end, and final KL, over the seeds."""
    for mode in dict.fromkeys(curve.variant for curve in curves):
        of_mode = [curve for curve in curves if curve.variant == mode]
        columns = {f"gold at {kl:g} nats": [curve.gold_at_kl(kl) for curve in of_mode] for kl in kl_grid}
        columns |= {
            "gold before": [curve.gold[0] for curve in of_mode],
            "final gold": [curve.gold[-1] for curve in of_mode],
            "final KL": [curve.kl[-1] for curve in of_mode],
        }
        yield {"mode": mode, "seeds": len(of_mode)} | {name: over_seeds(values) for name, values in columns.items()}
