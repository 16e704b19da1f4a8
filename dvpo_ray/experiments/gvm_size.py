"""How small the value model may be: its trunk truncated to the first layers, or another checkpoint; its accuracy, cost and use."""

from __future__ import annotations

import math
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dvpo_ray.config.options import whole_number
from dvpo_ray.config.paths import name_or_path_option
from dvpo_ray.errors import InputError
from dvpo_ray.experiments.readings import EXPLAINED, MAIN_VIEWS, accuracies, draw_cells, read_curve, training_seconds
from dvpo_ray.experiments.results import Result, columns
from dvpo_ray.experiments.study import Run, Study, override, variants

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WHOLE = "whole"
PARAMETERS = "parameters, millions"


class GVMSize(Study):
    name = "gvm-size"
    help = "smaller and truncated value models: accuracy, cost, and the policies they make"
    example = "dvpo experiment gvm-size cluster_configs/stories-cpu.yaml --layers 1 2 4 --seeds 0 1"

    @classmethod
    def add_options(cls, parser: ArgumentParser) -> None:
        help = "decoder layers kept (default: 1 2 4); the whole trunk is always measured too"
        parser.add_argument("--layers", type=whole_number(at_least=1), nargs="*", default=[1, 2, 4], metavar="N", help=help)
        help = "other checkpoints with the policy's tokenizer to start from"
        parser.add_argument("--init-from", nargs="+", default=[], metavar="MODEL", type=name_or_path_option, help=help)
        parser.add_argument("--policies", action="store_true", help="also optimise a policy with every value model; needs data.prompts and a judge")

    def runs(self) -> list[Run]:
        self.require("data.preferences.path")
        if self.options.policies:
            self.require("data.prompts.path", judge=True)
        return [run for seed in self.seeds for name, overrides in self._sizes().items() for run in self._of_size(name, seed, overrides)]

    def _sizes(self) -> dict[str, list[str]]:
        sizes = {f"layers-{count}": [override("gvm.num_layers", count)] for count in self.options.layers}
        sizes[WHOLE] = [override("gvm.num_layers", None)]
        for path in self.options.init_from:
            name = Path(path).name
            if name in sizes:
                raise InputError(f"--init-from {path}: there are two variants {name}; the last parts of the paths name the variants")
            sizes[name] = [override("gvm.init_from", path), override("gvm.num_layers", None)]
        return sizes

    def _of_size(self, name: str, seed: int, overrides: Sequence[str]) -> list[Run]:
        value_model = self.run("gvm", name, seed, *overrides)
        if not self.options.policies:
            return [value_model]
        return [value_model, self.run("policy", f"policy-{name}", seed, override("gvm.path", value_model.final))]

    def result(self, runs: Sequence[Run]) -> Result:
        policies = {run.folder.name: read_curve(run) for run in runs if run.stage == "policy"}
        table = []
        for name, of_size in variants(runs, stage="gvm").items():
            measured = []
            for run in of_size:
                cost = {PARAMETERS: count_parameters(run.folder / "final") / 1e6, "training seconds": training_seconds(run.folder)}
                curve = policies.get(f"policy-{run.folder.name}")
                measured.append(cost | accuracies(run) | ({} if curve is None else {"final gold": curve.gold[-1], "final KL": curve.kl[-1]}))
            table.append({"value model": name} | columns(measured))
        shown = (PARAMETERS, "training seconds", *MAIN_VIEWS, EXPLAINED, "final gold", "final KL")
        return Result(table, lambda figure: draw(figure, table), columns=shown)


def count_parameters(folder: Path) -> int:
    """Numbers in a checkpoint's weight files."""
    from safetensors import safe_open

    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "numpy") as weights:
            total += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118 (not a dict)
    return total


def draw(figure: Figure, table: Sequence[dict]) -> None:
    """Accuracy, and where there are policies their final gold, against the parameters of the value model."""
    panels = {"held-out accuracy": ("last", "mean")} | ({"final gold, held-out prompts": ("final gold",)} if "final gold" in table[0] else {})
    rows = sorted(table, key=lambda row: row[PARAMETERS]["mean"])
    for axes, (label, names) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for name in names:
            draw_cells(axes, [row[PARAMETERS]["mean"] for row in rows], rows, name)
        axes.set_xscale("log")
        axes.set_xlabel("parameters of the value model, millions")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend()
