"""Shamir's secret sharing: t of h shares give the secret, t - 1 shares give nothing.

    f(x) = secret + a_1 x + ... + a_{t-1} x^{t-1} mod p;   the share of x is f(x)
    secret = Σ_i f(x_i) Π_{j≠i} x_j / (x_j - x_i) mod p

Paper: A. Shamir, How to share a secret, 1979.

Tests: tests/identities/test_secure.py
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from itertools import accumulate

PRIME = (1 << 256) + 297
SECRET_BYTES = 32
SHARE_BYTES = 33
_LAZY = 256  # bits by which a sum may outgrow the prime before it is reduced


def share_out(
    secret: bytes, threshold: int, xs: Sequence[int], coefficients: Sequence[int] | None = None, prime: int = PRIME
) -> list[int]:
    """Share one number below the prime: f(x) for each x.

    Args:
        secret: big-endian bytes of a number below `prime`.
        threshold: number t of shares that rebuild the secret, 1 ≤ t ≤ len(xs).
        xs: distinct points in 1 .. p - 1; here the index of each holder.
        coefficients: a_1 .. a_{t-1}; by default random numbers of the operating system.
        prime: the modulus p.
    Returns:
        One number per point, in their order.
    Raises:
        ValueError: the secret is too large, the threshold or the points are outside their range.
    """
    value = int.from_bytes(secret, "big")
    if value >= prime or not 1 <= threshold <= len(xs) or len(set(xs)) < len(xs):
        raise ValueError("A secret below the prime, a threshold up to the number of points, distinct points.")
    if not all(0 < x < prime for x in xs):
        raise ValueError("A share at 0 is the secret.")
    if coefficients is None:
        coefficients = [secrets.randbelow(prime) for _ in range(threshold - 1)]
    descending = list(reversed(coefficients))
    top = prime.bit_length() + _LAZY
    shares = []
    for x in xs:
        total = 0
        for coefficient in descending:
            total = (total + coefficient) * x
            if total.bit_length() > top:  # a small x lets the sum grow slowly, so it is reduced seldom
                total %= prime
        shares.append((total + value) % prime)
    return shares


def lagrange(xs: Sequence[int], at: int = 0, prime: int = PRIME) -> list[int]:
    """The Lagrange coefficients Π_{j≠i} (at - x_j) / (x_i - x_j) mod p of distinct points.

    One list serves every secret that the same holders rebuild. It costs t² products of small numbers and one inversion.
    """
    if at in xs:
        return [int(x == at) for x in xs]
    upper = math.prod(at - x for x in xs)
    lower = [math.prod(x - other for other in xs if other != x) % prime for x in xs]
    inverses = _inverses(lower, prime)
    return [upper // (at - x) * inverse % prime for x, inverse in zip(xs, inverses, strict=True)]


def _inverses(numbers: Sequence[int], prime: int) -> list[int]:
    """1/x mod p of each number, by one inversion of their product."""
    products = list(accumulate(numbers, lambda a, b: a * b % prime, initial=1))
    rest, found = pow(products[-1], -1, prime), list(numbers)
    for i in range(len(numbers) - 1, -1, -1):
        found[i] = rest * products[i] % prime
        rest = rest * numbers[i] % prime
    return found


def rebuild(shares: Mapping[int, int], coefficients: Sequence[int] | None = None, prime: int = PRIME) -> int:
    """The number f(0) from exactly t shares, by point.

    Args:
        shares: share by point. With fewer than t shares, or with a wrong one, the result is an unrelated number.
        coefficients: `lagrange(list(shares))`, if the caller has them.
        prime: the modulus p.
    """
    coefficients = coefficients if coefficients is not None else lagrange(list(shares), prime=prime)
    return sum(map(int.__mul__, coefficients, shares.values())) % prime


def share_bytes(share: int) -> bytes:
    return share.to_bytes(SHARE_BYTES, "big")


def share_number(data: bytes) -> int:
    """The number of a share.

    Raises:
        ValueError: a wrong length, or a number that is not below the prime.
    """
    value = int.from_bytes(data, "big")
    if len(data) != SHARE_BYTES or value >= PRIME:
        raise ValueError("A share is a number below the prime, in 33 bytes.")
    return value
