"""What an experiment leaves: statistics over seeds, a markdown table, a plot and a JSON file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dvpo_ray.files import whole_file
from dvpo_ray.monitoring.run_files import finite

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Student's t, 97.5 % quantile, for 1 to 30 degrees of freedom.
_T975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
_Z975 = 1.960

RESULT = "result.json"

Statistic = dict
"""A cell of a table: `mean`, `std`, `ci95` ([low, high], None where there are fewer than two values) and `values`, one per seed."""


@dataclass(frozen=True)
class Result:
    """What the runs of an experiment say together.

    Attributes:
        table: rows; the first key of a row is its label, every `Statistic` is a column.
        draw: draws the plot on an empty figure.
        details: more for result.json, such as the curves behind the table.
        columns: columns of the markdown table, where it shows fewer than there are.
    """

    table: list[dict]
    draw: Callable[[Figure], None]
    details: Mapping = field(default_factory=dict)
    columns: Sequence[str] | None = None


def over_seeds(values: Sequence[float]) -> Statistic:
    """Mean, standard deviation (unbiased; 0 for one value) and 95 % interval of the mean by Student's t, over the seeds.

    One value that is NaN, as of a run that never got somewhere, makes all of them NaN.
    """
    values = [float(value) for value in values]
    mean, n = float(np.mean(values)), len(values)
    std = float(np.std(values, ddof=1)) if n > 1 else 0.0
    half = t_quantile(n - 1) * std / math.sqrt(n) if n > 1 else math.nan
    return {"mean": mean, "std": std, "ci95": [mean - half, mean + half] if n > 1 else None, "values": values}


def columns(measured: Sequence[Mapping[str, float]]) -> dict[str, Statistic]:
    """A column for each number that all runs of a variant have, over their seeds; none without runs."""
    names = [name for name in (measured[0] if measured else ()) if all(name in one for one in measured)]
    return {name: over_seeds([one[name] for one in measured]) for name in names}


def half_width(cell: Statistic) -> float:
    """Half of the interval, for error bars; 0 where there is none."""
    return cell["mean"] - cell["ci95"][0] if cell["ci95"] else 0.0


def t_quantile(degrees_of_freedom: int) -> float:
    """97.5 % quantile of Student's t; that of the normal distribution above 30 degrees of freedom."""
    return _T975[degrees_of_freedom - 1] if degrees_of_freedom <= len(_T975) else _Z975


def first_reaching(x: np.ndarray, y: np.ndarray, level: float) -> float:
    """y where x first reaches a level, linear between points; NaN when it never does. x need not be monotonic."""
    reached = np.flatnonzero(np.asarray(x) >= level)
    if len(reached) == 0:
        return float("nan")
    i = int(reached[0])
    return float(y[0]) if i == 0 else float(np.interp(level, x[i - 1 : i + 1], y[i - 1 : i + 1]))


# ---------------------------------------------------------------------------------------------------------- table


def with_interval(cell: Statistic) -> str:
    """`0.712 [0.690, 0.734]`, three decimals, or one from a hundred on; a dash for a number that not every seed has."""
    if not np.isfinite(cell["mean"]):
        return "–"
    mean, *ends = (f"{value:.1f}" if abs(value) >= 100 else f"{value:.3f}" for value in (cell["mean"], *(cell["ci95"] or ())))
    return mean + (f" [{', '.join(ends)}]" if ends else "")


def with_deviation(cell: Statistic) -> str:
    """`0.712 ± 0.009`, the standard deviation over seeds; a dash for a number that not every seed has."""
    return "–" if np.isnan(cell["mean"]) else f"{cell['mean']:.3f} ± {cell['std']:.3f}"


def markdown(table: Sequence[dict], cell: Callable[[Statistic], str] = with_interval, columns: Sequence[str] | None = None) -> str:
    """The table for the docs: the label of each row, then its statistics (or those of `columns`); a missing one is a dash."""
    label = next(iter(table[0]))
    every = dict.fromkeys(name for row in table for name, value in row.items() if isinstance(value, dict))
    names = [name for name in every if columns is None or name in columns]
    rows = [[label, *names], ["---"] * (1 + len(names))]
    rows += [[f"`{row[label]}`", *(cell(row[name]) if name in row else "–" for name in names)] for row in table]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def write_result(folder: Path, result: Result, about: Mapping, table: str) -> None:
    """Write result.json, table.md and plot.png.

    Args:
        about: the setting, which comes first in result.json.
        table: the markdown table.
    """
    from matplotlib.figure import Figure

    content = {**about, "table": result.table, **result.details}
    for name, text in ((RESULT, json.dumps(finite(content), indent=1) + "\n"), ("table.md", table)):
        with whole_file(folder / name) as file:
            file.write(text)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    result.draw(figure)
    figure.savefig(folder / "plot.png", dpi=130)
