"""The metrics of a run: one JSON object per step in metrics.jsonl, and the same in the config's trackers and in Ray's metrics."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from dvpo_ray.errors import DiskFull, InputError, ResourceError
from dvpo_ray.files import clear_when_full, whole_file
from dvpo_ray.monitoring.catalogue import find_metric
from dvpo_ray.monitoring.run_files import check_step, read_json_lines
from dvpo_ray.monitoring.trackers import TRACKERS, RayTracker, is_in_ray

logger = logging.getLogger(__name__)


class MetricsLog:
    """Writes metrics.jsonl and the trackers; a context manager.

    Each line is `{"step": int, "time": Unix seconds, "<metric>": float or null, ...}` and is on disk when `write` returns.

    Args:
        run_folder: is created if missing.
        trackers: names from `TRACKERS`.
        resume_step: last step of the checkpoint that the run resumes from; later lines are dropped, and so is a line that a
            crash cut off. None starts a new run.
        config: the resolved config, for trackers that show it.

    Raises:
        InputError: a new run in a folder that has metrics, or a metrics.jsonl that does not parse.
        ResourceError: a tracker's library is not installed.
    """

    def __init__(
        self, run_folder: str | Path, trackers: Sequence[str] = (), resume_step: int | None = None, config: dict[str, Any] | None = None
    ) -> None:
        folder = Path(run_folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "metrics.jsonl"
        if path.exists() and resume_step is not None:
            _drop_after(path, resume_step)
        elif path.exists() and path.stat().st_size > 0:
            raise InputError(f"{path} holds the metrics of an earlier run; resume that run, or choose another --out")
        kinds = [*(TRACKERS[name] for name in trackers), *([RayTracker] if is_in_ray() else [])]
        self._trackers = [kind(folder, config or {}, resume_step) for kind in kinds]
        self._path = path
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by __exit__()

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Append the metrics of a step. A value that is not finite becomes null, with a warning.

        Raises:
            ValueError: a metric is not in the catalogue.
            ResourceError: the disk is full, or the file is gone.
        """
        for name in metrics:
            if find_metric(name) is None:
                raise ValueError(f"unknown metric {name!r}: add it to dvpo_ray/monitoring/catalogue.py")
        values = {name: float(value) for name, value in metrics.items()}
        finite_values = {name: value for name, value in values.items() if math.isfinite(value)}
        for name in values.keys() - finite_values.keys():
            logger.warning("step %d: %s is %s, written as null", step, name, values[name])
        row = {"step": int(step), "time": round(time.time(), 3), **{name: finite_values.get(name) for name in values}}
        line = json.dumps(row).encode() + b"\n"
        if not self._path.exists():
            raise ResourceError(f"{self._path}: somebody removed or moved the file while the run wrote it")
        with clear_when_full(self._path):
            while line:  # an unbuffered write may write a part only
                line = line[self._file.write(line) :]
        for tracker in self._trackers:
            tracker.log(int(step), finite_values)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_exception: object) -> None:
        self._file.close()
        for tracker in self._trackers:
            with suppress(DiskFull) if kind is not None else nullcontext():  # what ended the run is what the user must see
                tracker.close()


def _drop_after(path: Path, step: int) -> None:
    """Keep only the lines up to a step, so that the resumed steps appear once."""
    rows, bad = read_json_lines(path, check_step)
    if bad:
        raise InputError(f"{bad[0]}; remove the line to resume")
    with whole_file(path) as file:
        file.writelines(json.dumps(row) + "\n" for row in rows if row["step"] <= step)
