"""The messages between a worker and the scheduler, and their encoding.

Tests: tests/parity/test_processes.py
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import msgspec
from torch import Tensor

from atoll.base import grammar
from atoll.base.names import load
from atoll.compute.batches import HOST
from atoll.engine.chunks import kept_from_tensors, kept_to_tensors
from atoll.engine.contribution import Results
from atoll.engine.workers.serialize import import_name
from atoll.engine.workers.shared_memory import Place
from atoll.plan.plan import Plan
from atoll.plan.protocols import Aggregator
from atoll.plan.registry import PARTS
from atoll.plan.round import Failure


class Setup(msgspec.Struct, frozen=True, tag=True):
    """The first message to a worker: the task and the data, with the block and the places of their tensors.

    A model that has a name is sent as its name.
    """

    block: str
    places: list[Place]
    task: Any
    data: Any
    model: tuple[str, str] | None  # name, seed
    threads: int
    device: str = "cpu"


class BroadcastMessage(msgspec.Struct, frozen=True, tag=True):
    """The broadcast of one model version: the text of the plan, the key, a block with the model and shared tensors.

    `own` maps names of parts outside the package to `module:name`. `forget` lists broadcasts that the worker can free.
    """

    number: int
    version: int
    plan: str
    own: dict[str, str]
    seed: str
    path: list[int]
    secret: bytes  # of the round; empty: it has none
    block: str
    places: list[Place]
    forget: list[int]

    def __repr__(self) -> str:
        return f"BroadcastMessage(number={self.number}, version={self.version})"


class RunMessage(msgspec.Struct, frozen=True, tag=True):
    """Train these clients. With `deliver`, return the results of all clients of the group."""

    group: int
    broadcast: int
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
    """The clients of a `RunMessage` are computed. The worker keeps their results until it must deliver."""


class ResultsMessage(msgspec.Struct, frozen=True, tag=True):
    """Results, in a block. `max_chunk` is the largest chunk that fits into memory, if a larger one did not."""

    block: str
    places: list[Place]
    failures: list[Failure]
    errors: list[str]
    max_chunk: int | None = None


class ErrorMessage(msgspec.Struct, frozen=True, tag=True):
    """The worker stopped with an error: its parts and the forms of its line, or the text of another exception."""

    kind: str
    parts: list[str]


Order = Setup | BroadcastMessage | RunMessage


Answer = Ready | Done | ResultsMessage | ErrorMessage


encode = msgspec.msgpack.Encoder().encode


orders = msgspec.msgpack.Decoder(Order)


answers = msgspec.msgpack.Decoder(Answer)


def results_to_tensors(results: Results) -> dict[str, Tensor]:
    """Results as named plain tensors, without failures and errors."""
    out = {f"partial/{b}/{n}": t for b, partial in results.partials.items() for n, t in partial.tensors().items()}
    for i, (ids, facts) in enumerate(zip(results.arrived, results.facts, strict=True)):
        out |= {f"arrived/{i}": ids} | {f"facts/{i}/{n}": t for n, t in facts.items()}
    for i, (ids, rows) in enumerate(results.memory):
        out |= {f"kept/{i}": ids} | {f"memory/{i}/{n}": t for n, t in rows.items()}
    out |= {f"keep/0/{n}": t for n, t in kept_to_tensors(results.kept).items()}
    return {name: t.to(HOST) for name, t in out.items()}


def results_from_tensors(
    tensors: Mapping[str, Tensor], failures: list[Failure], errors: list[str], rule: Aggregator
) -> Results:
    """The inverse of `results_to_tensors`; the tensors are copied."""
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
        {version: type(rule.zero()).of(partial) for version, partial in tables["partial"].items()},
        failures,
        [RuntimeError(text) for text in errors],
        [ids[i] for i in sorted(ids)],
        [facts.get(i, {}) for i in sorted(ids)],
        [(tables["kept"][i], tables["memory"][i]) for i in sorted(tables["kept"])],
        kept_from_tensors(tables["keep"].get(0, {})),
    )


def plan_to_text(plan: Plan) -> tuple[str, dict[str, str]]:
    """The text of a plan, and the `module:name` of each part that is not in the package.

    Raises:
        UsageError: another process cannot import a part or a function of the plan.
    """
    text, own = repr(plan), {}
    for part in _parts(plan):
        if isinstance(part, type) or (callable(part) and hasattr(part, "__qualname__")):
            import_name(part, f"The plan {text}")
        elif PARTS.get(type(part).__name__) is not type(part):
            own[type(part).__name__] = import_name(type(part), f"The plan {text}")
    return text, own


def _parts(value: Any) -> list[Any]:
    """The parts and functions that the text of a plan names, at any depth."""
    if isinstance(value, (tuple, list)):
        return [part for item in value for part in _parts(item)]
    if isinstance(value, grammar.Value) or hasattr(value, "__dataclass_fields__"):
        inner = [getattr(value, name) for name, f in value.__dataclass_fields__.items() if f.init]
        return [value, *(part for item in inner for part in _parts(item))]
    return [value] if callable(value) else []


@cache
def plan_of(text: str, own: tuple[tuple[str, str], ...]) -> Plan:
    """The inverse of `plan_to_text`."""
    names = {**PARTS, **{name: load(where) for name, where in own}}
    plan: Plan = grammar.parse(text, names, trust=True)
    return plan
