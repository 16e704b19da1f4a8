"""`dvpo experiment`: the measurements behind the defaults and the claims."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from dvpo_ray.commands.common import add_config_arguments, check_writable_folder
from dvpo_ray.commands.train import check_train_config
from dvpo_ray.config.arithmetic import counted
from dvpo_ray.config.options import whole_number
from dvpo_ray.config.paths import path_option
from dvpo_ray.experiments.registry import STUDIES
from dvpo_ray.experiments.runner import run_study, study_problems
from dvpo_ray.experiments.study import Run, add_numbers, check_distinct, plan_lines
from dvpo_ray.planning.placement import check_local_cluster, plan_training_placement

HELP = "rerun a measurement behind a default or a claim"
EXAMPLE = next(iter(STUDIES.values())).example


def add_arguments(parser: argparse.ArgumentParser) -> None:
    experiments = parser.add_subparsers(dest="experiment", metavar="EXPERIMENT", required=True)
    for name, study in STUDIES.items():
        command = experiments.add_parser(name, help=study.help, description=f"{study.help}.", epilog=study.example)
        add_config_arguments(command)
        add_numbers(command, "--seeds", [0, 1, 2], "each variant runs once with every seed", whole_number(at_least=0), "SEED")
        out = "folder of the runs; finished ones in it are kept (default: runs/<name>-<time>)"
        command.add_argument("--out", type=path_option, metavar="DIR", help=out)
        command.add_argument("--dry-run", action="store_true", help="list the runs and what they lack; start nothing")
        study.add_options(command)


def run(args: argparse.Namespace) -> int:
    out = args.out or Path("runs") / f"{args.experiment}-{datetime.now():%Y%m%d-%H%M%S}"
    study = STUDIES[args.experiment](args, out)
    runs = study.runs()
    check_writable_folder(out)
    study.check_folder()
    _check(args.config, runs)
    if args.dry_run:
        print(*plan_lines(runs), *(f"note: {problem}" for problem in study_problems(study, runs, ask_hub=False)), sep="\n")
        return 0
    print(f"{args.experiment}: {counted(len(runs), 'run')} in {out}", flush=True)
    print(run_study(study, runs))
    print(out.resolve())
    return 0


def _check(path: str, runs: Sequence[Run]) -> None:
    """Refuse, before the first run starts, whatever would stop a later one.

    Raises:
        InputError: a variant named twice, impossible arithmetic or placement, a missing setting, or a folder of another run.
    """
    check_distinct(runs)
    for run in runs:
        if run.stage == "policy":
            check_train_config(path, run.config)
        elif run.stage in ("gvm", "rm"):
            settings = run.config.gvm if run.stage == "gvm" else run.config.reward_model
            check_local_cluster(run.config, plan_training_placement(settings))
        run.check_kept()
