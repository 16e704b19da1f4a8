"""Checkpoints that are whole or absent, and how the last whole one is found."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path

from dvpo_ray.errors import InputError

logger = logging.getLogger(__name__)

_MANIFEST = "manifest.json"
_STATE = "state.json"


def begin(run_folder: Path, step: int) -> Path:
    """An empty draft folder for the checkpoint of a step; every worker writes its part into it."""
    draft = run_folder / "checkpoints" / f".step_{step:06d}.draft"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    return draft


def commit(draft: Path, state: dict, keep: int) -> Path:
    """Make a written draft the checkpoint of its step, and remove all but the newest `keep`.

    The manifest lists every file with its size. A checkpoint that does not match it is damaged.
    """
    (draft / _STATE).write_text(json.dumps(state), encoding="utf-8")
    sizes = {str(f.relative_to(draft)): f.stat().st_size for f in sorted(draft.rglob("*")) if f.is_file()}
    (draft / _MANIFEST).write_text(json.dumps(sizes, indent=1), encoding="utf-8")
    folder = draft.with_name(draft.name.removeprefix(".").removesuffix(".draft"))
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(draft, folder)
    for old in _all(folder.parent)[:-keep]:
        shutil.rmtree(old)
    return folder


def last_whole(run_folder: Path) -> tuple[Path, dict]:
    """The newest whole checkpoint of a run and its state; damaged ones are skipped with a warning.

    Raises:
        InputError: the run has no whole checkpoint.
    """
    for folder in reversed(_all(run_folder / "checkpoints")):
        problem = _problem(folder)
        if problem is None:
            return folder, json.loads((folder / _STATE).read_text(encoding="utf-8"))
        logger.warning("%s is damaged (%s) and is skipped", folder, problem)
    raise InputError(f"{run_folder}: no whole checkpoint to resume from; give another --out, or remove the folder to start anew")


def _all(folder: Path) -> list[Path]:
    return sorted(folder.glob("step_*")) if folder.is_dir() else []


def _problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        sizes = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"no readable {_MANIFEST}"
    for name, size in sizes.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} of {size} bytes"
    return None
