"""Choices that atoll makes for the user are notes, and a command prints each of them once."""

import numpy as np
import pytest

import atoll
from atoll.cli import main
from atoll.plan.formula import FEDAVG_RATE
from atoll.training.experiment import Experiment

ROWS = ["run", "--rounds", "1", "--model", "mine:net", "--set", "report=false", "--held-out", "0.2"]
NET = """
from torch import nn
class Centred(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
    def forward(self, x):
        return self.linear(x - x.mean(0))  # a row depends on the other rows of its batch, which is a note
net = Centred
"""


def test_one_hot_labels_are_a_note():
    x, labels = np.zeros((12, 2), "float32"), np.arange(12) % 3
    one_hot = np.eye(3, dtype="float32")[labels]
    (note,) = [n for n in atoll.data.arrays(x, one_hot).notes if "one-hot" in n]
    assert "y has the form of one-hot labels of 3 classes" in note and "y.argmax(1)" in note
    for other in (labels, one_hot * 2, one_hot + one_hot[::-1], one_hot[:, :2] + 0.5):
        assert not any("one-hot" in n for n in atoll.data.arrays(x, other).notes)
    assert not any("one-hot" in n for n in atoll.data.arrays(x, one_hot, task="regression").notes)


@pytest.mark.parametrize(("rows", "noted"), [(2, True), (4, True), (5, False)])
def test_few_rows_of_natural_clients_are_a_note(rows, noted):
    x = np.arange(rows * 9.0, dtype="float32")[:, None]
    source = atoll.data.arrays(x, np.arange(len(x)) % 2, by=np.arange(len(x)) % 9)
    notes = source.split(held_out=0).notes
    assert any(n.startswith(f"The median client has {rows} rows: does the column") for n in notes) == noted


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_command_prints_a_note_once(tmp_path, monkeypatch, capsys, more):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine.py").write_text(NET)
    (tmp_path / "rows.csv").write_text(
        "a,b,y\n" + "".join(f"{i},{i * i},{'no' if i % 3 else 'yes'}\n" for i in range(40))
    )
    assert main([*ROWS, "--data", "rows.csv", "--clients", "3", *more]) == 0
    error = capsys.readouterr().err
    assert error.count("Rows of a batch are coupled") == 1 and "Note" not in error, error


def test_a_served_run_is_not_resumed(tmp_path, capsys):
    run = tmp_path / "runs" / "2026-11-22-calm-reef"
    run.mkdir(parents=True)
    (run / "config.toml").touch()
    (tmp_path / "federation.db").touch()
    assert main(["resume", str(run)]) == 2
    assert f"Write: atoll serve --home {tmp_path}" in capsys.readouterr().err


def test_fedavg_has_one_rate():
    rates = {atoll.recipes.fedavg().local.optimizer.lr}
    rates |= {it.plan().local.optimizer.lr for it in (Experiment(), Experiment(recipe="fedavg()"))}
    assert rates == {FEDAVG_RATE}
