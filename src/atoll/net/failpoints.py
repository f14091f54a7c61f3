"""Named places at which a test ends the process, as `kill -9` would.

The variable `ATOLL_FAILPOINT` of the environment is `NAME:N`. The process ends with SIGKILL at the n-th passage of the
place with this name. Without the variable a place costs one comparison.

Tests: tests/faults/test_store.py
"""

from __future__ import annotations

import os
import signal
from collections import Counter

_ARMED, _, _COUNT = os.environ.get("ATOLL_FAILPOINT", "").partition(":")
_PASSED: Counter[str] = Counter()


def failpoint(name: str) -> None:
    """End the process if this place is armed and has been passed n times."""
    if not _ARMED or name != _ARMED:
        return
    _PASSED[name] += 1
    if _PASSED[name] == int(_COUNT or 1):
        os.kill(os.getpid(), signal.SIGKILL)
