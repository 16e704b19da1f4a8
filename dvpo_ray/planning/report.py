"""The plan of a run, as lines for people and as JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import psutil

from dvpo_ray.config.inputs import too_long_rows
from dvpo_ray.config.schema import Config
from dvpo_ray.errors import InputError
from dvpo_ray.planning.architecture import policy_plan
from dvpo_ray.planning.devices import Device
from dvpo_ray.planning.fit import Place, advice, in_host_memory, on_gpus
from dvpo_ray.planning.placement import plan_placement
from dvpo_ray.planning.plan import GIB, RolePlan, predict_roles
from dvpo_ray.planning.times import stage_seconds

_PARTS = ("parameters", "gradients", "optimizer", "activations", "cache")


@dataclass(frozen=True)
class Plan:
    """What a run will take.

    Attributes:
        config: of the run.
        device: that the times are for.
        roles: memory by role.
        seconds: of a step by stage, and of the `step`.
        places: GPUs, then the host memory.
    """

    config: Config
    device: Device
    roles: dict[str, RolePlan]
    seconds: dict[str, float]
    places: list[Place]

    @property
    def fits(self) -> bool:
        return all(place.fits for place in self.places)

    def lines(self) -> list[str]:
        """The plan for people."""
        return [*self._memory_lines(), "", *self._place_lines(), "", *self._time_lines()]

    def as_json(self) -> dict:
        """The plan for programs; sizes in bytes."""
        return {
            "fits": self.fits,
            "roles": {
                name: {"actors": role.actors, "parameters": role.model.parameters, "bytes_per_actor": asdict(role.per_actor)}
                for name, role in self.roles.items()
            },
            "places": [{"name": p.name, "capacity": p.capacity, "used": p.used, "fits": p.fits, "contents": p.contents} for p in self.places],
            "device": asdict(self.device),
            "step_seconds": self.seconds,
        }

    def _memory_lines(self) -> list[str]:
        header = f"{'role':<14}{'actors':>7}{'weights':>10}" + "".join(f" {part:>12}" for part in _PARTS) + f" {'total':>9}"
        lines = ["memory of one actor, GiB", header]
        for name, role in self.roles.items():
            memory = role.per_actor
            cells = "".join(f" {(getattr(memory, part) or 0) / GIB:>12.3f}" for part in _PARTS)
            total = memory.model_state + (memory.activations or 0) + memory.cache
            offloaded = f"  ({memory.offloaded / GIB:.3f} of it in host memory)" if memory.offloaded else ""
            lines.append(f"{name:<14}{role.actors:>7} {_count(role.model.parameters):>9}{cells} {total / GIB:>9.3f}{offloaded}")
        return lines

    def _place_lines(self) -> list[str]:
        lines = ["what lies where, GiB, each process's own included"]
        for place in self.places:
            contents = ", ".join(f"{name} {size / GIB:.2f}" for name, size in place.contents.items())
            verdict = "fits" if place.fits else "DOES NOT FIT"
            lines.append(f"{place.name:<11} {place.used / GIB:>9.2f} of {place.capacity / GIB:.2f}  {verdict}: {contents}")
        return [*lines, *(self._problem(place) for place in self.places if not place.fits)]

    def _problem(self, place: Place) -> str:
        return f"{(place.used - place.capacity) / GIB:.2f} GiB too much on {place.name}: {advice(place, self.roles, self.config)}"

    def _time_lines(self) -> list[str]:
        source = "measured here" if self.device.measured else "from a table; --calibrate measures this machine"
        device = self.device
        speed = f"{device.training_flops / 1e12:.3g} TFLOP/s training, {device.scoring_flops / 1e12:.3g} scoring"
        lines = [
            f"seconds of a step with responses of full length, at least; {device.name}, {speed}, {device.bytes_per_second / 1e9:.3g} GB/s, {source}"
        ]
        return lines + [f"  {stage:<11} {seconds:>10.3f}" for stage, seconds in self.seconds.items()]


def make_plan(config: Config, device: Device, node_memory_gib: float | None = None) -> Plan:
    """Predict memory, fit and time of a config's run.

    Args:
        node_memory_gib: host memory of a node; of this machine when not given. All actors are taken to be on one node.

    Raises:
        InputError: a model's config.json is missing, rows are longer than the policy's context, or placement and batch don't work out.
    """
    model = policy_plan(config, trained=False).model_config.get_text_config()
    too_long = too_long_rows(config, getattr(model, "max_position_embeddings", None))
    if too_long is not None:
        raise InputError(too_long)
    bundles = plan_placement(config)
    roles = predict_roles(config, device.memory_gib)
    seconds = stage_seconds(config, {name: role.model for name, role in roles.items()}, device)
    host = node_memory_gib if node_memory_gib is not None else psutil.virtual_memory().total / GIB
    gpus = on_gpus(bundles, roles, device.memory_gib) if device.is_gpu else []
    return Plan(config, device, roles, seconds, [*gpus, in_host_memory(bundles, roles, host)])


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.2f} M"
