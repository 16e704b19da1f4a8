"""Files and folders that are whole or absent, and one clear line when the disk is full."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from safetensors import SafetensorError

from dvpo_ray.errors import DiskFull


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A draft folder that replaces `folder` when the block succeeds and is removed when it fails.

    Raises:
        DiskFull: the disk is full.
    """
    draft, old = folder.with_name(f".{folder.name}.draft"), folder.with_name(f".{folder.name}.old")
    for leftover in (draft, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        with clear_when_full(folder):
            draft.mkdir(parents=True)
            yield draft
            share(draft)
        if folder.exists():
            os.rename(folder, old)
        os.rename(draft, folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def share(folder: Path) -> None:
    """Give the files of a folder the access that the folder has: libraries that write by a temporary file leave it to its owner alone."""
    access = folder.stat().st_mode & 0o666
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(file.stat().st_mode | access)


@contextmanager
def whole_file(file: Path) -> Iterator[TextIO]:
    """A text file that replaces `file` when the block succeeds and is removed when it fails.

    Raises:
        DiskFull: the disk is full.
    """
    draft = file.with_name(f".{file.name}.draft")
    try:
        with clear_when_full(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            with draft.open("w", encoding="utf-8") as stream:
                yield stream
        os.replace(draft, file)
    finally:
        draft.unlink(missing_ok=True)


def file_sha256(file: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def clear_when_full(target: Path) -> Iterator[None]:
    """Within this context a full disk raises a `DiskFull` that names the target."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if not _disk_is_full(error):
            raise
        raise DiskFull(f"{target}: no space left on the disk; free some, or write somewhere else") from error


def _disk_is_full(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, SafetensorError):
        return "No space left" in str(error)  # safetensors keeps the system's message only
    # torch.save says where its writer stopped, not why; only a full disk stops it there.
    return "inline_container" in str(error) or "PytorchStreamWriter failed writing" in str(error)
