"""The slots of the formula: what each kind of part is called with and what it gives back.

Values first, then one protocol a slot. Parts import these and nothing of one another; `plan.py` puts parts into slots.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from atoll.layout import Layout
from atoll.plan.lanes import Lanes
from atoll.rng import Key
from atoll.task import Model, Task

Tensors = Mapping[str, Tensor]
Shared = Mapping[str, Tensors]


class Population(NamedTuple):
    """Who could be at work: how many clients, and the rows each holds, int64 `[C]`."""

    clients: int
    sizes: Tensor


class Cohort(NamedTuple):
    """Who is at work in a round: ids, int64 `[n]`, and each client's chance of being there, float64 `[]` or `[C]`."""

    ids: Tensor
    chance: Tensor


class Ids(NamedTuple):
    """The starts that K rows of a contribution belong to, in the order of the rows.

    Args:
        client: client ids, int64 `[K]`.
        repeat: 0 for the first start of a client in the round that it started in, then 1, 2, …; int64 `[K]`.
    """

    client: Tensor
    repeat: Tensor

    def select(self, index: Tensor | slice) -> Ids:
        """Some of the starts, by position."""
        return Ids(self.client[index], self.repeat[index])


class Contribution(NamedTuple):
    """What K clients give. Everything but `facts` goes through the same sum."""

    means: Tensors  # [K, m] float: averaged by weight; "update" points uphill
    sums: Tensors  # [K] or [K, s] float: added as they are; "rows" counts what the other sums are about
    weight: Tensor  # [K] int64: rows held
    largest: Tensors  # [K, …] whole numbers: the largest is kept
    facts: Tensors  # [K, …]: told in the clear, for people to look at


class Total(NamedTuple):
    """The exact sum of a round: Σ w·means, Σ sums, Σ w, the number of clients, the largest counters."""

    means: Tensors
    sums: Tensors
    weight: Tensor
    arrived: Tensor
    largest: Tensors


class Broadcast(NamedTuple):
    """All that clients may know of a round: its number, the model, and what the server's half of each part adds."""

    round: int
    model: Model
    shared: Shared


@runtime_checkable
class Local(Protocol):
    """What a client computes from θ and its own rows. `atoll.plan.part.Part` gives every method but `contribute`."""

    def memory(self, layout: Layout) -> Tensors: ...
    def server(self, layout: Layout) -> Tensors: ...
    def settle(self, total: Total, server: Tensors, key: Key) -> tuple[Total, Tensors]: ...
    def width(self, rows: int) -> int: ...
    def contribute(
        self, broadcast: Broadcast, lanes: Lanes, memory: Tensors, key: Key, task: Task
    ) -> tuple[Contribution, Tensors]: ...


@runtime_checkable
class Stage(Protocol):
    """One stage of a codec: a client's half (`encode`) and three halves of the server's."""

    opens: bool
    decodes: bool

    def at(self, layout: Layout, everyone: Tensor | int | None = None) -> Stage: ...
    def memory(self, layout: Layout) -> Tensors: ...
    def server(self, layout: Layout) -> Tensors: ...
    def encode(
        self, x: Tensor, memory: Tensors, shared: Tensors, key: Key
    ) -> tuple[Tensor, Tensors, Tensors, Tensors]: ...
    def open(self, x: Tensor, side: Tensors) -> Tensor: ...
    def decode(self, x: Tensor, key: Key) -> Tensor: ...
    def nbytes(self, layout: Layout) -> int: ...
    def sizes(self, payload: Tensor, side: Tensors) -> Tensor: ...
    def settle(self, total: Total, server: Tensors, key: Key) -> tuple[Total, Tensors]: ...


@runtime_checkable
class Aggregator(Protocol):
    """How contributions become one. `fold` and `merge` are associative and commutative, to the bit."""

    linear: bool

    def zero(self) -> Any: ...
    def fold(self, partial: Any, contribution: Contribution) -> Any: ...
    def merge(self, a: Any, b: Any) -> Any: ...
    def total(self, partial: Any) -> Total: ...
    def finish(self, total: Total, cohort: Cohort, population: Population) -> Total: ...


@runtime_checkable
class Sampler(Protocol):
    def __call__(self, population: Population, round: int, key: Key) -> Cohort: ...


@runtime_checkable
class Pace(Protocol):
    """When a round closes; pure. `open` is what `atoll.plan.pace.Open` says."""

    flies_on: bool
    refills: bool

    def asks(self, n: int) -> int: ...
    def wants(self, started: int) -> int: ...
    def may_start(self, starts: int) -> bool: ...
    def closes(self, open: Any) -> bool: ...
    def discount(self, staleness: int) -> float: ...


@runtime_checkable
class Optimizer(Protocol):
    def init(self, theta: Tensor) -> Tensors: ...
    def update(self, theta: Tensor, g: Tensor, sums: Tensors, state: Tensors, round: int) -> tuple[Tensor, Tensors]: ...
    def lr_at(self, round: int, state: Tensors) -> float: ...
