"""A training loop of the user, called once for each client.

Tests: tests/identities/test_local_sgd.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from atoll.base.errors import UsageError
from atoll.base.random import Key, global_scope
from atoll.compute.batches import ClientBatch
from atoll.compute.task import Task
from atoll.plan.local.contribution import (
    check_batch,
    check_sends,
    contribution_of,
    declared_update,
)
from atoll.plan.local.steps import lengths_of
from atoll.plan.protocols import (
    OPEN,
    Broadcast,
    Contribution,
    Declared,
    Local,
    Sends,
    Tensors,
)


@dataclass(frozen=True)
class Context:
    """The facts that a user's loop receives: round, client, learning rate, device and a keyed generator.

    Args:
        round: the number of the round, from 0.
        client: the id of the client.
        lr: the value passed as `Custom(fn, lr=...)`, or None.
        device: the device of the model.
        generator: a torch generator, seeded by the training's seed, the round and the client.
    """

    round: int
    client: int
    lr: float | None
    device: torch.device
    generator: torch.Generator


class Loader:
    """Yields the batches `(x, y)` of one client. Each pass has a new random order.

    If the model uses batch statistics, a last batch of one row is merged into the batch before it, as in `Train`.
    """

    def __init__(self, lanes: ClientBatch, k: int, batch: int | None, key: Key, joins: bool = False) -> None:
        self._lanes = ClientBatch(lanes.clients, lanes.ids[k : k + 1], lanes.dtype, device=lanes.device)
        self._key, self._passes, self.rows = key, 0, lanes.sizes[k]
        count = int(lengths_of(torch.tensor(self.rows), batch, joins)[0])
        full = [min(batch or self.rows, self.rows)] * (count - 1)
        self._lengths = [*full, self.rows - sum(full)]

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = self._key.fold(self._passes).permutation(self.rows)[None]
        self._passes += 1
        for piece in order.split(self._lengths, 1):
            x, y, _ = self._lanes.take(self._lanes.places(piece), (piece.shape[1],))
            yield x[0], y[0]


@dataclass(frozen=True, repr=False)
class Custom(Local):
    """Your own training loop, called once for each client of a round.

    gᵢ = θ − θᵢ,  where θᵢ are the parameters of the model after `fn` has trained it.

    Args:
        fn: `fn(model, loader, ctx) -> metrics | None`. It trains the model in place. `loader` yields batches `(x, y)`.
            The metrics are a dict of numbers. They are averaged with the rows as weights. In a plan text, `fn` is
            `module:name`.
        batch: the number of rows in a batch of the loader; None: all rows.
        lr: is passed to `fn` as `ctx.lr`; a number or None.
        sends: `"update"` or `"model"`, as for `Train`.
    Raises:
        UsageError: `fn` is not a function, or another argument is out of range.
    Example:
        >>> def train(model, loader, ctx):
        ...     optimizer = torch.optim.SGD(model.parameters(), ctx.lr)
        ...     for x, y in loader:
        ...         optimizer.zero_grad()
        ...         nn.functional.cross_entropy(model(x), y).backward()
        ...         optimizer.step()
        >>> part = Custom(train, batch=10, lr=0.1)
    """

    fn: Callable[[nn.Module, Loader, Context], Mapping[str, float] | None]
    batch: int | None = None
    lr: float | None = None
    sends: Sends = "update"
    numerics = "loop"

    def __post_init__(self) -> None:
        check_batch("Custom", self.batch)
        check_sends("Custom", self.sends, "")
        if not callable(self.fn):
            raise UsageError(
                f"Custom({self.fn!r}).",
                "a function (model, loader, ctx), or module:name in a plan text.",
            )

    def padded_batch(self, rows: int) -> int:
        """The number of rows itself: clients train one after another, so their batches are not padded."""
        return rows

    def declare(self, task: Task) -> Mapping[str, Declared]:
        """Declares the update, buffers, the rows, and metrics of any name: clients may return different metrics."""
        means = {n: d for n, d in declared_update(task).items() if d.kind == "mean"}
        return {**means, "rows": Declared(1, torch.float64, "sum"), OPEN: Declared(1, torch.float64, "sum")}

    def contribute(
        self, broadcast: Broadcast, lanes: ClientBatch, memory: Tensors, key: Key, task: Task
    ) -> tuple[Contribution, Tensors]:
        """Call the user's loop for each client, with a new module and keyed randomness."""
        out = [self._one(broadcast, lanes, k, key.only(k), task) for k in range(len(lanes.sizes))]
        theta, buffers, counters, sums = zip(*out, strict=True)
        names = sorted(set().union(*sums))
        nothing = torch.zeros((), dtype=torch.float64)
        stacked = {n: torch.stack([s.get(n, nothing) for s in sums]) for n in names}
        count = {n: torch.stack([c[n] for c in counters]) for n in counters[0]}
        update = broadcast.model.theta - torch.stack(theta)
        return contribution_of(lanes, update, torch.stack(buffers), count, stacked), {}

    def _one(
        self, broadcast: Broadcast, lanes: ClientBatch, k: int, key: Key, task: Task
    ) -> tuple[Tensor, Tensor, Tensors, dict[str, Tensor]]:
        module = task.rebuilt(broadcast.model.of(k)).train()
        device = broadcast.model.theta.device
        generator = torch.Generator(device).manual_seed(key.fold("generator").torch_seed())
        ctx = Context(broadcast.round, int(lanes.ids[k]), self.lr, device, generator)
        with global_scope(key.fold("custom")):
            loader = Loader(lanes, k, self.batch, key.fold("order"), task.batch_statistics)
            metrics = self.fn(module, loader, ctx) or {}
        if not isinstance(metrics, Mapping):
            raise UsageError(
                f"{self!r} returned {type(metrics).__name__}.",
                "metrics by name, or None.",
                write='return {"loss": loss}',
            )
        rows = lanes.sizes[k]
        sums = {n: torch.tensor(float(v) * rows, dtype=torch.float64) for n, v in metrics.items()}
        sums["rows"] = torch.tensor(float(rows), dtype=torch.float64)
        theta, buffers, fixed = task.layout.flatten(module.state_dict())
        return theta, buffers, {e.name: fixed[e.name] for e in task.layout.counters}, sums
