"""Codecs: what happens to an update on its way, as a chain of two-sided stages.

A stage has a client's half, `encode`, and up to three halves of the server's:

    open     each message as it arrives (dequantise, scatter a sparse support)
    decode   each sum of one birth (undo a rotation): linear, keyed, without state
    settle   the round's total (noise, adaptive bounds)

`a >> b` runs a first and is itself a stage. A sum of opened messages cannot be opened again, so a stage that
decodes may not follow one that opens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from atoll.errors import UsageError
from atoll.layout import Layout
from atoll.plan.part import Part
from atoll.plan.slots import Stage, Tensors, Total
from atoll.rng import Key


class Codec(Part):
    """The defaults of a stage: nothing is changed, nothing is kept. `a >> b` is a chain.

    Every method works on the last axis and broadcasts over leading ones.
    """

    opens = False
    decodes = False

    def encode(self, x: Tensor, memory: Tensors, shared: Tensors, key: Key) -> tuple[Tensor, Tensors, Tensors, Tensors]:
        """The client's half: (payload for the next stage, side tensors, sums to add, memory after)."""
        return x, {}, {}, memory

    def open(self, x: Tensor, side: Tensors) -> Tensor:
        """Each message as it arrives."""
        return x

    def decode(self, x: Tensor, key: Key) -> Tensor:
        """The sum of one birth; must be linear."""
        return x

    def __rshift__(self, other: Stage) -> Chain:
        mine = self.stages if isinstance(self, Chain) else (self,)
        return Chain((*mine, *(other.stages if isinstance(other, Chain) else (other,))))


@dataclass(frozen=True, repr=False)
class Identity(Codec):
    """Sends the update as it is.

    Example:
        >>> Identity() >> Identity()
        Identity() >> Identity()
    """


@dataclass(frozen=True, repr=False)
class Chain(Codec):
    """Stages one after another: to chain is to zip the stages with their states and thread the update through.

    Args:
        stages: in the order in which a client runs them.
    Raises:
        UsageError: a stage that decodes stands behind one that opens.
    """

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        opened: Any = None
        for stage in self.stages:
            if not isinstance(stage, Stage) or isinstance(stage, type):
                raise UsageError(f"{stage!r} in a codec.", "a stage.", write="Identity() >> Identity()")
            if opened is not None and stage.decodes:
                raise UsageError(
                    f"{opened!r} >> {stage!r}.",
                    "stages that decode before stages that open.",
                    "the sum is decoded once, after each message was opened: what is done last is undone first.",
                    f"{stage!r} >> {opened!r}",
                )
            opened = stage if stage.opens else opened

    @property
    def opens(self) -> bool:  # type: ignore[override]
        return any(stage.opens for stage in self.stages)

    @property
    def decodes(self) -> bool:  # type: ignore[override]
        return any(stage.decodes for stage in self.stages)

    def __repr__(self) -> str:
        return " >> ".join(map(repr, self.stages))

    def memory(self, layout: Layout) -> Tensors:
        return _join([stage.memory(layout) for stage in self.stages])

    def server(self, layout: Layout) -> Tensors:
        return _join([stage.server(layout) for stage in self.stages])

    def encode(self, x: Tensor, memory: Tensors, shared: Tensors, key: Key) -> tuple[Tensor, Tensors, Tensors, Tensors]:
        sides, kept, sums = [], [], dict[str, Tensor]()
        for i, stage in enumerate(self.stages):
            x, side, more, after = stage.encode(x, _of(memory, i), _of(shared, i), key.fold(i))
            sides.append(side)
            kept.append(after)
            sums |= more
        return x, _join(sides), sums, _join(kept)

    def open(self, x: Tensor, side: Tensors) -> Tensor:
        for i, stage in reversed(list(enumerate(self.stages))):
            x = stage.open(x, _of(side, i))
        return x

    def decode(self, x: Tensor, key: Key) -> Tensor:
        for i, stage in reversed(list(enumerate(self.stages))):
            x = stage.decode(x, key.fold(i))
        return x

    def settle(self, total: Total, server: Tensors, key: Key) -> tuple[Total, Tensors]:  # type: ignore[override]
        after: list[Tensors] = []
        for i, stage in reversed(list(enumerate(self.stages))):
            total, kept = stage.settle(total, _of(server, i), key.fold(i))
            after.insert(0, kept)
        return total, _join(after)


def _join(many: list[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{i}.{name}": t for i, tensors in enumerate(many) for name, t in tensors.items()}


def _of(tensors: Tensors, i: int) -> dict[str, Tensor]:
    return {n.removeprefix(f"{i}."): t for n, t in tensors.items() if n.startswith(f"{i}.")}
