"""Aggregation by a function of the user, which receives the updates of all clients of a round as one matrix.

Tests: tests/identities/test_combine.py
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from atoll.base.errors import AtollError, RunError, UsageError, place_of
from atoll.base.lines import Line, Part
from atoll.base.names import under, without_prefix
from atoll.base.random import Key, user_scope
from atoll.compute.device import available
from atoll.plan.aggregate.mean import Mean, PartialSum, one_of
from atoll.plan.protocols import (
    Aggregator,
    Conflict,
    Contribution,
    Group,
    Ids,
    Partial,
    Population,
    RoundInfo,
    Slots,
    Tensors,
    Total,
    Weights,
)

_MEMORY_PART = 0.5  # largest part of the free memory that the updates of a round may occupy as float64
_ROWS = ("updates", "client", "repeat", "weights")


@dataclass
class PartialRows(Partial):
    """The updates of some contributions as rows, and the sums of all their other values.

    Args:
        blocks: the rows in the order of arrival. A block has `updates` `[K, d]`, and `client`, `repeat` and `weights`,
            int64 `[K]`.
        rest: the sums of everything except the updates.
    """

    blocks: list[Tensors] = field(default_factory=list)
    rest: PartialSum = field(default_factory=PartialSum)

    def __len__(self) -> int:
        return sum(len(block["client"]) for block in self.blocks)

    def tensors(self) -> dict[str, Tensor]:
        """Convert the partial to named tensors, to send it to another process."""
        rows = {n: torch.cat([block[n] for block in self.blocks]) for n in _ROWS} if self.blocks else {}
        return under("rows/", rows) | under("rest/", self.rest.tensors())

    @classmethod
    def of(cls, tensors: Tensors) -> PartialRows:
        """The inverse of `tensors`: build a partial from named tensors."""
        rows = without_prefix(tensors, "rows/")
        return cls([rows] if rows else [], PartialSum.of(without_prefix(tensors, "rest/")))

    def reduce(self, group: Group) -> PartialRows:
        """The rows of all processes, on the device of this process, and the sums over all processes."""
        rest, mine = self.rest.reduce(group), without_prefix(self.tensors(), "rows/")
        device = mine["updates"].device if mine else torch.device("cpu")
        theirs = [rows for rows in group.all_gather(mine) if rows]
        return PartialRows([rows | {"updates": rows["updates"].to(device)} for rows in theirs], rest)

    def places(self) -> list[Tensor]:
        """The row number of each row of each block in the order of (client, repeat), int64 `[K]` for each block."""
        starts = torch.cat([block["client"] << 32 | block["repeat"] for block in self.blocks])
        place = torch.empty_like(starts)
        place[starts.argsort()] = torch.arange(len(starts))
        return list(place.split([len(block["client"]) for block in self.blocks]))


class _Bound(Aggregator):
    """The values that `Combine` has after `bind`. They are no fields, so a plan text does not contain them."""

    _mean: Mean = Mean()  # of the buffers; it also weighs the clients
    _cohort: int = 0  # the expected number of clients in a round; 0: unknown


@dataclass(frozen=True, repr=False)
class Combine(_Bound):
    """The update that a function computes from the updates of all clients of a round.

    g = fn(updates, weights)

    Metrics, sums, counters and buffers are aggregated as by `Mean`. The server keeps the update of every client of a
    round. `fn` runs once in a round, at the server. Random draws inside it have the same seed in each round.

    Args:
        fn: a function of `updates`, float64 `[n, d]`, and `weights`, float64 `[n]`, which returns floats `[d]`. Row i
            of both belongs to one start of a client. Rows are in the order of client ids, then of the client's starts.
            `fn` must not change its arguments. In a plan text, `fn` is `module:name`.
        weights: `"examples"`: the weight of a client is its number of rows; `"equal"`: 1. With a sampler of unequal
            chances it is divided by the chance of the client, as in `Mean`.
    Raises:
        UsageError: `fn` is not a function, or the updates of a round need more than half of the free memory.
        RunError: `fn` raised an error, changed an argument, or returned something else than finite floats `[d]`.
    Example:
        >>> from atoll.testing import round_info
        >>> rule = Combine(lambda updates, weights: updates.median(0).values)
        >>> rows = torch.tensor([[1.0], [900.0], [3.0]])
        >>> ids = Ids(torch.arange(3), torch.zeros(3, dtype=torch.int64))
        >>> given = Contribution({"update": rows}, {}, torch.tensor([10, 10, 10]), {}, {})
        >>> rule.finalize(rule.total(rule.fold(rule.zero(), given, ids)), round_info()).means["update"]
        tensor([3.], dtype=torch.float64)

    Reference: Yin et al., Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates, 2018.
    """

    fn: Callable[[Tensor, Tensor], Tensor]
    weights: Weights = "examples"

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise UsageError(
                f"Combine({self.fn!r:.60}).",
                "a function (updates, weights), or module:name in a plan text.",
            )
        one_of("Combine", "weights", self.weights, ("examples", "equal"))
        object.__setattr__(self, "_mean", Mean(self.weights))

    def bind(self, population: Population, chance: Tensor) -> Self:
        """A copy that knows the expected number of clients, and divides weights by unequal chances as `Mean` does."""
        bound = copy.copy(self)
        object.__setattr__(bound, "_mean", self._mean.bind(population, chance))
        cohort = chance.sum() if chance.dim() else chance * population.clients
        object.__setattr__(bound, "_cohort", round(float(cohort)))
        return bound

    def weigh(self, clients: Tensor, rows: Tensor) -> Tensor:
        """The weight of each contribution, int64 `[K]`, as that of `Mean`."""
        return self._mean.weigh(clients, rows)

    def zero(self) -> PartialRows:
        """No row."""
        return PartialRows()

    def fold(self, partial: PartialRows, contribution: Contribution, ids: Ids) -> PartialRows:
        """Add the rows of K contributions, in place.

        Raises:
            UsageError: the rows of the round need more than half of the free memory.
        """
        others = {n: t for n, t in contribution.means.items() if n != "update"}
        partial.rest = self._mean.fold(partial.rest, contribution._replace(means=others), ids)
        if "update" in contribution.means:
            rows, held = contribution.means["update"], len(partial)
            if not held or held + len(rows) > self._cohort:
                self._check_memory(max(held + len(rows), self._cohort), rows.shape[1], rows.device)
            weights = self.weigh(ids.client, contribution.weight)
            numbers = {"client": ids.client, "repeat": ids.repeat, "weights": weights}
            partial.blocks.append({"updates": rows.clone(), **{n: t.clone() for n, t in numbers.items()}})
        return partial

    def merge(self, a: PartialRows, b: PartialRows) -> PartialRows:
        """Add the rows and the sums of the partial `b` to the partial `a`, in place."""
        a.blocks += b.blocks
        a.rest = self._mean.merge(a.rest, b.rest)
        return a

    def total(self, partial: PartialRows) -> Total:
        """The update that `fn` returns, and the sums of everything else.

        Raises:
            RunError: `fn` raised an error, changed an argument, or returned something else than finite floats `[d]`.
        """
        total = self._mean.total(partial.rest)
        if not len(partial):
            return total
        places = partial.places()
        first = partial.blocks[0]["updates"]
        updates = torch.empty(len(partial), first.shape[1], dtype=torch.float64, device=first.device)
        weights = torch.empty(len(partial), dtype=torch.float64, device=first.device)
        for place, block in zip(places, partial.blocks, strict=True):
            updates[place.to(first.device)] = block["updates"].to(updates)
            weights[place.to(first.device)] = block["weights"].to(weights)
        result = self._call(updates, weights)
        for place, block in zip(places, partial.blocks, strict=True):
            for name, now in (("updates", updates), ("weights", weights)):
                if not _same_bits(now[place.to(now.device)], block[name].to(now)):
                    raise RunError(
                        f"{self!r:.80} changed its argument {name} in place.",
                        "a function that leaves its arguments as they are.",
                        "the server still needs them.",
                        Line(python=f"{name} = {name}.clone()"),
                    )
        return total._replace(means={**total.means, "update": self._checked(result, updates)})

    def finalize(self, total: Total, info: RoundInfo) -> Total:
        """Keep the update as it is, and divide all other means, such as buffers, by the weight.

        Raises:
            RunError: the chances of the clients differ from those at the start of the training.
        """
        update = {n: t for n, t in total.means.items() if n == "update"}
        others = {n: t for n, t in total.means.items() if n != "update"}
        mean = self._mean.finalize(total._replace(means=others), info)
        return mean._replace(means={**mean.means, **update})

    def conflicts(self, slots: Slots) -> Iterable[Conflict]:
        """Refuse asynchronous paces and codecs that decode sums: `fn` takes the single updates of one round."""
        why = "the function takes the update of each client of a round, and a sum of updates does not contain them."
        if slots.pace.asynchronous:
            yield Conflict(f"{self!r} with {slots.pace!r}.", "a pace without late updates.", why, "Sync()")
        if slots.codec.per_sum:
            yield Conflict(f"{self!r} with {slots.codec!r}.", "a codec that decodes no sum.", why, "Identity()")

    def _check_memory(self, n: int, d: int, device: torch.device) -> None:
        free = available(device)
        if free is None or n * d * 8 <= _MEMORY_PART * free:
            return
        fits = int(_MEMORY_PART * free) // (8 * d)
        raise UsageError(
            f"{self!r:.80} with {n} updates of {d} numbers, {n * d * 8 / 1e9:.2g} GB.",
            f"at most half of the free memory of {free / 1e9:.2g} GB.",
            "the server keeps the update of each client of a round as float64.",
            Part(f"Uniform({fits})", "cohort") if fits else "",
        )

    def _call(self, updates: Tensor, weights: Tensor) -> Any:
        try:
            with user_scope(Key(0).fold("combine")):
                return self.fn(updates, weights)
        except AtollError:
            raise
        except Exception as error:
            place = place_of(error)
            raise RunError(
                f"{self!r:.80} raised {type(error).__name__}: {error}{f' ({place})' if place else ''}.",
                f"floats [{updates.shape[1]}] from updates {list(updates.shape)} and weights [{len(weights)}].",
            ) from error

    def _checked(self, result: Any, updates: Tensor) -> Tensor:
        """The result as float64 `[d]`, in memory of its own."""
        n, d = updates.shape
        if not isinstance(result, Tensor):
            given = f"a {type(result).__name__}"
        elif result.shape != (d,) or not result.is_floating_point():
            given = f"a tensor of shape {list(result.shape)} and {result.dtype}"
        elif not bool(result.isfinite().all()):
            bad = int((~result.isfinite()).sum())
            given = f"{bad} of {d} numbers that are NaN or infinite"
        else:
            return result.detach().to(updates).clone()
        raise RunError(
            f"{self!r:.80} returned {given} for updates [{n}, {d}].",
            f"a tensor of finite floats [{d}].",
            "the optimizer moves the d parameters along it.",
            Line(python="return updates.median(0).values") if isinstance(result, tuple) else "",
        )


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two float64 tensors have the same bits, also where they are NaN."""
    return torch.equal(a.view(torch.int64), b.view(torch.int64))
