"""A run with a loss far above that of the start model or of a constant answer fails, whatever its first round was."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import atoll
from atoll import recipes
from atoll.base.errors import RunError
from atoll.cli import main
from atoll.compute.loss import binary_cross_entropy, cross_entropy, mse
from atoll.data import IID, arrays
from atoll.training.reference import constant_loss, reference_rows

DIGITS = atoll.data.load("digits").split(10)


def test_the_constant_answer_is_that_of_numpy():
    y = np.array([0, 0, 1, 2, 2, 2])
    rows = arrays(np.zeros((6, 1)), y).split(2, IID(), held_out=0)
    shares = np.array([2, 1, 3]) / 6
    rows = reference_rows(rows, 0)
    assert math.isclose(constant_loss(cross_entropy(), rows), -(shares * np.log(shares)).sum(), rel_tol=1e-12)
    rows = reference_rows(arrays(np.zeros((6, 1)), y % 2).split(2, IID(), held_out=0), 0)
    share = np.array([5, 1]) / 6
    assert math.isclose(constant_loss(binary_cross_entropy, rows), -(share * np.log(share)).sum(), rel_tol=1e-12)
    t = np.random.default_rng(0).normal(size=(6, 2))
    rows = reference_rows(arrays(np.zeros((6, 1)), t).split(2, IID(), held_out=0), 0)
    assert math.isclose(constant_loss(mse, rows), t.var(0).mean(), rel_tol=1e-6)
    assert constant_loss(lambda output, y: output.sum(1), rows) is None


def test_rows_are_keyed_and_bounded():
    a, b = reference_rows(DIGITS, 0), reference_rows(DIGITS, 0)
    assert torch.equal(a.order, b.order) and len(a.order) == 1024 == len(a.order.unique())
    assert not torch.equal(a.order, reference_rows(DIGITS, 1).order)


@pytest.mark.parametrize("rounds", [2, 20])
def test_a_huge_rate_fails(rounds):
    with pytest.raises(RunError, match="diverged") as caught:
        atoll.train("mlp", DIGITS, recipes.fedavg(lr=1000), rounds=rounds, out=None)
    assert caught.value.exit_code == 1 and caught.value.line == "atoll lr"


def test_a_huge_rate_fails_at_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["run", "--recipe", "fedavg(lr=1000)", "--rounds", "2", "--clients", "5", "--quiet"]
    assert main([*words, "--set", "report=false"]) == 1
    assert "atoll lr" in capsys.readouterr().err
    assert main(["runs"]) == 0
    assert "failed" in capsys.readouterr().out


def test_a_run_worse_than_a_constant_answer_states_it():
    x = torch.full((40, 1), 3.0)
    data = arrays(x, torch.arange(40.0) % 2).split(4, IID(), held_out=0)
    run = atoll.train("linear", data, recipes.gd(1e-6), rounds=1, out=None)
    assert "constant answer" in run.reason and "atoll lr" in run.reason and run.status == "done"
    run = atoll.train("linear", data, recipes.gd(0.01), rounds=60, out=None)
    assert run.reason == "Finished 60 rounds."


def test_a_start_far_above_a_constant_answer_is_no_failure():
    """Regression in own units: the start model has 100 times the loss of the constant answer, and the run improves."""
    x = torch.ones(40, 1)
    data = arrays(x, 10 + (torch.arange(40.0) % 2)).split(4, IID(), held_out=0)
    run = atoll.train("linear", data, recipes.gd(0.01), rounds=10, out=None)
    assert run.status == "done" and run.metrics["loss"] > 10 * 0.25


def test_the_own_loss_of_a_client_is_not_compared():
    def own(model, loader, ctx):
        for x, y in loader:
            nn.functional.cross_entropy(model(x), y).backward()
        return {"loss": 1e6}

    from atoll.plan.aggregate import Mean
    from atoll.plan.local import Custom

    run = atoll.train("softmax", DIGITS, atoll.Plan(Custom(own), Mean()), rounds=2, out=None)
    assert run.status == "done"
