"""The process of one step: calls the step's function with a report."""

from __future__ import annotations

import ctypes
import faulthandler
import importlib
import os
import signal
import sys
from pathlib import Path

from dvpo_ray.bench.gpu_check.figures import Report

_LOOK_SECONDS = 3.0
_SET_DEATH_SIGNAL = 1


def main(function: str, device: str, file: str, folder: str, models: str, limit: str) -> int:
    """Exit status 0 when the step has come to its end, also where some of its parts have failed."""
    ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)  # of the script's process
    # Shortly before this process is killed its log gets what every thread is doing.
    faulthandler.dump_traceback_later(max(0.8 * float(limit), float(limit) - _LOOK_SECONDS))
    os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "4")
    report = Report(Path(file), device, Path(folder), Path(models))
    module, _, name = function.partition(":")
    try:
        getattr(importlib.import_module(module), name)(report)
    except Exception as error:
        report.failed("the step", error)
        print(f"{type(error).__name__}: {error}", flush=True)
        return 1
    faulthandler.cancel_dump_traceback_later()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
