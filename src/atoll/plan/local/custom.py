"""A training loop of the user, called once for each client.

Tests: tests/identities/test_local_sgd.py
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from atoll.base.errors import ClientError, UsageError
from atoll.base.lines import Change, Line
from atoll.base.names import ROWS_OF, metric_name
from atoll.base.random import Key, user_scope
from atoll.base.validation import plain_fields, real_number
from atoll.compute.autograd import constant_changed
from atoll.compute.batches import ClientBatch
from atoll.compute.layout import named_tensors
from atoll.compute.shapes import is_plain, kind_of
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
    """The facts that a user's loop receives: round, client, learning rate, device, a keyed generator and client memory.

    Args:
        round: the number of the round, from 0.
        client: the id of the client.
        device: the device of the model.
        generator: a torch generator, seeded by the training's seed, the round and the client.
        memory: the memory of the client, tensors by name, on the device of the model. The loop changes the tensors or
            replaces them. The next start of the client reads them if the server has accepted this contribution.
        rate: the value passed as `Custom(fn, lr=...)`, or None.
    """

    round: int
    client: int
    device: torch.device
    generator: torch.Generator
    memory: dict[str, Tensor] = field(default_factory=dict)
    rate: float | None = None

    @property
    def lr(self) -> float:
        """The learning rate of `Custom(fn, lr=...)`.

        Raises:
            UsageError: no rate was passed; `rate` is None then.
        """
        if self.rate is None:
            raise UsageError(
                "ctx.lr is read in the loop of Custom, and no rate was passed.",
                "Custom(fn, lr=...).",
                "the loop has no rate of its own.",
                Line("Custom(fn, lr=0.1)", *_SLOT_WITH_RATE),
            )
        return self.rate


_SLOT_WITH_RATE = tuple(Change("plan.local", "Custom(mine:train, lr=0.1)").at(door) for door in ("shell", "file"))


Inputs = Callable[[Tensor], Any]  # rows as stored → rows as a model takes them


class ClientDataset(Dataset[tuple[Any, Tensor]]):
    """The rows of one client by their number: `len(rows)`, and `rows[i]` is (x, y)."""

    def __init__(self, lanes: ClientBatch, inputs: Inputs) -> None:
        self._lanes, self._inputs = lanes, inputs

    def __len__(self) -> int:
        return self._lanes.sizes[0]

    def __getitem__(self, index: int) -> tuple[Any, Tensor]:
        position = range(len(self))[index]  # also for negative numbers, and with IndexError
        x, y, _ = self._lanes.take(self._lanes.places(torch.tensor([[position]])), (1,))
        return self._inputs(x[0, 0]), y[0, 0]


class _NoAttribute(UsageError, AttributeError):
    """The error for an attribute of `DataLoader` that a `Loader` lacks; also an AttributeError, for `hasattr`."""


_OF_DATALOADER = (
    *("sampler", "batch_sampler", "num_workers", "collate_fn", "pin_memory", "drop_last", "timeout"),
    *("worker_init_fn", "multiprocessing_context", "generator", "prefetch_factor", "persistent_workers"),
)


class Loader:
    """Yields the batches `(x, y)` of one client. Each pass has a new random order. x is a dict if rows are dicts.

    It has three attributes of a `DataLoader` or instead of one: `dataset`, the rows by number; `batch_size`, the number
    of rows in a batch; `rows`, the number of rows of the client. `len(loader)` is the number of batches. If the rows of
    a batch influence each other, a last batch of one row is merged into the batch before it, as in `Train`.
    """

    def __init__(self, lanes: ClientBatch, k: int, batch: int | None, key: Key, task: Task) -> None:
        self._lanes = ClientBatch(
            lanes.clients,
            lanes.ids[k : k + 1],
            lanes.dtype,
            device=lanes.device,
            key=None if lanes.key is None else lanes.key.select(slice(k, k + 1)),
        )
        self._key, self._passes, self.rows = key, 0, lanes.sizes[k]
        count = int(lengths_of(torch.tensor(self.rows), batch, task.couples)[0])
        full = [min(batch or self.rows, self.rows)] * (count - 1)
        self._lengths = [*full, self.rows - sum(full)]
        self.batch_size = batch or self.rows
        self._inputs = task.inputs
        self.dataset = ClientDataset(self._lanes, task.inputs)

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

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        order = self._key.fold(self._passes).permutation(self.rows)[None]
        self._passes += 1
        for piece in order.split(self._lengths, 1):
            x, y, _ = self._lanes.take(self._lanes.places(piece), (piece.shape[1],))
            yield self._inputs(x[0]), y[0]


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
        memory: `memory(model) -> dict of tensors`, the memory with which every client begins. `model` is the model
            before the first round. `fn` reads and changes it as `ctx.memory`; names, shapes and dtypes stay. None:
            clients have no memory.
    Raises:
        UsageError: `fn` or `memory` is not a function, or another argument is out of range.
    Example:
        >>> def train(model, loader, ctx):
        ...     optimizer = torch.optim.SGD(model.parameters(), ctx.lr)
        ...     for x, y in loader:
        ...         optimizer.zero_grad()
        ...         nn.functional.cross_entropy(model(x), y).backward()
        ...         optimizer.step()
        >>> part = Custom(train, batch=10, lr=0.1)
        >>> def first(model):
        ...     return {"visits": torch.zeros((), dtype=torch.int64)}
        >>> def count(model, loader, ctx):
        ...     ctx.memory["visits"] += 1
        >>> part = Custom(count, memory=first)
    """

    fn: Callable[[nn.Module, Loader, Context], Mapping[str, float] | None]
    batch: int | None = None
    lr: float | None = None
    sends: Sends = "update"
    memory: Callable[[nn.Module], Mapping[str, Tensor]] | None = None
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
        if self.memory is not None and not callable(self.memory):
            raise UsageError(
                f"Custom(memory={self.memory!r:.60}).",
                "a function (model) that returns a dict of tensors, or None.",
                "each client begins with these tensors.",
                Line(python="Custom(train, memory=make)"),
            )

    def padded_batch(self, rows: int) -> int:
        """The number of rows itself: clients train one after another, so their batches are not padded."""
        return rows

    def declare(self, task: Task) -> Mapping[str, Declared]:
        """Declares the update, buffers, the rows, and metrics of any name: clients may return different metrics."""
        means = {n: d for n, d in declared_update(task).items() if d.kind == "mean"}
        return {**means, "rows": Declared(1, torch.float64, "sum"), OPEN: Declared(1, torch.float64, "sum")}

    def first_memory(self, task: Task) -> Tensors:
        """The memory with which every client begins: copies of the tensors of `memory(model)`, in CPU memory.

        Raises:
            UsageError: `memory(model)` is no dict of dense tensors by name.
        """
        if self.memory is None:
            return {}
        with user_scope(Key(0).fold("memory")):
            given = self.memory(task.rebuilt(task.start))
        named = given.items() if isinstance(given, Mapping) else [(None, given)]
        for name, tensor in named:
            if not (isinstance(name, str) and name and isinstance(tensor, Tensor) and is_plain(tensor)):
                entry = "" if name is None else f"{name!r}: "
                raise UsageError(
                    f"memory(model) of {self!r:.80} returned {entry}{tensor!r:.60}.",
                    "a dict of dense real tensors by name.",
                    "the memory of a client is saved, and sent to the process that trains the client.",
                    Line(python='return {"visits": torch.zeros(())}'),
                )
        return {n: t.detach().to("cpu", copy=True).contiguous() for n, t in named}

    def contribute(
        self, broadcast: Broadcast, lanes: ClientBatch, memory: Tensors, key: Key, task: Task
    ) -> tuple[Contribution, Tensors]:
        """Call the user's loop for each client, with a new module and keyed randomness."""
        out = [self._one(broadcast, lanes, memory, k, key.only(k), task) for k in range(len(lanes.sizes))]
        theta, buffers, counters, sums, kept = zip(*out, strict=True)
        names = sorted(set().union(*sums))
        nothing = torch.zeros((), dtype=torch.float64)  # of a metric that the client did not return, with 0 rows
        stacked = {n: torch.stack([s.get(n, nothing) for s in sums]) for n in names}
        count = {n: torch.stack([c[n] for c in counters]) for n in counters[0]}
        update = broadcast.model.theta - torch.stack(theta)
        after = {n: torch.stack([one[n] for one in kept]) for n in memory}
        return contribution_of(lanes, broadcast, task.layout, update, torch.stack(buffers), count, stacked), after

    def _one(
        self, broadcast: Broadcast, lanes: ClientBatch, memory: Tensors, k: int, key: Key, task: Task
    ) -> tuple[Tensor, Tensor, Tensors, dict[str, Tensor], dict[str, Tensor]]:
        module = task.rebuilt(broadcast.model.of(k))
        device = broadcast.model.theta.device
        generator = torch.Generator(device).manual_seed(key.fold("generator").torch_seed())
        mine = {n: t[k].clone() for n, t in memory.items()}
        ctx = Context(broadcast.round, int(lanes.ids[k]), device, generator, mine, self.lr)
        with user_scope(key.fold("custom")):
            loader = Loader(lanes, k, self.batch, key.fold("order"), task)
            metrics = self.fn(module, loader, ctx)
        rows, sums = float(lanes.sizes[k]), {"rows": float(lanes.sizes[k])}
        for name, value in self._metrics(metrics).items():
            sums |= {name: value * rows, f"{ROWS_OF}{name}": rows}
        theta, buffers, fixed = task.layout.flatten(named_tensors(module))
        for constant in task.layout.constants:
            if not torch.equal(fixed[constant], broadcast.model.fixed[constant].to(fixed[constant])):
                raise constant_changed(constant)
        counters = {e.name: fixed[e.name] for e in task.layout.counters}
        kept = self._kept(mine, {n: t[k] for n, t in memory.items()})
        return theta, buffers, counters, {n: torch.tensor(s, dtype=torch.float64) for n, s in sums.items()}, kept

    def _kept(self, after: Mapping[str, Any], before: Tensors) -> dict[str, Tensor]:
        """Copies of the memory of a client after its loop.

        Raises:
            UsageError: a name, a shape or a dtype differs from the memory before the loop.
        """
        for name in {**before, **after}:
            ours, given = before.get(name), after.get(name)
            plain = isinstance(given, Tensor) and is_plain(given)
            if ours is None or not plain or kind_of(given) != kind_of(ours):
                raise UsageError(
                    f"The loop of {self!r:.80} left ctx.memory[{name!r}] as {kind_of(given)}.",
                    f"{kind_of(ours)}, as memory(model) returned it.",
                    "the memory of every client has the names, shapes and dtypes of its first value.",
                )
        return {n: t.detach().to(before[n].device, copy=True) for n, t in after.items()}

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
