"""`dvpo quickstart`: the whole method on a small model."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from dvpo_ray.commands.common import DRY_RUN, argument, command, loading, overrides
from dvpo_ray.commands.train import POLICY, choose_run_folder
from dvpo_ray.config import load_config
from dvpo_ray.config.notes import training_notes
from dvpo_ray.config.options import whole_number
from dvpo_ray.config.paths import path_option

CONFIG = Path(__file__).resolve().parents[1] / "quickstart" / "config.yaml"


@command(
    "make a small language model better by DVPO, on two cores and in minutes",
    "dvpo quickstart --out runs/quickstart",
    overrides("the quickstart"),
    argument("--out", metavar="DIR", type=path_option, help="run folder (default: runs/quickstart-<time>)"),
    argument("--steps", metavar="N", type=whole_number(at_least=1), help="steps of policy optimisation; the same as train.steps=N"),
    DRY_RUN,
)
def quickstart(args: Namespace) -> None:
    settings = [*args.overrides, *([f"train.steps={args.steps}"] if args.steps is not None else [])]
    config = load_config(CONFIG, settings)
    if args.dry_run:
        POLICY.print_plan(config, ["the run fills in the paths of model, data and value model", *training_notes(config)])
        return
    out = choose_run_folder(args.out, config)

    with loading():
        from dvpo_ray.quickstart.run import quickstart

    quickstart(out, settings)
