"""Waiting for actors: every wait has a time limit, says what it waits for, and fails with one clear line."""

from __future__ import annotations

import re
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import ray
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayActorError, RayError, RayTaskError

from dvpo_ray.config.arithmetic import counted
from dvpo_ray.errors import HeadGone, InputError, ResourceError, RoleDied
from dvpo_ray.monitoring.console import duration

PERIOD_SECONDS = 30.0
"""A wait that lasts says so again and again after this time."""
HEAD_PERIOD_SECONDS = 5.0
"""How often a wait looks whether Ray's head is still there. Ray itself ends the process, without a word to it, after a minute without a head."""


def tell(text: str) -> None:
    """Say a line where no console is open. Standard output is for results."""
    print(text, file=sys.stderr)


def say(text: str) -> None:
    """Say a line where this process's waits are told."""
    _patience.say(text)


@dataclass(frozen=True)
class Patience:
    """How this process waits for its actors.

    Attributes:
        seconds: the limit of a wait that has none of its own.
        head: host and port of Ray's head; without it nobody looks for the head.
        say: tells the user of a wait that lasts.
    """

    seconds: float = float("inf")
    head: str = ""
    say: Callable[[str], None] = tell


_patience = Patience()
_actors: dict[str, tuple[str, Path]] = {}
"""Name and log file of each actor that this process has started, by Ray's id."""


@contextmanager
def patience(**changes) -> Iterator[None]:
    """Other fields of `Patience` for the time of a `with` block."""
    global _patience
    before, _patience = _patience, replace(_patience, **changes)
    try:
        yield
    finally:
        _patience = before


def introduce(handle: ActorHandle, name: str, log: Path) -> None:
    """Make known what messages call an actor, and where its log is."""
    _actors[handle._actor_id.hex()] = name, log


def known(handle: ActorHandle) -> tuple[str, Path]:
    """Name and log file of an actor that this process has started."""
    return _actors[handle._actor_id.hex()]


def get(refs, *, what: str, timeout_seconds: float | None = None):
    """`ray.get` with errors that say what was waited for.

    Args:
        refs: one reference or a list of them.
        what: names the work, for the messages.
        timeout_seconds: the limit; that of `patience` when not given.

    Raises:
        InputError, ResourceError, OSError: the actor raised it.
        RoleDied: an actor died.
        ResourceError: a node ran out of memory, or the time limit passed.
    """
    pending = refs if isinstance(refs, list) else [refs]
    for seconds in _slices(pending, what, timeout_seconds):
        try:
            return ray.get(refs, timeout=seconds)
        except GetTimeoutError:
            continue
        except RayError as error:
            check_head(what)  # with the head, the actors on its node die
            raise _in_one_line(error, what) from None
    raise AssertionError("unreachable")


def wait(refs: Iterable[ObjectRef], *, what: str, timeout_seconds: float | None = None) -> None:
    """Wait until all are there, or have failed, without fetching them.

    Args:
        timeout_seconds: as in `get`.

    Raises:
        ResourceError: the time limit passed.
    """
    pending = list(refs)
    for seconds in _slices(pending, what, timeout_seconds):
        _, late = ray.wait(pending, num_returns=len(pending), timeout=seconds, fetch_local=False) if pending else ([], [])
        if not late:
            return


def as_they_come(streams: Sequence, *, what: str, followed_by: Callable = lambda ended: None) -> Iterator[ObjectRef]:
    """The references that some streams of actors give, in the order of their coming.

    Args:
        followed_by: gives the stream that takes the place of one that has ended, or None.

    Raises:
        ResourceError: the time limit passed since the last one.
    """
    open_streams = list(streams)
    while open_streams:
        for seconds in _slices([stream.completed() for stream in open_streams], what):
            ready, _ = ray.wait(open_streams, num_returns=1, timeout=seconds, fetch_local=False)
            if ready:
                break
        for stream in ready:
            chunk = next(stream, None)
            if chunk is None:
                open_streams.remove(stream)
                if (another := followed_by(stream)) is not None:
                    open_streams.append(another)
            else:
                yield chunk


def _slices(refs: list[ObjectRef], what: str, limit: float | None = None) -> Iterator[float]:
    """Seconds of the next part of a wait. Between the parts the user is told.

    Raises:
        HeadGone: Ray's head is gone.
        ResourceError: the time limit has passed.
    """
    key = "" if limit is not None else " (ray.wait_timeout_seconds)"
    limit = _patience.seconds if limit is None else limit
    started = told = time.monotonic()
    while (passed := (now := time.monotonic()) - started) < limit:
        if passed > 0.9 * HEAD_PERIOD_SECONDS:
            check_head(what)
        if now - told > 0.9 * PERIOD_SECONDS:
            told = now
            _patience.say(f"still waiting for {what}{_of(refs)} after {duration(passed)}")
        yield min(HEAD_PERIOD_SECONDS, PERIOD_SECONDS, limit - passed)
    raise ResourceError(f"{what} did not finish within {counted(limit, 'second')}{key}{_of(refs)}")


def check_head(what: str) -> None:
    """Look whether Ray's head is still there.

    Args:
        what: the work that is waited for, for the message.

    Raises:
        HeadGone: nothing has answered at its address for some seconds.
    """
    if not _patience.head:
        return
    host, _, port = _patience.head.rpartition(":")
    for pause in (1.0, 2.0, 0.0):
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
            return
        except OSError:
            time.sleep(pause)
    raise HeadGone(f"Ray's head at {_patience.head} was gone during {what}: its processes have ended, or the network to it is down")


def head_answers() -> bool:
    """Whether Ray's head is there, as far as this process knows its address."""
    try:
        check_head("the end")
    except HeadGone:
        return False
    return True


def _of(refs: list[ObjectRef]) -> str:
    """The actors that the late ones of some references come from."""
    _, late = ray.wait(refs, num_returns=len(refs), timeout=0, fetch_local=False) if refs else ([], [])
    ids = [ref.task_id().actor_id().hex() for ref in late]
    names = dict.fromkeys(_actors[one][0] for one in ids if one in _actors)
    return f" of {', '.join(names)}" if names else ""


# ------------------------------------------------------------------------------------------------------------- errors

_OWN = re.compile(r"dvpo_ray\.errors\.(InputError|ResourceError): (.+)")
_EXIT = re.compile(r"Worker exit detail: (.+)", re.DOTALL)


def _in_one_line(error: RayError, what: str) -> Exception:
    """What went wrong in an actor, as an error of one line; the error itself if it is a bug."""
    cause: Exception = error
    while isinstance(cause, RayTaskError) and isinstance(cause.cause, Exception):
        cause = cause.cause
    if isinstance(cause, InputError | ResourceError | OSError):
        return cause
    if isinstance(cause, OutOfMemoryError):
        told = str(cause).partition("\n")[0].rstrip(".")
        return ResourceError(f"{what}: {told}; use fewer or smaller actors, or stop other programs that take memory")
    return _end_of_actor(cause, what) if isinstance(cause, RayActorError) else error


def _end_of_actor(error: RayActorError, what: str) -> Exception:
    text = str(error)
    own = _OWN.search(text)
    if own is not None:  # Ray keeps only the text of an error in a constructor.
        return {"InputError": InputError, "ResourceError": ResourceError}[own[1]](own[2])
    name, log = _actors.get(error.actor_id or "", ("an actor", None))
    if error.actor_init_failed:
        happened, why = "could not start", text.rstrip().rpartition("\n")[2]
    else:
        exit_detail = _EXIT.search(text)
        happened, why = f"died during {what}", exit_detail[1] if exit_detail else text
    why = " ".join(why.split()).rstrip(".")
    return RoleDied(f"{name} {happened}: {why}" + (f"; its log is {log}" if log else ""), name)
