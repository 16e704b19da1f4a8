"""`dvpo report`: the HTML report of a run."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dvpo_ray.errors import InputError

HELP = "write report.html of a run folder"
EXAMPLE = "dvpo report runs/first"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN", type=Path, help="run folder of `dvpo train`")


def run(args: argparse.Namespace) -> int:
    if not args.run_folder.is_dir():
        raise InputError(f"{args.run_folder}: no such run folder")

    from dvpo_ray.monitoring.report import write_report

    print(write_report(args.run_folder, _warn))
    return 0


def _warn(note: str) -> None:
    print(f"dvpo: warning: {note}", file=sys.stderr)
