"""The entry point of the `dvpo` command. It is small, so that Ctrl-C ends the command in one line also while its modules are imported."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


def main() -> int:
    """Run the command of this process's arguments; returns the exit status, as `dvpo_ray.cli.main` says."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _end)
    from dvpo_ray.cli import main as run  # it puts its own handler in this one's place while a command runs

    return run()


def _end(signum: int, frame: FrameType | None) -> None:
    # No exception: an import may turn it into another one. There is nothing to clean up yet, or nothing any more.
    os.write(2, b"dvpo: interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    sys.exit(main())
