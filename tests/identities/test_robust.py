"""Robust rules: their formulas, equivariance, what they withstand and what breaks them, and no influence of order."""

import pytest
import torch
from problems import classification, run, seeded, task_of
from quick_cases import one_in
from torch import nn

import atoll
from atoll import recipes
from atoll.base.errors import RunError, UsageError
from atoll.engine.inprocess import InProcessEngine
from atoll.plan.aggregate import (
    CenteredClip,
    Combine,
    GeometricMedian,
    Krum,
    Mean,
    Median,
    NormBound,
    TrimmedMean,
)
from atoll.plan.aggregate.rows import BLOCK, squared_distances
from atoll.plan.codec import Rotate
from atoll.plan.local import Dynamic, Normalised, Train
from atoll.plan.optimizer.rules import adam, sgd
from atoll.plan.pace import Buffered
from atoll.plan.plan import Plan
from atoll.plan.protocols import Contribution, Ids
from atoll.plan.registry import read_part
from atoll.testing import round_info

WIDE = torch.float64
RULES = [Median(), TrimmedMean(0.2), Krum(2), Krum(2, m=5), GeometricMedian(), CenteredClip(1.0), NormBound(5.0)]
EQUIVARIANT = RULES[:5]


def rows(n, d=6, seed=0, dtype=WIDE):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def aggregated(rule, x, weight=None, order=None, blocks=1):
    """The result of the rule for updates that arrive in this order, in some blocks."""
    order = torch.arange(len(x)) if order is None else order
    weight = torch.ones(len(x), dtype=torch.int64) if weight is None else weight
    partial = rule.zero()
    for some in order.chunk(blocks):
        ids = Ids(some, torch.zeros_like(some))
        given = Contribution({"update": x[some]}, {"rows": weight[some]}, weight[some], {}, {})
        partial = rule.fold(partial, given, ids)
    return rule.finalize(rule.total(partial), round_info()).means["update"]


@pytest.mark.parametrize("n", [1, 2, 5, 8, 13])
def test_coordinate_rules_are_their_formulas(n):
    x = torch.cat([rows(n, BLOCK + 3), torch.zeros(n, 2)], 1)
    ordered = x.sort(0).values
    torch.testing.assert_close(
        aggregated(Median(), x), (ordered[(n - 1) // 2] + ordered[n // 2]) / 2, rtol=1e-14, atol=0
    )
    for beta in (0.0, 0.2, 0.4):
        k = int(beta * n + 1e-9)
        torch.testing.assert_close(aggregated(TrimmedMean(beta), x), ordered[k : n - k].mean(0), rtol=1e-12, atol=1e-14)


def test_krum_is_its_formula_and_the_mean_of_all():
    x, f = rows(9), 2
    scores = [sorted(((a - b) ** 2).sum().item() for b in x)[1 : 9 - f - 1] for a in x]
    best = sorted(range(9), key=lambda i: sum(scores[i]))
    torch.testing.assert_close(aggregated(Krum(f), x), x[best[0]])
    torch.testing.assert_close(aggregated(Krum(f, m=3), x), x[best[:3]].mean(0))
    torch.testing.assert_close(aggregated(Krum(0, m=9), x), x.mean(0))


def test_geometric_median_minimises_the_sum_of_distances():
    x = rows(8)
    z = aggregated(GeometricMedian(), x).requires_grad_()
    (x - z).norm(dim=1).sum().backward()
    assert float(z.grad.norm()) < 1e-5
    two = rows(2)
    between = aggregated(GeometricMedian(), two)
    apart = float((two[0] - two[1]).norm())
    assert float((two[0] - between).norm() + (two[1] - between).norm()) == pytest.approx(apart, rel=1e-9)


def test_degenerate_rules_are_the_mean():
    x = rows(7)
    for rule in (TrimmedMean(0.0), Krum(0, m=7), NormBound(1e300), CenteredClip(1e9)):
        torch.testing.assert_close(aggregated(rule, x), aggregated(Mean("equal"), x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(aggregated(NormBound(1e300, Median()), x), aggregated(Median(), x))


@pytest.mark.parametrize("rule", EQUIVARIANT, ids=repr)
def test_equivariant_under_shift(rule):
    x, shift = rows(11), rows(1, seed=3)
    torch.testing.assert_close(aggregated(rule, x + shift), aggregated(rule, x) + shift[0], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_order_blocks_and_claimed_rows_change_no_bit(rule):
    x = rows(11, dtype=torch.float32)
    first = aggregated(rule, x)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(1))
    claimed = torch.ones(11, dtype=torch.int64)
    claimed[3] = 10**7
    assert torch.equal(first, aggregated(rule, x, order=order, blocks=4))
    assert torch.equal(first, aggregated(rule, x, claimed, order, 3))


@pytest.mark.parametrize("rule", RULES[:6], ids=repr)
@pytest.mark.parametrize("far", [1e9, -1e9])
def test_attackers_cannot_move_the_result_out(rule, far):
    honest = rows(9)
    found = aggregated(rule, torch.cat([honest, torch.full((2, 6), far, dtype=WIDE)]))
    low, high = honest.amin(0), honest.amax(0)
    slack = 0.0 if isinstance(rule, (Median, TrimmedMean, Krum)) else 10 * float(squared_distances(honest).max()) ** 0.5
    assert bool(((found >= low - slack) & (found <= high + slack)).all())


def test_more_attackers_than_stated_move_it():
    honest = rows(8)
    evil = torch.full((3, 6), 1e9, dtype=WIDE)
    assert float(aggregated(TrimmedMean(0.2), torch.cat([honest[:7], evil])).min()) > 1e6  # 3 of 10, and ⌊.2·10⌋ = 2
    assert float(aggregated(Median(), torch.cat([honest[:3], evil])).min()) > 1e6  # n/2


def test_one_row_moves_the_bounded_mean_by_two_r_over_n():
    x, r = rows(10), 0.5
    base = aggregated(NormBound(r), x)
    for k, value in ((0, 1e9), (3, -1e9)):
        changed = x.clone()
        changed[k] = value
        assert float((aggregated(NormBound(r), changed) - base).norm()) <= 2 * r / 10 + 1e-12


# in training


def trained(rule, rounds=2, local=None, **slots):
    data = classification((12, 9, 9, 7, 5, 4, 4))
    module = seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)))
    local = local or Train(sgd(0.1), steps=2, batch=4)
    engine = InProcessEngine(task_of(module, data, "lanes", torch.float32), data, slots.pop("chunk", None))
    return run(Plan(local, rule, **slots), engine, rounds)[0].model


@pytest.mark.parametrize("rule", one_in(3, RULES), ids=repr)
def test_chunks_change_no_bit(rule):
    one, all_ = (trained(rule, chunk=chunk) for chunk in (1, None))
    assert torch.equal(one.theta, all_.theta) and torch.equal(one.buffers, all_.buffers)
    assert read_part(repr(rule)) == rule


def test_buffers_are_those_of_the_rule():
    """Krum selects the buffers of the client whose update it selects; a server optimizer and corrections follow."""
    assert not torch.equal(trained(Krum(1)).buffers, trained(Mean("equal")).buffers)
    assert torch.isfinite(trained(Krum(1), optimizer=adam(0.01)).theta).all()
    plain = trained(TrimmedMean(0.0), 1)
    nova = trained(TrimmedMean(0.0), 1, Train(sgd(0.1), steps=2, batch=4, correction=Normalised()))
    torch.testing.assert_close(nova.theta, plain.theta)
    dyn = Train(sgd(0.1), steps=2, batch=4, correction=Dynamic(0.5))
    fn = Combine(lambda updates, weights: weights @ updates / weights.sum())
    torch.testing.assert_close(trained(fn, 3, dyn).theta, trained(Mean(), 3, dyn).theta)


@pytest.mark.slow
def test_worker_processes_change_no_bit():
    data, plan = classification((12, 9, 9, 7, 5, 4, 4)), Plan(recipes.fedavg(0.1).local, Krum(1, m=2))
    a, b = (
        atoll.train("softmax", data, plan, rounds=2, out=None, numerics="fused", engine=engine).reports[-1].fingerprint
        for engine in ("InProcess()", "Processes(workers=2)")
    )
    assert a == b


def test_refusals():
    local = recipes.fedavg(0.1).local
    for make, says in (
        (lambda: TrimmedMean(0.5), "beta"),
        (lambda: Krum(-1), "f"),
        (lambda: CenteredClip(0.0), "tau"),
        (lambda: NormBound(1.0, Mean()), "equal"),
        (lambda: Plan(local, Krum(1), pace=Buffered(2)), "late"),
        (lambda: Plan(local, Median(), codec=Rotate()), "sum"),
        (lambda: trained(Krum(3)), "at least 9"),
    ):
        with pytest.raises(UsageError, match=says):
            make()
    with pytest.raises(RunError, match="at least 5"):
        aggregated(Krum(1), rows(4))


def test_the_geometric_median_leaves_a_row_that_is_not_the_minimum():
    """The mean of these rows is a row: the plain iteration would stay there."""
    assert float(GeometricMedian().rule(torch.tensor([[0.0], [0.0], [0.0], [4.0], [16.0]]))) == pytest.approx(
        0, abs=1e-6
    )
    honest = torch.randn(9, 30, generator=torch.Generator().manual_seed(1))
    far = torch.full((1, 30), 100.0)
    middle = (honest.sum(0, keepdim=True) + far) / 10
    found = GeometricMedian().rule(torch.cat([honest, far, middle]))
    assert float((found - middle[0]).norm()) > 1
