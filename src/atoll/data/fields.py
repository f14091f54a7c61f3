"""Rows of several tensors: a row is a dict of named tensors, stored as one vector of 32-bit words.

A model is a vector with segments, and so is a row: each field has its place among the words. All code that selects,
pads, copies or sends rows therefore works on one tensor, int32 `[..., words]`. Only two places read fields: the call of
the model, and the batches of a user's own loop.

Tests: tests/data/test_fields.py
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from atoll.base.errors import UsageError
from atoll.base.lines import Line

_WORD = 4  # bytes


@dataclass(frozen=True)
class RowField:
    """One named tensor of a row.

    Args:
        name: the keyword by which the model receives it.
        dtype: uint8, bool, int64, float32 or float64.
        shape: of one row.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """The count of numbers in a row."""
        return math.prod(self.shape)

    @property
    def words(self) -> int:
        """The number of 32-bit words of a row."""
        return -(-self.numel * self.dtype.itemsize // _WORD)

    def __str__(self) -> str:
        return f"{self.name} {str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


class PackedRows(NamedTuple):
    """Rows of several tensors: the words `[..., words]`, a tensor or an array, and the fields in the order of names."""

    words: Any
    fields: tuple[RowField, ...]

    @property
    def shape(self) -> torch.Size:
        """The shape of the words."""
        return torch.Size(self.words.shape)


def as_stored(x: Tensor) -> Tensor:
    """A field in the dtype in which it is stored.

    Intensities and masks are unchanged, as are float32 and float64; shorter floats become float32, integers int64.
    """
    if x.dtype in (torch.uint8, torch.bool, torch.float32, torch.float64):
        return x
    return x.float() if x.is_floating_point() else x.long()


def pack_fields(tensors: Mapping[str, Tensor], axes: int) -> PackedRows:
    """Pack named tensors into words.

    Args:
        tensors: `[*leading, *shape]` for each name, with equal leading axes.
        axes: the number of leading axes.
    Example:
        >>> words, fields = pack_fields({"b": torch.tensor([[1, 2]]), "a": torch.tensor([0.5])}, 1)
        >>> words.dtype, words.shape, [str(field) for field in fields]
        (torch.int32, torch.Size([1, 5]), ['a float32 []', 'b int64 [2]'])
    """
    fields, parts = [], []
    for name in sorted(tensors):
        t = as_stored(tensors[name])
        field = RowField(name, t.dtype, tuple(t.shape[axes:]))
        flat = t.reshape((*t.shape[:axes], field.numel)).contiguous().view(torch.uint8)
        padding = field.words * _WORD - flat.shape[-1]
        parts.append(torch.nn.functional.pad(flat, (0, padding)) if padding else flat)
        fields.append(field)
    return PackedRows(torch.cat(parts, -1).view(torch.int32), tuple(fields))


def unpack_fields(words: Tensor, fields: Sequence[RowField], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The fields of rows as a model takes them.

    Intensities become floats in [0, 1]. Token ids are int64, and masks bool.

    Args:
        words: int32 `[..., words]`.
        fields: of the rows.
        dtype: of all floats; None: as stored.
    Example:
        >>> words, fields = pack_fields({"ids": torch.tensor([[1, 2]]), "age": torch.tensor([0.5])}, 1)
        >>> unpack_fields(words, fields, torch.float64)
        {'age': tensor([0.5000], dtype=torch.float64), 'ids': tensor([[1, 2]])}
    """
    out, start = {}, 0
    for field in fields:
        # A copy: a view of 64-bit numbers must begin at an even word.
        part = words[..., start : start + field.words].clone(memory_format=torch.contiguous_format)
        start += field.words
        if field.dtype.itemsize < _WORD:
            part = part.view(torch.uint8)[..., : field.numel].contiguous()
        x = part.view(field.dtype).reshape((*words.shape[:-1], *field.shape))
        x = x.float().div_(255) if x.dtype == torch.uint8 else x
        out[field.name] = x if dtype is None or not x.is_floating_point() else x.to(dtype)
    return out


def check_names(x: Mapping[Any, Any], subject: str) -> None:
    """Refuse a dict that is no flat dict of named tensors."""
    nested = next((name for name, part in x.items() if isinstance(part, Mapping)), None)
    wrong = next((name for name in x if not isinstance(name, str) or not name.isidentifier()), None)
    if nested is None and wrong is None and x:
        return
    raise UsageError(
        f"{subject} is a dict that contains a dict, at {nested!r}."
        if nested is not None
        else f"{subject} is a dict with the key {wrong!r}."
        if x
        else f"{subject} is an empty dict.",
        "a flat dict of tensors, whose keys are names of arguments of the model's forward.",
        "the model receives each tensor by its keyword.",
        Line(python='{"ids": ids, "mask": mask}'),
    )


def check_tuple(x: Any, subject: str, axes: int) -> None:
    """Refuse several inputs of a model in a tuple or list: they would be stacked into one tensor.

    Args:
        x: the features.
        subject: their name in the error.
        axes: the least number of axes of an input.
    """
    if not isinstance(x, (tuple, list)) or not 2 <= len(x) <= 8:
        return
    if not all(hasattr(part, "dtype") and getattr(part, "ndim", 0) >= axes for part in x):
        return
    shapes = ", ".join(str(tuple(part.shape)) for part in x[:4])
    raise UsageError(
        f"{subject} is a {type(x).__name__} of {len(x)} arrays with the shapes {shapes}.",
        "one array, or a dict of named arrays.",
        "the model receives each array by its keyword.",
        Line(python="{" + ", ".join(f'"{name}": x[{i}]' for i, name in enumerate("abcdefgh"[: len(x)])) + "}"),
    )


def check_same_fields(given: Sequence[RowField], first: Sequence[RowField], subject: str, other: str) -> None:
    """Refuse rows with other fields than those of other rows.

    Raises:
        UsageError: a name, a shape or a dtype differs.
    """
    if tuple(given) == tuple(first):
        return
    ours, theirs = ({f.name: f for f in fields} for fields in (given, first))
    name = next(n for n in sorted({**ours, **theirs}) if ours.get(n) != theirs.get(n))
    both = tuple("one tensor" if not f else f"no {name}" if name not in f else str(f[name]) for f in (ours, theirs))
    ragged = name in ours and name in theirs and ours[name].dtype == theirs[name].dtype
    raise UsageError(
        f"{subject} has {both[0]}, {other} has {both[1]}.",
        "the same names, shapes and dtypes for all rows.",
        "rows are stacked into batches; pad sequences to one length, and pad labels with -100, which no loss counts."
        if ragged
        else "rows are stacked into batches.",
    )
