"""Joining a cluster that is not there is one clear line, at once."""

from __future__ import annotations

import socket

import pytest

from dvpo_ray.config.schema import RayConfig
from dvpo_ray.errors import ResourceError
from dvpo_ray.orchestration.cluster import connect


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_nobody_at_the_address(scheme):
    address = f"{scheme}127.0.0.1:{free_port()}"
    with pytest.raises(ResourceError, match=f"no Ray cluster answers at {address}; start one"), connect(RayConfig(address=address)):
        pass
