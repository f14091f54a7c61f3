"""Every schedule equals its closed form, and torch's scheduler if torch has one."""

import math
import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from atoll.base.errors import UsageError
from atoll.base.grammar import parse
from atoll.plan.schedule import (
    SCHEDULES,
    as_schedule,
    constant,
    cosine,
    exponential,
    hold,
    inverse,
    inverse_sqrt,
    plateau,
    polynomial,
    step,
    warmup,
)

ROUNDS = range(250)
FORMS = [
    (constant(0.3), lambda t: 0.3),
    (step(0.3, every=30), lambda t: 0.3 * 0.1 ** (t // 30)),
    (step(0.3, every=7, factor=0.5), lambda t: 0.3 / 2 ** (t // 7)),
    (exponential(0.3, decay=0.97), lambda t: 0.3 * math.exp(t * math.log(0.97))),
    (inverse(3, t0=10), lambda t: 3 / (t + 10)),
    (inverse_sqrt(3, t0=16), lambda t: 3 / (t + 16) ** 0.5),
    (cosine(0.3, rounds=100), lambda t: 0.3 * math.cos(min(t, 100) * math.pi / 200) ** 2),
    (cosine(0.3, rounds=100, end=0.1), lambda t: 0.1 + 0.2 * math.cos(min(t, 100) * math.pi / 200) ** 2),
    (polynomial(0.3, rounds=100), lambda t: 0.3 * max(100 - t, 0) / 100),
    (polynomial(0.3, rounds=50, power=2, end=0.1), lambda t: 0.1 + 0.2 * (max(50 - t, 0) / 50) ** 2),
    (warmup(9) >> constant(1), lambda t: min((t + 1) / 10, 1)),
    (warmup(4, start=0.5) >> inverse(2, t0=2), lambda t: 0.5 + 0.1 * (t + 1) if t < 4 else 2 / (t - 2)),
    (hold(1, rounds=20) >> 16, lambda t: 1 if t < 20 else 16),
    (hold(2, rounds=3) >> (hold(1, rounds=4) >> inverse(6)), lambda t: 2 if t < 3 else 1 if t < 7 else 6 / (t - 6)),
    (hold(0.1, rounds=3) >> (warmup(4) >> constant(1)), lambda t: 0.1 if t < 3 else min((t - 2) / 5, 1)),
    (warmup(4) >> (hold(1, rounds=3) >> constant(0.5)), lambda t: (t + 1) / 5 if t < 4 else 1 if t < 7 else 0.5),
    (plateau(0.3), lambda t: 0.3),
]


@pytest.mark.parametrize(("schedule", "form"), FORMS, ids=[repr(row[0]) for row in FORMS])
def test_closed_form(schedule, form):
    rates = [schedule(t) for t in ROUNDS]
    assert all(type(rate) is float for rate in rates)
    assert rates == pytest.approx([form(t) for t in ROUNDS], rel=1e-12, abs=1e-15)


def test_every_schedule_is_here():
    assert {type(row[0]).__name__ for row in FORMS} | {"warmup", "hold"} == {*SCHEDULES, "join"}


def torchs(make, rounds):
    p = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([p], lr=0.3)
    scheduler = make(optimizer)
    rates = []
    for _ in range(rounds):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(
    ("schedule", "make"),
    [
        (step(0.3, every=30), lambda o: lr_scheduler.StepLR(o, 30)),
        (exponential(0.3, decay=0.97), lambda o: lr_scheduler.ExponentialLR(o, 0.97)),
        (cosine(0.3, rounds=100, end=0.01), lambda o: lr_scheduler.CosineAnnealingLR(o, 100, 0.01)),
        (polynomial(0.3, rounds=100, power=2), lambda o: lr_scheduler.PolynomialLR(o, 100, 2)),
    ],
    ids=lambda value: "by hand" if isinstance(value, types.FunctionType) else repr(value),
)
def test_is_torchs(schedule, make):
    assert [schedule(t) for t in range(100)] == pytest.approx(torchs(make, 100), rel=1e-9)


@given(
    st.lists(st.floats(0.01, 10) | st.just(math.nan), min_size=1, max_size=60),
    st.integers(0, 4),
    st.integers(0, 3),
    st.sampled_from([0.0, 1e-4, 0.2]),
    st.sampled_from([0.0, 0.01]),
)
def test_plateau_is_torchs(losses, patience, cooldown, threshold, end):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    reference = lr_scheduler.ReduceLROnPlateau(
        optimizer, "min", 0.5, patience, threshold, "rel", cooldown, min_lr=end, eps=0
    )
    ours = plateau(0.3, factor=0.5, patience=patience, threshold=threshold, cooldown=cooldown, end=end)
    memory = ours.init()
    for t, loss in enumerate(losses):
        reference.step(loss)
        before = {name: value.clone() for name, value in memory.items()}
        after = ours.observe(memory, torch.tensor([loss], dtype=torch.float64))
        assert all(torch.equal(before[name], value) for name, value in memory.items())
        assert {n: (v.shape, v.dtype) for n, v in memory.items()} == {n: (v.shape, v.dtype) for n, v in after.items()}
        memory = after
        assert ours(t, memory) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)


def test_a_warm_up_hands_its_memory_on():
    schedule = warmup(2) >> plateau(0.3, factor=0.5, patience=0)
    memory = schedule.init()
    for _ in range(2):
        memory = schedule.observe(memory, torch.tensor(1.0))
    assert schedule(5, memory) == 0.15
    assert schedule(0, memory) == pytest.approx(0.05)


def test_pure_schedules_remember_nothing():
    for schedule, _ in FORMS[:-1]:
        assert schedule.init() == {} == schedule.observe({}, torch.tensor(1.0))


@pytest.mark.parametrize("schedule", [row[0] for row in FORMS], ids=repr)
def test_prints_as_its_constructor(schedule):
    again = parse(repr(schedule), SCHEDULES)
    assert again == schedule and hash(again) == hash(schedule) and repr(again) == repr(schedule)


def test_the_text():
    assert repr(cosine(0.1, rounds=100)) == "cosine(0.1, rounds=100)"
    assert repr(warmup(5) >> step(1, every=30)) == "warmup(5) >> step(1.0, every=30)"
    assert repr(hold(1, rounds=2) >> (hold(3, rounds=4) >> 5)) == (
        "hold(1.0, rounds=2) >> (hold(3.0, rounds=4) >> constant(5.0))"
    )
    assert repr(warmup(5) >> 0.1) == "warmup(5) >> constant(0.1)"
    assert as_schedule(1) == constant(1.0) and as_schedule(cosine(1, rounds=2)) == cosine(1, rounds=2)


REFUSED = [
    lambda: constant(0),
    lambda: constant(-0.1),
    lambda: constant(math.nan),
    lambda: constant("0.1"),
    lambda: constant(False),
    lambda: step(0.1, every=0),
    lambda: step(0.1, every=2.5),
    lambda: step(0.1, every=2, factor=2),
    lambda: exponential(0.1, decay=0),
    lambda: exponential(-1, decay=1.5),
    lambda: inverse(1, t0=0),
    lambda: inverse_sqrt(math.inf),
    lambda: cosine(0.1, rounds=-1),
    lambda: cosine(0.1, rounds=10, end=-0.1),
    lambda: polynomial(0.1, rounds=10, power=0),
    lambda: plateau(0.1, factor=1),
    lambda: plateau(0.1, patience=-1),
    lambda: plateau(0.1, threshold=1),
    lambda: plateau(0.1, end=0.2),
    lambda: warmup(0),
    lambda: warmup(5, start=-1),
    lambda: as_schedule(0),
    lambda: as_schedule(None),
    lambda: as_schedule(True),
    lambda: as_schedule(warmup(5)),
    lambda: warmup(5) >> warmup(5),
    lambda: warmup(5) >> (warmup(5) >> constant(0.1)),
    lambda: hold(0, rounds=5),
    lambda: hold(0.1, rounds=0.5),
    lambda: as_schedule(hold(0.1, rounds=5)),
    lambda: hold(0.1, rounds=5) >> hold(0.2, rounds=5),
    lambda: constant(0.1) >> hold(0.1, rounds=5),
    lambda: constant(0.1) >> cosine(0.1, rounds=10),
    lambda: constant(0.1) >> warmup(5),
    lambda: (warmup(5) >> constant(0.1)) >> cosine(0.1, rounds=10),
    lambda: cosine(0.1, rounds=10) >> (warmup(5) >> constant(0.1)),
    lambda: (warmup(5) >> constant(0.1)) >> 3,
]


@pytest.mark.parametrize("make", REFUSED)
def test_refuses_with_a_line_that_builds(make):
    with pytest.raises(UsageError) as refusal:
        make()
    assert refusal.value.required
    assert repr(parse(refusal.value.line, SCHEDULES)) == refusal.value.line
