"""Steps for the tests of `launch/gpu_check.sh`: what a step can do wrong, and its real proofs and measurements with one start."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from dvpo_ray.bench.gpu_check.figures import Report

OUT = "GPU_CHECK_OUT"
"""Environment variable with the folder of the results."""


def works(report: Report) -> None:
    report.figure("speed", 1234.5, "tokens/s", at_least=1e6)
    report.check("it works", True, "yes")
    (report.folder / "logs").mkdir()
    (report.folder / "logs" / "learner-0.log").write_text("first\n" + 20_000 * "x" + "\nlast\n")


def raises(report: Report) -> None:
    report.figure("before", 1.0)
    with report.part("a part"):
        raise ValueError("of a part")
    report.figure("between", 2.0)
    raise RuntimeError("of the step")


def is_killed(report: Report) -> None:
    report.figure("before", 1.0)
    os.kill(os.getpid(), signal.SIGKILL)


def hangs(report: Report) -> None:
    """With a child in a session of its own, as a Ray node has them."""
    report.figure("before", 1.0)
    leaves(report)
    time.sleep(100)


def leaves(report: Report) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"], start_new_session=True)
    with (Path(os.environ[OUT]) / "left").open("a") as file:
        file.write(f"{child.pid}\n")


def waits(report: Report) -> None:
    """For another step that runs at the same time; says how many are over."""
    out = Path(os.environ[OUT])
    while not (out / "answer").exists():
        time.sleep(0.05)
    report.figure("steps", (out / "table.md").read_text().count("works") if (out / "table.md").exists() else 0)


def answers(report: Report) -> None:
    (Path(os.environ[OUT]) / "answer").touch()


def looks(report: Report) -> None:
    """What the results say while this step runs."""
    out = Path(os.environ[OUT])
    report.figure("steps", len(json.loads((out / "results.json").read_text())["steps"]))
    report.figure("lines", (out / "table.md").read_text().count("\n"))


def card(report: Report) -> None:
    """All that is proven and measured on a card."""
    from dvpo_ray.bench.gpu_check.card import started_card
    from dvpo_ray.bench.gpu_check.on_card import MEASUREMENTS, PROOFS

    with started_card(report, "tiny", adapters=True) as started:
        for name, do in (PROOFS | MEASUREMENTS).items():
            with report.part(name):
                do(started)


def alone(report: Report) -> None:
    """What roles do one after the other in this process."""
    from dvpo_ray.bench.gpu_check.alone import speed, zero

    speed(report, "1b")
    zero(report)
