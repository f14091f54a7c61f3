"""Helpers for figures in the style of atoll, on light and dark pages. They use no global state of matplotlib.

The colours are those of Okabe and Ito, which colour-blind readers can distinguish. Dark pages use lighter variants.

The manual draws diagrams and contours with it. Reports of runs need no matplotlib.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from atoll.runs.format import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

DPI = 168


@dataclass(frozen=True)
class Theme:
    """The colours of a light or dark page: background, text, secondary text, grid, four series, heat map."""

    paper: str
    ink: str
    soft: str
    grid: str
    series: tuple[str, str, str, str]
    heat: tuple[str, ...]


LIGHT = Theme(
    "#ffffff",
    "#1f2933",
    "#5f6b7a",
    "#e6eaef",
    ("#0072b2", "#d55e00", "#00805d", "#a3528a"),
    ("#f3f6f9", "#c3dbed", "#6aaed6", "#2171b5", "#08306b"),
)
DARK = Theme(
    "#161b22",
    "#e6edf3",
    "#9aa6b2",
    "#2b323b",
    ("#56b4e9", "#f0a202", "#2fbf98", "#dc8fbb"),
    ("#1f262f", "#204566", "#2a78ad", "#69b7e6", "#e2f3fd"),
)


def figure(theme: Theme, width: float = 5.4, height: float = 3.1) -> Figure:
    """Create an empty figure; width and height are in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), dpi=DPI, facecolor=theme.paper)
    FigureCanvasAgg(made)
    return made


def axes(made: Figure, theme: Theme, box: Sequence[float], title: str = "", x: str = "", y: str = "") -> Axes:
    """Add axes to a figure.

    Args:
        made: the figure.
        theme: the colours.
        box: left, bottom, right and top edge, as fractions of the figure.
        title: the title, above the left edge.
        x, y: the labels of the axes.
    """
    left, bottom, right, top = box
    ax = made.add_axes((left, bottom, right - left, top - bottom), facecolor=theme.paper)
    wide, high = 72 * made.get_figwidth() * (right - left), 72 * made.get_figheight() * (top - bottom)
    for side, spine in ax.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(theme.soft)
        spine.set_linewidth(0.7)
    ax.tick_params(colors=theme.soft, labelsize=7.5, length=0, pad=4)
    ax.tick_params(axis="x", length=2.5, width=0.7)
    ax.grid(axis="y", color=theme.grid, linewidth=0.7)
    ax.set_axisbelow(True)
    if title:
        ax.text(0, 1 + 9 / high, title, fontsize=9.5, fontweight="bold", color=theme.ink, transform=ax.transAxes)
    # Fixed positions: the search for positions takes half of the drawing time.
    ax.set_title("", y=1.0)
    ax.xaxis.set_label_coords(0.5, -18 / high)
    ax.yaxis.set_label_coords(-30 / wide, 0.5)
    ax.set_xlabel(x, fontsize=8, color=theme.soft)
    ax.set_ylabel(y, fontsize=8, color=theme.soft)
    return ax


def text(words: str, most: int = 28) -> str:
    """Escape text for matplotlib, so that a dollar sign does not start a formula."""
    return plain(words, most).replace("$", r"\$")


def png(made: Figure) -> bytes:
    """Render a figure as a PNG; a character that the font lacks becomes a box without a warning."""
    from PIL import Image

    canvas: Any = made.canvas
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        canvas.draw()
    file = io.BytesIO()
    # Opaque RGB needs three quarters of the bytes of RGBA.
    image = Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba(), "raw", "RGBA", 0, 1)
    image.convert("RGB").save(file, "png")
    return file.getvalue()


def ramp(theme: Theme) -> Colormap:
    """The colour map of a heat map, from a share of 0 upwards."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("atoll", theme.heat)


def logarithmic(ax: Axes) -> None:
    """Make the y axis logarithmic, with plain numbers at its ticks; below 2.5 decades also at 2 and 5."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    ax.set_yscale("log")
    low, high = sorted(ax.get_ylim())
    decades = np.log10(high / low) if low > 0 else 1.0
    ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2.5 else (1.0,), numticks=7))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def name_ends(ax: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Write the name of each line at the right edge, at the height of its end; names that overlap are moved.

    Args:
        ax: the axes.
        ends: for each line its last value in data coordinates, its name and its colour.
    """
    inside = [(float(y), words, colour) for y, words, colour in ends if np.isfinite(y)]
    if not inside:
        return
    ax.autoscale_view()
    to_axes = ax.transData + ax.transAxes.inverted()
    high = ax.get_window_extent().height / ax.figure.dpi * 72
    gap = 9.5 / high
    placed = sorted((float(np.clip(to_axes.transform((0, y))[1], 0, 1)), words, colour) for y, words, colour in inside)
    heights = [at for at, _, _ in placed]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    for i in range(len(heights) - 1, -1, -1):
        limit = heights[i + 1] - gap if i + 1 < len(heights) else 1.0
        heights[i] = min(heights[i], limit)
    for at, (_, words, colour) in zip(heights, placed, strict=True):
        ax.text(
            1.02, at, text(words, 40), color=colour, fontsize=8, va="center", ha="left", transform=ax.transAxes,
            clip_on=False,
        )  # fmt: skip
