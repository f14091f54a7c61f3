"""Distributes clients to workers: as chunks in synchronous rounds, and as single flights under other paces.

Under other paces a flight arrives when a worker has computed it, in real time. The number of workers, the assignment of
clients and the deaths of workers change no bit of a synchronous round. A worker returns one partial sum per round, not
one per client.

Tests: tests/parity/test_processes.py, tests/parity/test_ray.py, tests/faults/test_killed_clients.py
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from atoll.base.errors import UsageError
from atoll.base.lines import Change, Line, Part
from atoll.base.random import Key
from atoll.compute import limits
from atoll.compute.layout import Layout
from atoll.compute.task import Task
from atoll.data.clients import Clients
from atoll.engine.arrival_loop import ArrivalLoop, Landed
from atoll.engine.chunk_limit import ChunkLimit
from atoll.engine.chunks import by_version, chunks, gathered, task_for
from atoll.engine.client_state import Uncommitted
from atoll.engine.contribution import Results
from atoll.engine.inprocess import check_chunk
from atoll.engine.protocols import Engine
from atoll.engine.simulation.arrivals import Arrivals, simulate_round
from atoll.engine.workers.messages import BroadcastMessage, Setup, plan_of, plan_to_text
from atoll.engine.workers.pool import Job, PoolResult, Transport, WorkerPool
from atoll.engine.workers.serialize import serialize
from atoll.plan.in_flight import Flight
from atoll.plan.pace import Sync
from atoll.plan.plan import Plan
from atoll.plan.protocols import Broadcast, Cohort, Ids, Partial, Population
from atoll.plan.round import Gathered
from atoll.plan.state import State, pack_broadcast

_SYNC = Sync()


class _Pending(NamedTuple):
    """A flight that a worker computes or will compute, with its job, the model and the plan that it started from."""

    flight: Flight
    job: Job
    theta: Tensor
    plan: str


class WorkerEngine(Engine):
    """An engine that distributes clients to workers; `ProcessesEngine` and `RayEngine` start the workers.

    If a worker dies, another one is started and repeats its unfinished clients. Close the engine, or use it in a `with`
    statement. An open engine ends with the program.

    Args:
        chunk: the number of clients that are computed together; None chooses it by the size of the model. It changes no
            bit.
    """

    task: Task
    data: Clients
    workers: int
    threads: int

    def __init__(self, chunk: int | None) -> None:
        check_chunk(chunk)
        self.chunk = chunk
        self.closed, self._opened = False, False

    def _open(
        self, task: Task, data: Clients, workers: int, threads: int, transport: Transport, max_failed_starts: int = 3
    ) -> None:
        """Start the workers.

        Args:
            task: the model, loss and metrics; `task.numerics` names the backend.
            data: the clients.
            workers: number of workers, ≥ 1.
            threads: number of threads of each worker, ≥ 1.
            transport: starts workers; `close` closes it.
            max_failed_starts: after this number of consecutive failed starts, the run ends with an error.
        """
        self.task, self.data = task, data
        self.workers, self.threads = workers, threads
        self._transport = transport
        self._numbers: Iterator[int] = iter(range(1, 1 << 62))
        self._broadcasts: set[int] = set()
        self._in_flight: dict[int, _Pending] = {}
        self._plan: tuple[Plan, str, dict[str, str]] | None = None  # the last plan, and its text
        self._pool = WorkerPool(transport, workers, max_failed_starts)
        self._opened = self._fresh = True
        self.room = ChunkLimit()

    @property
    def population(self) -> Population:
        """All clients, and the number of rows of each."""
        return Population(self.data.count, self.data.sizes)

    @property
    def layout(self) -> Layout:
        """The layout of the model vector."""
        return self.task.layout

    def agree(self, value: bytes) -> bytes:
        """The value itself, because this is the only process that runs the training."""
        return value

    @property
    def pids(self) -> list[int]:
        """The process ids of the workers."""
        self._ready()
        return self._pool.pids

    @property
    def deaths(self) -> int:
        """The number of workers that died and were replaced."""
        return self._pool.deaths

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the workers and release their memory. A second call does nothing."""
        if not self.closed:
            self.closed = True
            if self._opened:
                self._pool.close()
                self._transport.close()

    def describe(self) -> Mapping[str, Any]:
        """The number of workers, and the number of threads of each."""
        return {"workers": self.workers, "threads_per_worker": self.threads}

    def gather(self, plan: Plan, state: State, cohort: Cohort, key: Key, keep: Collection[int] = ()) -> Gathered:
        """Train the cohort and return one partial sum for each model version.

        Raises:
            UsageError: the plan has a part that another process cannot import, or that needs a virtual clock.
            RunError: all clients failed with the same error, more failed than the plan allows, or a worker stopped.
        """
        self._ready()
        if self._plan is None or self._plan[0] is not plan:
            self._plan = plan, *_checked(plan)
        _, text, own = self._plan
        needed = self._pool.needed_broadcasts()
        for number in self._broadcasts - needed:
            self._transport.unpublish(number)
            self._pool.forget([number])
        self._broadcasts &= needed

        def message(version: int) -> BroadcastMessage:
            chosen = key if version == state.round else state.key(version)
            return self._publish(state.version(version), chosen, text, own)

        try:
            if plan.pace == _SYNC:
                flown, results = self._together(plan, state, cohort, message(state.round), keep)
            else:
                flown, results = _AsynchronousRound(self, plan, text, state, cohort, message, keep).run()
        except BaseException:
            self._pool.drop(lambda job: True)
            self._in_flight.clear()
            raise
        return gathered(plan, state, flown, results, self.room, keep)

    def _together(
        self, plan: Plan, state: State, cohort: Cohort, broadcast: BroadcastMessage, keep: Collection[int]
    ) -> tuple[Arrivals, Results]:
        """A synchronous round: free workers receive chunks, and each returns its results once."""
        self._pool.drop(lambda job: True)
        self._in_flight.clear()
        flown = simulate_round(plan, state, self.population, cohort, None, 0)
        task, kept, group = task_for(plan, self.task), Uncommitted(state.memory), next(self._numbers)
        largest = -(-len(flown.arrived) // (limits.CHUNKS_PER_WORKER * self.workers)) or 1
        for _, ids, down in by_version(flown.arrived):
            for chunk, sent in chunks(plan, task, self.data, ids, down, self.room.within(self.chunk)):
                for at in torch.arange(len(sent)).split(largest):
                    job = self.job(
                        group, broadcast, chunk.select(at), sent[at], kept, keep, deliver=bool(state.memory.first)
                    )
                    self._pool.queue.append(job)
        results = Results.empty()
        while self._pool.busy(group):
            result = self._pool.next(plan.aggregator, limits.QUEUED_CHUNKS)
            if result is not None:
                results.add(plan.aggregator, result.results)
                self.room.lower(result.max_chunk)
        return flown, results

    def job(
        self,
        group: int,
        broadcast: BroadcastMessage,
        ids: Ids,
        down: Tensor,
        kept: Uncommitted,
        keep: Collection[int],
        *,
        deliver: bool,
    ) -> Job:
        """The job to compute these clients; it returns the contributions of those in `keep`."""
        rows, clients = (lambda: kept.take(ids.client)) if kept.first else None, ids.client.tolist()
        return Job(group, broadcast, clients, ids.repeat.tolist(), down.tolist(), rows, deliver, sorted(keep))

    def _ready(self) -> None:
        if self.closed or not self._opened:
            kind = type(self).__name__
            raise UsageError(
                "The engine was closed.", "an engine that is open.", write=Line(python=f"{kind}(task, data, workers=2)")
            )
        if self._fresh:
            self._pool.ready()
            self._fresh = False

    def _publish(self, broadcast: Broadcast, key: Key, text: str, own: dict[str, str]) -> BroadcastMessage:
        """Publish the broadcast of a model version for all workers. Returns its message."""
        number = next(self._numbers)
        block, places = self._transport.publish(number, pack_broadcast(broadcast))
        self._broadcasts.add(number)
        seed, path = str(key.seed), list(key.path)
        return BroadcastMessage(number, broadcast.round, text, own, seed, path, key.secret, block, places, [])


class _AsynchronousRound:
    """An open round of a pace that does not wait for all clients. A flight arrives when a worker has computed it."""

    def __init__(
        self,
        engine: WorkerEngine,
        plan: Plan,
        text: str,
        state: State,
        cohort: Cohort,
        message: Callable[[int], BroadcastMessage],
        keep: Collection[int],
    ) -> None:
        self.engine, self.plan, self.text, self.state = engine, plan, text, state
        self._loop = ArrivalLoop(plan, state, engine.population, cohort, self._submit, self._receive, time.perf_counter)
        self._kept = Uncommitted(state.memory)
        self._broadcasts: dict[int, BroadcastMessage] = {}
        self._message, self._results, self._keep = message, Results.empty(), keep

    def run(self) -> tuple[Arrivals, Results]:
        """Start the missing clients and accept arrivals until the pace closes the round."""
        flights = {flight.number for flight in self.state.air.flights}
        for number in self.engine._in_flight.keys() - flights:
            self._forget(number)
        flown = self._loop.run()
        if not self.plan.pace.asynchronous:
            for number in self._loop.awaited:
                self._forget(number)
        return flown, self._results

    def _submit(self, flight: Flight) -> None:
        """Submit the job of a flight. A flight of an earlier round may have its job already, except after a resume."""
        engine, version = self.engine, flight.version
        theta, known = self.state.version(version).model.theta, self.engine._in_flight.get(flight.number)
        asked = self._requested(flight)
        same = known is not None and (known.flight, known.plan, known.job.keep) == (flight, self.text, asked)
        if known is not None and same and known.theta is theta:
            return
        self._forget(flight.number)
        if version not in self._broadcasts:
            self._broadcasts[version] = self._message(version)
        ids, down = Ids(torch.tensor([flight.client]), torch.tensor([flight.again])), torch.tensor([flight.down])
        job = engine.job(
            next(engine._numbers),
            self._broadcasts[version],
            ids,
            down,
            self._kept,
            asked,
            deliver=True,
        )
        engine._in_flight[flight.number] = _Pending(flight, job, theta, self.text)
        engine._pool.queue.append(job)

    def _requested(self, flight: Flight) -> list[int]:
        """The client of a flight, if the caller asked for its contribution."""
        return [flight.client] if flight.client in self._keep else []

    def _forget(self, number: int) -> None:
        known = self.engine._in_flight.pop(number, None)
        if known is not None:
            self.engine._pool.drop(lambda job: job is known.job)

    def _receive(self, left: float | None) -> list[Landed]:
        """The next arrival. Workers that still compute cancelled jobs are replaced, so that some worker stays free."""
        pool, deadline = self.engine._pool, self.plan.pace.deadline_s
        if deadline is not None:
            pool.replace_stuck(deadline + limits.PATIENCE_S)
            left = limits.PATIENCE_S if left is None else min(left, limits.PATIENCE_S)
        result = pool.next(self.plan.aggregator, 1, left)
        return [] if result is None else self._arrive(result)

    def _arrive(self, result: PoolResult) -> list[Landed]:
        (job,) = result.jobs
        number = next((n for n, known in self.engine._in_flight.items() if known.job is job), None)
        if number is None:
            return []
        flight, results = self.engine._in_flight.pop(number).flight, result.results
        self.engine.room.lower(result.max_chunk)
        for ids, rows in results.memory:
            self._kept.put(ids, rows)
        if self.plan.pace.asynchronous:
            late = torch.tensor([self.state.round - flight.version])
            facts: list[Mapping[str, Tensor]] = [{**f, "staleness": late} for f in results.facts]
            results = results._replace(facts=facts)
        self._results.add(self.plan.aggregator, results)
        return [Landed(number)]


def packed(
    task: Task, data: Clients, model: str | None, seed: int, threads: int, spill: Callable[[], Path] | None
) -> tuple[Setup, dict[str, Tensor]]:
    """The first message to every worker, and its tensors. Metrics are not sent: this process evaluates the model.

    Args:
        task, data: the task and the clients of the engine.
        model: the name from which the model was built; None sends the module with its tensors.
        seed: the seed with which the model was built.
        threads: number of threads of each worker, ≥ 1.
        spill: gives a path to which a mapped array without a file is written; None sends the array.
    Raises:
        UsageError: another process cannot import the model, the loss or the data set.
    """
    plain: Any = replace(task, metrics=(), lengths={})
    if model is not None:
        plain = replace(plain, module=None)
    named = [Change("model", "my_module:make").at(door) for door in ("shell", "file")]
    tree, of_task = serialize(plain, "The task", Line('atoll.train("my_module:make", data, plan)', *named), spill)
    rows, of_data = serialize(data, "The data", Line(python="atoll.data.arrays(x, y)"), spill)
    tensors = {f"task/{n}": t for n, t in of_task.items()} | {f"data/{n}": t for n, t in of_data.items()}
    return Setup("", [], tree, rows, None if model is None else (model, str(seed)), threads), tensors


def _checked(plan: Plan) -> tuple[str, dict[str, str]]:
    """The plan as text, and the `module:name` of each part that is not in the package.

    Raises:
        UsageError: workers cannot run the plan.
    """
    if plan.pace.partial:
        known: list[str] = [f.name for f in fields(plan.pace)] if is_dataclass(plan.pace) else []
        raise UsageError(
            f"{plan.pace!r} with workers.",
            "a pace without partial work.",
            "a computation that is cut at a deadline in real time cannot be repeated.",
            Part(repr(replace(plan.pace, partial=False)) if "partial" in known else "Sync()", "pace"),  # type: ignore[type-var]
        )
    if not isinstance(plan.aggregator.zero(), Partial):
        raise UsageError(
            f"{plan.aggregator!r} with workers.",
            "a partial with `tensors`, `of` and `reduce`, as atoll.plan.protocols.Partial declares them.",
            "a worker returns a partial sum as plain tensors.",
            Change("engine", "inprocess"),
        )
    text, own = plan_to_text(plan)
    if plan_of(text, tuple(own.items())) != plan:
        raise UsageError(
            f"The text of the plan is {text}, and this text builds another plan.",
            "parts whose `repr` builds an equal part.",
            "a worker reads the plan from its text.",
            Change("engine", "inprocess"),
        )
    return text, own
