"""A worker: it trains chunks of clients, adds up their contributions, and returns the sums when it is asked.

Messages contain no tensors. On one machine, tensors are in blocks of memory that both processes map.

Tests: tests/parity/test_processes.py, tests/parity/test_ray.py
"""

from __future__ import annotations

import os
import queue
import threading
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from atoll import models
from atoll.base.errors import AtollError, RunError, UsageError
from atoll.base.lines import forms
from atoll.base.random import GeneratorWatch, Key
from atoll.compute.buffer_pool import BufferPool, use_pool
from atoll.compute.device import move_rows, resolve_device
from atoll.compute.task import Task
from atoll.compute.user_code import PASSES, missed_draw
from atoll.data.clients import Clients
from atoll.engine.chunks import ChunkRunner, task_for
from atoll.engine.client_state import Memory
from atoll.engine.contribution import Results
from atoll.engine.inprocess import InProcessEngine
from atoll.engine.workers.messages import (
    Answer,
    BroadcastMessage,
    Done,
    ErrorMessage,
    Ready,
    ResultsMessage,
    RunMessage,
    Setup,
    encode,
    orders,
    plan_of,
    results_to_tensors,
)
from atoll.engine.workers.serialize import deserialize
from atoll.engine.workers.shared_memory import Place, SharedBlock, SharedBlocks
from atoll.plan.plan import Plan
from atoll.plan.protocols import Broadcast, Ids
from atoll.plan.round import bind
from atoll.plan.state import part_of, unpack_broadcast


@dataclass
class _Group:
    number: int
    runner: ChunkRunner


class Worker:
    """The state of a worker, independent of the transport of its messages.

    Args:
        setup: the task and the data.
        tensors: the tensors of task and data, by `task/…` and `data/…`.
    """

    def __init__(self, setup: Setup, tensors: Mapping[str, Tensor]) -> None:
        torch.set_num_threads(setup.threads)
        data: Clients = deserialize(setup.data, part_of(tensors, "data"))
        task: Task = deserialize(setup.task, part_of(tensors, "task"))
        if setup.model is not None:
            task = _rebuilt(task, data, *setup.model)
        self._device = resolve_device(setup.device)
        self._engine = InProcessEngine(task.on(self._device), move_rows(data, self._device))
        self._tasks: dict[str, Task] = {}
        self._plans: dict[tuple[str, tuple[tuple[str, str], ...]], Plan] = {}
        self._broadcasts: dict[int, tuple[BroadcastMessage, Broadcast]] = {}
        self._group: _Group | None = None
        self._buffers = BufferPool()

    @property
    def max_chunk(self) -> int | None:
        """The largest chunk that fits into memory, if a larger one did not; else None."""
        return self._engine.room.most

    def store_broadcast(self, message: BroadcastMessage, tensors: Mapping[str, Tensor]) -> None:
        """Store the broadcast of a model version, and free the broadcasts that are no longer needed."""
        for number in message.forget:
            self._broadcasts.pop(number, None)
        here = {n: t.to(self._device) for n, t in tensors.items()}
        self._broadcasts[message.number] = message, unpack_broadcast(message.version, here)

    def run(self, run: RunMessage, rows: Mapping[str, Tensor] | None) -> Results | None:
        """Train clients, with their client state. Returns the results of the group if the message asks for them."""
        if run.clients:
            runner = self._runner(run, rows)
            ids = Ids(torch.tensor(run.clients), torch.tensor(run.repeats))
            if rows is not None:
                runner.memory.put(ids.client, rows)
            findings = self._engine.task.findings
            draws = None if findings.built_in or findings.draws == PASSES else GeneratorWatch()
            with use_pool(self._buffers):
                runner.run(self._broadcasts[run.broadcast][0].version, ids, torch.tensor(run.down))
            if draws is not None and draws.found():
                raise missed_draw(self._broadcasts[run.broadcast][0].version)
            runner.commit_wave()
        if not run.deliver:
            return None
        group, self._group = self._group, None
        return Results.empty() if group is None or group.number != run.group else group.runner.results

    def _runner(self, run: RunMessage, rows: Mapping[str, Tensor] | None) -> ChunkRunner:
        """The runner of a group. Each of its messages contains the memory of its clients, if clients have memory."""
        if self._group is None or self._group.number != run.group:
            message, broadcast = self._broadcasts[run.broadcast]
            plan = self._plan(message.plan, tuple(message.own.items()))
            task = task_for(plan, self._engine.task)
            task = self._tasks.setdefault(task.numerics, task)
            key = Key(int(message.seed), tuple(message.path), None, message.secret)
            self._group = _Group(
                run.group,
                ChunkRunner(
                    plan,
                    task,
                    self._engine.data,
                    lambda version: (broadcast, key),
                    Memory({} if rows is None else {n: t[0] for n, t in rows.items()}),
                    message.version,
                    room=self._engine.room,
                    keep=run.keep,
                ),
            )
        return self._group.runner

    def _plan(self, text: str, own: tuple[tuple[str, str], ...]) -> Plan:
        """The plan of a text, bound to the engine of this worker. It is bound once."""
        if (text, own) not in self._plans:
            self._plans[text, own] = bind(plan_of(text, own), self._engine, self._engine.task)
        return self._plans[text, own]


def _rebuilt(task: Task, data: Clients, name: str, seed: str) -> Task:
    """The task with a model that is built from its name."""
    module = models.resolve(name, data, Key(int(seed)).fold("model"), task.layout.dtype)
    fresh = Task.of(module, task.loss, (), task.layout.dtype)
    if fresh.layout != task.layout:
        raise RunError(
            f"The model {name} has another layout in a worker than in the main process.",
            "a factory that builds the same model in every call.",
            "a worker reads θ by name and shape.",
        )
    return replace(task, module=fresh.module)


def results_message(results: Results, block: str, places: list[Place], max_chunk: int | None) -> ResultsMessage:
    """The message with the places of results, and with the largest chunk that fits into memory."""
    errors = ["".join(traceback.format_exception(e)) for e in results.errors[:1]]
    return ResultsMessage(block, places, results.failures, errors, max_chunk)


class _SharedMemoryWorker:
    """A worker that receives and returns tensors in blocks of shared memory.

    Args:
        setup: the task and the data.
        blocks: the blocks for its results.
    """

    def __init__(self, setup: Setup, blocks: SharedBlocks) -> None:
        self._worker = Worker(setup, SharedBlock(setup.block).read(setup.places))
        self._blocks = blocks
        self._out: list[SharedBlock | None] = [None, None]
        self._open: dict[str, SharedBlock] = {}

    def store_broadcast(self, message: BroadcastMessage) -> None:
        self._worker.store_broadcast(message, self._block(message.block).read(message.places))

    def run(self, run: RunMessage) -> Answer:
        results = self._worker.run(run, None if run.rows is None else self._block(run.rows[0]).read(run.rows[1]))
        if results is None:
            return Done()
        tensors = results_to_tensors(results)
        # Two blocks in turn: the engine may still read one while the worker writes the next.
        out = self._blocks.reuse_or_grow(self._out[0], tensors)
        self._out = [self._out[1], out]
        return results_message(results, out.path, out.write(tensors), self._worker.max_chunk)

    def _block(self, path: str) -> SharedBlock:
        if path not in self._open:
            self._open = {p: b for p, b in self._open.items() if os.path.exists(p)}
            self._open[path] = SharedBlock(path)
        return self._open[path]


def preload() -> None:
    """Run one tiny vmap in one thread, so that torch loads its modules for lanes."""
    torch.set_num_threads(1)
    twice = torch.ones(2, 1)
    torch.func.vmap(torch.func.grad(lambda theta: theta.square().sum()))(twice)


def run_worker(connection: Connection, *folders: str) -> None:
    """The main loop of a worker process: it handles requests in order, and ends when the connection closes."""
    todo: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def listen() -> None:
        try:
            while True:
                todo.put(connection.recv_bytes())
        except (EOFError, OSError):
            os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    blocks = SharedBlocks(folders, f"worker-{os.getpid()}")
    worker: _SharedMemoryWorker | None = None
    try:
        while True:
            order = orders.decode(todo.get())
            match order:
                case Setup():
                    worker = _SharedMemoryWorker(order, blocks)
                    answer: Answer | None = Ready(os.getpid())
                case BroadcastMessage() if worker:
                    answer = None
                    worker.store_broadcast(order)
                case RunMessage() if worker:
                    answer = worker.run(order)
                case _:
                    raise RunError(f"A worker received {type(order).__name__} before it received task and data.")
            if answer is not None:
                connection.send_bytes(encode(answer))
    except BaseException as error:
        connection.send_bytes(encode(error_message(error)))


def error_message(error: BaseException) -> ErrorMessage:
    """An error as a message."""
    if isinstance(error, AtollError):
        kind = "UsageError" if isinstance(error, UsageError) else "RunError"
        return ErrorMessage(kind, [error.given, error.required, error.why, *forms(error.write)])
    return ErrorMessage(type(error).__name__, ["".join(traceback.format_exception(error))])
