"""How small the value model may be: its trunk truncated to the first layers, or another checkpoint; its accuracy, cost and use."""

from __future__ import annotations

import math
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dvpo_ray.config.options import whole_number
from dvpo_ray.errors import InputError
from dvpo_ray.experiments.accuracy import MAIN_VIEWS, accuracy_columns, explained_variance
from dvpo_ray.experiments.curves import read_curve, training_seconds
from dvpo_ray.experiments.results import Result, Statistic, half_width, over_seeds
from dvpo_ray.experiments.study import Run, Study, override, variants

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WHOLE = "whole"


class GVMSize(Study):
    name = "gvm-size"
    help = "smaller and truncated value models: accuracy, cost, and the policies they make"
    example = "dvpo experiment gvm-size cluster_configs/stories-cpu.yaml --layers 1 2 4 --seeds 0 1"

    @classmethod
    def add_options(cls, parser: ArgumentParser) -> None:
        help = "decoder layers kept (default: 1 2 4); the whole trunk is always there"
        parser.add_argument("--layers", type=whole_number(at_least=1), nargs="*", default=[1, 2, 4], metavar="N", help=help)
        parser.add_argument("--init-from", nargs="+", default=[], metavar="MODEL", help="other checkpoints with the policy's tokenizer to start from")
        parser.add_argument("--policies", action="store_true", help="also optimise a policy with every value model; needs data.prompts and a judge")

    def runs(self) -> list[Run]:
        self.require("data.preferences.path")
        if self.options.policies:
            self.require("data.prompts.path")
            self.require_judge()
        return [run for seed in self.seeds for name, overrides in self._sizes().items() for run in self._of_size(name, seed, overrides)]

    def _sizes(self) -> dict[str, list[str]]:
        sizes = {f"layers-{count}": [override("gvm.num_layers", count)] for count in self.options.layers}
        sizes[WHOLE] = [override("gvm.num_layers", None)]
        for path in self.options.init_from:
            name = Path(path).name
            if name in sizes:
                raise InputError(f"--init-from {path}: {name} is there already; the last parts of the paths name the variants")
            sizes[name] = [override("gvm.init_from", path), override("gvm.num_layers", None)]
        return sizes

    def _of_size(self, name: str, seed: int, overrides: Sequence[str]) -> list[Run]:
        value_model = self.run("gvm", name, seed, *overrides)
        if not self.options.policies:
            return [value_model]
        return [value_model, self.run("policy", f"policy-{name}", seed, override("gvm.path", str(value_model.folder / "final")))]

    def result(self, runs: Sequence[Run]) -> Result:
        policies = variants(runs, stage="policy")
        table = [
            {"value model": name} | _columns(of_size) | _policy_columns(policies.get(f"policy-{name}", []))
            for name, of_size in variants(runs, stage="gvm").items()
        ]
        shown = ("parameters, millions", "training seconds", *MAIN_VIEWS, "explained variance", "final gold", "final KL")
        return Result(table, lambda figure: draw(figure, table), columns=shown)


def _columns(runs: Sequence[Run]) -> dict[str, Statistic]:
    cost = {
        "parameters, millions": over_seeds([count_parameters(run.folder / "final") / 1e6 for run in runs]),
        "training seconds": over_seeds([training_seconds(run.folder) for run in runs]),
    }
    return cost | accuracy_columns(runs) | {"explained variance": explained_variance(runs)}


def _policy_columns(runs: Sequence[Run]) -> dict[str, Statistic]:
    if not runs:
        return {}
    curves = [read_curve(run) for run in runs]
    return {"final gold": over_seeds([curve.gold[-1] for curve in curves]), "final KL": over_seeds([curve.kl[-1] for curve in curves])}


def count_parameters(folder: Path) -> int:
    """Numbers in a checkpoint's weight files."""
    from safetensors import safe_open

    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "numpy") as weights:
            names = weights.keys()
            total += sum(math.prod(weights.get_slice(name).get_shape()) for name in names)
    return total


def draw(figure: Figure, table: Sequence[dict]) -> None:
    """Accuracy, and where there are policies their final gold, against the parameters of the value model."""
    columns = [("last", "mean")] + ([("final gold",)] if "final gold" in table[0] else [])
    for axes, names in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns, strict=True):
        rows = sorted(table, key=lambda row: row["parameters, millions"]["mean"])
        size = [row["parameters, millions"]["mean"] for row in rows]
        for name in names:
            cells = [row[name] for row in rows]
            errors = [half_width(cell) for cell in cells]
            axes.errorbar(size, [cell["mean"] for cell in cells], yerr=errors, marker="o", markersize=4, capsize=2, label=name)
        axes.set_xscale("log")
        axes.set_xlabel("parameters of the value model, millions")
        axes.set_ylabel("final gold, held-out prompts" if names == ("final gold",) else "held-out accuracy")
        axes.grid(alpha=0.3)
        axes.legend()
