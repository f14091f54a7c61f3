"""The exact sum: one result for every order, grouping and number of workers.

A float is a sum of *digits*, whole numbers of at most 25 bits and a sign, one for each *place* j, worth 2^(26 j):

    x ≈ Σ_j  D_j(x),     D_j(x) a multiple of 2^(26 j),  |D_j(x)| ≤ 2^(26 j + 25)

Weights are whole numbers and Σ w ≤ 2²⁸, so Σ_i w_i D_j(x_i) is a whole number of 2^(26 j) below 2⁵³ of them: float64
holds it, and every partial sum on the way, without rounding. Adding is therefore associative and commutative, whichever
way a matrix product orders it. Only two places round, each a function of its own input alone: a contribution keeps the
leading `places` digits of each block of coordinates, counted from the block's largest number, and the finished
digits are added from the largest place down.

With 2^e above the largest number of a block, what is kept of each of its numbers is off by at most

    float32   2 places: 2^(e − 27), 2^(e − 39) on average
    float64   3 places: 2^(e − 53)

and anywhere by 2^−1067, where float64 itself ends.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from atoll.errors import UsageError

WIDTH = 26
BLOCK = 4096
CAPACITY = 1 << 28
LARGEST = 2.0**900
_LOWEST = -41  # 2^(26·−41) = 2^−1066: below it float64 has only the last bits of its subnormal numbers

Digits = dict[int, Tensor]  # place → float64 [d], multiples of 2^(26·place)


def places(dtype: torch.dtype) -> int:
    """How many digits of a contribution are kept: 3 in float64, 2 in smaller types."""
    return 3 if dtype == torch.float64 else 2


def _top(block_max: Tensor) -> Tensor:
    """The least place j that rounds every higher one to 0: |x| < 2^(26 (j+1) − 1)."""
    exponent = torch.frexp(block_max).exponent
    return torch.div(exponent, WIDTH, rounding_mode="floor").clamp_(min=_LOWEST)


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
    keep, weights = places(rows.dtype), weights.to(torch.float64)
    for start in range(0, rows.shape[1], BLOCK):
        rest = rows[:, start : start + BLOCK].to(torch.float64, copy=True)
        block_max = rest.abs().amax(1)
        top = torch.where(block_max > 0, _top(block_max), _LOWEST - keep)
        high, low = (int(t) for t in torch.stack((top.max(), top.min())).tolist())
        for place in range(high, max(low - keep, _LOWEST - 1), -1):
            digit = _digit(rest, place)
            rest -= digit
            live = weights if high == low else weights * (top - keep < place)
            if place not in digits:
                digits[place] = rows.new_zeros(rows.shape[1], dtype=torch.float64)
            digits[place][start : start + BLOCK] += live @ digit
    if not digits:  # nothing but zeros so far: a sum of zeros still has a length
        digits[_LOWEST] = rows.new_zeros(rows.shape[1], dtype=torch.float64)
    return digits


def _digit(x: Tensor, place: int) -> Tensor:
    """x rounded to a multiple of 2^(26·place): adding 1.5·2^(52 + 26·place) leaves no room for smaller bits."""
    anchor = 1.5 * 2.0 ** (52 + WIDTH * place)
    return (x + anchor).sub_(anchor)


def merge(a: Digits, b: Digits) -> Digits:
    """The sum of two sums, exactly; `a` is added to in place."""
    for place, digit in b.items():
        if place in a:
            a[place] += digit
        else:
            a[place] = digit.clone()
    return a


def total(digits: Digits) -> Tensor:
    """The finished sum, float64 `[d]`: digits added from the largest place down."""
    first, *rest = (digits[place] for place in sorted(digits, reverse=True))
    out = first.to(torch.float64, copy=True)
    for digit in rest:
        out += digit
    return out


def check_capacity(weight: int, rule: Any) -> None:
    """Refuse a round whose weights would leave float64 too few bits for a rule's sum to stay exact."""
    if weight > CAPACITY:
        raise UsageError(
            f"The weights of this round sum to {weight:,}.",
            f"at most 2^28 = {CAPACITY:,} for an exact sum.",
            "beyond it a digit's sum no longer fits the 53 bits of float64.",
            repr(replace(rule, sum="float")),
        )
