"""Actors that start with their libraries loaded: on this machine one process imports them, and each actor's process is a fork of it.

Five actors that import torch, transformers and DeepSpeed beside each other take most of a start on a few cores. Ray starts its workers with
`fork_client` instead of Python; the client sends what it was started with to the server, which forks. Ray itself is not imported before the
fork, because it reads its settings from the environment when it is imported.

The server serves all runs of the process that started it, and ends with it. Without a server, `fork_client` starts Python. A machine with a GPU
has none: CUDA may not be initialised before a fork, and such machines have the cores to import everywhere.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from array import array
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from dvpo_ray.config.schema import Config
from dvpo_ray.planning.placement import joined_address
from dvpo_ray.runtime import fork_client

COMMON = (
    "dvpo_ray.data.encoding",
    "dvpo_ray.evaluation.judges",
    "dvpo_ray.gvm.dataset",
    "dvpo_ray.models.deepspeed",
    "dvpo_ray.models.forward",
    "dvpo_ray.models.loading",
    "dvpo_ray.models.trainable",
    "dvpo_ray.policy.losses",
)
VLLM = ("vllm.entrypoints.llm", "vllm.v1.worker.cpu_worker")

_PR_SET_PDEATHSIG = 1
_server: tuple[subprocess.Popen, Path] | None = None
_in_use = False


# ------------------------------------------------------------------------------------------------------- the driver


def prepare(config: Config) -> None:
    """Start the server of this process, unless it is there or the run joins a cluster. It loads its libraries while this process goes on."""
    global _server
    if joined_address(config.ray) or _server is not None or not sys.platform.startswith("linux") or Path("/dev/nvidiactl").exists():
        return
    vllm = config.rollout.backend == "vllm"
    folder = Path(tempfile.mkdtemp(prefix="dvpo-", dir="/tmp"))  # sockets need short paths
    words = [sys.executable, "-P", "-m", "dvpo_ray.runtime.fork_server", str(folder), str(os.getpid()), *(["vllm"] if vllm else [])]
    quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    # Its package is that of this process, also where the working folder holds another copy.
    path = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, **fork_client.PROCESS_WIDE}
    _server = subprocess.Popen(words, env=environment, start_new_session=True, **quiet), folder
    atexit.register(_stop)


@contextmanager
def in_use() -> Iterator[None]:
    """Within this context, which is that of a Ray cluster on this machine, workers are forks."""
    global _in_use
    before, _in_use = _in_use, True
    try:
        yield
    finally:
        _in_use = before


def runtime_env(variables: Mapping[str, str]) -> dict:
    """Ray's `runtime_env` of a worker with these environment variables."""
    if _server is None or not _in_use:
        return {"env_vars": dict(variables)}
    names = ("vllm", "common") if _without_compiler(variables) else ("common",)
    sockets = ":".join(str(_server[1] / name) for name in names)
    executable = f"{sys.executable} -S -s -E {fork_client.__file__}"
    return {"py_executable": executable, "env_vars": {**variables, fork_client.SOCKETS: sockets}}


def _without_compiler(variables: Mapping[str, str]) -> bool:
    """What vLLM's engine asks for on a CPU. Its functions are compiled or not from the moment when they are imported."""
    return variables.get("TORCHDYNAMO_DISABLE") == "1"


def _stop() -> None:
    global _server
    if _server is not None:
        process, folder = _server
        _server = None
        process.terminate()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


# ------------------------------------------------------------------------------------------------------- the server


def serve(folder: Path, driver: int, vllm: bool) -> None:
    """Load the libraries and fork for every client, until the driver ends."""
    _end_with(driver)
    signal.signal(signal.SIGTERM, lambda *_: (shutil.rmtree(folder, ignore_errors=True), os._exit(0)))
    sockets = {name: _listen(folder / name) for name in ("common", *(["vllm"] if vllm else []))}
    _load(COMMON)
    if vllm and os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _end_with(os.getppid())
        sys.modules["ray"] = None  # vLLM would import it
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
        _apply_environment()
        _load(VLLM)
        del sys.modules["ray"]
        _accept(sockets["vllm"])
    _accept(sockets["common"])


def _end_with(process: int) -> None:
    """Get SIGTERM when the process that started this one ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != process:
        os._exit(0)


def _listen(path: Path) -> socket.socket:
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    server.bind(str(path))
    server.listen(128)
    return server


def _load(modules: tuple[str, ...]) -> None:
    for name in modules:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # so that a fork's collections do not copy what it shares


def _accept(server: socket.socket) -> None:
    """Fork for every client, and tell it how its process ended."""
    clients: dict[int, socket.socket] = {}

    def reap(*_) -> None:
        while clients:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            if pid in clients:
                with clients.pop(pid) as client:
                    fork_client.send_status(client, os.waitstatus_to_exitcode(status))

    signal.signal(signal.SIGCHLD, reap)
    while True:
        client, _ = server.accept()
        request, descriptors = fork_client.receive(client)
        if request is None:  # Ray has killed it
            client.close()
        else:
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})
            pid = os.fork()
            if pid == 0:
                for inherited in (server, client, *clients.values()):
                    inherited.close()
                _become(request, descriptors)
            clients[pid] = client
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
        for descriptor in descriptors:
            os.close(descriptor)


def _become(request: dict, descriptors: array) -> None:
    """Run the client's script in this process, with what the client was started with."""
    os.setpgid(0, 0)  # Ray ends the whole process group of a worker that has died
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, request["blocked_signals"])
    for target, descriptor in enumerate(descriptors):
        os.dup2(descriptor, target)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    _apply_environment()
    sys.argv = request["arguments"]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        os._exit(0)


def _apply_environment() -> None:
    """Bring what torch read from the environment when it was imported to what is there now."""
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    torch._dynamo.config.disable = _without_compiler(os.environ)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]), "vllm" in sys.argv[3:])
