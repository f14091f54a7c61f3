"""Aggregation by a function of the user, which receives the updates of all clients of a round as one matrix.

Tests: tests/identities/test_combine.py
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from atoll.base.errors import AtollError, RunError, UsageError, place_of
from atoll.base.lines import Line
from atoll.base.random import Key, user_scope
from atoll.plan.aggregate.mean import Mean, one_of
from atoll.plan.aggregate.rows import PartialRows, RowRule
from atoll.plan.protocols import Total, Weights


@dataclass(frozen=True, repr=False)
class Combine(RowRule):
    """The update that a function computes from the updates of all clients of a round.

    g = fn(updates, weights)

    Metrics, sums, counters and buffers are aggregated as by `Mean`. The server keeps the update of every client of a
    round. `fn` runs once in a round, at the server. Random draws inside it have the same seed in each round.

    Args:
        fn: a function of `updates`, float64 `[n, d]`, and `weights`, float64 `[n]`, which returns floats `[d]`. Row i
            of both belongs to one start of a client. Rows are in the order of client ids, then of the client's starts.
            `fn` must not change its arguments. In a plan text, `fn` is `module:name`.
        weights: `"examples"`: the weight of a client is its number of rows; `"equal"`: 1. With a sampler of unequal
            chances it is divided by the chance of the client, as in `Mean`.
    Raises:
        UsageError: `fn` is not a function, or the updates of a round need more than half of the free memory.
        RunError: `fn` raised an error, changed an argument, or returned something else than finite floats `[d]`.
    Example:
        >>> from atoll.plan.protocols import Contribution, Ids
        >>> from atoll.testing import round_info
        >>> rule = Combine(lambda updates, weights: updates.median(0).values)
        >>> rows = torch.tensor([[1.0], [900.0], [3.0]])
        >>> ids = Ids(torch.arange(3), torch.zeros(3, dtype=torch.int64))
        >>> given = Contribution({"update": rows}, {}, torch.tensor([10, 10, 10]), {}, {})
        >>> rule.finalize(rule.total(rule.fold(rule.zero(), given, ids)), round_info()).means["update"]
        tensor([3.], dtype=torch.float64)

    Reference: Yin et al., Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates, 2018.
    """

    fn: Callable[[Tensor, Tensor], Tensor]
    weights: Weights = "examples"
    in_memory = True

    def __post_init__(self) -> None:
        if not callable(self.fn):
            raise UsageError(
                f"Combine({self.fn!r:.60}).",
                "a function (updates, weights), or module:name in a plan text.",
            )
        one_of("Combine", "weights", self.weights, ("examples", "equal"), "Combine(mine:rule)")
        object.__setattr__(self, "_mean", Mean(self.weights))

    def kept_as_rows(self, name: str) -> bool:
        """The function receives updates. Other means, such as buffers, are averaged."""
        return name == "update"

    def total(self, partial: PartialRows) -> Total:
        """The update that `fn` returns times the total weight, and the sums of everything else.

        Raises:
            RunError: `fn` raised an error, changed an argument, or returned something else than finite floats `[d]`.
        """
        total = self._mean.total(partial.rest)
        if not len(partial):
            return total
        updates, weights = (partial.matrix(n, torch.float64) for n in ("means/update", "weights"))
        result = self._call(updates, weights)
        for place, block in zip(partial.places(), partial.blocks, strict=True):
            for name, now, given in (("updates", updates, "means/update"), ("weights", weights, "weights")):
                if not _same_bits(now[place.to(now.device)], block[given].to(now)):
                    raise RunError(
                        f"{self!r:.80} changed its argument {name} in place.",
                        "a function that leaves its arguments as they are.",
                        "the server still needs them.",
                        Line(python=f"{name} = {name}.clone()"),
                    )
        update = self._checked(result, updates) * float(total.weight)
        return total._replace(means={**total.means, "update": update})

    def _call(self, updates: Tensor, weights: Tensor) -> Any:
        try:
            with user_scope(Key(0).fold("combine")):
                return self.fn(updates, weights)
        except AtollError:
            raise
        except Exception as error:
            place = place_of(error)
            raise RunError(
                f"{self!r:.80} raised {type(error).__name__}: {error}{f' ({place})' if place else ''}.",
                f"floats [{updates.shape[1]}] from updates {list(updates.shape)} and weights [{len(weights)}].",
            ) from error

    def _checked(self, result: Any, updates: Tensor) -> Tensor:
        """The result as float64 `[d]`, in memory of its own."""
        n, d = updates.shape
        if not isinstance(result, Tensor):
            given = f"a {type(result).__name__}"
        elif result.shape != (d,) or not result.is_floating_point():
            given = f"a tensor of shape {list(result.shape)} and {result.dtype}"
        elif not bool(result.isfinite().all()):
            bad = int((~result.isfinite()).sum())
            given = f"{bad} of {d} numbers that are NaN or infinite"
        else:
            return result.detach().to(updates).clone()
        raise RunError(
            f"{self!r:.80} returned {given} for updates [{n}, {d}].",
            f"a tensor of finite floats [{d}].",
            "the optimizer moves the d parameters along it.",
            Line(python="return updates.median(0).values") if isinstance(result, tuple) else "",
        )


def _same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two float64 tensors have the same bits, also where they are NaN."""
    return torch.equal(a.view(torch.int64), b.view(torch.int64))
