"""The loss `cox`: Efron's partial likelihood by its definition, its derivatives, statsmodels' PHReg, and refusals."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from problems import federation, run, task_of
from torch import nn

import atoll
from atoll import recipes
from atoll.base.errors import UsageError
from atoll.base.random import Key
from atoll.compute.loss import cox
from atoll.compute.survival import derivatives
from atoll.engine.inprocess import InProcessEngine

WIDE = torch.float64
SIZES = (50, 31, 24, 12)


def trial(sizes=SIZES, features=3, columns=("age", "dose", "stage")):
    """Clients with tied survival times, of which a third is censored."""
    rows, key = sum(sizes), Key(3)
    x = key.fold("x").normal(rows * features).reshape(rows, features)
    hazard = (x @ torch.tensor([0.8, -0.5, 0.0], dtype=WIDE)[:features]).exp()
    time = (-key.fold("t").uniform(rows, WIDE).log() / hazard * 8).ceil()
    event = (key.fold("e").uniform(rows, WIDE) < 0.7).to(WIDE)
    return replace(federation(x, torch.stack((time, event), 1), sizes), columns=columns)


def efron(z, time, event):
    """The sum of the loss over one stratum, by its definition."""
    total = torch.zeros((), dtype=WIDE)
    for t in time[event > 0].unique():
        risk, tied = z[time >= t].exp().sum(), z[(time == t) & (event > 0)]
        for k in range(len(tied)):
            total = total + (risk - k / len(tied) * tied.exp().sum()).log() - tied[k]
    return total


def test_the_loss_is_efrons_and_its_derivatives_are_those_of_autograd():
    data = trial((40,))
    x, y = data.rows.x, data.rows.y
    w = torch.tensor([0.5, -0.3, 0.1], dtype=WIDE, requires_grad=True)
    loss = cox(x @ w, y)
    torch.testing.assert_close(loss.sum(), efron(x @ w, y[:, 0], y[:, 1]))
    assert bool((loss[y[:, 1] == 0] == 0).all())
    hessian = torch.autograd.functional.hessian(lambda w: cox(x @ w, y).sum(), w.detach())
    found = derivatives(x, (x @ w).detach(), y)
    torch.testing.assert_close(found.hessian, hessian)
    torch.testing.assert_close(found.slope @ x, torch.autograd.grad(loss.sum(), w)[0])


def test_the_loss_is_vectorised_over_clients():
    z, y = Key(1).normal(20).reshape(2, 10), trial((20,)).rows.y.reshape(2, 10, 2)
    each = torch.func.vmap(torch.func.grad(lambda z, y: cox(z, y).sum()))(z, y)
    torch.testing.assert_close(each[1], torch.func.grad(lambda z: cox(z, y[1]).sum())(z[1]))


@pytest.mark.slow
def test_newton_gives_the_stratified_estimate_of_statsmodels():
    from statsmodels.duration.hazard_regression import PHReg

    data = trial()
    strata = np.repeat(np.arange(len(SIZES)), SIZES)
    y = data.rows.y.numpy()
    theirs = PHReg(y[:, 0], data.rows.x.numpy(), status=y[:, 1], strata=strata, ties="efron").fit()
    ours = atoll.train("cox", data, recipes.newton(), rounds=8, dtype="float64", out=None)
    found = ours.model.linear.weight.detach()[0].numpy()
    np.testing.assert_allclose(found, theirs.params, atol=1e-6)


def test_the_model_trains_with_other_recipes_and_is_judged_by_the_c_index():
    data = trial()
    held = replace(data, held_out=data.rows)
    run_ = atoll.train("cox", held, recipes.fedavg(0.1, batch=None), rounds=2, out=None)
    assert run_.best["metric"] == "c_index" and run_.metrics["c_index"] > 0.6
    assert run_.task.couples and not any("linear.bias" in n for n in run_.model.state_dict())


def test_a_stratum_is_never_padded_or_divided():
    """The gradient of two clients with other numbers of rows is the mean of their own."""
    data = trial((33, 7))
    task = replace(task_of(nn.Linear(3, 1, bias=False), data, "lanes", WIDE, "cox"))
    state, _ = run(recipes.distributed_gd(1.0), InProcessEngine(task, data), 1, init=torch.zeros(3, dtype=WIDE))
    w = torch.zeros(3, dtype=WIDE, requires_grad=True)
    parts = [slice(a, b) for a, b in pairwise(data.offsets.tolist())]
    loss = sum(cox(data.rows.x[s] @ w, data.rows.y[s]).sum() for s in parts) / 40
    torch.testing.assert_close(state.model.theta, -torch.autograd.grad(loss, w)[0])


@pytest.mark.parametrize(
    ("time", "event", "message"),
    [(-1.0, 1.0, "a time is -1"), (1.0, 2.0, "an event is 2"), (1.0, 0.0, "no row has an event")],
)
def test_refused_targets(time, event, message):
    x = torch.randn(6, 2, dtype=WIDE)
    y = torch.tensor([[time, event]] + [[2.0, 0.0]] * 5, dtype=WIDE)
    with pytest.raises(UsageError, match=message):
        atoll.train("cox", federation(x, y, (3, 3)), recipes.newton(), rounds=1, out=None)


def test_times_that_are_equal_in_float32_are_refused():
    data = trial((9, 9))
    data.rows.y[:, 0] += 1.6e9  # seconds since 1970
    with pytest.raises(UsageError, match="equal in float32"):
        atoll.train("cox", data, recipes.newton(), rounds=1, out=None)
    atoll.train("cox", data, recipes.newton(), rounds=1, out=None, dtype="float64")


def test_refused_models():
    data = trial()
    with pytest.raises(UsageError, match="a model with a bias"):
        atoll.train(nn.Linear(3, 1), data, recipes.newton(), rounds=1, out=None, loss="cox")
    one = federation(data.rows.x, data.rows.y[:, 0], SIZES)
    with pytest.raises(UsageError, match="two targets"):
        atoll.train("cox", one, recipes.newton(), rounds=1, out=None)
    with pytest.raises(UsageError, match="loss cox"):
        atoll.train("linear", one, recipes.newton(), rounds=1, out=None, loss="cox")


def test_a_table_on_the_command_line(tmp_path, capsys):
    from atoll.cli import main

    data = trial()
    table = tmp_path / "trial.csv"
    rows = torch.cat((data.rows.x, data.rows.y), 1).tolist()
    lines = ["age,dose,stage,time,event", *(",".join(map(str, row)) for row in rows)]
    table.write_text("\n".join(lines))
    words = ["run", "--data", str(table), "--target", "time,event", "--model", "cox", "--recipe", "newton()"]
    out = tmp_path / "runs"
    assert main([*words, "--clients", "3", "--rounds", "4", "--out", str(out), "--set", "report=false"]) == 0
    assert "c index" in capsys.readouterr().out
    run_ = next(out.iterdir())
    assert main(["predict", str(run_), str(table)]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "age,dose,stage,time,event,prediction"
