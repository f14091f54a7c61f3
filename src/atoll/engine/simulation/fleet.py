"""Fleets as values: compute times and link rates of simulated clients, their availability, and the rate of dropout.

    Fleet(compute=HalfNormal(), uplink=LogNormal(1.25e6, 0.5), server="1 Gb/s", availability=0.8, dropout=0.05)

A flight is one trip of a client: it downloads the model, computes, and uploads its update. The key of every random
number is the seed together with the client's id or the flight's ordinal. The number depends on nothing else.

Tests: tests/identities/test_fleet.py, tests/identities/test_clock.py.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from atoll.base.errors import UsageError
from atoll.base.grammar import Value
from atoll.base.random import Key
from atoll.base.validation import bounded_number, check_fields, plain_number, repaired
from atoll.engine.simulation import availability, traces

LARGEST = 1e15
_TOO_LARGE = "above 1e15, float64 does not resolve tenths of a second."
_SMALLEST = 1e-12  # in units of the scale: some laws give 0 with probability 2⁻⁵³, and a transfer at rate 0 never ends
_MOST_RANK = 10**6
_RATE = re.compile(r"([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([kKMGT]?)(i?)([bB])/s")
_PREFIX = {"": 0, "k": 1, "K": 1, "M": 2, "G": 3, "T": 4}

Draw = Callable[[Tensor], Tensor]


@runtime_checkable
class Distribution(Protocol):
    """A positive random number for each client or for each flight.

    `per` is "client" or "flight". `bounds` are the smallest and the largest possible value. `draws(key, sizes)` takes
    the rows of each client, int64 `[C]`. It returns a function from ids, int64 `[K]`, to values, float64 `[K]`. The ids
    are clients or ordinals of flights, as `per` names.
    """

    @property
    def per(self) -> str: ...
    @property
    def bounds(self) -> tuple[float, float]: ...
    def draws(self, key: Key, sizes: Tensor) -> Draw: ...


def rate(text: str | float) -> float:
    """Convert a rate to bytes per second.

    Args:
        text: a text made of a number, a prefix k M G T (of 1000) or Ki Mi Gi Ti (of 1024), and b/s (bits) or B/s
            (bytes); or a number of bytes per second.
    Returns:
        Bytes per second, in (0, 1e15].
    Raises:
        UsageError: the text has another form, or the rate is outside (0, 1e15].
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
    elif isinstance(number := plain_number(text), (int, float)) and not isinstance(number, bool):
        value = float(number)
    if not 0 < value <= LARGEST:
        raise UsageError(
            f"A rate of {text!r}.",
            "a number above 0 and a unit, b/s (bits) or B/s (bytes), or bytes per second as a number, at most 1e15.",
            write="'100 Mb/s'",
        )
    return value


def _per(value: Any) -> None:
    """Validate the numbers of a distribution and its `per`."""
    check_fields(value)
    if value.per not in ("client", "flight"):
        raise UsageError(
            f"{type(value).__name__} has per = {value.per!r}.",
            "'client' (one draw for all flights of a client) or 'flight' (one draw for each flight).",
            write=repaired(value, per="client"),
        )


def _scale(default: Any = 1.0) -> Any:
    return bounded_number(default, above=0, most=LARGEST, example=1.0, why=_TOO_LARGE)


@dataclass(frozen=True, repr=False)
class HalfNormal(Value):
    """scale·|N(0, 1)|. The mean is 0.798·scale. The slowest of 100 clients takes 3.44 times the mean.

    Args:
        scale: the scale of the distribution, in (0, 1e15].
        per: "client", one draw for each client; or "flight", one draw for each flight.
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
    """median·exp(sigma·N(0, 1)), the log-normal law.

    Args:
        median: the median of the distribution, in (0, 1e15].
        sigma: standard deviation of the logarithm, in [0, 20].
        per: "client", one draw for each client; or "flight", one draw for each flight.
    Example:
        >>> LogNormal(2, sigma=0.5)
        LogNormal(2.0, sigma=0.5)
    """

    median: float = _scale()
    sigma: float = bounded_number(1.0, least=0, most=20)
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
    """The exponential law: P(x > t) = exp(−t/mean).

    Args:
        mean: the mean of the distribution, in (0, 1e15].
        per: "client", one draw for each client; or "flight", one draw for each flight.
    Example:
        >>> Exponential(3)
        Exponential(3.0)
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
    """scale·k with P(k) ∝ k⁻ᵃ for k = 1 … 10⁶: many values equal `scale`, and a few are larger by orders of magnitude.

    Each client or flight draws its own k, independently. Draws of the untruncated law above 10⁶ are repeated.

    Args:
        a: the exponent, in [1.01, 10].
        scale: the value for k = 1, in (0, 1e15].
        per: "client", one draw for each client; or "flight", one draw for each flight.
    Example:
        >>> Zipf(1.8).draws(Key(7), torch.ones(3))(torch.arange(3)).min() >= 1
        tensor(True)

    Reference: Devroye, Non-Uniform Random Variate Generation, 1986, X.6.1.
    """

    a: float = bounded_number(2.0, least=1.01, most=10, why="the sum of k⁻ᵃ is finite only if a > 1.")
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
    """The uniform law in [low, high).

    Args:
        low: the lower limit, in (0, 1e15].
        high: the upper limit, in (low, 1e15].
        per: "client", one draw for each client; or "flight", one draw for each flight.
    Raises:
        UsageError: a value is outside its range, or low ≥ high.
    Example:
        >>> Between(0.5, 2).bounds
        (0.5, 2.0)
    """

    low: float = bounded_number(above=0, most=LARGEST, example=0.5)
    high: float = bounded_number(above=0, most=LARGEST, example=1.5, why=_TOO_LARGE)
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
    """Explicit values: client i has values[i].

    Args:
        values: one number for each client, in (0, 1e15].
    Raises:
        UsageError: a value is outside its range; or, when a clock is built, the number of values differs from the
            number of clients.
    Example:
        >>> Each((1, 1, 5))
        Each((1.0, 1.0, 5.0))
    """

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        values = tuple(map(plain_number, self.values)) if isinstance(self.values, (tuple, list)) else (self.values,)
        good = [isinstance(v, (int, float)) and not isinstance(v, bool) and 0 < v <= LARGEST for v in values]
        if not isinstance(self.values, (tuple, list)) or not values or not all(good):
            mended = tuple(float(v) if fine else 1.0 for v, fine in zip(values, good, strict=True)) or (1.0,)
            raise UsageError(
                f"Each({self.values!r}).",
                "a tuple with one number for each client, each in (0, 1e15].",
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
    """Values from a CSV file with a header: one line for each client, with the columns `client` (0 … C−1) and `column`.

    The file is read when a clock is built, not when this value is built. So parsing a text opens no file.

    Args:
        path: the CSV file.
        column: the name of the column of values, each above 0.
    Example:
        >>> Trace("fleet.csv", column="seconds")
        Trace('fleet.csv', column='seconds')
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
            f"{type(value).__name__} has path = {value.path!r}.",
            "the path of a CSV file.",
            write=repr(replace(value, path="fleet.csv")),
        )
    return str(os.fspath(value.path))


@dataclass(frozen=True, repr=False)
class ByRows(Value):
    """A distribution scaled by the client's rows: value · rows / mean rows. Clients with more rows compute longer.

    Args:
        distribution: seconds of a client with the mean number of rows; a number in (0, 1e15], or a distribution other
            than `ByRows`.
    Example:
        >>> ByRows(HalfNormal())
        ByRows(HalfNormal())
    """

    distribution: float | Distribution = bounded_number(1.0, above=0, most=LARGEST, also=Distribution, why=_TOO_LARGE)

    def __post_init__(self) -> None:
        check_fields(self)
        if isinstance(self.distribution, ByRows):
            raise UsageError(
                "ByRows of ByRows.", "a distribution that is not scaled by rows.", write=repr(self.distribution)
            )

    @property
    def per(self) -> str:
        return "client" if isinstance(self.distribution, float) else self.distribution.per

    @property
    def bounds(self) -> tuple[float, float]:
        return (self.distribution,) * 2 if isinstance(self.distribution, float) else self.distribution.bounds

    def draws(self, key: Key, sizes: Tensor) -> Draw:
        """Draws before scaling. A flight's ordinal does not identify its client, so the caller scales by `share`."""
        given = self.distribution
        if isinstance(given, float):
            return lambda ids: torch.full((len(ids),), given, dtype=torch.float64)
        return given.draws(key, sizes)

    @staticmethod
    def share(sizes: Tensor) -> Tensor:
        """rows / mean rows, float64 `[C]`."""
        if not int(sizes.sum()):
            raise UsageError(
                "ByRows, and no client holds a row.", "at least one row.", "values are divided by the mean rows.", "1.0"
            )
        return sizes.to(torch.float64) / sizes.to(torch.float64).mean()


@dataclass(frozen=True, repr=False)
class Chance(Value):
    """Random availability: a client is available for a whole window with this probability, independently of others.

    Args:
        chance: the probability, in (0, 1]. The key of a draw is the client and the window.
        window: length of a window in seconds, in (0, 1e15].
    Example:
        >>> Chance(0.8, window=60)
        Chance(0.8, window=60.0)
    """

    chance: float = bounded_number(0.5, above=0, most=1, why="a round can only start clients that are available.")
    window: float = _scale()

    def __post_init__(self) -> None:
        check_fields(self)

    def calendar(self, key: Key, clients: int) -> availability.Calendar:
        if self.chance == 1:
            return availability.Always(clients)
        return availability.BernoulliWindows(self.chance, self.window, key, clients)


@dataclass(frozen=True, repr=False)
class Windows(Value):
    """Availability from a CSV file with a header: the columns client, start, end, in seconds.

    A client is available for start ≤ t < end. All windows repeat. The period is the latest end in the file. The file is
    read when a clock is built.

    Args:
        path: the CSV file.
    Example:
        >>> Windows("windows.csv")
        Windows('windows.csv')
    """

    path: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", _path(self))

    def calendar(self, key: Key, clients: int) -> availability.Calendar:
        return availability.Repeating(traces.windows(self.path, clients))


@runtime_checkable
class Presence(Protocol):
    """Availability of clients. `calendar(key, clients)` gives the availability of a population over time."""

    def calendar(self, key: Key, clients: int) -> availability.Calendar: ...


@dataclass(frozen=True, repr=False)
class Fleet(Value):
    """Durations of simulated flights: download, compute, upload. By default a flight takes 1 s and links are free.

    Args:
        compute: seconds that one flight computes, a number in [0, 1e15] or a distribution. If a client's steps follow a
            schedule, this is the time of round 0, and the times of other rounds are in proportion to their steps.
        uplink, downlink: the client's own link: a rate ("10 Mb/s", or bytes per second) or a distribution of bytes per
            second; None: infinitely fast.
        server: the rate of the server's link, shared by all transfers of one direction; None: no limit.
        availability: the probability that a client is available, in (0, 1], drawn for windows of one second;
            `Chance(q, window=60)` for other windows; or `Windows(path)`. A client that is in flight when its window
            ends finishes its flight.
        dropout: the probability that a flight is lost, in [0, 1). A lost flight ends at a uniform time of its compute
            phase.
        latency: seconds that each transfer takes in addition, each way; a number in [0, 1e15] or a distribution.
    Raises:
        UsageError: a number is outside its range, a text is not a rate, or a rate is scaled by rows.
    Example:
        >>> Fleet(HalfNormal(), server="100 Mb/s", dropout=0.1)
        Fleet(HalfNormal(), server='100 Mb/s', dropout=0.1)
    """

    compute: float | Distribution = bounded_number(1.0, least=0, most=LARGEST, also=Distribution, why=_TOO_LARGE)
    uplink: str | float | Distribution | None = None
    downlink: str | float | Distribution | None = None
    server: str | float | None = None
    availability: float | Presence = bounded_number(
        1.0, above=0, most=1, also=Presence, why="no client could be started."
    )
    dropout: float = bounded_number(0.0, least=0, below=1, why="if every flight were lost, no round would close.")
    latency: float | Distribution = bounded_number(0.0, least=0, most=LARGEST, also=Distribution, why=_TOO_LARGE)

    def __post_init__(self) -> None:
        check_fields(self)
        for name in ("uplink", "downlink", "server"):
            given = getattr(self, name)
            if isinstance(given, ByRows) or (name == "server" and isinstance(given, Distribution)):
                raise UsageError(
                    f"Fleet has {name} = {given!r}.",
                    "a rate." if name == "server" else "a rate, or a distribution of rates.",
                    "there is one server." if name == "server" else "a client without rows would have rate 0.",
                    repaired(self, **{name: "100 Mb/s"}),
                )
            if given is not None and not isinstance(given, Distribution):
                try:
                    read = rate(given)
                except UsageError as error:
                    raise UsageError(
                        f"Fleet has {name} = {given!r}.",
                        error.required,
                        write=repaired(self, **{name: "100 Mb/s"}),
                    ) from None
                if not isinstance(given, str):
                    object.__setattr__(self, name, read)


FLEET: Mapping[str, Callable[..., Any]] = {
    value.__name__: value
    for value in (Fleet, HalfNormal, LogNormal, Zipf, Exponential, Between, Each, Trace, ByRows, Chance, Windows)
}
