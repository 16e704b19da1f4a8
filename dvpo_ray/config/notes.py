"""Notes of a dry run, warnings of a run: settings that are legal together but have no effect, or another effect than they seem to."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from dvpo_ray.config.algorithms import ALGORITHMS
from dvpo_ray.config.arithmetic import counted, derive_batch, trainer_steps, value_model_steps
from dvpo_ray.config.inputs import is_local
from dvpo_ray.config.load import load_config
from dvpo_ray.config.schema import Config, DPOConfig, PreferenceData, PreferenceTraining, SplitData
from dvpo_ray.errors import InputError


def training_notes(config: Config) -> list[str]:
    """The notes on a config of `dvpo train`, one line each.

    Raises:
        InputError: as in `derive_batch`.
    """
    kinds = (foreign_prompts, foreign_judge, _known_prompts, _placement_notes, _batch_notes, _kl_notes, _health_notes)
    return [note for kind in kinds for note in kind(config)]


def foreign_heldout(section: str, data: SplitData) -> list[str]:
    """One line if rows of one's own stand beside the held-out file that the package ships, whose results say nothing of them.

    Args:
        section: key of the data, for the line.
    """
    if data.heldout_path is None or not is_shipped(data.heldout_path) or is_shipped(data.path):
        return []
    return [
        f"{section}.heldout_path is still {data.heldout_path}, which belongs to the quickstart's data and not to {data.path}: held-out results "
        f"will say nothing of your data; set {section}.heldout_path=null to hold out a share of it, or give your own file"
    ]


def foreign_prompts(config: Config) -> list[str]:
    """One line if a value model of one's own pairs would be used on the prompts that the package ships."""
    pairs, prompts = config.data.preferences, config.data.prompts
    if pairs is None or prompts is None or is_shipped(pairs.path) or not is_shipped(prompts.path):
        return []
    return [
        f"data.prompts.path is still {prompts.path}, the quickstart's prompts, while data.preferences.path is {pairs.path}: the policy would learn "
        f"to continue sentences; set data.prompts.path={pairs.path} data.prompts.heldout_path=null to take the prompts of your pairs"
    ]


def has_own_prompts(config: Config) -> bool:
    """Whether the policy's prompts are on this machine, and not those that the package ships."""
    prompts = config.data.prompts
    return prompts is not None and is_local(prompts.path) and not is_shipped(prompts.path)


def foreign_judge(config: Config) -> list[str]:
    """One line if the judge of the package, which knows sentiment alone, would score responses to prompts of one's own."""
    if config.evaluation.judge != "vader" or not has_own_prompts(config):
        return []
    pairs, prompts = config.data.preferences, Path(config.data.prompts.path)
    if pairs is not None and Path(pairs.path) == prompts.with_name(JUDGED_PAIRS):  # sentiment is what they are about
        return []
    return [
        f"evaluation.judge is vader, which scores sentiment and nothing else, and {prompts} are prompts of your own: unless sentiment is what "
        "counts, its gold score and its alarms say nothing of your responses; set evaluation.judge=none (docs/training.md, Without a judge)"
    ]


FEW_STEPS = 30
"""Optimizer steps under which a value model has hardly begun to learn (docs/gvm.md, "How many pairs and epochs")."""


def few_steps(pairs: int, training: PreferenceTraining) -> list[str]:
    """One line if a training of a value model takes too few steps to learn much, with settings that take enough.

    Args:
        pairs: to train on, at least 1.
    """
    steps = value_model_steps(pairs, training)[1]
    if steps >= FEW_STEPS or training.keep_head:
        return []
    small = training.model_copy(update={"pairs_per_step": min(training.pairs_per_step, 8), "epochs": 1.0})
    epochs = math.ceil(FEW_STEPS / value_model_steps(pairs, small)[0])
    enough = f"{training.section}.pairs_per_step={small.pairs_per_step} {training.section}.epochs={epochs}"
    return [f"{_too_few(steps, enough, training.section)} (docs/gvm.md, How many pairs and epochs)"]


def few_dpo_steps(pairs: int, dpo: DPOConfig) -> list[str]:
    """Likewise for a training by DPO."""
    steps = trainer_steps(pairs, dpo)
    if steps >= FEW_STEPS:
        return []
    epochs = math.ceil(FEW_STEPS / trainer_steps(pairs, dpo.model_copy(update={"epochs": 1.0})))
    return [_too_few(steps, f"dpo.epochs={epochs}", "dpo")]


def _too_few(steps: int, enough: str, section: str) -> str:
    are = "are" if steps > 1 else "is"
    return (
        f"{counted(steps, 'optimizer step')} {are} too few to learn much: take {FEW_STEPS} or more, for example by {enough}, "
        f"or raise {section}.learning_rate"
    )


def _known_prompts(config: Config) -> list[str]:
    """One line if held-out prompts are those of pairs that the value model was trained on: a smaller share of one file is held out of its pairs."""
    prompts, pairs = config.data.prompts, _pairs_of_value_model(config)
    if prompts is None or pairs is None or Path(prompts.path) != Path(pairs.path) or not (prompts.holds_out_a_share and pairs.holds_out_a_share):
        return []
    if prompts.heldout_fraction <= pairs.heldout_fraction:
        return []
    known = 1 - pairs.heldout_fraction / prompts.heldout_fraction
    return [
        f"data.prompts.heldout_fraction is {prompts.heldout_fraction:g}, and the value model's pairs of the same file have "
        f"data.preferences.heldout_fraction {pairs.heldout_fraction:g}: about {known:.0%} of the held-out prompts are those of its training pairs; "
        f"set data.prompts.heldout_fraction={pairs.heldout_fraction:g} for prompts that it has not seen"
    ]


def _pairs_of_value_model(config: Config) -> PreferenceData | None:
    """The pairs that the model that scores rollouts was trained on, by the config beside it, else those of this config."""
    path = getattr(config, ALGORITHMS[config.algorithm].section).path
    if path is not None and (beside := Path(path).parent / "config.yaml").is_file():
        try:
            return load_config(beside).data.preferences
        except InputError:  # of another version
            pass
    return config.data.preferences


JUDGED_PAIRS = "preferences.train.jsonl"
"""The file of pairs that the judge labelled, which `dvpo_ray.quickstart.self_preferences` writes."""


def is_shipped(path: str) -> bool:
    """Whether a file is one of the quickstart's."""
    return Path(path).parts[-4:-1] == ("dvpo_ray", "quickstart", "data")


def _placement_notes(config: Config) -> Iterator[str]:
    critic = ["critic"] if ALGORITHMS[config.algorithm].has_critic else []
    if config.placement == "separate" and not any(
        getattr(config, section).gpus_per_actor for section in ("rollout", "scorer", "reference", "policy", *critic)
    ):
        yield "placement separate has no effect, since no actor has a GPU (gpus_per_actor is 0 everywhere)"


def _batch_notes(config: Config) -> Iterator[str]:
    plan = derive_batch(config)
    critic = ["critic"] if ALGORITHMS[config.algorithm].has_critic else []
    for section in ("batch", "scorer", "reference", *critic):
        budget = getattr(config, section).micro_batch_tokens
        if budget < plan.max_tokens_per_row:
            yield (
                f"{section}.micro_batch_tokens {budget} is below the longest row of {plan.max_tokens_per_row} tokens; "
                "such a row is a micro-batch of its own"
            )
    if config.rollout.num_actors > plan.samples_per_step:
        samples = counted(plan.samples_per_step, "sample")
        yield f"rollout.num_actors {config.rollout.num_actors} is above the {samples} of a step; some engines stay idle"


def _kl_notes(config: Config) -> Iterator[str]:
    kl = config.kl
    if kl.placement == "loss" and kl.estimator == "k1":
        yield "kl.estimator k1 has no effect as a loss: its expected gradient is zero on the policy's own samples; use k2 or k3"
    if kl.placement != "off":
        return
    if kl.coefficient and "coefficient" in kl.model_fields_set:
        yield f"kl.coefficient {kl.coefficient:g} has no effect, since kl.placement is off; set kl.placement to reward or loss for a penalty"
    if kl.adaptive_target_nats is not None:
        yield f"kl.adaptive_target_nats {kl.adaptive_target_nats:g} has no effect, since kl.placement is off; there is no penalty to adapt"


def _health_notes(config: Config) -> Iterator[str]:
    health, steps, every = config.health, config.train.steps, config.gvm.refresh_every_steps
    if health.on_alarm != "warn" and health.window_steps > steps:
        missed = "no alarm that does so can be raised"
        yield f"health.on_alarm is {health.on_alarm}, but health.window_steps {health.window_steps} is above train.steps {steps}; {missed}"
    elif health.on_alarm != "warn" and config.evaluation.judge == "none" and health.max_calibration_error is None:
        yield f"health.on_alarm is {health.on_alarm}, but no alarm that does so can be raised, since evaluation.judge is none"
    if every >= steps:
        yield f"gvm.refresh_every_steps {every} is not below train.steps {steps}; it never causes a refresh"
