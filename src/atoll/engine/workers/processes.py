"""Clients in worker processes on this machine.

Messages to a worker contain bytes, arrays and names of code. They never contain pickled objects. The engine writes θ
once a round into shared memory that every worker maps. Partial sums return through shared memory too.

Tests: tests/parity/test_processes.py, tests/faults/test_killed_clients.py, tests/faults/test_kill.py.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection, wait

import torch
from msgspec import structs
from torch import Tensor

from atoll.base.errors import UsageError
from atoll.base.lines import EngineChange
from atoll.compute.task import Task
from atoll.data.clients import Clients
from atoll.engine.workers.forkserver import ForkServer
from atoll.engine.workers.messages import (
    Answer,
    BroadcastMessage,
    Ready,
    ResultsMessage,
    RunMessage,
    Setup,
    answers,
    encode,
)
from atoll.engine.workers.pool import WorkerConnection, WorkerDied, cores
from atoll.engine.workers.scheduler import WorkerEngine, packed
from atoll.engine.workers.shared_memory import Place, SharedBlock, SharedBlocks, block_bytes

_ENGINES = itertools.count()  # numbers the engines: an id() may return after an engine that was never closed


class ProcessesEngine(WorkerEngine):
    """An engine that runs clients in worker processes on this machine.

    If a worker dies, the engine starts another one and repeats the work of which it has no result. Close the engine, or
    use it in a `with` statement. An open engine ends when the program ends, also after a crash.

    Args:
        task: the model, loss and metrics; its `numerics` select the backend. With `task` and `data` the engine is open
            at once; otherwise `open` receives them.
        data: the clients.
        workers: the number of worker processes, ≥ 1; None: one for each core.
        chunk: the number of clients that are computed together, ≥ 1; None chooses it by the size of the model. It
            changes no bit.
        threads: the number of threads of each worker, ≥ 1; None: the threads of this process, divided by `workers`.
        model: the name from which the model was built, a name or `module:factory`; workers build the model from it.
            None: workers receive the names of the model's classes and its tensors.
        seed: the seed with which the model was built.
        nursery: the fork server that starts the workers; None: the engine makes its own. If engines share one, the
            caller closes it.
    Raises:
        UsageError: `workers`, `threads` or `chunk` is less than 1, or another process cannot import the model, the loss
            or the data set.
    Example:
        >>> from atoll.testing.local import clients, problem
        >>> with ProcessesEngine(problem(), clients(), workers=2) as engine:
        ...     engine.population.clients
        7
    """

    def __init__(
        self,
        task: Task | None = None,
        data: Clients | None = None,
        workers: int | None = None,
        chunk: int | None = None,
        threads: int | None = None,
        model: str | None = None,
        seed: int = 0,
        nursery: ForkServer | None = None,
    ) -> None:
        super().__init__(chunk)
        workers = cores() if workers is None else workers
        threads = max(1, torch.get_num_threads() // max(1, workers)) if threads is None else threads
        if workers < 1 or threads < 1:
            raise UsageError(
                f"workers = {workers}, threads = {threads}.",
                "at least 1 worker and at least 1 thread for each worker.",
                write=EngineChange("Processes(2)", "workers", 2),
            )
        self.workers, self.threads = workers, threads
        self._made = model, seed
        self._nursery, self._own = nursery or ForkServer(), nursery is None
        if task is not None and data is not None:
            self.open(task, data)

    def open(self, task: Task, data: Clients) -> None:
        """Start the worker processes.

        Raises:
            UsageError: another process cannot import the model, the loss or the data set.
        """
        self._nursery.start()  # it imports modules while this process serializes the data
        if task.numerics == "lanes":
            self._nursery.warm()
        pipes = _Pipes(self._nursery, self._own)
        try:
            pipes.prepare(task, data, *self._made, self.threads)
            self._open(task, data, self.workers, self.threads, pipes)
        except BaseException:
            pipes.close()
            raise

    def _ready(self) -> None:
        if self._nursery.closed:
            self.close()
        super()._ready()


class _Pipes:
    """Worker processes that a fork server starts, and the shared memory that all of them map.

    Args:
        nursery: the fork server.
        own: whether `close` also closes the fork server.
    """

    def __init__(self, nursery: ForkServer, own: bool) -> None:
        self._nursery, self._own = nursery, own
        self._blocks = SharedBlocks(nursery.folders, f"engine-{next(_ENGINES)}")
        self._published: dict[int, SharedBlock] = {}
        self._free: list[SharedBlock] = []
        self._setup: Setup | None = None

    def prepare(self, task: Task, data: Clients, model: str | None, seed: int, threads: int) -> None:
        """Serialize the first message to every worker: task and data."""
        setup, tensors = packed(task, data, model, seed, threads, self._blocks.path)
        block = self._blocks.block(block_bytes(tensors))
        self._setup = structs.replace(setup, block=block.path, places=block.write(tensors))

    def start_worker(self) -> _Pipe:
        pipe = _Pipe(self._nursery, self._blocks)
        if self._setup is not None:
            pipe.post(self._setup)
        return pipe

    def wait(self, connections: Sequence[WorkerConnection], timeout: float | None) -> Sequence[WorkerConnection]:
        pipes = {c.connection: c for c in connections if isinstance(c, _Pipe)}
        return [pipes[c] for c in wait(list(pipes), timeout) if isinstance(c, Connection)]

    def publish(self, number: int, tensors: Mapping[str, Tensor]) -> tuple[str, list[Place]]:
        fitting = [block for block in self._free if block.size >= block_bytes(tensors)]
        block = fitting[0] if fitting else self._blocks.block(block_bytes(tensors))
        self._free = [other for other in self._free if other is not block]
        self._published[number] = block
        return block.path, block.write(tensors)

    def unpublish(self, number: int) -> None:
        self._free.append(self._published.pop(number))

    def close(self) -> None:
        if self._own:
            self._nursery.close()
        else:
            self._blocks.remove()


class _Pipe:
    """A connection to a worker process, and the shared memory through which rows of client state reach it."""

    def __init__(self, nursery: ForkServer, blocks: SharedBlocks) -> None:
        self.connection = nursery.worker()
        self._nursery, self._blocks = nursery, blocks
        self._rows: list[SharedBlock | None] = [None, None]
        self._pid: int | None = None

    def post(self, order: Setup | BroadcastMessage | RunMessage) -> None:
        with contextlib.suppress(OSError):  # the worker is dead; the next read of its answers reports this
            self.connection.send_bytes(encode(order))

    def send(self, broadcast: BroadcastMessage | None, run: RunMessage, rows: Mapping[str, Tensor] | None) -> None:
        if broadcast is not None:
            self.post(broadcast)
        if rows is not None:
            # Two blocks in turn: a worker has at most two unfinished requests.
            block = self._blocks.reuse_or_grow(self._rows[0], rows)
            self._rows = [self._rows[1], block]
            run = structs.replace(run, rows=(block.path, block.write(rows)))
        self.post(run)

    def receive(self) -> tuple[Answer, Mapping[str, Tensor]]:
        try:
            answer = answers.decode(self.connection.recv_bytes())
        except (EOFError, OSError) as error:
            raise WorkerDied from error
        if isinstance(answer, Ready):
            self._pid = answer.pid
        if isinstance(answer, ResultsMessage):
            return answer, SharedBlock(answer.block).read(answer.places)
        return answer, {}

    def close(self) -> None:
        """A worker ends when its connection closes. A worker that hangs is killed."""
        self.connection.close()
        if self._pid is not None:
            self._nursery.kill(self._pid)
