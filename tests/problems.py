"""Small problems for tests: clients, a task, and some rounds of a plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from atoll.base.random import Key
from atoll.compute import compiled, native
from atoll.compute.task import Task
from atoll.data import ArrayRows, Clients
from atoll.engine.client_state import Memory
from atoll.engine.inprocess import InProcessEngine
from atoll.plan.plan import Plan
from atoll.plan.round import Report, bind, step
from atoll.plan.state import State


def _no_native() -> str:
    """The reason why this machine has no native code; "" if it has. A compiler error on our source raises."""
    try:
        native.compiler()
    except native.BuildError as why:
        return f"no native code: {why}"
    for dtype in (torch.float32, torch.float64):
        compiled.load_libraries(dtype)
    return ""


NO_NATIVE = _no_native()
needs_native = pytest.mark.skipif(bool(NO_NATIVE), reason=NO_NATIVE)
COMPILED = pytest.param("compiled", marks=needs_native)


def federation(x: Tensor, y: Tensor, sizes: Sequence[int], order: Tensor | None = None) -> Clients:
    """Clients with the rows of (x, y) in the given order; client i has `sizes[i]` rows."""
    ends = torch.tensor([0, *sizes]).cumsum(0)
    classes = None if y.is_floating_point() else tuple(map(str, range(int(y.max()) + 1)))
    return Clients(
        "test",
        ArrayRows(x, y, y.is_floating_point()),
        torch.arange(len(x)) if order is None else order,
        ends,
        None,
        "regression" if classes is None else "classification",
        classes,
        tuple(x.shape[1:]),
    )


def regression(sizes: Sequence[int], features: int = 3, seed: int = 0, dtype: torch.dtype = torch.float64) -> Clients:
    """Clients with y = a·x + b + noise, all of order 1."""
    rows = sum(sizes)
    draw = Key(seed).fold("regression").normal(rows * (features + 1)).reshape(rows, features + 1)
    x, noise = draw[:, :features], draw[:, features]
    y = x @ torch.linspace(1.0, 2.0, features, dtype=torch.float64) + 0.5 + 0.1 * noise
    return federation(x.to(dtype), y.to(dtype), sizes)


def classification(
    sizes: Sequence[int],
    shape: tuple[int, ...] = (4,),
    classes: int = 3,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Clients:
    """Clients with normal features around one mean for each class."""
    rows, width = sum(sizes), torch.Size(shape).numel()
    key = Key(seed).fold("classification")
    y = key.fold("y").integers(rows, classes)
    y[:classes] = torch.arange(classes)[:rows]
    means = key.fold("means").normal(classes * width).reshape(classes, width)
    x = key.fold("x").normal(rows * width).reshape(rows, width) + means[y]
    return federation(x.reshape(rows, *shape).to(dtype), y, sizes)


def tokens(sizes: Sequence[int], length: int = 5, vocabulary: int = 7, classes: int = 3) -> Clients:
    """Clients with rows of token ids. The class of a row follows from its first token."""
    rows = sum(sizes)
    x = Key(0).fold("tokens").integers(rows * length, vocabulary).reshape(rows, length)
    y = x[:, 0] % classes
    y[:classes] = torch.arange(classes)[:rows]
    return federation(x, y, sizes)


def task_of(
    module: nn.Module,
    data: Clients,
    numerics: str = "lanes",
    dtype: torch.dtype = torch.float64,
    loss: str | None = None,
) -> Task:
    """The task of a model on this data, with its body fixed."""
    loss = loss or ("mse" if data.kind == "regression" else "cross_entropy")
    return replace(Task.of(module, loss, (), dtype), numerics=numerics).with_fields(data.fields)


def seeded(make: type[nn.Module] | object, *args: object, seed: int = 0) -> nn.Module:
    """The task of a model on this data, with a fixed backend."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return make(*args)  # A module whose initial weights depend on the seed only.


def run(
    plan: Plan, engine: InProcessEngine, rounds: int = 2, seed: int = 0, init: Tensor | None = None
) -> tuple[State, list[Report]]:
    """Run some rounds from the start. Return the state after them and their reports."""
    plan, task = bind(plan, engine, engine.task), engine.task
    model = task.initial() if init is None else task.initial()._replace(theta=init)
    state, reports = State.first(plan, task, seed, Memory(plan.memory(task)), model), []
    for _ in range(rounds):
        state, report = step(plan, state, engine)
        reports.append(report)
    return state, reports


def far(a: Tensor, b: Tensor) -> float:
    """|a − b| / max(1, |b|): absolute for small numbers, relative for large ones."""
    a, b = a.double(), b.double()
    return float((a - b).norm() / b.norm().clamp(min=1.0))


@contextmanager
def threads(n: int) -> Iterator[None]:
    """Let torch use n threads inside the context."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)
