"""Names of the parameters of a linear model.

Tests: tests/identities/test_newton.py
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from atoll.compute.layout import Layout

CONSTANT = "the constant"


def parameter_names(layout: Layout, columns: Sequence[str]) -> list[str]:
    """The column of each parameter in θ; the constant for a bias.

    Args:
        layout: the layout of a model with one linear layer.
        columns: the names of the features; without names they are numbered.
    """
    names: list[str] = []
    for entry in layout.segment("params"):
        if len(entry.shape) < 2:
            names += [CONSTANT] * entry.size
            continue
        width = math.prod(entry.shape[1:])
        own = columns if len(columns) == width else [f"feature {i}" for i in range(width)]
        names += [*own] * entry.shape[0]
    return names
