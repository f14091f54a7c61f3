"""The timeline of a run: flights over virtual time, one row per client, or one per concurrent flight of many clients.

Tests: tests/surface/test_timeline.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from atoll.report.chart import Axis, Boxes, Drawing, Mark, Panel, Points, ReferenceLine
from atoll.report.flight_log import FlightLog, Numbers, Whole
from atoll.report.flight_rows import FATES
from atoll.report.run_data import RunData
from atoll.runs.format import client_name, duration, plain, whole

_PHASES = ("download", "compute", "upload")
_COLOURS = ("s5", "s0", "s2")
_MOST_LANES = 100  # rows that are drawn
_THICK = 0.38  # half of the height of a flight, of a row


def timeline(record: RunData, names: Sequence[str] | None) -> Drawing:
    """Download, computing and upload of each flight; grey is waiting, orange is work that did not count."""
    closings = record.series("clock")[1]
    flights = record.events.flights
    until = flights.window(closings, _flying(record))
    shown = flights.among(until)
    rows, clients = shown.lanes()
    count = int(rows.max(initial=0)) + 1
    drawn = min(count, _MOST_LANES)
    lanes = range(drawn)
    marks: list[Mark] = [
        Boxes(
            [0.0] * drawn, [until] * drawn, [-i - _THICK for i in lanes], [_THICK - i for i in lanes], "line", "waiting"
        )
    ]
    marks += _flights(shown, rows, drawn)
    marks += _ends(shown, rows, drawn, until)
    inside = closings[(closings > 0) & (closings <= until)]
    if len(inside) <= 60:
        closed = [ReferenceLine(float(t), "ink", vertical=True, dashed=False) for t in inside]
        marks += [*closed[:-1], ReferenceLine(closed[-1].at, "ink", "a round closed", True, False)] if closed else []
    part = shown.at_work(until, rows, count, None)
    ticks = [(-float(at), f"{plain(client_name(i, names), 13)} {100 * part[at]:.0f} %") for at, i in enumerate(clients)]
    words = "" if clients else f"{whole(drawn)} of {whole(count)} concurrent flights" if drawn < count else ""
    words = words or ("" if clients else f"{whole(count)} concurrent flights")
    y = Axis(words, low=0.5 - drawn, high=0.5, ticks=ticks)
    x = Axis(_part(record, flights, until), "seconds", low=0.0, high=until)
    panel = Panel(marks, "Timeline of clients", "in percent: the busy time" if clients else "", x, y, names="top")
    return Drawing("timeline", alt_text(record), [[panel]], True, min(0.75, 0.09 + 0.018 * drawn))


def alt_text(record: RunData) -> str:
    """The text for readers without the picture: the share of time in which clients were busy, and the lost share."""
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


def _flying(record: RunData) -> bool:
    """Whether flights were in progress when the last round closed."""
    return bool(record.last("flying"))


def _flights(shown: FlightLog, rows: Whole, drawn: int) -> list[Mark]:
    """The three phases of flights that counted, and flights that did not."""
    marks: list[Mark] = []
    for lost in (False, True):
        there = ((shown.fate != 0) == lost) & (rows < drawn)
        phases = [(0, 3, "s1", "did not count")] if lost else [(i, i + 1, _COLOURS[i], _PHASES[i]) for i in range(3)]
        for first, end, colour, name in phases:
            x, y = shown.times[first, there], shown.times[end, there]
            some = y > x
            at = (-rows[there][some]).tolist()
            if at:
                low, high = [v - _THICK for v in at], [v + _THICK for v in at]
                marks.append(Boxes(x[some].tolist(), y[some].tolist(), low, high, colour, name))
    return marks


def _ends(shown: FlightLog, rows: Whole, drawn: int, until: float) -> list[Mark]:
    """A cross at the end of a flight that dropped out, a triangle at the end of a late one."""
    marks: list[Mark] = []
    for fate in (1, 2):
        there = (shown.fate == fate) & (shown.end <= until) & (rows < drawn)
        x, y = shown.end[there].tolist(), (-rows[there]).tolist()
        if x and fate == 1:
            marks.append(Points(x, y, "ink", "cross", FATES[fate]))
        elif x:
            marks.append(Points(x, y, "ink", "triangle", FATES[fate]))
    return marks


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
