"""The mean and the sum of contributions. Each contribution is added once, in O(model) memory.

Tests: tests/identities/test_order.py, tests/conformance/test_parts.py
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Self

import torch
from torch import Tensor

from atoll.base.errors import RunError, UsageError
from atoll.base.lines import Part
from atoll.base.random import Key
from atoll.base.validation import plain_fields
from atoll.plan.aggregate import exact
from atoll.plan.aggregate.ring import (
    Grid,
    Masks,
    Words,
    added_sums,
    grids_of,
    lifted,
    numbers_of,
    secure_conflicts,
    words_of,
)
from atoll.plan.pace import Sync, counts_each
from atoll.plan.protocols import (
    Aggregator,
    Conflict,
    Contribution,
    Declared,
    Group,
    Ids,
    Over,
    Partial,
    Population,
    RoundInfo,
    Slots,
    SumKind,
    Tensors,
    Total,
    Weights,
)
from atoll.secure.params import DROPPED, topology

_NONE = torch.zeros((), dtype=torch.int64)


@dataclass
class PartialSum(Partial):
    """The sum of some contributions, as plain tensors.

    Args:
        means: Σ w·x of each mean x, as digits of an exact sum; with `sum="float"` one float sum at place 0.
        sums: Σ x of each sum x, in the form of `means`.
        counters: the largest value of each counter.
        weight: Σ w, int64 `[]`.
        arrived: the number of contributions, int64 `[]`.
    """

    means: dict[str, exact.Digits] = field(default_factory=dict)
    sums: dict[str, exact.Digits] = field(default_factory=dict)
    counters: dict[str, Tensor] = field(default_factory=dict)
    weight: Tensor = _NONE
    arrived: Tensor = _NONE

    def tensors(self) -> dict[str, Tensor]:
        """Convert the partial to named tensors, to send it to another process."""
        out = {"weight": self.weight, "arrived": self.arrived}
        for kind, table in (("means", self.means), ("sums", self.sums)):
            out |= {f"{kind}/{n}/{place}": t for n, digits in table.items() for place, t in digits.items()}
        return out | {f"counters/{n}": t for n, t in self.counters.items()}

    @classmethod
    def of(cls, tensors: Tensors) -> PartialSum:
        """The inverse of `tensors`: build a partial from named tensors."""
        out = cls(weight=tensors["weight"], arrived=tensors["arrived"])
        tables = {"means": out.means, "sums": out.sums}
        for path, t in tensors.items():
            kind, _, rest = path.partition("/")
            if kind == "counters":
                out.counters[rest] = t
            elif kind in tables:
                name, _, place = rest.rpartition("/")
                tables[kind].setdefault(name, {})[int(place)] = t
        return out

    def reduce(self, group: Group) -> PartialSum:
        """The sum over all processes. A digit that one process does not have counts as 0."""
        mine = self.tensors()
        spec = {n: torch.tensor([_DTYPES.index(t.dtype), *t.shape]) for n, t in mine.items()}
        specs: dict[str, list[int]] = {}
        for theirs in group.all_gather(spec):
            specs |= {n: t.tolist() for n, t in theirs.items()}
        device = next((t.device for t in mine.values() if t.dim()), self.weight.device)
        out: dict[str, Tensor] = {}
        for largest in (False, True):
            names = [n for n in sorted(specs) if n.startswith("counters/") is largest]
            tensors = [mine[n] if n in mine else _neutral(*specs[n], largest=largest, device=device) for n in names]
            added = group.all_reduce_max(tensors) if largest else group.all_reduce_sum(tensors)
            out |= dict(zip(names, added, strict=True))
        return PartialSum.of(out)


_DTYPES = (torch.int64, torch.float64, torch.float32, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


def _neutral(dtype: int, *shape: int, largest: bool, device: torch.device) -> Tensor:
    """The neutral element of a sum, or of a maximum."""
    kind = _DTYPES[dtype]
    value: float = 0
    if largest and kind != torch.bool:
        value = -math.inf if kind.is_floating_point else torch.iinfo(kind).min
    return torch.full(shape, value, dtype=kind, device=device if shape else "cpu")


class _Folded(Aggregator):
    """Adds and merges contributions. `Mean` and `Sum` inherit these methods."""

    linear = True
    max_weight: int | None = None
    _table: Tensor | None = None  # the weight of each client, int64 `[C]`; None: its rows, or 1
    _chance: Tensor | None = None  # the chance of each client for which the table was made, float64 `[C]`
    _grids: Mapping[str, Grid] | None = None  # the grid of each vector of a secure sum

    def bind(self, population: Population, chance: Tensor) -> Self:
        """A copy that divides each weight by the chance of its client, if the chances of the clients differ."""
        bound = copy.copy(self)
        if chance.dim():
            object.__setattr__(bound, "_table", weights_by_chance(self._capped(population.sizes), chance))
            object.__setattr__(bound, "_chance", chance)
        return bound

    def weigh(self, clients: Tensor, rows: Tensor) -> Tensor:
        """The weight of each contribution, int64 `[K]`: wᵢ, or wᵢ divided by the chance and scaled to whole numbers."""
        if self._table is not None:
            return self._table.to(clients.device)[clients].to(rows.device)
        return self._capped(rows)

    def _capped(self, rows: Tensor) -> Tensor:
        """The weights of clients with these numbers of rows."""
        if self.weights == "equal":
            return torch.ones_like(rows)
        return rows if self.max_weight is None else rows.clamp(max=self.max_weight)

    def zero(self) -> PartialSum:
        """An empty sum, to which no contribution was added."""
        return PartialSum()

    def fold(self, partial: PartialSum, contribution: Contribution, ids: Ids) -> PartialSum:
        """Add K contributions to the sum, in place."""
        weights = self.weigh(ids.client, contribution.weight)
        many = weights.shape[0]
        add = exact.add if self.sum == "exact" else _add_floats
        for name, rows in contribution.means.items():
            add(partial.means.setdefault(name, {}), rows, weights)
        for name, rows in contribution.sums.items():
            add(partial.sums.setdefault(name, {}), rows.to(torch.float64).reshape(many, -1), torch.ones_like(weights))
        for name, rows in contribution.counters.items():
            _keep_largest(partial.counters, name, rows.amax(0))
        partial.weight = partial.weight + weights.sum()
        partial.arrived = partial.arrived + many
        return partial

    def merge(self, a: PartialSum, b: PartialSum) -> PartialSum:
        """Add the partial `b` to the partial `a`, in place.

        Raises:
            UsageError: one of the two partials belongs to another aggregator.
        """
        for partial in (a, b):
            if not isinstance(partial, PartialSum):
                raise UsageError(
                    f"{self!r} merges a {type(partial).__name__}.",
                    "the partial of a `Mean` or a `Sum`.",
                    "partials of two kinds have no common aggregate.",
                )
        for mine, theirs in ((a.means, b.means), (a.sums, b.sums)):
            for name, digits in theirs.items():
                exact.merge(mine.setdefault(name, {}), digits)
        for name, rows in b.counters.items():
            _keep_largest(a.counters, name, rows)
        a.weight, a.arrived = a.weight + b.weight, a.arrived + b.arrived
        return a

    def total(self, partial: PartialSum) -> Total:
        """The sums as float64; with `sum="float"` in the dtype in which they were added."""
        if self.sum == "exact":
            exact.check_capacity(int(partial.weight), self)
        total = exact.total if self.sum == "exact" else _float
        return Total(
            {n: total(digits) for n, digits in partial.means.items()},
            {n: total(digits) for n, digits in partial.sums.items()},
            partial.weight,
            partial.arrived,
            partial.counters,
        )


_SPLIT = 1 << 12  # largest denominator of a weight divided by a chance that is represented exactly


def weights_by_chance(weights: Tensor, chance: Tensor) -> Tensor:
    """w/chance of each client, scaled to whole numbers, because the exact sum takes whole weights, int64 `[C]`.

    The scale is the least that makes all quotients whole. If there is none below `CAPACITY`, the quotients are rounded
    at the largest scale, with a relative error of about n/2²⁸ for a cohort of n clients.

    Args:
        weights: w, int64 `[C]`.
        chance: the probability that each client is selected, float64 `[C]`. A client with chance 0 gets weight 0.
    Example:
        >>> weights_by_chance(torch.tensor([80, 10, 10]), torch.tensor([1.0, 0.5, 0.5]).double()).tolist()
        [4, 1, 1]
    """
    drawn = chance > 0
    quotients = torch.where(drawn, weights / chance.where(drawn, 1.0), 0.0)
    cohort = max(1, round(float(chance.sum())))
    largest = float(quotients.topk(min(cohort, len(weights))).values.sum())
    broken = quotients[(quotients - quotients.round()).abs() > 1e-9 * quotients]
    parts = {Fraction(q).limit_denominator(_SPLIT).denominator for q in broken.unique()[: 2 * _SPLIT].tolist()}
    scale = min(math.lcm(*parts), exact.CAPACITY)
    scaled = quotients * scale
    whole = scaled.round()
    if scale * largest > exact.CAPACITY or bool(((scaled - whole).abs() > 1e-9 * scaled).any()):
        whole = (quotients * (exact.CAPACITY / 2 / max(largest, 1.0))).round()
        return torch.where(drawn & (weights > 0), whole.clamp(min=1), 0).long()
    table = whole.long()
    return table // max(1, math.gcd(*table.unique().tolist()))


@dataclass(frozen=True, repr=False)
class Mean(_Folded):
    """The mean of the updates.

    g = Σ wᵢ gᵢ / Σ wᵢ  over the contributions that arrived, or  g = Σ wᵢ gᵢ / E Σ wᵢ,  E Σ wᵢ = Σ chanceᵢ wᵢ

    If the chances of the clients differ (`Weighted`), wᵢ is divided by the chance of the client. The mean of g over all
    draws is then Σ wᵢ gᵢ / Σ wᵢ over all clients, with `over="expected"` and with `Weighted` exactly. With
    `over="arrived"` and equal chances it is so only approximately, if clients differ in size and cohorts are small.

    Args:
        weights: `"examples"`: wᵢ is the number of rows that the client holds; `"equal"`: wᵢ = 1.
        over: `"arrived"` divides by the weight that arrived. `"expected"` divides by the expected weight, so a client's
            influence does not depend on which other clients participate: the sum is unbiased and has a bounded
            sensitivity.
        sum: `"exact"` gives the same bits for every order, grouping and number of workers; `"float"` is faster and
            depends on the order.
        secure: True or `Masks(...)`: the server receives the sum over the clients of a round, and no contribution. Its
            numbers are rounded to a grid, so that a simulation gives the bits of the network. None: it receives each.
        max_weight: the largest weight of a client, in rows, ≥ 1: a client that claims more rows counts as one with this
            number. It needs `"examples"` and no secure sum. None: no limit.
    Raises:
        UsageError: an argument is not one of these words, or the limit is out of range or has no effect.
    Example:
        >>> mean = Mean(weights="equal")
        >>> from atoll.testing import round_info
        >>> rows = Contribution({"update": torch.tensor([[1.0], [3.0]])}, {}, torch.tensor([10, 30]), {}, {})
        >>> ids = Ids(torch.tensor([0, 1]), torch.tensor([0, 0]))
        >>> total = mean.total(mean.fold(mean.zero(), rows, ids))
        >>> mean.finalize(total, round_info()).means["update"]
        tensor([2.], dtype=torch.float64)

    Reference: McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data, 2017.
    """

    weights: Weights = "examples"
    over: Over = "arrived"
    sum: SumKind = "exact"
    secure: Masks | bool | None = None
    max_weight: int | None = None

    def __post_init__(self) -> None:
        plain_fields(self, "max_weight")
        one_of("Mean", "weights", self.weights, ("examples", "equal"))
        one_of("Mean", "over", self.over, ("arrived", "expected"))
        one_of("Mean", "sum", self.sum, ("exact", "float"))
        if self.secure is True or self.secure is False:  # one value, one text
            object.__setattr__(self, "secure", Masks() if self.secure else None)
        if self.secure is not None and not isinstance(self.secure, Masks):
            raise UsageError(f"Mean(secure={self.secure!r}).", "True, or Masks(...).", write="Mean(secure=True)")
        if self.max_weight is not None:
            self._check_limit(self.max_weight)

    def _check_limit(self, limit: object) -> None:
        example = "Mean(max_weight=1000)"
        if type(limit) is not int or limit < 1:
            raise UsageError(f"Mean(max_weight={limit!r}).", "a whole number of rows, at least 1.", write=example)
        if self.weights == "equal":
            raise UsageError(f"{self!r}.", 'weights="examples".', "equal weights have no limit to exceed.", example)
        if self.secure is not None:
            why = "the server cannot check the weight of a single client in a secure sum."
            raise UsageError(f"{self!r}.", "no secure sum, or equal weights.", why, "Mean('equal', secure=True)")

    def least(self, started: int) -> int:
        """The least number of contributions of a round with an update: `least` or the threshold of a secure sum."""
        masks = self._masks
        if masks is None or not started:
            return 1
        shape = topology(started, masks.neighbours, masks.threshold)
        # On a sparse graph a secret is rebuilt by neighbours, so the number of all survivors must not fall below the
        # share for which the graph was chosen.
        share = 0 if shape.complete else math.ceil((1 - DROPPED) * started)
        return max(masks.least, shape.threshold, share)

    @property
    def _masks(self) -> Masks | None:
        return self.secure if isinstance(self.secure, Masks) else None

    def secured(self, vectors: Mapping[str, Declared], clients: int, weight: int, rows: int) -> Self:
        """A copy that knows the grid of each vector."""
        bound = copy.copy(self)
        if self._masks is not None:
            object.__setattr__(bound, "_grids", grids_of(self._masks, vectors, clients, weight, rows))
        return bound

    def added(self) -> Mapping[str, Declared]:
        """Declares the number of values that a secure sum cut, if it cuts any."""
        return added_sums(self._grids or {})

    def lift(self, contribution: Contribution, key: Key) -> Contribution:
        """Round the means and sums to their grids. Counters and columns for each client stay at the client.

        Raises:
            UsageError: the aggregator was not bound, or a vector was not declared.
        """
        return contribution if self._masks is None else lifted(contribution, self._bound_grids(), key)

    def words(self, contribution: Contribution, weights: Tensor) -> dict[str, Words]:
        """The words of a lifted contribution by vector, `[K, m]`: what a client adds its masks to."""
        grids, ring = self._bound_grids(), self.masks.ring
        vectors = {**contribution.means, **contribution.sums}
        return {n: words_of(vectors[n], grid, weights, ring) for n, grid in grids.items() if n in vectors}

    def partial(self, words: Mapping[str, Words], weight: int, arrived: int) -> PartialSum:
        """The partial of a secure sum.

        Args:
            words: the sum of the words by vector, `[m]`.
            weight, arrived: the sum of the weights, and the number of the clients.
        """
        grids = self._bound_grids()
        digits = {n: numbers_of(words[n], grid) for n, grid in grids.items() if n in words}
        return PartialSum(
            {n: d for n, d in digits.items() if grids[n].weighted},
            {n: d for n, d in digits.items() if not grids[n].weighted},
            {},
            torch.tensor(weight, dtype=torch.int64),
            torch.tensor(arrived, dtype=torch.int64),
        )

    @property
    def masks(self) -> Masks:
        """The secure sum.

        Raises:
            UsageError: the aggregator has none.
        """
        if self._masks is None:
            raise UsageError(f"{self!r} has no secure sum.", "a secure sum.", write="Mean(secure=True)")
        return self._masks

    def largest_number(self, weight: int) -> int:
        """The least B with |number| ≤ B · weight for the words of every vector."""
        grids = self._bound_grids().values()
        return max(grid.limit if grid.weighted else -(-grid.limit // weight) for grid in grids)

    def _bound_grids(self) -> Mapping[str, Grid]:
        if self._grids is None:
            raise UsageError(
                f"{self!r} was not bound.", "an aggregator that knows its vectors: `atoll.plan.round.bind`."
            )
        return self._grids

    def finalize(self, total: Total, info: RoundInfo) -> Total:
        """Divide the means by the weight. A round without contributions has no mean, except with `over="expected"`.

        Raises:
            RunError: the chances of the clients differ from those at the start of the training.
        """
        if self._chance is not None and info.chance.dim() and not torch.equal(info.chance, self._chance):
            raise RunError(
                f"The sampler gave other chances in round {info.round} than at the start of the training.",
                "the chance of each client, equal in every round.",
                "each weight is divided by the chance of its client, and contributions of all rounds are added.",
                Part("Uniform(10)", "cohort"),
            )
        means = _divided(total.means, float(total.weight))
        if self.over == "expected":
            sizes, chance = info.population.sizes, info.chance
            weights = self.weigh(torch.arange(len(sizes), device=sizes.device), sizes)
            expected = (chance * weights).sum() if chance.dim() else chance * weights.sum()
            nothing = torch.zeros((), dtype=torch.float64, device=expected.device)
            means["update"] = total.means.get("update", nothing) / expected
        return total._replace(means=means)

    def conflicts(self, slots: Slots) -> Iterable[Conflict]:
        """Refuse `over="expected"` with a pace that decides which clients count: their expected weight is unknown.

        With noise a deadline is allowed. The divisor must then not depend on the clients that arrive, and a late client
        counts as one that dropped out: the sum is smaller. A quorum would let a client decide which others count.
        """
        event, pace = slots.codec.event(1.0), slots.pace
        private = event is not None and event.update and counts_each(pace)
        if self.over == "expected" and pace != Sync() and not private:
            why = "fast clients count more often, and the chance of that is not known."
            yield Conflict(f"{self!r} with {slots.pace!r}.", 'Sync(), or over="arrived".', why, "Sync()")
        if self._masks is not None:
            yield from secure_conflicts(self, slots)


@dataclass(frozen=True, repr=False)
class Sum(_Folded):
    """The sum of the updates, as a parameter server adds gradients.

    g = Σ wᵢ gᵢ

    With `Gradient()` and `"examples"` this is the gradient of the summed loss, so the learning rate must decrease as
    the number of rows grows.

    Args:
        weights: `"examples"`: wᵢ is the number of rows that the client holds; `"equal"`: wᵢ = 1.
        sum: `"exact"` or `"float"`, as for `Mean`.
    Raises:
        UsageError: an argument is not one of these words.
    Example:
        >>> from atoll.testing import round_info
        >>> rows = Contribution({"update": torch.tensor([[1.0], [3.0]])}, {}, torch.tensor([10, 30]), {}, {})
        >>> rule, ids = Sum(weights="equal"), Ids(torch.tensor([0, 1]), torch.tensor([0, 0]))
        >>> rule.finalize(rule.total(rule.fold(rule.zero(), rows, ids)), round_info()).means["update"]
        tensor([4.], dtype=torch.float64)

    Reference: Li et al., Scaling Distributed Machine Learning with the Parameter Server, 2014.
    """

    forms_sum = True

    weights: Weights = "examples"
    sum: SumKind = "exact"

    def __post_init__(self) -> None:
        one_of("Sum", "weights", self.weights, ("examples", "equal"))
        one_of("Sum", "sum", self.sum, ("exact", "float"))

    def finalize(self, total: Total, info: RoundInfo) -> Total:
        """Keep the sum as the update, and divide all other means, such as buffers, by the weight."""
        means = _divided(total.means, float(total.weight))
        return total._replace(means=means | {n: t for n, t in total.means.items() if n == "update"})


def _divided(means: Tensors, by: float) -> dict[str, Tensor]:
    return dict(means) if by == 1 else {n: t / by for n, t in means.items()}


def _keep_largest(table: dict[str, Tensor], name: str, rows: Tensor) -> None:
    table[name] = torch.maximum(table[name], rows) if name in table else rows


def _add_floats(digits: exact.Digits, rows: Tensor, weights: Tensor) -> exact.Digits:
    """Σ w·x in the dtype of the rows, in the order of arrival."""
    batch = weights.to(rows) @ rows
    if 0 in digits:
        digits[0] += batch
    else:
        digits[0] = batch
    return digits


def _float(digits: exact.Digits) -> Tensor:
    """The one float sum."""
    return digits[0]


def one_of(part: str, name: str, given: str, allowed: tuple[str, ...], line: str | None = None) -> None:
    """Refuse a word that an argument of a part does not allow.

    Args:
        part, name, given: the part, its argument, and the value of the argument.
        allowed: the words.
        line: the line to write instead; None: a call of the part with this argument alone.

    Raises:
        UsageError: `given` is not in `allowed`.
    Example:
        >>> one_of("Mean", "sum", "exact", ("exact", "float"))
    """
    if not isinstance(given, str) or given not in allowed:
        raise UsageError(
            f"{part}({name}={given!r}).",
            f"{name} one of {', '.join(map(repr, allowed))}.",
            write=f"{part}({name}={allowed[0]!r})" if line is None else line,
        )
