"""Room for actors: a placement group, the actors started in its bundles, and waiting for them by name."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from dvpo_ray.config.schema import RayConfig
from dvpo_ray.errors import HeadGone, ResourceError
from dvpo_ray.planning.placement import Bundle, total_resources
from dvpo_ray.runtime.fork_server import runtime_env
from dvpo_ray.runtime.process import Actor, driver_folders
from dvpo_ray.runtime.waiting import get, head_answers, introduce, known


@dataclass(frozen=True)
class Room:
    """Reserved resources that actors can be started in.

    Attributes:
        group: the placement group.
        bundles: all that it was made of.
        free: those of them that new actors may take.
    """

    group: PlacementGroup
    bundles: list[Bundle]
    free: list[Bundle]

    def of_role(self, role: str) -> Room:
        """The same room with the bundles of one role free, because its actors are gone."""
        return replace(self, free=[bundle for bundle in self.bundles if bundle.role == role])


@contextmanager
def reserved(bundles: list[Bundle], settings: RayConfig) -> Iterator[Room]:
    """Room for the bundles, for the time of a `with` block.

    Raises:
        ResourceError: the cluster didn't have the room within `ray.placement_timeout_seconds`.
    """
    group = placement_group([_resources(bundle) for bundle in bundles if _resources(bundle)], strategy=settings.placement_strategy)
    try:
        patience = _patience(bundles, settings)
        ready, _ = ray.wait([group.ready()], timeout=patience)
        if not ready:
            cpus, gpus = total_resources(bundles)
            have = ray.cluster_resources()
            raise ResourceError(
                f"the run needs {cpus:g} CPUs and {gpus:g} GPUs, but the Ray cluster has {have.get('CPU', 0):g} CPUs and {have.get('GPU', 0):g} "
                "GPUs in all; lower cpus_per_actor, gpus_per_actor or num_actors of a role, or free resources (waited "
                f"{patience:g} s, ray.placement_timeout_seconds)"
            )
        yield Room(group, bundles, bundles)
    finally:
        if not isinstance(sys.exc_info()[1], HeadGone) and head_answers():  # else Ray would wait for the head, and then end this process
            remove_placement_group(group)


def _patience(bundles: list[Bundle], settings: RayConfig) -> float:
    """Seconds to wait for room: 1 when the whole cluster, empty, would not have it and can't grow by itself."""
    cpus, gpus = total_resources(bundles)
    have = ray.cluster_resources()
    fits = have.get("CPU", 0) >= cpus and have.get("GPU", 0) >= gpus
    return settings.placement_timeout_seconds if fits or settings.autoscaling else 1.0


def _resources(bundle: Bundle) -> dict[str, float]:
    return {name: amount for name, amount in (("CPU", bundle.cpus), ("GPU", bundle.gpus)) if amount > 0}


def spawn(cls: type[Actor], bundle: Bundle, room: Room, environment: dict[str, str], *args, run_folder: str, role: str | None = None) -> ActorHandle:
    """Create one named actor in its bundle. It works in this process's folder, so that relative paths mean the same to both.

    Args:
        environment: variables of its process.
        args: of its constructor.
        run_folder: where its log goes.
        role: for the actor's name, where it is not the bundle's own.
    """
    variables = environment | driver_folders()
    name = f"{role or bundle.role}-{bundle.index}"
    options: dict = {"name": name, "num_cpus": bundle.cpus, "num_gpus": bundle.gpus, "runtime_env": runtime_env(variables)}
    if _resources(bundle):
        place = [b for b in room.bundles if _resources(b)].index(bundle)
        options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(room.group, placement_group_bundle_index=place)
    handle = ray.remote(cls).options(**options).remote(*args)
    introduce(handle, name, Path(run_folder).resolve() / "logs" / f"{cls.role}-{bundle.index}.log")
    return handle


def wait_until_ready(
    actors: dict[str, list[ActorHandle]], timeout_seconds: float, show: Callable[[Mapping[str, str]], None] = lambda states: None
) -> dict[str, list[int]]:
    """Wait for the constructors of all actors and return, by role, the process ids of those on this node.

    Args:
        show: is told every second what each actor does, by its name: `importing`, `loading` or `ready`.

    Raises:
        RoleDied, ResourceError: one of them failed, or the time limit passed.
    """
    started = time.time()
    pending = {role: [handle.ready.remote() for handle in handles] for role, handles in actors.items()}
    late = {ref: handle for role, refs in pending.items() for ref, handle in zip(refs, actors[role], strict=True)}
    handles = dict(late)
    while late:
        done, _ = ray.wait(list(late), num_returns=len(late), timeout=1.0)
        get(done, what="the start of the actors")  # raises what went wrong
        late = {ref: handle for ref, handle in late.items() if ref not in done}
        show({known(handle)[0]: "ready" if ref not in late else _state_at_start(known(handle)[1], started) for ref, handle in handles.items()})
        if late and time.time() - started > timeout_seconds:
            name, log = known(next(iter(late.values())))
            raise ResourceError(f"{name} did not start within {timeout_seconds:g} seconds (rollout.start_timeout_seconds); its log is {log}")
    here = ray.get_runtime_context().get_node_id()
    found = {role: get(refs, what=f"the start of {role}") for role, refs in pending.items()}
    return {role: [pid for node, pid in places if node == here] for role, places in found.items()}


def _state_at_start(log: Path, started: float) -> str:
    """An actor's log begins when its libraries are imported."""
    return "loading" if log.exists() and log.stat().st_mtime >= started else "importing"


def stop(handles: list[ActorHandle]) -> None:
    """Stop actors and wait until they are gone: only then are their names and resources free."""
    for handle in handles:
        ray.kill(handle)
    for handle in handles:
        while True:
            try:
                ray.get(handle.ready.remote())
            except RayActorError:
                break
            time.sleep(0.05)
