"""Losses and metrics: functions of a model's output and the target, one value for each example."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PerExample = Callable[[Tensor, Tensor], Tensor]


def _rows(values: Tensor) -> Tensor:
    """One number a row: the mean over whatever axes an example has."""
    return values.flatten(1).mean(1) if values.dim() > 1 else values


def cross_entropy(output: Tensor, y: Tensor) -> Tensor:
    """−log softmax(output)[y], one value a row; output `[B, C]` or `[B, T, C]`, y int64 `[B]` or `[B, T]`."""
    picked = F.log_softmax(output, -1).gather(-1, y.unsqueeze(-1)).squeeze(-1)
    return _rows(-picked)


def binary_cross_entropy(output: Tensor, y: Tensor) -> Tensor:
    """−log σ(±output), one value a row; output `[B]` or `[B, 1]` in logits, y in {0, 1}."""
    logits = output.reshape(y.shape)
    # softplus would be shorter, and rounds differently at the end of a tensor: see engine/elementwise.py.
    return _rows(-F.logsigmoid(-logits) - logits * y)


def mse(output: Tensor, y: Tensor) -> Tensor:
    """(output − y)², one value a row: the mean over an example's targets."""
    return _rows((output.reshape(y.shape) - y).square())


def mae(output: Tensor, y: Tensor) -> Tensor:
    """|output − y|, one value a row."""
    return _rows((output.reshape(y.shape) - y).abs())


def _hits(output: Tensor, y: Tensor) -> Tensor:
    binary = output.shape == y.shape or (output.shape[-1] == 1 and output.dim() == y.dim() + 1)
    guess = (output.reshape(y.shape) > 0).to(y.dtype) if binary else output.argmax(-1)
    return _rows((guess == y).to(torch.float32))


@dataclass(frozen=True)
class Metric:
    """A number about many rows that is the function of a mean over them: value = finish(mean of per-example values)."""

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
