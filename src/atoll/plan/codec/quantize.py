"""Quantisation in the update's own coordinates: casts, stochastic levels, signs.

Tests: tests/identities/test_codecs.py, tests/rates/test_codec_theory.py
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from atoll.base.errors import UsageError
from atoll.base.random import Key
from atoll.compute.layout import Layout
from atoll.plan.codec import grid
from atoll.plan.codec.pack import TERNARY, pack_bits, packed_length, unpack_bits
from atoll.plan.codec.stage import Codec, Encoded
from atoll.plan.form import Field, Form, reject
from atoll.plan.protocols import Tensors

_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.float8_e4m3fn}
_TOP = {"fp16": 15, "fp8": 8}  # the largest number is scaled to this exponent


@dataclass(frozen=True, repr=False)
class Cast(Codec):
    """Rounds each number to the nearest number of a smaller float type.

    x̂ = s · round(x/s),   s = 1 for bf16, else a power of two: max|x|/s is in [2¹⁴, 2¹⁵) for fp16, in [2⁷, 2⁸) for fp8

    The relative error of a number is at most 2⁻⁹ (bf16), 2⁻¹² (fp16, for numbers down to 4e-9 of the largest) or 2⁻⁴
    (fp8 e4m3, for numbers down to 1e-4 of the largest).

    Message: for fp16 and fp8 the scale s in the run's dtype; then the numbers.

    Args:
        to: the type of the numbers in the message: `"bf16"`, `"fp16"` or `"fp8"`.
    Raises:
        UsageError: `to` is another type.
    Example:
        >>> from atoll.plan.codec.stage import flat_layout
        >>> codec = Cast("bf16").bind(flat_layout(1))
        >>> payload, side, *_ = codec.encode(torch.tensor([[1.003]]), {}, {}, Key(0))
        >>> codec.decode(payload, side)
        tensor([[1.]])
    """

    per_message = True
    packs = True

    to: Literal["bf16", "fp16", "fp8"] = field(metadata={"example": "bf16"})

    def __post_init__(self) -> None:
        if self.to not in _TYPES:
            raise UsageError(f"Cast({self.to!r}).", "one of 'bf16', 'fp16', 'fp8'.", write="Cast('bf16')")

    def form(self, layout: Layout) -> Form:
        side = {"scale": Field(layout.dtype, 1)} if self.to in _TOP else {}
        return Form(side, Field(_TYPES[self.to], layout.d))

    def encode(self, x: Tensor, memory: Tensors, shared: Tensors, key: Key) -> Encoded:
        if self.to not in _TOP:
            return x.to(_TYPES[self.to]), {}, {}, memory
        largest = x.abs().amax(-1, keepdim=True)
        exponent = torch.frexp(largest).exponent
        scale = torch.where(
            largest.isfinite(), torch.ldexp(torch.ones_like(largest), exponent - _TOP[self.to]), largest
        )
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        return (x / scale).to(_TYPES[self.to]), {"scale": scale}, {}, memory

    def decode(self, x: Tensor, side: Tensors) -> Tensor:
        return x.to(self.layout.dtype) * side["scale"] if self.to in _TOP else x.to(self.layout.dtype)

    def validate(self, payload: Tensor | None, side: Tensors) -> None:
        if "scale" in side:
            reject((side["scale"] <= 0).any(-1), "the scale is not positive", "a scale > 0")


@dataclass(frozen=True, repr=False)
class Quantize(Codec):
    """Rounds each number at random to one of 2s + 1 levels, without bias for any vector.

    q = ⌊x/Δ + u⌋,  u uniform in [0, 1),   x̂ = Δ q,   Δ = M/s,   M the norm of the bucket

    E x̂ = x up to 2⁻¹⁷ Δ, since u has 16 bits. Error: E|x̂ − x|² = Δ² Σ f(1 − f), f the fractional part of |x|/Δ.
    Each client draws its own u, so the mean of n clients has 1/n of the error.

    Message: Δ of each bucket in the run's dtype, then the codes q + s.

    Args:
        bits: the number of bits of each code, 2 to 16: s = 2^(bits−1) − 1. Pass either `bits` or `levels`.
        levels: s, 1 to 32,767. 1 is ternary: −M, 0 or M, in 1.6 bits.
        bucket: the count of numbers that share one Δ, a power of two from 8 to 65,536; None: all numbers share one Δ.
        norm: `"max"` has the smallest error; `"l2"` is the norm of QSGD and sends more zeros.
    Raises:
        UsageError: neither or both of bits and levels are given, or an argument is out of range.
    Example:
        >>> from atoll.plan.codec.stage import flat_layout
        >>> codec, key = Quantize(levels=4).bind(flat_layout(4)), Key(7).of(torch.tensor([0]))
        >>> payload, side, *_ = codec.encode(torch.tensor([[1.0, -0.5, 0.25, 0.0]]), {}, {}, key)
        >>> codec.decode(payload, side)
        tensor([[ 1.0000, -0.5000,  0.2500,  0.0000]])

    Reference: Alistarh et al., QSGD, 2017; Wen et al., TernGrad, 2017.
    """

    per_message = True
    packs = True

    bits: int | None = field(default=None, metadata={"example": 8})
    levels: int | None = None
    bucket: int | None = 512
    norm: Literal["max", "l2"] = "max"

    def __post_init__(self) -> None:
        if (self.bits is None) == (self.levels is None):
            raise UsageError(f"{self!r}.", "either bits or levels.", "each follows from the other.", "Quantize(8)")
        if self.bits is not None and not (type(self.bits) is int and 2 <= self.bits <= 16):
            raise UsageError(
                f"{self!r}.",
                "2 to 16 bits, a whole number.",
                "there are at least three levels, −M, 0 and M, and they need more than one bit.",
                "Quantize(levels=1)" if self.bits == 1 else "Quantize(8)",
            )
        if self.levels is not None and not (type(self.levels) is int and 1 <= self.levels <= 32767):
            raise UsageError(f"{self!r}.", "1 to 32,767 levels on each side of 0.", write="Quantize(levels=1)")
        bucket = self.bucket
        if bucket is not None and not (type(bucket) is int and 8 <= bucket <= grid.GROUP and bucket.bit_count() == 1):
            raise UsageError(
                f"{self!r}.",
                f"a bucket that is a power of two from 8 to {grid.GROUP}, or None.",
                "a bucket must not cross the end of a group, and groups have the size of the cache.",
                "Quantize(8, bucket=512)",
            )
        if self.norm not in ("max", "l2"):
            raise UsageError(f"{self!r}.", "norm one of 'max', 'l2'.", write="Quantize(8, norm='l2')")

    @property
    def s(self) -> int:
        """The levels on each side of 0."""
        return self.levels if self.levels is not None else (1 << ((self.bits or 0) - 1)) - 1

    def contraction(self) -> Codec:
        # A bucket with one number sΔ and n − 1 numbers fΔ has the error n f(1 − f)Δ². This is less than the energy for
        # all f if and only if n < 8s² for the norm "max", and n < 4s² for "l2".
        most = (8 if self.norm == "max" else 4) * self.s**2
        if self.bucket is not None and self.bucket < most:
            return self
        bucket = min(512, 1 << ((most - 1).bit_length() - 1))
        return replace(self, bucket=bucket) if bucket >= 8 else Sign()

    @property
    def _width(self) -> int:
        return TERNARY if self.s == 1 else (2 * self.s).bit_length()

    def _length(self, n: int) -> int:
        return packed_length(n, self._width)

    def _count(self, n: int) -> int:
        return -(-n // self.bucket) if self.bucket else 0

    def form(self, layout: Layout) -> Form:
        steps = grid.length_of(layout.d, self._count) if self.bucket else 1
        return Form({"step": Field(layout.dtype, steps)}, Field(torch.uint8, grid.length_of(layout.d, self._length)))

    def encode(self, x: Tensor, memory: Tensors, shared: Tensors, key: Key) -> Encoded:
        d, form = self.layout.d, self.form(self.layout)
        payload = x.new_empty(len(x), form.payload.length, dtype=torch.uint8)
        step = x.new_empty(len(x), form.side["step"].length) if self.bucket else self._norm_of_lanes(x) / self.s
        states = grid.group_states(key, len(x), d, x.device)
        for _, lanes, rows, codes, state, *steps in grid.batches(
            *self._cuts(x, payload), states, *self._steps(step, d)
        ):
            code, found = self.quantise(rows, state, None if self.bucket else step[lanes, None])
            codes.copy_(code)
            for target in steps:
                target.copy_(found)
        return payload, {"step": step}, {}, memory

    def _cuts(self, x: Tensor, payload: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        return grid.parts(x), grid.split(payload, x.shape[-1], self._length)

    def _steps(self, step: Tensor, d: int) -> list[list[Tensor]]:
        """The steps by group if each bucket has its own step; empty if the whole vector has one step."""
        return [grid.split(step, d, self._count)] if self.bucket else []

    def quantise(self, rows: Tensor, state: Tensor, step: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return packed codes and steps of rows `[..., n]`. `state`, int64 `[...]`, is the random state of each row."""
        n = rows.shape[-1]
        x = grid.buckets(rows, self.bucket) if self.bucket else rows[..., None, :]
        if step is None:
            step = self._norm(x) / self.s
        y = x / torch.where(step == 0, torch.ones_like(step), step)[..., None]
        y = y.flatten(-2)[..., :n] + grid.dither(state, n, rows.dtype)
        code = y.round_().clamp_(-self.s, self.s).add_(self.s).to(torch.int32)
        return pack_bits(code, self._width), step

    def _norm(self, x: Tensor) -> Tensor:
        """The norm along the last axis."""
        largest = x.abs().amax(-1)
        if self.norm == "max":
            return largest
        unit = torch.where(largest == 0, torch.ones_like(largest), largest)
        return grid.ordered_sum((x / unit[..., None]).square_())[..., 0].sqrt_() * largest

    def _norm_of_lanes(self, x: Tensor) -> Tensor:
        """The norm of each lane, `[K, 1]`."""
        d = x.shape[-1]
        norms = x.new_empty(len(x), grid.groups_of(d))
        for _, _, rows, out in grid.batches(grid.parts(x), grid.split(norms, d, lambda n: 1)):
            out[..., 0] = self._norm(rows)
        return self._norm(norms)[:, None]

    def decode(self, x: Tensor, side: Tensors) -> Tensor:
        step = side["step"]
        out = step.new_empty(len(x), self.layout.d)
        for _, lanes, target, codes, *steps in grid.batches(*self._cuts(out, x), *self._steps(step, self.layout.d)):
            n = target.shape[-1]
            q = unpack_bits(codes, n, self._width).sub_(self.s).to(step.dtype)
            if self.bucket:
                target.copy_((grid.buckets(q, self.bucket) * steps[0][..., None]).flatten(-2)[..., :n])
            else:
                torch.mul(q, step[lanes, None], out=target)
        return out

    def validate(self, payload: Tensor | None, side: Tensors) -> None:
        reject((side["step"] < 0).any(-1), "a step is negative", "steps ≥ 0")
        if payload is not None:
            refuse_codes(payload, self.layout.d, self._width, 2 * self.s)


def refuse_codes(payload: Tensor, d: int, bits: int, highest: int) -> None:
    """Refuse packed groups with a code above `highest`, or with bits that are not 0 after the last code."""
    for part, (_, n) in zip(
        grid.split(payload, d, lambda n: packed_length(n, bits)), grid.group_lengths(d), strict=True
    ):
        codes = unpack_bits(part, n, bits)
        reject((codes > highest).flatten(1).any(-1), f"a code is above {highest}", "codes of the quantiser's levels")
        reject((pack_bits(codes, bits) != part).flatten(1).any(-1), "bits after the last code are set", "zeros there")


def _one_bit(n: int) -> int:
    return packed_length(n, 1)


@dataclass(frozen=True, repr=False)
class Sign(Codec):
    """Sends the sign of each number, one bit per coordinate, and the mean of all absolute values.

    x̂ = (|x|₁/d) · sign(x),   sign(0) = 1

    |x̂ − x|² = |x|² − |x|₁²/d, always less than |x|². So the codec is a contraction; use it as `ErrorFeedback(Sign())`.

    Message: the mean absolute value in the run's dtype, then the signs, 1 for negative.

    Example:
        >>> from atoll.plan.codec.stage import flat_layout
        >>> codec = Sign().bind(flat_layout(2))
        >>> payload, side, *_ = codec.encode(torch.tensor([[3.0, -1.0]]), {}, {}, Key(0))
        >>> codec.decode(payload, side)
        tensor([[ 2., -2.]])

    Reference: Karimireddy et al., Error Feedback Fixes SignSGD, 2019.
    """

    per_message = True
    packs = True

    def form(self, layout: Layout) -> Form:
        return Form({"scale": Field(layout.dtype, 1)}, Field(torch.uint8, grid.length_of(layout.d, _one_bit)))

    def encode(self, x: Tensor, memory: Tensors, shared: Tensors, key: Key) -> Encoded:
        scale = grid.lane_sum(x, torch.abs) / x.shape[-1]
        payload = x.new_empty(len(x), self.form(self.layout).payload.length, dtype=torch.uint8)
        for _, _, rows, codes in grid.batches(grid.parts(x), grid.split(payload, x.shape[-1], _one_bit)):
            codes.copy_(pack_bits((rows < 0).to(torch.int32), 1))
        return payload, {"scale": scale}, {}, memory

    def decode(self, x: Tensor, side: Tensors) -> Tensor:
        scale = side["scale"]
        out = scale.new_empty(len(x), self.layout.d)
        for _, lanes, target, codes in grid.batches(grid.parts(out), grid.split(x, self.layout.d, _one_bit)):
            sign = unpack_bits(codes, target.shape[-1], 1).mul_(-2).add_(1).to(scale.dtype)
            torch.mul(sign, scale[lanes, None], out=target)
        return out

    def validate(self, payload: Tensor | None, side: Tensors) -> None:
        reject((side["scale"] < 0).any(-1), "the scale is negative", "a scale ≥ 0")
        if payload is not None:
            refuse_codes(payload, self.layout.d, 1, 1)
