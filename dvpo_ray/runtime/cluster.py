"""Joining or starting Ray."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

import ray
import torch

from dvpo_ray.config.schema import RayConfig
from dvpo_ray.errors import ResourceError
from dvpo_ray.runtime import fork_server
from dvpo_ray.runtime.termination import keeps_termination
from dvpo_ray.runtime.waiting import patience

START_PATIENCE = "RAY_raylet_start_wait_time_s"
"""The environment variable with the seconds that Ray waits for its own node to start."""


@contextmanager
def connect(config: RayConfig) -> Iterator[None]:
    """Ray for the time of a `with` block: this process's session, the cluster at an address, or a new one on this machine.

    Raises:
        ResourceError: no cluster answers at the address.
    """
    if ray.is_initialized():
        yield
        return
    address = config.address or os.environ.get("RAY_ADDRESS")
    quiet = {"log_to_driver": False, "logging_level": "WARNING"}
    with keeps_termination():
        if address:
            _join(address, quiet)
        else:
            _start_local(config, quiet)
    try:
        with patience(seconds=config.wait_timeout_seconds), nullcontext() if address else fork_server.in_use():
            yield
    finally:
        ray.shutdown()


def _join(address: str, options: dict) -> None:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if host and port.isdigit():  # Ray itself would try for minutes before it gives up
            socket.create_connection((host.strip("[]"), int(port)), timeout=20).close()
        ray.init(address=address, **options)
    except (ConnectionError, TimeoutError, socket.gaierror) as error:
        raise ResourceError(f"no Ray cluster answers at {address}; start one with `ray start --head`, or unset ray.address") from error
    except ValueError as error:
        raise ResourceError(f"'{address}' is not the address of a Ray cluster; expected HOST:PORT, ray://HOST:PORT or auto in RAY_ADDRESS") from error


def _start_local(config: RayConfig, options: dict) -> None:
    # Ray warns that a new cluster asks for a token. This process and its actors have the token anyway.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")  # workers that none of our actors would use
    try:
        ray.init(
            num_cpus=config.num_cpus,
            num_gpus=config.num_gpus,
            object_store_memory=int(config.object_store_gib * 2**30) if config.object_store_gib else None,
            include_dashboard=config.dashboard,
            **options,
        )
    except Exception as error:  # Ray raises a bare Exception when its node takes longer than it allows
        if "timed out during startup" not in str(error):
            raise
        patience = os.environ.get(START_PATIENCE, "30")
        raise ResourceError(
            f"Ray did not start within its limit of {patience} seconds; the machine is overloaded: try again, or raise the limit with "
            f"{START_PATIENCE}=120 in the environment"
        ) from error


def check_gpus(wanted: Mapping[str, float], config: RayConfig) -> None:
    """Refuse GPUs that a cluster started by `connect` would not have, because this machine has no GPU.

    Args:
        wanted: number of GPUs by the key that asks for them.

    Raises:
        ResourceError: names the first such key.
    """
    joins = ray.is_initialized() or config.address or os.environ.get("RAY_ADDRESS")
    key = next((key for key, gpus in wanted.items() if gpus > 0), None)
    if joins or key is None or torch.cuda.is_available():
        return
    raise ResourceError(
        f"{key} is {wanted[key]:g}, but this machine has no GPU that torch can use; set {key}=0 (cluster_configs/local-cpu.yaml is for CPUs), "
        "or ray.address to a cluster with GPUs"
    )
