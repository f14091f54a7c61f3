"""A forecast of the costs of a training: bytes, time on the clock of its fleet, and memory.

    atoll plan experiment.toml

The rounds are simulated with the sampler, pace and clock of the plan, and with messages of the length that the codec
declares. The training of clients and the step of the server are omitted. So bytes, arrivals and the times at which
rounds close are equal to those of the run.

Tests: tests/surface/test_forecast.py
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from atoll.base.errors import UsageError
from atoll.base.markup import mimebundle, preformatted
from atoll.base.random import Key, user_scope
from atoll.engine.chunk_limit import chunk_size
from atoll.engine.inprocess import InProcessEngine
from atoll.engine.simulation.arrivals import Arrivals, message_bytes, nbytes, simulate_round
from atoll.engine.simulation.fleet import rate
from atoll.plan.aggregate.exact import places
from atoll.plan.codec import Cast, Codec, Eden, ErrorFeedback, Identity, Quantize, TopK
from atoll.plan.local import Gradient, Train
from atoll.plan.pace import Buffered
from atoll.plan.plan import Plan
from atoll.plan.round import bind, open_round
from atoll.plan.state import DownlinkState, State
from atoll.privacy.account import Account, account, noise_for
from atoll.runs.format import duration, size, whole
from atoll.tools.rebuild import local_engine, training_of
from atoll.training.experiment import Experiment
from atoll.training.rounds import Training

FLIGHTS = 200_000  # largest number of simulated flights; later rounds are extrapolated from the last half
TRIED = 20_000  # the same limit for each change that is tried
LINKS = ("10 Mb/s", "100 Mb/s", "1 Gb/s", "10 Gb/s")
LADDER: tuple[Codec, ...] = (
    Cast("bf16"),
    Quantize(8),
    Eden(4),
    Eden(2),
    Eden(1),
    ErrorFeedback(TopK(0.01) >> Quantize(8)),
    ErrorFeedback(TopK(0.001) >> Quantize(8)),
)


class Parts(NamedTuple):
    """Seconds of a mean round, by the activity of a mean client. Their sum is the duration of the round."""

    download: float
    compute: float
    upload: float
    waiting: float

    @property
    def link(self) -> float:
        return self.download + self.upload

    @property
    def total(self) -> float:
        return sum(self)


class FlightTotals(NamedTuple):
    """Simulated rounds, with one entry per round, except for `parts` and `participants`.

    Args:
        up, down: bytes of all messages.
        started, arrived: numbers of clients.
        versions: number of model versions from which clients in flight still compute when the round closes.
        now: seconds of the run; empty without a fleet.
        parts: seconds of the mean round; None without a fleet.
        participants: number of different clients that arrived in any round.
    """

    up: tuple[int, ...]
    down: tuple[int, ...]
    started: tuple[int, ...]
    arrived: tuple[int, ...]
    versions: tuple[int, ...]
    now: tuple[float, ...]
    parts: Parts | None
    participants: int


class Help(NamedTuple):
    """A change of the plan: the flags to write, the parts of a round, and whether the link no longer dominates."""

    write: str
    parts: Parts
    arrivals: float  # contributions per second
    enough: bool


@dataclass(frozen=True, repr=False)
class Forecast:
    """The predicted costs of a training.

    Args:
        rounds: largest number of rounds; a stop rule may end the run earlier.
        clients: number of clients.
        parameters: d, the length of θ.
        flights: the simulated rounds.
        message: bytes of a client's message.
        exact: whether every message has this length. If not, a lossless stage may shorten it, or user code may add
            sums.
        memory: bytes by name, in the process of the server, except for `clients`, which is on disk.
        lanes: number of clients computed together.
        links: seconds per round by the rate of the server's link, for all bytes without computation; {} with a fleet.
        help: the change that shortens a round most, if one was found.
        privacy: ε of all rounds, if the plan adds noise.
        noise: the least z with which all rounds cost at most the budget, if the training has one.
    """

    rounds: int
    clients: int
    parameters: int
    flights: FlightTotals
    message: int
    exact: bool
    memory: Mapping[str, int]
    lanes: int
    links: Mapping[str, float]
    help: Help | None = None
    privacy: Account | None = None
    noise: float | None = None

    @property
    def bytes_up(self) -> int:
        """Bytes of all uploads of the run."""
        return round(_whole(self.flights.up, self.rounds))

    @property
    def bytes_down(self) -> int:
        """Bytes of all downloads of the run."""
        return round(_whole(self.flights.down, self.rounds))

    @property
    def seconds(self) -> float | None:
        """Seconds of the run on the virtual clock; None without a clock."""
        now = self.flights.now
        return _whole([b - a for a, b in pairwise((0.0, *now))], self.rounds) if now else None

    @property
    def dominates(self) -> str | None:
        """The activity that takes a client longer, "link" or "compute"; None without a clock."""
        parts = self.flights.parts
        return None if parts is None else "link" if parts.link > parts.compute else "compute"

    def values(self) -> dict[str, Any]:
        """The forecast as plain values, for JSON."""
        f, parts = self.flights, self.flights.parts
        started, arrived = max(1, sum(f.started)), max(1, sum(f.arrived))
        out: dict[str, Any] = {
            "rounds": self.rounds,
            "flown": len(f.up),
            "clients": self.clients,
            "parameters": self.parameters,
            "message": self.message,
            "exact": self.exact,
            "bytes": {
                "up": {"client": sum(f.up) / arrived, "round": _mean(f.up), "run": self.bytes_up},
                "down": {"client": sum(f.down) / started, "round": _mean(f.down), "run": self.bytes_down},
            },
            "memory": {**self.memory, "lanes": self.lanes},
            "time": None,
            "links": dict(self.links) or None,
            "privacy": None,
        }
        if self.privacy is not None:
            spent = self.privacy
            named = {"epsilon": spent.epsilon, "delta": spent.delta, "unit": spent.unit, "relation": spent.relation}
            out["privacy"] = named | {"noise_for_budget": self.noise}
        if parts is not None:
            shown = {**parts._asdict(), "round": parts.total, "run": self.seconds, "dominates": self.dominates}
            out["time"] = shown | {"help": None if self.help is None else _help_values(self.help)}
        return out

    def __repr__(self) -> str:
        sizes = f"clients={self.clients}, parameters={self.parameters}, message={self.message}"
        return f"Forecast(rounds={self.rounds}, {sizes})"

    def _repr_html_(self) -> str:
        return preformatted(self.text())

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        return mimebundle(self)

    def text(self) -> str:
        """The forecast as text."""
        return "\n".join([*self._bytes(), "", *self._memory(), "", *self._time(), *self._privacy()])

    def _privacy(self) -> Iterator[str]:
        if self.privacy is None:
            return
        yield ""
        yield self.privacy.text()
        if self.noise is not None:
            yield f"With Noise({self.noise}) all rounds fit into the budget."

    def _bytes(self) -> Iterator[str]:
        simulated, sizes = len(self.flights.up), self.values()["bytes"]
        yield f"{whole(self.rounds)} rounds, {whole(self.clients)} clients, {whole(self.parameters)} parameters"
        if simulated < self.rounds:
            yield f"{whole(simulated)} rounds were simulated; the others are assumed to be like the last half of them"
        yield ""
        yield f"{'bytes':<12}{'per client':>12}{'per round':>12}{'run':>12}"
        for way, row in sizes.items():
            mark = "" if self.exact or way == "down" else "   at most" if self.message else ""
            yield f"  {way:<10}" + "".join(f"{size(row[n]):>12}" for n in ("client", "round", "run")) + mark

    def _memory(self) -> Iterator[str]:
        words = {
            "model": "θ and buffers",
            "versions": "models of clients in flight",
            "optimizer": "optimizer",
            "parts": "state of parts",
            "sum": "the sum",
            "chunk": f"{whole(self.lanes)} clients at once",
            "clients": "client state, on disk",
        }
        yield "memory"
        for name, text in words.items():
            if self.memory[name]:
                yield f"  {text:<28}{size(self.memory[name]):>8}"

    def _time(self) -> Iterator[str]:
        parts = self.flights.parts
        if parts is None:
            yield "time per round on the link of the server, without computing"
            for name, seconds in self.links.items():
                yield f"  {name:<12}{duration(seconds):>12}"
            yield "For times with computing and waiting, write: --fleet \"Fleet(HalfNormal(), server='100 Mb/s')\""
            return
        yield f"{'time':<12}{duration(parts.total):>12} per round{duration(self.seconds or 0.0):>14} run"
        for name, seconds in parts._asdict().items():
            yield f"  {name:<10}{duration(seconds):>12}{seconds / max(parts.total, 1e-300):>8.0%}"
        yield self._verdict(parts)

    def _verdict(self, parts: Parts) -> str:
        link, compute = (duration(s) for s in (parts.link, parts.compute))
        activity = "The link" if self.dominates == "link" else "Computing"
        verdict = f"{activity} dominates: {link} on the link, {compute} computing."
        waits = parts.waiting > max(parts.link, parts.compute)
        if self.help is None and not waits and self.dominates == "compute":
            share = parts.link / max(parts.total, 1e-300)
            limit = f"No codec can save more than {share:.0%}, the share of the link."
            return f"{verdict} {limit} Use fewer local steps or faster clients."
        if self.help is None:
            return (
                f"{verdict} {'Most of the time is waiting' if waits else 'No codec that was tried sends fewer bytes'}."
            )
        if waits:
            now = _mean(self.flights.arrived) / max(parts.total, 1e-300)
            more = f"{self.help.arrivals / max(now, 1e-300):.1f} times the number of contributions in the same time"
            return f"{verdict} Most of the time is waiting. {more} with {self.help.write}"
        end = "less than computing" if self.help.enough else "which is still more than computing"
        return f"{verdict} The link would take {duration(self.help.parts.link)}, {end}, with {self.help.write}"


def _help_values(help: Help) -> dict[str, Any]:
    shown = {**help.parts._asdict(), "round": help.parts.total}
    return {"write": help.write, **shown, "arrivals": help.arrivals, "enough": help.enough}


def _mean(values: tuple[int, ...]) -> float:
    return sum(values) / max(1, len(values))


def _whole(values: Sequence[float], rounds: int) -> float:
    """The sum over all rounds, of which these are the first. Later rounds are extrapolated from their last half."""
    late = values[len(values) // 2 :]
    return sum(values) + (rounds - len(values)) * sum(late) / max(1, len(late))


def forecast(experiment: Experiment) -> Forecast:
    """Predict the costs of an experiment. No client is trained, and no file is written.

    Args:
        experiment: the settings.
    Raises:
        UsageError: model, data, plan and fleet do not fit; `atoll run` refuses the same experiments.
    """
    return predict(training_of(experiment, evaluate_every=0))


@user_scope(Key(0).fold("tool"))
def predict(training: Training) -> Forecast:
    """Predict the costs of a training.

    Args:
        training: before its first round; it is not changed.
    Returns:
        The forecast. If it is `exact`, the bytes of each round are those of the run, and with a fleet also the seconds.
        This does not hold if contributions fail for other reasons than a drop-out of the fleet, or if a rule stops the
        run.
    Example:
        >>> import atoll
        >>> data = atoll.data.load("diabetes").split(clients=5)
        >>> training = atoll.rounds("linear", data, atoll.recipes.distributed_gd(0.1), rounds=3)
        >>> prediction = predict(training)
        >>> prediction.bytes_up, sum(report.bytes_up for report in training)
        (960, 960)
    """
    engine, state, rounds = local_engine(training), training.state, training.settings.rounds
    plan, layout = training.plan, training.task.layout
    flights = simulate(plan, state, engine, rounds)
    lanes = chunk_size(plan, training.task, training.data, int(training.data.sizes.max()), engine.chunk)
    links = {}
    if training.fleet is None:
        each = (_mean(flights.up) + _mean(flights.down),)
        links = {name: each[0] / rate(name) for name in LINKS}
    return Forecast(
        rounds,
        engine.population.clients,
        layout.d,
        flights,
        message_bytes(plan, training.task),
        plan.codec.compressor is None and isinstance(plan.local, (Gradient, Train)),
        _memory(plan, state, engine, flights, lanes, rounds),
        lanes,
        links,
        _help(training, flights),
        *_privacy(training),
    )


def _privacy(training: Training) -> tuple[Account | None, float | None]:
    """ε of all rounds, and the noise with which they fit into the budget."""
    budget, rounds = training.budget, training.settings.rounds
    if budget is None:
        return None, None
    spent = account(training.plan, clients=budget.clients, rounds=rounds, delta=budget.delta)
    if budget.limit is None:
        return spent, None
    return spent, noise_for(
        training.plan, clients=budget.clients, rounds=rounds, delta=budget.delta, epsilon=budget.limit
    )


def simulate(plan: Plan, state: State, engine: InProcessEngine, rounds: int, limit: int = FLIGHTS) -> FlightTotals:
    """Simulate rounds of a plan without computing them.

    Args:
        plan: the algorithm, bound.
        state: the state before the first of these rounds.
        engine: its clients and its fleet are simulated.
        rounds: number of rounds; fewer are simulated if they have more than `limit` flights.
        limit: largest number of flights.
    """
    up = message_bytes(plan, engine.task)
    delta = 0 if plan.downlink == Identity() else plan.downlink.nbytes(plan.local.server_layout(engine.layout))
    plain = dataclasses.replace(plan, downlink=Identity())  # no delta is encoded here: its length is enough
    rows: list[Arrivals] = []
    participants: set[int] = set()
    while len(rows) < rounds and (len(rows) < 3 or sum(r.started for r in rows) < limit):
        if delta:
            state = dataclasses.replace(state, sent=_next(state, delta))
        opened = open_round(plain, state, engine)
        row = simulate_round(plan, state, opened.population, opened.cohort, engine.fleet, up)
        participants.update(f.client for f in row.arrived)
        state = dataclasses.replace(state, round=state.round + 1, air=row.air)
        rows.append(row)
    return FlightTotals(
        tuple(up * len(r.arrived) for r in rows),
        tuple(r.sent for r in rows),
        tuple(r.started for r in rows),
        tuple(len(r.arrived) for r in rows),
        tuple(len({f.version for f in r.air.flights}) for r in rows),
        tuple(r.now for r in rows if r.now is not None),
        _parts(rows) if engine.fleet is not None else None,
        len(participants),
    )


def _next(state: State, delta: int) -> DownlinkState:
    """The downlink state when a round opens: empty before the first round, then with one more delta."""
    return DownlinkState(state.model.theta, ()) if state.sent is None else state.sent.append(state.sent.theta, delta)


def _parts(rows: list[Arrivals]) -> Parts:
    """Seconds of the mean round, by the activity of a place in the cohort."""
    last = rows[-1].air
    clock = last.clock.copy()
    for flight in last.flights:  # these clients have used their places until now
        clock.cancel(flight.number)
    trips = [*(trip for row in rows for trip in row.trips), *clock.trips()]
    now = [0.0, *(row.now or 0.0 for row in rows)]
    spans = [b - a for a, b in pairwise(now)]
    capacity = sum(row.air.target * span for row, span in zip(rows, spans, strict=True))
    each = now[-1] / len(rows) / capacity if capacity else 0.0
    used = (
        sum(t.loaded - t.start for t in trips) * each,
        sum(t.computed - t.loaded for t in trips) * each,
        sum(t.end - t.computed for t in trips) * each,
    )
    return Parts(*used, max(0.0, now[-1] / len(rows) - sum(used)))


def _memory(
    plan: Plan, state: State, engine: InProcessEngine, flights: FlightTotals, lanes: int, rounds: int
) -> dict[str, int]:
    """Bytes by purpose. The sum has float64 digits, one more than are kept, for blocks of different sizes."""
    model, layout = state.model, engine.layout
    theta = layout.d * layout.dtype.itemsize
    versions = max(flights.versions) + 1
    digits = 1 if plan.aggregator.sum == "float" else places(layout.dtype) + 1
    shared = nbytes({"theta": model.theta, "buffers": model.buffers, **model.counters})
    parts = sum(nbytes(tensors) for tensors in state.server.values())
    row = nbytes(state.memory.first)
    participants = flights.participants + (flights.participants * (rounds - len(flights.up))) // len(flights.up)
    return {
        "model": shared + nbytes(model.fixed) + (0 if plan.downlink == Identity() else theta),
        "versions": (versions - 1) * (shared + parts),
        "optimizer": nbytes(state.optimizer),
        "parts": parts,
        "sum": 8 * (layout.d + layout.b) * digits * versions,
        "chunk": 6 * theta * lanes,
        "clients": row * min(engine.population.clients, participants),
    }


# changes that shorten a round


def _help(training: Training, flights: FlightTotals) -> Help | None:
    """A change that shortens a round: less waiting or fewer bytes; None if neither takes most of the time."""
    parts = flights.parts
    if parts is None:
        return None
    if parts.waiting > max(parts.link, parts.compute):
        k = max(1, round(_mean(flights.started) / 10))
        return None if training.plan.pace.asynchronous else _tried(training, pace=Buffered(k))
    if parts.link <= parts.compute:
        return None
    slower = "codec" if parts.upload >= parts.download else "downlink"
    best: Help | None = None
    for slots in ((slower,), ("codec", "downlink")):
        for codec in LADDER:
            found = _tried(training, **{slot: _for(slot, codec) for slot in slots})
            if found is not None and found.enough:
                return found
            if found is not None and (best is None or found.parts.link < best.parts.link):
                best = found
    return best if best is not None and best.parts.link < parts.link else None


def _for(slot: str, codec: Codec) -> Codec:
    """The codec for a slot. A downlink needs no error memory, because its next delta contains the error."""
    return codec.codec if slot == "downlink" and isinstance(codec, ErrorFeedback) else codec


def _tried(training: Training, **slots: Any) -> Help | None:
    """The plan with other parts in some slots; None if they do not fit or do not shorten the messages."""
    engine, layout = local_engine(training), training.plan.local.server_layout(training.task.layout)
    for slot in slots.keys() - {"pace"}:
        if slots[slot].nbytes(layout) >= getattr(training.plan, slot).nbytes(layout):
            return None
    try:
        plan = bind(dataclasses.replace(training.plan, **slots), engine)
        server = {**training.state.server, "codec": plan.codec.server(layout)}
        state = dataclasses.replace(training.state, server=server)
        flights = simulate(plan, state, engine, training.settings.rounds, TRIED)
    except UsageError:
        return None
    parts = flights.parts
    if parts is None:
        return None
    write = " ".join(f'--set "plan.{slot}={part!r}"' for slot, part in sorted(slots.items()))
    arrivals = sum(flights.arrived) / max(flights.now[-1], 1e-300)
    return Help(write, parts, arrivals, parts.link <= parts.compute)
