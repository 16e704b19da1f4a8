"""`dvpo rm train`: the reward model of the baselines."""

from __future__ import annotations

import argparse

from dvpo_ray.commands.common import add_run_arguments, choose_run_folder, load
from dvpo_ray.commands.gvm import missing_pairs, print_training_plan
from dvpo_ray.config.inputs import preference_inputs, problems, value_model_misfits
from dvpo_ray.errors import InputError
from dvpo_ray.planning.placement import check_local_cluster, plan_training_placement

HELP = "train a Bradley-Terry reward model for the baselines"
EXAMPLE = "dvpo rm train cluster_configs/local-cpu.yaml data.preferences.path=pairs.jsonl --out runs/rm"

TRAIN_HELP = "train a reward model on preference pairs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    train = commands.add_parser("train", help=TRAIN_HELP, description=TRAIN_HELP, epilog=EXAMPLE)
    add_run_arguments(train, "runs/<name>-rm-<time>")


def run(args: argparse.Namespace) -> int:
    config = load(args)
    missing, bundles = missing_pairs(config), plan_training_placement(config.reward_model)
    check_local_cluster(config, bundles)
    if args.dry_run:
        misfits = value_model_misfits(config, "reward_model")
        print_training_plan(config, config.reward_model, bundles, [*missing, *problems(preference_inputs(config, "reward_model")), *misfits])
        return 0
    for problem in missing:
        raise InputError(f"{args.config}: {problem}")
    out = choose_run_folder(args, config, suffix="-rm")

    from dvpo_ray.training.value_model import train_value_model

    print(train_value_model(config, config.reward_model, out, args.resume))
    return 0
