"""`dvpo gvm train | eval | score`: the Global Value Model."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from dvpo_ray.commands.common import add_config_arguments, add_run_arguments, choose_run_folder, dated_folder, load, print_plan
from dvpo_ray.commands.paths import check_new_file, check_new_folder
from dvpo_ray.config import Config
from dvpo_ray.config.inputs import preference_inputs, problems, value_model_misfits
from dvpo_ray.config.schema import ContextConfig, DataConfig, GVMConfig, PreferenceTraining
from dvpo_ray.errors import InputError
from dvpo_ray.planning.placement import Bundle, check_local_cluster, plan_training_placement

HELP = "train, evaluate or apply a Global Value Model"
EXAMPLE = "dvpo gvm train cluster_configs/local-cpu.yaml data.preferences.path=pairs.jsonl --out runs/gvm"

TRAIN_HELP = "train a value model on preference pairs"
EVAL_HELP = "measure a value model on held-out pairs"
EVAL_EXAMPLE = "dvpo gvm eval cluster_configs/local-cpu.yaml --gvm runs/gvm/final --out runs/gvm-eval"
SCORE_HELP = "write the values of every response of a file"
SCORE_EXAMPLE = "dvpo gvm score cluster_configs/local-cpu.yaml --gvm runs/gvm/final --input pairs.jsonl --output values.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    train = commands.add_parser("train", help=TRAIN_HELP, description=TRAIN_HELP, epilog=EXAMPLE)
    add_run_arguments(train, "runs/<name>-gvm-<time>")
    train.set_defaults(gvm_command=_train)

    evaluate = commands.add_parser("eval", help=EVAL_HELP, description=EVAL_HELP, epilog=EVAL_EXAMPLE)
    add_config_arguments(evaluate)
    _add_gvm_argument(evaluate)
    evaluate.add_argument("--out", metavar="DIR", type=Path, help="new folder for the JSON and the plots (default: runs/<name>-gvm-eval-<time>)")
    evaluate.set_defaults(gvm_command=_evaluate)

    score = commands.add_parser("score", help=SCORE_HELP, description=SCORE_HELP, epilog=SCORE_EXAMPLE)
    add_config_arguments(score)
    _add_gvm_argument(score)
    score.add_argument("--input", metavar="FILE", type=Path, required=True, help="rows with a prompt and responses")
    score.add_argument("--output", metavar="FILE", type=Path, required=True, help="new JSONL file, one object per row")
    score.set_defaults(gvm_command=_score)


def run(args: argparse.Namespace) -> int:
    return args.gvm_command(args)


def missing_pairs(config: Config) -> list[str]:
    """What the config lacks to train on preference pairs."""
    return ["data.preferences.path is not set; give the preference pairs to train on"] if config.data.preferences is None else []


def print_training_plan(config: Config, trained: PreferenceTraining, bundles: list[Bundle], notes: list[str]) -> None:
    """Print what training on preference pairs with this config would be.

    Args:
        trained: its section that is trained.
        bundles: the placement of its trainers.
    """
    print_plan(config, _arithmetic(config.data, trained), bundles, notes)


def _train(args: argparse.Namespace) -> int:
    config = load(args)
    missing, bundles = missing_pairs(config), plan_training_placement(config.gvm)
    check_local_cluster(config, bundles)
    if args.dry_run:
        print_training_plan(config, config.gvm, bundles, [*missing, *problems(preference_inputs(config)), *value_model_misfits(config)])
        return 0
    for problem in missing:
        raise InputError(f"{args.config}: {problem}")
    out = choose_run_folder(args, config, suffix="-gvm")

    from dvpo_ray.training.value_model import train_value_model

    print(train_value_model(config, config.gvm, out, args.resume))
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    config = load(args)
    gvm, out = _gvm_path(args, config), args.out or dated_folder(config, "-gvm-eval")
    check_new_folder(out, "the evaluation")

    from dvpo_ray.gvm.evaluation import evaluate_gvm

    print(json.dumps(evaluate_gvm(config, gvm, out), indent=2))
    return 0


def _score(args: argparse.Namespace) -> int:
    config = load(args)
    gvm = _gvm_path(args, config)
    check_new_file(args.output, "--output")

    from dvpo_ray.gvm.scoring import score_file

    rows = score_file(config, gvm, args.input, args.output)
    print(f"{args.output}: {rows} rows")
    return 0


def _add_gvm_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gvm", metavar="DIR", type=Path, help="GVM folder (default: gvm.path of the config)")


def _gvm_path(args: argparse.Namespace, config: Config) -> Path:
    if args.gvm is None and config.gvm.path is None:
        raise InputError(f"{args.config}: which value model? give --gvm DIR or set gvm.path")
    return args.gvm or Path(config.gvm.path)


def _arithmetic(data: DataConfig, trained: PreferenceTraining) -> list[str]:
    pairs_per_worker = math.ceil(trained.pairs_per_step / trained.num_actors)
    context = trained.context if isinstance(trained, GVMConfig) else ContextConfig()
    longest = data.max_prompt_tokens + data.max_response_tokens + context.examples * context.max_tokens
    examples = f" + {context.examples} x {context.max_tokens} examples" if context.examples else ""
    return [
        f"pairs per step           {trained.pairs_per_step}, at most {pairs_per_worker} on each of {trained.num_actors} workers",
        f"optimizer steps          {trained.epochs:g} epochs x training pairs / {trained.pairs_per_step}",
        f"longest row              {longest} tokens = {data.max_prompt_tokens} prompt + "
        f"{data.max_response_tokens} response{examples}; micro-batches of {trained.micro_batch_tokens} padded tokens",
    ]
