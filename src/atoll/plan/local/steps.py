"""Numbers of local steps: of a pass over the rows, and by a schedule of the round."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from atoll.errors import RunError, UsageError
from atoll.schedule import Schedule, led

_FAR = 10**9  # a round in which every schedule that falls has fallen


def _whole(schedule: Schedule, t: int) -> int:
    """How many steps a schedule says for round t; 0 for what is no number of steps."""
    value = schedule(t)
    return max(0, round(value)) if math.isfinite(value) else 0


def check_steps(schedule: Schedule) -> None:
    """Refuse a schedule of steps that looks at the loss, or that comes below 1: where a piece begins or in the end."""
    steps, looks = _whole(schedule, 0), bool(schedule.init())
    turns, rest = [0], schedule
    while isinstance(rest, led):
        turns.append(turns[-1] + rest.first.rounds)
        rest = rest.then
    if looks or not all(_whole(schedule, t) for t in (*turns, _FAR)):
        raise UsageError(
            f"Train(steps={schedule!r}).",
            "a schedule of the round alone." if looks else "at least 1 step in every round.",
            "what says how long clients work is known before the round." if looks else "no step is no update.",
            f"Train(sgd(0.1), steps=cosine({max(1, steps)}.0, rounds=100, end=1.0), batch=10)",
        )


def steps_at(schedule: Schedule, t: int) -> int:
    """The steps of round t.

    Raises:
        RunError: a schedule of the user's own says less than one.
    Example:
        >>> from atoll.schedule import cosine
        >>> [steps_at(cosine(8.0, rounds=2, end=1.0), t) for t in range(3)]
        [8, 4, 1]
    """
    steps = _whole(schedule, t)
    if not steps:
        raise RunError(
            f"{schedule!r} says {schedule(t)!r} steps for round {t}.",
            "at least 1 step in every round.",
            "no step is no update. The state is that of the round before.",
            "Train(sgd(0.1), steps=10, batch=10)",
        )
    return steps


def quotient(a: Tensor, b: Tensor) -> Tensor:
    """⌊a / b⌋."""
    return torch.div(a, b, rounding_mode="floor")


def lengths_of(rows: Tensor, batch: int | None, joins: bool) -> tuple[Tensor, Tensor]:
    """How many batches a pass over so many rows has, and whether its last one holds a row more than `batch`.

    For batch statistics, which one row has none of, a tail of one joins the batch before.

    Example:
        >>> lengths_of(torch.tensor([25, 21, 7]), 10, True)
        (tensor([3, 2, 1]), tensor([False,  True, False]))
    """
    if batch is None:
        return torch.ones_like(rows), torch.zeros_like(rows, dtype=torch.bool)
    joined = (rows % batch == 1) & (rows > batch) & (joins and batch > 1)
    return quotient(rows + batch - 1, torch.tensor(batch)).clamp(min=1) - joined.long(), joined


def counted(steps: Iterator[tuple[Tensor, tuple[int, ...]]], rows: Tensor) -> Iterator[tuple[Tensor, tuple[int, ...]]]:
    """The same steps, places and counts of each; the rows of each client that count are added up, in place."""
    for places, counts in steps:
        rows[: len(counts)] += torch.tensor(counts, device=rows.device)
        yield places, counts
