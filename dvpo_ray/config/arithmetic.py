"""Batch sizes that follow from the configured ones, and what must be equal in runs that are compared."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from operator import attrgetter, mul

from dvpo_ray.config.algorithms import ALGORITHMS
from dvpo_ray.config.schema import Config, PreferenceTraining, TRLStageConfig
from dvpo_ray.errors import InputError

MAX_KL_ERROR = 0.2
"""Bound of the relative error that the adaptive KL coefficient reacts to (Ziegler et al. 2019, arXiv 1909.08593)."""


def counted(number: float, noun: str) -> str:
    """A number and its noun: "1 pair", "2 pairs", "0.5 CPUs"."""
    return f"{number:.12g} {noun}{'' if number == 1 else 's'}"


@dataclass(frozen=True)
class BatchPlan:
    """The derived numbers of policy optimisation. A row is one prompt with one sampled response.

    Attributes:
        samples_per_step: rows sampled and trained on in one step.
        max_samples_per_engine: rows that a rollout engine gets when a step begins, at most.
        samples_per_worker: rows of each learner worker in one step, on average, rounded up: workers share rows by tokens.
        rows_per_minibatch: rows of one optimizer step, over all workers.
        max_tokens_per_row: longest prompt plus longest response.
        optimizer_steps_per_step: over all update epochs.
        optimizer_steps: over the whole run; the length of the learning-rate schedule.
        total_prompts: prompts taken from the data over the whole run, with repetition.
        total_samples: rows over the whole run.
    """

    samples_per_step: int
    max_samples_per_engine: int
    samples_per_worker: int
    rows_per_minibatch: int
    max_tokens_per_row: int
    optimizer_steps_per_step: int
    optimizer_steps: int
    total_prompts: int
    total_samples: int


def derive_batch(config: Config) -> BatchPlan:
    """All batch numbers of policy optimisation.

    Raises:
        InputError: minibatches cannot share the samples of a step evenly, or there are too few samples for the algorithm, for the
            workers, or for the horizon of the adaptive KL coefficient.
    """
    batch, kl, workers = config.batch, config.kl, config.policy.num_actors
    algorithm = ALGORITHMS[config.algorithm]
    samples = batch.prompts_per_step * batch.samples_per_prompt
    if batch.samples_per_prompt < algorithm.min_samples_per_prompt:
        raise InputError(
            f"batch.samples_per_prompt is {batch.samples_per_prompt}, but algorithm {config.algorithm} compares the samples of a prompt; "
            f"set {algorithm.min_samples_per_prompt} or more"
        )
    _require_even_minibatches(config, samples)
    for section in ("policy", *(["critic"] if algorithm.has_critic else [])):
        _require_rows(config, samples // batch.minibatches_per_epoch, section)
    if kl.adaptive_target_nats is not None and kl.adaptive_horizon <= shortest_horizon(samples):
        raise InputError(
            f"kl.adaptive_horizon {kl.adaptive_horizon:g} is too short for {counted(samples, 'sample')} per step: the coefficient could fall to 0; "
            f"set more than {shortest_horizon(samples):g}"
        )
    optimizer_steps_per_step = batch.update_epochs * batch.minibatches_per_epoch
    together = batch.samples_per_prompt if batch.prompts_per_step >= config.rollout.num_actors else 1  # one engine has a prompt's samples
    return BatchPlan(
        samples_per_step=samples,
        max_samples_per_engine=together * math.ceil(samples / config.rollout.num_actors / together),
        samples_per_worker=math.ceil(samples / workers),
        rows_per_minibatch=samples // batch.minibatches_per_epoch,
        max_tokens_per_row=config.data.max_prompt_tokens + config.rollout.max_response_tokens,
        optimizer_steps_per_step=optimizer_steps_per_step,
        optimizer_steps=optimizer_steps_per_step * config.train.steps,
        total_prompts=batch.prompts_per_step * config.train.steps,
        total_samples=samples * config.train.steps,
    )


def _require_even_minibatches(config: Config, samples: int) -> None:
    batch = config.batch
    if samples % batch.minibatches_per_epoch == 0:
        return
    step = batch.minibatches_per_epoch // math.gcd(batch.minibatches_per_epoch, batch.samples_per_prompt)
    below = batch.prompts_per_step // step * step
    working = " or ".join(str(prompts) for prompts in (below, below + step) if prompts)
    raise InputError(
        f"batch.prompts_per_step {batch.prompts_per_step} x batch.samples_per_prompt {batch.samples_per_prompt} = {counted(samples, 'sample')} "
        f"can't be shared evenly by batch.minibatches_per_epoch {batch.minibatches_per_epoch}; batch.prompts_per_step {working} can"
    )


def _require_rows(config: Config, rows: int, section: str) -> None:
    workers = getattr(config, section).num_actors
    if rows < workers:
        raise InputError(
            f"a minibatch has {counted(rows, 'sample')}, fewer than {section}.num_actors {workers}; raise batch.prompts_per_step, or lower "
            f"batch.minibatches_per_epoch {config.batch.minibatches_per_epoch} or {section}.num_actors"
        )


def value_model_steps(pairs: int, training: PreferenceTraining) -> tuple[int, int]:
    """Optimizer steps of an epoch and of the whole training of a value model.

    Args:
        pairs: to train on, at least 1.
    """
    in_epoch = math.ceil(pairs / training.pairs_per_step)
    return in_epoch, max(1, round(training.epochs * in_epoch))


def trainer_steps(rows: int, stage: TRLStageConfig) -> int:
    """Optimizer steps of a stage that a trainer of TRL runs.

    Args:
        rows: to train on, at least 1.
    """
    return math.ceil(stage.epochs * math.ceil(rows / (stage.batch_size * stage.gradient_accumulation_steps)))


def shortest_horizon(samples: int) -> float:
    """With this horizon, one step of so many samples could take the adaptive KL coefficient to 0; the horizon must be longer."""
    return MAX_KL_ERROR * samples


# ------------------------------------------------------------------------------------------------ runs that are compared

_ROWS = ("model", "data", "rollout.max_response_tokens")
SAME_UPDATE = ("batch.prompts_per_step x batch.samples_per_prompt", *_ROWS, "batch.update_epochs", "batch.minibatches_per_epoch")
"""To compare the cost of a step: the same number of samples, of the same lengths, by the same model, and of optimizer steps."""
SAME_RUN = ("train.steps x batch.prompts_per_step x batch.samples_per_prompt", *_ROWS, "evaluation")
"""To compare gold and KL along a run: the same number of samples of the same model, judged alike."""


def check_equal(configs: Mapping[str, Config], equal: tuple[str, ...]) -> None:
    """Refuse configs that differ from the first one in what must be equal.

    Args:
        configs: by the name of the algorithm or variant.
        equal: keys, or products of keys.

    Raises:
        InputError: names the two configs and the setting.
    """
    (first, expected), *others = configs.items()
    for name, config in others:
        for product in equal:
            if _value(config, product) != _value(expected, product):
                raise InputError(f"{name} differs from {first} in {product}, which must be equal in all that are compared")


def _value(config: Config, product: str) -> object:
    return reduce(mul, (attrgetter(key)(config) for key in product.split(" x ")))
