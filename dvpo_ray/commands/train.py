"""`dvpo train`: policy optimisation."""

from __future__ import annotations

import argparse

from dvpo_ray.commands.common import add_run_arguments, choose_run_folder, load, print_plan
from dvpo_ray.config import Config
from dvpo_ray.config.algorithms import ALGORITHMS
from dvpo_ray.config.arithmetic import derive_batch
from dvpo_ray.config.inputs import policy_inputs, policy_misfits, problems
from dvpo_ray.config.notes import training_notes
from dvpo_ray.errors import InputError
from dvpo_ray.planning.placement import check_local_cluster, plan_placement

HELP = "optimise the policy with a frozen Global Value Model, or by a baseline (algorithm=ppo)"
EXAMPLE = "dvpo train cluster_configs/local-cpu.yaml gvm.path=runs/gvm/final policy.learning_rate=1e-5 --out runs/first"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run_arguments(parser, "runs/<name>-<time>")


def run(args: argparse.Namespace) -> int:
    config = load(args)
    if args.dry_run:
        print_train_plan(config, [*_missing(config), *problems(policy_inputs(config)), *policy_misfits(config)])
        return 0
    check_train_config(args.config, config)
    config = config.model_copy(update={"out": str(choose_run_folder(args, config))})

    from dvpo_ray.training.policy import train

    print(train(config, resume=args.resume))
    return 0


def check_train_config(path: str, config: Config) -> None:
    """Refuse, before anything is loaded, a config that can't be trained with.

    Raises:
        InputError: impossible arithmetic or placement, no GVM or reward model, no prompts.
    """
    derive_batch(config)
    bundles = plan_placement(config)
    for problem in _missing(config):
        raise InputError(f"{path}: {problem}")
    check_local_cluster(config, bundles)


def print_train_plan(config: Config, notes: list[str]) -> None:
    """Print what a run of policy optimisation with this config would be.

    Raises:
        InputError: impossible arithmetic or placement.
    """
    bundles = plan_placement(config)
    check_local_cluster(config, bundles)
    print_plan(config, _arithmetic(config), bundles, [*notes, *training_notes(config)])


def _missing(config: Config) -> list[str]:
    missing = []
    scorer = ALGORITHMS[config.algorithm].scorer
    if scorer == "scorer" and config.gvm.path is None:
        missing.append("gvm.path is not set; train a value model with `dvpo gvm train` and give its folder")
    if scorer == "reward_model" and config.reward_model.path is None:
        missing.append(f"reward_model.path is not set, and {config.algorithm} needs rewards; train one with `dvpo rm train` and give its folder")
    if config.data.prompts is None:
        missing.append("data.prompts.path is not set; give the prompts to optimise on")
    return missing


def _arithmetic(config: Config) -> list[str]:
    plan, batch = derive_batch(config), config.batch
    samples = plan.samples_per_step
    return [
        f"samples per step         {samples} = prompts_per_step {batch.prompts_per_step} x samples_per_prompt {batch.samples_per_prompt}",
        f"samples per engine       {plan.max_samples_per_engine} at most, over {config.rollout.num_actors} engines",
        f"samples per worker       {plan.samples_per_worker}, over {config.policy.num_actors} learner workers",
        f"rows per minibatch       {plan.rows_per_minibatch}, {plan.rows_per_worker_minibatch} on each worker",
        f"optimizer steps          {plan.optimizer_steps_per_step} per step = update_epochs {batch.update_epochs} x "
        f"minibatches_per_epoch {batch.minibatches_per_epoch}; {plan.optimizer_steps} in {config.train.steps} steps",
        f"longest row              {plan.max_tokens_per_row} tokens = {config.data.max_prompt_tokens} prompt + "
        f"{config.rollout.max_response_tokens} response",
        f"samples in the run       {plan.total_samples} on {plan.total_prompts} prompts",
    ]
