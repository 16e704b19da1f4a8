"""Host memory of processes and of their descendants, in GiB.

The figure is the proportional set size (PSS): a page shared by n processes counts 1/n in each, so that the sum over
processes counts Ray's object store, shared libraries and forked pages once. The resident set size (RSS) would count them
n times. PSS costs a walk over the page tables, some 50 ms per GiB, RSS next to nothing: the background sampling looks at
RSS often and at PSS only when RSS is higher than it was before.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable

import psutil

GIB = 1 << 30
_NEW_HIGH = 1.01  # times the highest RSS so far, for PSS to be measured again


class PeakMemory:
    """Samples the memory of this process, its descendants and added processes in the background and keeps the largest sum.

    A Ray cluster that this process started is among its descendants: raylet, workers and what they start. The actors of a
    cluster that was already there are not; give the pids of those on this node to `add_pids`.

    Use as a context manager; `peak_gib` is valid at any time:

        with PeakMemory() as memory:
            memory.add_pids(pids_of_actors)
            ...
        summary["peak_memory_gib"] = memory.peak_gib

    Args:
        pids: processes to watch with their descendants; this process when not given.
        period_seconds: time between looks at the resident size.
    """

    def __init__(self, pids: Iterable[int] | None = None, period_seconds: float = 0.5) -> None:
        self.peak_gib = 0.0
        self._highest_resident = 0.0
        self._roots: list[psutil.Process] = []
        self._period_seconds = period_seconds
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="peak-memory", daemon=True)
        self.add_pids([os.getpid()] if pids is None else pids)

    def add_pids(self, pids: Iterable[int]) -> None:
        """Watch more processes of this node, with their descendants. A process that is already gone is left out."""
        with self._lock:
            self._roots.extend(_processes(pids))

    def sample(self) -> float:
        """The memory of all watched processes now, in GiB; raises `peak_gib` to it."""
        with self._lock:
            tree = _tree(self._roots)
            now = sum(map(_proportional_bytes, tree)) / GIB
            self._highest_resident = max(self._highest_resident, sum(map(_resident_bytes, tree)))
            self.peak_gib = max(self.peak_gib, now)
        return now

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> float:
        """Take a last sample and end sampling.

        Returns:
            `peak_gib`.

        Raises:
            Exception: what ended the background sampling before its time.
        """
        self._stop.set()
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        self.sample()
        return self.peak_gib

    def __enter__(self) -> PeakMemory:
        self.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self.stop()

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                with self._lock:
                    resident = sum(map(_resident_bytes, _tree(self._roots)))
                if resident > _NEW_HIGH * self._highest_resident:
                    self.sample()
                self._stop.wait(self._period_seconds)
        except Exception as error:  # raised by stop(), in the thread that can handle it
            self._failure = error


def process_tree_gib(pids: Iterable[int] | None = None) -> float:
    """Memory of some processes and their descendants now, in GiB; of this process when none are given.

    Processes that vanish meanwhile count 0.
    """
    return sum(map(_proportional_bytes, _tree(_processes([os.getpid()] if pids is None else pids)))) / GIB


def _processes(pids: Iterable[int]) -> list[psutil.Process]:
    """Handles that keep the identity of a process even when its pid is given to another one later."""
    found = []
    for pid in pids:
        try:
            found.append(psutil.Process(pid))
        except psutil.NoSuchProcess:
            continue
    return found


def _tree(roots: Iterable[psutil.Process]) -> list[psutil.Process]:
    """The processes and all their descendants, each once."""
    tree: dict[int, psutil.Process] = {}
    for root in roots:
        if root.pid not in tree:
            tree.update((process.pid, process) for process in _with_descendants(root))
    return list(tree.values())


def _with_descendants(root: psutil.Process) -> list[psutil.Process]:
    try:
        return [root, *root.children(recursive=True)] if root.is_running() else []
    except psutil.NoSuchProcess:
        return []


def _proportional_bytes(process: psutil.Process) -> int:
    """PSS of one process; its RSS where the system does not tell PSS; 0 when it has vanished."""
    try:
        with open(f"/proc/{process.pid}/smaps_rollup", "rb") as file:
            for line in file:
                if line.startswith(b"Pss:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass  # vanished, not permitted, or no such file on this system: RSS tells which
    return _resident_bytes(process)


def _resident_bytes(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return 0
