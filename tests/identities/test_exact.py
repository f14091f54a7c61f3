"""The sum does not depend on order: same bits for every order, grouping, chunk and thread count (identity 4).

The bound of `atoll.plan.aggregate.exact`, with 2^e above the largest number of a contribution's block: the digits of a
number are off by at most 2^(e−27) in float32 and 2^(e−53) in float64, or by 2^−1067 if that is larger. The finished
digits are added with the relative error of a float64 or two.
"""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import needs_native, threads

from atoll.base import grammar
from atoll.base.errors import UsageError
from atoll.compute import limits, native
from atoll.compute.buffer_pool import BufferPool, use_pool
from atoll.compute.tensor_notes import attach
from atoll.plan.aggregate import Mean, PartialSum, Sum, exact
from atoll.plan.protocols import Contribution, Ids
from atoll.plan.registry import PARTS

DTYPES = {torch.float32: np.float32, torch.float64: np.float64}
BELOW = {torch.float32: 27, torch.float64: 53}
BLOCK = exact.BLOCK

# log10 of the smallest and the largest magnitude: typical updates, and the full range
USUAL, ALL32, ALL64 = (-12.0, 19.0), (-46.0, 38.5), (-324.0, math.log10(exact.LARGEST))

seeds = st.integers(0, 2**32 - 1)


@pytest.fixture(scope="module", autouse=True, params=["torch", pytest.param("native", marks=needs_native)])
def reads(request):
    """Read digits by torch operations or in native code, however few they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact, "_NATIVE", request.param == "native")
        yield request.param


@st.composite
def problems(draw, width=st.sampled_from([1, 2, 7, 300, BLOCK - 1, BLOCK + 1, 2 * BLOCK + 5])):
    """(rows [n, d], weights [n], a generator for orders and groupings)."""
    rng = np.random.default_rng(draw(seeds))
    dtype = draw(st.sampled_from(list(DTYPES)))
    span = draw(st.sampled_from([USUAL, ALL32 if dtype == torch.float32 else ALL64]))
    n, d = draw(st.integers(1, 9)), draw(width)
    low, high = np.sort(rng.uniform(*span, 2)) if draw(st.booleans()) else span
    with np.errstate(under="ignore", over="ignore"):
        rows = (10.0 ** rng.uniform(low, high, (n, d)) * rng.choice([-1, 1], (n, d))).astype(DTYPES[dtype])
    rows[rng.random((n, d)) < draw(st.sampled_from([0.0, 0.5]))] = 0
    if draw(st.booleans()):  # cancellation: every row but one has its opposite
        rows[n - n // 2 :] = -rows[: n // 2]
    largest = min(exact.LARGEST, float(np.finfo(DTYPES[dtype]).max))
    rows = torch.from_numpy(np.clip(rows, -largest, largest))
    return rows, torch.from_numpy(rng.integers(1, draw(st.sampled_from([2, 1000, 2**25])), n)), rng


STARTS = Ids(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))  # a mean does not read them


def contribution(rows, weights, index):
    index = torch.as_tensor(index, dtype=torch.int64)
    some, weight = rows[index], weights[index]
    return Contribution({"update": some}, {"loss": some[:, 0], "rows": weight}, weight, {"steps": weight}, {})


def bits(partial, aggregator):
    """A total as bytes, so that equality is bit-identity, including the signs of zeros."""
    total = aggregator.total(partial)
    tensors = {**total.means, **total.sums, **total.counters, "weight": total.weight, "arrived": total.arrived}
    return {name: t.numpy().tobytes() for name, t in tensors.items()}


def pieces(rng, n):
    """0 … n−1 in a random order, cut at random positions."""
    cuts = np.sort(rng.integers(0, n + 1, rng.integers(0, n)))
    return [piece for piece in np.split(rng.permutation(n), cuts) if len(piece)]


def grouped(aggregator, rows, weights, rng):
    """The total by another way: workers take clients in any order and chunks; partials are serialized and merged."""
    workers = [aggregator.zero() for _ in range(rng.integers(1, 4))]
    for piece in pieces(rng, len(rows)):
        w = rng.integers(len(workers))
        workers[w] = aggregator.fold(workers[w], contribution(rows, weights, piece), STARTS)
    while len(workers) > 1:
        one, other = (workers.pop(rng.integers(len(workers))) for _ in range(2))
        other = PartialSum.of({name: t.clone() for name, t in other.tensors().items()})
        workers.append(aggregator.merge(one, other))
    return workers[0]


@pytest.mark.parametrize("aggregator", [Mean(), Mean(weights="equal"), Sum()], ids=repr)
@given(problems())
def test_same_bits_for_every_order_and_grouping(aggregator, problem):
    rows, weights, rng = problem
    whole = aggregator.fold(aggregator.zero(), contribution(rows, weights, range(len(rows))), STARTS)
    expected = bits(whole, aggregator)
    assert bits(grouped(aggregator, rows, weights, rng), aggregator) == expected


@pytest.mark.parametrize(
    ("dtype", "bad"),
    [*((dtype, bad) for dtype in DTYPES for bad in (math.nan, math.inf, -math.inf)), (torch.float64, -(2.0**901))],
)
def test_values_that_are_not_finite_are_found_before_the_sum(dtype, bad, monkeypatch):
    monkeypatch.setattr(limits, "NATIVE_PEAKS", 1)
    rows = torch.ones(3, BLOCK + 7, dtype=dtype)
    rows[0, 0] = -float(min(exact.LARGEST, torch.finfo(dtype).max))
    assert exact.bounded(rows)
    rows[1, BLOCK + 2] = bad
    assert not exact.bounded(rows)
    if exact._library(rows) is not None:
        with pytest.raises(UsageError, match="not finite"):
            exact.add({}, rows, torch.ones(3))


@needs_native
@given(problems())
def test_native_code_reads_the_same_digits(problem):
    """A sum that one implementation has begun can be continued by the other."""
    rows, weights, _ = problem
    sums = []
    for first, second in ((True, True), (False, False), (True, False)):
        digits = {}
        for part, natively in ((slice(1), first), (slice(1, None), second)):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(exact, "_NATIVE", natively)
                digits = exact.add(digits, rows[part], weights[part]) if len(rows[part]) else digits
        sums.append(exact.total(digits).numpy().tobytes())
        totals = []
        for natively in (True, False):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(exact, "_NATIVE", natively)
                totals.append(exact.total(digits).numpy().tobytes())
        assert totals[0] == totals[1]
    assert sums[0] == sums[1] == sums[2]


@given(problems(), st.integers(1, 2**20), st.integers(1, 40))
def test_clients_of_equal_weight_are_added_as_single_clients(problem, weight, times):
    """In single precision the digits of two clients of equal weight are read at once."""
    rows, _, rng = problem
    rows = rows[torch.from_numpy(rng.integers(0, len(rows), times))]
    weights, alone = torch.full((times,), min(weight, exact.CAPACITY // times)), {}
    for row, own in zip(rows, weights, strict=True):
        exact.add(alone, row[None], own[None])
    assert torch.equal(exact.total(exact.add({}, rows, weights)), exact.total(alone))


@pytest.mark.parametrize("many", [4096, 4097])
def test_as_many_as_there_can_be_of_the_largest_digits(many):
    largest = np.nextafter(np.float32(2.0**25), np.float32(0))  # just below the next place
    rows = torch.full((many, 1), float(largest))
    got = exact.total(exact.add({}, rows, torch.full((many,), exact.CAPACITY // many)))
    assert Fraction(got.item()) == Fraction(float(largest)) * many * (exact.CAPACITY // many)


@given(problems())
def test_cached_maxima_of_blocks_change_no_bit(problem):
    rows, weights, _ = problem
    found, finite = exact.total(exact.add({}, rows, weights)), exact.bounded(rows)
    whole = torch.nn.functional.pad(rows.abs(), (0, -rows.shape[1] % BLOCK))
    attach(rows, "peaks", whole.unflatten(1, (-1, BLOCK)).amax(2).contiguous())
    assert exact.bounded(rows) == finite
    assert torch.equal(exact.total(exact.add({}, rows, weights)), found)
    rows[0, 0] = math.inf  # the cached maxima are no longer valid
    assert not exact.bounded(rows)


@given(problems(), st.booleans())
def test_memory_that_held_something_else_changes_no_bit(problem, spoiled):
    rows, weights, rng = problem
    rows, shelf = torch.cat([rows] * 64, 1), BufferPool()
    alone = exact.total(exact.add({}, rows, weights))
    if spoiled:
        rows[rng.integers(len(rows)), rng.integers(rows.shape[1])] = math.nan
    with pytest.MonkeyPatch.context() as patch, use_pool(shelf):
        patch.setattr(limits, "POOLED_BYTES", 1)
        for size in (8, 16, 32, 64, 128):  # for each of them a buffer that will be reused
            shelf.empty(size * len(rows[0])).fill_(255)
        digits = {}
        if not spoiled:
            assert torch.equal(exact.total(exact.add(digits, rows, weights)), alone)
        elif exact._library(rows) is not None:
            with pytest.raises(UsageError, match="not finite"):
                exact.add(digits, rows, weights)
            assert all(digit.isfinite().all() for digit in digits.values())


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_every_number_of_threads(dtype):
    rows = torch.from_numpy(np.random.default_rng(3).standard_cauchy((64, 3 * BLOCK))).to(dtype)
    weights = torch.arange(1, 65)
    totals = []
    for n in (1, 2):
        with threads(n), native.threads(n), pytest.MonkeyPatch.context() as patch:
            patch.setattr(limits, "THREADED_SUM", 1)
            totals.append(exact.total(exact.add({}, rows, weights)))
    for piece in (rows[:1], rows[:33]):  # other shapes of a matrix product
        totals.append(
            exact.total(
                exact.merge(
                    exact.add({}, piece, weights[: len(piece)]),
                    exact.add({}, rows[len(piece) :], weights[len(piece) :]),
                )
            )
        )
    assert all(torch.equal(totals[0], other) for other in totals[1:])


@settings(max_examples=3 * settings().max_examples)
@given(problems(width=st.integers(1, 5)))
def test_within_the_bound_of_the_true_sum(problem):
    rows, weights, _ = problem
    total = exact.total(exact.add({}, rows, weights))
    assert total.isfinite().all()
    # one block: 2^e is above all numbers of the row
    exponents = [math.frexp(float(row.abs().max()))[1] for row in rows]
    weighted = list(zip(weights.tolist(), exponents, strict=True))
    kept = sum(w * Fraction(2) ** (e - BELOW[rows.dtype]) for w, e in weighted)
    lowest = sum(weights.tolist()) * Fraction(2) ** -1067
    for j, got in enumerate(total.tolist()):
        true = sum((w * Fraction(x) for w, x in zip(weights.tolist(), rows[:, j].tolist(), strict=True)), Fraction(0))
        bound = kept + lowest
        assert abs(Fraction(got) - true) <= bound + Fraction(2) ** -52 * (abs(true) + bound)


@given(seeds, st.integers(1, 40), st.sampled_from(list(DTYPES)))
def test_numbers_of_like_size_are_summed_without_any_error(seed, n, dtype):
    """20 bits each, on one grid: no number is rounded, even if all cancel."""
    rng = np.random.default_rng(seed)
    scale = 2.0 ** rng.integers(-60, 60)
    whole = rng.integers(-(2**20), 2**20, (n, 3))
    weights = rng.integers(0, 2**20, n)
    rows = torch.from_numpy(whole * scale).to(dtype)
    total = exact.total(exact.add({}, rows, torch.from_numpy(weights)))
    assert total.tolist() == [
        float(sum(int(w) * int(x) for w, x in zip(weights, c, strict=True)) * scale) for c in whole.T
    ]


@given(problems(width=st.just(2 * BLOCK)))
def test_a_block_is_rounded_by_its_own_numbers(problem):
    """The numbers of another block change no bit, however large they are."""
    rows, weights, _ = problem
    first = exact.total(exact.add({}, rows[:, :BLOCK].contiguous(), weights))
    assert torch.equal(exact.total(exact.add({}, rows, weights))[:BLOCK], first)


def test_the_fixed_grid_would_have_lost_this():
    """1e19 + 1 − 1e19 = 1, and 1e-12 survives although other clients have 1e19."""
    rows = torch.tensor([[1e19], [1.0], [-1e19], [1e-12]], dtype=torch.float64)
    total = exact.total(exact.add({}, rows, torch.ones(4)))
    assert total.item() == 1.0 + 1e-12


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_have_a_sum(dtype):
    for width in (1, BLOCK + 1):
        total = exact.total(exact.add({}, torch.zeros(3, width, dtype=dtype), torch.ones(3)))
        assert torch.equal(total, torch.zeros(width, dtype=torch.float64))


@given(problems(width=st.sampled_from([1, BLOCK + 1])))
def test_partial_is_plain_tensors_and_back(problem):
    rows, weights, _ = problem
    aggregator = Mean()
    partial = aggregator.fold(aggregator.zero(), contribution(rows, weights, range(len(rows))), STARTS)
    tensors = partial.tensors()
    assert all(isinstance(name, str) and isinstance(t, torch.Tensor) for name, t in tensors.items())
    again = PartialSum.of(tensors)
    assert bits(again, aggregator) == bits(partial, aggregator)
    assert again.tensors().keys() == tensors.keys()


@pytest.mark.parametrize("make", [Mean, Sum])
def test_too_much_weight_is_refused_with_a_line_that_works(make):
    rows, weights = torch.ones(2, 3, dtype=torch.float64), torch.tensor([exact.CAPACITY, 1])
    both = contribution(rows, weights, [0, 1])
    aggregator = make()
    with pytest.raises(UsageError, match="2\\^28") as caught:
        aggregator.total(aggregator.fold(aggregator.zero(), both, STARTS))
    instead = grammar.parse(caught.value.line, PARTS)
    assert isinstance(instead, make)
    total = instead.total(instead.fold(instead.zero(), both, STARTS))
    assert total.means["update"].tolist() == [float(exact.CAPACITY + 1)] * 3

    allowed = aggregator.total(aggregator.fold(aggregator.zero(), contribution(rows, weights, [0]), STARTS))
    assert allowed.means["update"].tolist() == [float(exact.CAPACITY)] * 3


@given(problems())
def test_the_float_sum_is_close(problem):
    rows, weights, _ = problem
    scale = (weights[:, None].double() * rows.double().abs()).sum(0)
    if not scale.le(torch.finfo(rows.dtype).max / 4).all():
        return  # the float sum is the fast choice: it overflows here, with an error, and the exact sum does not
    sums = {}
    for how in ("exact", "float"):
        aggregator = Mean(sum=how)
        partial = aggregator.fold(aggregator.zero(), contribution(rows, weights, range(len(rows))), STARTS)
        sums[how] = aggregator.total(partial).means["update"]
    eps = torch.finfo(rows.dtype).eps
    block = torch.cat([b.abs().amax(1, keepdim=True).expand_as(b) for b in rows.double().split(BLOCK, 1)], 1)
    grid = (weights[:, None] * block).sum(0) * 2.0 ** (1 - BELOW[rows.dtype])
    tiny = torch.finfo(rows.dtype).tiny * len(rows)
    assert (sums["exact"] - sums["float"]).abs().le(2 * len(rows) * eps * scale + grid + tiny).all()


def by_places(rows, weights):
    """The sum by its definition: digit after digit of each contribution's block, from its own largest number down."""
    digits, keep = {}, exact.places(rows.dtype)
    for row, weight in zip(rows.double(), weights.double(), strict=True):
        for start in range(0, len(row), BLOCK):
            rest = row[start : start + BLOCK].clone()
            if not (largest := float(rest.abs().max())):
                continue
            top = max(-41, math.frexp(largest)[1] // 26)
            for place in range(top, max(top - keep, -42), -1):
                anchor = 1.5 * 2.0 ** (52 + 26 * place)
                digit = (rest + anchor) - anchor
                rest -= digit
                whole = digits.setdefault(place, torch.zeros(rows.shape[1], dtype=torch.float64))
                whole[start : start + BLOCK] += weight * digit
    return digits


@given(problems())
def test_the_sum_is_that_of_the_definition(problem):
    """Digits that are read as integers, many blocks and two places at a time, have the same sum as single digits."""
    rows, weights, _ = problem
    ours, theirs = exact.add({}, rows, weights), by_places(rows, weights)
    for place, digit in ours.items():  # integers of their place, with room left in float64
        whole = digit * 2.0 ** (-13 * place) * 2.0 ** (-13 * place)
        assert torch.equal(whole, whole.round()) and whole.abs().le(2.0**53).all()
    for j in {0, rows.shape[1] // 2, rows.shape[1] - 1}:
        one, other = (sum(Fraction(float(t[j])) for t in digits.values()) for digits in (ours, theirs))
        assert one == other
    assert not theirs or torch.equal(exact.total(ours), exact.total(theirs))


@given(problems())
def test_the_sum_of_opposites_is_the_opposite(problem):
    rows, weights, _ = problem
    there, back = (exact.total(exact.add({}, x, weights)) for x in (rows, -rows))
    assert torch.equal(there, -back)
