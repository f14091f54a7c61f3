"""A training loop of the user, called once for each client.

Tests: tests/identities/test_local_sgd.py
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from atoll.base.errors import ClientError, UsageError
from atoll.base.lines import Line
from atoll.base.names import ROWS_OF, metric_name
from atoll.base.random import Key, user_scope
from atoll.base.validation import plain_fields, real_number
from atoll.compute.autograd import constant_changed
from atoll.compute.batches import ClientBatch
from atoll.compute.layout import named_tensors
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


class ClientDataset(Dataset[tuple[Tensor, Tensor]]):
    """The rows of one client by their number: `len(rows)`, and `rows[i]` is (x, y)."""

    def __init__(self, lanes: ClientBatch) -> None:
        self._lanes = lanes

    def __len__(self) -> int:
        return self._lanes.sizes[0]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        position = range(len(self))[index]  # also for negative numbers, and with IndexError
        x, y, _ = self._lanes.take(self._lanes.places(torch.tensor([[position]])), (1,))
        return x[0, 0], y[0, 0]


class _NoAttribute(UsageError, AttributeError):
    """The error for an attribute of `DataLoader` that a `Loader` lacks; also an AttributeError, for `hasattr`."""


_OF_DATALOADER = (
    *("sampler", "batch_sampler", "num_workers", "collate_fn", "pin_memory", "drop_last", "timeout"),
    *("worker_init_fn", "multiprocessing_context", "generator", "prefetch_factor", "persistent_workers"),
)


class Loader:
    """Yields the batches `(x, y)` of one client. Each pass has a new random order.

    It has three attributes of a `DataLoader` or instead of one: `dataset`, the rows by number; `batch_size`, the number
    of rows in a batch; `rows`, the number of rows of the client. `len(loader)` is the number of batches. If the rows of
    a batch influence each other, a last batch of one row is merged into the batch before it, as in `Train`.
    """

    def __init__(self, lanes: ClientBatch, k: int, batch: int | None, key: Key, joins: bool = False) -> None:
        self._lanes = ClientBatch(
            lanes.clients,
            lanes.ids[k : k + 1],
            lanes.dtype,
            device=lanes.device,
            key=None if lanes.key is None else lanes.key.select(slice(k, k + 1)),
        )
        self._key, self._passes, self.rows = key, 0, lanes.sizes[k]
        count = int(lengths_of(torch.tensor(self.rows), batch, joins)[0])
        full = [min(batch or self.rows, self.rows)] * (count - 1)
        self._lengths = [*full, self.rows - sum(full)]
        self.batch_size = batch or self.rows
        self.dataset = ClientDataset(self._lanes)

    def __getattr__(self, name: str) -> Any:
        if name in _OF_DATALOADER:
            raise _NoAttribute(
                f"loader.{name} in the loop of Custom.",
                "loader.dataset, loader.batch_size, loader.rows or len(loader).",
                "a training draws the batches of each client by itself.",
            )
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)

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
            The metrics are a dict of numbers. Each is averaged over the clients that returned it, with their rows as
            weights. A client that returns a metric that is not finite fails. A name that the run uses itself, such as
            `lr`, becomes `training_lr`. In a plan text, `fn` is `module:name`.
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
        plain_fields(self, "batch", "lr")
        if self.lr is not None and (isinstance(self.lr, bool) or not isinstance(self.lr, (int, float))):
            raise UsageError(
                f"Custom(lr={self.lr!r:.60}).",
                "a number, or None.",
                "the function receives it as ctx.lr.",
                Line(python="Custom(train, lr=0.1)"),
            )
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
        nothing = torch.zeros((), dtype=torch.float64)  # of a metric that the client did not return, with 0 rows
        stacked = {n: torch.stack([s.get(n, nothing) for s in sums]) for n in names}
        count = {n: torch.stack([c[n] for c in counters]) for n in counters[0]}
        update = broadcast.model.theta - torch.stack(theta)
        return contribution_of(lanes, broadcast, task.layout, update, torch.stack(buffers), count, stacked), {}

    def _one(
        self, broadcast: Broadcast, lanes: ClientBatch, k: int, key: Key, task: Task
    ) -> tuple[Tensor, Tensor, Tensors, dict[str, Tensor]]:
        module = task.rebuilt(broadcast.model.of(k))
        device = broadcast.model.theta.device
        generator = torch.Generator(device).manual_seed(key.fold("generator").torch_seed())
        ctx = Context(broadcast.round, int(lanes.ids[k]), self.lr, device, generator)
        with user_scope(key.fold("custom")):
            loader = Loader(lanes, k, self.batch, key.fold("order"), task.couples)
            metrics = self.fn(module, loader, ctx)
        rows, sums = float(lanes.sizes[k]), {"rows": float(lanes.sizes[k])}
        for name, value in self._metrics(metrics).items():
            sums |= {name: value * rows, f"{ROWS_OF}{name}": rows}
        theta, buffers, fixed = task.layout.flatten(named_tensors(module))
        for constant in task.layout.constants:
            if not torch.equal(fixed[constant], broadcast.model.fixed[constant].to(fixed[constant])):
                raise constant_changed(constant)
        counters = {e.name: fixed[e.name] for e in task.layout.counters}
        return theta, buffers, counters, {n: torch.tensor(s, dtype=torch.float64) for n, s in sums.items()}

    def _metrics(self, metrics: Any) -> dict[str, float]:
        """The metrics that `fn` returned, under the names of the report.

        Raises:
            UsageError: the metrics are no dict of numbers, or two have the same name in the report.
            ClientError: a metric is not finite.
        """
        if metrics is None:
            return {}
        if not isinstance(metrics, Mapping):
            raise self._wrong(f"returned {type(metrics).__name__}")
        read: dict[str, float] = {}
        for name, raw in metrics.items():
            if not isinstance(name, str) or metric_name(name) in read:
                raise self._wrong(f"returned a metric named {name!r}" + (" twice" if isinstance(name, str) else ""))
            try:
                value = float(bool(raw)) if isinstance(raw, bool) else real_number(raw)
            except ValueError:
                raise self._wrong(f"returned the metric {name!r} = {raw!r:.60}, a {type(raw).__name__}") from None
            if not math.isfinite(value):
                raise ClientError(f"The metric {name!r} is {value}.", "finite metrics.")
            read[metric_name(name)] = value
        return read

    def _wrong(self, given: str) -> UsageError:
        return UsageError(
            f"{self!r:.80} {given}.",
            "a dict of numbers by name, or None.",
            "metrics of clients are averaged by name.",
            Line(python='return {"loss": loss.item()}'),
        )
