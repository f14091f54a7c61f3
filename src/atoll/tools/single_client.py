"""The contribution of one flight, computed in a chunk of one client.

The engine trained the client in a chunk with others. The numbers of a client do not depend on the chunk, so they are
the same here.

Tests: tests/surface/test_replay_flights.py
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from atoll.engine.chunks import task_for
from atoll.engine.contribution import Chunk, contribute_chunk
from atoll.plan.in_flight import Flight
from atoll.plan.plan import Plan
from atoll.plan.protocols import Contribution, Ids, Tensors
from atoll.plan.state import State
from atoll.training.rounds import Training


class ClientResult(NamedTuple):
    """The results of one flight.

    Args:
        contribution: as the local part gave it, `[1, …]`.
        sent: the update as the server decodes it, `[d]`; None if the contribution has no update.
        bytes: length of the message.
        kept: client state after the flight, rows `[1, …]` by `part/name`.
    """

    contribution: Contribution
    sent: Tensor | None
    bytes: int
    kept: Tensors


def compute(
    training: Training, plan: Plan, state: State, flight: Flight, kept: Tensors, losses: list[float]
) -> ClientResult:
    """Compute one flight from the model version and the keys of the round that it started in.

    Args:
        training: its data and task are read.
        plan: the algorithm, bound.
        state: of the opened round.
        flight: of the client.
        kept: client state before the flight, rows `[1, …]` by `part/name`.
        losses: receives the mean loss of each step.
    """
    ids, key = Ids(torch.tensor([flight.client]), torch.tensor([flight.again])), state.key(flight.version)
    chunk: Chunk = contribute_chunk(
        plan,
        task_for(plan, training.task),
        training.data,
        state.version(flight.version),
        ids,
        key,
        kept,
        on_step=lambda lane, step, loss: losses.append(loss),
        share=flight.share,
    )
    update = chunk.decoded.means.get("update")
    sent = None if update is None else plan.codec.decode_sum(update, key.fold("codec"))[0]
    return ClientResult(chunk.contribution, sent, int(chunk.bytes[0]), chunk.memory)


def rejection(given: ClientResult) -> str:
    """The names of the tensors that are not finite: engines reject such a contribution. Empty if there are none."""
    tensors = {**given.contribution.means, **given.contribution.sums}
    found = [n for n, t in tensors.items() if not bool(torch.isfinite(t).all())]
    return f"not finite: {', '.join(found)}" if found else ""
