"""The state of a training between two rounds."""

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
from atoll.plan.in_flight import Air
from atoll.plan.plan import Plan
from atoll.plan.protocols import Broadcast, Shared, Tensors

_birth = operator.itemgetter(1)  # of a flight; half the time of its name


class Store(Protocol):
    """What clients keep between rounds: rows appear on first touch. `first` is what a client keeps before that."""

    first: dict[str, Tensor]

    def take(self, ids: Tensor) -> Tensors: ...
    def put(self, ids: Tensor, rows: Tensors) -> None: ...


def part_of(tensors: Tensors, part: str) -> dict[str, Tensor]:
    """The tensors of one part, out of those of all parts."""
    return without_prefix(tensors, f"{part}/")


def public(tensors: Tensors) -> dict[str, Tensor]:
    """What clients are told of a part's server state: names that begin with an underscore stay at the server."""
    return {n: t for n, t in tensors.items() if not n.rpartition(".")[2].startswith("_")}


class Sent(NamedTuple):
    """θ as clients know it under a compressed downlink, and the length in bytes of the last rounds' deltas.

    Args:
        theta: `[d]`.
        deltas: of the rounds up to the last one; of older ones the whole θ is sent, which is no longer.
    """

    theta: Tensor
    deltas: tuple[int, ...]

    def after(self, theta: Tensor, length: int) -> Sent:
        """With one more delta: what is kept of the stream is no longer than θ whole."""
        deltas, whole = (*self.deltas, length), theta.numel() * theta.element_size()
        while sum(deltas) > whole:
            deltas = deltas[1:]
        return Sent(theta, deltas)


@dataclass(frozen=True)
class State:
    """Everything needed to go on: the next round's number, the model, what the server's half of each part keeps, what
    is in the air, the models that it started from, and θ as the clients know it where that is another."""

    round: int
    seed: int
    model: Model
    optimizer: Tensors
    server: Shared
    memory: Store
    air: Air = Air()
    versions: Mapping[int, Broadcast] = field(default_factory=dict)
    sent: Sent | None = None

    @classmethod
    def first(cls, plan: Plan, task: Task, seed: int, memory: Store, model: Model | None = None) -> State:
        """The state before the first round."""
        model = model or task.initial()
        parts = {"local": plan.local.server(task.layout), "codec": plan.codec.server(task.layout)}
        server = {part: {n: t.to(task.device) for n, t in tensors.items()} for part, tensors in parts.items()}
        return cls(0, seed, model, plan.optimizer.init(model.theta), server, memory)

    def key(self, round: int | None = None) -> Key:
        """The key of everything drawn in the coming round, or in another one."""
        return Key(self.seed).fold("round", self.round if round is None else round)

    @cached_property
    def broadcast(self) -> Broadcast:
        """What clients that start in the coming round may know."""
        model = self.model if self.sent is None else self.model._replace(theta=self.sent.theta)
        return Broadcast(self.round, model, {part: public(tensors) for part, tensors in self.server.items()})

    def version(self, birth: int) -> Broadcast:
        """What clients were told that started in this round, which is the coming one or an earlier one."""
        return self.broadcast if birth == self.round else self.versions[birth]


def versions(state: State, air: Air) -> dict[int, Broadcast]:
    """The models that somebody still works from who is in the air when the round has closed."""
    if not air.flights:
        return {}
    kept, births = {**state.versions, state.round: state.broadcast}, set(map(_birth, air.flights))
    for gone in kept.keys() - births:
        del kept[gone]
    return kept
