"""Workers as forks of one process: they have their client's arguments, environment and streams, and the server outlives bad clients."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dvpo_ray.runtime import fork_client, fork_server

SCRIPT = """
import os, sys, time
begun = time.perf_counter()
import torch
from dvpo_ray.models import loading
print(sys.argv[1:], os.environ["NAME"], os.getcwd(), torch.get_num_threads(), torch._dynamo.config.disable, time.perf_counter() - begun < 0.5)
assert os.getpgid(0) == os.getpid()  # Ray ends the whole group of a worker that has died
print("to stderr", file=sys.stderr)
sys.exit(3)
"""


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server that has loaded one module of ours beside torch, and its folder of sockets."""
    folder = Path(f"/tmp/dvpo-test-{os.getpid()}")
    folder.mkdir()
    load = "from pathlib import Path; from dvpo_ray.runtime import fork_server as f; f.COMMON = ('dvpo_ray.models.loading',)"
    serve = f"{load}; f.serve(Path({str(folder)!r}), {os.getpid()}, False)"
    process = subprocess.Popen([sys.executable, "-c", serve])
    while not (folder / "common").exists() and process.poll() is None:
        time.sleep(0.05)
    yield process, folder / "common"
    process.terminate()
    process.wait()
    assert not folder.exists()


def client(sockets: str, script: Path, **variables: str) -> subprocess.CompletedProcess:
    words = [sys.executable, "-S", "-s", "-E", fork_client.__file__, str(script), "one", "two"]
    environment = os.environ | {fork_client.SOCKETS: sockets, "NAME": "mine", "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(words, env=environment, cwd=script.parent, capture_output=True, text=True, check=False)


def test_a_worker_is_a_fork_with_what_its_client_was_started_with(server, tmp_path):
    process, path = server
    (tmp_path / "worker.py").write_text(SCRIPT)
    for disabled in ("0", "1"):
        done = client(f"/no/such/socket:{path}", tmp_path / "worker.py", TORCHDYNAMO_DISABLE=disabled)
        told = f"['one', 'two'] mine {tmp_path} 1 {disabled == '1'} True\n"
        assert (done.stdout, done.stderr) == (told, "to stderr\n")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as silent:
        silent.connect(str(path))
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as torn:
        torn.connect(str(path))
        torn.sendall(b"\0\0\1\0{")
    assert client(str(path), tmp_path / "worker.py").stderr == "to stderr\n" and process.poll() is None


def test_without_a_server_python_runs_the_script(tmp_path):
    (tmp_path / "worker.py").write_text("import sys; print(sys.argv[1:]); sys.exit(4)")
    done = client("/no/such/socket", tmp_path / "worker.py")
    assert (done.returncode, done.stdout) == (4, "['one', 'two']\n")


def test_only_workers_of_a_ray_on_this_machine_are_forks(monkeypatch):
    plain = {"env_vars": {"A": "1"}}
    assert fork_server.runtime_env({"A": "1"}) == plain
    monkeypatch.setattr(fork_server, "_server", (None, Path("/tmp/x")))
    assert fork_server.runtime_env({"A": "1"}) == plain
    with fork_server.in_use():
        assert fork_server.runtime_env({"A": "1"})["env_vars"] == {"A": "1", fork_client.SOCKETS: "/tmp/x/common"}
        assert fork_server.runtime_env({"TORCHDYNAMO_DISABLE": "1"})["env_vars"][fork_client.SOCKETS] == "/tmp/x/vllm:/tmp/x/common"
    assert fork_server.runtime_env({"A": "1"}) == plain
