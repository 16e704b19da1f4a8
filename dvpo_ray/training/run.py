"""One lifecycle for every run that has a folder: who may write there, where it goes on, what it saves, and how it ended.

    run = Run("train", config, folder, resume=resume)     refuses a folder or settings that are not this run's
    inputs = ...                                          every mistake in the inputs is found here
    run.open_checkpoint()                                 the last whole one of a resumed run
    with run.started("DVPO", facts, notes) as console:    from here on the folder is this run's
        ...                                               `run.last_step` and `run.outcome` go to the summary

However the block ends, summary.json says it: `finished`, `stopped`, `interrupted` or `failed`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from dvpo_ray.config import Config
from dvpo_ray.errors import diverged
from dvpo_ray.monitoring.console import RunConsole
from dvpo_ray.monitoring.memory import PeakMemory
from dvpo_ray.monitoring.metrics import MetricsLog
from dvpo_ray.monitoring.report import write_report
from dvpo_ray.monitoring.run_files import write_summary
from dvpo_ray.runtime import checkpoints
from dvpo_ray.training.run_folder import begin, check_resume


class Run:
    """One run in its folder.

    Attributes:
        last_step: the last one that is done.
        outcome: how the run ends when nothing is raised.
        checkpoint: where it goes on: the checkpoint's folder and its state; None for a new run.
        memory: of all of its processes on this node.

    Args:
        stage: key of `config.resuming.STAGES`.
        resume: continue the run in the folder.

    Raises:
        InputError: the run in the folder cannot be resumed as this one.
    """

    def __init__(self, stage: str, config: Config, folder: Path, *, resume: bool = False) -> None:
        self.stage = stage
        self.config = config
        self.folder = folder.resolve()
        self.resumed = resume
        self.last_step = 0
        self.outcome = "finished"
        self.checkpoint: tuple[Path, dict] | None = None
        self.memory = PeakMemory()
        if resume:
            check_resume(self.folder, stage, config)

    @contextmanager
    def started(
        self,
        title: str,
        facts: Mapping[str, object],
        notes: Sequence[str],
        summary: Callable[[], Mapping[str, Any]],
        console: RunConsole | None = None,
    ) -> Iterator[RunConsole]:
        """The run itself, with its console; the summary and the report are written however it ends.

        Args:
            title, facts: what runs, and with what, for the header.
            notes: what the user should know of settings and data, one line each.
            summary: entries of summary.json beside those that every run has; asked for at the end.
            console: of a larger run that this is a part of; otherwise the run opens its own.
        """
        started, state = time.time(), "failed"
        try:
            begin(self.folder, self.stage, self.config, resumed=self.resumed)
            with nullcontext(console) if console is not None else RunConsole() as console, self.memory:
                console.header(title, {**facts, "run folder": self.folder})
                for note in notes:
                    console.warn(note)
                yield console
            state = self.outcome
        except KeyboardInterrupt:
            state = "interrupted"
            raise
        finally:
            common = {
                "name": self.config.name,
                "stage": self.stage,
                "state": state,
                "steps": self.last_step,
                "model": self.config.model.path,
                "seed": self.config.seed,
                "duration_seconds": round(time.time() - started, 1),
                "peak_memory_gib": round(self.memory.peak_gib, 3),
                "notes": list(notes),
            }
            write_summary(self.folder, common | dict(summary()))
            if self.stage == "train":
                write_report(self.folder)

    def metrics_log(self) -> MetricsLog:
        """metrics.jsonl and the trackers; of a resumed run it goes on after `last_step`."""
        resume_step = self.last_step if self.resumed else None
        return MetricsLog(self.folder, self.config.train.trackers, resume_step=resume_step, config=self.config.model_dump(mode="json"))

    # ------------------------------------------------------------------------------------------------ checkpoints

    def open_checkpoint(self, find: Callable[[Path], tuple[Path, dict]] = checkpoints.last_whole) -> dict | None:
        """Find the last whole checkpoint of a resumed run, and count its steps as done; returns its state, None for a new run.

        Args:
            find: the checkpoint in a run folder and its state, which has the `step`.

        Raises:
            InputError: there is no whole checkpoint.
        """
        if not self.resumed:
            return None
        self.checkpoint = find(self.folder)
        self.last_step = self.checkpoint[1]["step"]
        return self.checkpoint[1]

    def save_checkpoint(self, write: Callable[[Path], None], state: Mapping[str, Any]) -> None:
        """Save a checkpoint of `last_step`.

        Args:
            write: writes what the actors hold into a folder.
            state: what the driver itself knows.
        """
        draft = checkpoints.begin(self.folder, self.last_step)
        write(draft)
        checkpoints.commit(draft, {"step": self.last_step, **state}, self.config.checkpoint.keep)


def is_due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps happens after this one; 0: never."""
    return every > 0 and step % every == 0


def check_finite(step: int, metrics: Mapping[str, float], stage: str, section: str, *, dtype: str) -> None:
    """Stop where the loss or the gradient norm of a step is not a finite number.

    Args:
        metrics: has `<stage>/loss` and `<stage>/grad_norm`.
        section: of the config, whose `learning_rate` it is.
        dtype: of the computation. In float16 a gradient that overflows now and then is how the loss scale is found; such a step is skipped.

    Raises:
        ResourceError: says which number, at which step, and what to lower.
    """
    watched = [f"{stage}/loss", *([f"{stage}/grad_norm"] if dtype != "float16" else [])]
    for name in watched:
        if not math.isfinite(metrics[name]):
            raise diverged(f"{name} is {metrics[name]} at step {step}", section)
