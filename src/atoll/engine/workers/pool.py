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
from atoll.engine.chunks import Results
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

_DEADLY = 3  # deaths of workers during the same job after which the job counts as the cause

Rows = Callable[[], dict[str, Tensor]]


@dataclass(eq=False)
class Job:
    """Clients that train from one model version. A job without clients only requests the results of earlier jobs.

    Args:
        group: the worker adds up the results of all jobs with the same group.
        told: the broadcast for these clients.
        clients: the ids of the clients.
        repeats: earlier starts of each client in its round.
        down: bytes of the download of each client.
        rows: reads the client state; called when the job is assigned. None: the clients have no state.
        keep: ids of clients whose contributions are returned.
        deliver: whether the worker returns its results after this job.
        wanted: whether the engine still needs the results.
        deaths: the number of workers that died during this job.
        unwanted_since: the time at which `wanted` became False, in seconds of `time.monotonic`.
    """

    group: int
    told: BroadcastMessage
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

    `most` is the largest chunk that fits into memory, if a larger one did not; else None.
    """

    jobs: list[Job]
    haul: Results
    most: int | None = None


class WorkerDied(Exception):
    """A worker has ended. The text is the known reason, possibly empty."""


class WorkerConnection(Protocol):
    """A connection to one worker. After `Ready`, the worker answers requests in order."""

    def send(self, told: BroadcastMessage | None, run: RunMessage, rows: Mapping[str, Tensor] | None) -> None:
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

    def wait(self, lines: Sequence[WorkerConnection], timeout: float | None) -> Sequence[WorkerConnection]:
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

    line: WorkerConnection
    pid: int | None = None
    sent: deque[Job] = field(default_factory=deque)  # jobs without an answer
    done: list[Job] = field(default_factory=list)  # computed jobs of which the results are not returned yet
    known: set[int] = field(default_factory=set)  # numbers of the broadcasts that the worker has
    forget: list[int] = field(default_factory=list)  # numbers of the broadcasts that the worker shall free


class WorkerPool:
    """Workers, the queue of jobs, and the results that have arrived.

    Args:
        office: starts workers.
        workers: the number of workers, ≥ 1.
        stillborn: after this number of consecutive failed starts, the run ends with an error.
    """

    def __init__(self, office: Transport, workers: int, stillborn: int = 3) -> None:
        self._office, self._most_stillborn = office, stillborn
        self.queue: deque[Job] = deque()
        self.deaths = 0
        self._caught: deque[PoolResult] = deque()
        self._stillborn = 0
        self._hands = [_WorkerState(office.start_worker()) for _ in range(workers)]

    @property
    def pids(self) -> list[int]:
        """The process ids of the workers that are ready."""
        return [hand.pid for hand in self._hands if hand.pid is not None]

    def close(self) -> None:
        """End all workers."""
        for hand in self._hands:
            hand.line.close()

    def ready(self) -> None:
        """Wait until every worker is ready."""
        while any(hand.pid is None for hand in self._hands):
            self._listen(None, None)

    def busy(self, group: int) -> bool:
        """Whether a job of this group is unfinished, or its results have not been taken yet."""
        return any(job.group == group and job.wanted for job in self._jobs())

    def _jobs(self) -> Iterator[Job]:
        """All jobs: in the queue, at a worker, or in results that have arrived."""
        yield from self.queue
        for hand in self._hands:
            yield from (*hand.sent, *hand.done)
        for catch in self._caught:
            yield from catch.jobs

    def forget(self, numbers: Iterable[int]) -> None:
        """Let workers free these broadcasts. They receive the numbers with their next broadcast."""
        for hand in self._hands:
            gone = hand.known & set(numbers)
            hand.known -= gone
            hand.forget += sorted(gone)

    def told(self) -> set[int]:
        """The numbers of the broadcasts that a job still needs."""
        return {job.told.number for job in self._jobs()}

    def drop(self, unwanted: Callable[[Job], bool]) -> None:
        """Cancel jobs for which `unwanted` is true. A worker finishes its current job, and the result is ignored."""
        now = time.monotonic()
        for job in self._jobs():
            if job.wanted and unwanted(job):
                job.wanted, job.unwanted_since = False, now
        self.queue = deque(job for job in self.queue if job.wanted)
        self._caught = deque(catch for catch in self._caught if any(job.wanted for job in catch.jobs))

    def replace_stuck(self, seconds: float) -> None:
        """Replace workers that still compute a job that was cancelled more than `seconds` ago."""
        for hand in self._hands:
            first = hand.sent[0] if hand.sent else None
            if first and not first.wanted and time.monotonic() - first.unwanted_since > seconds:
                self._replace(hand)

    def next(self, rule: Aggregator, ahead: int, timeout: float | None = None) -> PoolResult | None:
        """Assign queued jobs until results arrive, and return the results; None after `timeout` seconds.

        Args:
            rule: the aggregator that reads the partial sums in the results.
            ahead: the largest number of unfinished jobs at one worker.
            timeout: seconds; None: no limit.
        Raises:
            RunError: a worker stopped with an error, or no worker can be started.
        """
        until = None if timeout is None else time.monotonic() + timeout
        while not self._caught:
            self._deal(ahead)
            left = None if until is None else max(0.0, until - time.monotonic())
            if not self._listen(rule, left) and left == 0.0:
                return None
        return self._caught.popleft()

    # the workers

    def _replace(self, hand: _WorkerState, reason: str = "") -> None:
        """Start another worker in place of this one. Jobs without returned results go to the front of the queue."""
        hand.line.close()
        self.deaths += 1
        lost = [job for job in (*hand.done, *hand.sent) if job.clients and job.wanted]
        at_work = hand.sent[0] if hand.sent else None
        if at_work in lost:
            lost.remove(at_work)
            at_work.deaths += 1
            lost = [*self._retried(at_work), *lost]
        self.queue.extendleft(reversed(lost))
        if hand.pid is None:
            self._stillborn += 1
            if self._stillborn >= self._most_stillborn:
                raise RunError(
                    f"{self._stillborn} workers in a row ended before they were ready.",
                    "a worker process that starts.",
                    reason or "their output above contains the reason.",
                    "--engine inprocess",
                )
        self._hands[self._hands.index(hand)] = _WorkerState(self._office.start_worker())

    def _retried(self, job: Job) -> list[Job]:
        """The jobs that replace one during which a worker died: the job itself, and after three deaths its two halves.

        After three deaths, a job with a single client becomes a failure of that client.
        """
        if job.deaths < _DEADLY:
            return [job]
        if len(job.clients) == 1:
            cause = f"{_DEADLY} workers died while they trained it"
            failure = Failure(job.clients[0], job.told.birth, "local", cause)
            self._caught.append(
                PoolResult([job], Results.empty()._replace(failures=[failure], errors=[RuntimeError(cause)]))
            )
            return []
        half = len(job.clients) // 2
        return [self._part(job, slice(None, half)), self._part(job, slice(half, None))]

    def _part(self, job: Job, part: slice) -> Job:
        rows = job.rows
        some = None if rows is None else lambda: {n: t[part] for n, t in rows().items()}
        clients, repeats, down = job.clients[part], job.repeats[part], job.down[part]
        return Job(job.group, job.told, clients, repeats, down, some, job.deliver, job.keep, deaths=_DEADLY - 1)

    # the jobs

    def _deal(self, ahead: int) -> None:
        """Assign jobs to ready workers, at most `ahead` to each. With an empty queue, request their results."""
        hands = [hand for hand in self._hands if hand.pid is not None]
        while self.queue and hands:
            hand = min(hands, key=lambda hand: len(hand.sent))
            if len(hand.sent) >= ahead:
                return
            self._give(hand, self.queue.popleft())
        for hand in hands:
            mine = [*hand.done, *hand.sent]
            if mine and not mine[-1].deliver and mine[-1].wanted:
                self._give(hand, Job(mine[-1].group, mine[-1].told, [], [], [], None, True))

    def _give(self, hand: _WorkerState, job: Job) -> None:
        told: BroadcastMessage | None = None
        if job.told.number not in hand.known:
            hand.known.add(job.told.number)
            forget, hand.forget = [n for n in hand.forget if n != job.told.number], []
            told = structs.replace(job.told, forget=forget)
        rows = None if job.rows is None else job.rows()
        hand.sent.append(job)
        run = RunMessage(
            job.group, job.told.number, job.clients, job.repeats, job.down, None, job.deliver, list(job.keep)
        )
        hand.line.send(told, run, rows)

    def _listen(self, rule: Aggregator | None, timeout: float | None) -> bool:
        """Process the answers of workers. Return False if none arrived within `timeout` seconds."""
        heard = self._office.wait([hand.line for hand in self._hands], timeout)
        for hand in [hand for hand in self._hands if hand.line in heard]:
            try:
                answer, tensors = hand.line.receive()
            except WorkerDied as gone:
                self._replace(hand, str(gone))
                continue
            match answer:
                case Ready(pid):
                    hand.pid, self._stillborn = pid, 0
                case Done():
                    hand.done.append(hand.sent.popleft())
                case ResultsMessage() if rule is not None:
                    self._take(hand, answer, tensors, rule)
                case ErrorMessage():
                    self._broken(hand, answer)
        return bool(heard)

    def _take(
        self, hand: _WorkerState, answer: ResultsMessage, tensors: Mapping[str, Tensor], rule: Aggregator
    ) -> None:
        jobs, hand.done = [*hand.done, hand.sent.popleft()], []
        if any(job.wanted and job.clients for job in jobs):
            haul = results_from_tensors(tensors, answer.failures, answer.errors, rule)
            self._caught.append(PoolResult(jobs, haul, answer.most))

    def _broken(self, hand: _WorkerState, answer: ErrorMessage) -> None:
        """Raise the error of a worker here, and start another worker in its place."""
        hand.sent.clear()
        hand.done.clear()
        if hand.pid is None:
            self.close()
        else:
            self._replace(hand)
        if answer.kind in ("UsageError", "RunError"):
            raise (UsageError if answer.kind == "UsageError" else RunError)(*answer.parts)
        raise RunError(
            f"A worker stopped with {answer.kind}.",
            why=answer.parts[0].strip(),
            write="--engine inprocess",
        )


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
