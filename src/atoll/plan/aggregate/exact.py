"""The exact sum: one result for every order, grouping and number of workers.

A float is a sum of *digits*, integers of at most 25 bits and a sign. The digit of *place* j has the unit 2^(26 j):

    x ≈ Σ_j  D_j(x),     D_j(x) a multiple of 2^(26 j),  |D_j(x)| ≤ 2^(26 j + 25)

Weights are integers with Σ w ≤ 2²⁸, so Σ_i w_i D_j(x_i) is an integer multiple of 2^(26 j) with a factor below 2⁵³.
float64 represents it and all partial sums without rounding. Addition is therefore associative and commutative, in any
order that a matrix product may choose. Rounding happens in two steps only. First, a contribution keeps the leading
`places` digits of each block of coordinates, counted from the block's largest number. The rounding error depends on the
contribution only. Second, the digits of the sum are carried into a normal form and added from the largest place down.
The rounding error depends on the sum only.

If all numbers of a block are below 2^e in absolute value, the error of each of them is at most

    float32   2 places: 2^(e − 27), 2^(e − 39) on average
    float64   3 places: 2^(e − 53)

plus 2^−1067, since float64 has no smaller numbers.

Tests: tests/identities/test_exact.py, tests/identities/test_native.py
"""

from __future__ import annotations

import ctypes
import math
import struct
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from atoll.base.errors import UsageError
from atoll.base.lines import Part
from atoll.compute import limits
from atoll.compute.buffer_pool import empty
from atoll.compute.native import serving, threads_now
from atoll.compute.native.structs import SumJob
from atoll.compute.tensor_notes import BLOCK, blocks, lookup

WIDTH = 26
_NATIVE = True  # tests switch it off to compare both paths
_NOT_ADDABLE = 127  # place of a block with NaN, infinity or a number above the limit
_EMPTY = -128  # place of a block of zeros
_ADDED, _REFUSED = 1, 2  # state of a block; refused: a place has no digits yet, or the block is not addable
_NO_MEMORY = 1  # result of native code
CAPACITY = 1 << 28
LARGEST = 2.0**900
_HIGHEST = 1024 // WIDTH
_LOWEST = -41  # 2^(26·−41) = 2^−1066: float64 has only the last bits of its subnormal numbers below it

_PLACES = _HIGHEST - _LOWEST + 1

Digits = dict[int, Tensor]  # place → float64 [d], multiples of 2^(26·place)


def places(dtype: torch.dtype) -> int:
    """The number of digits that a contribution keeps: 3 for float64, 2 for smaller dtypes."""
    return 3 if dtype == torch.float64 else 2


def add(digits: Digits, rows: Tensor, weights: Tensor) -> Digits:
    """Add weighted rows to a sum of digits, in place.

        digits ← digits + Σ_k weights[k] · rows[k]

    Args:
        digits: the sum so far; {} is zero. All weights ever added to it must sum to at most `CAPACITY`; the caller
            checks this.
        rows: the rows to add, float32 or float64 `[K, d]`, finite, |x| ≤ 2⁹⁰⁰.
        weights: the weight of each row, integers ≥ 0 of any numeric dtype, `[K]`.
    Returns:
        `digits`.
    Raises:
        UsageError: a number is not finite, or above 2⁹⁰⁰.
        MemoryError: there is no memory for the digits. Some rows may be added already.
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
    whole = d - d % BLOCK  # the last block is added separately if it is shorter
    for start, end in ((0, whole), (whole, d)):
        if start < end:
            _add_blocks(digits, rows, start, end, weights.to(rows.device, torch.int64))
    if not digits:  # all rows are zero: the sum still needs its length
        digits[_LOWEST] = rows.new_zeros(d, dtype=torch.float64)
    return digits


def _library(rows: Tensor) -> ctypes.CDLL | None:
    """The native library if it is built and can read these rows; otherwise None, and torch forms the sum."""
    return serving("exact", rows) if _NATIVE and rows.stride(-1) == 1 else None


def bounded(rows: Tensor) -> bool:
    """Whether `add` accepts rows `[K, d]`: all numbers are finite and at most `LARGEST` in absolute value."""
    peaks = lookup(rows, "peaks")
    if peaks is not None:
        return float(peaks.max()) <= LARGEST  # False for NaN
    native = _library(rows)
    if native is not None and rows.numel() >= limits.NATIVE_PEAKS:
        job, (tops, *_) = _job(rows)
        _check_memory(native.tops(ctypes.byref(job)))
        return not bool((tops == _NOT_ADDABLE).any())
    low, high = torch.aminmax(rows)  # both are NaN if any number is
    return float(high) <= LARGEST and float(low) >= -LARGEST


def _check_memory(status: int) -> None:
    if status == _NO_MEMORY:
        raise MemoryError("no memory for an exact sum in native code")


def _job(rows: Tensor, weights: Tensor | None = None) -> tuple[SumJob, tuple[Any, ...]]:
    """A job for native code, and the arrays that it points to: places, state of blocks, digits, fresh, peaks."""
    k, d = rows.shape
    tops, done = torch.empty(blocks(d), k, dtype=torch.int8), torch.zeros(blocks(d), dtype=torch.int8)
    table, fresh = (ctypes.c_void_p * _PLACES)(), (ctypes.c_int8 * _PLACES)()
    own, peaks = threads_now(0), lookup(rows, "peaks")
    threads = own or torch.get_num_threads()
    if rows.numel() < (limits.THREADED_SUM if own else limits.BUSY_THREADED_SUM):
        threads = 1
    sizes = (rows.data_ptr(), k, d, rows.stride(0), _LOWEST, threads, tops.data_ptr(), done.data_ptr())
    sums = None if weights is None else weights.data_ptr(), ctypes.addressof(table), ctypes.addressof(fresh)
    return SumJob(*sizes, *sums, None if peaks is None else peaks.data_ptr()), (tops, done, table, fresh, peaks)


def _add_natively(native: ctypes.CDLL, digits: Digits, rows: Tensor, weights: Tensor) -> Digits:
    """The same digits as `_add_blocks`, in one pass over the rows."""
    integers = weights.to(torch.float64)
    job, (tops, done, table, fresh, _) = _job(rows, integers)
    for place, digit in digits.items():
        table[place - _LOWEST] = digit.data_ptr()
    try:
        _check_memory(native.add(ctypes.byref(job)))
        while bool((refused := done == _REFUSED).any()):  # a place occurs for the first time
            found = set(tops[refused].flatten().tolist())
            if _NOT_ADDABLE in found:
                raise UsageError(
                    "A contribution to an exact sum has a number that is not finite, or above 2^900.",
                    "finite numbers, at most 2^900 in absolute value.",
                    "digits cannot represent it. The blocks before it have already been added.",
                    Part("Mean(sum='float')", "aggregator"),
                )
            used = {top - j for top in found if top != _EMPTY for j in range(places(rows.dtype)) if top - j >= _LOWEST}
            added = bool((done == _ADDED).any())
            for place in used - digits.keys():  # before the first addition, native code itself writes zeros
                digits[place] = empty(rows, rows.shape[1:], torch.float64)
                if added:
                    digits[place].zero_()
                table[place - _LOWEST], fresh[place - _LOWEST] = digits[place].data_ptr(), not added
            done[refused] = 0
            _check_memory(native.add(ctypes.byref(job)))
    except Exception:  # digits that were created without zeros are complete only in blocks added
        missing = (done != _ADDED).repeat_interleave(BLOCK)[: rows.shape[1]]
        for place in (place for place in digits if fresh[place - _LOWEST]):
            digits[place].masked_fill_(missing, 0)
        raise
    if not digits:
        digits[_LOWEST] = rows.new_zeros(rows.shape[1], dtype=torch.float64)
    return digits


def _add_blocks(digits: Digits, rows: Tensor, start: int, end: int, weights: Tensor) -> None:
    """Add the weighted rows in coordinates start … end − 1: whole blocks, or the last block."""
    x, keep = rows[:, start:end].view(rows.shape[0], -1, min(BLOCK, end - start)), places(rows.dtype)
    largest = torch.maximum(x.amax(2), x.amin(2).neg_())
    most = float(largest.max())
    if most == 0:
        return
    least = float(largest.min()) or float(largest[largest > 0].min())
    high, low = _place(most), _place(least)
    if high != low:
        top = torch.div(torch.frexp(largest).exponent, WIDTH, rounding_mode="floor").clamp_(min=_LOWEST)
    size = max(1, (limits.SUM_TILE if x.device.type == "cpu" else limits.DEVICE_SUM_TILE) // (x.shape[0] * x.shape[2]))
    weight = int(weights.sum())
    for first in range(high, low - 1, -1):
        block_weights = weights[:, None] * (top == first) if high != low else weights[:, None].expand(largest.shape)
        digit_places = tuple(range(first, max(first - keep, _LOWEST - 1), -1))
        equal = (block_weights == block_weights[0]).all(0).tolist()
        for at in range(0, x.shape[1], size):
            part = slice(at, min(at + size, x.shape[1]))
            place = slice(start + at * x.shape[2], start + part.stop * x.shape[2])
            # The two lowest digits are extracted together if their weighted sum fits 62 bits.
            bits = min(math.frexp(most)[1] - WIDTH * digit_places[-1], 2 * WIDTH)
            joint = len(digit_places) > 1 and bits + weight.bit_length() <= 62
            _add_tile(digits, place, rows, x[:, part], block_weights[:, part], digit_places, joint, all(equal[part]))


def _place(x: float) -> int:
    """The least place j whose higher digits are all 0: |x| < 2^(26 (j + 1) − 1)."""
    return max(math.frexp(x)[1] // WIDTH, _LOWEST)


def _add_tile(
    digits: Digits,
    at: slice,
    rows: Tensor,
    x: Tensor,
    weights: Tensor,
    places: tuple[int, ...],
    joint: bool,
    equal: bool,
) -> None:
    """Add Σ_k weights[k, b] · D_j(x[k, b, :]) to the digits of each place j of `places`, in falling order.

    The bits of x + 1.5·2^(52 + 26 j), read as an integer, are those of the anchor plus D_j(x) / 2^(26 j). If D_{j+1}
    was not subtracted before, they are those of the anchor plus (D_{j+1}(x) + D_j(x)) / 2^(26 j). Integers wrap, so a
    sum that fits is correct even if partial sums overflow.
    """
    x, above = x.to(torch.float64, copy=True), None
    for place in places:
        if joint and place == places[-2]:
            continue
        anchor = 1.5 * 2.0 ** (52 + WIDTH * place)
        y = x.add_(anchor) if place == places[-1] else x + anchor
        subtracted = place == places[0] and len(places) > 2  # one float64 has 51 bits and a sign, two digits
        if subtracted:
            x -= y - anchor
        words = y.view(torch.int64)
        if equal:
            read = words.sum(0).sub_(_wrapped(len(words) * _bits(anchor))).mul_(weights[0, :, None])
        else:
            read = words.mul_(weights[:, :, None]).sum(0).sub_(weights.sum(0)[:, None] * _bits(anchor))
        if joint and place == places[-1]:
            above = (read + (1 << WIDTH - 1)) >> WIDTH
            _add_digits(digits, place + 1, at, rows, above)
        _add_digits(digits, place, at, rows, read if above is None else torch.sub(read, above, alpha=1 << WIDTH))
        above = None if subtracted else read


def _add_digits(digits: Digits, place: int, at: slice, rows: Tensor, digit: Tensor) -> None:
    """Add integers to the digits of a place."""
    if place not in digits:
        digits[place] = rows.new_zeros(rows.shape[1], dtype=torch.float64)
    digits[place][at].add_(digit.flatten().to(torch.float64), alpha=2.0 ** (WIDTH * place))


def _bits(x: float) -> int:
    """The bits of a float64, read as an integer."""
    return int.from_bytes(struct.pack("<d", x), "little")


def _wrapped(x: int) -> int:
    """The int64 that an integer wraps to."""
    return (x + (1 << 63)) % (1 << 64) - (1 << 63)


def merge(a: Digits, b: Digits) -> Digits:
    """a ← a + b, exactly and in place; returns a."""
    for place, digit in b.items():
        if place in a:
            a[place] += digit
        else:
            a[place] = digit.clone()
    return a


def total(digits: Digits) -> Tensor:
    """The sum as float64 `[d]`: its digits are added from the largest place down.

    The sum of two digits rounds once, so it does not depend on the digits. With three or more digits, different digits
    can represent the same sum. The excess of each place is therefore carried to the next place first. This is done on
    absolute values, so that total(−x) = −total(x).

    Raises:
        MemoryError: native code has no memory for the digits of all places.
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
        sizes = map(ctypes.c_int64, (len(table), lowest, len(first)))
        _check_memory(native.total(table, *sizes, ctypes.c_void_p(out.data_ptr())))
        return out
    sign = _sign(_carried(digits))
    return _added(_carried({place: digit * sign for place, digit in digits.items()})).mul_(sign)


def to_integers(digits: Digits) -> tuple[int, Tensor]:
    """The normal form of a sum: equal sums have equal integers, in any order and grouping of their contributions.

        Σ_j  n_j · 2^(26 j) = the sum,     −2²⁵ ≤ n_j < 2²⁵

    Args:
        digits: the sum.
    Returns:
        The lowest place, and n of each place from it, int32 `[places, d]`. A sum of zeros has no place.
    Example:
        >>> low, numbers = to_integers(add({}, torch.tensor([[3.0]]), torch.ones(1)))
        >>> low, numbers.tolist()
        (0, [[3]])
    """
    low, high = min(digits), max(digits) + 2  # Σ w ≤ 2²⁸, so two further places take all that is carried
    carry = torch.zeros_like(next(iter(digits.values())), dtype=torch.int64)
    rows = []
    for place in range(low, high + 1):
        given = digits.get(place)
        number = carry if given is None else carry + (given / 2.0 ** (WIDTH * place)).to(torch.int64)
        carry = number + (1 << WIDTH - 1) >> WIDTH
        rows.append((number - (carry << WIDTH)).to(torch.int32))
    whole = torch.stack(rows)
    used = whole.any(1).nonzero()[:, 0].tolist()
    return (low + used[0], whole[used[0] : used[-1] + 1]) if used else (0, whole[:0])


def from_integers(low: int, numbers: Tensor) -> Digits:
    """The inverse of `to_integers`.

    Args:
        low: the lowest place.
        numbers: the integers of each place, int32 `[places, d]`.
    Returns:
        The sum.
    Example:
        >>> total(from_integers(0, torch.tensor([[3], [1]], dtype=torch.int32))).item() == 3 + 2**26
        True
    """
    if not len(numbers):
        return {_LOWEST: numbers.new_zeros(numbers.shape[1], dtype=torch.float64)}
    return {low + i: row.to(torch.float64) * 2.0 ** (WIDTH * (low + i)) for i, row in enumerate(numbers)}


def in_range(low: int, count: int) -> bool:
    """Whether a sum of at most `CAPACITY` times `LARGEST` can have these places."""
    return low >= _LOWEST and low + count <= _HIGHEST + 1 and count >= 0


def _added(digits: Digits) -> Tensor:
    first, *rest = (digits[place] for place in sorted(digits, reverse=True))
    out = empty(first, first.shape, torch.float64).copy_(first)
    for digit in rest:
        out += digit
    return out


def _carried(digits: Digits) -> Digits:
    """The same sum in normal form: every digit but the largest is in [−2²⁵, 2²⁵) units of its place."""
    top, out = max(digits), {}
    carry = torch.zeros_like(digits[top])
    for place in range(min(digits), top):
        digit, unit = digits[place] + carry if place in digits else carry, 2.0 ** (WIDTH * (place + 1))
        carry = torch.floor(digit / unit + 0.5).mul_(unit)
        out[place] = digit - carry
    out[top] = digits[top] + carry
    return out


def _sign(carried: Digits) -> Tensor:
    """The sign of a sum in normal form, 1 or −1: the sign of its largest nonzero digit."""
    lead = torch.zeros_like(next(iter(carried.values())))
    for place in sorted(carried):
        lead = torch.where(carried[place] == 0, lead, carried[place])
    return torch.where(lead < 0, -1.0, 1.0).to(lead.dtype)


def check_capacity(weight: int, rule: Any) -> None:
    """Refuse weights whose sum exceeds `CAPACITY`.

    Args:
        weight: the sum of the weights of a round.
        rule: the aggregator; the error shows it with `sum="float"`.
    Raises:
        UsageError: the sum is too large.
    """
    if weight > CAPACITY:
        raise UsageError(
            f"The weights of this round sum to {weight:,}.",
            f"at most 2^28 = {CAPACITY:,} for an exact sum.",
            "above it the sum of a digit does not fit the 53 bits of float64.",
            Part(repr(replace(rule, sum="float")), "aggregator"),
        )
