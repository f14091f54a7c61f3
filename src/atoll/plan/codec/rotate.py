"""The randomised Hadamard rotation: the coordinates of a rotated vector are nearly normal numbers of one scale.

Tests: tests/identities/test_codecs.py, tests/identities/test_codec_algebra.py
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from atoll.base.errors import UsageError
from atoll.base.random import Key
from atoll.compute.layout import Layout
from atoll.plan.codec import grid
from atoll.plan.codec.stage import Codec, Encoded
from atoll.plan.protocols import Declared, Tensors

BLOCK = 4096
TILE = 2  # groups per transform: each step adds one half of the numbers to the other half


class Hadamard:
    """The Hadamard transform of order m along the middle axis of `[rows, m, columns]`, in a buffer that is reused.

    H₁ = 1,  H₂ₘ = (Hₘ Hₘ ; Hₘ −Hₘ), not normalised. It uses additions only, so every machine computes the same bits.
    """

    def __init__(self, rows: int, m: int, columns: int, like: Tensor) -> None:
        self.values = like.new_empty(rows, m, columns)
        halves = [1 << i for i in reversed(range(m.bit_length() - 1))]
        self._pairs = [self.values.view(-1, 2, half * columns).unbind(1) for half in halves]

    def run(self) -> Tensor:
        """Transform `values` in place."""
        for a, b in self._pairs:
            a.add_(b)
            torch.sub(a, b, alpha=2, out=b)  # (a + b) − 2b
        return self.values


class Geometry:
    """The blocks in which a group of n coordinates is rotated, of order m = min(block, the largest power of two ≤ n).

    The first m·⌊n/m⌋ coordinates, read as `[m, columns]`, are rotated column by column. If m does not divide n, the
    last m coordinates (the window) are then rotated together. So every coordinate is mixed with m others, nothing is
    padded, and the whole transform is orthogonal.
    """

    def __init__(self, n: int, block: int | None) -> None:
        self.n = n
        self.m = 1 << (min(n, block or n).bit_length() - 1)
        self.columns = n // self.m
        self.body = self.m * self.columns
        self.ragged = self.body < n
        self.window = n - self.m


class Rotation:
    """The rotation of some lanes, group by group.

    R = (window ∘ columns), each of them H·diag(±1)/√m

    Args:
        state: the state of the random stream of signs, int64: `[K]` if each lane has its own rotation, `[]` if all
            lanes share one.
        d: the length of the vectors.
        block: the order of the blocks, a power of two; None: the largest that the whole vector allows.
        like: a tensor with the dtype and the device of the computation.
    """

    def __init__(self, state: Tensor, d: int, block: int | None, like: Tensor) -> None:
        self._shared = state.dim() == 0
        state = state.to(like.device)
        lengths = [d] if block is None else [n for _, n in grid.group_lengths(d)]
        self.geometry = [Geometry(n, block) for n in lengths]
        self._whole = block is None
        # All groups use the same drawn signs; the window has signs of its own.
        first, second = grid.words(state.reshape(-1), 2).unbind(-1)
        signs = grid.signs(first, max(at.body for at in self.geometry))
        self._signs = [_scaled(signs[:, None, : at.body], at.m, like.dtype) for at in self.geometry]
        last = self.geometry[-1]
        self._window = _scaled(grid.signs(second, last.m if last.ragged else 1)[:, None], last.m, like.dtype)
        self._like = like
        self._buffers: dict[tuple[int, int, int], Hadamard] = {}

    def parts(self, x: Tensor) -> list[Tensor]:
        """Lanes `[K, d]` as views `[K, groups, n]`, one per geometry."""
        return [x[:, None]] if self._whole else grid.parts(x)

    def forward(self, rows: Tensor, lanes: slice, part: int) -> Tensor:
        """The rotated rows `[k, g, n]` of one part. The next call with the same shape overwrites them."""
        at = self.geometry[part]
        work = self._buffer(rows, at.m, at.columns)
        signs = self._of(self._signs[part], lanes)
        torch.mul(rows[..., : at.body], signs, out=work.values.view(*rows.shape[:-1], at.body))
        rotated = work.run().view(*rows.shape[:-1], at.body)
        if not at.ragged:
            return rotated
        whole = torch.cat((rotated, rows[..., at.body :]), -1)
        work = self._buffer(rows, at.m, 1)
        torch.mul(whole[..., at.window :], self._of(self._window, lanes), out=work.values.view(*rows.shape[:-1], at.m))
        whole[..., at.window :] = work.run().view(*rows.shape[:-1], at.m)
        return whole

    def rotated_rows(self, out: Tensor, part: int) -> Tensor:
        """A buffer for the rotated rows `[k, g, n]` that `inverse` reads."""
        at = self.geometry[part]
        return torch.empty_like(out) if at.ragged else self._buffer(out, at.m, at.columns).values.view(out.shape)

    def inverse(self, rows: Tensor, out: Tensor, lanes: slice, part: int) -> None:
        """Write to `out`, `[k, g, n]`, the inverse rotation of the rows in the buffer `rotated_rows(out, part)`."""
        at, lead = self.geometry[part], out.shape[:-1]
        body = self._buffer(out, at.m, at.columns)
        if at.ragged:
            tail = self._buffer(out, at.m, 1)
            tail.values.view(*lead, at.m).copy_(rows[..., at.window :])
            rows[..., at.window :] = tail.run().view(*lead, at.m) * self._of(self._window, lanes)
            out[..., at.body :] = rows[..., at.body :]
            body.values.view(*lead, at.body).copy_(rows[..., : at.body])
        unrotated = body.run().view(*lead, at.body)
        torch.mul(unrotated, self._of(self._signs[part], lanes), out=out[..., : at.body])

    def _of(self, signs: Tensor, lanes: slice) -> Tensor:
        return signs if self._shared else signs[lanes]

    def _buffer(self, rows: Tensor, m: int, columns: int) -> Hadamard:
        shape = (rows[..., 0].numel(), m, columns)
        if shape not in self._buffers:
            self._buffers[shape] = Hadamard(*shape, self._like)
        return self._buffers[shape]


def _scaled(signs: Tensor, m: int, dtype: torch.dtype) -> Tensor:
    scaled: Tensor = signs.to(dtype) * m**-0.5
    return scaled


def check_block(call: str, block: Any) -> None:
    """Refuse a block that is neither None nor a power of two from 2 to 65,536. `call` begins the text of the call."""
    if block is not None and not (type(block) is int and 2 <= block <= grid.GROUP and block.bit_count() == 1):
        raise UsageError(
            f"{call}block={block!r}).",
            f"a power of two from 2 to {grid.GROUP}, or None for the whole vector.",
            "a Hadamard matrix of order 2m is built from one of order m, and a block must fit the cache.",
            f"{call}block={BLOCK})",
        )


@dataclass(frozen=True, repr=False)
class Rotate(Codec):
    """Rotates the update by a random rotation that all clients of a round share; the server inverts it on their sum.

    y = R x,   R orthogonal and keyed by the round;   Σᵢ xᵢ = Rᵀ Σᵢ yᵢ

    The coordinates of a rotated vector have one scale, so a following quantiser uses all its levels. The length of the
    vector does not change. Do not combine `Rotate` with `Eden`, which has its own rotation for each client.

    Args:
        block: the number of coordinates that are mixed, a power of two from 2 to 65,536; None mixes the whole vector,
            which does not fit the cache and is many times slower.
    Raises:
        UsageError: the block is out of range or not a power of two.
    Example:
        >>> y, *_ = Rotate().encode(torch.tensor([[4.0, 0.0, 0.0, 0.0]]), {}, {}, Key(7))
        >>> y.abs(), Rotate().decode_sum(y, Key(7)).abs()
        (tensor([[2., 2., 2., 2.]]), tensor([[4., 0., 0., 0.]]))

    Reference: Ailon and Chazelle, The Fast Johnson–Lindenstrauss Transform, 2009; Suresh et al., Distributed Mean
        Estimation with Limited Communication, 2017.
    """

    per_sum = True

    block: int | None = BLOCK

    def __post_init__(self) -> None:
        check_block("Rotate(", self.block)

    def gain(self, layout: Layout) -> float:
        return 1.0

    def declare(self, layout: Layout) -> Mapping[str, Declared]:
        return self.bounded(layout)

    def encode(self, x: Tensor, memory: Tensors, shared: Tensors, key: Key) -> Encoded:
        rotation = Rotation(key.shared().state(), x.shape[-1], self.block, x)
        out = torch.empty_like(x)
        for i, lanes, rows, target in grid.batches(rotation.parts(x), rotation.parts(out), groups=TILE):
            target.copy_(rotation.forward(rows, lanes, i))
        return out, {}, {}, memory

    def decode_sum(self, x: Tensor, key: Key) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        rotation = Rotation(key.shared().state(), x.shape[-1], self.block, rows)
        out = torch.empty_like(rows)
        for i, lanes, rotated, target in grid.batches(rotation.parts(rows), rotation.parts(out), groups=TILE):
            into = rotation.rotated_rows(target, i)
            into.copy_(rotated)
            rotation.inverse(into, target, lanes, i)
        return out.view_as(x)
