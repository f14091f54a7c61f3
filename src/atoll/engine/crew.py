"""A crew of workers: jobs are dealt to whoever is free, and dealt again when somebody dies over them."""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import NamedTuple

from msgspec import structs
from torch import Tensor

from atoll.engine.crossing import Block, Blocks, Place
from atoll.engine.nursery import Nursery
from atoll.engine.work import Haul
from atoll.engine.worker import Broke, Done, Hauled, Ready, Run, Setup, Told, answers, encode, haul_of
from atoll.errors import RunError, UsageError
from atoll.plan.plan import Failure
from atoll.plan.slots import Aggregator

_AHEAD = 2  # jobs that a worker has in hand, so that it need not wait for the next one
_DEADLY = 3  # deaths over the same clients that are no accident
_STILLBORN = 3  # workers that may end one after the other before the first is ready

Rows = Callable[[], dict[str, Tensor]]


@dataclass(eq=False)
class Job:
    """Clients of one birth to compute; without clients, the wish for what was computed before.

    Args:
        group: jobs whose results are added up by the worker.
        told: what their clients may know.
        codes, clients, down: who, and the bytes that each was sent.
        rows: what they keep; asked for when the job is dealt.
        deliver: whether the worker hands over its haul when it has done this.
        wanted: whether somebody still waits for it.
        deaths: workers that died over it.
    """

    group: int
    told: Told
    codes: list[int]
    clients: list[int]
    down: list[int]
    rows: Rows | None
    deliver: bool
    wanted: bool = True
    deaths: int = 0
    unwanted_since: float = 0.0


class Catch(NamedTuple):
    """A haul, and the jobs that are in it."""

    jobs: list[Job]
    haul: Haul


@dataclass(eq=False)
class _Hand:
    """A worker, as the crew sees it."""

    connection: Connection
    pid: int | None = None
    sent: deque[Job] = field(default_factory=deque)  # not yet answered
    done: list[Job] = field(default_factory=list)  # computed, and not yet handed over
    known: set[int] = field(default_factory=set)
    forget: list[int] = field(default_factory=list)
    inputs: list[Block | None] = field(default_factory=lambda: [None, None])


class Crew:
    """Workers, the jobs that wait, and what came of those that were done.

    Args:
        setup: what every worker is given first.
        workers: how many.
        nursery: where they come from.
        blocks: of the program that deals the jobs.
    """

    def __init__(self, setup: Setup, workers: int, nursery: Nursery, blocks: Blocks) -> None:
        self._setup, self._nursery, self._blocks = setup, nursery, blocks
        self.queue: deque[Job] = deque()
        self.deaths = 0
        self._caught: deque[Catch] = deque()
        self._stillborn = 0
        self._hands = [self._hire() for _ in range(workers)]

    @property
    def pids(self) -> list[int]:
        """The process ids of the workers that are ready."""
        return [hand.pid for hand in self._hands if hand.pid is not None]

    def close(self) -> None:
        """End all workers."""
        for hand in self._hands:
            self._dismiss(hand)

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

    def _hire(self) -> _Hand:
        hand = _Hand(self._nursery.worker())
        self._send(hand, self._setup)
        return hand

    def _send(self, hand: _Hand, order: Setup | Told | Run) -> None:
        with contextlib.suppress(OSError):  # it is dead, which is seen where its answers are read
            hand.connection.send_bytes(encode(order))

    def _dismiss(self, hand: _Hand) -> None:
        """A worker whose connection is closed ends by itself; one that is stuck is helped."""
        hand.connection.close()
        if hand.pid is not None:
            self._nursery.kill(hand.pid)

    def _replace(self, hand: _Hand) -> None:
        """Another worker in its place; what it had not handed over waits again, first of all."""
        self._dismiss(hand)
        self.deaths += 1
        lost = [job for job in (*hand.done, *hand.sent) if job.codes and job.wanted]
        at_work = hand.sent[0] if hand.sent else None
        if at_work in lost:
            lost.remove(at_work)
            at_work.deaths += 1
            lost = [*self._retried(at_work), *lost]
        self.queue.extendleft(reversed(lost))
        if hand.pid is None:
            self._stillborn += 1
            if self._stillborn >= _STILLBORN:
                raise RunError(
                    f"{_STILLBORN} workers ended one after the other before they were ready.",
                    "a worker that starts.",
                    "what they printed above says why.",
                    "--engine inprocess",
                )
        self._hands[self._hands.index(hand)] = self._hire()

    def _retried(self, job: Job) -> list[Job]:
        """A job over which a worker died: again as it is, then in halves; a client that goes on killing has failed."""
        if job.deaths < _DEADLY:
            return [job]
        if len(job.codes) == 1:
            cause = f"{_DEADLY} worker processes died over it"
            failure = Failure(job.clients[0], job.told.birth, "local", cause)
            self._caught.append(Catch([job], Haul.none()._replace(failures=[failure], errors=[RuntimeError(cause)])))
            return []
        half = len(job.codes) // 2
        return [self._part(job, slice(None, half)), self._part(job, slice(half, None))]

    def _part(self, job: Job, part: slice) -> Job:
        rows = job.rows
        some = None if rows is None else lambda: {n: t[part] for n, t in rows().items()}
        codes, clients, down = job.codes[part], job.clients[part], job.down[part]
        return Job(job.group, job.told, codes, clients, down, some, job.deliver, deaths=_DEADLY - 1)

    # the jobs

    def _deal(self, ahead: int) -> None:
        """Give every worker what it has room for, and ask for its haul once nothing is left to give."""
        while self.queue:
            hand = min(self._hands, key=lambda hand: len(hand.sent))
            if len(hand.sent) >= ahead:
                return
            self._give(hand, self.queue.popleft())
        for hand in self._hands:
            mine = [*hand.done, *hand.sent]
            if mine and not mine[-1].deliver and mine[-1].wanted:
                self._give(hand, Job(mine[-1].group, mine[-1].told, [], [], [], None, True))

    def _give(self, hand: _Hand, job: Job) -> None:
        told = job.told
        if told.number not in hand.known:
            hand.known.add(told.number)
            forget, hand.forget = [n for n in hand.forget if n != told.number], []
            self._send(hand, structs.replace(told, forget=forget))
        rows = None if job.rows is None else self._put(hand, job.rows())
        hand.sent.append(job)
        self._send(hand, Run(job.group, told.number, job.codes, job.down, rows, job.deliver))

    def _put(self, hand: _Hand, rows: dict[str, Tensor]) -> tuple[str, list[Place]]:
        """Rows where the worker can read them: two blocks in turn, one for each job that it has in hand."""
        block, hand.inputs[0] = self._blocks.fitting(hand.inputs[0], rows), hand.inputs[1]
        hand.inputs[1] = block
        return block.path, block.write(rows)

    def _listen(self, rule: Aggregator | None, timeout: float | None) -> bool:
        """Take in what workers say; False where nobody said anything in time."""
        heard = wait([hand.connection for hand in self._hands], timeout)
        for hand in [hand for hand in self._hands if hand.connection in heard]:
            try:
                answer = answers.decode(hand.connection.recv_bytes())
            except (EOFError, OSError):
                self._replace(hand)
                continue
            match answer:
                case Ready(pid):
                    hand.pid, self._stillborn = pid, 0
                case Done():
                    hand.done.append(hand.sent.popleft())
                case Hauled() if rule is not None:
                    self._take(hand, answer, rule)
                case Broke():
                    self._broken(hand, answer)
        return bool(heard)

    def _take(self, hand: _Hand, answer: Hauled, rule: Aggregator) -> None:
        jobs, hand.done = [*hand.done, hand.sent.popleft()], []
        if any(job.wanted and job.codes for job in jobs):
            block = Block(answer.block)
            self._caught.append(Catch(jobs, haul_of(block.read(answer.places), answer.failures, answer.errors, rule)))

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
