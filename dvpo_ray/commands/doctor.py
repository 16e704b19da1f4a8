"""`dvpo doctor`: what this machine has of what a run needs."""

from __future__ import annotations

import argparse

HELP = "check what this machine has of what a run needs, and say what to do about the rest"
EXAMPLE = "dvpo doctor"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It takes none."""


def run(args: argparse.Namespace) -> int:
    from dvpo_ray.runtime.doctor import print_report, run_checks

    print("importing every library in a process of its own, half a minute ...", flush=True)
    return print_report(run_checks())
