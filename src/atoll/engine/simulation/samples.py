"""Random numbers of a fleet for one population and seed: tables that are filled in blocks at first use.

Tests: tests/identities/test_fleet.py, tests/identities/test_clock.py.
"""

from __future__ import annotations

import hashlib
import math
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from atoll.base.errors import UsageError
from atoll.base.random import Key
from atoll.engine.simulation import availability
from atoll.engine.simulation.fleet import ByRows, Chance, Distribution, Draw, Fleet, Presence, Trace, rate

_BLOCK = 12  # draws are made for 2¹² clients or flights at once
_KEPT = 64  # blocks of flights in the cache: ordinals grow, and a draw for an old ordinal is computed again


class Table:
    """One number for each client or flight, drawn in blocks at first use. Copies of a clock share the table.

    Args:
        given: a constant or a distribution.
        key: the key of the draws.
        sizes: the number of rows of each client, int64 `[C]`.
    """

    def __init__(self, given: float | Distribution, key: Key, sizes: Tensor) -> None:
        self._clients = len(sizes)
        self._blocks: dict[int, list[float]] = {}
        self._share = ByRows.share(sizes).tolist() if isinstance(given, ByRows) else None
        self._same: float | None = None
        self._flight = False
        if isinstance(given, Distribution):
            self._draw: Draw = given.draws(key, sizes)
            self._flight = given.per == "flight"
            self._bounds = given.bounds
        else:
            self._same = float(given)

    def at(self, client: int, number: int) -> float:
        if self._same is not None:
            return self._same
        i = number if self._flight else client
        block = self._blocks.get(i >> _BLOCK)
        if block is None:
            block = self._fill(i >> _BLOCK)
        value = block[i & ((1 << _BLOCK) - 1)]
        return value if self._share is None else value * self._share[client]

    def _fill(self, block: int) -> list[float]:
        first, last = block << _BLOCK, (block + 1) << _BLOCK
        if self._flight and len(self._blocks) >= _KEPT:
            del self._blocks[next(iter(self._blocks))]
        ids = torch.arange(first, last if self._flight else min(last, self._clients))
        values: list[float] = self._draw(ids).tolist()
        self._blocks[block] = values
        return values

    def extreme(self, which: int) -> Tensor:
        """The smallest (`which` = 0) or largest (1) possible value of each client, float64 `[C]`."""
        if self._same is not None:
            return torch.full((self._clients,), self._same, dtype=torch.float64)
        if self._flight:
            values = torch.full((self._clients,), self._bounds[which], dtype=torch.float64)
        else:
            values = self._draw(torch.arange(self._clients))
        return values if self._share is None else values * torch.tensor(self._share, dtype=torch.float64)


class DropoutTime(NamedTuple):
    """The fraction of its compute time at which a flight is lost: uniform in [0, 1) with probability `chance`, else 2.

    A value of 2 means that the flight is not lost.
    """

    chance: float
    per: str = "flight"
    bounds: tuple[float, float] = (0.0, 2.0)

    def draws(self, key: Key, sizes: Tensor) -> Draw:
        def draw(ids: Tensor) -> Tensor:
            coin, moment = key.of(ids).uniform(2).unbind(-1)
            return torch.where(coin < self.chance, moment, 2.0)

        return draw


class Draws:
    """All random numbers of a fleet for one population and seed. They are pure functions; results are cached.

    Args:
        fleet: durations, availability and dropout.
        sizes: the number of rows of each client, int64 `[C]`, ≥ 0; C ≥ 1.
        seed: the key of every draw.
    Raises:
        UsageError: `sizes` is not of this form, or a distribution of the fleet is for another number of clients.
    """

    def __init__(self, fleet: Fleet, sizes: Tensor, seed: int) -> None:
        if sizes.ndim != 1 or sizes.is_floating_point() or not len(sizes) or int(sizes.min()) < 0:
            raise UsageError(
                f"Sizes of shape {tuple(sizes.shape)} and type {sizes.dtype}.",
                "int64 [C] with C ≥ 1: the rows of each client, each ≥ 0.",
            )
        key = Key(seed).fold("clock")

        def table(name: str, given: float | Distribution) -> Table:
            return Table(given, key.fold(name), sizes)

        def link(name: str, given: str | float | Distribution | None) -> Table:
            plain = math.inf if given is None else given if isinstance(given, Distribution) else rate(given)
            return table(name, plain)

        self.clients = len(sizes)
        self.compute, self.latency = table("compute", fleet.compute), table("latency", fleet.latency)
        self.up, self.down = link("uplink", fleet.uplink), link("downlink", fleet.downlink)
        self.lost = table("dropout", DropoutTime(fleet.dropout)) if fleet.dropout else table("dropout", 2.0)
        self.server = None if fleet.server is None else rate(fleet.server)
        presence = fleet.availability if isinstance(fleet.availability, Presence) else Chance(fleet.availability)
        self.calendar = presence.calendar(key.fold("availability"), len(sizes))
        self._what = (fleet, sizes.clone(), seed)

    @cached_property
    def fingerprint(self) -> int:
        """63 bits of SHA-256 over the fleet, the contents of its traces, the population and the seed."""
        fleet, sizes, seed = self._what
        whole = hashlib.sha256(repr((fleet, seed)).encode())
        whole.update(sizes.to(torch.int64).numpy().tobytes())
        for given, table in (
            (fleet.compute, self.compute),
            (fleet.latency, self.latency),
            (fleet.uplink, self.up),
            (fleet.downlink, self.down),
        ):
            if isinstance(given.distribution if isinstance(given, ByRows) else given, Trace):
                whole.update(repr(table.extreme(0).tolist()).encode())
        if isinstance(self.calendar, availability.Repeating):
            whole.update(repr(self.calendar.windows).encode())
        return int.from_bytes(whole.digest()[:8], "little") >> 1
