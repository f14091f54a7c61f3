"""Clients in worker processes on this machine.

Workers are given bytes, arrays and names of code, never pickled objects. θ lies in memory that all of them map, written
once a round; partial sums come back the same way.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection, wait

import torch
from msgspec import structs
from torch import Tensor

from atoll.data.clients import Clients
from atoll.engine.crew import Gone, Line, cores
from atoll.engine.crossing import Block, Blocks, Place, room
from atoll.engine.dealer import Dealer, packed
from atoll.engine.nursery import Nursery
from atoll.engine.worker import Answer, Hauled, Ready, Run, Setup, Told, answers, encode
from atoll.errors import UsageError
from atoll.task import Task


class ProcessesEngine(Dealer):
    """An engine that runs clients in worker processes on this machine.

    A worker that dies is replaced, and what it had not handed over is computed again. Close the engine, or use it in a
    `with` statement; left open, it ends with the program, however that ends.

    Args:
        task: the model, loss and metrics; `task.numerics` names the backend. With `task` and `data` the engine is open
            at once; otherwise `open` passes them.
        data: the clients.
        workers: number of worker processes; None starts one for each core.
        chunk: clients computed together; None chooses by the model's size. It changes no bit.
        threads: of each worker; None: this process' own, shared out.
        model: the name that the model was made by, a name or `module:factory`, where it has one: workers make it anew.
            Without a name they are sent its classes' names and its tensors.
        seed: that it was made with.
        nursery: where workers come from; None: one of the engine's own. One that several engines share is yours to
            close.
    Raises:
        UsageError: fewer than one worker, or a model, loss or data set that another process cannot import.
    Example:
        >>> from atoll.testing.locals import clients, problem
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
        nursery: Nursery | None = None,
    ) -> None:
        super().__init__(chunk)
        workers = cores() if workers is None else workers
        threads = max(1, torch.get_num_threads() // max(1, workers)) if threads is None else threads
        if workers < 1 or threads < 1:
            raise UsageError(f"workers = {workers}, threads = {threads}.", "at least one of each.", write="--workers 2")
        self.workers, self.threads = workers, threads
        self._made = model, seed
        self._nursery, self._own = nursery or Nursery(), nursery is None
        if task is not None and data is not None:
            self.open(task, data)

    def open(self, task: Task, data: Clients) -> None:
        """Start the worker processes.

        Raises:
            UsageError: a model, loss or data set that another process cannot import.
        """
        self._nursery.start()  # it imports while the data is packed
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
    """Workers forked from a nursery, and blocks of memory that all of them map.

    Args:
        nursery: where they are forked.
        own: whether it ends with them.
    """

    def __init__(self, nursery: Nursery, own: bool) -> None:
        self._nursery, self._own = nursery, own
        self._blocks = Blocks(nursery.folders, f"engine-{id(self):x}")
        self._published: dict[int, Block] = {}
        self._free: list[Block] = []
        self._setup: Setup | None = None

    def prepare(self, task: Task, data: Clients, model: str | None, seed: int, threads: int) -> None:
        """Pack what every worker is given first."""
        setup, tensors = packed(task, data, model, seed, threads, self._blocks.path)
        block = self._blocks.block(room(tensors))
        self._setup = structs.replace(setup, block=block.path, places=block.write(tensors))

    def hire(self) -> _Pipe:
        pipe = _Pipe(self._nursery, self._blocks)
        if self._setup is not None:
            pipe.send(self._setup)
        return pipe

    def wait(self, lines: Sequence[Line], timeout: float | None) -> Sequence[Line]:
        pipes = {line.connection: line for line in lines if isinstance(line, _Pipe)}
        return [pipes[c] for c in wait(list(pipes), timeout) if isinstance(c, Connection)]

    def publish(self, number: int, tensors: Mapping[str, Tensor]) -> tuple[str, list[Place]]:
        fitting = [block for block in self._free if block.size >= room(tensors)]
        block = fitting[0] if fitting else self._blocks.block(room(tensors))
        self._free = [other for other in self._free if other is not block]
        self._published[number] = block
        return block.path, block.write(tensors)

    def withdraw(self, number: int) -> None:
        self._free.append(self._published.pop(number))

    def close(self) -> None:
        if self._own:
            self._nursery.close()
        else:
            self._blocks.remove()


class _Pipe:
    """A connection to a worker process, and the blocks in which it is given rows."""

    def __init__(self, nursery: Nursery, blocks: Blocks) -> None:
        self.connection = nursery.worker()
        self._nursery, self._blocks = nursery, blocks
        self._rows: list[Block | None] = [None, None]
        self._pid: int | None = None

    def send(self, order: Setup | Told | Run) -> None:
        with contextlib.suppress(OSError):  # it is dead, which is seen where its answers are read
            self.connection.send_bytes(encode(order))

    def give(self, told: Told | None, run: Run, rows: Mapping[str, Tensor] | None) -> None:
        if told is not None:
            self.send(told)
        if rows is not None:
            # Two blocks in turn, one for each order that the worker has in hand.
            block = self._blocks.fitting(self._rows[0], rows)
            self._rows = [self._rows[1], block]
            run = structs.replace(run, rows=(block.path, block.write(rows)))
        self.send(run)

    def hear(self) -> tuple[Answer, Mapping[str, Tensor]]:
        try:
            answer = answers.decode(self.connection.recv_bytes())
        except (EOFError, OSError) as error:
            raise Gone from error
        if isinstance(answer, Ready):
            self._pid = answer.pid
        if isinstance(answer, Hauled):
            return answer, Block(answer.block).read(answer.places)
        return answer, {}

    def close(self) -> None:
        """A worker whose connection is closed ends by itself; one that is stuck is helped."""
        self.connection.close()
        if self._pid is not None:
            self._nursery.kill(self._pid)
