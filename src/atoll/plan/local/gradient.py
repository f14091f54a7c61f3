"""The gradient of a client's own loss.

Tests: tests/identities/test_linear_regression.py
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from atoll.base.random import Key
from atoll.base.validation import plain_fields
from atoll.compute.batches import ClientBatch, padded
from atoll.compute.task import Task
from atoll.plan.local.contribution import (
    check_batch,
    contribution_of,
    declared_update,
)
from atoll.plan.protocols import (
    Broadcast,
    Contribution,
    Declared,
    Local,
    Tensors,
)


@dataclass(frozen=True, repr=False)
class Gradient(Local):
    """The gradient of a client's own loss at θ.

    gᵢ = ∇θ (1/|B|) Σ_{rows in B} ℓ(f_θ(x), y),  where B is all rows, or `batch` rows drawn without
    replacement in each round.

    Args:
        batch: the number of rows in B, ≥ 1; None: all rows. A client with fewer rows uses all of them.
    Raises:
        UsageError: the batch is not an integer ≥ 1.
    Example:
        >>> Gradient(batch=32)
        Gradient(32)

    Reference: Robbins and Monro, A Stochastic Approximation Method, 1951.
    """

    batch: int | None = None

    def __post_init__(self) -> None:
        plain_fields(self, "batch")
        check_batch("Gradient", self.batch)

    @property
    def mixes_widths(self) -> bool:
        """Clients of different padded lengths share a chunk: the rows of each length are one pass."""
        return True

    def padded_batch(self, rows: int) -> int:
        """The padded length of this client's batch, a function of its own number of rows."""
        return self.batch if self.batch is not None and rows >= self.batch else padded(rows)

    def examples_per_round(self, sizes: Tensor) -> Tensor:
        """The rows that each client processes in a round, int64 `[C]`; `sizes`: the rows that it has, int64 `[C]`."""
        return sizes if self.batch is None else sizes.clamp(max=self.batch)

    def declare(self, task: Task) -> Mapping[str, Declared]:
        """Declares the gradient, buffers if the model has any, the loss and the rows."""
        return declared_update(task)

    def contribute(
        self, broadcast: Broadcast, lanes: ClientBatch, memory: Tensors, key: Key, task: Task
    ) -> tuple[Contribution, Tensors]:
        """The gradient of K clients at once."""
        width = self.padded_batch(lanes.sizes[0])
        counts = tuple(min(n, self.batch or n) for n in lanes.sizes)
        if self.batch is None:
            positions = torch.arange(width, device=lanes.ids.device).expand(len(counts), -1)
        else:
            length = max(width, lanes.sizes[0])
            positions = key.fold("order").permutations(lanes.rows, length)[:, :width]
        model = broadcast.model.lanes(len(counts))
        widths = tuple(map(self.padded_batch, lanes.sizes))
        g = lanes.gradient(task, model, lanes.places(positions), counts, key.fold("pass"), widths)
        if lanes.on_step is not None:
            lanes.stepped(0, g.loss, counts)
        sums = {"loss": g.loss, "rows": torch.tensor(counts, device=lanes.ids.device)}
        return contribution_of(lanes, broadcast, task.layout, g.grad, g.buffers, g.counters, sums), {}
