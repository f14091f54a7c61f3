"""Accountants: ε of repeated Gaussian releases, by Rényi divergences (RDP) and by privacy loss distributions (PLD).

    δ(ε) = sup over neighbours of ∫ max(0, P − e^ε Q),   ε(δ) = the least ε with δ(ε) ≤ δ

P and Q are the distributions of all releases on two neighbouring populations. Both accountants return upper bounds.

Tests: tests/identities/test_accountant.py
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

ORDERS = (*(1 + x / 10 for x in range(1, 100)), *range(11, 65), *range(65, 257, 4), 320, 384, 512, 1024)
_GRID = 2e-4  # largest distance between privacy losses of a PLD; smaller for many or small releases
_POINTS = 1 << 22  # largest number of losses of a PLD
_LARGEST = 300.0  # largest ε of a PLD: e^ε must not overflow
_TAIL = 1e-6  # part of δ that a PLD may lose in its tails


@dataclass(frozen=True)
class Releases:
    """Equal releases of a sum with Gaussian noise.

    Args:
        noise: the standard deviation of the noise in units of the sensitivity, > 0.
        count: the number of releases T, ≥ 0.
        rate: the chance q that a client is in a release, in [0, 1]; 1: no amplification.
        fixed_size: whether a release takes a fixed number of clients without replacement, and not each with an
            independent coin. The neighbours then replace one client, and `noise` is in units of that sensitivity.
    Example:
        >>> round(least_epsilon(Releases(1.0, 1), 1e-5), 6)
        4.377178
    """

    noise: float
    count: int
    rate: float = 1.0
    fixed_size: bool = False


@lru_cache(1 << 10)
def least_epsilon(releases: Releases, delta: float) -> float:
    """The least proved ε at δ: exact for q = 1, else the smaller of RDP and PLD.

    Args:
        releases: the releases.
        delta: δ in (0, 1).
    Returns:
        ε ≥ 0; infinity if no bound is known.
    Example:
        >>> round(least_epsilon(Releases(2.0, 10, 0.1), 1e-5), 4) <= round(rdp_epsilon(Releases(2.0, 10, 0.1), 1e-5), 4)
        True
    """
    if releases.count == 0 or releases.rate == 0:
        return 0.0
    if releases.rate == 1 and not releases.fixed_size:
        return gaussian_epsilon(math.sqrt(releases.count) / releases.noise, delta)
    bound = rdp_epsilon(releases, delta)
    return bound if releases.fixed_size else min(bound, pld_epsilon(releases, delta, bound))


# The Gaussian mechanism


def gaussian_delta(mu: float, eps: float) -> float:
    """δ(ε) = Φ(μ/2 − ε/μ) − e^ε Φ(−μ/2 − ε/μ) of Gaussian releases with total sensitivity / noise = μ.

    Example:
        >>> round(gaussian_delta(1.0, 1.0), 8)
        0.12693674

    Paper: Balle and Wang, Improving the Gaussian Mechanism for Differential Privacy, 2018.
    """
    return max(0.0, _tail(eps / mu - mu / 2) - math.exp(eps + _log_tail(eps / mu + mu / 2)))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """The inverse of `gaussian_delta`, from above."""
    return _least(lambda eps: gaussian_delta(mu, eps) <= delta, mu * mu / 2 + mu * math.sqrt(2 * math.log(1 / delta)))


# Rényi divergences


@lru_cache(1 << 14)
def _log_moment(noise: float, rate: float, fixed_size: bool, order: float) -> float:
    """log E_Q[(P/Q)^α] of one release."""
    if fixed_size:
        return _fixed_size_moment(rate, noise, order)
    if float(order).is_integer():
        return _whole_moment(rate, noise, int(order))
    return _moment(rate, noise, order)


def rdp(releases: Releases, order: float) -> float:
    """The Rényi divergence of order α of all releases, T · log E_Q[(P/Q)^α] / (α − 1).

    Args:
        releases: the releases.
        order: α > 1.
    Example:
        >>> f"{rdp(Releases(2.5, 50, 0.01), 2.5):.6e}"
        '1.085418e-03'

    Paper: Mironov, Talwar and Zhang, Rényi Differential Privacy of the Sampled Gaussian Mechanism, 2019; for
        `fixed_size` Wang, Balle and Kasiviswanathan, Subsampled Rényi Differential Privacy, 2019.
    """
    if releases.rate == 1 and not releases.fixed_size:
        return releases.count * order / (2 * releases.noise**2)
    moment = _log_moment(releases.noise, releases.rate, releases.fixed_size, order)
    return releases.count * moment / (order - 1)


def rdp_epsilon(releases: Releases, delta: float, orders: Sequence[float] = ORDERS) -> float:
    """ε = min over α of RDP(α) + log(1 − 1/α) − log(δα)/(α − 1), and at least 0.

    Example:
        >>> round(rdp_epsilon(Releases(1.5, 2250, 0.04), 1e-5, range(2, 257)), 6)
        7.329877

    Paper: Canonne, Kamath and Steinke, The Discrete Gaussian for Differential Privacy, 2020.
    """
    each = [rdp(releases, order) + math.log1p(-1 / order) - math.log(delta * order) / (order - 1) for order in orders]
    return max(0.0, min(each))


def composed_epsilon(groups: Sequence[Releases], delta: float, orders: Sequence[float] = ORDERS) -> float:
    """ε of several kinds of releases with one relation of neighbours: their divergences of an order add up."""
    each = [
        sum(rdp(group, order) for group in groups) + math.log1p(-1 / order) - math.log(delta * order) / (order - 1)
        for order in orders
    ]
    return max(0.0, min(each))


def _whole_moment(q: float, z: float, order: int) -> float:
    """log Σ_k C(α, k) (1 − q)^(α−k) q^k e^(k(k−1)/2z²)."""
    k = np.arange(order + 1)
    terms = _log_binomials(order) + k * math.log(q) + k * (k - 1) / (2 * z * z)
    terms = terms + (order - k) * math.log1p(-q) if q < 1 else terms[-1:]
    return _log_sum(terms)


def _moment(q: float, z: float, order: float) -> float:
    """log E[(1 − q + q e^((2x − 1)/2z²))^α], x ~ N(0, z²), by the trapezoidal rule, which converges exponentially."""
    low, high = -14 * z, order + 14 * z  # the integrand is a mixture of normal densities at 0 … α
    x = np.linspace(low, high, max(4001, math.ceil(40 * (high - low) / min(z, 1.0))))
    ratio = np.logaddexp(math.log1p(-q), math.log(q) + (2 * x - 1) / (2 * z * z))
    density = -0.5 * (x / z) ** 2 - math.log(z * math.sqrt(2 * math.pi))
    return _log_sum(order * ratio + density) + math.log(x[1] - x[0])


def _fixed_size_moment(q: float, z: float, order: float) -> float:
    """log A(α) of sampling without replacement; between whole orders by convexity of log A."""
    below = math.floor(order)
    if below < order:
        low = _fixed_size_moment(q, z, below) if below > 1 else 0.0
        return low + (order - below) * (_fixed_size_moment(q, z, below + 1) - low)
    k = np.arange(order + 1)
    each = k * (k - 1) / (2 * z * z)  # (k − 1) times the divergence of order k
    terms = _log_binomials(int(order)) + k * math.log(q) + math.log(2) + each
    pair = 1 / (z * z)
    least = math.log(4) + math.log(math.expm1(pair)) if pair < 700 else math.inf
    terms[2] = terms[2] - math.log(2) - pair + min(least, math.log(2) + pair)
    return _log_sum(np.concatenate((np.zeros(1), terms[2:])))


# Privacy loss distributions


def pld_epsilon(releases: Releases, delta: float, most: float, step: float | None = None) -> float:
    """ε of releases with independent coins, from the distribution of the privacy loss for both neighbours.

    The loss of one release is rounded to a grid so that δ(ε) is exact at the grid and never too small between its
    points. Releases add independent losses.

    Args:
        releases: the releases.
        delta: δ in (0, 1).
        most: an upper bound of ε, such as that of RDP.
        step: the distance of two losses. None: fine enough that ε is at most 1e-4 above its limit.
    Example:
        >>> round(pld_epsilon(Releases(1.3, 6000, 1 / 400), 1e-5, 1.0), 3)
        0.64

    Paper: Doroshenko et al., Connect the Dots: Tighter Discrete Approximations of Privacy Loss Distributions, 2022.
    """
    if most > _LARGEST:
        return math.inf
    if step is None:
        small = max(1e-5, most / 2000), 0.01 / math.sqrt(releases.count), 0.05 * releases.rate / releases.noise
        step = min(_GRID, *small)
    return max(_one_sided(releases, delta, step, curve) for curve in (_removed, _added))


def _one_sided(releases: Releases, delta: float, step: float, curve: Callable[[float, float, Array], Array]) -> float:
    """ε for one of the two directions of neighbours."""
    losses, mass, infinite = _discrete(releases, curve, step, delta)
    losses, mass, lost = _composed(losses, mass, releases.count, step, delta)
    lost += -math.expm1(releases.count * math.log1p(-infinite))
    if lost > delta:
        return math.inf
    # Between two losses δ(ε) = lost + a − e^ε b, with a = Σ_{L > ε} p and b = Σ_{L > ε} p e^(−L).
    losses, mass = losses[losses > 0], mass[losses > 0]
    above = np.cumsum(mass[::-1])[::-1]
    discounted = np.cumsum((mass * np.exp(-losses))[::-1])[::-1]
    if lost + float(above[:1].sum() - discounted[:1].sum()) <= delta:
        return 0.0
    at = int(np.flatnonzero(lost + above - np.exp(np.minimum(losses, 700)) * discounted <= delta)[0])
    return math.log((lost + above[at] - delta) / discounted[at])


def _discrete(
    releases: Releases, curve: Callable[[float, float, Array], Array], step: float, delta: float
) -> tuple[Array, Array, float]:
    """The losses of one release on a grid, their probabilities, and the probability of an infinite loss.

    δ is a convex function of t = e^ε. The grid joins its points by lines: the line's slope is −Σ_{L > ε} p e^(−L).
    """
    q, z = releases.rate, releases.noise
    share = delta * _TAIL / max(1, releases.count)
    reach = _upper(curve, q, z, share)
    low = max(math.log1p(-q) if curve is _removed and q < 1 else -math.inf, -_upper(_opposite(curve), q, z, share))
    grid = np.arange(math.floor(low / step), math.ceil(reach / step) + 1)
    losses = grid * step
    deltas = np.maximum(curve(q, z, losses), np.maximum(0.0, -np.expm1(losses)))
    t = np.exp(losses)
    below = np.concatenate(([(1 - deltas[0]) / t[0]], -np.diff(deltas) / np.diff(t), [0.0]))
    mass = np.maximum(0.0, (below[:-1] - below[1:]) * t)
    infinite = float(deltas[-1])
    return losses, mass * ((1 - infinite) / mass.sum()), infinite


def _composed(losses: Array, mass: Array, count: int, step: float, delta: float) -> tuple[Array, Array, float]:
    """The sum of `count` independent losses on the grid, by FFT on a window that loses at most `delta · _TAIL`."""
    low, high = _window(losses, mass, count, math.log(1 / (delta * _TAIL)))
    first = math.floor(max(low, count * losses[0]) / step)
    size = math.ceil(min(high, count * losses[-1]) / step) - first + 1
    length = 1 << max(len(mass), size, 2).bit_length()
    if length > 4 * _POINTS:
        return _composed(*_coarser(losses, mass, step), count, 2 * step, delta)
    spectrum = np.fft.rfft(mass, length) ** count
    total = np.maximum(0.0, np.fft.irfft(spectrum, length))
    origin = round(losses[0] / step) * count  # the first number of the product; the window is cyclic
    at = (np.arange(first, first + length) - origin) % length
    return (first + np.arange(length)) * step, total[at], 2 * delta * _TAIL


def _window(losses: Array, mass: Array, count: int, log_tail: float) -> tuple[float, float]:
    """Losses that a sum leaves with probability at most e^(−log_tail) on each side, by Chernoff bounds."""
    with np.errstate(divide="ignore"):
        logs = np.log(mass)
    tilts = np.geomspace(1e-3, 1e3, 61)
    up = min((count * _log_sum(logs + s * losses) + log_tail) / s for s in tilts)
    down = max(-(count * _log_sum(logs - s * losses) + log_tail) / s for s in tilts)
    return down, up


def _coarser(losses: Array, mass: Array, step: float) -> tuple[Array, Array]:
    """The losses on a grid of twice the distance; a loss between two points moves up, so no δ becomes smaller."""
    grid = np.round(losses / step).astype(np.int64)
    up = -(-grid // 2)
    out = np.zeros(int(up[-1] - up[0]) + 1)
    np.add.at(out, up - up[0], mass)
    return (up[0] + np.arange(len(out))) * 2 * step, out


def _removed(q: float, z: float, eps: Array) -> Array:
    """δ(ε) of P = (1 − q) N(0, z²) + q N(1, z²) and Q = N(0, z²): P has one client more."""
    with np.errstate(divide="ignore", invalid="ignore"):
        x = z * z * (np.log(np.expm1(eps) + q) - math.log(q)) + 0.5
    found = q * _tails((x - 1) / z) - (np.expm1(eps) + q) * _tails(x / z)
    return np.where(np.expm1(eps) + q > 0, found, -np.expm1(eps))


def _added(q: float, z: float, eps: Array) -> Array:
    """δ(ε) of P = N(0, z²) and Q = (1 − q) N(0, z²) + q N(1, z²)."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        x = z * z * (np.log(np.expm1(-eps) + q) - math.log(q)) + 0.5
        found = -np.exp(eps) * ((np.expm1(-eps) + q) * -1 * _tails(-x / z) + q * _tails((1 - x) / z))
    return np.where(np.expm1(-eps) + q > 0, found, 0.0)


def _opposite(curve: Callable[[float, float, Array], Array]) -> Callable[[float, float, Array], Array]:
    return _added if curve is _removed else _removed


def _upper(curve: Callable[[float, float, Array], Array], q: float, z: float, tail: float) -> float:
    """The least loss, up to a factor, above which P has at most the mass `tail`."""
    high = 0.1
    while float(curve(q, z, np.array([high]))[0]) > tail and high < 600:
        high *= 1.25
    return high


# Numbers


def _log_binomials(n: int) -> Array:
    """log C(n, k) for k = 0 … n."""
    logs = np.concatenate(([0.0], np.cumsum(np.log(np.arange(1, n + 1)))))
    found: Array = logs[-1] - logs - logs[::-1]
    return found


def _log_sum(terms: Array) -> float:
    top = float(terms.max())
    return top if not math.isfinite(top) else top + math.log(float(np.exp(terms - top).sum()))


def _tail(x: float) -> float:
    """Φ(−x), the chance that a normal number is above x."""
    return math.erfc(x / math.sqrt(2)) / 2


def _log_tail(x: float) -> float:
    """log Φ(−x), also if Φ(−x) underflows."""
    if x < 30:
        return math.log(_tail(x))
    return -x * x / 2 - math.log(x * math.sqrt(2 * math.pi)) + math.log1p(-1 / (x * x) + 3 / x**4)


def _tails(x: Array) -> Array:
    from scipy.special import ndtr

    return np.asarray(ndtr(-x))


def _least(enough: Callable[[float], bool], high: float) -> float:
    """The least x ≥ 0 for which a monotone condition holds, from above, by bisection."""
    if enough(0.0):
        return 0.0
    while not enough(high):
        high *= 2
    low = 0.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
