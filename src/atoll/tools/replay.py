"""What one client computed in one round of a run, computed again: a run is a function of its config and its seed.

    atoll replay RUN --round 7 --client 3

The rounds before are trained again without writing anything, and each one's fingerprint of θ is held against the run's
own; where a checkpoint stands at that round or before it, from there on. Then the client is run alone, from the model
that it had started from: its numbers do not depend on who is computed beside it, so they are the ones that it gave, and
if it raised, it raises again. A round is that in which a contribution arrived, or was lost, whenever it had started.

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
from atoll.base.errors import AtollError, RunError, UsageError
from atoll.base.names import without_prefix
from atoll.base.random import Key
from atoll.engine.simulation.arrivals import Arrivals, message_bytes, simulate_round
from atoll.plan.in_flight import Flight
from atoll.plan.pace import Sync
from atoll.plan.plan import Plan
from atoll.plan.round import Opened, close_round, open_round, step
from atoll.report.format import size
from atoll.runs.checkpoint import state_from_tensors
from atoll.runs.fingerprint import fingerprint
from atoll.tools.rebuild import local_engine, same_data, training_in
from atoll.tools.single_client import compute, rejection
from atoll.training.rounds import Training

_TOLD = 1000  # clients of a round that events.jsonl lists


@dataclass(frozen=True)
class Replay:
    """One client in one round, as it was.

    Args:
        run: name of its folder.
        round: from 0.
        client: its number, and `name`, where it has one.
        rows: that it holds.
        cohort: how many were at work.
        birth: the round whose model it started from; an earlier one where contributions may be late.
        of: how many contributions of this client came to an end in the round; this one is told of.
        work: the part of its work that it had time for before the deadline.
        bytes_up, bytes_down: of its message, and of what it was sent when it started; None where it gave no message.
        losses: mean loss of each batch, in order: one a step of `Gradient` and `Train`, none of `Custom`.
        metrics: what it told of the round: the loss, or what the user's own loop returned; means over rows seen.
        seen: rows that it went through.
        update_norm: ‖gᵢ‖₂ before the codec; None where it raised.
        cosine: ⟨gᵢ, g⟩ / (‖gᵢ‖ ‖g‖), g the round's mean; None where there is none.
        share: s (wᵢ/Σw) ⟨ĝᵢ, g⟩ / ‖g‖², its share of g, where ĝᵢ is gᵢ as the server decodes it and s the factor of its
            staleness; over the contributions that arrived they sum to 1.
        failure: the whole traceback, or why its numbers were refused or not awaited; empty where all was well.
        first: the round from which was trained again: 0, or that of the checkpoint.
        checked: rounds whose fingerprint was held against the run's own, the replayed one included; all agreed.
        fingerprint: of θ after the round; empty where the round could not be run.
        seconds: of the client alone.
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
        """Optimizer steps that it made; None where the loop was the user's own."""
        return len(self.losses) or None

    def text(self) -> str:
        """What there is to say, line by line."""

        def shown(value: float | None, form: str = ".6g") -> str:
            return "–" if value is None else format(value, form)

        who = f"client {self.client}" + (f" ({self.name})" if self.name else "")
        lines = [
            f"{self.run}, round {self.round}, {who}: one of {self.cohort} at work",
            *self._flight(),
            f"rows held     {self.rows}",
            f"rows seen     {self.seen}, in {self.steps or '?'} steps, {self.seconds:.3f} s",
            *(f"{name:<13} {value:.6g}" for name, value in self.metrics.items()),
        ]
        if len(self.losses) > 1:
            lines.append(f"by step       {_some(self.losses)}")
        lines += [
            f"‖update‖      {shown(self.update_norm)}",
            f"cosine        {shown(self.cosine, '.4f')}  with the round's mean",
            f"share         {shown(None if self.share is None else 100 * self.share, '.2f')} % of the round's mean",
            f"θ after       {self.fingerprint or '–'}",
            f"checked       {self.checked} rounds from round {self.first} on, every fingerprint as in metrics.jsonl",
            *self.notes,
        ]
        if self.failure:
            lines += ["", "it failed:", self.failure.rstrip()]
        return "\n".join(lines)

    def _flight(self) -> list[str]:
        """What there is to say of the way, where it is not what it always is."""
        up = "–" if self.bytes_up is None else size(self.bytes_up)
        lines = [f"bytes         ↑ {up}   ↓ {size(self.bytes_down)}"]
        if self.birth != self.round:
            late = self.round - self.birth
            lines.append(f"started       in round {self.birth}, from the model of then: {late} rounds late")
        if self.work < 1:
            lines.append(f"work          {100 * self.work:.1f} %, until the deadline")
        if self.of > 1:
            lines.append(f"arrived       {self.of} times in this round; --nth 0 to {self.of - 1} tells of each")
        return lines


def _some(values: tuple[float, ...], most: int = 8) -> str:
    """The first and the last of many numbers."""
    half = most // 2
    picked = values if len(values) <= most else (*values[:half], *values[-half:])
    texts = [f"{v:.4g}" for v in picked]
    return " ".join(texts if len(values) <= most else [*texts[:half], "…", *texts[half:]])


def replay(
    path: str | Path,
    round: int,
    client: int,
    trust: bool = False,
    training: Training | None = None,
    nth: int = 0,
) -> Replay:
    """Compute again what a client computed whose contribution came to an end in a round of a run.

    Args:
        path: the run's folder; it is only read.
        round: from 0; of a run that failed, also the round that it failed in.
        client: its number, from 0.
        trust: whether the run's config.toml may name code outside atoll.
        training: the same training before its first round, `atoll.rounds(model, data, plan, …)`, for a run that was
            started from Python; None makes it from config.toml.
        nth: which of its contributions, from 0, where several arrived in that round.
    Raises:
        UsageError: the client gave nothing in that round (the rounds in which it did are listed), there is no such
            client or round, or the data has changed.
        RunError: a round came out otherwise than the run wrote it down.
    """
    folder = Path(path)
    if training is None:
        training = training_in(folder, trust=trust)
    else:
        same_data(folder, training)
    _refuse_entropy(training.plan, folder.resolve().name)
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
        raise _was_not_there(folder, training, rows, round, client)
    if not 0 <= nth < len(flights):
        raise UsageError(
            f"nth = {nth}: client {client} came to an end {len(flights)} times in round {round}.",
            f"0 to {len(flights) - 1}.",
            write=f"atoll replay {folder.resolve().name} --round {round} --client {client} --nth {len(flights) - 1}",
        )
    whole = _whole(training, opened)
    if whole.fingerprint:
        checked += _check(folder, rows, round, whole.fingerprint)
    return _alone(training, opened, flights, nth, whole, {
        "run": folder.resolve().name, "round": round, "first": start, "checked": checked,
        "cohort": len(opened.state.air.flights) + flown.started,
        "fingerprint": whole.fingerprint, "notes": (whole.note,) if whole.note else (),
    })  # fmt: skip


def _refuse_entropy(plan: Plan, run: str) -> None:
    """Refuse a plan with a part that draws noise which no seed determines."""
    for part in (plan.local, plan.codec, plan.aggregator):
        if part.uses_entropy:
            raise UsageError(
                f"A replay of {run}, whose plan has {part!r}.",
                "a plan in which every draw comes from the seed.",
                "this part released noise from the operating system, and released noise is not drawn twice.",
                f"atoll show {run}",
            )


def _open(training: Training) -> tuple[Opened, Arrivals]:
    """The open round, and the flights of it."""
    engine = local_engine(training)
    opened = open_round(training.plan, training.state, engine)
    up = 0 if engine.fleet is None else message_bytes(opened.plan, training.task.layout)
    return opened, simulate_round(opened.plan, opened.state, opened.population, opened.cohort, engine.fleet, up)


def _flights(opened: Opened, flown: Arrivals, training: Training, client: int) -> list[tuple[Flight, str]]:
    """The flights of a client that ended in the round, in the order of their starts, and how each was lost if it was.

    Whoever was no longer awaited has started in this round: under a pace that flies on, everybody is awaited.
    """
    round = opened.state.round
    found = [(f, "") for f in flown.arrived if f.client == client]
    found += [(f, "it dropped out: what it computed never arrived") for f in flown.dropped if f.client == client]
    late = "no longer awaited: the round had closed"
    if training.fleet is not None:
        gone = [t for t in flown.trips if t.outcome == "late" and t.client == client]
        found += [(Flight(client, round, 0, t.number), late) for t in gone]
    elif flown.late and not found and client in opened.cohort.ids.tolist():
        found.append((Flight(client, round, 0, opened.state.air.started), late))
    return sorted(found, key=lambda pair: pair[0].number)


def _check_asked(folder: Path, training: Training, rows: Mapping[int, Any], round: int, client: int) -> None:
    """Refuse before anything is computed what the log already says was not so."""
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
            f"a round that was run, 0 to {last - 1}." if last else "a run that has made a round.",
            write=f"atoll replay {name} --round {max(0, last - 1)} --client {client}",
        )
    if _drawn(training):
        there = client in _cohort(training, round)
    else:
        ended, listed = _ended(folder)
        # Who is late stands in no list, nor does who came after the thousandth.
        unknown = round == last or listed.get(round, _TOLD) >= _TOLD or not training.plan.pace.asynchronous
        there = unknown or client in ended.get(round, ())
    if not there:
        raise _was_not_there(folder, training, rows, round, client)


def _drawn(training: Training) -> bool:
    """Whether the seed alone says who was at work in a round."""
    return training.plan.pace == Sync() and training.fleet is None


def _cohort(training: Training, round: int) -> list[int]:
    key = Key(training.settings.seed).fold("round", round).fold("cohort")
    ids: list[int] = training.plan.sampler(training.engine.population, round, key).ids.tolist()
    return ids


def _ended(folder: Path) -> tuple[dict[int, set[int]], dict[int, int]]:
    """Whose contributions arrived or were lost in each round, by events.jsonl, and how many arrivals that lists."""
    ended: dict[int, set[int]] = {}
    listed: dict[int, int] = {}
    failed: set[int] = set()
    for event in runs.read_rows(folder / "events.jsonl"):
        if event.get("event") == "failure":  # a failure stands before the arrivals of the round that it was found in
            failed.add(event.get("client", -1))
        elif event.get("event") == "clients":
            ids = event.get("id", [])
            ended[event["round"]], listed[event["round"]] = failed | set(ids), len(ids)
            failed = set()
    return ended, listed


def _was_not_there(folder: Path, training: Training, rows: Mapping[int, Any], round: int, client: int) -> UsageError:
    last, name = max(rows, default=-1) + 1, folder.resolve().name
    by_round = {t: set(_cohort(training, t)) for t in range(last)} if _drawn(training) else _ended(folder)[0]
    was = sorted(t for t, ids in by_round.items() if client in ids)
    told = ", ".join(map(str, was[:20])) + (f", … {was[-1]}" if len(was) > 20 else "")
    here = sorted(by_round.get(round, ()))
    if was:
        nearest = min(was, key=lambda t: abs(t - round))
        write = f"atoll replay {name} --round {nearest} --client {client}"
    else:
        write = f"atoll replay {name} --round {round} --client {here[0]}" if here else f"atoll show {name}"
    flies = training.plan.pace.asynchronous
    return UsageError(
        f"Client {client} was not at work in round {round} of {name}."
        if not flies
        else f"No contribution of client {client} came to an end in round {round} of {name}.",
        f"one of the rounds in which {'one did' if flies else 'it was'}: {told}."
        if was
        else "a client that was at work: this one never was.",
        "a contribution is told of in the round in which it arrives, or is lost, not in that in which it started."
        if flies
        else "who is not drawn into the cohort computes nothing.",
        write,
    )


def _failed(folder: Path) -> bool:
    """Whether the run ended because a round could not be run: that round has no row, and is the one to look at."""
    stops = [e for e in runs.read_rows(folder / "events.jsonl") if e.get("event") == "stop"]
    return bool(stops) and stops[-1].get("status") == "failed"


def _checkpoint(folder: Path, training: Training, round: int) -> int:
    """Put the training where the run's checkpoint stands, if that is at the round or before it; nothing is cut."""
    try:
        if not 0 < runs.read_pointer(folder)["facts"]["round"] <= round:
            return 0
        checkpoint = runs.RunFolder(folder).restore()
    except (
        AtollError
    ):  # there is none, or it is damaged, or of other versions: the long way tells what there is to tell
        return 0
    if checkpoint is None:
        return 0
    training.state = state_from_tensors(checkpoint.tensors, checkpoint.facts["round"], training.state)
    for segment in checkpoint.memory:
        training.memory.put(segment["ids"], without_prefix(segment, "rows/"))
    return int(checkpoint.facts["round"])


def _check(folder: Path, rows: Mapping[int, Mapping[str, Any]], round: int, now: str) -> int:
    """1 where the fingerprint of a round is the run's own, 0 where the run wrote none down."""
    was = rows.get(round, {}).get("fingerprint")
    if not was or was == now:
        return int(bool(was))
    about, here = runs.read_environment(folder), runs.environment()
    other = [
        f"{n} {about[n]}, here {here[n]}"
        for n in ("atoll", "torch", "numpy", "cpu", "machine")
        if n in about and about[n] != here.get(n)
    ]
    raise RunError(
        f"Round {round} of {folder.resolve().name} came out as {now}; the run wrote {was}.",
        "the same bits in every round.",
        f"it was made with other versions or another kind of CPU: {'; '.join(other)}."
        if other
        else "the versions are the same: code outside atoll, or the data behind a sample, has changed.",
        f"atoll show {folder.resolve().name}",
    )


class _Whole(NamedTuple):
    """The round as it was: its mean, the weight that arrived, the fingerprint after it; or a note why there is none."""

    mean: Tensor | None
    weight: float
    fingerprint: str
    note: str


def _whole(training: Training, opened: Opened) -> _Whole:
    try:
        gathered = local_engine(training).gather(opened.plan, opened.state, opened.cohort, opened.key)
    except RunError as error:
        return _Whole(None, 0.0, "", f"the round could not be run: {error.given}")
    total, mean, after, _ = close_round(opened, gathered)
    return _Whole(mean.means.get("update"), float(total.weight), fingerprint(after.model.theta), "")


def _alone(
    training: Training,
    opened: Opened,
    flights: list[tuple[Flight, str]],
    nth: int,
    whole: _Whole,
    told: dict[str, Any],
) -> Replay:
    """Run the client alone, as the engine does, and set what it gave beside the round's mean."""
    plan, state, data = opened.plan, opened.state, training.data
    flight, failure = flights[nth]
    kept = state.memory.take(torch.tensor([flight.client]))
    for earlier, lost in flights[:nth] if kept else ():  # what it keeps moves with each one that is accepted
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
        metrics = {n: float(s[0]) / max(1, seen) for n, s in sums.items() if n != "rows" and s.dim() == 1}
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
        part = (1 if plan.aggregator.weights == "equal" else rows) / whole.weight
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
        **told,
    )
