"""`dvpo bench`: a training step against the bare libraries it stands on, the algorithms against each other, and training against TRL."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from dvpo_ray.commands.common import add_config_arguments, check_new_output, dated_folder, load
from dvpo_ray.commands.train import check_train_config, missing_pairs
from dvpo_ray.config import Config, override_config
from dvpo_ray.config.algorithms import ALGORITHMS
from dvpo_ray.config.arithmetic import SAME_UPDATE, check_equal
from dvpo_ray.config.inputs import Needed, policy_inputs, preference_inputs, problems
from dvpo_ray.config.options import add_set_option, settings_by_algorithm, whole_number
from dvpo_ray.errors import InputError

HELP = "measure training steps: against the bare libraries, the algorithms against each other, and against TRL"
EXAMPLE = "dvpo bench step cluster_configs/local-cpu.yaml gvm.path=runs/gvm/final --repeats 3"

STEP_HELP = "measure a training step against the bare libraries it stands on"
LEDGER_HELP = "measure memory and time of a step of each algorithm, by role, and their ratios to PPO"
LEDGER_EXAMPLE = "dvpo bench ledger cluster_configs/local-cpu.yaml gvm.path=runs/gvm/final reward_model.path=runs/rm/final --repeats 3"
DEFAULT_ALGORITHMS = ("ppo", "grpo", "dvpo")
TRL_HELP = "measure a training step against TRL's PPOTrainer"
TRL_EXAMPLE = "dvpo bench trl cluster_configs/stories-cpu.yaml batch.update_epochs=4 --trl-python .venv-trl/bin/python"
TRL_REWARD_HELP = "train a reward model by TRL's RewardTrainer and compare its accuracy with that of gvm.path and reward_model.path"
TRL_REWARD_EXAMPLE = "dvpo bench trl-reward cluster_configs/stories-cpu.yaml reward_model.epochs=2 --out runs/trl-reward"

Benchmark = Callable[[argparse.Namespace, Config, Path], dict]
"""Measures in a folder and returns what bench.json holds."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    benchmarks = parser.add_subparsers(metavar="BENCHMARK", required=True)
    step = _add(benchmarks, "step", STEP_HELP, EXAMPLE, _step)
    _add_repeats(step, "measured rounds after one that warms up", 5)
    _add_ledger(benchmarks)
    trl = _add(benchmarks, "trl", TRL_HELP, TRL_EXAMPLE, _trl)
    trl.add_argument(
        "--trl-python", metavar="FILE", type=Path, required=True, help="Python of the environment that launch/bench_trl.sh makes, with TRL 1.12.0"
    )
    _add_repeats(trl, "measured steps of each contestant after one that warms up", 3)
    _add_rounds(trl)
    add_set_option(trl)
    _add(benchmarks, "trl-reward", TRL_REWARD_HELP, TRL_REWARD_EXAMPLE, _trl_reward)


def _add(benchmarks, name: str, help_text: str, example: str, benchmark: Benchmark) -> argparse.ArgumentParser:
    parser = benchmarks.add_parser(name, help=help_text, description=f"{help_text}.", epilog=example)
    add_config_arguments(parser)
    parser.add_argument("--out", metavar="DIR", type=Path, help="folder of bench.json and the logs (default: runs/<name>-bench-<time>)")
    parser.set_defaults(bench_command=_measure, benchmark=benchmark)
    return parser


def _add_rounds(parser: argparse.ArgumentParser) -> None:
    help = "turns that the contestants take, each from a new start; for a machine whose speed drifts (default: 1)"
    parser.add_argument("--rounds", metavar="N", type=whole_number(at_least=1), default=1, help=help)


def _add_repeats(parser: argparse.ArgumentParser, meaning: str, default: int) -> None:
    parser.add_argument("--repeats", metavar="N", type=whole_number(at_least=1), default=default, help=f"{meaning} (default: {default})")


def _add_ledger(benchmarks) -> None:
    ledger = benchmarks.add_parser("ledger", help=LEDGER_HELP, description=f"{LEDGER_HELP}.", epilog=LEDGER_EXAMPLE)
    add_config_arguments(ledger)
    ledger.add_argument(
        "--algorithms",
        metavar="NAMES",
        type=_algorithms,
        default=list(DEFAULT_ALGORITHMS),
        help=f"comma-separated, of {', '.join(ALGORITHMS)} (default: {','.join(DEFAULT_ALGORITHMS)})",
    )
    _add_repeats(ledger, "measured steps after one that warms up", 3)
    _add_rounds(ledger)
    ledger.add_argument(
        "--group-size",
        metavar="N",
        type=whole_number(at_least=2),
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
    add_set_option(ledger)
    ledger.set_defaults(bench_command=_ledger)


def _algorithms(names: str) -> list[str]:
    chosen = list(dict.fromkeys(name.strip() for name in names.split(",")))
    unknown = next((name for name in chosen if name not in ALGORITHMS), None)
    if unknown is not None:
        raise argparse.ArgumentTypeError(f"'{unknown}' is no algorithm; expected some of {','.join(ALGORITHMS)}")
    return chosen


def run(args: argparse.Namespace) -> int:
    return args.bench_command(args)


# -------------------------------------------------------------------------------------- benchmarks with a bench.json


def _measure(args: argparse.Namespace) -> int:
    config = load(args)
    out = args.out or dated_folder(config, "-bench")
    check_new_output(out, "the results")
    results = args.benchmark(args, config, out)

    from dvpo_ray.files import whole_file

    with whole_file(out / "bench.json") as file:
        json.dump(results, file, indent=2)
    print(out / "bench.json")
    return 0


def _step(args: argparse.Namespace, config: Config, out: Path) -> dict:
    check_train_config(args.config, config)

    from dvpo_ray.bench.step import bench_step

    return bench_step(config, out, args.repeats)


def _trl(args: argparse.Namespace, config: Config, out: Path) -> dict:
    from dvpo_ray.bench.trl import ALGORITHMS, bench_trl, run_as, with_models

    settings = settings_by_algorithm(args.set, ALGORITHMS)
    configs = {algorithm: override_config(with_models(run_as(config, algorithm), fallback="made"), settings[algorithm]) for algorithm in ALGORITHMS}
    for changed in configs.values():
        check_train_config(args.config, changed)
    check_equal({"TRL": config, **configs}, SAME_UPDATE)
    return bench_trl(config, args.trl_python, out, args.repeats, settings, args.rounds)


def _trl_reward(args: argparse.Namespace, config: Config, out: Path) -> dict:
    compared = [Needed(f"{kind}.path", path, kind) for kind in ("gvm", "reward_model") if (path := getattr(config, kind).path) is not None]
    for problem in [*missing_pairs(config), *problems([*preference_inputs(config, "reward_model"), *compared])]:
        raise InputError(f"{args.config}: {problem}")

    from dvpo_ray.bench.trl_reward import bench_trl_reward

    return bench_trl_reward(config, out)


# ----------------------------------------------------------------------------------------------------------- ledger


def _ledger(args: argparse.Namespace) -> int:
    config = load(args)
    if args.tokenizer is not None and args.random_weights is None:
        raise InputError("--tokenizer is for --random-weights CONFIG_JSON; without it the tokenizer is the model's own")
    settings = settings_by_algorithm(args.set, args.algorithms)
    out = args.out or dated_folder(config, "-ledger")
    check_new_output(out, "the results")

    from dvpo_ray.bench.ledger import bench_ledger, config_for

    def by_algorithm(config: Config) -> dict[str, Config]:
        return {name: config_for(override_config(config, settings[name]), name, args.group_size) for name in args.algorithms}

    check_equal(by_algorithm(config), SAME_UPDATE)
    config = _with_models(args, config, out)
    for changed in by_algorithm(config).values():
        check_train_config(args.config, changed)
        for problem in problems(policy_inputs(changed)):
            raise InputError(problem)
    results, markdown = bench_ledger(config, args.algorithms, out, args.repeats, args.group_size, settings, args.rounds)

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

    return with_random_weights(config, args.random_weights, out.resolve() / "random-weights", args.tokenizer)
