"""Aggregation: how the contributions of a round become one update.

Tests: tests/identities/test_order.py, tests/conformance/test_parts.py
"""

from atoll.plan.aggregate.combine import Combine
from atoll.plan.aggregate.mean import Mean, PartialSum, Sum
from atoll.plan.aggregate.ring import Masks

__all__ = ["Combine", "Masks", "Mean", "PartialSum", "Sum"]
