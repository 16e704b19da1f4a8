"""The commands that train and make a run folder: `dvpo sft`, `gvm train`, `rm train`, `dpo` and `train`."""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dvpo_ray.commands.common import (
    CONFIG,
    DRY_RUN,
    JSON,
    Command,
    argument,
    check_writable_folder,
    command,
    dated_folder,
    load,
    loading,
    only_json,
    print_plan,
    refuse_unreachable,
    tell,
)
from dvpo_ray.config import Config
from dvpo_ray.config.algorithms import ALGORITHMS
from dvpo_ray.config.arithmetic import counted, derive_batch, trainer_steps, value_model_steps
from dvpo_ray.config.inputs import (
    Needed,
    names_of_files,
    other_tokenizer,
    policy_inputs,
    policy_misfits,
    preference_inputs,
    problems,
    scoring_warnings,
    sft_inputs,
    value_model_misfits,
)
from dvpo_ray.config.notes import few_dpo_steps, few_steps, has_own_prompts, training_notes
from dvpo_ray.config.paths import path_option
from dvpo_ray.config.schema import GVMConfig, TRLStageConfig
from dvpo_ray.data import hub
from dvpo_ray.data.preferences import no_scores
from dvpo_ray.data.preview import Preview, preview
from dvpo_ray.errors import InputError
from dvpo_ray.monitoring.charts import number
from dvpo_ray.monitoring.ending import ending
from dvpo_ray.monitoring.run_files import SUMMARY
from dvpo_ray.monitoring.trackers import missing_trackers
from dvpo_ray.planning.placement import Seat, check_local_cluster, choose_transport, gpus_not_here, plan_placement, plan_training_placement
from dvpo_ray.runtime.fork_server import prepare
from dvpo_ray.training.run_folder import RunIsFinished, check_new, check_resume


@dataclass(frozen=True)
class Training:
    """What differs between the commands that train.

    Attributes:
        stage: key of `config.resuming.STAGES`. The default run folder is `runs/<name>-<stage>-<time>`, without the stage for `train`.
        missing: the settings that the config lacks, one line each with what to give.
        inputs: what it reads.
        notes: what else the dry run should mention, one line each. The last argument is what is known of the data to train on.
        arithmetic: numbers of the batches by name. The last argument is the number of pairs, prompts or answers to train on, None if it is not
            known yet. Raises InputError when they don't work out.
        train: trains in a run folder and returns the path of the result. Its last argument is `--resume`.
        placement: of the actors; empty when the command trains in its own process.
    """

    stage: str
    missing: Callable[[Config], list[str]]
    inputs: Callable[[Config], Iterable[Needed]]
    notes: Callable[[Config, Preview], list[str]]
    arithmetic: Callable[[Config, int | None], dict[str, str]]
    train: Callable[[Config, Path, bool], Path]
    placement: Callable[[Config], list[Seat]] = lambda config: []

    @property
    def suffix(self) -> str:
        return "" if self.stage == "train" else f"-{self.stage}"

    def command(self, help: str, example: str) -> Command:
        """The command, with its options and its dry run."""
        folder = f"run folder, new or empty (default: `out` of the config, else runs/<name>{self.suffix}-<time>)"
        resume = "continue the run in the run folder from its last whole checkpoint"
        out = argument("--out", metavar="DIR", type=path_option, help=folder)
        return command(help, example, *CONFIG, out, argument("--resume", action="store_true", help=resume), JSON, DRY_RUN)(self._run)

    def check(self, path: str, config: Config) -> None:
        """Refuse a config that can't be trained with, before anything is loaded.

        Raises:
            InputError: impossible arithmetic or placement, a setting that the file at `path` lacks, or a tracker that is not installed.
        """
        self.arithmetic(config, None)
        for problem in [*self.missing(config), *missing_trackers(config.train.trackers)]:
            raise InputError(f"{path}: {problem}")
        check_local_cluster(config, self.placement(config))

    def print_plan(self, config: Config, notes: list[str], data: Preview | None = None) -> None:
        """Print what a run with this config would be.

        Args:
            data: what it trains on, as far as that is known.

        Raises:
            InputError: impossible arithmetic or placement.
        """
        seats = self.placement(config)
        check_local_cluster(config, seats)
        data = data or Preview()
        print_plan(config, data.facts, self.arithmetic(config, data.train), seats, notes)

    def _folder_problem(self, args: Namespace, config: Config) -> list[str]:
        """Why a run would not take its folder, for the dry run; nothing where it would."""
        try:
            folder = choose_run_folder(args.out, config, self.suffix, args.resume)
            if args.resume:
                check_resume(folder, self.stage, config)
        except InputError as error:
            return [str(error)]
        return []

    def _run(self, args: Namespace) -> None:
        config = load(args)
        if args.dry_run:
            inputs = list(self.inputs(config))
            sections = [one.key.removesuffix(".path") for one in inputs if one.key in ("data.preferences.path", "data.prompts.path", "data.sft")]
            of_data = [preview(config, section) for section in sections]
            data = next(iter(of_data), Preview())  # the first section is what it trains on
            settings = [
                *self._folder_problem(args, config),
                *self.missing(config),
                *missing_trackers(config.train.trackers),
                *problems(inputs),
                *names_of_files(inputs),
                *hub.not_checked(inputs),
                *gpus_not_here(config, self.placement(config)),
                *self.notes(config, data),
            ]
            config = config.model_copy(update={"out": str(args.out)}) if args.out is not None else config
            self.print_plan(config, [*settings, *(line for one in of_data for line in one.notes)], data)
            return
        self.check(args.config, config)
        folder = choose_run_folder(args.out, config, self.suffix, args.resume)
        try:
            if args.resume:
                check_resume(folder, self.stage, config)
            with only_json(args.json):
                refuse_unreachable(*self.inputs(config))
                for problem in problems(self.inputs(config)):  # before the libraries are loaded
                    raise InputError(problem)
                if self.placement(config):
                    prepare(config)
                result = self.train(config, folder, args.resume)
                tell(ending(folder))
        except RunIsFinished as finished:
            result = finished
        # The last line is for scripts.
        print((folder / SUMMARY).read_text(encoding="utf-8").rstrip() if args.json else result)


def choose_run_folder(out: Path | None, config: Config, suffix: str = "", resume: bool = False) -> Path:
    """The run folder: `--out`, else `out` of the config, else `runs/<name><suffix>-<time>`.

    Raises:
        InputError: the folder holds another run's files, it cannot be written to, or there is nothing in it to resume.
    """
    named = out or (Path(config.out) if config.out else None)
    if resume:
        if named is None:
            raise InputError("--resume needs the run folder to continue: --out DIR")
        if not named.is_dir():
            raise InputError(f"{named}: no run folder to resume")
        return named
    folder = named or dated_folder(config, suffix)
    check_new(folder)
    check_writable_folder(folder)
    return folder


def _longest_row(prompt: int, response: int, examples: int = 0, example: int = 0) -> str:
    """How many tokens a row has at most; `examples` of `example` tokens each stand before the prompt."""
    added = f" + {examples} x {example} examples" if examples else ""
    return f"{prompt + response + examples * example} tokens = {prompt} prompt + {response} response{added}"


# -------------------------------------------------------------------------------------------------------- sft and dpo


def missing_pairs(config: Config) -> list[str]:
    """What the config lacks to train on preference pairs."""
    return ["data.preferences.path is not set; give the preference pairs to train on"] if config.data.preferences is None else []


def _optimizer_steps(stage: TRLStageConfig, row: str, known: int | None) -> dict[str, str]:
    """The batches of a stage that a trainer of TRL runs; `row` is what its rows are, and `known` how many there are to train on."""
    rows = stage.batch_size * stage.gradient_accumulation_steps
    return {
        f"{row}s per optimizer step": f"{rows} = {stage.batch_size} x {stage.gradient_accumulation_steps} accumulated",
        "optimizer steps": f"{counted(stage.epochs, 'epoch')} x {'' if known is None else f'{known} '}training {row}s / {rows}"
        + ("" if known is None else f" = {counted(trainer_steps(known, stage), 'step')}"),
    }


def _train_sft(config: Config, out: Path, resume: bool) -> Path:
    with loading():
        from dvpo_ray.training.sft import train_sft

    return train_sft(config, out, resume)


def _train_dpo(config: Config, out: Path, resume: bool) -> Path:
    with loading():
        from dvpo_ray.training.dpo import train_dpo

    return train_dpo(config, out, resume)


SFT = Training(
    stage="sft",
    missing=lambda config: [] if config.data.sft else ["data.sft is not set; give the instruction-answer rows to train on"],
    inputs=sft_inputs,
    notes=lambda config, data: [],
    arithmetic=lambda config, rows: _optimizer_steps(config.sft, "row", rows) | {"longest row": f"{config.sft.max_tokens} tokens"},
    train=_train_sft,
).command(
    "fine-tune a model on instruction-answer rows, as the start of the method",
    "dvpo sft cluster_configs/local-cpu.yaml data.sft=answers.jsonl --out runs/sft",
)

DPO = Training(
    stage="dpo",
    missing=missing_pairs,
    inputs=partial(preference_inputs, section="dpo"),
    notes=lambda config, data: few_dpo_steps(data.train, config.dpo) if data.train is not None else [],
    arithmetic=lambda config, pairs: (
        _optimizer_steps(config.dpo, "pair", pairs) | {"longest row": _longest_row(config.data.max_prompt_tokens, config.data.max_response_tokens)}
    ),
    train=_train_dpo,
).command(
    "fine-tune a model on preference pairs by DPO, as a baseline",
    "dvpo dpo cluster_configs/local-cpu.yaml data.preferences.path=pairs.jsonl --out runs/dpo",
)


# --------------------------------------------------------------------------------------------- value and reward model


def _value_model_training(section: str, stage: str) -> Training:
    """The training of `config.gvm` or `config.reward_model`, whichever section is named."""

    def arithmetic(config: Config, pairs: int | None) -> dict[str, str]:
        trained = getattr(config, section)
        lengths = [config.data.max_prompt_tokens, config.data.max_response_tokens]
        if isinstance(trained, GVMConfig):
            lengths += [trained.context.examples, trained.context.max_tokens]
        pairs_per_worker = math.ceil(trained.pairs_per_step / trained.num_actors)
        return {
            "pairs per step": f"{trained.pairs_per_step}, at most {pairs_per_worker} on each of {counted(trained.num_actors, 'worker')}",
            "optimizer steps": f"{counted(trained.epochs, 'epoch')} x {'' if pairs is None else f'{pairs} '}training pairs / {trained.pairs_per_step}"
            + ("" if pairs is None else f" = {counted(value_model_steps(pairs, trained)[1], 'step')}"),
            "longest row": f"{_longest_row(*lengths)}; micro-batches of {trained.micro_batch_tokens} padded tokens",
        }

    def notes(config: Config, data: Preview) -> list[str]:
        trained = getattr(config, section)
        unscored = [no_scores(data.unscored)] if trained.outcome == "score" and data.unscored is not None else []
        return [*value_model_misfits(config, section), *unscored, *(few_steps(data.train, trained) if data.train is not None else [])]

    def train(config: Config, out: Path, resume: bool) -> Path:
        with loading():
            from dvpo_ray.training.value_model import train_value_model

        return train_value_model(config, getattr(config, section), out, resume)

    return Training(
        stage=stage,
        missing=missing_pairs,
        inputs=partial(preference_inputs, section=section),
        notes=notes,
        arithmetic=arithmetic,
        train=train,
        placement=lambda config: plan_training_placement(getattr(config, section)),
    )


GVM = _value_model_training("gvm", "gvm").command(
    "train a value model on preference pairs",
    "dvpo gvm train cluster_configs/local-cpu.yaml data.preferences.path=pairs.jsonl --out runs/gvm",
)
REWARD_MODEL = _value_model_training("reward_model", "rm").command(
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


def _policy_arithmetic(config: Config, prompts: int | None) -> dict[str, str]:
    plan, batch = derive_batch(config), config.batch
    estimated = {}
    if config.policy.gpus_per_actor == 0 and has_own_prompts(config):  # the steps of a shipped config take hours with a larger model
        rollouts = counted(plan.samples_per_step, "rollout")
        estimated = {"length of the run": f"{counted(config.train.steps, 'step')} of {rollouts}; `dvpo plan` with these settings estimates the time"}
    distinct = "" if prompts is None else f": {counted(prompts, 'distinct one')}, each about {number(plan.total_prompts / prompts)} times"
    return {
        "samples per step": f"{plan.samples_per_step} = prompts_per_step {batch.prompts_per_step} x samples_per_prompt {batch.samples_per_prompt}",
        "samples per engine": f"{plan.max_samples_per_engine} at most, over {counted(config.rollout.num_actors, 'engine')}",
        "samples per worker": f"about {plan.samples_per_worker}, over {config.policy.num_actors} learner workers, shared by tokens"
        if config.policy.num_actors > 1
        else f"{plan.samples_per_worker}",
        "rows per minibatch": f"{plan.rows_per_minibatch}",
        "optimizer steps": f"{plan.optimizer_steps_per_step} per step = update_epochs {batch.update_epochs} x "
        f"minibatches_per_epoch {batch.minibatches_per_epoch}; {plan.optimizer_steps} in {counted(config.train.steps, 'step')}",
        "longest row": _longest_row(config.data.max_prompt_tokens, config.rollout.max_response_tokens),
        "samples in the run": f"{plan.total_samples}, {counted(plan.total_prompts, 'prompt')} with repeats{distinct}",
        **estimated,
    }


def _policy_placement(config: Config) -> list[Seat]:
    choose_transport(config)  # refuses one that the placement does not allow
    return plan_placement(config)


def _train_policy(config: Config, out: Path, resume: bool) -> Path:
    with loading():
        from dvpo_ray.training.policy import train

    return train(config.model_copy(update={"out": str(out)}), resume=resume)


POLICY = Training(
    stage="train",
    missing=_missing_for_policy,
    inputs=policy_inputs,
    notes=lambda config, data: [*policy_misfits(config), *other_tokenizer(config), *scoring_warnings(config), *training_notes(config)],
    arithmetic=_policy_arithmetic,
    train=_train_policy,
    placement=_policy_placement,
)
TRAIN = POLICY.command(
    "optimise the policy with a frozen Global Value Model, or by a baseline (algorithm=ppo)",
    "dvpo train cluster_configs/local-cpu.yaml gvm.path=runs/gvm/final policy.learning_rate=1e-5 --out runs/first",
)
check_train_config = POLICY.check
