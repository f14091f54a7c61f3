"""Groups: how a long vector is cut for work in the cache, with draws and sums over the groups.

A vector is cut into groups of 65,536 coordinates. The rest becomes the last group; if the rest has fewer than 4,096
coordinates, it is joined to the group before it. The cut depends only on the length, and it is part of the message
formats: packed codes, rotations and buckets never cross the end of a group. Every sum here has a fixed order, so the
bits of a lane depend only on that lane.

Tests: tests/identities/test_codec_algebra.py, tests/golden/test_codec_bytes.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from atoll.base.random import Key, mix64

GROUP = 1 << 16
LEAST = 1 << 12
_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # the step of SplitMix64, as a signed word


def group_lengths(d: int) -> tuple[tuple[int, int], ...]:
    """Pairs of a number of groups and their length: the full groups, then the last group if its length differs.

    Example:
        >>> group_lengths(1000), group_lengths(200_000)
        (((1, 1000),), ((2, 65536), (1, 68928)))
    """
    whole, rest = divmod(d, GROUP)
    if whole and 0 < rest < LEAST:
        whole, rest = whole - 1, rest + GROUP
    return (((whole, GROUP),) if whole else ()) + (((1, rest),) if rest else ())


def groups_of(d: int) -> int:
    """The number of groups."""
    return sum(count for count, _ in group_lengths(d))


def length_of(d: int, length: Callable[[int], int]) -> int:
    """Σ length(n) over all groups."""
    return sum(count * length(n) for count, n in group_lengths(d))


def parts(x: Tensor) -> list[Tensor]:
    """Views `[K, groups, n]` of lanes `[K, d]`."""
    return split(x, x.shape[-1], lambda n: n)


def split(x: Tensor, d: int, length: Callable[[int], int]) -> list[Tensor]:
    """Views `[K, groups, length(n)]` of the numbers that belong to each group of n coordinates out of d."""
    out, start = [], 0
    for count, n in group_lengths(d):
        width = length(n)
        out.append(x[:, start : start + count * width].unflatten(-1, (count, width)))
        start += count * width
    return out


def room(groups: int = 1) -> int:
    """How many numbers to process per operation: few enough for the cache, enough to outweigh the call's overhead."""
    return groups * GROUP * max(2, min(torch.get_num_threads(), 8))


def batches(*cuts: list[Tensor], groups: int = 1) -> Iterator[tuple[Any, ...]]:
    """Iterate over several cuts of the same lanes: on the CPU about `room(groups)` numbers at a time, else all at once.

    Yields:
        (number of the part, slice of the lanes, then the views `[k, g, …]` of each cut); on the CPU k or g is 1.
    """
    for i, views in enumerate(zip(*cuts, strict=True)):
        lanes, length, n = views[0].shape
        many = few = max(1, room(groups) // max(1, n))
        if views[0].device.type != "cpu":
            many, few = lanes, length
        elif length > 1:
            many = 1
        for k in range(0, lanes, max(1, many)):
            for g in range(0, length, max(1, few)):
                lane = slice(k, min(k + many, lanes))
                yield i, lane, *(view[lane, g : g + few] for view in views)


def words(state: Tensor, n: int) -> Tensor:
    """n 64-bit words of the stream of each state, int64 `[..., n]`: SplitMix64, as in `Key.hash`."""
    return mix64(state[..., None] + _steps(n, state.device))


@lru_cache(maxsize=8)
def _steps(n: int, device: torch.device) -> Tensor:
    return torch.arange(1, n + 1, device=device) * _GOLDEN


def group_states(key: Key, lanes: int, d: int, device: torch.device) -> list[Tensor]:
    """The state of a stream for each lane and group, int64 `[K, groups]`, by part."""
    states = words(key.state().to(device), groups_of(d)).expand(lanes, -1)
    return [view[..., 0] for view in split(states, d, lambda n: 1)]


def dither(state: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """n numbers (j + ½)/2¹⁶ − ½ for uniform 16-bit j, `[..., n]`: symmetric about 0, never ±½."""
    draws: Tensor = words(state, -(-n // 4)).view(torch.int16)[..., :n].to(dtype)
    return draws.add_(0.5).mul_(2.0**-16)


def signs(state: Tensor, n: int) -> Tensor:
    """n signs ±1 of equal probability, int8 `[..., n]`: the top bits of the bytes of n/8 words."""
    fair: Tensor = (words(state, -(-n // 8)).view(torch.int8)[..., :n] >> 7) | 1
    return fair


def ordered_sum(x: Tensor, columns: int = 1) -> Tensor:
    """The sums over m rows, `[..., m·columns]` to `[..., columns]`, in an order that depends only on m and columns.

    Runs of 64 rows are added in parallel, then the results of the runs are added in the same way. `torch.sum` over the
    last axis would split a single lane differently from several lanes.

    Example:
        >>> ordered_sum(torch.arange(6.0)), ordered_sum(torch.arange(6.0), columns=2)
        (tensor([15.]), tensor([6., 9.]))
    """
    while (m := x.shape[-1] // columns) > 1:
        rows = min(64, m)
        width = m // rows * columns
        rest = x[..., rows * width :]
        x = x[..., : rows * width].unflatten(-1, (rows, width)).sum(-2)
        if rest.shape[-1]:
            x = torch.cat((x, rest), -1)
    return x


def lane_sum(x: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
    """Σ of(x) over each lane `[K, d]` in a fixed order, group by group, `[K, 1]`."""
    sums = x.new_empty(len(x), groups_of(x.shape[-1]))
    for _, _, rows, out in batches(parts(x), split(sums, x.shape[-1], lambda n: 1)):
        out.copy_(ordered_sum(of(rows)))
    return ordered_sum(sums)


def buckets(x: Tensor, size: int) -> Tensor:
    """Rows `[..., n]` as buckets `[..., ⌈n/size⌉, size]`, the last one padded with zeros."""
    lack = -x.shape[-1] % size
    rows: Tensor = (pad(x, (0, lack)) if lack else x).unflatten(-1, (-1, size))
    return rows
