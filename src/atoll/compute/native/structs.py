"""The structs that Python and the C sources share, field by field.

Each library exports size and field names of its structs. The loader compares them with `STRUCTS`, because C reads a
struct by position: with a different declaration it would read wrong addresses.

Tests: tests/identities/test_native.py
"""

from __future__ import annotations

import ctypes
from typing import NamedTuple

_INT, _REAL, _POINTER = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p


class LayerSpec(NamedTuple):
    """A convolution or linear layer with optional bias, ReLU and max pool: `LayerSpec` in descent.c, int64 each.

    A linear layer is a convolution whose kernel covers the whole input.
    """

    relu: int
    channels: int
    height: int
    width: int
    pad_y: int
    pad_x: int
    out: int
    kernel_y: int
    kernel_x: int
    stride_y: int
    stride_x: int
    out_y: int
    out_x: int
    pool_y: int = 1
    pool_x: int = 1
    pool_stride_y: int = 1
    pool_stride_x: int = 1
    last_y: int = 1
    last_x: int = 1
    weight: int = 0
    bias: int = -1

    @property
    def flat(self) -> bool:
        """Whether the kernel covers the whole input, as in a linear layer."""
        return (self.kernel_y, self.kernel_x) == (self.height + 2 * self.pad_y, self.width + 2 * self.pad_x)

    @property
    def products(self) -> int:
        """Multiplications for one row, forward pass only."""
        return self.out_y * self.out_x * self.out * self.kernel_y * self.kernel_x * self.channels


class DescentJob(ctypes.Structure):
    """Argument of `run`: `Job` in descent.c."""

    _fields_ = [
        ("layers", _POINTER),
        ("layer_count", _INT),
        ("loss", _INT),
        ("weights", _POINTER),
        ("weight_count", _INT),
        ("d", _INT),
        ("x", _POINTER),
        ("bytes", _INT),
        ("features", _INT),
        ("y", _POINTER),
        ("targets", _INT),
        ("rows", _POINTER),
        ("offsets", _POINTER),
        ("widths", _POINTER),
        ("lanes", _POINTER),
        ("counts", _POINTER),
        ("count_offsets", _POINTER),
        ("steps", _INT),
        ("clients", _INT),
        ("threads", _INT),
        ("theta", _POINTER),
        ("theta_stride", _INT),
        ("result", _INT),
        ("pulls", _INT),
        ("lr", _REAL),
        ("momentum", _REAL),
        ("nesterov", _INT),
        ("kappa", _REAL),
        ("constant", _POINTER),
        ("constant_stride", _INT),
        ("offset", _POINTER),
        ("anchor", _POINTER),
        ("mu", _REAL),
        ("velocity", _POINTER),
        ("out", _POINTER),
        ("losses", _POINTER),
        ("peaks", _POINTER),
        ("block", _INT),
    ]


class SumJob(ctypes.Structure):
    """Argument of `tops` and `add`: `Job` in exact.c."""

    _fields_ = [
        ("rows", _POINTER),
        ("clients", _INT),
        ("d", _INT),
        ("stride", _INT),
        ("lowest", _INT),
        ("threads", _INT),
        ("tops", _POINTER),
        ("done", _POINTER),
        ("weights", _POINTER),
        ("digits", _POINTER),
        ("fresh", _POINTER),
        ("peaks", _POINTER),
    ]


class StructLayout(NamedTuple):
    """Size of a struct in bytes, and the names of its fields in order."""

    size: int
    fields: tuple[str, ...]


def _layout(struct: type[ctypes.Structure]) -> StructLayout:
    return StructLayout(ctypes.sizeof(struct), tuple(field[0] for field in struct._fields_))


_LAYER = StructLayout(ctypes.sizeof(_INT) * len(LayerSpec._fields), LayerSpec._fields)

STRUCTS = {  # by the name of the C source, then by the name of the struct in C
    "descent": {"Job": _layout(DescentJob), "LayerSpec": _LAYER},
    "exact": {"Job": _layout(SumJob)},
}


def exported(library: ctypes.CDLL, struct: str) -> StructLayout | None:
    """The layout of a struct in a library; None if the library does not export it, or contradicts itself."""
    try:
        size, count = (ctypes.c_int64.in_dll(library, f"{struct}_{name}").value for name in ("size", "count"))
        names = ctypes.c_char.in_dll(library, f"{struct}_fields")
    except ValueError:
        return None
    fields = tuple(ctypes.string_at(ctypes.addressof(names)).decode().split())
    return StructLayout(size, fields) if len(fields) == count else None
