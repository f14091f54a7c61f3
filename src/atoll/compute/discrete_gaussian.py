"""Exact noise: integers from the discrete Gaussian distribution, with secret random bits and integer arithmetic.

    P[X = x] = exp(−x²/2σ²) / Σ_y exp(−y²/2σ²)

A normal number in floating point reveals the noise-free value by its last bits. These integers have no such bits. One
table of small deviation σ₀ serves all: 8X + X′ has the variance 64 Var X + Var X′.

Tests: tests/identities/test_discrete_gaussian.py
"""

from __future__ import annotations

import math
from decimal import Decimal, localcontext
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from atoll.base.errors import UsageError
from atoll.base.random import SecretKey

LEAST = 64  # the smallest deviation: below 16 the sum 8X + X' would differ from the distribution
DISTANCE = 2.0**-100  # statistical distance of one number from the discrete Gaussian, at most
_REACH = 13  # deviations that a table covers; the rest has a probability below 2⁻¹²⁰
_PREFIX = 16  # bits of a word that find the value of most draws

Array = np.ndarray[Any, np.dtype[Any]]


class _Table(NamedTuple):
    """Cumulative probabilities in 128 bits.

    Args:
        high, low: the upper and the lower word of P[X ≤ x] · 2¹²⁸ for x = −reach … reach − 1, uint64.
        guide: for each prefix of a word the value that all words with this prefix have; `_AMBIGUOUS` if they differ.
        reach: the largest value.
    """

    high: Array
    low: Array
    guide: Array
    reach: int


_AMBIGUOUS = np.int32(1 << 30)


def discrete_gaussian(key: SecretKey, n: int, deviation: float) -> Tensor:
    """n independent numbers of the discrete Gaussian distribution, int64 `[n]`, on the host.

    X₀ and each X′ are drawn from a table of deviation σ₀ in [64, 517), and X ← 8X + X′ is repeated j times:
    σ² = σ₀² (1 + 64 + … + 64^j).

    The statistical distance of one number to the distribution is below 2⁻¹⁰⁰. The table leaves out less than 2⁻¹²⁰ of
    the probability, and each of its fewer than 2¹⁴ cumulative probabilities is rounded by less than 2⁻¹²⁸, so one draw
    is at most 2⁻¹¹³ away, and there are at most 17. A sum 8X + X′ has relative errors of at most 3 exp(−2π²(σ₀/8.1)²),
    below 2⁻¹⁷⁰⁰, by Poisson summation.

    Args:
        key: the secret key; its clients are not used.
        n: the number of draws.
        deviation: σ, from 64 to 2⁵⁴.
    Raises:
        UsageError: the deviation is out of range.
    Example:
        >>> x = discrete_gaussian(SecretKey.of_seed(7), 10_000, 1000.0)
        >>> abs(float(x.double().std()) / 1000 - 1) < 0.05
        True

    Paper: Canonne, Kamath and Steinke, The Discrete Gaussian for Differential Privacy, 2020; Micciancio and Walter,
        Gaussian Sampling over the Integers: Efficient, Generic, Constant-Time, 2017.
    """
    if not LEAST <= deviation <= 2.0**54:
        raise UsageError(f"A discrete Gaussian of deviation {deviation!r}.", f"{LEAST} to 2^54.")
    joins = 0
    while deviation >= LEAST * math.sqrt(_growth(joins + 1)):
        joins += 1
    table = _table(deviation, joins)
    out = _draw(table, key.fold(0), n)
    for i in range(joins):
        out = 8 * out + _draw(table, key.fold(i + 1), n)
    return torch.from_numpy(out)


def _growth(joins: int) -> int:
    """σ²/σ₀² after this number of joins: 1 + 64 + … + 64^joins."""
    return int((64 ** (joins + 1) - 1) // 63)


@lru_cache(8)
def _table(deviation: float, joins: int) -> _Table:
    """The table of the deviation σ₀ from which `joins` joins make σ."""
    with localcontext() as context:
        context.prec = 60
        rate = Decimal(_growth(joins)) / (2 * Decimal(deviation) ** 2)  # exact up to 60 digits
        reach = math.ceil(_REACH * deviation / math.sqrt(_growth(joins)))
        ratio, square = (-rate).exp(), (-2 * rate).exp()
        weights = [Decimal(1)]
        for _ in range(reach):
            weights.append(weights[-1] * ratio)
            ratio *= square
        total = 2 * sum(weights[1:]) + 1
        cumulative, edges = Decimal(0), []
        for x in range(-reach, reach):
            cumulative += weights[abs(x)]
            edges.append(min(int(cumulative / total * 2**128), 2**128 - 1))
    high = np.array([edge >> 64 for edge in edges], np.uint64)
    low = np.array([edge & (2**64 - 1) for edge in edges], np.uint64)
    first = np.arange(1 << _PREFIX, dtype=np.uint64) << np.uint64(64 - _PREFIX)
    last = first + np.uint64((1 << (64 - _PREFIX)) - 1)
    # The value of a word is the number of edges that are not above it. Equal upper words are decided by the lower ones.
    below, above = np.searchsorted(high, first, "left"), np.searchsorted(high, last, "right")
    guide = np.where(below == above, below - reach, _AMBIGUOUS).astype(np.int32)
    return _Table(high, low, guide, reach)


def _draw(table: _Table, key: SecretKey, n: int) -> Array:
    words = np.frombuffer(key.bytes(8 * n), "<u8")
    out: Array = table.guide[words >> np.uint64(64 - _PREFIX)].astype(np.int64)
    open_ = np.flatnonzero(out == _AMBIGUOUS)
    some = words[open_]
    index = np.searchsorted(table.high, some, "right")
    tied = np.flatnonzero(np.searchsorted(table.high, some, "left") != index)
    if len(tied):  # the upper word equals that of an edge: the second word decides
        second = np.frombuffer(key.fold("second").bytes(8 * len(tied)), "<u8")
        for at, low in zip(tied.tolist(), second.tolist(), strict=True):
            start = int(np.searchsorted(table.high, some[at], "left"))
            index[at] = start + int((table.low[start : index[at]] <= low).sum())
    out[open_] = index - table.reach
    return out
