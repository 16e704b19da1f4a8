"""A cluster on real processes: a head with a token, a second node, jobs, a local run beside the head, and the death of the head."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import ray

from dvpo_ray.config.schema import RayConfig
from dvpo_ray.runtime.cluster import connect

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
RUN = """
import sys
from pathlib import Path
from dvpo_ray import cli
from dvpo_ray.config.schema import RayConfig
from dvpo_ray.errors import ResourceError
from dvpo_ray.planning.placement import Bundle
from dvpo_ray.runtime.cluster import connect
from dvpo_ray.runtime.process import Actor
from dvpo_ray.runtime.room import reserved, spawn, stop
from dvpo_ray.runtime.waiting import get

def run(args):
    config, bundle = RayConfig(), Bundle("experience", 0, 1, 0)
    with connect(config), reserved([bundle], config) as room:
        actor = spawn(Actor, bundle, room, {}, 0, sys.argv[1], run_folder=sys.argv[1])
        try:
            get(actor.ready.remote(), what="the start")
            print("started", flush=True)
            get(actor.observe.remote(lambda _: __import__("time").sleep(600)), what="step 3")
        finally:
            stop([actor])

cli.COMMANDS["doctor"].run = run
sys.exit(cli.main(["doctor"]))
"""
"""A command whose only step lasts ten minutes."""


class Cluster:
    """A head in a home and a temporary folder of its own. Its commands run in shells that have what the docs export, and nothing else."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port, self.dashboard = (self._free_port() for _ in range(2))
        self.address = f"127.0.0.1:{self.port}"
        self.shell = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "HOME": str(folder),
            "RAY_TMPDIR": str(folder),
            "RAY_AUTH_MODE": "token",
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{self.dashboard}",
        }
        self.nodes: list[subprocess.Popen] = []

    @staticmethod
    def _free_port() -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return probe.getsockname()[1]

    def command(self, line: str, **changes: str) -> subprocess.CompletedProcess:
        environment = {name: value for name, value in (self.shell | changes).items() if value}
        return subprocess.run(["bash", "-c", line], env=environment, cwd=self.folder, capture_output=True, text=True, timeout=180, check=False)

    def start(self, options: str) -> None:
        words = f"ray start --block --disable-usage-stats --num-cpus=1 {options}".split()
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.nodes.append(subprocess.Popen(words, env=self.shell, cwd=self.folder, **quiet))

    def wait_for(self, line: str, said: str, seconds: float = 120) -> None:
        """Until a command says something."""
        ends = time.monotonic() + seconds
        while said not in (done := self.command(line)).stdout + done.stderr:
            assert time.monotonic() < ends, f"{line}: {done.stdout}{done.stderr}"
            time.sleep(0.5)

    def kill(self) -> None:
        """As a power cut does it."""
        for node in self.nodes:
            for process in [*psutil.Process(node.pid).children(recursive=True), node]:
                process.kill()
            node.wait()
        self.nodes = []


@pytest.fixture(scope="module")
def cluster():
    folder = Path(tempfile.mkdtemp(prefix="dvpo-", dir="/tmp"))  # Ray's sockets need a short path
    cluster = Cluster(folder)
    try:
        assert len(cluster.command("ray get-auth-token --generate").stdout) > 20
        cluster.start(f"--head --port={cluster.port} --dashboard-port={cluster.dashboard}")
        cluster.wait_for("ray job list", "[]")
        yield cluster
    finally:
        cluster.kill()
        shutil.rmtree(folder, ignore_errors=True)


def test_the_commands_of_the_docs_with_a_token(cluster):
    docs = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    for line in ("export RAY_AUTH_MODE=token", "ray get-auth-token --generate", "ray start --address=HEAD:6379", "ray job stop ID"):
        assert f"\n{line}" in docs
    cluster.start(f"--address={cluster.address}")
    config = ROOT / "cluster_configs" / "stories-cpu.yaml"
    wrong = f"{config} ray.num_cpus=1 gvm.path={cluster.folder}/none"  # too small here, and no value model
    submitted = cluster.command(f"bash {ROOT}/launch/submit.sh {wrong}", RAY_AUTH_MODE="", DVPO_VENV=sys.prefix)
    assert submitted.returncode == 2, submitted.stdout + submitted.stderr
    assert len(re.findall(r"^dvpo: .*/none", submitted.stdout, re.MULTILINE)) == 1
    job = re.search(r"dvpo-\d+-\d+-\d+", submitted.stdout)[0]
    assert "FAILED" in cluster.command(f"ray job status {job}").stdout
    assert "dvpo: " in cluster.command(f"ray job logs {job}").stdout
    cluster.command("ray job submit --no-wait --submission-id long -- sleep 600")
    cluster.wait_for("ray job status long", "RUNNING")
    cluster.command("ray job stop long")
    assert "STOPPED" in cluster.command("ray job status long").stdout
    cluster.wait_for("ray status", "2 node_")  # the second node has joined


def test_a_local_run_is_local_beside_a_head_that_lives_or_died(cluster, monkeypatch, tmp_path):
    for name in ("HOME", "RAY_TMPDIR"):
        monkeypatch.setenv(name, str(cluster.folder))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    said: list[str] = []
    with connect(RayConfig(address=cluster.address), said.append):
        assert ray.cluster_resources()["CPU"] == 2
    assert said[-1].startswith(f"Ray: joined the cluster at {cluster.address.replace('127.0.0.1', '')}".rstrip(":")[:32])

    log = (tmp_path / "log").open("w+")
    words = [sys.executable, "-c", RUN, str(tmp_path)]
    run = subprocess.Popen(words, env=cluster.shell | {"RAY_ADDRESS": cluster.address}, cwd=tmp_path, stdout=log, stderr=log)
    while "started" not in (tmp_path / "log").read_text():
        assert run.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.2)

    def is_local() -> bool:
        with connect(RayConfig(num_cpus=3, object_store_gib=0.1), said.append):
            return ray.cluster_resources()["CPU"] == 3 and said[-1].startswith("Ray: started on this machine with 3 CPUs")

    assert is_local()
    assert (cluster.folder / "ray" / "ray_current_cluster").exists()
    cluster.kill()
    assert is_local()
    assert run.wait(50) == 2
    told = (tmp_path / "log").read_text().splitlines()
    assert [line for line in told if line.startswith("dvpo: ")] == [told[-1]] and "Ray's head at" in told[-1] and len(told) == 3


def test_a_machine_too_busy_for_rays_agents(monkeypatch, tmp_path):
    """The agents start 20 seconds late; the raylet alone would give up after 15."""
    slow = "import sys, time\nif any(word.endswith('/agent.py') or word.endswith('/main.py') for word in sys.orig_argv): time.sleep(20)\n"
    (tmp_path / "sitecustomize.py").write_text(slow)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    said: list[str] = []
    with connect(RayConfig(num_cpus=1, object_store_gib=0.1), said.append):
        assert ray.get(ray.remote(os.getpid).options(runtime_env={"env_vars": {"A": "1"}}).remote()) != os.getpid()
    assert len(said) == 1 and said[0].startswith("Ray: started")
