"""Every part of atoll satisfies the contract of its slot, and each check refuses a part that breaks it."""

import gc
import os
import sys
import threading
from dataclasses import dataclass, field, fields, is_dataclass

import pytest
import torch
from quick_cases import one_in, only

from atoll.base import grammar
from atoll.base.grammar import Value
from atoll.data import partition
from atoll.engine.inprocess import InProcessEngine
from atoll.plan import aggregate, codec, local, optimizer, pace, sampler, schedule
from atoll.plan.codec.stage import Codec
from atoll.plan.protocols import Aggregator, Cohort, Correction, Local, Optimizer, Pace, Pull, Sampler
from atoll.plan.schedule import constant, cosine, hold, plateau, warmup
from atoll.testing import (
    Nonconformity,
    check_aggregator,
    check_correction,
    check_engine,
    check_local,
    check_optimizer,
    check_pace,
    check_partition,
    check_sampler,
    check_schedule,
    check_stage,
    check_value,
    round_info,
)


def user_loop(model, loader, ctx):
    """A user's function for `Custom`: noise from the global generator, a batch order, a metric."""
    total = 0.0
    for x, y in loader:
        model.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x + 0.01 * torch.randn_like(x)), y)
        loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= ctx.lr * p.grad
        total += float(loss.detach()) / len(loader)
    return {"loss": total}


def median(updates, weights):
    """A user's function for `Combine`: the coordinate median."""
    return updates.median(0).values


def check_linear(part):
    """The check of a local part for models of one linear layer."""
    check_local(part, linear=True)


sgd = optimizer.sgd
CORRECTIONS = [
    local.Proximal(0.5),
    local.Scaffold(),
    local.Scaffold("update"),
    local.Dynamic(0.5),
    local.Normalised(),
    local.Extrapolated(),
    local.Calibrated(1.0),
    local.Calibrated(1.0, form="quarter") >> local.Proximal(0.5) >> local.Normalised(),
    local.Ditto(0.5),
    local.Fair(1.0),
    local.MimeLite(0.5),
]
OURS = {
    check_sampler: [
        sampler.Everyone(),
        sampler.Uniform(5),
        sampler.Uniform(40),
        sampler.Fraction(0.3),
        sampler.Poisson(0.2),
        sampler.Weighted(1),
        sampler.Weighted(7),
        sampler.RoundRobin(5),
        sampler.PowerOfChoice(3, 6),
    ],
    check_local: [
        local.Gradient(),
        local.Gradient(batch=4),
        local.Train(sgd(0.1), epochs=2, batch=4),
        local.Train(sgd(0.1, momentum=0.9), steps=3),
        local.Train(optimizer.adamw(0.01), steps=3, batch=4, keep=("optimizer", "order")),
        local.Train(sgd(plateau(0.1, patience=1)), steps=2, batch=4, keep=("order",)),
        local.Train(sgd(0.1), steps=hold(1, rounds=1) >> 3, batch=4, keep=("order",), sends="model"),
        *(local.Train(sgd(0.1), steps=3, batch=4, correction=part) for part in CORRECTIONS),
        local.Train(sgd(0.1), steps=3, batch=4, own=("*bias",)),
        local.Train(sgd(0.1), steps=3, batch=4, own=("*bias",), alternate=True),
        local.Train(sgd(0.1), steps=3, batch=4, own=("*bias",), correction=local.Scaffold()),
        local.Evaluate(),
        local.Moments((0.0, 0.5, 1.0), classes=3),
        local.Moments((0.0,) * 4),
        local.Moments(classes=3),
        local.Custom(user_loop, batch=4, lr=0.1),
    ],
    check_linear: [local.Newton(0.1)],
    check_correction: CORRECTIONS,
    check_stage: [
        codec.Identity(),
        codec.Identity() >> codec.Identity(),
        codec.Cast("bf16"),
        codec.Cast("fp16"),
        codec.Cast("fp8"),
        codec.Quantize(8),
        codec.Quantize(levels=1),
        codec.Rotate(),
        codec.Eden(1),
        codec.Eden(4),
        codec.TopK(0.1),
        codec.RandomK(0.3),
        codec.Sign(),
        codec.LowRank(1),
        codec.ErrorFeedback(codec.TopK(0.1)),
        codec.EF21(codec.TopK(0.1) >> codec.Quantize(8)),
        codec.TopK(0.1) >> codec.Quantize(8),
        codec.RandomK(0.25) >> codec.Eden(1),
        codec.Rotate() >> codec.Quantize(4),
        codec.TopK(0.1) >> codec.Entropy(),
        codec.Clip(1.0),
        codec.AdaptiveClip(),
        codec.Clip(1.0) >> codec.Noise(1.0),
    ],
    check_aggregator: [
        kind(**words)
        for kind, choices in (
            (
                aggregate.Mean,
                [
                    {},
                    {"weights": "equal"},
                    {"over": "expected"},
                    {"weights": "equal", "over": "expected"},
                    {"secure": aggregate.Masks(bound=10.0)},
                    {"max_weight": 9},
                ],
            ),
            (aggregate.Sum, [{}, {"weights": "equal"}]),
            (aggregate.Combine, [{"fn": median}]),
            (aggregate.Median, [{}]),
            (aggregate.TrimmedMean, [{"beta": 0.2}]),
            (aggregate.Krum, [{"f": 0}]),
            (aggregate.GeometricMedian, [{}]),
            (aggregate.CenteredClip, [{"tau": 1.0}]),
            (aggregate.Agnostic, [{"lr": 0.1}]),
            (aggregate.Bulyan, [{"f": 1}]),
            (aggregate.DnC, [{"f": 1}]),
            (aggregate.FLTrust, [{"client": 2}]),
            (aggregate.Bucketing, [{"s": 2}]),
            (aggregate.Foundation, [{}]),
            (aggregate.NormBound, [{"r": 1.0}, {"r": 1.0, "of": aggregate.Median()}]),
        )
        for words in choices
    ]
    + [
        # An attack knows the clients: it is checked as bound to those of `round_info`.
        aggregate.Attacked(of, attack, share=0.3).bind(round_info().population, torch.tensor(1.0))
        for of, attack in (
            (aggregate.Mean(), aggregate.SignFlip()),
            (aggregate.Median(), aggregate.Gaussian()),
            (aggregate.Median(), aggregate.ALIE()),
            (aggregate.Median(), aggregate.InnerProduct()),
            (aggregate.Mean(), aggregate.Claim(100)),
        )
    ],
    check_optimizer: [
        *(kind(0.01) for kind in optimizer.OPTIMIZERS.values()),
        sgd(0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
        sgd(plateau(0.1, patience=1), momentum=0.9),
        sgd(warmup(2) >> cosine(0.1, rounds=5)),
        optimizer.adam(0.01, correct=False, initial=1e-6),
        optimizer.adagrad(0.1, beta=0.9),
        optimizer.rmsprop(0.01, momentum=0.9, centered=True),
    ],
    check_schedule: [
        constant(0.1),
        schedule.step(0.1, every=3, factor=0.5),
        schedule.exponential(0.1, decay=0.9),
        schedule.inverse(1.0, t0=5),
        schedule.inverse_sqrt(1.0),
        cosine(0.1, rounds=20),
        schedule.polynomial(0.1, rounds=20, power=2, end=0.01),
        plateau(0.1, patience=1, cooldown=2, end=1e-3),
        warmup(5) >> plateau(0.1, patience=1),
        hold(0.2, rounds=3) >> plateau(0.1, patience=1),
    ],
    check_pace: [
        pace.Sync(),
        pace.Sync(over_select=1.3),
        pace.Sync(deadline_s=2),
        pace.Sync(over_select=2.5, deadline_s=60, quorum=0.8),
        pace.Sync(deadline_s=60, partial=True),
        pace.Buffered(1),
        pace.Buffered(10),
        pace.Buffered(10**6),
        pace.Buffered(3, staleness=pace.staleness_polynomial(0)),
        pace.Buffered(7, staleness=pace.hinge(0.5, grace=4)),
        *(pace.Bounded(s) for s in (0, 1, 4, 1000)),
    ],
    check_partition: [
        partition.IID(),
        partition.Dirichlet(0.3),
        partition.Pathological(2),
        partition.Shards(),
        partition.Quantity(1.5),
        partition.FeatureShift(noise=0.1),
        partition.FeatureShift(rotation=30, noise=0.1),
        partition.ByColumn(),
        partition.LabelFlip(0.3, partition.Dirichlet(0.5)),
        partition.Backdoor(1, 0.3, partition.Dirichlet(0.5)),
    ],
}
PAIRS = [(check, part) for check, parts in OURS.items() for part in parts]
# Another value of a part that is also checked with a value whose check takes less time, or that differs more.
SIMILAR = [
    (check_sampler, sampler.Uniform(40)),
    (check_sampler, sampler.Weighted(1)),
    (check_local, local.Gradient(batch=4)),
    (check_local, local.Train(sgd(0.1, momentum=0.9), steps=3)),
    (check_local, local.Train(sgd(plateau(0.1, patience=1)), steps=2, batch=4, keep=("order",))),
    (check_local, local.Train(sgd(0.1), steps=3, batch=4, own=("*bias",))),
    # `check_correction` ends with the check of a local part that has the correction.
    *((check_local, local.Train(sgd(0.1), steps=3, batch=4, correction=part)) for part in CORRECTIONS),
    (check_correction, local.Scaffold("update")),
    (check_correction, local.Calibrated(1.0)),
    (check_correction, local.Proximal(0.5)),  # the chain contains it
    (check_correction, local.Normalised()),
    (check_local, local.Train(sgd(0.1), steps=3, batch=4, own=("*bias",), correction=local.Scaffold())),
    (check_local, local.Moments((0.0,) * 4)),
    (check_local, local.Moments(classes=3)),
    (check_aggregator, aggregate.Mean(weights="equal")),
    (check_aggregator, aggregate.Mean(over="expected")),
    (check_aggregator, aggregate.Sum()),
    (check_pace, pace.Bounded(4)),
    (check_pace, pace.Sync(deadline_s=2)),
    (check_pace, pace.Buffered(1)),
    (check_pace, pace.Buffered(3, staleness=pace.staleness_polynomial(0))),
    (check_pace, pace.Sync(over_select=2.5, deadline_s=60, quorum=0.8)),
    (check_stage, codec.Cast("fp16")),
    (check_stage, codec.Eden(1)),
    (check_pace, pace.Bounded(1)),
    (check_pace, pace.Bounded(1000)),
    (check_pace, pace.Buffered(10)),
    (check_pace, pace.Buffered(10**6)),
    (check_pace, pace.Sync(1.3)),
]
QUICK = [pair for pair in PAIRS if pair not in SIMILAR]
assert len(QUICK) + len(SIMILAR) == len(PAIRS)


@pytest.mark.parametrize("pair", one_in(5, only(QUICK, PAIRS)), ids=lambda pair: f"{pair[0].__name__}-{pair[1]!r}")
def test_ours_conform(pair):
    check, part = pair
    check(part)


@pytest.mark.parametrize("chunk", only([2], [None, 2]), ids=str)
def test_our_engine_conforms(chunk):
    check_engine(lambda task, data: InProcessEngine(task, data, chunk))


def named(part):
    """The names in a part's text: its own, and those of the parts that it contains."""
    if isinstance(part, (tuple, list)):
        return {name for each in part for name in named(each)}
    if not is_dataclass(part):
        return set()
    return {type(part).__name__, *named([getattr(part, f.name) for f in fields(part)])}


def test_every_part_of_the_table_is_checked():
    """Plans have their own test."""
    from atoll.plan.registry import PARTS

    assert set(PARTS) - named(list(OURS.values())) == {"Plan"}


def test_plans_are_values():
    from atoll import recipes

    for recipe in recipes.RECIPES:
        check_value(recipe())


# Parts that break their contract in one way each, with a word of the expected message.


@dataclass(repr=False)
class Changeable(Sampler):
    n: int = 3
    __hash__ = object.__hash__

    def __call__(self, population, round, key):
        return sampler.Uniform(self.n)(population, round, key)


@dataclass(frozen=True)
class Unread(Sampler):
    """A part whose repr is not a constructor call."""

    n: int = 3

    def __repr__(self):
        return f"<{self.n} clients>"

    __call__ = Changeable.__call__


@dataclass(frozen=True, repr=False)
class Sampling(Sampler):
    way: str

    def __call__(self, population, round, key):
        first = torch.arange(3)
        match self.way:
            case "twice":
                ids = torch.tensor([1, 1, 2])
            case "outside":
                ids = torch.tensor([population.clients])
            case "unkeyed":
                ids = torch.randperm(population.clients)[:3]
            case _:
                ids = first
        return Cohort(ids, torch.tensor(3 / population.clients, dtype=torch.float64))


@dataclass(frozen=True, repr=False)
class Falling(Value):
    """A learning rate that goes below 0, or a memory that loses its names."""

    forgets: bool = False

    def init(self):
        return {"best": torch.zeros(())}

    def observe(self, memory, loss):
        return {} if self.forgets else dict(memory)

    def __call__(self, t, memory):
        return 0.1 if self.forgets else 0.1 - 0.001 * t


@dataclass(frozen=True, repr=False)
class Stepping(Optimizer):
    way: str

    def init(self, theta):
        return {}

    def lr_at(self, round, state):
        return 0.1

    def update(self, theta, g, sums, state, round):
        match self.way:
            case "climbs":
                return theta + 0.1 * g, {}
            case "in place":
                return theta.sub_(0.1 * g), {}
            case "all lanes by one norm":
                return theta - 0.1 * g / g.norm(), {}
            case "grows":
                return theta - 0.1 * g, {"more": theta}
            case "looks":
                return theta - (0.1 if g.abs().max().item() < 1e9 else 0.0) * g, {}
        return theta, {}


@dataclass(frozen=True, repr=False)
class Coding(Codec):
    way: str

    def server(self, layout):
        return {"bound": torch.ones(())}

    def encode(self, x, memory, shared, key):
        match self.way:
            case "by the largest of all":
                return x / x.abs().amax().clamp(min=1e-30), {}, {}, memory
            case "unkeyed":
                return x + torch.rand(1), {}, {}, memory
            case "side without rows":
                return x, {"scale": torch.ones(())}, {}, memory
            case "on the host":
                return x * torch.ones(x.shape[-1]), {}, {}, memory
            case "keeps more":
                return x, {}, {}, {"error": x}
        return x, {}, {}, memory

    def decode(self, x, side):
        return 2 * x if self.way == "opens in secret" else x

    def decode_sum(self, x, key):
        match self.way:
            case "decodes in secret":
                return 2 * x
            case "cuts":
                return x[..., :-1]
        return x

    def server_update(self, total, server, info, key):
        return total, {} if self.way == "forgets its server state" else server


@dataclass(frozen=True, repr=False)
class Squaring(codec.Identity):
    """A codec that declares a per-sum half, which is not linear."""

    per_sum = True

    def decode_sum(self, x, key):
        return x.square()


class Delegating(Aggregator):
    """An aggregator like `Mean`, except for the method that a subclass changes."""

    linear = True

    def zero(self):
        return aggregate.Mean().zero()

    def fold(self, partial, contribution, ids):
        return aggregate.Mean().fold(partial, contribution, ids)

    def merge(self, a, b):
        return aggregate.Mean().merge(a, b)

    def total(self, partial):
        return aggregate.Mean().total(partial)

    def finalize(self, total, info):
        return aggregate.Mean().finalize(total, info)


@dataclass(frozen=True, repr=False)
class Adding(Delegating):
    way: str

    def fold(self, partial, contribution, ids):
        update = contribution.means["update"]
        match self.way:
            case "by the largest of all":
                contribution.means["update"] = update / update.abs().amax()
            case "signs":
                return super().fold(
                    partial, contribution._replace(means={**contribution.means, "update": update.sign()}), ids
                )
        return super().fold(partial, contribution, ids)

    def merge(self, a, b):
        return a if self.way == "drops" else super().merge(a, b)

    def finalize(self, total, info):
        if self.way == "never empty":
            total = total._replace(means={**total.means, "update": total.means["update"] * 1.0})
        return super().finalize(total, info)


@dataclass(frozen=True, repr=False)
class Computing(Local):
    way: str

    def contribute(self, broadcast, lanes, memory, key, task):
        given, after = local.Gradient().contribute(broadcast, lanes, memory, key, task)
        update = given.means["update"]
        match self.way:
            case "beside others":
                update = update - update.mean(0)
            case "unkeyed":
                update = update + torch.rand(1)
            case "short":
                update = update[:, :-1]
            case "by rows used":
                given = given._replace(weight=given.weight * 0 + 1)
            case "unannounced":
                after = {"v": update}
            case "no rows":
                given = given._replace(sums={"loss": given.sums["loss"]})
        return given._replace(means={**given.means, "update": update}), after


@dataclass(frozen=True, repr=False)
class Dealing(partition.Partition):
    way: str

    def __call__(self, pool, clients, key):
        match self.way:
            case "no client":
                return torch.full((pool.rows,), -1)
            case "unkeyed":
                return torch.randint(clients, (pool.rows,))
        return partition.IID()(pool, clients, key)


@dataclass(frozen=True, repr=False)
class Waiting(Pace):
    """A pace like `Sync()`, or like `Buffered(2)` if it replaces arrivals, with one error."""

    way: str

    @property
    def asynchronous(self):
        return 1 if self.way == "no flag" else self.replaces_arrivals

    @property
    def replaces_arrivals(self):
        return self.way in ("never closes", "only as a whole")

    def cohort_size(self, n):
        match self.way:
            case "asks for fewer":
                return n - 1
            case "asks for the odd one out":
                return 2 * n
        return n

    def required(self, started):
        return started

    def may_start(self, starts):
        return starts != 3 if self.way == "forgives" else True

    def should_close(self, open):
        match self.way:
            case "never closes":
                return False
            case "only as a whole":
                return open.arrived == 2
            case "at once":
                return True
            case "in haste only":
                return open.arrived >= open.wanted and open.elapsed < 30
            case "by a coin":
                return open.arrived > 0 and bool(torch.rand(()) < 0.5)
        return open.arrived >= (2 if self.replaces_arrivals else open.wanted)

    def staleness_weight(self, staleness):
        match self.way:
            case "never whole":
                return 0.5
            case "louder with age":
                return 1.0 + staleness
            case "turns round":
                return 1.0 - staleness
        return 1.0


@dataclass(frozen=True, repr=False)
class Counting(Pace):
    """A pace that is not pure: it counts its calls."""

    asked: list = field(default_factory=list, compare=False)
    asynchronous = replaces_arrivals = False

    cohort_size = required = lambda self, n: n
    may_start = lambda self, starts: True  # noqa: E731

    def should_close(self, open):
        return open.arrived >= open.wanted

    def staleness_weight(self, staleness):
        self.asked.append(staleness)
        return 1.0 if len(self.asked) < 50 else 0.5


class Stubborn(InProcessEngine):
    """An engine like `InProcess`, with one error."""

    way: str

    def gather(self, plan, state, cohort, key):
        match self.way:
            case "in the order of arrival":
                gathered = super().gather(plan, state, cohort, key)
                return gathered._replace(arrived=gathered.arrived.flip(0))
            case "commits by itself":
                gathered = super().gather(plan, state, cohort, key)
                for ids, rows in gathered.memory:
                    state.memory.put(ids, rows)
                return gathered
            case "silent":
                return super().gather(plan, state, cohort, key)._replace(failures=())
            case "no empty cohorts":
                if not len(cohort.ids):
                    raise ValueError("the cohort is empty")
            case "another key":
                key = key.fold("mine")
        return super().gather(plan, state, cohort, key)


def stubborn(way):
    def make(task, data):
        engine = Stubborn(task, data)
        object.__setattr__(engine, "way", way)
        return engine

    return make


@dataclass(frozen=True, repr=False)
class Pulling(Correction):
    """A correction with one fault."""

    fault: str

    def pull(self, broadcast, memory, facts):
        return Pull(anchor=torch.zeros(1), mu=0.1) if self.fault == "anchor of one number" else None


BROKEN = [
    (check_sampler, Changeable(), "can be changed"),
    (check_sampler, Unread(), "cannot be read"),
    (check_sampler, Sampling("twice"), "different numbers"),
    (check_sampler, Sampling("outside"), "different numbers"),
    (check_sampler, Sampling("unkeyed"), "global generator"),
    (check_sampler, Sampling("always the first"), "in 1000 of 1000 rounds"),
    (check_schedule, Falling(), "in round 1000"),
    (check_schedule, Falling(forgets=True), "tensors named"),
    (check_optimizer, Stepping("climbs"), "uphill"),
    (check_optimizer, Stepping("in place"), "changed its arguments"),
    (check_optimizer, Stepping("all lanes by one norm"), "than one at a time"),
    (check_optimizer, Stepping("grows"), "tensors named"),
    (check_optimizer, Stepping("looks"), "without numbers"),
    (check_stage, Coding("by the largest of all"), "other clients in the batch"),
    (check_stage, Coding("unkeyed"), "global generator"),
    (check_stage, Coding("side without rows"), "for 4 clients"),
    (check_stage, Coding("on the host"), "without numbers"),
    (check_stage, Coding("keeps more"), "tensors named"),
    (check_stage, Coding("opens in secret"), "per_message = True"),
    (check_stage, Coding("decodes in secret"), "per_sum = True"),
    (check_stage, Coding("cuts"), "floats [63]"),
    (check_stage, Coding("forgets its server state"), "tensors named"),
    (check_stage, Squaring(), "linear decode"),
    (check_aggregator, aggregate.Mean(sum="float"), "order and grouping"),
    (check_aggregator, Adding("by the largest of all"), "changed its arguments"),
    (check_aggregator, Adding("signs"), "linear = False"),
    (check_aggregator, Adding("drops"), "order and grouping"),
    (check_aggregator, Adding("never empty"), "no contribution"),
    (check_local, Computing("beside others"), "other clients are in the batch"),
    (check_local, Computing("unkeyed"), "global generator"),
    (check_local, Computing("short"), "is a vector"),
    (check_local, Computing("by rows used"), "all rows of a client"),
    (check_local, Computing("unannounced"), "tensors named"),
    (check_local, Computing("no rows"), "a sum named rows"),
    (check_correction, Pulling("anchor of one number"), "as (torch.float32, [1])"),
    (check_correction, Pulling("no pull"), "a Pull"),
    (check_pace, Waiting("no flag"), "True or False"),
    (check_pace, Waiting("asks for fewer"), "at least"),
    (check_pace, Waiting("asks for the odd one out"), "each time"),
    (check_pace, Waiting("forgives"), "False from some number on"),
    (check_pace, Waiting("never closes"), "1e+12 arrivals"),
    (check_pace, Waiting("only as a whole"), "False with more arrivals"),
    (check_pace, Waiting("at once"), "has just opened"),
    (check_pace, Waiting("in haste only"), "False with more time"),
    (check_pace, Waiting("by a coin"), "global generator"),
    (check_pace, Waiting("never whole"), "floats that start at 1"),
    (check_pace, Waiting("louder with age"), "never increase"),
    (check_pace, Waiting("turns round"), "never below 0"),
    (check_pace, Counting(), "two results"),
    (check_partition, Dealing("no client"), "exactly one client"),
    (check_partition, Dealing("unkeyed"), "global generator"),
    (check_engine, stubborn("in the order of arrival"), "in order of their ids"),
    (check_engine, stubborn("commits by itself"), "after acceptance"),
    (check_engine, stubborn("silent"), "one failure"),
    (check_engine, stubborn("no empty cohorts"), "the cohort is empty"),
    (check_engine, stubborn("another key"), "the same result on every engine"),
]


@pytest.mark.parametrize(("check", "part", "says"), BROKEN, ids=[f"{c.__name__}-{s}" for c, _, s in BROKEN])
def test_check_refuses(check, part, says):
    with pytest.raises(Nonconformity) as refusal:
        check(part)
    assert says in str(refusal.value)
    assert refusal.value.given and refusal.value.required and refusal.value.why


def test_every_check_is_seen_to_refuse():
    import atoll.testing

    checks = {getattr(atoll.testing, name) for name in atoll.testing.__all__ if name.startswith("check_")}
    assert checks == {check for check, _, _ in BROKEN} | {check_value}


def test_same_looks_at_every_bit():
    from atoll.testing.contract import same

    nan = torch.tensor([float("nan")])
    assert same({"a": (nan, 1)}, {"a": (nan.clone(), 1)})
    for other in ({"a": (nan, 2)}, {"b": (nan, 1)}, {"a": (nan.double(), 1)}, {"a": (nan[None], 1)}, {"a": (-nan, 1)}):
        assert not same({"a": (nan, 1)}, other)


class Yields:
    """Garbage that lets another thread run when it is collected, also in the middle of `ast.parse`."""

    def __init__(self):
        self.me = self

    def __del__(self):
        os.stat(".")


def test_threads_read_texts_at_the_same_time():
    """Without a lock, Python 3.11 raises SystemError in one of them: its parser counts for all threads together."""
    text, errors = "Plan(Train(sgd(0.1), epochs=1, batch=10, correction=Fair(1.0)), aggregator=Mean())", []

    def read():
        try:
            for _ in range(300):
                [Yields() for _ in range(3)]
                grammar._tree(text)
        except BaseException as error:
            errors.append(error)

    usual, often = gc.get_threshold(), sys.getswitchinterval()
    threads = [threading.Thread(target=read) for _ in range(4)]
    gc.set_threshold(1)
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        gc.set_threshold(*usual)
        sys.setswitchinterval(often)
    assert not errors
