"""The optimal quantisers of a normal number for 1 to 8 bits: centroids, thresholds and errors.

A quantiser is optimal if each centroid is the mean of its cell and each threshold is half way between two centroids
(Lloyd 1957, Max 1960). The symmetric one with 2ᵇ levels is found by Newton's method on the first condition,

    F_i(c) = c_i (Φ(t_{i+1}) − Φ(t_i)) − (φ(t_i) − φ(t_{i+1})) = 0,     t_i = (c_{i−1} + c_i)/2,  t_0 = 0,

whose Jacobian is tridiagonal. Some rounds of Lloyd's method, which replaces each centroid by the mean of its cell, give
a start that is near enough. Lloyd's method starts from the quantiles of a normal number with variance 3, the solution
for large b.

Tests: tests/rates/test_codec_theory.py
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import pairwise
from statistics import NormalDist
from typing import NamedTuple

LLOYD, NEWTON = 40, 8  # rounds; a test checks that the last Newton round changes nothing, for each number of bits
_NORMAL = NormalDist()


class Quantiser(NamedTuple):
    """The positive half of a symmetric quantiser: centroids, the thresholds between them, and the error."""

    centroids: tuple[float, ...]
    thresholds: tuple[float, ...]
    error: float


@lru_cache(maxsize=8)
def lloyd_max(bits: int) -> Quantiser:
    """The quantiser of a standard normal number with 2^bits levels and the smallest mean square error.

    Args:
        bits: the number of bits of a code, 1 to 8.
    Returns:
        The quantiser Q, with the error E(z − Q(z))² = 1 − 2 Σ c_i² P(cell i). If Q is scaled to be unbiased, its error
        is error/(1 − error).
    Example:
        >>> [round(c, 4) for c in lloyd_max(2).centroids]
        [0.4528, 1.5104]

    Reference: Max, Quantizing for Minimum Distortion, 1960.
    """
    n = 1 << (bits - 1)
    c = [math.sqrt(3) * _NORMAL.inv_cdf(0.5 + (i + 0.5) / (2 * n)) for i in range(n)]
    for _ in range(LLOYD):
        c = _means(c)
    for _ in range(NEWTON):
        c = [a - step for a, step in zip(c, _newton(c), strict=True)]
    t = _thresholds(c)
    mass = [_NORMAL.cdf(b) - _NORMAL.cdf(a) for a, b in pairwise(t)]
    error = 1 - 2 * sum(a * a * p for a, p in zip(c, mass, strict=True))
    # Rounded to six decimals, the values do not depend on the last bits of the machine's exp and erf. This costs no
    # measurable accuracy.
    return Quantiser(tuple(round(a, 6) for a in c), tuple(round(x, 6) for x in t[1:-1]), error)


def _means(c: list[float]) -> list[float]:
    """The mean of a normal number in each cell."""
    t = _thresholds(c)
    return [(_density(a) - _density(b)) / (_NORMAL.cdf(b) - _NORMAL.cdf(a)) for a, b in pairwise(t)]


def _density(x: float) -> float:
    return 0.0 if math.isinf(x) else _NORMAL.pdf(x)


def _thresholds(c: list[float]) -> list[float]:
    return [0.0, *((a + b) / 2 for a, b in pairwise(c)), math.inf]


def _newton(c: list[float]) -> list[float]:
    """F'(c)⁻¹ F(c): one sweep down and one sweep up a tridiagonal matrix."""
    t = _thresholds(c)
    density = list(map(_density, t))
    n = len(c)
    upper, value = [0.0] * n, [0.0] * n
    for i in range(n):
        mass = _NORMAL.cdf(t[i + 1]) - _NORMAL.cdf(t[i])
        f = c[i] * mass - (density[i] - density[i + 1])
        # ∂F_i/∂t = (c_i − t)·φ(t) at the upper threshold, its negative at the lower one; ∂t/∂c = ½ on both sides.
        above = 0.5 * density[i + 1] * (c[i] - t[i + 1]) if i + 1 < n else 0.0
        below = -0.5 * density[i] * (c[i] - t[i]) if i else 0.0
        pivot = mass + above + below - (below * upper[i - 1] if i else 0.0)
        upper[i] = above / pivot
        value[i] = (f - (below * value[i - 1] if i else 0.0)) / pivot
    for i in range(n - 2, -1, -1):
        value[i] -= upper[i] * value[i + 1]
    return value
