"""What a training will cost, before any of it is computed: bytes, time on the clock of its fleet, and memory.

atoll plan experiment.toml

Rounds are flown with the plan's own sampler, pace and clock, and with messages of the length that the codec announces;
only the clients' work and the server's step are left out. So what is sent, who is waited for and when a round closes
come out as they will in the run, to the byte and to the second.

Tests: tests/surface/test_forecast.py
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from atoll.base.errors import UsageError
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
from atoll.report.format import duration, size, whole
from atoll.tools.rebuild import local_engine, training_of
from atoll.training.experiment import Experiment
from atoll.training.rounds import Training

FLIGHTS = 200_000  # how many are flown at most; what comes after them is taken to be like the last half of them
TRIED = 20_000  # the same, for each change that is tried
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
    """Seconds of a round, as a client of the cohort spends them on average; they add up to the round's."""

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
    """Rounds that were flown and not computed: one entry a round, but for `parts` and `heard`.

    Args:
        up, down: bytes of all messages.
        started, arrived: clients.
        versions: models that somebody still works from when the round has closed.
        now: seconds of the run; empty without a fleet.
        parts: of the mean round; None without a fleet.
        heard: how many different clients arrived, in all rounds.
    """

    up: tuple[int, ...]
    down: tuple[int, ...]
    started: tuple[int, ...]
    arrived: tuple[int, ...]
    versions: tuple[int, ...]
    now: tuple[float, ...]
    parts: Parts | None
    heard: int


class Help(NamedTuple):
    """A change that was tried: what to write, what it does to a round, and whether that is all that was wanted."""

    write: str
    parts: Parts
    arrivals: float  # contributions a second
    enough: bool


@dataclass(frozen=True)
class Forecast:
    """What a training will cost.

    Args:
        rounds: at most so many; a stop rule may end it sooner.
        clients: how many there are.
        parameters: d, the length of θ.
        flights: the rounds that were flown.
        message: bytes of a client's message.
        exact: whether every message is so long; else it is no longer, where it is compressed without loss, or it may
            hold sums that only the clients' own code knows of.
        memory: bytes by name, in the server's process, but for `clients`, which is on disk.
        lanes: clients computed together.
        links: seconds a round by the rate of the server's link, for all bytes and no computing; without a fleet.
        help: what would help most, where something was found.
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

    @property
    def bytes_up(self) -> int:
        """Of the whole run."""
        return round(_whole(self.flights.up, self.rounds))

    @property
    def bytes_down(self) -> int:
        """Of the whole run."""
        return round(_whole(self.flights.down, self.rounds))

    @property
    def seconds(self) -> float | None:
        """Of the whole run on the clock; None without one."""
        now = self.flights.now
        return _whole([b - a for a, b in pairwise((0.0, *now))], self.rounds) if now else None

    @property
    def dominates(self) -> str | None:
        """Which of "link" and "compute" takes a client longer; None without a clock."""
        parts = self.flights.parts
        return None if parts is None else "link" if parts.link > parts.compute else "compute"

    def told(self) -> dict[str, Any]:
        """Everything as plain values, for programs."""
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
        }
        if parts is not None:
            shown = {**parts._asdict(), "round": parts.total, "run": self.seconds, "dominates": self.dominates}
            out["time"] = shown | {"help": None if self.help is None else _told(self.help)}
        return out

    def text(self) -> str:
        """The same for people."""
        return "\n".join([*self._bytes(), "", *self._memory(), "", *self._time()])

    def _bytes(self) -> Iterator[str]:
        flown, told = len(self.flights.up), self.told()["bytes"]
        yield f"{whole(self.rounds)} rounds, {whole(self.clients)} clients, {whole(self.parameters)} parameters"
        if flown < self.rounds:
            yield f"{whole(flown)} rounds were flown; the others are taken to be like the last half of them"
        yield ""
        yield f"{'bytes':<12}{'a client':>12}{'a round':>12}{'the run':>12}"
        for way, row in told.items():
            mark = "" if self.exact or way == "down" else "   at most" if self.message else ""
            yield f"  {way:<10}" + "".join(f"{size(row[n]):>12}" for n in ("client", "round", "run")) + mark

    def _memory(self) -> Iterator[str]:
        words = {
            "model": "θ and buffers",
            "versions": "models of flights",
            "optimizer": "optimizer",
            "parts": "parts of the plan",
            "sum": "the sum",
            "chunk": f"{whole(self.lanes)} clients at once",
            "clients": "what clients keep, on disk",
        }
        yield "memory"
        for name, what in words.items():
            if self.memory[name]:
                yield f"  {what:<28}{size(self.memory[name]):>8}"

    def _time(self) -> Iterator[str]:
        parts = self.flights.parts
        if parts is None:
            yield "a round on the server's link, without computing"
            for name, seconds in self.links.items():
                yield f"  {name:<12}{duration(seconds):>12}"
            yield "For seconds with computing and waiting, write: --fleet \"Fleet(HalfNormal(), server='100 Mb/s')\""
            return
        yield f"{'time':<12}{duration(parts.total):>12} a round{duration(self.seconds or 0.0):>14} the run"
        for name, seconds in parts._asdict().items():
            yield f"  {name:<10}{duration(seconds):>12}{seconds / max(parts.total, 1e-300):>8.0%}"
        yield self._verdict(parts)

    def _verdict(self, parts: Parts) -> str:
        link, compute = (duration(s) for s in (parts.link, parts.compute))
        who = "The link" if self.dominates == "link" else "Computing"
        said = f"{who} dominates: {link} on the link, {compute} computing."
        waits = parts.waiting > max(parts.link, parts.compute)
        if self.help is None and not waits and self.dominates == "compute":
            share = parts.link / max(parts.total, 1e-300)
            return f"{said} No codec can save more than the link's {share:.0%}; fewer local steps, or quicker clients."
        if self.help is None:
            return f"{said} {'Most time is waiting' if waits else 'No codec that was tried sends less'}."
        if waits:
            now = _mean(self.flights.arrived) / max(parts.total, 1e-300)
            more = f"{self.help.arrivals / max(now, 1e-300):.1f} times the contributions in the same time"
            return f"{said} Most time is waiting: {more}, with {self.help.write}"
        end = "below computing" if self.help.enough else "which is still more than computing"
        return f"{said} It would be {duration(self.help.parts.link)}, {end}, with {self.help.write}"


def _told(help: Help) -> dict[str, Any]:
    shown = {**help.parts._asdict(), "round": help.parts.total}
    return {"write": help.write, **shown, "arrivals": help.arrivals, "enough": help.enough}


def _mean(values: tuple[int, ...]) -> float:
    return sum(values) / max(1, len(values))


def _whole(values: Sequence[float], rounds: int) -> float:
    """The sum over all rounds, of which these are the first: those behind them are like the last half of these."""
    late = values[len(values) // 2 :]
    return sum(values) + (rounds - len(values)) * sum(late) / max(1, len(late))


def forecast(experiment: Experiment) -> Forecast:
    """What an experiment will cost; nothing is trained, and nothing is written.

    Args:
        experiment: what was told.
    Raises:
        UsageError: its model, data, plan and fleet do not fit: what `atoll run` would refuse.
    """
    return predict(training_of(experiment, evaluate_every=0))


def predict(training: Training) -> Forecast:
    """What a training will cost.

    Args:
        training: before its first round; it stays as it is.
    Returns:
        The forecast: the bytes of every round are those of the run where `exact`, and its seconds where there is a
        fleet too, unless contributions are lost that no drop-out of the fleet took, or a rule stops it.
    Example:
        >>> import atoll
        >>> data = atoll.data.load("diabetes").split(clients=5)
        >>> training = atoll.rounds("linear", data, atoll.recipes.distributed_gd(0.1), rounds=3)
        >>> told = predict(training)
        >>> told.bytes_up, sum(report.bytes_up for report in training)
        (960, 960)
    """
    engine, state, rounds = local_engine(training), training.state, training.settings.rounds
    plan, layout = training.plan, training.task.layout
    flights = flown(plan, state, engine, rounds)
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
        message_bytes(plan, layout),
        plan.codec.compressor is None and isinstance(plan.local, (Gradient, Train)),
        _memory(plan, state, engine, flights, lanes, rounds),
        lanes,
        links,
        _help(training, flights),
    )


def flown(plan: Plan, state: State, engine: InProcessEngine, rounds: int, most: int = FLIGHTS) -> FlightTotals:
    """Fly rounds of a plan without computing anything.

    Args:
        plan: told where it works.
        state: where the first of these rounds begins.
        engine: whose clients fly, on the clock of its fleet.
        rounds: so many, or fewer where that is more than `most` flights.
        most: flights.
    """
    up = message_bytes(plan, engine.layout)
    delta = 0 if plan.downlink == Identity() else plan.downlink.nbytes(engine.layout)
    plain = dataclasses.replace(plan, downlink=Identity())  # no delta is encoded here: its length is enough
    rows: list[Arrivals] = []
    heard: set[int] = set()
    while len(rows) < rounds and (len(rows) < 3 or sum(r.started for r in rows) < most):
        if delta:
            state = dataclasses.replace(state, sent=_next(state, delta))
        opened = open_round(plain, state, engine)
        row = simulate_round(plan, state, opened.population, opened.cohort, engine.fleet, up)
        heard.update(f.client for f in row.arrived)
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
        len(heard),
    )


def _next(state: State, delta: int) -> DownlinkState:
    """What clients have been told of θ as a round opens: nothing before the first, then a delta of each."""
    return DownlinkState(state.model.theta, ()) if state.sent is None else state.sent.append(state.sent.theta, delta)


def _parts(rows: list[Arrivals]) -> Parts:
    """The mean round's seconds, by what a place of the cohort was used for."""
    last = rows[-1].air
    clock = last.clock.copy()
    for flight in last.flights:  # they have used their places up to now
        clock.cancel(flight.number)
    trips = [*(trip for row in rows for trip in row.trips), *clock.trips()]
    now = [0.0, *(row.now or 0.0 for row in rows)]
    spans = [b - a for a, b in pairwise(now)]
    room = sum(row.air.target * span for row, span in zip(rows, spans, strict=True))
    each = now[-1] / len(rows) / room if room else 0.0
    used = (
        sum(t.loaded - t.start for t in trips) * each,
        sum(t.computed - t.loaded for t in trips) * each,
        sum(t.end - t.computed for t in trips) * each,
    )
    return Parts(*used, max(0.0, now[-1] / len(rows) - sum(used)))


def _memory(
    plan: Plan, state: State, engine: InProcessEngine, flights: FlightTotals, lanes: int, rounds: int
) -> dict[str, int]:
    """Bytes by what they are for. The sum: float64, one more digit than are kept, for blocks of unlike size."""
    model, layout = state.model, engine.layout
    theta = layout.d * layout.dtype.itemsize
    births = max(flights.versions) + 1
    digits = 1 if plan.aggregator.sum == "float" else places(layout.dtype) + 1
    told = nbytes({"theta": model.theta, "buffers": model.buffers, **model.counters})
    parts = sum(nbytes(tensors) for tensors in state.server.values())
    row = nbytes(plan.memory(layout))
    heard = flights.heard + (flights.heard * (rounds - len(flights.up))) // len(flights.up)
    return {
        "model": told + nbytes(model.fixed) + (0 if plan.downlink == Identity() else theta),
        "versions": (births - 1) * (told + parts),
        "optimizer": nbytes(state.optimizer),
        "parts": parts,
        "sum": 8 * (layout.d + layout.b) * digits * births,
        "chunk": 6 * theta * lanes,
        "clients": row * min(engine.population.clients, heard),
    }


# what would help


def _help(training: Training, flights: FlightTotals) -> Help | None:
    """What would make a round shorter: no waiting, or fewer bytes; None where neither is what takes the time."""
    parts = flights.parts
    if parts is None:
        return None
    if parts.waiting > max(parts.link, parts.compute):
        k = max(1, round(_mean(flights.started) / 10))
        return None if training.plan.pace.asynchronous else _tried(training, pace=Buffered(k))
    if parts.link <= parts.compute:
        return None
    mostly = "codec" if parts.upload >= parts.download else "downlink"
    best: Help | None = None
    for slots in ((mostly,), ("codec", "downlink")):
        for codec in LADDER:
            found = _tried(training, **{slot: _for(slot, codec) for slot in slots})
            if found is not None and found.enough:
                return found
            if found is not None and (best is None or found.parts.link < best.parts.link):
                best = found
    return best if best is not None and best.parts.link < parts.link else None


def _for(slot: str, codec: Codec) -> Codec:
    """The codec as a slot takes it: what a downlink loses is in its next delta without a memory."""
    return codec.codec if slot == "downlink" and isinstance(codec, ErrorFeedback) else codec


def _tried(training: Training, **slots: Any) -> Help | None:
    """Rounds of the plan with other parts in some slots; None where they do not fit it, or are no shorter."""
    engine, layout = local_engine(training), training.task.layout
    for slot in slots.keys() - {"pace"}:
        if slots[slot].nbytes(layout) >= getattr(training.plan, slot).nbytes(layout):
            return None
    try:
        plan = bind(dataclasses.replace(training.plan, **slots), engine)
        server = {**training.state.server, "codec": plan.codec.server(layout)}
        state = dataclasses.replace(training.state, server=server)
        flights = flown(plan, state, engine, training.settings.rounds, TRIED)
    except UsageError:
        return None
    parts = flights.parts
    if parts is None:
        return None
    write = " ".join(f'--set "plan.{slot}={part!r}"' for slot, part in sorted(slots.items()))
    arrivals = sum(flights.arrived) / max(flights.now[-1], 1e-300)
    return Help(write, parts, arrivals, parts.link <= parts.compute)
