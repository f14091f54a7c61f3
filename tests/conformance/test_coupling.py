"""Rows that depend on other rows of their batch: never padded, never divided, on every backend."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from problems import classification, federation, seeded
from quick_cases import by_turns, one_in
from torch import Tensor, nn

import atoll
from atoll import recipes
from atoll.base.random import Key
from atoll.compute.loss import Loss
from atoll.compute.metrics import Metric
from atoll.compute.task import Task
from atoll.engine.choose_backend import choose
from atoll.engine.chunk_limit import too_large
from atoll.plan.aggregate import Mean
from atoll.plan.local import Gradient
from atoll.plan.plan import Plan

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # notes
SIZES = (17, 37, 23, 29, 31, 19)


def cox(output: Tensor, y: Tensor) -> Tensor:
    """The negative log partial likelihood of each row; y has the time and whether the event was seen."""
    time, event, score = y[:, 0], y[:, 1], output.squeeze(-1)
    at_risk = time[None] >= time[:, None]
    return event * (torch.where(at_risk, score[None], -torch.inf).logsumexp(1) - score)


def ranking(output: Tensor, y: Tensor) -> Tensor:
    """The mean hinge of each row with all rows of a smaller target."""
    score = output.squeeze(-1)
    worse = (y[:, None] > y[None]).to(score)
    return (worse * F.relu(1 - score[:, None] + score[None])).sum(1) / worse.sum(1).clamp(min=1)


def single(output: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(output, y, reduction="none")


class Centred(nn.Module):
    def __init__(self, always=True):
        super().__init__()
        self.a, self.b, self.always = nn.Linear(4, 8), nn.Linear(8, 3), always

    def forward(self, x):
        if self.always or self.training:
            x = x - x.mean(0, keepdim=True)
        return self.b(torch.tanh(self.a(x)))


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        h = self.a(x)
        return self.b(torch.softmax(h @ h.mT, -1) @ h)


class Detached(nn.Module):
    """Equal outputs and losses, and a gradient that depends on the batch."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 3)

    def forward(self, x):
        out = self.a(x)
        return out + (out.mean(0) - out.mean(0).detach()).expand_as(out)


def survival(sizes, events=None):
    """Clients with exponential times and censored rows."""
    rows = sum(sizes)
    key = Key(3).fold("survival")
    x = key.fold("x").normal(rows * 4).reshape(rows, 4)
    time = -key.fold("time").uniform(rows).log() * (-x[:, 0]).exp()
    event = (key.fold("event").uniform(rows) < 0.6).double() if events is None else events
    return federation(x.float(), torch.stack([time, event], 1).float(), sizes)


CLASSES = classification(SIZES)
REAL = federation(CLASSES.rows.x, CLASSES.rows.x.sum(1), SIZES)
SURVIVAL = survival(SIZES)


def one(width=1):
    return seeded(nn.Linear, 4, width)


COUPLED = {
    "centred": (seeded(Centred), CLASSES, None),
    "attending": (seeded(Attending), CLASSES, None),
    "gradient only": (seeded(Detached), CLASSES, None),
    "training only": (seeded(Centred, False), CLASSES, None),
    "cox": (one(), SURVIVAL, cox),
    "ranking": (one(), REAL, ranking),
    "batch norm": (seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))), CLASSES, None),
}


@pytest.mark.parametrize("name", one_in(2, COUPLED))
def test_coupled_rows_give_the_numbers_of_the_loop(name):
    """Ragged batches of clients of unequal size; the default backend is another."""
    net, data, loss = COUPLED[name]
    theta = {}
    for numerics in ("auto", "loop"):
        training = atoll.rounds(net, data, recipes.fedavg(0.1, batch=8), rounds=1, numerics=numerics, loss=loss)
        training.next()
        theta[numerics] = training.state.model.theta
        assert training.task.couples and any(
            "other rows" in n or "BatchNorm" in n for n in training.task.findings.couples
        )
        assert name == "batch norm" or any("depend" in note for note in training.notes)
    torch.testing.assert_close(theta["auto"], theta["loop"], rtol=0, atol=1e-6)


UNCOUPLED = {
    "group norm": seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.GroupNorm(2, 6), nn.Linear(6, 3))),
    "layer norm": seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3))),
    "dropout": seeded(lambda: nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.5), nn.Linear(64, 3))),
    "convolution": seeded(
        lambda: nn.Sequential(nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 3, 2), nn.Flatten(), nn.Linear(9, 3))
    ),
    "large numbers": seeded(
        lambda: nn.Sequential(nn.Linear(4, 300), nn.ReLU(), nn.Linear(300, 300), nn.Linear(300, 3))
    ),
}


@pytest.mark.parametrize("name", UNCOUPLED)
def test_rows_without_coupling_are_found(name):
    training = atoll.rounds(UNCOUPLED[name], CLASSES, recipes.fedavg(0.1), rounds=1, loss=single)
    assert not training.task.findings.couples and not training.task.findings.couples_in_evaluation
    assert training.notes == CLASSES.notes


def test_batch_norm_does_not_couple_an_evaluation():
    training = atoll.rounds(COUPLED["batch norm"][0], CLASSES, recipes.fedavg(0.1), rounds=1, loss=single)
    assert training.task.findings.couples == ("BatchNorm1d",)
    assert not training.task.findings.couples_in_evaluation


@pytest.mark.parametrize(("numerics", "sizes"), by_turns(["auto", "lanes", "loop"], [SIZES, (2176, 40)]))
def test_losses_of_whole_clients(sizes, numerics):
    """Training and held-out loss, and the step, are those of one pass over each client's own rows."""
    everything, net = survival((*sizes, 2176)), one()
    held = everything.only(torch.tensor([len(sizes)])).pooled()
    train = everything.only(torch.arange(len(sizes)))
    x, y = everything.rows.x, everything.rows.y
    rows = train.order
    source = atoll.data.arrays(
        x[rows],
        y[rows],
        by=torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)),
        test=(x[held.order], y[held.order]),
    )
    data = source.split()
    training = atoll.rounds(net, data, recipes.distributed_gd(0.5), rounds=1, loss=cox, numerics=numerics, metrics=())
    report = training.next()
    losses, grads = [], []
    for client in range(data.count):
        xs, ys = data.take(data.client_rows(client))
        value = cox(net(xs), ys).mean()
        losses.append(value.detach() * len(xs))
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, list(net.parameters()))]) * len(xs))
    total = sum(sizes)
    assert report.metrics["loss"] == pytest.approx(float(sum(losses)) / total, rel=1e-5)
    moved = (training.first.theta - training.state.model.theta) / 0.5
    torch.testing.assert_close(moved, sum(grads) / total, rtol=1e-4, atol=1e-6)
    xs, ys = data.held_out.take(torch.arange(2176))
    wanted = float(cox(training.model(xs).detach(), ys).mean())
    assert report.metrics["held_out_loss"] == pytest.approx(wanted, rel=1e-5)


def test_censored_rows_first():
    """A few rows without an event show nothing: rows of other targets are chosen, or nothing is decided."""
    sizes = (30, 21)
    event = torch.ones(51)
    event[:12] = event[30:42] = 0
    data = survival(sizes, event.double())
    training = atoll.rounds(one(), data, recipes.distributed_gd(0.1), rounds=1, loss=cox)
    assert "other rows" in training.task.findings.couples[0]
    lazy = atoll.data.federate([list(zip(*data.take(data.client_rows(c)), strict=True)) for c in range(2)], held_out=0)
    training = atoll.rounds(one(), lazy, recipes.distributed_gd(0.1), rounds=1, loss=cox)
    assert "no gradient" in training.task.findings.couples[0]


def test_a_declared_loss_is_believed():
    data, net = SURVIVAL, one()
    quiet = lambda output, y: F.mse_loss(output.squeeze(-1), y[:, 0], reduction="none")  # noqa: E731
    training = atoll.rounds(net, data, recipes.fedavg(0.1), rounds=1, loss=Loss(quiet, couples=True))
    assert training.task.findings.couples == training.task.findings.couples_in_evaluation == ("declared by the loss",)
    assert training.next().metrics["loss"] > 0
    assert "No metric rmse" in training.notes[0] and not training.task.metrics
    assert atoll.Loss is Loss


def test_a_metric_that_compares_rows():
    """One pass over all held-out rows."""
    places = Metric("place", lambda o, y: (o[:, :1] > o[:, 0]).float().mean(1))
    x, y = CLASSES.rows.x, CLASSES.rows.y
    data = atoll.data.arrays(x, y, test=(x.repeat(12, 1), y.repeat(12))).split(3)
    training = atoll.rounds(one(3), data, recipes.fedavg(0.1), rounds=1, metrics=(places, "accuracy"))
    assert training.task.findings.couples == ()
    assert training.task.findings.couples_in_evaluation == ("the metric place of a row depends on the other rows",)
    report, output = training.next(), training.model(x.repeat(12, 1)).detach()
    assert report.metrics["place"] == pytest.approx(float((output[:, :1] > output[:, 0]).float().mean()), rel=1e-6)


def test_a_pass_that_does_not_fit_names_the_coupling():
    data = survival((3000, 9))
    task = choose(Task.of(one(), cox), data, Plan(Gradient(), Mean())).task
    error = too_large(Plan(Gradient(), Mean()), task, 0, 3000, MemoryError("no memory"))
    assert "3000 rows are coupled" in str(error) and "other rows" in str(error)


def test_models_of_single_rows_are_computed_alone():
    """A model that fails for one row is not padded, and no probe fails."""

    class Squeezed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 1)

        def forward(self, x):
            return self.linear(x).squeeze()

    training = atoll.rounds(seeded(Squeezed), REAL, recipes.distributed_gd(0.1), rounds=1)
    assert "fails" in training.task.findings.couples[0]
    assert training.next().metrics["loss"] > 0
