"""The model of benchmarks/net.py: two dense layers whose size the benchmark chooses."""

from __future__ import annotations

import os

from torch import nn


def wide() -> nn.Module:
    """64 inputs, NET_HIDDEN hidden units, 10 outputs."""
    hidden = int(os.environ["NET_HIDDEN"])
    return nn.Sequential(nn.Flatten(), nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))
