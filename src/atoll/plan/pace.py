"""Paces: when a round closes, which clients may start while it is open, and the weight of a late contribution.

A pace receives numbers only: the number of required contributions, the number that have arrived, and the seconds since
the round opened. It has no clock and no socket, so the same value works with a virtual clock, with worker processes and
with a network. A round with no client in flight is over under every pace.

Tests: tests/identities/test_flights.py, tests/identities/test_fedasync.py
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from atoll.base.errors import UsageError
from atoll.base.grammar import Value
from atoll.base.validation import plain_fields
from atoll.plan.protocols import Open, Pace


def _check(part: str, name: str, value: Any, good: bool, required: str, why: str, write: str) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not good:
        raise UsageError(f"{part}({name}={value!r}).", required, why, write)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True, repr=False)
class Sync(Pace):
    """Closes a round when each client of its cohort has arrived or failed. No client stays in flight.

    With `over_select`, ⌈over_select·n⌉ clients start, and the first n to arrive count. With `deadline_s`, the round
    closes at the deadline if at least `quorum`·n clients have arrived, and otherwise when this number has arrived.
    Later contributions are discarded, and the memory of their clients does not change.

    Args:
        over_select: the number of clients that start for each required contribution, ≥ 1.
        deadline_s: the number of seconds after which the round need not wait, > 0; None: the round waits for all.
        quorum: fraction of n that must have arrived before a deadline closes the round, in [0, 1].
        partial: whether a client that still computes at the deadline stops and sends the steps that it has made.
    Raises:
        UsageError: a number is out of range, or a quorum or partial work is given without a deadline.
    Example:
        >>> Sync(over_select=1.3).cohort_size(100)
        130

    Reference: Bonawitz et al., Towards Federated Learning at Scale: System Design, 2019.
    """

    over_select: float = 1.0
    deadline_s: float | None = None
    quorum: float = 0.0
    partial: bool = False

    def __post_init__(self) -> None:
        plain_fields(self, "over_select", "quorum", "deadline_s")
        over, quorum, deadline = self.over_select, self.quorum, self.deadline_s
        why = "fewer clients than required can never make a full round."
        _check(
            "Sync", "over_select", over, self._number(over) and over >= 1, "1 or more.", why, "Sync(over_select=1.3)"
        )
        good = self._number(quorum) and 0 <= quorum <= 1
        why = "it is a fraction of the cohort."
        _check("Sync", "quorum", quorum, good, "a fraction in [0, 1].", why, "Sync(deadline_s=60, quorum=0.8)")
        if deadline is not None:
            good = self._number(deadline) and deadline > 0
            why = "no client arrives before the round has opened."
            _check("Sync", "deadline_s", deadline, good, "seconds, above 0.", why, "Sync(deadline_s=60)")
        if not isinstance(self.partial, bool):
            raise UsageError(f"Sync(partial={self.partial!r:.60}).", "True or False.", write="Sync(deadline_s=60)")
        if deadline is None and (self.quorum or self.partial):
            raise UsageError(
                f"{self!r}.",
                "a deadline.",
                "quorum and partial take effect at the deadline.",
                f"Sync(deadline_s=60{f', quorum={self.quorum}' if self.quorum else ''}"
                f"{', partial=True' if self.partial else ''})",
            )

    @staticmethod
    def _number(x: Any) -> bool:
        return isinstance(x, (int, float)) and math.isfinite(x)

    def cohort_size(self, n: int) -> int:
        """The number of clients that start for a cohort of n."""
        return math.ceil(self.over_select * n - 1e-9)

    def required(self, started: int) -> int:
        """The number of contributions that make a full round if `started` clients start."""
        return int(started / self.over_select + 1e-9)

    def should_close(self, open: Open) -> bool:
        """Whether the round is over, although clients are still in flight."""
        if open.arrived >= open.wanted:
            return True
        late = self.deadline_s is not None and open.elapsed >= self.deadline_s
        return late and not self.partial and open.arrived >= self.quorum * open.wanted


def counts_each(pace: Pace) -> bool:
    """Whether each client of a cohort counts or not by itself: `Sync()`, or with a deadline only.

    Example:
        >>> counts_each(Sync(deadline_s=60)), counts_each(Sync(deadline_s=60, quorum=0.5))
        (True, False)
    """
    return isinstance(pace, Sync) and pace == Sync(deadline_s=pace.deadline_s)


@dataclass(frozen=True, repr=False)
class staleness_polynomial(Value):
    """A function that returns the weight of an update that is s rounds late: (1 + s)^−power.

    Args:
        power: the exponent, ≥ 0; with 0 every update has weight 1.
    Raises:
        UsageError: the power is out of range.
    Example:
        >>> [staleness_polynomial(0.5)(s) for s in (0, 3, 8)]
        [1.0, 0.5, 0.3333333333333333]

    Reference: Xie, Koyejo and Gupta, Asynchronous Federated Optimization, 2019.
    """

    power: float

    def __post_init__(self) -> None:
        plain_fields(self, "power")
        good = isinstance(self.power, (int, float)) and math.isfinite(self.power) and self.power >= 0
        why = "an older update must not have a larger weight."
        _check("staleness_polynomial", "power", self.power, good, "0 or more.", why, "staleness_polynomial(0.5)")

    def __call__(self, staleness: int) -> float:
        return float((1 + staleness) ** -self.power)


@dataclass(frozen=True, repr=False)
class hinge(Value):
    """A function that returns the weight of an update that is s rounds late.

    The weight is 1 if s ≤ grace, and 1 / (1 + slope·(s − grace)) otherwise.

    Args:
        slope: the rate at which the weight falls, ≥ 0.
        grace: the largest number of rounds by which an update may be late without losing weight, ≥ 0.
    Raises:
        UsageError: a number is out of range.
    Example:
        >>> [hinge(1, grace=2)(s) for s in (0, 2, 3)]
        [1.0, 1.0, 0.5]

    Reference: Xie, Koyejo and Gupta, Asynchronous Federated Optimization, 2019.
    """

    slope: float
    grace: int = 0

    def __post_init__(self) -> None:
        plain_fields(self, "slope", "grace")
        good = isinstance(self.slope, (int, float)) and math.isfinite(self.slope) and self.slope >= 0
        why = "an older update must not have a larger weight."
        _check("hinge", "slope", self.slope, good, "0 or more.", why, "hinge(0.5, grace=4)")
        good = _whole(self.grace) and self.grace >= 0
        why = "lateness is counted in rounds."
        _check("hinge", "grace", self.grace, good, "whole rounds, 0 or more.", why, "hinge(0.5, grace=4)")

    def __call__(self, staleness: int) -> float:
        return 1.0 if staleness <= self.grace else 1.0 / (1.0 + self.slope * (staleness - self.grace))


@dataclass(frozen=True, repr=False)
class Buffered(Pace):
    """Closes a round when k contributions have arrived, from any clients. All other clients stay in flight.

    For each client that arrives, another client starts at once, so the number of active clients equals the cohort size
    at all times. An update that started s rounds ago is multiplied by staleness(s). The weight that divides the sum is
    not reduced, so late updates make the step smaller. k = 1 is fully asynchronous.

    Args:
        k: the number of contributions in a round, ≥ 1.
        staleness: returns the weight of an update that is s rounds late: `staleness_polynomial(0.5)`,
            `hinge(0.5, grace=4)`, or any other function from int to float.
    Raises:
        UsageError: k is not an integer ≥ 1, or the staleness is not a function.
    Example:
        >>> Buffered(10)
        Buffered(10)
        >>> Buffered(1).staleness_weight(3)
        0.5

    Reference: Nguyen et al., Federated Learning with Buffered Asynchronous Aggregation, 2022.
    """

    k: int = field(metadata={"example": 10})
    staleness: Callable[[int], float] = field(default_factory=lambda: staleness_polynomial(0.5))

    asynchronous = True
    replaces_arrivals = True

    def __post_init__(self) -> None:
        plain_fields(self, "k")
        good, why = _whole(self.k) and self.k >= 1, "a round needs at least one update."
        _check("Buffered", "k", self.k, good, "a whole number of contributions, at least 1.", why, "Buffered(10)")
        if not callable(self.staleness) or isinstance(self.staleness, type):
            raise UsageError(
                f"Buffered(staleness={self.staleness!r}).",
                "a function of the rounds of lateness.",
                "it gives the weight of a late update.",
                f"Buffered({self.k}, staleness=staleness_polynomial(0.5))",
            )

    def should_close(self, open: Open) -> bool:
        """Whether the round is over, although clients are still in flight."""
        return open.arrived >= self.k

    def staleness_weight(self, staleness: int) -> float:
        """The factor that multiplies an update whose client started `staleness` rounds ago."""
        return float(self.staleness(staleness))


@dataclass(frozen=True, repr=False)
class Bounded(Pace):
    """Bounded staleness: a client may start at most s times while the oldest contribution is in flight.

    A round closes when an arrived client may start again. s = 0 is `Sync()`, bit for bit. With a large s every arrival
    closes a round. A slow client delays the others only after each of them has made s starts since the slow client
    started.

    Args:
        staleness: s, the largest number of starts of a client while the oldest contribution is in flight, ≥ 0.
    Raises:
        UsageError: s is not an integer ≥ 0.
    Example:
        >>> Bounded(4)
        Bounded(4)

    Reference: Ho et al., More Effective Distributed ML via a Stale Synchronous Parallel Parameter Server, 2013. The
        paper bounds the difference of clocks; here the age of contributions in flight is bounded.
    """

    staleness: int = field(metadata={"example": 2})

    asynchronous = True

    def __post_init__(self) -> None:
        plain_fields(self, "staleness")
        good, why = _whole(self.staleness) and self.staleness >= 0, "it counts starts."
        _check("Bounded", "staleness", self.staleness, good, "a whole number, at least 0.", why, "Bounded(4)")

    def may_start(self, starts: int) -> bool:
        """Whether a client may start again if it has started `starts` times since the oldest flight started."""
        return starts < self.staleness

    def should_close(self, open: Open) -> bool:
        """Whether the round is over, although clients are still in flight."""
        return any(self.may_start(n) for n in open.starts())
