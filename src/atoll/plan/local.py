"""What a client computes: a gradient, local training, the user's own loop, or an evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from atoll.errors import UsageError
from atoll.layout import Layout
from atoll.plan.lanes import ROWS, Lanes, padded
from atoll.plan.protocols import (
    OPEN,
    Broadcast,
    Conflict,
    Contribution,
    Declared,
    Local,
    Optimizer,
    RoundInfo,
    Sends,
    Slots,
    Tensors,
    Total,
)
from atoll.plan.steps import check_steps, counted, lengths_of, quotient, steps_at
from atoll.rng import Key, global_scope
from atoll.schedule import Schedule, constant
from atoll.task import Task

_AHEAD = 64  # steps planned at once


def _contribution(lanes: Lanes, update: Tensor, buffers: Tensor, counters: Tensors, sums: Tensors) -> Contribution:
    """A contribution of an update; buffers go beside it where the model has any."""
    means = {"update": update} | ({"buffers": buffers} if buffers.shape[-1] else {})
    facts = {"loss": _each(sums["loss"], sums["rows"])} if "loss" in sums else {}
    return Contribution(means, sums, lanes.rows, counters, facts)


def _declared(task: Task) -> dict[str, Declared]:
    """The declaration of a contribution with an update, the loss and the rows."""
    layout = task.layout
    buffers = {"buffers": Declared(layout.b, layout.dtype, "mean")} if layout.b else {}
    return {
        "update": Declared(layout.d, layout.dtype, "mean"),
        **buffers,
        "loss": Declared(1, layout.dtype, "sum"),
        "rows": Declared(1, torch.int64, "sum"),
    }


def _each(total: Tensor, rows: Tensor) -> Tensor:
    """What comes to a row, on the device of the total."""
    return total / rows.to(total.device).clamp(min=1)


def _check_batch(part: str, batch: Any) -> None:
    if batch is not None and (isinstance(batch, bool) or not isinstance(batch, int) or batch < 1):
        raise UsageError(
            f"{part}: batch = {batch!r}.",
            "a whole number of rows, at least 1, or None for all rows at once.",
            write={"Gradient": "Gradient(batch=32)", "Train": "Train(sgd(0.1), epochs=1, batch=10)"}.get(part, ""),
        )


@dataclass(frozen=True, repr=False)
class Gradient(Local):
    """The gradient of a client's own loss at θ.

    gᵢ = ∇θ (1/|B|) Σ_{rows in B} ℓ(f_θ(x), y),  B all rows, or `batch` of them drawn without replacement each round.

    Args:
        batch: rows in B, or None for all. A client that holds fewer takes all it holds.
    Example:
        >>> Gradient(batch=32)
        Gradient(32)

    Reference: Robbins and Monro, A Stochastic Approximation Method, 1951.
    """

    batch: int | None = None

    def __post_init__(self) -> None:
        _check_batch("Gradient", self.batch)

    def padded_batch(self, rows: int) -> int:
        """How wide this client's batch is padded: a function of its own size."""
        return self.batch if self.batch is not None and rows >= self.batch else padded(rows)

    def examples_per_round(self, sizes: Tensor) -> Tensor:
        """Rows that clients who hold so many go through in a round."""
        return sizes if self.batch is None else sizes.clamp(max=self.batch)

    def declare(self, task: Task) -> Mapping[str, Declared]:
        """The gradient, buffers if the model has any, the loss and the rows."""
        return _declared(task)

    def contribute(
        self, broadcast: Broadcast, lanes: Lanes, memory: Tensors, key: Key, task: Task
    ) -> tuple[Contribution, Tensors]:
        """The gradient of K clients at once."""
        width = self.padded_batch(lanes.sizes[0])
        counts = tuple(min(n, self.batch or n) for n in lanes.sizes)
        if self.batch is None:
            positions = torch.arange(width, device=lanes.ids.device).expand(len(counts), -1)
        else:
            wide = max(width, lanes.sizes[0])
            positions = key.fold("order").permutations(lanes.rows, wide)[:, :width]
        model = broadcast.model.lanes(len(counts))
        g = lanes.gradient(task, model, lanes.places(positions), counts, key.fold("pass"))
        if lanes.on_step is not None:
            lanes.stepped(0, g.loss, counts)
        sums = {"loss": g.loss, "rows": torch.tensor(counts, device=lanes.ids.device)}
        return _contribution(lanes, g.grad, g.buffers, g.counters, sums), {}


Keep = Literal["optimizer", "order"]


def _check_sends(part: str, sends: Any, write: str) -> None:
    if sends not in ("update", "model"):
        raise UsageError(f"{part}(sends={sends!r}).", "'update' or 'model'.", write=write)


@dataclass(frozen=True, repr=False)
class Train(Local):
    """Local training: some steps of an optimizer from θ, on the client's own rows in a keyed order.

    gᵢ = θ − θᵢ,  θᵢ from θ by `epochs` passes over the rows, or by `steps` batches that run on across passes.

    Args:
        optimizer: the client's own, such as `sgd(0.1)`; its schedule counts rounds.
        epochs: passes over the rows, at least 1; or
        steps: batches, at least 1, or a schedule of them by the round, to the nearest whole number. One of the two.
        batch: rows in a batch; None is all of them. A client that holds fewer trains on all it holds at once.
        keep: what a client keeps between rounds: `"optimizer"` its state, `"order"` its place in the rows.
        sends: what counts at the server: the `"update"`, or the `"model"` θᵢ itself. Then the update is θ − θᵢ with the
            θ of the server when it arrives, not the one that the client began at: models are mixed, as in FedAsync.
            The message is the same, since the server still has both θ; only what arrives late counts otherwise.
    Raises:
        UsageError: neither or both of epochs and steps, a number out of range, or a schedule that comes below one step.
    Example:
        >>> from atoll.plan.optimizer import sgd
        >>> Train(sgd(0.1), epochs=1, batch=10)
        Train(sgd(0.1), epochs=1, batch=10)

    Reference: McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data, 2017.
    """

    optimizer: Optimizer
    epochs: int | None = None
    steps: int | Schedule | None = None
    batch: int | None = None
    keep: tuple[Keep, ...] = ()
    sends: Sends = "update"
    can_stop_early = True

    def __post_init__(self) -> None:
        _check_batch("Train", self.batch)
        _check_sends("Train", self.sends, 'Train(sgd(0.1), epochs=1, batch=10, sends="model")')
        if isinstance(self.steps, constant) and self.steps.lr.is_integer():
            object.__setattr__(self, "steps", int(self.steps.lr))  # one value, one text
        lengths = [n for n in (self.epochs, self.steps) if n is not None]
        numbers = [n for n in lengths if not (n is self.steps and isinstance(n, Schedule))]
        whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in numbers)
        if len(lengths) != 1 or not whole:
            raise UsageError(
                f"Train(epochs={self.epochs!r}, steps={self.steps!r}).",
                "one of epochs and steps, a whole number, at least 1.",
                "it says how long a client trains between two rounds.",
                "Train(sgd(0.1), epochs=1, batch=10)",
            )
        if isinstance(self.steps, Schedule):
            check_steps(self.steps)
        known = isinstance(self.optimizer, Optimizer) and not isinstance(self.optimizer, type)
        if not known or not self.optimizer.trains_clients:
            raise UsageError(
                f"Train(optimizer={self.optimizer!r}).",
                "an optimizer that inherits atoll.plan.stepper.OptimizerBase." if known else "an optimizer.",
                "local training makes steps in place." if known else "",
                "Train(sgd(0.1), epochs=1, batch=10)",
            )
        odd = set(self.keep) - {"optimizer", "order"}
        if odd or isinstance(self.keep, str):
            raise UsageError(
                f"Train(keep={self.keep!r}).",
                "a tuple of 'optimizer' and 'order'.",
                write='Train(sgd(0.1), steps=10, batch=10, keep=("optimizer", "order"))',
            )
        if "order" in self.keep and self.steps is None:
            raise UsageError(
                "Train(epochs=..., keep=('order',)).",
                "steps, where the place in the rows is kept.",
                "whole passes end where they began: there is no place to keep.",
                'Train(sgd(0.1), steps=10, batch=10, keep=("order",))',
            )

    def steps_at(self, t: int) -> int | None:
        """The batches of round t; None where passes are counted.

        Raises:
            RunError: a schedule of the user's own says less than one.
        """
        return steps_at(self.steps, t) if isinstance(self.steps, Schedule) else self.steps

    def relative_work(self, t: int) -> float:
        """How much a client has to do in round t, by what it had in round 0."""
        return steps_at(self.steps, t) / steps_at(self.steps, 0) if isinstance(self.steps, Schedule) else 1.0

    def memory(self, layout: Layout) -> Tensors:
        """The optimizer's state and the number of batches taken so far, as `keep` says."""
        kept: dict[str, Tensor] = {}
        if "optimizer" in self.keep:
            fresh = self.optimizer.slots(torch.zeros(layout.d, dtype=layout.dtype))
            kept |= {f"optimizer.{n}": t for n, t in fresh.items()}
        if "order" in self.keep:
            kept["taken"] = torch.zeros((), dtype=torch.int64)
        return kept

    def server(self, layout: Layout) -> Tensors:
        """What a plateau schedule of the clients remembers; nothing for the others."""
        return dict(self.optimizer.schedule.init())

    def conflicts(self, slots: Slots) -> Iterable[Conflict]:
        """The conflicts of the clients' optimizer."""
        return self.optimizer.conflicts(slots)

    def declare(self, task: Task) -> Mapping[str, Declared]:
        """The update, buffers if the model has any, the loss and the rows."""
        return _declared(task)

    def server_update(self, total: Total, server: Tensors, info: RoundInfo, key: Key) -> tuple[Total, Tensors]:
        """The schedule of the clients observes the loss of the round."""
        if not server or "loss" not in total.sums:
            return total, server
        return total, self.optimizer.schedule.observe(server, (total.sums["loss"] / total.sums["rows"]).squeeze())

    def padded_batch(self, rows: int) -> int:
        """How wide this client's batches are padded: a function of its own size."""
        return self.batch if self.batch is not None and rows >= self.batch else padded(rows)

    def examples_per_round(self, sizes: Tensor) -> Tensor:
        """Rows that clients who hold so many go through in a round, the first one."""
        if self.epochs is not None:
            return sizes * self.epochs
        return sizes.clamp(max=self.batch) * (self.steps_at(0) or 0)

    def contribute(
        self, broadcast: Broadcast, lanes: Lanes, memory: Tensors, key: Key, task: Task
    ) -> tuple[Contribution, Tensors]:
        """θ − θᵢ of K clients, trained side by side; a lane that has finished is left alone."""
        count, steps = len(lanes.sizes), self.steps_at(broadcast.round)
        lr = self.optimizer.schedule(broadcast.round, broadcast.shared.get("local", {}))
        batches = self._batches(lanes, memory, key, task, steps)
        if task.numerics == "lanes" or broadcast.model.theta.dim() == 2 or not self.sequential(lanes.sizes[0]):
            return self._any_rule(broadcast, lanes, memory, key, task, lr, batches)
        # Plain SGD: a step is part of the backward pass, and no gradient is stored.
        if self.epochs is not None and lanes.share == 1:
            rows = lanes.rows * self.epochs
        else:
            rows = torch.zeros_like(lanes.rows)
            batches = counted(batches, rows)
        descent = task.descent(broadcast.model, count, lr, key)
        descent.follow(lanes, batches)
        after = {"taken": self._taken(lanes, memory, steps)} if "order" in self.keep else {}
        sums = {"loss": descent.loss, "rows": rows}
        return _contribution(lanes, descent.update(), *descent.moved, sums), after

    def _any_rule(
        self,
        broadcast: Broadcast,
        lanes: Lanes,
        memory: Tensors,
        key: Key,
        task: Task,
        lr: float,
        batches: Iterator[tuple[Tensor, tuple[int, ...]]],
    ) -> tuple[Contribution, Tensors]:
        """θ − θᵢ of K clients by steps of any optimizer, from one model or from one of each lane."""
        model = broadcast.model.lanes(len(lanes.sizes))
        state = self.optimizer.slots(model.theta)
        if "optimizer" in self.keep:
            state = {n: memory[f"optimizer.{n}"].clone() for n in state}
        stepper = self.optimizer.stepper(model.theta, state, lr)
        loss, rows = model.theta.new_zeros(len(lanes.sizes)), torch.zeros_like(lanes.rows)
        for s, (places, counts) in enumerate(batches):
            k = len(counts)
            g = lanes.gradient(task, model.first(k), places, counts, key.fold("pass", s).select(slice(k)))
            stepper.step(g.grad)
            model.buffers[:k] = g.buffers
            for name, counter in g.counters.items():
                model.counters[name][:k] = counter
            loss[:k] += g.loss
            rows[:k] += torch.tensor(counts, device=rows.device)
            if lanes.on_step is not None:
                lanes.stepped(s, g.loss, counts)
        after: dict[str, Tensor] = {}
        if "optimizer" in self.keep:
            after |= {f"optimizer.{n}": t for n, t in state.items()}
        if "order" in self.keep:
            after["taken"] = self._taken(lanes, memory, self.steps_at(broadcast.round))
        update = broadcast.model.theta - model.theta
        return _contribution(lanes, update, model.buffers, model.counters, {"loss": loss, "rows": rows}), after

    def _taken(self, lanes: Lanes, memory: Tensors, steps: int | None) -> Tensor:
        taken = memory["taken"].to(lanes.ids.device)
        return taken + self._done(torch.full_like(taken, steps or 0), lanes.share)

    @staticmethod
    def _done(steps: Tensor, share: float) -> Tensor:
        """The steps that somebody makes who has time for a part of them: the first is always made."""
        return steps if share == 1 else (steps * share).long().clamp(min=1)

    def sequential(self, rows: int) -> bool:
        """Whether the loop takes each client of a chunk to its end before the next, where one has so many rows."""
        return self.optimizer.is_plain_sgd() and self.padded_batch(rows) <= ROWS

    def _batches(
        self, lanes: Lanes, memory: Tensors, key: Key, task: Task, steps_each: int | None
    ) -> Iterator[tuple[Tensor, tuple[int, ...]]]:
        """Places of rows `[k, B]` and counts of each step, for the k lanes that still train: always the first ones.

        Each lane is at its own place in its own pass, so that its draws do not depend on how many batches others have.
        """
        width, rows = self.padded_batch(lanes.sizes[0]), lanes.rows
        lengths, joined = lengths_of(rows, self.batch, task.batch_statistics)
        steps = lengths * self.epochs if self.epochs else torch.full_like(lengths, steps_each or 0)
        steps = self._done(steps, lanes.share)
        keeps = "order" in self.keep
        # Who starts twice in a round draws anew, which its key knows; a kept order goes on where it was.
        draw = Key(key.seed).fold("kept order") if keeps else key.fold("order")
        who = lanes.ids if keeps or key.clients is None else key.clients
        taken = memory["taken"].to(rows.device) if keeps else torch.zeros_like(lengths)
        reach = width * int(lengths.max()) + 1
        full = rows if self.batch is None else rows.clamp(max=self.batch)
        if not keeps and lanes.sizes[0] == lanes.sizes[-1]:  # all at the same place: none has to be looked up
            of_pass, size, count = int(lengths[0]), int(full[0]), len(lanes.sizes)
            last = lanes.sizes[0] - (of_pass - 1) * size
            for s in range(int(steps[0])):
                epoch, place = divmod(s, of_pass)
                if not place:
                    order = lanes.places(draw.of(who, rows.new_tensor(epoch)).permutations(rows, reach))
                own = size if place < of_pass - 1 else last
                yield order[:, place * width : place * width + max(own, width)], (own,) * count
            return
        order = torch.zeros(len(rows), reach, dtype=torch.int64, device=rows.device)
        for first in range(0, int(steps[0]), _AHEAD):
            ahead = torch.arange(first, min(first + _AHEAD, int(steps[0])), device=rows.device)[:, None]
            active = (steps > ahead).sum(1).tolist()
            epoch_of, at = (f(taken + ahead, lengths) for f in (quotient, torch.remainder))
            left = rows - at * full  # of the pass, this batch and all after it
            counts = torch.where(joined & (at == lengths - 1), left, torch.minimum(left, full)).tolist()
            new = (at == 0) | (ahead == 0)
            for i, (k, some) in enumerate(zip(active, new.any(1).tolist(), strict=True)):
                if some and bool(new[i, :k].any()):
                    index = new[i, :k].nonzero().squeeze(1)
                    drawn = draw.of(who[index], epoch_of[i, index]).permutations(rows[index], reach)
                    order[index] = lanes.places(drawn, index)
                mine = tuple(counts[i][:k])
                span = torch.arange(max(*mine, width), device=rows.device)
                yield order[:k].gather(1, (at[i, :k, None] * width + span).clamp_(max=reach - 1)), mine


@dataclass(frozen=True)
class Context:
    """What a user's own loop is told: the round, the client, the server's learning rate, the device, keyed generators.

    Args:
        round: from 0.
        client: the client's number.
        lr: the rate that the plan suggests, `Custom(fn, lr=...)`; None without.
        device: where the model is.
        generator: torch's, seeded by (seed, round, client).
    """

    round: int
    client: int
    lr: float | None
    device: torch.device
    generator: torch.Generator


class Loader:
    """Batches `(x, y)` of one client, in a new keyed order each time it is walked through.

    Where the model has batch statistics, a tail of one row joins the batch before it, as in `Train`.
    """

    def __init__(self, lanes: Lanes, k: int, batch: int | None, key: Key, joins: bool = False) -> None:
        self._lanes = Lanes(lanes.clients, lanes.ids[k : k + 1], lanes.dtype, device=lanes.device)
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
    """Your own training loop, called once for each client at work.

    gᵢ = θ − θᵢ,  θᵢ what `fn` left in the model.

    Args:
        fn: `fn(model, loader, ctx) -> metrics | None`: trains the model in place; `loader` yields `(x, y)`; the
            metrics, numbers by name, are averaged by rows. In a text it is written `module:name`.
        batch: rows in the loader's batches; None is all of them.
        lr: handed on as `ctx.lr`; a number or None.
        sends: `"update"` or `"model"`, as for `Train`.
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
        _check_batch("Custom", self.batch)
        _check_sends("Custom", self.sends, "")
        if not callable(self.fn):
            raise UsageError(
                f"Custom({self.fn!r}).",
                "a function (model, loader, ctx); in a text, module:name.",
            )

    def padded_batch(self, rows: int) -> int:
        """No padding: each client runs by itself."""
        return rows

    def declare(self, task: Task) -> Mapping[str, Declared]:
        """The update, buffers if the model has any, the rows, and any metric: clients may return different names."""
        means = {n: d for n, d in _declared(task).items() if d.kind == "mean"}
        return {**means, "rows": Declared(1, torch.float64, "sum"), OPEN: Declared(1, torch.float64, "sum")}

    def contribute(
        self, broadcast: Broadcast, lanes: Lanes, memory: Tensors, key: Key, task: Task
    ) -> tuple[Contribution, Tensors]:
        """Call the user's loop for each client, on a fresh module, its randomness keyed."""
        out = [self._one(broadcast, lanes, k, key.only(k), task) for k in range(len(lanes.sizes))]
        theta, buffers, counters, sums = zip(*out, strict=True)
        names = sorted(set().union(*sums))
        nothing = torch.zeros((), dtype=torch.float64)
        stacked = {n: torch.stack([s.get(n, nothing) for s in sums]) for n in names}
        count = {n: torch.stack([c[n] for c in counters]) for n in counters[0]}
        update = broadcast.model.theta - torch.stack(theta)
        return _contribution(lanes, update, torch.stack(buffers), count, stacked), {}

    def _one(
        self, broadcast: Broadcast, lanes: Lanes, k: int, key: Key, task: Task
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


@dataclass(frozen=True, repr=False)
class Evaluate(Local):
    """The loss and the metrics of θ on a client's rows: sums only, no update.

    Example:
        >>> Evaluate()
        Evaluate()
    """

    def padded_batch(self, rows: int) -> int:
        """How wide this client's batches are padded: a function of its own size."""
        return padded(rows)

    def declare(self, task: Task) -> Mapping[str, Declared]:
        """Sums alone: the rows, the loss and each metric of the task."""
        return {"rows": Declared(1, torch.int64, "sum"), OPEN: Declared(1, task.layout.dtype, "sum")}

    def contribute(
        self, broadcast: Broadcast, lanes: Lanes, memory: Tensors, key: Key, task: Task
    ) -> tuple[Contribution, Tensors]:
        """Σ loss, Σ metrics and rows of K clients, at most `ROWS` rows of each in a pass."""
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
