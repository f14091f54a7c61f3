"""The algorithm: a plan, its parts, the state between rounds, and one round.

The names of this package are imported at their first use, so that a plan's names load without torch.

Tests: tests/identities/test_one_algorithm.py, tests/surface/test_public.py
"""

from typing import TYPE_CHECKING

from atoll.base.names import lazy

if TYPE_CHECKING:
    from atoll.plan.plan import Plan
    from atoll.plan.round import Report, bind, close_round, open_round, step
    from atoll.plan.state import State

__all__ = ["Plan", "Report", "State", "bind", "close_round", "open_round", "step"]

_HOMES = {"Plan": "plan", "State": "state"} | dict.fromkeys(
    ("Report", "bind", "close_round", "open_round", "step"), "round"
)

__getattr__, __dir__ = lazy(__name__, _HOMES)
