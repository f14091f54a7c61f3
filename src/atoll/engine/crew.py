"""A crew of workers: jobs are dealt to whoever is free, and dealt again when somebody dies over them."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from msgspec import structs
from torch import Tensor

from atoll.engine.chunks import Results
from atoll.engine.crossing import Place
from atoll.engine.worker import Answer, Broke, Done, Hauled, Ready, Run, Told, haul_of
from atoll.errors import RunError, UsageError
from atoll.plan.protocols import Aggregator
from atoll.plan.round import Failure

_DEADLY = 3  # deaths over the same clients that are no accident

Rows = Callable[[], dict[str, Tensor]]


@dataclass(eq=False)
class Job:
    """Clients of one birth to compute; without clients, the wish for what was computed before.

    Args:
        group: jobs whose results are added up by the worker.
        told: what their clients may know.
        clients, repeats, down: the starts, and the bytes that each client was sent.
        rows: what they keep; asked for when the job is dealt.
        keep: ids of clients whose contributions are returned.
        deliver: whether the worker hands over its haul when it has done this.
        wanted: whether somebody still waits for it.
        deaths: workers that died over it.
    """

    group: int
    told: Told
    clients: list[int]
    repeats: list[int]
    down: list[int]
    rows: Rows | None
    deliver: bool
    keep: Sequence[int] = ()
    wanted: bool = True
    deaths: int = 0
    unwanted_since: float = 0.0


class Catch(NamedTuple):
    """A haul, the jobs that are in it, and how many clients fit side by side where more did not."""

    jobs: list[Job]
    haul: Results
    most: int | None = None


class Gone(Exception):
    """A worker has ended, whatever it was at; with what is known of the reason."""


class Line(Protocol):
    """How one speaks with a worker. It answers every `give`, in turn, once it has said that it is ready."""

    def give(self, told: Told | None, run: Run, rows: Mapping[str, Tensor] | None) -> None:
        """An order, with what its clients keep, and what they may know where the worker does not have it yet."""

    def hear(self) -> tuple[Answer, Mapping[str, Tensor]]:
        """What it says, and the tensors of a haul, as they are until it is given more. Raises `Gone`."""

    def close(self) -> None:
        """End it at once, whatever it is at."""


class Office(Protocol):
    """Where workers come from, and where what all of them may read is laid out."""

    def hire(self) -> Line:
        """A line to a new worker, which is being set up."""

    def wait(self, lines: Sequence[Line], timeout: float | None) -> Sequence[Line]:
        """Lines on which something can be heard; none once `timeout` seconds have passed, None is for ever."""

    def publish(self, number: int, tensors: Mapping[str, Tensor]) -> tuple[str, list[Place]]:
        """Lay tensors out where every worker can read them, and say where."""

    def withdraw(self, number: int) -> None:
        """Nobody reads any more what was published under this number."""

    def close(self) -> None:
        """Give back whatever it has."""


@dataclass(eq=False)
class _Hand:
    """A worker, as the crew sees it."""

    line: Line
    pid: int | None = None
    sent: deque[Job] = field(default_factory=deque)  # not yet answered
    done: list[Job] = field(default_factory=list)  # computed, and not yet handed over
    known: set[int] = field(default_factory=set)
    forget: list[int] = field(default_factory=list)


class Crew:
    """Workers, the jobs that wait, and what came of those that were done.

    Args:
        office: where workers come from.
        workers: how many.
        stillborn: workers that may end one after the other before the first is ready.
    """

    def __init__(self, office: Office, workers: int, stillborn: int = 3) -> None:
        self._office, self._most_stillborn = office, stillborn
        self.queue: deque[Job] = deque()
        self.deaths = 0
        self._caught: deque[Catch] = deque()
        self._stillborn = 0
        self._hands = [_Hand(office.hire()) for _ in range(workers)]

    @property
    def pids(self) -> list[int]:
        """The process ids of the workers that are ready."""
        return [hand.pid for hand in self._hands if hand.pid is not None]

    def close(self) -> None:
        """End all workers."""
        for hand in self._hands:
            hand.line.close()

    def ready(self) -> None:
        """Wait until every worker has said that it is ready."""
        while any(hand.pid is None for hand in self._hands):
            self._listen(None, None)

    def busy(self, group: int) -> bool:
        """Whether some job of a group is still waited for, or its haul not yet taken."""
        return any(job.group == group and job.wanted for job in self._jobs())

    def _jobs(self) -> Iterator[Job]:
        """All jobs: those that wait, those that workers have, and those whose haul is here."""
        yield from self.queue
        for hand in self._hands:
            yield from (*hand.sent, *hand.done)
        for catch in self._caught:
            yield from catch.jobs

    def forget(self, numbers: Iterable[int]) -> None:
        """Nobody asks any more for what these births were told."""
        for hand in self._hands:
            gone = hand.known & set(numbers)
            hand.known -= gone
            hand.forget += sorted(gone)

    def told(self) -> set[int]:
        """The births that some job, dealt or not, still reads."""
        return {job.told.number for job in self._jobs()}

    def drop(self, unwanted: Callable[[Job], bool]) -> None:
        """Nobody waits any more for some jobs; a worker that is at one finishes it, and nobody looks."""
        now = time.monotonic()
        for job in self._jobs():
            if job.wanted and unwanted(job):
                job.wanted, job.unwanted_since = False, now
        self.queue = deque(job for job in self.queue if job.wanted)
        self._caught = deque(catch for catch in self._caught if any(job.wanted for job in catch.jobs))

    def replace_stuck(self, seconds: float) -> None:
        """Replace workers that are still at something nobody has waited for since so many seconds."""
        for hand in self._hands:
            first = hand.sent[0] if hand.sent else None
            if first and not first.wanted and time.monotonic() - first.unwanted_since > seconds:
                self._replace(hand)

    def next(self, rule: Aggregator, ahead: int, timeout: float | None = None) -> Catch | None:
        """Deal what waits, and the next haul; None once `timeout` seconds have passed.

        Args:
            rule: whose partial sums the hauls hold.
            ahead: jobs that a worker has in hand at most.
            timeout: seconds; None waits as long as it takes.
        Raises:
            RunError: a worker cannot go on, or no worker can be started.
        """
        until = None if timeout is None else time.monotonic() + timeout
        while not self._caught:
            self._deal(ahead)
            left = None if until is None else max(0.0, until - time.monotonic())
            if not self._listen(rule, left) and left == 0.0:
                return None
        return self._caught.popleft()

    # the workers

    def _replace(self, hand: _Hand, reason: str = "") -> None:
        """Another worker in its place; what it had not handed over waits again, first of all."""
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
                    f"{self._stillborn} workers ended one after the other before they were ready.",
                    "a worker that starts.",
                    reason or "what they printed above says why.",
                    "--engine inprocess",
                )
        self._hands[self._hands.index(hand)] = _Hand(self._office.hire())

    def _retried(self, job: Job) -> list[Job]:
        """A job over which a worker died: again as it is, then in halves; a client that goes on killing has failed."""
        if job.deaths < _DEADLY:
            return [job]
        if len(job.clients) == 1:
            cause = f"{_DEADLY} workers died over it"
            failure = Failure(job.clients[0], job.told.birth, "local", cause)
            self._caught.append(
                Catch([job], Results.empty()._replace(failures=[failure], errors=[RuntimeError(cause)]))
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
        """Give every worker that is there what it has room for, and ask for its haul once nothing is left to give."""
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

    def _give(self, hand: _Hand, job: Job) -> None:
        told: Told | None = None
        if job.told.number not in hand.known:
            hand.known.add(job.told.number)
            forget, hand.forget = [n for n in hand.forget if n != job.told.number], []
            told = structs.replace(job.told, forget=forget)
        rows = None if job.rows is None else job.rows()
        hand.sent.append(job)
        run = Run(job.group, job.told.number, job.clients, job.repeats, job.down, None, job.deliver, list(job.keep))
        hand.line.give(told, run, rows)

    def _listen(self, rule: Aggregator | None, timeout: float | None) -> bool:
        """Take in what workers say; False where nobody said anything in time."""
        heard = self._office.wait([hand.line for hand in self._hands], timeout)
        for hand in [hand for hand in self._hands if hand.line in heard]:
            try:
                answer, tensors = hand.line.hear()
            except Gone as gone:
                self._replace(hand, str(gone))
                continue
            match answer:
                case Ready(pid):
                    hand.pid, self._stillborn = pid, 0
                case Done():
                    hand.done.append(hand.sent.popleft())
                case Hauled() if rule is not None:
                    self._take(hand, answer, tensors, rule)
                case Broke():
                    self._broken(hand, answer)
        return bool(heard)

    def _take(self, hand: _Hand, answer: Hauled, tensors: Mapping[str, Tensor], rule: Aggregator) -> None:
        jobs, hand.done = [*hand.done, hand.sent.popleft()], []
        if any(job.wanted and job.clients for job in jobs):
            haul = haul_of(tensors, answer.failures, answer.errors, rule)
            self._caught.append(Catch(jobs, haul, answer.most))

    def _broken(self, hand: _Hand, answer: Broke) -> None:
        """A worker cannot go on: what it says is raised here, and another one stands by."""
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
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
