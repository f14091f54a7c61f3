"""Shapes of outputs and targets. A shape is never repaired, except by axes of length 1; otherwise it is refused.

Tests: tests/identities/test_shapes.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from atoll.base.errors import UsageError
from atoll.base.lines import Change, Line


def row_means(values: Tensor) -> Tensor:
    """Reduce `[B, …]` to one number per row: the mean over all other axes."""
    return values.flatten(1).mean(1) if values.dim() > 1 else values


def labelled_means(values: Tensor, labelled: Tensor) -> Tensor:
    """The mean of each row over its labelled places.

    mean_i = Σ_t labelled[i, t] · values[i, t] / Σ_t labelled[i, t]

    Args:
        values: `[B, …]`, float.
        labelled: whether a place has a label, bool `[B, …]`.
    Returns:
        One number for each row, `[B]`. It is NaN for a row without any label.
    Example:
        >>> labelled_means(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[True, True, False]]))
        tensor([2.])
    """
    counted = torch.where(labelled, values, values.new_zeros(())).flatten(1)
    return counted.sum(1) / labelled.flatten(1).sum(1)


def _long(shape: torch.Size) -> tuple[int, ...]:
    """The axes of one row that are longer than 1."""
    return tuple(n for n in shape[1:] if n != 1)


def same_axes(shape: torch.Size, other: torch.Size) -> bool:
    """Whether two shapes have the same rows and differ at most by axes of length 1."""
    return shape[:1] == other[:1] and _long(shape) == _long(other)


def aligned(output: Tensor, y: Tensor) -> Tensor:
    """Reshape the output to the shape of the targets, if the two shapes differ only by axes of length 1.

    Args:
        output: predictions `[B, …]`.
        y: targets `[B, …]`.
    Returns:
        The output in the shape of `y`, with the same numbers in the same order.
    Raises:
        UsageError: the shapes differ in another way; the error shows both.
    Example:
        >>> aligned(torch.zeros(4, 1, 2), torch.zeros(4, 2)).shape
        torch.Size([4, 2])
    """
    check_output(output)
    if output.shape == y.shape:
        return output
    if output.dim() and same_axes(output.shape, y.shape):
        return output.reshape(y.shape)
    classes = not y.is_floating_point() and output.dim() == y.dim() + 1
    raise UsageError(
        f"The model returned shape {tuple(output.shape)} for targets of shape {tuple(y.shape)}.",
        "equal shapes; they may differ by axes of length 1.",
        "another reshape would compare numbers with the targets of other places.",
        Change("loss", "cross_entropy") if classes else "",
    )


def class_axis(output: Tensor, y: Tensor, axis: int | None = None) -> tuple[int, Tensor]:
    """Find the axis of the classes from the shapes of logits and labels: the last axis, or axis 1.

    Args:
        output: logits `[B, …]`, with the axes of `y` and one for the classes.
        y: labels, int64 `[B, …]`.
        axis: the axis of the classes if the shapes fit both; None: such shapes are refused.
    Returns:
        The axis, ≥ 1, and the labels in the shape of the output without this axis.
    Raises:
        UsageError: no axis fits, or both fit and `axis` is None; the error shows both shapes.
    Example:
        >>> class_axis(torch.zeros(2, 5, 7), torch.zeros(2, 7).long())[0]
        1
    """
    check_output(output)
    if output.dim() == 2 and y.dim() == 1 and len(output) == len(y):
        return 1, y
    last = output.dim() - 1
    rests = {at: output.shape[:at] + output.shape[at + 1 :] for at in {1, last, axis or 1} if 1 <= at <= last}
    fitting = [at for at, rest in rests.items() if rest == y.shape]
    fitting = fitting or [at for at, rest in rests.items() if same_axes(rest, y.shape)]
    if len(fitting) > 1:
        fitting = [at for at in fitting if axis is not None and at == axis % output.dim()]
        if not fitting:
            raise _either(output, y)
    if not fitting:
        raise _no_class_axis(output, y)
    (at,) = fitting
    return at, y if rests[at] == y.shape else y.reshape(rests[at])


def _either(output: Tensor, y: Tensor) -> UsageError:
    return UsageError(
        f"The model returned shape {tuple(output.shape)} for labels of shape {tuple(y.shape)}: the classes may be on "
        "axis 1 or on the last axis.",
        "a loss that names the axis of the classes: cross_entropy(axis=1) or cross_entropy(axis=-1).",
        "both axes fit the shapes, and the loss of one is wrong for the other.",
        Line(
            "\n".join(Change("loss", f"cross_entropy(axis={at})").at("python") for at in (1, -1)),
            Change("loss", "cross_entropy(axis=1)").at("shell"),
            Change("loss", "cross_entropy(axis=1)").at("file"),
        ),
    )


def _no_class_axis(output: Tensor, y: Tensor) -> UsageError:
    single = output.dim() > 0 and same_axes(output.shape, y.shape)
    return UsageError(
        f"The model returned shape {tuple(output.shape)} for labels of shape {tuple(y.shape)}.",
        "the shape of the labels with one more axis for the classes, the last axis or axis 1.",
        "cross-entropy compares the logits of all classes at the place of each label.",
        Change("loss", "binary_cross_entropy") if single else "",
    )


def check_output(output: Any) -> None:
    """Refuse an output that is no tensor.

    Raises:
        UsageError: the error shows the type, its fields, and a wrapper that returns one of them.
    """
    if isinstance(output, Tensor):
        return
    if output is None:
        raise UsageError(
            "The model returned None.", "a tensor with one entry for each row.", "forward has no return statement."
        )
    fields = _fields(output)
    shown = ", ".join(f"{name} {_shape(value)}" for name, value in fields.items())
    tensors = [name for name, value in fields.items() if isinstance(value, Tensor)]
    raise UsageError(
        f"The model returned a {type(output).__name__}{f' with {shown}' if shown else ''}.",
        "a tensor with one entry for each row, or an object with logits.",
        "the built-in losses and metrics compare one tensor with the targets.",
        _wrapper(next((n for n in tensors if "logits" in n), tensors[0])) if tensors else "",
    )


def _fields(output: Any) -> dict[str, Any]:
    """The fields of an output that is no tensor, by the text that reads one: `["logits"]`, `.loss` or `[0]`."""
    if isinstance(output, Mapping):
        return {f"[{name!r}]": value for name, value in output.items()}
    if dataclasses.is_dataclass(output):
        return {f".{f.name}": getattr(output, f.name) for f in dataclasses.fields(output)}
    if isinstance(output, (tuple, list)):
        names: tuple[str, ...] = vars(type(output)).get("_fields", ())  # of a named tuple
        return {f".{names[i]}" if names else f"[{i}]": value for i, value in enumerate(output)}
    return {}


def kind_of(value: Any) -> str:
    """The dtype and the shape of a tensor as text, such as "float32 [3, 4]"; the type of another value.

    Example:
        >>> kind_of(torch.zeros(3, 4)), kind_of(None)
        ('float32 [3, 4]', 'NoneType')
    """
    if not isinstance(value, Tensor):
        return type(value).__name__
    sparse = "" if value.layout == torch.strided else f"{value.layout} "
    return f"{sparse}{value.dtype} {list(value.shape)}".replace("torch.", "")


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is dense, real, and has values: only such tensors are stored and sent."""
    special = tensor.is_meta or tensor.is_complex() or tensor.is_quantized or tensor.is_nested
    return tensor.layout == torch.strided and not special


def _shape(value: Any) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def _wrapper(field: str) -> str:
    """A module that returns one field of the output of another module."""
    return (
        "class Logits(torch.nn.Module):\n"
        "    def __init__(self, net):\n"
        "        super().__init__()\n"
        "        self.net = net\n"
        "    def forward(self, *rows, **words):\n"
        f"        return self.net(*rows, **words){field}"
    )
