"""TensorBoard, Weights & Biases and MLflow behind one small interface. Each library is imported only when its tracker is asked for."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from dvpo_ray.errors import InputError, ResourceError
from dvpo_ray.files import whole_file


class Tracker(Protocol):
    """Where metrics go beside metrics.jsonl."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Record the finite metrics of a step."""
        ...

    def close(self) -> None: ...


class TensorBoardTracker:
    """Events in the run folder's `tensorboard/`. On resume, events after the resumed step are purged from view."""

    def __init__(self, run_folder: Path, config: dict[str, Any], resume_step: int | None) -> None:
        tensorboard = _import("torch.utils.tensorboard", "tensorboard", "tensorboard")
        self._writer = tensorboard.SummaryWriter(str(run_folder / "tensorboard"), purge_step=None if resume_step is None else resume_step + 1)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbTracker:
    """A run of project `dvpo` named after the run folder. A resumed run goes on in the same W&B run."""

    def __init__(self, run_folder: Path, config: dict[str, Any], resume_step: int | None) -> None:
        wandb = _import("wandb", "wandb", "wandb")
        known = _recall_run(run_folder, "wandb") if resume_step is not None else None
        self._run = wandb.init(project="dvpo", name=run_folder.name, dir=str(run_folder), config=config, id=known, resume="allow" if known else None)
        _remember_run(run_folder, "wandb", self._run.id)
        # Steps repeated after a resume must not be refused, so the step is an ordinary metric here and the axis of the others.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log({"step": step, **metrics})

    def close(self) -> None:
        self._run.finish()


class MlflowTracker:
    """A run of experiment `dvpo` named after the run folder, at the tracking URI of the environment. A resumed run goes on in the same one."""

    def __init__(self, run_folder: Path, config: dict[str, Any], resume_step: int | None) -> None:
        self._mlflow = _import("mlflow", "mlflow", "mlflow")
        known = _recall_run(run_folder, "mlflow") if resume_step is not None else None
        self._mlflow.set_experiment("dvpo")
        run = self._mlflow.start_run(run_id=known) if known else self._mlflow.start_run(run_name=run_folder.name)
        _remember_run(run_folder, "mlflow", run.info.run_id)
        if not known:
            self._mlflow.log_dict(config, "config.json")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._mlflow.log_metrics(metrics, step=step)

    def close(self) -> None:
        self._mlflow.end_run()


_TRACKERS: dict[str, Callable[[Path, dict[str, Any], int | None], Tracker]] = {
    "tensorboard": TensorBoardTracker,
    "wandb": WandbTracker,
    "mlflow": MlflowTracker,
}


def make_tracker(name: str, run_folder: Path, config: dict[str, Any], resume_step: int | None) -> Tracker:
    """Open the tracker that `train.trackers` names.

    Raises:
        InputError: there is no tracker of that name.
        ResourceError: its library is not installed.
    """
    if name not in _TRACKERS:
        raise InputError(f"train.trackers: unknown tracker {name!r}; use {', '.join(_TRACKERS)}")
    return _TRACKERS[name](run_folder, config, resume_step)


def _import(module: str, tracker: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ResourceError(f"train.trackers: {tracker} is not installed ({error}); run: pip install {package}") from None


def _recall_run(run_folder: Path, tracker: str) -> str | None:
    """The tracker's own id of the run, from trackers.json; None when the run is new to it."""
    path = run_folder / "trackers.json"
    return json.loads(path.read_text(encoding="utf-8")).get(tracker) if path.exists() else None


def _remember_run(run_folder: Path, tracker: str, run_id: str) -> None:
    path = run_folder / "trackers.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    with whole_file(path) as file:
        json.dump({**known, tracker: run_id}, file, indent=2)
