"""Only some of the numbers: the largest of each client, or the same random ones of all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from atoll.base.errors import UsageError
from atoll.base.random import Key
from atoll.compute.layout import Layout
from atoll.plan.codec import grid
from atoll.plan.codec.pack import index_flaws, index_length, pack_index, unpack_index
from atoll.plan.codec.stage import Codec, Encoded, flat_layout
from atoll.plan.codec.wire import Field, Form, reject
from atoll.plan.protocols import Tensors


def magnitude(x: Tensor) -> Tensor:
    """|x| as whole numbers in the same order, NaN above all: the bits without the sign."""
    if x.dtype == torch.float64:
        return x.view(torch.int64) & (2**63 - 1)
    return x.view(torch.int32) & (2**31 - 1)


def largest(x: Tensor, k: int, size: Callable[[Tensor], Tensor]) -> Tensor:
    """Where the k largest of each lane are: exactly k, the earliest among equals.

    A sample says which threshold a few more than k numbers will pass; only those are looked at again. Where the sample
    misleads, the lane is sorted out as a whole: it never changes the answer.

    Args:
        x: `[K, d]`.
        k: how many, 1 ≤ k ≤ d.
        size: whole numbers to compare, of any slice of x.
    Returns:
        int64 `[K, k]`, each row rising.
    """
    lanes, d = x.shape
    if x.device.type != "cpu" or d < grid.LEAST:
        return _keep(size(x), k)
    return torch.stack([_by_sample(row, k, size) for row in x]) if lanes else x.new_empty(0, k, dtype=torch.int64)


def _keep(sizes: Tensor, k: int) -> Tensor:
    """Where the k largest of each row are, int64 `[K, k]`, rising: all above the k-th, and the first that equal it."""
    last = sizes.kthvalue(sizes.shape[-1] - k + 1, dim=-1, keepdim=True).values
    above, equal = sizes > last, sizes == last
    room = k - above.sum(-1, keepdim=True)
    kept = above | (equal & (equal.cumsum(-1) <= room))
    return torch.nonzero_static(kept, size=len(sizes) * k)[:, 1].view(len(sizes), k)


def _by_sample(row: Tensor, k: int, size: Callable[[Tensor], Tensor]) -> Tensor:
    d = len(row)
    sample = size(row[:: max(16, d // grid.GROUP)].contiguous())
    expected = len(sample) * k / d
    rank = min(len(sample), int(expected + 4 * expected**0.5 + 8))
    threshold = sample.kthvalue(len(sample) - rank + 1).values
    found = [
        (size(chunk) >= threshold).nonzero()[:, 0] + start
        for start, chunk in zip(range(0, d, grid.GROUP), row.split(grid.GROUP), strict=True)
    ]
    index = torch.cat(found)
    if len(index) < k:
        return _keep(size(row)[None], k)[0]
    return index[_keep(size(row[index])[None], k)[0]]


def _count(fraction: float, d: int) -> int:
    return max(1, round(fraction * d))


def _check_fraction(part: str, fraction: Any) -> None:
    if not (type(fraction) in (int, float) and 0 < fraction <= 1):
        raise UsageError(
            f"{part}({fraction!r}).",
            "a fraction of the coordinates, 0 < fraction ≤ 1.",
            "something has to be sent, and not more than there is.",
            f"{part}(0.01)",
        )


@dataclass(frozen=True, repr=False)
class TopK(Codec):
    """Keeps the largest numbers of each client and where they stand.

    x̂ⱼ = xⱼ for the k largest |xⱼ|, else 0;   k = max(1, round(fraction · d)), exactly; the earliest among equals

    |x̂ − x|² is the energy of the tail, at most (1 − k/d)|x|²: a contraction with a bias, to be written
    `ErrorFeedback(TopK(0.01))` or `EF21(TopK(0.01))`.

    Message: the k places, rising, in at most log₂(d/k) + 2 bits each; then the k numbers, which a next stage may pack:
    `TopK(0.01) >> Quantize(8)`.

    Args:
        fraction: of the coordinates, in (0, 1].
    Raises:
        UsageError: the fraction is out of range.
    Example:
        >>> codec = TopK(0.5).bind(flat_layout(4))
        >>> payload, side, *_ = codec.encode(torch.tensor([[0.1, -3.0, 2.0, 0.0]]), {}, {}, Key(0))
        >>> payload, codec.decode(payload, side)
        (tensor([[-3.,  2.]]), tensor([[ 0., -3.,  2.,  0.]]))

    Reference: Stich, Cordonnier and Jaggi, Sparsified SGD with Memory, 2018.
    """

    per_message = True

    fraction: float

    def __post_init__(self) -> None:
        _check_fraction("TopK", self.fraction)

    def output_layout(self, layout: Layout) -> Layout:
        return flat_layout(_count(self.fraction, layout.d), layout.dtype)

    def form(self, layout: Layout) -> Form:
        k = _count(self.fraction, layout.d)
        return Form({"index": Field(torch.uint8, index_length(k, layout.d))}, Field(layout.dtype, k))

    def encode(self, x: Tensor, memory: Tensors, shared: Tensors, key: Key) -> Encoded:
        index = largest(x, _count(self.fraction, x.shape[-1]), magnitude)
        return x.gather(-1, index), {"index": pack_index(index, x.shape[-1])}, {}, memory

    def decode(self, x: Tensor, side: Tensors) -> Tensor:
        index = unpack_index(side["index"], x.shape[-1], self.layout.d)
        return x.new_zeros(len(x), self.layout.d).scatter_(-1, index, x)

    def validate(self, payload: Tensor | None, side: Tensors) -> None:
        k, d = _count(self.fraction, self.layout.d), self.layout.d
        reject(
            index_flaws(side["index"], k, d),
            f"the places are not {k} different ones below {d}",
            "rising places inside the vector",
        )


@dataclass(frozen=True, repr=False)
class RandomK(Codec):
    """Keeps the same random coordinates of all clients, others every round; the numbers add up without being opened.

    yⱼ = (d/k) x_{i(j)},   i(1) … i(k) different ones drawn from the round's key, k = max(1, round(fraction · d))

    The coordinates are cut, as a circle from a random place on, into k stretches of one length, give or take one; of
    each one coordinate is drawn. So all have the same chance, k/d, and to draw takes work in proportion to k:
    E x̂ = x and E|x̂ − x|² = (d/k − 1)|x|². All clients keep the same coordinates, so their mean has that error too, of
    the mean update: it does not fall with the number of clients. Nothing but the numbers is sent.

    Args:
        fraction: of the coordinates, in (0, 1].
        unbiased: whether to scale by d/k. Error feedback needs a contraction:
            `ErrorFeedback(RandomK(0.1, unbiased=False))`.
    Raises:
        UsageError: the fraction is out of range.
    Example:
        >>> codec = RandomK(0.5).bind(flat_layout(4))
        >>> payload, *_ = codec.encode(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), {}, {}, Key(1))
        >>> payload, codec.decode_sum(payload, Key(1))
        (tensor([[8., 6.]]), tensor([[0., 0., 6., 8.]]))

    Reference: Konečný and Richtárik, Randomized Distributed Mean Estimation, 2018.
    """

    per_sum = True

    fraction: float
    unbiased: bool = True

    def __post_init__(self) -> None:
        _check_fraction("RandomK", self.fraction)

    def contraction(self) -> Codec:
        return replace(self, unbiased=False)

    def output_layout(self, layout: Layout) -> Layout:
        return flat_layout(_count(self.fraction, layout.d), layout.dtype)

    def form(self, layout: Layout) -> Form:
        return Form({}, Field(layout.dtype, _count(self.fraction, layout.d)))

    def encode(self, x: Tensor, memory: Tensors, shared: Tensors, key: Key) -> Encoded:
        kept = x.index_select(-1, self.support(key, x.shape[-1], x.device))
        # A number that is not finite must not pass unseen because it is not among those that are kept.
        worst = torch.maximum(*(one.abs() for one in torch.aminmax(x, dim=-1, keepdim=True)))
        kept = torch.where(worst.isfinite(), kept, worst)
        return (kept * (x.shape[-1] / kept.shape[-1]) if self.unbiased else kept), {}, {}, memory

    def decode_sum(self, x: Tensor, key: Key) -> Tensor:
        out = x.new_zeros(*x.shape[:-1], self.layout.d)
        return out.index_copy_(-1, self.support(key, self.layout.d, x.device), x)

    def support(self, key: Key, d: int, device: torch.device) -> Tensor:
        """The coordinates that are kept, int64 `[k]`, rising but for one step back where the circle closes."""
        state, k = key.shared().state().to(device), _count(self.fraction, d)
        place, *streams = grid.words(state, 1 + -(-k // grid.GROUP)).unbind()
        out = torch.empty(k, dtype=torch.int64, device=device)
        for chunk, stream, start in zip(out.split(grid.GROUP), streams, range(0, k, grid.GROUP), strict=True):
            n = len(chunk)
            edges = torch.div(torch.arange(start, start + n + 1, device=device) * d, k, rounding_mode="floor")
            fair = (grid.words(stream, n) >> 11).to(torch.float64).mul_(2.0**-53).add_(0.5)  # in [0, 1)
            torch.add(edges[:-1], fair.mul_(edges.diff()).long(), out=chunk)
        out += place.remainder(d)
        return torch.where(out < d, out, out - d)
