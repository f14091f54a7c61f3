"""The state of a training between two rounds.

Tests: tests/faults/test_kill.py, tests/identities/test_flights.py
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple, Protocol

from torch import Tensor

from atoll.base.names import without_prefix
from atoll.base.random import Key
from atoll.compute.model_state import Model, split_of
from atoll.compute.task import Task
from atoll.plan.in_flight import InFlight
from atoll.plan.plan import Plan
from atoll.plan.protocols import Broadcast, Shared, Tensors

SHARED = ("local", "codec")  # the parts whose public server state is broadcast
_version_of = operator.itemgetter(1)  # of a flight; half the time of attribute access


class Store(Protocol):
    """Stores one row of memory for each client that has been written; `first` is the memory of any other client."""

    first: dict[str, Tensor]

    def take(self, ids: Tensor, read_only: str = "") -> Tensors: ...
    def put(self, ids: Tensor, rows: Tensors, owned: str = "") -> None: ...


def part_of(tensors: Tensors, part: str) -> dict[str, Tensor]:
    """The tensors of one part, selected from those of all parts."""
    return without_prefix(tensors, f"{part}/")


def round_key(seed: int, round: int) -> Key:
    """The key of all random numbers in a round."""
    return Key(seed).fold("round", round)


def public(tensors: Tensors) -> dict[str, Tensor]:
    """Select the server state that is broadcast. Tensors whose names begin with an underscore stay at the server."""
    return {n: t for n, t in tensors.items() if not n.rpartition(".")[2].startswith("_")}


MAX_DELTAS = 1024  # a work message names each delta that its client needs


class DownlinkState(NamedTuple):
    """The model that clients have if the downlink is compressed, and the latest deltas.

    A delta is the compressed difference that the server sends to the clients in one round.

    Args:
        theta: θ̂, the parameters that clients have, `[d]`. They differ from θ by the error of compression.
        deltas: the lengths in bytes of the deltas of the latest rounds. If a client needs an older delta, the server
            sends the whole θ, which is not longer.
        messages: the bytes of these deltas; empty for a codec whose messages have no form as bytes.
    """

    theta: Tensor
    deltas: tuple[int, ...]
    messages: tuple[bytes, ...] = ()

    def append(self, theta: Tensor, length: int, message: bytes = b"") -> DownlinkState:
        """Append a delta. The oldest are dropped until the others are at most `MAX_DELTAS` and not longer than θ."""
        deltas, whole = (*self.deltas, length)[-MAX_DELTAS:], theta.numel() * theta.element_size()
        while sum(deltas) > whole:
            deltas = deltas[1:]
        return DownlinkState(theta, deltas, (*self.messages, message)[-len(deltas) :] if deltas else ())


@dataclass(frozen=True)
class State:
    """The complete state of a training between two rounds.

    Args:
        round: the number of the next round.
        seed: the seed from which the keys of all random numbers derive.
        model: θ, buffers, counters and fixed tensors.
        optimizer: the state of the server optimizer.
        server: the server state of the local part, of the codec and of the aggregator, and the memory of the sampler.
        memory: the client memory.
        air: the clients in flight: they have started and have not arrived.
        versions: the broadcasts that clients in flight started from; the keys are model versions.
        sent: the model that clients have, if the downlink is compressed; else None.
    """

    round: int
    seed: int
    model: Model
    optimizer: Tensors
    server: Shared
    memory: Store
    air: InFlight = InFlight()
    versions: Mapping[int, Broadcast] = field(default_factory=dict)
    sent: DownlinkState | None = None

    @classmethod
    def first(cls, plan: Plan, task: Task, seed: int, memory: Store, model: Model | None = None) -> State:
        """The state before the first round. A given model has all tensors of the module."""
        model, layout = model or task.initial(), plan.local.server_layout(task.layout)
        if layout is not task.layout:
            model = split_of(task.layout, layout).shared(model)
        parts = {"local": plan.local.server(layout), "codec": plan.codec.server(layout)}
        parts |= {"aggregator": plan.aggregator.server(layout), "sampler": {}}  # the population is not known yet
        server = {part: {n: t.to(task.device) for n, t in tensors.items()} for part, tensors in parts.items()}
        return cls(0, seed, model, plan.optimizer.init(model.theta), server, memory)

    def key(self, round: int | None = None) -> Key:
        """The key of all random numbers in a round: in `round`, or in the next round if it is None."""
        return round_key(self.seed, self.round if round is None else round)

    @cached_property
    def broadcast(self) -> Broadcast:
        """The broadcast that clients receive if they start in the next round."""
        model = self.model if self.sent is None else self.model._replace(theta=self.sent.theta)
        return Broadcast(self.round, model, {part: public(self.server[part]) for part in SHARED})

    def version(self, round: int) -> Broadcast:
        """The broadcast that clients received, or will receive, if they start in round `round`."""
        return self.broadcast if round == self.round else self.versions[round]


def evaluated_model(plan: Plan, state: State, task: Task) -> Model:
    """The model that is evaluated and exported: that of the state, unless the local part states other parameters."""
    theta = plan.local.evaluated(state.model.theta, state.server["local"])
    return plan.local.whole(state.model if theta is state.model.theta else state.model._replace(theta=theta), task)


def versions(state: State, air: InFlight) -> dict[int, Broadcast]:
    """The broadcasts that clients in flight started from, after the round has closed. The keys are model versions."""
    if not air.flights:
        return {}
    kept, needed = {**state.versions, state.round: state.broadcast}, set(map(_version_of, air.flights))
    for unused in kept.keys() - needed:
        del kept[unused]
    return kept


def pack_broadcast(broadcast: Broadcast) -> dict[str, Tensor]:
    """A broadcast as named plain tensors."""
    model = broadcast.model
    out = {"theta": model.theta, "buffers": model.buffers}
    out |= {f"counter/{n}": t for n, t in model.counters.items()} | {f"fixed/{n}": t for n, t in model.fixed.items()}
    return out | {f"shared/{part}/{n}": t for part, tensors in broadcast.shared.items() for n, t in tensors.items()}


def unpack_broadcast(round: int, tensors: Mapping[str, Tensor]) -> Broadcast:
    """The inverse of `pack_broadcast`; the tensors are views."""
    groups: dict[str, dict[str, Tensor]] = {"counter": {}, "fixed": {}}
    shared: dict[str, dict[str, Tensor]] = {part: {} for part in SHARED}
    for path, t in tensors.items():
        kind, _, name = path.partition("/")
        if kind in groups:
            groups[kind][name] = t
        elif kind == "shared":
            part, _, name = name.partition("/")
            shared[part][name] = t
    return Broadcast(round, Model(tensors["theta"], tensors["buffers"], groups["counter"], groups["fixed"]), shared)
