"""What one client computed in one round of a run, computed again: a run is a function of its config and its seed.

    atoll replay RUN --round 7 --client 3

The rounds before are trained again without writing anything, and each one's fingerprint of θ is held against the run's
own; where a checkpoint stands at that round or before it, from there on. Then the client is run alone: its numbers do
not depend on who is computed beside it, so they are the ones that it gave, and if it raised, it raises again.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atoll import runs
from atoll.errors import AtollError, RunError, UsageError
from atoll.plan.lanes import Lanes
from atoll.plan.plan import decode, descend, part_of, settle, step
from atoll.plan.slots import Broadcast, Cohort
from atoll.rng import Key
from atoll.saved import unpack
from atoll.task import Gradient, Model, Task
from atoll.tools.again import same_data, training_in
from atoll.training import Rounds


@dataclass(frozen=True)
class Replay:
    """One client in one round, as it was.

    Args:
        run: name of its folder.
        round: from 0.
        client: its number, and `name`, where it has one.
        rows: that it holds.
        cohort: how many were at work.
        losses: mean loss of each batch, in order: one a step of `Gradient` and `Train`, none of `Custom`.
        metrics: what it told of the round: the loss, or what the user's own loop returned; means over rows seen.
        seen: rows that it went through.
        update_norm: ‖gᵢ‖₂ before the codec; None where it raised.
        cosine: ⟨gᵢ, g⟩ / (‖gᵢ‖ ‖g‖), g the round's mean; None where there is none.
        share: (wᵢ/Σw) ⟨gᵢ, g⟩ / ‖g‖², its share of g; over the clients that arrived they sum to 1.
        failure: the whole traceback, or why its numbers were refused; empty where all was well.
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


def _some(values: tuple[float, ...], most: int = 8) -> str:
    """The first and the last of many numbers."""
    half = most // 2
    picked = values if len(values) <= most else (*values[:half], *values[-half:])
    texts = [f"{v:.4g}" for v in picked]
    return " ".join(texts if len(values) <= most else [*texts[:half], "…", *texts[half:]])


def replay(path: str | Path, round: int, client: int, trust: bool = False, training: Rounds | None = None) -> Replay:
    """Compute again what a client computed in a round of a run.

    Args:
        path: the run's folder; it is only read.
        round: from 0; of a run that failed, also the round that it failed in.
        client: its number, from 0.
        trust: whether the run's config.toml may name code outside atoll.
        training: the same training before its first round, `atoll.rounds(model, data, plan, …)`, for a run that was
            started from Python; None makes it from config.toml.
    Raises:
        UsageError: the client was not at work in that round (the rounds in which it was are listed), there is no such
            client or round, or the data has changed.
        RunError: a round came out otherwise than the run wrote it down.
    """
    folder = Path(path)
    if training is None:
        training = training_in(folder, trust=trust)
    else:
        same_data(folder, training)
    rows = {row["round"]: row for row in runs.read_rows(folder / "metrics.jsonl") if "round" in row}
    _check_asked(folder, training, rows, round, client)
    start = _checkpoint(folder, training, round)
    checked = 0
    for t in range(start, round):
        training.state, _ = step(training.plan, training.state, training.engine)
        checked += _check(folder, rows, t, runs.fingerprint(training.state.model.theta))
    cohort = _cohort(training, round)
    mean, weight, fingerprint, note = _whole(training, cohort)
    if fingerprint:
        checked += _check(folder, rows, round, fingerprint)
    return _alone(training, client, cohort, mean, weight, {
        "run": folder.resolve().name, "round": round, "first": start, "checked": checked, "fingerprint": fingerprint,
        "notes": (note,) if note else (),
    })  # fmt: skip


def _cohort(training: Rounds, round: int) -> Cohort:
    """Who was at work in a round: a function of the seed."""
    key = Key(training.settings.seed).fold("round", round).fold("cohort")
    return training.plan.sampler(training.engine.population, round, key)


def _check_asked(folder: Path, training: Rounds, rows: Mapping[int, Any], round: int, client: int) -> None:
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
    if client in _cohort(training, round).ids.tolist():
        return
    was = [t for t in range(last) if client in _cohort(training, t).ids.tolist()]
    told = ", ".join(map(str, was[:20])) + (f", … {was[-1]}" if len(was) > 20 else "")
    nearest = min(was, key=lambda t: abs(t - round), default=None)
    raise UsageError(
        f"Client {client} was not at work in round {round} of {name}.",
        f"one of the rounds in which it was: {told}." if was else "a client that was at work: this one never was.",
        "who is not drawn into the cohort computes nothing.",
        f"atoll replay {name} --round {nearest} --client {client}"
        if nearest is not None
        else f"atoll replay {name} --round {round} --client {int(_cohort(training, round).ids[0])}"
        if len(_cohort(training, round).ids)
        else f"atoll show {name}",
    )


def _failed(folder: Path) -> bool:
    """Whether the run ended because a round could not be run: that round has no row, and is the one to look at."""
    stops = [e for e in runs.read_rows(folder / "events.jsonl") if e.get("event") == "stop"]
    return bool(stops) and stops[-1].get("status") == "failed"


def _checkpoint(folder: Path, training: Rounds, round: int) -> int:
    """Put the training where the run's checkpoint stands, if that is at the round or before it; nothing is cut."""
    try:
        if not 0 < runs.read_pointer(folder)["facts"]["round"] <= round:
            return 0
        checkpoint = runs.Folder(folder).restore()
    except (
        AtollError
    ):  # there is none, or it is damaged, or of other versions: the long way tells what there is to tell
        return 0
    if checkpoint is None:
        return 0
    training.state = unpack(checkpoint.tensors, checkpoint.facts["round"], training)
    for segment in checkpoint.memory:
        rows = {n.removeprefix("rows/"): r for n, r in segment.items() if n != "ids"}
        training.memory.put(segment["ids"], rows)
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


def _whole(training: Rounds, cohort: Cohort) -> tuple[Tensor | None, float, str, str]:
    """The round as it was: its mean, the weight that arrived, the fingerprint after it; or a note why there is none."""
    plan, state, engine = training.plan.at(training.engine), training.state, training.engine
    try:
        gathered = engine.gather(plan, state, cohort, state.key())
    except RunError as error:
        return None, 0.0, "", f"the round could not be run: {error.given}"
    total, server = settle(plan, decode(plan, state, gathered), state, state.key())
    mean = plan.aggregator.finish(total, cohort, engine.population)
    after = descend(plan, state, mean, server)
    return mean.means.get("update"), float(total.weight), runs.fingerprint(after.model.theta), ""


@dataclass(frozen=True)
class _Steps(Lanes):
    """Lanes that keep the mean loss of every step."""

    losses: list[float] = field(default_factory=list)

    def gradient(self, task: Task, model: Model, positions: Tensor, counts: tuple[int, ...], key: Key) -> Gradient:
        got = super().gradient(task, model, positions, counts, key)
        self.losses.append(float(got.loss[0]) / max(1, counts[0]))
        return got


def _alone(
    training: Rounds, client: int, cohort: Cohort, mean: Tensor | None, weight: float, told: dict[str, Any]
) -> Replay:
    """Run the client alone, as the engine does, and set what it gave beside the round's mean."""
    plan, state, data, task = training.plan, training.state, training.data, training.task
    ids = torch.tensor([client])
    rows = int(data.sizes[client])
    own = getattr(plan.local, "numerics", task.numerics)
    task = task if own == task.numerics else replace(task, numerics=own)
    lanes = _Steps(data, ids, (rows,), task.layout.dtype)
    key = state.key().fold("clients").of(ids).fold("local")
    kept = part_of(state.memory.take(ids), "local")
    failure, update, metrics, seen = "", None, {}, 0
    began = time.perf_counter()
    try:
        given, _ = plan.local.contribute(Broadcast(state.round, state.model, state.server), lanes, kept, key, task)
        update = given.means["update"][0].double() if "update" in given.means else None
        seen = int(given.sums["rows"][0]) if "rows" in given.sums else 0
        metrics = {n: float(s[0]) / max(1, seen) for n, s in given.sums.items() if n != "rows" and s.dim() == 1}
        odd = [n for n, t in (*given.means.items(), *given.sums.items()) if not bool(torch.isfinite(t).all())]
        failure = f"not finite: {', '.join(odd)}" if odd else ""
    except Exception:
        failure = traceback.format_exc()
    norm = None if update is None else float(torch.linalg.vector_norm(update))
    cosine = share = None
    if update is not None and mean is not None and not failure:
        inner, length = float(update @ mean.double()), float(torch.linalg.vector_norm(mean.double()))
        cosine = inner / (norm * length) if norm and length else None
        part = (1 if getattr(plan.aggregator, "weights", "examples") == "equal" else rows) / weight
        share = part * inner / length**2 if length and plan.aggregator.linear else None
    return Replay(
        client=client,
        name=data.names[client] if data.names else "",
        rows=rows,
        cohort=len(cohort.ids),
        losses=tuple(lanes.losses),
        metrics=metrics,
        seen=seen,
        update_norm=norm,
        cosine=cosine,
        share=share,
        failure=failure,
        seconds=time.perf_counter() - began,
        **told,
    )
