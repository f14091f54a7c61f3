"""Schedules: the learning rate of each round.

    lr_t = schedule(t, memory)        t = 0, 1, 2, … counts rounds

A schedule is a value: a pure function of t. Only `plateau` also uses the loss. Its memory is a few tensors on the
host, which the caller keeps: `init` creates them, `observe` returns the next ones.

    warmup(5) >> cosine(0.1, rounds=100)      five rounds up to 0.1, then the cosine from its own t = 0
    hold(0.1, rounds=50) >> 0.01              0.1 for fifty rounds, then 0.01

A schedule can also set the number of local steps in each round: `Train(steps=...)`.

Tests: tests/identities/test_schedule.py, tests/rates/test_rates.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from atoll.base.errors import UsageError
from atoll.base.grammar import constructor
from atoll.base.validation import bounded_number, check_fields, plain_number, repaired

Tensors = Mapping[str, Tensor]
NOTHING: Tensors = {}

_STEP = "a learning rate of 0 makes no step, and a negative one increases the loss."
_FALL = "a factor above 1 increases the learning rate."


def _rate() -> Any:
    return bounded_number(above=0, example=0.1, why=_STEP)


def _rounds(example: int = 100) -> Any:
    return bounded_number(least=1, whole=True, example=example, why="rounds are counted in whole numbers.")


def _end() -> Any:
    return bounded_number(0.0, least=0, why="a negative learning rate increases the loss.")


class Schedule:
    """Base of all schedules: a function of the round and of the schedule's own memory."""

    def __post_init__(self) -> None:
        check_fields(self)

    def __repr__(self) -> str:
        return constructor(self)

    def init(self) -> dict[str, Tensor]:
        """Return the memory before the first round; empty for a pure function of t."""
        return {}

    def observe(self, memory: Tensors, loss: Tensor) -> dict[str, Tensor]:
        """Return the memory after a round with mean training loss `loss`, a tensor of one number."""
        return dict(memory)

    def __call__(self, t: int, memory: Tensors = NOTHING) -> float:
        """Return the learning rate of round t ≥ 0."""
        raise NotImplementedError

    def __rshift__(self, other: object) -> Schedule:
        after = other if isinstance(other, Schedule) else self
        raise UsageError(
            f"{self!r} >> {other!r}.",
            "a warm-up or a hold before >>.",
            "any other schedule has no last round, so no schedule can follow it.",
            f"{after!r}" if isinstance(after, join) else f"warmup(5) >> {after!r}",
        )


@dataclass(frozen=True, repr=False)
class constant(Schedule):
    """The learning rate is the same in every round. A number in place of a schedule means this schedule.

    lr_t = lr

    Args:
        lr: the learning rate, > 0.
    Example:
        >>> constant(0.1)(1000)
        0.1
    """

    lr: float = _rate()

    def __call__(self, t: int, memory: Tensors = NOTHING) -> float:
        return self.lr


@dataclass(frozen=True, repr=False)
class step(Schedule):
    """Multiply the learning rate by a factor every `every` rounds.

    lr_t = lr · factor^⌊t / every⌋

    Args:
        lr: learning rate of the first `every` rounds, > 0.
        every: the number of rounds with the same learning rate, ≥ 1.
        factor: the factor after each such period, 0 < factor ≤ 1.
    Example:
        >>> [step(1, every=2, factor=0.5)(t) for t in range(5)]
        [1.0, 1.0, 0.5, 0.5, 0.25]
    """

    lr: float = _rate()
    every: int = _rounds(30)
    factor: float = bounded_number(0.1, above=0, most=1, why=_FALL)

    def __call__(self, t: int, memory: Tensors = NOTHING) -> float:
        return self.lr * self.factor ** (t // self.every)


@dataclass(frozen=True, repr=False)
class exponential(Schedule):
    """The learning rate decreases by the same factor in every round.

    lr_t = lr · decayᵗ

    Args:
        lr: learning rate of round 0, > 0.
        decay: the factor from one round to the next, 0 < decay ≤ 1.
    Example:
        >>> exponential(1, decay=0.5)(3)
        0.125
    """

    lr: float = _rate()
    decay: float = bounded_number(above=0, most=1, example=0.99, why=_FALL)

    def __call__(self, t: int, memory: Tensors = NOTHING) -> float:
        return float(self.lr * self.decay**t)


@dataclass(frozen=True, repr=False)
class inverse(Schedule):
    """The learning rate of stochastic approximation.

    lr_t = c / (t + t0)

    ∑ lr_t = ∞, so every point can be reached. ∑ lr_t² < ∞, so the noise averages out.
    With c > 1/(2μ) on a μ-strongly convex loss, E‖θ_t − θ*‖² falls as 1/t.

    Args:
        c: scale, > 0; the learning rate of round 0 is c / t0.
        t0: shift in rounds, > 0.
    Example:
        >>> inverse(1, t0=4)(4)
        0.125

    Reference: Robbins, Monro, A Stochastic Approximation Method, 1951.
    """

    c: float = _rate()
    t0: float = bounded_number(1.0, above=0, why="round 0 divides by it.")

    def __call__(self, t: int, memory: Tensors = NOTHING) -> float:
        return self.c / (t + self.t0)


@dataclass(frozen=True, repr=False)
class inverse_sqrt(Schedule):
    """The learning rate for convex losses that are not strongly convex.

    lr_t = c / √(t + t0)

    Args:
        c: scale, > 0; the learning rate of round 0 is c / √t0.
        t0: shift in rounds, > 0.
    Example:
        >>> inverse_sqrt(1, t0=1)(3)
        0.5
    """

    c: float = _rate()
    t0: float = bounded_number(1.0, above=0, why="round 0 divides by it.")

    def __call__(self, t: int, memory: Tensors = NOTHING) -> float:
        return self.c / math.sqrt(t + self.t0)


@dataclass(frozen=True, repr=False)
class cosine(Schedule):
    """The learning rate follows half a cosine from `lr` down to `end`, then stays at `end`.

    lr_t = end + (lr − end) · (1 + cos(π · min(t / rounds, 1))) / 2

    Args:
        lr: learning rate of round 0, > 0.
        rounds: the number of rounds until the learning rate is `end`, ≥ 1.
        end: last learning rate, ≥ 0.
    Example:
        >>> [round(cosine(1, rounds=4)(t), 3) for t in range(6)]
        [1.0, 0.854, 0.5, 0.146, 0.0, 0.0]

    Reference: Loshchilov, Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts, 2017, equation 5.
    """

    lr: float = _rate()
    rounds: int = _rounds()
    end: float = _end()

    def __call__(self, t: int, memory: Tensors = NOTHING) -> float:
        return self.end + (self.lr - self.end) * (1 + math.cos(math.pi * min(t / self.rounds, 1.0))) / 2


@dataclass(frozen=True, repr=False)
class polynomial(Schedule):
    """The learning rate follows a power of the remaining fraction of rounds down to `end`. Power 1 is a straight line.

    lr_t = end + (lr − end) · (1 − min(t / rounds, 1))^power

    Args:
        lr: learning rate of round 0, > 0.
        rounds: the number of rounds until the learning rate is `end`, ≥ 1.
        power: the exponent, > 0.
        end: last learning rate, ≥ 0.
    Example:
        >>> [polynomial(1, rounds=4)(t) for t in range(6)]
        [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """

    lr: float = _rate()
    rounds: int = _rounds()
    power: float = bounded_number(1.0, above=0, why="a power of 0 or below does not fall.")
    end: float = _end()

    def __call__(self, t: int, memory: Tensors = NOTHING) -> float:
        return float(self.end + (self.lr - self.end) * (1 - min(t / self.rounds, 1.0)) ** self.power)


@dataclass(frozen=True, repr=False)
class plateau(Schedule):
    """Lower the learning rate when the training loss has stopped decreasing.

    lr_t = max(lr · factorⁿ, end), n = number of drops so far. A drop follows more than `patience` consecutive
    rounds with loss ≥ (1 − threshold) · best.

    The memory consists of scalars `[]` on the host: `best` float64; int64 `bad` (rounds without a new best), `rest`
    (remaining cooldown rounds), `drops` (n). A NaN loss is never a new best.

    Args:
        lr: first learning rate, > 0.
        factor: the factor of the learning rate at a drop, 0 < factor < 1.
        patience: the number of consecutive rounds without a new best that cause no drop, ≥ 0.
        threshold: relative decrease that counts as a new best, 0 ≤ threshold < 1.
        cooldown: the number of rounds after a drop that do not count as rounds without a new best, ≥ 0.
        end: lowest learning rate, ≥ 0.
    Example:
        >>> rate = plateau(0.1, factor=0.5, patience=1)
        >>> memory = rate.init()
        >>> for loss in (1.0, 1.0, 1.0):
        ...     memory = rate.observe(memory, torch.tensor(loss))
        >>> rate(3, memory)
        0.05

    Reference: torch.optim.lr_scheduler.ReduceLROnPlateau with mode "min" and threshold_mode "rel".
    """

    lr: float = _rate()
    factor: float = bounded_number(0.1, above=0, below=1, why="only a factor below 1 lowers the learning rate.")
    patience: int = bounded_number(10, least=0, whole=True)
    threshold: float = bounded_number(1e-4, least=0, below=1)
    cooldown: int = bounded_number(0, least=0, whole=True)
    end: float = _end()

    def __post_init__(self) -> None:
        check_fields(self)
        if self.end > self.lr:
            raise UsageError(
                f"{self!r} ends above its first learning rate.",
                f"end ≤ lr = {self.lr!r}.",
                "plateau never raises the learning rate.",
                repaired(self, end=0.0),
            )

    def init(self) -> dict[str, Tensor]:
        counts = {name: torch.zeros((), dtype=torch.int64, device="cpu") for name in ("bad", "rest", "drops")}
        return {"best": torch.full((), math.inf, dtype=torch.float64, device="cpu"), **counts}

    def observe(self, memory: Tensors, loss: Tensor) -> dict[str, Tensor]:
        best, bad, rest = memory["best"], memory["bad"], memory["rest"]
        loss = loss.detach().reshape(()).to(best)
        better = loss < best * (1 - self.threshold)
        bad = torch.where(better | (rest > 0), 0, bad + 1)
        drop = bad > self.patience
        return {
            "best": torch.where(better, loss, best),
            "bad": bad.masked_fill(drop, 0),
            "rest": (rest - 1).clamp_min(0).masked_fill(drop, self.cooldown),
            "drops": memory["drops"] + drop,
        }

    def __call__(self, t: int, memory: Tensors = NOTHING) -> float:
        drops = int(memory["drops"]) if "drops" in memory else 0
        return float(max(self.lr * self.factor**drops, self.end))


class _Prefix:
    """Base of prefixes: a prefix sets the values of some rounds before a schedule. It is not a schedule itself."""

    rounds: int

    def __post_init__(self) -> None:
        check_fields(self)

    def __repr__(self) -> str:
        return constructor(self)

    def at(self, t: int, foot: float) -> float:
        """Return the value of round t < rounds; `foot` is the first value of the next schedule."""
        raise NotImplementedError

    def __rshift__(self, other: object) -> Schedule:
        if isinstance(other, _Prefix):
            corrected = join(other, constant(0.1))
            raise UsageError(
                f"{self!r} >> {other!r}.",
                "a schedule after both, and parentheses.",
                "neither of the two has a learning rate for the rounds after its own.",
                repr(corrected) if _both_rise(self, other) else f"{self!r} >> ({corrected!r})",
            )
        then = as_schedule(other)
        if isinstance(then, join) and _both_rise(self, then.first):
            raise UsageError(
                f"{self!r} >> ({then!r}).",
                "one warm-up.",
                "the first would rise to the start of the second, not to the learning rate.",
                f"{self!r} >> {then.then!r}",
            )
        return join(self, then)


def _both_rise(*leads: _Prefix) -> bool:
    return all(isinstance(lead, warmup) for lead in leads)


@dataclass(frozen=True, repr=False)
class warmup(_Prefix):
    """A prefix that rises in equal steps from `start` to the first value of the next schedule.

    lr_t = start + (next(0) − start) · (t + 1) / (rounds + 1) for t < rounds, then next(t − rounds)

    No round uses `start` itself. The first round of the next schedule is one equal step higher.

    Args:
        rounds: length of the warm-up, ≥ 1.
        start: learning rate to rise from, ≥ 0.
    Example:
        >>> rate = warmup(3) >> constant(1)
        >>> [rate(t) for t in range(5)]
        [0.25, 0.5, 0.75, 1.0, 1.0]
    """

    rounds: int = _rounds(5)
    start: float = _end()

    def at(self, t: int, foot: float) -> float:
        return self.start + (foot - self.start) * (t + 1) / (self.rounds + 1)


@dataclass(frozen=True, repr=False)
class hold(_Prefix):
    """A prefix with one constant value.

    lr_t = lr for t < rounds, then next(t − rounds)

    Args:
        lr: the value, > 0.
        rounds: length of the prefix, ≥ 1.
    Example:
        >>> steps = hold(1, rounds=3) >> constant(16)
        >>> [steps(t) for t in range(5)]
        [1.0, 1.0, 1.0, 16.0, 16.0]
    """

    lr: float = _rate()
    rounds: int = _rounds()

    def at(self, t: int, foot: float) -> float:
        return self.lr


@dataclass(frozen=True, repr=False)
class join(Schedule):
    """A prefix followed by a schedule: the result of `first >> then`. The memory is that of `then`."""

    first: _Prefix
    then: Schedule

    def __repr__(self) -> str:
        then = f"({self.then!r})" if isinstance(self.then, join) else repr(self.then)
        return f"{self.first!r} >> {then}"

    def init(self) -> dict[str, Tensor]:
        return self.then.init()

    def observe(self, memory: Tensors, loss: Tensor) -> dict[str, Tensor]:
        return self.then.observe(memory, loss)

    def __call__(self, t: int, memory: Tensors = NOTHING) -> float:
        rounds = self.first.rounds
        return float(self.then(t - rounds, memory) if t >= rounds else self.first.at(t, self.then(0, memory)))


@lru_cache(256)
def _constant(lr: float) -> Schedule:
    return constant(lr)


def as_schedule(given: object) -> Schedule:
    """Return a schedule unchanged; convert a number to `constant`.

    Args:
        given: a schedule, or a number > 0.
    Raises:
        UsageError: `given` is neither, the number is ≤ 0, or `given` is a prefix without a schedule after it.
    Example:
        >>> as_schedule(0.1)
        constant(0.1)
    """
    if isinstance(given, Schedule):
        return given
    if isinstance(given, _Prefix):
        raise UsageError(
            f"{given!r} has no schedule after it.",
            "a schedule after it.",
            "it has no learning rate for the rounds after its own.",
            f"{given!r} >> constant(0.1)",
        )
    if isinstance(number := plain_number(given), (int, float)) and not isinstance(number, bool):
        return _constant(float(number))
    raise UsageError(
        f"{given!r} is not a learning rate.",
        "a positive number or a schedule.",
        _STEP,
        "cosine(0.1, rounds=100)",
    )


_PURE = (constant, step, exponential, inverse, inverse_sqrt, cosine, polynomial)
SCHEDULES: dict[str, type] = {c.__name__: c for c in (*_PURE, plateau, warmup, hold)}
