"""The direction in which a metric improves, by its name. Loads without torch.

Tests: tests/identities/test_stop.py, tests/surface/test_fast_commands.py
"""

from __future__ import annotations

import re

_HIGHER = {"accuracy", "auc", "recall", "precision", "f1", "r2", "score", "top5", "index"}
_LOWER = {"loss", "error", "mse", "rmse", "mae", "perplexity", "norm", "brier", "ece", "deviance"}

PERSONAL = "personal_"  # personal_M: a metric M of the models of clients, each on its own held-out rows
OVER_CLIENTS = ("clients", "median", "worst10", "min", "sd")  # M_clients, …: a metric M over clients


def base_metric(name: str) -> str:
    """The metric M of a name such as M_clients or M_worst10; "" for other names.

    Example:
        >>> base_metric("accuracy_worst10"), base_metric("accuracy")
        ('accuracy', '')
    """
    base, _, last = name.rpartition("_")
    return base if last in OVER_CLIENTS else ""


def direction(metric: str) -> int | None:
    """The direction in which a metric improves, by the last word of its name, or of M in M_clients, M_worst10, ….

    Args:
        metric: the name of the metric.
    Returns:
        +1 if higher values are better, −1 if lower values are better, None if the word is unknown.
    Example:
        >>> direction("held_out_accuracy"), direction("loss"), direction("margin"), direction("auc_worst10")
        (1, -1, None, 1)
    """
    if base_metric(metric) and not metric.endswith("_sd"):
        metric = base_metric(metric)
    word = re.split(r"[^a-z0-9]+", metric.lower())[-1]
    return 1 if word in _HIGHER else -1 if word in _LOWER else None
