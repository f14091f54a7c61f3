"""Clients in this process: lanes of a chunk computed together, contributions folded as they come.

A chunk is K clients whose batches are padded to one width. How large it is, and in which order chunks run, changes no
bit: a lane's numbers depend on its own client alone, and the sum does not depend on order.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from atoll.data.clients import Clients
from atoll.errors import AtollError, RunError, UsageError
from atoll.layout import Layout
from atoll.plan.aggregate.exact import LARGEST
from atoll.plan.lanes import Lanes
from atoll.plan.plan import Failure, Gathered, Plan, State, part_of
from atoll.plan.slots import Broadcast, Cohort, Contribution, Population
from atoll.rng import Key
from atoll.task import Task

_LANE_BYTES = 16 << 20  # what a chunk's θ, gradients and updates take together: they stay near the cores
_SMALL = 100_000  # parameters below which one thread is quickest


@dataclass(frozen=True)
class InProcess:
    """An engine that runs clients in this process.

    Args:
        task: the model, loss and metrics; its `numerics` say which body computes.
        data: the clients.
        chunk: clients computed together; None chooses by the model's size. It changes no bit.
    """

    task: Task
    data: Clients
    chunk: int | None = None

    def __post_init__(self) -> None:
        if self.chunk is not None and self.chunk < 1:
            raise UsageError(f"chunk = {self.chunk}.", "at least one client.", write="--chunk 32")

    @property
    def population(self) -> Population:
        """All clients, and the rows each holds."""
        return Population(self.data.count, self.data.sizes)

    @property
    def layout(self) -> Layout:
        """How the model lies in its vector."""
        return self.task.layout

    def gather(self, plan: Plan, state: State, cohort: Cohort, key: Key) -> Gathered:
        """Run the cohort: one partial sum, and the record of who gave it.

        Raises:
            RunError: the same error struck every client, or more failed than the plan allows.
        """
        task = replace(self.task, numerics=getattr(plan.local, "numerics", self.task.numerics))
        if task.numerics == self.task.numerics:
            task = self.task
        broadcast = Broadcast(state.round, state.model, state.server)
        round_ = _Round(plan, state, task, self.data, broadcast, key)
        with threads_for(task):
            for ids in self._chunks(plan, task, cohort.ids):
                round_.run(ids)
        return round_.gathered(cohort)

    def _chunks(self, plan: Plan, task: Task, ids: Tensor) -> Iterator[Tensor]:
        """Clients of one width together, largest first, a chunk at a time."""
        sizes = self.data.sizes[ids]
        ids = ids[torch.argsort(sizes, descending=True, stable=True)]
        chunk = self._lanes(plan, task)
        group: list[int] = []
        now = -1
        for i, n in zip(ids.tolist(), self.data.sizes[ids].tolist(), strict=True):
            width = plan.local.width(n)
            if group and (width != now or len(group) == chunk):
                yield torch.tensor(group)
                group = []
            now = width
            group.append(i)
        if group:
            yield torch.tensor(group)

    def _lanes(self, plan: Plan, task: Task) -> int:
        if task.numerics == "loop":
            return 1
        if self.chunk is not None:
            return self.chunk
        each = 6 * task.layout.d * task.layout.dtype.itemsize
        return max(4, min(1024, _LANE_BYTES // each))


@contextlib.contextmanager
def threads_for(task: Task) -> Iterator[None]:
    """Let torch use one thread for a small model, and then as many as before. It changes no bit.

    A kernel of a small model is over before a second thread has woken; on a busy machine the first then waits for it.
    """
    before = torch.get_num_threads()
    if before == 1 or task.layout.d >= _SMALL or task.slow_in_lanes:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Round:
    """One round under way: what has arrived so far."""

    def __init__(self, plan: Plan, state: State, task: Task, data: Clients, broadcast: Broadcast, key: Key) -> None:
        self.plan, self.state, self.task, self.data = plan, state, task, data
        self.broadcast, self.key = broadcast, key
        self.partial = plan.aggregator.zero()
        self.failures: list[Failure] = []
        self.errors: list[Exception] = []
        self.arrived: list[Tensor] = []
        self.facts: list[Mapping[str, Tensor]] = []
        self.memory: list[tuple[Tensor, Mapping[str, Tensor]]] = []
        self.bytes_up = 0

    def run(self, ids: Tensor) -> None:
        """Compute a chunk and fold what it gives; a client that raises is found by halving the chunk."""
        try:
            contribution, memory, size = self._contribute(ids)
        except (MemoryError, KeyboardInterrupt, AtollError):
            raise
        except Exception as error:
            if len(ids) > 1:
                self.run(ids[: len(ids) // 2])
                self.run(ids[len(ids) // 2 :])
            else:
                self._fail(int(ids[0]), "local", f"{type(error).__name__}: {error}")
                self.errors.append(error)
            return
        good = torch.ones(len(ids), dtype=torch.bool)
        for name, rows in (*contribution.means.items(), *contribution.sums.items()):
            finite = rows.reshape(len(ids), -1).abs().amax(1) <= LARGEST
            for i in ids[good & ~finite].tolist():
                self._fail(i, "check", f"{name} is not finite")
            good &= finite
        self._accept(ids, good, contribution, memory, size)

    def _accept(
        self, ids: Tensor, good: Tensor, contribution: Contribution, memory: Mapping[str, Tensor], size: int
    ) -> None:
        if not bool(good.all()):
            ids, memory = ids[good], {n: t[good] for n, t in memory.items()}
            picked = (
                {n: t[good] for n, t in part.items()}
                for part in (contribution.means, contribution.sums, contribution.largest, contribution.facts)
            )
            means, sums, largest, facts = picked
            contribution = Contribution(means, sums, contribution.weight[good], largest, facts)
        if not len(ids):
            return
        self.partial = self.plan.aggregator.fold(self.partial, contribution)
        self.arrived.append(ids)
        self.facts.append({**contribution.facts, "rows": contribution.weight})
        self.bytes_up += size * len(ids)
        if memory:
            self.memory.append((ids, memory))

    def _contribute(self, ids: Tensor) -> tuple[Contribution, Mapping[str, Tensor], int]:
        """The contributions of a chunk, opened, with the size of one message in bytes."""
        lanes = Lanes(self.data, ids, tuple(self.data.sizes[ids].tolist()), self.task.layout.dtype)
        kept = self.state.memory.take(ids)
        key = self.key.of(ids)
        contribution, local = self.plan.local.contribute(
            self.broadcast, lanes, part_of(kept, "local"), key.fold("clients", "local"), self.task
        )
        memory = {f"local/{n}": t for n, t in local.items()}
        update = contribution.means.get("update")
        if update is None:
            return contribution, memory, _bytes(contribution, {})
        payload, side, sums, codec = self.plan.codec.encode(
            update, part_of(kept, "codec"), self.broadcast.shared["codec"], key.fold("codec")
        )
        memory |= {f"codec/{n}": t for n, t in codec.items()}
        contribution = contribution._replace(sums={**contribution.sums, **sums})
        size = _bytes(contribution, {"payload": payload, **side})
        opened = {**contribution.means, "update": self.plan.codec.open(payload, side)}
        return contribution._replace(means=opened), memory, size

    def _fail(self, client: int, stage: str, cause: str) -> None:
        self.failures.append(Failure(client, self.broadcast.round, stage, cause))

    def gathered(self, cohort: Cohort) -> Gathered:
        """What the round brought back, or the reason to end the run."""
        asked = len(cohort.ids)
        self.failures.sort()  # by client: the order of chunks tells nothing
        if self.failures and len(self.failures) == asked:
            self._all_failed()
        if len(self.failures) > self.plan.max_failed * asked:
            first = self.failures[0]
            raise RunError(
                f"{len(self.failures)} of {asked} clients failed in round {self.broadcast.round}; "
                f"first client {first.client}, at {first.stage}: {first.cause}.",
                f"at most the fraction max_failed = {self.plan.max_failed}.",
                "what is left would be another cohort than the sampler drew. The state is that of the round before.",
                "atoll lr" if "not finite" in first.cause else "--set plan.max_failed=1.0",
            )
        ids = torch.cat(self.arrived) if self.arrived else torch.empty(0, dtype=torch.int64)
        order = torch.argsort(ids, stable=True)
        names = set.intersection(*(set(f) for f in self.facts)) if self.facts else set()
        facts = {n: torch.cat([f[n] for f in self.facts])[order] for n in sorted(names)}
        model = self.broadcast.model
        down = _size({"theta": model.theta, "buffers": model.buffers, **model.counters})
        down += sum(_size(tensors) for tensors in self.broadcast.shared.values())
        down += _size(model.fixed) if self.broadcast.round == 0 else 0
        partials: dict[int, Any] = {self.broadcast.round: self.partial}
        return Gathered(
            partials, ids[order], tuple(self.memory), facts, tuple(self.failures), self.bytes_up, down * asked
        )

    def _all_failed(self) -> None:
        """Every client failed: the same way is a fault of the program, not of the clients."""
        (cause, count), *_ = Counter(f.cause for f in self.failures).most_common()
        if count < len(self.failures):
            return
        first = self.failures[0]
        raise RunError(
            f"Every client of round {first.round} failed in the same way, at {first.stage}: {cause}.",
            "a model, a loss and data that fit each other, and a step that stays finite.",
            "what strikes every client alike is a fault of the program or of the learning rate, not of a client.",
            "atoll lr" if first.stage == "check" else "atoll run --smoke",
        ) from (self.errors[0] if self.errors else None)


def _size(tensors: Mapping[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _bytes(contribution: Contribution, message: Mapping[str, Tensor]) -> int:
    """The bytes of one client's message: the encoded update, the other means, sums, counters, and 8 for the weight."""
    rest = {n: t for n, t in contribution.means.items() if n != "update"}
    whole = _size(message) + _size(rest) + _size(contribution.sums) + _size(contribution.largest)
    return whole // len(contribution.weight) + 8
