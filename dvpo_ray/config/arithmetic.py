"""Every batch size that follows from the configured ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dvpo_ray.config.algorithms import ALGORITHMS
from dvpo_ray.config.schema import Config
from dvpo_ray.errors import InputError

MAX_KL_ERROR = 0.2
"""Bound of the relative error that the adaptive KL coefficient reacts to (Ziegler et al. 2019, arXiv 1909.08593)."""


@dataclass(frozen=True)
class BatchPlan:
    """The derived numbers of policy optimisation. A row is one prompt with one sampled response.

    Attributes:
        samples_per_step: rows sampled and trained on in one step.
        max_samples_per_engine: rows of the busiest rollout engine in one step.
        samples_per_worker: rows of each learner worker in one step.
        rows_per_minibatch: rows behind one optimizer step, over all workers.
        rows_per_worker_minibatch: each worker's share of them.
        max_tokens_per_row: longest prompt and longest response.
        optimizer_steps_per_step: over all update epochs.
        optimizer_steps: over the whole run; the length of the learning-rate schedule.
        total_prompts: prompts taken from the data over the whole run, with repetition.
        total_samples: rows over the whole run.
        prompt_epochs: passes over the prompt set; None when its size isn't known.
    """

    samples_per_step: int
    max_samples_per_engine: int
    samples_per_worker: int
    rows_per_minibatch: int
    rows_per_worker_minibatch: int
    max_tokens_per_row: int
    optimizer_steps_per_step: int
    optimizer_steps: int
    total_prompts: int
    total_samples: int
    prompt_epochs: float | None


def derive_batch(config: Config, num_prompts: int | None = None) -> BatchPlan:
    """All batch numbers of policy optimisation.

    Args:
        config: the run's settings.
        num_prompts: training prompts in the data, where known.

    Raises:
        InputError: the samples of a step can't be shared out evenly over learner (or critic) workers and minibatches, or are too few for
            the algorithm or for the adaptive KL coefficient's horizon.
    """
    batch, workers = config.batch, config.policy.num_actors
    samples = batch.prompts_per_step * batch.samples_per_prompt
    _require_enough_samples(config)
    _require_even_shares(config, samples, "policy", workers)
    if ALGORITHMS[config.algorithm].has_critic:
        _require_even_shares(config, samples, "critic", config.critic.num_actors)
    _require_horizon(config, samples)
    total_prompts = batch.prompts_per_step * config.train.steps
    optimizer_steps_per_step = batch.update_epochs * batch.minibatches_per_epoch
    return BatchPlan(
        samples_per_step=samples,
        max_samples_per_engine=math.ceil(samples / config.rollout.num_actors),
        samples_per_worker=samples // workers,
        rows_per_minibatch=samples // batch.minibatches_per_epoch,
        rows_per_worker_minibatch=samples // (workers * batch.minibatches_per_epoch),
        max_tokens_per_row=config.data.max_prompt_tokens + config.rollout.max_response_tokens,
        optimizer_steps_per_step=optimizer_steps_per_step,
        optimizer_steps=optimizer_steps_per_step * config.train.steps,
        total_prompts=total_prompts,
        total_samples=samples * config.train.steps,
        prompt_epochs=total_prompts / num_prompts if num_prompts else None,
    )


def _require_enough_samples(config: Config) -> None:
    least, samples = ALGORITHMS[config.algorithm].min_samples_per_prompt, config.batch.samples_per_prompt
    if samples < least:
        raise InputError(
            f"batch.samples_per_prompt is {samples}, but algorithm {config.algorithm} compares the samples of a prompt; set {least} or more"
        )


def _require_horizon(config: Config, samples: int) -> None:
    shortest = shortest_horizon(samples)
    if config.kl.adaptive_target_nats is not None and config.kl.adaptive_horizon <= shortest:
        raise InputError(
            f"kl.adaptive_horizon {config.kl.adaptive_horizon:g} is too short for {samples} samples per step: the coefficient could fall to 0; "
            f"set more than {shortest:g}"
        )


def _require_even_shares(config: Config, samples: int, section: str, workers: int) -> None:
    batch = config.batch
    shares = workers * batch.minibatches_per_epoch
    if samples % shares == 0:
        return
    step = shares // math.gcd(shares, batch.samples_per_prompt)
    below = batch.prompts_per_step // step * step
    working = " or ".join(str(prompts) for prompts in (below, below + step) if prompts)
    raise InputError(
        f"batch.prompts_per_step {batch.prompts_per_step} x batch.samples_per_prompt {batch.samples_per_prompt} = {samples} samples "
        f"can't be shared evenly by {section}.num_actors {workers} x batch.minibatches_per_epoch {batch.minibatches_per_epoch} = {shares}; "
        f"batch.prompts_per_step {working} can"
    )


def shortest_horizon(samples: int) -> float:
    """The horizon at which a step of so many samples could take the adaptive KL coefficient to 0; it must be longer."""
    return MAX_KL_ERROR * samples


def batch_notes(config: Config) -> list[str]:
    """What is legal but probably not meant, one line each."""
    plan = derive_batch(config)
    budgets = {
        "batch.micro_batch_tokens": config.batch.micro_batch_tokens,
        "scorer.micro_batch_tokens": config.scorer.micro_batch_tokens,
        "reference.micro_batch_tokens": config.reference.micro_batch_tokens,
    }
    if ALGORITHMS[config.algorithm].has_critic:
        budgets["critic.micro_batch_tokens"] = config.critic.micro_batch_tokens
    notes = [
        f"{key} {budget} is below the longest row of {plan.max_tokens_per_row} tokens; such a row is a micro-batch of its own"
        for key, budget in budgets.items()
        if budget < plan.max_tokens_per_row
    ]
    if config.rollout.num_actors > plan.samples_per_step:
        notes.append(f"rollout.num_actors {config.rollout.num_actors} is above the {plan.samples_per_step} samples of a step; some engines stay idle")
    if config.kl.placement == "loss" and config.kl.estimator == "k1":
        notes.append("kl.estimator k1 has no effect as a loss: its expected gradient is zero on the policy's own samples; use k2 or k3")
    return notes
