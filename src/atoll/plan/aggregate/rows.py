"""The base of aggregators that need the single contributions of a round: the server keeps one row of each client.

Tests: tests/identities/test_robust.py, tests/identities/test_combine.py
"""

from __future__ import annotations

import copy
import mmap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple, Self

import torch
from torch import Tensor

from atoll.base.errors import RunError, UsageError
from atoll.base.lines import Part
from atoll.base.names import under, without_prefix
from atoll.base.random import Key
from atoll.compute import limits
from atoll.compute.device import available
from atoll.compute.file_memory import in_file, leave_memory
from atoll.plan.aggregate.mean import Mean, PartialSum
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
from atoll.plan.schedule import NOTHING

_MEMORY_PART = 0.5  # largest part of the free memory that the rows of a round may occupy as float64
_LEAVE = 8  # blocks of columns that are read before their pages leave the memory
_NUMBERS = ("client", "repeat", "rows", "weights")


@dataclass
class PartialRows(Partial):
    """Some means of some contributions as rows, and the sums of all their other values.

    Rows on the CPU beyond `limits.ROW_BYTES` are in files without a name.

    Args:
        blocks: the rows in the order of arrival. A block has `means/NAME` `[K, length]`, and `client`, `repeat`,
            `rows` (the claimed number of rows) and `weights`, int64 `[K]`.
        rest: the sums of everything else.
        files: the pages of the files.
        filed: the number of blocks in files. They are the first ones.
    """

    blocks: list[Tensors] = field(default_factory=list)
    rest: PartialSum = field(default_factory=PartialSum)
    files: list[mmap.mmap] = field(default_factory=list)
    filed: int = 0

    def __len__(self) -> int:
        return sum(len(block["client"]) for block in self.blocks)

    @property
    def names(self) -> list[str]:
        """The names of the means that are kept as rows."""
        return sorted(without_prefix(self.blocks[0], "means/")) if self.blocks else []

    def add(self, blocks: Sequence[Tensors], *, copied: bool) -> None:
        """Add blocks of rows. If the rows in memory exceed the limit, a file receives them.

        Args:
            blocks: the blocks.
            copied: whether no other part changes or reuses their memory.
        """
        here = [*self.blocks[self.filed :], *blocks]
        if sum(t.nbytes for block in here for t in block.values() if t.is_cpu) > limits.ROW_BYTES:
            joined, files = _joined(here, in_files=True)
            self.blocks[self.filed :] = [joined]
            self.files += files
            self.filed += 1
        else:
            self.blocks += blocks if copied else [{n: t.clone() for n, t in block.items()} for block in blocks]

    def tensors(self) -> dict[str, Tensor]:
        """Convert the partial to named tensors, to send it to another process."""
        rows = _joined(self.blocks)[0] if len(self.blocks) > 1 else dict(*self.blocks)
        return under("rows/", rows) | under("rest/", self.rest.tensors())

    @classmethod
    def of(cls, tensors: Tensors) -> PartialRows:
        """The inverse of `tensors`: build a partial from named tensors."""
        rows = without_prefix(tensors, "rows/")
        return cls([rows] if rows else [], PartialSum.of(without_prefix(tensors, "rest/")))

    def reduce(self, group: Group) -> PartialRows:
        """The rows of all processes, on the device of this process, and the sums over all processes."""
        rest, mine = self.rest.reduce(group), without_prefix(self.tensors(), "rows/")
        device = next((t.device for n, t in mine.items() if n not in _NUMBERS), torch.device("cpu"))
        theirs = [rows for rows in group.all_gather(mine) if rows]
        blocks: list[Tensors] = [{n: t if n in _NUMBERS else t.to(device) for n, t in rows.items()} for rows in theirs]
        out = PartialRows(rest=rest)
        out.add(blocks, copied=True)
        return out

    def places(self) -> list[Tensor]:
        """The row number of each row of each block in the order of (client, repeat), int64 `[K]` for each block."""
        starts = torch.cat([block["client"] << 32 | block["repeat"] for block in self.blocks])
        place = torch.empty_like(starts)
        place[starts.argsort()] = torch.arange(len(starts))
        return list(place.split([len(block["client"]) for block in self.blocks]))

    def matrix(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """The rows of a tensor in the order of (client, repeat), `[n, length]` or `[n]`, in their dtype or in `dtype`.

        Beyond `limits.ROW_BYTES` its memory is a file.

        Args:
            name: `means/NAME`, `client`, `repeat`, `rows` or `weights`.
            dtype: the dtype of the result; None: that of the rows.
        """
        first = self.blocks[0][name]
        out = row_memory((len(self), *first.shape[1:]), dtype or first.dtype, first.device)
        for place, block in zip(self.places(), self.blocks, strict=True):
            out[place.to(out.device)] = block[name].to(out)
        leave_memory(self.files)
        return out

    def columns(self, name: str) -> Iterator[Tensor]:
        """The rows of a mean in the order of (client, repeat), in blocks of columns `[n, ≤ BLOCK]`."""
        first, places = self.blocks[0][name], self.places()
        for number, start in enumerate(range(0, max(1, first.shape[1]), BLOCK)):
            some = first.new_empty(len(self), min(BLOCK, first.shape[1] - start))
            for place, block in zip(places, self.blocks, strict=True):
                some[place.to(some.device)] = block[name][:, start : start + BLOCK]
            if number % _LEAVE == _LEAVE - 1:
                leave_memory(self.files)
            yield some
        leave_memory(self.files)


def row_memory(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for rows, not initialised; on the CPU and beyond `limits.ROW_BYTES` in a file."""
    if device.type == "cpu" and prod(shape) * dtype.itemsize > limits.ROW_BYTES:
        return in_file(shape, dtype)[0]
    return torch.empty(shape, dtype=dtype, device=device)


def _joined(blocks: Sequence[Tensors], *, in_files: bool = False) -> tuple[dict[str, Tensor], list[mmap.mmap]]:
    """The rows of several blocks as one block. `in_files` gives each mean on the CPU a file, whose pages it returns."""
    joined, files = dict[str, Tensor](), list[mmap.mmap]()
    for name, first in blocks[0].items():
        shape = (sum(len(block[name]) for block in blocks), *first.shape[1:])
        rows = [block[name] for block in blocks]
        if in_files and first.is_cpu and name.startswith("means/") and prod(shape):
            joined[name], pages = in_file(shape, first.dtype, rows)
            files.append(pages)
        else:
            joined[name] = torch.cat(rows, out=row_memory(shape, first.dtype, first.device))
    leave_memory(files)
    return joined, files


class RowFacts(NamedTuple):
    """The facts of the rows of a round, for a rule.

    Args:
        client: the client of each row, int64 `[n]`; None: client i for row i.
        key: the key of all random numbers of the rule in the round. It is equal for all means of a contribution.
        server: the server state of the rule; empty for other means than the update.
    """

    client: Tensor | None = None
    key: Key = Key(0)
    server: Tensors = NOTHING


NO_FACTS = RowFacts()


class RowRule(Aggregator):
    """The base of rules that see the contribution of each client. A rule defines `rule` or `row_weights`.

    The total is the result of the rule times the total weight, so that it is divided by the weight as under `Mean`.
    Sums, such as those of metrics, are exact sums.
    """

    weights: Weights = "equal"
    _mean: Mean = Mean("equal")  # of the sums; it also weighs the clients
    _cohort: int = 0  # the expected number of clients in a round; 0: unknown
    _facts: RowFacts = NO_FACTS  # of the round
    by_client = False  # whether the rule needs to know which client a row is from
    by_coordinate = False  # whether a coordinate of the result depends only on this coordinate of the rows
    in_memory = False  # whether the rule needs all rows in memory

    def rule(self, x: Tensor, facts: RowFacts = NO_FACTS) -> Tensor:
        """The aggregate of the rows. The default is the weighted mean, with the weights of these rows.

        Args:
            x: the rows of a mean in the order of (client, repeat), `[n, length]`. It must not change.
            facts: of the rows.
        Returns:
            Floats `[length]`.
        """
        weights = self.row_weights(x, facts)
        if weights is None:
            raise NotImplementedError
        return weighted(weights, x)

    def prepared(self, x: Tensor, facts: RowFacts = NO_FACTS) -> Tensor:
        """The updates that the rule takes instead of the updates x, `[n, d]`. Other means remain as they are."""
        return x

    def row_weights(self, x: Tensor, facts: RowFacts = NO_FACTS) -> Tensor | None:
        """The weights of a rule that is a weighted mean of rows, float64 `[n]` with the sum 1; None: it is none.

        The weights are computed from the updates, and all means, such as buffers, get the same.

        Args:
            x: the updates in the order of (client, repeat), `[n, d]`. They must not change.
            facts: of the rows.
        """
        return None

    def in_round(self, server: Tensors, key: Key) -> Self:
        """A copy that knows the server state and the key of a round."""
        bound = copy.copy(self)
        object.__setattr__(bound, "_facts", RowFacts(None, key, server))
        return bound

    def noted(self, contribution: Contribution) -> dict[str, Tensor]:
        """Further numbers of each client that the rule keeps, tensors `[K]`."""
        return {}

    def least_rows(self) -> int:
        """The smallest number of contributions with which the rule is defined."""
        return 1

    def for_rows(self, n: int) -> str:
        """The text of a rule for n contributions, if they are too few for this one."""
        return "Median()"

    def kept_as_rows(self, name: str) -> bool:
        """Whether the rule applies to the mean of this name. Others are averaged."""
        return True

    def bind(self, population: Population, chance: Tensor) -> Self:
        """A copy that knows the expected number of clients, and divides weights by unequal chances as `Mean` does.

        Raises:
            UsageError: the rule is not defined for so few clients.
        """
        bound = copy.copy(self)
        object.__setattr__(bound, "_mean", self._mean.bind(population, chance))
        cohort = round(float(chance.sum() if chance.dim() else chance * population.clients))
        object.__setattr__(bound, "_cohort", cohort)
        if 0 < cohort < self.least_rows():
            raise UsageError(*self._few(f"a cohort of {cohort} clients"), Part(self.for_rows(cohort), "aggregator"))
        return bound

    def _few(self, given: str) -> tuple[str, str, str]:
        least = self.least_rows()
        why = "with fewer contributions the rule has no result that the attackers cannot choose."
        return f"{self!r:.80} with {given}.", f"at least {least} contributions.", why

    def weigh(self, clients: Tensor, rows: Tensor) -> Tensor:
        """The weight of each contribution, int64 `[K]`, as that of `Mean`."""
        return self._mean.weigh(clients, rows)

    def zero(self) -> PartialRows:
        """No row."""
        return PartialRows()

    def fold(self, partial: PartialRows, contribution: Contribution, ids: Ids) -> PartialRows:
        """Add the rows of K contributions, in place.

        Raises:
            UsageError: the rows need more than half of the free memory, and the rule or the device needs them there.
            RunError: the disk has too little space for the rows.
        """
        kept = {n: t for n, t in contribution.means.items() if self.kept_as_rows(n)}
        others = {n: t for n, t in contribution.means.items() if n not in kept}
        partial.rest = self._mean.fold(partial.rest, contribution._replace(means=others), ids)
        if kept:
            count, held = len(ids.client), len(partial)
            device = next(iter(kept.values())).device
            if (self.in_memory or device.type != "cpu") and (not held or held + count > self._cohort):
                width = sum(t.shape[1] for t in kept.values())
                self._check_memory(max(held + count, self._cohort), width, device)
            weights = self.weigh(ids.client, contribution.weight)
            numbers = {"client": ids.client, "repeat": ids.repeat, "rows": contribution.weight, "weights": weights}
            rows = {**under("means/", kept), **numbers, **under("noted/", self.noted(contribution))}
            partial.add([rows], copied=False)
        return partial

    def merge(self, a: PartialRows, b: PartialRows) -> PartialRows:
        """Add the rows and the sums of the partial `b` to the partial `a`, in place."""
        a.blocks[:0], a.files, a.filed = b.blocks[: b.filed], a.files + b.files, a.filed + b.filed
        a.add(b.blocks[b.filed :], copied=True)
        a.rest = self._mean.merge(a.rest, b.rest)
        return a

    def total(self, partial: PartialRows) -> Total:
        """The result of the rule times the total weight, and the sums of everything else.

        Raises:
            RunError: the round has too few contributions.
        """
        total = self._mean.total(partial.rest)
        if not len(partial):
            return total
        if len(partial) < self.least_rows():
            raise RunError(*self._few(f"{len(partial)} contributions"))
        means, names = dict(total.means), partial.names
        facts = self._facts._replace(client=partial.matrix("client"))
        others = facts._replace(server=NOTHING)
        whole = "update" in names and not self.by_coordinate
        updates = self.prepared(partial.matrix("means/update"), facts) if whole else None
        weights = None if updates is None else self.row_weights(updates, facts)
        for name in names:
            if self.by_coordinate:
                mine = facts if name == "update" else others
                result = torch.cat([self.rule(some, mine) for some in partial.columns(f"means/{name}")])
            elif weights is not None:
                x = updates if name == "update" and updates is not None else partial.matrix(f"means/{name}")
                result = weighted(weights, x)
            elif name == "update" and updates is not None:
                result = self.rule(updates, facts)
            else:
                result = self.rule(partial.matrix(f"means/{name}"), others)
            means[name] = result.double() * float(total.weight)
        return total._replace(means=means)

    def finalize(self, total: Total, info: RoundInfo) -> Total:
        """Divide all means by the weight.

        Raises:
            RunError: the chances of the clients differ from those at the start of the training.
        """
        return self._mean.finalize(total, info)

    def conflicts(self, slots: Slots) -> Iterable[Conflict]:
        """Refuse asynchronous paces and codecs that decode sums: the rule takes the single updates of one round."""
        why = "the rule takes the update of each client of a round, and a sum of updates does not contain them."
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


BLOCK = 1 << 14  # coordinates that are computed together, so that they stay in the caches


def weighted(weights: Tensor, x: Tensor) -> Tensor:
    """Σ wᵢ xᵢ in float64, `[length]`. A row of weight 0 has no influence.

    Args:
        weights: float64 `[n]`.
        x: rows `[n, length]`.
    """
    used = weights.nonzero()[:, 0]
    out = torch.empty(x.shape[1], dtype=torch.float64, device=x.device)
    for first in range(0, x.shape[1], BLOCK):
        out[first : first + BLOCK] = weights[used] @ x[used, first : first + BLOCK].double()
    return out


def squared_distances(x: Tensor) -> Tensor:
    """|xᵢ − xⱼ|² for all pairs of rows, float64 `[n, n]`, by blocks of coordinates.

    Args:
        x: rows `[n, length]`.
    """
    out = torch.zeros(len(x), len(x), dtype=torch.float64, device=x.device)
    for first in range(0, x.shape[1], BLOCK):
        out += torch.cdist(
            *(x[:, first : first + BLOCK].double(),) * 2, compute_mode="donot_use_mm_for_euclid_dist"
        ).square()
    return out
