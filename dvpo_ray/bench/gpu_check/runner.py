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
from collections.abc import Mapping, Sequence
from contextlib import suppress
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
_MARK = "DVPO_GPU_CHECK_STEP"
"""Environment variable of all processes of a step, with its name."""
_SET_CHILD_SUBREAPER = 36
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Step:
    """A step of the check.

    Attributes:
        name: as the command line takes it.
        function: `module:function`; called with a `Report`, in a process of its own.
        seconds: its time limit.
        about: what it proves or measures, for the help and for the table.
        gpus: how many it needs; 0 for a step that also runs on a CPU.
        beside: it measures no speed, so on a GPU it runs at the same time as its neighbours that measure none.
    """

    name: str
    function: str
    seconds: float
    about: str
    gpus: int = 0
    beside: bool = False


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
    out.mkdir(parents=True, exist_ok=True)
    ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    work = Path(tempfile.mkdtemp(prefix="dvpo-gpu-check-", dir="/tmp"))  # sockets need short paths
    check, deadline = _Check(out, work, device, gpus), time.monotonic() + seconds
    try:
        for group in _groups(steps, device):
            left = deadline - time.monotonic()
            for step in group:
                check.begin(step, left)
            check.wait()
    finally:
        check.end()
        shutil.rmtree(work, ignore_errors=True)
    return check.ended


def _groups(steps: Sequence[Step], device: str) -> list[list[Step]]:
    """Steps that run at the same time. A machine without a GPU has few cores: there each runs alone."""
    groups: list[list[Step]] = []
    for step in steps:
        if groups and device == "cuda" and step.beside and groups[-1][-1].beside:
            groups[-1].append(step)
        else:
            groups.append([step])
    return groups


def _why_not(step: Step, device: str, gpus: int, left: float) -> str | None:
    """The reason why a step does not run."""
    if step.gpus and device == "cpu":
        return "it has no counterpart on a CPU"
    if step.gpus > gpus:
        return f"it needs {step.gpus} GPUs, and here is {gpus}"
    if left < step.seconds / 2:
        return f"{max(0.0, left):.0f} s are left, and its limit is {step.seconds:g} s"
    return None


@dataclass
class _Running:
    """A step's process."""

    ended: Ended
    process: subprocess.Popen
    started: float
    limit: float


class _Check:
    """The steps that run and those that are over, and their results on disk."""

    def __init__(self, out: Path, work: Path, device: str, gpus: Sequence[str]) -> None:
        self.out, self.work, self.device, self.gpus = out, work, device, gpus
        self.ended: list[Ended] = []
        self._running: list[_Running] = []
        names = Counter(line.partition(": ")[2].partition(" (")[0] for line in gpus)
        self.facts = {
            "date": datetime.now().astimezone().isoformat(timespec="seconds"),
            "device": ", ".join(f"{count} x {name}" for name, count in names.items()) or device,
            "dvpo_ray": __version__,
            "python": platform.python_version(),
        }

    def begin(self, step: Step, left: float) -> None:
        """Start a step, if `left` seconds are enough for it."""
        skipped = _why_not(step, self.device, len(self.gpus), left)
        self.ended.append(Ended(step, f"skipped: {skipped}" if skipped else "killed: the script was ended"))
        if skipped:
            self._write()
            _show(self.ended[-1], self.out)
            return
        folder, limit = self.work / step.name, min(step.seconds, left)
        folder.mkdir()
        files = [self._figures(step), folder, self.work / "checkpoints"]
        words = [sys.executable, "-P", "-m", "dvpo_ray.bench.gpu_check.inside", step.function, self.device, *map(str, files), str(limit)]
        with (self.out / f"{step.name}.log").open("wb") as output:
            environment = os.environ | {_MARK: step.name}
            process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True, env=environment)
        self._running.append(_Running(self.ended[-1], process, time.monotonic(), limit))

    def wait(self) -> None:
        """Wait until all steps that run are over."""
        while self._running:
            for one in list(self._running):
                status, passed = one.process.poll(), time.monotonic() - one.started
                if status is None and passed < one.limit:
                    continue
                if status is None:
                    one.ended.state = f"killed: it was not done after {one.limit:.0f} s"
                else:
                    one.ended.state = "done" if status == 0 else _how_it_ended(status, self.out / f"{one.ended.step.name}.log")
                self._running.remove(one)
                end_descendants(one.ended.step.name)
                self._collect(one)
            time.sleep(_POLL_SECONDS)

    def end(self) -> None:
        """End everything, and keep what the steps that ran have measured."""
        end_descendants()
        while self._running:
            self._collect(self._running.pop(0))

    def _collect(self, one: _Running) -> None:
        step, folder = one.ended.step, self.work / one.ended.step.name
        one.ended.seconds = time.monotonic() - one.started
        one.ended.figures = read_figures(self._figures(step))
        _keep_logs(folder, self.out / "logs" / step.name)
        shutil.rmtree(folder, ignore_errors=True)
        self._write()
        _show(one.ended, self.out)

    def _figures(self, step: Step) -> Path:
        return self.work / f"{step.name}.jsonl"

    def _write(self) -> None:
        running = {id(one.ended) for one in self._running}
        over = [one for one in self.ended if id(one) not in running]
        with whole_file(self.out / "results.json") as file:
            json.dump({**self.facts, "steps": [_as_json(one) for one in over]}, file, indent=1)
        with whole_file(self.out / "table.md") as file:
            file.write(table(over, self.facts))


def _how_it_ended(status: int, log: Path) -> str:
    if status < 0:
        return f"killed: by {signal.Signals(-status).name}"
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return f"failed: {next((line.strip() for line in reversed(lines) if line.strip()), f'status {status}')}"


def end_descendants(step: str | None = None) -> None:
    """Kill the processes that a step has started, whatever group or session they are in; without a name those of all steps."""
    while descendants := [one for one in psutil.Process().children(recursive=True) if step is None or _step_of(one) == step]:
        alive = [process for process in descendants if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
        if not alive:
            return
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=5)


def _step_of(process: psutil.Process) -> str | None:
    """The step that a process belongs to. All of a step's descendants inherit its environment."""
    try:
        return process.environ().get(_MARK)
    except psutil.Error:  # it has ended
        return None


def _keep_logs(folder: Path, kept: Path) -> None:
    """The ends of all logs that a step has written into its folder."""
    for log in sorted(folder.rglob("*.log")):
        kept.mkdir(parents=True, exist_ok=True)
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - LOG_END_BYTES))
            (kept / "-".join(log.relative_to(folder).parts)).write_bytes(file.read())


# -------------------------------------------------------------------------------------------------------- results


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
    with suppress(BrokenPipeError):  # whoever reads may be gone, and the results are in the files
        print(f"{one.step.name}: {_short(one.state)}, {one.seconds:.0f} s\n{text}".rstrip(), flush=True)
