"""Clients dealt to workers, wherever they are: synchronous rounds shared out in chunks, other paces by real arrivals.

How many workers there are, who computes what and who dies over it changes no bit of a synchronous round. Partial sums
come back one a worker and round, not one a client.

Tests: tests/parity/test_processes.py
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from atoll.base.errors import UsageError
from atoll.base.random import Key
from atoll.compute import limits
from atoll.compute.layout import Layout
from atoll.compute.task import Task
from atoll.data.clients import Clients
from atoll.engine.chunk_limit import ChunkLimit
from atoll.engine.chunks import Results, by_version, chunks, gathered, task_for
from atoll.engine.client_state import Uncommitted
from atoll.engine.inprocess import check_chunk
from atoll.engine.protocols import Engine
from atoll.engine.simulation.arrivals import Arrivals, DownlinkBytes, simulate_round
from atoll.engine.workers.messages import BroadcastMessage, Setup, pack_broadcast, plan_of, plan_to_text
from atoll.engine.workers.pool import Job, PoolResult, Transport, WorkerPool
from atoll.engine.workers.serialize import serialize
from atoll.plan.in_flight import Flight, OpenRound
from atoll.plan.pace import Sync
from atoll.plan.plan import Plan
from atoll.plan.protocols import Broadcast, Cohort, Ids, Partial, Population
from atoll.plan.round import Gathered
from atoll.plan.state import State

_PLAIN = Sync()


class _Pending(NamedTuple):
    """A flight that a worker is at, or will be, and what it started from."""

    flight: Flight
    job: Job
    theta: Tensor
    plan: str


class WorkerEngine(Engine):
    """An engine that distributes clients to workers; `ProcessesEngine` and `RayEngine` start the workers.

    A worker that dies is replaced, and its unfinished clients are computed again. Close the engine, or use it in a
    `with` statement; an open engine ends with the program.

    Args:
        chunk: clients computed together; None chooses by the model's size. It changes no bit.
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
        self, task: Task, data: Clients, workers: int, threads: int, office: Transport, stillborn: int = 3
    ) -> None:
        """Start the workers.

        Args:
            task: the model, loss and metrics; `task.numerics` names the backend.
            data: the clients.
            workers: number of workers, ≥ 1.
            threads: of each worker.
            office: starts workers; it is closed with the engine.
            stillborn: workers that may end one after the other before the first is ready.
        """
        self.task, self.data = task, data
        self.workers, self.threads = workers, threads
        self._office = office
        self._numbers: Iterator[int] = iter(range(1, 1 << 62))
        self._tolds: set[int] = set()
        self._aloft: dict[int, _Pending] = {}
        self._plan: tuple[Plan, str, dict[str, str]] | None = None  # the last one, and how it crosses
        self._crew = WorkerPool(office, workers, stillborn)
        self._opened = self._fresh = True
        self.room = ChunkLimit()

    @property
    def population(self) -> Population:
        """All clients, and the rows each holds."""
        return Population(self.data.count, self.data.sizes)

    @property
    def layout(self) -> Layout:
        """How the model lies in its vector."""
        return self.task.layout

    def agree(self, value: bytes) -> bytes:
        """The value of the first process of a training: this one."""
        return value

    @property
    def pids(self) -> list[int]:
        """The process ids of the workers."""
        self._ready()
        return self._crew.pids

    @property
    def deaths(self) -> int:
        """Workers that have been replaced."""
        return self._crew.deaths

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the workers and give back their memory. Nothing is left behind; closing twice is closing."""
        if not self.closed:
            self.closed = True
            if self._opened:
                self._crew.close()
                self._office.close()

    def describe(self) -> Mapping[str, Any]:
        """The number of workers, and the threads of each."""
        return {"workers": self.workers, "threads_per_worker": self.threads}

    def gather(self, plan: Plan, state: State, cohort: Cohort, key: Key, keep: Collection[int] = ()) -> Gathered:
        """Run the cohort: one partial sum for each birth, and the record of who gave it.

        Raises:
            UsageError: the plan has a part that another process cannot import, or that needs a virtual clock.
            RunError: the same error struck every client, more failed than the plan allows, or a worker cannot go on.
        """
        self._ready()
        if self._plan is None or self._plan[0] is not plan:
            self._plan = plan, *_checked(plan)
        _, text, own = self._plan
        reading = self._crew.told()
        for number in self._tolds - reading:
            self._office.unpublish(number)
            self._crew.forget([number])
        self._tolds &= reading
        now = state.broadcast

        def tell(birth: int) -> BroadcastMessage:
            return self._tell(state.version(birth), key if birth == state.round else state.key(birth), text, own)

        try:
            if plan.pace == _PLAIN:
                flown, results = self._together(plan, state, cohort, tell(state.round), keep)
            else:
                flown, results = _Arrivals(self, plan, text, state, cohort, now, tell, keep).run()
        except BaseException:
            self._crew.drop(lambda job: True)
            self._aloft.clear()
            raise
        return gathered(plan, state, flown, results, self.room, keep)

    def _together(
        self, plan: Plan, state: State, cohort: Cohort, told: BroadcastMessage, keep: Collection[int]
    ) -> tuple[Arrivals, Results]:
        """A synchronous round: free workers receive chunks, and each returns its results once."""
        self._crew.drop(lambda job: True)
        self._aloft.clear()
        flown = simulate_round(plan, state, self.population, cohort, None, 0)
        task, kept, group = task_for(plan, self.task), Uncommitted(state.memory), next(self._numbers)
        most = -(-len(flown.arrived) // (limits.CHUNKS_PER_WORKER * self.workers)) or 1
        for _, ids, down in by_version(flown.arrived):
            for chunk, sent in chunks(plan, task, self.data, ids, down, self.room.within(self.chunk)):
                for at in torch.arange(len(sent)).split(most):
                    job = self.job(
                        group, told, chunk.select(at), sent[at], kept, keep, deliver=bool(state.memory.first)
                    )
                    self._crew.queue.append(job)
        results = Results.empty()
        while self._crew.busy(group):
            catch = self._crew.next(plan.aggregator, limits.QUEUED_CHUNKS)
            if catch is not None:
                results.add(plan.aggregator, catch.haul)
                self.room.lower(catch.most)
        return flown, results

    def job(
        self,
        group: int,
        told: BroadcastMessage,
        ids: Ids,
        down: Tensor,
        kept: Uncommitted,
        keep: Collection[int],
        *,
        deliver: bool,
    ) -> Job:
        """The job to compute these clients; it returns the contributions of those in `keep`."""
        rows, clients = (lambda: kept.take(ids.client)) if kept.first else None, ids.client.tolist()
        return Job(group, told, clients, ids.repeat.tolist(), down.tolist(), rows, deliver, sorted(keep))

    def _ready(self) -> None:
        if self.closed or not self._opened:
            kind = type(self).__name__
            raise UsageError(
                "The engine was closed.", "an engine that is open.", write=f"{kind}(task, data, workers=2)"
            )
        if self._fresh:
            self._crew.ready()
            self._fresh = False

    def _tell(self, broadcast: Broadcast, key: Key, text: str, own: dict[str, str]) -> BroadcastMessage:
        """What the clients of a birth may know, laid out once for all of them."""
        number = next(self._numbers)
        block, places = self._office.publish(number, pack_broadcast(broadcast))
        self._tolds.add(number)
        return BroadcastMessage(number, broadcast.round, text, own, str(key.seed), list(key.path), block, places, [])


class _Arrivals:
    """An open round of a pace that does not wait for everybody: a flight arrives when a worker has computed it."""

    def __init__(
        self,
        engine: WorkerEngine,
        plan: Plan,
        text: str,
        state: State,
        cohort: Cohort,
        now: Broadcast,
        tell: Any,
        keep: Collection[int],
    ) -> None:
        self.engine, self.plan, self.text, self.state, self.now = engine, plan, text, state, now
        self._sending = DownlinkBytes(state, engine.data.count)
        self._traffic = OpenRound(
            plan.pace, plan.sampler, state.seed, state.round, state.air, engine.population, cohort
        )
        self._kept = Uncommitted(state.memory)
        self._tolds: dict[int, BroadcastMessage] = {}
        self._tell, self._results, self._keep = tell, Results.empty(), keep
        self._started = self._sent = 0

    def run(self) -> tuple[Arrivals, Results]:
        """Start who is missing, take arrivals as they come, until the pace closes the round."""
        began, traffic, pace = time.perf_counter(), self._traffic, self.plan.pace
        deadline = pace.deadline_s
        self._adopt()
        self._start()
        waits = True
        while waits and traffic.flying:
            spent = time.perf_counter() - began
            left = deadline - spent if deadline is not None and spent < deadline else None
            catch = self._next(left)
            if catch is not None:
                self._arrive(catch)
            waits = traffic.goes_on(time.perf_counter() - began)
            if pace.replaces_arrivals and waits:
                self._start()
        late = traffic.abandoned()
        for flight in late:
            self._forget(flight.number)
        flown = Arrivals(
            traffic.arrivals,
            [],
            len(late),
            self._started,
            self._sent,
            traffic.in_flight(self._sending.known, None),
            None,
            (),
        )
        return flown, self._results

    def _adopt(self) -> None:
        """Flights that are in the air already: those that workers are at, and those of a state from elsewhere anew."""
        flights = {f.number: f for f in self.state.air.flights}
        for number in [n for n in self.engine._aloft if n not in flights]:
            self._forget(number)
        for number, flight in flights.items():
            known = self.engine._aloft.get(number)
            theta = self.state.versions[flight.version].model.theta
            same = known is not None and known.flight == flight and known.theta is theta and known.plan == self.text
            if known is None or not same or known.job.keep != self._named(flight):
                self._forget(number)
                self._post(flight, theta)

    def _start(self) -> None:
        begun = self._traffic.start_missing()
        for flight, down in zip(begun, self._sending.to([f.client for f in begun]), strict=True):
            self._traffic.sent(flight, down)
            self._post(flight._replace(down=down), self.now.model.theta)
            self._sent += down
        self._started += len(begun)

    def _post(self, flight: Flight, theta: Tensor) -> None:
        engine, birth = self.engine, flight.version
        if birth not in self._tolds:
            self._tolds[birth] = self._tell(birth)
        ids, down = Ids(torch.tensor([flight.client]), torch.tensor([flight.again])), torch.tensor([flight.down])
        job = engine.job(
            next(engine._numbers), self._tolds[birth], ids, down, self._kept, self._named(flight), deliver=True
        )
        engine._aloft[flight.number] = _Pending(flight, job, theta, self.text)
        engine._crew.queue.append(job)

    def _named(self, flight: Flight) -> list[int]:
        """The client of a flight, if the caller asked for its contribution."""
        return [flight.client] if flight.client in self._keep else []

    def _forget(self, number: int) -> None:
        known = self.engine._aloft.pop(number, None)
        if known is not None:
            self.engine._crew.drop(lambda job: job is known.job)

    def _next(self, left: float | None) -> PoolResult | None:
        """The next arrival. Workers that stay at what nobody waits for are given up, or no one would be left."""
        crew, deadline = self.engine._crew, self.plan.pace.deadline_s
        if deadline is None:
            return crew.next(self.plan.aggregator, 1, left)
        crew.replace_stuck(deadline + limits.PATIENCE_S)
        return crew.next(self.plan.aggregator, 1, limits.PATIENCE_S if left is None else min(left, limits.PATIENCE_S))

    def _arrive(self, catch: PoolResult) -> None:
        (job,) = catch.jobs
        number = next((n for n, known in self.engine._aloft.items() if known.job is job), None)
        if number is None:
            return
        flight, results = self.engine._aloft.pop(number).flight, catch.haul
        self.engine.room.lower(catch.most)
        self._traffic.arrive(number)
        for ids, rows in results.memory:
            self._kept.put(ids, rows)
        if self.plan.pace.asynchronous:
            late = torch.tensor([self.state.round - flight.version])
            facts: list[Mapping[str, Tensor]] = [{**f, "staleness": late} for f in results.facts]
            results = results._replace(facts=facts)
        self._results.add(self.plan.aggregator, results)


def packed(
    task: Task, data: Clients, model: str | None, seed: int, threads: int, spill: Callable[[], Path] | None
) -> tuple[Setup, dict[str, Tensor]]:
    """What every worker is given first, and the tensors in it; metrics go without what finishes them.

    Args:
        task, data: of the engine.
        model: the name that the model was made by, and `seed` that it was made with; None sends its tensors.
        threads: of each worker.
        spill: where a mapped array without a file of its own is written to; None sends it.
    Raises:
        UsageError: a model, loss or data set that another process cannot import.
    """
    plain: Any = replace(task, metrics=tuple(replace(metric, finish=float) for metric in task.metrics))
    if model is not None:
        plain = replace(plain, module=None)
    tree, of_task = serialize(plain, "The task", 'atoll.train("my_module:make", data, plan)', spill)
    rows, of_data = serialize(data, "The data", "atoll.data.arrays(x, y)", spill)
    tensors = {f"task/{n}": t for n, t in of_task.items()} | {f"data/{n}": t for n, t in of_data.items()}
    return Setup("", [], tree, rows, None if model is None else (model, str(seed)), threads), tensors


def _checked(plan: Plan) -> tuple[str, dict[str, str]]:
    """The plan as it crosses.

    Raises:
        UsageError: it needs what workers do not have.
    """
    if plan.pace.partial:
        raise UsageError(
            f"{plan.pace!r} with workers.",
            "a pace that hears those who have finished.",
            "a real computation cannot be cut short at a deadline and still be repeated.",
            repr(replace(plan.pace, partial=False)),  # type: ignore[type-var]
        )
    if not isinstance(plan.aggregator.zero(), Partial):
        raise UsageError(
            f"{plan.aggregator!r} with workers.",
            "a partial with `tensors`, `of` and `reduce`, as atoll.plan.protocols.Partial declares them.",
            "a partial sum comes back as plain tensors.",
            "--engine inprocess",
        )
    text, own = plan_to_text(plan)
    if plan_of(text, tuple(own.items())) != plan:
        raise UsageError(
            f"The plan prints as {text}, which builds another one.",
            "parts that print as what builds them.",
            "a worker reads the plan from its text.",
            "--engine inprocess",
        )
    return text, own
