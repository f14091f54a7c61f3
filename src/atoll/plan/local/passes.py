"""Passes over the rows of clients that make no step.

Tests: tests/identities/test_local_sgd.py, tests/identities/test_fairness.py
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from atoll.base.random import Key
from atoll.compute.batches import ROWS, ClientBatch, padded
from atoll.compute.model_state import Model
from atoll.compute.task import OnRows, Task
from atoll.plan.protocols import Broadcast, Contribution


def measured(broadcast: Broadcast, lanes: ClientBatch, key: Key, task: Task, on_rows: OnRows | None) -> Contribution:
    """The sums of the clients' rows, in passes of at most `ROWS` rows of each client, or in one if rows are coupled."""
    lanes = replace(lanes, key=None)  # a row of an evaluation draws the same in each round
    model = broadcast.model.lanes(len(lanes.sizes))
    positions = torch.arange(padded(lanes.sizes[0]), device=lanes.ids.device).expand(len(lanes.sizes), -1)
    sums: dict[str, Tensor] = {}
    start = 0
    most = positions.shape[1] if task.findings.couples_in_evaluation else ROWS
    for number, piece in enumerate(positions.split(most, 1)):
        counts = tuple(max(0, min(n - start, piece.shape[1])) for n in lanes.sizes)
        batch = lanes.take(lanes.places(piece), counts)
        for name, value in task.measure(model, batch, key.fold("piece", number), on_rows).items():
            sums[name] = sums[name] + value if name in sums else value
        start += piece.shape[1]
    sums["rows"] = lanes.rows
    facts = {n: s / lanes.rows.to(s.device) for n, s in sums.items() if n != "rows" and s.dim() == 1}
    return Contribution({}, sums, lanes.rows, {}, facts)


def gradient_of_each(model: Model, lanes: ClientBatch, key: Key, task: Task) -> Tensor:
    """The gradients of the mean losses of K clients over all their rows, `[K, d]`, in groups of one padded length.

    Args:
        model: that of all clients, or those of K clients.
        lanes: the rows of the clients.
        key: with one stream for each client.
        task: the model and the loss.
    """
    model, rows = model.lanes(len(lanes.sizes)), lanes.rows.to(torch.int64)
    widths, out = [padded(n) for n in rows.tolist()], torch.zeros_like(model.theta)
    for width in sorted({w for w, n in zip(widths, rows.tolist(), strict=True) if n}):
        index = torch.tensor([k for k, w in enumerate(widths) if w == width], device=lanes.ids.device)
        group = replace(lanes, ids=lanes.ids[index])
        positions = torch.arange(width, device=lanes.ids.device).expand(len(index), -1)
        some, counts = model.select(index.to(model.theta.device)), tuple(rows[index].tolist())
        out[index] = group.gradient(task, some, group.places(positions), counts, key.select(index)).grad
    return out


def measured_of_each(broadcast: Broadcast, lanes: ClientBatch, key: Key, task: Task) -> dict[str, Tensor]:
    """The sums of K clients of any number of rows, `[K, …]`, in groups of clients whose rows have one padded length.

    Args:
        broadcast: with the model of all clients, or those of K clients.
        lanes: the rows of the clients.
        key: with one stream for each client.
        task: the model, loss and metrics.
    """
    model, rows = broadcast.model.lanes(len(lanes.sizes)), lanes.rows.to(torch.int64)
    widths, sums = [padded(n) for n in rows.tolist()], dict[str, Tensor]()
    for width in sorted({w for w, n in zip(widths, rows.tolist(), strict=True) if n}):
        index = torch.tensor([k for k, w in enumerate(widths) if w == width], device=lanes.ids.device)
        index = index[rows[index].argsort(descending=True, stable=True)]
        some = broadcast._replace(model=model.select(index.to(model.theta.device)))
        group = replace(lanes, ids=lanes.ids[index], key=None)
        for name, t in measured(some, group, key.select(index), task, None).sums.items():
            if name != "rows":
                sums.setdefault(name, t.new_zeros(len(rows), *t.shape[1:]))[index.to(t.device)] = t
    return sums
