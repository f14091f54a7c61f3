"""Passes over the updates of clients: their norms, a factor or a divisor for each, sums, and random rounding to a grid.

Native code and torch give the same bits: each sum of squares has one fixed order, and every other step rounds one
number. If the CPU can, torch and native code round a product and its sum together. Native code serves float32 on the
CPU; it also records the peaks from which an exact sum chooses its places.

Tests: tests/identities/test_bounded_rows.py
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from atoll.base.random import Key
from atoll.compute.buffer_pool import empty
from atoll.compute.native import serving
from atoll.compute.tensor_notes import BLOCK, attach, blocks

_LANES = 256  # squares of a block that are added in parallel
_RUNS = BLOCK // _LANES
_NATIVE = True


def norms(x: Tensor) -> Tensor:
    """The norm of each row, in an order that depends only on the length of the row.

    A block of 4,096 squares is added in 256 lanes; lanes, and then blocks, are added by halves.

    Args:
        x: float `[K, d]`.
    Returns:
        float64 `[K, 1]`, on the device of x.
    Example:
        >>> norms(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).tolist()
        [[5.0], [0.0]]
    """
    k, d = x.shape
    native = _library(x)
    if native is None:
        whole = [_block_sums(x[:, start : start + _part(x)]) for start in range(0, d, _part(x))]
        return _halved(torch.cat(whole, 1) if whole else x.new_zeros(k, 1, dtype=torch.float64)).sqrt()
    sums = torch.zeros(k, max(1, blocks(d)), dtype=torch.float64)
    for row, out in zip(x, sums, strict=True):
        native.squares(_at(row), ctypes.c_int64(d), _at(out))
    return _halved(sums).sqrt()


def scaled(x: Tensor, factors: Tensor) -> Tensor:
    """Each row times its factor.

    Args:
        x: float `[K, d]`.
        factors: `[K, 1]`, of the dtype of x.
    Example:
        >>> scaled(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.5]]))
        tensor([[1.5000, 2.0000]])
    """
    native, d = _library(x), ctypes.c_int64(x.shape[1])
    if native is None:
        return x * factors
    out, peaks = empty(x, x.shape), x.new_empty(len(x), blocks(x.shape[1]))
    for row, factor, into, peak in zip(x, factors[:, 0].tolist(), out, peaks, strict=True):
        native.scale(_at(row), d, ctypes.c_float(factor), _at(into), _at(peak))
    attach(out, "peaks", peaks)
    return out


def quotients(x: Tensor, divisors: Tensor) -> Tensor:
    """Each row divided by its divisor.

    Args:
        x: float `[K, d]`.
        divisors: `[K, 1]`, of the dtype of x.
    Example:
        >>> quotients(torch.tensor([[3.0, 4.0]]), torch.tensor([[2.0]]))
        tensor([[1.5000, 2.0000]])
    """
    native, out = _library(x), empty(x, x.shape)
    if native is None or not x.is_contiguous():
        return torch.div(x, divisors, out=out)
    divisors, peaks, sizes = divisors.contiguous(), x.new_empty(len(x), blocks(x.shape[1])), _sizes(x)
    native.quotients(_at(x), *sizes, _at(divisors), _at(out), _at(peaks))
    attach(out, "peaks", peaks)
    return out


def combined(x: Tensor, factors: Tensor, base: Tensor) -> Tensor:
    """factor · x + base for each row.

    Args:
        x: float `[K, d]`.
        factors: `[K, 1]`, of the dtype of x.
        base: `[d]` for all rows or `[K, d]`.
    Example:
        >>> combined(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.5]]), torch.tensor([1.0, 0.0]))
        tensor([[2.5000, 2.0000]])
    """
    return _combined(x, factors, base, None)[0]


def combined_and_added(x: Tensor, factors: Tensor, base: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """z = factor · x + base and own + z for each row, in one pass over the rows.

    Args:
        x, own: float `[K, d]`.
        factors: `[K, 1]`, of the dtype of x.
        base: `[d]` for all rows or `[K, d]`.
    Example:
        >>> x, own = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 1.0]])
        >>> combined_and_added(x, torch.tensor([[0.5]]), torch.tensor([1.0, 0.0]), own)
        (tensor([[2.5000, 2.0000]]), tensor([[3.5000, 3.0000]]))
    """
    return _combined(x, factors, base, own)


def _combined(x: Tensor, factors: Tensor, base: Tensor, own: Tensor | None) -> tuple[Tensor, Any]:
    native, out = _library(x), empty(x, x.shape)
    after = None if own is None else empty(x, x.shape)
    if native is None or not all(t is None or t.is_contiguous() for t in (x, base, own)):
        torch.addcmul(base, x, factors, out=out)
        return out, None if own is None else torch.add(own, out, out=after)
    stride = ctypes.c_int64(0 if base.dim() == 1 else x.shape[1])
    factors, peaks = factors.contiguous(), x.new_empty(len(x), blocks(x.shape[1]))
    added = (None if own is None else _at(own), _at(out), None if after is None else _at(after))
    native.combine(_at(x), *_sizes(x), _at(factors), _at(base), stride, *added, _at(peaks))
    attach(out, "peaks", peaks)
    return out, after


def rounded_rows(x: Tensor, exponent: int, limit: int, key: Key) -> Tensor:
    """Each number as a multiple of 2^-exponent, at random and without bias, and cut to ±limit · 2^-exponent.

    q = ⌊x · 2^exponent + u⌉,  u = (j + ½) / 2¹⁶ − ½ for a uniform 16-bit j: a number on the grid stays

    Args:
        x: float `[K, d]`.
        exponent: of the grid.
        limit: the largest |q|.
        key: one stream for each of the K clients.
    Returns:
        A new tensor `[K, d]`. A row with a number that is not finite is NaN: the client is dropped by name, and the
        limit would turn infinity into a number.
    Example:
        >>> rounded_rows(torch.tensor([[0.5, 9.0]]), 1, 2, Key(0).of(torch.tensor([4])))
        tensor([[0.5000, 1.0000]])
    """
    up, down = math.ldexp(1.0, exponent), math.ldexp(1.0, -exponent)
    native = _library(x) if type(key) is Key else None
    out = empty(x, x.shape)
    if native is None:
        for i, row in enumerate(x):
            _round_row(row, up, down, limit, key.select(slice(i, i + 1)), out[i])
        return out
    peaks, d = x.new_empty(len(x), blocks(x.shape[1])), ctypes.c_int64(x.shape[1])
    grid = tuple(map(ctypes.c_float, (up, down, limit)))
    states = key.state().expand(len(x)).tolist()
    for row, state, into, peak in zip(x, states, out, peaks, strict=True):
        native.round_row(_at(row), d, ctypes.c_uint64(state), *grid, _at(into), _at(peak))
    attach(out, "peaks", peaks)
    return out


def _round_row(row: Tensor, up: float, down: float, limit: int, key: Key, out: Tensor) -> None:
    lane = torch.mul(row, up, out=out)
    if not bool(torch.isfinite(lane.abs().amax() if len(lane) else lane.sum())):
        lane.fill_(math.nan)
        return
    words = key.hash(-(-len(lane) // 4)).reshape(-1)
    lane += words.view(torch.int16)[: len(lane)].to(lane.dtype).add_(0.5).mul_(2.0**-16)
    lane.round_().clamp_(-limit, limit).mul_(down)


def _library(x: Tensor) -> ctypes.CDLL | None:
    """The native library if it is built and can read these rows; otherwise None."""
    served = _NATIVE and x.dtype == torch.float32 and x.stride(-1) == 1
    return serving("bounded", x) if served else None


def _sizes(x: Tensor) -> tuple[ctypes.c_int64, ctypes.c_int64]:
    return ctypes.c_int64(x.shape[0]), ctypes.c_int64(x.shape[1])


def _at(row: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(row.data_ptr())


def _part(x: Tensor) -> int:
    """The numbers of a row that torch squares at once: whole blocks that stay in the cache."""
    return max(1, (1 << 18) // max(1, len(x) * BLOCK)) * BLOCK


def _block_sums(x: Tensor) -> Tensor:
    """Σ x² of each block, float64 `[K, blocks]`."""
    rest = x.shape[1] % BLOCK
    whole = x[:, : x.shape[1] - rest].unflatten(1, (-1, _RUNS, _LANES))
    lanes = min(_LANES, 1 << rest.bit_length())  # more lanes would add zeros
    last = pad(x[:, x.shape[1] - rest :], (0, -rest % lanes)).unflatten(1, (1, -1, lanes))
    return torch.cat([_lane_sums(runs) for runs in (whole, last) if runs.shape[1] * runs.shape[2]], 1)


def _lane_sums(runs: Tensor) -> Tensor:
    sums = runs[:, :, 0].double().square()
    for i in range(1, runs.shape[2]):
        sums += runs[:, :, i].double().square()
    return _halved(sums)[..., 0]


def _halved(x: Tensor) -> Tensor:
    """The sum over the last axis, `[..., 1]`: the upper half is added to the lower one until one number is left."""
    while (n := x.shape[-1]) > 1:
        half = -(-n // 2)
        x = x[..., :half] + pad(x[..., half:], (0, half - (n - half)))
    return x
