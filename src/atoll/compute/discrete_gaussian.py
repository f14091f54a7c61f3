"""Exact noise: integers from the discrete Gaussian distribution, with secret random bits and integer arithmetic.

    P[X = x] = exp(−x²/2σ²) / Σ_y exp(−y²/2σ²)

A normal number in floating point reveals the noise-free value by its last bits. These integers have no such bits. One
table of small deviation σ₀ serves all: 16X + X′ has the variance 256 Var X + Var X′.

Tests: tests/identities/test_discrete_gaussian.py
"""

from __future__ import annotations

import ctypes
import math
from decimal import Decimal, localcontext
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from atoll.base.errors import UsageError
from atoll.base.random import SecretKey
from atoll.compute.native import present

LEAST = 64  # the smallest deviation: below 32 the sum 16X + X' would differ from the distribution
DISTANCE = 2.0**-100  # statistical distance of one number from the discrete Gaussian, at most
_REACH = 13  # deviations that a table covers; the rest has a probability below 2⁻¹²⁰
_PREFIX = 16  # bits of a word that find the value of most draws
_FIRST, _REST = 32, 96  # bits of a draw: the word, and what decides if the word equals that of an edge
_AT_ONCE = 1 << 15  # numbers whose words and sums stay in the cache
_POINT = 256  # bits after the point of the weights of a table
_ONE = 1 << _POINT
_NATIVE = True

Array = np.ndarray[Any, np.dtype[Any]]


class _Table(NamedTuple):
    """Cumulative probabilities in 128 bits: the edges P[X ≤ x] · 2¹²⁸ for x = −reach … reach − 1.

    Args:
        first: the first 32 bits of each edge, uint32.
        rest: the other 96 bits.
        guide: for each prefix of a word twice the number of edges below all its words, plus 1 if the prefix has an edge
            itself, uint16.
        reach: the largest value.
    """

    first: Array
    rest: tuple[int, ...]
    guide: Array
    reach: int


def discrete_gaussian(key: SecretKey, n: int, deviation: float) -> Tensor:
    """n independent numbers of the discrete Gaussian distribution, int64 `[n]`, on the host.

    X₀ and each X′ are drawn from a table of deviation σ₀ in [64, 1027), and X ← 16X + X′ is repeated j times:
    σ² = σ₀² (1 + 256 + … + 256^j).

    The statistical distance of one number to the distribution is below 2⁻¹⁰⁰. The table leaves out less than 2⁻¹²⁰ of
    the probability, and each of its fewer than 2¹⁵ cumulative probabilities is rounded by less than 2⁻¹²⁷, so one draw
    is at most 2⁻¹¹¹ away, and there are at most 13. A sum 16X + X′ has relative errors of at most
    3 exp(−2π²(σ₀/16.1)²), below 2⁻⁴⁴⁰, by Poisson summation.

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
    draws = [_Draws(table, key.fold(i)) for i in range(joins + 1)]
    out = np.zeros(n, np.int64)
    for start in range(0, n, _AT_ONCE):
        for each in draws:
            each.join(out[start : start + _AT_ONCE])
    return torch.from_numpy(out)


def _growth(joins: int) -> int:
    """σ²/σ₀² after this number of joins: 1 + 256 + … + 256^joins."""
    return int((256 ** (joins + 1) - 1) // 255)


@lru_cache(8)
def _table(deviation: float, joins: int) -> _Table:
    """The table of the deviation σ₀ from which `joins` joins make σ."""
    with localcontext() as context:
        context.prec = 90
        rate = Decimal(_growth(joins)) / (2 * Decimal(deviation) ** 2)
        ratio, square = (int((-k * rate).exp() * _ONE) for k in (1, 2))
    reach = math.ceil(_REACH * deviation / math.sqrt(_growth(joins)))
    weights = [_ONE]  # exp(−x² rate), with 256 bits after the point
    for _ in range(reach):
        weights.append(weights[-1] * ratio >> _POINT)
        ratio = ratio * square >> _POINT
    total = 2 * sum(weights[1:]) + _ONE
    cumulative, edges = 0, []
    for x in range(-reach, reach):
        cumulative += weights[abs(x)]
        edges.append(min((cumulative << 128) // total, (1 << 128) - 1))
    first = np.array([edge >> _REST for edge in edges], np.uint32)
    rest = tuple(edge & ((1 << _REST) - 1) for edge in edges)
    lowest = np.arange(1 << _PREFIX, dtype=np.uint32) << np.uint32(_FIRST - _PREFIX)
    highest = lowest + np.uint32((1 << (_FIRST - _PREFIX)) - 1)
    below, above = np.searchsorted(first, lowest, "left"), np.searchsorted(first, highest, "right")
    return _Table(first, rest, (2 * below + (below != above)).astype(np.uint16), reach)


class _Draws:
    """Draws from a table, one after the other, from the stream of a key.

    The value of a draw is −reach plus the number of edges that are not above its 128 bits. Its first 32 bits come from
    the stream. If they equal those of an edge, the next 96 bits of a second stream decide.
    """

    def __init__(self, table: _Table, key: SecretKey) -> None:
        self._table, self._words, self._second = table, key.keystream(), key.fold("second").keystream()
        self._buffer, self._places = np.empty(_AT_ONCE, "<u4"), np.empty(_AT_ONCE, np.int64)
        self._native = present("noise") if _NATIVE else None

    def join(self, out: Array) -> None:
        """Replace each number y of `out`, int64 `[m]`, by 16y + x with a new draw x."""
        words = self._buffer[: len(out)]
        self._words.fill(words.data.cast("B"))
        edges = self._table.first
        for at in (
            self._added(words, out) if self._native is None else self._natively(self._native, words, out)
        ).tolist():
            rest = int.from_bytes(self._second.read(16), "little") & ((1 << _REST) - 1)
            equal = range(int(np.searchsorted(edges, words[at])), int(np.searchsorted(edges, words[at], "right")))
            out[at] += sum(self._table.rest[edge] <= rest for edge in equal)

    def _added(self, words: Array, out: Array) -> Array:
        """Add the draws, without the edges that equal their words in 32 bits; returns the places of these draws."""
        first, _, guide, reach = self._table
        found = guide[words >> np.uint32(_FIRST - _PREFIX)].astype(np.int64)
        open_ = np.flatnonzero(found & 1)
        found >>= 1
        found[open_] = np.searchsorted(first, words[open_], "left")
        out *= 16
        out += found - reach
        tied: Array = open_[np.searchsorted(first, words[open_], "right") > found[open_]]
        return tied

    def _natively(self, native: ctypes.CDLL, words: Array, out: Array) -> Array:
        """The same by native code."""
        first, _, guide, reach = self._table
        at = [ctypes.c_void_p(each.ctypes.data) for each in (words, guide, first, out, self._places)]
        n, edges, most = (ctypes.c_int64(x) for x in (len(out), len(first), reach))
        return self._places[: native.join(at[0], n, *at[1:3], edges, most, *at[3:])]
