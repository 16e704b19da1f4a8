"""The metrics of a run, one JSON object per step in metrics.jsonl, and the same in the trackers of the config."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dvpo_ray.errors import InputError
from dvpo_ray.files import clear_when_full
from dvpo_ray.monitoring.catalogue import find_metric
from dvpo_ray.monitoring.run_files import check_step, read_json_lines, write_json_lines
from dvpo_ray.monitoring.trackers import make_tracker

logger = logging.getLogger(__name__)


class MetricsLog:
    """Writes metrics.jsonl and the trackers; a context manager.

    Each line is `{"step": int, "time": Unix seconds, "<metric>": float or null, ...}` and is on disk before `write` returns.

    Args:
        run_folder: is created when missing.
        trackers: of `tensorboard`, `wandb`, `mlflow`.
        resume_step: last step of the checkpoint that the run resumes from; later lines, and a line cut off by a crash, are
            dropped. None starts a new run.
        config: the resolved config, for trackers that show it.

    Raises:
        InputError: a new run in a folder that has metrics, a metrics.jsonl that does not parse, or an unknown tracker.
        ResourceError: a tracker's library is not installed.
    """

    def __init__(
        self, run_folder: str | Path, trackers: Sequence[str] = (), resume_step: int | None = None, config: dict[str, Any] | None = None
    ) -> None:
        folder = Path(run_folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        if resume_step is None:
            _refuse_earlier_run(path)
        else:
            _drop_after(path, resume_step)
        self._trackers = [make_tracker(name, folder, config or {}, resume_step) for name in trackers]
        self._path = path
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by close()

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Append the metrics of a step. A value that is not finite becomes null, with a warning.

        Raises:
            ValueError: a metric is not in the catalogue.
            ResourceError: the disk is full.
        """
        for name in metrics:
            find_metric(name)
        values = {name: float(value) for name, value in metrics.items()}
        finite_values = {name: value for name, value in values.items() if math.isfinite(value)}
        for name in values.keys() - finite_values.keys():
            logger.warning("step %d: %s is %s, written as null", step, name, values[name])
        row = {"step": int(step), "time": round(time.time(), 3), **{name: finite_values.get(name) for name in values}}
        with clear_when_full(self._path):
            self._append(json.dumps(row).encode() + b"\n")
        for tracker in self._trackers:
            tracker.log(int(step), finite_values)

    def _append(self, line: bytes) -> None:
        while line:
            line = line[self._file.write(line) :]

    def close(self) -> None:
        """Close the file and every tracker."""
        self._file.close()
        for tracker in self._trackers:
            tracker.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()


def _refuse_earlier_run(path: Path) -> None:
    if path.exists() and path.stat().st_size > 0:
        raise InputError(f"{path} holds the metrics of an earlier run; resume that run, or choose another --out")


def _drop_after(path: Path, step: int) -> None:
    """Keep only the lines up to a step, so that the resumed steps are written once."""
    if not path.exists():
        return
    rows, bad = read_json_lines(path, check_step)
    if bad:
        raise InputError(f"{bad[0]}; remove the line to resume")
    write_json_lines(path, [row for row in rows if row["step"] <= step])
