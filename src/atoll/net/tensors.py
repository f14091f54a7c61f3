"""Tensors as the bytes of a safetensors file, in parts that share the memory of the tensors.

A model is hashed, written and sent from its own memory. `safetensors.torch.save` returns the same bytes in one buffer,
which takes two copies of each tensor, and it examines each tensor three times.

Tests: tests/faults/test_state_on_disk.py
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

# In the order in which a file has them: long numbers first, so that each tensor is aligned.
_TYPES = {
    torch.uint64: "U64", torch.int64: "I64", torch.float64: "F64", torch.complex64: "C64", torch.float32: "F32",
    torch.uint32: "U32", torch.int32: "I32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint16: "U16",
    torch.int16: "I16", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_ORDER = {dtype: number for number, dtype in enumerate(_TYPES)}


def tensor_parts(tensors: Mapping[str, Tensor]) -> list[bytes | memoryview]:
    """The bytes that `safetensors.torch.save` returns for these tensors, in parts.

    Args:
        tensors: tensors of any device and any strides. They must not change while the parts are in use.
    Returns:
        The head, then the memory of each tensor that is in CPU memory and contiguous, or of a copy.
    Example:
        >>> head, numbers = tensor_parts({"w": torch.zeros(2)})
        >>> head[8:62], len(numbers)
        (b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', 8)
    """
    names = sorted(tensors, key=lambda name: (_ORDER[tensors[name].dtype], name))
    head = _head(tuple((name, tensors[name].dtype, tuple(tensors[name].shape)) for name in names))
    return [head, *(_bytes_of(tensors[name]) for name in names)]


def tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """`tensor_parts` in one buffer."""
    return b"".join(tensor_parts(tensors))


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if len(flat) else memoryview(b"")


@lru_cache(maxsize=64)
def _head(tensors: tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]) -> bytes:
    """The length of the table, and the table of the tensors in their order."""
    table, at = {}, 0
    for name, dtype, shape in tensors:
        end = at + torch.Size(shape).numel() * dtype.itemsize
        table[name] = {"dtype": _TYPES[dtype], "shape": shape, "data_offsets": (at, end)}
        at = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
