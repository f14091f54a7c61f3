"""Every optimizer equals torch's or that of its paper, and a lane equals the single run bit for bit."""

import math
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quick_cases import by_turns, only
from torch import Tensor

from atoll.base.errors import UsageError
from atoll.base.grammar import parse
from atoll.compute import limits
from atoll.plan.optimizer.base import OptimizerBase
from atoll.plan.optimizer.rules import (
    OPTIMIZERS,
    adadelta,
    adagrad,
    adam,
    adamax,
    adamw,
    nadam,
    radam,
    rmsprop,
    sgd,
    yogi,
)
from atoll.plan.schedule import SCHEDULES, cosine, plateau, warmup

# atoll's, torch's class, its arguments; None: torch has none
TABLE = [
    (sgd(0.1), torch.optim.SGD, {}),
    (sgd(0.1, weight_decay=0.01), torch.optim.SGD, {"weight_decay": 0.01}),
    (sgd(0.1, momentum=0.9), torch.optim.SGD, {"momentum": 0.9}),
    (
        sgd(0.1, momentum=0.9, weight_decay=0.01, dampening=0.3),
        torch.optim.SGD,
        {"momentum": 0.9, "weight_decay": 0.01, "dampening": 0.3},
    ),
    (sgd(0.7, momentum=0.9, nesterov=True), torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    (adam(0.01), torch.optim.Adam, {}),
    (
        adam(0.01, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.01),
        torch.optim.Adam,
        {"betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.01},
    ),
    (adamw(0.01), torch.optim.AdamW, {}),
    (adagrad(0.1), torch.optim.Adagrad, {}),
    (
        adagrad(0.1, initial=0.3, weight_decay=0.01),
        torch.optim.Adagrad,
        {"initial_accumulator_value": 0.3, "weight_decay": 0.01},
    ),
    (rmsprop(0.01), torch.optim.RMSprop, {}),
    (
        rmsprop(0.01, momentum=0.9, centered=True, weight_decay=0.01),
        torch.optim.RMSprop,
        {"momentum": 0.9, "centered": True, "weight_decay": 0.01},
    ),
    (adadelta(1.0), torch.optim.Adadelta, {}),
    (adamax(0.01, weight_decay=0.01), torch.optim.Adamax, {"weight_decay": 0.01}),
    (nadam(0.01, weight_decay=0.01), torch.optim.NAdam, {"weight_decay": 0.01}),
    (radam(0.01, betas=(0.9, 0.99)), torch.optim.RAdam, {"betas": (0.9, 0.99)}),
    (adam(0.01, correct=False, initial=1e-6), None, {}),
    (adagrad(0.1, beta=0.9, weight_decay=0.01), None, {}),
    (yogi(0.01, weight_decay=0.01), None, {}),
]
KINDS = list({type(row[0]): row[0] for row in TABLE}.values())  # the last of each, which has most settings
EACH = pytest.mark.parametrize("optimizer", [row[0] for row in TABLE], ids=repr)
STEPS = 20


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Numbers of many magnitudes, some of them 0."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x = x * 10.0 ** torch.randint(-6, 3, shape, generator=generator)
    return x.masked_fill(torch.rand(shape, generator=generator) < 0.1, 0.0).to(dtype)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are bit-identical, including the sign of zero."""
    whole = torch.int32 if a.dtype == torch.float32 else torch.int64
    return a.shape == b.shape and torch.equal(a.contiguous().view(whole), b.contiguous().view(whole))


def run(optimizer: OptimizerBase, theta: Tensor, gs: list[Tensor], state=None) -> tuple[Tensor, dict[str, Tensor]]:
    """In place on copies: θ and the slots after a step along each g."""
    theta = theta.clone()
    state = optimizer.slots(theta) if state is None else {name: value.clone() for name, value in state.items()}
    stepper = optimizer.stepper(theta, state, optimizer.lr_at(0))
    for g in gs:
        stepper.step(g)
    return theta, state


def test_every_optimizer_is_in_the_table():
    assert {type(row[0]) for row in TABLE} == set(OPTIMIZERS.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("d", only([1, 1001], [1, 7, 33, 1001]))
@pytest.mark.parametrize(
    ("optimizer", "cls", "words"), [row for row in TABLE if row[1]], ids=[repr(row[0]) for row in TABLE if row[1]]
)
def test_is_torch_to_the_bit(optimizer, cls, words, d, dtype):
    theta, gs = draw(d, dtype=dtype), [draw(d, seed=s, dtype=dtype) for s in range(1, STEPS + 1)]
    p = theta.clone().requires_grad_()
    reference = cls([p], lr=optimizer.lr, **words)
    for g in gs:
        p.grad = g.clone()
        reference.step()
    ours, _ = run(optimizer, theta, gs)
    assert same(ours, p.detach())


@pytest.mark.parametrize(
    ("optimizer", "lanes", "d"), by_turns([row[0] for row in TABLE], [1, 2, 3, 4, 5], [1, 7, 33, 1001])
)
def test_a_lane_is_the_single_run(optimizer, lanes, d):
    """Also if the lanes make different numbers of steps, longest first."""
    steps = [STEPS - 4 * lane for lane in range(lanes)]
    theta = draw(lanes, d)
    gs = [draw(sum(n > s for n in steps), d, seed=s + 1) for s in range(STEPS)]
    together, state = run(optimizer, theta, gs)
    for lane, n in enumerate(steps):
        alone, own = run(optimizer, theta[lane], [g[lane] for g in gs[:n]])
        assert same(together[lane], alone)
        assert all(torch.equal(state[name][lane], value) for name, value in own.items())
        assert int(own.get("step", torch.tensor(n))) == n


@EACH
def test_lanes_with_kept_state_resume(optimizer):
    """Lanes with different step counts: each equals one run without interruption."""
    before, d = (3, 3, 0, 5, 5, 5), 33
    theta, first = draw(len(before), d), [draw(len(before), d, seed=s) for s in range(5)]
    second = [draw(k, d, seed=100 + k) for k in (6, 6, 4, 1)]
    kept = [run(optimizer, theta[lane], [g[lane] for g in first[:n]]) for lane, n in enumerate(before)]
    stacked = {name: torch.stack([state[name] for _, state in kept]) for name in kept[0][1]}
    together, state = run(optimizer, torch.stack([after for after, _ in kept]), second, stacked)
    for lane, n in enumerate(before):
        later = [g[lane] for g in second if len(g) > lane]
        alone, own = run(optimizer, theta[lane], [*(g[lane] for g in first[:n]), *later])
        assert same(together[lane], alone)
        assert all(torch.equal(state[name][lane], value) for name, value in own.items())


@pytest.mark.parametrize("optimizer", only(KINDS[::2], [row[0] for row in TABLE]), ids=repr)
def test_bits_do_not_depend_on_blocks_threads_or_neighbours(optimizer, monkeypatch):
    d, threads = 20011, torch.get_num_threads()
    theta, gs = draw(3, d), [draw(3, d, seed=s) for s in (1, 2)]
    alone = torch.stack([run(optimizer, theta[lane], [g[lane] for g in gs])[0] for lane in range(3)])
    try:
        for count, block in ((1, 1 << 17), (2, 1 << 17), (1, 1003), (2, 20001)):
            torch.set_num_threads(count)
            monkeypatch.setattr(limits, "OPTIMIZER_BLOCK", block)
            assert same(run(optimizer, theta, gs)[0], alone), (count, block)
    finally:
        torch.set_num_threads(threads)


@EACH
@pytest.mark.parametrize("shape", [(33,), (3, 33)])
def test_update_is_a_step_and_changes_nothing_given(optimizer, shape):
    theta, gs = draw(*shape), [draw(*shape, seed=s) for s in range(1, STEPS)]
    state = optimizer.init(theta)
    after = theta
    for t, g in enumerate(gs):
        given = (after.clone(), g.clone(), {name: value.clone() for name, value in state.items()})
        after_next, state_next = optimizer.update(after, g, {}, state, t)
        assert same(given[0], after) and same(given[1], g)
        assert all(torch.equal(given[2][name], value) for name, value in state.items())
        after, state = after_next, state_next
    whole, slots = run(optimizer, theta, gs)
    assert same(after, whole) and state.keys() == slots.keys()


@EACH
@pytest.mark.parametrize("shape", [(33,), (3, 33)])
def test_on_the_meta_device(optimizer, shape):
    theta = torch.empty(shape, device="meta")
    state = optimizer.init(theta)
    after, state = optimizer.update(theta, torch.empty_like(theta), {}, state, 0)
    assert after.is_meta and after.shape == theta.shape
    assert all(state[name].is_meta for name in optimizer.per_coordinate())
    assert all(state[name].device.type == "cpu" for name in optimizer.per_lane())
    everything = {name: value.to("meta") for name, value in state.items()}
    assert optimizer.update(theta, torch.empty_like(theta), {}, everything, 1)[0].is_meta


@EACH
def test_no_lanes_and_no_coordinates(optimizer):
    for shape in ((0, 5), (2, 0), (0,)):
        theta = torch.zeros(shape)
        after, _ = optimizer.update(theta, torch.zeros(shape), {}, optimizer.init(theta), 0)
        assert after.shape == theta.shape


@EACH
def test_slots_of_lanes_are_slots_of_each(optimizer):
    one, many = optimizer.slots(torch.zeros(7)), optimizer.slots(torch.zeros(3, 7))
    assert one.keys() == many.keys()
    assert all(torch.equal(torch.stack([one[name]] * 3), value) for name, value in many.items())


@pytest.mark.parametrize(
    ("optimizer", "square"),
    [
        (adam(0.03, betas=(0.8, 0.95), eps=1e-2, correct=False, initial=1e-4), lambda v, q: 0.95 * v + 0.05 * q),
        (adagrad(0.03, beta=0.8, eps=1e-2, initial=1e-4), lambda v, q: v + q),
        (
            yogi(0.03, betas=(0.8, 0.95), eps=1e-2, initial=1e-4),
            lambda v, q: v - 0.05 * q * math.copysign(v != q, v - q),
        ),
    ],
    ids=lambda value: "by hand" if isinstance(value, types.FunctionType) else repr(value),
)
def test_adaptive_federated_optimization(optimizer, square):
    """Algorithm 2 of Reddi et al., number by number; their Δ is the negative gradient."""
    d = 9
    theta, gs = draw(d, dtype=torch.float64), [draw(d, seed=s, dtype=torch.float64) for s in range(1, 30)]
    ours, _ = run(optimizer, theta, gs)
    for i in range(d):
        x, m, v = float(theta[i]), 0.0, 1e-4
        for g in gs:
            delta = -float(g[i])
            m, v = 0.8 * m + 0.2 * delta, square(v, delta**2)
            x += 0.03 * m / (math.sqrt(v) + 1e-2)
        assert float(ours[i]) == pytest.approx(x, rel=1e-12)


@given(st.integers(0, 10**6))
def test_fedyogi_is_fedadagrad_while_v_is_small(seed):
    """√v grows by a factor √(1 − β₂) more slowly, and the rates compensate."""
    shrink = math.sqrt(1 - 0.999)
    slow = yogi(0.01, betas=(0.9, 0.999), eps=1e-8)
    fast = adagrad(0.01 / shrink, beta=0.9, eps=1e-8 / shrink)
    generator = torch.Generator().manual_seed(seed)
    theta = torch.randn(17, generator=generator, dtype=torch.float64)
    # |g| within a factor 5 for 20 rounds: v ≤ 20 · 0.001 · 25 · min g² < g²
    size = 1 + 4 * torch.rand(20, 17, generator=generator, dtype=torch.float64)
    gs = [row for row in size * (torch.randint(0, 2, (20, 17), generator=generator) * 2 - 1)]
    torch.testing.assert_close(run(slow, theta, gs)[0], run(fast, theta, gs)[0], rtol=1e-12, atol=1e-12)


def test_adam_of_one_step_is_the_sign():
    after, _ = run(adam(0.1, eps=1e-30), torch.zeros(3), [torch.tensor([5.0, -1e-3, 0.0])])
    torch.testing.assert_close(after, torch.tensor([-0.1, 0.1, 0.0]))


def test_a_plateau_lowers_the_rate_of_the_next_round():
    optimizer = sgd(plateau(1.0, factor=0.5, patience=0))
    theta = torch.zeros(1, dtype=torch.float64)
    state, rates = optimizer.init(theta), []
    for t, loss in enumerate((3.0, 2.0, 2.0, 2.0, 1.0)):
        rates.append(optimizer.lr_at(t, state))
        theta, state = optimizer.update(theta, torch.ones(1), {"loss": torch.tensor(loss)}, state, t)
    assert rates == [1.0, 1.0, 1.0, 0.5, 0.25]
    assert float(theta) == -sum(rates)
    assert optimizer.lr_at(5, state) == 0.25
    assert not optimizer.slots(theta)


def test_the_rate_follows_the_round():
    optimizer = sgd(cosine(1.0, rounds=4))
    theta, state = torch.zeros(1, dtype=torch.float64), {}
    for t in range(6):
        theta, state = optimizer.update(theta, torch.ones(1), {}, state, t)
    assert float(theta) == pytest.approx(-2.5)


@pytest.mark.parametrize("shape", [(4, 5), (3, 4), (5,), (1, 3, 5)])
def test_lanes_never_come_back(shape):
    theta = torch.zeros(3, 5)
    stepper = sgd(0.1).stepper(theta, {}, 0.1)
    with pytest.raises(UsageError, match="An update of shape"):
        stepper.step(torch.ones(shape))
    stepper.step(torch.ones(2, 5))
    with pytest.raises(UsageError, match="stays finished"):
        stepper.step(torch.ones(3, 5))
    assert theta[2].eq(0).all() and theta[:2].eq(-0.1).all()


NAMES = {**OPTIMIZERS, **SCHEDULES}


@pytest.mark.parametrize(
    "optimizer",
    [*(row[0] for row in TABLE), sgd(cosine(0.1, rounds=9)), adam(warmup(5) >> plateau(0.1, factor=0.5))],
    ids=lambda value: "by hand" if isinstance(value, types.FunctionType) else repr(value),
)
def test_prints_as_its_constructor(optimizer):
    again = parse(repr(optimizer), NAMES)
    assert again == optimizer and hash(again) == hash(optimizer) and repr(again) == repr(optimizer)


def test_the_text():
    assert repr(sgd(1)) == "sgd(1.0)" == repr(sgd(SCHEDULES["constant"](1)))
    assert repr(sgd(0.1, momentum=0.9)) == "sgd(0.1, momentum=0.9)"
    assert repr(adam(0.01, betas=[0.9, 0.99])) == "adam(0.01, betas=(0.9, 0.99))"
    assert sgd(1) == sgd(1.0) != sgd(2.0)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize(
    "words",
    [
        {"lr": 0},
        {"lr": -1.0},
        {"lr": math.nan},
        {"lr": math.inf},
        {"lr": "0.1"},
        {"lr": True},
        {"lr": warmup(5)},
        {"lr": 0.1, "weight_decay": -1},
        {"lr": 0, "weight_decay": math.inf},
    ],
    ids=str,
)
def test_refuses_with_a_line_that_builds(name, words):
    with pytest.raises(UsageError, match=f"{name} was given") as refusal:
        OPTIMIZERS[name](**words)
    assert isinstance(parse(refusal.value.line, NAMES), OPTIMIZERS[name])
    assert refusal.value.required


@pytest.mark.parametrize(
    ("make", "write"),
    [
        (lambda: sgd(0.1, nesterov=True), "sgd(0.1, momentum=0.9, nesterov=True)"),
        (
            lambda: sgd(0.1, momentum=0.5, nesterov=True, dampening=0.1),
            "sgd(0.1, momentum=0.5, nesterov=True)",
        ),
        (lambda: sgd(0.1, dampening=0.1), "sgd(0.1)"),
        (lambda: sgd(0.1, momentum=1), "sgd(0.1)"),
        (lambda: sgd(0.1, nesterov=1), "sgd(0.1)"),
        (lambda: sgd(0, momentum=1, weight_decay=0.1), "sgd(0.1, weight_decay=0.1)"),
        (lambda: sgd(0, momentum=1, nesterov=True), "sgd(0.1, momentum=0.9, nesterov=True)"),
        (lambda: adam(0, initial=0.5), "adam(0.01, correct=False, initial=0.5)"),
        (lambda: adam(0.1, betas=(0.9, 1.0)), "adam(0.1)"),
        (lambda: adam(0.1, betas=0.9), "adam(0.1)"),
        (lambda: adam(0.1, eps=0), "adam(0.1)"),
        (lambda: adam(0.1, initial=0.5), "adam(0.1, correct=False, initial=0.5)"),
        (lambda: adagrad(0.1, beta=1), "adagrad(0.1)"),
        (lambda: yogi(0.1, initial=-1), "yogi(0.1)"),
        (lambda: rmsprop(0.1, alpha=1), "rmsprop(0.1)"),
        (lambda: adadelta(1, rho=-1), "adadelta(1.0)"),
        (lambda: nadam(0.1, momentum_decay=-1), "nadam(0.1)"),
    ],
)
def test_unsupported_plans_are_refused(make, write):
    with pytest.raises(UsageError) as refusal:
        make()
    assert refusal.value.line == write
    assert repr(parse(write, NAMES)) == write
