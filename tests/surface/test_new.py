"""`atoll new` writes a project that trains at once."""

import math
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import atoll
from atoll.cli import main
from atoll.tools.new import TEMPLATES, new_project

ROWS = "hospital,age,risk\n" + "".join(f"{'ab'[i % 2]},{20 + i},{i / 7:.3f}\n" for i in range(40))


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """An empty working folder; the modules of a project are forgotten at the end."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "rows.csv").write_text(ROWS)
    yield tmp_path
    for name in ("study", "my_model", "my_loop", "test_experiment"):
        sys.modules.pop(name, None)


CASES = [pytest.param(t, "rows.csv", marks=[pytest.mark.slow] if t == "transformers" else []) for t in TEMPLATES] + [
    ("torch", None)
]


def _needs(template):
    if template == "transformers":
        pytest.importorskip("transformers", reason="the extra atoll[hf] is not installed")


@pytest.mark.parametrize(("template", "data"), CASES)
def test_a_project_trains_at_once(template, data, place, monkeypatch):
    _needs(template)
    files = new_project("p", template, data)
    module = next(f for f in files if f.suffix == ".py")
    lines = (place / "p/experiment.toml").read_text().splitlines()
    assert all(line.startswith("# ") for line in lines[::2]) and all(" = " in line for line in lines[1::2])
    assert len((place / "p/README.md").read_text().splitlines()) == 10
    compile(module.read_text(), str(module), "exec")
    monkeypatch.chdir("p")
    run = atoll.Experiment.read("experiment.toml").override(rounds=2).train(report=False)
    assert run.status == "done" and run.rounds == 2
    assert all(math.isfinite(value) for value in run.metrics.values())


def test_the_first_rows_propose_target_client_and_task(place):
    new_project("p", data="rows.csv")
    text = (place / "p/experiment.toml").read_text()
    assert 'target = "risk"' in text and "it is the last column that names no client" in text
    assert re.search(r'Proposed: "hospital", because .*2 values of it.*\n# by = "hospital"', text)
    assert re.search(r'Proposed: regression, because the column contains numbers.*\n# task = "regression"', text)
    active = atoll.Experiment.read("p/experiment.toml")
    assert active.by is None and active.recipe == "fedavg(lr=0.05, batch=10)"
    proposed = re.sub("^# (?=(by|task) =)", "", text, flags=re.M)
    (place / "p/experiment.toml").write_text(proposed)
    assert atoll.Experiment.read("p/experiment.toml").data().names == ("a", "b")


def test_names_of_columns_become_texts_of_toml(place):
    Path("odd.csv").write_text('"a ""b"" #\\",label\n1,x\n2,y\n')
    new_project("p", data="odd.csv", target='a "b" #\\')
    assert tomllib.loads((place / "p/experiment.toml").read_text())["target"] == 'a "b" #\\'
    new_project("q", data="odd.csv")
    assert tomllib.loads((place / "q/experiment.toml").read_text())["target"] == "label"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["full"], "atoll new full-2"),
        (["rows.csv"], "atoll new rows.csv-2"),
        (["p", "--data", "rows.csv", "--target", "riks"], "--target risk"),
        (["p", "--data", "numbers.csv"], "sed -i 1ic0,c1 numbers.csv"),
        (["p", "--data", "row.csv"], "--data rows.csv"),
        (["p", "--template", "pytorch"], "--template torch"),
        (["p", "--target", "risk"], ""),
        (["p", "--data", "empty.csv"], ""),
    ],
)
def test_a_wrong_request_is_refused(words, line, place, capsys):
    (place / "full").mkdir()
    (place / "full/a").touch()
    Path("numbers.csv").write_text("1,2\n3,4\n")
    Path("empty.csv").write_text("a,b\n")
    assert main(["new", *words]) == 2
    error = capsys.readouterr().err
    assert (f"Write: {line}\n" in error) if line else "Write:" not in error
    assert not (place / "p").exists()


def test_the_command_names_the_next_line(place, capsys):
    (place / "p").mkdir()
    assert main(["new", "p", "--template", "torch"]) == 0
    done = capsys.readouterr()
    assert done.out.split() == [
        f"p{os.sep}{n}" for n in ("experiment.toml", "my_model.py", "README.md", "test_experiment.py")
    ]
    assert "Write: cd p && atoll run experiment.toml" in done.err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("template", "data"),
    [("tabular", None), ("torch", "rows.csv"), ("own-loop", None), ("transformers", None), ("sklearn", "rows.csv")],
)
def test_the_commands_of_the_readme_run(template, data, place):
    _needs(template)
    new_project("p", template, data)
    module = TEMPLATES[template].module
    lines = [["-m", "atoll", "run", "experiment.toml", "--smoke"], ["-m", "pytest", "-q"]]
    lines += [[module]] if module == "study.py" else []
    for words in lines:
        subprocess.run([sys.executable, *words], cwd=place / "p", check=True, timeout=120, capture_output=True)
