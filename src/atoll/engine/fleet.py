"""Fleets as values: how fast clients compute, what their links carry, when they are there, how often they are lost.

    Fleet(compute=HalfNormal(), uplink=LogNormal(1.25e6, 0.5), server="1 Gb/s", availability=0.8, dropout=0.05)

Every number that a client or a flight draws is keyed by the seed, and by the client or the flight's ordinal alone.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import count
from numbers import Real
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from atoll.engine import calendars, traces
from atoll.errors import UsageError
from atoll.fields import check, number, repaired
from atoll.grammar import Value
from atoll.rng import Key

LARGEST = 1e15
_TOO_LARGE = "above 1e15, float64 no longer tells tenths of a second apart."
_SMALLEST = 1e-12  # of the scale: the laws that reach 0 do so with chance 2⁻⁵³, and a rate of 0 would never arrive
_MOST_RANK = 10**6
_RATE = re.compile(r"([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([kKMGT]?)(i?)([bB])/s")
_PREFIX = {"": 0, "k": 1, "K": 1, "M": 2, "G": 3, "T": 4}

Draw = Callable[[Tensor], Tensor]


@runtime_checkable
class Distribution(Protocol):
    """A positive number for each client or flight.

    `draws` is bound to a population, int64 `[C]` rows a client; it gives a function of int64 `[K]` ids (clients, or
    ordinals of flights) to float64 `[K]`. `bounds` are the least and the largest that it can give.
    """

    @property
    def per(self) -> str: ...
    @property
    def bounds(self) -> tuple[float, float]: ...
    def draws(self, key: Key, sizes: Tensor) -> Draw: ...


def rate(text: str | float) -> float:
    """Bytes per second, out of a text or a number.

    Args:
        text: a number, a prefix k M G T (of 1000) or Ki Mi Gi Ti (of 1024), and b/s (bits) or B/s (bytes); a plain
            number is bytes per second.
    Raises:
        UsageError: it is none of these, or not above 0.
    Example:
        >>> rate("100 Mb/s"), rate("1.5 MB/s"), rate(2000)
        (12500000.0, 1500000.0, 2000.0)
    """
    value = math.nan
    if isinstance(text, str):
        found = _RATE.fullmatch(text.strip())
        if found and not (found[3] and not found[2]):
            try:
                scale = (1024 if found[3] else 1000) ** _PREFIX[found[2]]
                value = float(found[1]) * scale / (8 if found[4] == "b" else 1)
            except ValueError:  # "1.2.3"
                value = math.nan
    elif isinstance(text, Real) and not isinstance(text, bool):
        value = float(text)
    if not 0 < value <= LARGEST:
        raise UsageError(
            f"A rate of {text!r}.",
            "a number above 0 and a unit, b/s (bits) or B/s (bytes), or bytes per second as a number, at most 1e15.",
            write="'100 Mb/s'",
        )
    return value


def _per(value: Any) -> None:
    """Read the numbers of a distribution and refuse a `per` that is neither word."""
    check(value)
    if value.per not in ("client", "flight"):
        raise UsageError(
            f"{type(value).__name__} was given per = {value.per!r}.",
            "'client' (one draw, kept for all its flights) or 'flight' (drawn anew for each).",
            write=repaired(value, per="client"),
        )


def _scale(default: Any = 1.0) -> Any:
    return number(default, above=0, most=LARGEST, example=1.0, why=_TOO_LARGE)


@dataclass(frozen=True, repr=False)
class HalfNormal(Value):
    """scale·|N(0, 1)|: mean .798 scale. Among 100 clients the slowest takes 3.44 means.

    Args:
        scale: above 0.
        per: "client" or "flight".
    Example:
        >>> HalfNormal(2.0).draws(Key(7), torch.ones(3))(torch.arange(3)).shape
        torch.Size([3])

    Reference: Nguyen et al., Federated Learning with Buffered Asynchronous Aggregation, 2022.
    """

    scale: float = _scale()
    per: str = "client"

    def __post_init__(self) -> None:
        _per(self)

    @property
    def bounds(self) -> tuple[float, float]:
        return 0.0, math.inf

    def draws(self, key: Key, sizes: Tensor) -> Draw:
        return lambda ids: key.of(ids).normal(1)[:, 0].abs().clamp_min(_SMALLEST) * self.scale


@dataclass(frozen=True, repr=False)
class LogNormal(Value):
    """median·exp(sigma·N(0, 1)).

    Args:
        median: above 0.
        sigma: standard deviation of the logarithm, in [0, 20].
        per: "client" or "flight".
    """

    median: float = _scale()
    sigma: float = number(1.0, least=0, most=20)
    per: str = "client"

    def __post_init__(self) -> None:
        _per(self)

    @property
    def bounds(self) -> tuple[float, float]:
        return 0.0, math.inf

    def draws(self, key: Key, sizes: Tensor) -> Draw:
        return lambda ids: torch.exp(key.of(ids).normal(1)[:, 0] * self.sigma) * self.median


@dataclass(frozen=True, repr=False)
class Exponential(Value):
    """Exponential law: P(x > t) = exp(−t/mean).

    Args:
        mean: above 0.
        per: "client" or "flight".
    """

    mean: float = _scale()
    per: str = "client"

    def __post_init__(self) -> None:
        _per(self)

    @property
    def bounds(self) -> tuple[float, float]:
        return 0.0, math.inf

    def draws(self, key: Key, sizes: Tensor) -> Draw:
        return lambda ids: (-torch.log1p(-key.of(ids).uniform(1)[:, 0])).clamp_min(_SMALLEST) * self.mean


@dataclass(frozen=True, repr=False)
class Zipf(Value):
    """scale·k with P(k) ∝ k⁻ᵃ for k = 1 … 10⁶: most are as fast as the fastest, a few are slower by magnitudes.

    Each client (or flight) draws its own k; there are no ranks to share out. What the law without an end puts above
    10⁶ is drawn again.

    Args:
        a: in (1, 10], at least 1.01.
        scale: the value of k = 1, above 0.
        per: "client" or "flight".
    Reference: Devroye, Non-Uniform Random Variate Generation, 1986, X.6.1.
    """

    a: float = number(2.0, least=1.01, most=10, why="the sum of k⁻ᵃ is finite for a > 1 alone.")
    scale: float = _scale()
    per: str = "client"

    def __post_init__(self) -> None:
        _per(self)

    @property
    def bounds(self) -> tuple[float, float]:
        return self.scale, self.scale * _MOST_RANK

    def draws(self, key: Key, sizes: Tensor) -> Draw:
        power, b = self.a - 1, 2 ** (self.a - 1)

        def draw(ids: Tensor) -> Tensor:
            k = torch.ones(len(ids), dtype=torch.float64)
            left = torch.arange(len(ids))
            for attempt in count():
                u, v = key.fold(attempt).of(ids[left]).uniform(2).unbind(-1)
                x = torch.floor((1 - u) ** (-1 / power))
                t = (1 + 1 / x) ** power
                taken = (x <= _MOST_RANK) & (v * x * (t - 1) / (b - 1) <= t / b)
                k[left[taken]] = x[taken]
                left = left[~taken]
                if not len(left):
                    break
            return k * self.scale

        return draw


@dataclass(frozen=True, repr=False)
class Between(Value):
    """Uniform in [low, high).

    Args:
        low: above 0.
        high: above low.
        per: "client" or "flight".
    """

    low: float = number(above=0, most=LARGEST, example=0.5)
    high: float = number(above=0, most=LARGEST, example=1.5, why=_TOO_LARGE)
    per: str = "client"

    def __post_init__(self) -> None:
        _per(self)
        if self.low >= self.high:
            raise UsageError(
                f"Between({self.low:g}, high={self.high:g}).",
                "low < high.",
                write=repr(replace(self, low=self.high, high=self.low) if self.low > self.high
                           else replace(self, low=self.low / 2)),
            )  # fmt: skip

    @property
    def bounds(self) -> tuple[float, float]:
        return self.low, self.high

    def draws(self, key: Key, sizes: Tensor) -> Draw:
        return lambda ids: self.low + key.of(ids).uniform(1)[:, 0] * (self.high - self.low)


@dataclass(frozen=True, repr=False)
class Each(Value):
    """Client i has values[i].

    Args:
        values: a number above 0 for each client.
    Raises:
        UsageError: a value is no number above 0; or, when a clock is made, there are not as many as clients.
    Example:
        >>> Each((1, 1, 5))
        Each((1.0, 1.0, 5.0))
    """

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        values = tuple(self.values) if isinstance(self.values, (tuple, list)) else (self.values,)
        good = [isinstance(v, Real) and not isinstance(v, bool) and 0 < float(v) <= LARGEST for v in values]
        if not isinstance(self.values, (tuple, list)) or not values or not all(good):
            mended = tuple(float(v) if fine else 1.0 for v, fine in zip(values, good, strict=True)) or (1.0,)
            raise UsageError(
                f"Each was given {self.values!r}.",
                "a tuple with a number for each client, 0 < it ≤ 1e15.",
                write=repr(Each(mended)),
            )
        object.__setattr__(self, "values", tuple(map(float, values)))

    @property
    def per(self) -> str:
        return "client"

    @property
    def bounds(self) -> tuple[float, float]:
        return min(self.values), max(self.values)

    def draws(self, key: Key, sizes: Tensor) -> Draw:
        if len(self.values) != len(sizes):
            mended = (self.values * -(-len(sizes) // len(self.values)))[: len(sizes)]
            raise UsageError(
                f"Each has {len(self.values)} values, and there are {len(sizes)} clients.",
                "one value for each client.",
                write=repr(Each(mended)) if len(sizes) <= 100 else "",
            )
        values = torch.tensor(self.values, dtype=torch.float64)
        return lambda ids: values[ids]


@dataclass(frozen=True, repr=False)
class Trace(Value):
    """A number for each client out of a CSV file with a header: the columns `client` (0 … C−1) and `column`.

    The file is read when a clock is made, not when the value is: reading a plan opens no file.

    Args:
        path: of the file.
        column: the column of numbers, each above 0.
    """

    path: str
    column: str = "value"

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", _path(self))

    @property
    def per(self) -> str:
        return "client"

    @property
    def bounds(self) -> tuple[float, float]:
        return 0.0, math.inf

    def draws(self, key: Key, sizes: Tensor) -> Draw:
        values = traces.values(self.path, self.column, len(sizes))
        return lambda ids: values[ids]


def _path(value: Any) -> str:
    """The path of a value that names a file."""
    if not isinstance(value.path, (str, os.PathLike)) or not os.fspath(value.path):
        raise UsageError(
            f"{type(value).__name__} was given path = {value.path!r}.",
            "the path of a CSV file.",
            write=repr(replace(value, path="fleet.csv")),
        )
    return str(os.fspath(value.path))


@dataclass(frozen=True, repr=False)
class ByRows(Value):
    """A distribution times rows / mean rows of the client: who holds more computes longer.

    Args:
        distribution: of seconds, for a client with the mean number of rows; a number is a constant.
    Example:
        >>> ByRows(HalfNormal())
        ByRows(HalfNormal())
    """

    distribution: float | Distribution = number(1.0, above=0, most=LARGEST, also=Distribution, why=_TOO_LARGE)

    def __post_init__(self) -> None:
        check(self)
        if isinstance(self.distribution, ByRows):
            raise UsageError(
                "ByRows of ByRows.", "a distribution that does not know of rows.", write=repr(self.distribution)
            )

    @property
    def per(self) -> str:
        return "client" if isinstance(self.distribution, float) else self.distribution.per

    @property
    def bounds(self) -> tuple[float, float]:
        return (self.distribution,) * 2 if isinstance(self.distribution, float) else self.distribution.bounds

    def draws(self, key: Key, sizes: Tensor) -> Draw:
        """The draws before they are multiplied: a flight's ordinal does not tell its client; see `share`."""
        given = self.distribution
        if isinstance(given, float):
            return lambda ids: torch.full((len(ids),), given, dtype=torch.float64)
        return given.draws(key, sizes)

    @staticmethod
    def share(sizes: Tensor) -> Tensor:
        """rows / mean rows, float64 `[C]`."""
        if not int(sizes.sum()):
            raise UsageError(
                "ByRows, and no client holds a row.", "at least one row.", "the mean is what divides.", "1.0"
            )
        return sizes.to(torch.float64) / sizes.to(torch.float64).mean()


@dataclass(frozen=True, repr=False)
class Chance(Value):
    """In each window of time a client is there with this chance, by its own keyed coin, for the whole window.

    Args:
        chance: in (0, 1].
        window: seconds, above 0.
    """

    chance: float = number(0.5, above=0, most=1, why="somebody must be there to be started.")
    window: float = _scale()

    def __post_init__(self) -> None:
        check(self)

    def calendar(self, key: Key, clients: int) -> calendars.Calendar:
        if self.chance == 1:
            return calendars.Always(clients)
        return calendars.Coins(self.chance, self.window, key, clients)


@dataclass(frozen=True, repr=False)
class Windows(Value):
    """When each client is there, out of a CSV file with a header: the columns client, start, end (seconds).

    A client is there for start ≤ t < end; the whole repeats with the latest end of all as its period. The file is
    read when a clock is made.

    Args:
        path: of the file.
    """

    path: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", _path(self))

    def calendar(self, key: Key, clients: int) -> calendars.Calendar:
        return calendars.Repeating(traces.windows(self.path, clients))


@runtime_checkable
class Presence(Protocol):
    """When clients are there: bound to a population, a calendar."""

    def calendar(self, key: Key, clients: int) -> calendars.Calendar: ...


@dataclass(frozen=True, repr=False)
class Fleet(Value):
    """What time costs: a flight is download, compute, upload; the default takes one second, and links cost nothing.

    Args:
        compute: seconds of one flight's work, a number or a distribution. Where a client's steps follow a schedule,
            those of round 0; other rounds take in proportion.
        uplink, downlink: each client's own link: a rate ("10 Mb/s", or bytes per second) or a distribution of bytes
            per second; None: infinitely fast.
        server: rate of the server's own link, shared by all transfers, one pool down and one up; None: no limit.
        availability: the chance that a client may be started, by windows of one second; `Chance(q, window=60)` for
            others; or `Windows(path)`. Who is in flight when its window ends flies on.
        dropout: the chance that a flight never arrives, in [0, 1): it ends at a keyed moment, uniform in its compute
            time.
        latency: seconds before a transfer is heard at the other end, each way; a number or a distribution.
    Raises:
        UsageError: a number outside its range, a text that is no rate, a rate by rows.
    Example:
        >>> Fleet(HalfNormal(), server="100 Mb/s", dropout=0.1)
        Fleet(HalfNormal(), server='100 Mb/s', dropout=0.1)
    """

    compute: float | Distribution = number(1.0, least=0, most=LARGEST, also=Distribution, why=_TOO_LARGE)
    uplink: str | float | Distribution | None = None
    downlink: str | float | Distribution | None = None
    server: str | float | None = None
    availability: float | Presence = number(1.0, above=0, most=1, also=Presence, why="somebody must be there.")
    dropout: float = number(0.0, least=0, below=1, why="if every flight were lost, no round would close.")
    latency: float | Distribution = number(0.0, least=0, most=LARGEST, also=Distribution, why=_TOO_LARGE)

    def __post_init__(self) -> None:
        check(self)
        for name in ("uplink", "downlink", "server"):
            given = getattr(self, name)
            if isinstance(given, ByRows) or (name == "server" and isinstance(given, Distribution)):
                raise UsageError(
                    f"Fleet was given {name} = {given!r}.",
                    "a rate." if name == "server" else "a rate, or a distribution of rates.",
                    "there is one server." if name == "server" else "who holds no rows would never arrive.",
                    repaired(self, **{name: "100 Mb/s"}),
                )
            if given is not None and not isinstance(given, Distribution):
                try:
                    read = rate(given)
                except UsageError as error:
                    raise UsageError(
                        f"Fleet was given {name} = {given!r}.",
                        error.required,
                        write=repaired(self, **{name: "100 Mb/s"}),
                    ) from None
                if not isinstance(given, str):
                    object.__setattr__(self, name, read)


FLEET: Mapping[str, Callable[..., Any]] = {
    value.__name__: value
    for value in (Fleet, HalfNormal, LogNormal, Zipf, Exponential, Between, Each, Trace, ByRows, Chance, Windows)
}
