"""The charts of a run as data: learning curves, costs and clients. `svg.py` writes them.

Tests: tests/surface/test_report.py, tests/surface/test_timeline.py
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate
from statistics import median
from typing import TYPE_CHECKING

from atoll.report.chart import (
    LEVELS,
    Axis,
    Band,
    Boxes,
    Drawing,
    Mark,
    Numbers,
    Panel,
    Points,
    ReferenceLine,
    Series,
    last,
    suits_log,
)
from atoll.report.run_data import RunData
from atoll.report.timeline import timeline
from atoll.runs.format import client_name, duration, format_number, label, plain, rises, size, whole

if TYPE_CHECKING:
    from atoll.report.clients import Federation

BASELINES = {"pooled": "s2", "local": "s3"}
_MOST_METRICS = 3
_FEW_CLIENTS = 4  # a spread over so few clients says less than their own lines
_ROUND = Axis("round", "count")


def charts(record: RunData, federation: Federation | None, names: Sequence[str] | None = None) -> Iterator[Drawing]:
    """The charts of a run, in the order of the report. A chart without measured values is omitted.

    Args:
        record: the contents of the run folder.
        federation: the summary of the clients' rows; None omits it.
        names: the names of the clients, or None.
    """
    yield from _learning(record)
    yield from _costs(record)
    yield from _participation(record)
    if len(record.events.flights):
        yield timeline(record, names)
    if federation is not None:
        yield _clients(federation)
        if federation.count > len(federation.ids):
            yield _sizes(federation)
    if _uneven(record):
        yield _client_bytes(record, names)
    if record.events.clients:
        yield _client_loss(record, names)


def _series(record: RunData, name: str) -> tuple[list[float], list[float]]:
    x, y = record.series(name)
    return x.tolist(), y.tolist()


def _titled(name: str) -> str:
    words = label(name)
    return plain(words.upper() if len(words) <= 4 else words[:1].upper() + words[1:], 60)


def _one(name: str, alt: str, panel: Panel) -> Drawing:
    return Drawing(name, alt, [[panel]])


def _learning(record: RunData) -> Iterator[Drawing]:
    losses = [n for n in ("loss", "held_out_loss") if n in record.columns]
    if losses:
        short = {"loss": "training", "held_out_loss": "held-out"}
        lines = [Series(*_series(record, n), f"s{i}", short[n]) for i, n in enumerate(losses)]
        detail = ", ".join(f"{label(n)} {format_number(record.last(n))} at the end" for n in losses)
        y = Axis(log=suits_log(*(line.y for line in lines)))
        yield _one("loss", f"Loss by round: {detail}.", Panel(lines, "Loss", "", _ROUND, y))
    of_clients = [n for n in (f"{record.judged}_clients",) if n in record.columns]
    for name in (*of_clients, *record.metrics[:_MOST_METRICS]):
        yield _metric(record, name)
    if len(record.rows) > 1 and "gradient_norm" in record.columns:
        x, y_ = _series(record, "gradient_norm")
        alt = f"Norm of the mean update by round, {format_number(record.last('gradient_norm'))} at the end."
        panel = Panel([Series(x, y_)], "Norm of the mean update ‖g‖", "", _ROUND, Axis(log=suits_log(y_)))
        yield _one("gradient_norm", alt, panel)


def _metric(record: RunData, name: str) -> Drawing:
    x, y = _series(record, name)
    kinds = [(n, v) for n in BASELINES if (v := record.baseline(n, name)) is not None and math.isfinite(v)]
    end = format_number(last(y)) if y else "–"
    marks: list[Mark] = [ReferenceLine(v, BASELINES[n], f"{label(n)} {format_number(v)}") for n, v in kinds]
    marks.append(Series(x, y, "s0", f"federated {end}" if kinds else end))
    best, remark = record.best(name), ""
    if best is not None:
        marks.append(Points([best["round"]], [best[name]], "ink", "ring"))
        remark = f"best {format_number(best[name])} in round {best['round']}"
    log = not rises(name) and suits_log(y, [v for _, v in kinds])
    alt = f"{label(name)} by round, {format_number(record.last(name))} at the end."
    return _one(_file(name), alt, Panel(marks, _titled(name), remark, _ROUND, Axis(log=log)))


def _file(name: str) -> str:
    safe = "".join(c if c.isascii() and (c.isalnum() or c in "_-") else "_" for c in name)
    return f"metric_{safe[:40]}"


def _costs(record: RunData) -> Iterator[Drawing]:
    """The selection metric by bytes, if bytes per round vary, and by the simulated clock; the time of each round."""
    name, several = record.judged, len(record.rows) > 1
    judged = several and name in record.columns
    each = [_amount(r.get("bytes_up")) + _amount(r.get("bytes_down")) for r in record.rows]
    if judged and len(set(each)) > 1:
        sent = dict(zip((r["round"] for r in record.rows), accumulate(each), strict=True))
        totals = "   ".join(f"{a} {size(record.total(n))}" for a, n in (("↑", "bytes_up"), ("↓", "bytes_down")))
        axis = Axis("up and down, all clients", "bytes", low=0.0)
        alt = f"{label(name)} by all bytes sent, up and down together."
        yield _over(record, sent, "bytes", f"{_titled(name)} by bytes sent", totals, axis, alt)
    if judged and record.total("clock") > 0:
        times = dict(zip(*_series(record, "clock"), strict=True))
        end = duration(record.last("clock") or 0)
        alt = f"{label(name)} by virtual time, {end} at the end."
        axis = Axis("virtual time", "seconds", low=0.0)
        yield _over(record, times, "clock", f"{_titled(name)} by time", f"{end} in total", axis, alt)
    x, y = _series(record, "seconds")
    if several and y:
        good = [v for v in y if math.isfinite(v)] or [0.0]
        log = suits_log(y)
        remark = f"median {duration(median(good))}, {duration(sum(good))} in total"
        marks: list[Mark] = [ReferenceLine(median(good)), Series(x, y)]
        axis = Axis(unit="seconds", log=log, low=None if log else 0.0)
        alt = f"Seconds per round; {duration(sum(good))} in total."
        yield _one("seconds", alt, Panel(marks, "Time per round", remark, _ROUND, axis))


def _over(
    record: RunData, costs: dict[float, float], file: str, title: str, remark: str, axis: Axis, alt: str
) -> Drawing:
    """The selection metric over the cost at the end of each round."""
    rounds, y = _series(record, record.judged)
    x = [costs.get(t, math.nan) for t in rounds]
    log = not rises(record.judged) and suits_log(y)
    return _one(file, alt, Panel([Series(x, y)], title, remark, axis, Axis(log=log)))


def _amount(value: object) -> float:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else 0.0  # type: ignore[arg-type]


def _participation(record: RunData) -> Iterator[Drawing]:
    x, rates = _series(record, "lr")
    if len({r for r in rates if math.isfinite(r)}) > 1:
        panel = Panel([Series(x, rates)], "Learning rate of the server", "", _ROUND)
        yield _one("lr", "The server's learning rate by round.", panel)
    arrived, cohort = _series(record, "arrived"), _series(record, "cohort")
    if len(record.rows) > 1 and len({*arrived[1], *cohort[1]}) > 1:
        lines = [Series(*cohort, "s1", "selected"), Series(*arrived, "s0", "arrived")]
        lost = sum(e.count for e in record.events.lost.values())
        remark = f"{whole(lost)} contributions lost" if lost else ""
        alt = "Clients selected, and contributions that arrived, by round."
        panel = Panel(lines, "Participating clients", remark, _ROUND, Axis(unit="count", low=0.0))
        yield _one("arrived", alt, panel)
    late = record.events.tally.staleness
    if sum(n for staleness, n in late.items() if staleness):
        yield _staleness(late)


def _staleness(late: dict[int, int]) -> Drawing:
    most, count = max(late), sum(late.values())
    width = -(-(most + 1) // 40)  # of a bar, in rounds
    bars = [0] * (most // width + 1)
    for staleness, n in late.items():
        bars[staleness // width] += n
    mean = sum(s * n for s, n in late.items()) / count
    middle = [i * width for i in range(len(bars))]
    half = 0.4 * width
    marks = [
        Boxes([m - half for m in middle], [m + half for m in middle], [0.0] * len(bars), [n / count for n in bars])
    ]
    alt = f"Staleness of contributions in rounds: {mean:.2f} on average, at most {most}."
    remark = f"mean {mean:.2f}, at most {most}, of {whole(count)}"
    axis = Axis("rounds between start and arrival", "count")
    return _one("staleness", alt, Panel(marks, "Staleness", remark, axis, Axis(unit="share", low=0.0)))


def _uneven(record: RunData) -> bool:
    """Whether bytes differ by more than 1 % between clients. Otherwise one number is enough."""
    tally = record.events.tally
    return any(len(d) > 1 and max(d.values()) > 1.01 * min(d.values()) for d in (tally.up, tally.down))


def _bars(heights: Numbers, colour: str, name: str = "", part: float = 0.8) -> Boxes:
    """One bar at each whole number, from 0 to a height, which may be negative."""
    at, half = range(len(heights)), part / 2
    low, high = [min(0.0, h) for h in heights], [max(0.0, h) for h in heights]
    return Boxes([i - half for i in at], [i + half for i in at], low, high, colour, name)


def _client_bytes(record: RunData, names: Sequence[str] | None) -> Drawing:
    """Bytes up above the axis and bytes down below it: by client up to 40 clients, else in ascending order."""
    tally = record.events.tally
    ids = sorted({*tally.up, *tally.down})
    few = len(ids) <= 40
    if not few:
        ids.sort(key=lambda i: tally.up.get(i, 0) + tally.down.get(i, 0))
    marks = [
        _bars([float(tally.up.get(i, 0)) for i in ids], "s0", "up", 0.8 if few else 1.0),
        _bars([-float(tally.down.get(i, 0)) for i in ids], "s2", "down", 0.8 if few else 1.0),
    ]
    detail = "" if tally.rounds == tally.of else f"; {whole(tally.rounds)} of {whole(tally.of)} rounds counted"
    axis = _client_axis([client_name(i, names) for i in ids] if few else [], len(ids), "ascending")
    remark = f"of contributions that arrived{detail}"
    panel = Panel(marks, "Bytes of each client", remark, axis, Axis(unit="bytes"), names="top")
    return Drawing("client_bytes", "Bytes that each client sent and received in the whole run.", [[panel]], True, 0.27)


def _client_axis(names: Sequence[str], count: int, order: str) -> Axis:
    """An axis of clients: with their names, or with their number if they are many."""
    ticks = [(float(i), plain(name, 14)) for i, name in enumerate(names)]
    words = "" if names else f"{whole(count)} clients, {order}"
    return Axis(words, low=-0.6, high=max(count, 1) - 0.4, ticks=ticks)


def _clients(federation: Federation) -> Drawing:
    """The rows of each client as bars, above a heat map of clients × classes on the same axis."""
    shares, count = federation.shares, len(federation.ids)
    few = {"class": "by their most overrepresented class", "target": "by their mean target"}
    part = f"{count} of {whole(federation.count)}" if count < federation.count else whole(count)
    words = f"{part} clients, {few.get(federation.of, 'largest first')}"
    axis = _client_axis(federation.labels if count <= 30 else [], count, "")
    axis = axis if count <= 30 else Axis(words, low=-0.6, high=count - 0.4, ticks=[])
    measured = ", ".join(f"{n} {v}" for n, v in federation.measures.items())
    what = {"class": "labels", "target": "targets"}.get(federation.of, "")
    title = f"Rows and {what} by client" if what and shares is not None else "Rows by client"
    bare = Axis(low=-0.6, high=count - 0.4, ticks=[])
    bars = Panel(
        [_bars(federation.sizes.tolist(), "s0")], title, "", axis if shares is None else bare,
        Axis("rows", "count", low=0.0),
    )  # fmt: skip
    alt = f"Rows per client{', and their ' + what if what else ''}: {measured}."
    if shares is None:
        return Drawing("clients", alt, [[bars]], True, 0.2)
    classes = shares.shape[1]
    deep = max(0.11, min(0.42, 0.02 * classes))
    bars = Panel(bars.marks, bars.title, "", bars.x, bars.y, high=0.16)
    heat = Panel(*_heat(federation), axis, _class_axis(federation), high=deep)
    return Drawing("clients", alt, [[bars], [heat]], True, 0.16 + deep)


def _class_axis(federation: Federation) -> Axis:
    count = len(federation.classes)
    ticks = [(-float(i), plain(c, 14)) for i, c in enumerate(federation.classes)]
    return Axis(federation.of, low=0.5 - count, high=0.5, ticks=ticks)


def _heat(federation: Federation) -> tuple[list[Mark], str, str]:
    """The cells by level of colour, no title, and the meaning of the darkest level."""
    table = [] if federation.shares is None else federation.shares.tolist()
    classes = len(federation.classes)
    most = min(1.0, max(max((max(row) for row in table), default=0.0), 3 / max(1, classes)))
    cells: dict[int, list[tuple[int, int]]] = {}
    for client, row in enumerate(table):
        for at, share in enumerate(row):
            cells.setdefault(min(LEVELS - 1, int(LEVELS * share / most)), []).append((client, at))
    gap = 0.03 if len(table) <= 30 else 0.0
    marks: list[Mark] = []
    for level, those in sorted(cells.items()):
        x, y = [c for c, _ in those], [-k for _, k in those]
        left, right = [v - 0.5 + gap for v in x], [v + 0.5 - gap for v in x]
        marks.append(Boxes(left, right, [v - 0.47 for v in y], [v + 0.47 for v in y], f"h{level}"))
    return marks, "", f"strongest colour: {100 * most:.0f} % of the rows of a client"


def _sizes(federation: Federation) -> Drawing:
    y = [float(v) for v in federation.every.tolist()]
    x = [1 + i * (federation.count - 1) / max(1, len(y) - 1) for i in range(len(y))]
    log = suits_log(y)
    floor = min(y) if log else 0.0
    marks: list[Mark] = [Band(x, [floor] * len(y), y), Series(x, y, step=True)]
    axis = Axis(f"all {whole(federation.count)} clients, ascending", "count")
    alt = f"Rows per client of all {whole(federation.count)} clients, ascending."
    panel = Panel(marks, "Rows per client", "", axis, Axis(unit="count", log=log, low=None if log else 0.0))
    return Drawing("sizes", alt, [[panel]], True, 0.24)


def _client_loss(record: RunData, names: Sequence[str] | None) -> Drawing:
    """The spread over clients by round (left), and the last loss of each client in ascending order (right)."""
    rows = [(t, [v for v in loss if math.isfinite(v)]) for t, _, loss in record.events.client_rows]
    rows = [(t, loss) for t, loss in rows if loss]
    x = [float(t) for t, _ in rows]
    low, middle, high = ([_quantile(sorted(loss), q) for _, loss in rows] for q in (0.1, 0.5, 0.9))
    last_loss: dict[int, float] = {}
    for _, ids, loss in record.events.client_rows:
        last_loss.update((i, v) for i, v in zip(ids, loss, strict=True) if math.isfinite(v))
    spread = len(last_loss) > _FEW_CLIENTS and len(rows) > 1
    left = Panel(
        [*([Band(x, low, high)] if spread else []), Series(x, middle, "s0")], "Training loss of participating clients",
        "median, and the middle 80 %" if spread else "median", _ROUND, Axis(log=suits_log(low, high)),
    )  # fmt: skip
    ranked = sorted(last_loss.items(), key=lambda pair: pair[1])
    few = len(ranked) <= 8
    axis = _client_axis([client_name(i, names) for i, _ in ranked] if few else [], len(ranked), "ascending")
    highest = ", ".join(client_name(i, names, 16) for i, _ in reversed(ranked[-3:]))
    values = [v for _, v in ranked]
    points = Points([float(i) for i in range(len(values))], values)
    remark = "" if few else f"highest: {highest}"
    right = Panel([points], "Last loss of each client", remark, axis, Axis(log=suits_log(values)))
    alt = "Training loss of clients: its spread by round, and the last value of each client."
    return Drawing("client_loss", alt, [[left, right]], True, 0.29)


def _quantile(ordered: Sequence[float], q: float) -> float:
    """The q-quantile of ascending values, linear between two of them."""
    at = q * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])
