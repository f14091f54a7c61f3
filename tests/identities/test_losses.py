"""Losses by name: their best constants, the units of predictions and metrics, and data that they refuse."""

import json
import math

import numpy as np
import pandas
import pytest
import torch
from torch import nn

import atoll
from atoll.base.errors import UsageError
from atoll.base.lines import form
from atoll.cli.answer import answer
from atoll.compute.loss import huber, loss_of, quantile
from atoll.training.evaluation import constant_answer

PLAN = atoll.recipes.gd(0.5)


def counts(rows=300, seed=0):
    """Counts with the logarithm of the rate linear in x."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=rows)
    return pandas.DataFrame({"x": x, "visits": rng.poisson(np.exp(0.4 + 0.7 * x))})


def test_names_and_calls_of_the_grammar():
    assert loss_of("huber") == loss_of("huber(1.0)") == huber()
    assert loss_of("quantile(0.9)") == quantile(0.9) and repr(quantile(0.9)) == "quantile(0.9)"
    for text, found in (("quantile", "quantile"), ("quantile(1.0)", "q = 1.0"), ("huber(0)", "delta = 0")):
        with pytest.raises(UsageError, match=found.replace("(", ".")):
            loss_of(text)


@pytest.mark.parametrize("q", [0.1, 0.5, 0.9])
def test_the_best_constant_of_the_quantile_loss_is_the_quantile(q):
    y = torch.linspace(0, 1, 101, dtype=torch.float64) ** 2
    answers = torch.linspace(0, 1, 1001, dtype=torch.float64)
    losses = torch.stack([quantile(q)(torch.full_like(y, float(a)), y).mean() for a in answers])
    assert float(answers[losses.argmin()]) == pytest.approx(float(y.quantile(q)), abs=1e-3)


def test_a_model_of_rates_answers_and_is_judged_in_counts(tmp_path, capsys):
    """The model is the maximum of the likelihood; predictions, rmse and the constant are in counts."""
    counts().to_csv(tmp_path / "train.csv", index=False)
    counts(60, 1).to_csv(tmp_path / "new.csv", index=False)
    options = {"target": "visits", "task": "regression", "scale_target": "none", "scale": "none"}
    data = atoll.data.load(tmp_path / "train.csv", **options).split(3, held_out=0.2)
    where = {"out": tmp_path / "runs", "report": False, "loss": "poisson", "dtype": "float64"}
    run = atoll.train("linear", data, atoll.recipes.gd(0.3), rounds=60, **where)
    x, y = data.take(data.order)
    rate = run.model(x).detach()[:, 0].exp()
    assert float((rate - y).mean()) == pytest.approx(0, abs=0.02)  # the gradient of the likelihood is 0
    assert float(((rate - y) * x[:, 0]).mean()) == pytest.approx(0, abs=0.02)
    held_x, held_y = data.held_out.take(torch.arange(len(data.held_out)))
    held = run.model(held_x).detach()[:, 0].exp()
    assert run.metrics["rmse"] == pytest.approx(float((held - held_y).square().mean().sqrt()), rel=1e-9)
    deviance = 2 * (torch.xlogy(held_y, held_y / held) - held_y + held).mean()
    assert run.metrics["poisson_deviance"] == pytest.approx(float(deviance), rel=1e-9)
    new = counts(60, 1)
    with torch.no_grad():
        wanted = run.model(torch.tensor(new[["x"]].to_numpy()))[:, 0].exp()
    for predictor in (run.predictor, atoll.predictor(run.path)):
        np.testing.assert_allclose(predictor.predict(new), wanted.numpy(), rtol=1e-12)
        assert predictor.evaluate(new, new["visits"]).metrics.keys() == {
            "loss",
            "poisson_deviance",
            "rmse",
            "mae",
            "r2",
        }
    assert answer(["predict", str(run.path), str(tmp_path / "new.csv"), "--to", str(tmp_path / "a.csv"), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)["metrics"]
    assert printed["rmse"] == pytest.approx(float((wanted.numpy() - new["visits"]).pow(2).mean() ** 0.5), rel=1e-9)
    assert pandas.read_csv(tmp_path / "a.csv")["prediction"].to_numpy() == pytest.approx(wanted.numpy(), rel=1e-12)


def test_the_constant_of_counts_is_their_mean():
    table = counts()
    data = atoll.data.frame(table, target="visits", task="regression", scale_target="none").split(2, held_out=0.2)
    task = atoll.rounds("linear", data, PLAN, rounds=1, loss="poisson").task
    mean = float(data.rows.targets()[data.order].mean())
    held = data.held_out.targets()
    found = constant_answer(task, data).metrics
    assert found["rmse"] == pytest.approx(float((held - mean).square().mean().sqrt()), rel=1e-6)
    assert found["held_out_loss"] == pytest.approx(float((mean - held * math.log(mean)).mean()), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "line"),
    [({}, 'scale_target="none"'), ({"task": "classification"}, 'task="regression"')],
)
def test_data_without_counts_are_refused_for_poisson(options, line):
    data = atoll.data.frame(counts(), target="visits", **{"task": "regression", **options}).split(2)
    with pytest.raises(UsageError) as error:
        atoll.rounds(nn.Linear(1, 1), data, PLAN, rounds=1, loss="poisson")
    assert form(error.value.write, "python") == line


def test_negative_counts_are_refused():
    data = atoll.data.arrays(torch.zeros(6, 1), torch.arange(6.0) - 1).split(2)
    with pytest.raises(UsageError, match="a target is -1"):
        atoll.rounds("linear", data, PLAN, rounds=1, loss="poisson")


@pytest.mark.slow
def test_a_quantile_run_has_its_share_of_targets_below():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(600, 1))
    y = 3 * x[:, 0] + rng.gumbel(size=600)
    data = atoll.data.arrays(x, y).split(3, held_out=0)
    training = atoll.rounds("linear", data, atoll.recipes.gd(1.0), rounds=60, loss="quantile(0.8)")
    list(training)
    with torch.no_grad():
        below = torch.tensor(y) < training.model(torch.tensor(x, dtype=torch.float32))[:, 0]
    assert float(below.double().mean()) == pytest.approx(0.8, abs=0.02)


def own(output, y):
    return (output[:, 0] - y).square().square()


def test_a_predictor_from_a_folder_has_the_loss_of_the_run_or_none(tmp_path):
    """A default loss in place of a loss of the user would be a wrong number under the name of the loss."""
    data = atoll.data.load("diabetes").split(3)
    x, y = data.rows.rows.take(torch.arange(40))
    found = {}
    for loss in ("huber(delta=0.5)", huber(0.5), own):
        run = atoll.train("linear", data, PLAN, rounds=1, loss=loss, metrics=["mae"], out=tmp_path, report=False)
        read = [p.evaluate(x, y).metrics for p in (run.predictor, atoll.predictor(run.path))]
        found[str(loss)] = [m.get("loss") for m in read]
        assert all("mae" in m for m in read)
    (a, b), (c, d), (e, f) = found.values()
    assert a == b == c == d is not None
    assert e is not None and f is None
