"""The contract of when a round closes: paces."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from atoll.engine.memory import Memory
from atoll.plan.aggregate import Mean
from atoll.plan.in_flight import Traffic
from atoll.plan.local import Train
from atoll.plan.optimizer import sgd
from atoll.plan.plan import Plan
from atoll.plan.protocols import Pace, Population, Sampler
from atoll.plan.round import opening
from atoll.plan.sampler import Everyone, Uniform
from atoll.plan.state import State
from atoll.rng import Key
from atoll.task import Model
from atoll.testing.contract import check_value, pure, require

_CLIENTS, _ROUNDS, _MOST = 12, 24, 2**40
_WATCHED = 500  # arrivals of a round up to which whole rounds are played
_COUNTS = (*range(1, 41), 1000, 10**5)


@dataclass(frozen=True)
class _Seen:
    """An open round with `arrived` contributions, and the starts of each arrived client."""

    wanted: int
    arrived: int
    elapsed: float
    ages: tuple[int, ...] = ()

    def starts(self) -> tuple[int, ...]:
        return self.ages


def check_pace(part: Any) -> None:
    """The contract of a pace.

    All answers are functions of the question. cohort_size(n) is n or more, and required(cohort_size(n)) = n.
    staleness_weight(0) = 1, and
    the weight falls with lateness and is never below 0. A client with more starts may not start sooner. A round that
    closes also closes with one more arrival, or later; no round closes when it opens. Every round ends with at least
    one contribution if all clients arrive, in any order.

    Args:
        part: a pace, as `atoll.plan.protocols.Pace` declares it.
    Raises:
        Nonconformity: it breaks the contract.
    Example:
        >>> from atoll.plan.pace import Buffered
        >>> check_pace(Buffered(10))
    """
    check_value(part)
    who = repr(part)
    for flag, given in (("asynchronous", part.asynchronous), ("replaces_arrivals", part.replaces_arrivals)):
        require(isinstance(given, bool), f"{who}.{flag} is {given!r}.", "True or False.", "traffic is ruled by it.")
    _check_counts(who, part)
    _check_discount(who, part)
    _check_starts(who, part)
    _check_closing(who, part)
    _check_end(who, part)


def _asked(who: str, method: Callable[..., Any], *given: Any) -> Any:
    """The answer of a method, which must not depend on earlier calls."""
    name = f"{who}.{method.__name__}"
    return pure(name, method, *given)


def _check_counts(who: str, part: Pace) -> None:
    asked = {n: _asked(who, part.cohort_size, n) for n in _COUNTS}
    for n, m in reversed(asked.items()):
        require(
            isinstance(m, int) and m >= n,
            f"{who}.cohort_size({n}) is {m!r}.",
            f"a whole number, at least {n}.",
            "a round needs as many starts as it wants contributions.",
        )
        back = _asked(who, part.required, m)
        require(
            isinstance(back, int) and back == n and part.cohort_size(n) == m,
            f"{who}.required({m}) is {back!r}, where cohort_size({n}) was {m}.",
            f"{n}, each time.",
            "who is asked is told by one, and how many are waited for by the other.",
        )


def _check_discount(who: str, part: Pace) -> None:
    weight = part.staleness_weight
    factors = [_asked(who, weight, s) for s in range(64)] + [weight(10**6)]
    good = all(isinstance(f, float) and math.isfinite(f) and f >= 0 for f in factors) and factors[0] == 1
    falls = good and all(b <= a for a, b in pairwise(factors))
    require(
        falls and [weight(s) for s in reversed(range(64))] == factors[63::-1],
        f"{who}.staleness_weight gave {', '.join(map(str, factors[:4]))}, … for 0, 1, 2, 3, … rounds of lateness.",
        "floats from 1 for what is not late, never rising, never below 0.",
        "a late update may shrink the step; it never turns it round or enlarges it.",
    )


def _check_starts(who: str, part: Pace) -> None:
    may = [_asked(who, part.may_start, n) for n in range(64)]
    require(
        all(isinstance(m, bool) for m in may) and all(a or not b for a, b in pairwise(may)),
        f"{who}.may_start gave {may[:8]}, … for 0, 1, 2, … starts.",
        "True, then False from some number on.",
        "a client that has gone further ahead is held back no less.",
    )


def _check_closing(who: str, part: Pace) -> None:
    key, times = Key(7).fold("pace"), (0.0, 1.0, 59.5, 1e4, 1e9)
    for wanted in (1, 2, 5, 40):
        ages = tuple((key.fold(wanted).uniform(wanted + 3) * 6).floor().long().tolist())
        seen = [[_Seen(wanted, n, t, ages[:n]) for n in range(wanted + 4)] for t in times]
        table = [[_asked(who, part.should_close, each) for each in row] for row in seen]
        require(
            all(isinstance(c, bool) for row in table for c in row),
            f"{who}.should_close.",
            "True or False.",
            "it is asked whether.",
        )
        require(
            not table[0][0],
            f"{who}.should_close a round of {wanted} as it opens, with nobody there.",
            "to wait, for a contribution or for time to pass.",
            "rounds without end would go by, and no time.",
        )
        for way, rows in (("more arrivals", table), ("more time", list(map(list, zip(*table, strict=True))))):
            require(
                all(b or not a for row in rows for a, b in pairwise(row)),
                f"{who}.should_close a round of {wanted}, and with {way} keeps it open.",
                "what was enough to stay enough.",
                "arrivals that come at one moment are heard one after the other.",
            )


def _check_end(who: str, part: Pace) -> None:
    """Play rounds in which all clients arrive: in the order of starts, in reverse, or in a keyed order."""
    needed = 1
    while part.replaces_arrivals and needed <= _MOST:
        if part.should_close(_Seen(5, needed, 0.0, (0,) * min(needed, 99))):
            break
        needed *= 2
    require(
        needed <= _MOST,
        f"{who} keeps a round open after {_MOST:.0e} arrivals, and starts another client for each.",
        "a round that closes.",
        "it would wait for ever.",
    )
    if needed > _WATCHED:
        return
    over = part.cohort_size(1000) > 1000
    for sampler in (Uniform(5), *(() if over else (Everyone(),))):
        for order in ("first", "last", "any"):
            _play(who, part, sampler, order)


def _play(who: str, part: Pace, sampler: Sampler, order: str) -> None:
    clients = max(_CLIENTS, part.cohort_size(5) + 1)
    population = Population(clients, torch.ones(clients, dtype=torch.int64))
    plan = Plan(Train(sgd(0.1), epochs=1), Mean(), cohort=sampler, pace=part)
    none = torch.empty(0)
    state = State(0, 7, Model(none, none, {}, {}), {}, {}, Memory({}))
    for t in range(_ROUNDS):
        state = dataclasses.replace(state, round=t)
        cohort = opening(plan, state, population, state.key())
        traffic = Traffic(part, sampler, state.seed, t, state.air, population, cohort)
        flying = [*state.air.flights, *traffic.fill()]
        waits = True
        while waits and flying:
            draw = int(state.key().fold("next", traffic.arrived).hash(1)[0]) % len(flying)
            flight = flying.pop({"first": 0, "last": -1, "any": draw}[order])
            traffic.arrive(flight.number)
            waits = traffic.goes_on(float(traffic.arrived))
            require(
                traffic.arrived <= 4 * _WATCHED,
                f"{who} keeps round {t} open after {traffic.arrived} arrivals.",
                "a round that closes.",
                "it would wait for ever.",
            )
            flying += traffic.fill() if part.replaces_arrivals and waits else []
        require(
            traffic.arrived > 0,
            f"{who} has nobody arrive in round {t}, although everyone who starts does.",
            "somebody who may start.",
            "a round without contributions makes no step, and the next would be like it.",
        )
        state = dataclasses.replace(state, air=traffic.after(None, None))
