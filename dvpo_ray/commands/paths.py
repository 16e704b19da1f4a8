"""Checks of the folders and files that a command would write, before it does anything."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path

from dvpo_ray.errors import InputError


def check_new_folder(folder: Path, what: str) -> None:
    """Refuse a folder for results that holds something already, or that cannot be written to.

    Args:
        what: would be written there, for the message.

    Raises:
        InputError: names the folder.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: already there and not empty, and {what} would take its place; give another --out")
    check_writable_folder(folder)


def check_new_file(file: Path, option: str) -> None:
    """Refuse a file for results that is there already, or whose folder cannot be written to.

    Raises:
        InputError: names the file and the option that chose it.
    """
    if file.exists():
        raise InputError(f"{file}: already there, and {option} would take its place; give another file, or remove that one")
    check_writable_folder(file.parent)


def check_writable_folder(folder: Path) -> None:
    """Refuse a folder in which no file can be made. Folders that are missing are made for the test, and removed again.

    Permissions alone don't tell: read-only and virtual file systems, quotas and limits of names show only when it is done.

    Raises:
        InputError: names the folder, and the part of it that is in the way.
    """
    made: list[Path] = []
    try:
        for part in reversed([folder, *folder.parents]):
            if not part.is_dir():
                part.mkdir()
                made.append(part)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        at = f" at {error.filename}" if error.filename and Path(error.filename) in folder.parents else ""
        reason = "a file is in the way" if isinstance(error, FileExistsError | NotADirectoryError) else error.strerror
        raise InputError(f"{folder}: nothing can be written there: {reason}{at}; give another place") from error
    finally:
        for part in reversed(made):
            with suppress(OSError):  # somebody else's file has come into it meanwhile
                part.rmdir()
