"""Parts of other packages, checked by `mypy --strict`: by inheritance, and a pace without it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from atoll.base.random import Key
from atoll.compute.batches import ClientBatch
from atoll.compute.layout import Layout
from atoll.compute.task import Task
from atoll.plan.aggregate import Mean
from atoll.plan.codec import Codec, ErrorFeedback, TopK
from atoll.plan.local import Gradient, Train
from atoll.plan.optimizer.rules import sgd
from atoll.plan.plan import Plan
from atoll.plan.protocols import (
    Aggregator,
    Broadcast,
    Cohort,
    Conflict,
    Contribution,
    Declared,
    Ids,
    Local,
    Open,
    Pace,
    Population,
    RoundInfo,
    Sampler,
    Slots,
    Tensors,
    Total,
)


@dataclass(frozen=True, repr=False)
class Halved(Local):
    batch: int | None
    keep: tuple[str, ...] = ()
    numerics = "loop"

    def contribute(
        self, broadcast: Broadcast, lanes: ClientBatch, memory: Tensors, key: Key, task: Task
    ) -> tuple[Contribution, Tensors]:
        return Gradient(self.batch).contribute(broadcast, lanes, memory, key, task)


@dataclass(frozen=True, repr=False)
class Clip(Codec):
    bound: float

    def encode(self, x: Tensor, memory: Tensors, shared: Tensors, key: Key) -> tuple[Tensor, Tensors, Tensors, Tensors]:
        norm = x.norm(dim=-1, keepdim=True).clamp(min=self.bound)
        return x * (self.bound / norm), {}, {"clipped": (norm > self.bound).sum(-1)}, memory

    def declare(self, layout: Layout) -> Mapping[str, Declared]:
        return {
            "update": Declared(layout.d, layout.dtype, "mean", self.bound),
            "clipped": Declared(1, torch.int64, "sum"),
        }


@dataclass(frozen=True, repr=False)
class Rule(Aggregator):
    linear = True

    def zero(self) -> object:
        return Mean().zero()

    def fold(self, partial: object, contribution: Contribution, ids: Ids) -> object:
        return partial

    def merge(self, a: object, b: object) -> object:
        return a

    def total(self, partial: object) -> Total:
        raise NotImplementedError

    def finalize(self, total: Total, info: RoundInfo) -> Total:
        return total

    def conflicts(self, slots: Slots) -> Iterable[Conflict]:
        if slots.pace.asynchronous:
            yield Conflict("given.", "required.", "why.", "Sync()")


@dataclass(frozen=True, repr=False)
class First(Sampler):
    def __call__(self, population: Population, round: int, key: Key) -> Cohort:
        return Cohort(torch.zeros(1, dtype=torch.int64), torch.tensor(1.0))


@dataclass(frozen=True)
class Waiting:
    """A pace that inherits nothing: a frozen dataclass satisfies the read-only members."""

    deadline_s: float | None = None
    asynchronous: bool = False
    replaces_arrivals: bool = False
    partial: bool = False

    def should_close(self, open: Open) -> bool:
        return open.arrived >= open.wanted

    def cohort_size(self, n: int) -> int:
        return n

    def required(self, started: int) -> int:
        return started

    def may_start(self, starts: int) -> bool:
        return True

    def staleness_weight(self, staleness: int) -> float:
        return 1.0

    def conflicts(self, slots: Slots) -> Iterable[Conflict]:
        return ()


pace: Pace = Waiting()
plan = Plan(Halved(None), Rule(), sgd(0.1), cohort=First(), codec=Clip(1.0) >> TopK(0.1), pace=pace)
small = replace(plan, codec=ErrorFeedback(TopK(0.05)), local=Train(sgd(0.1), epochs=1))
