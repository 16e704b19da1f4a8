"""How well values rank held-out responses: every objective, kind of outcome, Bradley-Terry term and context, on the same pairs."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dvpo_ray.config.options import finite_number
from dvpo_ray.experiments.readings import EXPLAINED, MAIN_VIEWS, POSITIONS, accuracies, draw_bars
from dvpo_ray.experiments.results import Result, columns
from dvpo_ray.experiments.study import Run, Study, add_numbers, override, variants

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REWARD_MODEL = "bradley_terry"
VARIANTS = (
    *("td0", "td_lambda", "monte_carlo", "td0+bt", "td_lambda+bt", "monte_carlo+bt"),
    *(REWARD_MODEL, "td_lambda+score", "monte_carlo+score", "monte_carlo+tau"),
)
"""Objectives, with a Bradley-Terry term (`+bt`), with scores as outcomes (`+score`) and with examples of the writer (`+tau`)."""


class GVMQuality(Study):
    name = "gvm-quality"
    help = "held-out accuracy of the value model for every objective, kind of outcome and context"
    example = "dvpo experiment gvm-quality cluster_configs/stories-cpu.yaml --variants monte_carlo bradley_terry --seeds 0 1"

    @classmethod
    def add_options(cls, parser: ArgumentParser) -> None:
        help = f"of {', '.join(VARIANTS)} (default: all); +score needs pairs with scores"
        parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT", help=help)
        add_numbers(parser, "--bt-weight", 1.0, "gvm.bradley_terry_weight of the +bt variants", finite_number(above=0), "W")
        add_numbers(parser, "--examples", 2, "gvm.context.examples of the +tau variant", metavar="K")

    def runs(self) -> list[Run]:
        self.require("data.preferences.path")
        return [self.run("gvm", variant, seed, *self._overrides(variant)) for seed in self.seeds for variant in self.options.variants]

    def _overrides(self, variant: str) -> list[str]:
        """Everything that variants differ in, so that none of it comes from the config."""
        objective, _, extra = variant.partition("+")
        settings: dict[str, Any] = {
            "objective": objective,
            "outcome": "score" if extra == "score" else "binary",
            "bradley_terry_weight": self.options.bt_weight if extra == "bt" else 0.0,
            "context.examples": self.options.examples if extra == "tau" else 0,
        }
        return [override(f"gvm.{key}", value) for key, value in settings.items()]

    def result(self, runs: Sequence[Run]) -> Result:
        table = [{"variant": variant} | columns([accuracies(run) for run in of_variant]) for variant, of_variant in variants(runs).items()]
        for row in table:
            if row["variant"] == REWARD_MODEL:
                del row[EXPLAINED]  # its numbers are not in the unit of the outcomes
        return Result(table, lambda figure: draw(figure, table), columns=(*MAIN_VIEWS, "longer_wins", EXPLAINED))


def draw(figure: Figure, table: Sequence[dict]) -> None:
    """Accuracy by last and by mean value of every variant, and by position in the response."""
    bars, positions = figure.subplots(1, 2, sharey=True)
    draw_bars(bars, table, ("last", "mean"), "variant")
    bars.set_ylabel("held-out accuracy")
    bars.set_ylim(0.4, 1.0)
    for row in table:
        accuracy = [row[f"position_{percent}"]["mean"] for percent in POSITIONS]
        positions.plot(POSITIONS, accuracy, marker="o", markersize=3, label=row["variant"])
    positions.set_xticks(POSITIONS)
    positions.set_xlabel("share of the response read (%)")
    positions.grid(alpha=0.3)
    positions.legend(fontsize=7)
