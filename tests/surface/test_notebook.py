"""Progress and HTML views of Python: names, notebooks, errors of a view, observers, escaped text."""

import json
import re
from pathlib import Path
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


# Notebooks in a kernel. `make faces` runs these tests twice, with ipykernel 6 and 7.

NOTEBOOKS = sorted((Path(__file__).parents[2] / "docs" / "notebooks").glob("*.ipynb"))
VIEWS = """
import ipykernel, atoll
print("ipykernel", ipykernel.__version__)
data = atoll.data.load("wine").split(clients=5)
plan = atoll.recipes.fedavg(0.1)
run = atoll.train("softmax", data, plan, rounds=30, report=False, baselines=True)
print(max(len(repr(each)) for each in (run, plan, data)))
"""


def executed(notebook, folder):
    """The outputs of each cell with code, by MIME type; an error of a cell is raised."""
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: make setup-faces")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed: make setup-faces")
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(folder)}}).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [[dict(o.get("data", {"text/plain": o.get("text", "")})) for o in cell.outputs] for cell in cells]


def check_outputs(cells):
    for outputs in cells:
        for output in outputs:
            assert all(len(text) <= 60_000 and "<script" not in text for text in output.values())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::FutureWarning")
def test_progress_and_views_in_a_kernel(tmp_path):
    nbformat = pytest.importorskip("nbformat", reason="nbclient is not installed: make setup-faces")
    new = nbformat.v4
    cells = [new.new_code_cell(text) for text in (VIEWS, "run", "plan", "data")]
    first, *views = executed(new.new_notebook(cells=cells), tmp_path)
    check_outputs([first, *views])
    text = " ".join(output["text/plain"] for output in first if "text/html" not in output)
    (version,) = re.findall(r"ipykernel (\d+)\.", text)
    print("ipykernel", version)
    assert int(text.split()[-1]) <= 400
    (shown,) = [output["text/html"] for output in first if "text/html" in output]  # one view, updated in its place
    assert "training on wine" in shown and "done: " in shown
    for (output,) in views:
        assert {"text/plain", "text/html"} <= set(output) and len(output["text/html"]) > 20


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::FutureWarning")
def test_the_notebooks_of_the_manual_run(path, tmp_path):
    nbformat = pytest.importorskip("nbformat", reason="nbclient is not installed: make setup-faces")
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.outputs for cell in notebook.cells if cell.cell_type == "code")
    check_outputs(executed(notebook, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_the_code_of_the_notebooks_runs_without_a_kernel(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    space: dict[str, object] = {}
    for cell in json.loads(path.read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), space)
