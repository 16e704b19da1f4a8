"""Host memory of processes and their descendants, in GiB.

The figure is the proportional set size (PSS): a page shared by n processes counts 1/n in each. So the sum over processes
counts Ray's object store, shared libraries and forked pages once; the resident set size (RSS) would count them n times. PSS
costs a walk over the page tables, about 50 ms per GiB, and RSS costs next to nothing. So the background thread looks at RSS
often, and at PSS only if RSS is higher than before.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from contextlib import suppress

import psutil

GIB = 1 << 30
_NEW_HIGH = 1.01  # PSS is measured again when RSS is this many times its highest value so far


class PeakMemory:
    """Measures this process, its descendants and added processes in the background, and keeps the largest sum.

    A Ray cluster that this process started is among its descendants: raylet, workers and what they start. Actors of an older
    cluster are not: give the pids of those on this node to `add_pids`.

    Use it as a context manager; `peak_gib` is valid at any time:

        with PeakMemory() as memory:
            memory.add_pids(pids_of_actors)
            ...
        summary["peak_memory_gib"] = memory.peak_gib

    Args:
        pids: the processes to watch with their descendants; this process by default.
        period_seconds: time between two looks at RSS.
    """

    def __init__(self, pids: Iterable[int] | None = None, period_seconds: float = 0.5) -> None:
        self.peak_gib = 0.0
        self._highest_resident = 0.0
        self._roots: list[psutil.Process] = []
        self._period_seconds = period_seconds
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="peak-memory", daemon=True)
        self.add_pids([os.getpid()] if pids is None else pids)

    def add_pids(self, pids: Iterable[int]) -> None:
        """Watch more processes of this node, with their descendants. A process that has ended is left out."""
        for pid in pids:
            with self._lock, suppress(psutil.NoSuchProcess):
                self._roots.append(psutil.Process(pid))  # knows the process, even if another one gets its pid later

    def sample(self) -> float:
        """The memory of all watched processes at this moment, in GiB; raises `peak_gib` to it."""
        with self._lock:
            tree = _tree(self._roots)
            now = sum(map(_proportional_bytes, tree)) / GIB
            self._highest_resident = max(self._highest_resident, sum(map(_resident_bytes, tree)))
            self.peak_gib = max(self.peak_gib, now)
        return now

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._stop.set()
        self._thread.join()
        self.sample()

    def _run(self) -> None:
        while not self._stop.is_set():
            with self._lock:
                resident = sum(map(_resident_bytes, _tree(self._roots)))
            if resident > _NEW_HIGH * self._highest_resident:
                self.sample()
            self._stop.wait(self._period_seconds)


def _tree(roots: Iterable[psutil.Process]) -> list[psutil.Process]:
    """The processes and all their descendants, each once."""
    tree: dict[int, psutil.Process] = {}
    for root in roots:
        if root.pid not in tree and root.is_running():
            with suppress(psutil.NoSuchProcess):
                tree.update((process.pid, process) for process in (root, *root.children(recursive=True)))
    return list(tree.values())


def _proportional_bytes(process: psutil.Process) -> int:
    """PSS of one process; its RSS if the system does not tell PSS; 0 if it has ended."""
    try:
        with open(f"/proc/{process.pid}/smaps_rollup", "rb") as file:
            for line in file:
                if line.startswith(b"Pss:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass  # the process has ended, or reading is not permitted, or the system has no such file
    return _resident_bytes(process)


def _resident_bytes(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0
