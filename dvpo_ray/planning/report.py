"""The plan of a run: memory, whether the actors fit the GPUs and the node, and times; as lines for people and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field

import psutil

from dvpo_ray.config.inputs import too_long_rows
from dvpo_ray.config.schema import Config
from dvpo_ray.errors import InputError
from dvpo_ray.planning.architecture import policy_plan
from dvpo_ray.planning.memory import GIB, RolePlan, predict_roles
from dvpo_ray.planning.placement import Bundle, plan_placement
from dvpo_ray.planning.times import Device, stage_seconds

PARTS = ("parameters", "gradients", "optimizer", "activations", "cache")
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
    """The GPUs and what is on each. Actors fill them in the placement's order; actors with fractions of a GPU share one."""
    places: list[Place] = []
    for bundle in bundles:
        if bundle.gpus == 0 or bundle.role not in roles:
            continue
        memory = roles[bundle.role].per_actor
        shared = next((place for place in places if bundle.gpus < 1 and place.free >= bundle.gpus - 1e-9), None)
        new = 0 if shared else max(1, int(bundle.gpus))
        places += [Place(f"GPU {len(places) + i}", round(gpu_memory_gib * GIB)) for i in range(new)]
        for place in [shared] if shared else places[-new:]:
            place.free -= min(1, bundle.gpus)
            place.contents[f"{bundle.role}-{bundle.index}"] = round((memory.peak + memory.cache) / max(1, bundle.gpus)) + PROCESS_BYTES["gpu"]
    return places


def in_host_memory(bundles: Iterable[Bundle], roles: Mapping[str, RolePlan], node_memory_gib: float) -> Place:
    """The memory of one node with all actors on it: the whole memory of those without a GPU, and what the others offload."""
    place = Place("host memory", round(node_memory_gib * GIB))
    for bundle in bundles:
        role = roles.get(bundle.role)
        memory = 0 if role is None else role.per_actor.offloaded if bundle.gpus else role.per_actor.peak + role.per_actor.cache
        place.contents[f"{bundle.role}-{bundle.index}"] = memory + PROCESS_BYTES["cpu"]
    return place


# -------------------------------------------------------------------------------------------------------------- plan


class Plan:
    """Memory, fit and time of a config's run.

    Args:
        config: of the run.
        device: that the times are for.
        node_memory_gib: host memory of a node; of this machine when not given. All actors are assumed to be on one node.

    Raises:
        InputError: a model's config.json is missing, rows are longer than the policy's context, or placement or batch don't work out.
    """

    def __init__(self, config: Config, device: Device, node_memory_gib: float | None = None) -> None:
        model = policy_plan(config, trained=False).model_config.get_text_config()
        too_long = too_long_rows(config, getattr(model, "max_position_embeddings", None))
        if too_long is not None:
            raise InputError(too_long)
        self.config, self.device = config, device
        bundles = plan_placement(config)
        self.roles = predict_roles(config, device.memory_gib)
        self.seconds = stage_seconds(config, {name: role.model for name, role in self.roles.items()}, device)
        host = node_memory_gib if node_memory_gib is not None else psutil.virtual_memory().total / GIB
        gpus = on_gpus(bundles, self.roles, device.memory_gib) if device.memory_gib is not None else []
        self.places = [*gpus, in_host_memory(bundles, self.roles, host)]

    def lines(self) -> list[str]:
        """The plan for people."""
        return [*self._memory_lines(), "", *self._place_lines(), "", *self._time_lines()]

    def as_json(self) -> dict:
        """The plan for programs; sizes in bytes."""
        return {
            "fits": all(place.fits for place in self.places),
            "roles": {
                name: {"actors": role.actors, "parameters": role.model.parameters, "bytes_per_actor": asdict(role.per_actor)}
                for name, role in self.roles.items()
            },
            "places": [{"name": p.name, "capacity": p.capacity, "used": p.used, "fits": p.fits, "contents": p.contents} for p in self.places],
            "device": asdict(self.device),
            "step_seconds": self.seconds,
        }

    def _memory_lines(self) -> list[str]:
        header = f"{'role':<14}{'actors':>7}{'weights':>10}" + "".join(f" {part:>12}" for part in PARTS) + f" {'total':>9}"
        lines = ["memory of one actor, GiB", header]
        for name, role in self.roles.items():
            memory, parameters = role.per_actor, role.model.parameters
            parts = [getattr(memory, part) for part in PARTS]
            weights = f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.2f} M"
            cells = "".join(f" {size / GIB:>12.3f}" for size in parts)
            offloaded = f"  ({memory.offloaded / GIB:.3f} of it in host memory)" if memory.offloaded else ""
            lines.append(f"{name:<14}{role.actors:>7} {weights:>9}{cells} {sum(parts) / GIB:>9.3f}{offloaded}")
        return lines

    def _place_lines(self) -> list[str]:
        lines = ["what is where, GiB, with each process's own memory"]
        for place in self.places:
            contents = ", ".join(f"{name} {size / GIB:.2f}" for name, size in place.contents.items())
            verdict = "fits" if place.fits else "DOES NOT FIT"
            lines.append(f"{place.name:<11} {place.used / GIB:>9.2f} of {place.capacity / GIB:.2f}  {verdict}: {contents}")
        return [*lines, *(self._problem(place) for place in self.places if not place.fits)]

    def _problem(self, place: Place) -> str:
        """How much too much there is, and the remedy for the largest part of the actor that takes most."""
        largest = max((name for name in place.contents if name.rpartition("-")[0] in self.roles), key=place.contents.__getitem__)
        role = largest.rpartition("-")[0]
        part = max(PARTS, key=lambda part: getattr(self.roles[role].per_actor, part))
        excess = (place.used - place.capacity) / GIB
        return f"{excess:.2f} GiB too much on {place.name}: {largest} takes most, {_remedy(role, part, self.config)}"

    def _time_lines(self) -> list[str]:
        device = self.device
        source = "measured here" if device.measured else "from a table; --calibrate measures this machine"
        speed = f"{device.training_flops / 1e12:.3g} TFLOP/s training, {device.scoring_flops / 1e12:.3g} scoring"
        lines = [
            f"seconds of a step with responses of full length, at least; {device.name}, {speed}, {device.bytes_per_second / 1e9:.3g} GB/s, {source}"
        ]
        return lines + [f"  {stage:<11} {seconds:>10.3f}" for stage, seconds in self.seconds.items()]


def _remedy(role: str, part: str, config: Config) -> str:
    """What to change so that the largest part of a role's memory gets smaller."""
    if role == "rollout":
        return {
            "cache": "lower rollout.gpu_memory_utilization (on a CPU rollout.kv_cache_gib)",
            "activations": "lower rollout.max_concurrent_sequences",
        }.get(part, "raise rollout.tensor_parallel_size, or set model.dtype=bfloat16")
    if role not in ("learner", "critic"):
        section = "reference" if role == "reference" else "scorer"  # a reward model has the scorer's settings
        lower = f"lower {section}.micro_batch_tokens"
        return lower if part == "activations" else "set model.dtype=bfloat16, or a GPU with fewer actors (gpus_per_actor)"
    section = "policy" if role == "learner" else "critic"
    deepspeed = getattr(config, section).deepspeed
    if part == "activations":
        lower = f"lower {'batch' if section == 'policy' else section}.micro_batch_tokens"
        return lower if deepspeed.gradient_checkpointing else f"{lower}, or set {section}.deepspeed.gradient_checkpointing=true"
    stage, shard = 3 if part == "parameters" else 2, f"raise {section}.num_actors"
    if deepspeed.zero_stage < stage:
        shard = f"set {section}.deepspeed.zero_stage={stage} with several {section}.num_actors"
    if part == "parameters" or deepspeed.offload_optimizer or config.policy.gpus_per_actor == 0:
        return shard
    return f"{shard}, or set {section}.deepspeed.offload_optimizer=true" + (" with a zero_stage" if deepspeed.zero_stage == 0 else "")
