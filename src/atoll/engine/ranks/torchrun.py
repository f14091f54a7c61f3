"""The engine for ranks that `torchrun` started. Each rank trains a part of the clients; the exact sum has equal bits.

Every rank has the whole state and makes the same draws. In a round each rank trains its part of the clients with
`InProcessEngine`. Then the ranks exchange the digits of exact sums, the client states, and the failures with their
causes. The digits are integers, so their sum has the same bits in any order. Afterwards every rank makes the same step
of the server. No rank is a server, and θ is never sent.

Tests: tests/parity/test_torchrun.py
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from functools import cached_property
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from atoll.base.errors import AtollError, RunError, UsageError
from atoll.base.lines import Change, Line, forms
from atoll.base.names import without_prefix
from atoll.base.random import Key
from atoll.compute.batches import HOST
from atoll.compute.layout import Layout
from atoll.compute.task import Task
from atoll.data.clients import Clients
from atoll.engine.chunks import gathered, kept_from_tensors, kept_to_tensors
from atoll.engine.contribution import Results
from atoll.engine.inprocess import InProcessEngine, threads_for
from atoll.engine.protocols import Engine
from atoll.engine.ranks.launch import job, restarts
from atoll.engine.ranks.overlap import Overlap, data_parallel
from atoll.engine.ranks.process_group import ProcessGroup
from atoll.engine.simulation.arrivals import message_bytes, simulate_round
from atoll.engine.simulation.fleet import Fleet
from atoll.plan.plan import Plan
from atoll.plan.protocols import Aggregator, Cohort, Partial, Population, Tensors
from atoll.plan.round import Failure, Gathered
from atoll.plan.state import State, part_of


class TorchrunEngine(Engine):
    """An engine that runs each client on one of the ranks that `torchrun` started.

    Every rank calls `gather` with the same plan, state and cohort, and gets the same sum. For any number of ranks it
    has the bits of the sum of `InProcessEngine`.

    Args:
        task, data, chunk, fleet: as for `InProcessEngine`.
        ranks: the processes of the training.
    """

    task: Task
    data: Clients

    def __init__(
        self,
        task: Task | None = None,
        data: Clients | None = None,
        chunk: int | None = None,
        fleet: Fleet | None = None,
        ranks: ProcessGroup | None = None,
    ) -> None:
        self.ranks = ProcessGroup.join() if ranks is None else ranks
        self.chunk, self.fleet = chunk, fleet
        self._local = InProcessEngine(None, None, chunk, fleet, self._assign, self._reduce)
        self.room = self._local.room
        if task is not None and data is not None:
            self.open(task, data)

    def open(self, task: Task, data: Clients) -> None:
        """Take the task and the clients."""
        self.task, self.data = task, data
        self._local.open(task, data)

    @property
    def population(self) -> Population:
        """All clients, and the rows of each."""
        return self._local.population

    @property
    def layout(self) -> Layout:
        """The layout of the model vector."""
        return self._local.layout

    @property
    def primary(self) -> bool:
        """Whether this process is rank 0."""
        return self.ranks.first

    @property
    def restart_of(self) -> str | None:
        """The job of `torchrun`, if it has restarted the ranks."""
        return job() if restarts() else None

    def numerics_for(self, plan: Plan) -> tuple[str, str] | None:
        """The loop for a data-parallel plan: gradients are then added during the backward pass."""
        return ("loop", "gradients are reduced during the backward pass") if data_parallel(plan) else None

    def check_start(self, plan: Plan, state: State) -> None:
        """Refuse a fleet or a deadline, as `InProcessEngine` does."""
        self._local.check_start(plan, state)

    def agree(self, value: bytes) -> bytes:
        """The value of rank 0."""
        return self.ranks.broadcast(value)

    def exchange(self, value: bytes) -> list[bytes]:
        """The values of all ranks, by rank."""
        return self.ranks.all_gather_bytes(value)

    def describe(self) -> Mapping[str, Any]:
        """The kind of GPU, the job of `torchrun` and the number of ranks."""
        return {**self._local.describe(), "job": job(), "ranks": self.ranks.size}

    def gather(self, plan: Plan, state: State, cohort: Cohort, key: Key, keep: Collection[int] = ()) -> Gathered:
        """Train this rank's clients of the cohort, and add the results of all ranks.

        Raises:
            UsageError: the pace lets clients arrive in a later round, or a client of `keep` did not arrive.
            RunError: as for `InProcessEngine`, at every rank; or a rank is gone.
        """
        refuse_pace(plan)
        refuse_partial(plan)
        reduced = None if keep else self._overlapped(plan, state, cohort, key)
        return self._local.gather(plan, state, cohort, key, keep) if reduced is None else reduced

    def _overlapped(self, plan: Plan, state: State, cohort: Cohort, key: Key) -> Gathered | None:
        """The round with gradients added during the backward pass; None if the plan is no such plan or a client fails.

        After a None, the caller computes the round on the general path. Simulated durations are keyed and stay equal.
        """
        task, data = self.task, self.data
        if task.numerics != "loop" or not data_parallel(plan):
            return None
        up = 0 if self.fleet is None else message_bytes(plan, task)
        flown = simulate_round(plan, state, self.population, cohort, self.fleet, up)
        arrived = flown.arrived
        if not self._overlap.serves(data, arrived):
            return None
        with threads_for(task, cohort.ids.shape[0], plan):
            mine = self._assign(torch.tensor([flight.client for flight in arrived]))
            results = self._overlap.results(plan, data, state.broadcast, key, arrived, mine)
        return None if results is None else gathered(plan, state, flown, results, self.room)

    @cached_property
    def _overlap(self) -> Overlap:
        return Overlap(self.task, self.ranks)

    def _assign(self, clients: Tensor) -> Tensor:
        return assign(clients, self.data, self.ranks)

    def _reduce(self, rule: Aggregator, results: Results, first: Tensors, trouble: Exception | None) -> Results:
        return all_reduce_results(self.ranks, rule, results, first, trouble, self.task.device)


def assign(clients: Tensor, data: Clients, ranks: ProcessGroup) -> Tensor:
    """The positions of this rank's clients in `clients`.

    Clients are assigned in order of decreasing size, to ranks 0 … n − 1, then n − 1 … 0, and so on. So all ranks have
    nearly the same number of rows.

    Example:
        >>> from atoll.testing.local import clients as data
        >>> [assign(torch.arange(7), data(), ProcessGroup(rank, 2, torch.device("cpu"))).tolist() for rank in range(2)]
        [[0, 3, 4], [1, 2, 5, 6]]
    """
    order = torch.argsort(data.sizes[clients], descending=True, stable=True)
    turn = torch.arange(len(clients))
    place, back = turn % ranks.size, turn // ranks.size % 2 == 1
    return order[torch.where(back, ranks.size - 1 - place, place) == ranks.rank]


def refuse_pace(plan: Plan) -> None:
    """Refuse an asynchronous pace.

    Raises:
        UsageError: the pace lets clients arrive in a later round.
    """
    if plan.pace.asynchronous:
        raise UsageError(
            f"{plan.pace!r} on the engine torchrun.",
            "Sync().",
            "the ranks add their sums in one collective, so each round waits for the slowest rank.",
            Change("plan.pace", "Sync()"),
        )


def refuse_partial(plan: Plan) -> None:
    """Refuse an aggregator whose partial cannot be reduced over processes.

    Raises:
        UsageError: names the aggregator and its partial.
    """
    partial = plan.aggregator.zero()
    if not isinstance(partial, Partial):
        raise UsageError(
            f"{plan.aggregator!r} on the engine torchrun: its partial is a {type(partial).__name__}.",
            "a partial with `tensors`, `of` and `reduce`, as atoll.plan.protocols.Partial declares them.",
            "each rank has a part of the aggregate, and `reduce` combines them.",
            Change("engine", "inprocess"),
        )


def all_reduce_results(
    ranks: ProcessGroup,
    rule: Aggregator,
    results: Results,
    first: Tensors,
    trouble: Exception | None = None,
    device: torch.device = HOST,
) -> Results:
    """The results of all ranks, at each rank.

    Args:
        ranks: the processes of the training.
        rule: the aggregator of the plan.
        results: the results of this rank.
        first: the client state of one client before its first round: the shape of a row.
        trouble: the error of this rank.
        device: the device of the sums.
    Raises:
        RunError: a rank has an error.
    """
    ids, rows = _memory(results)
    mine: dict[str, Any] = {
        "trouble": _parts(trouble),
        "failures": [tuple(f) for f in results.failures],
        "versions": sorted(results.partials),
        "rows": {n: list(t.shape) for n, t in rows.items()},
    }
    names = set.intersection(*(set(f) for f in results.facts)) if results.facts else set()
    facts = {f"facts/{n}": torch.cat([f[n] for f in results.facts]) for n in sorted(names)}
    arrived = torch.cat(results.arrived) if results.arrived else torch.empty(0, dtype=torch.int64)
    kept = {f"keep/{n}": t.contiguous() for n, t in kept_to_tensors(results.kept).items()}
    words = torch.frombuffer(bytearray(json.dumps(mine).encode()), dtype=torch.uint8)
    received = [
        load(data)
        for data in ranks.all_gather_bytes(save({"record": words, "arrived": arrived, "kept": ids, **facts, **kept}))
    ]
    each = [json.loads(tensors["record"].numpy().tobytes()) for tensors in received]
    _raise([record["trouble"] for record in each])
    nonempty = [tensors for tensors in received if len(tensors["arrived"])]
    return Results(
        _reduced(ranks, rule, results.partials, {version for record in each for version in record["versions"]}, device),
        [Failure(*failure) for record in each for failure in record["failures"]],
        results.errors,
        [tensors["arrived"] for tensors in nonempty],
        [without_prefix(tensors, "facts/") for tensors in nonempty],
        _all_memory(ranks, rows, received, [record["rows"] for record in each], first),
        [kept for tensors in received for kept in kept_from_tensors(part_of(tensors, "keep"))],
    )


def _reduced(
    ranks: ProcessGroup, rule: Aggregator, mine: Mapping[int, Any], versions: set[int], device: torch.device
) -> dict[int, Any]:
    """The aggregate of all ranks, for each model version. Every rank calls `reduce` for every version."""
    out = {}
    for version in sorted(versions):
        partial = (mine[version] if version in mine else rule.zero()).reduce(ranks)
        if device != HOST:  # a rank without clients has a partial on the host
            partial = partial.of({n: t.to(device) if t.dim() else t for n, t in partial.tensors().items()})
        out[version] = partial
    return out


def _memory(results: Results) -> tuple[Tensor, dict[str, Tensor]]:
    """The client state of this rank's clients, as one table."""
    if not results.memory:
        return torch.empty(0, dtype=torch.int64), {}
    ids = torch.cat([ids for ids, _ in results.memory])
    return ids, {n: torch.cat([rows[n] for _, rows in results.memory]) for n in results.memory[0][1]}


def _all_memory(
    ranks: ProcessGroup,
    mine: Mapping[str, Tensor],
    received: list[dict[str, Tensor]],
    shapes: list[dict[str, list[int]]],
    first: Tensors,
) -> list[tuple[Tensor, Mapping[str, Tensor]]]:
    """The client states of all ranks, in order of ranks."""
    tables: list[dict[str, Tensor]] = [{} for _ in received]
    for n in sorted({n for s in shapes for n in s}):
        own = mine.get(n, first[n].new_empty(0, *first[n].shape))
        each = [s.get(n, [0, *first[n].shape]) for s in shapes]
        for table, rows in zip(tables, ranks.rows(own, each), strict=True):
            table[n] = rows
    return [(t["kept"], table) for t, table in zip(received, tables, strict=True) if len(t["kept"])]


def _parts(trouble: Exception | None) -> list[str] | None:
    """The parts of an error, with the forms of its line."""
    if trouble is None:
        return None
    if isinstance(trouble, AtollError):
        return [trouble.given, trouble.required, trouble.why, *forms(trouble.write)]
    return [f"{type(trouble).__name__}: {trouble}", "", "", *forms(Change("chunk", 1))]


def _raise(troubles: list[list[str] | None]) -> None:
    """Raise the error of the first rank that has one, on every rank."""
    for rank, parts in enumerate(troubles):
        if parts is not None:
            given, required, why, *lines = parts
            raise RunError(f"Rank {rank}: {given}", required, why, Line(*lines))
