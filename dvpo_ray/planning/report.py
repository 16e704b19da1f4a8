"""The plan of a run: memory, whether the actors fit the GPUs and the node, and times; as lines for people and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import groupby

import psutil

from dvpo_ray.config.arithmetic import counted
from dvpo_ray.config.inputs import too_long_rows
from dvpo_ray.config.schema import Config
from dvpo_ray.errors import InputError, ResourceError
from dvpo_ray.monitoring.console import duration
from dvpo_ray.planning.architecture import policy_plan
from dvpo_ray.planning.memory import GIB, PROCESS_BYTES, ActorMemory, RolePlan, predict_roles
from dvpo_ray.planning.placement import Seat, placement_lines, plan_placement, shares_gpus
from dvpo_ray.planning.slots import STEP, SlotPlan, plan_slots
from dvpo_ray.planning.times import Device, stage_seconds

PARTS = ("parameters", "gradients", "optimizer", "activations", "cache")


@dataclass
class Place:
    """One GPU in one phase of a step, or the host memory of one node.

    Attributes:
        name: `GPU 0`, `host memory`.
        capacity: bytes.
        contents: bytes by actor, `role-index`.
        phase: where it is one of several.
    """

    name: str
    capacity: int
    contents: dict[str, int] = field(default_factory=dict)
    phase: str = ""

    @property
    def by_role(self) -> list[tuple[tuple[str, int], int]]:
        """Roles with the bytes of an actor, and how many such actors there are."""
        return list(Counter((name.rpartition("-")[0], size) for name, size in self.contents.items()).items())

    @property
    def used(self) -> int:
        return sum(self.contents.values())

    @property
    def fits(self) -> bool:
        return self.used <= self.capacity


def on_gpus(plan: SlotPlan) -> list[Place]:
    """The GPUs and what is on each, by phase."""
    return [
        Place(f"GPU {slot}", plan.capacity, contents, "" if phase == STEP else phase)
        for phase, slots in plan.phases.items()
        for slot, contents in slots.items()
    ]


def check_fit(plan: SlotPlan, roles: Mapping[str, RolePlan], config: Config) -> None:
    """Refuse actors that are too large for their GPUs.

    Raises:
        ResourceError: names the fullest GPU, who takes most of it and what to change.
    """
    if not plan.fits:
        phase, slot = plan.fullest
        raise ResourceError(_problem(Place(f"GPU {slot}", plan.capacity, plan.phases[phase][slot], "" if phase == STEP else phase), roles, config))


def in_host_memory(seats: Iterable[Seat], roles: Mapping[str, RolePlan], node_memory_gib: float, away: Collection[str] = ()) -> Place:
    """The memory of one node with all actors on it: the whole memory of those without a GPU, and what the others offload.

    Args:
        away: roles on GPUs whose models are in host memory in a part of each step.
    """
    place = Place("host memory", round(node_memory_gib * GIB))
    for seat in seats:
        memory = roles[seat.role].per_actor if seat.role in roles else ActorMemory()
        on_host = memory.model_state if seat.role in away else memory.offloaded
        place.contents[seat.name] = (on_host if seat.slots else memory.peak + memory.cache) + PROCESS_BYTES["cpu"]
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
        seats = plan_placement(config)
        self.roles = predict_roles(config, device.memory_gib)
        self.seconds = stage_seconds(config, {name: role.model for name, role in self.roles.items()}, device)
        self.slots = plan_slots(config, seats, self.roles, device.memory_gib) if device.memory_gib is not None else None
        host = node_memory_gib if node_memory_gib is not None else psutil.virtual_memory().total / GIB
        self.seats, self._is_this_host = seats, node_memory_gib is None
        self.places = [*(on_gpus(self.slots) if self.slots else []), in_host_memory(seats, self.roles, host, self.slots.away if self.slots else ())]

    @property
    def run_seconds(self) -> float:
        """Of all steps, without what comes before, between and after them."""
        return self.config.train.steps * self.seconds["step"]

    def lines(self) -> list[str]:
        """The plan for people."""
        return [*self._memory_lines(), "", *placement_lines(self.seats), "", *self._place_lines(), "", *self._time_lines()]

    def as_json(self) -> dict:
        """The plan for programs; sizes in bytes."""
        return {
            "fits": all(place.fits for place in self.places),
            "roles": {
                name: {"actors": role.actors, "parameters": role.model.parameters, "bytes_per_actor": asdict(role.per_actor)}
                for name, role in self.roles.items()
            },
            "places": [
                {"name": p.name, "phase": p.phase, "capacity": p.capacity, "used": p.used, "fits": p.fits, "contents": p.contents}
                for p in self.places
            ],
            "device": asdict(self.device),
            "step_seconds": self.seconds,
            "run_seconds": self.run_seconds,
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
        whose = "; host memory is this machine's, and --node-memory-gib gives another" if self._is_this_host else ""
        lines = [f"what is where, GiB, with each process's own memory{whose}"]
        for _, alike in groupby(self.places, key=lambda place: (place.phase, place.by_role)):
            first, *others = alike
            name = f"{first.name}-{others[-1].name.removeprefix('GPU ')}" if others else first.name
            verdict = "fits" if first.fits else "DOES NOT FIT"
            contents = ", ".join(
                f"{number} x {role} {size / GIB:.2f}" if number > 1 else f"{role} {size / GIB:.2f}" for (role, size), number in first.by_role
            )
            lines.append(f"{name:<11} {first.phase:<8} {first.used / GIB:>9.2f} of {first.capacity / GIB:.2f}  {verdict}: {contents}")
        return [
            *lines,
            *(self.slots.lines if self.slots else []),
            *(_problem(place, self.roles, self.config) for place in self.places if not place.fits),
        ]

    def _time_lines(self) -> list[str]:
        device = self.device
        source = "measured here" if device.measured else "from a table; --calibrate measures this machine"
        speed = f"{device.training_flops / 1e12:.3g} TFLOP/s training, {device.scoring_flops / 1e12:.3g} scoring"
        lines = [
            f"seconds of a step with responses of full length, estimated; {device.name}, {speed}, {device.bytes_per_second / 1e9:.3g} GB/s, {source}"
        ]
        lines += [f"  {stage:<11} {seconds:>10.3f}" for stage, seconds in self.seconds.items()]
        steps, without = counted(self.config.train.steps, "step"), "without its start, evaluations, checkpoints and refreshes"
        return [*lines, f"the run: {steps} of train.steps take {duration(self.run_seconds)}, {without}"]


def _problem(place: Place, roles: Mapping[str, RolePlan], config: Config) -> str:
    """How much too much there is, and the remedy for the largest part of the actor that takes most."""
    largest = max((name for name in place.contents if name.rpartition("-")[0] in roles), key=place.contents.__getitem__)
    role = largest.rpartition("-")[0]
    least = shares_gpus(plan_placement(config)) and config.rollout.kv_cache_gib is None  # then the cache is as small as it can be
    part = max((part for part in PARTS if part != "cache" or not least), key=lambda part: getattr(roles[role].per_actor, part) or 0)
    excess = (place.used - place.capacity) / GIB
    where = place.name + (f" in the {place.phase}" if place.phase else "")
    return f"{excess:.2f} GiB too much on {where}: {largest} takes most ({place.contents[largest] / GIB:.2f} GiB), {_remedy(role, part, config)}"


def _remedy(role: str, part: str, config: Config) -> str:
    """What to change so that the largest part of a role's memory gets smaller."""
    if role == "rollout":
        return {
            "cache": "lower rollout.kv_cache_gib or rollout.gpu_memory_utilization",
            "activations": "lower rollout.max_concurrent_sequences",
        }.get(part, "raise rollout.tensor_parallel_size, or set model.dtype=bfloat16")
    if role not in ("learner", "critic"):
        section = "reference" if role == "reference" else "scorer"  # a reward model has the scorer's settings
        lower = f"lower {section}.micro_batch_tokens"
        return lower if part == "activations" else "set model.dtype=bfloat16, or placement=separate with more GPUs"
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
