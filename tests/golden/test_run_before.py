"""Run folders of version 0.1.0 before the redesign, in `run_before*`: later versions still read them."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import atoll
from atoll.cli import main

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A copy: three rounds of FedAvg on 5 clients, with error feedback around top-k."""
    return Path(shutil.copytree(HERE / "run_before", tmp_path_factory.mktemp("runs") / "run_before"))


def test_the_model_loads(run):
    """It is right as often as its last row of metrics.jsonl states."""
    model = atoll.load(run)
    held = atoll.Experiment.read(run).data().held()
    x, y = held.take(held.order)
    with torch.no_grad():
        assert float((model(x).argmax(1) == y).double().mean()) == pytest.approx(0.4373259052924791, abs=0.003)


@pytest.mark.parametrize("words", [("show",), ("compare", "run_before")])
def test_commands_read_the_run(run, words, capsys):
    command, *rest = words
    assert main([command, "run_before", *rest, "--out", str(run.parent)]) == 0
    assert "run_before" in capsys.readouterr().out


def test_a_round_is_repeated(run, capsys):
    """On the kind of CPU that trained the run. On another kind the bits differ, and the refusal names both."""
    recorded = json.loads((run / "environment.json").read_text(encoding="utf-8"))["cpu"]
    done = main(["replay", "run_before", "--round", "1", "--client", "1", "--out", str(run.parent)])
    out, err = capsys.readouterr()
    here = torch.backends.cpu.get_cpu_capability()
    if here == recorded:
        assert done == 0 and "run_before" in out
    else:
        assert done == 1 and f"another kind of CPU: cpu {recorded}, here {here}" in err


def test_the_model_is_exported(run, tmp_path):
    assert main(["export", str(run), "--to", str(tmp_path / "small.safetensors")]) == 0
