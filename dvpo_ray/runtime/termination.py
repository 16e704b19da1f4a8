"""Signals that end a run: they interrupt it like Ctrl-C, and wait while a step and its record must not be torn apart."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_arrived = float("-inf")
"""When the last signal came that waited in `held`, on the monotonic clock."""


class Termination:
    """Until `close`, the first SIGTERM or SIGHUP raises KeyboardInterrupt. For the main thread only.

    A SIGHUP that the command was told to ignore, by nohup for instance, stays ignored.

    Attributes:
        received: the signal that asked this process to end, or None.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
        for number, handler in self._before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, self._handle)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        # Only KeyboardInterrupt ends Ray's waits. A second signal must not interrupt what the first one started.
        if self.received is None:
            self.received = signal.Signals(signum)
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
def held(grace_seconds: float, told: Callable[[], None] = lambda: None) -> Iterator[list[int]]:
    """Let a signal that ends the run wait until the end of this block; after the grace it interrupts the block all the same.

    Args:
        told: called when the first signal comes.

    Yields:
        The signals that wait; empty as long as none has come.
    """
    waiting: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only the main thread gets signals
        yield waiting
        return

    def hold(signum: int, frame: FrameType | None) -> None:
        global _arrived
        if not waiting:
            waiting.append(signum)
            _arrived = time.monotonic()
            signal.setitimer(signal.ITIMER_REAL, grace_seconds)
            told()

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
    """Interrupt this block, which follows a signal, when the grace is over."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    passed = time.monotonic() - _arrived
    alarm = signal.signal(signal.SIGALRM, _interrupt)
    # A signal that did not wait has just come.
    signal.setitimer(signal.ITIMER_REAL, max(0.01, grace_seconds - passed) if passed < grace_seconds else grace_seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, alarm)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
