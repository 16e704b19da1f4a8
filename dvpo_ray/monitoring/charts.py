"""Small charts as inline SVG. Colours come from CSS classes, so that one picture fits light and dark pages.

Every chart has an `aria-label` that says in words what it shows, and a `<title>` per step that browsers show as a tooltip.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from dvpo_ray.monitoring.markup import escape

WIDTH, HEIGHT = 520, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 14, 12, 34

Values = Sequence[float | None]


@dataclass(frozen=True)
class Series:
    """One line.

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


@dataclass(frozen=True)
class Band:
    """The area between two lines, for a spread around a mean."""

    label: str
    lows: Values
    highs: Values
    color: str = "c1"


@dataclass(frozen=True)
class Marks:
    """Points with intervals, at positions of their own: (x, mean, low, high)."""

    label: str
    points: Sequence[tuple[float, float, float, float]]
    color: str = "c2"


@dataclass(frozen=True)
class Frame:
    """The drawing area: data ranges mapped onto it, with axes, grid lines and labels."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    x_label: str = "step"
    height: int = HEIGHT
    x_ticks: list[float] = field(default_factory=list)
    y_ticks: list[float] = field(default_factory=list)

    def x(self, value: float) -> float:
        low, high = self.x_range
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * ((value - low) / (high - low) if high > low else 0.5)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return self.height - _BOTTOM - (self.height - _TOP - _BOTTOM) * ((value - low) / (high - low) if high > low else 0.5)

    def axes(self) -> str:
        return self.y_axis() + self.x_axis()

    def y_axis(self) -> str:
        parts = []
        for tick in self.y_ticks:
            zero = " zero" if tick == 0 else ""
            parts.append(f'<line class="grid{zero}" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{self.y(tick):.1f}" y2="{self.y(tick):.1f}"/>')
            parts.append(f'<text class="tick" x="{_LEFT - 7}" y="{self.y(tick) + 4:.1f}" text-anchor="end">{number(tick)}</text>')
        return "".join(parts)

    def x_axis(self) -> str:
        base = self.height - _BOTTOM + 16
        parts = [f'<text class="tick" x="{self.x(tick):.1f}" y="{base}" text-anchor="middle">{number(tick)}</text>' for tick in self.x_ticks]
        middle = (_LEFT + WIDTH - _RIGHT) / 2
        parts.append(f'<text class="axis" x="{middle}" y="{self.height - 3}" text-anchor="middle">{escape(self.x_label)}</text>')
        return "".join(parts)

    def svg(self, body: str, description: str) -> str:
        return f'<svg viewBox="0 0 {WIDTH} {self.height}" role="img" aria-label="{escape(description)}">{body}</svg>'


def line_chart(
    xs: Sequence[float],
    series: Sequence[Series],
    *,
    bands: Sequence[Band] = (),
    marks: Marks | None = None,
    name: str = "",
    x_label: str = "step",
    from_zero: bool = False,
    limit: float | None = None,
    tokens: Sequence[str] = (),
) -> str:
    """Lines over steps, with optional bands behind and marked points before them.

    Args:
        xs: ascending positions, the same for every line and band.
        name: of what is shown, for the description.
        from_zero: the y axis takes in 0.
        limit: a bound that the lines should stay within, drawn where it is in sight.
        tokens: where positions 1, 2, … are those of tokens, their texts, for the tooltips.
    """
    heights = [y for s in series for y in s.ys] + [y for b in bands for y in (*b.lows, *b.highs)]
    positions = list(xs)
    if marks:
        heights += [y for point in marks.points for y in point[1:]]
        positions += [point[0] for point in marks.points]
    frame = make_frame(positions, [*heights, 0.0] if from_zero else heights, x_label)
    parts = [frame.axes()]
    if limit is not None and frame.y_range[0] <= limit <= frame.y_range[1]:
        parts.append(f'<line class="limit" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{frame.y(limit):.1f}" y2="{frame.y(limit):.1f}"/>')
    parts += [f'<path class="band {b.color}" d="{_area(frame, xs, b.lows, b.highs)}"/>' for b in bands]
    parts += [_line(frame, xs, s) for s in series]
    parts += [_whisker(frame, point, marks.color) for point in marks.points] if marks else []
    parts.append(_hover_columns(frame, xs, [*((s.label, s.ys) for s in series), *_band_rows(bands)], x_label, tokens))
    parts += [_mark_title(frame, marks.label, point, x_label) for point in marks.points] if marks else []
    return frame.svg("".join(parts), describe(name, xs, series, x_label))


def stacked_chart(xs: Sequence[float], layers: Sequence[Series], *, name: str = "", x_label: str = "step") -> str:
    """One stacked bar per step. Missing values count 0."""
    bottoms = [0.0] * len(xs)
    bars = []
    tops = [sum(layer.ys[i] or 0.0 for layer in layers) for i in range(len(xs))]
    spacing = min((b - a for a, b in zip(xs, xs[1:], strict=False)), default=1.0)
    frame = make_frame([xs[0] - spacing / 2, xs[-1] + spacing / 2], [0.0, *tops], x_label)
    width = max(0.5, (frame.x(xs[0] + spacing) - frame.x(xs[0])) * 0.78)
    for layer in layers:
        path = []
        for i, x in enumerate(xs):
            value = layer.ys[i] or 0.0
            low, high = frame.y(bottoms[i]), frame.y(bottoms[i] + value)
            bottoms[i] += value
            if low - high > 0.05:
                path.append(f"M{frame.x(x) - width / 2:.1f} {low:.1f}V{high:.1f}h{width:.1f}V{low:.1f}z")
        bars.append(f'<path class="fill {layer.color}" d="{"".join(path)}"/>')
    hover = _hover_columns(frame, xs, [(layer.label, layer.ys) for layer in layers], x_label)
    return frame.svg(frame.axes() + "".join(bars) + hover, describe(name, xs, [Series("total", tops)], x_label))


def path_chart(xs: Values, ys: Values, steps: Sequence[int], *, name: str, x_label: str, y_label: str) -> str:
    """The way through a plane over the steps, from a hollow first point to a full last one."""
    points = [(x, y, step) for x, y, step in zip(xs, ys, steps, strict=True) if x is not None and y is not None]
    frame = make_frame([p[0] for p in points], [p[1] for p in points], x_label, steps=False)
    way = "M" + "L".join(f"{frame.x(x):.1f} {frame.y(y):.1f}" for x, y, _ in points)
    parts = [frame.axes(), f'<path class="line thin c8" d="{way}"/>']
    for i, (x, y, step) in enumerate(points):
        kind = "hollow" if i == 0 else "dot"
        age = 0.35 + 0.65 * i / max(len(points) - 1, 1)
        tip = escape(f"step {step}\n{x_label} {number(x)}\n{y_label} {number(y)}")
        at = f'cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="{5.5 if i in (0, len(points) - 1) else 3.5}"'
        parts.append(f'<circle class="{kind} c1" {at} style="opacity:{age:.2f}"><title>{tip}</title></circle>')
    first, last = points[0], points[-1]
    words = f"{name}: from {y_label} {number(first[1])} at {x_label} {number(first[0])} to {number(last[1])} at {number(last[0])}."
    return frame.svg("".join(parts), words)


# ------------------------------------------------------------------------------------------------------- scales


def make_frame(xs: Values, ys: Values, x_label: str, *, steps: bool = True, height: int = HEIGHT) -> Frame:
    """A frame around the data, its y range widened to the next ticks.

    Args:
        steps: x counts steps: ticks are whole numbers and the range is that of the data; else it is widened to the next ticks.
    """
    heights = [y for y in ys if y is not None] or [0.0]
    widths = [x for x in xs if x is not None] or [0.0]
    y_ticks = nice_ticks(min(heights), max(heights), count=5)
    x_ticks = nice_ticks(min(widths), max(widths), count=6, whole=steps)
    x_range = (min(widths), max(widths)) if steps else (x_ticks[0], x_ticks[-1])
    shown = [tick for tick in x_ticks if x_range[0] <= tick <= x_range[1]]
    return Frame(x_range, (y_ticks[0], y_ticks[-1]), x_label, height, shown, y_ticks)


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
    if "." in text:
        text = text.rstrip("0").rstrip(".")
    return text.replace("-", "−")


def describe(name: str, xs: Sequence[float], series: Sequence[Series], x_label: str) -> str:
    """What a chart shows, in words, for those who cannot see it."""
    parts = []
    for s in series:
        known = [(x, y) for x, y in zip(xs, s.ys, strict=True) if y is not None]
        if known:
            (x0, y0), (x1, y1) = known[0], known[-1]
            parts.append(f"{s.label} from {number(y0)} at {x_label} {number(x0)} to {number(y1)} at {x_label} {number(x1)}")
    return f"{name}: " + "; ".join(parts) + "."


# -------------------------------------------------------------------------------------------------------- shapes


def _runs(xs: Sequence[float], *columns: Values) -> list[list[int]]:
    """Indices of the stretches without a gap."""
    runs: list[list[int]] = [[]]
    for i in range(len(xs)):
        if all(column[i] is not None for column in columns):
            runs[-1].append(i)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _line(frame: Frame, xs: Sequence[float], series: Series) -> str:
    style = f'class="line {series.color}{" dashed" if series.dashed else ""}"'
    parts = []
    for run in _runs(xs, series.ys):
        if len(run) == 1:
            parts.append(f'<circle class="dot {series.color}" cx="{frame.x(xs[run[0]]):.1f}" cy="{frame.y(series.ys[run[0]]):.1f}" r="3"/>')
        else:
            parts.append(f'<path {style} d="M' + "L".join(f"{frame.x(xs[i]):.1f} {frame.y(series.ys[i]):.1f}" for i in run) + '"/>')
    return "".join(parts)


def _area(frame: Frame, xs: Sequence[float], lows: Values, highs: Values) -> str:
    parts = []
    for run in _runs(xs, lows, highs):
        there = "L".join(f"{frame.x(xs[i]):.1f} {frame.y(highs[i]):.1f}" for i in run)
        back = "L".join(f"{frame.x(xs[i]):.1f} {frame.y(lows[i]):.1f}" for i in reversed(run))
        parts.append(f"M{there}L{back}z")
    return "".join(parts)


def _whisker(frame: Frame, point: tuple[float, float, float, float], color: str) -> str:
    x, mean, low, high = point
    at = f"{frame.x(x):.1f}"
    return (
        f'<line class="whisker {color}" x1="{at}" x2="{at}" y1="{frame.y(low):.1f}" y2="{frame.y(high):.1f}"/>'
        f'<circle class="dot {color}" cx="{at}" cy="{frame.y(mean):.1f}" r="4.5"/>'
    )


def _mark_title(frame: Frame, label: str, point: tuple[float, float, float, float], x_label: str) -> str:
    x, mean, low, high = point
    tip = escape(f"{x_label} {number(x)}\n{label} {number(mean)}, 95 % interval {number(low)} to {number(high)}")
    return f'<circle class="hit" cx="{frame.x(x):.1f}" cy="{frame.y(mean):.1f}" r="10"><title>{tip}</title></circle>'


def _band_rows(bands: Sequence[Band]) -> list[tuple[str, Values]]:
    return [row for b in bands for row in ((f"{b.label}, low", b.lows), (f"{b.label}, high", b.highs))]


def _hover_columns(frame: Frame, xs: Sequence[float], rows: Sequence[tuple[str, Values]], x_label: str, tokens: Sequence[str] = ()) -> str:
    """An invisible column per step whose tooltip lists every value of that step."""
    edges = [frame.x(x) for x in xs]
    parts = []
    for i, x in enumerate(xs):
        left = (edges[i - 1] + edges[i]) / 2 if i else _LEFT
        right = (edges[i] + edges[i + 1]) / 2 if i + 1 < len(xs) else WIDTH - _RIGHT
        lines = [f"{label} {number(values[i])}" for label, values in rows if values[i] is not None]
        of_token = tokens and i > 0
        tip = escape("\n".join([f"{x_label} {number(x)}", *([repr(tokens[i - 1])] if of_token else []), *lines]))
        area = f'x="{left:.1f}" y="{_TOP}" width="{max(right - left, 0):.1f}" height="{frame.height - _TOP - _BOTTOM}"'
        mark = f' data-token="{i - 1}"' if of_token else ""
        parts.append(f'<rect class="hit" {area}{mark}><title>{tip}</title></rect>')
    return "".join(parts)
