"""Where the output of the infrastructure goes: one file per actor, and a quiet console."""

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


def redirect_process_output(path: Path) -> None:
    """Send everything that this process writes from now on to a file, line by line; for use inside an actor.

    File descriptors 1 and 2 are replaced, so the file also gets the output of C++ libraries and of later subprocesses. It is
    appended to, so a restarted actor keeps its predecessor's log.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        _send_output_to(file.fileno())
    text = {"buffering": 1, "encoding": "utf-8", "errors": "backslashreplace"}
    sys.stdout, sys.stderr = (open(descriptor, "w", closefd=False, **text) for descriptor in _OUTPUT)  # noqa: SIM115 - open to the end


class LibraryOutput:
    """What this process writes while `library_output` is open. It is dropped unless `keep` names a file.

    Attributes:
        terminal: the standard output from before, for what the user should see.
    """

    def __init__(self, scratch: BinaryIO, terminal: TextIO) -> None:
        self._scratch = scratch
        self.terminal = terminal

    def keep(self, path: Path) -> None:
        """Send it to a file from now on, after what has come so far."""
        path.parent.mkdir(parents=True, exist_ok=True)
        _flush()
        self._scratch.seek(0)
        with path.open("ab") as file:
            file.write(self._scratch.read())
            file.flush()
            _send_output_to(file.fileno())


@contextmanager
def library_output() -> Iterator[LibraryOutput]:
    """Within a `with` block, keep what libraries write in this process off the console, native code included."""
    before = [os.dup(descriptor) for descriptor in _OUTPUT]
    with tempfile.TemporaryFile() as scratch, open(os.dup(1), "w", buffering=1, encoding="utf-8", errors="backslashreplace") as terminal:
        _send_output_to(scratch.fileno())
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


def _send_output_to(target: int) -> None:
    _flush()
    for descriptor in _OUTPUT:
        os.dup2(target, descriptor)


def quiet_libraries() -> None:
    """Keep progress bars and messages below a warning of Ray, vLLM, DeepSpeed and Hugging Face off this console.

    Call it before these libraries are imported. Later processes inherit it. What the user has set in the environment stays.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for library in ("HF_HUB", "HF_DATASETS"):  # their bars ignore TQDM_DISABLE
        os.environ.setdefault(f"{library}_DISABLE_PROGRESS_BARS", "1")
    for name in _LIBRARIES:
        logging.getLogger(name).setLevel(logging.WARNING)
    # When it is imported, DeepSpeed sets its logger's level and warns if the machine has no GPU.
    logging.getLogger("DeepSpeed").addFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
