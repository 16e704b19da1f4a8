"""The errors that are no bugs: one line, exit status 2."""

from __future__ import annotations

import errno
import os


class InputError(ValueError):
    """Bad input. Its message is one line that names the file, the key or the row, and what would be right."""


class ResourceError(RuntimeError):
    """Something that the run needs is missing: a GPU, a port, disk space, an engine's answer. One line, exit status 2."""


class DiskFull(ResourceError):
    """The disk that something is written to has no room left."""


class HeadGone(ResourceError):
    """The Ray cluster that a run is in has ended."""


class RoleDied(ResourceError):
    """An actor's process is gone.

    Attributes:
        actor: its name, for example `rollout-0`.
    """

    def __init__(self, message: str, actor: str) -> None:
        super().__init__(message)
        self.actor = actor


def diverged(finding: str, section: str) -> ResourceError:
    """The error of a training that has diverged.

    Args:
        finding: which number is not finite, and when.
        section: of the config, whose `learning_rate` it is.
    """
    return ResourceError(f"training has diverged: {finding}; lower {section}.learning_rate and start anew")


def one_line(error: BaseException) -> str | None:
    """What a user is told of an error, in one line; None for a bug, as an OSError is that names no path."""
    if isinstance(error, InputError | ResourceError):
        # Ray wraps an actor's error in one of the same class whose text is a traceback; the original is its `cause`.
        return " ".join(str(getattr(error, "cause", None) or error).split())
    if not isinstance(error, OSError):
        return None
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{error.filename or 'writing'}: no space left on the disk; free some"
    if not isinstance(error.filename, str | os.PathLike) or error.strerror is None:
        return None
    return f"{error.filename}: the system refuses it: {error.strerror}"
