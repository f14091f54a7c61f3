"""Choices that atoll makes for the user are notes, and a command prints each of them once."""

import numpy as np
import pytest

import atoll
from atoll.cli import main
from atoll.cli.net_commands import Printer
from atoll.net.home import ServerHome
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


@pytest.mark.parametrize(
    ("file", "resumed", "status", "following"),
    [
        ("federation.db", "atoll serve --home HOME", "unfinished", "atoll serve --home HOME"),
        ("site.json", "atoll join --home HOME --data my.csv", "done", "atoll predict HOME/runs/RUN my.csv"),
    ],
)
def test_a_served_run_continues_at_its_server(file, resumed, status, following, tmp_path, capsys):
    run = tmp_path / "runs" / "2026-11-22-calm-reef"
    run.mkdir(parents=True)
    (run / "config.toml").touch()
    (tmp_path / file).touch()
    assert main(["resume", str(run)]) == 2
    assert f"Write: {resumed.replace('HOME', str(tmp_path))}" in capsys.readouterr().err
    assert main(["show", str(run)]) == 0
    shown = capsys.readouterr().out
    assert f"{run.name}   {status}" in shown
    assert f"next    {following.replace('HOME', str(tmp_path)).replace('RUN', run.name)}" in shown


def test_the_status_after_the_end_of_a_run_has_the_run_and_its_end(tmp_path):
    home = ServerHome.open(tmp_path)
    try:
        assert (home.status()["run"], home.status()["end"]) == (None, "")
        run = tmp_path / "runs" / "2026-11-22-calm-reef"
        run.mkdir(parents=True)
        (run / "config.toml").touch()
        (run / "events.jsonl").write_text('{"event": "stop", "status": "done", "reason": "Finished 3 rounds."}\n')
        assert (home.status()["run"], home.status()["end"]) == (run.name, "done: Finished 3 rounds.")
    finally:
        home.close()


def test_equal_lines_of_a_site_are_printed_once(capsys):
    printer = Printer(False)
    for event in ("waiting", "waiting", "connected", "waiting"):
        printer({"event": event, "address": "a:1"})
    assert [line.split()[0] for line in capsys.readouterr().err.splitlines()] == ["waiting", "connected", "waiting"]


def test_fedavg_has_one_rate():
    rates = {atoll.recipes.fedavg().local.optimizer.lr}
    rates |= {it.plan().local.optimizer.lr for it in (Experiment(), Experiment(recipe="fedavg()"))}
    assert rates == {FEDAVG_RATE}
