"""The figure of `run.plot`: columns of metrics.jsonl by round, bytes, seconds or virtual time.

Tests: tests/surface/test_figure.py
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from atoll.base.errors import UsageError, unknown_name
from atoll.base.lines import Line
from atoll.report.chart import Axis, Drawing, Panel, Series, suits_log
from atoll.report.export import Plot
from atoll.report.figure import AXES
from atoll.runs.format import label, rises

_COSTS = {"bytes": ("bytes_up", "bytes_down"), "seconds": ("seconds",)}


def run_plot(rows: Sequence[Mapping[str, Any]], metrics: Sequence[str], x: str) -> Plot:
    """Draw columns of a run, one panel each.

    Args:
        rows: the rows of metrics.jsonl.
        metrics: the columns.
        x: a key of `AXES`.
    Raises:
        UsageError: an unknown column or axis, or a run without virtual time.
    Example:
        >>> run_plot([{"round": 0, "loss": 2.0}, {"round": 1, "loss": 1.0}], ["loss"], "round")
        Plot('training loss by round.')
    """
    if x not in AXES:
        raise unknown_name("axis", x, AXES, lambda near: Line(python=f'x="{near}"'))
    known = dict.fromkeys(n for row in rows for n, v in row.items() if isinstance(v, (int, float)) and n != "round")
    for name in metrics:
        if name not in known:
            raise unknown_name("metric", name, known, lambda near: Line(python=f'run.plot("{near}")'))
    places = _places(rows, x)
    panels = []
    for at, name in enumerate(metrics):
        points = [(p, float(row[name])) for p, row in zip(places, rows, strict=True) if row.get(name) is not None]
        values = [value for _, value in points]
        log = rises(name) is False and suits_log(values)
        line = Series([p for p, _ in points], values, f"s{at % 8}")
        panels.append(Panel([line], label(name), x=Axis(*AXES[x]), y=Axis(log=log), names="none"))
    alt = f"{', '.join(label(name) for name in metrics)} by {x}."
    return Plot(Drawing("plot", alt, [panels[i : i + 2] for i in range(0, len(panels), 2)], len(panels) > 1, 0.6))


def _places(rows: Sequence[Mapping[str, Any]], x: str) -> list[float]:
    """The place of each round on an axis: its number, its virtual time, or the sum of a cost up to it."""
    if x in _COSTS:
        costs = [sum(float(row.get(name) or 0) for name in _COSTS[x]) for row in rows]
        return list(itertools.accumulate(costs))
    if x == "round":
        return [float(row["round"]) for row in rows]
    if any(row.get("clock") is None for row in rows):
        raise UsageError(
            "x = 'clock' and a run without virtual time.", "a run with a fleet.", write=Line(python='x="round"')
        )
    return [float(row["clock"]) for row in rows]
