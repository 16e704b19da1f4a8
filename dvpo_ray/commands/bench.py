"""`dvpo bench`: measurements against other libraries."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from dvpo_ray.commands.common import add_config_arguments, dated_folder, load
from dvpo_ray.commands.gvm import missing_pairs
from dvpo_ray.commands.train import check_train_config
from dvpo_ray.config import Config
from dvpo_ray.errors import InputError

HELP = "measure a training step against the bare libraries it stands on, and training against TRL"
EXAMPLE = "dvpo bench step cluster_configs/local-cpu.yaml gvm.path=runs/gvm/final --repeats 3"

STEP_HELP = "measure a training step against the bare libraries it stands on"
TRL_HELP = "measure a training step against TRL's PPOTrainer"
TRL_EXAMPLE = "dvpo bench trl cluster_configs/stories-cpu.yaml batch.update_epochs=4 --trl-python .venv-trl/bin/python"
TRL_REWARD_HELP = "train a reward model by TRL's RewardTrainer and compare its accuracy with that of gvm.path and reward_model.path"
TRL_REWARD_EXAMPLE = "dvpo bench trl-reward cluster_configs/stories-cpu.yaml reward_model.epochs=2 --out runs/trl-reward"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    benchmarks = parser.add_subparsers(metavar="BENCHMARK", required=True)
    step = _add(benchmarks, "step", STEP_HELP, EXAMPLE, _step)
    _add_repeats(step, "measured rounds after one that warms up", 5)
    trl = _add(benchmarks, "trl", TRL_HELP, TRL_EXAMPLE, _trl)
    trl.add_argument(
        "--trl-python", metavar="FILE", type=Path, required=True, help="Python of the environment that launch/bench_trl.sh makes, with TRL 1.12.0"
    )
    _add_repeats(trl, "measured steps of each contestant after one that warms up", 3)
    _add(benchmarks, "trl-reward", TRL_REWARD_HELP, TRL_REWARD_EXAMPLE, _trl_reward)


def run(args: argparse.Namespace) -> int:
    config = load(args)
    if getattr(args, "repeats", 1) < 1:
        raise InputError(f"--repeats is {args.repeats}; expected a whole number of at least 1")
    out = args.out or dated_folder(config, "-bench")
    results = args.benchmark(args, config, out)

    from dvpo_ray.files import whole_file

    with whole_file(out / "bench.json") as file:
        json.dump(results, file, indent=2)
    print(out / "bench.json")
    return 0


def _add(benchmarks, name: str, help_text: str, example: str, benchmark: Callable[[argparse.Namespace, Config, Path], dict]):
    parser = benchmarks.add_parser(name, help=help_text, description=help_text, epilog=example)
    add_config_arguments(parser)
    parser.add_argument("--out", metavar="DIR", type=Path, help="folder of bench.json and the logs (default: runs/<name>-bench-<time>)")
    parser.set_defaults(benchmark=benchmark)
    return parser


def _add_repeats(parser: argparse.ArgumentParser, meaning: str, default: int) -> None:
    parser.add_argument("--repeats", metavar="N", type=int, default=default, help=f"{meaning} (default: {default})")


def _step(args: argparse.Namespace, config: Config, out: Path) -> dict:
    check_train_config(args.config, config)

    from dvpo_ray.bench.step import bench_step

    return bench_step(config, out, args.repeats)


def _trl(args: argparse.Namespace, config: Config, out: Path) -> dict:
    from dvpo_ray.bench.trl import ALGORITHMS, bench_trl, run_as, with_models

    for algorithm in ALGORITHMS:
        check_train_config(args.config, with_models(run_as(config, algorithm), fallback="made"))
    return bench_trl(config, args.trl_python, out, args.repeats)


def _trl_reward(args: argparse.Namespace, config: Config, out: Path) -> dict:
    for problem in missing_pairs(config):
        raise InputError(f"{args.config}: {problem}")

    from dvpo_ray.bench.trl_reward import bench_trl_reward

    return bench_trl_reward(config, out)
