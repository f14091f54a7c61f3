"""Robust rules: their formulas, equivariance, what they withstand and what breaks them, and no influence of order."""

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from problems import classification, run, seeded, task_of
from quick_cases import one_in
from torch import nn

import atoll
from atoll import recipes
from atoll.base.errors import RunError, UsageError
from atoll.base.random import Key
from atoll.compute import limits
from atoll.compute.native import BuildError, library, widths
from atoll.engine.inprocess import InProcessEngine
from atoll.plan.aggregate import (
    Attacked,
    Bucketing,
    Bulyan,
    CenteredClip,
    Combine,
    DnC,
    FLTrust,
    Foundation,
    GeometricMedian,
    Krum,
    Mean,
    Median,
    NormBound,
    SignFlip,
    TrimmedMean,
    robust,
)
from atoll.plan.aggregate.rows import BLOCK, squared_distances
from atoll.plan.codec import Rotate
from atoll.plan.local import Dynamic, Normalised, Train
from atoll.plan.optimizer.rules import adam, sgd
from atoll.plan.pace import Buffered
from atoll.plan.plan import Plan
from atoll.plan.protocols import Contribution, Ids
from atoll.plan.registry import read_part
from atoll.plan.sampler import Uniform
from atoll.testing import round_info

WIDE = torch.float64
RULES = [
    *(Median(), TrimmedMean(0.2), Krum(2), Krum(2, m=5), GeometricMedian(), Bulyan(2), DnC(2), Bucketing(2, Median())),
    *(CenteredClip(1.0), FLTrust(2), NormBound(5.0), Foundation(TrimmedMean(0.2)), Foundation(Krum(2))),
]
EQUIVARIANT = [*RULES[:8], *RULES[11:]]


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
    for rule in (TrimmedMean(0.0), Krum(0, m=7), NormBound(1e300), CenteredClip(1e9), Bulyan(0), DnC(0)):
        torch.testing.assert_close(aggregated(rule, x), aggregated(Mean("equal"), x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(aggregated(NormBound(1e300, Median()), x), aggregated(Median(), x))


@pytest.mark.parametrize("rule", EQUIVARIANT, ids=repr)
def test_equivariant_under_shift_and_permutation(rule):
    x, shift, near = rows(11), rows(1, seed=3), {"rtol": 1e-8, "atol": 1e-8}
    found = aggregated(rule, x)
    torch.testing.assert_close(aggregated(rule, x + shift), found + shift[0], **near)
    torch.testing.assert_close(aggregated(rule, x.flip(1)), found.flip(0), **near)
    # Buckets are drawn for the order of clients. Two nearest neighbours of Bulyan have equal scores.
    if not isinstance(rule, (Bucketing, Bulyan)):
        torch.testing.assert_close(aggregated(rule, x.roll(3, 0)), found, **near)


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_order_blocks_and_claimed_rows_change_no_bit(rule):
    x = rows(11, dtype=torch.float32)
    first = aggregated(rule, x)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(1))
    claimed = torch.ones(11, dtype=torch.int64)
    claimed[3] = 10**7
    assert torch.equal(first, aggregated(rule, x, order=order, blocks=4))
    assert torch.equal(first, aggregated(rule, x, claimed, order, 3))


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_rows_in_files_change_no_bit(rule, monkeypatch):
    """Rows beyond the limit are in files: those that arrive, those that cross to another process, and the matrix."""
    x, ones = rows(11, BLOCK + 3, dtype=torch.float32), torch.ones(11, dtype=torch.int64)
    want = aggregated(rule, x)
    monkeypatch.setattr(limits, "ROW_BYTES", 5 * x[0].nbytes)
    assert torch.equal(want, aggregated(rule, x, order=torch.arange(11).flip(0), blocks=4))
    halves = []
    for some in ones.cumsum(0).sub(1).split([1, 10]):
        given = Contribution({"update": x[some]}, {}, ones[some], {}, {})
        halves.append(rule.fold(rule.zero(), given, Ids(some, 0 * some)))
    whole = rule.merge(*[type(part).of(part.tensors()) for part in halves])
    assert len(halves[1].files) == len(whole.files) == 1
    assert torch.equal(want, rule.finalize(rule.total(whole), round_info()).means["update"])


def test_a_full_disk_is_an_error(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(limits, "ROW_BYTES", 50)
    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(RunError, match="GB free"):
        aggregated(Median(), rows(9))


@pytest.mark.parametrize("dtype", [torch.float32, WIDE])
def test_native_code_changes_no_bit(dtype, monkeypatch):
    try:
        library("ranks", *widths(dtype))
    except BuildError as error:
        pytest.skip(str(error))
    for n, d in ((1, 3), (2, 64), (9, 130), (40, 65)):
        x = rows(n, d, dtype=dtype).round(decimals=1)
        x[:, 0] = -0.0
        for rule in (Median(), TrimmedMean(0.0), TrimmedMean(0.3)):
            monkeypatch.setattr(robust, "_NATIVE", True)
            found = rule.rule(x)
            monkeypatch.setattr(robust, "_NATIVE", False)
            assert torch.equal(found.view(torch.int64), rule.rule(x).view(torch.int64))
    monkeypatch.undo()
    assert bool(Median().rule(torch.full((3, 2), float("nan"), dtype=dtype)).isnan().all())


@pytest.mark.parametrize("rule", [*RULES[:10], *RULES[11:]], ids=repr)
@pytest.mark.parametrize("far", [1e9, -1e9])
def test_attackers_cannot_move_the_result_out(rule, far):
    honest = rows(9)
    found = aggregated(rule, torch.cat([honest, torch.full((2, 6), far, dtype=WIDE)]))
    low, high = honest.amin(0), honest.amax(0)
    exact = (Median, TrimmedMean, Krum, Bulyan, Bucketing, Foundation)
    slack = 1e-9 if isinstance(rule, exact) else 10 * float(squared_distances(honest).max()) ** 0.5
    assert bool(((found >= low - slack) & (found <= high + slack)).all())


@pytest.mark.parametrize("rule", [*RULES[:7], RULES[8], DnC(1, iterations=3, coordinates=4)], ids=repr)
def test_buckets_of_one_client_are_the_rule(rule):
    x = rows(11, dtype=torch.float32)
    assert torch.equal(aggregated(Bucketing(1, rule), x), aggregated(rule, x))


def test_buckets_are_means_and_differ_less():
    x = rows(12)
    torch.testing.assert_close(aggregated(Bucketing(3, TrimmedMean(0.0)), x), x.mean(0))
    rule = Bucketing(3, Median()).in_round({}, Key(5))
    order = Key(5).fold("buckets").permutation(12)
    means = torch.stack([x[order // 3 == j].mean(0) for j in range(4)])
    torch.testing.assert_close(aggregated(rule, x), means.sort(0).values[1:3].mean(0))
    assert not torch.equal(aggregated(rule, x), aggregated(rule.in_round({}, Key(6)), x))
    # A label that a third of the clients have: the median of clients loses it, that of buckets does not.
    rare = torch.cat([torch.ones(60, 1, dtype=WIDE), torch.zeros(120, 1, dtype=WIDE)])
    assert float(aggregated(Median(), rare)) == 0 < float(aggregated(Bucketing(6, Median()), rare))


def test_bulyan_is_its_formula():
    x, f = rows(12), 2
    left, chosen = list(range(12)), []
    for _ in range(12 - 2 * f):
        scores = [sorted(float((x[a] - x[b]).square().sum()) for b in left)[1 : len(left) - f - 1] for a in left]
        chosen.append(left.pop(min(range(len(left)), key=lambda i: sum(scores[i]))))
    some = x[sorted(chosen)]
    middle = some.sort(0).values[3:5].mean(0)
    near = (some - middle).abs().sort(0).indices[: 12 - 4 * f]
    torch.testing.assert_close(aggregated(Bulyan(f), x), some.gather(0, near).mean(0))


def test_dnc_is_its_formula_and_leaves_out_the_main_direction():
    x = rows(9) + torch.outer(torch.tensor([3.0] * 2 + [0.0] * 7, dtype=WIDE), torch.ones(6, dtype=WIDE))
    centred = x - x.mean(0)
    scores = (centred @ torch.linalg.svd(centred).Vh[0]).square()
    kept = scores.argsort()[: 9 - 2]
    torch.testing.assert_close(aggregated(DnC(2), x), x[kept.sort().values].mean(0))
    some = aggregated(DnC(1, iterations=3, coordinates=2), x)  # an update remains only if it does so in each draw
    assert any(torch.allclose(some, x[list(left)].mean(0)) for k in (6, 7, 8) for left in combinations(range(9), k))


def test_fltrust_is_its_formula():
    x, own = rows(6), 2
    trust = (x @ x[own] / x.norm(dim=1) / x[own].norm()).clamp(min=0)
    scaled = x / x.norm(dim=1, keepdim=True) * x[own].norm()
    torch.testing.assert_close(aggregated(FLTrust(own), x), trust @ scaled / trust.sum())
    against = torch.stack([x[own], -x[own], 0 * x[own], -1e9 * x[own]])
    torch.testing.assert_close(aggregated(FLTrust(0), against), x[own])
    torch.testing.assert_close(aggregated(FLTrust(1), x[:1].expand(3, -1)), x[0])
    with pytest.raises(RunError, match="client 9 is missing"):
        aggregated(FLTrust(9), x)


def test_foundation_is_its_formula_and_withstands_more():
    x = rows(9)
    chosen = torch.minimum((x - x.amax(0)).norm(dim=1), (x - x.amin(0)).norm(dim=1)).argmax()
    more = torch.cat((x, x[chosen].expand(4, -1)))
    for rule in (Median(), TrimmedMean(0.2), Krum(2, m=3), GeometricMedian(), Bulyan(1)):
        torch.testing.assert_close(aggregated(Foundation(rule), x), aggregated(rule, more))
        torch.testing.assert_close(aggregated(Foundation(rule, share=0.0), x), aggregated(rule, x))
    attacked = torch.cat((x[:6], torch.full((3, 6), 1e9, dtype=WIDE)))  # three of nine, and ⌊.25 · 9⌋ = 2
    assert float(aggregated(TrimmedMean(0.25), attacked).min()) > 1e6
    assert float(aggregated(Foundation(TrimmedMean(0.25)), attacked).max()) <= x[:6].max()


def test_centered_clip_starts_at_the_last_result():
    rule, x = CenteredClip(0.1), rows(7)
    last = torch.full((6,), 40.0, dtype=WIDE)
    found = aggregated(rule.in_round({"last": last}, Key(0)), x)
    step = last.clone()
    for _ in range(5):
        off = x - step
        step = step + (off * (0.1 / off.norm(dim=1, keepdim=True)).clamp(max=1)).mean(0)
    torch.testing.assert_close(found, step)
    first = aggregated(rule.in_round(rule.server(None), Key(0)), x)
    assert torch.equal(first, aggregated(rule, x))


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


@pytest.mark.parametrize("rule", one_in(6, [Bulyan(1) if rule == Bulyan(2) else rule for rule in RULES]), ids=repr)
def test_chunks_change_no_bit(rule):
    one, all_ = (trained(rule, chunk=chunk) for chunk in (1, None))
    assert torch.equal(one.theta, all_.theta) and torch.equal(one.buffers, all_.buffers)
    assert read_part(repr(rule)) == rule


@pytest.mark.slow
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


def test_a_resumed_run_ends_in_the_same_bits(tmp_path):
    """The state of the rule is in the checkpoint, also under an attack; draws belong to the round."""
    data = classification((12, 9, 9, 7, 5, 4, 4))
    plan = Plan(recipes.fedavg(0.1).local, Attacked(Bucketing(2, CenteredClip(0.05)), SignFlip(3.0)))
    words = {"report": False, "checkpoint_s": 0.0}
    whole = atoll.train("softmax", data, plan, rounds=4, out=None, **words)
    atoll.train("softmax", data, plan, rounds=2, out=tmp_path, **words)
    again = atoll.train("softmax", data, plan, rounds=4, resume=next(tmp_path.iterdir()), **words)
    assert again.reports[-1].fingerprint == whole.reports[-1].fingerprint
    without = replace(plan, aggregator=replace(plan.aggregator, of=Bucketing(2, Median())))
    assert atoll.train("softmax", data, without, rounds=4, out=None).reports[-1].fingerprint != whole


@pytest.mark.slow
def test_worker_processes_change_no_bit(monkeypatch):
    monkeypatch.setattr(limits, "ROW_BYTES", 100)
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
        (lambda: trained(Bulyan(2)), "at least 11"),
        (lambda: trained(DnC(2, iterations=4)), "at least 9"),
        (lambda: trained(Bucketing(3, Krum(1))), "at least 13"),
        (lambda: Bucketing(2, FLTrust(0)), "sees rows only"),
        (lambda: Bucketing(2, NormBound(1.0)), "goes outside"),
        (lambda: NormBound(1.0, Combine(aggregated)), "equal"),
        (lambda: Foundation(FLTrust(0)), "sees rows only"),
        (lambda: Foundation(Median(), share=1.0), "majority"),
        (lambda: trained(Foundation(Krum(3))), "at least 9"),
        (lambda: trained(FLTrust(7)), "from 0 to 6"),
        (lambda: trained(FLTrust(0), cohort=Uniform(5)), "may leave client 0 out"),
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


def test_the_weights_of_a_geometric_median_at_a_row_are_float64():
    """The minimum is one of the rows, or the iteration starts at a row: the mean of all rows."""
    for rows in ([[1.0], [1.0], [1.0], [900.0]], [[-3.0, 0.0], [3.0, 0.0], [0.0, 3.0], [0.0, -3.0], [0.0, 0.0]]):
        weights = GeometricMedian().row_weights(torch.tensor(rows))
        assert weights.dtype == torch.float64 and abs(float(weights.sum()) - 1) < 1e-12
    assert weights.tolist() == [0, 0, 0, 0, 1]
