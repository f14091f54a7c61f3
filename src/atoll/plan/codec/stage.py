"""Codecs: chains of stages that compress an update.

A stage has a client's half, `encode`, and up to three halves of the server's:

    decode          each message when it arrives (dequantise, scatter)
    decode_sum      the sum of each model version (undo a rotation): linear, keyed, without state
    server_update   the total of the round

`a >> b` runs a first and is itself a stage. A sum of decoded messages cannot be decoded again per message, so a stage
with `per_sum` may not follow one with `per_message`. Before a run `codec.bind(layout, total_weight)` gives a codec the
facts that no message carries: the layout of the vector, Σ w over the population, and the bound of the preceding stage.

Tensors of `server` are broadcast with θ. If the last part of a name after a dot begins with `_`, the tensor stays at
the server and counts no bytes. Names keep this beginning in a chain (`0._sum`) and in a wrapper (`codec._sum`).

Tests: tests/identities/test_codecs.py, tests/identities/test_codec_algebra.py
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from typing import NamedTuple, Self, TypeVar

import torch
from torch import Tensor

from atoll.base.errors import RunError, UsageError
from atoll.base.names import under, without_prefix
from atoll.base.random import Key
from atoll.base.validation import class_instead_of_value
from atoll.compute.layout import Entry, Layout
from atoll.plan import form as forms
from atoll.plan.form import Field, Form
from atoll.plan.protocols import Conflict, Declared, Release, RoundInfo, Slots, Stage, Tensors, Total, default

T = TypeVar("T")
Encoded = tuple[Tensor, Tensors, Tensors, Tensors]


class Binding(NamedTuple):
    """The facts that `bind` gives to a stage.

    Args:
        layout: the layout of the vector that the stage encodes.
        total_weight: Σ w, the sum of the weights of all clients; None: it is unknown.
        before: the declaration of the vector that the stage receives.
        noised: whether a later stage of the same chain adds noise to the sum.
    """

    layout: Layout
    total_weight: Tensor | None
    before: Declared
    noised: bool = False


def flat_layout(d: int, dtype: torch.dtype = torch.float32) -> Layout:
    """The layout of a plain vector of d numbers.

    Example:
        >>> flat_layout(8).d
        8
    """
    return Layout((Entry("x", (d,), dtype, "params"),), dtype)


class Codec(Stage):
    """The base of codec stages. A stage defines `encode`; the other methods have defaults. `a >> b` is a chain.

    Every method works on the last axis of `[K, d]`, one row per client.
    """

    compresses = False  # the stage works on the bytes of the whole message, not on numbers
    binding: Binding | None = None

    def bind(self, layout: Layout, total_weight: Tensor | int | None = None, before: Declared | None = None) -> Self:
        """A copy of the codec that knows the facts that no message carries. The copy equals the codec as a value.

        Args:
            layout: the layout of the vector that the codec encodes.
            total_weight: Σ w, the sum of the weights that the aggregator gives to all clients of the population; only
                `EF21` needs it.
            before: the declaration of the vector that the codec receives; None: no bound is known.
        """
        bound = copy(self)
        weight = None if total_weight is None else torch.as_tensor(total_weight)
        before = before or Declared(layout.d, layout.dtype, "mean")
        object.__setattr__(bound, "binding", Binding(layout, weight, before))
        return bound

    @default
    def packs(self) -> bool:
        """Whether the payload is packed, so that no other stage can compute with its numbers."""
        return False

    @property
    def layout(self) -> Layout:
        """The layout of the vector that the codec encodes.

        Raises:
            RunError: `bind` was not called.
        """
        return self._require(self.binding and self.binding.layout, "layout", "codec.bind(layout)")

    @property
    def total_weight(self) -> Tensor:
        """Σ w, the sum of the weights of all clients. The aggregator sets the weight of a client: its rows, or 1.

        Raises:
            RunError: `bind` was not called, or it was called without `total_weight`.
        """
        known = self.binding and self.binding.total_weight
        return self._require(known, "total weight of all clients", "codec.bind(layout, total_weight)")

    @property
    def before(self) -> Declared:
        """The declaration of the vector that the codec receives, with the bound of the preceding stage.

        Raises:
            RunError: `bind` was not called.
        """
        return self._require(self.binding and self.binding.before, "preceding stage", "codec.bind(layout)")

    def _require(self, value: T | None, fact: str, write: str) -> T:
        if value is None:
            why = f"the message itself does not carry the {fact}."
            raise RunError(f"{self!r} has no {fact}.", f"a call of {write}.", why, write)
        return value

    @default
    def parts(self) -> tuple[Codec, ...]:
        """The codecs that this one contains, in the order in which a client runs them."""
        return ()

    def bounded(self, layout: Layout) -> Mapping[str, Declared]:
        """The declaration of a stage whose payload has no larger norm than its decoded update: |payload| ≤ gain · |x|.

        Args:
            layout: the layout of the vector that the stage encodes.
        """
        sent = Declared(self.output_layout(layout).d, layout.dtype, "mean")
        bound = self.before.bound if self.binding else None
        return {"update": sent if bound is None else sent._replace(bound=bound * self.gain(layout))}

    def contraction(self) -> Codec:
        """This codec if it is a contraction: E|x − C(x)|² < |x|² for every x. Otherwise a variant that is one."""
        return self

    def form(self, layout: Layout) -> Form:
        """The fields of a message."""
        return Form({}, Field(layout.dtype, layout.d))

    def validate(self, payload: Tensor | None, side: Tensors) -> None:
        """Refuse a message that no client of this codec sends. The payload is None if another stage packed it.

        Raises:
            MessageError: a message is not valid. The error states the message and the fault.
        """

    @property
    def compressor(self) -> Codec | None:
        """The stage that compresses the bytes of whole messages, if there is one."""
        return self if self.compresses else None

    def compress(self, form: Form, messages: Sequence[bytes]) -> list[bytes]:
        """Compress messages before they are sent. No message becomes longer."""
        return list(messages)

    def decompress(self, form: Form, data: Sequence[forms.Buffer]) -> Sequence[forms.Buffer]:
        """The inverse of `compress`.

        Raises:
            MessageError: the bytes are not a result of `compress`.
        """
        return list(data)

    def nbytes(self, layout: Layout) -> int:
        """The number of bytes of a message; an upper bound if a stage compresses bytes."""
        return self.form(layout).nbytes

    def sizes(self, payload: Tensor, side: Tensors) -> Tensor:
        """The number of bytes of each client's message, int64 `[K]`."""
        if self.compressor:
            return torch.tensor([len(one) for one in self.to_bytes(payload, side)], dtype=torch.int64)
        return super().sizes(payload, side)

    def to_bytes(self, payload: Tensor, side: Tensors) -> list[bytes]:
        """Convert the payload and side tensors of each client to the bytes of a message."""
        form = self.form(self.layout)
        messages = forms.to_bytes(form, payload, side)
        return self.compressor.compress(form, messages) if self.compressor else messages

    def from_bytes(self, data: Sequence[forms.Buffer]) -> tuple[Tensor, dict[str, Tensor]]:
        """The inverse of `to_bytes`: return payload and side tensors, one row for each message.

        Raises:
            MessageError: the bytes are not a message of this codec for this layout.
        """
        form = self.form(self.layout)
        payload, side = forms.from_bytes(form, self.compressor.decompress(form, data) if self.compressor else data)
        self.validate(payload, side)
        return payload, side

    def __rshift__(self, other: Codec) -> Chain:
        mine = self.stages if isinstance(self, Chain) else (self,)
        return Chain((*mine, *(other.stages if isinstance(other, Chain) else (other,))))


def roundtrip(codec: Codec, payload: Tensor, side: Tensors, key: Key) -> Tensor:
    """The update that the server decodes from each message by itself."""
    return codec.decode_sum(codec.decode(payload, side), key)


@dataclass(frozen=True, repr=False)
class Identity(Codec):
    """Sends the update unchanged.

    Example:
        >>> Identity() >> Identity()
        Identity() >> Identity()
    """

    lossless = True

    def declare(self, layout: Layout) -> Mapping[str, Declared]:
        return self.bounded(layout)

    def gain(self, layout: Layout) -> float:
        return 1.0

    def encode(self, x: Tensor, memory: Tensors, shared: Tensors, key: Key) -> Encoded:
        return x, {}, {}, memory


@dataclass(frozen=True, repr=False)
class Chain(Codec):
    """A chain of stages. A client runs them from left to right, the server from right to left.

    Args:
        stages: the stages, in the order in which a client runs them.
    Raises:
        UsageError: a `per_sum` stage follows a `per_message` stage, a stage that computes with numbers follows one that
            packs them, a stage follows one that compresses bytes, or a stage that needs the model's coordinates follows
            one that changes them.
    """

    stages: tuple[Codec, ...]

    def __post_init__(self) -> None:
        for stage in self.stages:
            if not isinstance(stage, Codec):
                if isinstance(stage, type):
                    raise class_instead_of_value("A stage of a codec", stage)
                raise UsageError(f"{stage!r} in a codec.", "a stage.", write="Identity() >> Identity()")
        if any(isinstance(stage, Chain) for stage in self.stages):  # one chain has one meaning and one text
            flat = [s for stage in self.stages for s in (stage.stages if isinstance(stage, Chain) else (stage,))]
            object.__setattr__(self, "stages", tuple(flat))
        for i, b in enumerate(self.stages):
            for a in self.stages[:i]:
                if clash := _clash(a, b):
                    raise UsageError(f"{a!r} >> {b!r}.", *clash, write=_instead(a, b))

    @property
    def per_message(self) -> bool:
        return any(stage.per_message for stage in self.stages)

    @property
    def per_sum(self) -> bool:
        return any(stage.per_sum for stage in self.stages)

    @property
    def packs(self) -> bool:
        return any(stage.packs for stage in self.stages)

    @property
    def lossless(self) -> bool:
        return all(stage.lossless for stage in self.stages)

    @property
    def corrects_error(self) -> bool:
        return all(stage.corrects_error or stage.lossless for stage in self.stages)

    @property
    def needs_model_coordinates(self) -> bool:
        return any(stage.needs_model_coordinates for stage in self.stages)

    @property
    def averages_all_clients(self) -> bool:
        return any(stage.averages_all_clients for stage in self.stages)

    @property
    def compressor(self) -> Codec | None:
        return self.stages[-1].compressor if self.stages else None

    @property
    def uses_entropy(self) -> bool:
        return any(stage.uses_entropy for stage in self.stages)

    @property
    def parts(self) -> tuple[Codec, ...]:
        return self.stages

    @property
    def _last(self) -> int:
        """The stage whose payload is the message's."""
        return max((i for i, stage in enumerate(self.stages) if not stage.compresses), default=len(self.stages) - 1)

    def contraction(self) -> Codec:
        return Chain(tuple(stage.contraction() for stage in self.stages))

    def __repr__(self) -> str:
        return " >> ".join(map(repr, self.stages))

    def bind(self, layout: Layout, total_weight: Tensor | int | None = None, before: Declared | None = None) -> Self:
        bound, stages = super().bind(layout, total_weight, before), []
        for i, (stage, stage_layout) in enumerate(self._along(layout)):
            own = stage.bind(stage_layout, total_weight, before)
            if own.binding is not None and any(_noises(later) for later in self.stages[i + 1 :]):
                object.__setattr__(own, "binding", own.binding._replace(noised=True))
            stages.append(own)
            before = _after(own, stage_layout, before)
        object.__setattr__(bound, "stages", tuple(stages))
        return bound

    def declare(self, layout: Layout) -> Mapping[str, Declared]:
        out: dict[str, Declared] = {}
        for stage, stage_layout in self._along(layout):
            out |= stage.declare(stage_layout)
        return out or super().declare(layout)

    def gain(self, layout: Layout) -> float:
        return math.prod(stage.gain(stage_layout) for stage, stage_layout in self._along(layout))

    def event(self, cohort: float) -> Release | None:
        """The releases of all stages as one: 1/z² = Σ 1/zᵢ²."""
        events = [event for stage in self.stages if (event := stage.event(cohort)) is not None]
        if not events:
            return None
        noise = sum(e.noise**-2 for e in events) ** -0.5
        return Release(noise, any(e.update for e in events), any(e.messages for e in events))

    def conflicts(self, slots: Slots) -> Iterable[Conflict]:
        for stage in self.stages:
            yield from stage.conflicts(slots)

    def _along(self, layout: Layout) -> list[tuple[Codec, Layout]]:
        out = []
        for stage in self.stages:
            out.append((stage, layout))
            layout = stage.output_layout(layout)
        return out

    def output_layout(self, layout: Layout) -> Layout:
        for stage in self.stages:
            layout = stage.output_layout(layout)
        return layout

    def memory(self, layout: Layout) -> Tensors:
        return _join([stage.memory(stage_layout) for stage, stage_layout in self._along(layout)])

    def server(self, layout: Layout) -> Tensors:
        return _join([stage.server(stage_layout) for stage, stage_layout in self._along(layout)])

    def form(self, layout: Layout) -> Form:
        each = [stage.form(stage_layout) for stage, stage_layout in self._along(layout)]
        side = {f"{i}.{name}": field for i, form in enumerate(each) for name, field in form.side.items()}
        return Form(side, each[self._last].payload if each else Field(layout.dtype, layout.d))

    def validate(self, payload: Tensor | None, side: Tensors) -> None:
        for i, stage in enumerate(self.stages):
            stage.validate(payload if i == self._last else None, _of(side, i))

    def encode(self, x: Tensor, memory: Tensors, shared: Tensors, key: Key) -> Encoded:
        sides, kept, sums = [], [], dict[str, Tensor]()
        for i, stage in enumerate(self.stages):
            x, side, more, after = stage.encode(x, _of(memory, i), _of(shared, i), key.fold(i))
            sides.append(side)
            kept.append(after)
            sums |= more
        return x, _join(sides), sums, _join(kept)

    def decode(self, x: Tensor, side: Tensors) -> Tensor:
        for i, stage in reversed(list(enumerate(self.stages))):
            x = stage.decode(x, _of(side, i))
        return x

    def decode_sum(self, x: Tensor, key: Key) -> Tensor:
        for i, stage in reversed(list(enumerate(self.stages))):
            x = stage.decode_sum(x, key.fold(i))
        return x

    def server_update(self, total: Total, server: Tensors, info: RoundInfo, key: Key) -> tuple[Total, Tensors]:
        after: list[Tensors] = []
        for i, stage in reversed(list(enumerate(self.stages))):
            own = info._replace(entropy=info.entropy.fold(i))
            total, kept = stage.server_update(total, _of(server, i), own, key.fold(i))
            after.insert(0, kept)
        return total, _join(after)


def _noises(stage: Codec) -> bool:
    """Whether the stage adds noise that covers the update."""
    event = stage.event(1.0)
    return event is not None and event.update


def _after(stage: Codec, layout: Layout, before: Declared | None) -> Declared | None:
    """The declaration of the vector that a stage sends, with the bound that follows from its gain."""
    declared = stage.declare(layout).get("update")
    if declared is None or declared.bound is not None or before is None or before.bound is None:
        return declared
    gain = stage.gain(layout)
    return declared._replace(bound=before.bound * gain) if math.isfinite(gain) else declared


def _join(many: list[Tensors]) -> dict[str, Tensor]:
    return {name: t for i, tensors in enumerate(many) for name, t in under(f"{i}.", tensors).items()}


def _of(tensors: Tensors, i: int) -> dict[str, Tensor]:
    return without_prefix(tensors, f"{i}.")


def _clash(a: Codec, b: Codec) -> tuple[str, str] | None:
    """(required, why) if b cannot follow a anywhere in a chain."""
    if b.needs_model_coordinates and (a.per_message or a.per_sum):
        return (
            f"{type(b).__name__} before any stage that changes coordinates.",
            "its state is in the model's own coordinates, and the coordinates after the other stage differ.",
        )
    if a.compressor or (a.packs and not b.compresses):
        return (
            "a stage that packs at the end of a codec.",
            "another stage cannot compute with packed codes.",
        )
    if a.per_message and b.per_sum:
        return (
            "stages with per_sum before stages with per_message.",
            "the sum is decoded after each message, so the last stage of the client is decoded first.",
        )
    return None


def _instead(a: Codec, b: Codec) -> str:
    """The text of a codec that can be built, as near as possible to a >> b, which cannot be built."""
    for outer, other in ((b, a), (a, b)):
        for inner in outer.parts if outer.needs_model_coordinates and not isinstance(outer, Chain) else ():
            if not _clash(other, inner) and not other.needs_model_coordinates:
                return f"{type(outer).__name__}({other.contraction()!r} >> {inner!r})"
    return repr(a) if _clash(b, a) else f"{b!r} >> {a!r}"
