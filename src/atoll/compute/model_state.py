"""The numbers that pass between batches of clients and a model: model, batch, gradient, rows.

Tests: tests/identities/test_models.py, tests/identities/test_numerics.py
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from atoll.compute.buffer_pool import empty
from atoll.compute.layout import Layout
from atoll.compute.tensor_notes import BLOCK, attach, lookup


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


class OwnSplit(NamedTuple):
    """The places of the shared part and of the own part of a model in its flat vectors.

    Args:
        theta, buffers: of θ and of the float buffers: the neighbouring places of the shared part, then of the own part.
        counters: the names of the own counters.
    """

    theta: tuple[tuple[slice, ...], tuple[slice, ...]]
    buffers: tuple[tuple[slice, ...], tuple[slice, ...]]
    counters: frozenset[str]

    def shared(self, model: Model) -> Model:
        """The shared part of one model or of K models: θ `[..., s]`."""
        counters = {n: t for n, t in model.counters.items() if n not in self.counters}
        return Model(some(model.theta, self.theta[0]), some(model.buffers, self.buffers[0]), counters, model.fixed)

    def own(self, model: Model) -> dict[str, Tensor]:
        """The own part of one model or of K models by name: `theta`, `buffers` and the counters."""
        counters = {f"counters.{n}": t for n, t in model.counters.items() if n in self.counters}
        return {"theta": some(model.theta, self.theta[1]), "buffers": some(model.buffers, self.buffers[1]), **counters}

    def join(self, shared: Model, own: Mapping[str, Tensor]) -> Model:
        """The whole of a shared part and the own parts of K clients, or of one: θ `[K, d]` or `[d]`.

        Args:
            shared: of all clients, θ `[s]`, or of each client, θ `[K, s]`.
            own: the result of `own`.
        """
        counters = dict(shared.counters)
        if shared.theta.dim() < own["theta"].dim():
            counters = {n: t.expand(len(own["theta"]), *t.shape) for n, t in counters.items()}
        return Model(
            joined_parts(shared.theta, own["theta"], self.theta),
            joined_parts(shared.buffers, own["buffers"], self.buffers),
            {**counters, **{n: own[f"counters.{n}"] for n in self.counters}},
            shared.fixed,
        )


def some(vector: Tensor, places: tuple[slice, ...]) -> Tensor:
    """A contiguous copy of some places of a vector `[..., n]`."""
    out = empty(vector, (*vector.shape[:-1], sum(at.stop - at.start for at in places)))
    start = 0
    for at in places:
        out[..., start : start + at.stop - at.start] = vector[..., at]
        start += at.stop - at.start
    peaks = lookup(vector, "peaks")
    if peaks is not None and [at.start for at in places] == [0]:  # only the last block is another one
        whole = start // BLOCK
        last = out[:, whole * BLOCK :]
        attach(out, "peaks", torch.cat([peaks[:, :whole], *([last.abs().amax(1, True)] if last.shape[1] else [])], 1))
    return out


def joined_parts(shared: Tensor, own: Tensor, places: tuple[tuple[slice, ...], tuple[slice, ...]]) -> Tensor:
    """The whole vector `[..., n]` of a shared part and an own part."""
    out = empty(own, (*own.shape[:-1], shared.shape[-1] + own.shape[-1]))
    for part, slices in zip((shared, own), places, strict=True):
        start = 0
        for at in slices:
            length = at.stop - at.start
            out[..., at] = part[..., start : start + length]
            start += length
    return out


@lru_cache(64)
def split_of(whole: Layout, shared: Layout) -> OwnSplit:
    """The split of a model into the part with the names of `shared` and the rest."""
    names = {e.name for e in shared.entries}

    def places(segment: str) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        found: tuple[list[slice], list[slice]] = ([], [])
        start = 0
        for e in whole.segment(segment):
            mine = found[e.name not in names]
            before = mine.pop().start if mine and mine[-1].stop == start else start
            mine.append(slice(before, start + e.size))
            start += e.size
        return tuple(found[0]), tuple(found[1])

    counters = frozenset(e.name for e in whole.counters if e.name not in names)
    return OwnSplit(places("params"), places("buffers"), counters)
