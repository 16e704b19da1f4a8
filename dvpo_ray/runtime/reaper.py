"""Ends what a killed driver leaves of the Ray that it started. Standard library only, so that it starts at once.

Ray's agents outlive a raylet that was killed by a minute: they try to report its death to a head that is gone too.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

_SECONDS_TO_END_ALONE = 3.0


def main(session: str) -> None:
    """Wait for the end of standard input, whose other end the driver holds, and kill the processes that write logs of a session of Ray."""
    sys.stdin.read()
    time.sleep(_SECONDS_TO_END_ALONE)
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if any(os.readlink(file).startswith(f"{session}/") for file in (folder / "fd").iterdir()):
                os.kill(int(folder.name), signal.SIGKILL)
        except OSError:  # somebody else's, or gone
            continue


if __name__ == "__main__":
    main(sys.argv[1])
