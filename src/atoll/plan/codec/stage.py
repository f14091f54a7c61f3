"""Codecs: what happens to an update on its way, as a chain of two-sided stages.

A stage has a client's half, `encode`, and up to three halves of the server's:

    open     each message as it arrives (dequantise, scatter what was kept)
    decode   each sum of one birth (undo a rotation): linear, keyed, without state
    settle   the round's total

`a >> b` runs a first and is itself a stage. A sum of opened messages cannot be opened again, so a stage that
decodes may not follow one that opens. Before a run a codec is told where it works, `codec.at(layout, everyone)`: how
long the vector is, how the model lies in it, and how much all clients weigh.

What `server` gives travels to the clients with θ, but for tensors whose name, or the last part of it behind a dot,
begins with `_`: they stay at the server, and no bytes are counted for them. Every name keeps that beginning in a chain
(`0._sum`) and in a codec around another (`codec._sum`).
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import NamedTuple, Self, TypeVar

import torch
from torch import Tensor

from atoll.errors import RunError, UsageError
from atoll.layout import Entry, Layout
from atoll.names import under, without_prefix
from atoll.plan.codec import wire
from atoll.plan.codec.wire import Field, Form
from atoll.plan.part import Part
from atoll.plan.slots import Tensors, Total
from atoll.rng import Key

T = TypeVar("T")
Encoded = tuple[Tensor, Tensors, Tensors, Tensors]


class Place(NamedTuple):
    """Where a codec works: the layout of the vector it is given; Σ w over all clients there are, if somebody said."""

    layout: Layout
    everyone: Tensor | None


def flat(d: int, dtype: torch.dtype = torch.float32) -> Layout:
    """The layout of a plain vector of d numbers.

    Example:
        >>> flat(8).d
        8
    """
    return Layout((Entry("x", (d,), dtype, "params"),), dtype)


class Codec(Part):
    """The defaults of a stage: nothing is changed, nothing is kept. `a >> b` is a chain.

    Every method works on the last axis of lanes `[K, d]`, one row a client.
    """

    opens = False  # the server must open each message: its payloads do not add up
    decodes = False  # the server must decode each sum
    packs = False  # the payload is packed: no other stage can work on its numbers
    seals = False  # it works on the bytes of the whole message, not on numbers
    native = False  # it needs the model's own coordinates, the same ones every round
    remembers_everyone = False  # the server adds to a mean over all clients, those that are away included
    place: Place | None = None

    def at(self, layout: Layout, everyone: Tensor | int | None = None) -> Self:
        """The same codec, told where it works; as a value it is equal.

        Args:
            layout: of the vector that it is given.
            everyone: Σ w over all clients there are, as the aggregator weighs them; only `Shift` asks for it.
        """
        placed = copy(self)
        object.__setattr__(placed, "place", Place(layout, None if everyone is None else torch.as_tensor(everyone)))
        return placed

    @property
    def layout(self) -> Layout:
        """The layout of the vector that it is given.

        Raises:
            RunError: nobody said.
        """
        return self._known(self.place and self.place.layout, "how long its vector is", "codec.at(layout)")

    @property
    def everyone(self) -> Tensor:
        """Σ w over all clients there are.

        Raises:
            RunError: nobody said.
        """
        known = self.place and self.place.everyone
        return self._known(known, "how much all clients weigh", "codec.at(layout, everyone)")

    def _known(self, value: T | None, what: str, write: str) -> T:
        if value is None:
            raise RunError(f"{self!r} does not know {what}.", "a codec that was told.", "no message says so.", write)
        return value

    def after(self, layout: Layout) -> Layout:
        """The layout of the payload's numbers, which the next stage is given."""
        return layout

    def contraction(self) -> Codec:
        """This codec if E|x − C(x)|² < |x|² for every x, as error feedback needs it; else the nearest one like it."""
        return self

    def form(self, layout: Layout) -> Form:
        """What a message holds."""
        return Form({}, Field(layout.dtype, layout.d))

    def flaws(self, payload: Tensor | None, side: Tensors) -> None:
        """Refuse a message that no client could have sent; the payload is None where another stage packed it.

        Raises:
            MessageError: which message, and what is wrong with it.
        """

    def encode(self, x: Tensor, memory: Tensors, shared: Tensors, key: Key) -> Encoded:
        """The client's half: (payload for the next stage, side tensors, sums to add, memory after)."""
        return x, {}, {}, memory

    def open(self, x: Tensor, side: Tensors) -> Tensor:
        """Each message as it arrives."""
        return x

    def decode(self, x: Tensor, key: Key) -> Tensor:
        """The sum of one birth, `[..., after]`; must be linear, and the same for every client."""
        return x

    @property
    def sealer(self) -> Codec | None:
        """The stage that works on the bytes of its messages, if there is one."""
        return self if self.seals else None

    def seal(self, form: Form, messages: Sequence[bytes]) -> list[bytes]:
        """Messages as they cross a wire, none longer than before."""
        return list(messages)

    def unseal(self, form: Form, data: Sequence[bytes]) -> list[bytes]:
        """The messages that were sealed.

        Raises:
            MessageError: the bytes cannot have been sealed.
        """
        return list(data)

    def nbytes(self, layout: Layout) -> int:
        """How many bytes a message has, at most; exactly so many where nothing seals it."""
        return self.form(layout).nbytes

    def sizes(self, payload: Tensor, side: Tensors) -> Tensor:
        """How many bytes the message of each lane has, int64 `[K]`."""
        lanes = payload.shape[0]
        if self.sealer:
            return torch.tensor([len(one) for one in self.to_bytes(payload, side)], dtype=torch.int64)
        whole = sum(t.numel() * t.element_size() for t in (payload, *side.values()))
        return torch.full((lanes,), whole // max(1, lanes), dtype=torch.int64)

    def to_bytes(self, payload: Tensor, side: Tensors) -> list[bytes]:
        """The message of each lane, as it crosses a wire."""
        form = self.form(self.layout)
        messages = wire.to_bytes(form, payload, side)
        return self.sealer.seal(form, messages) if self.sealer else messages

    def from_bytes(self, data: Sequence[bytes]) -> tuple[Tensor, dict[str, Tensor]]:
        """(payload, side) of some messages, a row each.

        Raises:
            MessageError: the bytes are no message of this codec for this layout.
        """
        form = self.form(self.layout)
        payload, side = wire.from_bytes(form, self.sealer.unseal(form, data) if self.sealer else data)
        self.flaws(payload, side)
        return payload, side

    def __rshift__(self, other: Codec) -> Chain:
        mine = self.stages if isinstance(self, Chain) else (self,)
        return Chain((*mine, *(other.stages if isinstance(other, Chain) else (other,))))


def arrived(codec: Codec, payload: Tensor, side: Tensors, key: Key) -> Tensor:
    """What the server will make of messages, one by one: open, then decode."""
    return codec.decode(codec.open(payload, side), key)


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
        UsageError: a stage that decodes stands behind one that opens, one that works on numbers behind one that packs
            them, any behind one that seals, or one that needs the model's own coordinates behind one that changes them.
    """

    stages: tuple[Codec, ...]

    def __post_init__(self) -> None:
        for stage in self.stages:
            if not isinstance(stage, Codec):
                raise UsageError(f"{stage!r} in a codec.", "a stage.", write="Identity() >> Identity()")
        for i, b in enumerate(self.stages):
            for a in self.stages[:i]:
                if clash := _clash(a, b):
                    raise UsageError(f"{a!r} >> {b!r}.", *clash, write=_instead(a, b))

    @property
    def opens(self) -> bool:  # type: ignore[override]
        return any(stage.opens for stage in self.stages)

    @property
    def decodes(self) -> bool:  # type: ignore[override]
        return any(stage.decodes for stage in self.stages)

    @property
    def packs(self) -> bool:  # type: ignore[override]
        return any(stage.packs for stage in self.stages)

    @property
    def native(self) -> bool:  # type: ignore[override]
        return any(stage.native for stage in self.stages)

    @property
    def remembers_everyone(self) -> bool:  # type: ignore[override]
        return any(stage.remembers_everyone for stage in self.stages)

    @property
    def sealer(self) -> Codec | None:
        return self.stages[-1].sealer if self.stages else None

    @property
    def _last(self) -> int:
        """The stage whose payload is the message's."""
        return max((i for i, stage in enumerate(self.stages) if not stage.seals), default=len(self.stages) - 1)

    def contraction(self) -> Codec:
        return Chain(tuple(stage.contraction() for stage in self.stages))

    def __repr__(self) -> str:
        return " >> ".join(map(repr, self.stages))

    def at(self, layout: Layout, everyone: Tensor | int | None = None) -> Self:
        placed = super().at(layout, everyone)
        stages = tuple(stage.at(here, everyone) for stage, here in self._along(layout))
        object.__setattr__(placed, "stages", stages)
        return placed

    def _along(self, layout: Layout) -> list[tuple[Codec, Layout]]:
        out = []
        for stage in self.stages:
            out.append((stage, layout))
            layout = stage.after(layout)
        return out

    def after(self, layout: Layout) -> Layout:
        for stage in self.stages:
            layout = stage.after(layout)
        return layout

    def memory(self, layout: Layout) -> Tensors:
        return _join([stage.memory(here) for stage, here in self._along(layout)])

    def server(self, layout: Layout) -> Tensors:
        return _join([stage.server(here) for stage, here in self._along(layout)])

    def form(self, layout: Layout) -> Form:
        forms = [stage.form(here) for stage, here in self._along(layout)]
        side = {f"{i}.{name}": field for i, form in enumerate(forms) for name, field in form.side.items()}
        return Form(side, forms[self._last].payload if forms else Field(layout.dtype, layout.d))

    def flaws(self, payload: Tensor | None, side: Tensors) -> None:
        for i, stage in enumerate(self.stages):
            stage.flaws(payload if i == self._last else None, _of(side, i))

    def encode(self, x: Tensor, memory: Tensors, shared: Tensors, key: Key) -> Encoded:
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


def _join(many: list[Tensors]) -> dict[str, Tensor]:
    return {name: t for i, tensors in enumerate(many) for name, t in under(f"{i}.", tensors).items()}


def _of(tensors: Tensors, i: int) -> dict[str, Tensor]:
    return without_prefix(tensors, f"{i}.")


def _clash(a: Codec, b: Codec) -> tuple[str, str] | None:
    """What is required, and why, where b can stand nowhere behind a."""
    if b.native and (a.opens or a.decodes):
        return (
            f"{type(b).__name__} before what changes coordinates.",
            "what it keeps belongs to the model's own coordinates; those behind are others, for every client or round.",
        )
    if a.sealer or (a.packs and not b.seals):
        return (
            "what packs at the end of a codec.",
            "packed codes are no numbers that another stage could work on.",
        )
    if a.opens and b.decodes:
        return (
            "stages that decode before stages that open.",
            "the sum is decoded once, after each message was opened: what is done last is undone first.",
        )
    return None


def _instead(a: Codec, b: Codec) -> str:
    """A codec that can be built, as near as possible to a >> b, which cannot."""
    for outer, inner in ((b, (a, getattr(b, "codec", None))), (a, (b, getattr(a, "codec", None)))):
        if isinstance(inner[1], Codec) and not _clash(inner[0], inner[1]) and not inner[0].native:
            return f"{type(outer).__name__}({inner[0].contraction()!r} >> {inner[1]!r})"
    return repr(a) if _clash(b, a) else f"{b!r} >> {a!r}"
