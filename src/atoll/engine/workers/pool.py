"""A pool of workers: the pool assigns jobs to idle workers, and assigns them again if a worker dies.

Tests: tests/faults/test_killed_clients.py, tests/parity/test_processes.py, tests/parity/test_ray.py.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from msgspec import structs
from torch import Tensor

from atoll.base.errors import RunError, UsageError
from atoll.base.lines import Change, Line
from atoll.engine.contribution import Results
from atoll.engine.workers.messages import (
    Answer,
    BroadcastMessage,
    Done,
    ErrorMessage,
    Ready,
    ResultsMessage,
    RunMessage,
    results_from_tensors,
)
from atoll.engine.workers.shared_memory import Place
from atoll.plan.protocols import Aggregator
from atoll.plan.round import Failure

_MAX_DEATHS = 3  # deaths of workers during the same job after which the job counts as the cause

Rows = Callable[[], dict[str, Tensor]]


@dataclass(eq=False)
class Job:
    """Clients that train from one model version. A job without clients only requests the results of earlier jobs.

    Args:
        group: the worker adds up the results of all jobs with the same group.
        broadcast: the broadcast for these clients.
        clients: the ids of the clients.
        repeats: the number of earlier starts of each client in the same round.
        down: the number of bytes of each client's download.
        rows: reads the client state; called when the job is assigned. None: the clients have no state.
        keep: ids of clients whose contributions are returned.
        deliver: whether the worker returns its results after this job.
        wanted: whether the engine still needs the results.
        deaths: the number of workers that died during this job.
        unwanted_since: the time at which `wanted` became False, in seconds of `time.monotonic`.
    """

    group: int
    broadcast: BroadcastMessage
    clients: list[int]
    repeats: list[int]
    down: list[int]
    rows: Rows | None
    deliver: bool
    keep: Sequence[int] = ()
    wanted: bool = True
    deaths: int = 0
    unwanted_since: float = 0.0


class PoolResult(NamedTuple):
    """Results of one worker, and the jobs that they contain.

    `max_chunk` is the largest chunk that fits into memory, if a larger one did not; else None.
    """

    jobs: list[Job]
    results: Results
    max_chunk: int | None = None


class WorkerDied(Exception):
    """A worker has ended. The text is the known reason, possibly empty."""


class WorkerConnection(Protocol):
    """A connection to one worker. After `Ready`, the worker answers requests in order."""

    def send(self, broadcast: BroadcastMessage | None, run: RunMessage, rows: Mapping[str, Tensor] | None) -> None:
        """Send a request, with client state, and with the broadcast if the worker does not have it yet."""

    def receive(self) -> tuple[Answer, Mapping[str, Tensor]]:
        """Receive the next answer and the tensors of its results; they are valid until the next request.

        Raises:
            WorkerDied: the worker has ended.
        """

    def close(self) -> None:
        """End the worker at once, also during a job."""


class Transport(Protocol):
    """Starts workers, and publishes tensors that all workers read."""

    def start_worker(self) -> WorkerConnection:
        """Start a worker and return the connection to it. The worker is not ready yet."""

    def wait(self, connections: Sequence[WorkerConnection], timeout: float | None) -> Sequence[WorkerConnection]:
        """Wait for answers and return the connections that have one; () after `timeout` seconds, None waits forever."""

    def publish(self, number: int, tensors: Mapping[str, Tensor]) -> tuple[str, list[Place]]:
        """Copy tensors to memory that every worker can read. Return the name of that memory and their places in it."""

    def unpublish(self, number: int) -> None:
        """Free the memory of the tensors that were published under this number."""

    def close(self) -> None:
        """Release all resources."""


@dataclass(eq=False)
class _WorkerState:
    """The pool's record of one worker."""

    connection: WorkerConnection
    pid: int | None = None
    sent: deque[Job] = field(default_factory=deque)  # jobs without an answer
    done: list[Job] = field(default_factory=list)  # computed jobs of which the results are not returned yet
    known: set[int] = field(default_factory=set)  # numbers of the broadcasts that the worker has
    forget: list[int] = field(default_factory=list)  # numbers of the broadcasts that the worker shall free


class WorkerPool:
    """Manages workers, the queue of jobs, and the results that have arrived.

    Args:
        transport: starts workers.
        workers: the number of workers, ≥ 1.
        max_failed_starts: after this number of consecutive failed starts, the run ends with an error.
    """

    def __init__(self, transport: Transport, workers: int, max_failed_starts: int = 3) -> None:
        self._transport, self._max_failed_starts = transport, max_failed_starts
        self.queue: deque[Job] = deque()
        self.deaths = 0
        self._finished: deque[PoolResult] = deque()
        self._failed_starts = 0
        self._workers = [_WorkerState(transport.start_worker()) for _ in range(workers)]

    @property
    def pids(self) -> list[int]:
        """The process ids of the workers that are ready."""
        return [worker.pid for worker in self._workers if worker.pid is not None]

    def close(self) -> None:
        """End all workers."""
        for worker in self._workers:
            worker.connection.close()

    def ready(self) -> None:
        """Wait until every worker is ready."""
        while any(worker.pid is None for worker in self._workers):
            self._receive(None, None)

    def busy(self, group: int) -> bool:
        """Whether a job of this group is unfinished, or its results have not been taken yet."""
        return any(job.group == group and job.wanted for job in self._jobs())

    def _jobs(self) -> Iterator[Job]:
        """All jobs: in the queue, at a worker, or in results that have arrived."""
        yield from self.queue
        for worker in self._workers:
            yield from (*worker.sent, *worker.done)
        for result in self._finished:
            yield from result.jobs

    def forget(self, numbers: Iterable[int]) -> None:
        """Let workers free these broadcasts. They receive the numbers with their next broadcast."""
        for worker in self._workers:
            gone = worker.known & set(numbers)
            worker.known -= gone
            worker.forget += sorted(gone)

    def needed_broadcasts(self) -> set[int]:
        """The numbers of the broadcasts that a job still needs."""
        return {job.broadcast.number for job in self._jobs()}

    def drop(self, unwanted: Callable[[Job], bool]) -> None:
        """Cancel jobs for which `unwanted` is true. A worker finishes its current job, and the result is ignored."""
        now = time.monotonic()
        for job in self._jobs():
            if job.wanted and unwanted(job):
                job.wanted, job.unwanted_since = False, now
        self.queue = deque(job for job in self.queue if job.wanted)
        self._finished = deque(result for result in self._finished if any(job.wanted for job in result.jobs))

    def replace_stuck(self, seconds: float) -> None:
        """Replace workers that still compute a job that was cancelled more than `seconds` ago."""
        for worker in self._workers:
            first = worker.sent[0] if worker.sent else None
            if first and not first.wanted and time.monotonic() - first.unwanted_since > seconds:
                self._replace(worker)

    def next(self, rule: Aggregator, ahead: int, timeout: float | None = None) -> PoolResult | None:
        """Assign queued jobs until results arrive, and return the results; None after `timeout` seconds.

        Args:
            rule: the aggregator that reads the partial sums in the results.
            ahead: the largest number of unfinished jobs at one worker.
            timeout: the number of seconds to wait; None: no limit.
        Raises:
            RunError: a worker stopped with an error, or no worker can be started.
        """
        until = None if timeout is None else time.monotonic() + timeout
        while not self._finished:
            self._assign(ahead)
            left = None if until is None else max(0.0, until - time.monotonic())
            if not self._receive(rule, left) and left == 0.0:
                return None
        return self._finished.popleft()

    # the workers

    def _replace(self, worker: _WorkerState, reason: str = "") -> None:
        """Start another worker in place of this one. Jobs without returned results go to the front of the queue."""
        worker.connection.close()
        self.deaths += 1
        lost = [job for job in (*worker.done, *worker.sent) if job.clients and job.wanted]
        at_work = worker.sent[0] if worker.sent else None
        if at_work in lost:
            lost.remove(at_work)
            at_work.deaths += 1
            lost = [*self._retried(at_work), *lost]
        self.queue.extendleft(reversed(lost))
        if worker.pid is None:
            self._failed_starts += 1
            if self._failed_starts >= self._max_failed_starts:
                raise RunError(
                    f"{self._failed_starts} workers in a row ended before they were ready.",
                    "a worker process that starts.",
                    reason or "their output above contains the reason.",
                    Change("engine", "inprocess"),
                )
        self._workers[self._workers.index(worker)] = _WorkerState(self._transport.start_worker())

    def _retried(self, job: Job) -> list[Job]:
        """The jobs that replace one during which a worker died: the job itself, and after three deaths its two halves.

        After three deaths, a job with a single client becomes a failure of that client.
        """
        if job.deaths < _MAX_DEATHS:
            return [job]
        if len(job.clients) == 1:
            cause = f"{_MAX_DEATHS} workers died while they trained it"
            failure = Failure(job.clients[0], job.broadcast.version, "local", cause)
            self._finished.append(
                PoolResult([job], Results.empty()._replace(failures=[failure], errors=[RuntimeError(cause)]))
            )
            return []
        half = len(job.clients) // 2
        return [self._part(job, slice(None, half)), self._part(job, slice(half, None))]

    def _part(self, job: Job, part: slice) -> Job:
        rows = job.rows
        some = None if rows is None else lambda: {n: t[part] for n, t in rows().items()}
        clients, repeats, down = job.clients[part], job.repeats[part], job.down[part]
        return Job(
            job.group, job.broadcast, clients, repeats, down, some, job.deliver, job.keep, deaths=_MAX_DEATHS - 1
        )

    # the jobs

    def _assign(self, ahead: int) -> None:
        """Assign jobs to ready workers, at most `ahead` to each. With an empty queue, request their results."""
        workers = [worker for worker in self._workers if worker.pid is not None]
        while self.queue and workers:
            worker = min(workers, key=lambda worker: len(worker.sent))
            if len(worker.sent) >= ahead:
                return
            self._send(worker, self.queue.popleft())
        for worker in workers:
            mine = [*worker.done, *worker.sent]
            if mine and not mine[-1].deliver and mine[-1].wanted:
                self._send(worker, Job(mine[-1].group, mine[-1].broadcast, [], [], [], None, True))

    def _send(self, worker: _WorkerState, job: Job) -> None:
        broadcast: BroadcastMessage | None = None
        if job.broadcast.number not in worker.known:
            worker.known.add(job.broadcast.number)
            forget, worker.forget = [n for n in worker.forget if n != job.broadcast.number], []
            broadcast = structs.replace(job.broadcast, forget=forget)
        rows = None if job.rows is None else job.rows()
        worker.sent.append(job)
        run = RunMessage(
            job.group, job.broadcast.number, job.clients, job.repeats, job.down, None, job.deliver, list(job.keep)
        )
        worker.connection.send(broadcast, run, rows)

    def _receive(self, rule: Aggregator | None, timeout: float | None) -> bool:
        """Process the answers of workers. Return False if none arrived within `timeout` seconds."""
        answered = self._transport.wait([worker.connection for worker in self._workers], timeout)
        for worker in [worker for worker in self._workers if worker.connection in answered]:
            try:
                answer, tensors = worker.connection.receive()
            except WorkerDied as gone:
                self._replace(worker, str(gone))
                continue
            match answer:
                case Ready(pid):
                    worker.pid, self._failed_starts = pid, 0
                case Done():
                    worker.done.append(worker.sent.popleft())
                case ResultsMessage() if rule is not None:
                    self._take(worker, answer, tensors, rule)
                case ErrorMessage():
                    self._broken(worker, answer)
        return bool(answered)

    def _take(
        self, worker: _WorkerState, answer: ResultsMessage, tensors: Mapping[str, Tensor], rule: Aggregator
    ) -> None:
        jobs, worker.done = [*worker.done, worker.sent.popleft()], []
        if any(job.wanted and job.clients for job in jobs):
            results = results_from_tensors(tensors, answer.failures, answer.errors, rule)
            self._finished.append(PoolResult(jobs, results, answer.max_chunk))

    def _broken(self, worker: _WorkerState, answer: ErrorMessage) -> None:
        """Raise the error of a worker here, and start another worker in its place."""
        worker.sent.clear()
        worker.done.clear()
        if worker.pid is None:
            self.close()
        else:
            self._replace(worker)
        if answer.kind in ("UsageError", "RunError"):
            given, required, why, *lines = answer.parts
            raise (UsageError if answer.kind == "UsageError" else RunError)(given, required, why, Line(*lines))
        raise RunError(
            f"A worker stopped with {answer.kind}.",
            why=answer.parts[0].strip(),
            write=Change("engine", "inprocess"),
        )


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
