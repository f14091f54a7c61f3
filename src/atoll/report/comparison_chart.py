"""The chart of two runs: their metric by bytes and by time.

Tests: tests/surface/test_tools.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from atoll.report.chart import Axis, Drawing, Mark, Panel, Points, ReferenceLine, Series, Unit, suits_log
from atoll.report.comparison import MetricComparison
from atoll.runs.format import format_number, label, plain


def comparison_drawing(found: MetricComparison) -> Drawing:
    """The metric by bytes and by time. A ring marks the point at which a run reaches the target."""
    name = _titled(found.metric)
    by_bytes = _panel(found, [c.bytes for c in found.curves], f"{name} by bytes", "up and down, all clients", "bytes")
    by_time = _panel(found, [c.times for c in found.curves], f"{name} by time", found.time, "seconds")
    names = " and ".join(c.name for c in found.curves)
    return Drawing("comparison", f"{name} of {names} by bytes and by time.", [[by_bytes, by_time]], True, 0.32)


def apart(costs: Sequence[Sequence[float]]) -> bool:
    """Whether the costs differ by more than a factor of 8, so that a linear axis would squeeze one line."""
    ends = [float(c[-1]) for c in costs if len(c)]
    return len(ends) == 2 and min(ends) > 0 and max(ends) > 8 * min(ends)


def _panel(found: MetricComparison, costs: Sequence[Sequence[float]], title: str, label: str, unit: Unit) -> Panel:
    marks: list[Mark] = [ReferenceLine(found.target, "soft")]
    for i, (curve, x, at) in enumerate(zip(found.curves, costs, found.at, strict=True)):
        marks.append(Series(list(x), list(curve.values), f"s{i}", curve.name))
        if at is not None:
            marks.append(Points([x[at]], [curve.values[at]], f"s{i}", "ring"))
    log = not found.rising and suits_log(*(c.values for c in found.curves))
    far = apart(costs)
    axis = Axis(label, unit, log=far, low=None if far else 0.0)
    remark = f"dashed: {format_number(found.target)}"
    return Panel(marks, title, remark, axis, Axis(log=log), names="top")


def _titled(name: str) -> str:
    words = label(name)
    return plain(words[:1].upper() + words[1:], 40)
