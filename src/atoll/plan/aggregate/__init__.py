"""Aggregation: how the contributions of a round become one update.

Tests: tests/identities/test_order.py, tests/conformance/test_parts.py
"""

from atoll.plan.aggregate.combine import Combine
from atoll.plan.aggregate.mean import Mean, PartialSum, Sum
from atoll.plan.aggregate.ring import Masks
from atoll.plan.aggregate.robust import (
    ROBUST,
    CenteredClip,
    GeometricMedian,
    Krum,
    Median,
    NormBound,
    TrimmedMean,
)
from atoll.plan.aggregate.rows import RowRule

__all__ = [
    "ROBUST",
    "CenteredClip",
    "Combine",
    "GeometricMedian",
    "Krum",
    "Masks",
    "Mean",
    "Median",
    "NormBound",
    "PartialSum",
    "RowRule",
    "Sum",
    "TrimmedMean",
]
