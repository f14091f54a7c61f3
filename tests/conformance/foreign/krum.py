"""Krum: an aggregator that selects the update with the smallest distances to its neighbours.

Tests: tests/conformance/test_foreign.py
"""

from dataclasses import dataclass

import torch

from atoll.base.errors import RunError
from atoll.base.names import dotted, without_prefix
from atoll.base.validation import bounded_number, check_fields
from atoll.plan.protocols import Aggregator, Conflict, Partial, Total


class Rows(dict[str, torch.Tensor], Partial):
    """Contributions as tensors `[n, …]` by name, one row for each start, in the order of (client, repeat).

    All contributions of a round must have the same names. The partial of no contribution has no name.
    """

    def tensors(self):
        """The rows by name."""
        return self

    @classmethod
    def of(cls, *tables):
        """The rows of some tables."""
        some = [table for table in tables if table]
        order = torch.cat([t["client"] << 32 | t["repeat"] for t in some]).argsort() if some else ()
        return cls({name: torch.cat([t[name] for t in some])[order] for name in (some[0] if some else ())})

    def reduce(self, group):
        """The rows of all processes."""
        return self.of(*group.all_gather(self))


@dataclass(frozen=True, repr=False)
class Krum(Aggregator):
    """The update with the smallest sum of squared distances to its nearest neighbours.

    g = g_k,   k = argminᵢ Σⱼ |gᵢ − gⱼ|²,   j one of the n − f − 2 updates that are nearest to gᵢ

    All clients have the weight 1. Of two equal sums the one of the smaller client id is selected. The model's buffers
    are those of the selected client. `Report.clients["selected"]` is true for the selected client only.

    Args:
        f: the largest number of clients that may send an arbitrary update, ≥ 0.
    Raises:
        UsageError: f is out of range.
        RunError: a round has fewer than 2f + 3 contributions.
    Example:
        >>> Krum(2)
        Krum(2)

    Reference: Blanchard et al., Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent, 2017.
    """

    f: int = bounded_number(least=0, whole=True, example=1)
    weights = "equal"

    def __post_init__(self):
        check_fields(self)

    def zero(self):
        """No row."""
        return Rows()

    def fold(self, partial, contribution, ids):
        """The rows with K more rows."""
        return Rows.of(partial, dotted({**contribution._asdict(), **ids._asdict()}))

    def merge(self, a, b):
        """The rows of both."""
        return Rows.of(a, b)

    def total(self, partial):
        """The row of the selected client, and the sums of all clients."""
        n = torch.tensor(len(partial.get("client", ())))
        if not n:
            return Total({}, {}, n, n, {})
        if n < 2 * self.f + 3:
            why = "with fewer updates the selected one can be an arbitrary one."
            raise RunError(f"{self!r} with {n} contributions.", f"at least {2 * self.f + 3}.", why, "Krum(0)")
        g = partial["means.update"].double()
        distances = torch.stack([(g - row).square().sum(1) for row in g]).sort(1).values  # the first is 0, its own
        best = distances[:, 1 : n - self.f - 1].sum(1).argmin()
        means = {name: t[best].double() for name, t in without_prefix(partial, "means.").items()}
        sums = {name: t.double().reshape(n, -1).sum(0) for name, t in without_prefix(partial, "sums.").items()}
        counters = {name: t.amax(0) for name, t in without_prefix(partial, "counters.").items()}
        return Total(means, sums, n, n, counters, {"id": partial["client"], "selected": torch.arange(n) == best.cpu()})

    def finalize(self, total, info):
        """The selected update as it is."""
        return total

    def conflicts(self, slots):
        """A sum of updates."""
        why = "the rule selects one of the updates of a round, and a sum of updates does not contain them."
        if slots.pace.asynchronous:
            yield Conflict(f"{self!r} with {slots.pace!r}.", "a pace without late updates.", why, "Sync()")
        if slots.codec.per_sum:
            yield Conflict(f"{self!r} with {slots.codec!r}.", "a codec that decodes no sum.", why, "Identity()")
