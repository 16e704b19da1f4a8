"""Where a run finds its Ray, and what it says when there is none, or when Ray does not start."""

from __future__ import annotations

import socket
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import ray

from dvpo_ray.config.schema import RayConfig
from dvpo_ray.errors import HeadGone, ResourceError
from dvpo_ray.runtime import cluster, waiting
from dvpo_ray.runtime.cluster import LOCAL_SETTINGS, connect
from dvpo_ray.runtime.waiting import get, patience


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_nobody_at_the_address(scheme):
    address = f"{scheme}127.0.0.1:{free_port()}"
    with pytest.raises(ResourceError, match=f"no Ray cluster answers at {address}; start one"), connect(RayConfig(address=address)):
        pass


def test_a_cluster_in_the_environment_whose_address_is_none(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "nonsense")
    told = "'nonsense' is not the address of a Ray cluster; expected HOST:PORT.* in RAY_ADDRESS"
    with pytest.raises(ResourceError, match=told), connect(RayConfig()):
        pass


class SlowRay:
    """`ray.init` that times out so many times and then starts; it keeps the arguments of each call."""

    def __init__(self, monkeypatch, times: int) -> None:
        self.times, self.calls = times, []
        monkeypatch.setattr(ray, "init", self.init)
        monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 3.0})
        monkeypatch.setattr(cluster, "_own_ray", nullcontext)
        for name in ("RAY_ADDRESS", "RAY_TMPDIR", "TMPDIR", *LOCAL_SETTINGS):
            monkeypatch.setenv(name, "")  # so that the values which `connect` sets are undone
            monkeypatch.delenv(name)

    def init(self, **options):
        self.calls.append(options)
        if len(self.calls) <= self.times:
            raise Exception("The current node timed out during startup. This could happen because ...")
        info = {"gcs_address": "10.0.0.1:6379", "session_dir": "/tmp/ray/session_1", "metrics_export_port": options["_metrics_export_port"]}
        return SimpleNamespace(address_info=info, dashboard_url="127.0.0.1:8265" if options["include_dashboard"] else "")


def test_a_local_run_is_local_and_says_so(monkeypatch):
    slow, said = SlowRay(monkeypatch, times=0), []
    with connect(RayConfig(num_cpus=3, dashboard=True), said.append):
        pass
    port = slow.calls[0]["_metrics_export_port"]
    assert slow.calls[0]["address"] == "local" and slow.calls[0]["num_cpus"] == 3
    assert said == [
        "Ray: started on this machine with 3 CPUs and 0 GPUs, logs in /tmp/ray/session_1/logs, "
        f"metrics at http://127.0.0.1:{port}/metrics, dashboard at http://127.0.0.1:8265"
    ]


@pytest.mark.parametrize("address", [None, "local"])
def test_local_is_an_address_too(monkeypatch, address):
    slow = SlowRay(monkeypatch, times=0)
    monkeypatch.setenv("RAY_ADDRESS", "" if address is None else "127.0.0.1:9")
    with connect(RayConfig(address=address)):
        assert slow.calls[0]["address"] == "local"


def test_a_start_that_takes_too_long_is_tried_once_more(monkeypatch):
    slow, said = SlowRay(monkeypatch, times=1), []
    with connect(RayConfig(), said.append):
        pass
    assert len(slow.calls) == 2 and said[0] == "Ray did not start within 120 seconds: the machine is busy; trying once more"
    assert said[1].startswith("Ray: started on this machine with 3 CPUs")


@pytest.mark.parametrize(("setting", "limit", "advice"), [(None, "120", "240"), ("300", "300", "600")])
def test_a_machine_that_is_too_slow_is_one_line_with_a_larger_limit(monkeypatch, setting, limit, advice):
    slow = SlowRay(monkeypatch, times=2)
    if setting is not None:
        monkeypatch.setenv("RAY_raylet_start_wait_time_s", setting)
    told = f"did not start, twice, within {limit} seconds: .*RAY_raylet_start_wait_time_s={advice} in the environment"
    with pytest.raises(ResourceError, match=told), connect(RayConfig()):
        pass
    assert len(slow.calls) == 2


def test_other_errors_of_the_start_keep_their_traceback(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", lambda **options: 1 // 0)
    with pytest.raises(ZeroDivisionError), connect(RayConfig()):
        pass


def test_a_temporary_folder_too_long_for_rays_sockets_is_refused_before_the_start(monkeypatch):
    slow = SlowRay(monkeypatch, times=0)
    monkeypatch.setenv("TMPDIR", "/" + "t" * 99)
    with pytest.raises(ResourceError, match=r"^/t+ has 100 bytes, Ray's sockets allow \d\d; set RAY_TMPDIR to"), connect(RayConfig()):
        pass
    assert not slow.calls


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("happens", [ray.exceptions.GetTimeoutError(), ray.exceptions.RayActorError(error_msg="The actor died.")])
def test_a_wait_looks_whether_the_head_is_there(monkeypatch, happens, there):
    def fail(*_args, timeout, **_options):
        threading.Event().wait(timeout)
        raise happens

    monkeypatch.setattr(ray, "get", fail)
    monkeypatch.setattr(waiting, "HEAD_PERIOD_SECONDS", 0.01)
    monkeypatch.setattr(waiting.time, "sleep", lambda seconds: None)
    with socket.socket() as head:
        head.bind(("127.0.0.1", 0))
        if there:
            head.listen()
        address = f"127.0.0.1:{head.getsockname()[1]}"
        with patience(head=address), pytest.raises(ResourceError) as raised:
            get([], what="step 3", timeout_seconds=0.1)
    assert isinstance(raised.value, HeadGone) is not there
    if not there:
        assert str(raised.value) == f"Ray's head at {address} was gone during step 3: its processes have ended, or the network to it is down"


def test_a_node_without_memory_is_one_line(monkeypatch):
    def killed(*_args, **_options):
        raise ray.exceptions.OutOfMemoryError("2 worker(s) were killed due to the node running low on memory.\nOOM kill reason: ...")

    monkeypatch.setattr(ray, "get", killed)
    with pytest.raises(ResourceError, match=r"^the start of rollout: 2 worker\(s\) were killed .* low on memory; use fewer"):
        get([], what="the start of rollout")
