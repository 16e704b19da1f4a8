"""`dvpo quickstart`: the whole method on a small model."""

from __future__ import annotations

import argparse
from pathlib import Path

from dvpo_ray.commands.common import Command, add_dry_run, add_overrides
from dvpo_ray.commands.train import POLICY, choose_run_folder
from dvpo_ray.config import load_config
from dvpo_ray.config.notes import training_notes
from dvpo_ray.config.options import whole_number

CONFIG = Path(__file__).resolve().parents[1] / "quickstart" / "config.yaml"


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add_overrides(parser, "the quickstart")
    parser.add_argument("--out", metavar="DIR", type=Path, help="run folder (default: runs/quickstart-<time>)")
    parser.add_argument("--steps", metavar="N", type=whole_number(at_least=1), help="steps of policy optimisation; the same as train.steps=N")
    add_dry_run(parser)
    parser.set_defaults(resume=False)


def _run(args: argparse.Namespace) -> int:
    overrides = [*args.overrides, *([f"train.steps={args.steps}"] if args.steps is not None else [])]
    config = load_config(CONFIG, overrides)
    if args.dry_run:
        POLICY.print_plan(config, ["the run fills in the paths of model, data and value model", *training_notes(config)])
        return 0
    out = choose_run_folder(args, config)

    from dvpo_ray.quickstart.run import quickstart

    quickstart(out, overrides)
    return 0


QUICKSTART = Command(
    "make a small language model better by DVPO, on two cores and in minutes", "dvpo quickstart --out runs/quickstart", _add_arguments, _run
)
