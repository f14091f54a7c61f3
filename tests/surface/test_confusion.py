"""The confusion table of a run: in Python, in the folder, in the summary, in `atoll show` and in the report."""

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix

import atoll
from atoll.cli import main
from atoll.runs.confusion import Confusion


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    data = atoll.data.load("wine").split(4)
    plan = atoll.recipes.fedavg(0.1)
    metrics = ["accuracy", "confusion"]
    out = tmp_path_factory.mktemp("runs")
    return atoll.train("softmax", data, plan, rounds=3, metrics=metrics, out=out), data


def test_the_table_equals_that_of_scikit_learn(run):
    run, data = run
    x, y = data.held_out.take(torch.arange(len(data.held_out)))
    with torch.no_grad():
        found = run.model(x.float()).argmax(1)
    np.testing.assert_array_equal(run.confusion.counts, confusion_matrix(y, found, labels=[0, 1, 2]))
    assert run.confusion.classes == data.classes
    right = sum(run.confusion.counts[i][i] for i in range(3))
    assert right / len(y) == pytest.approx(run.metrics["accuracy"])


def test_the_folder_the_summary_the_command_and_the_report_have_it(run, capsys):
    run, _ = run
    assert Confusion.read(run.path) == run.confusion
    assert run.confusion.text() in run.summary()
    assert main(["show", str(run.path)]) == 0
    assert run.confusion.text() in capsys.readouterr().out
    page = (run.path / "report.html").read_text(encoding="utf-8")
    assert "<h2>Confusion</h2>" in page and "Columns: the predicted class." in page


def test_other_runs_have_none(tmp_path):
    data = atoll.data.load("wine").split(4)
    run = atoll.train("softmax", data, atoll.recipes.fedavg(0.1), rounds=1, out=tmp_path, report=False)
    assert run.confusion is None and not (run.path / "confusion.csv").exists()
    assert Confusion.of(None, torch.eye(3)) is None and Confusion.of(["a"] * 60, torch.eye(60)) is None


@pytest.mark.parametrize("text", ["", "class,a\n", "class,a\na,x\n", "class,a,b\na,1\nb,2\n"])
def test_a_broken_file_is_no_table(tmp_path, text):
    (tmp_path / "confusion.csv").write_text(text)
    assert Confusion.read(tmp_path) is None


def test_a_name_cannot_change_the_terminal_or_the_page():
    table = Confusion(("<script>\x1b[2J", "b"), ((1, 0), (0, 2)))
    assert "\x1b" not in table.text()


def test_long_names_of_classes_stay_different():
    long = Confusion(("very severe disease", "very severe disorder"), ((3, 1), (0, 2)))
    assert (
        long.cells()[0] == ["class", "very severe disease", "very severe disorder"] and long.cells(40) == long.cells()
    )
