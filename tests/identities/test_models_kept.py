"""A model is a vector and is restored exactly: frozen, tied, counted, typed. The user's module stays unchanged."""

import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from problems import classification, far, run, seeded, task_of, tokens
from quick_cases import by_turns
from torch import nn

from atoll import recipes
from atoll.compute.task import Task
from atoll.engine.choose_backend import choose
from atoll.engine.inprocess import InProcessEngine
from atoll.plan import optimizer as rules
from atoll.plan.aggregate import Mean
from atoll.plan.local import Custom, Evaluate, Gradient, Train
from atoll.plan.plan import Plan
from atoll.plan.protocols import Cohort, Sampler
from atoll.plan.round import step

SIZES = (9, 5, 4)
TRAIN = Plan(Train(rules.sgd(0.1), epochs=1, batch=4), Mean())
bodies = pytest.mark.parametrize("body", ["lanes", "loop"])


def bits_of(module):
    return {name: (t.dtype, t.numpy().tobytes()) for name, t in module.state_dict().items()}


def trained(module, data, body="lanes", plan=TRAIN, rounds=2, dtype=torch.float32):
    """The module at the end of a training."""
    engine = InProcessEngine(task_of(module, data, body, dtype), data)
    return engine.task.result(run(plan, engine, rounds)[0].model)


def norm():
    return seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)))


class Tied(nn.Module):
    """The last layer's weights are those of the embedding."""

    def __init__(self):
        super().__init__()
        self.embedding, self.last = nn.Embedding(7, 5), nn.Linear(5, 7, bias=False)
        self.last.weight = self.embedding.weight

    def forward(self, x):
        return self.last(self.embedding(x).mean(1))


class Average(nn.Module):
    """Stores an average and a count by replacing its buffers with new tensors."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("average", torch.zeros(4))
        self.register_buffer("passes", torch.tensor(0))

    def forward(self, x):
        if self.training:
            self.average = 0.5 * self.average + 0.5 * x.detach().mean(0)
            self.passes = self.passes + 1
        return self.linear(x - self.average)


@bodies
def test_frozen_parameters_stay_to_the_bit(body):
    module = norm()
    module[0].requires_grad_(False)
    module[3].bias.requires_grad_(False)
    after = trained(module, classification(SIZES), body)
    for name in ("0.weight", "0.bias", "3.bias"):
        assert torch.equal(after.state_dict()[name], module.state_dict()[name])
        assert not dict(after.named_parameters())[name].requires_grad
    assert not torch.equal(after[3].weight, module[3].weight)
    assert task_of(module, classification(SIZES)).layout.d == 6 + 6 + 18


@bodies
def test_tied_weights_stay_tied_and_lie_in_the_vector_once(body):
    module, data = seeded(Tied), tokens(SIZES)
    task = task_of(module, data)
    assert task.layout.d == 35
    after = trained(module, data, body)
    assert after.last.weight is after.embedding.weight
    assert list(after.state_dict()) == ["embedding.weight", "last.weight"]

    # One step on the whole batch equals torch's step on the tied weights, with gradients from both uses.
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    pooled = data.pooled()
    nn.functional.cross_entropy(module(pooled.rows.x), pooled.rows.y).backward()
    before = seeded(Tied)
    optimizer.step()
    got = trained(before, data, body, recipes.distributed_gd(0.1), 1)
    assert far(got.last.weight.detach(), module.last.weight.detach()) < 1e-6


@dataclass(frozen=True)
class Only(Sampler):
    """One client, every round."""

    i: int

    def __call__(self, population, round, key):
        return Cohort(torch.tensor([self.i]), torch.tensor(1.0))


def batches(rows, batch=4):
    """The number of batches of a client; a last batch of one row is joined to the previous batch."""
    return max(1, rows // batch + (rows % batch > 1))


@bodies
def test_buffers_become_their_mean_and_counters_take_the_largest_increment(body):
    data, module = classification(SIZES), norm()
    module[1].num_batches_tracked += 40
    task = task_of(module, data, body)
    state, _ = run(TRAIN, InProcessEngine(task, data), 1)
    alone = []
    for i in range(3):
        # Client i by itself, with the same rows and the same id.
        one, _ = run(Plan(TRAIN.local, Mean(), cohort=Only(i)), InProcessEngine(task, data), 1)
        alone.append(one.model)
        assert one.model.counters["1.num_batches_tracked"] == 40 + batches(SIZES[i])
    mean = sum(n * model.buffers for n, model in zip(SIZES, alone, strict=True)) / sum(SIZES)
    assert far(state.model.buffers, mean) < 1e-12
    assert state.model.counters["1.num_batches_tracked"] == 40 + max(map(batches, SIZES))
    assert (state.model.buffers[6:] > 0).all()  # variances


@bodies
def test_batch_norm_moves_as_it_does_in_torch(body):
    """One client, one step per round: running statistics and all other state equal those of a plain loop."""
    data, module = classification((16,)), norm().double()
    after = trained(module, data, body, recipes.gd(0.1), 3, torch.float64)
    module = norm().double().train()
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(data.rows.x.double()), data.rows.y).backward()
        optimizer.step()
    for name, tensor in module.state_dict().items():
        assert far(after.state_dict()[name], tensor) < 1e-12, name


@bodies
def test_a_buffer_that_is_put_in_place_of_another(body):
    """self.average = …: the new tensor reaches the server, and no client sees another client's."""
    data = classification(SIZES)
    module = seeded(Average)
    after = trained(module, data, body, recipes.distributed_gd(0.1), 1, torch.float64)
    means = [data.rows.x[data.client_rows(i)].double().mean(0) for i in range(3)]
    expected = sum(n * 0.5 * m for n, m in zip(SIZES, means, strict=True)) / sum(SIZES)
    assert far(after.average, expected) < 1e-6 and after.passes == 1
    assert torch.equal(module.average, torch.zeros(4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@bodies
def test_keys_order_and_types_come_back_verbatim(body, dtype):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.ones(4, dtype=torch.float64))
            self.register_buffer("mask", torch.tensor([True, True, False, True]))
            self.register_buffer("hidden", torch.ones(4), persistent=False)
            self.old = nn.Parameter(torch.ones(4, dtype=torch.bfloat16), requires_grad=False)
            self.net = norm()
            self.register_buffer("seen", torch.tensor([3, 4], dtype=torch.int32))

        def forward(self, x):
            return self.net(x * self.scale * self.mask * self.old * self.hidden)

    module, data = Mixed(), classification(SIZES)
    before = module.state_dict()
    task = task_of(module, data, body, dtype)
    state, _ = run(TRAIN, InProcessEngine(task, data))
    model = state.model
    assert model.theta.dtype == model.buffers.dtype == dtype
    for after in (
        task.layout.state_dict(model.theta, model.buffers, {**model.counters, **model.fixed}),
        task.result(model).state_dict(),
    ):
        assert list(after) == list(before)
        assert {n: (t.dtype, t.shape) for n, t in after.items()} == {n: (t.dtype, t.shape) for n, t in before.items()}
        assert torch.equal(after["mask"], before["mask"]) and torch.equal(after["seen"], before["seen"])
    seeded(Mixed).load_state_dict(after)


def test_an_untrained_model_keeps_its_bits():
    module = norm()
    for dtype in (torch.float32, torch.float64):
        task = Task.of(module, "cross_entropy", (), dtype)
        assert bits_of(task.result(task.initial())) == bits_of(module)


@pytest.mark.parametrize("plan", [TRAIN, Plan(Gradient(), Mean()), Plan(Evaluate(), Mean())], ids=repr)
@bodies
def test_the_users_module_is_left_alone(body, plan):
    module, data = norm(), classification(SIZES)
    module.eval()
    module[0].weight.grad = torch.ones(6, 4)
    before = bits_of(module)
    engine = InProcessEngine(choose(Task.of(module, "cross_entropy"), data, plan, body).task, data)
    run(plan, engine)
    assert bits_of(module) == before
    assert not module.training and torch.equal(module[0].weight.grad, torch.ones(6, 4))
    assert all(p.grad is None for name, p in module.named_parameters() if name != "0.weight")
    assert all(p.requires_grad for p in module.parameters())


def test_the_first_model_is_the_one_that_was_given():
    """Neither the trial before the first round nor an evaluation moves running statistics."""
    module, data = norm(), classification(SIZES)
    for wanted in ("auto", "loop"):
        task = choose(Task.of(module, "cross_entropy"), data, TRAIN, wanted).task
        engine = InProcessEngine(task, data)
        state, _ = run(TRAIN, engine, 0)
        step(Plan(Evaluate(), Mean()), state, engine)
        for model in (state.model, task.initial()):
            assert torch.equal(model.buffers, torch.tensor([0.0] * 6 + [1.0] * 6))
            assert model.counters["1.num_batches_tracked"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_dropout_in_lanes_is_dropout_in_the_loop(dtype):
    def drops():
        return nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)),
            nn.Conv2d(1, 6, 3),
            nn.Dropout2d(0.3),
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(216, 16),
            nn.Dropout(0.5),
            nn.ReLU(),
            nn.Linear(16, 3),
        )

    data = classification(SIZES, (64,))
    for plan in (TRAIN, recipes.distributed_gd(0.1)):
        lanes, loop = (trained(seeded(drops), data, body, plan, 1, dtype) for body in ("lanes", "loop"))
        for one, other in zip(lanes.parameters(), loop.parameters(), strict=True):
            assert far(one.detach(), other.detach()) < 1e-6


def test_dropout_drops_as_often_as_it_says():
    """51,200 coin flips of probability .3: further off than 6 standard deviations once in 5·10⁸ runs."""
    data, inputs = classification((2,) * 64, (400,)), []

    class Spy(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(400, 3)

        def forward(self, x):
            dropped = nn.functional.dropout(torch.ones_like(x), 0.3, self.training)
            inputs.append(dropped.detach())
            return self.linear(dropped)

    run(recipes.distributed_gd(0.1), InProcessEngine(task_of(seeded(Spy), data, "loop"), data), 1)
    kept = torch.cat(inputs)
    n = kept.numel()
    assert set(kept.unique().tolist()) == {0.0, 1 / (1 - 0.3)}
    assert abs(int((kept == 0).sum()) - 0.3 * n) < 6 * (n * 0.3 * 0.7) ** 0.5
    # By client and by row, another mask.
    assert len({row.numpy().tobytes() for row in kept}) == len(kept)


def generators():
    words = np.random.get_state(legacy=False)["state"]
    return (torch.random.get_rng_state().tolist(), random.getstate(), words["pos"], words["key"].tolist())


class Noisy(nn.Module):
    """Draws from all three global generators in every pass."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        x = x + 0.1 * torch.randn_like(x) + 0.1 * random.random() + 0.1 * np.random.random()
        return self.linear(x)


def custom(model, loader, ctx):
    for x, y in loader:
        nn.functional.cross_entropy(model(x + 0.1 * torch.randn_like(x)), y).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None


PLANS = {"train": TRAIN, "gradient": recipes.sgd(0.1, 4), "custom": Plan(Custom(custom, batch=4), Mean())}


@pytest.mark.parametrize(
    ("make", "plan"),
    by_turns([norm, lambda: seeded(Noisy), lambda: nn.Sequential(nn.Dropout(0.3), norm())], PLANS.values()),
)
def test_global_generators_are_untouched_and_change_nothing(make, plan):
    data = classification(SIZES)
    module = make()
    thetas = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        before = generators()
        task = choose(Task.of(module, "cross_entropy"), data, plan).task
        state, _ = run(plan, InProcessEngine(task, data))
        assert generators() == before
        thetas.append(state.model.theta)
    assert torch.equal(*thetas)
    other, _ = run(plan, InProcessEngine(task, data), seed=1)
    assert not torch.equal(other.model.theta, thetas[0])


def test_noise_of_a_clients_own_depends_on_the_client_and_the_round():
    data = classification(SIZES)
    task = choose(Task.of(seeded(Noisy), "cross_entropy"), data, TRAIN).task
    assert task.draws and task.numerics == "loop"
    updates = [run(recipes.gd(0.1), InProcessEngine(task, data), 1, seed)[0].model.theta for seed in (0, 0, 1)]
    assert torch.equal(updates[0], updates[1]) and not torch.equal(updates[0], updates[2])
