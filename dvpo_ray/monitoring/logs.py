"""Where the output of the infrastructure goes: a file per actor, and a quiet console."""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TextIO

_LIBRARIES = ("ray", "vllm", "DeepSpeed", "deepspeed", "transformers", "datasets", "accelerate", "torch", "httpx", "urllib3", "filelock")
_OUTPUT = (1, 2)


def redirect_process_output(path: str | Path) -> Path:
    """Send everything that this process writes from now on to a file, line by line; for use inside an actor.

    File descriptors 1 and 2 are replaced, so the output of C++ libraries and of subprocesses started later goes there too.
    An existing file is appended to, so that a restarted actor keeps the log of its predecessor.

    Returns:
        The path of the file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _flush()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    _point_output_to(descriptor)
    os.close(descriptor)
    sys.stdout, sys.stderr = _line_buffered(1), _line_buffered(2)
    return path


class LibraryOutput:
    """What this process writes while `library_output` is open; nothing of it is kept until a run folder takes it.

    Attributes:
        terminal: the standard output of before, for what the user should see.
    """

    def __init__(self, scratch: BinaryIO, terminal: TextIO) -> None:
        self._scratch = scratch
        self.terminal = terminal

    def keep(self, path: Path) -> None:
        """Send it to a file from now on, with what has come so far."""
        path.parent.mkdir(parents=True, exist_ok=True)
        _flush()
        self._scratch.seek(0)
        with path.open("ab") as file:
            file.write(self._scratch.read())
            file.flush()
            _point_output_to(file.fileno())


@contextmanager
def library_output() -> Iterator[LibraryOutput]:
    """Keep what other libraries write in this process, native code included, off the console for the time of a `with` block."""
    _flush()
    before = [os.dup(descriptor) for descriptor in _OUTPUT]
    with tempfile.TemporaryFile() as scratch, open(os.dup(1), "w", buffering=1, encoding="utf-8", errors="backslashreplace") as terminal:
        _point_output_to(scratch.fileno())
        try:
            yield LibraryOutput(scratch, terminal)
        finally:
            _flush()
            for descriptor, copy in zip(_OUTPUT, before, strict=True):
                os.dup2(copy, descriptor)
                os.close(copy)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


def _point_output_to(target: int) -> None:
    for descriptor in _OUTPUT:
        os.dup2(target, descriptor)


def quiet_libraries() -> None:
    """Keep the progress bars and the chatter below a warning of Ray, vLLM, DeepSpeed and Hugging Face's libraries off this console.

    Call it before these libraries are imported; processes started later inherit it. What the user has set in the
    environment stays.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for library in ("HF_HUB", "HF_DATASETS"):  # whose bars do not heed TQDM_DISABLE
        os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")
    for name in _LIBRARIES:
        logging.getLogger(name).setLevel(logging.WARNING)
    # DeepSpeed sets the level of its logger and warns of a machine without GPUs when it is imported.
    logging.getLogger("DeepSpeed").addFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR


def _line_buffered(descriptor: int):
    return open(descriptor, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
