"""Seconds of a step by stage: floating-point operations and bytes over what a device does of each in a second.

Operations are counted as usual (Kaplan et al. 2020, arXiv 2001.08361, §2.1): two for each weight and token forward, and twice as many
backward, with those of causal attention added. Loading, Python and Ray are not in it, so it is a lower bound for small models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from dvpo_ray.config.algorithms import ALGORITHMS
from dvpo_ray.config.arithmetic import derive_batch
from dvpo_ray.config.schema import Config
from dvpo_ray.models.loading import torch_dtype
from dvpo_ray.planning.architecture import Architecture

ADAM_BYTES = 28
"""Of each trained element in an optimizer step: weight, gradient and two moments read, weight and moments written, in float32."""
SYNC_COPIES = 3
"""Times that each weight is copied on its way to an engine: out of the learner, through the transport, into the engine."""


def forward_flops(model: Architecture, length: int) -> float:
    """Operations of one token's way through the decoder layers, in rows of so many tokens; the mean over a row's positions."""
    return 2 * model.layer_matrices + 2 * length * model.attention_width * model.layers


def logit_flops(model: Architecture) -> float:
    """Operations of the logits of one position."""
    return 2 * model.hidden * model.vocabulary


class Speeds(Protocol):
    """What of a `dvpo_ray.planning.devices.Device` times depend on."""

    training_flops: float
    scoring_flops: float
    bytes_per_second: float


@dataclass(frozen=True)
class _Work:
    config: Config
    length: int
    responses: int
    samples: int
    element_bytes: int
    greedy: int


def stage_seconds(config: Config, models: Mapping[str, Architecture], device: Speeds) -> dict[str, float]:
    """Seconds of generation, scoring, reference, update and sync, and of the whole `step`, with responses of full length.

    Roles on GPUs of their own work beside each other, so that of scoring only what the last chunk leaves shows; on a CPU, or a GPU that
    they share, the times add up.

    Args:
        models: the model of each role.
    """
    samples = derive_batch(config).samples_per_step
    work = _Work(
        config,
        config.data.max_prompt_tokens + config.rollout.max_response_tokens,
        config.rollout.max_response_tokens,
        samples,
        torch_dtype(config.model.dtype).itemsize,
        config.batch.prompts_per_step if ALGORITHMS[config.algorithm].has_greedy_baseline else 0,
    )
    scorer = ALGORITHMS[config.algorithm].scorer
    value_models = 1 + len(config.scorer.ensemble)
    generate = _generation(work, models["rollout"], device)
    seconds = {
        "generate": generate,
        "score": _visible(work, config.scorer, value_models * _scoring(work, models[scorer], config.scorer, device, samples + work.greedy)),
        "reference": _visible(work, config.reference, _scoring(work, models["reference"], config.reference, device, samples)),
    }
    epochs = config.batch.update_epochs
    recomputes = config.policy.old_log_probs == "recompute" and epochs * config.batch.minibatches_per_epoch > 1
    updates = [_update(work, models["learner"], config.policy, device, again=1 if recomputes else 0)]
    if "critic" in models:
        seconds["score"] += _scoring(work, models["critic"], config.critic, device, samples)
        updates.append(_update(work, models["critic"], config.critic, device, again=0))
    apart = config.policy.gpus_per_actor >= 1 and config.critic.gpus_per_actor >= 1
    seconds["update"] = max(updates) if apart else sum(updates)
    seconds["sync"] = SYNC_COPIES * models["rollout"].parameters * work.element_bytes / device.bytes_per_second
    return seconds | {"step": sum(seconds.values())}


def _generation(work: _Work, model: Architecture, device: Speeds) -> float:
    """Prompts at once, then token by token: each decoding step reads all weights and the cache, or computes, whichever takes longer."""
    rollout = work.config.rollout
    shards = rollout.tensor_parallel_size
    samples = math.ceil((work.samples + work.greedy) / rollout.num_actors)
    prompts = samples * (work.length - work.responses) * forward_flops(model, work.length) / (device.scoring_flops * shards)
    together = min(rollout.max_concurrent_sequences, samples)
    read = model.parameters * work.element_bytes + together * (work.length - work.responses / 2) * model.cache_per_token * work.element_bytes
    compute = together * (forward_flops(model, work.length) + logit_flops(model))
    token = max(read / device.bytes_per_second, compute / device.scoring_flops) / shards
    return prompts + math.ceil(samples / together) * work.responses * token


def _scoring(work: _Work, model: Architecture, role, device: Speeds, samples: int) -> float:
    per_row = work.length * forward_flops(model, work.length) + work.responses * logit_flops(model)
    return math.ceil(samples / role.num_actors) * per_row / device.scoring_flops


def _visible(work: _Work, role, seconds: float) -> float:
    """What of a frozen model's time is left after the last rollout."""
    if role.gpus_per_actor < 1:
        return seconds
    chunks = math.ceil(work.samples / (work.config.rollout.rollouts_per_chunk * role.num_actors))
    return seconds / chunks


def _update(work: _Work, model: Architecture, role, device: Speeds, again: int) -> float:
    """Forward and backward passes of all epochs, and the optimizer steps.

    Args:
        again: forward passes over the batch beforehand.
    """
    rows = work.samples / role.num_actors
    layers = work.length * forward_flops(model, work.length)
    logits = work.responses * logit_flops(model)
    reached = model.trained_layers / model.layers
    weights = min(1.0, model.trained / max(1, model.layer_matrices))  # share of the gradients of weights that is computed
    backward = reached * layers + weights * layers + (1 + (model.trained == model.parameters)) * logits
    recomputed = reached * layers if role.deepspeed.gradient_checkpointing else 0
    epochs, steps = work.config.batch.update_epochs, work.config.batch.update_epochs * work.config.batch.minibatches_per_epoch
    flops = rows * epochs * (layers + logits + backward + recomputed)
    before = again * rows * (layers + logits) / device.scoring_flops
    adam = steps * ADAM_BYTES * model.trained / role.num_actors / device.bytes_per_second
    return before + flops / device.training_flops + adam
