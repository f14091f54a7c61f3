"""The whole package in seconds: three clients, least squares, two rounds of every recipe."""

from dataclasses import replace

import pytest
import torch
from problems import federation, regression, run, task_of
from quick_cases import by_turns, one_in
from torch import nn

from atoll import recipes
from atoll.engine.inprocess import InProcessEngine
from atoll.plan.in_flight import InFlight
from atoll.plan.local import Evaluate
from atoll.plan.plan import Plan
from atoll.plan.round import step
from atoll.plan.state import State

# Recipes whose default steps are too many or too small for this test; the others run with their defaults.
ARGUMENTS = {
    "dp_fedavg": {"q": 1.0, "noise": 1e-6, "clip": 100.0},
    "gd": {"lr": 0.05},
    "sgd": {"batch": 16},
    "diloco": {"lr": 0.05, "steps": 5},
}


NAMED = (recipes.fedlc, recipes.fedper, recipes.fedbn, recipes.fedrep)  # they need classes, or layers of a name
RECIPES = [recipe for recipe in recipes.RECIPES if recipe not in NAMED]


def loss(state: State, engine: InProcessEngine) -> float:
    """Compute the mean loss over all rows, with one round of a plan that only evaluates."""
    plan = Plan(Evaluate(), recipes.gd().aggregator)
    return step(plan, replace(state, air=InFlight(), versions={}), engine)[1].metrics["loss"]


def linear() -> nn.Module:
    module = nn.Linear(3, 1)
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


@pytest.mark.parametrize(("recipe", "numerics"), one_in(2, by_turns(RECIPES, ["lanes", "loop"])))
def test_loss_falls(recipe, numerics):
    data = regression((12, 20, 7))
    plan = recipe(**ARGUMENTS.get(recipe.__name__, {}))
    if recipe in (recipes.gd, recipes.sgd):
        data = data.pooled()
    engine = InProcessEngine(task_of(linear(), data, numerics), data)
    losses = [loss(run(plan, engine, rounds)[0], engine) for rounds in (0, 1, 2)]
    assert losses[2] < losses[1] < losses[0] or recipe is recipes.newton  # its first step ends at the minimum
    assert losses[2] < losses[0]


@pytest.mark.parametrize(
    "recipe",
    [r for r in RECIPES if not r().pace.asynchronous and not r().releases],
    ids=lambda recipe: recipe.__name__,
)
def test_the_report_of_a_round(recipe):
    data = regression((12, 20, 7))
    engine = InProcessEngine(task_of(linear(), data), data)
    plan = recipe(**ARGUMENTS.get(recipe.__name__, {}))
    state, (first, second) = run(plan, engine)
    assert (first.round, second.round, state.round) == (0, 1, 2)
    assert (first.cohort, first.arrived, first.failures) == (3, 3, ())
    assert first.clients["id"].tolist() == [0, 1, 2] and first.clients["rows"].tolist() == [12, 20, 7]
    assert {"loss", "gradient_norm", "lr"} <= first.metrics.keys()
    # Up: θ, the weight, the loss, its row count, and what a correction sends, or a Hessian and an objective; down: θ.
    # 8 bytes a number, three clients.
    d = 4
    control = d if recipe in (recipes.scaffold, recipes.mimelite) else 0  # the clients receive it, too
    corrected = {"mimelite": d, "scaffold": d, "fednova": 1, "fedexp": 1, "qffl": 1, "newton": d * (d + 1) // 2 + 1}
    up = d + 3 + corrected.get(recipe.__name__, 0)
    assert first.bytes_up == 3 * 8 * up and first.bytes_down == 3 * 8 * (d + control)


def test_nothing_to_learn_is_no_fault():
    """At the solution every gradient is exactly zero, and so is their sum."""
    x = regression((4, 5)).rows.x
    data = federation(x, torch.zeros_like(x[:, 0]), (4, 5))
    engine = InProcessEngine(task_of(linear(), data), data)
    state, reports = run(recipes.distributed_gd(0.1), engine)
    assert torch.equal(state.model.theta, torch.zeros(4, dtype=torch.float64))
    assert reports[0].metrics["loss"] == 0 == reports[0].metrics["gradient_norm"]
