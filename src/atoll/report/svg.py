"""Write a chart as SVG: text as text, colours as CSS variables for both themes, equal bytes for equal input.

A file has its own style sheet. Inside a page the page has it. No attribute contains a style, because a strict content
security policy would refuse it.

Tests: tests/surface/test_svg.py
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from importlib.resources import files

from atoll.report.chart import (
    Band,
    Boxes,
    Drawing,
    Mark,
    Panel,
    Points,
    ReferenceLine,
    Series,
    fit,
    last,
    thin,
)
from atoll.runs.format import plain

WIDE, HALF = 1060, 520  # the widths of figures, in pixels
_LETTER = 6.1  # the mean width of a letter at 11 px
_LINE = 14.0  # the height of a line of text
_MOST = 1000  # points of a line
_FEW = 40  # points that get dots


def svg(drawing: Drawing, width: float = 0, *, style: bool = True) -> str:
    """Write a figure as SVG.

    Args:
        drawing: the figure.
        width: the width in pixels; 0: `WIDE` or `HALF`.
        style: whether the text contains its style sheet, for a file of its own.
    Returns:
        The text of one `svg` element.
    Example:
        >>> line = Series([0, 1, 2], [3.0, 2.0, 1.0], name="loss")
        >>> svg(Drawing("loss", "Loss by round.", [[Panel([line])]]))[:25]
        '<svg xmlns="http://www.w3'
    """
    width = width or (WIDE if drawing.wide else HALF)
    height = round(width * drawing.ratio)
    total = sum(max(p.high for p in row) for row in drawing.rows)
    body: list[str] = []
    top = 0.0
    frames: list[list[_Frame]] = []
    for row in drawing.rows:
        bottom = top + height * max(p.high for p in row) / total
        left, parts = 0.0, sum(p.part for p in row)
        frames.append([])
        for panel in row:
            right = left + width * panel.part / parts
            frames[-1].append(_Frame(panel, left, top, right, bottom))
            left = right
        top = bottom
    for row_of_frames in frames:
        for at, frame in enumerate(row_of_frames):
            # Panels above each other have one left and one right edge.
            column = [other[at] for other in frames if len(other) == len(row_of_frames)]
            body += frame.within(max(f.left for f in column), min(f.right for f in column)).elements()
    sheet = f"<style>{style_sheet()}</style>" if style else ""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="0 0 {_n(width)} {height}"'
    return f'{head} width="{_n(width)}" height="{height}" role="img" aria-label="{_text(drawing.alt, 500)}">' + "".join(
        (sheet, *body, "</svg>\n")
    )


@lru_cache(maxsize=1)
def style_sheet() -> str:
    """The colours of light and dark pages, and the classes of charts, as CSS."""
    folder = files("atoll.report").joinpath("page")
    text = "".join(folder.joinpath(f"{name}.css").read_text(encoding="utf-8") for name in ("colours", "chart"))
    return re.sub(r"\s*([{};:,])\s*", r"\1", " ".join(text.split()))


def palette(dark: bool = False) -> dict[str, str]:
    """The colours of a light or a dark page by name, as in `page/colours.css`.

    Example:
        >>> palette()["s0"], palette(dark=True)["s0"]
        ('#0072b2', '#56b4e9')
    """
    light, _, night = style_sheet().partition("@media")
    return dict(re.findall(r"--([\w-]+):(#[0-9a-f]{6})", night.partition(".chart")[0] if dark else light))


def _text(words: object, most: int = 60) -> str:
    return html.escape(plain(words, most))


def _n(value: float) -> str:
    """A coordinate with one digit after the point, without a negative zero."""
    text = f"{value:.1f}".removesuffix(".0")
    return "0" if text == "-0" else text


class _Frame:
    """A panel with its place in the figure: fitted axes, margins, and the elements of its marks."""

    def __init__(self, panel: Panel, left: float, top: float, right: float, bottom: float) -> None:
        self.panel = panel
        self.outer = (left, top, right, bottom)
        xs, ys = extent(panel.marks, panel.y.log)
        self.y = fit(panel.y, ys, max(2, int((bottom - top) / 45)))
        self.legend = self._legend()
        foot = 8.0 + (_LINE if panel.x.ticks is None or panel.x.ticks else 0) + (_LINE if panel.x.label else 0)
        self.room = int((right - left) / _LETTER - 7.5 / _LETTER * len(panel.title)) - 6  # letters next to the title
        self.below = (
            _LINE if panel.title and panel.remark and self.room < 8 else 0.0
        )  # the remark has a line of its own
        head = 12.0 + (16.0 if panel.title or panel.remark else 0) + self.below + _LINE * len(self.legend)
        ends = max((len(name) for _, name, _ in self._ends()), default=0)
        labels = max((len(text) for _, text in self.y.ticks), default=0)
        side = 14.0 + (_LINE if panel.y.label else 0) + min(130.0, labels * _LETTER)
        self.left, self.right = left + side, right - max(14.0, min(190.0, ends * _LETTER + 14))
        self.top, self.bottom = top + head, bottom - foot
        self._xs = xs

    def within(self, left: float, right: float) -> _Frame:
        """Set the left and the right edge, and fit the x axis to them."""
        self.left, self.right = left, right
        self.x = fit(self.panel.x, self._xs, max(2, int((right - left) / 60)))
        return self

    def _px(self, value: float) -> float:
        return self.left + (self.right - self.left) * self.x.place(float(value))

    def _py(self, value: float) -> float:
        return self.bottom - (self.bottom - self.top) * self.y.place(float(value))

    def elements(self) -> Iterator[str]:
        """The elements of the panel, the lowest first."""
        p, (left, top, right, _) = self.panel, self.outer
        if p.title:
            yield f'<text class="t" x="{_n(left + 14)}" y="{_n(top + 19)}">{_text(p.title)}</text>'
        if p.remark:
            words = _text(p.remark, max(8, int((right - left - 28) / _LETTER) if self.below else self.room))
            yield f'<text x="{_n(right - 14)}" y="{_n(top + 19 + self.below)}" text-anchor="end">{words}</text>'
        yield from self._legend_elements()
        yield from self._axes()
        crosses = 0
        for mark in p.marks:
            yield from self._mark(mark, crosses)
            crosses += isinstance(mark, Series)
        yield from self._end_names()

    def _axes(self) -> Iterator[str]:
        p = self.panel
        grid = "".join(f"M{_n(self.left)} {_n(self._py(v))}H{_n(self.right)}" for v, _ in self.y.ticks)
        ticks = "".join(f"M{_n(self._px(v))} {_n(self.bottom)}v4" for v, _ in self.x.ticks)
        yield f'<path class="g" d="{grid}"/>' if grid else ""
        yield f'<path class="a" d="M{_n(self.left)} {_n(self.bottom)}H{_n(self.right)}{ticks}"/>'
        for v, text in self.y.ticks:
            at = f'x="{_n(self.left - 6)}" y="{_n(self._py(v) + 4)}"'
            yield f'<text {at} text-anchor="end">{_text(text, 20)}</text>'
        yield from self._x_texts()
        middle = (self.left + self.right) / 2
        if p.x.label:
            at = f'x="{_n(middle)}" y="{_n(self.outer[3] - 5)}"'
            yield f'<text {at} text-anchor="middle">{_text(p.x.label, 160)}</text>'
        if p.y.label:
            x, y = _n(self.outer[0] + 16), _n((self.top + self.bottom) / 2)
            yield f'<text transform="translate({x} {y})rotate(-90)" text-anchor="middle">{_text(p.y.label)}</text>'

    def _x_texts(self) -> Iterator[str]:
        """The labels of the x axis: those that overlap the one before them are left out, the last one stays inside."""
        end = -math.inf
        for v, text in self.x.ticks:
            x, wide = self._px(v), len(text) * _LETTER
            x = min(x, self.outer[2] - 4 - wide / 2)
            if x - wide / 2 > end + 4:
                end = x + wide / 2
                yield f'<text x="{_n(x)}" y="{_n(self.bottom + 16)}" text-anchor="middle">{_text(text, 30)}</text>'

    def _mark(self, mark: Mark, crosses: int) -> Iterator[str]:
        match mark:
            case Series():
                yield from self._series(mark, crosses)
            case Band():
                there = [i for i, v in enumerate(mark.low) if math.isfinite(v) and math.isfinite(mark.high[i])]
                up = self._path([mark.x[i] for i in there], [mark.high[i] for i in there], clamp=True)
                down = self._path([mark.x[i] for i in there][::-1], [mark.low[i] for i in there][::-1], clamp=True)
                if up and down:
                    yield f'<path class="f b {mark.colour}" d="{up}{down.replace("M", "L", 1)}z"/>'
            case Boxes():
                boxes = "".join(self._boxes(mark))
                yield f'<path class="f {mark.colour}" d="{boxes}"/>' if boxes else ""
            case Points():
                yield from self._points(mark)
            case ReferenceLine():
                line = _n(self._px(mark.at) if mark.vertical else self._py(mark.at))
                span = f"M{line} {_n(self.top)}V{_n(self.bottom)}"
                span = span if mark.vertical else f"M{_n(self.left)} {line}H{_n(self.right)}"
                if line != "nan":
                    yield f'<path class="l {"d " if mark.dashed else ""}{mark.colour}" d="{span}"/>'

    def _series(self, mark: Series, crosses: int) -> Iterator[str]:
        x, y = thin(mark.x, mark.y, _MOST)
        path = self._path(x, y, step=mark.step)
        if path:
            yield f'<path class="l {"d " if mark.dashed else ""}{mark.colour}" d="{path}"/>'
        finite = sum(map(math.isfinite, y))
        if finite <= _FEW and not mark.step and not mark.dashed:
            yield from self._points(Points(x, y, mark.colour))
        bad = [self._px(v) for v, w in zip(x, y, strict=True) if not math.isfinite(w)][:200]
        foot = self.bottom - 5 - 6 * crosses
        marks = "".join(_cross(v, foot) for v in bad)
        if marks:
            yield f'<path class="o {mark.colour}" d="{marks}"/>'

    def _path(self, x: Sequence[float], y: Sequence[float], *, step: bool = False, clamp: bool = False) -> str:
        """The commands of a line, which values without a place interrupt; `clamp` puts them on the bottom."""
        out, pen = [], False
        for v, w in zip(x, y, strict=True):
            px, py = self._px(v), self._py(w)
            py = self.bottom if clamp and py != py else py
            if px != px or py != py:
                pen = False
                continue
            if pen and step:
                out.append(f"H{_n(px)}V{_n(py)}")
            else:
                out.append(f"{'L' if pen else 'M'}{_n(px)} {_n(py)}")
            pen = True
        return "".join(out)

    def _boxes(self, mark: Boxes) -> Iterator[str]:
        for left, right, low, high in zip(mark.left, mark.right, mark.low, mark.high, strict=True):
            x, end = max(self._px(left), self.left), min(self._px(right), self.right)
            top, bottom = self._py(high), self._py(low)
            bottom = self.bottom if bottom != bottom else bottom
            if end >= x and bottom >= top:
                wide = _n(max(end - x, 0.2))
                yield f"M{_n(x)} {_n(top)}h{wide}v{_n(bottom - top)}h-{wide}z"

    def _points(self, mark: Points) -> Iterator[str]:
        placed = [(self._px(v), self._py(w)) for v, w in zip(mark.x, mark.y, strict=True)]
        placed = [(x, y) for x, y in placed if x == x and y == y]
        radius = 2.4 if len(placed) <= 60 else 1.7
        shapes = {
            "dot": lambda x, y: _circle(x, y, radius),
            "ring": lambda x, y: _circle(x, y, 4.5),
            "cross": lambda x, y: _cross(x, y),
            "triangle": lambda x, y: f"M{_n(x - 4)} {_n(y)}l6 -3.5v7z",
        }
        path = "".join(shapes[mark.shape](x, y) for x, y in placed)
        if path:
            yield f'<path class="{"o" if mark.shape in ("ring", "cross") else "f"} {mark.colour}" d="{path}"/>'

    def _ends(self) -> list[tuple[float, str, str]]:
        """The last value, the name and the colour of each line whose name stands at its end."""
        if self.panel.names != "end":
            return []
        found = []
        for m in self.panel.marks:
            at = last(m.y) if isinstance(m, Series) else m.at if isinstance(m, ReferenceLine) else math.nan
            if isinstance(m, (Series, ReferenceLine)) and m.name and not math.isnan(self.y.place(at)):
                found.append((at, plain(m.name, 28), m.colour))
        return found

    def _end_names(self) -> Iterator[str]:
        """The names at the right edge, each at the height of the end of its line; names that overlap are moved."""
        gap, placed = 12.5, sorted((min(max(self._py(v), self.top), self.bottom), n, c) for v, n, c in self._ends())
        heights = [y for y, _, _ in placed]
        for i in range(1, len(heights)):
            heights[i] = max(heights[i], heights[i - 1] + gap)
        for i in range(len(heights) - 1, -1, -1):
            heights[i] = min(heights[i], heights[i + 1] - gap if i + 1 < len(heights) else self.bottom)
        for y, (_, name, colour) in zip(heights, placed, strict=True):
            yield f'<text class="{colour}" x="{_n(self.right + 7)}" y="{_n(y + 4)}">{_text(name)}</text>'

    def _legend(self) -> list[list[tuple[str, str, str]]]:
        """The rows of the legend above the panel: kind, name and colour of each mark that has a name."""
        rows: list[list[tuple[str, str, str]]] = []
        room = 0.0
        for mark in self.panel.marks if self.panel.names == "top" else ():
            if isinstance(mark, Band) or not mark.name:
                continue
            name = plain(mark.name, 48)
            wide = 30 + len(name) * _LETTER
            if wide > room:
                rows.append([])
                room = self.outer[2] - self.outer[0] - 28
            room -= wide
            kind = mark.shape if isinstance(mark, Points) else "box" if isinstance(mark, Boxes) else "line"
            dashed = isinstance(mark, (Series, ReferenceLine)) and mark.dashed
            rows[-1].append(("dash" if dashed else kind, name, mark.colour))
        return rows

    def _legend_elements(self) -> Iterator[str]:
        y = self.outer[1] + (34.0 if self.panel.title or self.panel.remark else 18.0) + self.below
        for row in self.legend:
            x = self.outer[0] + 14
            for kind, name, colour in row:
                yield _key(kind, colour, x, y - 4)
                yield f'<text x="{_n(x + 19)}" y="{_n(y)}">{_text(name)}</text>'
                x += 30 + len(name) * _LETTER
            y += _LINE


def _key(kind: str, colour: str, x: float, y: float) -> str:
    """The sign of a mark in the legend."""
    if kind in ("line", "dash"):
        return f'<path class="l {"d " if kind == "dash" else ""}{colour}" d="M{_n(x)} {_n(y)}h14"/>'
    paths = {
        "box": f"M{_n(x + 2)} {_n(y - 4)}h10v8h-10z",
        "dot": _circle(x + 7, y, 2.6),
        "ring": _circle(x + 7, y, 4.5),
        "cross": _cross(x + 7, y),
        "triangle": f"M{_n(x + 4)} {_n(y)}l6 -3.5v7z",
    }
    return f'<path class="{"o" if kind in ("ring", "cross") else "f"} {colour}" d="{paths[kind]}"/>'


def _circle(x: float, y: float, r: float) -> str:
    return f"M{_n(x - r)} {_n(y)}a{_n(r)} {_n(r)} 0 1 0 {_n(2 * r)} 0a{_n(r)} {_n(r)} 0 1 0 -{_n(2 * r)} 0"


def _cross(x: float, y: float) -> str:
    return f"M{_n(x - 3)} {_n(y - 3)}l6 6m-6 0l6 -6"


def extent(marks: Iterable[Mark], log: bool) -> tuple[list[float], list[float]]:
    """The values of x and of y that the axes of a panel must contain; on a linear y axis bars add 0 by themselves."""
    xs: list[float] = []
    ys: list[float] = []
    for mark in marks:
        match mark:
            case Series() | Points():
                xs.extend(map(float, mark.x))
                ys.extend(map(float, mark.y))
            case Band():
                xs.extend(map(float, mark.x))
                ys.extend(map(float, (*mark.low, *mark.high)))
            case Boxes():
                xs.extend(map(float, (*mark.left, *mark.right)))
                ys.extend(map(float, (*mark.low, *mark.high)))
            case ReferenceLine():
                (xs if mark.vertical else ys).append(float(mark.at))
    return xs, [v for v in ys if v > 0] if log else ys
