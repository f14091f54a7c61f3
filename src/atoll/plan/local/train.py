"""Local training: several optimizer steps of each client between two rounds.

Tests: tests/identities/test_local_sgd.py
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from atoll.base.concepts import part_for
from atoll.base.errors import UsageError
from atoll.base.lines import Part
from atoll.base.names import under, without_prefix
from atoll.base.random import Key
from atoll.base.validation import class_instead_of_value, plain_fields, repaired
from atoll.compute.batches import ROWS, ClientBatch, padded
from atoll.compute.layout import Layout
from atoll.compute.model_state import Model, split_of
from atoll.compute.step_rule import StepRule
from atoll.compute.task import Descent, Task
from atoll.plan.local.contribution import (
    Keep,
    Trained,
    check_batch,
    check_sends,
    contribution_of,
    declared_update,
)
from atoll.plan.local.correcting import (
    CORRECTION,
    Correcting,
    conflicts_of_pull,
    pulled_rule,
    pulled_start,
    require_correction,
)
from atoll.plan.local.own import (
    Names,
    OwnPart,
    after_personal,
    check_own,
    conflicts_of_own,
    first_own,
    first_personal,
    personal_models,
    shared_layout,
)
from atoll.plan.local.passes import gradient_of_each, measured_of_each
from atoll.plan.local.steps import check_steps, counted, lengths_of, quotient, steps_at
from atoll.plan.protocols import (
    Broadcast,
    Conflict,
    Contribution,
    Correction,
    Declared,
    Local,
    Optimizer,
    Pull,
    RoundInfo,
    Sends,
    Slots,
    StepFacts,
    Tensors,
    Total,
)
from atoll.plan.schedule import Schedule, constant

_AHEAD = 64  # steps planned at once
Batches = Iterator[tuple[Tensor, tuple[int, ...]]]


@dataclass(frozen=True, repr=False)
class Train(Local):
    """Local training: each client makes optimizer steps from θ on its own rows, in a random order.

    gᵢ = θ − θᵢ,  where θᵢ is the model after `epochs` passes over the rows, or after `steps` batches. With
    `steps`, the batches continue from one pass into the next.

    Args:
        optimizer: the optimizer of the clients, such as `sgd(0.1)`. Its schedule is a function of the round.
        epochs: the number of passes over the rows, ≥ 1. Pass either `epochs` or `steps`.
        steps: the number of batches in a round, ≥ 1; or a schedule that gives this number for each round, rounded to
            the nearest integer.
        batch: the number of rows in a batch; None: all rows. A client with fewer rows uses all its rows as one batch.
        keep: the client state that lasts between rounds: `"optimizer"` keeps the optimizer's state, `"order"` keeps the
            client's position in the order of its rows.
        sends: `"update"`, or `"model"` for θᵢ itself. With `"model"` the update is θ − θᵢ with the θ of the server when
            the contribution arrives, not the θ that the client started from: models are mixed, as in FedAsync. The
            message is the same, since the server has both θ. Only late contributions differ.
        correction: a correction of the steps for unequal clients, such as `Proximal(0.1)` or `Scaffold()`.
        own: patterns of the names of parameters and buffers that stay at the client, such as `("fc2.*",)`; or
            `"norms"`, all layers of normalisation. They are in client memory and in no message. The server has their
            first values, and a client that never took part uses them.
        alternate: whether the client trains its own part first and then the shared part, each for `epochs` or `steps`.
    Raises:
        UsageError: neither or both of epochs and steps are given, a number is out of range, or a schedule has less than
            one step.
    Example:
        >>> from atoll.plan.optimizer import sgd
        >>> Train(sgd(0.1), epochs=1, batch=10)
        Train(sgd(0.1), epochs=1, batch=10)

    Reference: McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data, 2017; `own`:
        Arivazhagan et al., Federated Learning with Personalization Layers, 2019.
    """

    optimizer: Optimizer
    epochs: int | None = None
    steps: int | Schedule | None = None
    batch: int | None = None
    keep: tuple[Keep, ...] = ()
    sends: Sends = "update"
    correction: Correction | None = None
    own: Names = ()
    alternate: bool = False
    can_stop_early = True

    def __post_init__(self) -> None:
        plain_fields(self, "epochs", "steps", "batch")
        check_batch("Train", self.batch)
        check_sends("Train", self.sends, 'Train(sgd(0.1), epochs=1, batch=10, sends="model")')
        if isinstance(self.steps, constant) and self.steps.lr.is_integer():
            object.__setattr__(self, "steps", int(self.steps.lr))  # equal parts have the same text
        lengths = [n for n in (self.epochs, self.steps) if n is not None]
        numbers = [n for n in lengths if not (n is self.steps and isinstance(n, Schedule))]
        whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in numbers)
        if len(lengths) != 1 or not whole:
            raise UsageError(
                f"Train(epochs={self.epochs!r}, steps={self.steps!r}).",
                "one of epochs and steps, a whole number, at least 1.",
                "it is the length of local training between two rounds.",
                Part(repaired(self, epochs=1, steps=None), changes={"epochs": 1}),
            )
        if isinstance(self.steps, Schedule):
            check_steps(self.steps)
        if isinstance(self.optimizer, type):
            raise class_instead_of_value("The optimizer of Train", self.optimizer)
        known = isinstance(self.optimizer, Optimizer)
        if not known or not self.optimizer.trains_clients:
            rule = ("" if known else part_for("optimizer", self.optimizer)) or "sgd(0.1)"
            raise UsageError(
                f"Train(optimizer={self.optimizer!r}).",
                "an optimizer that inherits atoll.plan.optimizer.base.OptimizerBase." if known else "an optimizer.",
                "local training makes steps in place." if known else "",
                f"Train({rule}, epochs=1, batch=10)",
            )
        require_correction(self.correction)
        object.__setattr__(self, "own", check_own(self.own, self.alternate))
        if not isinstance(self.keep, (tuple, list)) or not all(
            k in ("optimizer", "order") for k in map(str, self.keep)
        ):
            raise UsageError(
                f"Train(keep={self.keep!r}).",
                "a tuple of 'optimizer' and 'order'.",
                write='Train(sgd(0.1), steps=10, batch=10, keep=("optimizer", "order"))',
            )
        if "order" in self.keep and self.steps is None:
            raise UsageError(
                "Train(epochs=..., keep=('order',)).",
                "steps, to keep the place in the rows.",
                "whole passes end at the first row: there is no place to keep.",
                'Train(sgd(0.1), steps=10, batch=10, keep=("order",))',
            )

    @property
    def needs_population(self) -> bool:
        """Whether the correction needs the total weight of all clients."""
        return self.correction is not None and self.correction.needs_population

    def steps_at(self, t: int) -> int | None:
        """The number of batches in round t; None if passes are counted.

        Raises:
            RunError: a schedule that the user wrote gives less than one step.
        """
        return steps_at(self.steps, t) if isinstance(self.steps, Schedule) else self.steps

    def relative_work(self, t: int) -> float:
        """The number of steps of a client in round t, divided by its number of steps in round 0."""
        return steps_at(self.steps, t) / steps_at(self.steps, 0) if isinstance(self.steps, Schedule) else 1.0

    def first_memory(self, task: Task) -> Tensors:
        """The client memory before the first round: the parts that `keep` names, and that of the correction."""
        tensors: dict[str, Tensor] = {}
        if "optimizer" in self.keep:
            fresh = self.optimizer.slots(torch.zeros(task.layout.d, dtype=task.layout.dtype))
            tensors |= {f"optimizer.{n}": t for n, t in fresh.items()}
        if "order" in self.keep:
            tensors["taken"] = torch.zeros((), dtype=torch.int64)
        if self.correction is not None:
            tensors |= under(CORRECTION, self.correction.memory(self.server_layout(task.layout)))
            if self.correction.personal_mu is not None:
                tensors |= first_personal(task)
        return {**tensors, **first_own(self.own, task)}

    @property
    def trains_personal(self) -> bool:
        """Whether each client has an own part, or a second model."""
        return bool(self.own) or (self.correction is not None and self.correction.personal_mu is not None)

    def server_layout(self, layout: Layout) -> Layout:
        """The layout of the shared part.

        Raises:
            UsageError: `own` matches nothing or everything.
        """
        return shared_layout(layout, self.own) if self.own else layout  # a hash of the layout takes time

    def whole(self, model: Model, task: Task) -> Model:
        """The shared part with the first values of the own part."""
        if not self.own:
            return model
        split = split_of(task.layout, self.server_layout(task.layout))
        return split.join(model, split.own(task.start))

    def personal(self, model: Model, memory: Tensors, task: Task) -> Model:
        """The models of K clients: with their own parts, or their second models."""
        part = OwnPart.of(self.own, memory, task.layout)
        return personal_models(model, memory) if part is None else part.split.join(model, part.own)

    def server(self, layout: Layout) -> Tensors:
        """The server state before the first round: the memory of a plateau schedule, and that of the correction."""
        own = {} if self.correction is None else under(CORRECTION, self.correction.server(layout))
        return {**self.optimizer.schedule.init(), **own}

    def conflicts(self, slots: Slots) -> Iterable[Conflict]:
        """Reasons to refuse the optimizer of the clients or the correction."""
        yield from self.optimizer.conflicts(slots)
        if self.correction is not None:
            yield from self.correction.conflicts(slots)
            yield from conflicts_of_pull(self, self.correction)
        yield from conflicts_of_own(self)

    def declare(self, task: Task) -> Mapping[str, Declared]:
        """Declares the update, buffers if the model has any, the loss, the rows, and the names of the correction."""
        layout = self.server_layout(task.layout)
        task = task if layout is task.layout else replace(task, layout=layout)
        added = {} if self.correction is None else self.correction.declare(task)
        return {**declared_update(task), **added}

    def evaluated(self, theta: Tensor, server: Tensors) -> Tensor:
        """The parameters that are evaluated, `[d]`: θ, or those that the correction states."""
        return (
            theta if self.correction is None else self.correction.evaluated(theta, without_prefix(server, CORRECTION))
        )

    def server_update(self, total: Total, server: Tensors, info: RoundInfo, key: Key) -> tuple[Total, Tensors]:
        """Pass the loss of the round to the schedule of the clients, and the total to the correction."""
        after = {n: t for n, t in server.items() if not n.startswith(CORRECTION)}
        if after and "loss" in total.sums:
            loss = (total.sums["loss"] / total.sums["rows"]).squeeze()
            after = dict(self.optimizer.schedule.observe(after, loss))
        if self.correction is not None:
            total, own = self.correction.server_update(total, without_prefix(server, CORRECTION), info, key)
            after |= under(CORRECTION, own)
        return total, after

    def padded_batch(self, rows: int) -> int:
        """The padded length of this client's batches, a function of its own number of rows."""
        return self.batch if self.batch is not None and rows >= self.batch else padded(rows)

    def examples_per_round(self, sizes: Tensor) -> Tensor:
        """The rows that each client processes in round 0, int64 `[C]`; `sizes`: the rows that it has, int64 `[C]`."""
        twice = self.alternate or (self.correction is not None and self.correction.personal_mu is not None)
        sizes = sizes * (2 if twice else 1)
        if self.epochs is not None:
            return sizes * self.epochs
        return (sizes if self.batch is None else sizes.clamp(max=self.batch)) * (self.steps_at(0) or 0)

    def contribute(
        self, broadcast: Broadcast, lanes: ClientBatch, memory: Tensors, key: Key, task: Task
    ) -> tuple[Contribution, Tensors]:
        """Train K clients, one in each lane, and return y₀ − y of each. A lane that has finished does not change."""
        lr = self.optimizer.schedule(broadcast.round, broadcast.shared.get("local", {}))
        given = self.optimizer.step_rule(lr)
        rule, finish = given or StepRule(lr), None
        part, model = OwnPart.of(self.own, memory, task.layout), broadcast.model
        if part is not None:
            model = part.split.join(model, part.own)
        if self.correction is not None:
            facts = self._facts(lanes, given, lr, task, broadcast.round)
            if self.correction.needs_loss:
                sums = measured_of_each(broadcast._replace(model=model), lanes, key.fold("start"), task)
                facts = facts._replace(loss=sums["loss"] / lanes.rows.to(sums["loss"].device))
            if self.correction.needs_gradient:
                facts = facts._replace(gradient=gradient_of_each(model, lanes, key.fold("start"), task))
            finish = Correcting.of(self.correction, broadcast, memory, facts, given)
            pull = finish.pull if part is None else part.pull(finish.pull)
            rule, model = pulled_rule(pull, rule), pulled_start(pull, model, len(lanes.sizes))
        if part is not None and self.alternate:
            trained = self._alternating(part, model, rule, lanes, key, task, broadcast.round)
            after: dict[str, Tensor] = {}
        else:
            descent, batches, rows = self._descent(model, rule, lanes, memory, key, task, broadcast.round)
            if descent is None:
                trained, after = self._by_stepper(model, rule, lanes, memory, key, task, batches)
            else:
                descent.follow(lanes, batches)
                trained, after = _trained(descent, rows), {}
        if "order" in self.keep:
            after["taken"] = self._batches_taken(lanes, memory, self.steps_at(broadcast.round))
        if part is not None:
            trained, own = part.divide(trained)
            after |= own
        sums = {"loss": trained.loss, "rows": trained.rows}
        moved = (trained.update, trained.buffers, trained.counters)
        contribution = contribution_of(lanes, broadcast, self.server_layout(task.layout), *moved, sums)
        if finish is not None:
            contribution, own = finish.finish(contribution)
            after |= own
            mu = finish.correction.personal_mu
            if mu is not None:
                start, pull = personal_models(broadcast.model, memory), Pull(anchor=broadcast.model.theta, mu=mu)
                rule, second = pulled_rule(pull, given or StepRule(lr)), key.fold("personal")
                trained, _ = self._train(start, rule, lanes, memory, second, task, broadcast.round)
                after |= after_personal(start, trained, memory)
        return contribution, after

    def tuned(self, model: Model, lanes: ClientBatch, key: Key, task: Task) -> Model:
        """The models of K clients after this training of each client from a model, θ `[d]` or `[K, d]`.

        The learning rate and the number of steps are those of round 0. No state is kept.
        """
        rule = StepRule(self.optimizer.schedule(0, self.optimizer.schedule.init()))
        rule = self.optimizer.step_rule(rule.lr) or rule
        trained, _ = self._train(model, rule, lanes, {}, key, task, 0)
        return Model(model.theta - trained.update, trained.buffers, trained.counters, model.fixed)

    def _train(
        self, model: Model, rule: StepRule, lanes: ClientBatch, memory: Tensors, key: Key, task: Task, round: int
    ) -> tuple[Trained, dict[str, Tensor]]:
        """Train K clients from a model. `contribute` repeats these lines: a call would lengthen the path to a step."""
        descent, batches, rows = self._descent(model, rule, lanes, memory, key, task, round)
        if descent is None:
            return self._by_stepper(model, rule, lanes, memory, key, task, batches)
        descent.follow(lanes, batches)
        return _trained(descent, rows), {}

    def _descent(
        self, model: Model, rule: StepRule, lanes: ClientBatch, memory: Tensors, key: Key, task: Task, round: int
    ) -> tuple[Descent | None, Batches, Tensor]:
        """The backend's descent, the batches, and the rows of each client, which may be counted as they are read.

        If the backend makes the steps, a step needs no gradient in memory. Without a descent, an optimizer makes them.
        """
        batches = self._batches(lanes, memory, key, task, self.steps_at(round))
        rows = lanes.rows * (self.epochs or 0)
        by_backend = task.numerics != "lanes" and self.sequential(lanes.sizes[0])
        if not by_backend or self.optimizer.step_rule(rule.lr) is None:
            return None, batches, rows
        if self.epochs is None or lanes.share != 1:
            rows = torch.zeros_like(rows)
            batches = counted(batches, rows)
        return task.descent(model, len(lanes.sizes), rule, key), batches, rows

    def _alternating(
        self, part: OwnPart, model: Model, rule: StepRule, lanes: ClientBatch, key: Key, task: Task, round: int
    ) -> Trained:
        """Train the own part, then the shared part from there. The loss is that of both trainings."""
        shared, own = part.split.theta
        steps = self.steps_at(round)
        batches = self._batches(lanes, {}, key.fold("own"), task, steps)
        first, _ = self._by_stepper(model, rule, lanes, {}, key.fold("own"), task, batches, shared)
        middle = Model(model.theta - first.update, first.buffers, first.counters, model.fixed)
        batches = self._batches(lanes, {}, key, task, steps)
        second, _ = self._by_stepper(middle, rule, lanes, {}, key, task, batches, own)
        both = second._replace(update=first.update + second.update, rows=first.rows + second.rows)
        return both._replace(loss=first.loss + second.loss)

    def _by_stepper(
        self,
        model: Model,
        rule: StepRule,
        lanes: ClientBatch,
        memory: Tensors,
        key: Key,
        task: Task,
        batches: Batches,
        frozen: tuple[slice, ...] = (),
    ) -> tuple[Trained, dict[str, Tensor]]:
        """Train K clients by any optimizer. The pull is added to the gradient before its step.

        Args:
            frozen: the places of θ that do not change.
        """
        start, model = model.theta, model.lanes(len(lanes.sizes))
        state = self.optimizer.slots(model.theta)
        if "optimizer" in self.keep:
            state = {n: memory[f"optimizer.{n}"].clone() for n in state}
        stepper = self.optimizer.stepper(model.theta, state, rule.lr)
        rule = rule.joined()
        pulls = rule.mu or rule.shift is not None
        loss, rows = model.theta.new_zeros(len(lanes.sizes)), torch.zeros_like(lanes.rows)
        for s, (places, counts) in enumerate(batches):
            k = len(counts)
            g = lanes.gradient(task, model.first(k), places, counts, key.fold("pass", s).select(slice(k)))
            stepper.step(rule.pulled(g.grad, model.theta[:k]) if pulls else g.grad)
            for at in frozen:
                model.theta[:k, at] = start[:k, at]
            model.buffers[:k] = g.buffers
            for name, counter in g.counters.items():
                model.counters[name][:k] = counter
            loss[:k] += g.loss
            rows[:k] += torch.tensor(counts, device=rows.device)
            if lanes.on_step is not None:
                lanes.stepped(s, g.loss, counts)
        after = {f"optimizer.{n}": t for n, t in state.items()} if "optimizer" in self.keep else {}
        return Trained(start - model.theta, model.buffers, model.counters, loss, rows), after

    def _facts(self, lanes: ClientBatch, rule: StepRule | None, lr: float, task: Task, round: int) -> StepFacts:
        """The facts of the steps of K clients, for the correction."""
        lengths, _ = lengths_of(lanes.rows, self.batch, task.couples)
        decay = 0.0 if rule is None else rule.decay
        steps = self._steps_of(lengths, lanes.share, self.steps_at(round))
        return StepFacts(lr, decay, lanes.rows, steps, None, lanes.class_counts)

    def _steps_of(self, lengths: Tensor, share: float, steps_each: int | None) -> Tensor:
        """The number of steps of each client, int64 `[K]`, from its number of batches in a pass."""
        steps = lengths * self.epochs if self.epochs else torch.full_like(lengths, steps_each or 0)
        return self._done(steps, share)

    def _batches_taken(self, lanes: ClientBatch, memory: Tensors, steps: int | None) -> Tensor:
        taken = memory["taken"].to(lanes.ids.device)
        return taken + self._done(torch.full_like(taken, steps or 0), lanes.share)

    @staticmethod
    def _done(steps: Tensor, share: float) -> Tensor:
        """The number of steps, at least one, of a client that has time for only a fraction of them."""
        return steps if share == 1 else (steps * share).long().clamp(min=1)

    def sequential(self, rows: int) -> bool:
        """Whether the loop trains each client of a chunk to its end before the next client starts."""
        rule = self.optimizer.step_rule(1.0)
        keeps = rule is None or (rule.momentum and "optimizer" in self.keep)
        return not keeps and self.padded_batch(rows) <= ROWS

    def _batches(self, lanes: ClientBatch, memory: Tensors, key: Key, task: Task, steps_each: int | None) -> Batches:
        """Places of rows `[k, B]` and counts of each step, for the k lanes that still train, always the first k.

        Each lane has its own position in its own pass, so its draws do not depend on the number of batches of others.
        """
        width, rows = self.padded_batch(lanes.sizes[0]), lanes.rows
        lengths, joined = lengths_of(rows, self.batch, task.couples)
        steps = self._steps_of(lengths, lanes.share, steps_each)
        keeps_order = "order" in self.keep
        # The key of a repeated start draws another order; a kept order continues at its place.
        draw = Key(key.seed).fold("kept order") if keeps_order else key.fold("order")
        clients = lanes.ids if keeps_order or key.clients is None else key.clients
        taken = memory["taken"].to(rows.device) if keeps_order else torch.zeros_like(lengths)
        reach = width * int(lengths.max()) + 1
        full = rows if self.batch is None else rows.clamp(max=self.batch)
        if not keeps_order and lanes.sizes[0] == lanes.sizes[-1]:  # all lanes are at the same position in a pass
            of_pass, size, count = int(lengths[0]), int(full[0]), len(lanes.sizes)
            last = lanes.sizes[0] - (of_pass - 1) * size
            for s in range(int(steps[0])):
                epoch, place = divmod(s, of_pass)
                if not place:
                    order = lanes.places(draw.of(clients, rows.new_tensor(epoch)).permutations(rows, reach))
                own = size if place < of_pass - 1 else last
                yield order[:, place * width : place * width + max(own, width)], (own,) * count
            return
        order = torch.zeros(len(rows), reach, dtype=torch.int64, device=rows.device)
        for first in range(0, int(steps[0]), _AHEAD):
            ahead = torch.arange(first, min(first + _AHEAD, int(steps[0])), device=rows.device)[:, None]
            active = (steps > ahead).sum(1).tolist()
            epoch_of, at = (f(taken + ahead, lengths) for f in (quotient, torch.remainder))
            remaining = rows - at * full  # rows of the pass that remain, this batch included
            counts = torch.where(joined & (at == lengths - 1), remaining, torch.minimum(remaining, full)).tolist()
            new = (at == 0) | (ahead == 0)
            for i, (k, some) in enumerate(zip(active, new.any(1).tolist(), strict=True)):
                if some and bool(new[i, :k].any()):
                    index = new[i, :k].nonzero().squeeze(1)
                    drawn = draw.of(clients[index], epoch_of[i, index]).permutations(rows[index], reach)
                    order[index] = lanes.places(drawn, index)
                mine = tuple(counts[i][:k])
                span = torch.arange(max(*mine, width), device=rows.device)
                yield order[:k].gather(1, (at[i, :k, None] * width + span).clamp_(max=reach - 1)), mine


def _trained(descent: Descent, rows: Tensor) -> Trained:
    """The result of a descent over `rows` of each client."""
    return Trained(descent.update(), *descent.moved, descent.loss, rows)
