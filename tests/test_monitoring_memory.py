"""Memory of process trees."""

import mmap
import os
import signal
import subprocess
import sys
import threading

import psutil
import pytest

from dvpo_ray.monitoring import memory
from dvpo_ray.monitoring.memory import GIB, PeakMemory

HOLD = "import sys; block = bytearray({mib} << 20); print('ready', flush=True); sys.stdin.read()"
TREE = "import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', {child!r}], stdin=0, stdout=1); child.wait()"
MIB = 1 / 1024  # in GiB


@pytest.fixture
def start():
    """Start a Python program that says when it is ready and lives until its standard input closes."""
    started = []

    def run(program: str) -> subprocess.Popen:
        process = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield run
    for process in started:
        process.communicate()


def test_a_process_is_measured_by_what_it_holds(start):
    process = start(HOLD.format(mib=64))
    assert 64 * MIB < PeakMemory([process.pid]).sample() < 110 * MIB


def test_descendants_count(start):
    parent = start(TREE.format(child=HOLD.format(mib=64)))
    assert PeakMemory([parent.pid]).sample() > 64 * MIB


def test_a_process_named_twice_counts_once(start):
    parent = start(TREE.format(child=HOLD.format(mib=64)))
    (child,) = psutil.Process(parent.pid).children()
    alone = PeakMemory([parent.pid]).sample()
    assert PeakMemory([parent.pid, child.pid, parent.pid]).sample() == pytest.approx(alone, abs=2 * MIB)
    assert PeakMemory([child.pid, parent.pid]).sample() == pytest.approx(alone, abs=2 * MIB)


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps_rollup"), reason="no PSS on this system")
def test_shared_pages_count_once():
    before = PeakMemory().sample()
    shared = mmap.mmap(-1, 64 << 20)
    shared.write(b"x" * (64 << 20))
    read, write = os.pipe()
    ready, tell = os.pipe()
    child = os.fork()
    if child == 0:  # touches every page and waits
        os.close(write)
        sum(shared[:: mmap.PAGESIZE])
        os.write(tell, b"x")
        os.read(read, 1)
        os._exit(0)
    os.read(ready, 1)
    together = PeakMemory().sample() - before
    os.close(write)
    os.waitpid(child, 0)
    shared.close()
    assert 60 * MIB < together < 100 * MIB  # RSS would say 128 and more


def test_the_peak_outlives_its_process(start):
    process = start(HOLD.format(mib=64))
    with PeakMemory([process.pid], period_seconds=60.0) as peak:
        held = peak.sample()
        process.communicate()
        assert peak.sample() == 0.0
    assert peak.peak_gib == held > 64 * MIB


def test_added_processes_count(start):
    first, second = start(HOLD.format(mib=8)), start(HOLD.format(mib=64))
    peak = PeakMemory([first.pid])
    alone = peak.sample()
    peak.add_pids([second.pid])
    assert peak.sample() > alone + 64 * MIB


def sizes_over_time(monkeypatch, resident: list[int], proportional: list[int]) -> PeakMemory:
    """A background sampling that meets these sizes, in GiB, one after the other."""
    resident_left, proportional_left = iter(resident), iter(proportional)
    seen = threading.Event()

    def next_resident(_process):
        value = next(resident_left, None)
        if value is None:
            seen.set()
        return (value or 0) * GIB

    monkeypatch.setattr(memory, "_tree", lambda roots: [None])
    monkeypatch.setattr(memory, "_resident_bytes", next_resident)
    monkeypatch.setattr(memory, "_proportional_bytes", lambda _process: next(proportional_left, 0) * GIB)
    with PeakMemory(period_seconds=0.001) as peak:
        assert seen.wait(30)
    return peak


def test_background_sampling_keeps_the_largest(monkeypatch):
    # each new high is looked at twice: once to see it, once beside the proportional size
    assert sizes_over_time(monkeypatch, [4, 4, 8, 8, 6, 9, 9], [3, 7, 5]).peak_gib == 7.0


def test_proportional_sizes_are_measured_only_at_a_new_high(monkeypatch):
    assert sizes_over_time(monkeypatch, [4, 4, 4, 3, 4], [3, 100]).peak_gib == 100.0  # the last sample, by stop()
    assert sizes_over_time(monkeypatch, [4, 4, 4, 3, 4], [3, 2, 100]).peak_gib == 3.0


def test_vanished_processes_count_nothing():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    peak = PeakMemory([process.pid])
    peak.add_pids([process.pid])
    assert peak.sample() == 0.0


def test_a_zombie_counts_nothing(start):
    process = start(HOLD.format(mib=8))
    process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert PeakMemory([process.pid]).sample() == 0.0


def test_a_pid_given_to_another_process_is_not_mistaken(start, monkeypatch):
    process = start(HOLD.format(mib=8))
    peak = PeakMemory([process.pid])
    monkeypatch.setattr(psutil.Process, "is_running", lambda self: False)  # as psutil answers after a reuse
    assert peak.sample() == 0.0


def test_without_pss_the_resident_size_is_taken(start, monkeypatch):
    process = start(HOLD.format(mib=64))
    monkeypatch.setattr(memory, "open", lambda *_: (_ for _ in ()).throw(PermissionError()), raising=False)
    assert PeakMemory([process.pid]).sample() == pytest.approx(psutil.Process(process.pid).memory_info().rss / GIB, abs=2 * MIB)
