"""Joining a cluster that is not there is one clear line, at once."""

from __future__ import annotations

import socket

import pytest
import ray

from dvpo_ray.config.schema import RayConfig
from dvpo_ray.errors import ResourceError
from dvpo_ray.runtime.cluster import connect
from dvpo_ray.runtime.waiting import get


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_nobody_at_the_address(scheme):
    address = f"{scheme}127.0.0.1:{free_port()}"
    with pytest.raises(ResourceError, match=f"no Ray cluster answers at {address}; start one"), connect(RayConfig(address=address)):
        pass


def test_a_cluster_in_the_environment_whose_address_is_none(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "nonsense")
    told = "'nonsense' is not the address of a Ray cluster; expected HOST:PORT.* in RAY_ADDRESS"
    with pytest.raises(ResourceError, match=told), connect(RayConfig()):
        pass


def test_a_node_that_takes_too_long_names_the_limit(monkeypatch):
    def init(**options):
        raise Exception("The current node timed out during startup. This could happen because ...")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    told = "within its limit of 30 seconds; .*RAY_raylet_start_wait_time_s=120 in the environment"
    with pytest.raises(ResourceError, match=told), connect(RayConfig()):
        pass


def test_a_node_without_memory_is_one_line(monkeypatch):
    def killed(*_args, **_options):
        raise ray.exceptions.OutOfMemoryError("2 worker(s) were killed due to the node running low on memory.\nOOM kill reason: ...")

    monkeypatch.setattr(ray, "get", killed)
    with pytest.raises(ResourceError, match=r"^the start of rollout: 2 worker\(s\) were killed .* low on memory; use fewer"):
        get([], what="the start of rollout")
