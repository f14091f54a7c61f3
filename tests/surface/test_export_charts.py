"""Charts as PNG and PDF by matplotlib: every mark is drawn, equal charts give equal bytes, bad formats are refused."""

import sys

import pytest

import atoll
from atoll.base.errors import UsageError
from atoll.report.chart import Axis, Band, Boxes, Drawing, Panel, Points, ReferenceLine, Series
from atoll.report.export import rendered
from atoll.training.experiment import Experiment

X, Y = [0.0, 1.0, 2.0], [1.0, float("nan"), 3.0]
MARKS = [Series(X, Y, name="$a$"), Band(X, [0.5] * 3, [2.0] * 3), Boxes([0.0], [1.0], [0.5], [1.0], "h3", "box")]
MARKS += [Points(X, Y, "ink", "ring"), ReferenceLine(1.0, name="at 1"), ReferenceLine(1.0, "s2", vertical=True)]
CHART = Drawing("a", "A chart.", [[Panel(MARKS, "Title $", "remark", Axis("x", "count"), Axis("y", log=True))]])


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_setting_plots_writes_further_formats_or_is_refused_before_the_training(tmp_path, monkeypatch):
    data = atoll.data.load("digits").split(clients=2)
    plan = atoll.recipes.gd(0.1)
    with pytest.raises(UsageError, match="png"):
        atoll.train("softmax", data, plan, rounds=1, out=tmp_path, plots="pgn")
    run = Experiment(rounds=1, clients=2, recipe="distributed_gd(0.1)", model="softmax", out=str(tmp_path)).override(
        plots="png,svg"
    )
    path = run.train(progress="none").path
    assert {each.suffix for each in (path / "plots").iterdir()} == {".svg", ".png"}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="pip install"):
        atoll.train("softmax", data, plan, rounds=1, out=tmp_path, plots="pdf")
