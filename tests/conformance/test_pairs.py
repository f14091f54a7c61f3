"""Every recipe × codec × aggregator × engine: it runs, or is refused with a line that builds.

A pace, an engine, a codec or an aggregator that is new is one more row in its table; no test is written for it.
"""

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from problems import classification, seeded, task_of
from torch import nn

from atoll import recipes
from atoll.engine.inprocess import InProcess
from atoll.engine.memory import Memory
from atoll.errors import UsageError
from atoll.grammar import Value, parse
from atoll.plan.aggregate import Mean, Sum
from atoll.plan.codec import Codec, Identity
from atoll.plan.names import PARTS
from atoll.plan.pace import Sync
from atoll.plan.plan import Plan, State, step
from atoll.plan.slots import Aggregator, Pace, Stage
from atoll.testing import check_aggregator, check_stage


@dataclass(frozen=True, repr=False)
class Rotate(Codec):
    """Signs and places drawn for all clients together, undone once on the sum."""

    decodes = True

    def _draw(self, x, key):
        d, key = x.shape[-1], key.shared()
        signs = (key.fold("signs").hash(d) >> 63) * 2 + 1
        return signs.to(x), key.fold("order").permutation(d).to(x.device)

    def encode(self, x, memory, shared, key):
        signs, order = self._draw(x, key)
        return (x * signs)[..., order], {}, {}, memory

    def decode(self, x, key):
        signs, order = self._draw(x, key)
        return x[..., order.argsort()] * signs


@dataclass(frozen=True, repr=False)
class Quantize(Codec):
    """Whole numbers of `bits` bits, rounded up or down by a keyed coin, opened message by message."""

    bits: int = 8
    opens = True

    def encode(self, x, memory, shared, key):
        step = x.abs().amax(-1, keepdim=True).clamp(min=1e-30) / (2 ** (self.bits - 1) - 1)
        coins = key.fold("coins").uniform(x.shape[-1], x.dtype)
        return torch.floor(x / step + coins).to(torch.int16), {"step": step}, {}, memory

    def open(self, x, side):
        return x.to(side["step"].dtype) * side["step"]


@dataclass(frozen=True, repr=False)
class Halve(Codec):
    """Half as many bits, and what that loses is kept by the client for the next round; the server counts the rounds."""

    opens = True

    def memory(self, layout):
        return {"error": torch.zeros(layout.d, dtype=layout.dtype)}

    def server(self, layout):
        return {"rounds": torch.zeros((), dtype=torch.int64)}

    def encode(self, x, memory, shared, key):
        whole = x + memory["error"]
        sent = whole.to(torch.bfloat16)
        return sent, {}, {"clients": torch.ones_like(x[:, 0])}, {"error": whole - sent}

    def open(self, x, side):
        return x.to(torch.float32)

    def settle(self, total, server, key):
        return total, {"rounds": server["rounds"] + 1}


@dataclass(frozen=True, repr=False)
class Vote(Value):
    """The sign that most rows vote for: a rule that is not linear."""

    linear = False

    def zero(self):
        return Mean().zero()

    def fold(self, partial, contribution):
        signs = contribution.means["update"].sign()
        return Mean().fold(partial, contribution._replace(means={**contribution.means, "update": signs}))

    def merge(self, a, b):
        return Mean().merge(a, b)

    def total(self, partial):
        return Mean().total(partial)

    def finish(self, total, cohort, population):
        mean = Mean().finish(total, cohort, population)
        if "update" not in mean.means:
            return mean
        return mean._replace(means={**mean.means, "update": mean.means["update"].sign()})


RECIPES = {
    "gd": lambda: recipes.gd(0.1),
    "sgd": lambda: recipes.sgd(0.1, batch=4),
    "distributed_gd": lambda: recipes.distributed_gd(0.1),
    "fedsgd": lambda: recipes.fedsgd(0.1, cohort=2),
    "fedavg": lambda: recipes.fedavg(0.1, batch=4),
    "local_sgd": lambda: recipes.local_sgd(0.1, steps=2, batch=4),
    "fedavgm": lambda: recipes.fedavgm(0.1, batch=4, cohort=2),
    "fedadam": lambda: recipes.fedadam(0.1, batch=4, cohort=0.7),
    "fedyogi": lambda: recipes.fedyogi(0.1, batch=4),
    "fedadagrad": lambda: recipes.fedadagrad(0.1, batch=4),
    "diloco": lambda: recipes.diloco(steps=2, batch=4),
}
CODECS = {
    "none": lambda: Identity(),
    "none-none": lambda: Identity() >> Identity(),
    "rotate": lambda: Rotate(),
    "quantize": lambda: Quantize(8),
    "halve": lambda: Halve(),
    "rotate-quantize": lambda: Rotate() >> Quantize(8),
    "quantize-rotate": lambda: Quantize(8) >> Rotate(),
}
AGGREGATORS = {
    "mean": lambda: Mean(),
    "mean-equal": lambda: Mean(weights="equal"),
    "mean-expected": lambda: Mean(over="expected"),
    "mean-equal-expected": lambda: Mean(weights="equal", over="expected"),
    "mean-float": lambda: Mean(sum="float"),
    "sum": lambda: Sum(),
    "sum-equal": lambda: Sum(weights="equal"),
    "vote": lambda: Vote(),
}
PACES = {"sync": lambda: Sync()}
# name: (the body, an engine for a chunk size, chunk sizes to compare)
ENGINES = {"lanes": ("lanes", InProcess, (3, 1)), "loop": ("loop", InProcess, (None,))}

# What cannot stand together, by (codec, aggregator); None is any.
REFUSED = {("quantize-rotate", None), ("rotate", "vote"), ("rotate-quantize", "vote")}
NAMES = {**PARTS, **{part.__name__: part for part in (Rotate, Quantize, Halve, Vote)}}


def thinned():
    """All of them; a fifth is quick, in which every two parts still meet on every engine."""
    for names in itertools.product(RECIPES, CODECS, AGGREGATORS, PACES, ENGINES):
        at = [
            list(table).index(name) for table, name in zip((RECIPES, CODECS, AGGREGATORS, PACES), names, strict=False)
        ]
        yield pytest.param(*names, marks=[pytest.mark.slow] if sum(at) % 5 else [], id="-".join(names))


DATA = classification((4, 4, 3), (3,), 3)
TASKS = {body: task_of(seeded(nn.Linear, 3, 3), DATA, body, torch.float32) for body in ("lanes", "loop")}
START = TASKS["lanes"].initial().theta


def build(recipe, codec, aggregator, pace):
    return replace(RECIPES[recipe](), codec=CODECS[codec](), aggregator=AGGREGATORS[aggregator](), pace=PACES[pace]())


def after(plan, engine, chunk):
    """θ after two rounds."""
    body, make, _ = ENGINES[engine]
    task = TASKS[body]
    running = make(task, DATA, chunk)
    state = State.first(plan, task, 0, Memory(plan.memory(task.layout)))
    for _ in range(2):
        state, report = step(plan, state, running)
        assert report.arrived == report.cohort and report.bytes_up > 0
    return state.model.theta


def exact(plan):
    return getattr(plan.aggregator, "sum", "exact") == "exact"


@pytest.mark.parametrize(("recipe", "codec", "aggregator", "pace", "engine"), list(thinned()))
def test_pair(recipe, codec, aggregator, pace, engine):
    refused = {(codec, aggregator), (codec, None), (None, aggregator)} & REFUSED
    if refused:
        plan = instead(recipe, codec, aggregator, pace)
    else:
        plan = build(recipe, codec, aggregator, pace)
        assert parse(repr(plan), NAMES) == plan
    theta, *others = [after(plan, engine, chunk) for chunk in ENGINES[engine][2]]
    assert bool(torch.isfinite(theta).all()) and not torch.equal(theta, START)
    for other in others:
        if exact(plan):
            assert torch.equal(theta, other)
        else:
            torch.testing.assert_close(theta, other, rtol=1e-4, atol=1e-6)


def instead(recipe, codec, aggregator, pace):
    """The plan with what the refusal says to write."""
    with pytest.raises(UsageError) as refusal:
        build(recipe, codec, aggregator, pace)
    error = refusal.value
    assert error.given and error.required and error.why
    part = parse(error.write, NAMES)
    slots = ("codec", Stage), ("aggregator", Aggregator), ("pace", Pace)
    (slot,) = (slot for slot, protocol in slots if isinstance(part, protocol))
    fixed = CODECS | {codec: lambda: part} if slot == "codec" else CODECS
    rest = {"codec": fixed[codec], "aggregator": AGGREGATORS[aggregator], "pace": PACES[pace]}
    try:
        return replace(RECIPES[recipe](), **{s: make() for s, make in rest.items() if s != slot}, **{slot: part})
    except UsageError as second:  # the codec mended, the aggregator may still be none for it
        return replace(RECIPES[recipe](), codec=part, aggregator=parse(second.write, NAMES))


@pytest.mark.parametrize("codec", [name for name in CODECS if (name, None) not in REFUSED])
def test_toy_codecs_conform(codec):
    check_stage(CODECS[codec]())


def test_toy_rule_conforms():
    check_aggregator(Vote())


@pytest.mark.parametrize("engine", ENGINES)
def test_a_rotation_is_undone(engine):
    """decode ∘ Σ ∘ encode = Σ, exactly: signs and places are moved back by the key that moved them."""
    plan = recipes.distributed_gd(0.1)
    assert torch.equal(after(replace(plan, codec=Rotate()), engine, 3), after(plan, engine, 3))


def test_every_two_parts_meet_in_the_quick_fifth():
    quick = [p.values for p in thinned() if not p.marks]
    for one, other in itertools.combinations(range(5), 2):
        tables = RECIPES, CODECS, AGGREGATORS, PACES, ENGINES
        met = {(names[one], names[other]) for names in quick}
        assert met == set(itertools.product(tables[one], tables[other]))


def test_tables_are_whole():
    """A recipe that is new has a row here."""
    assert set(RECIPES) == {recipe.__name__ for recipe in recipes.RECIPES}
    assert all(isinstance(make(), Plan) for make in RECIPES.values())
