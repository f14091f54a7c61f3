"""A secure sum in a simulation: rounded floats and words of a ring give the same sums, and nothing leaves the ring."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import atoll
from atoll.base.errors import UsageError
from atoll.base.random import Key
from atoll.plan import Plan
from atoll.plan.aggregate import Masks, Mean, exact
from atoll.plan.aggregate.ring import Grid, grid_of, largest_bits, numbers_of, rounded, words_of
from atoll.plan.codec import Clip, Quantize, RandomK, Rotate
from atoll.plan.codec.stage import flat_layout
from atoll.plan.local import Train
from atoll.plan.optimizer import sgd
from atoll.plan.pace import Buffered
from atoll.plan.protocols import Declared, Population
from atoll.plan.sampler import Everyone, Fraction, Poisson, Uniform, binomial_tail

MEAN = Declared(8, torch.float32, "mean", 1.0)


@pytest.mark.parametrize(
    ("clients", "weight", "ring", "bits"), [(100, 1, 32, 24), (500, 1, 32, 22), (30, 600, 32, 16), (30, 600, 64, 24)]
)
def test_the_number_of_bits_is_the_most_that_fits(clients: int, weight: int, ring: int, bits: int) -> None:
    assert largest_bits(Masks(ring=ring), clients, weight, torch.float32) == bits


def test_the_proof_is_tight() -> None:
    """n · w · B < R / 2 at the limit, and refused one bit above."""
    for clients, weight in ((7, 13), (1, 1), (1000, 999)):
        most = largest_bits(Masks(ring=64, bits=None), clients, weight, torch.float64)
        room = (1 << 63) // (clients * weight)
        largest = min(53, room.bit_length() - (room & (room - 1) == 0 and (1 << 63) % (clients * weight) == 0))
        assert most == min(24, largest)
        fits = max(b for b in range(1, 54) if clients * weight * (1 << b) < 1 << 63)
        assert largest_bits(Masks(ring=64, bits=fits), clients, weight, torch.float64) == fits
        if fits < 53:
            with pytest.raises(UsageError, match=f"Masks\\(bits={fits}\\)"):
                largest_bits(Masks(ring=64, bits=fits + 1), clients, weight, torch.float64)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1 << 30), k=st.integers(3, 40), d=st.integers(1, 300), weight=st.sampled_from([1, 7, 600]),
    ring=st.sampled_from([32, 64]), wide=st.booleans(), bound=st.sampled_from([1.0, 0.37, 3e-7, 5e4]),
)  # fmt: skip
def test_floats_and_words_give_the_same_sum(
    seed: int, k: int, d: int, weight: int, ring: int, wide: bool, bound: float
) -> None:
    dtype = torch.float64 if wide else torch.float32
    draw = np.random.default_rng(seed)
    weights = torch.from_numpy(draw.integers(1, weight + 1, k))
    grid = grid_of(Masks(ring=ring), MEAN._replace(dtype=dtype), k, weight, bound)
    x = torch.from_numpy(draw.uniform(-1.2 * bound, 1.2 * bound, (k, d))).to(dtype)
    x[0] = bound
    on_grid = rounded(x, grid, Key(seed).of(torch.arange(k)))
    assert bool((on_grid.abs() <= math.ldexp(grid.limit, -grid.exponent)).all())
    floats = exact.total(exact.add({}, on_grid, weights))
    words = words_of(on_grid, grid, weights, ring)
    total = words.sum(axis=0, dtype=words.dtype)
    torch.testing.assert_close(exact.total(numbers_of(total, grid)), floats, rtol=0, atol=0)
    integers = (on_grid.double() * math.ldexp(1, grid.exponent)).long()
    python = [sum(int(w) * int(q) for w, q in zip(weights, column, strict=True)) for column in integers.T]
    assert [int(v) for v in total.view(f"<i{ring // 8}")] == python


def test_the_rounding_is_unbiased_and_keeps_numbers_of_the_grid() -> None:
    grid = Grid(2, 1 << 10, True)
    x = torch.full((1, 40_000), 0.3)
    drawn = rounded(x, grid, Key(1).of(torch.tensor([0])))
    assert set(drawn.unique().tolist()) == {0.25, 0.5}
    assert float(drawn.mean()) == pytest.approx(0.3, abs=5 * 0.1 / 200)
    whole = torch.arange(-8, 9).float()[None] / 4
    torch.testing.assert_close(rounded(whole, grid, Key(2).of(torch.tensor([3]))), whole, rtol=0, atol=0)


def test_the_chunk_size_changes_no_rounding() -> None:
    grid = Grid(4, 1 << 12, True)
    x = torch.randn(5, 70)
    ids = torch.arange(5)
    together = rounded(x, grid, Key(7).of(ids))
    alone = torch.cat([rounded(x[i : i + 1], grid, Key(7).of(ids[i : i + 1])) for i in range(5)])
    torch.testing.assert_close(together, alone, rtol=0, atol=0)


def test_a_text_and_a_value_are_equal() -> None:
    assert Mean(secure=True) == Mean(secure=Masks()) and Mean(secure=False) == Mean()
    assert repr(Mean(secure=True)) == "Mean(secure=Masks())"
    from atoll.plan.registry import read_part

    assert read_part("Mean(secure=True)") == read_part("Mean(secure=Masks())") == Mean(secure=True)


# Training


@pytest.fixture(scope="module")
def digits():
    return atoll.data.load("digits").split(clients=12, by=atoll.data.Dirichlet(0.5))


def _plan(**changes) -> Plan:
    slots = dict(
        local=Train(sgd(0.1), epochs=1, batch=10), aggregator=Mean(secure=Masks(bound=8.0)), optimizer=sgd(1.0),
        cohort=Uniform(8),
    )  # fmt: skip
    return Plan(**{**slots, **changes})


def _run(data, plan, **settings):
    return atoll.train("softmax", data, plan, out=None, **{"rounds": 3, "seed": 1, **settings})


def _theta(run) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in run.model.parameters()])


def test_a_secure_sum_changes_a_model_by_its_rounding_only(digits) -> None:
    secure, plain = _run(digits, _plan()), _run(digits, _plan(aggregator=Mean()))
    difference = (_theta(secure) - _theta(plain)).abs().max()
    assert 0 < float(difference) < 3 * 8.0 * 2**-12
    assert secure.metrics["loss"] == pytest.approx(plain.metrics["loss"], rel=1e-3)


@pytest.mark.parametrize("stage", [RandomK(0.25), RandomK(0.25, unbiased=False), Rotate()])
def test_a_linear_stage_after_a_clip_keeps_a_bound(digits, stage) -> None:
    """|encode(x)| ≤ gain · |x|, with equality for one coordinate: the grid of the sum follows, and nothing is cut."""
    bound = stage.bind(flat_layout(64), before=Declared(64, torch.float32, "mean", 1.0))
    norms = bound.encode(torch.eye(64), {}, {}, Key(3))[0].norm(dim=1)
    assert float(norms.max()) == pytest.approx(bound.declare(flat_layout(64))["update"].bound, rel=1e-6)
    plans = [_plan(codec=Clip(1.0) >> stage, aggregator=Mean("equal", secure=secure)) for secure in (True, False)]
    secure, plain = (_run(digits, plan, rounds=1) for plan in plans)
    assert 0 < float((_theta(secure) - _theta(plain)).abs().max()) < 2**-18


def test_chunks_change_no_bit(digits) -> None:
    torch.testing.assert_close(_theta(_run(digits, _plan(), chunk=1)), _theta(_run(digits, _plan())), rtol=0, atol=0)


@pytest.mark.slow
def test_processes_change_no_bit(digits) -> None:
    processes = _run(digits, _plan(), engine="Processes(workers=2)")
    torch.testing.assert_close(_theta(processes), _theta(_run(digits, _plan())), rtol=0, atol=0)


def test_numbers_that_are_cut_are_counted(digits) -> None:
    assert _run(digits, _plan()).metrics["clamped"] == 0
    assert _run(digits, _plan(aggregator=Mean(secure=Masks(bound=1e-3)))).metrics["clamped"] > 10


def test_the_report_has_no_value_of_one_client(digits) -> None:
    for report in _run(digits, _plan()).reports:
        assert set(report.clients) == {"id", "bytes_up", "bytes_down"}
        assert report.metrics["loss"] > 0


def test_a_round_with_too_few_clients_has_no_update(digits) -> None:
    plan = _plan(cohort=Everyone(), max_failed=1.0, aggregator=Mean(secure=Masks(least=12, bound=8.0)))
    run = _run(digits, plan, rounds=1, fleet="Fleet(dropout=0.3)")
    assert run.reports[0].arrived == 0
    assert {failure.stage for failure in run.failures} >= {"sum"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"aggregator": Mean(secure=True)}, "the vector update, which has no bound"),
        ({"codec": Quantize(4)}, "a codec whose messages can be added"),
        ({"pace": Buffered(2)}, "Sync"),
        ({"aggregator": Mean(sum="float", secure=True)}, 'sum="exact"'),
        ({"aggregator": Mean(secure=Masks(bits=30, bound=8.0))}, "at most"),
        ({"aggregator": Mean(secure=Masks(least=9, bound=8.0))}, "at least 9 clients"),
    ],
)
def test_plans_without_a_secure_sum_are_refused(digits, changes, words) -> None:
    with pytest.raises(UsageError, match=words):
        _run(digits, _plan(**changes), rounds=1)


def test_bad_masks() -> None:
    for wrong in ({"least": 2}, {"ring": 16}, {"bits": 0}, {"bound": 0.0}, {"threshold": 1}, {"loss": -1.0}):
        with pytest.raises(UsageError):
            Masks(**wrong)
    with pytest.raises(UsageError, match="Mean\\(secure=True\\)"):
        Mean(secure=3)


def test_the_largest_cohort() -> None:
    population = Population(200, torch.ones(200, dtype=torch.int64))
    assert Everyone().largest(population) == 200 and Uniform(7).largest(population) == 7
    assert Fraction(0.1).largest(population) == 20
    from scipy.stats import binom

    for n, q in ((200, 0.1), (1000, 0.5), (10**6, 0.001), (5, 0.9)):
        x = binomial_tail(n, q, 2.0**-40)
        assert binom.sf(x, n, q) <= 2.0**-40 * (1 + 1e-6) and (x == 0 or binom.sf(x - 1, n, q) > 2.0**-40 * (1 - 1e-6))
    assert Poisson(0.1).largest(population) == binomial_tail(200, 0.1, 2.0**-40)


def test_the_weight_of_the_proof_is_the_number_of_rows_held(digits) -> None:
    """A client that makes one step of ten rows still weighs as much as all its rows."""
    plan = _plan(local=Train(sgd(0.1), steps=1, batch=10), cohort=Everyone())
    training = atoll.rounds("softmax", digits, plan, rounds=1)
    grid = training.plan.aggregator._grids["update"]
    assert 12 * int(digits.sizes.max()) * grid.limit < 1 << 31 <= 12 * int(digits.sizes.max()) * grid.limit * 2


def test_infinity_drops_its_client_and_is_not_cut() -> None:
    x = torch.tensor([[1.0, 2.0], [math.inf, 0.0]])
    found = rounded(x, Grid(4, 1 << 8, True), Key(1).of(torch.tensor([0, 1])))
    assert bool(found[0].isfinite().all()) and bool(found[1].isnan().all())


def test_work_that_grows_cuts_no_count(digits) -> None:
    from atoll.plan.schedule import constant, hold

    local = Train(sgd(0.01), steps=hold(1.0, rounds=1) >> constant(20.0), batch=10)
    secure, plain = (
        _run(digits, _plan(local=local), rounds=2),
        _run(digits, _plan(local=local, aggregator=Mean()), rounds=2),
    )
    assert secure.metrics["loss"] == pytest.approx(plain.metrics["loss"], rel=1e-3)


@pytest.mark.parametrize("masks", [Masks(bound=1.0, neighbours=4), Masks(bound=1.0, neighbours=200, threshold=2)])
def test_a_graph_that_protects_nothing_is_refused(masks) -> None:
    vectors = {"update": MEAN}
    with pytest.raises(UsageError):
        Mean(secure=masks).secured(vectors, 1000 if masks.threshold else 12, 1, 10)
