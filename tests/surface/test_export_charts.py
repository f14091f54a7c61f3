"""Charts as PNG and PDF by matplotlib: every mark is drawn, equal charts give equal bytes, bad formats are refused."""

import sys

import pytest

from atoll.base.errors import UsageError
from atoll.report.chart import Axis, Band, Boxes, Drawing, Panel, Points, ReferenceLine, Series
from atoll.report.export import rendered

X, Y = [0.0, 1.0, 2.0], [1.0, float("nan"), 3.0]
MARKS = [Series(X, Y, name="$a$"), Band(X, [0.5] * 3, [2.0] * 3), Boxes([0.0], [1.0], [0.5], [1.0], "h3", "box")]
MARKS += [Points(X, Y, "ink", "ring"), ReferenceLine(1.0, name="at 1"), ReferenceLine(1.0, "s2", vertical=True)]
CHART = Drawing("a", "A chart.", [[Panel(MARKS, "Title $", "remark", Axis("x", "count"), Axis("y", log=True))]])


def test_a_chart_as_png_and_pdf():
    for suffix, start in (("svg", b"<svg"), ("png", b"\x89PNG"), ("pdf", b"%PDF")):
        made = rendered(CHART, suffix)
        assert made.startswith(start) and len(made) > 1000 and made == rendered(CHART, suffix)


def test_an_unknown_format_and_a_missing_extra_are_refused(monkeypatch):
    with pytest.raises(UsageError, match="pgn"):
        rendered(CHART, "pgn")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match=r"atoll\[plots\]"):
        rendered(CHART, "pdf")
