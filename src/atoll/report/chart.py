"""Charts as data: panels with axes and marks. `svg.py` writes them as SVG, `export.py` draws them with matplotlib.

Coordinates are data values. Colours are names of `page/colours.css`: `s0` to `s7` for series, `h0` to `h7` for the
levels of a heat map, `ink`, `soft` and `line`.

Tests: tests/surface/test_svg.py
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from atoll.runs.format import size, whole

Numbers = Sequence[float]
Unit = Literal["number", "count", "bytes", "seconds", "share"]
SERIES = 8  # colours of series
LEVELS = 8  # colours of a heat map
_TIME = ((1.0, 1000.0, "ms"), (120.0, 1.0, "s"), (7200.0, 1 / 60, "min"), (172_800.0, 1 / 3600, "h"))


@dataclass(frozen=True)
class Axis:
    """An axis of a panel.

    Args:
        label: the text next to the axis.
        unit: the unit of the values; it decides the form of the tick labels. A `count` has ticks at integers only.
        log: whether the scale is logarithmic; values ≤ 0 are then not drawn.
        low, high: the ends of the axis; None: the ends of the data, with a margin.
        ticks: the position and the label of each tick; None: round values.
    """

    label: str = ""
    unit: Unit = "number"
    log: bool = False
    low: float | None = None
    high: float | None = None
    ticks: Sequence[tuple[float, str]] | None = None


@dataclass(frozen=True)
class Series:
    """A line through points.

    Args:
        x, y: the points, [n]. A value of y that is not finite interrupts the line, and a cross marks it at the bottom.
        colour: the name of the colour.
        name: the name of the line; empty: it is not listed.
        dashed: whether the line is dashed.
        step: whether y stays constant up to the next x.
    """

    x: Numbers
    y: Numbers
    colour: str = "s0"
    name: str = ""
    dashed: bool = False
    step: bool = False


@dataclass(frozen=True)
class Band:
    """The area between two lines: x, low and high, each [n]."""

    x: Numbers
    low: Numbers
    high: Numbers
    colour: str = "s0"


@dataclass(frozen=True)
class Boxes:
    """Filled rectangles (bars, spans of time, cells): the left, right, low and high edge of each, [n]."""

    left: Numbers
    right: Numbers
    low: Numbers
    high: Numbers
    colour: str = "s0"
    name: str = ""


@dataclass(frozen=True)
class Points:
    """Single points, [n], as dots, rings, crosses or triangles."""

    x: Numbers
    y: Numbers
    colour: str = "s0"
    shape: Literal["dot", "ring", "cross", "triangle"] = "dot"
    name: str = ""


@dataclass(frozen=True)
class ReferenceLine:
    """A straight line across the panel, at a value of y, or of x if `vertical`."""

    at: float
    colour: str = "soft"
    name: str = ""
    vertical: bool = False
    dashed: bool = True


Mark = Series | Band | Boxes | Points | ReferenceLine


@dataclass(frozen=True)
class Panel:
    """One pair of axes with its marks.

    Args:
        marks: the marks, the lowest first.
        title: the text above the panel.
        remark: a short text above the right edge.
        x, y: the axes.
        names: the place of the names of marks: at the right end of each line, in rows above the panel, or no place.
        part: the width of the panel relative to the other panels of its row.
        high: the height of the panel relative to the other rows.
    """

    marks: Sequence[Mark]
    title: str = ""
    remark: str = ""
    x: Axis = Axis()
    y: Axis = Axis()
    names: Literal["end", "top", "none"] = "end"
    part: float = 1.0
    high: float = 1.0


@dataclass(frozen=True)
class Drawing:
    """A figure: rows of panels.

    Args:
        name: the file name without its suffix.
        alt: the text for readers who do not see the picture.
        rows: the rows of panels from top to bottom.
        wide: whether the figure is as wide as a page; else it has half of this width.
        ratio: the height as a fraction of the width.
    """

    name: str
    alt: str
    rows: Sequence[Sequence[Panel]]
    wide: bool = False
    ratio: float = 0.6


@dataclass(frozen=True)
class Scale:
    """A fitted axis: its ends, its kind, and its ticks."""

    low: float
    high: float
    log: bool
    ticks: tuple[tuple[float, str], ...]

    def place(self, value: float) -> float:
        """The place of a value: 0 at the low end, 1 at the high end; NaN if the scale has no such value."""
        if not math.isfinite(value) or (self.log and value <= 0):
            return math.nan
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def fit(axis: Axis, values: Numbers, ticks: int = 5) -> Scale:
    """Fit an axis to values.

    Args:
        axis: the axis.
        values: the values that it must contain; those that are not finite do not count.
        ticks: about the number of ticks.
    Example:
        >>> fit(Axis(), [0.0, 10.0]).ticks
        ((0.0, '0'), (2.0, '2'), (4.0, '4'), (6.0, '6'), (8.0, '8'), (10.0, '10'))
    """
    good = [v for v in values if math.isfinite(v) and (v > 0 or not axis.log)]
    low, high = (min(good), max(good)) if good else (1.0, 10.0) if axis.log else (0.0, 1.0)
    if low == high:
        wide = abs(low) or 1.0
        low, high = (low / 2, high * 2) if axis.log else (low - wide / 2, high + wide / 2)
    margin = 0.0 if axis.unit == "count" else 0.03
    if axis.log:
        low, high = (low * (low / high) ** margin, high * (high / low) ** margin)
    else:
        low, high = low - margin * (high - low), high + margin * (high - low)
    low = low if axis.low is None else axis.low
    high = high if axis.high is None else axis.high
    high = high if high > low else low + 1.0
    by = _time_unit(high)[0] if axis.unit == "seconds" else 1.0
    at = _log_ticks(low, high) if axis.log else _ticks(low * by, high * by, ticks, axis.unit == "count")
    at = at if axis.log else [v / by for v in at]
    named = tuple(axis.ticks) if axis.ticks is not None else tuple(zip(at, _texts(at, axis.unit, high), strict=True))
    inside = tuple((v, text) for v, text in named if low - 1e-9 * abs(low) <= v <= high + 1e-9 * abs(high))
    return Scale(low, high, axis.log, inside)


def _ticks(low: float, high: float, most: int, integers: bool) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten between two ends."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * f for f in (1, 2, 5, 10) if power * f >= 0.8 * raw)
    step = max(1.0, step) if integers else step
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)][:50]


def _log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten; below 2.5 decades also their multiples by 2 and 5; at most 8."""
    decades = math.log10(high / low)
    digits = (1, 2, 5) if decades < 2.5 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [float(f"{d}e{p}") for p in powers for d in digits if low <= float(f"{d}e{p}") <= high]
    found = found[:: -(-len(found) // 8) or 1]
    return found if len(found) > 1 else [low, high]


def _time_unit(most: float) -> tuple[float, str]:
    """The number of units in a second, and the unit, in which the longest duration is a short number."""
    return next(((by, name) for end, by, name in _TIME if most < end), (1 / 86_400, "d"))


def _texts(at: Sequence[float], unit: Unit, most: float) -> list[str]:
    if unit == "bytes":
        return ["0" if v == 0 else _short(size(abs(v))) for v in at]
    if unit == "seconds":
        scale, name = _time_unit(most)
        return [f"{v * scale:.4g} {name}" if v > 0 else "0" for v in at]
    if unit == "share":
        return [f"{100 * v:.4g} %" for v in at]
    if unit == "count":
        return [whole(v) for v in at]
    return [f"{v:.4g}" if v == 0 or 1e-4 <= abs(v) < 1e5 else f"{v:.3g}" for v in at]


def _short(text: str) -> str:
    """A size without the zeros at its end."""
    number, _, unit = text.partition(" ")
    return f"{number.rstrip('0').rstrip('.') if '.' in number else number} {unit}"


def suits_log(*values: Numbers) -> bool:
    """Whether a logarithmic scale suits: all values are positive, and the largest exceeds 10 times the smallest."""
    good = [v for each in values for v in each if math.isfinite(v)]
    return len(good) > 1 and min(good) > 0 and max(good) > 10 * min(good)


def thin(x: Numbers, y: Numbers, most: int = 2000) -> tuple[list[float], list[float]]:
    """At most `most` points of a curve: the smallest and the largest value of each of `most / 2` stretches.

    The first and the last point stay, and a point that is not finite stays if its stretch has no finite one.

    Args:
        x, y: the points, [n], in order.
        most: the largest number of points; ≥ 4.
    Example:
        >>> thin(range(8), [0, 1, 9, 1, 1, 1, -5, 0], most=6)
        ([0.0, 2.0, 4.0, 6.0, 7.0], [0.0, 9.0, 1.0, -5.0, 0.0])
    """
    count = len(x)
    if count <= most:
        return [float(v) for v in x], [float(v) for v in y]
    parts, kept = (most - 2) // 2, {0, count - 1}
    for part in range(parts):
        start, end = count * part // parts, count * (part + 1) // parts
        values = y[start:end]
        good = values if all(map(math.isfinite, values)) else [v for v in values if math.isfinite(v)] or values[:1]
        kept |= {start + values.index(min(good)), start + values.index(max(good))}
    chosen = sorted(kept)
    return [float(x[i]) for i in chosen], [float(y[i]) for i in chosen]


def last(y: Numbers) -> float:
    """The last finite value; NaN if there is none."""
    return next((float(v) for v in reversed(y) if math.isfinite(v)), math.nan)
