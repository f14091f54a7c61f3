"""The one algorithm and its slots.

    cohort = sampler(clients, round)                     who is at work
    gᵢ     = local(θ, dataᵢ)                             an update, uphill: a gradient, or θ − θᵢ after local steps
    mᵢ     = encode(gᵢ)                                  clip, compress
    total  = Σ_b s(b) · decode_b( Σ_{i born b} lift(open(mᵢ), wᵢ) )
    g      = finish(settle(total))                       the mean, or a robust rule
    θ⁺     = optimizer(θ, g, round)                      the server always descends

`step` is this, once, for every algorithm and every engine. An algorithm is a `Plan`: a value with a part in each slot.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from atoll.errors import UsageError
from atoll.fields import repaired
from atoll.grammar import Value
from atoll.known import norm
from atoll.layout import Layout
from atoll.plan.codec.stage import Identity, roundtrip
from atoll.plan.conflicts import check
from atoll.plan.flight import Air
from atoll.plan.optimizer import sgd
from atoll.plan.pace import Sync
from atoll.plan.protocols import (
    Aggregator,
    Broadcast,
    Cohort,
    Local,
    Optimizer,
    Pace,
    Population,
    Sampler,
    Shared,
    Stage,
    Tensors,
    Total,
)
from atoll.plan.sampler import Everyone, Uniform, fraction
from atoll.rng import Key
from atoll.task import Model, Task

_birth = operator.itemgetter(1)  # of a flight; half the time of its name


class Failure(NamedTuple):
    """One contribution that was lost: whose, in which round, at which stage, and why."""

    client: int
    round: int
    stage: str
    cause: str


class Trip(NamedTuple):
    """One flight on the clock, in seconds of the run: it started, had the model, had computed, and ended, and how."""

    number: int
    client: int
    birth: int
    start: float
    loaded: float
    computed: float
    end: float
    fate: str  # "arrived", "dropped", or "late": no longer awaited


class Gathered(NamedTuple):
    """What an engine brings back: a partial sum for each birth, and the record of who gave it."""

    partials: Mapping[int, Any]
    arrived: Tensor  # int64 ids, rising
    memory: tuple[tuple[Tensor, Tensors], ...]  # what the accepted clients keep: (ids [K], rows [K, …])
    facts: Tensors  # one row an arrived client
    failures: tuple[Failure, ...]
    bytes_up: int
    bytes_down: int
    air: Air = Air()  # what flies on
    started: int = 0
    late: int = 0  # no longer awaited
    now: float | None = None  # seconds of the run, where there is a clock
    trips: tuple[Trip, ...] = ()
    notes: tuple[str, ...] = ()  # what is said once, when it happens


class Store(Protocol):
    """What clients keep between rounds: rows appear on first touch. `first` is what a client keeps before that."""

    first: dict[str, Tensor]

    def take(self, ids: Tensor) -> Tensors: ...
    def put(self, ids: Tensor, rows: Tensors) -> None: ...


class Engine(Protocol):
    """Where clients run and how the sum is taken."""

    @property
    def population(self) -> Population: ...
    @property
    def layout(self) -> Layout: ...
    def gather(self, plan: Plan, state: State, cohort: Cohort, key: Key) -> Gathered: ...


@dataclass(frozen=True, repr=False)
class Plan(Value):
    """An algorithm, as a value: a part in each slot of the formula.

    θ⁺ = optimizer(θ, finish(settle(Σ lift(open(encode(local(θ, dataᵢ))), wᵢ))))

    Args:
        local: what a client computes.
        aggregator: how contributions become one.
        optimizer: how the server descends.
        cohort: who is at work: a sampler; None is everyone, an int that many, a float that fraction.
        codec: what happens to an update on its way.
        pace: when a round closes.
        downlink: what happens to the model's change on its way to the clients; the server keeps what was lost of it.
        max_failed: the largest fraction of a cohort that may fail before the run ends, in [0, 1].
    Raises:
        UsageError: a slot holds something else than a part for it, or two parts cannot stand beside each other.
    Example:
        >>> from atoll.plan.local import Gradient
        >>> from atoll.plan.aggregate import Mean
        >>> Plan(Gradient(), Mean(), sgd(0.1))
        Plan(Gradient(), aggregator=Mean(), optimizer=sgd(0.1))
    """

    local: Local
    aggregator: Aggregator
    optimizer: Optimizer = field(default_factory=lambda: sgd(1.0))
    cohort: Sampler | int | float | None = field(default_factory=Everyone)
    codec: Stage = field(default_factory=Identity)
    pace: Pace = field(default_factory=Sync)
    downlink: Stage = field(default_factory=Identity)
    max_failed: float = 0.5

    def __post_init__(self) -> None:
        if not isinstance(self.max_failed, (int, float)) or not 0 <= self.max_failed <= 1:
            raise UsageError(
                f"max_failed = {self.max_failed!r}.",
                "a fraction in [0, 1].",
                "it is the part of a cohort that may fail before the round is given up.",
                repaired(self, max_failed=0.5),
            )
        object.__setattr__(self, "cohort", _sampler(self.cohort))
        check(self)

    @property
    def sampler(self) -> Sampler:
        """Who is at work in a round, as a part."""
        return self.cohort  # type: ignore[return-value]

    def __str__(self) -> str:
        """The formula with its slots filled in."""
        return "\n".join(
            (
                f"cohort = {self.sampler!r}",
                f"gᵢ     = {self.local!r}(θ, dataᵢ)",
                f"mᵢ     = {self.codec!r}(gᵢ)",
                f"g      = {self.aggregator!r}(mᵢ, wᵢ)          pace {self.pace!r}",
                f"θ⁺     = {self.optimizer!r}(θ, g, round)",
                *([] if self.downlink == Identity() else [f"θ̂⁺     = θ̂ + {self.downlink!r}(θ⁺ − θ̂)"]),
            )
        )

    def at(self, engine: Engine) -> Plan:
        """The same plan, its codec told where it works; told once for each engine."""
        known = self.__dict__.get("_at")
        if known is not None and known[0] is engine:
            return known[1]  # type: ignore[no-any-return]
        placed = self._placed(engine)
        for plan in (self, placed):
            object.__setattr__(plan, "_at", (engine, placed))
        return placed

    def _placed(self, engine: Engine) -> Plan:
        sizes = engine.population.sizes
        weights = torch.ones_like(sizes) if self.aggregator.weights == "equal" else sizes
        codec, downlink = self.codec.bind(engine.layout, weights.sum()), self.downlink.bind(engine.layout)
        return dataclasses.replace(self, codec=codec, downlink=downlink)

    def memory(self, layout: Layout) -> dict[str, Tensor]:
        """What one client keeps before its first round, by `part/name`."""
        return _joined({"local": self.local.memory(layout), "codec": self.codec.memory(layout)})


def _sampler(cohort: Any) -> Sampler:
    match cohort:
        case None:
            return Everyone()
        case bool():
            pass
        case int():
            return Uniform(cohort)
        case float():
            return fraction(cohort)
        case Sampler() if not isinstance(cohort, type):
            return cohort
    raise UsageError(
        f"cohort = {cohort!r}.",
        "a sampler, a number of clients, a fraction of them, or None for everyone.",
        write="Uniform(10)",
    )


def _joined(parts: Mapping[str, Tensors]) -> dict[str, Tensor]:
    return {f"{part}/{name}": t for part, tensors in parts.items() for name, t in tensors.items()}


def part_of(tensors: Tensors, part: str) -> dict[str, Tensor]:
    """The tensors of one part, out of those of all parts."""
    return {n.removeprefix(f"{part}/"): t for n, t in tensors.items() if n.startswith(f"{part}/")}


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


@dataclass(frozen=True)
class Report:
    """What happened in a round.

    Args:
        round: from 0.
        metrics: by name.
        cohort: how many started.
        arrived: how many contributions are in the step.
        failures: contributions that were lost.
        bytes_up, bytes_down: of all messages.
        seconds: that the round took to compute.
        fingerprint: 12 hex digits that stand for all bits of θ: `atoll.digest`.
        clients: columns, one row a contribution: who, and what it told in the clear.
        late: how many were no longer awaited.
        flying: how many are at work when the round has closed.
        now: seconds of the run on the clock, where there is one.
        trips: flights that ended in the round, on the clock.
        notes: what is said once, when it happens.
    """

    round: int
    metrics: Mapping[str, float]
    cohort: int
    arrived: int
    failures: tuple[Failure, ...]
    bytes_up: int
    bytes_down: int
    seconds: float = 0.0
    fingerprint: str = ""
    clients: Mapping[str, Any] = field(default_factory=dict)
    late: int = 0
    flying: int = 0
    now: float | None = None
    trips: tuple[Trip, ...] = ()
    notes: tuple[str, ...] = ()

    def to(self, **changes: Any) -> Report:
        """The same report with some fields replaced."""
        return dataclasses.replace(self, **changes)


def step(plan: Plan, state: State, engine: Engine) -> tuple[State, Report]:
    """One round of any algorithm on any engine.

    Args:
        plan: the algorithm.
        state: where it stands; unchanged but for what accepted clients keep.
        engine: where the clients run.
    Returns:
        The state after the round, and the report of it.
    Raises:
        RunError: more clients failed than the plan allows, or the same error struck all of them. The state is
            still good.
    """
    key, plan = state.key(), plan.at(engine)
    state = tell(plan, state, key)
    cohort = opening(plan, state, engine.population, key)
    gathered = engine.gather(plan, state, cohort, key)
    total = decode_sums(plan, state, gathered)
    info = round_info(state, engine, cohort, gathered.started)
    total, server = server_update(plan, total, state, info, key)
    mean = finalize(plan, total, info)
    after = descend(plan, state, mean, server, gathered.air)
    for ids, rows in gathered.memory:
        state.memory.put(ids, rows)
    return after, report(plan, state, gathered, mean)


def tell(plan: Plan, state: State, key: Key) -> State:
    """What clients know of θ moves by a compressed delta: θ̂⁺ = θ̂ + C(θ − θ̂). What it lost is in the next one."""
    if plan.downlink == Identity():
        return state
    theta = state.model.theta
    if state.sent is None:
        return dataclasses.replace(state, sent=Sent(theta, ()))
    delta, key = (theta - state.sent.theta)[None], key.fold("downlink").of(theta.new_zeros(1, dtype=torch.int64))
    payload, side, _, _ = plan.downlink.encode(delta, {}, {}, key)
    length = int(plan.downlink.sizes(payload, side)[0])
    known = state.sent.theta + roundtrip(plan.downlink, payload, side, key)[0]  # type: ignore[arg-type]
    return dataclasses.replace(state, sent=state.sent.after(known, length))


_NOBODY = Cohort(torch.empty(0, dtype=torch.int64), torch.ones((), dtype=torch.float64))


def opening(plan: Plan, state: State, population: Population, key: Key) -> Cohort:
    """Who starts as a round opens with nothing in the air; with something in it, traffic starts what is missing."""
    if state.air.flights:
        return _NOBODY
    sampler = plan.sampler.resized(plan.pace.cohort_size) or plan.sampler
    return sampler(population, state.round, key.fold("cohort"))


def versions(state: State, air: Air) -> dict[int, Broadcast]:
    """The models that somebody still works from who is in the air when the round has closed."""
    if not air.flights:
        return {}
    kept, births = {**state.versions, state.round: state.broadcast}, set(map(_birth, air.flights))
    for gone in kept.keys() - births:
        del kept[gone]
    return kept


def decode_sums(plan: Plan, state: State, gathered: Gathered) -> Total:
    """Σ_b s(b) · decode_b(partial_b): each birth's sum is decoded with its own key and discounted by its staleness.

    Where clients send their models, Σ wᵢ (θ_b − θᵢ) becomes Σ wᵢ (θ − θᵢ): the server has θ_b, and the weights' sum.
    """
    totals = []
    for birth, partial in sorted(gathered.partials.items()):
        total = plan.aggregator.total(partial)
        if "update" in total.means:
            update = total.means["update"]
            if plan.codec.per_sum:
                update = plan.codec.decode_sum(
                    update, state.key(birth).fold("codec")
                )  # the key that clients encoded with
            if plan.local.sends == "model":
                update = update + total.weight * since(state, birth)
            factor = plan.pace.staleness_weight(state.round - birth)
            update = update if factor == 1 else update * factor
            total = total._replace(means={**total.means, "update": update})
        totals.append(total)
    return sum_totals(totals)


def since(state: State, birth: int) -> Tensor:
    """θ − θ_b, float64 `[d]`: how far the model has come from what clients of this birth began at."""
    return state.model.theta.double() - state.version(birth).model.theta.double()


def sum_totals(totals: list[Total]) -> Total:
    """The totals of several births as one."""
    first, *rest = totals
    for other in rest:
        first = Total(
            {n: t + other.means[n] for n, t in first.means.items()},
            {n: t + other.sums[n] for n, t in first.sums.items()},
            first.weight + other.weight,
            first.arrived + other.arrived,
            {n: torch.maximum(t, other.counters[n]) for n, t in first.counters.items()},
            {n: torch.cat((t, other.per_client[n])) for n, t in first.per_client.items() if n in other.per_client},
        )
    return first


def round_info(state: State, engine: Engine, cohort: Cohort, started: int) -> RoundInfo:
    """The facts of a round for the server's half of the parts."""
    return RoundInfo(state.round, engine.population, started, cohort.chance, entropy_of(engine))


def server_update(plan: Plan, total: Total, state: State, info: RoundInfo, key: Key) -> tuple[Total, Shared]:
    """Once a round, on the exact total: the server's half of the codec, then of the local part."""
    total, codec = plan.codec.server_update(total, state.server["codec"], info, key.fold("settle codec"))
    total, local = plan.local.server_update(total, state.server["local"], info, key.fold("settle local"))
    return total, {"local": local, "codec": codec}


def finalize(plan: Plan, total: Total, info: RoundInfo) -> Total:
    """The aggregate of the round; every sum divided by the rows that it is about."""
    mean = plan.aggregator.finalize(total, info)
    return mean._replace(sums=per_row(mean.sums))


def descend(plan: Plan, state: State, mean: Total, server: Shared, air: Air) -> State:
    """θ⁺ = optimizer(θ, g): buffers are replaced by their mean, counters by the largest; without an update θ stays."""
    model, optimizer, flying = state.model, state.optimizer, versions(state, air)
    if "update" in mean.means:
        g = mean.means["update"].to(model.theta)
        g = g if g.shape == model.theta.shape else g.expand_as(model.theta)
        theta, optimizer = plan.optimizer.update(model.theta, g, mean.sums, optimizer, state.round)
        buffers = mean.means["buffers"].to(model.buffers.dtype) if "buffers" in mean.means else model.buffers
        model = Model(theta, buffers, {**model.counters, **mean.counters}, model.fixed)
    return State(state.round + 1, state.seed, model, optimizer, server, state.memory, air, flying, state.sent)


def per_row(sums: Tensors) -> dict[str, Tensor]:
    """Each sum divided by the rows it is about."""
    if "rows" not in sums:
        return {}
    return {n: t / sums["rows"].clamp(min=1) for n, t in sums.items() if n != "rows"}


def _columns(arrived: Tensor, per_client: Tensors) -> dict[str, Tensor]:
    """The aggregator's columns, one row per contribution; a client that the aggregator does not list has 0."""
    columns = {n: t for n, t in per_client.items() if n != "id"}
    if not columns:
        return {}
    ids, order = per_client["id"].to(arrived.device).sort(stable=True)
    at = torch.searchsorted(ids, arrived).clamp(max=max(len(ids) - 1, 0))
    out = {}
    for name, column in columns.items():
        values = column.to(arrived.device)
        out[name] = values.new_zeros(len(arrived), *values.shape[1:])
        if len(ids):
            found = ids[at] == arrived
            out[name][found] = values[order[at[found]]]
    return out


def report(plan: Plan, state: State, gathered: Gathered, mean: Total) -> Report:
    """What people are told of a round."""
    metrics = {n: float(t) for n, t in mean.sums.items() if t.numel() == 1}
    if "update" in mean.means:
        metrics["gradient_norm"] = float(norm(mean.means["update"]))
    metrics["lr"] = plan.optimizer.lr_at(state.round, state.optimizer)
    return Report(
        state.round,
        metrics,
        gathered.started,
        gathered.arrived.shape[0],
        gathered.failures,
        gathered.bytes_up,
        gathered.bytes_down,
        clients={"id": gathered.arrived, **gathered.facts, **_columns(gathered.arrived, mean.per_client)},
        late=gathered.late,
        flying=len(gathered.air.flights),
        now=gathered.now,
        trips=gathered.trips,
        notes=gathered.notes,
    )
