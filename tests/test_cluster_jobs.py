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

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
RUN = """
import sys
import ray
from dvpo_ray import cli
from dvpo_ray.config.schema import RayConfig
from dvpo_ray.planning.placement import Seat
from dvpo_ray.runtime.cluster import connect
from dvpo_ray.runtime.process import Actor
from dvpo_ray.runtime.room import reserved, spawn
from dvpo_ray.runtime.waiting import get

def run(args):
    config, seat = RayConfig(), Seat("experience", 0, 1)
    with connect(config), reserved([seat], config) as room:
        actor = spawn(Actor, seat, room, {}, 0, sys.argv[1], run_folder=sys.argv[1])
        try:
            get(actor.ready.remote(), what="the start")
            print("started", flush=True)
            get(actor.observe.remote(lambda _: __import__("time").sleep(600)), what="step 3")
        finally:
            ray.kill(actor)

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
        cluster.start(f"--num-gpus=2 --head --port={cluster.port} --dashboard-port={cluster.dashboard}")
        cluster.wait_for("ray job list", "[]")
        yield cluster
    finally:
        cluster.kill()
        shutil.rmtree(folder, ignore_errors=True)


def test_the_commands_of_the_docs_with_a_token(cluster):
    docs = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    for line in ("export RAY_AUTH_MODE=token", "ray get-auth-token --generate", "ray start --address=HEAD:6379", "ray job stop ID"):
        assert f"\n{line}" in docs
    cluster.start(f"--num-gpus=2 --address={cluster.address}")
    config = ROOT / "cluster_configs" / "stories-cpu.yaml"
    wrong = f"{config} ray.num_cpus=1 model.path={cluster.folder}/none"  # too small for this machine, and no model
    submitted = cluster.command(f"bash {ROOT}/launch/submit.sh {wrong}", RAY_AUTH_MODE="", DVPO_VENV=sys.prefix)
    assert submitted.returncode == 2, submitted.stdout + submitted.stderr
    assert f"dvpo: model.path {cluster.folder}/none: no such checkpoint folder" in submitted.stdout
    job = re.search(r"dvpo-\d+-\d+-\d+", submitted.stdout)[0]
    assert f"Job '{job}' failed" in cluster.command(f"ray job status {job}").stdout
    assert "dvpo: " in cluster.command(f"ray job logs {job}").stdout
    wait = re.search(r"^wait=('.*')$", (ROOT / "launch" / "submit.sh").read_text(encoding="utf-8"), re.MULTILINE)[1]
    (cluster.folder / "long.sh").write_text("trap 'sleep 5; echo ended in order; exit' TERM\necho begun\nsleep 600 & wait\n")
    cluster.command(f"ray job submit --no-wait --submission-id long --runtime-env-json {wait} -- bash {cluster.folder}/long.sh")
    cluster.wait_for("ray job logs long", "begun")
    cluster.command("ray job stop long")
    assert "Job 'long' was stopped" in cluster.command("ray job status long").stdout
    assert "ended in order" in cluster.command("ray job logs long").stdout
    cluster.wait_for("ray status", "/2.0 CPU")  # the second node has joined


def test_slots_are_the_gpus_in_the_order_of_nodes_and_numbers(cluster, tmp_path):
    script = """
import sys
from dvpo_ray.config.schema import RayConfig
from dvpo_ray.planning.placement import Seat
from dvpo_ray.runtime.cluster import connect
from dvpo_ray.runtime.process import Actor
from dvpo_ray.runtime.room import reserved, spawn, stop, wait_until_ready
from dvpo_ray.runtime.waiting import get

def sees(actor):
    import os, ray
    return os.environ["CUDA_VISIBLE_DEVICES"], ray.get_runtime_context().get_node_id()

config = RayConfig(placement_strategy="SPREAD")
seats = [Seat("rollout", 0, 0.5, (0, 1)), Seat("rollout", 1, 0, (2, 3)), *(Seat("learner", i, 0.1, (i,)) for i in range(4))]
with connect(config), reserved(seats, config) as room:
    actors = [spawn(Actor, seat, room, {}, seat.index, sys.argv[1], run_folder=sys.argv[1]) for seat in seats]
    wait_until_ready({seat.name: [actor] for seat, actor in zip(seats, actors)}, 120)
    (a, node), (b, other), *learners = [get(actor.observe.remote(sees), what="a look") for actor in actors]
    assert (a, b) == ("0,1", "0,1") and node != other, (a, b, node, other)
    assert learners == [("0", node), ("1", node), ("0", other), ("1", other)], learners
    stop(actors)
print("as planned")
"""
    (tmp_path / "slots.py").write_text(script)
    done = cluster.command(f"python {tmp_path}/slots.py {tmp_path}", RAY_ADDRESS=cluster.address)
    assert done.stdout.endswith("as planned\n"), done.stdout + done.stderr


def look(cluster: Cluster, folder: Path, config: str, **environment: str) -> str:
    """What a command says of the Ray that it gets with these settings of `ray`, and the CPUs there."""
    script = (
        "import ray\nfrom dvpo_ray.config.schema import RayConfig\nfrom dvpo_ray.runtime.cluster import connect\n"
        f"with connect(RayConfig({config}), print): print(ray.get(ray.remote(lambda: 'works').remote()), ray.cluster_resources()['CPU'])\n"
    )
    (folder / "look.py").write_text(script)
    done = cluster.command(f"python {folder}/look.py", RAY_AUTH_MODE="", **environment)
    assert done.returncode == 0 and not done.stderr, done.stdout + done.stderr
    return done.stdout


def test_a_local_run_is_local_beside_a_head_that_lives_or_died(cluster, tmp_path):
    joined = rf"Ray: joined the cluster at [\d.]+:{cluster.port}, \d nodes? with \d CPUs? and \d GPUs?, dashboard at http://\S+\nworks [12].0\n"
    assert re.fullmatch(joined, look(cluster, tmp_path, f"address='{cluster.address}'"))
    log = tmp_path / "log"
    words = [sys.executable, "-c", RUN, str(tmp_path)]
    environment = cluster.shell | {"RAY_ADDRESS": cluster.address}
    run = subprocess.Popen(words, env=environment, cwd=tmp_path, stdout=log.open("w"), stderr=subprocess.STDOUT)
    while "started" not in log.read_text():
        assert run.poll() is None, log.read_text()
        time.sleep(0.2)
    local = r"Ray: started on this machine with 3 CPUs and 0 GPUs, logs in /\S+/logs, metrics at http://\S+/metrics\nworks 3.0\n"
    assert re.fullmatch(local, look(cluster, tmp_path, "num_cpus=3, object_store_gib=0.1"))
    cluster.kill()
    assert (cluster.folder / "ray" / "ray_current_cluster").exists()
    assert re.fullmatch(local, look(cluster, tmp_path, "num_cpus=3, object_store_gib=0.1"))
    assert run.wait(50) == 2
    told = log.read_text().splitlines()
    assert told[-1].startswith("dvpo: Ray's head at ") and len(told) == 3, told


def test_a_machine_too_busy_for_rays_agents(cluster, tmp_path):
    """Ray's agent starts so late that the raylet alone would give up."""
    slow = "import sys, time\nif any(word.endswith('/agent.py') for word in sys.orig_argv): time.sleep(60)\n"
    (tmp_path / "sitecustomize.py").write_text(slow)
    said = look(cluster, tmp_path, "num_cpus=1, object_store_gib=0.1", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert said.startswith("Ray: started on this machine with 1 CPU and") and said.endswith("works 1.0\n")
