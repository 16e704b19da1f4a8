"""What the user sees while a run goes on: a header, one bar per stage, and notes. Everything else goes to files.

On a terminal the bars are live (rich). Where standard output is no terminal, as in CI logs, each stage prints plain lines
from time to time instead.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

PLAIN_PERIOD_SECONDS = 15.0

_KEY_METRICS = (
    ("reward/gold_mean", "gold {:.3f}"),
    ("kl/reference_mean", "KL {:.2f} nats"),
    ("value/terminal_mean", "value {:.3f}"),
    ("time/step_seconds", "{:.1f} s/step"),
)


def key_metrics(metrics: Mapping[str, float | None]) -> str:
    """The few metrics of a step that a person watches, as one line; those that are missing are left out."""
    return " · ".join(text.format(metrics[name]) for name, text in _KEY_METRICS if metrics.get(name) is not None)


def duration(seconds: float) -> str:
    """A time span for people: `42 s`, `3 min 05 s`, `2 h 10 min`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


class Stage(ABC):
    """The progress of one stage of a run; made by `RunConsole.stage`."""

    def __init__(self, done: int) -> None:
        self._done = done
        self._details = ""

    def advance(self, count: int = 1, details: str = "") -> None:
        """So many more items are done. `details` stay beside the bar until others come."""
        self._done += count
        self._details = details or self._details
        self._show()

    def step(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Training step `step` is done; shows its key metrics."""
        self._done = step
        self._details = key_metrics(metrics)
        self._show()

    @abstractmethod
    def _show(self) -> None:
        """Show how far the stage is."""

    @abstractmethod
    def _finish(self) -> None:
        """Leave a line that stays."""


class _LiveBars(Progress):
    """Bars with their details on a line below, so that both fit a terminal of 80 columns."""

    def get_renderables(self) -> Iterable[RenderableType]:
        for task in self.tasks:
            yield self.make_tasks_table([task])
            if task.fields["details"]:
                yield Text(f"  {task.fields['details']}", style="cyan", no_wrap=True, overflow="ellipsis")


class _LiveStage(Stage):
    """A bar of a live display; when it is done, a line that stays."""

    def __init__(self, bars: _LiveBars, name: str, total: int | None, done: int, unit: str) -> None:
        super().__init__(done)
        self._bars = bars
        self._name, self._unit = name, unit
        self._task = bars.add_task(name, total=total, completed=done, unit=unit, details="")

    def _show(self) -> None:
        self._bars.update(self._task, completed=self._done, details=self._details)

    def _finish(self) -> None:
        took = duration(next(task for task in self._bars.tasks if task.id == self._task).elapsed or 0.0)
        self._bars.remove_task(self._task)
        self._bars.refresh()  # else the line is printed above a bar that is no more
        text = " · ".join(filter(None, [f"{self._done} {self._unit} in {took}", self._details]))
        self._bars.console.print(Text.assemble(("✓ ", "green"), (self._name, "bold"), f"  {text}"), soft_wrap=True)


class _PlainStage(Stage):
    """Lines from time to time: at the start, at the end, and at most one every `PLAIN_PERIOD_SECONDS` between."""

    def __init__(self, say: Callable[[str], None], clock: Callable[[], float], name: str, total: int | None, done: int, unit: str) -> None:
        super().__init__(done)
        self._say, self._clock = say, clock
        self._name, self._unit = name, unit
        self._total = total
        self._first = done
        self._started = self._spoke = clock()
        self._say(f"{name}: starts" if total is None else f"{name}: {done}/{total} {unit}".rstrip())

    def _show(self) -> None:
        now = self._clock()
        if now - self._spoke < PLAIN_PERIOD_SECONDS or self._done == self._total:
            return
        self._spoke = now
        self._say(" · ".join(filter(None, [self._progress(), self._details, self._remaining(now)])))

    def _finish(self) -> None:
        took = f"done in {duration(self._clock() - self._started)}"
        self._say(" · ".join(filter(None, [self._progress(), self._details, took])))

    def _progress(self) -> str:
        count = self._done if self._total is None else f"{self._done}/{self._total}"
        return f"{self._name}: {count} {self._unit}".rstrip()

    def _remaining(self, now: float) -> str:
        done = self._done - self._first
        if self._total is None or done <= 0:
            return ""
        return f"{duration((now - self._started) / done * (self._total - self._done))} left"


class RunConsole:
    """The console of a run; a context manager.

        with RunConsole() as console:
            console.header("DVPO", {"model": "SmolLM2-135M-Instruct", "run folder": "runs/quickstart"})
            with console.stage("policy optimisation", total=100, unit="steps") as stage:
                stage.step(1, metrics)

    Args:
        console: where to print; standard output when not given.
        clock: seconds, for the pace of plain lines.
    """

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console or Console(highlight=False)
        self._clock = clock
        self._bars: _LiveBars | None = None

    def __enter__(self) -> RunConsole:
        if self._console.is_terminal:
            self._bars = _LiveBars(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[unit]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._bars.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def header(self, title: str, facts: Mapping[str, object]) -> None:
        """What runs, and with what."""
        if self._bars is None:
            self.say(title)
            for name, value in facts.items():
                self.say(f"  {name}: {value}")
            return
        table = Table.grid(padding=(0, 2))
        for name, value in facts.items():
            table.add_row(Text(name, style="dim"), Text(str(value)))
        self._console.print(Panel(table, title=Text(title, style="bold"), title_align="left", expand=False))

    def say(self, text: str) -> None:
        """One line for the user."""
        self._console.print(Text(text), soft_wrap=True)

    def warn(self, text: str) -> None:
        """One line that the user should not miss."""
        self._console.print(Text(f"warning: {text}", style="yellow"), soft_wrap=True)

    @contextmanager
    def stage(self, name: str, total: int | None = None, *, done: int = 0, unit: str = "") -> Iterator[Stage]:
        """A stage with a bar: `total` items of which `done` are done already; a total of None is not known."""
        stage = _PlainStage(self.say, self._clock, name, total, done, unit) if self._bars is None else _LiveStage(self._bars, name, total, done, unit)
        yield stage
        stage._finish()
