"""Whether the actors fit the GPUs and nodes that the config's placement gives them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from dvpo_ray.config.schema import Config
from dvpo_ray.planning.placement import Bundle
from dvpo_ray.planning.plan import GIB, RolePlan

PROCESS_BYTES = {"cpu": round(0.45 * GIB), "gpu": round(0.6 * GIB)}
"""Of a process before it holds a model: libraries on a CPU, the CUDA context and its kernels on a GPU."""


@dataclass
class Place:
    """One GPU, or the host memory of one node.

    Attributes:
        name: `GPU 0`, `host memory`.
        capacity: bytes.
        contents: bytes by actor, `role-index`.
        free: share of the GPU that is not reserved.
    """

    name: str
    capacity: int
    contents: dict[str, int] = field(default_factory=dict)
    free: float = 1.0

    @property
    def used(self) -> int:
        return sum(self.contents.values())

    @property
    def fits(self) -> bool:
        return self.used <= self.capacity


def on_gpus(bundles: Iterable[Bundle], roles: Mapping[str, RolePlan], gpu_memory_gib: float) -> list[Place]:
    """GPUs with what lies on each: actors fill them in the placement's order, several to a GPU where they reserve fractions of one."""
    places: list[Place] = []
    for bundle in bundles:
        if bundle.gpus == 0 or bundle.role not in roles:
            continue
        memory = roles[bundle.role].per_actor
        needed = memory.peak + memory.cache
        name = f"{bundle.role}-{bundle.index}"
        if bundle.gpus < 1:
            place = next((p for p in places if p.free >= bundle.gpus - 1e-9), None) or _new(places, gpu_memory_gib)
            place.free -= bundle.gpus
            place.contents[name] = needed + PROCESS_BYTES["gpu"]
        else:
            for _ in range(int(bundle.gpus)):
                place = _new(places, gpu_memory_gib)
                place.free = 0.0
                place.contents[name] = round(needed / bundle.gpus) + PROCESS_BYTES["gpu"]
    return places


def _new(places: list[Place], gpu_memory_gib: float) -> Place:
    places.append(Place(f"GPU {len(places)}", round(gpu_memory_gib * GIB)))
    return places[-1]


def in_host_memory(bundles: Iterable[Bundle], roles: Mapping[str, RolePlan], node_memory_gib: float) -> Place:
    """The memory of one node with all actors on it: those without a GPU whole, of the others what is offloaded."""
    place = Place("host memory", round(node_memory_gib * GIB))
    for bundle in bundles:
        role = roles.get(bundle.role)
        memory = 0 if role is None else role.per_actor.offloaded if bundle.gpus else role.per_actor.peak + role.per_actor.cache
        place.contents[f"{bundle.role}-{bundle.index}"] = memory + PROCESS_BYTES["cpu"]
    return place


def advice(place: Place, roles: Mapping[str, RolePlan], config: Config) -> str:
    """What to change so that a place has room: the remedy for the largest part of the actor that takes most."""
    largest = max((name for name in place.contents if name.rpartition("-")[0] in roles), key=place.contents.__getitem__)
    role = largest.rpartition("-")[0]
    memory = roles[role].per_actor
    parts = {name: getattr(memory, name) or 0 for name in ("parameters", "gradients", "optimizer", "activations", "cache")}
    return f"{largest} takes most, {_remedy(role, max(parts, key=parts.__getitem__), config)}"


def _remedy(role: str, part: str, config: Config) -> str:
    if role == "rollout":
        return {
            "cache": "lower rollout.gpu_memory_utilization (on a CPU rollout.kv_cache_gib)",
            "activations": "lower rollout.max_concurrent_sequences",
        }.get(part, "raise rollout.tensor_parallel_size, or set model.dtype=bfloat16")
    if role in ("learner", "critic"):
        return _training_remedy("policy" if role == "learner" else "critic", part, config)
    section = "reference" if role == "reference" else "scorer"  # a reward model has the scorer's settings
    lower = f"lower {section}.micro_batch_tokens"
    return lower if part == "activations" else "set model.dtype=bfloat16, or a GPU with fewer actors (gpus_per_actor)"


def _training_remedy(section: str, part: str, config: Config) -> str:
    deepspeed = getattr(config, section).deepspeed
    if part == "activations":
        lower = f"lower {'batch' if section == 'policy' else section}.micro_batch_tokens"
        return lower if deepspeed.gradient_checkpointing else f"{lower}, or set {section}.deepspeed.gradient_checkpointing=true"
    stage = 3 if part == "parameters" else 2
    shard = (
        f"raise {section}.num_actors"
        if deepspeed.zero_stage >= stage
        else f"set {section}.deepspeed.zero_stage={stage} with several {section}.num_actors"
    )
    if part == "parameters" or deepspeed.offload_optimizer or config.policy.gpus_per_actor == 0:
        return shard
    return f"{shard}, or set {section}.deepspeed.offload_optimizer=true" + (" with a zero_stage" if deepspeed.zero_stage == 0 else "")
