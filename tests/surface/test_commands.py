"""Python and shell take the same texts; a resumed run never loses rounds; a run in progress is shown as running."""

import json
import sys

import pytest
import torch

import atoll
from atoll import recipes, runs
from atoll.base.errors import UsageError
from atoll.cli import main
from atoll.engine.ranks.launch import engine_of_launch
from atoll.runs.folder import RunFolder, rounds_to_run
from atoll.training import Settings

MINE = """
import torch
def huber(output, y):
    return torch.nn.functional.huber_loss(output.squeeze(-1), y, reduction="none")
def near(output, y):
    return (output.squeeze(-1) - y).abs() < 50
"""


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_functions.py").write_text(MINE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("own_functions", None)


def started(rounds=3, **words):
    data = atoll.data.load("diabetes").split(4)
    return atoll.train("linear", data, "gd(0.1)", rounds=rounds, report=False, **words)


def test_texts_are_the_values_of_python():
    data = atoll.data.load("diabetes")
    by_text, by_value = data.split(4, by="Quantity(0.5)"), data.split(4, by=atoll.data.Quantity(0.5))
    assert torch.equal(by_text.order, by_value.order) and torch.equal(by_text.offsets, by_value.offsets)
    one, two = (
        atoll.rounds("linear", by_value, plan, rounds=1).next() for plan in ("fedavg(0.001)", recipes.fedavg(0.001))
    )
    assert one.fingerprint == two.fingerprint
    with pytest.raises(UsageError) as caught:
        data.split(4, by="Quantity(-1)")
    assert caught.value.line.startswith("data.split(by=Quantity(")
    with pytest.raises(UsageError) as caught:
        atoll.rounds("linear", by_value, "fedavgg(0.1)")
    assert caught.value.line == "fedavg(0.1)"


def test_loss_and_metrics_of_the_own_module(place, capsys):
    import own_functions

    data = atoll.data.load("diabetes").split(4)
    words = {"rounds": 2, "out": None}
    run = atoll.train("linear", data, "gd(0.1)", loss="own_functions:huber", metrics=["own_functions:near"], **words)
    same = atoll.train("linear", data, "gd(0.1)", loss=own_functions.huber, metrics="mae", **words)
    assert run.metrics["loss"] == same.metrics["loss"] and 0 <= run.metrics["near"] <= 1
    flags = ["--loss", "own_functions:huber", "--metrics", "own_functions:near", "--metrics", "mae"]
    words = ["run", "--data", "diabetes", "--model", "linear", "--recipe", "gd(0.1)", "--clients", "4", "--rounds", "2"]
    assert main([*words, *flags, "--json", "--quiet", "--set", "report=false"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert {"near", "mae"} <= shown["metrics"].keys()
    assert main(["resume", "latest", "--more", "1", "--quiet"]) == 2  # the folder names code, and it is not trusted
    assert main(["resume", "latest", "--more", "1", "--quiet", "--trust"]) == 0


def test_latest_and_load():
    run = started()
    model = atoll.load("latest")
    own = run.model.state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(UsageError, match=r"linear.weight: absent, and not \(1, 10\)") as caught:
        atoll.load("latest", torch.nn.Bilinear(2, 2, 1))
    assert not caught.value.line
    for folder in ("", "."):
        with pytest.raises(UsageError, match="No run is called"):
            atoll.load(folder)
    longer = started(rounds=5, resume="latest")
    assert longer.path == run.path.resolve() and longer.rounds == 5


def test_a_resumed_run_keeps_its_rounds():
    run = started(rounds=4)
    for rounds, more in ((3, None), (5, 2), (None, 0), (None, True)):
        with pytest.raises(UsageError):
            rounds_to_run(run.path, rounds, more)
    with pytest.raises(UsageError, match="has done 4 rounds"):
        started(resume=run.path, rounds=3)
    assert started(resume=run.path, rounds=4).rounds == 4
    data = atoll.data.load("diabetes").split(4)
    more = atoll.train("linear", data, "gd(0.1)", resume=run.path, more=2, report=False)
    assert more.rounds == 6
    again = atoll.train("linear", data, "gd(0.1)", resume=run.path, report=False)
    assert again.rounds == 6, "the default total is that of the run, not 100"
    assert main(["resume", "latest", "--rounds", "3"]) == 2
    with pytest.raises(UsageError, match="without resume"):
        started(more=3)


def test_the_command_adds_rounds(capsys):
    words = ["run", "--data", "diabetes", "--model", "linear", "--recipe", "gd(0.1)", "--clients", "3", "--quiet"]
    assert main([*words, "--rounds", "2", "--set", "report=false"]) == 0
    assert main(["resume", "latest", "--more", "3", "--quiet", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rounds"] == 5
    assert main(["resume", "latest", "--rounds", "1"]) == 2
    assert "--more 10" in capsys.readouterr().err


def test_a_locked_run_is_running(capsys):
    run = started()
    folder = RunFolder.open(run.path)
    assert runs.is_locked(run.path)
    assert main(["show", "latest", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "running"
    assert main(["show", "latest"]) == 0
    shown = capsys.readouterr().out
    assert "running" in shown.splitlines()[0] and "next    atoll show" in shown
    folder.close()
    assert not runs.is_locked(run.path)
    assert main(["show", "latest", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "done"


def test_several_processes_without_an_engine_are_torchrun(monkeypatch, capsys):
    assert engine_of_launch({}) == engine_of_launch({"WORLD_SIZE": "1"}) == "inprocess"
    assert engine_of_launch({"WORLD_SIZE": "2", "RANK": "1"}) == "torchrun"
    monkeypatch.setenv("WORLD_SIZE", "7")
    with pytest.raises(UsageError, match="torchrun did not start"):
        Settings.from_kwargs({"rounds": 1})
    assert main(["run", "--rounds", "1"]) == 2
    assert "WORLD_SIZE is 7" in capsys.readouterr().err
    assert repr(Settings.from_kwargs({"engine": "inprocess"}).engine) == "InProcess()"


def test_the_summary_states_one_reason(capsys):
    words = ["run", "--data", "diabetes", "--model", "linear", "--recipe", "gd(0.1)", "--clients", "3", "--rounds", "3"]
    assert main([*words, "--set", "report=false"]) == 0
    shown = capsys.readouterr()
    assert (shown.out + shown.err).count("Finished 3 rounds") == 1
    assert shown.out.count("best ") == 1 and "3 rounds, " in shown.out and " of " in shown.out
