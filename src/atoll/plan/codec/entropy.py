"""Lossless compression of a message's bytes by zstd.

Tests: tests/identities/test_codecs_entropy.py
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from torch import Tensor

from atoll.base.errors import UsageError
from atoll.base.random import Key
from atoll.compute.layout import Layout
from atoll.plan.codec.stage import Codec, Encoded
from atoll.plan.form import Buffer, Form, MessageError
from atoll.plan.protocols import Declared, Tensors

_MODULE = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"


def _zstd() -> Any:
    """The zstd module of Python 3.14, or its backport for earlier versions."""
    try:
        return importlib.import_module(_MODULE)
    except ImportError:
        raise UsageError(
            f"Entropy() without the module {_MODULE}.",
            "the extra atoll[zstd].",
            "Python contains zstd from 3.14 on, if it was built with it.",
            "pip install 'atoll[zstd]'",
        ) from None


@dataclass(frozen=True, repr=False)
class Entropy(Codec):
    """Compresses the message without loss, as the last stage of a codec.

    message = zstd(bytes of all preceding stages), or these bytes unchanged if the zstd frame is not shorter

    The numbers do not change. Only `to_bytes`, `from_bytes` and the counted bytes differ. Codes need about their
    entropy: 3.8 bits instead of 4 for `Eden(4)`, 1.5 instead of 4 for `Quantize(4, norm="l2")`, 27.6 instead of 32 for
    normal numbers. The length of a message depends on its content, so it reveals something about the update. `nbytes`
    is the largest possible length.

    Message: if it has the length of the preceding stages' form, it is their message, unchanged. If it is shorter, it is
    one zstd frame with a checksum. The frame contains the fields one after another. Each field is transposed: the first
    bytes of all its numbers, then the second bytes, and so on.

    Args:
        level: the compression level of zstd, 1 (fastest) to 22 (smallest).
    Raises:
        UsageError: the level is out of range. Or zstd is not installed; this is checked when a training is built.
    Example:
        >>> import torch
        >>> from atoll.plan.codec.quantize import Quantize
        >>> from atoll.plan.codec.stage import flat_layout
        >>> from atoll.base.random import Key
        >>> codec = (Quantize(8) >> Entropy()).bind(flat_layout(1000))
        >>> payload, side, *_ = codec.encode(torch.zeros(1, 1000), {}, {}, Key(0))
        >>> codec.sizes(payload, side).tolist(), codec.nbytes(flat_layout(1000))
        ([26], 1008)

    Reference: RFC 8878, Zstandard Compression, 2021.
    """

    per_message = True
    compresses = True
    lossless = True

    level: int = 3

    def __post_init__(self) -> None:
        if type(self.level) is not int or not 1 <= self.level <= 22:
            raise UsageError(
                f"Entropy({self.level!r}).", "a level of zstd, 1 to 22, a whole number.", write="Entropy(3)"
            )

    def bind(self, layout: Layout, total_weight: Tensor | int | None = None, before: Declared | None = None) -> Self:
        _zstd()  # not in the constructor, since reading a plan text must import nothing
        return super().bind(layout, total_weight, before)

    def declare(self, layout: Layout) -> Mapping[str, Declared]:
        return {"update": self.before} if self.binding else super().declare(layout)

    def encode(self, x: Tensor, memory: Tensors, shared: Tensors, key: Key) -> Encoded:
        return x, {}, {}, memory

    def compress(self, form: Form, messages: Sequence[bytes]) -> list[bytes]:
        zstd = _zstd()
        parameter = zstd.CompressionParameter
        options = {parameter.compression_level: self.level, parameter.checksum_flag: 1}
        frames = [zstd.compress(_transposed(form, whole), options=options) for whole in messages]
        return [frame if len(frame) < len(whole) else whole for frame, whole in zip(frames, messages, strict=True)]

    def decompress(self, form: Form, data: Sequence[Buffer]) -> Sequence[Buffer]:
        # Data of the full length or longer is no frame; the check of its length follows in `from_bytes`.
        return [self._opened(form, one, i) if len(one) < form.nbytes else one for i, one in enumerate(data)]

    def _opened(self, form: Form, frame: Buffer, i: int) -> bytes:
        zstd = _zstd()
        # A frame states the memory that its decoder needs. A frame that `compress` made needs at most the length
        # of its message, so a larger demand is refused.
        window = min(max(10, (form.nbytes - 1).bit_length()), zstd.DecompressionParameter.window_log_max.bounds()[1])
        opener = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: window})
        try:
            whole = opener.decompress(frame, max_length=form.nbytes + 1)
        except zstd.ZstdError as error:
            raise _refused(i, form, f"zstd cannot decompress it: {error}") from None
        if len(whole) > form.nbytes:
            raise _refused(i, form, f"it contains more than {form.nbytes} bytes")
        if not opener.eof:
            raise _refused(i, form, "it ends too early")
        if opener.unused_data or len(whole) != form.nbytes:
            raise _refused(i, form, f"it holds {len(whole)} bytes and {len(opener.unused_data)} more follow")
        return _transposed(form, whole, back=True)


def _refused(i: int, form: Form, subject: str) -> MessageError:
    return MessageError(
        f"Message {i}: {subject}.",
        f"one zstd frame of {form.nbytes} bytes.",
        "the codec and the model determine the length of every message.",
    )


def _transposed(form: Form, whole: bytes, back: bool = False) -> bytes:
    """The fields with the first bytes of all numbers, then the second bytes, and so on.

    Bytes that contain exponents repeat often. Separated from the last bits, which do not repeat, they compress better.
    """
    out, start = [], 0
    for field in (*form.side.values(), form.payload):
        part = np.frombuffer(whole, np.uint8, field.nbytes, start)
        shape = (field.length, field.dtype.itemsize)
        out.append(part.reshape(shape[::-1] if back else shape).T.tobytes())
        start += field.nbytes
    return b"".join(out)
