"""Aggregation: how the contributions of a round become one update.

Tests: tests/identities/test_order.py, tests/conformance/test_parts.py
"""

from atoll.plan.aggregate.combine import Combine
from atoll.plan.aggregate.mean import Mean, PartialSum, Sum

__all__ = ["Combine", "Mean", "PartialSum", "Sum"]
