"""Memory and logs of actors on a real Ray cluster."""

import os
from pathlib import Path

import psutil
import pytest

from dvpo_ray.monitoring.logs import redirect_process_output
from dvpo_ray.monitoring.memory import PeakMemory

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

    ray.init(num_cpus=1, include_dashboard=False, configure_logging=False, log_to_driver=False)
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


def test_output_of_an_actor_goes_to_its_file(worker, tmp_path):
    import ray

    ray.get(worker.talk.remote(tmp_path / "logs" / "worker-0.log"))
    assert (tmp_path / "logs" / "worker-0.log").read_text().splitlines() == ["from print", "from a child"]
