"""The contract of paces.

Tests: tests/conformance/test_parts.py
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from atoll.base.random import Key
from atoll.compute.model_state import Model
from atoll.engine.client_state import Memory
from atoll.plan.aggregate import Mean
from atoll.plan.in_flight import OpenRound
from atoll.plan.local import Train
from atoll.plan.optimizer.rules import sgd
from atoll.plan.plan import Plan
from atoll.plan.protocols import Pace, Population, Sampler
from atoll.plan.round import draw_cohort
from atoll.plan.sampler import Everyone, Uniform
from atoll.plan.state import State
from atoll.testing.contract import check_value, conformity, pure, require

_CLIENTS, _ROUNDS, _MOST = 12, 24, 2**40
_WATCHED = 500  # whole rounds are simulated for a pace that closes after at most this number of arrivals
_COUNTS = (*range(1, 41), 1000, 10**5)


@dataclass(frozen=True)
class _Seen:
    """The facts about an open round that a pace can read: `arrived` contributions, and the starts of each client."""

    wanted: int
    arrived: int
    elapsed: float
    ages: tuple[int, ...] = ()

    def starts(self) -> tuple[int, ...]:
        return self.ages


@conformity
def check_pace(part: Any) -> None:
    """Check the contract of a pace.

    All methods are pure functions. cohort_size(n) ≥ n, and required(cohort_size(n)) = n. staleness_weight(0) = 1, and
    the weight never increases with lateness and is never below 0. If a client may not start, a client with more starts
    may not start either. A round that closes also closes with one more arrival, or later. No round closes when it
    opens. If all clients arrive, in any order, every round closes with at least one contribution.

    Args:
        part: a pace, as `atoll.plan.protocols.Pace` declares it.
    Raises:
        Nonconformity: the pace breaks the contract.
    Example:
        >>> from atoll.plan.pace import Buffered
        >>> check_pace(Buffered(10))
    """
    check_value(part)
    subject = repr(part)
    for flag, given in (("asynchronous", part.asynchronous), ("replaces_arrivals", part.replaces_arrivals)):
        require(
            isinstance(given, bool), f"{subject}.{flag} is {given!r}.", "True or False.", "the loop branches on it."
        )
    _check_counts(subject, part)
    _check_discount(subject, part)
    _check_starts(subject, part)
    _check_closing(subject, part)
    _check_end(subject, part)


def _answer(subject: str, method: Callable[..., Any], *given: Any) -> Any:
    """The result of a method, which must not depend on earlier calls."""
    name = f"{subject}.{method.__name__}"
    return pure(name, method, *given)


def _check_counts(subject: str, part: Pace) -> None:
    cohorts = {n: _answer(subject, part.cohort_size, n) for n in _COUNTS}
    for n, m in reversed(cohorts.items()):
        require(
            isinstance(m, int) and m >= n,
            f"{subject}.cohort_size({n}) is {m!r}.",
            f"a whole number, at least {n}.",
            "a round that requires n contributions needs at least n starts.",
        )
        required = _answer(subject, part.required, m)
        require(
            isinstance(required, int) and required == n and part.cohort_size(n) == m,
            f"{subject}.required({m}) is {required!r}, and cohort_size({n}) is {m}.",
            f"{n}, each time.",
            "cohort_size gives the number of starts, and required the number of arrivals that the round waits for.",
        )


def _check_discount(subject: str, part: Pace) -> None:
    weight = part.staleness_weight
    factors = [_answer(subject, weight, s) for s in range(64)] + [weight(10**6)]
    good = all(isinstance(f, float) and math.isfinite(f) and f >= 0 for f in factors) and factors[0] == 1
    falls = good and all(b <= a for a, b in pairwise(factors))
    require(
        falls and [weight(s) for s in reversed(range(64))] == factors[63::-1],
        f"{subject}.staleness_weight gave {', '.join(map(str, factors[:4]))}, … for 0, 1, 2, 3, … rounds of lateness.",
        "floats that start at 1, never increase and are never below 0.",
        "lateness may make an update smaller; it must not reverse or enlarge it.",
    )


def _check_starts(subject: str, part: Pace) -> None:
    may = [_answer(subject, part.may_start, n) for n in range(64)]
    require(
        all(isinstance(m, bool) for m in may) and all(a or not b for a, b in pairwise(may)),
        f"{subject}.may_start gave {may[:8]}, … for 0, 1, 2, … starts.",
        "True, then False from some number on.",
        "a client that is further ahead must wait at least as long.",
    )


def _check_closing(subject: str, part: Pace) -> None:
    key, times = Key(7).fold("pace"), (0.0, 1.0, 59.5, 1e4, 1e9)
    for wanted in (1, 2, 5, 40):
        ages = tuple((key.fold(wanted).uniform(wanted + 3) * 6).floor().long().tolist())
        seen = [[_Seen(wanted, n, t, ages[:n]) for n in range(wanted + 4)] for t in times]
        table = [[_answer(subject, part.should_close, each) for each in row] for row in seen]
        require(
            all(isinstance(c, bool) for row in table for c in row),
            f"{subject}.should_close.",
            "True or False.",
            "the loop branches on it.",
        )
        require(
            not table[0][0],
            f"{subject}.should_close is True for a round of {wanted} that has just opened, without a contribution.",
            "False, until a contribution arrives or time passes.",
            "an endless number of rounds would pass in no time.",
        )
        for way, rows in (("more arrivals", table), ("more time", list(map(list, zip(*table, strict=True))))):
            require(
                all(b or not a for row in rows for a, b in pairwise(row)),
                f"{subject}.should_close is True for a round of {wanted}, and False with {way}.",
                "True also with more arrivals and more time.",
                "arrivals of one moment are counted one after another.",
            )


def _check_end(subject: str, part: Pace) -> None:
    """Simulate rounds in which all clients arrive: in the order of their starts, in reverse, or in a keyed order."""
    needed = 1
    while part.replaces_arrivals and needed <= _MOST:
        if part.should_close(_Seen(5, needed, 0.0, (0,) * min(needed, 99))):
            break
        needed *= 2
    require(
        needed <= _MOST,
        f"{subject} keeps a round open after {_MOST:.0e} arrivals, and starts another client for each.",
        "a round that closes.",
        "it would wait forever.",
    )
    if needed > _WATCHED:
        return
    over = part.cohort_size(1000) > 1000
    for sampler in (Uniform(5), *(() if over else (Everyone(),))):
        for order in ("first", "last", "any"):
            _play(subject, part, sampler, order)


def _play(subject: str, part: Pace, sampler: Sampler, order: str) -> None:
    clients = max(_CLIENTS, part.cohort_size(5) + 1)
    population = Population(clients, torch.ones(clients, dtype=torch.int64))
    plan = Plan(Train(sgd(0.1), epochs=1), Mean(), cohort=sampler, pace=part)
    none = torch.empty(0)
    state = State(0, 7, Model(none, none, {}, {}), {}, {"sampler": {}}, Memory({}))
    for t in range(_ROUNDS):
        state = dataclasses.replace(state, round=t)
        cohort = draw_cohort(plan, state, population, state.key())
        opened = OpenRound(part, sampler, state.seed, t, state.air, population, cohort)
        flying = [*state.air.flights, *opened.start_missing()]
        waits = True
        while waits and flying:
            draw = int(state.key().fold("next", opened.arrived).hash(1)[0]) % len(flying)
            flight = flying.pop({"first": 0, "last": -1, "any": draw}[order])
            opened.arrive(flight.number)
            waits = opened.goes_on(float(opened.arrived))
            require(
                opened.arrived <= 4 * _WATCHED,
                f"{subject} keeps round {t} open after {opened.arrived} arrivals.",
                "a round that closes.",
                "it would wait forever.",
            )
            flying += opened.start_missing() if part.replaces_arrivals and waits else []
        require(
            opened.arrived > 0,
            f"{subject} lets no client start in round {t}, so none arrives.",
            "at least one start.",
            "a round without contributions makes no step, and the next round would be the same.",
        )
        state = dataclasses.replace(state, air=opened.in_flight(None, None))
