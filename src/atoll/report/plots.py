"""The charts of a run: learning curves, costs and clients, each for light and for dark pages.

Tests: tests/surface/test_report.py, tests/surface/test_timeline.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from atoll.report import timeline
from atoll.report.clients import Federation
from atoll.report.figures import (
    PlotLine,
    Theme,
    axes,
    figure,
    logarithmic,
    name_ends,
    of_bytes,
    of_seconds,
    plot,
    ramp,
    text,
    wants_log,
    whole_rounds,
)
from atoll.report.flight_log import Numbers
from atoll.report.run_data import RunData
from atoll.runs.format import client_name, duration, format_number, label, rises, size, whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BASELINES = {"pooled": 2, "local": 3}
_BOX = (0.105, 0.165, 0.79, 0.85)
_WIDE_BOX = (*_BOX[:2], 0.965, _BOX[3])
_MOST_METRICS = 3


@dataclass(frozen=True)
class Chart:
    """A chart that is not drawn yet.

    Args:
        name: the name of its file, without the suffix.
        alt_text: the alt text.
        wide: whether it is as wide as the page.
        draw: a function that draws the figure in a theme.
    """

    name: str
    alt_text: str
    wide: bool
    draw: Callable[[Theme], Figure]


def charts(record: RunData, federation: Federation | None, names: tuple[str, ...] | None = None) -> Iterator[Chart]:
    """The charts of a run, in the order of the page. A chart without measured values is omitted."""
    losses = [n for n in ("loss", "held_out_loss") if n in record.columns]
    if losses:
        detail = ", ".join(f"{label(n)} {format_number(record.last(n))} at the end" for n in losses)
        yield Chart("loss", f"Loss by round: {detail}.", False, partial(_loss, record, losses))
    of_clients = [n for n in (f"{record.judged}_clients",) if n in record.columns]
    for name in (*of_clients, *record.metrics[:_MOST_METRICS]):
        says = f"{label(name)} by round, {format_number(record.last(name))} at the end."
        yield Chart(_file(name), says, False, partial(_metric, record, name))
    several = len(record.rows) > 1
    if several and "gradient_norm" in record.columns:
        says = f"Norm of the mean update by round, {format_number(record.last('gradient_norm'))} at the end."
        yield Chart("gradient_norm", says, False, partial(_gradient, record))
    if several and record.judged in record.columns and record.total("bytes_up") + record.total("bytes_down") > 0:
        says = f"{label(record.judged)} by all bytes sent, up and down together."
        yield Chart("bytes", says, False, partial(_bytes, record))
    if several and record.judged in record.columns and record.total("clock") > 0:
        says = f"{label(record.judged)} by virtual time, {duration(record.last('clock') or 0)} at the end."
        yield Chart("clock", says, False, partial(_clock, record))
    if several and len(record.series("seconds")[0]):
        says = f"Seconds per round; {duration(record.total('seconds'))} in total."
        yield Chart("seconds", says, False, partial(_seconds, record))
    rates = record.series("lr")[1]
    if len(set(rates[np.isfinite(rates)])) > 1:
        yield Chart("lr", "The server's learning rate by round.", False, partial(_rate, record))
    arrived, cohort = record.series("arrived")[1], record.series("cohort")[1]
    if several and (len({*arrived, *cohort}) > 1):
        says = "Clients selected, and contributions that arrived, by round."
        yield Chart("arrived", says, False, partial(_arrived, record))
    if sum(n for late, n in record.events.tally.staleness.items() if late):
        yield Chart("staleness", _says_staleness(record), False, partial(_staleness, record))
    if len(record.events.flights):
        yield Chart("timeline", timeline.alt_text(record), True, partial(timeline.timeline, record, names))
    if federation is not None:
        yield Chart("clients", _says_clients(federation), True, partial(_clients, federation))
        if federation.count > len(federation.ids):
            says = f"Rows per client of all {whole(federation.count)} clients, ascending."
            yield Chart("sizes", says, True, partial(_sizes, federation))
    if _uneven(record):
        says = "Bytes that each client sent and received in the whole run."
        yield Chart("client_bytes", says, True, partial(_client_bytes, record, names))
    if record.events.clients:
        says = "Training loss of clients: its spread by round, and the last value of each client."
        yield Chart("client_loss", says, True, partial(_client_loss, record, names))


def _file(name: str) -> str:
    safe = "".join(c if c.isascii() and (c.isalnum() or c in "_-") else "_" for c in name)
    return f"metric_{safe[:40]}"


def _titled(name: str) -> str:
    words = label(name)
    return text(words.upper() if len(words) <= 4 else words[:1].upper() + words[1:], 40)


def _aside(ax: Axes, theme: Theme, words: str) -> None:
    """Write a remark above the right edge."""
    ax.text(1.0, 1.045, words, transform=ax.transAxes, ha="right", va="bottom", fontsize=7.5, color=theme.soft)


def _curve(
    theme: Theme, title: str, lines: list[PlotLine], *, log: bool = False, named: bool = False, zero: bool = False
) -> tuple[Figure, Axes]:
    """Draw lines over rounds. `named` labels their ends. `zero` starts a linear scale at 0."""
    made = figure(theme)
    ax = axes(made, theme, _BOX if named else _WIDE_BOX, title, "round")
    plot(ax, lines, log=log)
    whole_rounds(ax, lines[0].x)
    if zero and not log:
        most = max((float(line.y[np.isfinite(line.y)].max(initial=0)) for line in lines), default=0.0)
        ax.set_ylim(0, 1.06 * most or 1)
    if named:
        name_ends(ax, [(_end(line.y), line.name, line.colour) for line in lines])
    return made, ax


def _end(y: Numbers) -> float:
    good = y[np.isfinite(y)]
    return float(good[-1]) if len(good) else float("nan")


def _loss(record: RunData, losses: Sequence[str], theme: Theme) -> Figure:
    short = {"loss": "training", "held_out_loss": "held-out"}
    lines = [PlotLine(short[n], *record.series(n), theme.series[i]) for i, n in enumerate(losses)]
    return _curve(theme, "Loss", lines, log=wants_log([line.y for line in lines]), named=True)[0]


def _metric(record: RunData, name: str, theme: Theme) -> Figure:
    x, y = record.series(name)
    kinds = [(n, v) for n in BASELINES if (v := record.baseline(n, name)) is not None]
    log = not rises(name) and wants_log([y, np.array([v for _, v in kinds])])
    made = figure(theme)
    ax = axes(made, theme, _BOX, _titled(name), "round")
    plot(ax, [PlotLine("federated", x, y, theme.series[0])], log=log)
    whole_rounds(ax, x)
    ends = [(_end(y), f"federated {format_number(_end(y))}" if kinds else format_number(_end(y)), theme.series[0])]
    for kind, value in kinds:
        colour = theme.series[BASELINES[kind]]
        ax.axhline(value, color=colour, linewidth=1.1, linestyle=(0, (4, 2.5)), zorder=2)
        ends.append((value, f"{label(kind)} {format_number(value)}", colour))
    _mark_best(ax, record, name, theme)
    name_ends(ax, ends)
    return made


def _mark_best(ax: Axes, record: RunData, name: str, theme: Theme) -> None:
    best = record.best(name)
    if best is None:
        return
    ax.plot(
        [best["round"]], [best[name]], "o", markersize=6.5, markerfacecolor="none", markeredgewidth=1.3,
        markeredgecolor=theme.ink, zorder=6,
    )  # fmt: skip
    _aside(ax, theme, f"best {format_number(best[name])} in round {best['round']}")


def _gradient(record: RunData, theme: Theme) -> Figure:
    x, y = record.series("gradient_norm")
    line = PlotLine("‖g‖", x, y, theme.series[0])
    return _curve(theme, "Norm of the mean update ‖g‖", [line], log=wants_log([y]))[0]


def _rate(record: RunData, theme: Theme) -> Figure:
    x, y = record.series("lr")
    return _curve(theme, "Learning rate of the server", [PlotLine("lr", x, y, theme.series[0])])[0]


def _bytes(record: RunData, theme: Theme) -> Figure:
    name = record.judged
    rounds, y = record.series(name)
    up, down = record.series("bytes_up"), record.series("bytes_down")
    sent = dict(zip(up[0], np.cumsum(np.nan_to_num(up[1])), strict=True))
    back = dict(zip(down[0], np.cumsum(np.nan_to_num(down[1])), strict=True))
    x = np.array([sent.get(t, 0.0) + back.get(t, 0.0) for t in rounds])
    made = figure(theme)
    ax = axes(made, theme, _WIDE_BOX, f"{_titled(name)} by bytes sent", "up and down, all clients")
    plot(ax, [PlotLine(name, x, y, theme.series[0])], log=not rises(name) and wants_log([y]))
    if len(x) == 1 or np.ptp(x) > 0:
        ax.set_xlim(left=0)
    of_bytes(ax)
    _aside(ax, theme, f"↑ {size(record.total('bytes_up'))}   ↓ {size(record.total('bytes_down'))}")
    return made


def _clock(record: RunData, theme: Theme) -> Figure:
    name = record.judged
    rounds, y = record.series(name)
    times = dict(zip(*record.series("clock"), strict=True))
    x = np.array([times.get(t, np.nan) for t in rounds])
    made = figure(theme)
    ax = axes(made, theme, _WIDE_BOX, f"{_titled(name)} by time", "virtual time")
    plot(ax, [PlotLine(name, x, y, theme.series[0])], log=not rises(name) and wants_log([y]))
    ax.set_xlim(left=0)
    of_seconds(ax.xaxis, float(np.nanmax(x, initial=0)))
    _aside(ax, theme, f"{duration(record.last('clock') or 0)} in total")
    return made


def _says_staleness(record: RunData) -> str:
    late = record.events.tally.staleness
    mean = sum(s * n for s, n in late.items()) / sum(late.values())
    return f"Staleness of contributions in rounds: {mean:.2f} on average, at most {max(late)}."


def _staleness(record: RunData, theme: Theme) -> Figure:
    late = record.events.tally.staleness
    most = max(late)
    width = -(-(most + 1) // 40)  # of a bar, in rounds
    bars = np.zeros(most // width + 1)
    for s, n in late.items():
        bars[s // width] += n
    made = figure(theme)
    ax = axes(made, theme, _WIDE_BOX, "Staleness", "rounds between start and arrival")
    ax.bar(np.arange(len(bars)) * width, 100 * bars / bars.sum(), 0.8 * width, color=theme.series[0])
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    whole_rounds(ax, np.array([0.0, most]))
    mean = sum(s * n for s, n in late.items()) / sum(late.values())
    _aside(ax, theme, f"mean {mean:.2f}, at most {most}, of {whole(sum(late.values()))} contributions")
    return made


def _uneven(record: RunData) -> bool:
    """Whether bytes differ by more than 1 % between clients. Otherwise one number in the tiles is enough."""
    tally = record.events.tally
    return any(len(d) > 1 and max(d.values()) > 1.01 * min(d.values()) for d in (tally.up, tally.down))


def _client_bytes(record: RunData, names: tuple[str, ...] | None, theme: Theme) -> Figure:
    """Draw bytes up above the axis and bytes down below it: by client up to 40 clients, else in ascending order."""
    tally = record.events.tally
    ids = sorted({*tally.up, *tally.down})
    few = len(ids) <= 40
    if not few:
        ids.sort(key=lambda i: tally.up.get(i, 0) + tally.down.get(i, 0))
    made = figure(theme, 11.0, 2.7)
    foot = 0.28 if few and max(len(client_name(i, names)) for i in ids) > 10 else 0.17
    ax = axes(made, theme, (0.07, foot, 0.985, 0.85), "Bytes of each client")
    x = np.arange(len(ids))
    wide = 0.8 if few else 1.0
    for into, sign, colour in ((tally.up, 1, theme.series[0]), (tally.down, -1, theme.series[2])):
        ax.bar(x, [sign * into.get(i, 0) for i in ids], wide, color=colour, linewidth=0)
    ax.axhline(0, color=theme.soft, linewidth=0.7)
    ax.yaxis.set_major_formatter(lambda value, _: size(abs(value)) if value else "0")
    ax.locator_params(axis="y", nbins=5)
    ax.set_xlim(-0.6, len(ids) - 0.4)
    for words, high, colour in (("up", 0.93, theme.series[0]), ("down", 0.05, theme.series[2])):
        ax.text(0.006, high, words, transform=ax.transAxes, fontsize=8, color=colour, va="center", fontweight="bold")
    if few:
        slanted = foot > 0.2
        ax.set_xticks(
            x, [text(client_name(i, names), 20) for i in ids], rotation=25 if slanted or len(ids) > 14 else 0,
            ha="right" if slanted or len(ids) > 14 else "center", rotation_mode="anchor",
        )  # fmt: skip
    else:
        ax.set_xticks([])
        ax.set_xlabel(f"{whole(len(ids))} clients, ascending", fontsize=8, color=theme.soft)
    detail = "" if tally.rounds == tally.of else f"; {whole(tally.rounds)} of {whole(tally.of)} rounds counted"
    _aside(ax, theme, f"of contributions that arrived{detail}")
    return made


def _seconds(record: RunData, theme: Theme) -> Figure:
    x, y = record.series("seconds")
    log = wants_log([y])
    made, ax = _curve(theme, "Time per round", [PlotLine("seconds", x, y, theme.series[0])], log=log, zero=True)
    middle = float(np.nanmedian(y)) if np.isfinite(y).any() else 0.0
    if len(y) > 1:
        ax.axhline(middle, color=theme.soft, linewidth=0.9, linestyle=(0, (4, 2.5)), zorder=2)
    if not log:
        of_seconds(ax.yaxis, float(np.nanmax(y, initial=0)))
    _aside(ax, theme, f"median {duration(middle)}, {duration(record.total('seconds'))} in total")
    return made


def _arrived(record: RunData, theme: Theme) -> Figure:
    lines = [
        PlotLine("selected", *record.series("cohort"), theme.series[1]),
        PlotLine("arrived", *record.series("arrived"), theme.series[0]),
    ]
    made, ax = _curve(theme, "Participating clients", lines, named=True, zero=True)
    lost = sum(e.count for e in record.events.lost.values())
    if lost:
        _aside(ax, theme, f"{whole(lost)} contributions lost")
    return made


def _says_clients(federation: Federation) -> str:
    measured = ", ".join(f"{n} {v}" for n, v in federation.measures.items())
    what = {"class": "classes", "target": "targets"}.get(federation.of)
    return f"Rows per client, and their {what}: {measured}." if what else f"Rows per client: {measured}."


def _clients(federation: Federation, theme: Theme) -> Figure:
    """Draw the rows of each client as bars, above a heat map of clients × classes on the same axis."""
    shares, count = federation.shares, len(federation.ids)
    deep = 0.0 if shares is None else max(0.9, min(4.2, 0.19 * shares.shape[1]))
    named = count <= 12
    slanted = named and count > 5 and max(map(len, federation.labels)) > 9
    foot = 0.95 if slanted else 0.5
    width, height = 11.0, foot + deep + (0.12 if deep else 0) + 1.0 + 0.42
    made = figure(theme, width, height)
    left, right = 0.075, 0.93
    low = (foot + deep + (0.12 if deep else 0)) / height
    title = (
        "Rows and labels by client" if federation.of == "class" else "Rows and targets by client" if deep else "Rows"
    )
    bars = axes(made, theme, (left, low, right, low + 1.0 / height), title)
    thick = (right - left) * width * 72 / count
    bars.vlines(
        np.arange(count), 0, federation.sizes, color=theme.series[0], linewidth=thick * (0.8 if count > 1 else 0.2)
    )
    bars.set_ylabel("rows", fontsize=8, color=theme.soft)
    bars.yaxis.set_major_formatter(lambda value, _: whole(value))
    bars.locator_params(axis="y", nbins=3, integer=True)
    bars.set_xlim(-0.5, count - 0.5)
    bars.set_ylim(bottom=0)
    foremost = bars
    if shares is not None:
        bars.tick_params(axis="x", length=0, labelbottom=False)
        foremost = _heat(made, federation, theme, (left, foot / height, right, (foot + deep) / height))
    if count <= 30:
        foremost.set_xticks(
            np.arange(count), [text(n, 24) for n in federation.labels],
            rotation=25 if slanted else 0, ha="right" if slanted else "center", rotation_mode="anchor",
        )  # fmt: skip
    else:
        foremost.set_xticks([])
        foremost.set_xlabel(_order_words(federation), fontsize=8, color=theme.soft)
    return made


def _order_words(federation: Federation) -> str:
    few = f"{len(federation.ids)} of " if len(federation.ids) < federation.count else ""
    drawn = f"{few}{whole(federation.count)} clients"
    by = {"class": "by their most overrepresented class", "target": "by their mean target"}
    return f"{drawn}, {by.get(federation.of, 'largest first')}"


def _heat(made: Figure, federation: Federation, theme: Theme, box: tuple[float, float, float, float]) -> Axes:
    """Draw the share of each client's rows in each class."""
    shares = federation.shares
    table = np.zeros((1, 1)) if shares is None else shares
    classes = table.shape[1]
    ax = axes(made, theme, box)
    ax.grid(False)
    most = min(1.0, max(float(table.max(initial=0)), 3 / classes))
    image = ax.imshow(table.T, aspect="auto", interpolation="nearest", cmap=ramp(theme), vmin=0, vmax=most)
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.hlines(np.arange(1, classes) - 0.5, -0.5, len(table) - 0.5, color=theme.paper, linewidth=0.8)
    if len(table) <= 30:
        ax.vlines(np.arange(1, len(table)) - 0.5, -0.5, classes - 0.5, color=theme.paper, linewidth=1.2)
    ax.tick_params(axis="x", length=0)
    ax.set_yticks(np.arange(classes), [text(c, 12) for c in federation.classes])
    ax.tick_params(axis="y", labelsize=7.5 if classes <= 16 else 6)
    if max(map(len, federation.classes)) <= 6:
        ax.set_ylabel(federation.of, fontsize=8, color=theme.soft)
    bar_axes = made.add_axes((box[2] + 0.012, box[1], 0.009, box[3] - box[1]))
    bar = made.colorbar(image, cax=bar_axes)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=theme.soft, labelsize=7, length=0, pad=3)
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    bar.ax.set_title("share", fontsize=7, color=theme.soft, pad=5, loc="left")
    return ax


def _sizes(federation: Federation, theme: Theme) -> Figure:
    y = federation.every.astype(float)
    x = np.linspace(1, federation.count, len(y))
    made = figure(theme, 11.0, 2.5)
    box = (0.052, 0.2, 0.985, 0.82)
    ax = axes(made, theme, box, "Rows per client", f"all {whole(federation.count)} clients, ascending")
    log = wants_log([y])
    ax.fill_between(x, y, y.min() if log else 0, step="mid", color=theme.series[0], alpha=0.25, linewidth=0)
    ax.plot(x, y, drawstyle="steps-mid", color=theme.series[0], linewidth=1.4)
    if log:
        logarithmic(ax)
    else:
        ax.set_ylim(bottom=0)
    ax.xaxis.set_major_formatter(lambda value, _: whole(value))
    return made


def _client_loss(record: RunData, names: tuple[str, ...] | None, theme: Theme) -> Figure:
    """Draw the spread over clients by round (left), and the last loss of each client in ascending order (right)."""
    given = [r for r in record.events.clients if np.isfinite(r.loss).any()]
    made = figure(theme, 11.0, 3.1)
    ax = axes(made, theme, (0.052, 0.165, 0.475, 0.85), "Training loss of participating clients", "round")
    levels = [np.nanquantile(np.where(np.isfinite(r.loss), r.loss, np.nan), (0.1, 0.5, 0.9)) for r in given]
    x, fan = np.array([r.round for r in given], dtype=float), np.array(levels).reshape(-1, 3)
    log = wants_log([fan.ravel()])
    if len(fan) > 1 and np.ptp(fan, axis=1).max() > 0:
        ax.fill_between(x, fan[:, 0], fan[:, 2], color=theme.series[0], alpha=0.22, linewidth=0)
        _aside(ax, theme, "median, and the middle 80 %")
    plot(ax, [PlotLine("median", x, fan[:, 1], theme.series[0])], log=log)
    whole_rounds(ax, x)
    last: dict[int, float] = {}
    for r in given:
        last.update((i, v) for i, v in zip(r.ids.tolist(), r.loss.tolist(), strict=True) if np.isfinite(v))
    ranked = sorted(last.items(), key=lambda pair: pair[1])
    box = (0.565, 0.165, 0.985, 0.85)
    right = axes(made, theme, box, "Last loss of each client", f"{whole(len(ranked))} clients, ascending")
    values = np.array([v for _, v in ranked])
    right.plot(np.arange(len(values)), values, "o", color=theme.series[0], markersize=4 if len(values) <= 60 else 2.2)
    if wants_log([values]):
        logarithmic(right)
    if len(ranked) <= 8:
        right.set_xticks(np.arange(len(ranked)), [text(client_name(i, names), 12) for i, _ in ranked])
        right.set_xlabel("")
    else:
        right.set_xticks([])
        highest = ", ".join(client_name(i, names, 16) for i, _ in reversed(ranked[-3:]))
        _aside(right, theme, f"highest: {text(highest, 60)}")
    right.margins(x=0.06)
    return made
