"""Standard errors, p-values and intervals of `newton`: statsmodels' values, units, notes, files and commands."""

import math

import numpy as np
import pytest
import torch
from problems import classification, federation, regression

import atoll
from atoll import recipes
from atoll.cli import main
from atoll.runs.inference import Inference

WIDE = torch.float64


def trained(model, data, l2=0.0, rounds=8, out=None, **settings):
    words = {"dtype": "float64", "evaluate_every": 0, "report": False, **settings}
    return atoll.train(model, data, recipes.newton(l2), rounds=rounds, out=out, **words)


def rows(inference, units):
    """The values of the rows in these units, `[rows, 6]`: coefficient, se, z, p, low, high."""
    found = inference.frame()
    return found[found["units"] == units].iloc[:, 2:].to_numpy(float)


def theirs(fit):
    """The values of a fit of statsmodels, with the constant last."""
    found = np.column_stack((fit.params, fit.bse, fit.tvalues, fit.pvalues, fit.conf_int()))
    return np.vstack((found[1:], found[:1]))


def test_a_logistic_model_has_the_inverse_information_as_covariance():
    data = classification((60, 50, 40), (2,), 2, dtype=WIDE)
    found = trained("logistic", data)
    x = torch.cat((data.rows.x, torch.ones(150, 1, dtype=WIDE)), 1)
    p = (x @ torch.cat([t.flatten() for t in found.model.parameters()]).detach()).sigmoid()
    se = torch.linalg.inv(x.T @ ((p * (1 - p))[:, None] * x)).diagonal().sqrt()
    np.testing.assert_allclose(rows(found.inference, "scaled")[:, 1], se, rtol=1e-9)
    assert found.inference.names == ("feature 0", "feature 1", "the constant") and found.inference.statistic == "z"


def test_a_softmax_of_two_classes_has_the_errors_of_the_logistic_model():
    data = classification((60, 50, 40), (2,), 2, dtype=WIDE)
    one = rows(trained("logistic", data).inference, "scaled")
    both = trained("softmax", data).inference
    np.testing.assert_allclose(2 * rows(both, "scaled")[2:4, :2], one[:2, :2], rtol=1e-8)
    assert both.names[2] == "1: feature 0"


@pytest.mark.slow
def test_a_linear_model_has_the_table_of_ordinary_least_squares_in_raw_units():
    import statsmodels.api as sm

    source = atoll.data.load("diabetes", scale_target="standard")
    data = source.split(5, atoll.data.Quantity(1.0), held_out=0)
    found = trained("linear", data, rounds=1)
    from sklearn.datasets import load_diabetes

    x, y = load_diabetes(return_X_y=True, scaled=False)
    fit = sm.OLS(y, sm.add_constant(x)).fit()
    np.testing.assert_allclose(rows(found.inference, "raw"), theirs(fit), rtol=1e-6)
    assert found.inference.statistic == "t"


@pytest.mark.slow
def test_poisson_and_logistic_models_have_the_tables_of_statsmodels():
    import statsmodels.api as sm

    data = regression((60, 50, 40))
    y = torch.poisson((0.2 * data.rows.x.sum(1) + 1).exp(), generator=torch.Generator().manual_seed(0))
    x = sm.add_constant(data.rows.x.numpy())
    found = trained("linear", federation(data.rows.x, y, (60, 50, 40)), rounds=10, loss="poisson")
    fit = sm.GLM(y.numpy(), x, family=sm.families.Poisson()).fit(tol=1e-14)
    np.testing.assert_allclose(rows(found.inference, "scaled"), theirs(fit), rtol=1e-6)


def test_a_penalty_has_no_p_values_and_few_rounds_a_note():
    data = classification((60, 50), (2,), 2, dtype=WIDE)
    found = trained("logistic", data, l2=0.1).inference
    values = rows(found, "scaled")
    assert np.isfinite(values[:, :2]).all() and np.isnan(values[:, 2:]).all() and "no p-values" in found.text()
    assert "run more rounds" in trained("logistic", data, rounds=2).inference.text()
    assert "run more rounds" not in trained("logistic", data).inference.text()
    weighted = trained("logistic", data, class_weight="balanced").inference
    assert np.isnan(rows(weighted, "scaled")[:, 1]).all() and "Class weights" in weighted.text()


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_penalized_linear_model_has_the_covariance_of_its_estimate(rounds):
    data = regression((30, 20))
    l2, x = 0.4, torch.cat((data.rows.x, torch.ones(50, 1, dtype=WIDE)), 1)
    penalty = l2 * torch.diag(torch.tensor([*[1.0] * data.rows.x.shape[1], 0.0], dtype=WIDE))
    map_of_y = torch.linalg.solve(2 / 50 * x.T @ x + penalty, 2 / 50 * x.T)  # the estimate is linear in y
    y = data.rows.y.reshape(50)
    squares = (y - x @ map_of_y @ y).square().sum() / (50 - (x @ map_of_y).trace())
    found = trained("linear", data, l2, rounds)
    np.testing.assert_allclose(rows(found.inference, "scaled")[:, 0], map_of_y @ y, rtol=1e-9)
    np.testing.assert_allclose(
        rows(found.inference, "scaled")[:, 1], (squares * map_of_y @ map_of_y.T).diagonal().sqrt(), rtol=1e-9
    )
    assert "run more rounds" not in found.inference.text()  # one step is exact


@pytest.mark.parametrize("l2", [1e-4, 1e-8])
def test_columns_that_add_up_to_the_constant_have_the_errors_of_their_difference(l2):
    level = torch.rand(150, generator=torch.Generator().manual_seed(0)) < 0.4
    x, y = torch.stack((level, ~level), 1).to(WIDE), classification((150,), (2,), 2, dtype=WIDE).rows.y
    both = rows(trained("logistic", federation(x, y, (60, 50, 40)), l2).inference, "scaled")
    one = rows(trained("logistic", federation(x[:, :1], y, (60, 50, 40))).inference, "scaled")
    np.testing.assert_allclose(2 * both[0, :2], one[0, :2], rtol=1e3 * l2 + 1e-5)


def test_a_step_that_may_be_taken_back_has_no_errors():
    data = regression((60, 50))
    y = 200 * (torch.poisson((0.2 * data.rows.x.sum(1) + 1).exp(), generator=torch.Generator().manual_seed(0)) + 1)
    found = trained("linear", federation(data.rows.x, y, (60, 50)), rounds=2, loss="poisson").inference
    assert np.isnan(rows(found, "scaled")[:, 1:]).all() and "longer than a standard error" in found.text()


def test_a_softmax_has_the_same_table_from_each_start():
    data = classification((60, 50, 40), (2,), 3, dtype=WIDE)
    torch.manual_seed(0)
    for l2 in (0.0, 0.1):
        each = [trained(model, data, l2).inference for model in ("softmax", torch.nn.Linear(2, 3, dtype=WIDE))]
        here, there = (rows(found, "scaled")[:, :2] for found in each)
        np.testing.assert_allclose(there, here, rtol=1e-7)
        np.testing.assert_allclose([here[i::2, 0][:3].sum() for i in (0, 1)], 0, atol=1e-12)


def test_the_folder_the_summary_and_the_command_have_it(tmp_path, capsys):
    data = atoll.data.load("diabetes").split(4)
    run = trained("linear", data, rounds=2, out=tmp_path)
    assert main(["show", str(run.path)]) == 0
    shown = capsys.readouterr().out
    for line in run.inference.text().splitlines():
        assert line in run.summary() and line in shown
    again = Inference.read(run.path)
    np.testing.assert_array_equal(rows(again, "raw"), rows(run.inference, "raw"))
    assert (again.names, again.units, again.statistic) == (run.inference.names, run.inference.units, "t")
    other = atoll.train("linear", data, recipes.distributed_gd(0.1), rounds=1, out=None)
    assert other.inference is None and Inference.read(tmp_path) is None
    (tmp_path / "inference.csv").write_text("name,units\na,b\n")
    assert Inference.read(tmp_path) is None


def test_undefined_values():
    two = regression((9, 9))
    two = federation(two.rows.x, two.rows.x[:, :2], (9, 9))
    found = trained("linear", two, rounds=2).inference
    assert math.isnan(found.values["se"][0]) and "several targets" in found.text()
    few = trained("linear", regression((2, 2)), rounds=2).inference  # four rows, four parameters
    assert math.isnan(few.values["p"][0]) and not math.isnan(few.values["coefficient"][0])
