"""The exact sum: one result for every order, grouping and number of workers.

A float is a sum of *digits*, whole numbers of at most 25 bits and a sign, one for each *place* j, worth 2^(26 j):

    x ≈ Σ_j  D_j(x),     D_j(x) a multiple of 2^(26 j),  |D_j(x)| ≤ 2^(26 j + 25)

Weights are whole numbers and Σ w ≤ 2²⁸, so Σ_i w_i D_j(x_i) is a whole number of 2^(26 j) below 2⁵³ of them: float64
holds it, and every partial sum on the way, without rounding. Adding is therefore associative and commutative, whichever
way a matrix product orders it. Only two places round, each a function of its own input alone: a contribution keeps the
leading `places` digits of each block of coordinates, counted from the block's largest number, and the finished
digits are carried into one form that their sum alone decides, and added from the largest place down.

With 2^e above the largest number of a block, what is kept of each of its numbers is off by at most

    float32   2 places: 2^(e − 27), 2^(e − 39) on average
    float64   3 places: 2^(e − 53)

and anywhere by 2^−1067, where float64 itself ends.
"""

from __future__ import annotations

import ctypes
import math
import struct
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from atoll.errors import UsageError
from atoll.known import BLOCK, blocks, told
from atoll.native import serving, threads_now
from atoll.shelf import empty

WIDTH = 26
_TILE = 1 << 18  # numbers worked on at once: with their digits they stay near a core
_FAR_TILE = 1 << 24  # the same where a kernel is only worth its start for many numbers
_NATIVE = True  # tests look at both ways
_SOME = 1 << 19  # numbers from which on native code finds the largest sooner than torch
_MANY = 1 << 22  # numbers from which on a second thread is worth its start
_BUSY_MANY = 1 << 24  # the same where torch's own threads may still spin on the cores, for some milliseconds
_BEYOND = 127  # the place of a block that cannot be added
_EMPTY = -128  # the place of a block of zeros
_ADDED, _REFUSED = 1, 2  # what became of a block; refused: a place has no digits yet, or it cannot be added
CAPACITY = 1 << 28
LARGEST = 2.0**900
_HIGHEST = 1024 // WIDTH
_LOWEST = -41  # 2^(26·−41) = 2^−1066: below it float64 has only the last bits of its subnormal numbers

_PLACES = _HIGHEST - _LOWEST + 1

Digits = dict[int, Tensor]  # place → float64 [d], multiples of 2^(26·place)


def places(dtype: torch.dtype) -> int:
    """How many digits of a contribution are kept: 3 in float64, 2 in smaller types."""
    return 3 if dtype == torch.float64 else 2


def add(digits: Digits, rows: Tensor, weights: Tensor) -> Digits:
    """Add Σ_k weights[k] · rows[k] to a sum of digits, in place.

    Args:
        digits: the sum so far; {} is zero. The caller answers for Σ weights ≤ `CAPACITY` over its whole life.
        rows: float32 or float64 `[K, d]`, finite, |x| ≤ 2⁹⁰⁰.
        weights: whole numbers ≥ 0, any numeric dtype, `[K]`.
    Returns:
        `digits`.
    Example:
        >>> rows = torch.tensor([[1e19], [1.0], [-1e19]], dtype=torch.float64)
        >>> total(add({}, rows, torch.ones(3))).item()
        1.0

    Reference: Demmel and Nguyen, Parallel Reproducible Summation, 2015: sums in fixed bins of exponents.
    """
    d = rows.shape[1]
    native = _library(rows)
    if native is not None:
        return _add_natively(native, digits, rows, weights)
    whole = d - d % BLOCK  # the last block stands by itself where it is shorter than the others
    for start, end in ((0, whole), (whole, d)):
        if start < end:
            _add_blocks(digits, rows, start, end, weights.to(rows.device, torch.int64))
    if not digits:  # nothing but zeros so far: a sum of zeros still has a length
        digits[_LOWEST] = rows.new_zeros(d, dtype=torch.float64)
    return digits


def _library(rows: Tensor) -> ctypes.CDLL | None:
    """Native code for these rows, where there is any."""
    return serving("exact", rows) if _NATIVE and rows.stride(-1) == 1 else None


class _Job(ctypes.Structure):
    """What native/exact.c is told."""

    _fields_ = [
        ("rows", ctypes.c_void_p),
        ("clients", ctypes.c_int64),
        ("d", ctypes.c_int64),
        ("stride", ctypes.c_int64),
        ("lowest", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("tops", ctypes.c_void_p),
        ("done", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("digits", ctypes.c_void_p),
        ("fresh", ctypes.c_void_p),
        ("peaks", ctypes.c_void_p),
    ]


def bounded(rows: Tensor) -> bool:
    """Whether all numbers of rows `[K, d]` are finite, and at most `LARGEST`: whether they can be added."""
    peaks = told(rows, "peaks")
    if peaks is not None:
        return float(peaks.max()) <= LARGEST  # NaN is not
    native = _library(rows)
    if native is not None and rows.numel() >= _SOME:
        job, (tops, *_) = _job(rows)
        native.tops(ctypes.byref(job))
        return not bool((tops == _BEYOND).any())
    low, high = torch.aminmax(rows)  # one NaN makes both of them NaN
    return float(high) <= LARGEST and float(low) >= -LARGEST


def _job(rows: Tensor, weights: Tensor | None = None) -> tuple[_Job, tuple[Any, ...]]:
    """A job, and what must live as long: places of blocks, what became of them, digits, which to write."""
    k, d = rows.shape
    tops, done = torch.empty(blocks(d), k, dtype=torch.int8), torch.zeros(blocks(d), dtype=torch.int8)
    table, fresh = (ctypes.c_void_p * _PLACES)(), (ctypes.c_int8 * _PLACES)()
    own, peaks = threads_now(0), told(rows, "peaks")
    threads = own or torch.get_num_threads()
    if rows.numel() < (_MANY if own else _BUSY_MANY):
        threads = 1
    what = (rows.data_ptr(), k, d, rows.stride(0), _LOWEST, threads, tops.data_ptr(), done.data_ptr())
    where = None if weights is None else weights.data_ptr(), ctypes.addressof(table), ctypes.addressof(fresh)
    return _Job(*what, *where, None if peaks is None else peaks.data_ptr()), (tops, done, table, fresh, peaks)


def _add_natively(native: ctypes.CDLL, digits: Digits, rows: Tensor, weights: Tensor) -> Digits:
    """The same digits, read in one pass over the rows."""
    whole = weights.to(torch.float64)
    job, (tops, done, table, fresh, _) = _job(rows, whole)
    for place, digit in digits.items():
        table[place - _LOWEST] = digit.data_ptr()
    native.add(ctypes.byref(job))
    while bool((refused := done == _REFUSED).any()):  # a place is met for the first time
        met = set(tops[refused].flatten().tolist())
        if _BEYOND in met:
            nothing = (done != _ADDED).repeat_interleave(BLOCK)[: rows.shape[1]]
            for place in (place for place in digits if fresh[place - _LOWEST]):
                digits[place].masked_fill_(nothing, 0)
            raise UsageError(
                "An exact sum was given a number that is not finite, or beyond 2^900.",
                "finite numbers, at most 2^900.",
                "no digits stand for others. What was added of the rows in part stays.",
                "Mean(sum='float')",
            )
        used = {top - j for top in met if top != _EMPTY for j in range(places(rows.dtype)) if top - j >= _LOWEST}
        begun = bool((done == _ADDED).any())
        for place in used - digits.keys():  # while nothing has been added, zeros are written block by block
            digits[place] = empty(rows, rows.shape[1:], torch.float64)
            if begun:
                digits[place].zero_()
            table[place - _LOWEST], fresh[place - _LOWEST] = digits[place].data_ptr(), not begun
        done[refused] = 0
        native.add(ctypes.byref(job))
    if not digits:
        digits[_LOWEST] = rows.new_zeros(rows.shape[1], dtype=torch.float64)
    return digits


def _add_blocks(digits: Digits, rows: Tensor, start: int, end: int, weights: Tensor) -> None:
    """Add the weighted rows in some coordinates, whole blocks or the last one."""
    x, keep = rows[:, start:end].view(rows.shape[0], -1, min(BLOCK, end - start)), places(rows.dtype)
    largest = torch.maximum(x.amax(2), x.amin(2).neg_())
    most = float(largest.max())
    if most == 0:
        return
    least = float(largest.min()) or float(largest[largest > 0].min())
    high, low = _place(most), _place(least)
    if high != low:
        top = torch.div(torch.frexp(largest).exponent, WIDTH, rounding_mode="floor").clamp_(min=_LOWEST)
    size = max(1, (_TILE if x.device.type == "cpu" else _FAR_TILE) // (x.shape[0] * x.shape[2]))
    weight = int(weights.sum())
    for first in range(high, low - 1, -1):
        live = weights[:, None] * (top == first) if high != low else weights[:, None].expand(largest.shape)
        own = tuple(range(first, max(first - keep, _LOWEST - 1), -1))
        alike = (live == live[0]).all(0).tolist()
        for at in range(0, x.shape[1], size):
            part = slice(at, min(at + size, x.shape[1]))
            place = slice(start + at * x.shape[2], start + part.stop * x.shape[2])
            # The two lowest digits are read at once where 62 bits hold their weighted sum.
            bits = min(math.frexp(most)[1] - WIDTH * own[-1], 2 * WIDTH)
            joint = len(own) > 1 and bits + weight.bit_length() <= 62
            _add_tile(digits, place, rows, x[:, part], live[:, part], own, joint, all(alike[part]))


def _place(x: float) -> int:
    """The least place that rounds every higher one to 0: |x| < 2^(26 (j + 1) − 1)."""
    return max(math.frexp(x)[1] // WIDTH, _LOWEST)


def _add_tile(
    digits: Digits, at: slice, rows: Tensor, x: Tensor, live: Tensor, own: tuple[int, ...], joint: bool, alike: bool
) -> None:
    """Add Σ_k live[k, b] · D_j(x[k, b, :]) to the digits of each place j of `own`, falling by one.

    Read as a whole number, x + 1.5·2^(52 + 26 j) is the anchor plus D_j(x) / 2^(26 j), or plus
    (D_{j+1}(x) + D_j(x)) / 2^(26 j) where D_{j+1} was not taken away. Whole numbers wrap around, so a sum that fits
    comes out right whatever it passed on its way.
    """
    x, above = x.to(torch.float64, copy=True), None
    for place in own:
        if joint and place == own[-2]:
            continue
        anchor = 1.5 * 2.0 ** (52 + WIDTH * place)
        y = x.add_(anchor) if place == own[-1] else x + anchor
        taken = place == own[0] and len(own) > 2  # 51 bits and a sign are all that one number has room for
        if taken:
            x -= y - anchor
        words = y.view(torch.int64)
        if alike:
            read = words.sum(0).sub_(_wrapped(len(words) * _bits(anchor))).mul_(live[0, :, None])
        else:
            read = words.mul_(live[:, :, None]).sum(0).sub_(live.sum(0)[:, None] * _bits(anchor))
        if joint and place == own[-1]:
            above = (read + (1 << WIDTH - 1)) >> WIDTH
            _put(digits, place + 1, at, rows, above)
        _put(digits, place, at, rows, read if above is None else torch.sub(read, above, alpha=1 << WIDTH))
        above = None if taken else read


def _put(digits: Digits, place: int, at: slice, rows: Tensor, digit: Tensor) -> None:
    """Add a digit, whole numbers, to what stands at its place."""
    if place not in digits:
        digits[place] = rows.new_zeros(rows.shape[1], dtype=torch.float64)
    digits[place][at].add_(digit.flatten().to(torch.float64), alpha=2.0 ** (WIDTH * place))


def _bits(x: float) -> int:
    """A float64 read as a whole number."""
    return int.from_bytes(struct.pack("<d", x), "little")


def _wrapped(x: int) -> int:
    """The int64 that a whole number wraps around to."""
    return (x + (1 << 63)) % (1 << 64) - (1 << 63)


def merge(a: Digits, b: Digits) -> Digits:
    """The sum of two sums, exactly; `a` is added to in place."""
    for place, digit in b.items():
        if place in a:
            a[place] += digit
        else:
            a[place] = digit.clone()
    return a


def total(digits: Digits) -> Tensor:
    """The finished sum, float64 `[d]`: digits added from the largest place down.

    Two digits round once, whatever they are. The same sum may stand as other digits, so of three and more, what a place
    has too much is carried to the next first; and by its absolute value, so that a sum of opposites is the opposite.
    """
    if len(digits) < 3:
        return _added(digits)
    first = next(iter(digits.values()))
    native = _library(first[None])
    if native is not None and all(digit.is_contiguous() for digit in digits.values()):
        lowest, out = min(digits), empty(first, first.shape)
        table = (ctypes.c_void_p * (max(digits) - lowest + 1))()
        for place, digit in digits.items():
            table[place - lowest] = digit.data_ptr()
        native.total(table, *map(ctypes.c_int64, (len(table), lowest, len(first))), ctypes.c_void_p(out.data_ptr()))
        return out
    sign = _sign(_carried(digits))
    return _added(_carried({place: digit * sign for place, digit in digits.items()})).mul_(sign)


def _added(digits: Digits) -> Tensor:
    first, *rest = (digits[place] for place in sorted(digits, reverse=True))
    out = empty(first, first.shape, torch.float64).copy_(first)
    for digit in rest:
        out += digit
    return out


def _carried(digits: Digits) -> Digits:
    """The same sum with every digit but the largest in [−2²⁵, 2²⁵) of its place."""
    top, out = max(digits), {}
    carry = torch.zeros_like(digits[top])
    for place in range(min(digits), top):
        digit, unit = digits[place] + carry if place in digits else carry, 2.0 ** (WIDTH * (place + 1))
        carry = torch.floor(digit / unit + 0.5).mul_(unit)
        out[place] = digit - carry
    out[top] = digits[top] + carry
    return out


def _sign(carried: Digits) -> Tensor:
    """The sign of a sum whose digits are carried, 1 or −1: that of the first digit which is not 0."""
    lead = torch.zeros_like(next(iter(carried.values())))
    for place in sorted(carried):
        lead = torch.where(carried[place] == 0, lead, carried[place])
    return torch.where(lead < 0, -1.0, 1.0).to(lead.dtype)


def check_capacity(weight: int, rule: Any) -> None:
    """Refuse a round whose weights would leave float64 too few bits for a rule's sum to stay exact."""
    if weight > CAPACITY:
        raise UsageError(
            f"The weights of this round sum to {weight:,}.",
            f"at most 2^28 = {CAPACITY:,} for an exact sum.",
            "beyond it a digit's sum no longer fits the 53 bits of float64.",
            repr(replace(rule, sum="float")),
        )
