"""Codecs with a memory: what was lost on the way is made good later."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from atoll.errors import UsageError
from atoll.layout import Layout
from atoll.names import under, without_prefix
from atoll.plan.codec.stage import Chain, Codec, Encoded, arrived
from atoll.plan.codec.wire import Form
from atoll.plan.slots import Tensors, Total
from atoll.rng import Key


class _Around(Codec):
    """What a codec around another has of that other."""

    native = True

    codec: Codec

    def at(self, layout: Layout, everyone: Tensor | int | None = None) -> Self:
        placed = super().at(layout, everyone)
        object.__setattr__(placed, "codec", self.codec.at(layout, everyone))
        return placed

    @property
    def opens(self) -> bool:  # type: ignore[override]
        return self.codec.opens

    @property
    def decodes(self) -> bool:  # type: ignore[override]
        return self.codec.decodes

    @property
    def packs(self) -> bool:  # type: ignore[override]
        return self.codec.packs

    @property
    def sealer(self) -> Codec | None:
        return self.codec.sealer

    def after(self, layout: Layout) -> Layout:
        return self.codec.after(layout)

    def form(self, layout: Layout) -> Form:
        return self.codec.form(layout)

    def flaws(self, payload: Tensor | None, side: Tensors) -> None:
        self.codec.flaws(payload, side)

    def open(self, x: Tensor, side: Tensors) -> Tensor:
        return self.codec.open(x, side)

    def decode(self, x: Tensor, key: Key) -> Tensor:
        return self.codec.decode(x, key)

    def server(self, layout: Layout) -> Tensors:
        return _inner(self.codec.server(layout))

    def settle(self, total: Total, server: Tensors, key: Key) -> tuple[Total, Tensors]:  # type: ignore[override]
        total, after = self.codec.settle(total, _outer(server), key)
        return total, _inner(after)


def _inner(tensors: Tensors) -> dict[str, Tensor]:
    return under("codec.", tensors)


def _outer(tensors: Tensors) -> dict[str, Tensor]:
    return without_prefix(tensors, "codec.")


def _check_inner(part: str, codec: Any) -> None:
    """Refuse what is no codec, is no contraction, or has a memory of its own."""
    if not isinstance(codec, Codec):
        raise UsageError(f"{part}({codec!r}).", "a codec.", write=f"{part}(TopK(0.01))")
    if (tame := codec.contraction()) != codec:
        raise UsageError(
            f"{part}({codec!r}).",
            "a codec that brings back less error than it was given.",
            "its error can be larger than the update, and what is kept for later would grow without end.",
            f"{part}({tame!r})",
        )
    if any(isinstance(stage, _Around) for stage in (codec.stages if isinstance(codec, Chain) else (codec,))):
        raise UsageError(
            f"{part}({codec!r}).",
            "a codec without a memory of its own.",
            "one memory makes good what the other has already made good.",
            f"{part}(TopK(0.01))",
        )


@dataclass(frozen=True, repr=False)
class Feedback(_Around):
    """Error feedback: what a codec loses of an update is added to the client's next one.

    p = x + e,   send C(p),   e⁺ = p − Ĉ(p),   e = 0 at first

    Ĉ is what the server will read. The sum of all that was sent and of e equals the sum of all that was meant; e
    moves only if the message was accepted. With clients whose optima differ, the step has to shrink; `Shift` stands
    a constant one.

    Args:
        codec: a contraction: `TopK`, `Sign`, `LowRank`, `Quantize`, `Eden`, `RandomK(..., unbiased=False)`, or a
            chain of them.
    Raises:
        UsageError: the codec may enlarge an update, or has a memory of its own.
    Example:
        >>> from atoll.plan.codec.stage import flat
        >>> from atoll.plan.codec.sparse import TopK
        >>> codec, memory = Feedback(TopK(0.5)).at(flat(2)), {"error": torch.zeros(1, 2)}
        >>> for _ in range(2):
        ...     payload, side, _, memory = codec.encode(torch.tensor([[3.0, 2.0]]), memory, {}, Key(0))
        ...     codec.open(payload, side)
        tensor([[3., 0.]])
        tensor([[0., 4.]])

    Reference: Seide et al., 1-Bit Stochastic Gradient Descent, 2014; Karimireddy et al., Error Feedback Fixes SignSGD,
        2019.
    """

    codec: Codec

    def __post_init__(self) -> None:
        _check_inner("Feedback", self.codec)

    def memory(self, layout: Layout) -> Mapping[str, Tensor]:
        return {"error": torch.zeros(layout.d, dtype=layout.dtype)}

    def encode(self, x: Tensor, memory: Tensors, shared: Tensors, key: Key) -> Encoded:
        meant = x + memory["error"]
        payload, side, sums, _ = self.codec.encode(meant, {}, _outer(shared), key)
        return payload, side, sums, {"error": meant - arrived(self.codec, payload, side, key)}


@dataclass(frozen=True, repr=False)
class Shift(_Around):
    """EF21: a client sends the compressed change of its update; the server keeps the mean of all clients' last ones.

    send C(x − h),   h⁺ = h + Ĉ(x − h);      g = Σ over all clients of w h⁺ / Σ over all clients of w

    h follows x, so the error vanishes as updates settle, for clients however different and at a constant step. A
    client that is away, or whose message is lost, stands in the mean with its last h. It needs a mean over what
    arrived, born in the round in which it arrives: not `Sum`, not `over="expected"`, nothing stale.

    Server state: `_sum`, float64 `[d]`, Σ w h over all clients; no client sees it.

    Args:
        codec: a contraction, as for `Feedback`.
    Raises:
        UsageError: the codec may enlarge an update, or has a memory of its own.
    Example:
        >>> from atoll.plan.codec.sparse import TopK
        >>> Shift(TopK(0.01))
        Shift(TopK(0.01))

    Reference: Richtárik, Sokolov and Fatkhullin, EF21: A New, Simpler, Theoretically Better, and Practically Faster
        Error Feedback, 2021.
    """

    remembers_everyone = True

    codec: Codec

    def __post_init__(self) -> None:
        _check_inner("Shift", self.codec)

    def memory(self, layout: Layout) -> Mapping[str, Tensor]:
        return {"shift": torch.zeros(layout.d, dtype=layout.dtype)}

    def server(self, layout: Layout) -> Tensors:
        return {"_sum": torch.zeros(layout.d, dtype=torch.float64), **_inner(self.codec.server(layout))}

    def encode(self, x: Tensor, memory: Tensors, shared: Tensors, key: Key) -> Encoded:
        shift = memory["shift"]
        payload, side, sums, _ = self.codec.encode(x - shift, {}, _outer(shared), key)
        return payload, side, sums, {"shift": shift + arrived(self.codec, payload, side, key)}

    def settle(self, total: Total, server: Tensors, key: Key) -> tuple[Total, Tensors]:  # type: ignore[override]
        total, after = super().settle(total, server, key)
        held = server["_sum"] + total.means.get("update", torch.zeros_like(server["_sum"]))
        # `finish` will divide by the weight that arrived; the mean of all is over everyone's.
        update = held * (total.weight.to(torch.float64) / self.everyone.to(torch.float64))
        return total._replace(means={**total.means, "update": update}), {"_sum": held, **after}
