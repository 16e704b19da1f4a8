"""`dvpo dpo`: the baseline without rollouts."""

from __future__ import annotations

import argparse

from dvpo_ray.commands.common import add_run_arguments, choose_run_folder, load, print_plan, rows_per_optimizer_step
from dvpo_ray.commands.gvm import missing_pairs
from dvpo_ray.config import Config
from dvpo_ray.config.inputs import preference_inputs, problems
from dvpo_ray.errors import InputError

HELP = "fine-tune a model on preference pairs by DPO, as a baseline"
EXAMPLE = "dvpo dpo cluster_configs/local-cpu.yaml data.preferences.path=pairs.jsonl --out runs/dpo"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser, "runs/<name>-dpo-<time>")


def run(args: argparse.Namespace) -> int:
    config = load(args)
    missing = missing_pairs(config)
    if args.dry_run:
        print_plan(config, _arithmetic(config), [], [*missing, *problems(preference_inputs(config, "dpo"))])
        return 0
    for problem in missing:
        raise InputError(f"{args.config}: {problem}")
    out = choose_run_folder(args, config, suffix="-dpo")

    from dvpo_ray.training.dpo import train_dpo

    print(train_dpo(config, out, args.resume))
    return 0


def _arithmetic(config: Config) -> list[str]:
    data = config.data
    return [
        *rows_per_optimizer_step(config.dpo, "pair"),
        f"longest row              {data.max_prompt_tokens + data.max_response_tokens} tokens = {data.max_prompt_tokens} prompt + "
        f"{data.max_response_tokens} response",
    ]
