"""Reading and writing the small files of a run folder: JSON that is always whole and always valid."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dvpo_ray.files import whole_file


def finite(value: Any) -> Any:
    """The same value with every number that is not finite replaced by None, which JSON can hold.

    NumPy and torch scalars become Python numbers, arrays become lists, paths become text.
    """
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if hasattr(value, "tolist"):
        return finite(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


@dataclass(frozen=True)
class BadLine:
    """A line of a JSON Lines file that could not be used; its text names file, line and fault."""

    path: Path
    number: int
    problem: str

    def __str__(self) -> str:
        return f"{self.path}:{self.number}: {self.problem}"


def read_json_lines(path: Path, check: Callable[[dict], str | None] | None = None, *, appended: bool = True) -> tuple[list[dict], list[BadLine]]:
    """The objects of a JSON Lines file, and the lines that hold none.

    Args:
        path: the file, UTF-8.
        check: says what is wrong with an object, None when nothing is; an object with a fault is a bad line.
        appended: the file grows line by line. Then a last line without its newline that does not parse was cut off by a crash
            while it was written, and is neither; a file that is written as a whole has no such line unless it is damaged.
    """
    rows: list[dict] = []
    bad: list[BadLine] = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            if number < len(lines) or not appended:
                bad.append(BadLine(path, number, f"not valid JSON ({error})"))
            continue
        problem = f"expected a JSON object, found {type(row).__name__}" if not isinstance(row, dict) else check and check(row)
        if problem:
            bad.append(BadLine(path, number, problem))
        else:
            rows.append(row)
    return rows, bad


def check_step(row: dict) -> str | None:
    """The fault of a row of metrics.jsonl, None when it has none."""
    return None if isinstance(row.get("step"), int) else "`step` is missing or not a whole number"


def write_json_lines(path: Path, rows: Iterable[dict]) -> None:
    """Write a JSON Lines file as a whole, replacing an older one."""
    with whole_file(path) as file:
        file.writelines(json.dumps(finite(row)) + "\n" for row in rows)
