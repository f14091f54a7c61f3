"""Optimizers: the server's rule and the rule of clients, as values.

Tests: tests/identities/test_optimizer.py
"""

from atoll.plan.optimizer.base import LaneGroup, OptimizerBase
from atoll.plan.optimizer.rules import (
    OPTIMIZERS,
    adadelta,
    adagrad,
    adam,
    adamax,
    adamw,
    nadam,
    radam,
    rmsprop,
    sgd,
    yogi,
)

__all__ = [
    "OPTIMIZERS",
    "LaneGroup",
    "OptimizerBase",
    "adadelta",
    "adagrad",
    "adam",
    "adamax",
    "adamw",
    "nadam",
    "radam",
    "rmsprop",
    "sgd",
    "yogi",
]
