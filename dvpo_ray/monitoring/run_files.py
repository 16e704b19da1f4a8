"""The small files of a run folder: summary.json, and files of JSON lines."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from dvpo_ray.config.resuming import STAGES
from dvpo_ray.files import whole_file

CONFIG, SUMMARY = "config.yaml", "summary.json"
_ROOM = 4096
"""Characters that the file takes at least, so that its end can be written on a disk that is full."""


def finite(value: Any) -> Any:
    """The value as JSON can hold it: numbers that are not finite become None.

    NumPy and torch scalars become Python numbers, arrays become lists, paths become text.
    """
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if hasattr(value, "tolist"):
        return finite(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def write_summary(run_folder: str | Path, summary: dict[str, Any]) -> Path:
    """Write summary.json: what a run did, its main numbers and how it ended.

    A run with a gold judge has `gold.before.mean`, `gold.after.mean`, `gold.gain_ci95`, `gvm.heldout_accuracy`,
    `duration_seconds` and `peak_memory_gib`.

    Returns:
        The path of the file.
    """
    path = Path(run_folder) / SUMMARY
    with whole_file(path) as file:
        file.write(json.dumps(finite(summary), indent=2).ljust(_ROOM) + "\n")
    return path


def read_summary(run_folder: str | Path) -> dict[str, Any]:
    """summary.json, or nothing where it is missing or damaged."""
    try:
        summary = json.loads((Path(run_folder) / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return summary if isinstance(summary, dict) else {}


def amend_summary(run_folder: str | Path, changes: dict[str, Any]) -> None:
    """Change entries of summary.json in its own place, for a disk that has no room for a second file."""
    text = json.dumps(read_summary(run_folder) | finite(changes), indent=2)
    with (Path(run_folder) / SUMMARY).open("r+", encoding="utf-8") as file:
        file.write(text.ljust(_ROOM) + "\n")
        file.truncate()


def this_process() -> dict[str, Any]:
    """The entry `process` of summary.json: `pid`, `host` and the time when this process `started`, in Unix seconds."""
    return {"pid": os.getpid(), "host": socket.gethostname(), "started": psutil.Process().create_time()}


def living(summary: dict[str, Any]) -> bool:
    """Whether the process of a run may still be there. Of another machine nothing is known, so there it may."""
    process = summary.get("process")
    if summary.get("state") != "running" or process is None:
        return False
    if process["host"] != socket.gethostname():
        return True
    try:
        return abs(psutil.Process(process["pid"]).create_time() - process["started"]) < 1.0
    except psutil.NoSuchProcess:
        return False


def saved_checkpoints(run_folder: Path) -> Iterator[Path]:
    """The package's own checkpoints, and those of transformers' trainers."""
    yield from (run_folder / "checkpoints").glob("step_*")
    yield from (run_folder / "checkpoints").glob("checkpoint-*")


def last_saved_step(run_folder: Path) -> int:
    """The step of the newest checkpoint; 0 without one."""
    return max((int(re.sub(r"\D", "", path.name)) for path in saved_checkpoints(run_folder)), default=0)


def from_here(folder: Path) -> Path:
    """An absolute path as printed commands have it: relative to the present folder, as paths in a config are, where it is in that folder."""
    here = Path.cwd()
    return folder.relative_to(here) if folder.is_relative_to(here) and folder != here else folder


def resume_command(run_folder: Path, stage: str) -> str | None:
    """The shell line that continues a run, if it has a checkpoint. Relative paths in its config mean those of the present folder."""
    if not any(saved_checkpoints(run_folder)):
        return None
    shown = from_here(run_folder)
    return f"{STAGES[stage].command} {shlex.quote(str(shown / CONFIG))} --out {shlex.quote(str(shown))} --resume"


def read_json_lines(path: Path, check: Callable[[dict], str | None] | None = None, *, appended: bool = True) -> tuple[list[dict], list[str]]:
    """The objects of a JSON Lines file in UTF-8, and one text per unusable line: file, line number and fault.

    Args:
        check: returns what is wrong with an object, or None.
        appended: the file grows line by line. If its last line has no newline and does not parse, a crash cut it off: it is
            skipped.
    """
    rows, bad = [], []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            if number < len(lines) or not appended:
                bad.append(f"{path}:{number}: not valid JSON ({error})")
            continue
        problem = f"expected a JSON object, found {type(row).__name__}" if not isinstance(row, dict) else check and check(row)
        if problem:
            bad.append(f"{path}:{number}: {problem}")
        else:
            rows.append(row)
    return rows, bad


def check_step(row: dict) -> str | None:
    """What is wrong with a row of metrics.jsonl, or None."""
    return None if isinstance(row.get("step"), int) else "`step` is missing or not a whole number"
