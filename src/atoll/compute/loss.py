"""Losses and metrics: functions of a model's output and the target, with one value per example.

Tests: tests/identities/test_one_algorithm.py, tests/identities/test_numerics.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PerExample = Callable[[Tensor, Tensor], Tensor]


def _rows(values: Tensor) -> Tensor:
    """Reduce `[B, …]` to one number per row: the mean over all other axes."""
    return values.flatten(1).mean(1) if values.dim() > 1 else values


def cross_entropy(output: Tensor, y: Tensor) -> Tensor:
    """Compute −log softmax(output)[y], one value per row `[B]`.

    Args:
        output: logits `[B, C]` or `[B, T, C]`; for sequences the result is the mean over T.
        y: class ids, int64 `[B]` or `[B, T]`, in [0, C).
    Example:
        >>> cross_entropy(torch.zeros(1, 2), torch.tensor([0]))
        tensor([0.6931])
    """
    picked = F.log_softmax(output, -1).gather(-1, y.unsqueeze(-1)).squeeze(-1)
    return _rows(-picked)


def binary_cross_entropy(output: Tensor, y: Tensor) -> Tensor:
    """Compute −log σ(±output), with the sign + for y = 1 and − for y = 0, one value per row `[B]`.

    Args:
        output: logits `[B]` or `[B, 1]`.
        y: 0 or 1, `[B]`.
    Example:
        >>> binary_cross_entropy(torch.zeros(1, 1), torch.tensor([1]))
        tensor([0.6931])
    """
    logits = output.reshape(y.shape)
    # softplus would be shorter, but it rounds differently at the end of a tensor: see engine/position_check.py.
    return _rows(-F.logsigmoid(-logits) - logits * y)


def mse(output: Tensor, y: Tensor) -> Tensor:
    """Compute (output − y)², one value per row `[B]`: the mean over the example's targets.

    Args:
        output: predictions with the element count of `y`.
        y: targets `[B]` or `[B, n]`.
    Example:
        >>> mse(torch.tensor([[3.0]]), torch.tensor([1.0]))
        tensor([4.])
    """
    return _rows((output.reshape(y.shape) - y).square())


def mae(output: Tensor, y: Tensor) -> Tensor:
    """Compute |output − y|, one value per row `[B]`: the mean over the example's targets.

    Args:
        output: predictions with the element count of `y`.
        y: targets `[B]` or `[B, n]`.
    Example:
        >>> mae(torch.tensor([[3.0]]), torch.tensor([1.0]))
        tensor([2.])
    """
    return _rows((output.reshape(y.shape) - y).abs())


def _hits(output: Tensor, y: Tensor) -> Tensor:
    binary = output.shape == y.shape or (output.shape[-1] == 1 and output.dim() == y.dim() + 1)
    guess = (output.reshape(y.shape) > 0).to(y.dtype) if binary else output.argmax(-1)
    return _rows((guess == y).to(torch.float32))


@dataclass(frozen=True)
class Metric:
    """A metric over many rows: value = finish(mean of per-example values).

    Args:
        name: the name in reports.
        each: (output, y) → one value per row `[B]`.
        finish: applied to the mean over all rows.
        higher_is_better: whether a larger value is an improvement.
    """

    name: str
    each: PerExample
    finish: Callable[[float], float] = float
    higher_is_better: bool = False


LOSSES: Mapping[str, PerExample] = {
    "cross_entropy": cross_entropy,
    "binary_cross_entropy": binary_cross_entropy,
    "mse": mse,
    "mae": mae,
}
METRICS: Mapping[str, Metric] = {
    m.name: m
    for m in (
        Metric("accuracy", _hits, higher_is_better=True),
        Metric("rmse", mse, lambda mean: mean**0.5),
        Metric("mae", mae),
    )
}


_HIGHER = {"accuracy", "auc", "recall", "precision", "f1", "r2", "score"}


_LOWER = {"loss", "error", "mse", "rmse", "mae", "perplexity", "norm"}


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
