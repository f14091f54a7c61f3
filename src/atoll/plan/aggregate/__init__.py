"""Aggregation: how the contributions of a round become one update.

Tests: tests/identities/test_order.py, tests/conformance/test_parts.py
"""

from atoll.plan.aggregate.agnostic import Agnostic
from atoll.plan.aggregate.attacks import (
    ALIE,
    ATTACKS,
    Attack,
    Attacked,
    Claim,
    Gaussian,
    InnerProduct,
    SignFlip,
)
from atoll.plan.aggregate.combine import Combine
from atoll.plan.aggregate.mean import Mean, PartialSum, Sum
from atoll.plan.aggregate.ring import Masks
from atoll.plan.aggregate.robust import (
    ROBUST,
    Bucketing,
    Bulyan,
    CenteredClip,
    DnC,
    FLTrust,
    Foundation,
    GeometricMedian,
    Krum,
    Median,
    NormBound,
    TrimmedMean,
)
from atoll.plan.aggregate.rows import RowFacts, RowRule

__all__ = [
    "ALIE",
    "ATTACKS",
    "ROBUST",
    "Agnostic",
    "Attack",
    "Attacked",
    "Bucketing",
    "Bulyan",
    "CenteredClip",
    "Claim",
    "Combine",
    "DnC",
    "FLTrust",
    "Foundation",
    "Gaussian",
    "GeometricMedian",
    "InnerProduct",
    "Krum",
    "Masks",
    "Mean",
    "Median",
    "NormBound",
    "PartialSum",
    "RowFacts",
    "RowRule",
    "SignFlip",
    "Sum",
    "TrimmedMean",
]
