"""How contributions become one."""

from atoll.plan.aggregate.mean import Mean, PartialSum, Sum

__all__ = ["Mean", "PartialSum", "Sum"]
