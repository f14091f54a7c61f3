"""A round with a failed client has the same bits as one without it, and the report names the client (identity 9)."""

from dataclasses import dataclass, replace

import pytest
import torch
from problems import classification, federation, needs_native, regression, run, seeded, task_of
from quick_cases import one_in, only
from torch import nn

import atoll
from atoll import recipes
from atoll.base.errors import RunError
from atoll.data import DatasetRows
from atoll.engine.client_state import Memory
from atoll.engine.inprocess import InProcessEngine
from atoll.plan import optimizer as rules
from atoll.plan.aggregate import Mean
from atoll.plan.local import Custom, Gradient, Train
from atoll.plan.plan import Plan
from atoll.plan.protocols import Cohort, Local, Sampler
from atoll.plan.round import step
from atoll.plan.state import State

SIZES = (9, 5, 9, 3, 9, 5, 9)


@dataclass(frozen=True)
class Without(Sampler):
    """A sampler that selects all clients except these."""

    ids: frozenset[int]

    def __call__(self, population, round, key):
        ids = torch.tensor([i for i in range(population.clients) if i not in self.ids])
        return Cohort(ids, torch.tensor(1.0, dtype=torch.float64))


@dataclass(frozen=True, repr=False)
class Sick(Local):
    """A local part that fails for some clients: it raises, or returns numbers that are not finite."""

    inner: Local
    who: frozenset[int]
    how: str
    since: int = 0

    def padded_batch(self, rows):
        return self.inner.padded_batch(rows)

    def first_memory(self, task):
        return self.inner.first_memory(task)

    def contribute(self, broadcast, lanes, memory, key, task):
        sick = torch.tensor([int(i) in self.who and broadcast.round >= self.since for i in lanes.ids])
        if self.how == "raises" and sick.any():
            raise ConnectionError("the site is gone")
        contribution, memory = self.inner.contribute(broadcast, lanes, memory, key, task)
        bad = torch.where(sick[:, None], float(self.how) if self.how != "raises" else 0.0, 0.0)
        means = {**contribution.means, "update": contribution.means["update"] + bad}
        return contribution._replace(means=means), memory


def bits(state):
    tensors = {"theta": state.model.theta, **state.model.counters, **state.optimizer, "buffers": state.model.buffers}
    return {name: t.numpy().tobytes() for name, t in tensors.items()}


def mlp():
    return seeded(lambda: nn.Sequential(nn.Linear(4, 33), nn.BatchNorm1d(33), nn.ReLU(), nn.Linear(33, 3)))


LOCALS = {
    "train": Train(rules.sgd(0.1, momentum=0.9), epochs=2, batch=4),
    "gradient": Gradient(),
    "keeps": Train(rules.adam(0.01), steps=3, batch=4, keep=("optimizer", "order")),
}

# Quick: each pair of a part, a way to fail and a backend once.
KILLED = [
    pytest.param(name, how, *where, marks=[] if (i + j + k) % 3 == 0 else [pytest.mark.slow])
    for i, name in enumerate(LOCALS)
    for j, how in enumerate(("raises", "nan", "inf"))
    for k, where in enumerate((("lanes", None), ("lanes", 2), ("loop", None)))
]


@pytest.mark.parametrize(("name", "how", "body", "chunk"), one_in(3, KILLED))
def test_a_killed_client_is_a_missing_client(name, how, body, chunk):
    local = LOCALS[name]
    data, who = classification(SIZES), frozenset((0, 4, 5))
    engine = InProcessEngine(task_of(mlp(), data, body), data, chunk)
    plan = Plan(local, Mean(), rules.sgd(1.0, momentum=0.5))
    state, reports = run(replace(plan, local=Sick(local, who, how)), engine, 3)
    silent, _ = run(replace(plan, cohort=Without(who)), engine, 3)
    assert bits(state) == bits(silent)
    for r, report in enumerate(reports):
        assert (report.cohort, report.arrived) == (7, 4)
        assert report.clients["id"].tolist() == [1, 2, 3, 6]
        assert sorted(f.client for f in report.failures) == sorted(who) and {f.round for f in report.failures} == {r}
        expected = (
            ("local", "ConnectionError: the site is gone") if how == "raises" else ("check", "update is not finite")
        )
        assert {(f.stage, f.cause) for f in report.failures} == {expected}
    keeps = getattr(local, "keep", ())  # client state changes only if the contribution arrived
    assert set(state.memory.touched().tolist()) == (set(range(7)) - who if keeps else set())


@pytest.mark.parametrize("how", ["nan", "inf", "-inf"])
def test_in_float32_too(how):
    """In float32 the bound of the exact sum, 2^900, is infinite."""
    data, who, local = classification(SIZES), frozenset((0, 4, 5)), LOCALS["gradient"]
    engine = InProcessEngine(task_of(mlp(), data, "lanes", torch.float32), data)
    state, reports = run(Plan(Sick(local, who, how), Mean()), engine, 2)
    assert {f.client for report in reports for f in report.failures} == set(who)
    assert bool(torch.isfinite(state.model.theta).all())


def test_a_lost_client_keeps_its_memory():
    data, local = classification(SIZES), LOCALS["keeps"]
    engine = InProcessEngine(task_of(mlp(), data), data)
    before, _ = run(Plan(local, Mean()), engine, 2)
    after, _ = run(Plan(Sick(local, frozenset([2]), "nan", since=2), Mean()), engine, 5)
    for name, row in before.memory.take(torch.tensor([2])).items():
        assert torch.equal(after.memory.take(torch.tensor([2]))[name], row)
    assert after.memory.take(torch.tensor([2, 1]))["local/taken"].tolist() == [6, 15]


class Disk(torch.utils.data.Dataset):
    """Rows of which one cannot be read."""

    def __init__(self, x, y, broken, how):
        self.x, self.y, self.broken, self.how = x, y, broken, how
        self.targets = y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        x, y = self.x[i], int(self.y[i])
        if i != self.broken:
            return x, y
        match self.how:
            case "raises":
                raise OSError("the disk is gone")
            case "shrinks":
                raise IndexError("list index out of range")
            case "shape":
                return x[:2], y
            case "text":
                return "x", y
            case "single":
                return x
        return x * float(self.how), y


@pytest.mark.parametrize(
    "body, how, cause",
    [
        ("lanes", "raises", "Row {} of the dataset raised OSError: the disk is gone"),
        ("loop", "nan", "The features contain nan at row {}, column 0"),
        ("fused", "shape", "Row {} of the dataset has torch.float32 (2,), row 0 has torch.float32 (4,)"),
        pytest.param(
            *("compiled", "shrinks", "Row {} of the dataset raised IndexError: list index out of range"),
            marks=needs_native,
        ),
        ("loop", "text", "Row {} of the dataset is (str, int)"),
        ("lanes", "single", "Row {} of the dataset is a Tensor"),
    ],
)
def test_a_client_whose_data_cannot_be_read(body, how, cause):
    """The round equals the round without the client, and the failure names the row."""
    good = classification(SIZES)
    # Row 0 sets the shape of all rows, so it is only unreadable here if it raises or is NaN.
    for row in (17,) if how in ("shape", "text", "single") else (0,):
        client = next(i for i in range(7) if row in good.client_rows(i))
        disk = DatasetRows(Disk(good.rows.x, good.rows.y, row, how), False)
        model = mlp() if body in ("lanes", "loop") else seeded(nn.Linear, 4, 3)
        task, plan = task_of(model, good, body), recipes.fedavg(0.1, batch=4)
        state, reports = run(plan, InProcessEngine(task, replace(good, rows=disk)))
        silent, _ = run(replace(plan, cohort=Without(frozenset([client]))), InProcessEngine(task, good))
        assert bits(state) == bits(silent)
        for r, report in enumerate(reports):
            assert report.failures == ((client, r, "local", cause.format(row)),)


@pytest.mark.parametrize("row", [0, 7])
def test_a_client_that_is_unreadable_from_the_start_costs_no_run(row):
    """The fingerprint, the choice of the backend and the first round continue with the other clients."""
    good = classification((9, 9, 9, 9), dtype=torch.float32)
    disk = replace(good, rows=DatasetRows(Disk(good.rows.x, good.rows.y, row, "raises")))
    training = atoll.rounds("softmax", disk, recipes.fedavg(0.1, batch=4), rounds=2)
    owner = int((disk.order == row).nonzero()) // 9
    assert [[f.client for f in report.failures] for report in training] == [[owner], [owner]]
    assert disk.fingerprint() != good.fingerprint()


def test_a_held_out_row_that_cannot_be_read_is_an_error():
    good = classification((9, 9, 9, 9), dtype=torch.float32)
    held = DatasetRows(Disk(good.rows.x, good.rows.y, 7, "nan"))
    training = atoll.rounds("softmax", replace(good, held_out=held), recipes.fedavg(0.1), rounds=2)
    with pytest.raises(RunError, match=r"The evaluation failed.*nan at row 7, column 0"):
        training.next()


@pytest.mark.parametrize("body", only(["loop"], ["lanes", "loop"]))
def test_a_client_whose_own_training_diverges(body):
    """Features of one client are a thousand times too large. Its loss overflows, and no other client's does."""
    good = regression(SIZES, dtype=torch.float32)
    x = good.rows.x.clone()
    x[good.client_rows(3)] *= 1e15
    bad = federation(x, good.rows.y, SIZES)
    task = task_of(seeded(nn.Linear, 3, 1), good, body, torch.float32)
    plan = Plan(Train(rules.sgd(0.1), epochs=3, batch=1), Mean())
    state, reports = run(plan, InProcessEngine(task, bad))
    silent, _ = run(replace(plan, cohort=Without(frozenset([3]))), InProcessEngine(task, good))
    assert bits(state) == bits(silent)
    assert [[(f.client, f.stage) for f in report.failures] for report in reports] == [[(3, "check")]] * 2


def test_a_users_own_loop_that_raises_for_one_client():
    def train(model, loader, ctx):
        for x, y in loader:
            nn.functional.mse_loss(model(x)[:, 0], y).backward()
        if ctx.client == 1:
            raise KeyError("session")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad

    data = regression(SIZES)
    engine = InProcessEngine(task_of(seeded(nn.Linear, 3, 1), data, "loop"), data)
    plan = Plan(Custom(train, batch=4), Mean())
    state, reports = run(plan, engine)
    silent, _ = run(replace(plan, cohort=Without(frozenset([1]))), engine)
    assert bits(state) == bits(silent)
    assert reports[0].failures == ((1, 0, "local", "KeyError: 'session'"),)


@pytest.mark.parametrize("how", ["raises", "nan"])
@pytest.mark.parametrize("clients", [1, 7])
def test_a_fault_of_every_client_is_raised(how, clients):
    data = classification(SIZES[:clients])
    engine = InProcessEngine(task_of(mlp(), data), data)
    plan = Plan(Sick(Gradient(), frozenset(range(7)), how, since=1), Mean(), max_failed=1.0)
    state, _ = run(plan, engine, 1)
    before = bits(state)
    with pytest.raises(RunError, match="Every client of round 1 failed in the same way") as caught:
        step(plan, state, engine)
    assert bits(state) == before
    if how == "raises":
        assert isinstance(caught.value.__cause__, ConnectionError)
    else:
        assert caught.value.line == "atoll lr"


def test_more_failures_than_allowed_end_the_run():
    data = classification(SIZES)
    engine = InProcessEngine(task_of(mlp(), data), data)
    plan = Plan(Sick(Gradient(), frozenset(range(4)), "raises"), Mean())
    with pytest.raises(RunError, match="4 of 7 clients failed in round 0") as caught:
        run(plan, engine)
    assert caught.value.line == "max_failed=1.0"
    _, reports = run(replace(plan, max_failed=1.0), engine)
    assert reports[0].arrived == 3


def test_a_round_without_arrivals_changes_nothing():
    """All clients fail, each with another error, and the plan allows it: θ and the optimizer stay unchanged."""

    def fail(model, loader, ctx):
        raise ValueError(f"client {ctx.client}")

    data = regression(SIZES)
    task = task_of(seeded(nn.Linear, 3, 1), data, "loop")
    plan = Plan(Custom(fail), Mean(), rules.sgd(1.0, momentum=0.9), max_failed=1.0)
    state, reports = run(plan, InProcessEngine(task, data))
    first = State.first(plan, task, 0, Memory({}))
    assert bits(state) == bits(first) and state.round == 2
    assert reports[0].arrived == 0 and len(reports[0].failures) == 7
    assert {f.cause for f in reports[1].failures} == {f"ValueError: client {i}" for i in range(7)}
