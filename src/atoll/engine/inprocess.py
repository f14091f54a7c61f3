"""The engine that trains all clients in this process, one chunk after the other.

Tests: tests/surface/test_engines.py, tests/identities/test_chunks.py
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from atoll.base.errors import AtollError, UsageError
from atoll.base.lines import Change, Part
from atoll.base.random import Key
from atoll.compute import limits, native
from atoll.compute.batches import HOST
from atoll.compute.device import free, gpu
from atoll.compute.layout import Layout
from atoll.compute.task import Task
from atoll.data.clients import Clients
from atoll.engine.autotune import Trial, Tuning
from atoll.engine.chunk_limit import ChunkLimit
from atoll.engine.chunks import ChunkRunner, by_version, chunks, gathered, partial_work, task_for
from atoll.engine.client_state import Uncommitted
from atoll.engine.contribution import Results
from atoll.engine.protocols import Engine
from atoll.engine.rehearsal import rehearse
from atoll.engine.simulation.arrivals import check_clock, message_bytes, simulate_round
from atoll.engine.simulation.fleet import Fleet
from atoll.plan.codec import Identity
from atoll.plan.in_flight import Flight, split_repeats
from atoll.plan.plan import Plan
from atoll.plan.protocols import Aggregator, Broadcast, Cohort, Population, Tensors
from atoll.plan.round import Gathered, read_only_memory
from atoll.plan.state import State

Assign = Callable[[Tensor], Tensor]
Reduce = Callable[[Aggregator, Results, Tensors, Exception | None], Results]


class InProcessEngine(Engine):
    """An engine that trains the clients in this process.

    Args:
        task: the model, loss and metrics; `task.numerics` names the backend. With `task` and `data` the engine is open
            at once; otherwise `open` receives them.
        data: the clients.
        chunk: the number of clients that are computed together; None chooses it by the size of the model. It changes no
            bit.
        fleet: the simulated durations of clients and links; None: durations are not simulated.
        assign: receives the client ids `[K]` and returns the positions of those that this process trains; None: all.
        reduce: adds the results of all processes; None: this process is the only one.
        rehearse: whether each round runs the protocol of a secure sum.
    Example:
        >>> from atoll.testing.local import clients, problem
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
        assign: Assign | None = None,
        reduce: Reduce | None = None,
        rehearse: bool = False,
    ) -> None:
        check_chunk(chunk)
        self.chunk, self.fleet, self.assign, self.reduce, self.rehearse = chunk, fleet, assign, reduce, rehearse
        self._compared: Plan | None = None  # a contribution to this plan has been compared with its declarations
        self.tuning, self.room = Tuning(), ChunkLimit()  # they learn the chunk size that is fast, and the one that fits
        if task is not None and data is not None:
            self.open(task, data)

    def open(self, task: Task, data: Clients) -> None:
        """Store the task and the clients."""
        self.task, self.data = task, data

    def check_start(self, plan: Plan, state: State) -> None:
        """Refuse a fleet or a deadline that does not fit the clients, and a rehearsal without a secure sum."""
        if self.rehearse and plan.aggregator.secure is None:
            raise UsageError(
                f"A rehearsal with {plan.aggregator!r}.",
                "an aggregator with a secure sum.",
                "a rehearsal runs the protocol of this sum.",
                Part("Mean(secure=True)", "aggregator"),
            )
        check_clock(plan, self.fleet, self.population, state.model, self.task, state.seed)

    def describe(self) -> Mapping[str, Any]:
        """The kind of GPU, if the model is on one."""
        return gpu(self.task.device)

    @property
    def population(self) -> Population:
        """All clients, and the number of rows of each."""
        return Population(self.data.count, self.data.sizes)

    @property
    def layout(self) -> Layout:
        """The layout of the model vector."""
        return self.task.layout

    def gather(self, plan: Plan, state: State, cohort: Cohort, key: Key, keep: Collection[int] = ()) -> Gathered:
        """Train the cohort and return one partial sum for each model version.

        Raises:
            RunError: all clients failed with the same error, or more failed than the plan allows.
            UsageError: a client of `keep` did not arrive.
        """
        task, data, first = task_for(plan, self.task), self.data, state.memory.first
        up = 0 if self.fleet is None else message_bytes(plan, task)
        flown = simulate_round(plan, state, self.population, cohort, self.fleet, up)

        def start(version: int) -> tuple[Broadcast, Key]:
            return state.version(version), key if version == state.round else state.key(version)

        shares, memory, trouble = partial_work(flown.arrived), Uncommitted(state.memory), None
        compare = self._compared is not plan
        runner = ChunkRunner(plan, task, data, start, memory, state.round, shares, self.room, keep, compare)
        runner.fold.sent = [] if self.rehearse else None
        with self._tuned(plan, task, flown.arrived, cohort) as scale:
            try:
                for wave in split_repeats(flown.arrived) if first else [flown.arrived]:
                    for version, ids, down in by_version(wave):
                        if self.assign is not None:
                            mine = self.assign(ids.client)
                            ids, down = ids.select(mine), down[mine]
                        for chunk, sent in chunks(plan, task, data, ids, down, self.chunk, free(task.device), scale):
                            runner.run(version, chunk, sent)
                    runner.commit_wave()
            except (AtollError, MemoryError) as error:
                if self.reduce is None:
                    raise
                trouble = error  # the other processes wait for this one: all of them raise it
            results, self._compared = runner.results, None if runner.compare else plan
            if self.rehearse:
                lost = [*(d.flight.client for d in flown.dropped), *(f.client for f in results.failures)]
                rehearse(plan, state, results, runner.fold.sent, lost)
            if self.reduce is not None:
                results = self.reduce(plan.aggregator, results, first, trouble)
        return gathered(plan, state, flown, results, self.room, keep)._replace(owned=read_only_memory(plan))

    @contextlib.contextmanager
    def _tuned(self, plan: Plan, task: Task, arrived: list[Flight], cohort: Cohort) -> Iterator[float]:
        """Set the number of threads for a round, and return a factor that multiplies the size of a chunk.

        The factor and the threads are tried out over the first rounds, if the engine chooses the size of a chunk and
        the round has enough clients for it to matter.
        """
        count = len(arrived)
        if self.chunk is not None or count < limits.TUNED_CLIENTS or task.numerics == "loop" or task.device != HOST:
            with threads_for(task, cohort.ids.shape[0], plan):
                yield 1.0
            return
        before, began = torch.get_num_threads(), time.perf_counter()
        with threads_for(task, count, plan):
            usual = torch.get_num_threads()
            others = () if task.numerics == "compiled" or task.slow_in_lanes else (1, before)
            setting = self.tuning.setting(Trial(1.0, usual), others)
            torch.set_num_threads(setting.threads)
            try:
                yield setting.chunk
            finally:
                torch.set_num_threads(usual)
        if not self.tuning.converged:
            rows = int(self.data.sizes[torch.tensor([flight.client for flight in arrived])].sum())
            self.tuning.record(rows, time.perf_counter() - began)


def check_chunk(chunk: int | None) -> None:
    """Refuse a chunk without clients."""
    if chunk is not None and chunk < 1:
        raise UsageError(f"chunk = {chunk}.", "at least one client.", write=Change("chunk", 32))


@contextlib.contextmanager
def threads_for(task: Task, lanes: int = 1, plan: Plan | None = None) -> Iterator[None]:
    """Let torch use one thread for a small model, and restore the number of threads afterwards. It changes no bit.

    A kernel of a small model ends before a second thread wakes up. On a busy machine the first thread then waits for
    the second. With `fused`, one kernel computes all lanes, so the limit depends on their number. With `compiled`,
    native code uses all threads, and torch needs them only for a codec.
    """
    before = torch.get_num_threads()
    if before == 1:
        yield
        return
    if task.numerics == "compiled":
        small = plan is not None and isinstance(plan.codec, Identity)
    else:
        size = task.layout.d * lanes // 4 if task.numerics == "fused" else task.layout.d
        small = size < limits.SERIAL_PARAMETERS and not task.slow_in_lanes
    if not small:
        yield
        return
    torch.set_num_threads(1)
    try:
        with native.threads(before):
            yield
    finally:
        torch.set_num_threads(before)
