"""SIGTERM as Ctrl-C: the run is unwound, its summary written, its actors stopped."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Termination:
    """From now on, and until `close`, SIGTERM raises KeyboardInterrupt, once. Only for the main thread.

    Attributes:
        received: whether this process was asked to end.
    """

    def __init__(self) -> None:
        self.received = False
        self._before = signal.signal(signal.SIGTERM, self._handle)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        # Ray's waits end for KeyboardInterrupt alone. A second signal must not cut off what the first one has unwound.
        if not self.received:
            self.received = True
            raise KeyboardInterrupt

    def close(self) -> None:
        """Bring back the handler of before."""
        signal.signal(signal.SIGTERM, self._before)


@contextmanager
def keeps_termination() -> Iterator[None]:
    """A `Termination` from before this context holds after it: Ray puts its own handlers, which exit at once, in the place of any."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if isinstance(getattr(handler, "__self__", None), Termination):
            signal.signal(signal.SIGTERM, handler)
