"""The numbers that pass between batches of clients and a model: model, batch, gradient, rows.

Tests: tests/identities/test_models.py, tests/identities/test_numerics.py
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from atoll.compute.buffer_pool import empty


class GradientResult(NamedTuple):
    """Result of a pass: mean gradient `[K, d]`, buffers `[K, b]`, counters by name, sum of the losses `[K]`."""

    grad: Tensor
    buffers: Tensor
    counters: dict[str, Tensor]
    loss: Tensor


class Model(NamedTuple):
    """The tensors of K models: θ `[K, d]`, float buffers `[K, b]`, counters `[K, …]` and fixed tensors by name.

    Without the leading axis it is a single model, such as the server's.
    """

    theta: Tensor
    buffers: Tensor
    counters: Mapping[str, Tensor]
    fixed: Mapping[str, Tensor]

    def lanes(self, k: int) -> Model:
        """A copy for each of k clients: of this one model, or of the model of each lane if there are k already."""
        if self.theta.dim() == 2:
            counters = {n: t.clone() for n, t in self.counters.items()}
            return Model(self.theta.clone(), self.buffers.clone(), counters, self.fixed)
        return Model(
            empty(self.theta, (k, len(self.theta))).copy_(self.theta),
            self.buffers.repeat(k, 1),
            {n: t.expand(k, *t.shape).clone() for n, t in self.counters.items()},
            self.fixed,
        )

    def of(self, k: int) -> Model:
        """The model of lane k: this one model, or views of the k-th if there is one for each lane."""
        if self.theta.dim() == 1:
            return self
        return Model(self.theta[k], self.buffers[k], {n: t[k] for n, t in self.counters.items()}, self.fixed)

    def to(self, device: torch.device) -> Model:
        """Move the tensors to a device; return `self` if they are already on it."""
        return self if self.theta.device == device else tree_map(lambda t: t.to(device), self)

    def first(self, k: int) -> Model:
        """Return views of the first k clients."""
        return Model(self.theta[:k], self.buffers[:k], {n: t[:k] for n, t in self.counters.items()}, self.fixed)

    def between(self, lanes: slice) -> Model:
        """Return views of neighbouring clients."""
        counters = {n: t[lanes] for n, t in self.counters.items()}
        return Model(self.theta[lanes], self.buffers[lanes], counters, self.fixed)

    def select(self, index: Tensor) -> Model:
        """Copy the clients at these positions."""
        return Model(
            self.theta[index],
            self.buffers[index],
            {n: t[index] for n, t in self.counters.items()},
            self.fixed,
        )


class Batch(NamedTuple):
    """Rows of K clients: x `[K, B, …]`, y `[K, B, …]`.

    The first counts[k] of client k's B rows are valid; the rest is padding.
    """

    x: Tensor
    y: Tensor
    counts: tuple[int, ...]


class Stored(NamedTuple):
    """Rows for native code: all rows `[N, …]`, the row number of each example, int64 `[n]`, and its target `[n, …]`."""

    x: Tensor
    at: Tensor
    y: Tensor
