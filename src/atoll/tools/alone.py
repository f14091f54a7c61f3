"""One client's flight, computed by itself: what an engine computes for it among others, step by step."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from atoll.engine.work import rest_of
from atoll.fused import Heard
from atoll.plan.in_flight import Flight
from atoll.plan.lanes import Lanes
from atoll.plan.plan import Plan
from atoll.plan.protocols import Contribution, Tensors
from atoll.plan.state import State, part_of
from atoll.rng import Key
from atoll.task import Gradient, Model, Task
from atoll.training.rounds import Rounds


@dataclass(frozen=True)
class _Steps(Lanes):
    """Lanes that keep the mean loss of every step."""

    losses: list[float] = field(default_factory=list)

    def gradient(self, task: Task, model: Model, positions: Tensor, counts: tuple[int, ...], key: Key) -> Gradient:
        got = super().gradient(task, model, positions, counts, key)
        self.losses.append(float(got.loss[0]) / max(1, counts[0]))
        return got


@dataclass(frozen=True)
class _Watched(Task):
    """A task whose steps are heard where they are part of the backward pass."""

    losses: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, task: Task, losses: list[float]) -> _Watched:  # type: ignore[override]
        return cls(**{f.name: getattr(task, f.name) for f in fields(Task) if f.init}, losses=losses)

    def descent(self, model: Model, lanes: int, lr: float, heard: Heard | None = None) -> Any:
        def listen(lost: Tensor, counts: tuple[int, ...]) -> None:
            self.losses.append(float(lost[0]) / max(1, counts[0]))

        return super().descent(model, lanes, lr, listen)


class Given(NamedTuple):
    """What a client computed in one flight: its contribution, its update as the server decodes it, the message's bytes,
    and what it keeps."""

    contribution: Contribution
    sent: Tensor | None
    bytes: int
    kept: Tensors


def compute(training: Rounds, plan: Plan, state: State, flight: Flight, kept: Tensors, losses: list[float]) -> Given:
    """One flight, as the engine computes it: from the model it started from, by the keys of then.

    Args:
        training: for its data and task.
        plan: told where it works, as `step` has it.
        state: of the round, its downlink told.
        flight: whose client computes.
        kept: what the client keeps before, rows `[1, …]` by `part/name`.
        losses: takes the mean loss of each step.
    """
    data = training.data
    own = plan.local.numerics or training.task.numerics
    task = _Watched.of(replace(training.task, numerics=own), losses)
    ids = torch.tensor([flight.client])
    lanes = _Steps(data, ids, task.layout.dtype, flight.share, task.device, losses)
    kept = {n: t.to(task.device) for n, t in kept.items()}
    broadcast = state.version(flight.birth)
    round_key = state.key(flight.birth)
    key = round_key.starts(ids, torch.tensor([flight.again]))
    contribution, local = plan.local.contribute(
        broadcast, lanes, part_of(kept, "local"), key.fold("clients", "local"), task
    )
    after = {f"local/{n}": t for n, t in local.items()}
    update, bytes_ = contribution.means.get("update"), rest_of(contribution)
    if update is None:
        return Given(contribution, None, bytes_, after)
    payload, side, _, codec = plan.codec.encode(
        update, part_of(kept, "codec"), broadcast.shared["codec"], key.fold("codec").to(task.device)
    )
    sent = plan.codec.decode_sum(plan.codec.decode(payload, side), round_key.fold("codec"))
    bytes_ += int(plan.codec.sizes(payload, side)[0])
    return Given(contribution, sent[0], bytes_, {**after, **{f"codec/{n}": t for n, t in codec.items()}})


def odd(given: Given) -> str:
    """What of a contribution is refused by every engine."""
    tensors = {**given.contribution.means, **given.contribution.sums}
    found = [n for n, t in tensors.items() if not bool(torch.isfinite(t).all())]
    return f"not finite: {', '.join(found)}" if found else ""
