"""Local parts: the computation of a client.

Tests: tests/conformance/test_parts.py
"""

from atoll.plan.local.correction import (
    CORRECTIONS,
    Calibrated,
    Chained,
    CorrectionBase,
    Ditto,
    Dynamic,
    Extrapolated,
    Fair,
    MimeLite,
    Normalised,
    Proximal,
    Scaffold,
)
from atoll.plan.local.custom import Context, Custom, Loader
from atoll.plan.local.evaluate import Evaluate
from atoll.plan.local.gradient import Gradient
from atoll.plan.local.moments import Moments
from atoll.plan.local.newton import Newton
from atoll.plan.local.train import Train

__all__ = [
    "CORRECTIONS",
    "Calibrated",
    "Chained",
    "Context",
    "CorrectionBase",
    "Custom",
    "Ditto",
    "Dynamic",
    "Evaluate",
    "Extrapolated",
    "Fair",
    "Gradient",
    "Loader",
    "MimeLite",
    "Moments",
    "Newton",
    "Normalised",
    "Proximal",
    "Scaffold",
    "Train",
]
