"""TensorBoard, Weights & Biases, MLflow and Ray's metrics behind one interface: `log` the finite metrics of a step, and `close`.

The library of a tracker that the config names is imported only then. Ray's metrics are for every run in a process that has joined Ray.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
import threading
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from dvpo_ray.errors import ResourceError
from dvpo_ray.files import clear_when_full, whole_file
from dvpo_ray.monitoring.catalogue import find_metric


class TensorBoardTracker:
    """Events in the run folder's `tensorboard/`. A resumed run hides the events after the step that it resumes from."""

    def __init__(self, run_folder: Path, config: dict[str, Any], resume_step: int | None) -> None:
        tensorboard = _import("torch.utils.tensorboard", "tensorboard")
        self._folder = run_folder / "tensorboard"
        self._excepthook, threading.excepthook = threading.excepthook, self._of_a_thread
        with clear_when_full(self._folder):
            self._writer = tensorboard.SummaryWriter(str(self._folder), purge_step=None if resume_step is None else resume_step + 1)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        with clear_when_full(self._folder):
            for name, value in metrics.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()

    def close(self) -> None:
        try:
            with clear_when_full(self._folder):
                self._writer.close()
        finally:
            threading.excepthook = self._excepthook

    def _of_a_thread(self, failure: threading.ExceptHookArgs) -> None:
        """The writer's own thread prints no traceback: what it failed at is raised by the next `log`."""
        if type(failure.thread).__name__ != "_AsyncWriterThread":
            self._excepthook(failure)


class WandbTracker:
    """A W&B run in project `dvpo`, named after the run folder. A resumed run continues it."""

    def __init__(self, run_folder: Path, config: dict[str, Any], resume_step: int | None) -> None:
        wandb = _import("wandb", "wandb")
        known = _recall_run(run_folder, "wandb") if resume_step is not None else None
        self._run = wandb.init(project="dvpo", name=run_folder.name, dir=str(run_folder), config=config, id=known, resume="allow" if known else None)
        _remember_run(run_folder, "wandb", self._run.id)
        # W&B refuses to log a step again, as a resumed run does. So the step is an ordinary metric, and the others' axis.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log({"step": step, **metrics})

    def close(self) -> None:
        self._run.finish()


class MlflowTracker:
    """An MLflow run in experiment `dvpo`, named after the run folder, at the environment's tracking URI. A resumed run continues it."""

    def __init__(self, run_folder: Path, config: dict[str, Any], resume_step: int | None) -> None:
        self._mlflow = _import("mlflow", "mlflow")
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


class RayTracker:
    """Gauges of Ray: Ray's Prometheus endpoints, its dashboard and Grafana show the last step of a run that goes on.

    `group/name` is `ray_dvpo_group_name` there, with the label `run`, the config's name. A metric of a role has the role as a label
    and not in its name: `memory/learner_gib` is `ray_dvpo_memory_gib{role="learner"}`.
    """

    def __init__(self, run_folder: Path, config: dict[str, Any], resume_step: int | None) -> None:
        self._gauge = importlib.import_module("ray.util.metrics").Gauge
        self._run = {"run": str(config.get("name", run_folder.name))}
        self._gauges: dict[str, Any] = {}

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in {"step": float(step), **metrics}.items():
            metric = find_metric(name)
            before, _, after = metric.name.partition("<role>") if metric else (name, "", "")
            role = {"role": name[len(before) : len(name) - len(after)]} if after else {}
            tags = self._run | role
            gauge = "dvpo_" + re.sub(r"\W", "_", before + after.removeprefix("_"))
            if gauge not in self._gauges:
                self._gauges[gauge] = self._gauge(
                    gauge, description=_ascii(metric.meaning) if metric else "Steps that are done.", tag_keys=tuple(tags)
                )
            self._gauges[gauge].set(value, tags=tags)

    def close(self) -> None:
        """Nothing: Ray forgets the gauges when the process leaves it."""


def _ascii(text: str) -> str:
    """Ray takes no other characters in a description."""
    return text.translate({ord("π"): "pi", ord("λ"): "lambda", ord("±"): "+-"}).encode("ascii", "replace").decode()


def is_in_ray() -> bool:
    """Whether this process has joined Ray."""
    return "ray" in sys.modules and sys.modules["ray"].is_initialized()


TRACKERS = {"tensorboard": TensorBoardTracker, "wandb": WandbTracker, "mlflow": MlflowTracker}
"""By their names in `train.trackers`."""


_INSTALL = {"tensorboard": "launch/install.sh", "wandb": "launch/install.sh wandb", "mlflow": "launch/install.sh mlflow"}


def missing_trackers(names: Iterable[str]) -> list[str]:
    """A line for each tracker whose library is not installed. It is looked for, and not imported."""
    return [f"train.trackers: {name} is not installed; run: {_INSTALL[name]}" for name in names if find_spec(name) is None]


def _import(module: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ResourceError(f"train.trackers: {package} is not installed ({error}); run: {_INSTALL[package]}") from None


def _recall_run(run_folder: Path, tracker: str) -> str | None:
    """The tracker's own id of the run, from trackers.json; None if the tracker does not know the run."""
    path = run_folder / "trackers.json"
    return json.loads(path.read_text(encoding="utf-8")).get(tracker) if path.exists() else None


def _remember_run(run_folder: Path, tracker: str, run_id: str) -> None:
    path = run_folder / "trackers.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    with whole_file(path) as file:
        json.dump({**known, tracker: run_id}, file, indent=2)
