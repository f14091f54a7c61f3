"""The evaluation of a model on the rows of clients.

Tests: tests/identities/test_local_sgd.py
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from atoll.base.random import Key
from atoll.compute.batches import ROWS, ClientBatch, padded
from atoll.compute.task import Task
from atoll.plan.protocols import (
    OPEN,
    Broadcast,
    Contribution,
    Declared,
    Local,
    Tensors,
)


@dataclass(frozen=True, repr=False)
class Evaluate(Local):
    """Evaluates θ on the rows of each client. The contribution contains sums of loss and metrics, and no update.

    Example:
        >>> Evaluate()
        Evaluate()
    """

    def padded_batch(self, rows: int) -> int:
        """The padded length of this client's batches, a function of its own number of rows."""
        return padded(rows)

    def declare(self, task: Task) -> Mapping[str, Declared]:
        """Declares only sums: the rows, the loss and each metric of the task."""
        return {"rows": Declared(1, torch.int64, "sum"), OPEN: Declared(1, task.layout.dtype, "sum")}

    def contribute(
        self, broadcast: Broadcast, lanes: ClientBatch, memory: Tensors, key: Key, task: Task
    ) -> tuple[Contribution, Tensors]:
        """Σ loss, Σ metrics and the number of rows of each client. A pass takes at most `ROWS` rows of each client."""
        model = broadcast.model.lanes(len(lanes.sizes))
        positions = torch.arange(self.padded_batch(lanes.sizes[0]), device=lanes.ids.device).expand(
            len(lanes.sizes), -1
        )
        sums: dict[str, Tensor] = {}
        start = 0
        for piece in positions.split(ROWS, 1):
            counts = tuple(max(0, min(n - start, piece.shape[1])) for n in lanes.sizes)
            for name, value in task.measure(model, lanes.take(lanes.places(piece), counts)).items():
                sums[name] = sums[name] + value if name in sums else value
            start += piece.shape[1]
        sums["rows"] = lanes.rows
        facts = {n: s / lanes.rows.to(s.device) for n, s in sums.items() if n != "rows"}
        return Contribution({}, sums, lanes.rows, {}, facts), {}
