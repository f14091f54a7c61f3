"""Eden: a random rotation, the best quantiser for normal numbers, and one scale per block that removes the bias.

Tests: tests/rates/test_codec_theory.py, tests/identities/test_codecs.py
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from atoll.base.errors import UsageError
from atoll.base.random import Key
from atoll.compute.layout import Layout
from atoll.plan.codec import grid
from atoll.plan.codec.lloyd import lloyd_max
from atoll.plan.codec.pack import pack_bits, packed_length, unpack_bits
from atoll.plan.codec.quantize import refuse_codes
from atoll.plan.codec.rotate import BLOCK, TILE, Geometry, Rotation, check_block
from atoll.plan.codec.stage import Codec, Encoded
from atoll.plan.form import Field, Form, reject
from atoll.plan.protocols import Tensors

CELLS = 4096  # cells of the table of magnitudes: a threshold is off by at most half a cell, and the error by 1e-7


def _positive(x: Tensor) -> Tensor:
    """x with 1 in place of 0, as a divisor: wherever x is 0, the dividend is 0 too."""
    return torch.where(x == 0, torch.ones_like(x), x)


@lru_cache(maxsize=16)
def _tables(bits: int, dtype: torch.dtype, device: torch.device) -> tuple[float, Tensor, Tensor, Tensor]:
    """(cells per unit, code by cell int32, centroid by cell, signed centroid by code)."""
    best = lloyd_max(bits)
    scale = CELLS / (best.thresholds[-1] + 0.1) if best.thresholds else 1.0
    middle = (torch.arange(CELLS, dtype=torch.float64) + 0.5) / scale
    code = torch.bucketize(middle, torch.tensor(best.thresholds, dtype=torch.float64), out_int32=True)
    positive = torch.tensor(best.centroids, dtype=dtype)
    by_cell, signed = positive[code.long()], torch.cat((positive, -positive))
    return scale, code.to(device), by_cell.to(device), signed.to(device)


class Buckets:
    """The coordinates of a rotated group that share a scale: each column is one bucket, and the window is another.

    The columns of a group differ in energy, and the window is a mixture of several columns.
    """

    def __init__(self, at: Geometry) -> None:
        self.at = at
        self.count = at.columns + at.ragged
        self._sizes: Tensor | None = None

    def sizes(self, like: Tensor) -> Tensor:
        """The number of coordinates that share each scale, `[count]`."""
        if self._sizes is None:
            at = self.at
            column = torch.arange(at.columns, device=like.device)
            end = at.window if at.ragged else at.body
            per_block = torch.div(end - column + at.columns - 1, at.columns, rounding_mode="floor")
            self._sizes = torch.cat((per_block, torch.full_like(per_block[:1], at.m)))[: self.count].to(like.dtype)
        return self._sizes

    def sums(self, x: Tensor) -> Tensor:
        """The sum over each bucket, `[rows, n]` to `[rows, count]`."""
        at = self.at
        if at.ragged:
            window = grid.ordered_sum(x[:, at.window :])
            x = x.clone()
            x[:, at.window :] = 0
        columns = grid.ordered_sum(x[:, : at.body], at.columns)
        return torch.cat((columns, window), -1) if at.ragged else columns

    def spread_(self, x: Tensor, values: Tensor, run: Callable[..., Tensor]) -> Tensor:
        """Replace x `[..., n]` by `run(x, value)`. Each coordinate takes the value of its bucket, `[..., count]`."""
        at = self.at
        # The short row of values is repeated, so that one pass runs over long rows.
        copies = min(at.m, 1 << max(0, (1024 // at.columns).bit_length() - 1))
        row = values[..., None, : at.columns].expand(*values.shape[:-1], copies, -1).flatten(-2)[..., None, :]
        # The window is first, since it overlaps the ends of columns, which the next pass overwrites.
        window = run(x[..., at.window :], values[..., at.columns :]) if at.ragged else None
        body = x[..., : at.body].unflatten(-1, (-1, copies * at.columns))
        run(body, row, out=body)
        if window is not None:
            x[..., at.window :] = window
        return x


@dataclass(frozen=True, repr=False)
class Eden(Codec):
    """Quantises each coordinate to a few bits, without bias and with the smallest error known for unbiased codecs.

    y = R x,   zⱼ = centroid(yⱼ),   x̂ = Rᵀ S z,   S = Σ y² / Σ y·z  over each block,   E x̂ = x

    Each client has its own rotation R. So the errors of clients are independent, and the error of their mean falls as
    1/n. The coordinates of a rotated vector are nearly normal, and for normal numbers the centroids of Lloyd and Max
    have the smallest error. S removes the bias. Eden with one bit is DRIVE. For less than one bit per coordinate write
    `RandomK(0.25) >> Eden(1)`.

    The rotation is a randomised Hadamard transform. It makes coordinates normal if many of them have a similar size.
    A vector with only a few nonzero coordinates in a block of 4,096 keeps some bias; `Quantize` has no bias for any
    vector.

    Error: E|x̂ − x|²/|x|² = D/(1 − D), D the quantiser's error: .571 .133 .0358 .00959 .00251 .000645 for 1 to 6 bits.

    Message: the seed of the rotation, 8 bytes; the scale of each block in the run's dtype; then the codes, with the
    sign in the highest bit.

    Args:
        bits: the number of bits for each coordinate, 1 to 8. Each block adds one number of the run's dtype.
        block: the number of coordinates that are rotated together, a power of two from 2 to 65,536; None: all.
    Raises:
        UsageError: bits or block are out of range.
    Example:
        >>> from atoll.plan.codec.stage import flat_layout
        >>> x, codec = Key(7).normal(10_000, torch.float32)[None], Eden(4).bind(flat_layout(10_000))
        >>> payload, side, *_ = codec.encode(x, {}, {}, Key(7))
        >>> error = codec.decode(payload, side) - x
        >>> payload.numel(), round(float(error.square().sum() / x.square().sum()), 3)
        (5000, 0.01)

    Reference: Vargaftik et al., DRIVE, 2021, and EDEN, 2022.
    """

    per_message = True
    packs = True

    bits: int = field(metadata={"example": 4})
    block: int | None = BLOCK

    def __post_init__(self) -> None:
        if type(self.bits) is not int or not 1 <= self.bits <= 8:
            raise UsageError(
                f"Eden({self.bits!r}).",
                "1 to 8 bits, a whole number.",
                "below one bit, coordinates must be dropped first; above eight bits, half precision is as small.",
                "RandomK(0.25) >> Eden(1)",
            )
        check_block(f"Eden({self.bits}, ", self.block)

    def _buckets(self, n: int) -> Buckets:
        # A rotation of the whole vector needs blocks only for its scales; their energies differ only by chance.
        return Buckets(Geometry(n, self.block or BLOCK))

    def _length(self, n: int) -> int:
        return packed_length(n, self.bits)

    def _count(self, n: int) -> int:
        return self._buckets(n).count

    def form(self, layout: Layout) -> Form:
        scales, size = (grid.length_of(layout.d, length) for length in (self._count, self._length))
        return Form({"seed": Field(torch.int64, 1), "scale": Field(layout.dtype, scales)}, Field(torch.uint8, size))

    def encode(self, x: Tensor, memory: Tensors, shared: Tensors, key: Key) -> Encoded:
        d, form = self.layout.d, self.form(self.layout)
        payload = x.new_empty(len(x), form.payload.length, dtype=torch.uint8)
        scale = x.new_empty(len(x), form.side["scale"].length)
        seed = key.state().to(x.device).expand(len(x))
        rotation = Rotation(seed, d, self.block, x)
        if not self.block:
            x = rotation.forward(x[:, None], slice(None), 0)[:, 0]
        buckets = [self._buckets(n) for _, n in grid.group_lengths(d)]
        cuts = (grid.parts(x), grid.split(payload, d, self._length), grid.split(scale, d, self._count))
        for i, lanes, rows, codes, scales in grid.batches(*cuts, groups=TILE):
            rotated = rotation.forward(rows, lanes, i) if self.block else rows
            for _, _, y, code, found in grid.batches([rotated], [codes], [scales]):
                self._quantise(y, buckets[i], code, found)
        return payload, {"seed": seed[:, None], "scale": scale}, {}, memory

    def _quantise(self, rotated: Tensor, at: Buckets, codes: Tensor, scales: Tensor) -> None:
        """Write packed codes and scales of rows `[k, g, n]` whose numbers are normal up to a scale."""
        y = rotated.flatten(0, 1)
        words = y.view(torch.int64 if y.dtype == torch.float64 else torch.int32)
        code = (words >> 8 * y.element_size() - 1).to(torch.int32).bitwise_and_(1 << (self.bits - 1))
        cells, code_of, centroid_of, _ = _tables(self.bits, y.dtype, y.device)
        both = y.new_empty(2, *y.shape)
        z, product = both
        torch.abs(y, out=z)
        # σ is estimated from the mean of |y|. Unlike Σ y², this mean does not overflow or underflow before y does.
        unit = at.sums(z) / at.sizes(y) * ((torch.pi / 2) ** 0.5 / cells)
        unit = _positive(unit)
        at.spread_(z, unit, torch.div)
        if self.bits == 1:
            torch.mul(z, lloyd_max(1).centroids[0], out=product)
        else:
            cell = z.to(torch.int32).clamp_(0, CELLS - 1).flatten()
            code.bitwise_or_(code_of.index_select(0, cell).view_as(code))
            torch.index_select(centroid_of, 0, cell, out=product.view(-1))
            product.mul_(z)
        z.mul_(z)
        square, dot = at.sums(both.flatten(0, 1)).chunk(2)
        codes.copy_(pack_bits(code, self.bits).view_as(codes))
        scales.copy_((unit * (square / _positive(dot))).view_as(scales))

    def decode(self, x: Tensor, side: Tensors) -> Tensor:
        scale, d = side["scale"], self.layout.d
        centroid = _tables(self.bits, scale.dtype, scale.device)[3]
        rotation = Rotation(side["seed"][:, 0], d, self.block, scale)
        out = scale.new_empty(len(x), d)
        buckets = [self._buckets(n) for _, n in grid.group_lengths(d)]
        cuts = (grid.parts(out), grid.split(x, d, self._length), grid.split(scale, d, self._count))
        for i, lanes, target, codes, scales in grid.batches(*cuts, groups=TILE):
            into = rotation.rotated_rows(target, i) if self.block else torch.empty_like(target)
            for _, _, y, code, size in grid.batches([into], [codes], [scales]):
                index = unpack_bits(code, y.shape[-1], self.bits)
                if self.bits == 1:
                    y.copy_(index.mul_(-2).add_(1)).mul_(centroid[0])
                else:
                    torch.index_select(centroid, 0, index.flatten(), out=y.view(-1))
                buckets[i].spread_(y, size, torch.mul)
            if self.block:
                rotation.inverse(into, target, lanes, i)
            else:
                target.copy_(into)
        if not self.block:
            into = rotation.rotated_rows(out[:, None], 0)
            into.copy_(out[:, None])
            rotation.inverse(into, out[:, None], slice(None), 0)
        return out

    def validate(self, payload: Tensor | None, side: Tensors) -> None:
        reject((side["scale"] < 0).any(-1), "a scale is negative", "scales ≥ 0")
        if payload is not None:
            refuse_codes(payload, self.layout.d, self.bits, (1 << self.bits) - 1)
