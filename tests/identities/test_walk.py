"""Clients that train one after the other have the same bits as clients that make their steps in turn."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from architectures import MODELS
from problems import classification, run, seeded, task_of
from quick_cases import only
from torch import nn

from atoll import recipes
from atoll.compute.task import Task
from atoll.engine.choose_backend import choose
from atoll.engine.inprocess import InProcessEngine
from atoll.plan.aggregate import Mean
from atoll.plan.local import Evaluate, Gradient, Train
from atoll.plan.optimizer.rules import adam, sgd
from atoll.plan.plan import Plan

SIZES = (9, 3, 21, 8, 1, 14)


class Moving(nn.Module):
    """A buffer that each pass replaces with another tensor, with a history of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 3)
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x):
        self.mean = 0.5 * self.mean + 0.5 * (x * self.last.weight.mean()).mean(0)
        return self.last(x - self.mean)


class Bounded(nn.Module):
    """Weights that each pass clips."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(4, 3)

    def forward(self, x):
        with torch.no_grad():
            self.last.weight.clamp_(-0.1, 0.1)
        return self.last(x)


CASES = {**MODELS, "moving buffer": (lambda: seeded(Moving), classification)}


@pytest.mark.parametrize("name", only(["dropout", "moving buffer"], CASES))
def test_walking_changes_no_bit(name, monkeypatch):
    make, data = CASES[name]
    data = data([n for n in SIZES if n > 1])
    plan = recipes.fedavg(0.1, epochs=2, batch=4)
    task = task_of(make(), data, "loop", torch.float32)
    walked = [run(plan, InProcessEngine(task, data, chunk))[0] for chunk in (1, 3, None)]
    monkeypatch.setattr(Train, "sequential", lambda self, rows: False)
    stepped, _ = run(plan, InProcessEngine(task, data))
    for state in walked:
        assert torch.equal(state.model.theta, stepped.model.theta)
        assert torch.equal(state.model.buffers, stepped.model.buffers)
        assert all(torch.equal(t, stepped.model.counters[n]) for n, t in state.model.counters.items())


@pytest.mark.parametrize(
    ("wide", "optimizer", "body"),
    [(20_000, sgd(0.1), "loop"), (20_000, sgd(0.1, momentum=0.9), "loop"), (20_000, adam(0.1), "lanes"),
     (20, sgd(0.1), "lanes")],
)  # fmt: skip
def test_large_models_use_the_walk_if_possible(wide, optimizer, body):
    model = seeded(lambda: nn.Sequential(nn.Linear(4, wide), nn.Tanh(), nn.Linear(wide, 3)))
    plan = replace(recipes.fedavg(), local=Train(optimizer, epochs=1, batch=4))
    assert choose(Task.of(model, "cross_entropy"), classification(SIZES), plan).task.numerics == body


@pytest.mark.parametrize("local", [Gradient(), Train(sgd(0.1), steps=2, batch=3), Evaluate()], ids=repr)
def test_a_pass_that_changes_weights_changes_no_state(local):
    """A single client also works on a copy of the numbers."""
    data = classification((9,))
    task = task_of(seeded(Bounded), data, "loop", torch.float32)
    first = task.initial()
    before = first.theta.clone()
    assert before.abs().max() > 0.1
    run(Plan(local, Mean(), sgd(1.0)), InProcessEngine(task, data), rounds=1, init=first.theta)
    assert torch.equal(first.theta, before)
