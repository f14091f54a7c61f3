"""The direction in which a metric improves, by its name. Loads without torch.

Tests: tests/identities/test_stop.py, tests/surface/test_fast_commands.py
"""

from __future__ import annotations

import re

_HIGHER = {"accuracy", "auc", "recall", "precision", "f1", "r2", "score", "top5", "index"}
_LOWER = {"loss", "error", "mse", "rmse", "mae", "perplexity", "norm", "brier", "ece", "deviance"}


def direction(metric: str) -> int | None:
    """The direction in which a metric improves, by the last word of its name.

    Args:
        metric: the name of the metric.
    Returns:
        +1 if higher values are better, −1 if lower values are better, None if the word is unknown.
    Example:
        >>> direction("held_out_accuracy"), direction("loss"), direction("margin")
        (1, -1, None)
    """
    word = re.split(r"[^a-z0-9]+", metric.lower())[-1]
    return 1 if word in _HIGHER else -1 if word in _LOWER else None
