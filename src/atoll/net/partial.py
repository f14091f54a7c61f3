"""The contribution of a relay as bytes: the exact sums of its clients, and which clients are in them.

    body = u32 length ‖ PartialHead ‖ n of each mean, then of each sum, by name ‖ counters ‖ columns      little-endian

n are the integers of `exact.to_integers`, i32 `[places, length]`. Equal contributions give equal bytes in any order, so
a relay that is killed sends the same bytes again. A sum over any number of clients has at most a few places.

Tests: tests/faults/test_partial.py
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from atoll.base.errors import UsageError
from atoll.base.lines import Part
from atoll.compute.layout import CHANGED, Layout
from atoll.compute.task import Task
from atoll.engine.contribution import Results, decode_contribution
from atoll.net.wire import Counted, FrameError, Lost, PartialHead, Start, decode_head, encode_head
from atoll.plan.aggregate import Mean, Sum, exact
from atoll.plan.aggregate.mean import PartialSum
from atoll.plan.codec.stage import Identity
from atoll.plan.form import Buffer, MessageError
from atoll.plan.message import MessageForm
from atoll.plan.pace import Sync
from atoll.plan.plan import Plan
from atoll.plan.protocols import Aggregator, Contribution, Stage, Tensors


def check_additive(plan: Plan) -> None:
    """Refuse a plan whose round is no sum of the contributions of its clients.

    Raises:
        UsageError: a relay cannot form the partial of this plan.
    """
    rule, why = plan.aggregator, "a relay sends one sum over its clients."
    given = f"{rule!r:.100} with a relay."
    if not isinstance(rule, (Mean, Sum)):
        raise UsageError(given, "an aggregator that adds contributions.", why, Part("Mean()", "aggregator"))
    if rule.secure is not None:
        why = "masks cancel in the sum over all clients, and not in that of a relay."
        raise UsageError(given, "no secure sum.", why, Part("Mean()", "aggregator"))
    if rule.sum != "exact":
        why = "a sum of floats depends on its grouping."
        raise UsageError(given, 'sum="exact".', why, Part(f"{type(rule).__name__}()", "aggregator"))
    if plan.pace != Sync():
        raise UsageError(f"{plan.pace!r} with a relay.", "Sync().", f"{why} It waits for all of them.", "Sync()")
    if plan.downlink != Identity():
        why = "a relay receives whole versions, and passes them on."
        raise UsageError(f"{plan.downlink!r:.100} with a relay.", "no codec of the downlink.", why, "Identity()")
    if plan.releases:
        why = "a relay receives each contribution, and the statement about privacy does not count it."
        raise UsageError(f"{plan.codec!r:.100} with a relay.", "a plan without noise.", why, "Identity()")


class Received(NamedTuple):
    """A partial that the root has checked.

    Args:
        head: its clients.
        partial: the sums.
        columns: a value for each client that arrived, `[K]`; the keys are names.
        bodies: outside the rounds: the message of each client that arrived, in place of sums.
    """

    head: PartialHead
    partial: PartialSum
    columns: dict[str, Tensor]
    bodies: tuple[Buffer, ...] = ()

    def results(self, version: int, plan: Plan, down: Sequence[int]) -> Results:
        """The results of its clients as those of other clients.

        Args:
            version: the round whose model the clients started from.
            plan: the algorithm.
            down: the bytes of the model that each client received.
        """
        ids = torch.tensor([one.client for one in self.head.arrived])
        facts = {"bytes_up": torch.tensor([one.length for one in self.head.arrived]), "bytes_down": torch.tensor(down)}
        if plan.shows_clients:
            facts = {**self.columns, "rows": torch.tensor([one.rows for one in self.head.arrived]), **facts}
        return Results.empty()._replace(partials={version: self.partial}, arrived=[ids], facts=[facts])


def read_messages(plan: Plan, form: MessageForm, bodies: Sequence[Buffer], rows: Tensor) -> Contribution:
    """Read and decode the messages of K clients.

    Args:
        plan: the algorithm, after `bind`.
        form: the form of the messages.
        bodies: the messages.
        rows: the weight that each message must have, int64 `[K]`.
    Raises:
        MessageError: a message is not valid.
    """
    decoded = decode_contribution(plan, form.from_bytes(bodies))
    if not torch.equal(decoded.weight, rows):
        raise MessageError("Message: the weight differs from the number of rows.", "the rows of the client.")
    return decoded


def decoded_length(codec: Stage, layout: Layout) -> int:
    """The length of an update that was decoded message by message, and not yet in the sum.

    Args:
        codec: the codec. Its stages that decode sums come before those that decode messages.
        layout: the layout of the vector that it encodes.
    Example:
        >>> from atoll.plan.codec import RandomK, TopK
        >>> from atoll.plan.codec.stage import flat_layout
        >>> decoded_length(RandomK(0.1) >> TopK(0.5), flat_layout(100))
        10
    """
    return _summed(codec, layout).d


def _summed(codec: Stage, layout: Layout) -> Layout:
    """The layout after the stages that decode sums."""
    parts = getattr(codec, "parts", ())
    if not parts:
        return layout if codec.per_message else codec.output_layout(layout)
    for stage in parts:
        layout = _summed(stage, layout)
        if stage.per_message:
            break
    return layout


def write_answers(arrived: Sequence[Counted], lost: Sequence[Lost], bodies: Sequence[bytes]) -> bytes:
    """The contribution of a relay outside the rounds: the message of each client, one after another."""
    return encode_head(PartialHead(tuple(arrived), tuple(lost), ())) + b"".join(bodies)


def read_answers(data: Buffer, starts: Sequence[Start]) -> Received:
    """The inverse of `write_answers`.

    Args:
        data: the bytes.
        starts: the clients of the work.
    Raises:
        MessageError: it names other clients than those of the work, or a length is wrong.
    """
    head, at = _head(data)
    _check_clients(head, starts)
    view, bodies = memoryview(data), []
    for one in head.arrived:
        bodies.append(view[at : at + one.length])
        at += one.length
    if head.places or at != len(view):
        raise MessageError(f"Partial: {len(view)} bytes.", f"the {at} bytes of its messages.")
    return Received(head, PartialSum(), {}, tuple(bodies))


def _head(data: Buffer) -> tuple[PartialHead, int]:
    try:
        return decode_head(data)
    except FrameError as error:
        raise MessageError(error.given, error.required, error.why) from None


@dataclass(frozen=True)
class PartialForm:
    """The vectors of a partial.

    Args:
        means, sums: the length of each sum by name, in the order in which they are sent.
        counters: the dtype and the shape of each counter.
        columns: the dtype of each value of a client, by name.
    """

    means: Mapping[str, int]
    sums: Mapping[str, int]
    counters: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    columns: Mapping[str, torch.dtype]

    @classmethod
    def of(cls, plan: Plan, task: Task, form: MessageForm) -> PartialForm:
        """The form of the partials of a plan.

        Args:
            plan: the algorithm, after `bind`.
            task: the model and loss.
            form: the form of the messages of the clients.
        """
        lengths: dict[str, dict[str, int]] = {"mean": {}, "sum": {}}
        counters: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for path, field in form.head.side.items():
            kind, _, name = path.partition("/")
            if kind == "counter":
                counters[name] = field.dtype, form.shapes[name]
            else:
                lengths[kind][name] = field.length
        if form.codec is not None:
            lengths["mean"]["update"] = decoded_length(plan.codec, plan.local.server_layout(task.layout))
        means, sums = (dict(sorted(lengths[kind].items())) for kind in ("mean", "sum"))
        columns = {name: form.head.side[f"sum/{name}"].dtype for name in form.facts}
        return cls(means, sums, counters, columns)

    @property
    def longest(self) -> int:
        """A bound on the length of a partial without its head: with every place that an exact sum has."""
        numbers = sum(self.means.values()) + sum(self.sums.values())
        return 4 * 128 * numbers + sum(d.itemsize * prod(shape) for d, shape in self.counters.values())

    def to_bytes(
        self,
        arrived: Sequence[Counted],
        lost: Sequence[Lost],
        partial: PartialSum | None,
        columns: Mapping[str, Tensor],
    ) -> bytes:
        """The body of a partial.

        Args:
            arrived, lost: the clients, ascending.
            partial: the sums; None if no client arrived.
            columns: a value for each client of `arrived`, `[K]`.
        """
        places: list[tuple[int, int]] = []
        parts: list[Tensor] = []
        if partial is not None:
            for table, lengths in ((partial.means, self.means), (partial.sums, self.sums)):
                for name in lengths:
                    low, numbers = exact.to_integers(table[name])
                    if numbers.shape[1] != lengths[name]:
                        given = f"{name} has {numbers.shape[1]} numbers, and its codec states {lengths[name]}."
                        raise UsageError(given, "a codec whose `per_message` and `output_layout` are those it has.")
                    places.append((low, len(numbers)))
                    parts.append(numbers)
            parts += [partial.counters[name].to(dtype) for name, (dtype, _) in self.counters.items()]
            parts += [columns[name].to(dtype) for name, dtype in self.columns.items()]
        head = PartialHead(tuple(arrived), tuple(lost), tuple(places))
        return encode_head(head) + b"".join(_bytes(part) for part in parts)

    def from_bytes(self, data: Buffer, starts: Sequence[Start], rows: Mapping[int, int], rule: Aggregator) -> Received:
        """Read a partial and check everything that does not need the single contributions.

        Args:
            data: the body.
            starts: the clients of the work.
            rows: the enrolled rows of each client.
            rule: the aggregator, bound. It gives the weights.
        Raises:
            MessageError: it names a client that was not asked or names one twice, it claims other rows than those that
                are enrolled, a length or a place is wrong, or a number is not finite or too large.
        """
        head, at = _head(data)
        _check_clients(head, starts)
        _check_rows(head, rows)
        out, view = PartialSum(), memoryview(data)
        ids, held = torch.tensor([[one.client, one.rows] for one in head.arrived], dtype=torch.int64).reshape(-1, 2).T
        out.weight = rule.weigh(ids, held).sum()
        out.arrived = torch.tensor(len(head.arrived))
        count = len(self.means) + len(self.sums) if head.arrived else 0
        if len(head.places) != count or not all(exact.in_range(*pair) for pair in head.places):
            raise MessageError("Partial: the places of its sums are not possible.", "places of exact sums.")
        left, columns = list(head.places), {}

        def take(dtype: torch.dtype, *shape: int) -> Tensor:
            nonlocal at
            size, start = dtype.itemsize * prod(shape), at
            at += size
            if at > len(view):
                raise MessageError(f"Partial: {len(view)} bytes.", "the bytes of its vectors.")
            flat = torch.frombuffer(bytearray(view[start:at]), dtype=dtype) if size else torch.empty(0, dtype=dtype)
            return flat.reshape(shape)

        if head.arrived:
            for table, lengths in ((out.means, self.means), (out.sums, self.sums)):
                for name, length in lengths.items():
                    low, many = left.pop(0)
                    scale = int(out.weight) if table is out.means else len(head.arrived)
                    table[name] = _sum(name, low, take(torch.int32, many, length), scale)
            out.counters.update({name: take(pair[0], *pair[1]) for name, pair in self.counters.items()})
            columns = {name: take(dtype, len(head.arrived)) for name, dtype in self.columns.items()}
        if at != len(view):
            raise MessageError(f"Partial: {len(view)} bytes.", f"the {at} bytes of its vectors.")
        self._check_numbers(out, columns)
        return Received(head, out, columns)

    def _check_numbers(self, partial: PartialSum, columns: Tensors) -> None:
        floats = [t for t in (*partial.counters.values(), *columns.values()) if t.is_floating_point()]
        if not all(bool(t.isfinite().all()) for t in floats):
            raise MessageError("Partial: a number is not finite.", "finite numbers.")
        if CHANGED in partial.counters and bool((partial.counters[CHANGED] > 1).any()):
            raise MessageError(f"Partial: {CHANGED} is not a flag.", "0 or 1.")


def _check_clients(head: PartialHead, starts: Sequence[Start]) -> None:
    """Refuse clients that were not asked, clients twice, and clients that are missing."""
    named = sorted(map(_place, (*head.arrived, *head.lost)))
    asked = list(map(_place, starts))
    if len(set(named)) < len(named):
        raise MessageError("Partial: a client is in it twice.", "each client once.")
    if set(named) - set(asked):
        raise MessageError("Partial: it has a client that was not asked.", "the clients of the work.")
    if (
        named != asked
        or [*head.arrived] != sorted(head.arrived, key=_place)
        or [*head.lost] != sorted(head.lost, key=_place)
    ):
        raise MessageError("Partial: a client of the work is missing.", "each client of the work, ascending.")


def _check_rows(head: PartialHead, rows: Mapping[int, int]) -> None:
    """Refuse other rows than the enrolled ones."""
    for one in head.arrived:
        if one.rows != rows[one.client]:
            raise MessageError(
                f"Partial: client {one.client} has {one.rows} rows.",
                f"{rows[one.client]}, its enrolled rows.",
                "a relay is trusted up to the rows of its clients.",
            )


def _place(one: Any) -> tuple[int, int]:
    return one.client, one.repeat


def _sum(name: str, low: int, numbers: Tensor, scale: int) -> exact.Digits:
    """The digits of a sum of contributions whose weights sum to `scale`."""
    half = 1 << exact.WIDTH - 1
    edges = numbers[[0, -1]] if len(numbers) else numbers
    if numbers.numel() and not (int(numbers.min()) >= -half and int(numbers.max()) < half and bool(edges.any(1).all())):
        raise MessageError(f"Partial: {name} is not in its only form.", "digits of 26 bits, without places of zeros.")
    digits = exact.from_integers(low, numbers)
    peak = float(exact.total(digits).abs().max()) if numbers.numel() else 0.0
    if not peak <= exact.LARGEST * max(1, scale):
        raise MessageError(f"Partial: {name} is not finite, or too large.", "a sum of numbers of at most 2^900.")
    return digits


def _bytes(tensor: Tensor) -> bytes:
    flat: bytes = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return flat
