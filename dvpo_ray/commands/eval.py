"""`dvpo eval`: gold scores of a policy."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from dvpo_ray.commands.common import add_config_arguments, dated_folder, load
from dvpo_ray.commands.paths import check_new_folder
from dvpo_ray.errors import InputError
from dvpo_ray.planning.placement import check_local_cluster, plan_placement

HELP = "judge a policy's responses to the held-out prompts"
EXAMPLE = "dvpo eval cluster_configs/local-cpu.yaml --policy runs/first/final --out runs/first-eval"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument("--policy", metavar="MODEL", help="checkpoint folder or hub name (default: model.path of the config)")
    parser.add_argument("--out", metavar="DIR", type=Path, help="new folder for the judged responses (default: runs/<name>-eval-<time>)")


def run(args: argparse.Namespace) -> int:
    config = load(args)
    if config.data.prompts is None:
        raise InputError(f"{args.config}: data.prompts.path is not set; give the prompts to evaluate on")
    out = args.out or dated_folder(config, "-eval")
    check_new_folder(out, "the evaluation")
    check_local_cluster(config, (bundle for bundle in plan_placement(config) if bundle.role == "rollout"))

    from dvpo_ray.training.evaluate import evaluate_policy

    print(json.dumps(evaluate_policy(config, args.policy or config.model.path, out), indent=2))
    return 0
