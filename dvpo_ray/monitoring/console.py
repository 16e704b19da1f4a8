"""What the user sees while a run goes on: a header, one bar per stage, and notes. Everything else goes to files.

On a terminal the bars are live (rich), and no line is longer than the terminal is wide. Elsewhere, as in CI logs, each stage prints a
plain line from time to time, also while nothing advances.
"""

from __future__ import annotations

import shlex
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import TypeVar

from rich.console import Console, RenderableType
from rich.panel import Panel
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

T = TypeVar("T")

PLAIN_PERIOD_SECONDS = 15.0
SILENCE_SECONDS = 8.0
"""After so long without a line, a plain console says what goes on, again and again."""
LONGEST_SILENCE_SECONDS = 60.0
"""Steps may take long, so a stage that counts them waits twice as long each time, up to this."""
QUIET_SECONDS = 5.0
"""A quiet stage that takes less leaves no line."""
READY = "ready"
NARROW = 64
"""Columns under which a bar shows its name, two numbers and the time only."""

_KEY_METRICS = {
    "reward/gold_mean": "gold {:z.3f}",
    "kl/reference_mean": "KL {:z.2f} nats",
    "reward/model_mean": "reward {:z.3f}",
    "value/terminal_mean": "value {:z.3f}",
    "time/step_seconds": "last step {:.1f} s",
}


def key_metrics(metrics: Mapping[str, float | None]) -> str:
    """The few metrics of a step that a person watches, in one line, without those that are missing."""
    return _joined(*(text.format(metrics[name]) for name, text in _KEY_METRICS.items() if metrics.get(name) is not None))


def duration(seconds: float) -> str:
    """A time span for people: `42 s`, `3 min 05 s`, `2 h 10 min`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


class Shell(str):
    """A shell line. Where the terminal is too narrow for it, it is broken in such a way that it can be pasted."""

    def broken(self, width: int) -> str:
        lines = [""]
        for word in map(shlex.quote, shlex.split(self)):
            if lines[-1].strip() and len(lines[-1]) + len(word) + 3 > width:
                lines[-1] += " \\"
                lines.append("    ")
            lines[-1] += f" {word}" if lines[-1].strip() else word
        return "\n".join(lines)


def _joined(*parts: str) -> str:
    return " · ".join(filter(None, parts))


class _LiveBars(Progress):
    """Bars with their details on a line below, so that both fit a terminal of 40 columns."""

    def __init__(self, console: Console) -> None:
        self.narrow = console.width < NARROW
        name, count, elapsed = TextColumn("{task.description}"), TextColumn("{task.fields[count]}"), TimeElapsedColumn()
        columns = (name, count, elapsed) if self.narrow else (name, BarColumn(bar_width=20), count, elapsed, _TimeLeft())
        super().__init__(*columns, console=console)

    def get_renderables(self) -> Iterable[RenderableType]:
        for task in self.tasks:
            yield self.make_tasks_table([task])
            if task.fields["details"]:
                yield Text(f"  {task.fields['details']}", style="cyan", no_wrap=True, overflow="ellipsis")


class _TimeLeft(ProgressColumn):
    """The remaining time, where it is known."""

    max_refresh = 0.5

    def __init__(self) -> None:
        super().__init__()
        self._remaining = TimeRemainingColumn()

    def render(self, task: Task) -> Text:
        known = task.total is not None and task.time_remaining is not None
        return Text.assemble("left ", self._remaining.render(task)) if known else Text()


class Stage:
    """The progress of one stage of a run; made by `RunConsole.stage`.

    It shows a live bar and leaves a line in the end, or prints plain lines: at the start, at the end, and at most one every
    `PLAIN_PERIOD_SECONDS` between.
    """

    def __init__(self, console: RunConsole, name: str, total: int | None, done: int, unit: str, quiet: bool) -> None:
        self._console, self._bars, self._clock = console, console.bars, console.clock
        self._name, self._total, self._done, self._unit, self._quiet = name, total, done, unit, quiet
        self._done_before, self._details = done, ""
        self._started = self._spoke = self._heard = self._advanced = self._clock()
        self._patience = QUIET_SECONDS if quiet else SILENCE_SECONDS
        self._longest_patience = LONGEST_SILENCE_SECONDS if unit == "steps" else SILENCE_SECONDS
        if self._bars is not None:
            self._task = self._bars.add_task(name, total=total, completed=done, count=self._count(), details="")
        elif not quiet:
            self._console.say(f"{name}: starts" if total is None else self._progress())

    def advance(self, count: int = 1, details: str = "") -> None:
        """`count` more items are done. `details` stay beside the bar until others come."""
        self._done += count
        self._show(details or self._details)

    def step(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Training step `step` is done; shows its key metrics."""
        self._done = step
        self._show(key_metrics(metrics))

    def _show(self, details: str) -> None:
        self._details, self._advanced = details, self._clock()
        now = self._advanced
        if self._bars is not None:
            self._bars.update(self._task, completed=self._done, count=self._count(), details=details)
        elif now - self._spoke >= PLAIN_PERIOD_SECONDS and self._done != self._total:
            self._spoke = now
            self.heard(now)
            self._console.say(_joined(self._progress(), details, self._remaining(now)))

    def heard(self, now: float) -> None:
        """The user has just seen a line of this stage, or of what it does."""
        self._heard, self._patience = now, SILENCE_SECONDS

    def tick(self) -> None:
        """Say that the stage goes on, if nothing has been said for long."""
        now = self._clock()
        if self._bars is None and now - self._heard >= self._patience:
            self._console.say(_joined(self._progress(), f"{duration(now - self._started)} so far", self._remaining(now)))
            self._spoke = self._heard = now
            self._patience = min(2 * max(self._patience, SILENCE_SECONDS), self._longest_patience)

    def finish(self) -> None:
        """Leave a line that stays, unless it is a quiet stage that was short."""
        seconds, silent = self._clock() - self._started, self.is_silent
        if self._bars is None:
            if not silent:
                self._console.say(_joined(self._progress(), self._details, f"done in {duration(seconds)}"))
            return
        self._bars.remove_task(self._task)
        self._bars.refresh()  # otherwise the removed bar stays below the line
        if not silent:
            text = _joined(f"{self._done} {self._unit} in {duration(seconds)}" if self._counts else f"in {duration(seconds)}", self._details)
            self._bars.console.print(Text.assemble(("✓ ", "green"), (self._name, "bold"), f"  {text}"))

    @property
    def is_silent(self) -> bool:
        """A quiet stage that is short: the user has seen no line of it."""
        return self._quiet and self._clock() - self._started < QUIET_SECONDS

    @property
    def _counts(self) -> bool:
        """False for a stage that has no items."""
        return self._total is not None or self._done > 0

    def _count(self) -> str:
        if not self._counts:
            return ""
        count = self._done if self._total is None else f"{self._done}/{self._total}"
        return f"{count}" if self._bars is not None and self._bars.narrow else f"{count} {self._unit}".rstrip()

    def _progress(self) -> str:
        return f"{self._name}: {self._count()}" if self._counts else self._name

    def _remaining(self, now: float) -> str:
        done = self._done - self._done_before
        if self._total is None or done <= 0:
            return ""
        left = (self._advanced - self._started) / done * (self._total - self._done) - (now - self._advanced)
        return f"{duration(left)} left" if left > 0 else ""


class PipedConsole(Console):
    """Rich's, which leaves it to the command what happens when the reader of its output is gone."""

    def on_broken_pipe(self) -> None:
        raise  # rich calls this while it handles the error


class RunConsole:
    """The console of a run; a context manager.

        with RunConsole() as console:
            console.header("DVPO", {"model": "SmolLM2-135M-Instruct", "run folder": "runs/quickstart"})
            with console.stage("policy optimisation", total=100, unit="steps") as stage:
                stage.step(1, metrics)

    Args:
        console: where to print; standard output by default.
        clock: seconds, for the pace of plain lines.
    """

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console or PipedConsole(highlight=False)
        self.clock = clock
        self.bars: _LiveBars | None = None
        self._stages: list[Stage] = []
        self._over = threading.Event()
        self._states: dict[str, str] = {}
        self._starting_since = 0.0

    def __enter__(self) -> RunConsole:
        if self._console.is_terminal:
            self.bars = _LiveBars(self._console)
            self.bars.start()
        else:
            self._over.clear()
            threading.Thread(target=self._tick, daemon=True).start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._over.set()
        if self.bars is not None:
            self.bars.stop()
            self.bars = None

    def _tick(self) -> None:
        with suppress(BrokenPipeError):  # the command itself sees that the reader is gone
            while not self._over.wait(1.0):
                for stage in self._stages[-1:]:
                    stage.tick()

    def header(self, title: str, facts: Mapping[str, object]) -> None:
        """What runs, and with what."""
        if self.bars is None:
            self.say(title)
            for name, value in facts.items():
                self.say(f"  {name}: {value}")
            return
        table = Table.grid(padding=(0, 2))
        table.add_column(overflow="fold")
        table.add_column(overflow="fold")
        for name, value in facts.items():
            table.add_row(Text(name, style="dim"), Text(str(value)))
        self._console.print(Panel(table, title=Text(title, style="bold"), title_align="left", expand=False))

    def say(self, text: str) -> None:
        """One line for the user; on a terminal it is wrapped between words."""
        if isinstance(text, Shell) and self._console.is_terminal:
            # A word that is longer than a line is left to the terminal, which copies it whole.
            self._console.print(Text(text.broken(self._console.width)), soft_wrap=True)
        else:
            self._print(Text(text))

    def warn(self, text: str) -> None:
        """One line that the user should not miss."""
        self._print(Text(f"warning: {text}", style="yellow"))

    def _print(self, text: Text) -> None:
        if self._console.is_terminal:
            self._console.print(text)
            return
        # Not by rich: it would print a line again that Ctrl-C interrupted after its write.
        self._console.file.write(f"{text.plain}\n")
        self._console.file.flush()

    def starting(self, roles: Mapping[str, str]) -> None:
        """How far the start of the actors is: one line for each state that has changed since the last call.

        Args:
            roles: by actor, such as `rollout-0`, its state: importing, loading, ready.
        """
        now = self.clock()
        if all(self._states.get(actor, READY) == READY for actor in roles):  # of a run that is over, or not there yet
            self._starting_since = now
        changed: dict[str, list[str]] = {}
        for actor, state in roles.items():
            if self._states.get(actor) != state:
                changed.setdefault(state, []).append(actor)
        self._states.update(roles)
        seconds = now - self._starting_since
        for state, actors in changed.items():
            self.say(f"{', '.join(actors)}: {state}" + (f" after {duration(seconds)}" if seconds >= 1 else ""))
        if changed:
            for stage in self._stages[-1:]:
                stage.heard(now)

    @contextmanager
    def stage(self, name: str, total: int | None = None, *, done: int = 0, unit: str = "", quiet: bool = False) -> Iterator[Stage]:
        """A stage with a bar: `done` of `total` items are done already; a total of None is unknown.

        Args:
            quiet: a stage of less than `QUIET_SECONDS` leaves no line.
        """
        stage = Stage(self, name, total, done, unit, quiet)
        self._stages.append(stage)
        try:
            yield stage
        finally:
            self._stages.remove(stage)
            if not stage.is_silent:
                for outer in self._stages[-1:]:
                    outer.heard(self.clock())
        stage.finish()

    @contextmanager
    def entering(self, name: str, context: AbstractContextManager[T], *, quiet: bool = False) -> Iterator[T]:
        """A context whose start is a stage, such as that of Ray."""
        with ExitStack() as opened:
            with self.stage(name, quiet=quiet):
                value = opened.enter_context(context)
            yield value
