"""Metrics: sums over rows that any engine can add, then one number from the sums.

    value = finish(Σ_rows sums(output, y), number of rows)

A metric that is not a function of sums, such as a rank statistic, reads all outputs of one host: `Metric.whole`.

Tests: tests/identities/test_metrics.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.loss import _Loss

from atoll.base.errors import UsageError, place_of, unknown_name
from atoll.base.lines import Change, Line
from atoll.base.names import RESERVED
from atoll.base.validation import required
from atoll.compute.loss import (
    PerExample,
    axis_of,
    binary_cross_entropy,
    cross_entropy,
    loss_of,
    of_regression,
    poisson,
    refuse_reduction,
    single_logit,
    values_of,
)
from atoll.compute.metric_names import base_metric
from atoll.compute.shapes import aligned, class_axis, labelled_means
from atoll.data.input import Input
from atoll.data.rows import IGNORED

AUC_BINS = 4096  # bins of the logit for rows on other hosts
_LARGEST_LOGIT = 1e4  # logits beyond it share the outer bins
_ECE_BINS = 15


@dataclass(frozen=True)
class Counts:
    """One-hot rows in short form: each row adds 1 at each of its indices.

    Args:
        index: int64 `[B]` or `[B, m]`; a negative index adds nothing.
        length: the length of the vector of counts.
    Example:
        >>> Counts(torch.tensor([2, 0, 2]), 3).added(torch.tensor([0, 0, 1]), 2).tolist()
        [[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]
    """

    index: Tensor
    length: int

    def added(self, owner: Tensor, owners: int) -> Tensor:
        """Add the rows of each owner: float64 `[owners, length]`, from the owner of each row, int64 `[B]`."""
        index = self.index.reshape(len(owner), -1)
        cells = owner[:, None] * self.length + index
        counts = cells[index >= 0].bincount(minlength=owners * self.length)
        return counts.reshape(owners, self.length).double()


@dataclass(frozen=True)
class Vectorised:
    """A `finish` that also takes the totals of many clients: `fn(totals [..., k], rows [...])` → `[...]`."""

    fn: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, total: Tensor, rows: int) -> Tensor:
        return self.fn(total, torch.tensor(float(rows), dtype=torch.float64))


@dataclass(frozen=True)
class Grouped:
    """An `over_rows` that also takes the rows of many clients: `fn(outputs, targets, owner, owners)` → `[owners]`."""

    fn: Callable[[Tensor, Tensor, Tensor, int], Tensor]

    def __call__(self, outputs: Tensor, targets: Tensor) -> float:
        return float(self.fn(outputs, targets, targets.new_zeros(len(targets), dtype=torch.int64), 1)[0])


@dataclass(frozen=True)
class InUnits:
    """A function of outputs and targets in the target's units: y ← y · spread + centre, in float64.

    Args:
        fn: the function.
        centre, spread: of each number to predict.
    Example:
        >>> InUnits(_absolute, (10.0,), (2.0,))(torch.tensor([[1.0]]), torch.tensor([0.5]))
        tensor([1.], dtype=torch.float64)
    """

    fn: Callable[..., Any]
    centre: tuple[float, ...]
    spread: tuple[float, ...]

    def __call__(self, output: Tensor, y: Tensor) -> Any:
        return self.fn(self._units(output), self._units(y))

    def _units(self, values: Tensor) -> Tensor:
        values = values.double()
        if len(self.spread) == 1:
            return values * self.spread[0] + self.centre[0]
        return values * values.new_tensor(self.spread) + values.new_tensor(self.centre)


@dataclass(frozen=True)
class OfRates:
    """A function of predictions and targets, for outputs that are logarithms of the predictions.

    Args:
        fn: the function.
    Example:
        >>> OfRates(_absolute)(torch.tensor([[0.0]]), torch.tensor([3.0]))
        tensor([2.], dtype=torch.float64)
    """

    fn: Callable[..., Any]

    def __call__(self, output: Tensor, y: Tensor) -> Any:
        return self.fn(output.double().exp(), y)


Sums = Callable[[Tensor, Tensor], Tensor | Counts]
Finish = Callable[[Tensor, int], "float | Tensor"]
Whole = Callable[[Tensor, Tensor], float]


@dataclass(frozen=True)
class Metric:
    """A metric over many rows: value = finish(Σ sums(output, y), rows).

    Args:
        name: the name in reports.
        sums: `(output, y)` → `[B]` or `[B, k]`, one number or vector for each row, or `Counts`. Outputs and targets
            are in the units of the target. Numbers are added in float64.
        finish: `(total, rows)` → the value, or NaN if it is undefined. `total` is a float64 tensor, `[]` for sums `[B]`
            and `[k]` for vectors. A tensor as result is a table. None: the mean, total / rows.
        higher_is_better: whether a larger value is an improvement.
        over_rows: `(outputs, targets)` → the value, over all rows of this host. If there is also `sums`, it is used
            for rows on other hosts.
        built_in: whether the metric is one of atoll's, which draws nothing and relates no rows of a batch.
    Raises:
        UsageError: neither `sums` nor `over_rows`.
    Example:
        >>> error = Metric("error", lambda output, y: (output.argmax(-1) != y).float())
        >>> error.value(torch.tensor(3.0), 12)
        0.25
    """

    name: str
    sums: Sums | None
    finish: Finish | None = None
    higher_is_better: bool = False
    over_rows: Whole | None = None
    built_in: bool = field(default=False, kw_only=True, repr=False)

    def __post_init__(self) -> None:
        if self.sums is None and self.over_rows is None:
            raise UsageError(
                f"Metric({self.name!r}, None).",
                "a function `sums`.",
                "a metric is computed from one number or vector for each row.",
                Line(python=f"Metric({self.name!r}, lambda output, y: (output - y).abs().mean(-1))"),
            )

    @classmethod
    def whole(cls, name: str, fn: Whole, higher_is_better: bool = False) -> Metric:
        """Build a metric that needs all rows at once.

        Args:
            name: the name in reports.
            fn: `(outputs, targets)` → a number, or NaN if it is undefined; all evaluated rows, in CPU memory.
            higher_is_better: whether a larger value is an improvement.
        Example:
            >>> Metric.whole("median_error", lambda o, y: float((o - y).abs().median())).sums is None
            True
        """
        return cls(name, None, None, higher_is_better, fn)

    def value(self, total: Tensor, rows: int) -> float | Tensor:
        """The value of the metric from the sums over `rows` rows; NaN if there are no rows."""
        if not rows:
            return math.nan
        if self.finish is None:
            return float(total) / rows
        try:
            found = self.finish(total, rows)
            return found if isinstance(found, Tensor) and found.numel() != 1 else float(found)
        except UsageError:  # it already has a line to write
            raise
        except Exception as error:
            raise self._raised("finish", error) from error

    def over_all(self, outputs: Tensor, targets: Tensor) -> float:
        """The value of `over_rows` over these rows, `[rows, …]`."""
        over_rows = required(self.over_rows, "function over all rows")
        try:
            return float(over_rows(outputs, targets))
        except UsageError:  # as above
            raise
        except Exception as error:
            raise self._raised("function over all rows", error) from error

    def _raised(self, function: str, error: Exception) -> UsageError:
        place = place_of(error)
        return UsageError(
            f"The {function} of the metric {self.name!r} raised {type(error).__name__}: {error}"
            f"{f' ({place})' if place else ''}.",
            "a number, or NaN if the value is undefined.",
            "some clients may have few rows, or rows of one class.",
            Line(python='float("nan")'),
        )

    def each(self, totals: Tensor, rows: Tensor) -> Tensor:
        """The value for each client: float64 `[n]` from totals `[n]` or `[n, k]` and rows `[n]`; NaN without rows."""
        if self.finish is None:
            return totals / rows
        if isinstance(self.finish, Vectorised):
            return torch.where(rows > 0, self.finish.fn(totals, rows.double()), torch.nan)
        values = [self.value(total, n) for total, n in zip(totals, rows.tolist(), strict=True)]
        return torch.tensor([math.nan if isinstance(v, Tensor) else v for v in values], dtype=torch.float64)

    def each_over_rows(self, outputs: Tensor, targets: Tensor, owner: Tensor, owners: int) -> Tensor:
        """The value of `over_rows` for each client, float64 `[owners]`; NaN without rows."""
        if isinstance(self.over_rows, Grouped):
            return self.over_rows.fn(outputs, targets, owner, owners)
        order, counts = owner.argsort(stable=True), owner.bincount(minlength=owners).tolist()
        parts = zip(outputs[order].split(counts), targets[order].split(counts), strict=True)
        values = [self.over_all(o, y) if len(y) else math.nan for o, y in parts]
        return torch.tensor(values, dtype=torch.float64)


# Scores


def _canonical(axis: int | None, output: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The output in the shape of `y`, or with one more axis for the classes, the last; and the labels."""
    if single_logit(output, y):
        return aligned(output, y), y
    at, y = class_axis(output, y, axis)
    return output.movedim(at, -1), y


def _of_classes(axis: int | None, function: Callable[..., Any], output: Tensor, y: Tensor, *owners: Any) -> Any:
    return function(*_canonical(axis, output, y), *owners)


def is_binary(output: Tensor, y: Tensor) -> bool:
    """Whether the output, in its canonical shape, has one logit for each target, and not one for each class."""
    return output.shape == y.shape


def _predicted(output: Tensor, y: Tensor) -> Tensor:
    """The predicted class of each target, int64 in the shape of `y`: a logit above 0, or the largest logit."""
    return (output > 0).long() if is_binary(output, y) else output.argmax(-1)


def _classes(output: Tensor, y: Tensor) -> int:
    return 2 if is_binary(output, y) else output.shape[-1]


def _probabilities(output: Tensor, y: Tensor) -> Tensor:
    """The probability of each class in float64, `[*y.shape, C]`."""
    if is_binary(output, y):
        p = output.double().sigmoid()
        return torch.stack((1 - p, p), -1)
    return output.double().softmax(-1)


def _log_odds(output: Tensor, y: Tensor) -> Tensor:
    """log p − log(1 − p) of each class in float64, `[*y.shape, C]`; one column for two classes."""
    if is_binary(output, y):
        return output.double().unsqueeze(-1)
    output = output.double()
    if output.shape[-1] == 2:
        return output[..., 1:] - output[..., :1]
    others = torch.stack(
        [torch.cat((output[..., :c], output[..., c + 1 :]), -1).logsumexp(-1) for c in range(output.shape[-1])], -1
    )
    return output - others


def _mean(values: Tensor, y: Tensor) -> Tensor:
    """Reduce `[B, …]` to one number for each row: the mean over its labelled places."""
    return values if y.dim() == 1 else labelled_means(values, y != IGNORED)


def _label(y: Tensor) -> Tensor:
    """Labels as indices; 0 in place of `IGNORED`."""
    return torch.where(y == IGNORED, 0, y).long()


def _paired(output: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Predictions and targets of a regression in float64, `[B, T]`."""
    return aligned(output, y).double().reshape(len(y), -1), y.double().reshape(len(y), -1)


# Classification


def _confusion(output: Tensor, y: Tensor) -> Counts:
    """Counts of (target, prediction), C² numbers. A target below 0 is no label."""
    count = _classes(output, y)
    cell = y.long() * count + _predicted(output, y)
    return Counts(cell.masked_fill(y == IGNORED, -1).reshape(len(y), -1), count * count)


def _label_counts(output: Tensor, y: Tensor) -> Counts:
    """Counts of (target, prediction) for each of L labels, 4L numbers."""
    output, y = aligned(output, y).reshape(len(y), -1), y.reshape(len(y), -1)
    cell = torch.arange(y.shape[1], device=y.device) * 4 + y.long() * 2 + (output > 0).long()
    return Counts(cell.masked_fill(y == IGNORED, -1), 4 * y.shape[1])


def _table(total: Tensor) -> Tensor:
    count = math.isqrt(total.shape[-1])
    return total.reshape(*total.shape[:-1], count, count)


def _recalls(table: Tensor) -> Tensor:
    return table.diagonal(dim1=-2, dim2=-1) / table.sum(-1)


def _f1s(table: Tensor) -> Tensor:
    hits = table.diagonal(dim1=-2, dim2=-1)
    return 2 * hits / (table.sum(-1) + table.sum(-2))


def _of_two(name: str, one: Callable[[Tensor], Tensor], tables: Tensor, labels: bool) -> Tensor:
    """A value of the positive class, the last of two, from the confusion table; for labels the mean over them."""
    if labels:
        return one(tables).nanmean(-1)
    if tables.shape[-1] != 2:
        raise UsageError(
            f"The metric {name!r} was computed for {tables.shape[-1]} classes.",
            "two classes.",
            f"{name} is the value of one positive class.",
            Change("metrics", ["macro_f1" if name == "f1" else "balanced_accuracy"]),
        )
    return one(tables)


def _hits(output: Tensor, y: Tensor) -> Tensor:
    return _mean((_predicted(output, y) == y).to(torch.float64), y)


def _top(k: int, output: Tensor, y: Tensor) -> Tensor:
    if is_binary(output, y):
        return torch.ones(len(y), dtype=torch.float64, device=y.device)
    near = output.topk(min(k, output.shape[-1]), -1).indices
    return _mean((near == y.unsqueeze(-1)).any(-1).double(), y)


def _brier(output: Tensor, y: Tensor) -> Tensor:
    p = _probabilities(output, y)
    error = (p - F.one_hot(_label(y), p.shape[-1])).square().sum(-1)
    return _mean(error / 2 if p.shape[-1] == 2 else error, y)


def _log_loss(output: Tensor, y: Tensor) -> Tensor:
    if is_binary(output, y):
        z = output.double()
        return _mean(-F.logsigmoid(torch.where(y > 0, z, -z)), y)
    return _mean(-output.double().log_softmax(-1).gather(-1, _label(y).unsqueeze(-1)).squeeze(-1), y)


def _confidence(output: Tensor, y: Tensor) -> Tensor:
    """Number, confidence and hits of each row's bin of confidence, `[B, 3 · bins]`; a mean over the labelled places."""
    p = _probabilities(output, y)
    top, guess = p.max(-1)
    bins = F.one_hot((top * _ECE_BINS).ceil().long().clamp(1, _ECE_BINS) - 1, _ECE_BINS).double()
    hit = (guess == y).double()
    parts = torch.cat((bins, bins * top.unsqueeze(-1), bins * hit.unsqueeze(-1)), -1)
    if y.dim() == 1:
        return parts
    labelled = (y != IGNORED).double().flatten(1)
    return (parts.flatten(1, -2) * labelled.unsqueeze(-1)).sum(1) / labelled.sum(1, keepdim=True)


def _ece(total: Tensor, rows: Tensor) -> Tensor:
    _, confidence, hits = total.unflatten(-1, (3, _ECE_BINS)).unbind(-2)
    error: Tensor = (confidence - hits).abs().sum(-1)
    return error / rows


# Area under the ROC curve


def _ranked_auc(score: Tensor, positive: Tensor, owner: Tensor, owners: int) -> Tensor:
    """P(score of a positive row > score of a negative row) + ½ P(equal) of each owner, by ranks, `[owners]`.

    NaN for an owner without positive rows or without negative rows.
    """
    order = score.argsort(stable=True)
    order = order[owner[order].argsort(stable=True)]
    score, positive, owner = score[order], positive[order].double(), owner[order]
    fresh = torch.ones(len(score), dtype=torch.bool, device=score.device)
    fresh[1:] = (score[1:] != score[:-1]) | (owner[1:] != owner[:-1])
    group = fresh.cumsum(0) - 1
    ties = group.bincount().double()
    middle = ties.cumsum(0) - (ties - 1) / 2  # the mean rank of equal scores, from 1
    counts = owner.bincount(minlength=owners).double()
    above = positive.new_zeros(owners).index_add_(0, owner, positive)
    ranks = middle[group] - (counts.cumsum(0) - counts)[owner]
    wins: Tensor = positive.new_zeros(owners).index_add_(0, owner, ranks * positive) - above * (above + 1) / 2
    return wins / (above * (counts - above))


def _auc(output: Tensor, y: Tensor, owner: Tensor, owners: int) -> Tensor:
    odds = _log_odds(output, y)
    owner = owner.reshape(-1, *[1] * (y.dim() - 1)).expand(y.shape).reshape(-1)
    odds, y = odds.flatten(0, -2), y.reshape(-1)
    odds, owner, y = odds[y != IGNORED], owner[y != IGNORED], y[y != IGNORED]
    if odds.shape[1] == 1:
        return _ranked_auc(odds[:, 0], y == 1, owner, owners)
    each = [_ranked_auc(odds[:, c], y == c, owner, owners) for c in range(odds.shape[1])]
    return torch.stack(each).nanmean(0)


def _label_auc(output: Tensor, y: Tensor, owner: Tensor, owners: int) -> Tensor:
    score, y = _paired(output, y)
    known = y != IGNORED
    each = [_ranked_auc(s[k], t[k] > 0, owner[k], owners) for s, t, k in zip(score.T, y.T, known.T, strict=True)]
    return torch.stack(each).nanmean(0)


def _bin_of(odds: Tensor) -> Tensor:
    place = (odds.asinh() / math.asinh(_LARGEST_LOGIT) + 1) / 2
    return (place * AUC_BINS).floor().long().clamp(0, AUC_BINS - 1)


def _binned(positive: Tensor, odds: Tensor) -> Counts:
    """Counts of (column, negative or positive, bin) from columns `[B, C]`."""
    column = torch.arange(odds.shape[-1], device=odds.device)
    return Counts((column * 2 + positive.long()) * AUC_BINS + _bin_of(odds), odds.shape[-1] * 2 * AUC_BINS)


def _auc_bins(output: Tensor, y: Tensor) -> Counts:
    odds = _log_odds(output, y)
    if odds.shape[-1] == 1:  # two classes: one column of (negative or positive, bin), several for each row of tokens
        odds, y = odds.reshape(len(y), -1), y.reshape(len(y), -1)
        cell = (y == 1).long() * AUC_BINS + _bin_of(odds)
        return Counts(cell.masked_fill(y == IGNORED, -1), 2 * AUC_BINS)
    positive = y.unsqueeze(-1) == torch.arange(odds.shape[-1], device=y.device)
    cells = _binned(positive, odds)
    return Counts(cells.index.masked_fill(y.unsqueeze(-1) == IGNORED, -1).reshape(len(y), -1), cells.length)


def _label_auc_bins(output: Tensor, y: Tensor) -> Counts:
    score, y = _paired(output, y)
    cells = _binned(y > 0, score)
    return Counts(cells.index.masked_fill(y == IGNORED, -1), cells.length)


def _auc_of_bins(total: Tensor, rows: Tensor) -> Tensor:
    negative, positive = total.unflatten(-1, (-1, 2, AUC_BINS)).unbind(-2)
    below = negative.cumsum(-1) - negative / 2
    wins: Tensor = (positive * below).sum(-1) / (positive.sum(-1) * negative.sum(-1))
    return wins.nanmean(-1)


# Regression


def _squared(output: Tensor, y: Tensor) -> Tensor:
    output, y = _paired(output, y)
    return (output - y).square().mean(1)


def _absolute(output: Tensor, y: Tensor) -> Tensor:
    output, y = _paired(output, y)
    return (output - y).abs().mean(1)


def _moments(centre: float, output: Tensor, y: Tensor) -> Tensor:
    """Squared error, y − c and (y − c)² of each target, `[B, 3T]`. The centre c prevents cancellation."""
    output, y = _paired(output, y)
    far = y - centre
    return torch.cat(((output - y).square(), far, far.square()), 1)


def _r2(total: Tensor, rows: Tensor) -> Tensor:
    error, far, squares = total.unflatten(-1, (3, -1)).unbind(-2)
    spread = squares - far.square() / rows.unsqueeze(-1)
    return torch.where(spread > 0, 1 - error / spread, torch.nan).nanmean(-1)


def _deviance(output: Tensor, y: Tensor) -> Tensor:
    output, y = _paired(output, y)
    return 2 * (torch.xlogy(y, y) - y * output - y + output.exp()).mean(1)


# Survival


def _count_below(values: Tensor, prefix: Tensor, bound: Tensor) -> Tensor:
    """How many of the first `prefix` values are below `bound`, for each query: a wavelet matrix, O(n log n).

    Args:
        values: integers in [0, n], int64 `[n]`.
        prefix: how many values count, int64 `[q]`.
        bound: int64 `[q]`, in [0, n].
    Example:
        >>> _count_below(torch.tensor([2, 0, 1]), torch.tensor([2, 3]), torch.tensor([1, 2])).tolist()
        [1, 2]
    """
    start, end, count = torch.zeros_like(prefix), prefix, torch.zeros_like(prefix)
    for bit in reversed(range(max(1, len(values).bit_length()))):
        ones = (values >> bit) & 1
        zeros = torch.cat((ones.new_zeros(1), (1 - ones).cumsum(0)))
        high, first, last = ((bound >> bit) & 1).bool(), zeros[start], zeros[end]
        count = count + torch.where(high, last - first, 0)
        start = torch.where(high, zeros[-1] + start - first, first)
        end = torch.where(high, zeros[-1] + end - last, last)
        values = torch.cat((values[ones == 0], values[ones == 1]))
    return count


def _c_index(output: Tensor, y: Tensor) -> float:
    """Harrell's index: the fraction of comparable pairs in which the row with the earlier event has the larger output.

    A pair is comparable if one row has an event, and the other has a later time, or an equal time without an event.
    An equal output counts one half.
    """
    if y.dim() != 2 or y.shape[1] != 2 or output.numel() != len(y):
        raise UsageError(
            f"c_index of outputs {tuple(output.shape)} and targets {tuple(y.shape)}.",
            "one output, and a time and an event, for each row.",
            "outputs are compared with the order of the events.",
        )
    time, event = y[:, 0].double(), y[:, 1] > 0
    rank = output.double().reshape(len(y)).unique(return_inverse=True)[1]
    # Latest first; at equal times rows without an event come first. The rows comparable with row i are then a prefix.
    order = torch.argsort(event.long(), stable=True)
    order = order[torch.argsort(time[order], descending=True, stable=True)]
    time, event, rank = time[order], event[order], rank[order]
    _, sizes = time.unique_consecutive(return_counts=True)
    group = torch.arange(len(sizes), device=y.device).repeat_interleave(sizes)
    censored = torch.zeros(len(sizes), dtype=torch.int64, device=y.device).index_add_(0, group, (~event).long())
    prefix = ((sizes.cumsum(0) - sizes) + censored)[group][event]
    mine = rank[event]
    pairs = int(prefix.sum())
    if not pairs:
        return math.nan
    below, up_to = _count_below(rank, prefix, mine), _count_below(rank, prefix, mine + 1)
    return float((below + up_to).sum()) / 2 / pairs


def _named(labels: bool, centre: float, axis: int | None) -> dict[str, Metric]:
    """Every metric by name, for rows with several labels or one, targets near `centre`, and classes on this axis."""

    def classes(function: Callable[..., Any]) -> Callable[..., Any]:
        return partial(_of_classes, axis, function)

    auc_bins, auc = (_label_auc_bins, _label_auc) if labels else (classes(_auc_bins), classes(_auc))
    counts = _label_counts if labels else classes(_confusion)

    def tables(total: Tensor) -> Tensor:
        return total.unflatten(-1, (-1, 2, 2)) if labels else _table(total)

    def mean_of(each: Callable[[Tensor], Tensor]) -> Finish:
        if labels:
            return Vectorised(lambda total, rows: each(tables(total)).nanmean(-1).nanmean(-1))
        return Vectorised(lambda total, rows: each(tables(total)).nanmean(-1))

    def positive(name: str, one: Callable[[Tensor], Tensor]) -> Metric:
        return Metric(name, counts, Vectorised(lambda total, rows: _of_two(name, one, tables(total), labels)), True)

    found = (
        Metric("accuracy", classes(_hits), None, True),
        Metric("balanced_accuracy", counts, mean_of(_recalls), True),
        Metric("top5", classes(partial(_top, 5)), None, True),
        positive("f1", lambda t: _f1s(t)[..., 1]),
        Metric("macro_f1", counts, mean_of(_f1s), True),
        positive("precision", lambda t: t[..., 1, 1] / t[..., :, 1].sum(-1)),
        positive("recall", lambda t: t[..., 1, 1] / t[..., 1, :].sum(-1)),
        Metric("auc", auc_bins, Vectorised(_auc_of_bins), True, Grouped(auc)),
        Metric("brier", classes(_brier)),
        Metric("ece", classes(_confidence), Vectorised(_ece)),
        Metric("log_loss", classes(_log_loss)),
        Metric("confusion", counts, lambda total, rows: tables(total)),
        Metric("rmse", _squared, Vectorised(lambda total, rows: (total / rows).sqrt())),
        Metric("mae", _absolute),
        Metric("r2", partial(_moments, centre), Vectorised(_r2), True),
        Metric("poisson_deviance", _deviance),
        Metric("perplexity", classes(_log_loss), Vectorised(lambda total, rows: (total / rows).exp())),
        Metric("c_index", None, None, True, _c_index),
    )
    return {metric.name: replace(metric, built_in=True) for metric in found}


METRICS: Mapping[str, Metric] = _named(False, 0.0, None)


def named_metric(name: str, *, labels: bool = False, centre: float = 0.0, axis: int | None = None) -> Metric:
    """The metric of this name.

    Args:
        name: a name in `METRICS`.
        labels: whether a row has several 0/1 labels; the value is then a mean over labels.
        centre: a number near the targets; `r2` subtracts it, against cancellation.
        axis: the axis of the classes if the shapes fit two; None: such shapes are refused.
    Raises:
        UsageError: an unknown name.
    Example:
        >>> named_metric("accuracy").higher_is_better
        True
    """
    if name not in METRICS:
        raise unknown_name("metric", name, METRICS, lambda near: Change("metrics", [near]))
    return _named(labels, centre, axis)[name]


def metric_of(metric: str | Metric, loss: PerExample, *, labels: bool = False, centre: float = 0.0) -> Metric:
    """The metric of a name, or the metric itself. A named metric takes the axis of the classes from the loss.

    Raises:
        UsageError: an unknown name, or a loss of `torch.nn` that returns a mean or a sum.
    """
    if isinstance(metric, str):
        return named_metric(metric, labels=labels, centre=centre, axis=axis_of(loss))
    if metric.sums is not None:
        refuse_reduction(metric.sums)
    return metric


def in_units(metric: Metric, centre: tuple[float, ...], spread: tuple[float, ...]) -> Metric:
    """The metric of a model whose outputs and targets are scaled: it receives them in the target's units.

    Args:
        metric: the metric.
        centre, spread: of each number to predict.
    """
    return _wrapped(metric, partial(InUnits, centre=centre, spread=spread))


def of_rates(metric: Metric) -> Metric:
    """The metric of a model whose outputs are logarithms of rates: it receives rates.

    `poisson_deviance` is unchanged, since it takes logarithms of rates.
    """
    return metric if metric.built_in and metric.name == "poisson_deviance" else _wrapped(metric, OfRates)


def metrics_of(
    metrics: Sequence[str | Metric], loss: str | PerExample, input: Input, near: float = 0.0
) -> tuple[Metric, ...]:
    """Metrics whose outputs and targets arrive in the target's units, if the loss has other units.

    Args:
        metrics: names or metrics.
        loss: the loss, which has the axis of the classes.
        input: the input, with the scale of the target.
        near: a number near the targets, if the input has no scale of the target.
    """
    centre, spread, labels = input.target.centre, input.target.spread, input.kind == "labels"
    for name in metrics:
        if isinstance(name, str):
            _check_kind(name, loss_of(loss), input)
    if not spread:
        found = tuple(metric_of(m, loss_of(loss), labels=labels, centre=near) for m in metrics)
        return tuple(map(of_rates, found)) if loss_of(loss) is poisson else found
    return tuple(in_units(metric_of(m, loss_of(loss), centre=centre[0]), centre, spread) for m in metrics)


_OF_NUMBERS = ("rmse", "mae", "r2", "poisson_deviance")
_OF_BOTH = ("c_index",)


def _check_kind(name: str, loss: PerExample, input: Input) -> None:
    """Refuse a metric of classes for a loss of numbers, and a metric of numbers for a loss of classes."""
    if name in _OF_BOTH or name not in METRICS:
        return
    of_numbers = name in _OF_NUMBERS
    if not of_numbers and input.kind == "regression" and of_regression(loss):
        raise UsageError(
            f"metrics={name!r} for a target of numbers.",
            f"one of {', '.join(_OF_NUMBERS)}.",
            "the metric counts rows of classes.",
            Change("metrics", ["r2"]),
        )
    of_classes = isinstance(loss, cross_entropy) or loss is binary_cross_entropy
    if of_numbers and input.classes is not None and of_classes:
        raise UsageError(
            f"metrics={name!r} for a target of classes.",
            f"one of {', '.join(n for n in METRICS if n not in (*_OF_NUMBERS, *_OF_BOTH))}.",
            "the metric is a distance of numbers.",
            Change("metrics", ["accuracy"]),
        )


def _wrapped(metric: Metric, wrap: Callable[[Callable[..., Any]], Any]) -> Metric:
    sums = None if metric.sums is None else wrap(metric.sums)
    over_rows = None if metric.over_rows is None else wrap(metric.over_rows)
    return replace(metric, sums=sums, over_rows=over_rows)


def check_metric_names(metrics: Sequence[Metric]) -> None:
    """Refuse metrics with a name that a run uses itself, or with one name for two of them.

    Raises:
        UsageError: names the metric.
    """
    names = [m.name for m in metrics]
    for name in names:
        if name in (*RESERVED, "loss") or names.count(name) > 1 or base_metric(name) in (*names, "held_out_loss"):
            raise UsageError(
                f"A metric is called {name!r}{' twice' if names.count(name) > 1 else ''}.",
                f"a name for each metric, other than {', '.join(sorted((*RESERVED, 'loss')))}, and other than a name "
                "for values over clients, such as accuracy_clients.",
                "each metric is one column of the log, and the run writes these columns itself.",
            )


def row_sums(metric: Metric, output: Any, y: Tensor) -> Tensor | Counts:
    """Call the `sums` of a metric, and require one number or vector for each row.

    Returns:
        float64 `[B]` or `[B, k]`, or counts.
    Raises:
        UsageError: another shape or type.
    """
    if metric.sums is None:
        raise UsageError(f"The metric {metric.name!r} has no sums.", "a metric that is computed from sums.")
    name = f"metric {metric.name}"
    if isinstance(metric.sums, _Loss):
        return values_of(metric.sums, output, y, name).double()
    found = metric.sums(output, y)
    if isinstance(found, Counts):
        whole = not found.index.is_floating_point() and found.index.shape[:1] == y.shape[:1] and found.length > 0
        if whole and (not found.index.numel() or int(found.index.max()) < found.length):
            return found
        raise UsageError(
            f"The {name} returned Counts with index {tuple(found.index.shape)} ({found.index.dtype}) "
            f"and length {found.length}, for {len(y)} rows.",
            "an integer index below the length for each row.",
        )
    vectors = metric.finish is not None and isinstance(found, Tensor) and found.dim() == 2
    if vectors and not found.is_complex() and found.shape[:1] == y.shape[:1] and found.device == y.device:
        return found.double()
    return values_of(lambda output, y: found, output, y, name).double()


def summed(rows: Tensor | Counts, owner: Tensor, owners: int) -> Tensor:
    """Add the rows of each owner: float64 `[owners]` or `[owners, k]`, from the owner of each row, int64 `[B]`."""
    if isinstance(rows, Counts):
        return rows.added(owner, owners)
    return rows.new_zeros(owners, *rows.shape[1:]).index_add_(0, owner, rows)
