"""How contributions become one: the mean and the sum, each contribution folded once, in O(model) memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from atoll.errors import UsageError
from atoll.grammar import Value
from atoll.plan.aggregate import exact
from atoll.plan.slots import Cohort, Contribution, Population, Tensors, Total

_NONE = torch.zeros((), dtype=torch.int64)


@dataclass
class Partial:
    """The sum of some contributions: plain tensors, merged with another's in any order.

    Args:
        means: Σ w·x by name, as digits of an exact sum (one float sum under place 0 where `sum="float"`).
        sums: Σ x by name, likewise.
        largest: the largest of each counter by name.
        weight: Σ w, int64 `[]`.
        arrived: how many contributions, int64 `[]`.
    """

    means: dict[str, exact.Digits] = field(default_factory=dict)
    sums: dict[str, exact.Digits] = field(default_factory=dict)
    largest: dict[str, Tensor] = field(default_factory=dict)
    weight: Tensor = _NONE
    arrived: Tensor = _NONE

    def tensors(self) -> dict[str, Tensor]:
        """The partial as named plain tensors: what crosses a process or a wire."""
        out = {"weight": self.weight, "arrived": self.arrived}
        for kind, table in (("means", self.means), ("sums", self.sums)):
            out |= {f"{kind}/{n}/{place}": t for n, digits in table.items() for place, t in digits.items()}
        return out | {f"largest/{n}": t for n, t in self.largest.items()}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Partial:
        """The partial that `tensors()` was called on."""
        out = cls(weight=tensors["weight"], arrived=tensors["arrived"])
        for path, t in tensors.items():
            kind, _, rest = path.partition("/")
            if kind == "largest":
                out.largest[rest] = t
            elif kind in ("means", "sums"):
                name, _, place = rest.rpartition("/")
                getattr(out, kind).setdefault(name, {})[int(place)] = t
        return out


class _Folded(Value):
    """Folding and merging, shared by the mean and the sum."""

    linear = True
    weights: str
    sum: str

    def zero(self) -> Partial:
        """The sum of no contribution."""
        return Partial()

    def lift(self, contribution: Contribution) -> Tensor:
        """The weight each contribution is added with, int64 `[K]`."""
        return torch.ones_like(contribution.weight) if self.weights == "equal" else contribution.weight

    def fold(self, partial: Partial, contribution: Contribution) -> Partial:
        """Add K contributions, in place."""
        weights = self.lift(contribution)
        many = weights.shape[0]
        add = exact.add if self.sum == "exact" else _add_floats
        for name, rows in contribution.means.items():
            add(partial.means.setdefault(name, {}), rows, weights)
        for name, rows in contribution.sums.items():
            add(partial.sums.setdefault(name, {}), rows.to(torch.float64).reshape(many, -1), torch.ones_like(weights))
        for name, rows in contribution.largest.items():
            _keep_largest(partial.largest, name, rows.amax(0))
        partial.weight = partial.weight + weights.sum()
        partial.arrived = partial.arrived + many
        return partial

    def merge(self, a: Partial, b: Partial) -> Partial:
        """The sum of two partials; `a` is added to in place."""
        for mine, theirs in ((a.means, b.means), (a.sums, b.sums)):
            for name, digits in theirs.items():
                exact.merge(mine.setdefault(name, {}), digits)
        for name, rows in b.largest.items():
            _keep_largest(a.largest, name, rows)
        a.weight, a.arrived = a.weight + b.weight, a.arrived + b.arrived
        return a

    def total(self, partial: Partial) -> Total:
        """The finished sums: float64, or what `sum="float"` has added up, as it is."""
        if self.sum == "exact":
            exact.check_capacity(int(partial.weight), self)
        total = exact.total if self.sum == "exact" else _float
        return Total(
            {n: total(digits) for n, digits in partial.means.items()},
            {n: total(digits) for n, digits in partial.sums.items()},
            partial.weight,
            partial.arrived,
            partial.largest,
        )


@dataclass(frozen=True, repr=False)
class Mean(_Folded):
    """The mean of the updates.

    g = Σ wᵢ gᵢ / Σ wᵢ  over what arrived, or divided by what the sampler led one to expect, E Σ wᵢ = Σ chanceᵢ wᵢ

    Args:
        weights: `"examples"`, wᵢ is the number of rows a client holds; `"equal"`, wᵢ = 1.
        over: `"arrived"` divides by the weight that arrived; `"expected"` by the expected one, so that a client's
            influence does not depend on who else came (an unbiased sum, and the one whose sensitivity is bounded).
        sum: `"exact"`, the same bits for every order, grouping and number of workers; `"float"`, fast, order-dependent.
    Example:
        >>> mean = Mean(weights="equal")
        >>> rows = Contribution({"update": torch.tensor([[1.0], [3.0]])}, {}, torch.tensor([10, 30]), {}, {})
        >>> total = mean.total(mean.fold(mean.zero(), rows))
        >>> mean.finish(total, None, None).means["update"]
        tensor([2.], dtype=torch.float64)

    Reference: McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data, 2017.
    """

    weights: Literal["examples", "equal"] = "examples"
    over: Literal["arrived", "expected"] = "arrived"
    sum: Literal["exact", "float"] = "exact"

    def __post_init__(self) -> None:
        _one_of("Mean", "weights", self.weights, ("examples", "equal"))
        _one_of("Mean", "over", self.over, ("arrived", "expected"))
        _one_of("Mean", "sum", self.sum, ("exact", "float"))

    def finish(self, total: Total, cohort: Cohort | None, population: Population | None) -> Total:
        """Divide the means. Without a contribution there is none, unless it is the expected weight that divides."""
        means = _divided(total.means, float(total.weight))
        if self.over == "expected" and cohort is not None and population is not None:
            held = torch.ones_like(population.sizes) if self.weights == "equal" else population.sizes
            expected = (cohort.chance * held).sum() if cohort.chance.dim() else cohort.chance * held.sum()
            nothing = torch.zeros((), dtype=torch.float64, device=expected.device)
            means["update"] = total.means.get("update", nothing) / expected
        return total._replace(means=means)


@dataclass(frozen=True, repr=False)
class Sum(_Folded):
    """The sum of the updates, as a parameter server adds gradients.

    g = Σ wᵢ gᵢ.  With `Gradient()` and `"examples"` this is the gradient of the summed loss: lr must shrink as
    data grows.

    Args:
        weights: `"examples"`, wᵢ is the number of rows a client holds; `"equal"`, wᵢ = 1.
        sum: `"exact"` or `"float"`, as for `Mean`.
    """

    weights: Literal["examples", "equal"] = "examples"
    sum: Literal["exact", "float"] = "exact"

    def __post_init__(self) -> None:
        _one_of("Sum", "weights", self.weights, ("examples", "equal"))
        _one_of("Sum", "sum", self.sum, ("exact", "float"))

    def finish(self, total: Total, cohort: Cohort | None, population: Population | None) -> Total:
        """The update's sum as it is; everything else, such as a running mean, is still averaged."""
        means = _divided(total.means, float(total.weight))
        return total._replace(means=means | {n: t for n, t in total.means.items() if n == "update"})


def _divided(means: Tensors, by: float) -> dict[str, Tensor]:
    return dict(means) if by == 1 else {n: t / by for n, t in means.items()}


def _keep_largest(table: dict[str, Tensor], name: str, rows: Tensor) -> None:
    table[name] = torch.maximum(table[name], rows) if name in table else rows


def _add_floats(digits: exact.Digits, rows: Tensor, weights: Tensor) -> exact.Digits:
    """Σ w·x in the rows' own type, in whatever order it comes."""
    batch = weights.to(rows) @ rows
    if 0 in digits:
        digits[0] += batch
    else:
        digits[0] = batch
    return digits


def _float(digits: exact.Digits) -> Tensor:
    """The one float sum."""
    return digits[0]


def _one_of(part: str, name: str, given: str, allowed: tuple[str, ...]) -> None:
    if given not in allowed:
        raise UsageError(
            f"{part}({name}={given!r}).",
            f"{name} one of {', '.join(map(repr, allowed))}.",
            write=f"{part}({name}={allowed[0]!r})",
        )
