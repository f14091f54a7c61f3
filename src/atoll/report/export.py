"""Charts as bytes of a file: SVG by `svg.py`, PNG and PDF by matplotlib, which the extra `atoll[plots]` installs.

No other module of the package imports matplotlib.

Tests: tests/surface/test_export_charts.py
"""

from __future__ import annotations

import importlib.util
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atoll.base.errors import UsageError, unknown_name
from atoll.base.files import atomic_write
from atoll.base.lines import Line
from atoll.report.chart import Band, Boxes, Drawing, Mark, Panel, Points, ReferenceLine, Series, fit
from atoll.report.svg import HALF, WIDE, extent, palette, svg
from atoll.runs.format import plain

FORMATS = ("svg", "png", "pdf")
_MARKERS = {"dot": "o", "ring": "o", "cross": "x", "triangle": "<"}


def chart_formats(plots: str) -> tuple[str, ...]:
    """The further formats of a setting such as "png,pdf"; SVG is always written.

    Raises:
        UsageError: an unknown format, or matplotlib is not installed.
    Example:
        >>> chart_formats(""), chart_formats("svg")
        ((), ())
    """
    given = dict.fromkeys(filter(None, (each.strip() for each in plots.split(","))))
    for each in given:
        if each not in FORMATS:
            raise unknown_name("format of plots", each, FORMATS, lambda near: plots_line(near))
    further = tuple(each for each in given if each != "svg")
    if further and importlib.util.find_spec("matplotlib") is None:
        raise _without_matplotlib(further[0])
    return further


def plots_line(value: str) -> Line:
    """The setting of the formats, as it is written in Python and in a command."""
    return Line(python=f'plots="{value}"', shell=f"--set plots={value}")


def _without_matplotlib(suffix: str) -> UsageError:
    return UsageError(
        f"A figure as {suffix.upper()}, and matplotlib is not installed.",
        "the extra atoll[plots], or an SVG.",
        write="pip install 'atoll[plots]'",
    )


@dataclass(frozen=True, repr=False)
class Plot:
    """A chart that a notebook shows at the end of a cell, and that `save` writes.

    Args:
        drawing: its panels.
    """

    drawing: Drawing

    def __repr__(self) -> str:
        return f"Plot({self.drawing.alt!r})"[:400]

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        return {"text/plain": repr(self), "image/svg+xml": rendered(self.drawing, "svg").decode()}

    def save(self, path: str | Path, width: float = 6.5) -> Path:
        """Write the chart as .svg, .png or .pdf. Equal charts give equal bytes.

        Args:
            path: the file.
            width: the width in inches, > 0 and < 100.
        Returns:
            the path of the file.
        Raises:
            UsageError: an unknown suffix, or a PDF or PNG without the extra `atoll[plots]`.
        """
        if not 0 < width < 100:
            raise UsageError(f"width = {width}.", "inches, > 0 and < 100.", write=Line("width=3.3", "--width 3.3"))
        file = Path(path)
        data = rendered(self.drawing, file.suffix[1:] or "none", 96 * width)
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(file, data)
        return file


def rendered(drawing: Drawing, suffix: str, width: float = 0.0) -> bytes:
    """A chart as the bytes of a file. Equal charts give equal bytes.

    Args:
        drawing: the chart.
        suffix: "svg", "png" or "pdf".
        width: the width in pixels (1/96 inch); 0: that of a report.
    Raises:
        UsageError: an unknown format, or matplotlib is not installed.
    Example:
        >>> line = Series([0, 1], [1.0, 2.0])
        >>> rendered(Drawing("a", "A line.", [[Panel([line])]]), "svg")[:4]
        b'<svg'
    """
    if suffix not in FORMATS:
        raise unknown_name("format of a figure", suffix, FORMATS, lambda near: Line(shell=f"--to figure.{near}"))
    if suffix == "svg":
        return svg(drawing, width).encode()
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise _without_matplotlib(suffix) from None
    wide = (width or (WIDE if drawing.wide else HALF)) / 96
    figure = Figure(figsize=(wide, wide * drawing.ratio), dpi=192, layout="constrained")
    heights = [max(p.high for p in row) for row in drawing.rows]
    parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    for row, part in zip(drawing.rows, parts, strict=True):
        axes = part.subplots(1, len(row), width_ratios=[p.part for p in row], squeeze=False)[0]
        for panel, ax in zip(row, axes, strict=True):
            _panel(ax, panel, palette())
    file = io.BytesIO()
    # Without the date, equal charts give equal bytes.
    metadata: dict[str, Any] = {"CreationDate": None} if suffix == "pdf" else {"Software": None}
    figure.savefig(file, format=suffix, metadata=metadata)
    return file.getvalue()


def _panel(ax: Any, panel: Panel, colours: dict[str, str]) -> None:
    """Draw a panel with the scales of its SVG."""
    xs, ys = extent(panel.marks, panel.y.log)
    for axis, scale, name in ((panel.x, fit(panel.x, xs), "x"), (panel.y, fit(panel.y, ys), "y")):
        if scale.log:
            ax.set(**{f"{name}scale": "log"})
        ax.set(**{f"{name}lim": (scale.low, scale.high), f"{name}label": _text(axis.label)})
        ax.set(**{f"{name}ticks": [v for v, _ in scale.ticks], f"{name}ticklabels": [_text(t) for _, t in scale.ticks]})
    ax.minorticks_off()
    for side in ("left", "right", "top"):
        ax.spines[side].set_visible(False)
    ax.tick_params(labelsize=8, length=0)
    ax.grid(axis="y", color=colours["line"], linewidth=0.7)
    ax.set_axisbelow(True)
    ax.set_title(_text(panel.title), loc="left", fontsize=9.5, fontweight="bold")
    if panel.remark:
        ax.set_title(_text(panel.remark), loc="right", fontsize=7.5, color=colours["soft"])
    for mark in panel.marks:
        _mark(ax, mark, colours)
    if panel.names != "none" and ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False, fontsize=7.5)


def _text(words: str) -> str:
    """A text in which a dollar sign starts no formula."""
    return plain(words, 160).replace("$", r"\$")


def _mark(ax: Any, mark: Mark, colours: dict[str, str]) -> None:
    colour = colours["edge" if mark.colour == "soft" else mark.colour]
    name = None if isinstance(mark, Band) or not mark.name else _text(mark.name)
    match mark:
        case Series():
            y = [v if math.isfinite(v) else math.nan for v in mark.y]
            style = "--" if mark.dashed else "-"
            steps = "steps-post" if mark.step else "default"
            ax.plot(mark.x, y, style, color=colour, linewidth=1.5, label=name, drawstyle=steps)
        case Band():
            ax.fill_between(mark.x, mark.low, mark.high, color=colour, alpha=0.22, linewidth=0)
        case Boxes():
            widths = [b - a for a, b in zip(mark.left, mark.right, strict=True)]
            heights = [b - a for a, b in zip(mark.low, mark.high, strict=True)]
            ax.bar(mark.left, heights, widths, mark.low, align="edge", color=colour, linewidth=0, label=name)
        case Points():
            face = "none" if mark.shape == "ring" else colour
            ax.plot(mark.x, mark.y, _MARKERS[mark.shape], color=colour, markerfacecolor=face, markersize=5, label=name)
        case ReferenceLine():
            draw = ax.axvline if mark.vertical else ax.axhline
            draw(mark.at, color=colour, linewidth=1.1, linestyle="--" if mark.dashed else "-", label=name)
