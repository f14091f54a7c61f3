"""Repeat the computation of one client in one round of a run. A run is a function of its config and its seed.

    atoll replay RUN --round 7 --client 3

The earlier rounds are trained again without writing files, from the checkpoint of the run if that is early enough. The
fingerprint of θ after each round is compared with the recorded one. Then the client trains in a chunk of its own, from
the model version from which it started. The numbers of a client do not depend on the other clients of a chunk, so they
are the recorded ones, and an error is raised again. The round of a contribution is the round in which it arrived or was
lost, not the round in which it started.

Tests: tests/surface/test_tools.py, tests/surface/test_replay_flights.py
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from atoll import runs
from atoll.base.errors import AtollError, RunError, UsageError, unknown_name
from atoll.base.lines import literal, quoted
from atoll.base.names import without_prefix
from atoll.base.random import Key, user_scope
from atoll.engine.simulation.arrivals import Arrivals, message_bytes, simulate_round
from atoll.plan.in_flight import Flight
from atoll.plan.pace import Sync
from atoll.plan.plan import Plan
from atoll.plan.round import Opened, close_round, open_round, per_row, select, step
from atoll.runs.checkpoint import state_from_tensors
from atoll.runs.fingerprint import fingerprint
from atoll.runs.format import size
from atoll.runs.next_line import near
from atoll.tools.rebuild import local_engine, same_data, training_in
from atoll.tools.single_client import compute, rejection
from atoll.training.rounds import Training

_LISTED = 1000  # largest number of clients per round in events.jsonl


@dataclass(frozen=True)
class Replay:
    """The computation of one client in one round.

    Args:
        run: the name of the run folder.
        round: the number of the round, from 0.
        client: the number of the client; `name` is its name or "".
        rows: number of rows that it holds.
        cohort: number of active clients.
        birth: the model version: the round whose model it started from.
        of: number of contributions of this client that ended in the round; this is one of them.
        work: the fraction of its work that it finished before the deadline, in (0, 1].
        bytes_up: bytes of its message; None if it sent none.
        bytes_down: bytes of its download.
        losses: mean loss of each batch, in order: one per step of `Gradient` and `Train`, none for `Custom`.
        metrics: the loss, or the metrics that the user's own loop returned; means over the rows seen.
        seen: number of rows that it processed.
        update_norm: ‖gᵢ‖₂ before the codec; None after an error.
        cosine: ⟨gᵢ, g⟩ / (‖gᵢ‖ ‖g‖) with the mean g of the round; None if there is no mean.
        share: s (wᵢ/Σw) ⟨ĝᵢ, g⟩ / ‖g‖², its share of g. ĝᵢ is gᵢ as the server decodes it, and s its staleness weight.
            The shares of all arrived contributions sum to 1.
        failure: the traceback, or the reason why the contribution was rejected or abandoned; "" without a failure.
        first: the first repeated round: 0, or the round of the checkpoint.
        checked: number of rounds with a fingerprint equal to the recorded one, this round included.
        fingerprint: of θ after the round; "" if the round failed.
        seconds: duration of the client's computation.
        notes: further messages.
    """

    run: str
    round: int
    client: int
    name: str
    rows: int
    cohort: int
    birth: int
    of: int
    work: float
    bytes_up: int | None
    bytes_down: int
    losses: tuple[float, ...]
    metrics: Mapping[str, float]
    seen: int
    update_norm: float | None
    cosine: float | None
    share: float | None
    failure: str
    first: int
    checked: int
    fingerprint: str
    seconds: float
    notes: tuple[str, ...] = field(default=())

    @property
    def steps(self) -> int | None:
        """Number of optimizer steps; None for the user's own loop."""
        return len(self.losses) or None

    def text(self) -> str:
        """The replay as text."""

        def shown(value: float | None, form: str = ".6g") -> str:
            return "–" if value is None else format(value, form)

        client = f"client {self.client}" + (f" ({self.name})" if self.name else "")
        lines = [
            f"{self.run}, round {self.round}, {client}: one of {self.cohort} active clients",
            *self._flight(),
            f"rows held     {self.rows}",
            f"rows seen     {self.seen}, in {self.steps or '?'} steps, {self.seconds:.3f} s",
            *(f"{name:<13} {value:.6g}" for name, value in self.metrics.items()),
        ]
        if len(self.losses) > 1:
            lines.append(f"by step       {_some(self.losses)}")
        lines += [
            f"‖update‖      {shown(self.update_norm)}",
            f"cosine        {shown(self.cosine, '.4f')}  with the mean of the round",
            f"share         {shown(None if self.share is None else 100 * self.share, '.2f')} % of this mean",
            f"θ after       {self.fingerprint or '–'}",
            f"checked       {self.checked} rounds from round {self.first} on, all equal to the recorded fingerprints",
            *self.notes,
        ]
        if self.failure:
            lines += ["", "failure:", self.failure.rstrip()]
        return "\n".join(lines)

    def _flight(self) -> list[str]:
        """The lines about the transfer; lines about a usual value are left out."""
        up = "–" if self.bytes_up is None else size(self.bytes_up)
        lines = [f"bytes         ↑ {up}   ↓ {size(self.bytes_down)}"]
        if self.birth != self.round:
            late = self.round - self.birth
            lines.append(f"started       in round {self.birth}, with the model of that round; staleness {late}")
        if self.work < 1:
            lines.append(f"work          {100 * self.work:.1f} %, until the deadline")
        if self.of > 1:
            lines.append(f"arrived       {self.of} times in this round; --nth 0 to {self.of - 1} selects one")
        return lines


def _some(values: tuple[float, ...], limit: int = 8) -> str:
    """Numbers as text; of a long list the first and the last ones."""
    half = limit // 2
    picked = values if len(values) <= limit else (*values[:half], *values[-half:])
    texts = [f"{v:.4g}" for v in picked]
    return " ".join(texts if len(values) <= limit else [*texts[:half], "…", *texts[half:]])


@user_scope(Key(0).fold("tool"))
def replay(
    path: str | Path,
    round: int,
    client: int | str,
    trust: bool = False,
    training: Training | None = None,
    nth: int = 0,
) -> Replay:
    """Repeat the computation of a client whose contribution ended in a round of a run.

    Args:
        path: the run folder; it is only read.
        round: the number of the round, from 0. The round in which a run failed is allowed.
        client: the number of the client, from 0, or its name.
        trust: whether config.toml may name code outside atoll.
        training: the same training before its first round, `atoll.rounds(model, data, plan, …)`, for a run that was
            started from Python; None builds it from config.toml.
        nth: the number of the contribution, from 0, if several contributions of the client ended in the round.
    Raises:
        UsageError: no contribution of the client ended in that round (the error lists the rounds with one), the client
            or the round does not exist, or the data have changed.
        RunError: the fingerprint of a repeated round differs from the recorded one.
    """
    folder = Path(path)
    if training is None:
        training = training_in(
            folder,
            lambda training: (
                "from atoll.tools.replay import replay\n"
                f"print(replay({literal(near(folder))}, {round}, {client!r}, training={training}).text())"
            ),
            trust=trust,
        )
    else:
        same_data(folder, training)
    _refuse_entropy(training.plan, folder.resolve().name)
    client = _number_of(folder, training, round, client)
    rows = {row["round"]: row for row in runs.read_rows(folder / "metrics.jsonl") if "round" in row}
    _check_asked(folder, training, rows, round, client)
    start = _checkpoint(folder, training, round)
    checked = 0
    for t in range(start, round):
        training.state, _ = step(training.plan, training.state, training.engine)
        checked += _check(folder, rows, t, fingerprint(training.state.model.theta))
    opened, flown = _open(training)
    flights = _flights(opened, flown, training, client)
    if not flights:
        raise _not_active(folder, training, rows, round, client)
    if not 0 <= nth < len(flights):
        raise UsageError(
            f"nth = {nth}: {len(flights)} contributions of client {client} ended in round {round}.",
            f"0 to {len(flights) - 1}.",
            write=f"atoll replay {folder.resolve().name} --round {round} --client {client} --nth {len(flights) - 1}",
        )
    whole = _whole(training, opened)
    if whole.fingerprint:
        checked += _check(folder, rows, round, whole.fingerprint)
    return _single(training, opened, flights, nth, whole, {
        "run": folder.resolve().name, "round": round, "first": start, "checked": checked,
        "cohort": len(opened.state.air.flights) + flown.started,
        "fingerprint": whole.fingerprint, "notes": (whole.note,) if whole.note else (),
    })  # fmt: skip


def _refuse_entropy(plan: Plan, run: str) -> None:
    """Refuse a plan with a part whose noise does not depend on the seed."""
    for part in (plan.local, plan.codec, plan.aggregator):
        if part.uses_entropy:
            raise UsageError(
                f"A replay of {run}, whose plan has {part!r}.",
                "a plan in which every draw comes from the seed.",
                "this part released noise from the operating system, and released noise is not drawn twice.",
                f"atoll show {run}",
            )


def _open(training: Training) -> tuple[Opened, Arrivals]:
    """The open round and its flights."""
    engine = local_engine(training)
    opened = open_round(training.plan, training.state, engine)
    up = 0 if engine.fleet is None else message_bytes(opened.plan, training.task)
    return opened, simulate_round(opened.plan, opened.state, opened.population, opened.cohort, engine.fleet, up)


def _flights(opened: Opened, flown: Arrivals, training: Training, client: int) -> list[tuple[Flight, str]]:
    """The flights of a client that ended in the round, in order of starts, each with the reason of its loss or "".

    An abandoned flight started in this round, because an asynchronous pace abandons none.
    """
    round = opened.state.round
    found = [(f, "") for f in flown.arrived if f.client == client]
    found += [
        (f, "the client dropped out, and its contribution did not arrive")
        for f, *_ in flown.dropped
        if f.client == client
    ]
    late = "the round closed before the contribution arrived"
    if training.fleet is not None:
        abandoned = [t for t in flown.trips if t.outcome == "late" and t.client == client]
        found += [(Flight(client, round, 0, t.number), late) for t in abandoned]
    elif flown.late and not found and client in opened.cohort.ids.tolist():
        found.append((Flight(client, round, 0, opened.state.air.started), late))
    return sorted(found, key=lambda pair: pair[0].number)


def _number_of(folder: Path, training: Training, round: int, client: int | str) -> int:
    """The number of a client; it may be given by name."""
    if not isinstance(client, str):
        return client
    names = training.data.names or ()
    if client in names:
        return names.index(client)
    words = f"atoll replay {folder.resolve().name} --round {round} --client"
    if not names:
        required = f"a number from 0 to {training.data.count - 1}."
        raise UsageError(f"client = {client!r}, and the clients have no names.", required, write=f"{words} 0")
    raise unknown_name("client", client, names, lambda name: f"{words} {quoted(name)}")


def _check_asked(folder: Path, training: Training, rows: Mapping[int, Any], round: int, client: int) -> None:
    """Refuse a client or a round that the log excludes, before any computation."""
    count, last = training.data.count, max(rows, default=-1) + 1
    name = folder.resolve().name
    if not 0 <= client < count:
        raise UsageError(
            f"client = {client}.",
            f"a client of this run, 0 to {count - 1}.",
            write=f"atoll replay {name} --round {max(0, min(round, last))} --client {count - 1}",
        )
    if not 0 <= round < last and not (round == last and _failed(folder)):
        raise UsageError(
            f"round = {round}.",
            f"a finished round, 0 to {last - 1}." if last else "a run with a finished round.",
            write=f"atoll replay {name} --round {max(0, last - 1)} --client {client}",
        )
    if _drawn(training):
        active = client in _cohort(training, round)
    else:
        ended, listed = _ended(folder)
        # The lists contain neither late clients nor clients after the first thousand.
        unknown = round == last or listed.get(round, _LISTED) >= _LISTED or not training.plan.pace.asynchronous
        active = unknown or client in ended.get(round, ())
    if not active:
        raise _not_active(folder, training, rows, round, client)


def _drawn(training: Training) -> bool:
    """Whether the seed determines the active clients of a round without a simulation and without the rounds before."""
    return training.plan.pace == Sync() and training.fleet is None and not training.plan.sampler.needs_values


def _cohort(training: Training, round: int) -> list[int]:
    key = Key(training.settings.seed).fold("round", round).fold("cohort")
    ids: list[int] = select(training.plan.sampler, training.engine.population, round, key).ids.tolist()
    return ids


def _ended(folder: Path) -> tuple[dict[int, set[int]], dict[int, int]]:
    """From events.jsonl: the clients whose contribution ended in each round, and the number of arrivals in the list."""
    ended: dict[int, set[int]] = {}
    listed: dict[int, int] = {}
    failed: set[int] = set()
    for event in runs.read_rows(folder / "events.jsonl"):
        if event.get("event") == "failure":  # a failure precedes the arrivals of its round
            failed.add(event.get("client", -1))
        elif event.get("event") == "clients":
            ids = event.get("id", [])
            ended[event["round"]], listed[event["round"]] = failed | set(ids), len(ids)
            failed = set()
    return ended, listed


def _not_active(folder: Path, training: Training, rows: Mapping[int, Any], round: int, client: int) -> UsageError:
    last, name = max(rows, default=-1) + 1, folder.resolve().name
    by_round = {t: set(_cohort(training, t)) for t in range(last)} if _drawn(training) else _ended(folder)[0]
    active = sorted(t for t, ids in by_round.items() if client in ids)
    listed = ", ".join(map(str, active[:20])) + (f", … {active[-1]}" if len(active) > 20 else "")
    here = sorted(by_round.get(round, ()))
    if active:
        nearest = min(active, key=lambda t: abs(t - round))
        write = f"atoll replay {name} --round {nearest} --client {client}"
    else:
        write = f"atoll replay {name} --round {round} --client {here[0]}" if here else f"atoll show {name}"
    if training.plan.pace.asynchronous:
        given = f"No contribution of client {client} ended in round {round} of {name}."
        required = f"one of the rounds in which one ended: {listed}."
        why = "a contribution belongs to the round in which it arrives or is lost, not to the round of its start."
    else:
        given = f"Client {client} was not active in round {round} of {name}."
        required = f"one of the rounds in which it was active: {listed}."
        why = "a client outside the cohort computes nothing."
    return UsageError(given, required if active else "an active client: this one was never active.", why, write)


def _failed(folder: Path) -> bool:
    """Whether the run ended with a failed round. That round has no row, but it can be replayed."""
    stops = [e for e in runs.read_rows(folder / "events.jsonl") if e.get("event") == "stop"]
    return bool(stops) and stops[-1].get("status") == "failed"


def _checkpoint(folder: Path, training: Training, round: int) -> int:
    """Load the checkpoint of the run into the training if it is not later than the round. No log is truncated."""
    try:
        if not 0 < runs.read_pointer(folder)["facts"]["round"] <= round:
            return 0
        checkpoint = runs.RunFolder(folder).restore()
    except AtollError:  # missing, damaged, or of other versions: the rounds are repeated from the first one
        return 0
    if checkpoint is None:
        return 0
    training.state = state_from_tensors(checkpoint.tensors, checkpoint.facts["round"], training.state)
    for segment in checkpoint.memory:
        training.memory.put(segment["ids"], without_prefix(segment, "rows/"))
    return int(checkpoint.facts["round"])


def _check(folder: Path, rows: Mapping[int, Mapping[str, Any]], round: int, now: str) -> int:
    """Compare the fingerprint of a round with the recorded one. Returns 1, or 0 if none is recorded."""
    recorded = rows.get(round, {}).get("fingerprint")
    if not recorded or recorded == now:
        return int(bool(recorded))
    about, here = runs.read_environment(folder), runs.environment()
    other = [
        f"{n} {about[n]}, here {here[n]}"
        for n in ("atoll", "torch", "numpy", "cpu", "machine")
        if n in about and about[n] != here.get(n)
    ]
    raise RunError(
        f"Round {round} of {folder.resolve().name} has fingerprint {now}; the run recorded {recorded}.",
        "the same bits in every round.",
        f"the run has other versions or another kind of CPU: {'; '.join(other)}."
        if other
        else "the versions are equal, so code outside atoll or rows of the data have changed.",
        f"atoll show {folder.resolve().name}",
    )


class _Whole(NamedTuple):
    """The repeated round: its mean, the total weight, the fingerprint after it; or the reason of its failure."""

    mean: Tensor | None
    weight: float
    fingerprint: str
    note: str


def _whole(training: Training, opened: Opened) -> _Whole:
    try:
        gathered = local_engine(training).gather(opened.plan, opened.state, opened.cohort, opened.key)
    except RunError as error:
        return _Whole(None, 0.0, "", f"the round failed: {error.given}")
    total, mean, after, _ = close_round(opened, gathered)
    return _Whole(mean.means.get("update"), float(total.weight), fingerprint(after.model.theta), "")


def _single(
    training: Training,
    opened: Opened,
    flights: list[tuple[Flight, str]],
    nth: int,
    whole: _Whole,
    facts: dict[str, Any],
) -> Replay:
    """Repeat the flight in a chunk of one client, and compare its contribution with the mean of the round."""
    plan, state, data = opened.plan, opened.state, training.data
    flight, failure = flights[nth]
    kept = state.memory.take(torch.tensor([flight.client]))
    for earlier, lost in flights[:nth] if kept else ():  # each accepted contribution changes the client state
        if not lost:
            given = compute(training, plan, state, earlier, kept, [])
            kept = {**kept, **given.kept} if not rejection(given) else kept
    losses: list[float] = []
    update, sent, metrics, seen, bytes_up = None, None, {}, 0, None
    began = time.perf_counter()
    try:
        given = compute(training, plan, state, flight, kept, losses)
        sums, update, sent = given.contribution.sums, given.contribution.means.get("update"), given.sent
        bytes_up = given.bytes
        seen = int(sums["rows"][0]) if "rows" in sums else 0
        metrics = {n: float(s[0]) for n, s in per_row(sums).items() if s.dim() == 1}
        failure = failure or rejection(given)
    except Exception:
        failure = traceback.format_exc()
    norm = cosine = share = None
    rows = int(data.sizes[flight.client])
    if update is not None:
        norm = float(torch.linalg.vector_norm(update[0].double()))
    if update is not None and sent is not None and whole.mean is not None and not failure:
        mean = whole.mean.double()
        length = float(torch.linalg.vector_norm(mean))
        cosine = float(update[0].double() @ mean) / (norm * length) if norm and length else None
        part = int(plan.aggregator.weigh(torch.tensor([flight.client]), torch.tensor([rows]))) / whole.weight
        part *= plan.pace.staleness_weight(state.round - flight.version)
        share = part * float(sent.double() @ mean) / length**2 if length and plan.aggregator.linear else None
    return Replay(
        client=flight.client,
        name=data.names[flight.client] if data.names else "",
        rows=rows,
        birth=flight.version,
        of=len(flights),
        work=flight.share,
        bytes_up=bytes_up,
        bytes_down=flight.down,
        losses=tuple(losses),
        metrics=metrics,
        seen=seen,
        update_norm=norm,
        cosine=cosine,
        share=share,
        failure=failure,
        seconds=time.perf_counter() - began,
        **facts,
    )
