"""How well values rank held-out responses: every objective, kind of outcome, Bradley-Terry term and context, on the same pairs."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dvpo_ray.config.options import finite_number, whole_number
from dvpo_ray.experiments.accuracy import MAIN_VIEWS, accuracy_columns, draw_bars, draw_positions, explained_variance
from dvpo_ray.experiments.results import Result
from dvpo_ray.experiments.study import Run, Study, override, variants

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OBJECTIVES = ("td0", "td_lambda", "monte_carlo")
WITH_BRADLEY_TERRY, WITH_SCORES, WITH_EXAMPLES = "+bt", "+score", "+tau"
REWARD_MODEL = "bradley_terry"
VARIANTS = (
    *OBJECTIVES,
    *(objective + WITH_BRADLEY_TERRY for objective in OBJECTIVES),
    REWARD_MODEL,
    *(objective + WITH_SCORES for objective in ("td_lambda", "monte_carlo")),
    "monte_carlo" + WITH_EXAMPLES,
)


class GVMQuality(Study):
    name = "gvm-quality"
    help = "held-out accuracy of the value model for every objective, kind of outcome and context"
    example = "dvpo experiment gvm-quality cluster_configs/stories-cpu.yaml --variants monte_carlo bradley_terry --seeds 0 1"

    @classmethod
    def add_options(cls, parser: ArgumentParser) -> None:
        parser.add_argument(
            "--variants",
            nargs="+",
            choices=VARIANTS,
            default=list(VARIANTS),
            metavar="VARIANT",
            help=f"of {', '.join(VARIANTS)} (default: all); +score needs pairs with scores",
        )
        parser.add_argument(
            "--bt-weight", type=finite_number(above=0), default=1.0, metavar="W", help="gvm.bradley_terry_weight of the +bt variants (default: 1)"
        )
        parser.add_argument(
            "--examples", type=whole_number(at_least=1), default=2, metavar="K", help="gvm.context.examples of the +tau variant (default: 2)"
        )

    def runs(self) -> list[Run]:
        self.require("data.preferences.path")
        return [self.run("gvm", variant, seed, *self._overrides(variant)) for seed in self.seeds for variant in self.options.variants]

    def _overrides(self, variant: str) -> list[str]:
        """Everything that variants differ in, so that none of it comes from the config."""
        settings: dict[str, Any] = {
            "objective": variant.partition("+")[0],
            "outcome": "score" if variant.endswith(WITH_SCORES) else "binary",
            "bradley_terry_weight": self.options.bt_weight if variant.endswith(WITH_BRADLEY_TERRY) else 0.0,
            "context.examples": self.options.examples if variant.endswith(WITH_EXAMPLES) else 0,
        }
        return [override(f"gvm.{key}", value) for key, value in settings.items()]

    def result(self, runs: Sequence[Run]) -> Result:
        table = [{"variant": variant} | _columns(variant, of_variant) for variant, of_variant in variants(runs).items()]
        return Result(table, lambda figure: draw(figure, table), columns=(*MAIN_VIEWS, "longer_wins", "explained variance"))


def _columns(variant: str, runs: Sequence[Run]) -> dict:
    columns = accuracy_columns(runs)
    # A reward model's numbers are not in the unit of the outcomes.
    return columns if variant == REWARD_MODEL else columns | {"explained variance": explained_variance(runs)}


def draw(figure: Figure, table: Sequence[dict]) -> None:
    """Accuracy by last and by mean value of every variant, and by position in the response."""
    bars, positions = figure.subplots(1, 2, sharey=True)
    draw_bars(bars, table, ("last", "mean"), "variant")
    bars.set_ylabel("held-out accuracy")
    bars.set_ylim(0.4, 1.0)
    draw_positions(positions, table, "variant")
