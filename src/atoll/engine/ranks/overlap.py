"""Gradients reduced during the backward pass: distributed gradient descent as data-parallel training.

The gradients of the loop backend are views of one flat vector, which is divided into buckets. When all gradients of a
bucket are computed, an all-reduce of the bucket starts, in place and in float32, while the backward pass continues
towards the first layer. The result is `sum="float"`: the last bits of this sum depend on the number of ranks.

Tests: tests/parity/test_torchrun.py
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.linalg import vector_norm

from atoll.base.random import Key
from atoll.compute import limits
from atoll.compute.autograd import MARGIN
from atoll.compute.batches import ROWS
from atoll.compute.task import Task
from atoll.compute.tensor_notes import attach
from atoll.data.clients import Clients
from atoll.engine.chunks import by_version
from atoll.engine.contribution import Results, contribute_chunk
from atoll.engine.ranks.process_group import ProcessGroup, together
from atoll.engine.simulation.arrivals import message_bytes
from atoll.plan.aggregate.mean import Mean, PartialSum, Sum
from atoll.plan.codec import Identity
from atoll.plan.in_flight import Flight
from atoll.plan.local import Gradient
from atoll.plan.plan import Plan
from atoll.plan.protocols import Broadcast, Ids

_SUMS = ("loss", "rows")
_MAX_CLIENTS = MARGIN // len(_SUMS) - 1  # clients whose sums fit into the memory before the gradient
_MAX_ROWS = 1 << 24  # number of rows up to which float32 counts exactly


def data_parallel(plan: Plan) -> bool:
    """Whether a plan is data-parallel training: uncompressed gradients and `sum="float"`.

    Example:
        >>> from atoll.recipes import distributed_gd, fedavg
        >>> [data_parallel(plan) for plan in (distributed_gd(0.1, sum="float"), distributed_gd(0.1), fedavg(0.1))]
        [True, False, False]
    """
    rule = plan.aggregator
    quick = isinstance(rule, (Mean, Sum)) and rule.sum == "float"
    return quick and isinstance(plan.local, Gradient) and plan.codec == Identity()


@dataclass
class Overlap:
    """The flat gradient of a task, divided into buckets that are reduced during the backward pass.

    Args:
        task: the task; the loop backend computes it.
        ranks: the processes of the training.
    """

    task: Task
    ranks: ProcessGroup
    _missing: set[int] = field(default_factory=set)  # parameters without a gradient so far
    _sent: list[Any] = field(default_factory=list)
    _divisor: int = 1  # divisor of the weights
    _earlier: Tensor | None = None  # Σ w·g of this rank's earlier clients

    def __post_init__(self) -> None:
        self.bound = self.task.bound
        parameters, self.flat = self.bound.parameters, self.bound.gradient
        self._buckets: list[tuple[int, int]] = []
        self._members: list[set[int]] = []  # parameters of each bucket
        at = end = self.flat.numel()
        for i in reversed(range(len(parameters))):
            if not self._members or end - at >= limits.BUCKET:
                end = at
                self._members.append(set())
                self._buckets.append((at, at))
            at -= parameters[i].numel()
            self._members[-1].add(i)
            self._buckets[-1] = (at, end)
            parameters[i].register_post_accumulate_grad_hook(self._hook(i))

    def serves(self, data: Clients, arrived: Sequence[Flight]) -> bool:
        """Whether the result of a round of a data-parallel plan is one flat gradient, with sums that fit before it."""
        layout, most = self.task.layout, int(data.sizes.max())
        nothing_else = not layout.b and not layout.counters and all(flight.share == 1 for flight in arrived)
        room = 0 < len(arrived) <= _MAX_CLIENTS and most <= _MAX_ROWS
        room &= self.flat.device == self.ranks.device  # it is sent in place, so it must be on the device that sends
        return room and nothing_else

    def _hook(self, i: int) -> Any:
        view = self.bound.gradients[i]

        def arrived(parameter: Tensor) -> None:
            if not self.bound.taken:
                return
            if i not in self._missing:
                raise RuntimeError("A parameter has two gradients in one pass.")  # as with reentrant checkpoints
            if parameter.grad is not None:
                view.copy_(parameter.grad)
                parameter.grad = None
            self._missing.remove(i)
            # In the order of buckets, which must be equal on all ranks, also if gradients arrive in another order. The
            # last bucket is not sent here, because `results` sends it together with the sums.
            while len(self._sent) < len(self._members) - 1 and self._members[len(self._sent)].isdisjoint(self._missing):
                self._send()

        return arrived

    def _send(self, prefix: Tensor | None = None) -> None:
        """Start the all-reduce of the next bucket. The last bucket includes the sums in the memory before it."""
        from torch import distributed

        start, end = self._buckets[len(self._sent)]
        piece = self.flat[start:end]
        if self._earlier is not None:
            piece.add_(self._earlier[start:end])
        if prefix is not None:
            piece = self.bound.room[MARGIN - len(prefix) : MARGIN + end]
            piece[: len(prefix)] = prefix
        self._sent.append(distributed.all_reduce(piece, async_op=True))

    def results(
        self, plan: Plan, data: Clients, broadcast: Broadcast, key: Key, arrived: list[Flight], mine: Tensor
    ) -> Results | None:
        """The gradient of a round, reduced over all ranks; None on every rank if a client failed.

        Its partial sum is a view of the gradient of the task, so the next backward pass overwrites it.

        Args:
            plan: the algorithm, bound; `data_parallel`.
            data: all clients.
            broadcast, key: the broadcast and the key of the round.
            arrived: the flights of all ranks.
            mine: the positions of this rank's clients.
        """
        ((version, ids, down),) = by_version(arrived)
        table = self.flat.new_zeros(1 + len(down), len(_SUMS))  # row 0: whether a client failed
        self._sent, self._earlier = [], None
        # The weights of a mean are divided by their sum before the reduction, so the result needs no division.
        rule, held = plan.aggregator, plan.aggregator.weigh(ids.client, data.sizes[ids.client])
        self._divisor = int(held.sum()) if rule.over == "arrived" and not rule.forms_sum else 1
        with together():
            try:
                for i, at in enumerate(mine.tolist()):
                    start, last = ids.select(slice(at, at + 1)), i + 1 == len(mine)
                    self._one(plan, data, broadcast, key, start, last, table[1 + at])
            except Exception:
                table[0, 0] = 1.0  # the other ranks wait for the buckets of this rank
            if not len(mine) or table[0, 0]:
                self.flat.zero_()
                self._earlier = None
            while len(self._sent) < len(self._buckets):
                last = len(self._sent) + 1 == len(self._buckets)
                self._send(table.flatten() if last else None)
            for sent in self._sent:
                sent.wait()
        # Squares of very large numbers overflow. Then the caller computes the round again on the slower general path.
        table, norm = self.bound.room[MARGIN - table.numel() : MARGIN].view_as(table).clone(), vector_norm(self.flat)
        if table[0, 0] or not math.isfinite(float(norm) + float(table.sum())):
            return None
        attach(self.flat, "norm", norm)
        loss, rows = table[1:].unbind(1)
        held = data.sizes[ids.client]
        sums = {n: {0: column.double().sum()[None]} for n, column in zip(_SUMS, (loss, rows), strict=True)}
        weight = plan.aggregator.weigh(ids.client, held).sum() if self._divisor == 1 else torch.tensor(1)
        partial = PartialSum({"update": {0: self.flat}}, sums, {}, weight, torch.tensor(len(down)))
        facts = {
            "loss": (loss / rows.clamp(min=1)).to(down.device),
            "rows": held,
            "bytes_up": torch.full_like(down, message_bytes(plan, self.task)),
            "bytes_down": down,
        }
        return Results({version: partial}, [], [], [ids.client], [facts], [], [])

    def _one(
        self, plan: Plan, data: Clients, broadcast: Broadcast, key: Key, start: Ids, last: bool, row: Tensor
    ) -> None:
        """Compute the gradient of one client. The pass of the last client starts the reduction of the sum."""
        rows = data.sizes[start.client]
        weight = float(plan.aggregator.weigh(start.client, rows)) / self._divisor
        if last and rows and plan.local.padded_batch(int(rows)) <= ROWS:
            self._missing = set(range(len(self.bound.gradients)))
            self.bound.taken, self.bound.scale = True, self.flat.new_tensor(weight)
        try:
            contribution = contribute_chunk(plan, self.task, data, broadcast, start, key, {}).decoded
        finally:
            sent, self.bound.taken, self.bound.scale = self.bound.taken, False, None
        for i in self._missing if sent else ():  # the pass did not use these parameters
            self.bound.gradients[i].zero_()
        update = contribution.means["update"][0]
        if not last:
            self._earlier = update * weight if self._earlier is None else self._earlier.add_(update, alpha=weight)
        elif not sent:  # several passes, or none: the gradient is not in the flat vector
            torch.mul(update, weight, out=self.flat)
        row[:] = torch.tensor([float(contribution.sums[n]) for n in _SUMS])
