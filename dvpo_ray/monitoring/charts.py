"""Small charts as inline SVG. Colours come from CSS classes, so that one picture fits light and dark pages.

Every chart has an `aria-label` that says in words what it shows, and a `<title>` per step that browsers show as a tooltip.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 520, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 14, 12, 34

Values = Sequence[float | None]
Interval = tuple[float, float, float]
"""mean, low, high"""


@dataclass(frozen=True)
class Series:
    """One line, or one layer of a stack.

    Attributes:
        label: name in the legend and the tooltips.
        ys: one value per x; None leaves a gap.
        color: CSS class, `c1` to `c8`.
        dashed: a secondary line.
    """

    label: str
    ys: Values
    color: str = "c1"
    dashed: bool = False


class Frame:
    """The drawing area: axes, grid lines, and data mapped onto pixels.

    Args:
        xs, ys: all data that must fit in. The y range ends at ticks.
        steps: x counts steps: ticks are whole numbers, and the x range ends at the data. Otherwise it ends at ticks.
    """

    def __init__(self, xs: Values, ys: Values, x_label: str, *, steps: bool = True, height: int = HEIGHT) -> None:
        xs, ys = ([value for value in values if value is not None] or [0.0] for values in (xs, ys))
        x_ticks, self.y_ticks = nice_ticks(min(xs), max(xs), count=6, whole=steps), nice_ticks(min(ys), max(ys), count=5)
        self.left, self.right = (min(xs), max(xs)) if steps else (x_ticks[0], x_ticks[-1])
        self.x_ticks = [tick for tick in x_ticks if self.left <= tick <= self.right]
        self.x_label, self.height, self.base = x_label, height, height - _BOTTOM

    def x(self, value: float) -> float:
        span = self.right - self.left
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * ((value - self.left) / span if span > 0 else 0.5)

    def y(self, value: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return self.base - (self.base - _TOP) * (value - low) / (high - low)

    def way(self, points: Sequence[tuple[float, float]]) -> str:
        """The path through points of the data."""
        return "M" + "L".join(f"{self.x(x):.1f} {self.y(y):.1f}" for x, y in points)

    def rule(self, y: float, css: str) -> str:
        """A horizontal line over the whole width."""
        return f'<line class="{css}" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{self.y(y):.1f}" y2="{self.y(y):.1f}"/>'

    def y_axis(self) -> str:
        labels = [f'<text x="{_LEFT - 7}" y="{self.y(tick) + 4:.1f}" text-anchor="end">{number(tick)}</text>' for tick in self.y_ticks]
        return "".join([*labels, *(self.rule(tick, "grid" if tick else "grid zero") for tick in self.y_ticks)])

    def x_axis(self) -> str:
        places = [(self.x(tick), self.base + 16, number(tick)) for tick in self.x_ticks]
        places.append(((_LEFT + WIDTH - _RIGHT) / 2, self.height - 3, escape(self.x_label)))
        return "".join(f'<text x="{x:.1f}" y="{y}" text-anchor="middle">{text}</text>' for x, y, text in places)

    def svg(self, body: Sequence[str], words: str) -> Markup:
        """The picture; `words` say what it shows."""
        return Markup(f'<svg viewBox="0 0 {WIDTH} {self.height}" role="img" aria-label="{escape(words)}">{"".join(body)}</svg>')


def line_chart(
    xs: Sequence[float],
    series: Sequence[Series],
    *,
    spread: Values = (),
    marks: Sequence[tuple[float, Interval]] = (),
    name: str = "",
    x_label: str = "step",
    from_zero: bool = False,
    limit: float | None = None,
    tokens: Sequence[str] = (),
) -> Markup:
    """Lines over steps.

    Args:
        xs: ascending positions, the same for every line.
        spread: standard deviations around the first line, drawn as an area.
        marks: held-out means with their intervals, at positions of their own.
        name: what is shown, for the description.
        from_zero: the y axis includes 0.
        limit: a bound for the lines, drawn if it is in sight.
        tokens: the texts of tokens at positions 1, 2, …, for the tooltips.
    """
    band = [(x, y, s) for x, y, s in zip(xs, series[0].ys, spread, strict=True) if y is not None and s is not None] if spread else []
    heights = [y for s in series for y in s.ys] + [y + sign * s for _, y, s in band for sign in (-1, 1)] + [y for _, m in marks for y in m]
    frame = Frame([*xs, *(x for x, _ in marks)], [*heights, 0.0] if from_zero else heights, x_label)
    parts = [frame.y_axis(), frame.x_axis()]
    if limit is not None and frame.y_ticks[0] <= limit <= frame.y_ticks[-1]:
        parts.append(frame.rule(limit, "limit"))
    if band:
        edge = [(x, y + s) for x, y, s in band] + [(x, y - s) for x, y, s in reversed(band)]
        parts.append(f'<path class="band {series[0].color}" d="{frame.way(edge)}z"/>')
    parts += [_line(frame, xs, s) for s in series]
    rows = [(s.label, s.ys) for s in series] + ([("± 1 standard deviation", spread)] if spread else [])
    parts.append(_hover(frame, xs, rows, tokens))
    for x, mark in marks:
        parts.append(f'<path class="whisker c2" d="{frame.way([(x, y) for y in mark[1:]])}"/>')
        parts.append(_dot(frame, x, mark[0], "dot c2", 4.5, f"{x_label} {number(x)}\nheld out {_interval(mark)}"))
    return frame.svg(parts, _words(name, xs, series, x_label))


def stacked_chart(xs: Sequence[float], layers: Sequence[Series], *, name: str) -> Markup:
    """One stacked bar per step. Missing values count 0."""
    tops = [0.0] * len(xs)
    spacing = min((b - a for a, b in zip(xs, xs[1:], strict=False)), default=1.0)
    totals = [sum(layer.ys[i] or 0.0 for layer in layers) for i in range(len(xs))]
    frame = Frame([xs[0] - spacing / 2, xs[-1] + spacing / 2], [0.0, *totals], "step")
    width = max(0.5, (frame.x(xs[0] + spacing) - frame.x(xs[0])) * 0.78)
    parts = [frame.y_axis(), frame.x_axis()]
    for layer in layers:
        path = ""
        for i, x in enumerate(xs):
            bottom, tops[i] = tops[i], tops[i] + (layer.ys[i] or 0.0)
            path += f"M{frame.x(x) - width / 2:.1f} {frame.y(bottom):.1f}V{frame.y(tops[i]):.1f}h{width:.1f}V{frame.y(bottom):.1f}z"
        parts.append(f'<path class="fill {layer.color}" d="{path}"/>')
    parts.append(_hover(frame, xs, [(layer.label, layer.ys) for layer in layers]))
    return frame.svg(parts, _words(name, xs, [Series("total", totals)], "step"))


def path_chart(xs: Values, ys: Values, steps: Sequence[int], *, name: str, x_label: str, y_label: str) -> Markup:
    """The way through a plane over the steps, from a hollow first point to a full last one."""
    points = [(x, y, step) for x, y, step in zip(xs, ys, steps, strict=True) if x is not None and y is not None]
    frame = Frame([x for x, _, _ in points], [y for _, y, _ in points], x_label, steps=False)
    parts = [frame.y_axis(), frame.x_axis(), f'<path class="line thin c8" d="{frame.way([p[:2] for p in points])}"/>']
    for i, (x, y, step) in enumerate(points):
        css, radius = "dot c1" if i else "hollow c1", 5.5 if i in (0, len(points) - 1) else 3.5
        age = 0.35 + 0.65 * i / max(len(points) - 1, 1)
        parts.append(_dot(frame, x, y, css, radius, f"step {step}\n{x_label} {number(x)}\n{y_label} {number(y)}", age))
    (x0, y0, _), (x1, y1, _) = points[0], points[-1]
    return frame.svg(parts, f"{name}: from {y_label} {number(y0)} at {x_label} {number(x0)} to {number(y1)} at {number(x1)}.")


def range_chart(rows: dict[str, Interval], *, name: str, x_label: str) -> Markup:
    """Means with their 95 % intervals, one below the other on one scale; the last row is the main one."""
    frame = Frame([x for row in rows.values() for x in row], [0.0, len(rows)], x_label, steps=False, height=26 * len(rows) + 44)
    frame.y_ticks = [0.0, float(len(rows))]
    parts = [frame.rule(0, "grid"), frame.x_axis()]
    if frame.left <= 0 <= frame.right:
        parts.append(f'<path class="grid zero" d="{frame.way([(0, 0), (0, len(rows))])}"/>')
    for i, (label, row) in enumerate(rows.items()):
        y, color = len(rows) - i - 0.5, "c1" if i == len(rows) - 1 else "c8"
        parts.append(f'<text class="strong" x="0" y="{frame.y(y) + 4:.1f}">{label}</text>')
        parts.append(f'<path class="whisker {color}" d="{frame.way([(row[1], y), (row[2], y)])}"/>')
        parts.append(_dot(frame, row[0], y, f"dot {color}", 6, f"{label} {_interval(row)}"))
    return frame.svg(parts, f"{name}: " + "; ".join(f"{label} {_interval(row)}" for label, row in rows.items()) + ".")


# ------------------------------------------------------------------------------------------------------ numbers


def nice_ticks(low: float, high: float, *, count: int, whole: bool = False) -> list[float]:
    """About `count` ticks at 1, 2 or 5 times a power of ten that enclose a range; `whole` allows whole numbers only."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        margin = abs(low) * 0.1 or 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    if whole:
        step = max(1.0, step)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, max(last, first + 1) + 1)]


def number(value: float) -> str:
    """A number for people: three significant digits, thousands separated."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e7 or size < 1e-4:
        return f"{value:.1e}".replace("e+0", "e").replace("e-0", "e−").replace("-", "−")
    decimals = 0 if size >= 100 else max(0, 2 - math.floor(math.log10(size)))
    text = f"{value:,.{decimals}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text).replace("-", "−")


def _interval(interval: Interval) -> str:
    mean, low, high = map(number, interval)
    return f"{mean}, 95 % interval {low} to {high}"


def _words(name: str, xs: Sequence[float], series: Sequence[Series], x_label: str) -> str:
    """What a chart shows, for people who cannot see it."""
    parts = []
    for s in series:
        known = [f"{number(y)} at {x_label} {number(x)}" for x, y in zip(xs, s.ys, strict=True) if y is not None]
        if known:
            parts.append(f"{s.label} from {known[0]} to {known[-1]}")
    return f"{name}: " + "; ".join(parts) + "."


# -------------------------------------------------------------------------------------------------------- shapes


def _line(frame: Frame, xs: Sequence[float], series: Series) -> str:
    """A path per stretch without a gap; a stretch of one point is a dot."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(xs, series.ys, strict=True):
        if y is None:
            runs.append([])
        else:
            runs[-1].append((x, y))
    css = f"line {series.color}{' dashed' if series.dashed else ''}"
    return "".join(
        f'<path class="{css}" d="{frame.way(run)}"/>' if len(run) > 1 else _dot(frame, *run[0], f"dot {series.color}", 3) for run in runs if run
    )


def _dot(frame: Frame, x: float, y: float, css: str, radius: float, tip: str = "", opacity: float = 1.0) -> str:
    inside = f"<title>{escape(tip)}</title>" if tip else ""
    style = f' style="opacity:{opacity:.2f}"' if opacity < 1 else ""
    return f'<circle class="{css}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="{radius}"{style}>{inside}</circle>'


def _hover(frame: Frame, xs: Sequence[float], rows: Sequence[tuple[str, Values]], tokens: Sequence[str] = ()) -> str:
    """An invisible column per step whose tooltip lists every value of that step."""
    places = [frame.x(x) for x in xs]
    edges = [_LEFT, *((a + b) / 2 for a, b in zip(places, places[1:], strict=False)), WIDTH - _RIGHT]
    parts = []
    for i, x in enumerate(xs):
        of_token = tokens and i > 0
        lines = [f"{frame.x_label} {number(x)}", *([repr(tokens[i - 1])] if of_token else [])]
        lines += [f"{label} {number(values[i])}" for label, values in rows if values[i] is not None]
        area = f'x="{edges[i]:.1f}" y="{_TOP}" width="{edges[i + 1] - edges[i]:.1f}" height="{frame.base - _TOP}"'
        mark = f' data-token="{i - 1}"' if of_token else ""
        parts.append(f'<rect class="hit" {area}{mark}><title>{escape(chr(10).join(lines))}</title></rect>')
    return "".join(parts)
