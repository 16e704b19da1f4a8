"""`dvpo bench`: measurements against the bare libraries."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from dvpo_ray.commands.common import add_config_arguments, dated_folder, load
from dvpo_ray.commands.train import check_train_config
from dvpo_ray.errors import InputError

HELP = "measure a training step against the bare libraries it stands on"
EXAMPLE = "dvpo bench step cluster_configs/local-cpu.yaml gvm.path=runs/gvm/final --repeats 3"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    benchmarks = parser.add_subparsers(metavar="BENCHMARK", required=True)
    step = benchmarks.add_parser("step", help=HELP, description=f"{HELP}.", epilog=EXAMPLE)
    add_config_arguments(step)
    step.add_argument("--repeats", metavar="N", type=int, default=5, help="measured rounds after one that warms up (default: 5)")
    step.add_argument("--out", metavar="DIR", type=Path, help="folder of bench.json and the logs (default: runs/<name>-bench-<time>)")


def run(args: argparse.Namespace) -> int:
    config = load(args)
    if args.repeats < 1:
        raise InputError(f"--repeats is {args.repeats}; expected a whole number of at least 1")
    check_train_config(args.config, config)
    out = args.out or dated_folder(config, "-bench")

    from dvpo_ray.bench.step import bench_step
    from dvpo_ray.files import whole_file

    results = bench_step(config, out, args.repeats)
    with whole_file(out / "bench.json") as file:
        json.dump(results, file, indent=2)
    print(out / "bench.json")
    return 0
