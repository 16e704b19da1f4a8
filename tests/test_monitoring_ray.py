"""Memory and logs of actors, and the metrics of a run, on a real Ray cluster."""

import os
import re
import time
import urllib.request
from pathlib import Path

import psutil
import pytest

from dvpo_ray.monitoring.logs import redirect_process_output
from dvpo_ray.monitoring.memory import PeakMemory
from dvpo_ray.monitoring.metrics import MetricsLog

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def worker():
    """An actor that holds memory and talks, on a cluster started here."""
    import ray

    class Worker:
        def hold(self, mib: int) -> int:
            self.block = bytearray(mib << 20)
            return os.getpid()

        def talk(self, log: Path) -> None:
            redirect_process_output(log)
            print("from print")
            os.system("echo from a child")

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_metrics_report_interval_ms", "500")
        ray.init(address="local", num_cpus=1, include_dashboard=False, configure_logging=False, log_to_driver=False)
    yield ray.remote(num_cpus=1)(Worker).remote()
    ray.shutdown()


def test_workers_of_a_cluster_started_here_count(worker):
    import ray

    pid = ray.get(worker.hold.remote(256))
    alone = PeakMemory([pid]).sample()
    assert alone > 0.25
    assert pid in {child.pid for child in psutil.Process().children(recursive=True)}
    with PeakMemory() as memory:
        memory.add_pids([pid])
    assert memory.peak_gib > alone


def test_the_last_metrics_are_in_rays_prometheus_endpoint(worker, tmp_path):
    import ray

    port = ray.nodes()[0]["MetricsExportPort"]
    with MetricsLog(tmp_path, config={"name": "night"}) as log:
        log.write(1, {"policy/loss": 0.5, "memory/learner_gib": 2.0})
        log.write(2, {"policy/loss": 0.25})
        wanted = {("ray_dvpo_policy_loss", ""): 0.25, ("ray_dvpo_memory_gib", "learner"): 2, ("ray_dvpo_step", ""): 2}
        seen: dict = {}
        ends = time.monotonic() + 60
        while seen != wanted and time.monotonic() < ends:
            time.sleep(0.5)
            page = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
            lines = re.findall(r'^(ray_dvpo_\w+)\{(.*run="night".*)\} (\S+)$', page, re.MULTILINE)
            seen = {(name, "".join(re.findall(r'role="(\w+)"', labels))): float(value) for name, labels, value in lines}
        assert seen == wanted


def test_output_of_an_actor_goes_to_its_file(worker, tmp_path):
    import ray

    ray.get(worker.talk.remote(tmp_path / "logs" / "worker-0.log"))
    assert (tmp_path / "logs" / "worker-0.log").read_text().splitlines() == ["from print", "from a child"]
