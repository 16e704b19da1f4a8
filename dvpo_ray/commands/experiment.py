"""`dvpo experiment`: the measurements behind the defaults."""

from __future__ import annotations

import argparse
from datetime import datetime
from pathlib import Path

from dvpo_ray.commands.common import add_config_arguments, load
from dvpo_ray.errors import InputError

HELP = "rerun a measurement that a default or a claim rests on"
EXAMPLE = "dvpo experiment advantage-modes cluster_configs/stories-cpu.yaml gvm.path=runs/gvm/final --seeds 0 1 2"

MODES = ("static_q", "td", "gae", "release")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("experiment", choices=["advantage-modes"], help="advantage-modes: gold against KL for every advantage mode")
    add_config_arguments(parser)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED", help="one run per mode and seed (default: 0 1 2)")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), metavar="MODE", help=f"of {', '.join(MODES)} (default: all)")
    parser.add_argument(
        "--kl", type=float, nargs="+", default=[4.0, 8.0, 12.0], metavar="NATS", help="KLs at which gold is compared (default: 4 8 12)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the runs; finished ones in it are kept (default: runs/<experiment>-<time>)"
    )


def run(args: argparse.Namespace) -> int:
    config = load(args)
    for missing, key in ((config.gvm.path is None, "gvm.path"), (config.data.prompts is None, "data.prompts.path")):
        if missing:
            raise InputError(f"{args.config}: {key} is not set")
    if config.evaluation.judge == "none" or config.evaluation.every_steps == 0:
        raise InputError(f"{args.config}: set evaluation.judge and evaluation.every_steps; gold is compared along the run")
    out = args.out or Path("runs") / f"{args.experiment}-{datetime.now():%Y%m%d-%H%M%S}"

    from dvpo_ray.experiments.advantage_modes import markdown, run_modes

    print(markdown(run_modes(config, out, args.modes, args.seeds, args.kl)["table"]))
    print(out)
    return 0
