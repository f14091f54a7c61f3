"""Confidence intervals at 95 % of measured values, and their text. They assume independent rows.

Tests: tests/identities/test_intervals.py.
"""

from __future__ import annotations

import math
from typing import NamedTuple

Z = 1.959963984540054  # the 0.975 quantile of the normal distribution


class Interval(NamedTuple):
    """A measured value with its 95 % interval.

    Args:
        value: the measured value.
        low, high: the ends of the interval.
        rows: the number of rows that were measured.
    Example:
        >>> str(wilson(123, 148))
        '0.831 [0.763, 0.883] n=148'
    """

    value: float
    low: float
    high: float
    rows: int

    def __str__(self) -> str:
        half = (self.high - self.low) / 2
        if not math.isfinite(half):
            return f"{self.value:.4g} n={self.rows}"
        # Two digits of the half width, and at least three digits after the point for fractions of rows.
        digits = 3 if half == 0 else max(0, 1 - math.floor(math.log10(half)))
        return f"{self.value:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}] n={self.rows}"


def wilson(hits: float, rows: int) -> Interval:
    """The interval of a proportion.

    centre = (p + z²/2n) / (1 + z²/n),  half = z √(p(1 − p)/n + z²/4n²) / (1 + z²/n)

    Args:
        hits: the number of hits, in [0, rows].
        rows: the number of rows n, ≥ 1.
    Example:
        >>> wilson(0, 10)[1:3]
        (0.0, 0.2775327998628892)

    Paper: Wilson, Probable Inference, the Law of Succession, and Statistical Inference, 1927.
    """
    p, spread = hits / rows, Z * Z / rows
    centre, half = p + spread / 2, Z * math.sqrt(max(0.0, p * (1 - p)) / rows + spread / (4 * rows))
    low, high = (centre - half) / (1 + spread), (centre + half) / (1 + spread)
    return Interval(p, low if hits > 0 else 0.0, high if hits < rows else 1.0, rows)


def hanley_mcneil(auc: float, positive: int, negative: int) -> Interval:
    """The interval of the area under the ROC curve.

    se² = (A(1 − A) + (n₊ − 1)(Q₁ − A²) + (n₋ − 1)(Q₂ − A²)) / n₊n₋,  Q₁ = A/(2 − A),  Q₂ = 2A²/(1 + A)

    Args:
        auc: the measured area A, in [0, 1].
        positive, negative: the numbers of rows n₊ and n₋, ≥ 1.
    Example:
        >>> str(hanley_mcneil(0.9, 50, 50))
        '0.900 [0.837, 0.963] n=100'

    Paper: Hanley and McNeil, The Meaning and Use of the Area under a ROC Curve, 1982.
    """
    first, second = auc / (2 - auc), 2 * auc * auc / (1 + auc)
    spread = auc * (1 - auc) + (positive - 1) * (first - auc * auc) + (negative - 1) * (second - auc * auc)
    half = Z * math.sqrt(max(0.0, spread) / (positive * negative))
    return Interval(auc, max(0.0, auc - half), min(1.0, auc + half), positive + negative)


def normal(mean: float, sd: float, rows: int) -> Interval:
    """The interval of a mean: mean ± z · sd / √n.

    Args:
        mean: the mean over rows.
        sd: the sample standard deviation of the rows, ≥ 0.
        rows: the number of rows n, ≥ 1.
    Example:
        >>> str(normal(10.0, 2.0, 100))
        '10.00 [9.61, 10.39] n=100'
    """
    half = Z * sd / math.sqrt(rows)
    return Interval(mean, mean - half, mean + half, rows)
