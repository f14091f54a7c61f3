"""Computes one round of any algorithm on any engine.

    cohort = sampler(clients, round)                     the clients that participate in the round
    gᵢ     = local(θ, dataᵢ)                             an update, uphill: a gradient, or θ − θᵢ after local steps
    mᵢ     = encode(gᵢ)                                  clip, compress
    total  = Σ_b s(b) · decode_sum_b( Σ_{i from b} lift(decode(mᵢ), wᵢ) )
    g      = finalize(server_update(total))              the codec's server part, then the mean or a robust rule
    θ⁺     = optimizer(θ, g, round)                      the server always descends

b is the model version: the round whose θ client i started from. s(b) is its staleness weight, 1 in synchronous rounds.
wᵢ is the weight of client i, usually the number of its training rows. `lift` multiplies by wᵢ and represents the
product so that it can be added without rounding.

`step` computes this formula for every algorithm on every engine. An algorithm is a `Plan`: a value with a part in each
slot.

Tests: tests/identities/test_one_algorithm.py, tests/identities/test_flights.py, tests/surface/test_hops.py
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from atoll.base.entropy import round_secret
from atoll.base.errors import RunError, UsageError
from atoll.base.lines import Line, Part
from atoll.base.markup import html_table, mimebundle
from atoll.base.names import ROWS_OF, metric_name
from atoll.base.random import Key, SecretKey
from atoll.compute.layout import Layout
from atoll.compute.model_state import Model
from atoll.compute.task import Task
from atoll.compute.tensor_notes import norm
from atoll.plan.buffers import join_buffers
from atoll.plan.codec.stage import Identity, roundtrip
from atoll.plan.conflicts import check_noised_sum
from atoll.plan.form import Buffer
from atoll.plan.in_flight import InFlight
from atoll.plan.local.correcting import CORRECTION
from atoll.plan.local.correction import CORRECTIONS
from atoll.plan.local.train import Train
from atoll.plan.plan import Plan
from atoll.plan.protocols import (
    Aggregator,
    Cohort,
    Contribution,
    Declared,
    Population,
    RoundInfo,
    Sampler,
    Shared,
    Tensors,
    Total,
)
from atoll.plan.state import DownlinkState, State, versions


class Failure(NamedTuple):
    """A lost contribution: its client, its round, the stage that failed, and the cause."""

    client: int
    round: int
    stage: str
    cause: str


class FlightTimes(NamedTuple):
    """The times of one flight in simulated seconds, and its outcome.

    The client has received the model at `loaded` and has finished its computation at `computed`.
    `version` is the round whose model the client started from.
    """

    number: int
    client: int
    version: int
    start: float
    loaded: float
    computed: float
    end: float
    outcome: str  # "arrived", "dropped", or "late": no longer awaited


class Kept(NamedTuple):
    """The contribution of one client that the caller of `gather` requested.

    Args:
        client, repeat: the client, and the number of its earlier starts in the same round.
        version: the round whose model the client started from.
        contribution: the contribution as the local part returned it; tensors `[1, …]`.
        decoded: the contribution as the server received it, after encoding and decoding; tensors `[1, …]`.
    """

    client: int
    repeat: int
    version: int
    contribution: Contribution
    decoded: Contribution


class Gathered(NamedTuple):
    """The results of `gather`: a partial sum for each model version, and facts about the clients that contributed."""

    partials: Mapping[int, Any]
    arrived: Tensor  # int64 ids, increasing
    memory: tuple[tuple[Tensor, Tensors], ...]  # next memory of the accepted clients: (ids [K], rows [K, …])
    facts: Tensors  # one row per arrived client
    failures: tuple[Failure, ...]
    bytes_up: int
    bytes_down: int
    air: InFlight = InFlight()  # clients that stay in flight
    started: int = 0
    late: int = 0  # number of flights no longer awaited
    now: float | None = None  # seconds of the run, if there is a clock
    trips: tuple[FlightTimes, ...] = ()
    notes: tuple[str, ...] = ()  # messages to print once
    kept: tuple[Kept, ...] = ()  # the contributions that the caller requested, by version, repeat and client
    owned: str = ""  # begins the names of the tensors of `memory` that no other object uses; "": none
    void: bool = False  # no secure sum, because the server was killed after clients had opened their masks


class Engine(Protocol):
    """Runs clients and adds their contributions."""

    @property
    def population(self) -> Population: ...
    @property
    def layout(self) -> Layout: ...
    def gather(self, plan: Plan, state: State, cohort: Cohort, key: Key, keep: Collection[int] = ()) -> Gathered: ...
    def agree(self, value: bytes) -> bytes: ...  # the value of the first process


@dataclass(frozen=True, repr=False)
class Report:
    """The report of a round.

    Args:
        round: the number of the round, from 0.
        metrics: the value of each metric; the keys are names.
        cohort: the number of clients that started.
        arrived: the number of contributions that the server's step used.
        failures: the contributions that were lost.
        bytes_up, bytes_down: the bytes of all messages to the server, and of all messages to clients.
        seconds: the time to compute the round.
        fingerprint: 12 hex digits, a hash of all bits of θ: `atoll.runs.fingerprint`.
        clients: columns with one row for each contribution: the id of the client, and facts such as its rows and bytes.
        late: the number of flights that the server no longer waits for.
        flying: the number of clients in flight after the round has closed.
        now: the simulated time in seconds at the end of the round; None without a simulated clock.
        trips: the times of the flights that ended in the round; empty without a simulated clock.
        notes: messages to print once.
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
    trips: tuple[FlightTimes, ...] = ()
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        metrics = ", ".join(f"{name[:40]}={value:.5g}" for name, value in list(self.metrics.items())[:8])
        return f"Report(round={self.round}, arrived={self.arrived} of {self.cohort}, {metrics})"[:400]

    def _repr_html_(self) -> str:
        rows = [["", "value"], *([name, f"{value:.6g}"] for name, value in self.metrics.items())]
        lost = f", {len(self.failures)} failures" if self.failures else ""
        more = f"{self.bytes_up:,} bytes up, {self.bytes_down:,} bytes down, {self.seconds:.3g} s{lost}"
        return html_table(f"round {self.round}: {self.arrived} of {self.cohort} clients", rows, more)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        return mimebundle(self)

    def to(self, **changes: Any) -> Report:
        """A copy of the report in which these fields are replaced."""
        return dataclasses.replace(self, **changes)


def bind(plan: Plan, engine: Engine, task: Task | None = None) -> Plan:
    """A copy of the plan whose codecs know the layout of the model and the total weight of all clients.

    The aggregator of the copy knows the chances of the clients, except if the codec keeps a mean over all clients.

    A plan is bound once for each training. The copy equals the plan as a value. It contains no engine, data or model.

    Args:
        plan: the algorithm.
        engine: an engine that is open.
        task: the model and loss; a secure sum needs it to know the vectors of a contribution.
    Raises:
        UsageError: the plan does not fit the model or the population.
    """
    population, rule, layout = engine.population, plan.aggregator, plan.local.server_layout(engine.layout)
    if plan.releases and layout.b:
        size = layout.segment("buffers")[0].size
        raise UsageError(
            f"{plan.codec!r} with a model that has buffers.",
            "a model without buffers that a pass changes.",
            "the mean of the buffers has no bound and no noise.",
            Line(python=f"torch.nn.GroupNorm(1, {size})"),
        )
    sampler = sampler_of(plan)
    if plan.local.needs_everyone and bool((sampler(population, 0, Key(0)).chance < 1).any()):
        raise UsageError(
            f"{plan.local!r} with {sampler!r}.",
            "a sampler that selects all clients in each round.",
            "the part makes a step only with the contributions of all clients.",
            Part("Everyone()", "cohort"),
        )
    if not plan.codec.averages_all_clients:
        chance = sampler(population, 0, Key(0)).chance
        if chance.dim() and plan.local.needs_population:
            raise UsageError(
                f"{plan.local!r} with {sampler!r}.",
                "a sampler that gives all clients the same chance.",
                "the server's state is a mean over all clients, and unequal chances would change its weights.",
                Part("Uniform(10)", "cohort"),
            )
        rule = rule.bind(population, chance)
    everyone = torch.arange(population.clients, device=population.sizes.device)
    total_weight = rule.weigh(everyone, population.sizes).sum()
    codec, downlink = plan.codec.bind(layout, total_weight), plan.downlink.bind(layout)
    bound = dataclasses.replace(plan, aggregator=rule, codec=codec, downlink=downlink)
    if rule.secure is None or task is None:
        return bound
    if plan.releases:
        check_noised_sum(bound, task, population)
    return dataclasses.replace(bound, aggregator=secured(bound, task, sum_limits(bound, population)))


class SumLimits(NamedTuple):
    """The numbers from which the grid of a secure sum follows.

    Args:
        clients: the largest number of clients of a round.
        weight: the largest weight of a client.
        rows: the largest number of rows that a client processes in round 0.
    """

    clients: int
    weight: int
    rows: int


def sum_limits(plan: Plan, population: Population) -> SumLimits:
    """The limits of the secure sum of a plan, after `bind`."""
    everyone = torch.arange(population.clients, device=population.sizes.device)
    rows = int(plan.local.examples_per_round(population.sizes).max())
    weight = int(plan.aggregator.weigh(everyone, population.sizes).max())
    return SumLimits(sampler_of(plan).largest(population), weight, rows)


def summed_vectors(plan: Plan, task: Task) -> dict[str, Declared]:
    """The vectors of a contribution that a secure sum adds, the update as the codec encodes it."""
    own = {} if plan.releases else plan.local.declare(task)
    layout = plan.local.server_layout(task.layout)
    return {**own, **plan.codec.declare(layout), **plan.aggregator.added()}


def secured(plan: Plan, task: Task, limits: SumLimits) -> Aggregator:
    """The aggregator of a plan with bound codecs, which knows the grid of each vector of its secure sum."""
    return plan.aggregator.secured(summed_vectors(plan, task), *limits)


def _few(arrived: int, least: int) -> RunError:
    """The end of a run with noise if a round has too few clients for its secure sum."""
    return RunError(
        f"A round has {arrived} clients, and its secure sum needs {least}.",
        "a sum in each round.",
        "one client could decide whether the round has a sum, so a round without one would reveal more than ε.",
    )


def step(plan: Plan, state: State, engine: Engine) -> tuple[State, Report]:
    """Run one round of any algorithm on any engine.

    Args:
        plan: the algorithm, bound to the engine.
        state: the state before the round. It does not change, except for the memory of accepted clients.
        engine: runs the clients.
    Returns:
        The state after the round, and its report.
    Raises:
        RunError: more clients failed than the plan allows, or all failed with the same error. The state before the
            round remains valid.
    """
    opened = open_round(plan, state, engine)
    gathered = enough(plan, opened, engine.gather(plan, opened.state, opened.cohort, opened.key))
    closed = close_round(opened, gathered)
    for ids, rows in gathered.memory:
        state.memory.put(ids, rows, gathered.owned)
    return closed.state, closed.report


def read_only_memory(plan: Plan) -> str:
    """The prefix of the names of client memory that only corrections of this package receive and return, or "".

    They neither change a tensor that they receive nor use one that they have returned, so it needs no copy.
    """
    correction = plan.local.correction if type(plan.local) is Train else None
    parts = () if correction is None else correction.parts or (correction,)
    return f"local/{CORRECTION}" if parts and all(type(part) in CORRECTIONS for part in parts) else ""


class Opened(NamedTuple):
    """A round before its clients train.

    Args:
        state: the state before the round, with the updated downlink.
        cohort: the clients that start; empty if clients of earlier rounds are in flight.
        key: the key of all random numbers in the round.
        plan: the algorithm, after `bind`.
        population: all clients.
        entropy: the secret key of the round, equal in all processes of the training.
        layout: the layout of the server's model, with the rules of buffers.
    """

    state: State
    cohort: Cohort
    key: Key
    plan: Plan
    population: Population
    entropy: SecretKey
    layout: Layout


def open_round(plan: Plan, state: State, engine: Engine) -> Opened:
    """Begin a round: update the model that clients will receive, and select the cohort. No client computes yet.

    If the plan compresses the downlink, clients receive an approximation of the server's model. `update_downlink`
    moves this approximation towards the model by a compressed delta.

    Args:
        plan: the algorithm, bound to the engine.
        state: the state after the previous round. It does not change.
        engine: supplies the population. It also sends random numbers of the primary process to all processes, so
            that all use the same ones.
    Returns:
        The opened round, for `engine.gather` and `close_round`.
    """
    key, population = state.key(), engine.population
    if any(part.uses_entropy for part in (plan.local, plan.codec, plan.aggregator)):
        key = dataclasses.replace(key, secret=round_secret(state.round, engine.agree))
    state = update_downlink(plan, state, key)
    cohort = draw_cohort(plan, state, population, key.entropy if plan.releases else key)
    entropy = key.entropy if key.secret else SecretKey(state.seed)
    return Opened(state, cohort, key, plan, population, entropy, plan.local.server_layout(engine.layout))


class Closed(NamedTuple):
    """A round after its clients have trained.

    Args:
        total: the exact sum of all contributions, after the server's half of the codec and of the local part.
        mean: the aggregate that the server optimizer receives; its sums are divided by rows.
        state: the state after the round. The new client memory is not stored yet.
        report: the report of the round.
    """

    total: Total
    mean: Total
    state: State
    report: Report


def close_round(opened: Opened, gathered: Gathered) -> Closed:
    """Decode the sum, aggregate, and make the server's step. Except for entropy this is a pure function.

    g = finalize(server_update(Σ_b s(b) · decode_sum_b(partial_b))) ;  θ⁺ = optimizer(θ, g, round)

    Args:
        opened: the result of `open_round`.
        gathered: the result of `engine.gather`.
    Returns:
        The total, the mean, the state after the round, and the report.
    """
    state, cohort, key, plan, population, entropy, _ = opened
    everyone = torch.arange(population.clients, device=population.sizes.device)
    total_weight = plan.aggregator.weigh(everyone, population.sizes).sum()
    info = RoundInfo(state.round, population, gathered.started, cohort.chance, entropy, total_weight.double())
    total, server = server_update(plan, decode_sums(plan, state, gathered), state, info, key)
    mean = finalize(plan, total, info)
    known = state.server["sampler"] or plan.sampler.memory(population)
    server = {**server, "sampler": plan.sampler.observe(known, gathered.arrived, gathered.facts)}
    after = descend(plan, state, mean, server, gathered.air, opened.layout)
    if plan.local.needs_everyone and bool(total.weight != total_weight):
        arrived, clients = len(gathered.arrived), population.clients
        note = f"{arrived} of {clients} clients arrived: no step, since {plan.local!r:.80} needs all."
        gathered = gathered._replace(notes=(*gathered.notes, note))
    return Closed(total, mean, after, report(plan, state, gathered, mean))


def enough(plan: Plan, opened: Opened, gathered: Gathered) -> Gathered:
    """The results of a round; without contributions if fewer arrived than a sum may have: then each is a failure.

    With noise a round of few ends the run, since a client could decide whether it has a sum. A kill of the server is no
    decision of a client: the round is then one without contributions, which releases noise.
    """
    arrived, least = gathered.arrived, plan.aggregator.least(gathered.started)
    if len(arrived) >= least:
        return gathered
    if plan.releases and plan.aggregator.secure is not None and not gathered.void:
        raise _few(len(arrived), least)
    cause = f"{len(arrived)} clients in a sum of at least {least}"
    lost = tuple(Failure(client, opened.state.round, "sum", cause) for client in arrived.tolist())
    facts = {name: column[:0] for name, column in gathered.facts.items()}
    return gathered._replace(
        partials={opened.state.round: plan.aggregator.zero()},
        arrived=arrived[:0],
        failures=gathered.failures + lost,
        memory=(),
        facts=facts,
    )


def update_downlink(plan: Plan, state: State, key: Key) -> State:
    """Update the downlink by a compressed delta: θ̂⁺ = θ̂ + C(θ − θ̂). The next delta contains the error of C."""
    if plan.downlink == Identity():
        return state
    theta = state.model.theta
    if state.sent is None:
        return dataclasses.replace(state, sent=DownlinkState(theta, ()))
    delta, key = (theta - state.sent.theta)[None], _downlink_key(key, theta)
    payload, side, _, _ = plan.downlink.encode(delta, {}, {}, key)
    length = int(plan.downlink.sizes(payload, side)[0])
    received = state.sent.theta + roundtrip(plan.downlink, payload, side, key)[0]  # type: ignore[arg-type]
    try:
        message = plan.downlink.to_bytes(payload, side)[0]
    except UsageError:  # a codec of the user without a form, which a network refuses
        message = b""
    return dataclasses.replace(state, sent=state.sent.append(received, length, message))


def apply_deltas(plan: Plan, theta: Tensor, messages: Sequence[Buffer], keys: Iterable[Key]) -> Tensor:
    """The parameters after some deltas of the downlink, oldest first: θ̂ ← θ̂ + C(θ − θ̂) for each.

    Args:
        plan: the algorithm, after `bind`.
        theta: θ̂ of the client, `[d]`.
        messages: the bytes of each delta.
        keys: the key of the round of each delta.
    Returns:
        θ̂ of the server, to the bit on the same kind of machine.
    Raises:
        MessageError: the bytes are not a message of the codec.
    """
    for message, key in zip(messages, keys, strict=True):
        payload, side = plan.downlink.from_bytes([message])
        theta = theta + roundtrip(plan.downlink, payload, side, _downlink_key(key, theta))[0]  # type: ignore[arg-type]
    return theta


def _downlink_key(key: Key, theta: Tensor) -> Key:
    return key.fold("downlink").of(theta.new_zeros(1, dtype=torch.int64))


def sampler_of(plan: Plan) -> Sampler:
    """The sampler of a plan, for the number of clients that its pace starts."""
    return plan.sampler.resized(plan.pace.cohort_size) or plan.sampler


_EMPTY = Cohort(torch.empty(0, dtype=torch.int64), torch.ones((), dtype=torch.float64))


def draw_cohort(plan: Plan, state: State, population: Population, key: Key) -> Cohort:
    """Draw the cohort of a round. It is empty if clients are in flight: then the engine starts only missing clients."""
    if state.air.flights:
        return _EMPTY
    sampler = sampler_of(plan)
    memory = state.server["sampler"] or sampler.memory(population)
    cohort = select(sampler.with_memory(memory), population, state.round, key.fold("cohort"))
    if plan.aggregator.secure is not None and len(cohort.ids) > sampler.largest(population):
        return cohort._replace(ids=cohort.ids[:0])  # its sum could leave the ring: a round without an update
    return cohort


def select(sampler: Sampler, population: Population, round: int, key: Key) -> Cohort:
    """The cohort that a sampler selects, after a check of its ids.

    Args:
        sampler: the sampler of a plan.
        population: all clients.
        round: the number of the round, from 0.
        key: the key of the random numbers of the sampler.
    Raises:
        UsageError: the ids are not int64 `[n]`, do not increase, or are not ids of clients. The error states the
            sampler.
    Example:
        >>> from atoll.plan.sampler import Everyone
        >>> select(Everyone(), Population(3, torch.tensor([5, 5, 5])), 0, Key(0)).ids.tolist()
        [0, 1, 2]
    """
    cohort = sampler(population, round, key)
    ids = cohort.ids
    wrong = ""
    if ids.dtype != torch.int64 or ids.dim() != 1:
        wrong = f"ids of shape {tuple(ids.shape)} and dtype {ids.dtype}"
    elif len(ids) and (int(ids[0]) < 0 or int(ids[-1]) >= population.clients or bool((ids[1:] <= ids[:-1]).any())):
        wrong = f"the ids {ids[:8].tolist()}{' …' if len(ids) > 8 else ''} of {population.clients} clients"
    if wrong:
        raise UsageError(
            f"{sampler!r} selected {wrong} in round {round}.",
            f"int64 ids that increase, from 0 to {population.clients - 1}.",
            "an id is the number of a client, and a client is selected at most once in a round.",
            Part("Uniform(10)", "cohort"),
        )
    return cohort


def decode_sums(plan: Plan, state: State, gathered: Gathered) -> Total:
    """Σ_b s(b) · decode_sum_b(partial_b): each model version's sum is decoded with its own key and weighted.

    If clients send their models, Σ wᵢ (θ_b − θᵢ) becomes Σ wᵢ (θ − θᵢ). The server knows θ_b and Σ wᵢ.

    The counts become float64, because torch divides a number by a whole one in float32, and parts divide by them.
    """
    totals, rule = [], plan.aggregator.in_round(state.server["aggregator"], state.key().fold("aggregate"))
    for version, partial in sorted(gathered.partials.items()):
        total = rule.total(partial)
        if "update" in total.means:
            update = total.means["update"]
            if plan.codec.per_sum:
                # with the key that the clients used to encode
                update = plan.codec.decode_sum(update, state.key(version).fold("codec"))
            if plan.local.sends == "model":
                update = update + total.weight * model_drift(state, version)
            factor = plan.pace.staleness_weight(state.round - version)
            update = update if factor == 1 else update * factor
            total = total._replace(means={**total.means, "update": update})
        totals.append(total)
    whole = sum_totals(totals)
    return whole._replace(weight=whole.weight.double(), arrived=whole.arrived.double())


def model_drift(state: State, version: int) -> Tensor:
    """θ − θ_b, float64 `[d]`: the change of the model since the version b."""
    return state.model.theta.double() - state.version(version).model.theta.double()


def sum_totals(totals: list[Total]) -> Total:
    """The sum of the totals of several model versions."""
    first, *rest = totals
    for other in rest:
        first = Total(
            _sum_of(first.means, other.means),
            _sum_of(first.sums, other.sums),
            first.weight + other.weight,
            first.arrived + other.arrived,
            {n: torch.maximum(t, other.counters[n]) for n, t in first.counters.items()},
            {n: torch.cat((t, other.per_client[n])) for n, t in first.per_client.items() if n in other.per_client},
        )
    return first


def _sum_of(a: Tensors, b: Tensors) -> dict[str, Tensor]:
    """The sum of two mappings. A name that one of them lacks counts as 0: no client of its version reported it."""
    return {**a, **b, **{n: t + b[n] for n, t in a.items() if n in b}}


def server_update(plan: Plan, total: Total, state: State, info: RoundInfo, key: Key) -> tuple[Total, Shared]:
    """Apply the server half of the codec, then that of the local part, once per round, to the exact total.

    The state of the aggregator is made from the total before them.
    """
    if plan.releases:
        total, info = _without_counts(total, info, state)
    rule = plan.aggregator.server_update(total, state.server["aggregator"], info)
    codec_info, local_info = (info._replace(entropy=info.entropy.fold(part)) for part in ("codec", "local"))
    total, codec = plan.codec.server_update(total, state.server["codec"], codec_info, key.fold("settle codec"))
    total, local = plan.local.server_update(total, state.server["local"], local_info, key.fold("settle local"))
    return total, {"local": local, "codec": codec, "aggregator": rule}


def _without_counts(total: Total, info: RoundInfo, state: State) -> tuple[Total, RoundInfo]:
    """The total and the facts of a round that do not reveal the number of clients: it is the expected one.

    The sum of an empty cohort is 0.
    """
    chance = info.chance
    n = round(float(chance.sum() if chance.dim() else chance * info.population.clients))
    count = torch.tensor(n, dtype=torch.int64)
    update = total.means.get("update", torch.zeros_like(state.model.theta, dtype=torch.float64))
    total = total._replace(means={**total.means, "update": update}, weight=count, arrived=count)
    return total, info._replace(cohort_size=n)


def finalize(plan: Plan, total: Total, info: RoundInfo) -> Total:
    """Compute the aggregate of the round, and divide every sum by the number of rows that it covers."""
    mean = plan.aggregator.finalize(total, info)
    return mean._replace(sums=per_row(mean.sums))


def descend(plan: Plan, state: State, mean: Total, server: Shared, air: InFlight, layout: Layout) -> State:
    """θ⁺ = optimizer(θ, g, round). Buffers are joined by their rules, counters by their maximum.

    Without an update θ stays.
    """
    model, optimizer, flying = state.model, state.optimizer, versions(state, air)
    if "update" in mean.means:
        g = mean.means["update"].to(model.theta)
        g = g if g.shape == model.theta.shape else g.expand_as(model.theta)
        theta, optimizer = plan.optimizer.update(model.theta, g, mean.sums, optimizer, state.round)
        buffers, counters = join_buffers(layout, model.buffers, theta, mean.means, mean.counters)
        model = Model(theta, buffers, {**model.counters, **counters}, model.fixed)
    return State(state.round + 1, state.seed, model, optimizer, server, state.memory, air, flying, state.sent)


def per_row(sums: Tensors) -> dict[str, Tensor]:
    """Divide each sum by the number of rows that it covers: by the sum `rows/NAME` if it exists, else by `rows`."""
    if "rows" not in sums:
        return {}
    values = {n: t for n, t in sums.items() if n != "rows" and not n.startswith(ROWS_OF)}
    return {n: t / sums.get(f"{ROWS_OF}{n}", sums["rows"]).clamp(min=1) for n, t in values.items()}


def _columns(arrived: Tensor, per_client: Tensors) -> dict[str, Tensor]:
    """The aggregator's columns, one row for each contribution: 0 for a client that the aggregator does not list."""
    names = per_client.keys() - {"id"}
    if not names:
        return {}
    ids, order = per_client["id"].to(arrived.device).sort(stable=True)
    at = torch.searchsorted(ids, arrived).clamp(max=max(len(ids) - 1, 0))
    found = ids[at] == arrived if len(ids) else torch.zeros_like(arrived, dtype=torch.bool)
    out = {}
    for name in sorted(names):
        column = per_client[name].to(arrived.device)
        out[name] = column.new_zeros(len(arrived), *column.shape[1:])
        out[name][found] = column[order[at[found]]]
    return out


def report(plan: Plan, state: State, gathered: Gathered, mean: Total) -> Report:
    """Build the report of a round."""
    metrics = {metric_name(n): float(t) for n, t in mean.sums.items() if t.numel() == 1}
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
