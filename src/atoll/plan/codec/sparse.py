"""Sparsification: send the largest coordinates of each client, or the same random coordinates of all clients.

Tests: tests/identities/test_codecs.py, tests/rates/test_codec_theory.py
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from atoll.base.errors import UsageError
from atoll.base.random import Key
from atoll.compute.layout import Layout
from atoll.plan.codec import grid
from atoll.plan.codec.pack import index_flaws, index_length, pack_index, unpack_index
from atoll.plan.codec.stage import Codec, Encoded, flat_layout
from atoll.plan.form import Field, Form, reject
from atoll.plan.protocols import Declared, Tensors


def magnitude(x: Tensor) -> Tensor:
    """|x| as integers in the same order, NaN the largest: the bits of the float without its sign."""
    if x.dtype == torch.float64:
        return x.view(torch.int64) & (2**63 - 1)
    return x.view(torch.int32) & (2**31 - 1)


def largest(x: Tensor, k: int, size: Callable[[Tensor], Tensor]) -> Tensor:
    """The positions of the k largest numbers of each lane: exactly k, and of equal numbers the first ones.

    A sample gives a threshold that slightly more than k numbers reach, and only these are compared. If fewer than k
    reach it, the whole lane is compared. The sample never changes the result.

    Args:
        x: the lanes, `[K, d]`.
        k: the number of positions, 1 ≤ k ≤ d.
        size: maps a slice of x to the integers that are compared.
    Returns:
        int64 `[K, k]`, each row increasing.
    """
    lanes, d = x.shape
    if x.device.type != "cpu" or d < grid.LEAST:
        return _keep(size(x), k)
    return torch.stack([_by_sample(row, k, size) for row in x]) if lanes else x.new_empty(0, k, dtype=torch.int64)


def _keep(sizes: Tensor, k: int) -> Tensor:
    """Positions of the k largest of each row, int64 `[K, k]`, increasing: all above the k-th, the first equal to it."""
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
            "a client sends at least one coordinate, and at most all of them.",
            f"{part}(0.01)",
        )


@dataclass(frozen=True, repr=False)
class TopK(Codec):
    """Sends the largest numbers of each client, and their positions.

    x̂ⱼ = xⱼ for the k largest |xⱼ|, else 0;   k = max(1, round(fraction · d)), exactly; of equal numbers the first ones

    |x̂ − x|² is the energy of the other coordinates, at most (1 − k/d)|x|². So TopK is a biased contraction; use it as
    `ErrorFeedback(TopK(0.01))` or `EF21(TopK(0.01))`.

    Message: the k positions, increasing, in at most log₂(d/k) + 2 bits each; then the k numbers. A following stage may
    compress the numbers: `TopK(0.01) >> Quantize(8)`.

    Args:
        fraction: the fraction of the coordinates that a client sends, in (0, 1].
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

    fraction: float = field(metadata={"example": 0.1})

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
            f"the positions are not {k} different numbers below {d}",
            "increasing positions inside the vector",
        )


@dataclass(frozen=True, repr=False)
class RandomK(Codec):
    """Sends the same random coordinates of every client, new ones each round; the server adds them without decoding.

    yⱼ = (d/k) x_{i(j)},   i(1) … i(k) different, drawn from the round's key,   k = max(1, round(fraction · d))

    The coordinates form a circle that is cut, from a random position, into k segments whose lengths differ by at most
    one. One coordinate of each segment is drawn. So each coordinate has the probability k/d, and the work of drawing
    is proportional to k: E x̂ = x and E|x̂ − x|² = (d/k − 1)|x|². All clients keep the same coordinates. So the mean of
    the clients has the same relative error, and it does not fall with the number of clients. Only the numbers are sent.

    Args:
        fraction: the fraction of the coordinates that a client sends, in (0, 1].
        unbiased: whether to scale by d/k. Error feedback needs a contraction instead:
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

    fraction: float = field(metadata={"example": 0.1})
    unbiased: bool = True

    def __post_init__(self) -> None:
        _check_fraction("RandomK", self.fraction)

    def contraction(self) -> Codec:
        return replace(self, unbiased=False)

    def output_layout(self, layout: Layout) -> Layout:
        return flat_layout(_count(self.fraction, layout.d), layout.dtype)

    def form(self, layout: Layout) -> Form:
        return Form({}, Field(layout.dtype, _count(self.fraction, layout.d)))

    def gain(self, layout: Layout) -> float:
        return layout.d / _count(self.fraction, layout.d) if self.unbiased else 1.0

    def declare(self, layout: Layout) -> Mapping[str, Declared]:
        return self.bounded(layout)

    def encode(self, x: Tensor, memory: Tensors, shared: Tensors, key: Key) -> Encoded:
        kept = x.index_select(-1, self.support(key, x.shape[-1], x.device))
        # A number that is not finite must be noticed, even if its coordinate is not among the sent ones.
        worst = torch.maximum(*(one.abs() for one in torch.aminmax(x, dim=-1, keepdim=True)))
        kept = torch.where(worst.isfinite(), kept, worst)
        return (kept * (x.shape[-1] / kept.shape[-1]) if self.unbiased else kept), {}, {}, memory

    def decode_sum(self, x: Tensor, key: Key) -> Tensor:
        out = x.new_zeros(*x.shape[:-1], self.layout.d)
        return out.index_copy_(-1, self.support(key, self.layout.d, x.device), x)

    def support(self, key: Key, d: int, device: torch.device) -> Tensor:
        """The coordinates that are sent, int64 `[k]`, increasing except for one step back at the end of the circle."""
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
