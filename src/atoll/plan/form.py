"""The bytes of a message: fields one after another, little-endian, without names, lengths or padding between them.

Sender and receiver know the codec and the layout, and these fix the length of every field. A message has exactly the
length of its `Form`. A message that is longer or shorter, or that no client sends, is refused before it is used.

Tests: tests/golden/test_codec_bytes.py, tests/identities/test_codecs.py
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from atoll.base.errors import AtollError

Buffer: TypeAlias = bytes | bytearray | memoryview


class MessageError(AtollError):
    """The bytes are no message of this codec. None of them are used, and the client's contribution is lost."""


class Field(NamedTuple):
    """One field of a message: the dtype and the count of its numbers."""

    dtype: torch.dtype
    length: int

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * self.length


class Form(NamedTuple):
    """The fields of a message: the side fields in the order in which they are sent, then the payload.

    Example:
        >>> Form({"scale": Field(torch.float32, 2)}, Field(torch.uint8, 12)).nbytes
        20
    """

    side: Mapping[str, Field]
    payload: Field

    @property
    def nbytes(self) -> int:
        return sum(field.nbytes for field in self.side.values()) + self.payload.nbytes


def to_bytes(form: Form, payload: Tensor, side: Mapping[str, Tensor]) -> list[bytes]:
    """The message of each lane: its side fields in the form's order, then its payload.

    Args:
        form: the fields of a message.
        payload: the payload of each message, `[K, form.payload.length]`.
        side: tensors `[K, length]`; the keys are the names of the fields.
    Returns:
        K messages of `form.nbytes` bytes.
    """
    parts = [(form.side[n], side[n]) for n in form.side] + [(form.payload, payload)]
    rows = [_dense(t.to(f.dtype).reshape(-1, f.length)).view(torch.uint8) for f, t in parts if f.length]
    if not rows:
        return [b""] * len(payload)
    whole = torch.cat(rows, -1)
    out = bytearray(whole.numel())
    torch.frombuffer(out, dtype=torch.uint8).copy_(whole.flatten())
    return [bytes(out[i : i + form.nbytes]) for i in range(0, len(out), form.nbytes)]


def _dense(rows: Tensor) -> Tensor:
    """Rows whose numbers follow one another. One number of an expanded tensor is contiguous, and has the stride 0."""
    rows = rows.contiguous()
    return rows if rows.stride(-1) == 1 else rows.clone(memory_format=torch.contiguous_format)


def from_bytes(form: Form, data: Sequence[Buffer]) -> tuple[Tensor, dict[str, Tensor]]:
    """Read the tensors from messages of one form.

    Args:
        form: the fields of a message.
        data: the messages.
    Returns:
        The payload and the side tensors, one row per message.
    Raises:
        MessageError: the length of a message differs from the form, or a message contains a number that is not finite.
    Example:
        >>> form = Form({}, Field(torch.float32, 1))
        >>> from_bytes(form, to_bytes(form, torch.tensor([[0.5]]), {}))[0]
        tensor([[0.5000]])
    """
    length = form.nbytes
    for i, one in enumerate(data):
        if len(one) != length:
            raise MessageError(
                f"Message {i} has {len(one)} bytes.",
                f"{length} bytes.",
                "the codec and the model determine the length of every message.",
            )
    whole = torch.empty(len(data), length, dtype=torch.uint8)
    if whole.numel():
        # One message that may be written to is used in place; a large one is not copied.
        alone = len(data) == 1 and not memoryview(data[0]).readonly
        whole = torch.frombuffer(data[0] if alone else bytearray().join(data), dtype=torch.uint8).reshape(whole.shape)
    fields = {**form.side, "payload": form.payload}
    sizes = [field.nbytes for field in fields.values()]
    out: dict[str, Tensor] = {}
    for (name, field), rows in zip(fields.items(), whole.split(sizes, -1), strict=True):
        # A view as numbers needs contiguous rows with an aligned start.
        size = field.dtype.itemsize
        aligned = rows.is_contiguous() and rows.data_ptr() % size == rows.stride(0) % size == 0
        out[name] = (rows if aligned else rows.clone(memory_format=torch.contiguous_format)).view(field.dtype)
        if field.dtype.is_floating_point and out[name].numel():
            reject(~_finite(out[name]), f"{name} is not finite", "finite numbers")
    return out.pop("payload"), out


def _finite(rows: Tensor) -> Tensor:
    """Whether all numbers of each row are finite, bool `[K]`: the extremes of a row with a NaN are NaN."""
    rows = rows if rows.dtype.itemsize > 1 else rows.to(torch.float32)
    return rows.amax(-1).isfinite() & rows.amin(-1).isfinite()


def reject(bad: Tensor, fault: str, required: str) -> None:
    """Raise MessageError for the first marked lane; `bad` is bool `[K]`."""
    if bool(bad.any()):
        raise MessageError(
            f"Message {bad.tolist().index(True)}: {fault}.", f"{required}.", "no client of this codec sends this."
        )
