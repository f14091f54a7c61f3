"""The loss of a constant answer: a training that ends above it has learned nothing.

    classes   entropy of the labels      two classes with one logit   the same      numbers   variance of the targets

Tests: tests/identities/test_diverged.py
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from atoll.base.errors import AtollError
from atoll.base.random import Key
from atoll.compute.loss import PerExample, binary_cross_entropy, cross_entropy, mse
from atoll.data.clients import Clients
from atoll.data.rows import IGNORED

MOST_ROWS = 1024

# Ratio of the last training loss to the loss of a constant answer above which a run reports it. A model that has not
# learned yet stays below it: a fresh mlp on digits has 2.33, and a constant answer 2.30, on 1,024 rows.
WORSE_THAN_CONSTANT = 1.05


def reference_rows(data: Clients, seed: int) -> Clients | None:
    """At most 1,024 train rows, drawn by the seed, as a federation of one client; None without rows."""
    count = len(data.order)
    if not count:
        return None
    rows = data.order[Key(seed).fold("reference").distinct(min(count, MOST_ROWS), count)]
    return replace(data, order=rows, offsets=torch.tensor([0, len(rows)]), held_out=None, names=None)


def constant_loss(loss: PerExample, rows: Clients) -> float | None:
    """The smallest mean loss of an answer that is equal for all rows.

    Args:
        loss: the loss of the task.
        rows: the rows.
    Returns:
        None if the loss is not one of cross-entropy, binary cross-entropy and mse, or if a row cannot be read.
    Example:
        >>> from atoll.data import arrays
        >>> rows = arrays(torch.zeros(4, 1), torch.tensor([0.0, 0.0, 2.0, 2.0])).split(1, held_out=0)
        >>> constant_loss(mse, rows)
        1.0
    """
    classes = isinstance(loss, cross_entropy) or loss is binary_cross_entropy
    if not classes and loss is not mse:
        return None
    try:
        y = rows.take(rows.order)[1]
    except (AtollError, OSError):
        return None
    if loss is binary_cross_entropy and y.dim() > 1:
        each = [_entropy(column) for column in y.reshape(len(y), -1).T]
        return None if None in each else sum(e for e in each if e is not None) / len(each)
    return _entropy(y) if classes else float(y.double().var(0, correction=0).mean())


def _entropy(y: Tensor) -> float | None:
    """The entropy of labels in nats. A place without a label does not count."""
    labels = y[y != IGNORED]
    if not labels.numel():
        return None
    shares = labels.unique(return_counts=True)[1].double() / labels.numel()
    return float(-(shares * shares.log()).sum())
