"""Robust rules: aggregates that a few arbitrary contributions cannot move far.

Every rule counts clients, not rows: a claimed number of rows has no influence. The order of arrival changes no bit.

| rule | withstands | of n contributions |
|---|---|---|
| `Median()` | fewer than n/2 | coordinate by coordinate |
| `TrimmedMean(beta)` | ⌊βn⌋ | coordinate by coordinate |
| `Krum(f, m)` | f, n ≥ 2f + 3 | the m contributions with the nearest neighbours |
| `GeometricMedian()` | fewer than n/2 | the point with the least sum of distances |
| `CenteredClip(tau)` | few | each moves the result by at most tau/n in a step |
| `NormBound(r, rule)` | few | each row is scaled to the norm r |

Tests: tests/identities/test_robust.py
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import floor

import torch
from torch import Tensor

from atoll.base.errors import UsageError
from atoll.base.validation import bounded_number, check_fields
from atoll.plan.aggregate.mean import Mean
from atoll.plan.aggregate.rows import BLOCK, RowRule, squared_distances, weighted

_STEPS, _NEAR = 1000, 1e-12  # of the geometric median: the most steps, and the least relative change of the weights
_AT_A_ROW = 1e-12  # a distance below this part of the largest one is 0
_CLIPS = 5  # steps of the centered clipping


@dataclass(frozen=True, repr=False)
class Median(RowRule):
    """The median of each coordinate; of an even number of rows the mean of the two middle ones.

    Example:
        >>> Median().rule(torch.tensor([[1.0], [900.0], [3.0]]))
        tensor([3.], dtype=torch.float64)

    Reference: Yin et al., Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates, 2018.
    """

    def rule(self, x: Tensor) -> Tensor:
        n = len(x)
        return _mean_of_ranks(x, (n - 1) // 2, n // 2 + 1)


@dataclass(frozen=True, repr=False)
class TrimmedMean(RowRule):
    """The mean of each coordinate without its ⌊βn⌋ largest and ⌊βn⌋ smallest values.

    Args:
        beta: β, the share that is cut off at each side, in [0, 0.5).
    Raises:
        UsageError: beta is out of range.
    Example:
        >>> TrimmedMean(0.25).rule(torch.tensor([[1.0], [900.0], [3.0], [-7.0]]))
        tensor([2.], dtype=torch.float64)

    Reference: Yin et al., Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates, 2018.
    """

    beta: float = bounded_number(least=0, below=0.5, example=0.2, why="with half or more nothing remains.")

    def __post_init__(self) -> None:
        check_fields(self)

    def rule(self, x: Tensor) -> Tensor:
        cut = floor(self.beta * len(x) + 1e-9)
        return _mean_of_ranks(x, cut, len(x) - cut)


@dataclass(frozen=True, repr=False)
class Krum(RowRule):
    """The mean of the m contributions with the smallest sums of squared distances to their nearest neighbours.

    sᵢ = Σⱼ |gᵢ − gⱼ|²,  j one of the n − f − 2 updates that are nearest to gᵢ

    Of equal sums the one of the smaller client id is selected. Buffers are those of the selected clients.

    Args:
        f: the largest number of clients that may send arbitrary updates, ≥ 0.
        m: the number of updates that are averaged, ≥ 1.
    Raises:
        UsageError: a number is out of range, or a cohort has fewer than 2f + 3 clients or fewer than m.
        RunError: a round has fewer contributions.
    Example:
        >>> Krum(1).rule(torch.tensor([[1.0], [1.1], [900.0], [1.2], [0.7]]))
        tensor([1.1000], dtype=torch.float64)

    Reference: Blanchard et al., Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent, 2017.
    """

    f: int = bounded_number(least=0, whole=True, example=1)
    m: int = bounded_number(1, least=1, whole=True)

    def __post_init__(self) -> None:
        check_fields(self)

    def least_rows(self) -> int:
        return max(2 * self.f + 3, self.m)

    def for_rows(self, n: int) -> str:
        f, m = min(self.f, (n - 3) // 2), min(self.m, n)
        return repr(Krum(f, m)) if f > 0 else super().for_rows(n)

    def row_weights(self, x: Tensor) -> Tensor:
        distances = squared_distances(x).sort(1).values  # the first is 0, that of the row itself
        scores = distances[:, 1 : len(x) - self.f - 1].sum(1)
        best = scores.sort(stable=True).indices[: self.m]
        return torch.zeros_like(scores).index_fill_(0, best, 1.0 / self.m)

    def rule(self, x: Tensor) -> Tensor:
        return _by_weights(self, x)


@dataclass(frozen=True, repr=False)
class GeometricMedian(RowRule):
    """The point with the least sum of distances to the updates, by Weiszfeld's iteration.

    z = argmin Σ |gᵢ − z|,   z ← Σ wᵢ gᵢ,  wᵢ ∝ 1/|gᵢ − z|

    If z is one of the updates, the step of Vardi and Zhang leaves it unless it is the minimum. z is a mean
    of the updates with these weights, so the iteration needs only their distances.

    Example:
        >>> GeometricMedian().rule(torch.tensor([[1.0], [1.0], [900.0]]))
        tensor([1.0000], dtype=torch.float64)

    Reference: Pillutla, Kakade, Harchaoui, Robust Aggregation for Federated Learning, 2022.
    """

    def row_weights(self, x: Tensor) -> Tensor:
        squares = squared_distances(x)
        weights = squares.new_full((len(x),), 1.0 / len(x))
        smallest = squares.amax() * torch.finfo(torch.float64).eps ** 2
        for _ in range(_STEPS):
            to_rows = squares @ weights  # |gᵢ − z|² = Σⱼ wⱼ|gᵢ − gⱼ|² − ½ Σ w w |g − g|²
            distances = (to_rows - 0.5 * weights @ to_rows).clamp(min=smallest + 1e-300).sqrt()
            after = _step_of_weiszfeld(squares, distances)
            change, weights = (after - weights).abs().max(), after
            if float(change) < _NEAR:
                break
        return weights

    def rule(self, x: Tensor) -> Tensor:
        return _by_weights(self, x)


def _step_of_weiszfeld(squares: Tensor, distances: Tensor) -> Tensor:
    """The next weights, also at a point that is one of the rows (Vardi and Zhang 2000).

    There the plain iteration would stay for ever, although the row need not be the minimum: it is one only if the unit
    vectors to the other rows add to at most the number of rows at the point.

    Args:
        squares: squared distances between the rows, `[n, n]`.
        distances: of the rows from the present point, `[n]`.
    """
    here = distances <= distances.amax() * _AT_A_ROW
    if not bool(here.any()) or bool(here.all()):
        weights: Tensor = 1.0 / distances
        return weights / weights.sum()
    count, k = here.sum(), here.nonzero()[0, 0]
    pulls = torch.where(here, 0.0, 1.0 / distances)
    inner = (squares[k][:, None] + squares[k][None, :] - squares) / 2  # of the differences to row k
    force = (pulls @ inner @ pulls).clamp(min=0).sqrt()
    if float(force) <= float(count):
        return here / count
    stay = count / force
    return (1 - stay) * pulls / pulls.sum() + stay * here / count


@dataclass(frozen=True, repr=False)
class CenteredClip(RowRule):
    """Centered clipping: the mean of the updates, each clipped to the distance tau around the present result.

    v ← v + (1/n) Σ (gᵢ − v)·min(1, tau/|gᵢ − v|),  five times, from the median of each coordinate

    The paper starts at the result of the last round. Here the start is the median of this round, which needs no state
    and is itself robust.

    Args:
        tau: the radius of the clipping, > 0.
    Raises:
        UsageError: tau is out of range.
    Example:
        >>> CenteredClip(1.0).rule(torch.tensor([[1.0], [900.0], [3.0]])).round()
        tensor([3.], dtype=torch.float64)

    Reference: Karimireddy, He, Jaggi, Learning from History for Byzantine Robust Optimization, 2021.
    """

    tau: float = bounded_number(above=0, example=1.0, why="with a radius of 0 no update has influence.")

    def __post_init__(self) -> None:
        check_fields(self)

    def rule(self, x: Tensor) -> Tensor:
        center = Median().rule(x)
        for _ in range(_CLIPS):
            off = x.double() - center
            norms = torch.linalg.vector_norm(off, dim=1, keepdim=True)
            center = center + (off * (self.tau / norms.clamp(min=self.tau))).mean(0)
        return center


@dataclass(frozen=True, repr=False)
class NormBound(RowRule):
    """Another rule on updates whose norm is at most r. A longer update is scaled to the norm r.

    g = of(gᵢ·min(1, r/|gᵢ|)).  One update moves the mean of n by at most 2r/n.

    Buffers and other means are not scaled.

    Args:
        r: the largest norm, > 0.
        of: the rule for the scaled updates: one of this module, or `Mean("equal")`.
    Raises:
        UsageError: r is out of range, or the rule weighs clients by their rows.
    Example:
        >>> NormBound(1.0).rule(NormBound(1.0).prepared(torch.tensor([[0.5], [900.0]])))
        tensor([0.7500], dtype=torch.float64)

    Reference: Sun et al., Can You Really Backdoor Federated Learning?, 2019.
    """

    r: float = bounded_number(above=0, example=1.0, why="with a bound of 0 no update has influence.")
    of: RowRule | Mean = field(default_factory=lambda: Mean("equal"))

    def __post_init__(self) -> None:
        check_fields(self)
        of_rows = isinstance(self.of, RowRule) and type(self.of).rule is not RowRule.rule
        if not of_rows and self.of != Mean("equal"):
            raise UsageError(
                f"NormBound({self.r!r}, {self.of!r}).",
                'a rule of atoll.plan.aggregate.robust, or Mean("equal").',
                "a bound on the norm is no bound on the influence of a client that claims more rows.",
                f'NormBound({self.r!r}, Mean("equal"))',
            )

    def least_rows(self) -> int:
        return self.of.least_rows() if isinstance(self.of, RowRule) else 1

    def for_rows(self, n: int) -> str:
        inner = self.of.for_rows(n) if isinstance(self.of, RowRule) else repr(self.of)
        return f"NormBound({self.r!r}, {inner})"

    def prepared(self, x: Tensor) -> Tensor:
        norms = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float64)
        scaled = x * (self.r / norms.clamp(min=self.r)).to(x)
        return self.of.prepared(scaled) if isinstance(self.of, RowRule) else scaled

    def row_weights(self, x: Tensor) -> Tensor | None:
        if isinstance(self.of, RowRule):
            return self.of.row_weights(x)
        return torch.full((len(x),), 1.0 / len(x), dtype=torch.float64, device=x.device)

    def rule(self, x: Tensor) -> Tensor:
        return self.of.rule(x) if isinstance(self.of, RowRule) else x.double().mean(0)


ROBUST = (Median, TrimmedMean, Krum, GeometricMedian, CenteredClip, NormBound)


def _by_weights(rule: Krum | GeometricMedian, x: Tensor) -> Tensor:
    return weighted(rule.row_weights(x), x)


def _mean_of_ranks(x: Tensor, first: int, end: int) -> Tensor:
    """The mean of the values of rank first, …, end − 1 in each column, float64 `[length]`.

    The rows are sorted by a network of minima and maxima of whole rows: vectors, and no branch for each number.

    Args:
        x: rows `[n, length]`.
        first, end: the ranks, 0 ≤ first < end ≤ n.
    """
    out = torch.empty(x.shape[1], dtype=torch.float64, device=x.device)
    pairs = _network(len(x), first, end)
    for begin in range(0, x.shape[1], BLOCK):
        rows = list(x[:, begin : begin + BLOCK].clone().unbind())
        spare = torch.empty_like(rows[0])
        for a, b in pairs:
            torch.minimum(rows[a], rows[b], out=spare)
            torch.maximum(rows[a], rows[b], out=rows[b])
            rows[a], spare = spare, rows[a]
        total = out[begin : begin + BLOCK].zero_()
        for row in rows[first:end]:
            total += row
    return out.div_(end - first)


@lru_cache(64)
def _network(n: int, first: int, end: int) -> Sequence[tuple[int, int]]:
    """The comparators of a sorting network of n rows that the ranks first, …, end − 1 depend on: Batcher, 1968."""
    if first == 0 and end == n:
        return ()
    pairs = []
    p = 1
    while p < n:
        k = p
        while k:
            pairs += [
                (i + j, i + j + k)
                for j in range(k % p, n - k, 2 * k)
                for i in range(min(k, n - j - k))
                if (i + j) // (2 * p) == (i + j + k) // (2 * p)
            ]
            k //= 2
        p *= 2
    wanted, kept = set(range(first, end)), []
    for a, b in reversed(pairs):
        if a in wanted or b in wanted:
            kept.append((a, b))
            wanted |= {a, b}
    return tuple(reversed(kept))
