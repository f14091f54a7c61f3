"""A worker: who computes chunks of clients, and the messages between it and whoever deals them out.

Messages are short; numbers go beside them: in blocks of memory that both sides map, where both are on one machine. A
worker adds up what it computes, and hands it over as one haul when it is asked to.
"""

from __future__ import annotations

import os
import queue
import threading
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing.connection import Connection
from typing import Any

import msgspec
import torch
from torch import Tensor

from atoll import models
from atoll.base import grammar
from atoll.base.errors import AtollError, RunError, UsageError
from atoll.base.names import load
from atoll.base.random import Key
from atoll.compute.batches import HOST
from atoll.compute.buffer_pool import Shelf, lent_from
from atoll.compute.device import found, nearby
from atoll.compute.task import Model, Task
from atoll.data.clients import Clients
from atoll.engine.chunks import ChunkRunner, Results, kept_from_tensors, kept_to_tensors, task_for
from atoll.engine.client_state import Memory
from atoll.engine.inprocess import InProcessEngine
from atoll.engine.workers.serialize import Block, Blocks, Place, name_of, unpack
from atoll.plan.plan import Plan
from atoll.plan.protocols import Aggregator, Broadcast, Ids
from atoll.plan.registry import PARTS
from atoll.plan.round import Failure, bind
from atoll.plan.state import part_of


class Setup(msgspec.Struct, frozen=True, tag=True):
    """Once, at the start: the task and the data, with a block's name and places; a model that has a name goes by it."""

    block: str
    places: list[Place]
    task: Any
    data: Any
    model: tuple[str, str] | None  # name, seed
    threads: int
    device: str = "cpu"


class Told(msgspec.Struct, frozen=True, tag=True):
    """What the clients of a birth may know: the plan's text, the key, the model and what parts share, in a block."""

    number: int
    birth: int
    plan: str
    own: dict[str, str]
    seed: str
    path: list[int]
    block: str
    places: list[Place]
    forget: list[int]


class Run(msgspec.Struct, frozen=True, tag=True):
    """Compute these clients; with `deliver` hand over all that was computed for the group."""

    group: int
    told: int
    clients: list[int]
    repeats: list[int]
    down: list[int]
    rows: tuple[str, list[Place]] | None
    deliver: bool
    keep: list[int] = []  # ids of clients whose contributions are returned


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The worker has everything it needs."""

    pid: int


class Done(msgspec.Struct, frozen=True, tag=True):
    """A run is computed, and kept for the haul."""


class Hauled(msgspec.Struct, frozen=True, tag=True):
    """A haul, in a block; and how many clients fit side by side, where more did not."""

    block: str
    places: list[Place]
    failures: list[Failure]
    errors: list[str]
    most: int | None = None


class Broke(msgspec.Struct, frozen=True, tag=True):
    """The worker cannot go on: an error of atoll's, in its four parts, or any other as text."""

    kind: str
    parts: list[str]


Order = Setup | Told | Run
Answer = Ready | Done | Hauled | Broke
encode = msgspec.msgpack.Encoder().encode
orders = msgspec.msgpack.Decoder(Order)
answers = msgspec.msgpack.Decoder(Answer)


def flat(haul: Results) -> dict[str, Tensor]:
    """A haul as named plain tensors, but for its failures and errors."""
    out = {f"partial/{b}/{n}": t for b, partial in haul.partials.items() for n, t in partial.tensors().items()}
    for i, (ids, facts) in enumerate(zip(haul.arrived, haul.facts, strict=True)):
        out |= {f"arrived/{i}": ids} | {f"facts/{i}/{n}": t for n, t in facts.items()}
    for i, (ids, rows) in enumerate(haul.memory):
        out |= {f"kept/{i}": ids} | {f"memory/{i}/{n}": t for n, t in rows.items()}
    out |= {f"keep/0/{n}": t for n, t in kept_to_tensors(haul.kept).items()}
    return {name: t.to(HOST) for name, t in out.items()}


def haul_of(tensors: Mapping[str, Tensor], failures: list[Failure], errors: list[str], rule: Aggregator) -> Results:
    """The haul that `flat` was called on; copies."""
    tables: dict[str, dict[int, Any]] = {
        "partial": {}, "arrived": {}, "facts": {}, "kept": {}, "memory": {}, "keep": {},
    }  # fmt: skip
    for path, t in tensors.items():
        kind, number, *rest = path.split("/", 2)
        if rest:
            tables[kind].setdefault(int(number), {})[rest[0]] = t.clone()
        else:
            tables[kind][int(number)] = t.clone()
    ids, facts = tables["arrived"], tables["facts"]
    return Results(
        {birth: type(rule.zero()).of(partial) for birth, partial in tables["partial"].items()},
        failures,
        [RuntimeError(text) for text in errors],
        [ids[i] for i in sorted(ids)],
        [facts.get(i, {}) for i in sorted(ids)],
        [(tables["kept"][i], tables["memory"][i]) for i in sorted(tables["kept"])],
        kept_from_tensors(tables["keep"].get(0, {})),
    )


def spoken(told: Broadcast) -> dict[str, Tensor]:
    """A broadcast as named plain tensors."""
    model = told.model
    out = {"theta": model.theta, "buffers": model.buffers}
    out |= {f"counter/{n}": t for n, t in model.counters.items()} | {f"fixed/{n}": t for n, t in model.fixed.items()}
    return out | {f"shared/{part}/{n}": t for part, tensors in told.shared.items() for n, t in tensors.items()}


def heard(round: int, tensors: Mapping[str, Tensor]) -> Broadcast:
    """The broadcast that `spoken` was called on; views."""
    groups: dict[str, dict[str, Tensor]] = {"counter": {}, "fixed": {}}
    shared: dict[str, dict[str, Tensor]] = {"local": {}, "codec": {}}
    for path, t in tensors.items():
        kind, _, name = path.partition("/")
        if kind in groups:
            groups[kind][name] = t
        elif kind == "shared":
            part, _, name = name.partition("/")
            shared[part][name] = t
    return Broadcast(round, Model(tensors["theta"], tensors["buffers"], groups["counter"], groups["fixed"]), shared)


def written(plan: Plan) -> tuple[str, dict[str, str]]:
    """A plan as the text that prints it, and where the parts are that are not atoll's own.

    Raises:
        UsageError: a part or a function of it cannot be imported, or does not print as what builds it.
    """
    text, own = repr(plan), {}
    for part in _parts(plan):
        if isinstance(part, type) or (callable(part) and hasattr(part, "__qualname__")):
            name_of(part, f"The plan {text}")
        elif PARTS.get(type(part).__name__) is not type(part):
            own[type(part).__name__] = name_of(type(part), f"The plan {text}")
    return text, own


def _parts(value: Any) -> list[Any]:
    """Everything in a plan that its text names: parts and functions, at any depth."""
    if isinstance(value, (tuple, list)):
        return [part for item in value for part in _parts(item)]
    if isinstance(value, grammar.Value) or hasattr(value, "__dataclass_fields__"):
        inner = [getattr(value, name) for name, f in value.__dataclass_fields__.items() if f.init]
        return [value, *(part for item in inner for part in _parts(item))]
    return [value] if callable(value) else []


@cache
def plan_of(text: str, own: tuple[tuple[str, str], ...]) -> Plan:
    """The plan that a text of `written` stands for."""
    names = {**PARTS, **{name: load(where) for name, where in own}}
    plan: Plan = grammar.parse(text, names, trust=True)
    return plan


@dataclass
class _Group:
    number: int
    runner: ChunkRunner


class Worker:
    """What a worker has and is at, however it is spoken to.

    Args:
        setup: the task and the data.
        tensors: those that stand in them, by `task/…` and `data/…`.
    """

    def __init__(self, setup: Setup, tensors: Mapping[str, Tensor]) -> None:
        torch.set_num_threads(setup.threads)
        data: Clients = unpack(setup.data, part_of(tensors, "data"))
        task: Task = unpack(setup.task, part_of(tensors, "task"))
        if setup.model is not None:
            task = _rebuilt(task, data, *setup.model)
        self._device = found(setup.device)
        self._engine = InProcessEngine(task.on(self._device), nearby(data, self._device))
        self._tasks: dict[str, Task] = {}
        self._plans: dict[tuple[str, tuple[tuple[str, str], ...]], Plan] = {}
        self._told: dict[int, tuple[Told, Broadcast]] = {}
        self._group: _Group | None = None
        self._shelf = Shelf()

    @property
    def most(self) -> int | None:
        """How many clients fit side by side, where more did not."""
        return self._engine.room.most

    def tell(self, told: Told, tensors: Mapping[str, Tensor]) -> None:
        """Keep what the clients of a birth may know."""
        for number in told.forget:
            self._told.pop(number, None)
        here = {n: t.to(self._device) for n, t in tensors.items()}
        self._told[told.number] = told, heard(told.birth, here)

    def run(self, run: Run, rows: Mapping[str, Tensor] | None) -> Results | None:
        """Compute some clients, with what they keep; a haul where one is wanted."""
        if run.clients:
            runner = self._runner(run)
            ids = Ids(torch.tensor(run.clients), torch.tensor(run.repeats))
            if rows is not None:
                runner.memory.put(ids.client, rows)
            with lent_from(self._shelf):
                runner.run(self._told[run.told][0].birth, ids, torch.tensor(run.down))
            runner.commit_wave()
        if not run.deliver:
            return None
        group, self._group = self._group, None
        return Results.empty() if group is None or group.number != run.group else group.runner.results

    def _runner(self, run: Run) -> ChunkRunner:
        if self._group is None or self._group.number != run.group:
            told, broadcast = self._told[run.told]
            plan = self._plan(told.plan, tuple(told.own.items()))
            task = task_for(plan, self._engine.task)
            task = self._tasks.setdefault(task.numerics, task)
            key, memory = Key(int(told.seed), tuple(told.path)), Memory(plan.memory(task.layout))
            self._group = _Group(
                run.group,
                ChunkRunner(
                    plan,
                    task,
                    self._engine.data,
                    lambda version: (broadcast, key),
                    memory,
                    told.birth,
                    room=self._engine.room,
                    keep=run.keep,
                ),
            )
        return self._group.runner

    def _plan(self, text: str, own: tuple[tuple[str, str], ...]) -> Plan:
        """The plan of a text, bound to the engine of this worker once."""
        if (text, own) not in self._plans:
            self._plans[text, own] = bind(plan_of(text, own), self._engine)
        return self._plans[text, own]


def _rebuilt(task: Task, data: Clients, name: str, seed: str) -> Task:
    """The task with its model made again, from its name."""
    module = models.resolve(name, data, Key(int(seed)).fold("model"), task.layout.dtype)
    fresh = Task.of(module, task.loss, (), task.layout.dtype)
    if fresh.layout != task.layout:
        raise RunError(
            f"The model {name} has another layout in the worker than here.",
            "a factory that makes the same model every time.",
            "θ is read by name and shape.",
        )
    return replace(task, module=fresh.module)


def hauled(haul: Results, block: str, places: list[Place], most: int | None) -> Hauled:
    """The message that says where a haul lies, and how many clients fit side by side."""
    errors = ["".join(traceback.format_exception(e)) for e in haul.errors[:1]]
    return Hauled(block, places, haul.failures, errors, most)


class _Seat:
    """A worker whose numbers come and go in blocks.

    Args:
        setup: the task and the data.
        blocks: where its hauls go.
    """

    def __init__(self, setup: Setup, blocks: Blocks) -> None:
        self._worker = Worker(setup, Block(setup.block).read(setup.places))
        self._blocks = blocks
        self._out: list[Block | None] = [None, None]
        self._open: dict[str, Block] = {}

    def tell(self, told: Told) -> None:
        self._worker.tell(told, self._block(told.block).read(told.places))

    def run(self, run: Run) -> Answer:
        haul = self._worker.run(run, None if run.rows is None else self._block(run.rows[0]).read(run.rows[1]))
        if haul is None:
            return Done()
        tensors = flat(haul)
        # Two blocks in turn: one may still be read while the next haul is made.
        out = self._blocks.fitting(self._out[0], tensors)
        self._out = [self._out[1], out]
        return hauled(haul, out.path, out.write(tensors), self._worker.most)

    def _block(self, path: str) -> Block:
        if path not in self._open:
            self._open = {p: b for p, b in self._open.items() if os.path.exists(p)}
            self._open[path] = Block(path)
        return self._open[path]


def warm() -> None:
    """Use lanes once, on next to nothing and in one thread: torch loads much of itself only then."""
    torch.set_num_threads(1)
    twice = torch.ones(2, 1)
    torch.func.vmap(torch.func.grad(lambda theta: theta.square().sum()))(twice)


def main(connection: Connection, *folders: str) -> None:
    """A worker's life: orders are read as they come, and obeyed one by one; it ends when nobody can give any."""
    todo: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def listen() -> None:
        try:
            while True:
                todo.put(connection.recv_bytes())
        except (EOFError, OSError):
            os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    blocks = Blocks(folders, f"worker-{os.getpid()}")
    worker: _Seat | None = None
    try:
        while True:
            order = orders.decode(todo.get())
            match order:
                case Setup():
                    worker = _Seat(order, blocks)
                    answer: Answer | None = Ready(os.getpid())
                case Told() if worker:
                    answer = None
                    worker.tell(order)
                case Run() if worker:
                    answer = worker.run(order)
                case _:
                    raise RunError(f"A worker was given {type(order).__name__} before it was set up.")
            if answer is not None:
                connection.send_bytes(encode(answer))
    except BaseException as error:
        connection.send_bytes(encode(broken(error)))


def broken(error: BaseException) -> Broke:
    """An error as it crosses."""
    if isinstance(error, AtollError):
        kind = "UsageError" if isinstance(error, UsageError) else "RunError"
        return Broke(kind, [error.given, error.required, error.why, error.write])
    return Broke(type(error).__name__, ["".join(traceback.format_exception(error))])
