"""How contributions become one."""

from atoll.plan.aggregate.mean import Mean, Partial, Sum

__all__ = ["Mean", "Partial", "Sum"]
