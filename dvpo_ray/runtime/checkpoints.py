"""Checkpoints that are whole or absent, and how the last whole one is found."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from dvpo_ray.config.arithmetic import counted
from dvpo_ray.errors import DiskFull, InputError
from dvpo_ray.files import clear_when_full, file_sha256
from dvpo_ray.planning.memory import FULL, MASTER, MOMENTS

logger = logging.getLogger(__name__)

_MANIFEST = "manifest.json"
_STATE = "state.json"


@contextmanager
def draft(run_folder: Path, step: int, expected: int = 0) -> Iterator[Path]:
    """An empty folder for the checkpoint of a step; every worker writes its part into it. It is removed when the block fails.

    Args:
        expected: bytes of the run's first checkpoint.

    Raises:
        DiskFull: the disk has less room than the checkpoint needs (see `check_room`), or is full.
    """
    folder = run_folder / "checkpoints" / f".step_{step:06d}.draft"
    shutil.rmtree(folder, ignore_errors=True)
    check_room(run_folder, expected, f"the checkpoint of step {step}")
    try:
        with clear_when_full(folder):
            folder.mkdir(parents=True)
            yield folder
    except DiskFull as error:
        had = f"the checkpoint of step {step} had {_size(_bytes(folder))} already, and the run folder holds {_fillers(run_folder)}"
        raise DiskFull(f"{error} ({had})") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def commit(written: Path, state: dict, keep: int) -> Path:
    """Make a written draft the checkpoint of its step, and remove all but the newest `keep`.

    The manifest lists every file with its size and SHA-256. A checkpoint that does not match it is damaged.
    """
    (written / _STATE).write_text(json.dumps(state), encoding="utf-8")
    write_manifest(written)
    folder = written.with_name(written.name.removeprefix(".").removesuffix(".draft"))
    shutil.rmtree(folder, ignore_errors=True)
    os.rename(written, folder)
    for old in _all(folder.parent)[:-keep]:
        shutil.rmtree(old)
    return folder


def write_manifest(folder: Path) -> None:
    """List the files of a whole checkpoint, for `problem`."""
    entries = {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256} for name, sha256 in _hashes(folder, _files(folder)).items()}
    (folder / _MANIFEST).write_text(json.dumps(entries, indent=1), encoding="utf-8")


def last_whole(run_folder: Path) -> tuple[Path, dict]:
    """The newest whole checkpoint of a run and its state; damaged ones are skipped with a warning.

    Raises:
        InputError: the run has no whole checkpoint.
    """
    for folder in reversed(_all(run_folder / "checkpoints")):
        damage = problem(folder)
        if damage is None:
            return folder, json.loads((folder / _STATE).read_text(encoding="utf-8"))
        logger.warning("%s is damaged (%s) and is skipped", folder, damage)
    raise InputError(f"{run_folder}: no whole checkpoint to resume from; give another --out, or remove the folder to start anew")


def problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        entries = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"no readable {_MANIFEST}"
    for name, entry in entries.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["bytes"]:
            return f"{name} has {file.stat().st_size} of {counted(entry['bytes'], 'byte')}"
    hashes = _hashes(folder, entries)
    return next((f"the content of {name} has changed" for name, entry in entries.items() if hashes[name] != entry["sha256"]), None)


def _all(folder: Path) -> list[Path]:
    return sorted(folder.glob("step_*")) if folder.is_dir() else []


def _files(folder: Path) -> list[str]:
    return [str(f.relative_to(folder)) for f in sorted(folder.rglob("*")) if f.is_file() and f.name != _MANIFEST]


def _hashes(folder: Path, names) -> dict[str, str]:
    with ThreadPoolExecutor() as threads:
        return dict(zip(names, threads.map(lambda name: file_sha256(folder / name), names), strict=True))


# -------------------------------------------------------------------------------------------------------------- room


def check_room(run_folder: Path, expected: int, what: str = "a checkpoint of this run") -> None:
    """Refuse to begin a checkpoint that the disk has no room for.

    Args:
        expected: its bytes, where the run has none yet. Otherwise it needs as much as the last one.
        what: is to be written, for the error.

    Raises:
        DiskFull: says how much is needed, how much is free, and what to do.
    """
    earlier = _all(run_folder / "checkpoints")
    needed, free = _bytes(earlier[-1]) if earlier else expected, shutil.disk_usage(run_folder).free
    if free < needed:
        holds = f"the run folder holds {_fillers(run_folder)}; free some, or lower checkpoint.keep"
        remedy = holds if earlier else "free some, or give an --out on another disk"
        raise DiskFull(f"{run_folder}: {what} needs {_size(needed)}, and the disk has {_size(free)} free; {remedy}")


def trainer_bytes(rank, *, with_policy: bool = False) -> int:
    """Bytes that all ranks of a trained role write into a checkpoint, from what one rank knows of its model.

    Trained weights, Adam's two moments, and master weights where DeepSpeed keeps some: in lower precision and with ZeRO. ZeRO 3 writes
    the weights as masters only.

    Args:
        rank: a `DeepSpeedRank`; its `observe` calls this.
        with_policy: the whole model is written too, as a Hugging Face checkpoint.
    """
    stage = rank.engine.zero_optimization_stage()
    total = 0
    for parameter in rank.model.parameters():
        elements, size = getattr(parameter, "ds_numel", parameter.numel()), parameter.element_size()
        if parameter.requires_grad:
            master = MASTER if stage or size < FULL else 0
            total += elements * ((0 if stage == 3 else size) + master + MOMENTS)
        total += elements * size * with_policy
    return total


def _fillers(run_folder: Path) -> str:
    """The largest parts of a run folder, with their sizes."""
    sizes = sorted(((_bytes(path), path.name) for path in run_folder.iterdir() if not path.name.startswith(".")), reverse=True)
    return ", ".join(f"{name} {_size(size)}" for size, name in sizes[:3])


def _bytes(path: Path) -> int:
    return sum(f.stat().st_size for f in (path, *path.rglob("*")) if f.is_file())


def _size(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
