"""Waits for actors: told while they last, limited, and one line when the actor is gone. Signals wait for the end of a step."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import ray

from dvpo_ray import cli
from dvpo_ray.config.schema import RayConfig
from dvpo_ray.errors import InputError, ResourceError, RoleDied
from dvpo_ray.runtime import waiting
from dvpo_ray.runtime.cluster import connect
from dvpo_ray.runtime.termination import Termination, grace_is_over, held, limited
from dvpo_ray.runtime.waiting import as_they_come, get, introduce, patience, wait


class Worker:
    """An actor with the faults that actors have."""

    def __init__(self, fault: str = "") -> None:
        if fault == "bad input":
            raise InputError("gvm.json: no such file")
        if fault == "bug":
            raise ValueError("no available memory for the cache blocks")

    def work(self, fault: str = "", _after: object = None) -> int:
        if fault == "bad input":
            raise InputError("row 3 is bad")
        if fault == "no folder":
            Path("/no/such/folder/file").touch()
        if fault == "death":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "frozen":
            os.kill(os.getpid(), signal.SIGSTOP)
        return 1

    def stream(self):
        yield 1
        time.sleep(1.0)  # another thread sends the item
        os.kill(os.getpid(), signal.SIGSTOP)


@pytest.fixture(scope="module")
def cluster():
    with connect(RayConfig(num_cpus=2, object_store_gib=0.1)):
        yield


@pytest.fixture
def start(tmp_path):
    """Starts workers that messages call `worker-0`."""
    workers = []

    def start(fault: str = ""):
        workers.append(ray.remote(Worker).options(num_cpus=0).remote(fault))
        introduce(workers[-1], f"worker-{len(workers) - 1}", tmp_path / "logs" / "worker-0.log")
        return workers[-1]

    yield start
    for worker in workers:
        ray.kill(worker)


@pytest.mark.slow
def test_what_an_actor_raises_is_its_one_line(cluster, start, tmp_path):
    with pytest.raises(InputError, match=r"^gvm\.json: no such file$"):
        get(start("bad input").work.remote(), what="work")
    with pytest.raises(
        RoleDied, match=r"^worker-1 could not start: ValueError: no available memory for the cache blocks; its log is .*worker-0.log$"
    ):
        get(start("bug").work.remote(), what="work")
    worker = start()
    with pytest.raises(InputError, match=r"^row 3 is bad$"):
        get(worker.work.remote("bad input"), what="work")
    with pytest.raises(FileNotFoundError) as raised:
        get([worker.work.remote(), worker.work.remote("no folder")], what="work")
    assert raised.value.filename == "/no/such/folder/file" and not hasattr(raised.value, "cause")


@pytest.mark.slow
def test_a_death_is_one_line_even_where_another_actor_met_it(cluster, start, tmp_path):
    first, second = start(), start()
    scores = second.work.remote("", first.work.remote("death"))
    wait([scores], what="scores")
    with pytest.raises(RoleDied) as raised:
        get(scores, what="advantages")
    line = str(raised.value)
    assert raised.value.actor == "worker-0" and "\n" not in line
    assert line.startswith("worker-0 died during advantages: ") and line.endswith(f"; its log is {tmp_path}/logs/worker-0.log")


@pytest.mark.slow
def test_a_long_wait_is_told_and_has_a_limit(cluster, start, monkeypatch):
    monkeypatch.setattr(waiting, "PERIOD_SECONDS", 0.5)
    said: list[str] = []
    workers = [start() for _ in range(4)]
    get([worker.work.remote() for worker in workers], what="the start")
    with patience(seconds=4, say=said.append):
        with pytest.raises(ResourceError, match=r"^the update did not finish within 4 seconds \(ray\.wait_timeout_seconds\) of worker-1$"):
            get([workers[0].work.remote(), workers[1].work.remote("frozen")], what="the update")
        with pytest.raises(ResourceError, match=r"^scores did not finish within 4 seconds .* of worker-2$"):
            wait([workers[2].work.remote("frozen")], what="scores")
        stream = as_they_come([workers[3].stream.remote()], what="rollouts")
        assert ray.get(next(stream)) == 1
        with pytest.raises(ResourceError, match=r"^rollouts did not finish within 4 seconds .* of worker-3$"):
            next(stream)
    assert said[0].startswith("still waiting for the update of worker-1 after ") and len(said) >= 3


# -------------------------------------------------------------------------------------------------------- signals


@pytest.fixture
def termination():
    termination = Termination()
    yield termination
    termination.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_waits_for_the_end_of_a_step(termination, number):
    steps = []
    with pytest.raises(KeyboardInterrupt), held(60) as signals:
        os.kill(os.getpid(), number)
        assert signals == [number]
        steps.append("done")
    assert steps == ["done"] and signal.getitimer(signal.ITIMER_REAL)[0] == 0
    assert termination.received == (None if number == signal.SIGINT else number)


def test_after_the_grace_a_scheduler_waits_no_longer(termination):
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), held(0.1):
        os.kill(os.getpid(), signal.SIGTERM)
        assert not grace_is_over(60)
        time.sleep(60)
    with pytest.raises(KeyboardInterrupt), limited(0.1):
        time.sleep(60)
    assert time.monotonic() - started < 30 and grace_is_over(0.1)


def test_ctrl_c_waits_without_a_limit_until_a_second_one(termination, monkeypatch):
    """`timeout -s INT` sends the signal twice at once; that is one Ctrl-C."""
    steps = []
    with pytest.raises(KeyboardInterrupt), held(0.01):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        steps.append("finished")
    with limited(0.01):
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)  # an echo too
        steps.append("saved")
    monkeypatch.setattr("dvpo_ray.runtime.termination._ECHO_SECONDS", -1.0)
    with pytest.raises(KeyboardInterrupt), limited(0.01):
        os.kill(os.getpid(), signal.SIGINT)
        steps.append("not reached")
    with pytest.raises(KeyboardInterrupt), held(0.01):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        steps.append("not reached")
    assert steps == ["finished", "saved"] and not grace_is_over(0.01)


def test_a_scheduler_that_asks_after_ctrl_c_has_its_grace(termination):
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), held(0.1) as signals:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    assert signals == [signal.SIGINT] and time.monotonic() - started < 30


def test_a_step_in_another_thread_gets_no_signals():
    ended = []

    def step():
        with held(60), limited(60):
            ended.append(True)

    thread = threading.Thread(target=step)
    thread.start()
    thread.join()
    assert ended == [True]


def test_a_signal_that_the_command_was_told_to_ignore_stays_ignored(monkeypatch, capsys):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        monkeypatch.setattr(cli, "parse_arguments", lambda argv: os.kill(os.getpid(), signal.SIGHUP) or os.kill(os.getpid(), signal.SIGTERM))
        assert cli.main([]) == 143
    finally:
        signal.signal(signal.SIGHUP, before)
    assert capsys.readouterr().err == "dvpo: ended by SIGTERM\n"
