"""Keyed dropout: torch operations and native code draw the same mask, and its share of kept numbers is right."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from problems import needs_native

from atoll.compute import native, overrides
from atoll.compute.overrides import KeyedDropout


def dropped(natively, word, p, shape, dtype, whole=False):
    """The output of two dropout layers in a row, and the gradient of the input."""
    x = torch.linspace(-3, 3, torch.Size(shape).numel(), dtype=dtype).view(shape).requires_grad_()
    drop = F.dropout2d if whole else F.dropout
    with pytest.MonkeyPatch.context() as patch, KeyedDropout(lambda: torch.tensor(word)):
        patch.setattr(overrides, "_NATIVE", natively)
        out = drop(drop(x, p), p)
    out.sum().backward()
    return out.detach(), x.grad


@needs_native
@given(
    st.integers(-(2**63), 2**63 - 1),
    st.one_of(st.floats(0, 1), st.sampled_from([2**-24, 0.1, 0.25, 0.5, 1 - 2**-24])),
    st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 9), st.integers(1, 9)),
    st.sampled_from([torch.float32, torch.float64]),
    st.booleans(),
)
def test_native_code_drops_the_same(word, p, shape, dtype, whole):
    assert native.serving("dropout", torch.zeros(1, dtype=dtype)) is not None
    for a, b in zip(*(dropped(natively, word, p, shape, dtype, whole) for natively in (True, False)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("natively", [False, pytest.param(True, marks=needs_native)])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_so_many_are_kept_and_the_mean_stays(natively, p):
    n = 1 << 16
    with pytest.MonkeyPatch.context() as patch, KeyedDropout(lambda: torch.tensor(1)):
        patch.setattr(overrides, "_NATIVE", natively)
        out = F.dropout(torch.ones(n, dtype=torch.float64), p)
    kept = float((out != 0).double().mean())
    assert abs(kept - (1 - p)) < 5 * (p * (1 - p) / n) ** 0.5
    assert torch.equal(out[out != 0].unique(), torch.tensor([1 / (1 - p)], dtype=torch.float64))
