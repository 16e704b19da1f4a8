"""Where the output of the infrastructure goes: a file per actor, and a quiet console."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

_LIBRARIES = ("ray", "vllm", "DeepSpeed", "deepspeed", "transformers", "datasets", "accelerate", "torch", "httpx", "urllib3", "filelock")


def redirect_process_output(path: str | Path) -> Path:
    """Send everything that this process writes from now on to a file, line by line; for use inside an actor.

    File descriptors 1 and 2 are replaced, so the output of C++ libraries and of subprocesses started later goes there too.
    An existing file is appended to, so that a restarted actor keeps the log of its predecessor.

    Returns:
        The path of the file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    sys.stdout, sys.stderr = _line_buffered(1), _line_buffered(2)
    return path


def quiet_libraries() -> None:
    """Keep the progress bars and the chatter below a warning of Ray, vLLM, DeepSpeed and transformers off this console.

    Call it before these libraries are imported; processes started later inherit it. What the user has set in the
    environment stays.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in _LIBRARIES:
        logging.getLogger(name).setLevel(logging.WARNING)


def _line_buffered(descriptor: int):
    return open(descriptor, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
