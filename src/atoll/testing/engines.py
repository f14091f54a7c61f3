"""The contract of an engine: its results equal those of `InProcess()` to the bit, and it records failures.

Tests: tests/conformance/test_parts.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from atoll.base.errors import RunError
from atoll.compute.task import Task
from atoll.data.clients import Clients
from atoll.data.rows import Rows
from atoll.engine.client_state import Memory
from atoll.engine.inprocess import InProcessEngine
from atoll.engine.protocols import Engine
from atoll.plan.aggregate import Mean, Sum
from atoll.plan.local import Gradient, Train
from atoll.plan.optimizer.rules import adam, sgd
from atoll.plan.plan import Plan
from atoll.plan.protocols import Cohort
from atoll.plan.round import Gathered, bind, step
from atoll.plan.sampler import Everyone, Uniform
from atoll.plan.state import State
from atoll.testing.contract import conformity, copied, refused, require, same
from atoll.testing.local import clients, problem

Make = Callable[[Task, Clients], Engine]

PLANS = (
    Plan(Gradient(), Mean(), sgd(0.5)),
    Plan(Gradient(batch=4), Sum(), sgd(0.01), cohort=Uniform(5)),
    Plan(Train(sgd(0.1), epochs=2, batch=4), Mean(weights="equal", over="expected"), adam(0.01), cohort=Uniform(5)),
    Plan(Train(adam(0.01), steps=3, batch=4, keep=("optimizer", "order")), Mean(), cohort=Uniform(5)),
)


@conformity
def check_engine(make_engine: Make) -> None:
    """Check the contract of an engine.

    For each plan and each of two backends the check runs two rounds. Model, memory, metrics and bytes must equal those
    of the in-process engine to the bit.
    The order of a cohort changes nothing. An empty cohort is legal. `gather` does not change the state. A client that
    raises, or whose numbers are not finite, costs one contribution, and the engine records one failure with its id. The
    round then equals a round without this client. If all clients raise the same error, the engine raises it.

    Args:
        make_engine: builds and opens the engine to check: `make_engine(task, data) -> Engine`. A class whose
            constructor takes no task is wrapped in a function that calls `open(task, data)`, as in
            docs/engines.md. The check closes each engine that it makes.
    Raises:
        Nonconformity: the engine breaks the contract.
    Example:
        >>> check_engine(InProcessEngine)
    """
    data = clients()
    plain, norm = problem(), problem(norm=True)
    task = replace(plain, numerics="lanes")
    with _closed(make_engine) as make:
        _check_cohorts(make(task, data), task, data)
    with _closed(make_engine) as make:
        _check_failures(make, task, data)
    for numerics in ("lanes", "loop"):
        for task, plan in (*((plain, plan) for plan in PLANS), (norm, PLANS[3])):
            with _closed(make_engine) as make:
                _check_rounds(make, plan, replace(task, numerics=numerics), data)


@contextmanager
def _closed(make_engine: Make) -> Iterator[Make]:
    """A function that makes engines. They are closed at the end of the block."""
    with ExitStack() as engines:

        def make(task: Task, data: Clients) -> Engine:
            engine = make_engine(task, data)
            engines.callback(engine.close)
            return engine

        yield make


def _first(plan: Plan, task: Task) -> State:
    return State.first(plan, task, 3, Memory(plan.memory(task)))


def _client_memory(state: State, count: int) -> Any:
    return state.model, state.optimizer, state.server, state.memory.take(torch.arange(count))


def _check_rounds(make_engine: Make, plan: Plan, task: Task, data: Clients) -> None:
    engine, reference = make_engine(task, data), InProcessEngine(task, data)
    require(
        engine.population.clients == data.count and same(engine.population.sizes, data.sizes),
        f"The engine has the population {engine.population}.",
        f"{data.count} clients of {data.sizes.tolist()} rows.",
        "samplers draw from the population.",
    )
    plan = bind(plan, engine)
    ours, theirs = _first(plan, task), _first(plan, task)
    for t in range(2):
        ours, report = refused(f"The engine, in round {t} of {plan!r}", step, plan, ours, engine)
        theirs, expected = step(plan, theirs, reference)
        require(
            same(_client_memory(ours, data.count), _client_memory(theirs, data.count)),
            f"After round {t} of {plan!r} in {task.numerics} the engine's state differs from the serial one.",
            "the same bits.",
            "a plan gives the same result on every engine.",
        )
        reported = [(r.metrics, r.arrived, r.failures, r.bytes_up, r.bytes_down, r.clients) for r in (report, expected)]
        require(
            same(*reported),
            f"The engine's report of round {t} of {plan!r} is {reported[0]}.",
            f"{reported[1]}.",
            "metrics are sums over clients, and a message has a fixed length; neither depends on the engine.",
        )


def _result(plan: Plan, gathered: Gathered) -> Any:
    totals = {version: plan.aggregator.total(partial) for version, partial in gathered.partials.items()}
    return totals, gathered.arrived, gathered.facts, gathered.bytes_up


def _check_cohorts(engine: Engine, task: Task, data: Clients) -> None:
    plan = PLANS[3]
    state = _first(plan, task)
    key, chance = state.key(), torch.ones((), dtype=torch.float64)
    before = copied(_client_memory(state, data.count))
    ids = torch.tensor([0, 1, 3, 4, 5])
    forth = engine.gather(plan, state, Cohort(ids, chance), key)
    require(
        same(_client_memory(state, data.count), before),
        "gather changed the state.",
        "no change: step creates the next state, and stores memory after acceptance.",
        "a round that fails must leave the state of the round before.",
    )
    back = engine.gather(plan, state, Cohort(ids.flip(0), chance), key)
    require(
        same(forth.arrived, ids),
        f"The engine was given clients {ids.tolist()} and gathered {forth.arrived.tolist()}.",
        "all clients that did not fail, in order of their ids.",
        "the report lists them in this order.",
    )
    require(
        same(_result(plan, forth), _result(plan, back)),
        "The engine gathers another sum if the cohort is in another order.",
        "the same bits.",
        "a cohort is a set.",
    )
    no_clients = Cohort(ids[:0], chance)
    empty = refused("The engine with an empty cohort", engine.gather, plan, state, no_clients, key)
    counted = sum(int(plan.aggregator.total(partial).arrived) for partial in empty.partials.values())
    require(
        len(empty.arrived) == 0 and not empty.failures and counted == 0,
        f"The engine gathered {empty} from an empty cohort.",
        "the sum of no contribution.",
        "Poisson sampling can draw an empty cohort.",
    )


@dataclass(frozen=True, eq=False)
class _Faulty:
    """Rows of which some raise when they are read, or are not finite."""

    rows: Rows
    fails: tuple[int, int]
    raises: bool

    def __len__(self) -> int:
        return len(self.rows)

    def targets(self) -> Tensor:
        return self.rows.targets()

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        x, y = self.rows.take(index)
        bad = (index >= self.fails[0]) & (index < self.fails[1])
        if self.raises and bool(bad.any()):
            raise OSError("the disk of this client is gone")
        return x.masked_fill(bad.unsqueeze(-1), torch.inf), y


def _check_failures(make_engine: Make, task: Task, data: Clients) -> None:
    plan, victim = PLANS[0], 3
    state, everyone = _first(plan, task), Everyone()
    key, whole = state.key(), everyone((engine := make_engine(task, data)).population, 0, state.key())
    others = Cohort(whole.ids[whole.ids != victim], whole.chance)
    expected = engine.gather(plan, state, others, key)
    start, end = data.offsets[victim : victim + 2].tolist()
    for raises in (True, False):
        faulty = replace(data, rows=_Faulty(data.rows, (start, end), raises))
        kind = "raises" if raises else "gives numbers that are not finite"
        gathered = refused(
            f"The engine with a client that {kind}", make_engine(task, faulty).gather, plan, state, whole, key
        )
        require(
            [f.client for f in gathered.failures] == [victim] and all(f.cause and f.stage for f in gathered.failures),
            f"Client {victim} {kind}; the engine reports the failures {gathered.failures}.",
            f"one failure, of client {victim}, with its stage and cause.",
            "a failure is data: the user must be able to find the client.",
        )
        require(
            same(_result(plan, gathered), _result(plan, expected)),
            f"Client {victim} {kind}, and the sum of the others differs from a round without that client.",
            "the same bits.",
            "a client that failed equals a client that did not participate.",
        )
    broken = replace(data, rows=_Faulty(data.rows, (0, len(data.rows)), True))
    try:
        make_engine(task, broken).gather(plan, state, whole, key)
    except RunError:
        return
    require(
        False,
        "Every client raised the same error, and the engine continued.",
        "a RunError.",
        "if all clients fail with the same error, the cause is the program, not a client.",
    )
