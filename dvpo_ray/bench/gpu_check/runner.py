"""Runs steps one after the other, each in its own process with a limit, and keeps the table up to date. Standard library and psutil only."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path

import psutil

from dvpo_ray import __version__
from dvpo_ray.bench.gpu_check.figures import Figure, markdown_rows, read_figures
from dvpo_ray.files import whole_file

LOG_END_BYTES = 16384
"""Of each log of an actor that is kept."""
SHOWN_CHARACTERS = 1500
"""Of the figures and errors of a step that are printed; the rest is in the files."""
ERROR_CHARACTERS = 160
_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Step:
    """A step of the check.

    Attributes:
        name: as the command line takes it.
        function: `module:function`; called with a `Report`, in a process of its own.
        seconds: its time limit.
        about: what it proves or measures, for the help and for the table.
        gpus: how many it needs; 0 for a step that also runs on a CPU.
    """

    name: str
    function: str
    seconds: float
    about: str
    gpus: int = 0


@dataclass
class Ended:
    """A step that is over.

    Attributes:
        state: `done`, or `failed`, `killed` or `skipped` and why.
        seconds: that it took.
        figures: what it measured, also before it failed.
    """

    step: Step
    state: str
    seconds: float = 0.0
    figures: list[Figure] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        """Whether something in it did not work; a missed target is no failure."""
        return self.state.startswith(("failed", "killed")) or any(figure.verdict == "FAILED" for figure in self.figures)


def run_steps(steps: Sequence[Step], out: Path, device: str, seconds: float, gpus: Sequence[str]) -> list[Ended]:
    """Run steps until the time is over; `table.md` and `results.json` in `out` are written anew after each.

    A step that fails or hangs does not stop the others. This process adopts and ends what a step leaves behind, so it must have no other
    children.

    Args:
        out: gets the table, `<step>.log` of each step, and the ends of its actors' logs under `logs/<step>/`.
        device: `cuda` or `cpu`.
        seconds: for all steps together.
        gpus: of this machine, as `nvidia-smi -L` lists them.
    """
    names = Counter(line.partition(": ")[2].partition(" (")[0] for line in gpus)
    facts = {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "device": ", ".join(f"{count} x {name}" for name, count in names.items()) or device,
        "dvpo_ray": __version__,
        "python": platform.python_version(),
    }
    started, ended = time.monotonic(), list[Ended]()
    out.mkdir(parents=True, exist_ok=True)
    ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    work = Path(tempfile.mkdtemp(prefix="dvpo-gpu-check-", dir="/tmp"))  # sockets need short paths
    try:
        for step in steps:
            left = seconds - (time.monotonic() - started)
            skipped = _why_not(step, device, len(gpus), left)
            now = Ended(step, f"skipped: {skipped}") if skipped else Ended(step, "killed: the script was ended")
            ended.append(now)
            with _written(ended, out, facts):
                if not skipped:
                    _run(now, out, work, device, min(step.seconds, left))
            _show(now, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return ended


def _why_not(step: Step, device: str, gpus: int, left: float) -> str | None:
    """The reason why a step does not run."""
    if step.gpus and device == "cpu":
        return "it has no counterpart on a CPU"
    if step.gpus > gpus:
        return f"it needs {step.gpus} GPUs, and here is {gpus}"
    if left < step.seconds / 2:
        return f"{max(0.0, left):.0f} s are left, and its limit is {step.seconds:g} s"
    return None


def _run(now: Ended, out: Path, work: Path, device: str, limit: float) -> None:
    step, started = now.step, time.monotonic()
    folder, log = work / step.name, out / f"{step.name}.log"
    folder.mkdir()
    figures = work / f"{step.name}.jsonl"
    words = [sys.executable, "-m", "dvpo_ray.bench.gpu_check.inside", step.function, device, str(figures), str(folder), str(work / "models")]
    try:
        with log.open("wb") as output:
            process = subprocess.Popen([*words, str(limit)], stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True)
            try:
                status = process.wait(timeout=limit)
                now.state = "done" if status == 0 else _how_it_ended(status, log)
            except subprocess.TimeoutExpired:
                now.state = f"killed: it was not done after {limit:.0f} s"
    finally:
        end_descendants()
        now.seconds = time.monotonic() - started
        now.figures = read_figures(figures)
        _keep_logs(folder, out / "logs" / step.name)
        shutil.rmtree(folder, ignore_errors=True)


def _how_it_ended(status: int, log: Path) -> str:
    if status < 0:
        return f"killed: by {signal.Signals(-status).name}"
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return f"failed: {next((line.strip() for line in reversed(lines) if line.strip()), f'status {status}')}"


def end_descendants() -> None:
    """Kill all children of this process and all of theirs, whatever group or session they are in, until none is left."""
    while descendants := psutil.Process().children(recursive=True):
        for process in descendants:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(descendants, timeout=5)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:  # adopted ones
                pass
        except ChildProcessError:
            return


def _keep_logs(folder: Path, kept: Path) -> None:
    """The ends of all logs that a step has written into its folder."""
    for log in sorted(folder.rglob("*.log")):
        kept.mkdir(parents=True, exist_ok=True)
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - LOG_END_BYTES))
            (kept / "-".join(log.relative_to(folder).parts)).write_bytes(file.read())


# -------------------------------------------------------------------------------------------------------- results


@contextmanager
def _written(ended: list[Ended], out: Path, facts: Mapping[str, str]) -> Iterator[None]:
    """However the block ends, the results of all steps so far are on disk after it."""
    try:
        yield
    finally:
        with whole_file(out / "results.json") as file:
            json.dump({**facts, "steps": [_as_json(one) for one in ended]}, file, indent=1)
        with whole_file(out / "table.md") as file:
            file.write(table(ended, facts))


def _as_json(one: Ended) -> dict:
    figures = [{**asdict(figure), "verdict": figure.verdict} for figure in one.figures]
    return {"step": one.step.name, "state": one.state, "seconds": round(one.seconds, 1), "figures": figures}


def table(ended: Sequence[Ended], facts: Mapping[str, str]) -> str:
    """All results as Markdown: the steps, then the figures of each."""
    steps = [[one.step.name, f"{one.seconds:.0f}", _short(one.state)] for one in ended]
    lines = ["# GPU check", "", ", ".join(f"{name} {value}" for name, value in facts.items()), ""]
    lines += markdown_rows(["step", "seconds", "end"], steps)
    for one in ended:
        if one.figures:
            rows = [[figure.name, _short(figure.measured), figure.target, figure.verdict] for figure in one.figures]
            lines += ["", f"## {one.step.name}: {one.step.about}", "", *markdown_rows(["figure", "measured", "target", ""], rows)]
    return "\n".join(lines) + "\n"


def _short(text: str) -> str:
    return text if len(text) <= ERROR_CHARACTERS else f"{text[:ERROR_CHARACTERS]} …"


def _show(one: Ended, out: Path) -> None:
    """Print the figures of a step, what failed and what has a target first."""
    shown = sorted(one.figures, key=lambda figure: (figure.verdict not in ("FAILED", "MISSED"), not figure.target))
    lines = [f"{figure.name}: {_short(figure.measured)} {figure.target} {figure.verdict}".rstrip() for figure in shown]
    text = "\n".join(f"  {line}" for line in lines)
    if len(text) > SHOWN_CHARACTERS:
        text = f"{text[:SHOWN_CHARACTERS]}\n  … the rest is in {out / 'table.md'}"
    print(f"{one.step.name}: {_short(one.state)}, {one.seconds:.0f} s\n{text}".rstrip(), flush=True)
