"""What every actor has: its process's threads and folder, a log file, busy time and memory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import psutil
import ray

import dvpo_ray
from dvpo_ray.config.schema import PolicyConfig, RoleConfig, RolloutConfig
from dvpo_ray.errors import ResourceError
from dvpo_ray.monitoring.logs import redirect_process_output
from dvpo_ray.runtime.fork_client import PROCESS_WIDE

T = TypeVar("T")

ON_GPUS = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
"""Variables of a process that computes on a GPU. Rows of many lengths leave no gaps between segments that can grow."""

WORKING_FOLDER = "DVPO_WORKING_FOLDER"
"""Environment variable with the driver's working folder. Processes of a running cluster start in the folder where the cluster was
started, and there the relative paths of a config would mean something else."""


PACKAGE_FOLDER = "DVPO_PACKAGE_FOLDER"
"""Environment variable with the folder of the driver's `dvpo_ray`. Ray puts the folder where a driver was started first on its
workers' search path, so a copy of the package in that folder would be used instead of the installed one."""


def driver_folders() -> dict[str, str]:
    """Environment variables that tell an actor where its driver works and where the driver's code is."""
    return {WORKING_FOLDER: os.getcwd(), PACKAGE_FOLDER: str(_package_folder())}


def _package_folder() -> Path:
    return Path(dvpo_ray.__file__).resolve().parent


def environment(role: RoleConfig) -> dict[str, str]:
    """Environment variables of an actor's process, to be set before it starts."""
    variables = {
        "OMP_NUM_THREADS": str(role.threads),
        "MKL_NUM_THREADS": str(role.threads),
        "KMP_BLOCKTIME": "0",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        **(ON_GPUS if role.gpus_per_actor else PROCESS_WIDE),
    }
    if isinstance(role, RolloutConfig | PolicyConfig):
        # vLLM's sleep and CUDA IPC both need memory that stays where it was allocated.
        variables.pop("PYTORCH_CUDA_ALLOC_CONF", None)
    if isinstance(role, RolloutConfig) and role.backend == "vllm":
        variables |= {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in the actor's own process, where weights arrive
            "VLLM_NO_USAGE_STATS": "1",
        }
        if role.gpus_per_actor == 0:
            variables["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        if role.gpus_per_actor == 0 and role.is_eager:
            # Otherwise vLLM still compiles a count over the logits: that takes half a minute and needs a C++ compiler.
            variables["TORCHDYNAMO_DISABLE"] = "1"
    return variables


def _enter_working_folder() -> None:
    folder = os.environ.get(WORKING_FOLDER, os.curdir)
    try:
        os.chdir(folder)
    except OSError as error:
        raise ResourceError(f"{folder}: {error.strerror} on this node; the folder of a run must be on a file system that all nodes share") from None


def _check_package() -> None:
    """Refuse to compute with another copy of the package than the driver's, if both are on this node."""
    mine = _package_folder()
    drivers = Path(os.environ.get(PACKAGE_FOLDER, mine))
    if drivers == mine or not drivers.is_dir():
        return
    in_its_place = "start the command in another folder" if mine.parent == Path.cwd() else f"start the cluster with PYTHONPATH={drivers.parent}"
    raise ResourceError(
        f"actors would run {mine}, but this command runs {drivers}; to run the first, put PYTHONPATH={mine.parent} before the command; "
        f"to run the second, {in_its_place} (Ray's workers look first in the folder where a command starts)"
    )


class BusyClock:
    """Seconds that an actor has computed since the last call of `read_and_reset`."""

    def __init__(self) -> None:
        self._seconds = 0.0

    @contextmanager
    def busy(self):
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds += time.perf_counter() - started

    def read_and_reset(self) -> float:
        seconds, self._seconds = self._seconds, 0.0
        return seconds


class Actor:
    """Base of every role: its name, its log file, its busy time and memory.

    Args:
        index: number of the actor within its role.
        run_folder: the run's folder on a file system that all nodes share; logs go to its `logs/`.
    """

    role = "actor"

    def __init__(self, index: int, run_folder: str) -> None:
        self.index = index
        self.run_folder = Path(run_folder)
        self.clock = BusyClock()
        _enter_working_folder()
        _check_package()
        redirect_process_output(self.run_folder / "logs" / f"{self.role}-{index}.log")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.index})"

    def ready(self) -> tuple[str, int]:
        """Ray's id of this node and the process id; the answer comes when the constructor is done."""
        return ray.get_runtime_context().get_node_id(), os.getpid()

    def stats(self) -> dict[str, float]:
        """Busy seconds since the last call, and memory in GiB: the GPU's peak, or without a GPU the resident memory."""
        import torch

        gib = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else psutil.Process().memory_info().rss / 2**30
        return {"busy_seconds": self.clock.read_and_reset(), "memory_gib": gib}

    def release(self) -> None:
        """Give the memory that torch keeps for later back to the GPU, for the others on it."""
        import torch

        torch.cuda.empty_cache()

    def gpu_memory(self) -> tuple[int, int, int]:
        """Bytes of this process's first GPU: those that are free, all, and those that torch has in this process."""
        import torch

        return *torch.cuda.mem_get_info(), torch.cuda.memory_reserved()

    def observe(self, function: Callable[..., T], *args) -> T:
        """Call a function with this actor and return what it returns: how a benchmark or a debugger looks inside."""
        return function(self, *args)
