"""Custom parts, loops, losses and data sets that worker processes import by name in the tests of engines."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from atoll.data import Rows
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


def huber(output: Tensor, y: Tensor) -> Tensor:
    """A custom loss."""
    return nn.functional.huber_loss(output.reshape(y.shape), y, reduction="none")


@dataclass(frozen=True, eq=False)
class Deadly:
    """Rows that kill the process that reads one of them, until `crosses` has `times` bytes.

    Args:
        rows: the rows.
        row: the index of the deadly row.
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
