"""The evaluation of a model on the rows of clients.

Tests: tests/identities/test_local_sgd.py, tests/identities/test_personal.py
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from atoll.base.errors import UsageError
from atoll.base.lines import Part
from atoll.base.random import Key
from atoll.compute.batches import ClientBatch, padded
from atoll.compute.layout import Layout
from atoll.compute.model_state import Model
from atoll.compute.task import OnRows, Task
from atoll.data.clients import Clients
from atoll.plan.local.own import Names
from atoll.plan.local.passes import measured, measured_of_each
from atoll.plan.local.train import Train
from atoll.plan.protocols import (
    Broadcast,
    Contribution,
    Declared,
    Local,
    Tensors,
)

SCORE = "score/"  # the prefix of the sums of each client in `per_client`


@dataclass(frozen=True, repr=False)
class Evaluate(Local):
    """Evaluates a model on the rows of each client. The contribution contains sums of loss and metrics, and no update.

    Args:
        of: the local part of a training with models of clients: the model of each client is evaluated, with its client
            memory, which does not change; None: θ is evaluated.
    Raises:
        UsageError: `of` is no local part with models of clients.
    Example:
        >>> Evaluate()
        Evaluate()
    """

    of: Local | None = None

    def __post_init__(self) -> None:
        if self.of is not None and not (isinstance(self.of, Local) and self.of.trains_personal):
            why = "all clients have the model of the server."
            write = Part("Evaluate()", "local")
            raise UsageError(f"Evaluate({self.of!r:.60}).", "a local part with models of clients, or None.", why, write)

    @property
    def own(self) -> Names:
        """The names of the part of the model that is not at the server."""
        return () if self.of is None else self.of.own

    def server_layout(self, layout: Layout) -> Layout:
        """The layout of θ at the server."""
        return layout if self.of is None else self.of.server_layout(layout)

    def first_memory(self, task: Task) -> Tensors:
        """The memory of the training before its first round."""
        return {} if self.of is None else self.of.first_memory(task)

    def padded_batch(self, rows: int) -> int:
        """The padded length of this client's batches, a function of its own number of rows."""
        return padded(rows)

    def declare(self, task: Task) -> Mapping[str, Declared]:
        """Declares only sums: the rows, the loss and each metric of the task."""
        return _declared(task)

    def contribute(
        self, broadcast: Broadcast, lanes: ClientBatch, memory: Tensors, key: Key, task: Task
    ) -> tuple[Contribution, Tensors]:
        """Σ loss, Σ metrics and the number of rows of each client. A pass takes at most `ROWS` rows of each client."""
        if self.of is not None:
            broadcast = broadcast._replace(model=self.of.personal(broadcast.model, memory, task))
        return measured(broadcast, lanes, key, task, None), {}


@dataclass(frozen=True, repr=False)
class ScoreRows(Local):
    """Passes the scores of the rows of one client to a function in this process, which adds them.

    Args:
        on_rows: receives output, targets and scores of each piece of rows.
    """

    on_rows: OnRows

    def padded_batch(self, rows: int) -> int:
        """The padded length of this client's batches, a function of its own number of rows."""
        return padded(rows)

    def declare(self, task: Task) -> Mapping[str, Declared]:
        """Declares only the number of rows: `on_rows` adds the scores."""
        return {"rows": Declared(1, torch.int64, "sum")}

    def contribute(
        self, broadcast: Broadcast, lanes: ClientBatch, memory: Tensors, key: Key, task: Task
    ) -> tuple[Contribution, Tensors]:
        """The number of rows of the client."""
        return measured(broadcast, lanes, key, task, self.on_rows), {}


@dataclass(frozen=True, repr=False)
class ScorePersonal(Local):
    """Evaluates the model of each client on held-out rows of its own. The sums of each client are in `per_client`.

    Args:
        local: the local part of the plan, which builds the models of clients.
        held: the held-out rows of the clients, under the same ids.
        tune: the training of a copy of each model on the client's train rows before its evaluation; None: no training.
    """

    local: Local
    held: Clients
    tune: Train | None = None

    def padded_batch(self, rows: int) -> int:
        """The padded length of this client's batches, a function of its own number of rows."""
        return padded(rows) if self.tune is None else self.tune.padded_batch(rows)

    def first_memory(self, task: Task) -> Tensors:
        """The memory of the local part, which does not change."""
        return self.local.first_memory(task)

    def declare(self, task: Task) -> Mapping[str, Declared]:
        """Declares only the number of rows."""
        return {"rows": Declared(1, torch.int64, "sum")}

    def contribute(
        self, broadcast: Broadcast, lanes: ClientBatch, memory: Tensors, key: Key, task: Task
    ) -> tuple[Contribution, Tensors]:
        """The sums of each client, in groups of clients whose held-out rows have one padded length."""
        model, held = self._models(broadcast.model, lanes, memory, key, task), replace(lanes, clients=self.held)
        found = measured_of_each(broadcast._replace(model=model), held, key, task)
        sums = {f"{SCORE}{name}": t for name, t in found.items()}
        return Contribution({}, {"rows": held.rows.to(torch.int64)}, lanes.rows, {}, sums), {}

    def _models(self, server: Model, lanes: ClientBatch, memory: Tensors, key: Key, task: Task) -> Model:
        """The models of the clients, `[K, …]`: tuned, if the part tunes them."""
        part = self.local
        model = part.personal(server, memory, task) if part.trains_personal else part.whole(server, task)
        return model.lanes(len(lanes.sizes)) if self.tune is None else self.tune.tuned(model, lanes, key, task)


def _declared(task: Task) -> Mapping[str, Declared]:
    names = ("loss", *(m.name for m in task.metrics if m.sums is not None))
    measured = {n: Declared(task.lengths.get(n, 1), torch.float64, "sum") for n in names}
    return {"rows": Declared(1, torch.int64, "sum"), **measured}
