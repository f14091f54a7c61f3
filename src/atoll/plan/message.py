"""The message of a client as bytes: the vectors that its parts declare, then the encoded update.

    message = weight, means, sums, counters  (each group by name, little-endian)  ‖  bytes of the codec

The plan and the task fix the names, the order and the length of all vectors, so the message contains only numbers. The
length is compared before a byte is read.

Tests: tests/identities/test_message.py
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from atoll.base.errors import UsageError
from atoll.compute.layout import CHANGED
from atoll.compute.task import Task
from atoll.plan import form as forms
from atoll.plan.form import Buffer, Field, Form, MessageError
from atoll.plan.plan import Plan
from atoll.plan.protocols import OPEN, Contribution, Stage, Tensors

_WEIGHT = Field(torch.int64, 1)


class Message(NamedTuple):
    """The messages of K clients before their conversion to bytes.

    Args:
        payload: the payload of the codec `[K, …]`; None: the contributions have no update.
        side: the side tensors of the codec, `[K, …]`.
        rest: the contributions without their updates, with the sums that the codec adds.
    """

    payload: Tensor | None
    side: Tensors
    rest: Contribution


def sizes_of(plan: Plan, message: Message) -> Tensor:
    """The length of the message of each client in bytes, int64 `[K]`."""
    overhead = _overhead(message.rest)
    if message.payload is None:
        return torch.full(message.rest.weight.shape, overhead, dtype=torch.int64)
    return plan.codec.sizes(message.payload, message.side) + overhead


def _overhead(rest: Contribution) -> int:
    """The bytes of a message without the encoded update: other means, sums, counters, and 8 for the weight."""
    tensors = [t for group in (rest.means, rest.sums, rest.counters) for t in group.values()]
    return sum([t.numel() * t.element_size() for t in tensors]) // rest.weight.shape[0] + _WEIGHT.nbytes


@dataclass(frozen=True)
class MessageForm:
    """The vectors of a client's message.

    Args:
        head: the weight, means, sums and counters; the keys are `mean/…`, `sum/…` and `counter/…`.
        shapes: the shape of each counter of one client.
        facts: the names of the sums of which the server makes one column for each client: sum / rows.
        codec: the codec that reads the encoded update; None: the message has no update.
        shortest, longest: the bounds on its length in bytes. They are equal if no stage compresses bytes.
    """

    head: Form
    shapes: Mapping[str, tuple[int, ...]]
    facts: tuple[str, ...]
    codec: Stage | None
    shortest: int
    longest: int

    @classmethod
    def of(cls, plan: Plan, task: Task) -> MessageForm:
        """The form of the messages of a plan.

        Args:
            plan: the algorithm, after `bind`.
            task: the model, loss and metrics.
        Raises:
            UsageError: the local part declares no complete list of its vectors, or the codec has no form.
        """
        declared, layout = plan.local.declare(task), plan.local.server_layout(task.layout)
        if OPEN in declared:
            raise UsageError(
                f"{plan.local!r} declares vectors of any name.",
                f"a local part whose `declare` lists each vector, without {OPEN!r}.",
                "the length of a message must be known before it is read.",
                "Gradient()",
            )
        if plan.releases:  # nothing else leaves a client: `encode_contribution`
            declared = {n: d for n, d in declared.items() if n == "update"}
        sends_update = "update" in declared
        codec = {**plan.codec.declare(layout), **plan.aggregator.added()} if sends_update else {}
        each = {n: d for n, d in {**codec, **declared}.items() if n != "update"}
        fields = {f"{d.kind}/{n}": Field(d.dtype, d.length) for n, d in each.items()}
        counted = sends_update and not plan.releases
        counters = [e for e in layout.counters if counted and e.name not in layout.dropped]
        shapes = {e.name: e.shape for e in counters}
        fields |= {f"counter/{e.name}": Field(e.dtype, e.size) for e in counters}
        if sends_update and "buffers" in declared:
            shapes[CHANGED] = (len(layout.segment("buffers")),)
            fields[f"counter/{CHANGED}"] = Field(torch.uint8, *shapes[CHANGED])
        head = Form(dict(sorted(fields.items())), _WEIGHT)
        scalars = [n for n, d in sorted(declared.items()) if d.kind == "sum" and d.length == 1 and n != "rows"]
        form = plan.codec.form(layout) if sends_update else None
        longest = head.nbytes + (0 if form is None else form.nbytes)
        varies = form is not None and plan.codec.compressor is not None
        return cls(
            head,
            shapes,
            tuple(scalars) if "rows" in declared else (),
            plan.codec if sends_update else None,
            head.nbytes if varies else longest,
            longest,
        )

    def check_length(self, length: int) -> None:
        """Refuse a length that no message of this form has.

        Raises:
            MessageError: the message is too short or too long.
        """
        if not self.shortest <= length <= self.longest:
            required = f"{self.longest}" if self.shortest == self.longest else f"{self.shortest} to {self.longest}"
            raise MessageError(
                f"A message of {length} bytes.",
                f"{required} bytes.",
                "the plan and the model determine the length of every message.",
            )

    def to_bytes(self, message: Message) -> list[bytes]:
        """Convert the messages of K clients to bytes.

        Raises:
            UsageError: a vector has another name or dtype than its part declares.
        """
        payload, side, (means, sums, weight, counters, _) = message
        groups = {"mean": means, "sum": sums, "counter": counters}
        given = {f"{kind}/{n}": t for kind, tensors in groups.items() for n, t in tensors.items()}
        for name in sorted(given.keys() ^ self.head.side.keys()):
            raise _undeclared(name, "it is not in both the message and the declaration")
        for name, field in self.head.side.items():
            if given[name].dtype != field.dtype:
                raise _undeclared(name, f"it has dtype {given[name].dtype}, and {field.dtype} is declared")
        head = forms.to_bytes(self.head, weight, given)
        if self.codec is None or payload is None:
            return head
        return [a + b for a, b in zip(head, self.codec.to_bytes(payload, side), strict=True)]

    def from_bytes(self, data: Sequence[Buffer]) -> Message:
        """Read the messages of K clients.

        Raises:
            MessageError: a length differs from the form, a number is not finite, or no client sends these bytes.
        """
        for one in data:
            self.check_length(len(one))
        views, head = [memoryview(one) for one in data], self.head.nbytes
        weight, found = forms.from_bytes(self.head, [one[:head] for one in views])
        groups: dict[str, dict[str, Tensor]] = {"mean": {}, "sum": {}, "counter": {}}
        for path, t in found.items():
            kind, _, name = path.partition("/")
            if kind == "sum" and t.shape[1] == 1:
                t = t[:, 0]
            groups[kind][name] = t.reshape(len(data), *self.shapes[name]) if kind == "counter" else t
        if CHANGED in groups["counter"]:
            forms.reject((groups["counter"][CHANGED] > 1).any(-1), f"{CHANGED} is not a flag", "0 or 1")
        sums = groups["sum"]
        columns = {n: sums[n] / sums["rows"].clamp(min=1) for n in self.facts}
        rest = Contribution(groups["mean"], sums, weight[:, 0], groups["counter"], columns)
        if self.codec is None:
            return Message(None, {}, rest)
        payload, side = self.codec.from_bytes([one[head:] for one in views])
        return Message(payload, side, rest)


def _undeclared(name: str, difference: str) -> UsageError:
    return UsageError(
        f"The vector {name.partition('/')[2]} of a message: {difference}.",
        "the names and dtypes that `declare` of the local part and of the codec gives.",
        "a message contains numbers only, so both sides must know its vectors.",
    )
