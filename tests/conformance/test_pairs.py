"""Every recipe × codec × aggregator × pace × downlink × engine: it runs, or is refused with a line that builds.

A new pace, engine, codec or aggregator is one more row in its table; no test is added. A pair of parts that exclude
each other is a pair of names in `REFUSED`.
"""

import itertools
import random
from dataclasses import dataclass, replace

import pytest
import torch
from problems import classification, seeded, task_of
from torch import nn

from atoll import recipes
from atoll.base.errors import UsageError
from atoll.base.grammar import parse
from atoll.engine.client_state import Memory
from atoll.engine.inprocess import InProcessEngine
from atoll.engine.simulation.fleet import Fleet, HalfNormal
from atoll.plan.aggregate import Mean, Sum
from atoll.plan.codec import CODECS as KINDS
from atoll.plan.codec import (
    EF21,
    AdaptiveClip,
    Cast,
    Clip,
    Codec,
    Eden,
    Entropy,
    ErrorFeedback,
    Identity,
    LowRank,
    Noise,
    Quantize,
    RandomK,
    Rotate,
    Sign,
    TopK,
)
from atoll.plan.local import Newton
from atoll.plan.pace import Bounded, Buffered, Sync, hinge
from atoll.plan.plan import Plan
from atoll.plan.protocols import Aggregator, Declared, Local, Pace, Sampler, Stage
from atoll.plan.registry import PARTS
from atoll.plan.round import bind, step
from atoll.plan.state import State
from atoll.testing import check_aggregator, check_stage


@dataclass(frozen=True, repr=False)
class Halve(Codec):
    """Half the bits; the client stores the error for the next round, and the server counts the rounds.

    It requires its own sum over clients, as no codec of atoll does.
    """

    per_message = True

    def declare(self, layout):
        return {**super().declare(layout), "clients": Declared(1, layout.dtype, "sum")}

    def memory(self, layout):
        return {"error": torch.zeros(layout.d, dtype=layout.dtype)}

    def server(self, layout):
        return {"rounds": torch.zeros((), dtype=torch.int64)}

    def encode(self, x, memory, shared, key):
        whole = x + memory["error"]
        sent = whole.to(torch.bfloat16)
        return sent, {}, {"clients": torch.ones_like(x[:, 0])}, {"error": whole - sent}

    def decode(self, x, side):
        return x.to(torch.float32)

    def server_update(self, total, server, info, key):
        return total, {"rounds": server["rounds"] + 1}


@dataclass(frozen=True, repr=False)
class Vote(Aggregator):
    """The sign of most rows: a rule that is not linear."""

    linear = False

    def zero(self):
        return Mean().zero()

    def fold(self, partial, contribution, ids):
        signs = contribution.means["update"].sign()
        return Mean().fold(partial, contribution._replace(means={**contribution.means, "update": signs}), ids)

    def merge(self, a, b):
        return Mean().merge(a, b)

    def total(self, partial):
        return Mean().total(partial)

    def finalize(self, total, info):
        mean = Mean().finalize(total, info)
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
    "post_local_sgd": lambda: recipes.post_local_sgd(0.1, switch=1, steps=2, batch=4),
    "fedbuff": lambda: recipes.fedbuff(0.1, batch=4, cohort=2),
    "fedasync": lambda: recipes.fedasync(0.1, batch=4, cohort=2),
    "fedprox": lambda: recipes.fedprox(0.1, batch=4, mu=0.5),
    "scaffold": lambda: recipes.scaffold(0.1, batch=4),
    "feddyn": lambda: recipes.feddyn(0.1, batch=4, alpha=0.5),
    "fednova": lambda: recipes.fednova(0.1, batch=4, momentum=0.5, mu=0.5),
    "fedexp": lambda: recipes.fedexp(0.1, batch=4),
    "qffl": lambda: recipes.qffl(0.1, batch=4),
    "mimelite": lambda: recipes.mimelite(0.1, batch=4),
    "fedlc": lambda: recipes.fedlc(0.1, batch=4),
    "fedper": lambda: recipes.fedper(0.1, batch=4, own=("*bias",)),
    "fedbn": lambda: recipes.fedper(0.1, batch=4, own=("weight",)),  # the model has no layer of normalisation
    "fedrep": lambda: recipes.fedrep(0.1, batch=4, own=("*bias",)),
    "ditto": lambda: recipes.ditto(0.1, batch=4),
    "dp_fedavg": lambda: recipes.dp_fedavg(0.1, clip=1.0, noise=1.0, q=0.6, batch=4),
    "newton": lambda: recipes.newton(0.1),
}
CODECS = {
    "none": lambda: Identity(),
    "none-none": lambda: Identity() >> Identity(),
    "cast": lambda: Cast("bf16"),
    "quantize": lambda: Quantize(8),
    "ternary": lambda: Quantize(levels=1),
    "rotate": lambda: Rotate(),
    "eden": lambda: Eden(4),
    "top": lambda: TopK(0.3),
    "random": lambda: RandomK(0.5),
    "sign": lambda: Sign(),
    "factors": lambda: LowRank(1),
    "feedback": lambda: ErrorFeedback(TopK(0.3)),
    "shift": lambda: EF21(TopK(0.3)),
    "top-quantize": lambda: TopK(0.5) >> Quantize(8),
    "rotate-quantize": lambda: Rotate() >> Quantize(8),
    "random-eden": lambda: RandomK(0.5) >> Eden(2),
    "feedback-rotate-sign": lambda: ErrorFeedback(Rotate() >> Sign()),
    "shift-top-quantize": lambda: EF21(TopK(0.3)) >> Quantize(8),
    "quantize-entropy": lambda: Quantize(8) >> Entropy(),
    "halve": lambda: Halve(),
    "clip": lambda: Clip(1.0),
    "adaptive": lambda: AdaptiveClip(),
    "quantize-rotate": lambda: Quantize(8) >> Rotate(),
    "rotate-feedback": lambda: Rotate() >> ErrorFeedback(TopK(0.3)),
    "feedback-random": lambda: ErrorFeedback(RandomK(0.5)),
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
PACES = {
    "sync": lambda: Sync(),
    "over": lambda: Sync(over_select=1.3),
    "deadline": lambda: Sync(deadline_s=0.8, quorum=0.5),
    "buffered": lambda: Buffered(3),
    "buffered-hinge": lambda: Buffered(1, staleness=hinge(0.5, grace=1)),
    "bounded": lambda: Bounded(2),
}
DOWNLINKS = {
    "whole": lambda: Identity(),
    "down-top": lambda: TopK(0.3),
    "down-quantize": lambda: Quantize(8),
    "down-factors": lambda: LowRank(1),
    "down-entropy": lambda: Rotate() >> Quantize(8) >> Entropy(),
    "down-feedback": lambda: ErrorFeedback(TopK(0.3)),
    "down-random": lambda: RandomK(0.5),
}
# name: (the backend, an engine for a chunk size, chunk sizes to compare)
ENGINES = {"lanes": ("lanes", InProcessEngine, (None, 5)), "loop": ("loop", InProcessEngine, (None,))}
TABLES = RECIPES, CODECS, AGGREGATORS, PACES, DOWNLINKS, ENGINES

EXPECTED = {"mean-expected", "mean-equal-expected"}
FLYING = {"buffered", "buffered-hinge", "bounded"}
DECODED = {"rotate", "rotate-quantize", "random", "random-eden", "feedback-rotate-sign"}
SHIFTED = {"shift", "shift-top-quantize"}
LOSSY = CODECS.keys() - {"none", "none-none", "feedback", "feedback-rotate-sign", "shift"}
SOME = {"fedsgd", "fedavgm", "fedadam", "fedbuff", "fedasync"}  # recipes with a cohort of some clients
ALONE = {"quantize-rotate", "rotate-feedback", "feedback-random", "down-feedback", "down-factors", "down-random"}
REFUSED = {
    frozenset(pair)
    for ones, others in (
        (DECODED, {"vote"}),
        (SHIFTED, {"vote", "sum", "sum-equal", *EXPECTED, *FLYING}),
        (FLYING, {"vote"}),
        (EXPECTED, PACES.keys() - {"sync"}),
        ({"over"}, RECIPES.keys() - SOME),
        ({"fedasync"}, {"vote", *SHIFTED}),
        ({"clip", "adaptive"}, {"vote", "fedasync"}),
        ({"adaptive"}, FLYING),
        ({"dp_fedavg"}, PACES.keys() - {"sync"}),
        ({"scaffold", "feddyn", "fedexp", "qffl", "mimelite"}, FLYING),
        ({"scaffold", "feddyn"}, LOSSY),
        ({"feddyn", "fedexp", "qffl"}, {"sum", "sum-equal", *EXPECTED}),
        ({"feddyn", "fednova", "fedexp", "qffl", "mimelite"}, SHIFTED),
        ({"newton"}, CODECS.keys() - {"none", "none-none"}),
        ({"newton"}, AGGREGATORS.keys() - {"mean", "mean-float"}),
        ({"newton"}, {*FLYING, *DOWNLINKS} - {"whole"}),
    )
    for pair in itertools.product(ones, others)
}
NAMES = {**PARTS, **{part.__name__: part for part in (Halve, Vote)}}


def refuses(names):
    """Whether a plan of these parts must be refused."""
    return not ALONE.isdisjoint(names) or any(frozenset(pair) in REFUSED for pair in itertools.combinations(names, 2))


def covering():
    """Rows that cover every pair of entries except recipe and codec: each row adds the most new pairs.

    A codec compresses the update of any local part: half of the pairs of recipe and codec are enough for quick tests.
    """
    met, starts = set(), itertools.cycle(itertools.product(CODECS, AGGREGATORS))
    wanted = {pair for two in itertools.combinations(TABLES[1:], 2) for pair in itertools.product(*two)}
    wanted |= {pair for table in TABLES[2:] for pair in itertools.product(RECIPES, table)}
    for count, (codec, aggregator) in enumerate(starts):
        if count >= len(CODECS) * len(AGGREGATORS) and wanted <= met:
            return
        names = [None, codec, aggregator, None, None, None]
        for slot in (4, 3, 0, 5):
            table = [*TABLES[slot]]
            turned = table[count % len(table) :] + table[: count % len(table)]
            names[slot] = max(turned, key=lambda name: sum(p not in met for p in paired(names, slot, name)))
        met |= set(itertools.combinations(names, 2))
        yield tuple(names)


def paired(names, slot, name):
    """The pairs that a name in a slot forms with the names in the other slots, in the order of the slots."""
    for other, known in enumerate(names):
        if known is not None:
            yield (known, name) if other < slot else (name, known)


def thinned():
    """Quick: the rows of `covering`. Slow: recipe by codec, and codec by aggregator by pace, with random others."""
    quick, draw = set(covering()), random.Random(7)
    triples = itertools.product(*TABLES[1:4])
    slow = [(draw.choice([*RECIPES]), *three, *(draw.choice([*table]) for table in TABLES[4:])) for three in triples]
    both = itertools.product(RECIPES, CODECS)
    slow += [(*two, *(draw.choice([*table]) for table in TABLES[2:])) for two in both]
    for names in dict.fromkeys((*sorted(quick), *slow)):
        marks = [] if names in quick else [pytest.mark.slow]
        yield pytest.param(*names, marks=marks, id="-".join(names))


ROWS = list(thinned())


def some_of(rows):
    """The rows that are trained quickly, as a training takes most of the time: one in 96, and each part once."""
    seen = set()
    for i, row in enumerate(rows):
        parts = {*enumerate(row.values)}
        left_out = not row.marks and i % 96 and parts <= seen
        seen |= set() if left_out or row.marks else parts
        yield pytest.param(*row.values, marks=pytest.mark.slow, id=row.id) if left_out else row


TRAINED = list(some_of(ROWS))
DATA = classification((4, 4, 3, 4, 5, 2, 4, 3, 3, 4, 4, 6, 4, 4), (3,), 3)
FLEET = Fleet(HalfNormal(), uplink="1 kB/s", server="10 kB/s", dropout=0.1)
TASKS = {body: task_of(seeded(nn.Linear, 3, 3), DATA, body, torch.float32) for body in ("lanes", "loop")}
START = TASKS["lanes"].initial().theta


def build(recipe, codec, aggregator, pace, downlink):
    return replace(
        RECIPES[recipe](),
        codec=CODECS[codec](),
        aggregator=AGGREGATORS[aggregator](),
        pace=PACES[pace](),
        downlink=DOWNLINKS[downlink](),
        max_failed=1,
    )


def after(plan, engine, chunk, rounds=2):
    """θ after two rounds; each started client arrived, failed, was late or is still in flight."""
    body, make, _ = ENGINES[engine]
    task = TASKS[body]
    fleet = Fleet(0.1) if isinstance(plan.local, Newton) else FLEET  # without all clients there is no Newton step
    running = make(task, DATA, chunk, fleet)
    state = State.first(plan, task, 0, Memory(plan.memory(task)))
    bound, flying = bind(plan, running), 0
    for _ in range(rounds):
        state, report = step(bound, state, running)
        assert flying + report.cohort == report.arrived + len(report.failures) + report.late + report.flying
        assert report.arrived == 0 or report.bytes_up > 0
        flying = report.flying
    return state.model.theta


def exact(plan):
    return plan.aggregator.sum == "exact"


def test_every_pair_is_built_or_refused_with_a_line_that_builds():
    for names in {tuple(row.values[:-1]) for row in ROWS if not row.marks}:
        planned(*names)


@pytest.mark.parametrize(("recipe", "codec", "aggregator", "pace", "downlink", "engine"), TRAINED)
def test_pair_trains(recipe, codec, aggregator, pace, downlink, engine):
    plan = planned(recipe, codec, aggregator, pace, downlink)
    theta, *others = [after(plan, engine, chunk) for chunk in ENGINES[engine][2]]
    assert bool(torch.isfinite(theta).all()) and not torch.equal(theta, START)
    for other in others:
        if exact(plan):
            assert torch.equal(theta, other)
        else:
            torch.testing.assert_close(theta, other, rtol=1e-4, atol=1e-6)


def planned(*names):
    """The plan of these parts, or the one that the lines of the refusals lead to."""
    if refuses(names):
        return instead(*names)
    plan = build(*names)
    assert parse(repr(plan), NAMES) == plan
    return plan


def instead(recipe, codec, aggregator, pace, downlink):
    """Apply the line to write of each refusal in turn, until the plan builds."""
    makes = {
        "local": lambda: RECIPES[recipe]().local,
        "cohort": lambda: RECIPES[recipe]().cohort,
        "codec": CODECS[codec],
        "aggregator": AGGREGATORS[aggregator],
        "pace": PACES[pace],
        "downlink": DOWNLINKS[downlink],
    }
    for attempt in range(6):
        parts, slot = {}, "plan"
        try:
            for slot, make in makes.items():
                parts[slot] = make()
            slot = "plan"
            plan = replace(RECIPES[recipe](), max_failed=1, **parts)
        except UsageError as error:
            assert error.given and error.required and error.why
            part = parse(error.line, NAMES)
            if slot == "plan":
                slot = slot_of(part, error.given)
            makes[slot] = lambda part=part: part
        else:
            assert attempt, "it had to be refused"
            return plan
    raise AssertionError("the plan is still refused after six lines to write")


def slot_of(part, given):
    """The slot of the part that the line to write contains."""
    if isinstance(part, Stage):
        return "downlink" if given.startswith("downlink=") else "codec"
    slots = ("local", Local), ("aggregator", Aggregator), ("pace", Pace), ("cohort", Sampler)
    return next(slot for slot, protocol in slots if isinstance(part, protocol))


def test_toy_codec_conforms():
    check_stage(Halve())


def test_toy_rule_conforms():
    check_aggregator(Vote())


def test_every_two_parts_meet_in_the_quick_rows():
    quick = [p.values for p in ROWS if not p.marks]
    trained = [p.values for p in TRAINED if not p.marks]
    assert [{*names} for names in zip(*trained, strict=True)] == [{*table} for table in TABLES], "each is trained once"
    assert len(quick) < 1.4 * len(CODECS) * len(AGGREGATORS)
    for one, other in itertools.combinations(range(len(TABLES)), 2):
        rows = quick if (one, other) != (0, 1) else [tuple(p.values) for p in ROWS]
        met = {(names[one], names[other]) for names in rows}
        assert met == set(itertools.product(TABLES[one], TABLES[other]))


def test_tables_are_whole():
    """A new recipe or codec has a row here."""
    assert set(RECIPES) == {recipe.__name__ for recipe in recipes.RECIPES}
    assert all(isinstance(make(), Plan) for make in RECIPES.values())
    texts = [repr(make()) for name, make in CODECS.items() if name not in ALONE]
    # Noise is accepted with one aggregator and one pace: tests/identities/test_privacy_codecs.py has its pairs.
    assert all(any(f"{kind.__name__}(" in text for text in texts) for kind in KINDS if kind is not Noise)
