"""What worker processes import by name in the tests of engines: parts, loops and losses of somebody else's."""

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
    """A codec that is not atoll's own: half of every number."""

    def encode(
        self, x: Tensor, memory: Mapping[str, Tensor], shared: Mapping[str, Tensor], key: object
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
        return x / 2, {}, {}, {}


def descend(model: nn.Module, loader: object, ctx: object) -> dict[str, float]:
    """One pass of plain descent, and a draw from the global generator."""
    for x, y in loader:  # type: ignore[attr-defined]
        model.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad + 1e-3 * torch.randn_like(p)
    return {"loss": float(loss.detach())}


def huber(output: Tensor, y: Tensor) -> Tensor:
    """A loss of somebody's own."""
    return nn.functional.huber_loss(output.reshape(y.shape), y, reduction="none")


@dataclass(frozen=True, eq=False)
class Deadly:
    """Rows that kill the process which reads one of them, as often as the file of crosses has room.

    Args:
        rows: the rows.
        row: the one.
        times: how often it kills.
        crosses: a file; it grows by one byte a death.
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
    """Rows of which one is never read to its end.

    Args:
        rows: the rows.
        row: the one.
        gate: a pipe with a name, that nobody writes to.
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
    """Rows that say who reads them, and then wait for the end, so many times; on some nodes they are plain rows.

    Args:
        rows: the rows.
        spared: the ids of those nodes.
        times: how often somebody waits.
        crosses: a file; it grows by one byte each time.
        door: a pipe with a name, on which the process id is told.
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
