"""The timeline of a run: flights over virtual time, one row per client, or one per concurrent flight of many clients.

Tests: tests/surface/test_timeline.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from atoll.report.figures import Theme, axes, figure, of_seconds, text
from atoll.report.flight_log import FlightLog, Numbers, Whole
from atoll.report.flight_rows import FATES
from atoll.report.run_data import RunData
from atoll.runs.format import client_name, duration, whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_PHASES = ("download", "compute", "upload")
_WIDE = 11.0


def alt_text(record: RunData) -> str:
    """The alt text of the timeline: the share of time in which clients were busy, and the share that was lost."""
    flights = record.events.flights
    until = flights.window(record.series("clock")[1], _flying(record))
    shown = flights.among(until)
    rows, clients = shown.lanes()
    count = int(rows.max(initial=-1)) + 1
    parts = [shown.at_work(until, rows, count, fate).mean() if count else 0.0 for fate in (0, None)]
    who = f"{whole(len(clients))} clients" if clients else f"{whole(count)} concurrent flights"
    return (
        f"Timeline of {who} over {duration(until)} of virtual time: busy {100 * parts[1]:.0f} % of the time, "
        f"{100 * (parts[1] - parts[0]):.0f} % in flights that dropped out or were late."
    )


def timeline(record: RunData, names: tuple[str, ...] | None, theme: Theme) -> Figure:
    """Draw download, computing and upload of each flight; grey is waiting, orange is work that did not count."""
    closings = record.series("clock")[1]
    flights = record.events.flights
    until = flights.window(closings, _flying(record))
    shown = flights.among(until)
    rows, clients = shown.lanes()
    count = int(rows.max(initial=0)) + 1
    each = 0.30 if count <= 8 else 0.19 if count <= 20 else 0.14 if clients else max(0.028, min(0.14, 4.6 / count))
    foot, head = 0.52, 0.40
    height = foot + each * count + head
    made = figure(theme, _WIDE, height)
    right = 0.945 if clients else 0.985
    box = (0.085 if clients else 0.03, foot / height, right, 1 - head / height)
    ax = axes(made, theme, box, "Timeline of clients", _part(record, flights, until))
    ax.grid(False)
    ax.set_xlim(0, until)
    ax.set_ylim(count - 0.5, -0.5)
    thick = 0.76 if each >= 0.1 else 0.84
    ax.hlines(np.arange(count), 0, until, color=theme.grid, linewidth=72 * each * thick, zorder=1)
    _bars(ax, shown, rows, thick, theme)
    _marks(ax, shown, rows, until, each, theme)
    inside = closings[(closings > 0) & (closings <= until)]
    few = len(inside) <= 60
    if few:
        ax.vlines(inside, -0.5, count - 0.5, color=theme.ink, linewidth=0.7, zorder=4)
    _sides(ax, shown, rows, clients, names, until, theme)
    of_seconds(ax.xaxis, until)
    _legend(made, shown, few and len(inside) > 0, theme, (right, 1 - (head - 0.08) / height))
    return made


def _flying(record: RunData) -> bool:
    """Whether flights were in progress when the last round closed."""
    return bool(record.last("flying"))


def _shades(theme: Theme, fate: int) -> tuple[str, str, str]:
    """The colours of download, computing and upload. Work that did not count has three shades of one hue."""
    from matplotlib.colors import to_hex, to_rgb

    def mixed(colour: str, part: float) -> str:
        red, green, blue = (part * a + (1 - part) * b for a, b in zip(to_rgb(colour), to_rgb(theme.paper), strict=True))
        return to_hex((red, green, blue))

    if fate == 0:
        return mixed(theme.series[0], 0.42), theme.series[0], theme.series[2]
    return mixed(theme.series[1], 0.30), mixed(theme.series[1], 0.62), mixed(theme.series[1], 0.85)


def _bars(ax: Axes, shown: FlightLog, rows: Whole, thick: float, theme: Theme) -> None:
    """Draw three rectangles for each flight: download, computing and upload. Lost work has another hue."""
    from matplotlib.collections import PolyCollection

    for lost in (False, True):
        there = (shown.fate != 0) == lost
        low, high = rows[there] - thick / 2, rows[there] + thick / 2
        for at, colour in enumerate(_shades(theme, int(lost))):
            x, y = shown.times[at, there], shown.times[at + 1, there]
            some = y > x
            if some.any():
                a, b, c, d = x[some], y[some], low[some], high[some]
                corners = np.stack([np.stack([a, c], 1), np.stack([b, c], 1), np.stack([b, d], 1), np.stack([a, d], 1)])
                edge = theme.paper if at == 2 or lost else "none"
                ax.add_collection(
                    PolyCollection(list(corners.swapaxes(0, 1)), facecolors=colour, edgecolors=edge, linewidths=0.0,
                                   zorder=2)
                )  # fmt: skip
    # A thin line in the background colour separates two flights without a pause between them.
    inside = shown.start > 0
    ax.vlines(
        shown.start[inside], rows[inside] - thick / 2, rows[inside] + thick / 2, color=theme.paper, linewidth=0.6,
        zorder=3,
    )  # fmt: skip


def _marks(ax: Axes, shown: FlightLog, rows: Whole, until: float, each: float, theme: Theme) -> None:
    """Mark the end of a flight that dropped out by a cross and the end of a late flight by a triangle."""
    large = max(2.2, min(5.0, 72 * each * 0.45))
    for fate, mark in ((1, "x"), (2, "<")):
        there = (shown.fate == fate) & (shown.end <= until)
        if there.any():
            ax.plot(
                shown.end[there], rows[there], mark, color=theme.ink if fate == 1 else theme.series[1],
                markersize=large, markeredgewidth=min(1.2, large / 3), zorder=5, clip_on=False,
            )  # fmt: skip


def _sides(
    ax: Axes, shown: FlightLog, rows: Whole, clients: tuple[int, ...], names: tuple[str, ...] | None, until: float,
    theme: Theme,
) -> None:  # fmt: skip
    """Write the name of each client on the left and its share of busy time on the right."""
    if not clients:
        ax.set_yticks([])
        ax.set_ylabel(f"{whole(int(rows.max(initial=0)) + 1)} concurrent flights", fontsize=8, color=theme.soft)
        ax.yaxis.set_label_coords(-0.012, 0.5)
        return
    ax.set_yticks(np.arange(len(clients)), [text(client_name(i, names), 13) for i in clients])
    ax.tick_params(axis="y", labelsize=7.5 if len(clients) <= 20 else 6.5)
    part = shown.at_work(until, rows, len(clients), None)
    for at, value in enumerate(part):
        ax.annotate(
            f"{100 * value:.0f} %", (1, at), xycoords=("axes fraction", "data"), xytext=(5, 0),
            textcoords="offset points", va="center", fontsize=7, color=theme.soft,
        )  # fmt: skip


def _legend(made: Figure, shown: FlightLog, closed: bool, theme: Theme, corner: tuple[float, float]) -> None:
    """Draw the legend of the colours and marks that occur."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Line2D | Patch] = []
    for at, (phase, colour) in enumerate(zip(_PHASES, _shades(theme, 0), strict=True)):
        if (shown.times[at + 1] > shown.times[at]).any():
            handles.append(Patch(facecolor=colour, label=phase))
    handles.append(Patch(facecolor=theme.grid, label="waiting"))
    if (shown.fate != 0).any():
        handles.append(Patch(facecolor=_shades(theme, 1)[1], label="did not count:"))
    for fate, mark, colour in ((1, "x", theme.ink), (2, "<", theme.series[1])):
        if (shown.fate == fate).any():
            handles.append(Line2D([], [], marker=mark, linestyle="", color=colour, markersize=4.5, label=FATES[fate]))
    if closed:
        handles.append(Line2D([], [], color=theme.ink, linewidth=0.8, label="a round closed"))
    made.legend(
        handles=handles, loc="lower right", bbox_to_anchor=corner,
        ncols=len(handles), frameon=False, fontsize=7.5, labelcolor=theme.soft, handlelength=1.2, handleheight=0.8,
        columnspacing=1.3, handletextpad=0.5, borderaxespad=0, borderpad=0,
    )  # fmt: skip


def _part(record: RunData, flights: FlightLog, until: float) -> str:
    """The label of the time axis: the drawn part of the run and the number of flights that are not drawn."""
    clock: Numbers = record.series("clock")[1]
    last = float(clock[-1]) if len(clock) else float(flights.end.max(initial=0.0))
    closed = int((clock <= until).sum())
    rounds = f"{whole(closed)} round{'' if closed == 1 else 's'}"
    if until < last:
        return f"virtual time: the first {duration(until)} of {duration(last)}, in which {rounds} closed"
    flying = f"; {whole(record.last('flying') or 0)} flights in progress, not drawn" if _flying(record) else ""
    return f"virtual time: {rounds} closed in {duration(until)}{flying}"
