"""`dvpo quickstart`: the whole method on a small model."""

from __future__ import annotations

import argparse
from pathlib import Path

from dvpo_ray.commands.common import choose_run_folder
from dvpo_ray.commands.train import print_train_plan
from dvpo_ray.config import load_config
from dvpo_ray.config.options import whole_number

HELP = "make a small language model better by DVPO, on two cores and in minutes"
EXAMPLE = "dvpo quickstart --out runs/quickstart"
CONFIG = Path(__file__).resolve().parents[1] / "quickstart" / "config.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", metavar="KEY=VALUE", nargs="*", default=[], help="settings that replace those of the quickstart")
    parser.add_argument("--out", metavar="DIR", type=Path, help="run folder (default: runs/quickstart-<time>)")
    parser.add_argument("--steps", metavar="N", type=whole_number(at_least=1), help="steps of policy optimisation; the same as train.steps=N")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved config, the batch arithmetic and the placement; start nothing")
    parser.set_defaults(resume=False)


def run(args: argparse.Namespace) -> int:
    overrides = [*args.overrides, *([f"train.steps={args.steps}"] if args.steps is not None else [])]
    config = load_config(CONFIG, overrides)
    if args.dry_run:
        print_train_plan(config, ["the paths of model, data and value model are filled in when it runs"])
        return 0
    out = choose_run_folder(args, config)

    from dvpo_ray.quickstart.run import quickstart

    quickstart(out, overrides)
    return 0
