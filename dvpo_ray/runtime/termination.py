"""Signals that end a run: they interrupt it like Ctrl-C, and wait while a step and its record must not be torn apart."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_ECHO_SECONDS = 0.5
"""`timeout -s INT` and other wrappers send a signal twice, to the process and to its group. A person takes longer."""

_asked_at: float | None = None
"""When a scheduler first asked this process to end (SIGTERM or SIGHUP), on the monotonic clock."""


def grace_is_over(grace_seconds: float) -> bool:
    """Whether a scheduler has asked this process to end, at least so long ago. Nobody ends a process soon after Ctrl-C."""
    return _asked_at is not None and time.monotonic() - _asked_at >= grace_seconds


class Termination:
    """Until `close`, Ctrl-C and the first SIGTERM or SIGHUP raise KeyboardInterrupt. For the main thread only.

    A signal that the command was told to ignore, as SIGHUP by nohup, stays ignored.

    Attributes:
        received: the signal by which a scheduler asked this process to end, or None.
    """

    def __init__(self) -> None:
        global _asked_at
        self.received: signal.Signals | None = None
        self._interrupted_at = _asked_at = None
        self._before = {number: signal.getsignal(number) for number in _ENDING}
        for number, handler in self._before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, self._handle)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        global _asked_at
        now = time.monotonic()
        # Only KeyboardInterrupt ends Ray's waits. A scheduler's second signal must not interrupt what the first one started.
        if signum == signal.SIGINT:
            if self._interrupted_at is None or now - self._interrupted_at > _ECHO_SECONDS:
                self._interrupted_at = now
                raise KeyboardInterrupt
        elif self.received is None:
            self.received = signal.Signals(signum)
            _asked_at = _asked_at or now
            raise KeyboardInterrupt

    def close(self) -> None:
        """Restore the earlier handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


@contextmanager
def keeps_termination() -> Iterator[None]:
    """Restore a `Termination` after this context: Ray replaces the handler of SIGTERM by its own, which exits at once."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if isinstance(getattr(handler, "__self__", None), Termination):
            signal.signal(signal.SIGTERM, handler)


@contextmanager
def held(grace_seconds: float, told: Callable[[int], None] = lambda signum: None) -> Iterator[list[int]]:
    """Let a signal that ends the run wait until the end of this block.

    Ctrl-C waits as long as that takes; a second one interrupts the block. SIGTERM and SIGHUP come from a scheduler, which kills the process
    after some time: when the grace is over, the block is interrupted.

    Args:
        told: called with the first signal when it comes.

    Yields:
        The signals that wait; empty as long as none has come.
    """
    waiting: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread gets signals
        yield waiting
        return
    first = 0.0

    def hold(signum: int, frame: FrameType | None) -> None:
        global _asked_at
        nonlocal first
        now, is_first = time.monotonic(), not waiting
        if is_first:
            first = now
            waiting.append(signum)
        elif signum == signal.SIGINT and now - first > _ECHO_SECONDS:
            raise KeyboardInterrupt
        if signum != signal.SIGINT and _asked_at is None:
            _asked_at = now
            signal.setitimer(signal.ITIMER_REAL, grace_seconds)
        if is_first:
            told(signum)

    handlers = {number: signal.getsignal(number) for number in _ENDING}
    kept = {number: handler for number, handler in handlers.items() if handler is not signal.SIG_IGN}
    alarm = signal.signal(signal.SIGALRM, _interrupt)
    for number in kept:
        signal.signal(number, hold)
    try:
        yield waiting
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in kept.items():
            signal.signal(number, handler)
        signal.signal(signal.SIGALRM, alarm)
    if waiting:
        signal.raise_signal(waiting[0])


@contextmanager
def limited(grace_seconds: float) -> Iterator[None]:
    """Interrupt this block, which follows a signal, when the grace of a scheduler is over. There is none after Ctrl-C."""
    if _asked_at is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    alarm = signal.signal(signal.SIGALRM, _interrupt)
    signal.setitimer(signal.ITIMER_REAL, max(0.01, _asked_at + grace_seconds - time.monotonic()))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, alarm)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
