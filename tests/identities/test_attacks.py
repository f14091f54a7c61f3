"""Attacks: their formulas, a fixed share of attackers, what each rule withstands, and claims of rows."""

import contextlib
from statistics import NormalDist

import pytest
import torch
from problems import classification, run, seeded, task_of
from torch import nn

import atoll
from atoll import recipes
from atoll.base.errors import RunError, UsageError
from atoll.base.random import Key
from atoll.engine.inprocess import InProcessEngine
from atoll.plan.aggregate import (
    ALIE,
    Attacked,
    Claim,
    Combine,
    Gaussian,
    GeometricMedian,
    InnerProduct,
    Krum,
    Mean,
    Median,
    NormBound,
    SignFlip,
    Sum,
    TrimmedMean,
)
from atoll.plan.codec import Clip, Noise, Rotate
from atoll.plan.local import Newton, Train
from atoll.plan.optimizer.rules import sgd
from atoll.plan.pace import Buffered
from atoll.plan.plan import Plan
from atoll.plan.protocols import Contribution, Ids, Population
from atoll.plan.registry import read_part
from atoll.testing import round_info

WIDE = torch.float64
ALL = torch.tensor(1.0, dtype=WIDE)
ATTACKS = [SignFlip(5.0), Gaussian(1.0), ALIE(), InnerProduct(0.5), Claim(10**6, SignFlip(5.0))]


def population(n, rows=10):
    return Population(n, torch.full((n,), rows))


def updates(n, d=6, seed=0, dtype=WIDE):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def aggregated(rule, x, weight=None, order=None, blocks=1):
    """The mean of a bound rule over the updates x of clients 0, …, n − 1, which arrive in this order."""
    order = torch.arange(len(x)) if order is None else order
    weight = torch.full((len(x),), 10) if weight is None else weight
    partial = rule.zero()
    for some in order.chunk(blocks):
        given = Contribution({"update": x[some]}, {"loss": x[some, 0]}, weight[some], {}, {})
        partial = rule.fold(partial, given, Ids(some, torch.zeros_like(some)))
    return rule.finalize(rule.total(partial), round_info()).means["update"]


def test_attacks_are_their_formulas():
    own, honest = updates(4), updates(16, seed=1)
    key = Key(0).of(torch.tensor([1, 5, 7, 8]))
    flipped = SignFlip(5.0).updates(own, honest, key)
    torch.testing.assert_close(flipped, -5 * own)
    torch.testing.assert_close(InnerProduct(0.5).updates(own, honest, key)[2], -0.5 * honest.mean(0))
    z = NormalDist().inv_cdf((20 - 4 - 7) / 16)  # s = ⌊20/2 + 1⌋ − 4 = 7
    spread = ((honest - honest.mean(0)) ** 2).mean(0).sqrt()
    torch.testing.assert_close(ALIE().updates(own, honest, key)[1], honest.mean(0) - z * spread)
    noise = Gaussian(2.0).updates(updates(4, 5000), updates(16, 5000), key)
    assert float(noise.std()) == pytest.approx(2.0, rel=0.05) and not torch.equal(noise[0], noise[1])
    for few in (updates(1), updates(2)):
        assert bool(ALIE().updates(own, few, key).isfinite().all())
    assert Claim(7).claimed(torch.tensor([1, 9])).tolist() == [7, 7]
    torch.testing.assert_close(Claim(7, SignFlip(5.0)).updates(own, honest, key), flipped)


@pytest.mark.parametrize("of", [Mean(), Mean("equal"), Sum(), Median(), Krum(2), NormBound(1.0)], ids=repr)
def test_the_rule_receives_the_updates_of_the_attack(of):
    rule = Attacked(of, SignFlip(3.0), share=0.3, seed=4).bind(population(11), ALL)
    x, weight = updates(11, dtype=torch.float32), torch.arange(1, 12)
    sent = x.clone()
    assert rule.attackers.tolist() == sorted(set(rule.attackers.tolist())) and len(rule.attackers) == 3
    sent[rule.attackers] *= -3
    assert torch.equal(aggregated(rule, x, weight), aggregated(of.bind(population(11), ALL), sent, weight))
    none = Attacked(of, SignFlip(3.0), share=0.0).bind(population(11), ALL)
    assert torch.equal(aggregated(none, x, weight), aggregated(of.bind(population(11), ALL), x, weight))


@pytest.mark.parametrize("attack", ATTACKS, ids=repr)
def test_order_and_blocks_change_no_bit(attack):
    rule, x = Attacked(TrimmedMean(0.2), attack).bind(population(11), ALL), updates(11, dtype=torch.float32)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(1))
    assert torch.equal(aggregated(rule, x), aggregated(rule, x, order=order, blocks=4))
    assert read_part(repr(Attacked(Median(), attack, share=0.3))) == Attacked(Median(), attack, share=0.3)


def test_attackers_are_fixed_by_the_seed():
    ones = [Attacked(Median(), ALIE(), seed=s).bind(population(50), ALL).attackers.tolist() for s in (0, 0, 1)]
    assert ones[0] == ones[1] != ones[2] and len(ones[2]) == 10


def test_a_claim_gains_nothing():
    """A claim of 10⁹ rows counts as one client under a rule, and as `max_weight` rows under a mean with a limit."""
    x, share = updates(10, dtype=torch.float32), 0.2
    for of in (Median(), TrimmedMean(0.2), Krum(2), GeometricMedian(), NormBound(1.0), Mean("equal")):
        plain, claims = (
            aggregated(Attacked(of, attack, share).bind(population(10), ALL), x)
            for attack in (SignFlip(5.0), Claim(10**9, SignFlip(5.0)))
        )
        assert torch.equal(plain, claims)
    capped = Attacked(Mean(max_weight=10), Claim(10**9), share).bind(population(10), ALL)
    assert torch.equal(aggregated(capped, x), aggregated(Mean(), x))
    trusting = Attacked(Mean(), Claim(10**6), share).bind(population(10), ALL)
    torch.testing.assert_close(aggregated(trusting, x), x[trusting.attackers].double().mean(0), rtol=1e-4, atol=1e-4)
    with pytest.raises(UsageError, match="weights of this round"):
        aggregated(Attacked(Mean(), Claim(10**9), share).bind(population(10), ALL), x)


def test_a_limit_of_the_weight():
    x, rows = updates(4), torch.tensor([3, 10, 11, 10**8])
    limited = torch.tensor([3.0, 10, 10, 10], dtype=WIDE)
    torch.testing.assert_close(aggregated(Mean(max_weight=10), x, rows), limited @ x / limited.sum())
    assert torch.equal(aggregated(Mean(max_weight=10**9), x, rows), aggregated(Mean(), x, rows))
    chance = torch.tensor([0.5, 1, 1, 1], dtype=WIDE)
    bound = Mean(max_weight=10).bind(Population(4, rows), chance)
    assert bound.weigh(torch.arange(4), rows).tolist() == [3, 5, 5, 5]  # 6 : 10 : 10 : 10
    assert read_part(repr(Mean(max_weight=10))) == Mean(max_weight=10)


# in training


def trained(rule, rounds=2, chunk=None):
    data = classification((12, 9, 9, 7, 5, 4, 4))
    engine = InProcessEngine(task_of(seeded(nn.Linear, 4, 3), data, "fused", torch.float32), data, chunk)
    return run(Plan(Train(sgd(0.1), steps=2, batch=4), rule), engine, rounds)[0]


@pytest.mark.parametrize(
    "rule", [Attacked(Median(), Gaussian(1.0)), Attacked(Mean(), Claim(10**6)), Mean(max_weight=5)], ids=repr
)
def test_chunks_change_no_bit(rule):
    one, all_ = (trained(rule, chunk=chunk) for chunk in (1, None))
    assert torch.equal(one.model.theta, all_.model.theta)
    assert not torch.equal(one.model.theta, trained(Mean()).model.theta)


@pytest.mark.slow
def test_engines_change_no_bit():
    data = classification((12, 9, 9, 7, 5, 4, 4))
    for rule in (Attacked(Krum(1, m=2), Gaussian(1.0)), Mean(max_weight=5)):
        plan = Plan(recipes.fedavg(0.1).local, rule)
        a, b = (
            atoll.train("softmax", data, plan, rounds=2, out=None, numerics="fused", engine=engine)
            .reports[-1]
            .fingerprint
            for engine in ("InProcess()", "Processes(workers=2)")
        )
        assert a == b


class Ended:
    """An observer that keeps the run, also if it diverged."""

    def end(self, run):
        self.run = run


@pytest.mark.slow
def test_the_median_withstands_sign_flips_and_the_mean_does_not():
    """20 clients, of which 4 send −5 times their updates."""
    digits = atoll.data.load("digits").split(clients=20, by=atoll.data.Dirichlet(1.0))

    def accuracy(rule):
        plan, ended = Plan(recipes.fedavg(lr=0.3, epochs=2, batch=10).local, rule), Ended()
        with contextlib.suppress(RunError):
            atoll.train("softmax", digits, plan, rounds=15, out=None, evaluate_every=15, observers=(ended,))
        return ended.run.metrics["accuracy"]

    clean = accuracy(Median())
    assert clean > 0.8
    assert accuracy(Attacked(Median(), SignFlip(5.0), share=0.2)) >= clean - 0.03
    assert accuracy(Attacked(Mean("equal"), SignFlip(5.0), share=0.2)) < 0.5


def test_refusals():
    local, flip = recipes.fedavg(0.1).local, SignFlip(5.0)
    for make, says in (
        (lambda: Attacked(Median(), flip, share=0.5), "share"),
        (lambda: Attacked(Median(), flip, share=-0.1), "share"),
        (lambda: Attacked(Median(), "SignFlip"), "an attack"),
        (lambda: Attacked("Median", flip), "an aggregator"),
        (lambda: Attacked(Attacked(Median(), flip), flip), "second"),
        (lambda: Attacked(Mean(secure=True), flip), "secure"),
        (lambda: NormBound(1.0, Attacked(Median(), flip)), "equal"),
        (lambda: NormBound(1.0, Combine(lambda u, w: u[0])), "equal"),
        (lambda: SignFlip(0.0), "c"),
        (lambda: Claim(0), "rows"),
        (lambda: Claim(5, Median()), "an attack"),
        (lambda: Plan(local, Attacked(Median(), flip), pace=Buffered(2)), "late"),
        (lambda: Plan(local, Attacked(Mean(), flip), codec=Rotate()), "sum"),
        (lambda: Plan(local, Attacked(Mean("equal", "expected"), flip), codec=Clip(1.0) >> Noise(1.0)), "linear"),
        (lambda: Plan(Newton(), Attacked(Mean(), flip), sgd(1.0)), "loss"),
        (lambda: Plan(Newton(), Mean(max_weight=5), sgd(1.0)), "loss"),
        (lambda: trained(Attacked(Median(), flip, share=0.1)), "no client attacks"),
        (lambda: trained(Attacked(Krum(3), flip)), "at least 9"),
        (lambda: aggregated(Attacked(Median(), flip), updates(5)), "not bound"),
        (lambda: Mean(max_weight=0), "at least 1"),
        (lambda: Mean("equal", max_weight=5), "equal weights"),
        (lambda: Mean(max_weight=5, secure=True), "secure"),
    ):
        with pytest.raises(UsageError, match=says):
            make()
    rule = Attacked(Median(), flip, share=0.3).bind(population(10), ALL)
    one = Contribution({"update": updates(1)}, {}, torch.tensor([10]), {}, {})
    only = rule.fold(rule.zero(), one, Ids(rule.attackers[:1], torch.zeros(1, dtype=torch.int64)))
    with pytest.raises(RunError, match="honest"):
        rule.total(only)
    with pytest.raises(RunError, match="beyond"):
        aggregated(
            Attacked(Median(), SignFlip(1e38), share=0.3).bind(population(5), ALL),
            1e3 * updates(5, dtype=torch.float32),
        )
