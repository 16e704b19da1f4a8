"""`dvpo bench step | ledger`: a training step against the bare libraries, and the algorithms against each other."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from dvpo_ray.baselines.algorithms import ALGORITHMS
from dvpo_ray.commands.common import add_config_arguments, dated_folder, load
from dvpo_ray.commands.train import check_train_config
from dvpo_ray.config import Config
from dvpo_ray.errors import InputError

HELP = "measure training steps: against the bare libraries, and the algorithms against each other"
EXAMPLE = "dvpo bench step cluster_configs/local-cpu.yaml gvm.path=runs/gvm/final --repeats 3"

STEP_HELP = "measure a training step against the bare libraries it stands on"
LEDGER_HELP = "measure memory and time of a step of each algorithm, by role, and their ratios to PPO"
LEDGER_EXAMPLE = "dvpo bench ledger cluster_configs/local-cpu.yaml gvm.path=runs/gvm/final reward_model.path=runs/rm/final --repeats 3"
DEFAULT_ALGORITHMS = ("ppo", "grpo", "dvpo")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    benchmarks = parser.add_subparsers(metavar="BENCHMARK", required=True)

    step = benchmarks.add_parser("step", help=STEP_HELP, description=f"{STEP_HELP}.", epilog=EXAMPLE)
    add_config_arguments(step)
    step.add_argument("--repeats", metavar="N", type=int, default=5, help="measured rounds after one that warms up (default: 5)")
    step.add_argument("--out", metavar="DIR", type=Path, help="folder of bench.json and the logs (default: runs/<name>-bench-<time>)")
    step.set_defaults(bench_command=_step)

    ledger = benchmarks.add_parser("ledger", help=LEDGER_HELP, description=f"{LEDGER_HELP}.", epilog=LEDGER_EXAMPLE)
    add_config_arguments(ledger)
    _add_ledger_arguments(ledger)
    ledger.set_defaults(bench_command=_ledger)


def _add_ledger_arguments(ledger: argparse.ArgumentParser) -> None:
    ledger.add_argument(
        "--algorithms",
        metavar="NAMES",
        type=_algorithms,
        default=list(DEFAULT_ALGORITHMS),
        help=f"comma-separated, of {', '.join(ALGORITHMS)} (default: {','.join(DEFAULT_ALGORITHMS)})",
    )
    ledger.add_argument("--repeats", metavar="N", type=int, default=3, help="measured steps after one that warms up (default: 3)")
    ledger.add_argument(
        "--group-size",
        metavar="N",
        type=int,
        default=4,
        help="samples of a prompt for grpo and rloo where batch.samples_per_prompt is 1; prompts become as many fewer (default: 4)",
    )
    ledger.add_argument(
        "--random-weights",
        metavar="CONFIG_JSON",
        type=Path,
        help="make policy, value model, reward model and prompts of this architecture with random weights; a config.json or its folder",
    )
    ledger.add_argument("--tokenizer", metavar="DIR", type=Path, help="tokenizer for --random-weights (default: the folder's, else one of bytes)")
    ledger.add_argument("--out", metavar="DIR", type=Path, help="folder of ledger.json, ledger.md and the logs (default: runs/<name>-ledger-<time>)")


def _algorithms(names: str) -> list[str]:
    chosen = list(dict.fromkeys(name.strip() for name in names.split(",")))
    unknown = next((name for name in chosen if name not in ALGORITHMS), None)
    if unknown is not None:
        raise argparse.ArgumentTypeError(f"'{unknown}' is no algorithm; expected some of {','.join(ALGORITHMS)}")
    return chosen


def run(args: argparse.Namespace) -> int:
    return args.bench_command(args)


def _step(args: argparse.Namespace) -> int:
    config = load(args)
    _check_repeats(args)
    check_train_config(args.config, config)
    out = args.out or dated_folder(config, "-bench")

    from dvpo_ray.bench.step import bench_step
    from dvpo_ray.files import whole_file

    results = bench_step(config, out, args.repeats)
    with whole_file(out / "bench.json") as file:
        json.dump(results, file, indent=2)
    print(out / "bench.json")
    return 0


def _ledger(args: argparse.Namespace) -> int:
    config = load(args)
    _check_repeats(args)
    if args.group_size < 2:
        raise InputError(f"--group-size is {args.group_size}; expected a whole number of at least 2")
    if args.tokenizer is not None and args.random_weights is None:
        raise InputError("--tokenizer is for --random-weights CONFIG_JSON; without it the tokenizer is the model's own")
    out = args.out or dated_folder(config, "-ledger")
    config = _with_models(args, config, out)

    from dvpo_ray.bench.ledger import bench_ledger, config_for

    for algorithm in args.algorithms:
        check_train_config(args.config, config_for(config, algorithm, args.group_size))
    results, markdown = bench_ledger(config, args.algorithms, out, args.repeats, args.group_size)

    from dvpo_ray.files import whole_file

    with whole_file(out / "ledger.json") as file:
        json.dump(results, file, indent=2)
    with whole_file(out / "ledger.md") as file:
        file.write(markdown)
    print(out / "ledger.json")
    return 0


def _with_models(args: argparse.Namespace, config: Config, out: Path) -> Config:
    """The config, with random checkpoints where they are asked for."""
    if args.random_weights is None:
        return config

    from dvpo_ray.bench.random_weights import with_random_weights

    out.mkdir(parents=True, exist_ok=True)
    return with_random_weights(config, args.random_weights, out.resolve() / "random-weights", args.tokenizer)


def _check_repeats(args: argparse.Namespace) -> None:
    if args.repeats < 1:
        raise InputError(f"--repeats is {args.repeats}; expected a whole number of at least 1")
