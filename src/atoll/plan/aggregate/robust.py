"""Robust rules: aggregates that a few arbitrary contributions cannot move far.

Every rule counts clients, not rows: a claimed number of rows has no influence. The order of arrival changes no bit.

| rule | withstands | of n contributions |
|---|---|---|
| `Median()` | fewer than n/2 | coordinate by coordinate |
| `TrimmedMean(beta)` | ⌊βn⌋ | coordinate by coordinate |
| `Krum(f, m)` | f, n ≥ 2f + 3 | the m contributions with the nearest neighbours |
| `GeometricMedian()` | fewer than n/2 | the point with the least sum of distances |
| `CenteredClip(tau)` | few | each moves the result by at most tau/n in a step |
| `Bulyan(f)` | f, n ≥ 4f + 3 | repeated Krum, then values next to the median |
| `DnC(f)` | f, n > 2f | without the f furthest along the main direction |
| `FLTrust(client)` | all but the trusted client | by direction, relative to the trusted client |
| `NormBound(r, rule)` | few | each row is scaled to the norm r |
| `Bucketing(s, rule)` | as the rule, of n/s buckets | the rule on means of random buckets |
| `Foundation(rule)` | as the rule, more or fewer | the rule with synthetic updates of the server |

Tests: tests/identities/test_robust.py
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import floor
from typing import Self

import torch
from torch import Tensor

from atoll.base.errors import RunError, UsageError
from atoll.base.lines import Part
from atoll.base.validation import bounded_number, check_fields
from atoll.compute.bounded_rows import norms
from atoll.compute.layout import Layout
from atoll.compute.native import serving
from atoll.plan.aggregate.mean import Mean
from atoll.plan.aggregate.rows import BLOCK, NO_FACTS, RowFacts, RowRule, row_memory, squared_distances
from atoll.plan.protocols import Population, RoundInfo, Tensors, Total

_STEPS, _NEAR = 1000, 1e-12  # of the geometric median: the most steps, and the least relative change of the weights
_AT_A_ROW = 1e-12  # a distance below this part of the largest one is 0
_COLUMNS = 64  # that native code sorts together
_NATIVE = True
_CLIPS = 5  # steps of the centered clipping


@dataclass(frozen=True, repr=False)
class Median(RowRule):
    """The median of each coordinate; of an even number of rows the mean of the two middle ones.

    Example:
        >>> Median().rule(torch.tensor([[1.0], [900.0], [3.0]]))
        tensor([3.], dtype=torch.float64)

    Reference: Yin et al., Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates, 2018.
    """

    by_coordinate = True

    def rule(self, x: Tensor, facts: RowFacts = NO_FACTS) -> Tensor:
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
    by_coordinate = True

    def __post_init__(self) -> None:
        check_fields(self)

    def rule(self, x: Tensor, facts: RowFacts = NO_FACTS) -> Tensor:
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

    def row_weights(self, x: Tensor, facts: RowFacts = NO_FACTS) -> Tensor:
        distances = squared_distances(x).sort(1).values  # the first is 0, that of the row itself
        scores = distances[:, 1 : len(x) - self.f - 1].sum(1)
        best = scores.sort(stable=True).indices[: self.m]
        return torch.zeros_like(scores).index_fill_(0, best, 1.0 / self.m)


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

    def row_weights(self, x: Tensor, facts: RowFacts = NO_FACTS) -> Tensor:
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
        return here.to(distances) / count
    stay = count / force
    return (1 - stay) * pulls / pulls.sum() + stay * here.to(distances) / count


@dataclass(frozen=True, repr=False)
class CenteredClip(RowRule):
    """Centered clipping: the mean of the updates, each clipped to the distance tau around the present result.

    v ← v + (1/n) Σ (gᵢ − v)·min(1, tau/|gᵢ − v|),  five times, from the result of the last round

    The first round starts at the median of each coordinate, and so do buffers.

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

    def rule(self, x: Tensor, facts: RowFacts = NO_FACTS) -> Tensor:
        last = facts.server.get("last", x[:0, 0])
        center = last.to(x.device) if len(last) else Median().rule(x)
        for _ in range(_CLIPS):
            squares = torch.zeros(len(x), 1, dtype=torch.float64, device=x.device)
            for first in range(0, x.shape[1], BLOCK):
                some = slice(first, first + BLOCK)
                squares += (x[:, some].double() - center[some]).square().sum(1, keepdim=True)
            factors, after = self.tau / squares.sqrt().clamp(min=self.tau), torch.empty_like(center)
            for first in range(0, x.shape[1], BLOCK):
                some = slice(first, first + BLOCK)
                after[some] = center[some] + ((x[:, some].double() - center[some]) * factors).mean(0)
            center = after
        return center

    def server(self, layout: Layout) -> Tensors:
        """The result of the last round, `[d]`; before the first round its length is 0."""
        return {"last": torch.zeros(0, dtype=torch.float64)}

    def server_update(self, total: Total, server: Tensors, info: RoundInfo) -> Tensors:
        """The result of this round, or the state before it if no contribution arrived."""
        return {"last": total.means["update"] / total.weight} if "update" in total.means else server


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
        if not takes_rows(self.of) and self.of != Mean("equal"):
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

    def prepared(self, x: Tensor, facts: RowFacts = NO_FACTS) -> Tensor:
        bounded = _times(x, self.r / norms(x).clamp(min=self.r))
        return self.of.prepared(bounded, facts) if isinstance(self.of, RowRule) else bounded

    def row_weights(self, x: Tensor, facts: RowFacts = NO_FACTS) -> Tensor | None:
        if isinstance(self.of, RowRule):
            return self.of.row_weights(x, facts)
        return torch.full((len(x),), 1.0 / len(x), dtype=torch.float64, device=x.device)

    def rule(self, x: Tensor, facts: RowFacts = NO_FACTS) -> Tensor:
        return self.of.rule(x, facts) if isinstance(self.of, RowRule) else x.double().mean(0)

    def server(self, layout: Layout) -> Tensors:
        """That of the other rule."""
        return self.of.server(layout)

    def server_update(self, total: Total, server: Tensors, info: RoundInfo) -> Tensors:
        """That of the other rule."""
        return self.of.server_update(total, server, info)


@dataclass(frozen=True, repr=False)
class Bucketing(RowRule):
    """Another rule on the means of random buckets of s updates: buckets of unequal clients differ less than clients.

    g = of(y₁, …, y_m),  yⱼ = the mean of the updates of bucket j,  m = ⌈n/s⌉

    The buckets are drawn in each round. f attackers reach at most f buckets, so the other rule must withstand f of m.
    Buffers have the same buckets.

    Args:
        s: the number of updates in a bucket, ≥ 1; 1 is the other rule itself.
        of: the rule for the means: one of this module without knowledge of single clients.
    Raises:
        UsageError: s is out of range, the rule cannot take means, or a cohort has too few buckets for it.
        RunError: a round has too few buckets for the rule.
    Example:
        >>> Bucketing(2, Median()).rule(torch.tensor([[1.0], [1.0], [3.0], [3.0]])) <= 3.0
        tensor([True])

    Reference: Karimireddy, He, Jaggi, Byzantine-Robust Learning on Heterogeneous Datasets via Bucketing, 2022.
    """

    s: int = bounded_number(2, least=1, whole=True, example=2)
    of: RowRule = field(default_factory=Median)

    def __post_init__(self) -> None:
        check_fields(self)
        if not takes_rows(self.of) or isinstance(self.of, (Bucketing, NormBound)):
            raise UsageError(
                f"Bucketing({self.s!r}, {self.of!r:.60}).",
                "a rule of atoll.plan.aggregate.robust that sees rows only, such as Median().",
                "the mean of a bucket is no update of a client. A bound on the norm goes outside: "
                "NormBound(r, Bucketing(s, rule)).",
                f"Bucketing({self.s!r}, Median())",
            )

    @property
    def by_coordinate(self) -> bool:  # type: ignore[override]
        """Whether the other rule is one by coordinate: buckets do not depend on the rows."""
        return self.of.by_coordinate

    def least_rows(self) -> int:
        return (self.of.least_rows() - 1) * self.s + 1

    def for_rows(self, n: int) -> str:
        return f"Bucketing({self.s!r}, {self.of.for_rows(-(-n // self.s))})"

    def row_weights(self, x: Tensor, facts: RowFacts = NO_FACTS) -> Tensor | None:
        bucket = self._buckets(len(x), facts).to(x.device)
        weights = self.of.row_weights(_means(x, bucket), facts._replace(client=None))
        return None if weights is None else weights[bucket] / bucket.bincount()[bucket]

    def rule(self, x: Tensor, facts: RowFacts = NO_FACTS) -> Tensor:
        means = _means(x, self._buckets(len(x), facts).to(x.device))
        return self.of.rule(means, facts._replace(client=None))

    def _buckets(self, n: int, facts: RowFacts) -> Tensor:
        """The bucket of each row, int64 `[n]`."""
        if self.s == 1:
            return torch.arange(n)
        return facts.key.fold("buckets").permutation(n) // self.s

    def server(self, layout: Layout) -> Tensors:
        """That of the other rule."""
        return self.of.server(layout)

    def server_update(self, total: Total, server: Tensors, info: RoundInfo) -> Tensors:
        """That of the other rule."""
        return self.of.server_update(total, server, info)


@dataclass(frozen=True, repr=False)
class Bulyan(RowRule):
    """Repeated selection by Krum, then in each coordinate the mean of the values next to the median.

    θ = n − 2f updates are selected, each by the score of `Krum(f)` among the rest; g = the mean of the θ − 2f
    values that are nearest to the median of the selected, coordinate by coordinate

    Krum alone bounds the distance of the result, which one far coordinate can use up. Buffers are selected by
    themselves.

    Args:
        f: the largest number of clients that may send arbitrary updates, ≥ 0; 0 is the mean.
    Raises:
        UsageError: f is out of range, or a cohort has fewer than 4f + 3 clients.
        RunError: a round has fewer contributions.
    Example:
        >>> Bulyan(1).rule(torch.tensor([[1.0], [1.0], [900.0], [1.0], [1.0], [1.0], [1.0]]))
        tensor([1.], dtype=torch.float64)

    Reference: El Mhamdi, Guerraoui, Rouault, The Hidden Vulnerability of Distributed Learning in Byzantium, 2018.
    """

    f: int = bounded_number(least=0, whole=True, example=1)

    def __post_init__(self) -> None:
        check_fields(self)

    def least_rows(self) -> int:
        return 4 * self.f + 3 if self.f else 1

    def for_rows(self, n: int) -> str:
        f = (n - 3) // 4
        return repr(Bulyan(f)) if f > 0 else super().for_rows(n)

    def rule(self, x: Tensor, facts: RowFacts = NO_FACTS) -> Tensor:
        rows = _by_scores(squared_distances(x), self.f, len(x) - 2 * self.f)
        kept = len(rows) - 2 * self.f
        out = torch.empty(x.shape[1], dtype=torch.float64, device=x.device)
        for first in range(0, x.shape[1], BLOCK):
            some = x[rows, first : first + BLOCK].double().sort(0).values
            median = (some[(len(rows) - 1) // 2] + some[len(rows) // 2]) / 2
            near = (some - median).abs().sort(dim=0, stable=True).indices[:kept]
            out[first : first + BLOCK] = some.gather(0, near).mean(0)
        return out


@dataclass(frozen=True, repr=False)
class DnC(RowRule):
    """Divide and conquer: the mean without the f updates that lie furthest along the main direction of their spread.

    sᵢ = ⟨gᵢ − ḡ, v⟩²,  v the leading right singular vector of the centred updates, on some random coordinates

    With several iterations the coordinates are drawn again, and an update must remain in each. Buffers are those of
    the clients that remain.

    Args:
        f: the number of updates that an iteration removes, ≥ 0; 0 is the mean.
        iterations: the number of draws of coordinates, ≥ 1. It removes at most f·iterations updates.
        coordinates: the number of coordinates of a draw, ≥ 1; all if the model has no more.
    Raises:
        UsageError: a number is out of range, or a cohort has at most 2f or f·iterations clients.
        RunError: a round has as few contributions.
    Example:
        >>> DnC(1).rule(torch.tensor([[1.0, 0.0], [1.0, 0.5], [900.0, 0.0], [1.0, 1.0]]))
        tensor([1.0000, 0.5000], dtype=torch.float64)

    Reference: Shejwalkar and Houmansadr, Manipulating the Byzantine: Optimizing Model Poisoning Attacks and Defenses
        for Federated Learning, 2021.
    """

    f: int = bounded_number(least=0, whole=True, example=1)
    iterations: int = bounded_number(1, least=1, whole=True)
    coordinates: int = bounded_number(10_000, least=1, whole=True)

    def __post_init__(self) -> None:
        check_fields(self)

    def least_rows(self) -> int:
        return max(2, self.iterations) * self.f + 1

    def for_rows(self, n: int) -> str:
        f = (n - 1) // max(2, self.iterations)
        return repr(DnC(f, self.iterations, self.coordinates)) if f > 0 else super().for_rows(n)

    def row_weights(self, x: Tensor, facts: RowFacts = NO_FACTS) -> Tensor:
        n, d = x.shape
        kept = torch.ones(n, dtype=torch.float64, device=x.device)
        for i in range(self.iterations if d > self.coordinates else 1):
            some = x
            if d > self.coordinates:
                drawn = facts.key.fold("coordinates", i).distinct(self.coordinates, d)
                some = x[:, drawn.sort().values.to(x.device)]
            centred = some.double() - some.double().mean(0)
            leading = torch.linalg.eigh(centred @ centred.T).eigenvectors[:, -1]  # ∝ the projections on v
            kept[leading.square().sort(descending=True, stable=True).indices[: self.f]] = 0
        return kept / kept.sum()


@dataclass(frozen=True, repr=False)
class FLTrust(RowRule):
    """Updates weighted by their direction relative to that of one trusted client, and scaled to its length.

    g = Σ tᵢ·gᵢ·|g₀|/|gᵢ| / Σ tᵢ,  tᵢ = max(0, cos(gᵢ, g₀)),  t₀ = 1

    In the paper g₀ is an update of the server from rows of its own. Here it is that of a client, which counts as one
    of the clients. Buffers have the weights tᵢ.

    Args:
        client: the number of the trusted client, ≥ 0. It must be in each cohort.
    Raises:
        UsageError: there is no such client, or the sampler may leave it out.
        RunError: the contribution of the client is missing in a round.
    Example:
        >>> FLTrust(0).rule(torch.tensor([[2.0, 0.0], [9.0, 0.0], [-9.0, 0.0]]))
        tensor([2., 0.], dtype=torch.float64)

    Reference: Cao, Fang, Liu, Gong, FLTrust: Byzantine-robust Federated Learning via Trust Bootstrapping, 2021.
    """

    client: int = bounded_number(least=0, whole=True, example=0)
    by_client = True

    def __post_init__(self) -> None:
        check_fields(self)

    def bind(self, population: Population, chance: Tensor) -> Self:
        """A copy that knows the clients.

        Raises:
            UsageError: there is no such client, or the sampler may leave it out.
        """
        if self.client >= population.clients:
            raise UsageError(
                f"{self!r} with {population.clients} clients.",
                f"the number of a client, from 0 to {population.clients - 1}.",
                write=Part("FLTrust(0)", "aggregator"),
            )
        if float(chance[self.client] if chance.dim() else chance) < 1:
            raise UsageError(
                f"{self!r} with a sampler that may leave client {self.client} out of a round.",
                "a sampler that selects the trusted client in each round.",
                "the other updates are compared with that of the trusted client.",
                Part("Everyone()", "cohort"),
            )
        return super().bind(population, chance)

    def prepared(self, x: Tensor, facts: RowFacts = NO_FACTS) -> Tensor:
        lengths = norms(x)
        return _times(x, torch.where(lengths > 0, lengths[self._trusted(x, facts)] / lengths, 0.0))

    def row_weights(self, x: Tensor, facts: RowFacts = NO_FACTS) -> Tensor:
        trusted = self._trusted(x, facts)
        products = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        lengths = norms(x)[:, 0]
        for first in range(0, x.shape[1], BLOCK):
            some = x[:, first : first + BLOCK].double()
            products += some @ some[trusted]
        trust = (products / (lengths * lengths[trusted])).nan_to_num(0.0, 0.0, 0.0).clamp(min=0)
        trust[trusted] = 1
        weights: Tensor = trust / trust.sum()
        return weights

    def rule(self, x: Tensor, facts: RowFacts = NO_FACTS) -> Tensor:
        return super().rule(self.prepared(x, facts), facts)

    def _trusted(self, x: Tensor, facts: RowFacts) -> int:
        """The row of the trusted client."""
        client = torch.arange(len(x)) if facts.client is None else facts.client
        found = (client == self.client).nonzero()[:, 0].tolist()
        if not found:
            raise RunError(
                f"{self!r}: the contribution of client {self.client} is missing in a round.",
                "the update of the trusted client in each round.",
                "the other updates are compared with it.",
            )
        return int(found[0])


@dataclass(frozen=True, repr=False)
class Foundation(RowRule):
    """Another rule on the updates and on synthetic ones: ⌊share · n⌋ copies of the update furthest from the extremes.

    g = of(g₁, …, g_n, g_k, …, g_k),  k = argmax min(|gᵢ − max|, |gᵢ − min|)

    max and min are the largest and the smallest value of each coordinate over the updates. Attackers who send extreme
    values lie near one of the two, so their part of the rows falls from f/n to f/((1 + share)n). An attacker whose
    update is selected gains the copies: the rule then withstands fewer. This is so for updates that are large, but not
    the extremes of most coordinates, such as those of `SignFlip`. Buffers are selected by themselves.

    Args:
        of: the rule for all rows: one of this module without knowledge of single clients.
        share: the number of synthetic updates for each update, in [0, 1); 0 is the other rule itself.
    Raises:
        UsageError: the share is out of range, the rule cannot take synthetic rows, or a cohort is too small for it.
        RunError: a round has too few contributions for the rule.
    Example:
        >>> Foundation(Median()).rule(torch.tensor([[1.0], [1.5], [900.0], [900.0]]))
        tensor([1.5000], dtype=torch.float64)

    Reference: Fang et al., Do We Really Need to Design New Byzantine-robust Aggregation Rules?, 2025.
    """

    of: RowRule = field(default_factory=Median)
    share: float = bounded_number(0.5, least=0, below=1, why="more copies than updates would be a majority.")

    def __post_init__(self) -> None:
        check_fields(self)
        if not takes_rows(self.of) or isinstance(self.of, (Foundation, NormBound)):
            raise UsageError(
                f"Foundation({self.of!r:.60}).",
                "a rule of atoll.plan.aggregate.robust that sees rows only, such as Median().",
                "a synthetic update is no update of a client. A bound on the norm goes outside: "
                "NormBound(r, Foundation(rule)).",
                "Foundation(Median())",
            )

    def least_rows(self) -> int:
        return self.of.least_rows()

    def for_rows(self, n: int) -> str:
        return f"Foundation({self.of.for_rows(n)}, share={self.share!r})"

    def row_weights(self, x: Tensor, facts: RowFacts = NO_FACTS) -> Tensor | None:
        if self.of.by_coordinate:
            return None
        chosen = self._chosen(x)
        weights = self.of.row_weights(self._extended(x, chosen), facts._replace(client=None))
        return None if weights is None else weights[: len(x)].index_add(0, chosen, weights[len(x) :])

    def rule(self, x: Tensor, facts: RowFacts = NO_FACTS) -> Tensor:
        chosen, facts = self._chosen(x), facts._replace(client=None)
        if not self.of.by_coordinate:
            return self.of.rule(self._extended(x, chosen), facts)
        pieces = (x[:, first : first + BLOCK] for first in range(0, max(1, x.shape[1]), BLOCK))
        return torch.cat([self.of.rule(torch.cat((some, some[chosen])), facts) for some in pieces])

    def _chosen(self, x: Tensor) -> Tensor:
        """The row of each synthetic update, int64 `[⌊share · n⌋]`: one row. Of equal ones the first is selected."""
        squares = torch.zeros(2, len(x), dtype=torch.float64, device=x.device)
        for first in range(0, x.shape[1], BLOCK):
            some = x[:, first : first + BLOCK].double()
            for k, end in enumerate((some.amax(0), some.amin(0))):
                squares[k] += (some - end).square().sum(1)
        furthest = squares.amin(0).argmax()
        return furthest.expand(floor(self.share * len(x) + 1e-9))

    def _extended(self, x: Tensor, chosen: Tensor) -> Tensor:
        """The updates, and the synthetic ones after them, `[n + m, length]`."""
        out = row_memory((len(x) + len(chosen), x.shape[1]), x.dtype, x.device)
        return torch.cat((x, x[chosen]), out=out)

    def server(self, layout: Layout) -> Tensors:
        """That of the other rule."""
        return self.of.server(layout)

    def server_update(self, total: Total, server: Tensors, info: RoundInfo) -> Tensors:
        """That of the other rule."""
        return self.of.server_update(total, server, info)


ROBUST = (
    *(Median, TrimmedMean, Krum, Bulyan, GeometricMedian, CenteredClip, DnC, FLTrust),
    *(NormBound, Bucketing, Foundation),
)


def takes_rows(rule: object) -> bool:
    """Whether a rule computes a result from rows alone: not a function of the user, and no rule of single clients."""
    if not isinstance(rule, RowRule) or rule.by_client:
        return False
    kind = type(rule)
    return kind.rule is not RowRule.rule or kind.row_weights is not RowRule.row_weights


def _times(x: Tensor, factors: Tensor) -> Tensor:
    """Each row times its factor, in the dtype of x.

    Args:
        x: rows `[n, length]`.
        factors: `[n, 1]`.
    """
    out, factors = row_memory((len(x), x.shape[1]), x.dtype, x.device), factors.to(x)
    for first in range(0, x.shape[1], BLOCK):
        torch.mul(x[:, first : first + BLOCK], factors, out=out[:, first : first + BLOCK])
    return out


def _means(x: Tensor, bucket: Tensor) -> Tensor:
    """The mean of the rows of each bucket, `[m, length]`; x itself if each bucket has one row in the order of rows.

    Args:
        x: rows `[n, length]`.
        bucket: int64 `[n]`, with each of 0, …, m − 1.
    """
    sizes = bucket.bincount()
    if len(sizes) == len(bucket):
        return x
    shares = torch.zeros(len(sizes), len(x), dtype=torch.float64, device=x.device)
    shares[bucket, torch.arange(len(x), device=x.device)] = 1.0 / sizes[bucket].double()
    out = row_memory((len(sizes), x.shape[1]), torch.float64, x.device)
    for first in range(0, x.shape[1], BLOCK):
        out[:, first : first + BLOCK] = shares @ x[:, first : first + BLOCK].double()
    return out


def _by_scores(squares: Tensor, f: int, count: int) -> Tensor:
    """The rows that Krum selects one after another, each among the rest, int64 `[count]`.

    Args:
        squares: squared distances between the rows, `[n, n]`.
        f: the number of arbitrary rows.
        count: the number of rows to select, ≤ n − 2f.
    """
    rest, chosen = list(range(len(squares))), []
    for _ in range(count):
        near = max(1, len(rest) - f - 2)
        scores = squares[rest][:, rest].sort(1).values[:, 1 : near + 1].sum(1)
        chosen.append(rest.pop(int(scores.sort(stable=True).indices[0])))
    return torch.tensor(sorted(chosen), device=squares.device)


def _mean_of_ranks(x: Tensor, first: int, end: int) -> Tensor:
    """The mean of the values of rank first, …, end − 1 in each column, float64 `[length]`.

    The rows are sorted by a network of minima and maxima of whole rows: vectors, and no branch for each number. Native
    code gives the same bits.

    Args:
        x: rows `[n, length]`.
        first, end: the ranks, 0 ≤ first < end ≤ n.
    """
    out = torch.empty(x.shape[1], dtype=torch.float64, device=x.device)
    pairs = _network(len(x), first, end)
    native = serving("ranks", x) if _NATIVE and x.stride(-1) == 1 else None
    if native is not None:
        network, scratch = torch.tensor(pairs, dtype=torch.int32), x.new_empty(len(x), _COLUMNS)
        at = [ctypes.c_void_p(t.data_ptr()) for t in (x, network, scratch, out)]
        sizes = [ctypes.c_int64(size) for size in (*x.shape, x.stride(0), len(pairs), first, end)]
        if not native.mean_of_ranks(at[0], *sizes[:3], at[1], *sizes[3:], *at[2:]):
            return out
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
