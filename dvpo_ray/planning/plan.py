"""Predictions by role, from the config and the config.json of its models."""

from __future__ import annotations

from dataclasses import dataclass, replace

from dvpo_ray.config.algorithms import ALGORITHMS
from dvpo_ray.config.arithmetic import derive_batch
from dvpo_ray.config.schema import Config, DeepSpeedConfig
from dvpo_ray.models.loading import torch_dtype
from dvpo_ray.planning.architecture import Architecture, ModelPlan, critic_plan, policy_plan, value_plan
from dvpo_ray.planning.memory import (
    SAMPLING_LOGIT_BYTES,
    ActorMemory,
    communication_buffers,
    rows_together,
    scoring_activations,
    trained_state,
    training_activations,
)
from dvpo_ray.planning.placement import choose_transport

GIB = 2**30


@dataclass(frozen=True)
class RolePlan:
    """One role before it exists.

    Attributes:
        model: the numbers of its model.
        actors: how many there are.
        per_actor: memory of one of them.
    """

    model: Architecture
    actors: int
    per_actor: ActorMemory

    @property
    def memory(self) -> ActorMemory:
        """Of all actors together."""
        return sum([self.per_actor] * self.actors, ActorMemory())


@dataclass(frozen=True)
class _Shapes:
    """What all roles have in common."""

    config: Config
    element_bytes: int
    length: int
    responses: int
    samples: int


def predict_roles(config: Config, gpu_memory_gib: float | None = None) -> dict[str, RolePlan]:
    """Memory of every role of a config's algorithm, by the names that placement and metrics use.

    Args:
        gpu_memory_gib: of the GPU that rollout engines run on; without it their cache on a GPU is unknown, and given as 0.

    Raises:
        InputError: a model's config.json is missing or of no known architecture.
    """
    shapes = _Shapes(
        config,
        torch_dtype(config.model.dtype).itemsize,
        config.data.max_prompt_tokens + config.rollout.max_response_tokens,
        config.rollout.max_response_tokens,
        derive_batch(config).samples_per_step,
    )
    algorithm = ALGORITHMS[config.algorithm]
    frozen = policy_plan(config, trained=False)
    value_models = 1 + len(config.scorer.ensemble)
    roles = {
        "rollout": _rollout(shapes, frozen.architecture(), gpu_memory_gib),
        algorithm.scorer: _frozen(shapes, value_plan(config, algorithm.section), config.scorer, gives_logits=False, copies=value_models),
        "reference": _frozen(shapes, frozen, config.reference, gives_logits=True),
        "learner": _trained(shapes, policy_plan(config, trained=True), config.policy, config.policy.deepspeed, config.batch.micro_batch_tokens),
    }
    if algorithm.has_critic:
        roles["critic"] = _trained(shapes, critic_plan(config), config.critic, config.critic.deepspeed, config.critic.micro_batch_tokens)
    return roles


def _trained(shapes: _Shapes, plan: ModelPlan, role, deepspeed: DeepSpeedConfig, micro_batch_tokens: int) -> RolePlan:
    model = plan.architecture()
    minibatch = shapes.samples // (role.num_actors * shapes.config.batch.minibatches_per_epoch)
    rows = min(rows_together(micro_batch_tokens, shapes.length), max(1, minibatch))
    saved = plan.saved_bytes(rows, shapes.length)
    on_gpu = role.gpus_per_actor > 0
    sizes = model, shapes.element_bytes, rows, shapes.length, shapes.responses
    activations = training_activations(saved, *sizes, checkpointing=deepspeed.gradient_checkpointing, on_gpu=on_gpu)
    if on_gpu:
        activations += communication_buffers(model, shapes.element_bytes, deepspeed)
    state = trained_state(model, shapes.element_bytes, deepspeed, role.num_actors)
    return RolePlan(model, role.num_actors, replace(state, activations=activations))


def _frozen(shapes: _Shapes, plan: ModelPlan, role, *, gives_logits: bool, copies: int = 1) -> RolePlan:
    """A frozen model, or several of its size that score one after the other."""
    model = plan.architecture()
    chunk = min(shapes.config.rollout.rollouts_per_chunk, shapes.samples)
    rows = min(rows_together(role.micro_batch_tokens, shapes.length), chunk)
    responses = shapes.responses if gives_logits else 0
    saved = plan.saved_bytes(rows, shapes.length)
    activations = scoring_activations(saved, model, shapes.element_bytes, rows, responses, on_gpu=role.gpus_per_actor > 0)
    return RolePlan(model, role.num_actors, ActorMemory(copies * model.parameters * shapes.element_bytes, activations=activations))


def _weight_bucket_bytes(config: Config, parameters: int) -> int:
    """What an engine holds of new weights beside its own while they arrive; with CUDA IPC it reads the learner's."""
    return 0 if choose_transport(config) == "ipc" else min(parameters, round(config.weight_sync.bucket_mib * 2**20))


def _rollout(shapes: _Shapes, model: Architecture, gpu_memory_gib: float | None) -> RolePlan:
    """An engine with all of its tensor-parallel shards."""
    rollout = shapes.config.rollout
    parameters = model.parameters * shapes.element_bytes
    together = min(rollout.max_concurrent_sequences, derive_batch(shapes.config).max_samples_per_engine)
    arriving = _weight_bucket_bytes(shapes.config, parameters)
    if rollout.backend == "transformers":  # it keeps the logits of every step, and the cache lives as long as the batch
        cache = together * shapes.length * model.cache_per_token * shapes.element_bytes
        activations = cache + together * shapes.responses * model.vocabulary * 4 + arriving
        return RolePlan(model, rollout.num_actors, ActorMemory(parameters, activations=activations))
    sampling = together * model.vocabulary * SAMPLING_LOGIT_BYTES
    if rollout.gpus_per_actor == 0:
        cache = rollout.kv_cache_gib * GIB
    elif gpu_memory_gib is None:
        cache = 0
    else:
        granted = rollout.gpu_memory_utilization * gpu_memory_gib * GIB * rollout.tensor_parallel_size
        cache = max(0, round(granted - parameters - sampling))
    return RolePlan(model, rollout.num_actors, ActorMemory(parameters, activations=sampling + arriving, cache=cache))
