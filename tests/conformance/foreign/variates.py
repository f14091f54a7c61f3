"""SCAFFOLD of a user under a name that no part of atoll has, for a network, where sites read a plan by its names.

Tests: tests/faults/test_random_kills.py
"""

from dataclasses import dataclass

from scaffold import Scaffold


@dataclass(frozen=True, repr=False)
class Variates(Scaffold):
    """`Scaffold` under another name.

    Example:
        >>> Variates(0.1, steps=5, batch=10)
        Variates(0.1, steps=5, batch=10)
    """
