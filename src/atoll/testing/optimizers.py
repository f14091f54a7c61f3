"""The contracts of schedules and optimizers.

Tests: tests/conformance/test_parts.py
"""

from __future__ import annotations

import math
from typing import Any

import torch

from atoll.base.random import Key
from atoll.testing.contract import (
    check_value,
    conformity,
    lanes,
    on_meta,
    pure,
    refused,
    require,
    row,
    same,
    same_names,
)


@conformity
def check_schedule(part: Any) -> None:
    """Check the contract of a schedule.

    For every round up to 10⁶ the learning rate is finite and not negative; in round 0 it is positive. It is a function
    of the round and the memory. The memory keeps its names, shapes and dtypes for all observed losses, also for NaN.

    Args:
        part: a schedule, `part(t, memory) -> float` with `init` and `observe`.
    Raises:
        Nonconformity: the schedule breaks the contract.
    Example:
        >>> from atoll.plan.schedule import cosine
        >>> check_schedule(cosine(0.1, rounds=100))
    """
    check_value(part)
    subject = repr(part)
    first = refused(f"{subject}.init", part.init)
    memory = dict(first)
    for t, loss in enumerate([2.0, 1.0, 1.0, 1.0, math.nan, math.inf, 0.0, -1.0] * 8):
        rate = pure(subject, part, t, memory)
        _check_rate(subject, t, rate)
        memory = pure(f"{subject}.observe", part.observe, memory, torch.tensor(loss))
        same_names(f"{subject}.observe", first, memory)
    for t in (100, 1000, 10**6):
        _check_rate(subject, t, part(t, first))


def _check_rate(subject: str, t: int, rate: Any) -> None:
    require(
        isinstance(rate, float) and math.isfinite(rate) and (rate > 0 or (t > 0 and rate == 0)),
        f"{subject} gave {rate!r} in round {t}.",
        "a finite float, not negative, and positive in round 0.",
        "a learning rate of 0 makes no step, and a negative one increases the loss.",
    )


@conformity
def check_optimizer(part: Any) -> None:
    """Check the contract of an optimizer.

    It descends. It changes no argument. K lanes `[K, d]` give the bits of K single θ `[d]`, also if the lanes have made
    different numbers of steps. Its state keeps names, shapes and dtypes. Steps in place, if it has them, give the same
    bits as `update`. It runs on meta tensors.

    Args:
        part: an optimizer with `init`, `update` and `lr_at`.
    Raises:
        Nonconformity: the optimizer breaks the contract.
    Example:
        >>> from atoll.plan.optimizer import adam
        >>> check_optimizer(adam(0.01))
    """
    check_value(part)
    for dtype in (torch.float32, torch.float64):
        for d in (1, 37):
            _check_lanes(part, d, dtype)
    _check_descent(part)
    theta = torch.empty(3, 5, device="meta")
    on_meta(repr(part), part.update, theta, theta, {}, part.init(theta), 0)


def _check_lanes(part: Any, d: int, dtype: torch.dtype, k: int = 5, steps: int = 3) -> None:
    subject, key = repr(part), Key(7).fold("optimizer", d)
    theta = key.fold("theta").normal(k * d, dtype).reshape(k, d)
    singles = [(theta[i].clone(), dict(part.init(theta[i]))) for i in range(k)]
    together = (theta, dict(part.init(theta)))
    first = {n: t.clone() for n, t in together[1].items()}
    for t in range(steps):
        g = key.fold("g", t).normal(k * d, dtype).reshape(k, d)
        sums = {"loss": torch.tensor(1.0, dtype=torch.float64)}
        now, state = together
        together = pure(subject, part.update, now, g, sums, state, t)
        same_names(f"{subject}.update", first, together[1])
        singles = [part.update(x, g[i], sums, s, t) for i, (x, s) in enumerate(singles)]
        require(
            all(same(together[0][i], x) for i, (x, _) in enumerate(singles)),
            f"{subject} moved {k} lanes of {d} {dtype} differently than one at a time, in step {t}.",
            "the same bits.",
            "the training of a client must not depend on the other clients of its batch.",
        )
        rate = part.lr_at(t, state)
        _check_rate(subject, t, rate)
        if part.trains_clients:
            inside, slots = now.clone(), {n: s.clone() for n, s in state.items()}
            part.stepper(inside, slots, rate).step(g)
            require(
                same(inside, together[0]),
                f"{subject} moved differently in place, in step {t}.",
                "the bits of update.",
                "local training steps in place, the server calls update, and both must apply one rule.",
            )
    if part.trains_clients:
        _check_uneven(part, subject, theta)


def _check_uneven(part: Any, subject: str, theta: torch.Tensor) -> None:
    """Check lanes whose optimizers have made different numbers of steps: 2, 1 and 0."""
    g = theta.flip(0)
    kept = []
    for i, done in enumerate((2, 1, 0)):
        x, state = theta[i : i + 1].clone(), lanes(part.slots(theta[i]), 1)
        for _ in range(done):
            part.stepper(x, state, 0.01).step(g[i : i + 1])
        kept.append((x, state))
    whole = torch.cat([x for x, _ in kept])
    slots = {n: torch.cat([state[n] for _, state in kept]) for n in kept[0][1]}
    part.stepper(whole, slots, 0.01).step(g[:3])
    for i, (x, state) in enumerate(kept):
        part.stepper(x, state, 0.01).step(g[i : i + 1])
        require(
            same((row(whole, i), row(slots, i)), (x, state)),
            f"{subject} moved a lane differently in a batch with lanes that had made other numbers of steps.",
            "the same bits.",
            "clients keep their optimizers, and they do not participate equally often.",
        )


def _check_descent(part: Any) -> None:
    theta = torch.zeros(8, dtype=torch.float64)
    g = torch.linspace(-1.0, 1.0, 8, dtype=torch.float64)
    after, _ = part.update(theta, g, {}, part.init(theta), 0)
    along = float((after - theta) @ g)
    require(
        along < 0,
        f"{part!r} moved by {along:.3g} along an update of length {float(g.norm()):.3g}.",
        "a step against it.",
        "an update points uphill, and the optimizer always descends.",
    )
