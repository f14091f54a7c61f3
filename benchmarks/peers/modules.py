"""The three models, for the frameworks that train PyTorch modules."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn


def module(name: str) -> nn.Module:
    """Build softmax (7,850 parameters), mlp (159,010) or cnn (80,202)."""
    match name:
        case "softmax":
            layers = (nn.Flatten(), nn.Linear(784, 10))
        case "mlp":
            layers = (nn.Flatten(), nn.Linear(784, 200), nn.ReLU(), nn.Linear(200, 10))
        case "cnn":
            first = (nn.Conv2d(1, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 5), nn.ReLU(), nn.MaxPool2d(2))
            layers = (*first, nn.Flatten(), nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 10))
        case _:
            raise SystemExit(f"no model {name}")
    return nn.Sequential(*layers)


def classes(net: nn.Module, x: np.ndarray) -> np.ndarray:
    """Return the classes that a module predicts for rows."""
    with torch.no_grad():
        return net(torch.from_numpy(x)).argmax(1).numpy()
