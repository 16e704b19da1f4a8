"""The commands that train and make a run folder: `dvpo sft`, `gvm train`, `rm train`, `dpo` and `train`."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dvpo_ray.commands.common import (
    Command,
    add_config_arguments,
    add_dry_run,
    check_writable_folder,
    dated_folder,
    load,
    print_plan,
)
from dvpo_ray.config import Config
from dvpo_ray.config.algorithms import ALGORITHMS
from dvpo_ray.config.arithmetic import derive_batch
from dvpo_ray.config.inputs import policy_inputs, policy_misfits, preference_inputs, problems, sft_inputs, value_model_misfits
from dvpo_ray.config.notes import training_notes
from dvpo_ray.config.schema import GVMConfig
from dvpo_ray.config.trl_stages import TRLStageConfig
from dvpo_ray.errors import InputError
from dvpo_ray.planning.placement import Bundle, check_local_cluster, plan_placement, plan_training_placement
from dvpo_ray.training.run_folder import check_new


@dataclass(frozen=True)
class Training:
    """What differs between the commands that train.

    Attributes:
        suffix: of the default run folder, `runs/<name><suffix>-<time>`.
        missing: the settings that the config lacks, one line each with what to give.
        notes: what else the dry run should mention, one line each.
        arithmetic: lines about the batches. Raises InputError when the batches don't work out.
        placement: of the actors; empty when the command trains in its own process.
        train: trains in a run folder and returns the path of the result; `resume` continues the run in that folder.
    """

    suffix: str
    missing: Callable[[Config], list[str]]
    notes: Callable[[Config], list[str]]
    arithmetic: Callable[[Config], list[str]]
    placement: Callable[[Config], list[Bundle]]
    train: Callable[[Config, Path, bool], Path]

    def command(self, help: str, example: str) -> Command:
        return Command(help, example, self._add_arguments, self._run)

    def check(self, path: str, config: Config) -> None:
        """Refuse a config that can't be trained with, before anything is loaded.

        Args:
            path: of the config file, for the message.

        Raises:
            InputError: impossible arithmetic or placement, or a missing setting.
        """
        self.arithmetic(config)
        for problem in self.missing(config):
            raise InputError(f"{path}: {problem}")
        check_local_cluster(config, self.placement(config))

    def print_plan(self, config: Config, notes: list[str]) -> None:
        """Print what a run with this config would be.

        Raises:
            InputError: impossible arithmetic or placement.
        """
        bundles = self.placement(config)
        check_local_cluster(config, bundles)
        print_plan(config, self.arithmetic(config), bundles, notes)

    def _add_arguments(self, parser: argparse.ArgumentParser) -> None:
        default = f"runs/<name>{self.suffix}-<time>"
        add_config_arguments(parser)
        parser.add_argument("--out", metavar="DIR", type=Path, help=f"run folder, new or empty (default: `out` of the config, else {default})")
        parser.add_argument("--resume", action="store_true", help="continue the run in the run folder from its last whole checkpoint")
        add_dry_run(parser)

    def _run(self, args: argparse.Namespace) -> int:
        config = load(args)
        if args.dry_run:
            self.print_plan(config, [*self.missing(config), *self.notes(config)])
            return 0
        self.check(args.config, config)
        print(self.train(config, choose_run_folder(args, config, self.suffix), args.resume))
        return 0


def choose_run_folder(args: argparse.Namespace, config: Config, suffix: str = "") -> Path:
    """The run folder: `--out`, else `out` of the config, else `runs/<name><suffix>-<time>`.

    Raises:
        InputError: the folder holds another run's files and `--resume` is not given, it cannot be written to, or there is nothing to resume.
    """
    named = args.out or (Path(config.out) if config.out else None)
    if args.resume:
        if named is None:
            raise InputError("--resume needs the run folder to continue: --out DIR")
        if not named.is_dir():
            raise InputError(f"{named}: no run folder to resume")
        return named
    folder = named or dated_folder(config, suffix)
    check_new(folder)
    check_writable_folder(folder)
    return folder


# -------------------------------------------------------------------------------------------------------- sft and dpo


def missing_pairs(config: Config) -> list[str]:
    """What the config lacks to train on preference pairs."""
    return ["data.preferences.path is not set; give the preference pairs to train on"] if config.data.preferences is None else []


def _missing_answers(config: Config) -> list[str]:
    return ["data.sft is not set; give the instruction-answer rows to train on"] if config.data.sft is None else []


def _rows_per_optimizer_step(stage: TRLStageConfig, row: str) -> list[str]:
    """The batches of a stage that a trainer of TRL runs; `row` is what its rows are."""
    rows = stage.batch_size * stage.gradient_accumulation_steps
    return [
        f"{row}s per optimizer step".ljust(25) + f"{rows} = {stage.batch_size} x {stage.gradient_accumulation_steps} accumulated",
        f"optimizer steps          {stage.epochs:g} epochs x training {row}s / {rows}",
    ]


def _longest(prompt: int, response: int, examples: int = 0, example: int = 0) -> str:
    """The line about the longest row; all counts but `examples` are tokens."""
    added = f" + {examples} x {example} examples" if examples else ""
    return f"longest row              {prompt + response + examples * example} tokens = {prompt} prompt + {response} response{added}"


def _train_sft(config: Config, out: Path, resume: bool) -> Path:
    from dvpo_ray.training.sft import train_sft

    return train_sft(config, out, resume)


def _train_dpo(config: Config, out: Path, resume: bool) -> Path:
    from dvpo_ray.training.dpo import train_dpo

    return train_dpo(config, out, resume)


SFT = Training(
    suffix="-sft",
    missing=_missing_answers,
    notes=lambda config: problems(sft_inputs(config)),
    arithmetic=lambda config: [
        *_rows_per_optimizer_step(config.sft, "row"),
        f"longest row              {config.sft.max_tokens} tokens",
    ],
    placement=lambda config: [],
    train=_train_sft,
).command(
    "fine-tune a model on instruction-answer rows, as the start of the method",
    "dvpo sft cluster_configs/local-cpu.yaml data.sft=answers.jsonl --out runs/sft",
)

DPO = Training(
    suffix="-dpo",
    missing=missing_pairs,
    notes=lambda config: problems(preference_inputs(config, "dpo")),
    arithmetic=lambda config: [
        *_rows_per_optimizer_step(config.dpo, "pair"),
        _longest(config.data.max_prompt_tokens, config.data.max_response_tokens),
    ],
    placement=lambda config: [],
    train=_train_dpo,
).command(
    "fine-tune a model on preference pairs by DPO, as a baseline",
    "dvpo dpo cluster_configs/local-cpu.yaml data.preferences.path=pairs.jsonl --out runs/dpo",
)


# --------------------------------------------------------------------------------------------- value and reward model


def _value_model_training(section: str, suffix: str) -> Training:
    """The training of `config.gvm` or `config.reward_model`, whichever section is named."""

    def arithmetic(config: Config) -> list[str]:
        trained = getattr(config, section)
        longest = [config.data.max_prompt_tokens, config.data.max_response_tokens]
        if isinstance(trained, GVMConfig):
            longest += [trained.context.examples, trained.context.max_tokens]
        pairs_per_worker = math.ceil(trained.pairs_per_step / trained.num_actors)
        return [
            f"pairs per step           {trained.pairs_per_step}, at most {pairs_per_worker} on each of {trained.num_actors} workers",
            f"optimizer steps          {trained.epochs:g} epochs x training pairs / {trained.pairs_per_step}",
            f"{_longest(*longest)}; micro-batches of {trained.micro_batch_tokens} padded tokens",
        ]

    def train(config: Config, out: Path, resume: bool) -> Path:
        from dvpo_ray.training.value_model import train_value_model

        return train_value_model(config, getattr(config, section), out, resume)

    return Training(
        suffix=suffix,
        missing=missing_pairs,
        notes=lambda config: [*problems(preference_inputs(config, section)), *value_model_misfits(config, section)],
        arithmetic=arithmetic,
        placement=lambda config: plan_training_placement(getattr(config, section)),
        train=train,
    )


GVM = _value_model_training("gvm", "-gvm").command(
    "train a value model on preference pairs",
    "dvpo gvm train cluster_configs/local-cpu.yaml data.preferences.path=pairs.jsonl --out runs/gvm",
)
REWARD_MODEL = _value_model_training("reward_model", "-rm").command(
    "train a reward model on preference pairs",
    "dvpo rm train cluster_configs/local-cpu.yaml data.preferences.path=pairs.jsonl --out runs/rm",
)


# ------------------------------------------------------------------------------------------------------------- policy


def _missing_for_policy(config: Config) -> list[str]:
    missing = []
    scorer = ALGORITHMS[config.algorithm].scorer
    if scorer == "scorer" and config.gvm.path is None:
        missing.append("gvm.path is not set; train a value model with `dvpo gvm train` and give its folder")
    if scorer == "reward_model" and config.reward_model.path is None:
        missing.append(f"reward_model.path is not set, and {config.algorithm} needs rewards; train one with `dvpo rm train` and give its folder")
    if config.data.prompts is None:
        missing.append("data.prompts.path is not set; give the prompts to optimise on")
    return missing


def _policy_arithmetic(config: Config) -> list[str]:
    plan, batch = derive_batch(config), config.batch
    return [
        f"samples per step         {plan.samples_per_step} = prompts_per_step {batch.prompts_per_step} "
        f"x samples_per_prompt {batch.samples_per_prompt}",
        f"samples per engine       {plan.max_samples_per_engine} at most, over {config.rollout.num_actors} engines",
        f"samples per worker       {plan.samples_per_worker}, over {config.policy.num_actors} learner workers",
        f"rows per minibatch       {plan.rows_per_minibatch}, {plan.rows_per_worker_minibatch} on each worker",
        f"optimizer steps          {plan.optimizer_steps_per_step} per step = update_epochs {batch.update_epochs} x "
        f"minibatches_per_epoch {batch.minibatches_per_epoch}; {plan.optimizer_steps} in {config.train.steps} steps",
        _longest(config.data.max_prompt_tokens, config.rollout.max_response_tokens),
        f"samples in the run       {plan.total_samples} on {plan.total_prompts} prompts",
    ]


def _train_policy(config: Config, out: Path, resume: bool) -> Path:
    from dvpo_ray.training.policy import train

    return train(config.model_copy(update={"out": str(out)}), resume=resume)


POLICY = Training(
    suffix="",
    missing=_missing_for_policy,
    notes=lambda config: [*problems(policy_inputs(config)), *policy_misfits(config), *training_notes(config)],
    arithmetic=_policy_arithmetic,
    placement=plan_placement,
    train=_train_policy,
)
TRAIN = POLICY.command(
    "optimise the policy with a frozen Global Value Model, or by a baseline (algorithm=ppo)",
    "dvpo train cluster_configs/local-cpu.yaml gvm.path=runs/gvm/final policy.learning_rate=1e-5 --out runs/first",
)
check_train_config = POLICY.check
