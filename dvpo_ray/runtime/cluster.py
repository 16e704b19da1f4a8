"""Joining or starting Ray."""

from __future__ import annotations

import logging
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from unittest import mock

import psutil
import ray
import ray._private.parameter
import ray._private.services
import torch
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray._private.parameter import RayParams
from ray._private.ray_constants import PROCESS_TYPE_RAYLET

from dvpo_ray.config.arithmetic import counted
from dvpo_ray.config.schema import RayConfig
from dvpo_ray.errors import ResourceError
from dvpo_ray.planning.placement import joined_address, no_gpu
from dvpo_ray.runtime import fork_server, reaper
from dvpo_ray.runtime.doctor import check_ray_folder, ray_temporary_folder
from dvpo_ray.runtime.termination import keeps_termination
from dvpo_ray.runtime.waiting import patience, tell

START_PATIENCE = "RAY_raylet_start_wait_time_s"
"""The environment variable with the seconds that Ray waits for its own node to start."""

LOCAL_SETTINGS = {
    START_PATIENCE: "120",
    "RAY_gcs_server_port_wait_time_s": "120",
    "RAY_agent_register_timeout_ms": "300000",
    "RAY_worker_register_timeout_seconds": "300",
    "RAY_prestart_worker_first_driver": "0",  # workers that none of our actors would use
}
"""Environment variables of a local Ray that are not set: what its start may take on a busy machine, where Ray's own limits are 30 seconds,
and 60 for a worker."""


@contextmanager
def connect(config: RayConfig, say: Callable[[str], None] = tell) -> Iterator[None]:
    """Ray for the time of a `with` block: this process's session, the cluster at an address, or a new one on this machine.

    Args:
        say: gets the line that tells which it is and where, and one for each start that is tried again.

    Raises:
        ResourceError: no cluster answers at the address, or Ray does not start.
    """
    if ray.is_initialized():
        yield
        return
    address = joined_address(config)
    quiet = {"log_to_driver": False, "logging_level": "WARNING"}
    # Ray warns that a cluster asks for a token. This process and its actors have the token anyway.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    with keeps_termination():
        line, head = _join(address, quiet) if address else _start_local(config, quiet, say)
    try:
        say(line)
        with patience(seconds=config.wait_timeout_seconds, head=head), nullcontext() if address else _own_ray():
            yield
    finally:
        ray.shutdown()


@contextmanager
def _own_ray() -> Iterator[None]:
    """Within this context workers are forks, and what Ray has started ends soon after a driver that is killed."""
    session = ray._private.worker._global_node.get_session_dir_path()
    words = [sys.executable, "-S", "-s", "-E", reaper.__file__, session]
    reaping = subprocess.Popen(words, stdin=subprocess.PIPE, start_new_session=True)
    try:
        with fork_server.in_use():
            yield
    finally:
        reaping.kill()
        reaping.wait()
        reaping.stdin.close()


def _join(address: str, options: dict) -> tuple[str, str]:
    """Join a cluster; returns the line that says so, and the address of its head."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)  # Ray itself does this for `auto` alone
    try:
        if host and port.isdigit():  # Ray itself would try for minutes before it gives up
            socket.create_connection((host.strip("[]"), int(port)), timeout=20).close()
        context = ray.init(address=address, **options)
    except (ConnectionError, TimeoutError, socket.gaierror) as error:
        raise ResourceError(
            f"no Ray cluster answers at {address}; start one with `ray start --head`, or unset ray.address and RAY_ADDRESS for a local run"
        ) from error
    except ValueError as error:
        raise ResourceError(f"'{address}' is not the address of a Ray cluster; expected HOST:PORT, ray://HOST:PORT or auto in RAY_ADDRESS") from error
    nodes = sum(node["Alive"] for node in ray.nodes())
    head = address.removeprefix("ray://") if "://" in address else context.address_info["gcs_address"]
    return f"Ray: joined the cluster at {head}, {counted(nodes, 'node')} with {_resources()}{_dashboard(context)}", head


def _start_local(config: RayConfig, options: dict, say: Callable[[str], None]) -> tuple[str, str]:
    """Start Ray on this machine; returns the line that says so, and the address of its head."""
    folder = check_ray_folder(ray_temporary_folder())
    if folder.status == "fail":
        raise ResourceError(f"{folder.found}; {folder.advice}")
    for name, value in LOCAL_SETTINGS.items():
        os.environ.setdefault(name, value)
    limit = float(os.environ[START_PATIENCE])
    for last in (False, True):
        before = set(psutil.Process().children())
        try:
            with _own_ports() as metrics_port:
                context = ray.init(
                    address="local",
                    num_cpus=config.num_cpus,
                    num_gpus=config.num_gpus,
                    object_store_memory=int(config.object_store_gib * 2**30) if config.object_store_gib else None,
                    include_dashboard=config.dashboard,
                    _metrics_export_port=metrics_port,
                    **options,
                )
            break
        except Exception as error:  # Ray raises a bare Exception when its node takes longer than it allows
            if "timed out" not in str(error).lower():
                raise
            ray.shutdown()
            for process in set(psutil.Process().children()) - before:  # what did start; Ray would leave it until this process ends
                for one in [*process.children(recursive=True), process]:
                    one.kill()
            if last:
                raise ResourceError(
                    f"Ray did not start, twice, within {counted(limit, 'second')}: the machine is overloaded; end other programs, "
                    f"or allow more with {START_PATIENCE}={2 * limit:.0f} in the environment"
                ) from error
            say(f"Ray did not start within {counted(limit, 'second')}: the machine is busy; trying once more")
    info = context.address_info
    metrics = f"metrics at http://127.0.0.1:{info['metrics_export_port']}/metrics"
    line = f"Ray: started on this machine with {_resources()}, logs in {info['session_dir']}/logs, {metrics}{_dashboard(context)}"
    return line, info["gcs_address"]


@contextmanager
def _own_ports() -> Iterator[int]:
    """Ports for the agents of the node that `ray.init` starts in a `with` block; yields the one that is its argument.

    Ray's agents would choose their ports by themselves. But then the raylet waits for each of them for 15 seconds, which no setting
    changes, and ends itself when the machine is too busy for that.
    """
    with ExitStack() as probes:
        free: list[int] = []
        while len(free) < 4:
            probe = probes.enter_context(socket.socket())
            try:
                # Below the ports that the system gives to connections: nothing else should take them until the agents do.
                probe.bind(("", random.SystemRandom().randrange(20000, 32768)))
            except OSError:
                continue
            free.append(probe.getsockname()[1])
    metrics, listen, grpc, runtime_env = free
    start = ray._private.services.start_ray_process

    def start_process(command: list[str], process_type: str, **options):
        # Ray tells the agent this port, but not the raylet.
        told = [f"--dashboard_agent_listen_port={listen}"] if process_type == PROCESS_TYPE_RAYLET else []
        return start([*command, *told], process_type, **options)

    parameters = partial(
        RayParams,
        metrics_agent_port=grpc,
        dashboard_agent_listen_port=listen,
        runtime_env_agent_port=runtime_env,
        # Nothing here asks for the autoscaler or for a copy of the workers' output; each is a process to start.
        no_monitor=True,
        include_log_monitor=False,
    )
    with (
        mock.patch.object(ray._private.parameter, "RayParams", parameters),
        mock.patch.object(ray._private.services, "start_ray_process", start_process),
    ):
        yield metrics


def _resources() -> str:
    have = ray.cluster_resources()
    return f"{counted(have.get('CPU', 0), 'CPU')} and {counted(have.get('GPU', 0), 'GPU')}"


def _dashboard(context) -> str:
    return f", dashboard at http://{context.dashboard_url}" if context.dashboard_url else ""


def check_gpus(wanted: Mapping[str, float], config: RayConfig) -> None:
    """Refuse GPUs that a cluster started by `connect` would not have, because this machine has no GPU.

    Args:
        wanted: number of GPUs by the key that asks for them.

    Raises:
        ResourceError: names these keys.
    """
    joins = ray.is_initialized() or joined_address(config)
    wanted = {key: gpus for key, gpus in wanted.items() if gpus > 0}
    if wanted and not joins and not torch.cuda.is_available():
        raise ResourceError(no_gpu(wanted))
