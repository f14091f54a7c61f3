"""Newton's method: one round on least squares, equality with pooled scikit-learn and statsmodels, and refusals."""

from dataclasses import replace

import pytest
import torch
from problems import classification, federation, regression, run, task_of
from torch import nn

import atoll
from atoll import recipes
from atoll.base.errors import RunError, UsageError
from atoll.base.random import Key
from atoll.compute.curvature import slopes
from atoll.compute.loss import ClassWeighted, binary_cross_entropy, cross_entropy, mse, poisson
from atoll.engine.inprocess import InProcessEngine
from atoll.engine.simulation.fleet import Fleet
from atoll.plan.aggregate import Masks, Mean, Sum
from atoll.plan.codec import ErrorFeedback, TopK
from atoll.plan.optimizer.rules import adam, sgd
from atoll.plan.pace import Buffered
from atoll.plan.protocols import Cohort, Sampler
from atoll.plan.round import bind
from atoll.plan.sampler import Poisson, Uniform
from atoll.training.baselines import compare_baselines

WIDE = torch.float64


class OfAll(Sampler):
    """A sampler from outside the package that selects all clients."""

    def __call__(self, population, round, key):
        return Cohort(torch.arange(population.clients), torch.ones((), dtype=WIDE))


def trained(model, data, plan, rounds=10, **settings):
    return atoll.train(model, data, plan, rounds=rounds, dtype="float64", out=None, evaluate_every=0, **settings)


def weights(run):
    return torch.cat([p.detach().flatten() for p in run.model.parameters()])


def counts(sizes=(30, 50, 20), features=3, dtype=WIDE):
    """Clients with Poisson counts."""
    data = regression(sizes, features, dtype=dtype)
    y = torch.poisson((0.3 * data.rows.x.sum(1)).exp(), generator=torch.Generator().manual_seed(0))
    return federation(data.rows.x, y, sizes)


def separate(sizes=(30, 30)):
    data = classification(sizes, (2,), 2, dtype=WIDE)
    return federation(torch.cat((10.0 * data.rows.y[:, None], data.rows.x), 1), data.rows.y, sizes)


@pytest.mark.parametrize(
    ("loss", "targets"),
    [
        (mse, torch.arange(15.0).reshape(5, 3).double()),
        (poisson, torch.arange(15.0).reshape(5, 3).double()),
        (binary_cross_entropy, torch.tensor([[1, 0, -100]] * 5)),
        (cross_entropy(), torch.arange(5) % 3),
        (ClassWeighted(cross_entropy(), (1.0, 2.0, 0.5)), torch.arange(5) % 3),
    ],
    ids=range(5),
)
def test_derivatives_are_those_of_the_loss(loss, targets):
    z = Key(1).fold("z").normal(15).reshape(5, 3).requires_grad_()
    found = slopes(loss, z.detach(), targets)
    first = torch.autograd.grad(loss(z, targets).sum(), z, create_graph=True)[0]
    torch.testing.assert_close(found.slope, first.detach())
    each = torch.stack([torch.autograd.grad(first[:, k].sum(), z, retain_graph=True)[0] for k in range(3)], 1)
    whole = found.curvature if found.curvature.dim() == 3 else torch.diag_embed(found.curvature)
    torch.testing.assert_close(whole, each)


def test_one_round_solves_least_squares():
    data = regression((40, 7, 1, 30), 5)
    x, y = data.rows.x, data.rows.y
    best = torch.linalg.lstsq(torch.cat((x, torch.ones(len(x), 1)), 1), y[:, None]).solution[:, 0]
    found = weights(trained("linear", data, recipes.newton(), rounds=1))
    assert float((found - best).norm() / best.norm()) < 1e-12


@pytest.mark.parametrize(
    ("split", "l2", "rounds"),
    [
        (atoll.data.Dirichlet(0.3), 1e-3, 10),
        pytest.param(None, 1e-3, 10, marks=pytest.mark.slow),
        pytest.param(atoll.data.Dirichlet(0.3), 1e-4, 11, marks=pytest.mark.slow),
    ],
)
def test_logistic_regression_is_that_of_scikit_learn(split, l2, rounds):
    from sklearn.linear_model import LogisticRegression

    data = atoll.data.load("breast_cancer").split(7 if split else 1, split or atoll.data.IID())
    x, y = (t.numpy() for t in data.take(data.order))
    theirs = LogisticRegression(C=1 / (l2 * len(x)), tol=1e-12, solver="newton-cholesky").fit(x, y)
    best = torch.tensor([*theirs.coef_[0], theirs.intercept_[0]])
    found = weights(trained("logistic", data, recipes.newton(l2), rounds))
    assert float((found - best).abs().max()) < 1e-6


def test_a_secure_sum_gives_the_weights_of_scikit_learn_and_cuts_no_number():
    from sklearn.linear_model import LogisticRegression

    data = atoll.data.load("breast_cancer").split(7, atoll.data.Dirichlet(0.3))
    x, y = (t.numpy() for t in data.take(data.order))
    theirs = LogisticRegression(C=1 / (1e-3 * len(x)), tol=1e-12, solver="newton-cholesky").fit(x, y)
    best = torch.tensor([*theirs.coef_[0], theirs.intercept_[0]])
    plan = recipes.newton(1e-3)
    plan = replace(plan, aggregator=replace(plan.aggregator, secure=Masks(bits=45, ring=64, bound=256.0)))
    found = trained("logistic", data, plan)
    assert float((weights(found) - best).abs().max()) < 1e-6
    assert [report.metrics["clamped"] for report in found.reports] == [0.0] * len(found.reports)


def test_softmax_regression_is_that_of_scikit_learn():
    from sklearn.linear_model import LogisticRegression

    data = atoll.data.load("wine").split(4, atoll.data.Dirichlet(0.5))
    x, y = (t.numpy() for t in data.take(data.order))
    theirs = LogisticRegression(C=1 / (1e-2 * len(x)), tol=1e-10, max_iter=5000).fit(x, y)
    found = weights(trained("softmax", data, recipes.newton(1e-2)))
    assert float((found - torch.tensor([*theirs.coef_.flatten(), *theirs.intercept_])).abs().max()) < 1e-5


def test_softmax_without_a_penalty_keeps_the_mean_over_classes():
    data = classification((60, 40), (2,), 3, dtype=WIDE)
    found = weights(trained("softmax", data, recipes.newton()))
    theta = found.clone().requires_grad_()
    z = data.rows.x @ theta[:6].reshape(3, 2).T + theta[6:]
    gradient = torch.autograd.grad(cross_entropy()(z, data.rows.y).mean(), theta)[0]
    assert gradient.abs().max() < 1e-12 and found[:6].reshape(3, 2).sum(0).abs().max() < 1e-12


def test_class_weights_and_the_loss_of_float32():
    data = classification((60, 40), (2,), 2, dtype=torch.float32)
    words = {"class_weight": {"0": 1.0, "1": 4.0}, "rounds": 8, "out": None}
    run_ = atoll.train("logistic", data, recipes.newton(0.01), **words)
    theta = weights(run_).double().requires_grad_()
    z = data.rows.x.double() @ theta[:2] + theta[2]
    each = ClassWeighted(binary_cross_entropy, (1.0, 4.0))(z, data.rows.y)
    gradient = torch.autograd.grad(each.mean() + 0.005 * theta[:2].square().sum(), theta)[0]
    assert gradient.abs().max() < 1e-6


def test_a_step_that_is_too_long_is_halved():
    """Large counts: the first step overflows exp, and the way back halves it until the loss falls."""
    data = counts()
    data = federation(data.rows.x, 200 * (data.rows.y + 1), (30, 50, 20))
    run_ = trained("linear", data, recipes.newton(), rounds=30, loss="poisson")
    losses = [r.metrics["loss"] for r in run_.reports]
    assert losses == sorted(losses, reverse=True) and losses[0] == losses[5] == 1.0 and losses[-1] < -1000
    mean = (data.rows.x @ weights(run_)[:3] + weights(run_)[3]).exp()
    torch.testing.assert_close(mean.sum(), data.rows.y.sum())


def test_a_round_without_all_clients_makes_no_step():
    data = regression((9, 8, 7))
    task = task_of(nn.Linear(3, 1).double(), data, "loop")
    plan = replace(recipes.newton(), max_failed=1.0)
    state, reports = run(plan, InProcessEngine(task, data, fleet=Fleet(dropout=0.5)), 12)
    moved = [r.round for r in reports if r.metrics.get("gradient_norm", 0.0) > 1e-9]
    assert moved == [next(r.round for r in reports if r.arrived == 3)] != [0]
    assert all(bool(r.notes) == (r.arrived < 3) for r in reports)
    assert "of 3 clients arrived: no step, since Newton() needs all" in reports[0].notes[0]
    whole, _ = run(plan, InProcessEngine(task, data), 2)
    torch.testing.assert_close(state.model.theta, whole.model.theta)


def test_singular_columns_are_named():
    data = regression((20, 20))
    x = torch.cat((data.rows.x, data.rows.x[:, :1] + 2 * data.rows.x[:, 1:2]), 1)
    data = replace(federation(x, data.rows.y, (20, 20)), columns=("age", "bmi", "height", "sum"))
    with pytest.raises(RunError, match="weights of age, bmi, sum can change"):
        trained("linear", data, recipes.newton())
    with pytest.raises(RunError, match="feature 0"):
        trained("linear", federation(0 * x, data.rows.y, (20, 20)), recipes.newton())
    trained("linear", data, recipes.newton(0.01))


def test_separable_rows_need_a_penalty():
    with pytest.raises(RunError, match="separable") as refusal:
        trained("logistic", separate(), recipes.newton(), rounds=20)
    assert refusal.value.line == "newton(l2=0.0167)"
    trained("logistic", separate(), recipes.newton(1 / 60))
    with pytest.raises(RunError, match="separable"):
        trained("softmax", separate(), recipes.newton(), rounds=20)


def test_refused_models():
    data = classification((9, 9), (4,), 3, dtype=WIDE)
    with pytest.raises(UsageError, match="more than one nn"):
        trained("mlp", data, recipes.newton())
    layer, hooked = nn.Linear(4, 4, dtype=WIDE), nn.Linear(4, 3, dtype=WIDE)
    hooked.register_forward_hook(lambda _, __, output: output.exp())
    normed = nn.utils.spectral_norm(nn.Linear(4, 3, dtype=WIDE))
    for model in (nn.Sequential(layer, layer), hooked, normed):
        with pytest.raises(UsageError, match="more than one nn"):
            trained(model, data, recipes.newton())
    with pytest.raises(UsageError, match="with the loss mae"):
        trained("linear", regression((9, 9)), recipes.newton(), loss="mae")
    with pytest.raises(UsageError, match="2,010 parameters"):
        trained("softmax", classification((9, 9), (200,), 10, dtype=WIDE), recipes.newton(1.0))
    with pytest.raises(UsageError, match="rows of 4 numbers"):
        task = task_of(nn.Linear(2, 3), classification((9, 9), (2, 2), 3))
        run(recipes.newton(), InProcessEngine(task, classification((9, 9), (2, 2), 3)))


@pytest.mark.parametrize(
    "other",
    [
        {"aggregator": Sum()},
        {"aggregator": Mean(weights="equal")},
        {"codec": TopK(0.5)},
        {"codec": ErrorFeedback(TopK(0.5))},
        {"downlink": TopK(0.5)},
        {"pace": Buffered(2)},
        {"optimizer": adam(0.1)},
        {"optimizer": sgd(0.5)},
    ],
    ids=str,
)
def test_refused_parts(other):
    with pytest.raises(UsageError, match=r"Newton\(\)"):
        replace(recipes.newton(), **other)


def test_only_a_sampler_of_all_clients_is_taken():
    data = regression((9, 8, 7))
    task = task_of(nn.Linear(3, 1).double(), data, "loop")
    engine, plan = InProcessEngine(task, data), recipes.newton()
    for other in (Uniform(2), Poisson(0.5)):
        with pytest.raises(UsageError, match="selects all clients"):
            bind(replace(plan, cohort=other), engine)
    whole = run(plan, engine, 1)[0].model.theta
    for same in (Uniform(3), Poisson(1.0), OfAll()):
        assert torch.equal(run(replace(plan, cohort=same), engine, 1)[0].model.theta, whole)


def test_baselines_are_the_minima_of_all_rows_and_of_each_client():
    data = replace(regression((12, 12)), held_out=regression((12, 12)).rows)
    training = atoll.rounds("linear", data, recipes.newton(), rounds=1, dtype="float64")
    list(training)
    found = compare_baselines(training)
    assert found["pooled"]["rmse"] == pytest.approx(training.final_values().metrics["rmse"], rel=1e-9)
    assert found["local"]["clients"] == 2 and "diverged" not in found["local"]
    assert found["local"]["rmse"] < 0.2  # the noise has 0.1


def test_refused_penalty():
    with pytest.raises(UsageError, match="l2"):
        recipes.newton(-1.0)


def test_a_resumed_run_ends_in_the_same_bits(tmp_path):
    data = classification((30, 20), (3,), 2, dtype=WIDE)
    words = {"dtype": "float64", "report": False, "checkpoint_s": 0.0}
    whole = atoll.train("logistic", data, recipes.newton(0.01), rounds=6, out=tmp_path / "a", **words)
    atoll.train("logistic", data, recipes.newton(0.01), rounds=2, out=tmp_path / "b", **words)
    again = atoll.train(
        "logistic", data, recipes.newton(0.01), rounds=6, resume=next((tmp_path / "b").iterdir()), **words
    )
    assert torch.equal(weights(whole), weights(again)) and again.rounds == 6
