"""Statistics of the rows of clients: their number, sums and sums of squares around a centre, and class counts.

Tests: tests/identities/test_moments.py
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from atoll.base.errors import ClientError, UsageError
from atoll.base.random import Key
from atoll.compute.batches import ClientBatch
from atoll.compute.task import Task
from atoll.data.rows import IGNORED
from atoll.data.scale import LEVELS, Sums, centred_sums
from atoll.plan.protocols import Broadcast, Conflict, Contribution, Declared, Local, Slots, Tensors

_SUM, _SQUARE = ([f"{name}_{level + 1}" for level in range(LEVELS)] for name in ("sum", "square"))


@dataclass(frozen=True, repr=False)
class Moments(Local):
    """Sums over the rows of each client, in float64 and as the rows are stored. The contribution has no update.

        presentᵢ = #x ;  sumᵢ = Σ (x − c) ;  squareᵢ = Σ (x − c)² ;  classesᵢ = the rows of each class

    x are the features of a row if they are floats, then the targets of the row if `classes` is 0. NaN, and a label of
    −100, is a missing number. A sum has three levels, `sum_1` to `sum_3`, as `atoll.data.scale.centred_sums` describes.
    Sums around 0 give the mean, and sums around the mean give the deviation without cancellation: see `sums_of`,
    `atoll.data.scale.mean_of` and `deviation_of`.

    Args:
        centre: c, of each number of a row; empty: only rows and classes are counted.
        classes: the number of classes, ≥ 0; 0: the targets are numbers or labels of 0 and 1.
        first: the place of the first number of x that is measured, from 0; the text of a plan is short.
    Raises:
        UsageError: the number of classes, or the first place, is no whole number ≥ 0.
    Example:
        >>> from atoll.plan.aggregate import Mean
        >>> from atoll.plan.plan import Plan
        >>> Plan(Moments((0.0, 0.0), classes=3), Mean()).local
        Moments((0.0, 0.0), classes=3)

    Reference: Chan, Golub and LeVeque, Algorithms for Computing the Sample Variance, 1983.
    """

    centre: tuple[float, ...] = ()
    classes: int = 0
    first: int = 0

    def __post_init__(self) -> None:
        for name, value in (("classes", self.classes), ("first", self.first)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise UsageError(
                    f"Moments: {name} = {value!r}.", "a whole number ≥ 0.", write="Moments((0.0,), classes=2)"
                )

    @property
    def mixes_widths(self) -> bool:
        """Clients of different lengths share a chunk: the rows of each client are read by themselves."""
        return True

    def declare(self, task: Task) -> Mapping[str, Declared]:
        """Declares the number of rows, the sums of the numbers, and the counts of the classes."""
        out = {"rows": Declared(1, torch.int64, "sum")}
        if self.centre:
            out["present"] = Declared(len(self.centre), torch.int64, "sum")
            out |= {n: Declared(len(self.centre), torch.float64, "sum") for n in (*_SUM, *_SQUARE)}
        return out | ({"classes": Declared(self.classes, torch.int64, "sum")} if self.classes else {})

    def contribute(
        self, broadcast: Broadcast, lanes: ClientBatch, memory: Tensors, key: Key, task: Task
    ) -> tuple[Contribution, Tensors]:
        """The sums of each client. They depend on its own rows only."""
        sums: dict[str, Tensor] = {"rows": lanes.rows}
        if self.classes:
            sums["classes"] = lanes.class_counts(self.classes)
        if self.centre:
            centre = torch.tensor(self.centre, dtype=torch.float64, device=lanes.device)
            each = [centred_sums(self._numbers(lanes.read(k)), centre) for k in range(len(lanes.sizes))]
            sums["present"] = torch.stack([one.present for one in each])
            sums |= {n: torch.stack([one.sum[level] for one in each]) for level, n in enumerate(_SUM)}
            sums |= {n: torch.stack([one.square[level] for one in each]) for level, n in enumerate(_SQUARE)}
        return Contribution({}, sums, lanes.rows, {}, {}), {}

    def _numbers(self, parts: Iterable[tuple[Tensor, Tensor]]) -> Iterator[Tensor]:
        """The numbers of rows, `[n, len(centre)]`."""
        for x, y in parts:
            numbers = [x.reshape(len(x), -1)] if x.is_floating_point() else []
            if not self.classes:
                missing = torch.zeros_like(y, dtype=torch.bool) if y.is_floating_point() else y == IGNORED
                numbers.append(y.double().masked_fill(missing, torch.nan).reshape(len(y), -1))
            found, last = sum(part.shape[1] for part in numbers), self.first + len(self.centre)
            if found < last:
                raise ClientError(f"A row has {found} numbers.", f"at least {last}, as Moments has centres.")
            yield torch.cat([part.double() for part in numbers], 1)[:, self.first : last]

    def sums_of(self, sums: Tensors) -> Sums:
        """The sums of a total, or of several contributions, for `atoll.data.scale.mean_of` and `deviation_of`.

        Args:
            sums: `present`, `sum_1` … `square_3`, as `contribute` names them, each `[d]`, or `[K, d]`.
        """
        width = len(self.centre)
        levels = (torch.cat([sums[n].reshape(-1, width) for n in names]) for names in (_SUM, _SQUARE))
        return Sums(sums["present"].reshape(-1, width).sum(0), *levels)

    def conflicts(self, slots: Slots) -> Iterable[Conflict]:
        """Excludes a secure sum and noise: neither bounds the sums of rows."""
        if slots.aggregator.secure is not None:
            yield Conflict(
                f"{self!r:.60} with {slots.aggregator!r}.",
                "an aggregator without a secure sum.",
                "the sums of rows have no bound, which the grid of a secure sum needs.",
                "Mean()",
            )
        if slots.codec.event(1.0) is not None:
            yield Conflict(
                f"{self!r:.60} with {slots.codec!r}.",
                "a codec without noise.",
                "the sums of rows would be released without noise.",
                "Identity()",
            )
