"""What a step of the check measured: written line by line as it comes, and read again for the table."""

from __future__ import annotations

import json
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from dvpo_ray.errors import one_line


@dataclass(frozen=True)
class Figure:
    """One measurement, or one thing that works or does not.

    Attributes:
        name: what was measured.
        value: a number, or what was found in words.
        unit: of the number.
        target: the bound, in words; empty for a figure that is for information only.
        met: whether the target is reached or the check has passed; None for a figure without.
        error: of a part that failed, in one line; the whole is in the step's log.
    """

    name: str
    value: float | str | None = None
    unit: str = ""
    target: str = ""
    met: bool | None = None
    error: str = ""

    @property
    def measured(self) -> str:
        """Value and unit, for a table."""
        if self.error:
            return f"error: {self.error}"
        if isinstance(self.value, str) or self.value is None:
            return self.value or ""
        digits = 0 if abs(self.value) >= 1000 else 3 if abs(self.value) < 10 else 1
        return f"{self.value:,.{digits}f} {self.unit}".rstrip()

    @property
    def verdict(self) -> str:
        """`met`, `MISSED`, `ok`, `FAILED` or nothing."""
        if self.error:
            return "FAILED"
        if self.met is None:
            return ""
        return ("met" if self.met else "MISSED") if self.target else ("ok" if self.met else "FAILED")


class Report:
    """Where a step puts its figures, and what it may use.

    Attributes:
        device: `cuda` or `cpu`.
        folder: of this step, for whatever it writes; gone after it, but for the ends of its `*.log` files.
        models: folder that the steps share, for checkpoints with random weights.

    Args:
        file: gets a line of JSON for each figure.
    """

    def __init__(self, file: Path, device: str, folder: Path, models: Path) -> None:
        self.device, self.folder, self.models = device, folder, models
        self._file = file

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    def figure(self, name: str, value: float | str, unit: str = "", *, at_least: float | None = None, at_most: float | None = None) -> None:
        """A measured number, or one in words. Bounds are targets for a GPU: on a CPU they are left out."""
        bounds = {">=": at_least, "<=": at_most} if self.on_gpu else {}
        bounds = {sign: bound for sign, bound in bounds.items() if bound is not None}
        met = all(value >= bound if sign == ">=" else value <= bound for sign, bound in bounds.items()) if bounds else None
        target = ", ".join(f"{sign} {bound:g}" for sign, bound in bounds.items())
        self._write(Figure(name, value if isinstance(value, str) else float(value), unit, target, met))

    def check(self, name: str, passed: bool, found: str) -> None:
        """Something that works or does not, on every device."""
        self._write(Figure(name, found, met=bool(passed)))

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A part of a step. If it fails, the step goes on with the next; the whole error is in the step's log."""
        try:
            yield
        except Exception as error:
            self.failed(name, error)

    def failed(self, name: str, error: BaseException) -> None:
        """Note an error, and print the whole of it."""
        traceback.print_exception(error)
        told = one_line(error) if isinstance(error, Exception) else None
        self._write(Figure(name, error=told or f"{type(error).__name__}: {error}"))

    def _write(self, figure: Figure) -> None:
        print(f"{figure.name}: {figure.measured} {figure.target} {figure.verdict}".rstrip(), flush=True)
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(figure)) + "\n")


def read_figures(file: Path) -> list[Figure]:
    """The figures that a step has written so far. A line that the end of the step has cut is left out."""
    if not file.is_file():
        return []
    return [Figure(**json.loads(line)) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]


def markdown_rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table."""
    cells = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(' '.join(cell.replace('|', '/').split()) for cell in row)} |" for row in cells]
