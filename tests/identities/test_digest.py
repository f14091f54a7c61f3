"""A fingerprint depends on all bits of a model, and on nothing else."""

import hashlib
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from atoll.base.random import Key
from atoll.runs.fingerprint import BLOCK, fingerprint

lengths = st.one_of(st.integers(1, 40), st.sampled_from([BLOCK // 2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5]))
dtypes = st.sampled_from([torch.float32, torch.float64])


def model(seed, d, dtype):
    """A model with any bits, including all kinds of NaN, infinities and subnormal numbers."""
    raw = np.random.default_rng(seed).bytes(d * dtype.itemsize)
    return torch.frombuffer(bytearray(raw), dtype=dtype)


@given(st.integers(0, 2**32), lengths, dtypes)
def test_the_fingerprint_equals_its_definition(seed, d, dtype):
    theta = model(seed, d, dtype)
    words = theta.numpy().tobytes()
    factors = [(int(k) & (2**64 - 1)) | 1 for k in Key(0).fold("fingerprint").hash(BLOCK)]
    each = [w for (w,) in struct.iter_unpack("<I", words)]
    sums = [
        sum(k * w for k, w in zip(factors, each[at : at + BLOCK], strict=False)) for at in range(0, len(each), BLOCK)
    ]
    if len(each) % BLOCK == 0:
        sums.append(0)
    found = struct.pack("<Q", len(each)) + b"".join(struct.pack("<Q", s % 2**64) for s in sums)
    assert fingerprint(theta) == hashlib.sha256(found).hexdigest()[:12]


@given(st.integers(0, 2**32), lengths, dtypes, st.data())
def test_every_bit_counts(seed, d, dtype, data):
    theta = model(seed, d, dtype)
    before = fingerprint(theta)
    assert fingerprint(theta.clone()) == fingerprint(torch.stack((theta, theta), 1)[:, 0]) == before
    bit = data.draw(st.integers(0, 8 * theta.nbytes - 1))
    theta.view(torch.uint8)[bit // 8] ^= 1 << bit % 8
    assert fingerprint(theta) != before


@pytest.mark.parametrize("d", [1, BLOCK - 1, BLOCK, 2 * BLOCK])
def test_zeros_of_other_lengths_are_others(d):
    assert fingerprint(torch.zeros(d)) != fingerprint(torch.zeros(d + 1))


def test_swapped_numbers_change_the_fingerprint():
    found = {fingerprint(torch.zeros(9000).index_fill_(0, torch.tensor(at), 1.0)) for at in range(0, 9000, 7)}
    assert len(found) == len(range(0, 9000, 7))
