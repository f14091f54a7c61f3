"""Codecs with client memory: the compression error of one round is corrected in later rounds.

Tests: tests/identities/test_codecs_memory.py, tests/rates/test_error_feedback.py
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from atoll.base.errors import UsageError
from atoll.base.names import under, without_prefix
from atoll.base.random import Key
from atoll.base.validation import class_instead_of_value
from atoll.compute.layout import Layout
from atoll.plan.codec.stage import Chain, Codec, Encoded, roundtrip
from atoll.plan.form import Form
from atoll.plan.protocols import Conflict, Declared, RoundInfo, Slots, Tensors, Total


class _Wrapper(Codec):
    """A codec that contains another one and forwards its questions to it."""

    needs_model_coordinates = True
    corrects_error = True

    codec: Codec

    def bind(self, layout: Layout, total_weight: Tensor | int | None = None, before: Declared | None = None) -> Self:
        # The inner codec encodes the update plus an error or minus a shift, so the bound of `before` does not hold.
        bound = super().bind(layout, total_weight, before)
        object.__setattr__(bound, "codec", self.codec.bind(layout, total_weight))
        return bound

    @property
    def parts(self) -> tuple[Codec, ...]:
        return (self.codec,)

    @property
    def uses_entropy(self) -> bool:
        return self.codec.uses_entropy

    def declare(self, layout: Layout) -> Mapping[str, Declared]:
        return self.codec.declare(layout)

    def conflicts(self, slots: Slots) -> Iterable[Conflict]:
        yield from self.codec.conflicts(slots)

    @property
    def per_message(self) -> bool:
        return self.codec.per_message

    @property
    def per_sum(self) -> bool:
        return self.codec.per_sum

    @property
    def packs(self) -> bool:
        return self.codec.packs

    @property
    def compressor(self) -> Codec | None:
        return self.codec.compressor

    def output_layout(self, layout: Layout) -> Layout:
        return self.codec.output_layout(layout)

    def form(self, layout: Layout) -> Form:
        return self.codec.form(layout)

    def validate(self, payload: Tensor | None, side: Tensors) -> None:
        self.codec.validate(payload, side)

    def decode(self, x: Tensor, side: Tensors) -> Tensor:
        return self.codec.decode(x, side)

    def decode_sum(self, x: Tensor, key: Key) -> Tensor:
        return self.codec.decode_sum(x, key)

    def server(self, layout: Layout) -> Tensors:
        return _inner(self.codec.server(layout))

    def server_update(self, total: Total, server: Tensors, info: RoundInfo, key: Key) -> tuple[Total, Tensors]:
        total, after = self.codec.server_update(total, _outer(server), info, key)
        return total, _inner(after)


def _inner(tensors: Tensors) -> dict[str, Tensor]:
    return under("codec.", tensors)


def _outer(tensors: Tensors) -> dict[str, Tensor]:
    return without_prefix(tensors, "codec.")


def _check_inner(part: str, codec: Any) -> None:
    """Refuse a value that is no codec, a codec that is no contraction, and a codec that has its own memory."""
    if isinstance(codec, type):
        raise class_instead_of_value(f"The codec of {part}", codec)
    if not isinstance(codec, Codec):
        raise UsageError(f"{part}({codec!r}).", "a codec.", write=f"{part}(TopK(0.01))")
    if (contraction := codec.contraction()) != codec:
        raise UsageError(
            f"{part}({codec!r}).",
            "a codec whose error is less than its input.",
            "its error can be larger than the update, and the kept error would grow without bound.",
            f"{part}({contraction!r})",
        )
    if any(isinstance(stage, _Wrapper) for stage in (codec.stages if isinstance(codec, Chain) else (codec,))):
        raise UsageError(
            f"{part}({codec!r}).",
            "a codec without a memory of its own.",
            "two memories would correct the same error twice.",
            f"{part}(TopK(0.01))",
        )


@dataclass(frozen=True, repr=False)
class ErrorFeedback(_Wrapper):
    """Error feedback: the compression error of an update is added to the client's next update.

    p = x + e,   send C(p),   e⁺ = p − Ĉ(p),   e = 0 at first

    Ĉ(p) is the vector that the server decodes. Σ (sent vectors) + e = Σ (updates x) at any time. e changes only if the
    server accepts the message. If the optima of the clients differ, the learning rate has to decrease; `EF21`
    converges with a constant one.

    Client memory: `error`, e, `[d]` in the run's dtype.

    Args:
        codec: a contraction: `TopK`, `Sign`, `LowRank`, `Quantize`, `Eden`, `RandomK(..., unbiased=False)`, or a
            chain of them.
    Raises:
        UsageError: the codec is no contraction, or it has its own memory.
    Example:
        >>> from atoll.plan.codec.stage import flat_layout
        >>> from atoll.plan.codec.sparse import TopK
        >>> codec, memory = ErrorFeedback(TopK(0.5)).bind(flat_layout(2)), {"error": torch.zeros(1, 2)}
        >>> for _ in range(2):
        ...     payload, side, _, memory = codec.encode(torch.tensor([[3.0, 2.0]]), memory, {}, Key(0))
        ...     codec.decode(payload, side)
        tensor([[3., 0.]])
        tensor([[0., 4.]])

    Reference: Seide et al., 1-Bit Stochastic Gradient Descent, 2014; Karimireddy et al., Error Feedback Fixes SignSGD,
        2019.
    """

    codec: Codec

    def __post_init__(self) -> None:
        _check_inner("ErrorFeedback", self.codec)

    def memory(self, layout: Layout) -> Mapping[str, Tensor]:
        return {"error": torch.zeros(layout.d, dtype=layout.dtype)}

    def encode(self, x: Tensor, memory: Tensors, shared: Tensors, key: Key) -> Encoded:
        corrected = x + memory["error"]
        payload, side, sums, _ = self.codec.encode(corrected, {}, _outer(shared), key)
        return payload, side, sums, {"error": corrected - roundtrip(self.codec, payload, side, key)}


@dataclass(frozen=True, repr=False)
class EF21(_Wrapper):
    """EF21: a client sends the compressed change of its update; the server averages the last updates of all clients.

    send C(x − h),   h⁺ = h + Ĉ(x − h);      g = Σ over all clients of w h⁺ / Σ over all clients of w

    h follows x, so the error vanishes as the updates converge. This holds for any difference between the clients, and
    for a constant learning rate. A client that does not participate, or whose message is lost, contributes its last h
    to the mean. EF21 needs a mean over the contributions that arrived, each in the round in which it started: not
    `Sum`, not `over="expected"`, no late contributions.

    Client memory: `shift`, h, `[d]` in the run's dtype.

    Server state: `_sum`, float64 `[d]`, Σ w h over all clients. It is not sent to clients.

    Args:
        codec: a contraction, as for `ErrorFeedback`.
    Raises:
        UsageError: the codec is no contraction, or it has its own memory.
    Example:
        >>> from atoll.plan.codec.sparse import TopK
        >>> EF21(TopK(0.01))
        EF21(TopK(0.01))

    Reference: Richtárik, Sokolov and Fatkhullin, EF21: A New, Simpler, Theoretically Better, and Practically Faster
        Error Feedback, 2021.
    """

    averages_all_clients = True

    codec: Codec

    def __post_init__(self) -> None:
        _check_inner("EF21", self.codec)

    def memory(self, layout: Layout) -> Mapping[str, Tensor]:
        return {"shift": torch.zeros(layout.d, dtype=layout.dtype)}

    def server(self, layout: Layout) -> Tensors:
        return {"_sum": torch.zeros(layout.d, dtype=torch.float64), **_inner(self.codec.server(layout))}

    def encode(self, x: Tensor, memory: Tensors, shared: Tensors, key: Key) -> Encoded:
        shift = memory["shift"]
        payload, side, sums, _ = self.codec.encode(x - shift, {}, _outer(shared), key)
        return payload, side, sums, {"shift": shift + roundtrip(self.codec, payload, side, key)}

    def server_update(self, total: Total, server: Tensors, info: RoundInfo, key: Key) -> tuple[Total, Tensors]:
        total, after = super().server_update(total, server, info, key)
        running_sum = server["_sum"] + total.means.get("update", torch.zeros_like(server["_sum"]))
        # `finalize` divides by the weight that arrived; this mean is over the weight of all clients.
        update = running_sum * (total.weight.to(torch.float64) / self.total_weight.to(torch.float64))
        return total._replace(means={**total.means, "update": update}), {"_sum": running_sum, **after}

    def conflicts(self, slots: Slots) -> Iterable[Conflict]:
        """Only the mean over all clients that arrive in their own round divides the server's sum correctly."""
        rule, required = slots.aggregator, "Mean() over the contributions that arrived, and a pace without late ones."
        why = "the server keeps the mean of all clients' last updates, and no other rule divides it correctly."
        if rule.forms_sum or not rule.linear or rule.over == "expected":
            yield Conflict(f"{slots.codec!r} with {rule!r}.", required, why, "Mean()")
        if slots.pace.asynchronous:
            yield Conflict(f"{slots.codec!r} with {slots.pace!r}.", required, why, "Sync()")
        yield from super().conflicts(slots)
