"""`dvpo sft`: the supervised warm start."""

from __future__ import annotations

import argparse

from dvpo_ray.commands.common import add_run_arguments, choose_run_folder, load, print_plan, rows_per_optimizer_step
from dvpo_ray.config import Config
from dvpo_ray.config.inputs import problems, sft_inputs
from dvpo_ray.errors import InputError

HELP = "fine-tune a model on instruction-answer rows, to start the method from"
EXAMPLE = "dvpo sft cluster_configs/local-cpu.yaml data.sft=answers.jsonl --out runs/sft"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser, "runs/<name>-sft-<time>")


def run(args: argparse.Namespace) -> int:
    config = load(args)
    missing = ["data.sft is not set; give the instruction-answer rows to train on"] if config.data.sft is None else []
    if args.dry_run:
        print_plan(config, _arithmetic(config), [], [*missing, *problems(sft_inputs(config))])
        return 0
    for problem in missing:
        raise InputError(f"{args.config}: {problem}")
    out = choose_run_folder(args, config, suffix="-sft")

    from dvpo_ray.training.sft import train_sft

    print(train_sft(config, out, args.resume))
    return 0


def _arithmetic(config: Config) -> list[str]:
    return [*rows_per_optimizer_step(config.sft, "row"), f"longest row              {config.sft.max_tokens} tokens"]
