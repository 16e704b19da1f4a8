"""What the user sees while a run goes on: a header, one bar per stage, and notes. Everything else goes to files.

On a terminal the bars are live (rich). Elsewhere, as in CI logs, each stage prints a plain line from time to time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

PLAIN_PERIOD_SECONDS = 15.0

_KEY_METRICS = {
    "reward/gold_mean": "gold {:.3f}",
    "kl/reference_mean": "KL {:.2f} nats",
    "value/terminal_mean": "value {:.3f}",
    "time/step_seconds": "{:.1f} s/step",
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


def _joined(*parts: str) -> str:
    return " · ".join(filter(None, parts))


class _LiveBars(Progress):
    """Bars with their details on a line below, so that both fit a terminal of 80 columns."""

    def get_renderables(self) -> Iterable[RenderableType]:
        for task in self.tasks:
            yield self.make_tasks_table([task])
            if task.fields["details"]:
                yield Text(f"  {task.fields['details']}", style="cyan", no_wrap=True, overflow="ellipsis")


class Stage:
    """The progress of one stage of a run; made by `RunConsole.stage`.

    It shows a live bar and leaves a line in the end, or prints plain lines: at the start, at the end, and at most one every
    `PLAIN_PERIOD_SECONDS` between.
    """

    def __init__(self, console: RunConsole, name: str, total: int | None, done: int, unit: str) -> None:
        self._console, self._bars, self._clock = console, console.bars, console.clock
        self._name, self._total, self._done, self._unit = name, total, done, unit
        self._done_before, self._details = done, ""
        self._started = self._spoke = self._clock()
        if self._bars is not None:
            self._task = self._bars.add_task(name, total=total, completed=done, unit=unit, details="")
        else:
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
        self._details, now = details, self._clock()
        if self._bars is not None:
            self._bars.update(self._task, completed=self._done, details=details)
        elif now - self._spoke >= PLAIN_PERIOD_SECONDS and self._done != self._total:
            self._spoke = now
            self._console.say(_joined(self._progress(), details, self._remaining(now)))

    def finish(self) -> None:
        """Leave a line that stays."""
        took = duration(self._clock() - self._started)
        if self._bars is None:
            self._console.say(_joined(self._progress(), self._details, f"done in {took}"))
            return
        self._bars.remove_task(self._task)
        self._bars.refresh()  # otherwise the removed bar stays below the line
        counted = f"{self._done} {self._unit} " if self._counts else ""
        text = _joined(f"{counted}in {took}", self._details)
        self._bars.console.print(Text.assemble(("✓ ", "green"), (self._name, "bold"), f"  {text}"), soft_wrap=True)

    @property
    def _counts(self) -> bool:
        """False for a stage that has no items."""
        return self._total is not None or self._done > 0

    def _progress(self) -> str:
        if not self._counts:
            return self._name
        count = self._done if self._total is None else f"{self._done}/{self._total}"
        return f"{self._name}: {count} {self._unit}".rstrip()

    def _remaining(self, now: float) -> str:
        done = self._done - self._done_before
        if self._total is None or done <= 0:
            return ""
        return f"{duration((now - self._started) / done * (self._total - self._done))} left"


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

    def __enter__(self) -> RunConsole:
        if self._console.is_terminal:
            self.bars = _LiveBars(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[unit]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self.bars.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        if self.bars is not None:
            self.bars.stop()
            self.bars = None

    def header(self, title: str, facts: Mapping[str, object]) -> None:
        """What runs, and with what."""
        if self.bars is None:
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
        """A stage with a bar: `done` of `total` items are done already; a total of None is unknown."""
        stage = Stage(self, name, total, done, unit)
        yield stage
        stage.finish()
