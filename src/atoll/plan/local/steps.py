"""The number of local steps: in one pass over the rows, or in a round if a schedule sets it.

Tests: tests/identities/test_local_sgd.py, tests/identities/test_schedule.py
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from atoll.base.errors import RunError, UsageError
from atoll.plan.schedule import Schedule, join

_FAR = 10**9  # a round in which every decreasing schedule has reached its end


def _whole(schedule: Schedule, t: int) -> int:
    """The number of steps of a schedule in round t; 0 if its value is not finite or rounds to less than 1."""
    value = schedule(t)
    return max(0, round(value)) if math.isfinite(value) else 0


def check_steps(schedule: Schedule) -> None:
    """Refuse a schedule of steps that observes the loss, or that is below 1 at the start of a piece or at the end."""
    steps, observes = _whole(schedule, 0), bool(schedule.init())
    turns, rest = [0], schedule
    while isinstance(rest, join):
        turns.append(turns[-1] + rest.first.rounds)
        rest = rest.then
    if observes or not all(_whole(schedule, t) for t in (*turns, _FAR)):
        raise UsageError(
            f"Train(steps={schedule!r}).",
            "a schedule that does not observe the loss." if observes else "at least 1 step in every round.",
            "the number of steps is fixed before the round."
            if observes
            else "a client that makes no step sends no update.",
            f"Train(sgd(0.1), steps=cosine({max(1, steps)}.0, rounds=100, end=1.0), batch=10)",
        )


def steps_at(schedule: Schedule, t: int) -> int:
    """The number of steps of round t.

    Args:
        schedule: gives the number of steps for each round; it is rounded to the nearest integer.
        t: the round, ≥ 0.
    Raises:
        RunError: a schedule that the user wrote gives less than one step.
    Example:
        >>> from atoll.plan.schedule import cosine
        >>> [steps_at(cosine(8.0, rounds=2, end=1.0), t) for t in range(3)]
        [8, 4, 1]
    """
    steps = _whole(schedule, t)
    if not steps:
        raise RunError(
            f"{schedule!r} gives {schedule(t)!r} steps in round {t}.",
            "at least 1 step in every round.",
            "a client that makes no step sends no update. The state is that of the round before.",
            "Train(sgd(0.1), steps=10, batch=10)",
        )
    return steps


def quotient(a: Tensor, b: Tensor) -> Tensor:
    """⌊a / b⌋."""
    return torch.div(a, b, rounding_mode="floor")


def lengths_of(rows: Tensor, batch: int | None, joins: bool) -> tuple[Tensor, Tensor]:
    """The number of batches in a pass over each client's rows, and whether the last batch has `batch` + 1 rows.

    A single row has no batch statistics. If the model uses batch statistics, a last batch of one row is therefore
    merged into the batch before it.

    Args:
        rows: the number of rows of each client, int64 `[K]`.
        batch: the number of rows in a batch; None: all rows.
        joins: whether a last batch of one row is merged into the batch before it.

    Example:
        >>> lengths_of(torch.tensor([25, 21, 7]), 10, True)
        (tensor([3, 2, 1]), tensor([False,  True, False]))
    """
    if batch is None:
        return torch.ones_like(rows), torch.zeros_like(rows, dtype=torch.bool)
    joined = (rows % batch == 1) & (rows > batch) & (joins and batch > 1)
    return quotient(rows + batch - 1, torch.tensor(batch)).clamp(min=1) - joined.long(), joined


def counted(steps: Iterator[tuple[Tensor, tuple[int, ...]]], rows: Tensor) -> Iterator[tuple[Tensor, tuple[int, ...]]]:
    """Yield the same steps, and add the number of rows that each client processes to `rows` in place."""
    for places, counts in steps:
        rows[: len(counts)] += torch.tensor(counts, device=rows.device)
        yield places, counts
