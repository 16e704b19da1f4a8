"""Which advantage mode is best: gold against KL, every mode, several seeds, the same samples."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Iterator, Sequence

from dvpo_ray.errors import InputError
from dvpo_ray.experiments.readings import Curve, draw_gold, read_curve
from dvpo_ray.experiments.results import Result, columns, with_deviation
from dvpo_ray.experiments.study import Run, Study, add_kl_option, override

MODES = ("static_q", "td", "gae", "release-row", "release-batch")
"""Values of `advantage.mode`. What follows a dash is `advantage.value_whitening`."""


def mode_overrides(variant: str) -> list[str]:
    """What a variant changes in the config."""
    mode, _, whitening = variant.partition("-")
    return [override("advantage.mode", mode), *([override("advantage.value_whitening", whitening)] if whitening else [])]


class AdvantageModes(Study):
    name = "advantage-modes"
    help = "gold against KL for every advantage mode"
    example = "dvpo experiment advantage-modes cluster_configs/stories-cpu.yaml evaluation.every_steps=4 --seeds 0 1 2"
    cell = staticmethod(with_deviation)

    @classmethod
    def add_options(cls, parser: ArgumentParser) -> None:
        help = f"of {', '.join(MODES)} (default: all these), or release, which whitens the values as the config says"
        parser.add_argument("--modes", nargs="+", choices=(*MODES, "release"), default=list(MODES), metavar="MODE", help=help)
        add_kl_option(parser)

    def runs(self) -> list[Run]:
        self.require("gvm.path", "data.prompts.path", curves=True)
        if self.config.algorithm != "dvpo":
            algorithm = self.config.algorithm
            raise InputError(f"{self.options.config}: algorithm is {algorithm}, which has no advantage modes to compare; set algorithm=dvpo")
        return [self.run("policy", mode, seed, *mode_overrides(mode)) for seed in self.seeds for mode in self.options.modes]

    def result(self, runs: Sequence[Run]) -> Result:
        curves = [read_curve(run) for run in runs]
        return Result(list(summarise(curves, self.options.kl)), lambda figure: draw_gold(figure, curves), self.details(curves))


def summarise(curves: Sequence[Curve], kl_grid: Sequence[float]) -> Iterator[dict]:
    """One row per mode: gold at each KL, gold before and at the end, and final KL, over the seeds."""
    for mode in dict.fromkeys(curve.variant for curve in curves):
        of_mode = [
            curve.golds_at(kl_grid) | {"gold before": curve.gold[0], "final gold": curve.gold[-1], "final KL": curve.kl[-1]}
            for curve in curves
            if curve.variant == mode
        ]
        yield {"mode": mode, "seeds": len(of_mode)} | columns(of_mode)
