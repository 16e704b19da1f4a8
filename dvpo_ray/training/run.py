"""One lifecycle for every run that has a folder: who may write there, where it goes on, what it saves, and how it ended.

    run = Run("train", config, folder, resume=resume)     refuses a folder or settings that are not this run's
    inputs = ...                                          every mistake in the inputs is found here
    run.open_checkpoint()                                 the last whole one of a resumed run
    with run.started("DVPO", facts, notes, …):            from here on the folder is this run's
        ...                                               `run.last_step` and `run.outcome` go to the summary

However the block ends, summary.json says it: `finished`, `stopped`, `interrupted` or `failed`, and why.
"""

from __future__ import annotations

import logging
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from dvpo_ray.config import Config
from dvpo_ray.errors import DiskFull, ResourceError, RoleDied, diverged, one_line
from dvpo_ray.monitoring.console import RunConsole
from dvpo_ray.monitoring.memory import PeakMemory
from dvpo_ray.monitoring.metrics import MetricsLog
from dvpo_ray.monitoring.report import write_report
from dvpo_ray.monitoring.run_files import amend_summary, last_saved_step, read_summary, resume_command, write_summary
from dvpo_ray.runtime import checkpoints
from dvpo_ray.runtime.termination import grace_is_over, held, limited
from dvpo_ray.runtime.waiting import patience
from dvpo_ray.training.run_folder import begin, check_resume, locked

logger = logging.getLogger(__name__)


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
        InputError: the run in the folder cannot be resumed as this one, or is still going on.
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
        self._earlier: dict[str, Any] = {}
        self._saved_step = 0
        self._checkpoint_bytes = 0
        self._is_whole = True
        self._told_of_long_steps = False
        self._writes_metrics = False
        if resume:
            check_resume(self.folder, stage, config)
            self._earlier = read_summary(self.folder)

    @contextmanager
    def started(
        self,
        title: str,
        facts: Mapping[str, object],
        notes: Sequence[str],
        summary: Callable[[], Mapping[str, Any]],
        console: RunConsole,
        *,
        is_part: bool = False,
    ) -> Iterator[None]:
        """The run itself, with its console; the summary and the report are written however it ends.

        Args:
            title, facts: what runs, and with what, for the header.
            notes: what the user should know of settings and data, one line each.
            summary: entries of summary.json beside those that every run has; asked for at the start of a new run and at the end.
            console: shows the header, the notes, and what the run waits for.
            is_part: of a larger run.

        Raises:
            InputError: another process runs in the folder.
            InputError, ResourceError: of the block. A run that is no part adds the command that continues it.
        """
        began = time.time()
        record = partial(self._record, began, notes, summary)
        with locked(self.folder):
            begin(self.folder, self.stage, self.config, resumed=self.resumed)
            if not self.resumed:  # the summary of a resumed run has it all
                self.tell(**{"model": self.config.model.path, "notes": list(notes)} | dict(summary()))
            try:
                with self.memory, patience(say=console.say):
                    console.header(title, {**facts, "run folder": self.folder})
                    for note in notes:
                        console.warn(note)
                    if self.checkpoint is not None:
                        console.say(f"going on from the checkpoint of step {self.last_step}")
                    yield
            except BaseException as error:
                command, line = resume_command(self.folder, self.stage), one_line(error)
                try:
                    record(**_how_it_ended(error), resume_command=command)
                except (OSError, ResourceError) as second:  # what ended the run is what the user must see
                    logger.warning("the end of the run is not fully recorded: %s", second)
                if isinstance(error, KeyboardInterrupt) and not is_part:
                    goes_on = f"step {last_saved_step(self.folder)} is saved; continue with: {command}"
                    console.say(goes_on if command else "no checkpoint is saved; the same command starts anew")
                if line and command and not is_part:
                    raise ResourceError(f"{line}; continue with `{command}`") from error
                raise
            record(state=self.outcome)

    def _record(self, began: float, notes: Sequence[str], summary: Callable[[], Mapping[str, Any]], **end: Any) -> None:
        """Write the summary and the report. `end`: how the run ended."""
        common = {
            "name": self.config.name,
            "stage": self.stage,
            "steps": self.last_step,
            "model": self.config.model.path,
            "seed": self.config.seed,
            "duration_seconds": round(self._earlier.get("duration_seconds", 0) + time.time() - began, 1),
            "peak_memory_gib": max(self._earlier.get("peak_memory_gib", 0.0), round(self.memory.peak_gib, 3)),
            "notes": list(notes),
        }
        # A resumed run that ended before it went on has nothing new to tell of its steps.
        entries = {} if self.resumed and not self._writes_metrics else common | dict(summary())
        end = {key: value for key, value in end.items() if value is not None}
        if not self.folder.is_dir():
            return
        try:
            write_summary(self.folder, read_summary(self.folder) | entries | end)
        except DiskFull:  # not even for a second file beside the first
            amend_summary(self.folder, {name: value for name, value in entries.items() if name == "steps"} | end)
        write_report(self.folder)

    def tell(self, **entries: Any) -> None:
        """Put entries into summary.json now, for a report of a run that goes on or is killed."""
        write_summary(self.folder, read_summary(self.folder) | entries)

    def metrics_log(self) -> MetricsLog:
        """metrics.jsonl and the trackers; of a resumed run it goes on after `last_step`."""
        self._writes_metrics = True
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
        self.last_step = self._saved_step = self.checkpoint[1]["step"]
        return self.checkpoint[1]

    def expect_checkpoints(self, size: int, every_steps: int, last_step: int) -> None:
        """Make known how large a checkpoint is going to be. Call it before the first step.

        Args:
            size: bytes.
            every_steps: steps between checkpoints.
            last_step: of the run.

        Raises:
            DiskFull: a checkpoint is due before the end, and the disk has no room for it.
        """
        self._checkpoint_bytes = size
        if last_step // every_steps > self.last_step // every_steps:
            checkpoints.check_room(self.folder, size)

    def save_checkpoint(self, write: Callable[[Path], None], state: Mapping[str, Any]) -> None:
        """Save a checkpoint of `last_step`.

        Args:
            write: writes what the actors hold into a folder.
            state: what the driver itself knows.

        Raises:
            DiskFull: the disk has no room for it.
        """
        with checkpoints.draft(self.folder, self.last_step, self._checkpoint_bytes) as draft:
            write(draft)
            checkpoints.commit(draft, {"step": self.last_step, **state}, self.config.checkpoint.keep)
        self._saved_step = self.last_step

    @contextmanager
    def saved_when_interrupted(self, write: Callable[[Path], None], state: Callable[[], Mapping[str, Any]], console: RunConsole) -> Iterator[None]:
        """When the block is interrupted, save a checkpoint of the last step that is done.

        After SIGTERM or SIGHUP within `termination.grace_seconds`; after Ctrl-C until a second one.

        Args:
            write, state: as in `save_checkpoint`.
        """
        try:
            yield
        except KeyboardInterrupt:
            if self._is_whole and self.last_step > self._saved_step:
                try:
                    with console.stage(f"checkpoint of step {self.last_step}"), limited(self.config.termination.grace_seconds):
                        self.save_checkpoint(write, state())
                except (KeyboardInterrupt, ResourceError, OSError) as second:
                    console.warn(f"no checkpoint of step {self.last_step}: {str(second) or self._why_cut_off()}")
            # Now, because the same signal may have ended Ray, and then this process may not come to its own end.
            end = {"state": "interrupted", "steps": self.last_step, "resume_command": resume_command(self.folder, self.stage)}
            self.tell(**end)
            raise

    @contextmanager
    def held_signals(self, console: RunConsole) -> Iterator[list[int]]:
        """A signal that ends the run waits for the end of this block, as `held` says. The user is told of it, and of work that it costs.

        Yields:
            The signals that wait.
        """
        grace = self.config.termination.grace_seconds

        def told(signum: int) -> None:
            limit = "; Ctrl-C again ends at once" if signum == signal.SIGINT else f", in at most {grace:g} s"
            console.say(f"ending: the step is finished and saved first{limit}")

        with held(grace, told) as signals:
            try:
                yield signals
            except KeyboardInterrupt:
                console.warn(f"the step is lost: {self._why_cut_off()}")
                raise

    def _why_cut_off(self) -> str:
        name, grace = "termination.grace_seconds", self.config.termination.grace_seconds
        if not grace_is_over(grace):
            return "it was ended by a second Ctrl-C"
        return f"it took longer than {name}={grace:g}; raise {name}, and give the scheduler that time"

    @contextmanager
    def whole_step(self, console: RunConsole) -> Iterator[None]:
        """From the update of a step to its record: a signal that ends the run waits.

        Where nobody watches a terminal, a note says once that this takes longer than a scheduler is going to wait.
        """
        grace, began = self.config.termination.grace_seconds, time.monotonic()
        with self.held_signals(console):
            self._is_whole = False
            yield
            self._is_whole = True
        seconds = time.monotonic() - began
        if seconds > grace and console.bars is None and not self._told_of_long_steps:
            self._told_of_long_steps = True
            console.say(
                f"note: to finish and save a step took {seconds:.0f} s, and termination.grace_seconds is {grace:g}: SIGTERM or SIGHUP would lose "
                "what follows the last checkpoint; raise it if your scheduler waits longer before it kills"
            )


def _how_it_ended(error: BaseException) -> dict[str, str]:
    """Entries of summary.json about what ended a run."""
    if isinstance(error, KeyboardInterrupt):
        return {"state": "interrupted"}
    told = one_line(error) or " ".join(f"{type(error).__name__}: {error}".split())
    return {"state": "failed", "error": told, **({"error_actor": error.actor} if isinstance(error, RoleDied) else {})}


def is_due(step: int, every: int, *, at_start: bool = False) -> bool:
    """Whether something that happens every so many steps happens after this one; 0: never. `at_start`: it also happens before step 1."""
    return (every > 0 and step % every == 0) or (at_start and step == 0)


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
