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
from atoll.compute.model_state import Model
from atoll.compute.task import Task
from atoll.plan.in_flight import InFlight
from atoll.plan.plan import Plan
from atoll.plan.protocols import Broadcast, Shared, Tensors

_version_of = operator.itemgetter(1)  # of a flight; half the time of attribute access


class Store(Protocol):
    """Client memory. A row exists after its first write; `first` is the memory of a client without a row."""

    first: dict[str, Tensor]

    def take(self, ids: Tensor) -> Tensors: ...
    def put(self, ids: Tensor, rows: Tensors) -> None: ...


def part_of(tensors: Tensors, part: str) -> dict[str, Tensor]:
    """The tensors of one part, selected from those of all parts."""
    return without_prefix(tensors, f"{part}/")


def public(tensors: Tensors) -> dict[str, Tensor]:
    """The server state of a part that is broadcast: tensors whose names begin with an underscore stay at the server."""
    return {n: t for n, t in tensors.items() if not n.rpartition(".")[2].startswith("_")}


class DownlinkState(NamedTuple):
    """θ as clients have it with a compressed downlink, and the lengths of the latest deltas.

    Args:
        theta: θ̂, `[d]`.
        deltas: lengths in bytes of the latest rounds' deltas. A client that needs an older delta is sent the whole θ,
            which is not longer.
    """

    theta: Tensor
    deltas: tuple[int, ...]

    def append(self, theta: Tensor, length: int) -> DownlinkState:
        """The same with one more delta. Old deltas are dropped until all together are not longer than θ."""
        deltas, whole = (*self.deltas, length), theta.numel() * theta.element_size()
        while sum(deltas) > whole:
            deltas = deltas[1:]
        return DownlinkState(theta, deltas)


@dataclass(frozen=True)
class State:
    """The complete state of a training between two rounds.

    Args:
        round: number of the next round.
        seed: of all keyed draws.
        model: θ, buffers, counters and fixed tensors.
        optimizer: state of the server optimizer.
        server: server state of the local part and of the codec.
        memory: client memory.
        air: clients in flight.
        versions: the broadcast of each model version that a client in flight started from.
        sent: θ as clients have it, if the downlink is compressed.
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
        """The state before the first round."""
        model = model or task.initial()
        parts = {"local": plan.local.server(task.layout), "codec": plan.codec.server(task.layout)}
        server = {part: {n: t.to(task.device) for n, t in tensors.items()} for part, tensors in parts.items()}
        return cls(0, seed, model, plan.optimizer.init(model.theta), server, memory)

    def key(self, round: int | None = None) -> Key:
        """The key of all draws in the next round, or in the given round."""
        return Key(self.seed).fold("round", self.round if round is None else round)

    @cached_property
    def broadcast(self) -> Broadcast:
        """The broadcast to clients that start in the next round."""
        model = self.model if self.sent is None else self.model._replace(theta=self.sent.theta)
        return Broadcast(self.round, model, {part: public(tensors) for part, tensors in self.server.items()})

    def version(self, round: int) -> Broadcast:
        """The broadcast to clients that started in this round, the next one or an earlier one."""
        return self.broadcast if round == self.round else self.versions[round]


def versions(state: State, air: InFlight) -> dict[int, Broadcast]:
    """The model versions that clients in flight started from, after the round has closed."""
    if not air.flights:
        return {}
    kept, needed = {**state.versions, state.round: state.broadcast}, set(map(_version_of, air.flights))
    for unused in kept.keys() - needed:
        del kept[unused]
    return kept
