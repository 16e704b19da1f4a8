"""`dvpo bench`: a training step against the bare libraries, the algorithms against each other, and training against TRL."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from dvpo_ray.commands.common import add_config_arguments, check_new_output, dated_folder, load, loading
from dvpo_ray.commands.train import check_train_config, missing_pairs
from dvpo_ray.config import Config, override_config
from dvpo_ray.config.algorithms import ALGORITHMS
from dvpo_ray.config.arithmetic import SAME_UPDATE, check_equal
from dvpo_ray.config.inputs import Needed, policy_inputs, preference_inputs, problems
from dvpo_ray.config.options import add_set_option, settings_by_algorithm, whole_number
from dvpo_ray.config.paths import path_option
from dvpo_ray.errors import InputError
from dvpo_ray.files import whole_file

HELP = "measure training steps: against the bare libraries, the algorithms against each other, and against TRL"
EXAMPLE = "dvpo bench step cluster_configs/local-cpu.yaml gvm.path=runs/gvm/final --repeats 3"

STEP_HELP = "measure a training step against the bare libraries that it uses"
SYNC_HELP = "measure how fast all weights travel from the learner to the rollout engines"
SYNC_EXAMPLE = "dvpo bench sync cluster_configs/local-cpu.yaml weight_sync.bucket_mib=64 --repeats 5"
LEDGER_HELP = "measure memory and time of a step of each algorithm, by role, and their ratios to PPO"
LEDGER_EXAMPLE = "dvpo bench ledger cluster_configs/local-cpu.yaml gvm.path=runs/gvm/final reward_model.path=runs/rm/final --repeats 3"
DEFAULT_ALGORITHMS = ("ppo", "grpo", "dvpo")
TRL_HELP = "measure a training step against TRL's PPOTrainer"
TRL_EXAMPLE = "dvpo bench trl cluster_configs/stories-cpu.yaml batch.update_epochs=4 --trl-python .venv-trl/bin/python"
TRL_REWARD_HELP = "train a reward model by TRL's RewardTrainer and compare its accuracy with that of gvm.path and reward_model.path"
TRL_REWARD_EXAMPLE = "dvpo bench trl-reward cluster_configs/stories-cpu.yaml reward_model.epochs=2 --out runs/trl-reward"

Results = tuple[dict, str | None]
"""What a benchmark measured, for JSON, and its tables in Markdown where it has some."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    benchmarks = parser.add_subparsers(metavar="BENCHMARK", required=True)
    step = _add(benchmarks, "step", STEP_HELP, EXAMPLE, _step)
    _add_number(step, "--repeats", "measured rounds after one that warms up", 5)

    sync = _add(benchmarks, "sync", SYNC_HELP, SYNC_EXAMPLE, _sync)
    _add_number(sync, "--repeats", "measured syncs after one that warms up", 5)

    ledger = _add(benchmarks, "ledger", LEDGER_HELP, LEDGER_EXAMPLE, _ledger, kind="ledger", files="ledger.json, ledger.md")
    ledger.add_argument(
        "--algorithms",
        metavar="NAMES",
        type=_algorithms,
        default=list(DEFAULT_ALGORITHMS),
        help=f"comma-separated, of {', '.join(ALGORITHMS)} (default: {','.join(DEFAULT_ALGORITHMS)})",
    )
    _add_number(ledger, "--repeats", "measured steps after one that warms up", 3)
    meaning = "samples of a prompt for grpo and rloo where batch.samples_per_prompt is 1; the number of prompts is divided by it"
    _add_number(ledger, "--group-size", meaning, 4, at_least=2)
    ledger.add_argument(
        "--random-weights",
        metavar="CONFIG_JSON",
        type=path_option,
        help="make policy, value model, reward model and prompts of this architecture with random weights; a config.json or its folder",
    )
    tokenizer = "tokenizer for --random-weights (default: the folder's, else one of bytes)"
    ledger.add_argument("--tokenizer", metavar="DIR", type=path_option, help=tokenizer)

    trl = _add(benchmarks, "trl", TRL_HELP, TRL_EXAMPLE, _trl)
    python = "Python of the environment that launch/bench_trl.sh makes, with TRL 1.12.0"
    trl.add_argument("--trl-python", metavar="FILE", type=path_option, required=True, help=python)
    _add_number(trl, "--repeats", "measured steps of each contestant after one that warms up", 3)
    for benchmark in (ledger, trl):
        _add_number(benchmark, "--rounds", "turns of each contestant, each from a new start; take several on a machine whose speed varies", 1)
        add_set_option(benchmark)
    _add(benchmarks, "trl-reward", TRL_REWARD_HELP, TRL_REWARD_EXAMPLE, _trl_reward)


def _add(
    benchmarks, name: str, help_text: str, example: str, benchmark: Callable[..., Results], kind: str = "bench", files: str = "bench.json"
) -> argparse.ArgumentParser:
    parser = benchmarks.add_parser(name, help=help_text, description=f"{help_text}.", epilog=example)
    add_config_arguments(parser)
    parser.add_argument("--out", metavar="DIR", type=path_option, help=f"folder of {files} and the logs (default: runs/<name>-{kind}-<time>)")
    parser.set_defaults(benchmark=benchmark, kind=kind)
    return parser


def _add_number(parser: argparse.ArgumentParser, option: str, meaning: str, default: int, at_least: int = 1) -> None:
    parser.add_argument(option, metavar="N", type=whole_number(at_least=at_least), default=default, help=f"{meaning} (default: {default})")


def _algorithms(names: str) -> list[str]:
    chosen = list(dict.fromkeys(name.strip() for name in names.split(",")))
    unknown = next((name for name in chosen if name not in ALGORITHMS), None)
    if unknown is not None:
        raise argparse.ArgumentTypeError(f"'{unknown}' is not an algorithm; expected some of {','.join(ALGORITHMS)}")
    return chosen


def run(args: argparse.Namespace) -> int:
    config = load(args)
    out = args.out or dated_folder(config, f"-{args.kind}")
    check_new_output(out, "the results")
    results, markdown = args.benchmark(args, config, out)
    with whole_file(out / f"{args.kind}.json") as file:
        json.dump(results, file, indent=2)
    if markdown is not None:
        with whole_file(out / f"{args.kind}.md") as file:
            file.write(markdown)
    print((out / f"{args.kind}.json").resolve())
    return 0


def _step(args: argparse.Namespace, config: Config, out: Path) -> Results:
    check_train_config(args.config, config)

    with loading():
        from dvpo_ray.bench.step import bench_step

    return bench_step(config, out, args.repeats), None


def _sync(args: argparse.Namespace, config: Config, out: Path) -> Results:
    with loading():
        from dvpo_ray.bench.sync import bench_sync

    return bench_sync(config, out, args.repeats), None


def _trl(args: argparse.Namespace, config: Config, out: Path) -> Results:
    with loading():
        from dvpo_ray.bench.trl import ALGORITHMS, bench_trl, with_models

    settings = settings_by_algorithm(args.set, ALGORITHMS)
    whole = with_models(config, fallback="made")
    configs = {algorithm: override_config(whole, [f"algorithm={algorithm}", *settings[algorithm]]) for algorithm in ALGORITHMS}
    for changed in configs.values():
        check_train_config(args.config, changed)
    check_equal({"TRL": config, **configs}, SAME_UPDATE)
    return bench_trl(config, args.trl_python, out, args.repeats, settings, args.rounds), None


def _trl_reward(args: argparse.Namespace, config: Config, out: Path) -> Results:
    compared = [Needed(f"{kind}.path", path, kind) for kind in ("gvm", "reward_model") if (path := getattr(config, kind).path) is not None]
    for problem in [*missing_pairs(config), *problems([*preference_inputs(config, "reward_model"), *compared])]:
        raise InputError(f"{args.config}: {problem}")

    with loading():
        from dvpo_ray.bench.trl_reward import bench_trl_reward

    return bench_trl_reward(config, out), None


def _ledger(args: argparse.Namespace, config: Config, out: Path) -> Results:
    if args.tokenizer is not None and args.random_weights is None:
        raise InputError("--tokenizer is for --random-weights CONFIG_JSON; without it the tokenizer is the model's own")
    settings = settings_by_algorithm(args.set, args.algorithms)

    with loading():
        from dvpo_ray.bench.ledger import bench_ledger, config_for

    def by_algorithm() -> dict[str, Config]:
        return {name: config_for(override_config(config, settings[name]), name, args.group_size) for name in args.algorithms}

    check_equal(by_algorithm(), SAME_UPDATE)
    if args.random_weights is not None:
        from dvpo_ray.bench.random_weights import with_random_weights

        config = with_random_weights(config, args.random_weights, out.resolve() / "random-weights", args.tokenizer)
    for changed in by_algorithm().values():
        check_train_config(args.config, changed)
        for problem in problems(policy_inputs(changed)):
            raise InputError(problem)
    return bench_ledger(config, args.algorithms, out, args.repeats, args.group_size, settings, args.rounds)
