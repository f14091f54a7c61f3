"""Every line that a command offers for a run of a Python program works when it is pasted into this program."""

import re

import pytest
import torch

import atoll
from atoll.cli import main
from atoll.report.page_data import page_data
from atoll.runs.folder import RunFolder
from atoll.runs.summary import summary
from atoll.tools.export import load_exported


def own():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(10, 1))


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# Settings that differ from the defaults belong to the offered line: a training without them is refused.
@pytest.fixture(params=["linear", "own"])
def program(request):
    """The variables of a program, and its run."""
    model, settings = ("linear", {}) if request.param == "linear" else (own(), {"seed": 3, "dtype": "float64"})
    names = {"atoll": atoll, "model": model, "data": atoll.data.load("diabetes").split(4), "plan": "gd(0.1)"}
    names["rows"] = {name: [0.1] for name in names["data"].columns}
    run = atoll.train(model, names["data"], "gd(0.1)", rounds=2, report=False, progress="none", **settings)
    return names, run


def pasted(lines, names):
    """Run lines of Python in a program; the value of the last one."""
    *first, last = lines.splitlines()
    exec("\n".join(first), names)
    target = re.match(r"(\w+) = (atoll\..*)", last)
    return eval(target[2] if target else last, names)


def offered(words, capsys):
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "was started from Python" in error or "no model of atoll's own" in error
    return error.partition("Write: ")[2]


def test_resume(program, capsys):
    names, run = program
    for words, rounds in ((["--more", "1"], 3), (["--rounds", "5"], 5), ([], 5)):
        found = pasted(offered(["resume", "latest", *words], capsys), names)
        assert (found.path, found.rounds) == (run.path, rounds)


def test_export_and_replay(program, capsys):
    names, _ = program
    pasted(offered(["export", "latest", "--dtype", "int8", "--to", "small.safetensors"], capsys), names)
    assert "int8" in capsys.readouterr().out
    assert {t.dtype for t in load_exported("small.safetensors").values()} == {torch.float32}
    pasted(offered(["replay", "latest", "--round", "1", "--client", "2"], capsys), names)
    assert "client 2" in capsys.readouterr().out


def test_a_repetition(program, capsys):
    names, run = program
    found = pasted(offered(["run", str(run.path)], capsys), names)
    assert found.path != run.path and found.reports[-1].fingerprint == run.reports[-1].fingerprint


def test_show_and_the_page(program, capsys):
    names, run = program
    assert main(["show", "latest"]) == 0
    shown = capsys.readouterr().out.rpartition("next    ")[2]
    assert isinstance(pasted(shown, names), torch.nn.Module)
    lines = page_data(run.path).lines
    python = [line for line in lines if not line.startswith("atoll predict")]
    assert len(python) == 2 and len(lines) == (3 if names["model"] == "linear" else 2)
    assert isinstance(pasted(python[0], names), torch.nn.Module)
    assert pasted(python[1], names).rounds == 12


def test_predict(program, capsys):
    names, run = program
    header = list(names["rows"])
    (run.path.parent / "rows.csv").write_text(",".join(header) + "\n" + ",".join(["0.1"] * len(header)) + "\n")
    words = ["predict", "latest", "runs/rows.csv"]
    if names["model"] == "linear":
        assert main(words) == 0
        expected = float(capsys.readouterr().out.splitlines()[1].rpartition(",")[2])
    else:
        found = pasted(offered(words, capsys), names)
        expected = run.predictor.predict(names["rows"])[0]
        assert float(found[0]) == float(expected)
    assert float(run.predictor.predict(names["rows"])[0]) == pytest.approx(float(expected))


def test_a_run_that_was_interrupted(program, capsys):
    names, run = program
    folder = RunFolder.open(run.path)
    folder.close()
    (run.path / "events.jsonl").write_text("")
    assert main(["show", "latest"]) == 0
    shown = capsys.readouterr().out.rpartition("next    ")[2]
    assert pasted(shown, names).path == run.path


def test_the_summary_offers_a_word_of_python(program):
    _, run = program
    assert "the same with baselines=True" in summary(run)
