"""Calendars: a calendar states for each client and each time whether the client is available.

Each calendar has these three methods. Times are in seconds, and the results depend on the arguments only.

available(client, now)      whether this client is available at time `now`
present(now)                whether each client is available at time `now`, bool [C], one entry for each client
next_change(now)            the first time after `now` at which a client can become available or unavailable

Tests: tests/identities/test_fleet.py, tests/identities/test_clock.py.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import Protocol

import torch
from torch import Tensor

from atoll.base.random import Key

_BLOCK = 10  # draws are made for 2¹⁰ clients at once
_KEPT = 4096  # blocks in the cache


class Calendar(Protocol):
    def available(self, client: int, now: float) -> bool: ...
    def present(self, now: float) -> Tensor: ...
    def next_change(self, now: float) -> float: ...


def window_index(now: float, length: float) -> int:
    """The index i of the window that contains `now`: i·length ≤ now < (i+1)·length, with products in float64.

    Args:
        now: seconds, ≥ 0.
        length: length of a window in seconds, > 0.

    Example:
        >>> window_index(2.0, 0.5), window_index(0.3, 0.1)
        (4, 2)
    """
    # Division and multiplication round differently: 0.3 / 0.1 < 3. For other values the quotient is too large.
    i = math.floor(now / length)
    if (i + 1) * length <= now:
        return i + 1
    return i - 1 if i * length > now else i


class Always:
    """Every client is available at any time."""

    def __init__(self, clients: int) -> None:
        self._clients = clients

    def available(self, client: int, now: float) -> bool:
        return True

    def present(self, now: float) -> Tensor:
        return torch.ones(self._clients, dtype=torch.bool)

    def next_change(self, now: float) -> float:
        return math.inf


class BernoulliWindows:
    """One Bernoulli draw for each client and window: the client is available for the whole window or not at all."""

    def __init__(self, chance: float, window: float, key: Key, clients: int) -> None:
        self._chance, self._window, self._key, self._clients = chance, window, key, clients
        self._tossed: dict[tuple[int, int], bytes] = {}

    def _toss(self, window: int, first: int, last: int) -> Tensor:
        words = self._key.fold(window).of(torch.arange(first, last)).hash(1)[:, 0]
        return ((words >> 11) & ((1 << 53) - 1)).to(torch.float64) * 2.0**-53 < self._chance

    def available(self, client: int, now: float) -> bool:
        window, block = window_index(now, self._window), client >> _BLOCK
        tossed = self._tossed.get((window, block))
        if tossed is None:
            if len(self._tossed) >= _KEPT:
                self._tossed.clear()
            first = block << _BLOCK
            tossed = bytes(self._toss(window, first, min(first + (1 << _BLOCK), self._clients)).tolist())
            self._tossed[window, block] = tossed
        return bool(tossed[client - (block << _BLOCK)])

    def present(self, now: float) -> Tensor:
        return self._toss(window_index(now, self._window), 0, self._clients)

    def next_change(self, now: float) -> float:
        return (window_index(now, self._window) + 1) * self._window


class Repeating:
    """Windows of each client, in order of time. All windows repeat; the period is the latest end of a window."""

    def __init__(self, windows: list[list[tuple[float, float]]]) -> None:
        self.windows = windows
        self._starts = [[start for start, _ in spans] for spans in windows]
        self._edges = sorted({edge for spans in windows for span in spans for edge in span})
        self._period = self._edges[-1]

    def available(self, client: int, now: float) -> bool:
        # Compare base + edge, the value that next_change returns, so that both methods agree to the bit.
        base = window_index(now, self._period) * self._period
        spans = self.windows[client]
        at = bisect_right(self._starts[client], now - base)
        return any(base + start <= now < base + end for start, end in spans[max(at - 1, 0) : at + 1])

    def present(self, now: float) -> Tensor:
        return torch.tensor([self.available(client, now) for client in range(len(self.windows))])

    def next_change(self, now: float) -> float:
        i = window_index(now, self._period)
        base = i * self._period
        for at in range(bisect_right(self._edges, now - base), len(self._edges) - 1):
            if base + self._edges[at] > now:
                return base + self._edges[at]
        return (i + 1) * self._period
