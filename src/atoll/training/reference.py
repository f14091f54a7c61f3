"""The constant answer: one output for all rows. A model that is no better has learned nothing.

    classes: log of the class shares;  0/1 labels: log-odds of the shares;  numbers: the mean, or the log of a mean rate

Its loss on train rows shows a training that diverged. Its metrics on held-out rows stand next to those of a model.

Tests: tests/identities/test_diverged.py, tests/identities/test_evaluation.py
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from atoll.base.errors import AtollError
from atoll.base.random import Key
from atoll.compute.loss import (
    PerExample,
    axis_of,
    binary_cross_entropy,
    cross_entropy,
    mse,
    poisson,
    single_logit,
    values_of,
)
from atoll.compute.metrics import Counts
from atoll.compute.shapes import class_axis
from atoll.data.clients import Clients
from atoll.data.input import Input
from atoll.data.rows import IGNORED
from atoll.data.schema import TrainRows

MOST_ROWS = 1024
_LARGEST_LOGIT = 30.0  # a class that is absent from the train rows has the probability e⁻³⁰

# Ratio of the last training loss to the loss of a constant answer above which a run reports it. A model that has not
# learned yet stays below it: a fresh mlp on digits has 2.33, and a constant answer 2.30, on 1,024 rows.
WORSE_THAN_CONSTANT = 1.05

Form = Literal["classes", "odds", "rate", "mean"]


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
    form: Form = "classes" if isinstance(loss, cross_entropy) else "odds" if loss is binary_cross_entropy else "mean"
    if form == "mean" and loss is not mse:
        return None
    try:
        y = rows.take(rows.order)[1]
    except (AtollError, OSError):
        return None
    if form != "mean" and not bool((y != IGNORED).any()):
        return None
    output = constant_outputs(form, y, torch.zeros(len(y), dtype=torch.int64), 1)
    if form == "classes":
        output, loss = output.reshape(-1).expand(*y.shape, -1), cross_entropy(axis=-1)
    else:
        output, y = output.expand(y.shape), y.double()
    return float(values_of(loss, output, y).mean())


def known_constant_loss(loss: PerExample, known: TrainRows, given: Input) -> float | None:
    """The smallest mean loss of a constant answer, from facts about the train rows of all sites.

    Args:
        loss: the loss of the task.
        known: the facts. A target has one class, or numbers.
        given: the input, which scales the numbers to predict.
    Returns:
        None if the loss is not one of cross-entropy, binary cross-entropy of two classes, and mse.
    Example:
        >>> from atoll.data.input import InputTarget
        >>> given = Input(target=InputTarget("regression"), features=(1,), outputs=1)
        >>> known_constant_loss(mse, TrainRows(deviation=(2.0,)), given)
        4.0
    """
    if loss is mse and known.deviation:
        y = torch.tensor(known.deviation, dtype=torch.float64)
        y = y / torch.tensor(given.target.spread or 1.0, dtype=torch.float64)
        return float(values_of(loss, torch.zeros_like(y)[None], y[None] if len(y) > 1 else y))
    if not known.classes:
        return None
    counts, classes = torch.tensor(known.classes), torch.arange(len(known.classes))
    share = counts / counts.sum()
    if isinstance(loss, cross_entropy):
        output = share.double().log().clamp(min=-_LARGEST_LOGIT).expand(len(classes), -1)
        values = values_of(cross_entropy(axis=-1), output, classes)
    elif loss is binary_cross_entropy and len(classes) == 2:
        output = share[1].double().logit().clamp(-_LARGEST_LOGIT, _LARGEST_LOGIT).expand(2)
        values = values_of(loss, output, classes.double())
    else:
        return None
    return float((values * share).sum())


def constant_outputs(form: Form, y: Tensor, owner: Tensor, owners: int) -> Tensor:
    """The constant answer to the rows of each owner, float64 `[owners, classes]` or `[owners, *target]`.

    Args:
        form: "classes": log-shares of the classes; "odds": the log-odds of each 0/1 label; "rate": the log of the
            mean of y; "mean": the mean of y.
        y: the targets, `[rows, *target]`. A label of −100 does not count.
        owner: the owner of each row, int64 `[rows]`.
        owners: the number of owners. An owner without rows gets NaN.
    Example:
        >>> constant_outputs("mean", torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 1]), 3).tolist()
        [2.0, 5.0, nan]
    """
    if form == "classes":
        count = Counts(y.masked_fill(y < 0, -1), max(2, 1 + int(y.max()))).added(owner, owners)
        return (count / count.sum(1, keepdim=True)).log().clamp(min=-_LARGEST_LOGIT)
    labelled = (y != IGNORED).double() if form == "odds" else torch.ones_like(y, dtype=torch.float64)
    sums, rows = (t.new_zeros(owners, *y.shape[1:]).index_add_(0, owner, t) for t in (labelled * y.double(), labelled))
    mean: Tensor = sums / rows
    if form == "rate":
        return mean.log().clamp(min=-_LARGEST_LOGIT)
    return mean.logit().clamp(-_LARGEST_LOGIT, _LARGEST_LOGIT) if form == "odds" else mean


def form_of(loss: PerExample, output: Any, y: Tensor) -> Form | None:
    """The form of a constant answer with the shape of this output; None if the output has no such form."""
    if not isinstance(output, Tensor) or not output.dim():
        return None
    labels = not y.is_floating_point()
    if single_logit(output, y):
        return "odds" if labels or loss is binary_cross_entropy else "rate" if loss is poisson else "mean"
    return "classes" if labels else None


def shaped(answers: Tensor, form: Form, loss: PerExample, output: Tensor, y: Tensor) -> Tensor:
    """Constant answers of k owners in the shape of an output, `[k, …]`.

    Args:
        answers: of `constant_outputs`.
        form: of `form_of`.
        loss: may name the axis of the classes.
        output, y: the output and the targets of one row.
    """
    if form != "classes":
        return answers.reshape(len(answers), *output.shape[1:]).to(output)
    at, _ = class_axis(output, y, axis_of(loss))
    absent = answers.new_full((len(answers), output.shape[at] - answers.shape[1]), -_LARGEST_LOGIT)
    answers = torch.cat((answers, absent), 1)
    axes = [len(answers), *(answers.shape[1] if axis == at else 1 for axis in range(1, output.dim()))]
    return answers.reshape(axes).expand(len(answers), *output.shape[1:]).to(output)
