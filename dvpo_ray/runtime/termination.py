"""SIGTERM ends a run like Ctrl-C: its actors are stopped and its summary is written."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Termination:
    """Until `close`, the first SIGTERM raises KeyboardInterrupt. For the main thread only.

    Attributes:
        received: whether this process was asked to end.
    """

    def __init__(self) -> None:
        self.received = False
        self._before = signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        # Only KeyboardInterrupt ends Ray's waits. A second signal must not interrupt what the first one started.
        if not self.received:
            self.received = True
            raise KeyboardInterrupt

    def close(self) -> None:
        """Restore the earlier handler."""
        signal.signal(signal.SIGTERM, self._before)


@contextmanager
def keeps_termination() -> Iterator[None]:
    """Restore a `Termination` after this context: Ray replaces every handler by its own, which exits at once."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if isinstance(getattr(handler, "__self__", None), Termination):
            signal.signal(signal.SIGTERM, handler)
