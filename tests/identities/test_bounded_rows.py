"""Norms, factors and rounding of updates: native code has the bits of torch, and both the right values."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import needs_native

from atoll.base.random import Key
from atoll.compute import bounded_rows, native
from atoll.compute.bounded_rows import combined, combined_and_added, norms, quotients, rounded_rows, scaled
from atoll.compute.tensor_notes import BLOCK, lookup

HARD = [0.0, -0.0, 1e-45, -1e-38, 3e38, math.inf, -math.inf, math.nan, 0.5, -1.5]


def passes(x, exponent, limit, key, natively):
    """The results, and the peaks of those that have rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bounded_rows, "_NATIVE", natively)
        size = norms(x)
        factors = (1 / size.clamp(min=0.3)).to(x.dtype)
        base = x[0] * 0.3 if len(x) else x.new_zeros(x.shape[1])
        total, after = combined_and_added(x, factors, base, x.flip(0))
        rows = scaled(x, factors), rounded_rows(x, exponent, limit, key), quotients(x, factors), total
        rows = (*rows, combined(x, factors, x.flip(0)))
        size = torch.cat([size, after.to(size)], 1)
    return size, *rows, *(lookup(each, "peaks") for each in rows)


def bits(x):
    return x.view(torch.int64 if x.dtype == torch.float64 else torch.int32)


@needs_native
@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10**6),
    st.sampled_from([0, 1, 3, 255, 257, BLOCK, BLOCK + 1, 3 * BLOCK + 300]),
    st.integers(-20, 140),
    st.sampled_from([1, 200, 1 << 24]),
    st.lists(st.sampled_from(HARD), max_size=2),
)
def test_native_code_has_the_bits_of_torch(seed, d, exponent, limit, hard):
    assert native.serving("bounded", torch.zeros(1)) is not None
    x = Key(seed).normal(3 * d).float().reshape(3, d)
    for i, value in enumerate(hard):
        if d > i:
            x[1, (seed * (i + 1)) % d] = value
    key = Key(seed).of(torch.tensor([7, 1, 4]))
    ours, theirs = (passes(x, exponent, limit, key, natively) for natively in (True, False))
    for a, b in zip(ours[:6], theirs[:6], strict=True):
        assert a.shape == b.shape and bits(a.nan_to_num(7.0)).equal(bits(b.nan_to_num(7.0)))
        assert a.isnan().equal(b.isnan())
    for rows, peaks in zip(ours[1:6], ours[6:], strict=True):
        for k in range(3 if d else 0):
            for b, block in enumerate(rows[k].split(BLOCK)):
                assert peaks[k, b].equal(block.abs().amax()) or (peaks[k, b].isnan() and block.isnan().any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_norm_and_a_row_do_not_depend_on_the_other_rows(dtype):
    x = Key(3).normal(5 * 9000).to(dtype).reshape(5, 9000)
    key = Key(1).of(torch.arange(5))
    whole, rounded = norms(x), rounded_rows(x, 6, 400, key)
    for k in range(5):
        one = slice(k, k + 1)
        assert norms(x[one]).equal(whole[one]) and rounded_rows(x[one], 6, 400, key.select(one)).equal(rounded[one])
        assert float(whole[k]) == pytest.approx(math.sqrt(math.fsum(float(v) ** 2 for v in x[k].double())), rel=1e-14)
    steps = rounded.double() * 64
    assert steps.equal(steps.round()) and float(rounded_rows(x, 6, 9, key).abs().max()) == 9 / 64
    assert ((rounded - x).abs() <= 1 / 64).all() and abs(float((rounded - x).mean())) < 6 / 64 / 2 / math.sqrt(45000)


@pytest.mark.parametrize("natively", [False, pytest.param(True, marks=needs_native)])
@pytest.mark.parametrize("d", [0, 5, BLOCK + 5])
def test_no_client_has_no_row(natively, d):
    sizes, *results = passes(torch.zeros(0, d), 3, 4, Key(1).of(torch.arange(0)), natively)
    rows = results[: len(results) // 2]
    assert sizes.shape == (0, 1 + d) and all(each.shape == (0, d) for each in rows)
