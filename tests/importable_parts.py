"""Custom parts, loops, losses and data sets that worker processes import by name in the tests of engines."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from atoll.data import ArrayRows, Clients, Rows
from atoll.data.fields import pack_fields
from atoll.plan.codec.stage import Codec


@dataclass(frozen=True, repr=False)
class Halve(Codec):
    """A custom codec: half of every number."""

    def encode(
        self, x: Tensor, memory: Mapping[str, Tensor], shared: Mapping[str, Tensor], key: object
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        return x / 2, {}, {}, {}


def descend(model: nn.Module, loader: object, ctx: object) -> dict[str, float]:
    """One pass of plain gradient descent, with a draw from the global generator at each step."""
    for x, y in loader:  # type: ignore[attr-defined]
        model.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad + 1e-3 * torch.randn_like(p)
    return {"loss": float(loss.detach())}


def personal(model: nn.Module) -> dict[str, Tensor]:
    """The client memory of `remember`: the last layer of the model, a momentum vector, and counts of several dtypes."""
    return {
        "head": list(model.parameters())[-1],
        "momentum": torch.zeros(sum(p.numel() for p in model.parameters())),
        "visits": torch.zeros((), dtype=torch.int64),
        "half": torch.full((2, 3), 0.5, dtype=torch.bfloat16),
        "nothing": torch.zeros(0),
    }


def remember(model: nn.Module, loader: object, ctx: Any) -> dict[str, float]:
    """Momentum that lasts between rounds, and a last layer that stays at the client."""
    last = list(model.parameters())[-1]
    server = last.detach().clone()
    last.data.copy_(ctx.memory["head"])
    out = descend(model, loader, ctx)
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    ctx.memory["momentum"] = 0.5 * ctx.memory["momentum"] + flat
    ctx.memory["head"] = last.detach().clone()
    ctx.memory["visits"] += 1
    ctx.memory["half"] *= 1.5
    last.data.copy_(server)
    if ctx.client == 2 and ctx.round == 1:
        raise ConnectionError("the site is gone")
    return {**out, "visits": float(ctx.memory["visits"])}


class Masked(nn.Module):
    """A model of rows of two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, values: Tensor, mask: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(values.masked_fill(mask, 0.0))))  # type: ignore[no-any-return]


def masked(data: Clients) -> Clients:
    """The same clients, with a mask of the negative numbers as a second tensor of each row."""
    x, y = data.rows.take(torch.arange(len(data.rows)))
    words, fields = pack_fields({"values": x, "mask": x < 0}, 1)
    return replace(data, rows=ArrayRows(words, y, fields=fields), features=tuple(words.shape[1:]))


def huber(output: Tensor, y: Tensor) -> Tensor:
    """A custom loss."""
    return nn.functional.huber_loss(output.reshape(y.shape), y, reduction="none")


@dataclass(frozen=True, eq=False)
class Deadly:
    """Rows that kill the process that reads one of them, until `crosses` has `times` bytes.

    Args:
        rows: the rows.
        row: the index of the row that kills.
        times: the number of kills.
        crosses: a file that grows by one byte at each kill.
    """

    rows: Rows
    row: int
    times: int
    crosses: str

    def __len__(self) -> int:
        return len(self.rows)

    def targets(self) -> Tensor:
        return self.rows.targets()

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        path = Path(self.crosses)
        if bool((index == self.row).any()) and path.stat().st_size < self.times:
            path.write_bytes(path.read_bytes() + b"+")
            os.kill(os.getpid(), signal.SIGKILL)
        return self.rows.take(index)


@dataclass(frozen=True, eq=False)
class Waiting:
    """Rows of which one blocks its reader forever.

    Args:
        rows: the rows.
        row: the index of that row.
        gate: a named pipe without a writer.
    """

    rows: Rows
    row: int
    gate: str

    def __len__(self) -> int:
        return len(self.rows)

    def targets(self) -> Tensor:
        return self.rows.targets()

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        if bool((index == self.row).any()):
            Path(self.gate).read_bytes()
        return self.rows.take(index)


@dataclass(frozen=True, eq=False)
class Knocking:
    """Rows that report the process id of their reader and then block it, `times` times.

    On the nodes in `spared` they are plain rows.

    Args:
        rows: the rows.
        spared: node ids.
        times: the number of readers that block.
        crosses: a file that grows by one byte for each of them.
        door: a named pipe to which the process id is written.
    """

    rows: Rows
    spared: tuple[str, ...]
    times: int
    crosses: str
    door: str

    def __len__(self) -> int:
        return len(self.rows)

    def targets(self) -> Tensor:
        return self.rows.targets()

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        import ray

        path = Path(self.crosses)
        if ray.get_runtime_context().get_node_id() not in self.spared and path.stat().st_size < self.times:
            path.write_bytes(path.read_bytes() + b"+")
            Path(self.door).write_text(str(os.getpid()))
            signal.pause()
        return self.rows.take(index)
