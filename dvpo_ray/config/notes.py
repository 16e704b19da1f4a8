"""Settings of policy optimisation that are legal together but hardly meant, one line each: notes of a dry run, warnings of a run."""

from __future__ import annotations

from collections.abc import Iterator

from dvpo_ray.config.algorithms import ALGORITHMS
from dvpo_ray.config.arithmetic import batch_notes
from dvpo_ray.config.health import GOLD_THRESHOLDS
from dvpo_ray.config.schema import Config


def training_notes(config: Config) -> list[str]:
    """Everything of a config of `dvpo train` that has no effect, or another one than it seems.

    Raises:
        InputError: as in `derive_batch`.
    """
    return [*batch_notes(config), *_kl_notes(config), *_health_notes(config), *_refresh_notes(config), *_context_notes(config)]


def _kl_notes(config: Config) -> Iterator[str]:
    kl = config.kl
    if kl.placement != "off":
        return
    if kl.coefficient and "coefficient" in kl.model_fields_set:
        yield f"kl.coefficient {kl.coefficient:g} has no effect, since kl.placement is off; set kl.placement to reward or loss for a penalty"
    if kl.adaptive_target_nats is not None:
        yield f"kl.adaptive_target_nats {kl.adaptive_target_nats:g} has no effect, since kl.placement is off and there is no penalty to adapt"


def _health_notes(config: Config) -> Iterator[str]:
    window, steps = config.health.window_steps, config.train.steps
    if window > steps:
        yield f"health.window_steps {window} is above train.steps {steps}; no alarm can be raised"
    elif config.health.on_alarm != "warn" and not _can_alarm(config):
        valueless = f" and {config.algorithm} has no values" if config.health.max_calibration_error is not None else ""
        unjudged = f", since evaluation.judge is none{valueless}"
        why = unjudged if config.evaluation.judge == "none" else ": the threshold of every rule that applies is null"
        yield f"health.on_alarm is {config.health.on_alarm}, but no alarm can be raised{why}"


def _can_alarm(config: Config) -> bool:
    """Whether any rule has its threshold and what it reads: a gold judge, or values along the responses."""
    health, algorithm = config.health, ALGORITHMS[config.algorithm]
    by_gold = config.evaluation.judge != "none" and any(getattr(health, key) is not None for key in GOLD_THRESHOLDS)
    return by_gold or ((algorithm.scorer == "scorer" or algorithm.has_critic) and health.max_calibration_error is not None)


def _refresh_notes(config: Config) -> Iterator[str]:
    every, steps, refresh = config.gvm.refresh_every_steps, config.train.steps, config.gvm.refresh
    if every >= steps:
        yield f"gvm.refresh_every_steps {every} is not below train.steps {steps}; the value model is never refreshed after a number of steps"
    most = refresh.samples_per_prompt // 2
    if refresh.source is not None and refresh.pairs_per_prompt > most:
        yield (
            f"gvm.refresh.pairs_per_prompt {refresh.pairs_per_prompt} is above what gvm.refresh.samples_per_prompt {refresh.samples_per_prompt} "
            f"allows, {most}: no response is in two pairs"
        )


def _context_notes(config: Config) -> Iterator[str]:
    context = config.gvm.context
    if ALGORITHMS[config.algorithm].scorer == "scorer" and 0 < context.pool <= context.examples:
        yield (
            f"gvm.context.pool {context.pool} is not above gvm.context.examples {context.examples}; a value model with so many examples of "
            f"other prompts needs {context.examples + 1} or more"
        )
