"""Functions that the local parts share: build and declare a contribution with an update, and check arguments.

Tests: tests/identities/test_local_sgd.py
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from atoll.base.errors import UsageError
from atoll.compute.batches import ClientBatch
from atoll.compute.layout import CHANGED, Layout
from atoll.compute.task import Task
from atoll.plan.buffers import flags_of
from atoll.plan.protocols import (
    Broadcast,
    Contribution,
    Declared,
    Tensors,
)

Keep = Literal["optimizer", "order"]


class Trained(NamedTuple):
    """The result of local training: y₀ − y `[K, d]`, buffers `[K, b]`, counters, and Σ losses over the rows, `[K]`."""

    update: Tensor
    buffers: Tensor
    counters: Tensors
    loss: Tensor
    rows: Tensor


def contribution_of(
    lanes: ClientBatch,
    broadcast: Broadcast,
    layout: Layout,
    update: Tensor,
    buffers: Tensor,
    counters: Tensors,
    sums: Tensors,
) -> Contribution:
    """Build a contribution that contains an update, and buffers if the model has any that clients send."""
    means = {"update": update}
    kept = {n: t for n, t in counters.items() if n not in layout.dropped}
    sent = layout.sent
    if buffers.shape[-1] and (sent is None or len(sent)):
        means["buffers"] = buffers if sent is None else buffers[:, sent.to(buffers.device)]
        kept[CHANGED] = flags_of(layout, broadcast.model.buffers, buffers)
    facts = {"loss": _each(sums["loss"], sums["rows"])} if "loss" in sums else {}
    return Contribution(means, sums, lanes.rows, kept, facts)


def declared_update(task: Task) -> dict[str, Declared]:
    """The declaration of a contribution that contains an update, the loss and the rows."""
    layout = task.layout
    sent = layout.b if layout.sent is None else len(layout.sent)
    buffers = {"buffers": Declared(sent, layout.dtype, "mean")} if sent else {}
    return {
        "update": Declared(layout.d, layout.dtype, "mean"),
        **buffers,
        "loss": Declared(1, layout.dtype, "sum"),
        "rows": Declared(1, torch.int64, "sum"),
    }


def _each(total: Tensor, rows: Tensor) -> Tensor:
    """The mean per row, on the device of the total."""
    return total / rows.to(total.device).clamp(min=1)


def check_batch(part: str, batch: Any) -> None:
    if batch is not None and (isinstance(batch, bool) or not isinstance(batch, int) or batch < 1):
        raise UsageError(
            f"{part}: batch = {batch!r}.",
            "a whole number of rows, at least 1, or None for all rows at once.",
            write={"Gradient": "Gradient(batch=32)", "Train": "Train(sgd(0.1), epochs=1, batch=10)"}.get(part, ""),
        )


def check_sends(part: str, sends: Any, write: str) -> None:
    if not isinstance(sends, str) or sends not in ("update", "model"):
        raise UsageError(f"{part}(sends={sends!r}).", "'update' or 'model'.", write=write)
