"""Progress and HTML views of Python: names, notebooks, errors of a view, observers, escaped text."""

import re
from types import SimpleNamespace

import pytest
import torch
from hostile import HOSTILE

import atoll
from atoll.base.errors import Note, UsageError
from atoll.base.markup import html_table, preformatted
from atoll.plan.round import Report
from atoll.report import LiveTable, progress
from atoll.report.progress import HtmlProgress, progress_view
from atoll.runs.events import whole_observers
from atoll.tools.compare import compare
from atoll.tools.forecast import forecast


@pytest.fixture(scope="module")
def data():
    return atoll.data.arrays(torch.arange(24.0).reshape(12, 2), torch.arange(12) % 2).split(3, held_out=0.25)


def trained(data, **more):
    return atoll.train("softmax", data, atoll.recipes.gd(0.1), rounds=3, out=None, **more)


def test_an_observer_has_any_of_three_methods_or_is_a_function(data):
    seen = []
    parts = (
        SimpleNamespace(start=lambda training, path: seen.append(("start", path))),
        SimpleNamespace(round=lambda report: seen.append(("round", report.round))),
        SimpleNamespace(end=lambda run: seen.append(("end", run.rounds))),
        lambda report: seen.append(("function", report.round)),
    )
    trained(data, observers=parts)
    each = [(kind, t) for t in range(3) for kind in ("round", "function")]
    assert seen == [("start", None), *each, ("end", 3)]


@pytest.mark.parametrize("wrong", [3, "table", SimpleNamespace(rounds=1), HtmlProgress])
def test_a_wrong_observer_or_progress_is_refused_before_the_folder(data, tmp_path, wrong):
    with pytest.raises(UsageError, match="observers contains"):
        atoll.train("softmax", data, atoll.recipes.gd(0.1), rounds=1, out=tmp_path, observers=[wrong])
    with pytest.raises(UsageError, match="tabel"):
        atoll.train("softmax", data, atoll.recipes.gd(0.1), rounds=1, out=tmp_path, progress="tabel")
    assert not list(tmp_path.iterdir())
    assert len(whole_observers([])) == 0


def test_progress_in_a_notebook_is_html_at_most_four_times_a_second(data, monkeypatch):
    shown, now = [], [0.0]
    view = HtmlProgress(shown.append, clock=lambda: now.__setitem__(0, now[0] + 0.1) or now[0])
    trained(data, observers=[view])
    assert len(shown) == 3 and "3 of 3" not in shown[0] and "done: " in shown[-1]  # start, one of three rounds, end
    assert all("<script" not in text and len(text) < 60_000 for text in shown)
    monkeypatch.setattr(progress, "_notebook", lambda: True)
    monkeypatch.setattr(progress, "_display", lambda: shown.append)
    assert isinstance(progress_view("auto", []), HtmlProgress)
    assert progress_view("auto", [LiveTable()]) is None and progress_view("none", []) is None


def test_a_view_that_fails_changes_no_bit_and_leaves_one_note(data, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "_display", lambda: lambda text: 1 / 0)
    plan = atoll.recipes.gd(0.1)
    quiet = atoll.train("softmax", data, plan, rounds=3, out=tmp_path, report=False)
    with pytest.warns(Note, match="ZeroDivisionError"):
        shown = atoll.train("softmax", data, plan, rounds=3, out=tmp_path, report=False, progress="html")
    assert [r.fingerprint for r in quiet.reports] == [r.fingerprint for r in shown.reports]
    assert (shown.path / "events.jsonl").read_text().count("The progress view failed") == 1


def test_html_views_are_escaped_and_bounded(data, tmp_path):
    plan = atoll.recipes.fedavg(0.1)
    runs = [atoll.train("softmax", data, plan, rounds=1, out=tmp_path, report=False) for _ in range(2)]
    source = atoll.data.arrays(torch.zeros(4, 2), torch.arange(4) % 2)
    predicted = forecast(atoll.Experiment().override(data="digits", clients=3, rounds=2))
    compared = compare(runs[0].path, runs[1].path)
    for each in (runs[0], plan, data, source, runs[0].reports[0], compared, predicted):
        bundle = each._repr_mimebundle_()
        text = each._repr_html_()
        assert bundle == {"text/plain": repr(each), "text/html": text}
        assert len(repr(each)) <= 400 and 20 < len(text.encode()) <= 60_000
        assert set(re.findall(r"<(\w+)", text)) <= {"pre", "table", "caption", "tr", "th", "td", "p"}
    report = Report(0, dict.fromkeys(HOSTILE, 1.0), 1, 1, (), 0, 0)
    for text in (report._repr_html_(), preformatted("<b>" * 90_000), html_table("a", [list(HOSTILE)] * 5000)):
        assert len(text.encode()) <= 60_000
        assert set(re.findall(r"<(\w+)", text)) <= {"pre", "table", "caption", "tr", "th", "td", "p"}
