"""The figure of `run.plot`: columns of metrics.jsonl by round, bytes, seconds or virtual time.

Tests: tests/surface/test_figure.py
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from atoll.base.errors import UsageError, unknown_name
from atoll.base.files import atomic_write
from atoll.base.lines import Line
from atoll.report.chart import Axis, Drawing, Panel, Series, suits_log
from atoll.report.export import rendered
from atoll.report.figure import AXES
from atoll.runs.format import label, rises

_COSTS = {"bytes": ("bytes_up", "bytes_down"), "seconds": ("seconds",)}


@dataclass(frozen=True, repr=False)
class RunPlot:
    """The figure of `run.plot`.

    Args:
        drawing: its panels.
    """

    drawing: Drawing

    def __repr__(self) -> str:
        return f"RunPlot({self.drawing.alt!r})"[:400]

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        return {"text/plain": repr(self), "image/svg+xml": rendered(self.drawing, "svg").decode()}

    def save(self, path: str | Path, width: float = 6.5) -> Path:
        """Write the figure as .svg, .png or .pdf. Equal runs give equal bytes.

        Args:
            path: the file.
            width: the width in inches, > 0 and < 100.
        Returns:
            the path of the file.
        Raises:
            UsageError: an unknown suffix, or a PDF or PNG without the extra `atoll[plots]`.
        """
        if not 0 < width < 100:
            raise UsageError(f"width = {width}.", "inches, > 0 and < 100.", write=Line(python="width=6.5"))
        file = Path(path)
        data = rendered(self.drawing, file.suffix[1:] or "none", 96 * width)
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(file, data)
        return file


def run_plot(rows: Sequence[Mapping[str, Any]], metrics: Sequence[str], x: str) -> RunPlot:
    """Draw columns of a run, one panel each.

    Args:
        rows: the rows of metrics.jsonl.
        metrics: the columns.
        x: a key of `AXES`.
    Raises:
        UsageError: an unknown column or axis, or a run without virtual time.
    Example:
        >>> run_plot([{"round": 0, "loss": 2.0}, {"round": 1, "loss": 1.0}], ["loss"], "round")
        RunPlot('training loss by round.')
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
    return RunPlot(Drawing("plot", alt, [panels[i : i + 2] for i in range(0, len(panels), 2)], len(panels) > 1, 0.6))


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
