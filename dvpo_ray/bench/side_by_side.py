"""Actors of the system and their bare counterparts, started beside each other with the same threads and devices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import ray
from ray.actor import ActorHandle

from dvpo_ray.config.schema import Config, RoleConfig
from dvpo_ray.planning.placement import Bundle
from dvpo_ray.runtime.process import Actor, environment
from dvpo_ray.runtime.room import reserved, spawn, wait_until_ready


@dataclass(frozen=True)
class Competitor:
    """An actor to start.

    Attributes:
        cls: its class.
        settings: the role that gives it CPUs, GPUs and threads.
        arguments: of the constructor, after config, index and run folder.
        shards: GPUs' multiple, for an engine that is sharded over several.
    """

    cls: type[Actor]
    settings: RoleConfig
    arguments: tuple = ()
    shards: int = 1


@contextmanager
def side_by_side(config: Config, run_folder: str, competitors: Sequence[Competitor]) -> Iterator[list[ActorHandle]]:
    """The actors, ready, for the time of a `with` block. They work in turns, so together they reserve the CPUs of the largest.

    Each has its own share of a GPU, so a GPU that they share must have room for all of them.

    Raises:
        ResourceError: the cluster has no room for them, or one did not start in time.
    """
    largest = max(competitor.settings.cpus_per_actor for competitor in competitors)
    cpus = max(largest / len(competitors), 0.01)  # a placement group can't be empty
    bundles = [Bundle(f"bench_{c.cls.role}", 0, cpus, c.settings.gpus_per_actor * c.shards) for c in competitors]
    handles: dict[str, list[ActorHandle]] = {}
    with reserved(bundles, config.ray) as room:
        try:
            for competitor, bundle in zip(competitors, bundles, strict=True):
                env = environment(competitor.settings)
                handles[bundle.role] = [spawn(competitor.cls, bundle, room, env, config, 0, run_folder, *competitor.arguments)]
            wait_until_ready(handles, config.rollout.start_timeout_seconds)
            yield [handle for (handle,) in handles.values()]
        finally:
            for (handle,) in handles.values():
                ray.kill(handle)
