"""Clients in this process: chunks of them one after the other."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from atoll import native
from atoll.data.clients import Clients
from atoll.engine.arrivals import check_clock, fly, message
from atoll.engine.device import free, gpu
from atoll.engine.fleet import Fleet
from atoll.engine.memory import Pending
from atoll.engine.room import Room
from atoll.engine.spec import Engine
from atoll.engine.tuning import Setting, Tuning
from atoll.engine.work import Haul, Work, births, chunks, cut, gathered, own_task
from atoll.errors import UsageError
from atoll.layout import Layout
from atoll.plan.codec import Identity
from atoll.plan.in_flight import Flight, waves
from atoll.plan.lanes import HOST
from atoll.plan.plan import Plan
from atoll.plan.protocols import Broadcast, Cohort, Ids, Population, Tensors
from atoll.plan.round import Gathered
from atoll.plan.state import State
from atoll.rng import Key
from atoll.task import Task

_ENOUGH = 16  # clients in a round, from which on chunks are worth a trial
_SMALL = 100_000  # parameters below which one thread is quickest


class InProcessEngine(Engine):
    """An engine that trains the clients in this process.

    Args:
        task: the model, loss and metrics; `task.numerics` names the backend. With `task` and `data` the engine is open
            at once; otherwise `open` passes them.
        data: the clients.
        chunk: clients computed together; None chooses by the size of the model. It changes no bit.
        fleet: the simulated durations of clients and links; None simulates none.
    Example:
        >>> from atoll.testing.locals import clients, problem
        >>> InProcessEngine(problem(), clients()).population.clients
        7
    """

    task: Task
    data: Clients

    def __init__(
        self,
        task: Task | None = None,
        data: Clients | None = None,
        chunk: int | None = None,
        fleet: Fleet | None = None,
    ) -> None:
        check_chunk(chunk)
        self.chunk, self.fleet = chunk, fleet
        self.tuning, self.room = Tuning(), Room()  # they learn the chunk size that is fast, and the one that fits
        if task is not None and data is not None:
            self.open(task, data)

    def open(self, task: Task, data: Clients) -> None:
        """Take the task and the clients."""
        self.task, self.data = task, data

    def check_start(self, plan: Plan, state: State) -> None:
        """Refuse a fleet or a deadline that does not fit the clients, and a deadline without a simulated clock."""
        check_clock(plan, self.fleet, self.population, state.model, self.layout, state.seed)

    def describe(self) -> Mapping[str, Any]:
        """The kind of GPU, if the model is on one."""
        return gpu(self.task.device)

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
        task = own_task(plan, self.task)
        up = 0 if self.fleet is None else message(plan, task.layout)
        flown = fly(plan, state, self.population, cohort, self.fleet, up)

        def start(birth: int) -> tuple[Broadcast, Key]:
            return state.version(birth), key if birth == state.round else state.key(birth)

        kept, shares = Pending(state.memory), cut(flown.arrived)
        work = Work(plan, task, self.data, start, kept, state.round, shares, self.room)
        if self._tries(task, len(flown.arrived)):
            haul = self._timed(work, flown.arrived, state.memory.first)
        else:
            with threads_for(task, cohort.ids.shape[0], plan):
                haul = self._haul(work, flown.arrived, state.memory.first)
        return gathered(plan, state, flown, haul, self.room)

    def agree(self, value: bytes) -> bytes:
        """The value of the first process of a training: this one."""
        return value

    def _tries(self, task: Task, many: int) -> bool:
        """Whether the size of chunks is this engine's to choose, and there are clients enough for it to matter."""
        return self.chunk is None and many >= _ENOUGH and task.numerics != "loop" and task.device == HOST

    def _timed(self, work: Work, arrived: list[Flight], first: Tensors) -> Haul:
        """The same work by the setting that is to be tried, or that was quickest."""
        before, began = torch.get_num_threads(), time.perf_counter()
        with threads_for(work.task, len(arrived), work.plan):
            usual = torch.get_num_threads()
            others = () if work.task.numerics == "compiled" or work.task.slow_in_lanes else (1, before)
            setting = self.tuning.setting(Setting(1.0, usual), others)
            torch.set_num_threads(setting.threads)
            try:
                haul = self._haul(work, arrived, first, setting.chunk)
            finally:
                torch.set_num_threads(usual)
        if not self.tuning.over:
            rows = int(self.data.sizes[torch.tensor([flight.client for flight in arrived])].sum())
            self.tuning.heard(rows, time.perf_counter() - began)
        return haul

    def _haul(self, work: Work, arrived: list[Flight], first: Tensors, scale: float = 1.0) -> Haul:
        """Do the work of everybody who arrived, chunk by chunk; `first` is what one client keeps at first."""
        for wave in waves(arrived) if first else [arrived]:
            for birth, ids, down in births(wave):
                for chunk, sent in self._chunks(work.plan, work.task, ids, down, scale):
                    work.run(birth, chunk, sent)
            work.landed()
        return work.haul

    def _chunks(
        self, plan: Plan, task: Task, ids: Ids, down: Tensor, scale: float = 1.0
    ) -> Iterator[tuple[Ids, Tensor]]:
        return chunks(plan, task, self.data, ids, down, self.chunk, free(task.device), scale)


def check_chunk(chunk: int | None) -> None:
    """Refuse a chunk of nobody."""
    if chunk is not None and chunk < 1:
        raise UsageError(f"chunk = {chunk}.", "at least one client.", write="--chunk 32")


@contextlib.contextmanager
def threads_for(task: Task, lanes: int = 1, plan: Plan | None = None) -> Iterator[None]:
    """Let torch use one thread for a small model, and then as many as before. It changes no bit.

    A kernel of a small model is over before a second thread has woken; on a busy machine the first then waits for it.
    By hand, one kernel goes through all lanes, of which there are so many. Native code takes all threads for itself,
    where no codec wants them.
    """
    before = torch.get_num_threads()
    if task.numerics == "compiled":
        small = plan is not None and isinstance(plan.codec, Identity)
    else:
        size = task.layout.d * lanes // 4 if task.numerics == "fused" else task.layout.d
        small = size < _SMALL and not task.slow_in_lanes
    if before == 1 or not small:
        yield
        return
    torch.set_num_threads(1)
    try:
        with native.threads(before):
            yield
    finally:
        torch.set_num_threads(before)
