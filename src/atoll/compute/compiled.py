"""Gradients and gradient descent of many clients in native code, for the layer stacks of `atoll.compute.fused`.

One thread runs all steps of a client, so the client's weights stay in the caches of one core. There is no tensor
operation for each step, no copy of a batch if the rows are in memory, and no padding. Each number is one chain of
multiplications and additions in a fixed order (`compute/native/descent.c`), so its bits do not depend on the other
clients, on the threads or on the vector width of the CPU.

Tests: tests/identities/test_numerics.py, tests/identities/test_native.py
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from functools import lru_cache
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor

from atoll.compute import limits
from atoll.compute.buffer_pool import empty
from atoll.compute.fused import (
    CROSS_ENTROPY,
    Bias,
    Convolution,
    Dense,
    MaxPool,
    Program,
    Relu,
    Shape,
    Steps,
    ToMaps,
    ToRows,
    UnsupportedModel,
)
from atoll.compute.model_state import Stored
from atoll.compute.native import library, threads_now, widths
from atoll.compute.native.structs import DescentJob, LayerSpec
from atoll.compute.step_rule import StepRule
from atoll.compute.tensor_notes import BLOCK, attach, blocks
from atoll.data.rows import outside

_GRADIENT, _UPDATE, _MODEL = 0, 1, 2
_NO_MEMORY, _NO_CLASS = 1, 2
_NO_STEP = StepRule(0.0)


class StepRows(Protocol):
    """The rows of the clients' steps: `atoll.compute.batches.ClientBatch`."""

    @property
    def in_memory(self) -> bool: ...
    @property
    def width(self) -> int: ...
    @property
    def on_step(self) -> Any: ...
    def stepped(self, step: int, losses: Tensor, counts: tuple[int, ...]) -> None: ...
    def stored(self, places: Tensor) -> Stored: ...


@lru_cache(256)
def stages(program: Program, features: tuple[int, ...]) -> tuple[LayerSpec, ...]:
    """Translate a program for rows of this shape into the layers of native code.

    Args:
        program: of the model.
        features: shape of one row.
    Raises:
        UnsupportedModel: native code does not support the model; with the reason.
    """
    theta = [torch.zeros(1, *shape) for shape in program.shapes]  # not meta tensors: with them torch imports sympy
    begins = [sum(map(prod, program.shapes[:i])) for i in range(len(program.shapes))]
    x, out = torch.zeros(1, 1, *features), list[LayerSpec]()
    for layer in program.layers:
        before, (x, _) = x, layer.forward(x, theta)
        if isinstance(layer, Dense):
            out.append(LayerSpec(0, before.shape[2], 1, 1, 0, 0, x.shape[2], 1, 1, 1, 1, 1, 1))
            out[-1] = out[-1]._replace(weight=begins[layer.weight], bias=_begin(begins, layer.bias))
        elif isinstance(layer, Convolution):
            if any(step != 1 for step in layer.dilation):
                raise UnsupportedModel("a convolution has a dilation")
            (channels, height, width), (y_out, x_out) = before.shape[1:4], x.shape[2:4]
            into, step = (channels, height, width, *layer.padding), (*layer.kernel, *layer.stride)
            sizes = (*into, x.shape[1], *step, y_out, x_out, 1, 1, 1, 1, y_out, x_out)
            out.append(LayerSpec(0, *sizes, begins[layer.weight]))
        elif isinstance(layer, (ToMaps, ToRows, Shape)):
            if isinstance(layer, Shape) and out and x.dim() > 3:
                raise UnsupportedModel("an Unflatten follows its first layer")
        elif not out:
            raise UnsupportedModel("another layer precedes its first Linear or Conv2d")
        elif isinstance(layer, Bias):
            out[-1] = out[-1]._replace(bias=begins[layer.bias])
        elif isinstance(layer, Relu):
            out[-1] = out[-1]._replace(relu=1)
        elif isinstance(layer, MaxPool):
            across = layer.axis == 3
            pool = (out[-1].pool_x, out[-1].pool_stride_x) if across else (out[-1].pool_y, out[-1].pool_stride_y)
            if pool != (1, 1):
                raise UnsupportedModel("a pool follows a pool")
            names = ("pool_x", "pool_stride_x", "last_x") if across else ("pool_y", "pool_stride_y", "last_y")
            out[-1] = out[-1]._replace(**dict(zip(names, (layer.size, layer.stride, x.shape[layer.axis]), strict=True)))
    last = out[-1] if out else None
    if last is None or last.relu or not last.flat:
        raise UnsupportedModel("it does not end in a Linear layer")
    return tuple(out)


def products(program: Program, features: tuple[int, ...]) -> int:
    """Multiplications for one row, forward and backward; the input of the first layer needs no gradient."""
    first, *others = (stage.products for stage in stages(program, features))
    return 2 * first + 3 * sum(others)


def _begin(begins: list[int], i: int) -> int:
    return begins[i] if i >= 0 else -1


def load_libraries(dtype: torch.dtype) -> ctypes.CDLL:
    """Build or load all native libraries for this dtype, and return that of descent.c.

    Sum, dropout mask, clip, rounding and noise have slower paths of equal bits. They use these libraries if they are in
    the cache.

    Raises:
        atoll.compute.native.BuildError: this machine cannot build them.
    """
    library("exact"), library("exact", "WIDE"), library("dropout", *widths(dtype))  # WIDE: metrics are float64
    library("bounded"), library("noise"), library("ranks", *widths(dtype))
    return library("descent", *widths(dtype))


def _run(
    program: Program,
    theta: Tensor,
    rows: Stored,
    steps: list[tuple[int, tuple[int, ...]]],
    result: int,
    rule: StepRule = _NO_STEP,
    velocity: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the steps of K clients, or compute the gradient of one step.

    Args:
        program: of the model.
        theta: the start, `[d]` for all clients or `[K, d]`.
        rows: the rows of all steps in order, each step `[k, B]`.
        steps: of each step B, and the number of valid rows of each of its k clients; k never grows.
        result: _GRADIENT, _UPDATE (θ − θ_k) or _MODEL (θ_k).
        rule: the rule of the steps.
        velocity: the velocity of each client, `[K, d]`, which the steps change; None: it starts at 0.
    Returns:
        The result `[K, d]`, and the sum of losses of each client in each step, in the order of the steps.
    Raises:
        UsageError: a row number is outside the rows.
    """
    x, at = rows.x.contiguous(), rows.at.long().contiguous()
    features = tuple(x.shape[1:])
    layers = stages(program, features)
    _check_rows(at, x, theta.dtype)
    y = _targets(program, layers[-1].out, rows.y, theta.dtype)
    specs, weights = torch.tensor(layers, dtype=torch.int64), theta.new_tensor(program.weights)
    offsets, count_offsets, widths, lanes, counts = _places_of(steps)
    clients, d = len(steps[0][1]), theta.shape[-1]
    out, losses, peaks = empty(theta, (clients, d)), theta.new_empty(len(counts)), theta.new_empty(clients, blocks(d))
    work = products(program, features) * len(at)
    fields, kept = _rule_fields(rule, d)
    job = DescentJob(
        layers=specs.data_ptr(),
        layer_count=len(layers),
        loss=program.loss,
        weights=weights.data_ptr() if len(weights) else None,
        weight_count=len(weights),
        d=d,
        x=x.data_ptr(),
        bytes=x.dtype == torch.uint8,
        features=prod(features),
        y=y.data_ptr(),
        targets=prod(y.shape[1:]),
        rows=at.data_ptr(),
        offsets=offsets.data_ptr(),
        widths=widths.data_ptr(),
        lanes=lanes.data_ptr(),
        counts=counts.data_ptr(),
        count_offsets=count_offsets.data_ptr(),
        steps=len(steps),
        clients=clients,
        threads=1 if work < limits.SERIAL_PRODUCTS else threads_now(torch.get_num_threads()),
        theta=theta.data_ptr(),
        theta_stride=d if theta.dim() == 2 else 0,
        result=result,
        **fields,
        velocity=None if velocity is None else velocity.data_ptr(),
        out=out.data_ptr(),
        losses=losses.data_ptr(),
        peaks=peaks.data_ptr(),
        block=BLOCK,
    )
    _check_status(load_libraries(theta.dtype).run(ctypes.byref(job)), y)
    del kept
    attach(out, "peaks", peaks)
    return out, losses


def _places_of(steps: list[tuple[int, tuple[int, ...]]]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """For each step its first row, its first count, its width and its clients; then the counts of all steps."""
    sizes = torch.tensor([(width * len(lane_counts), len(lane_counts), width) for width, lane_counts in steps])
    offsets, count_offsets = (sizes.cumsum(0) - sizes)[:, :2].t().contiguous()
    counts = torch.tensor([n for _, lane_counts in steps for n in lane_counts])
    return offsets, count_offsets, sizes[:, 2].contiguous(), sizes[:, 1].contiguous(), counts


def _rule_fields(rule: StepRule, d: int) -> tuple[dict[str, Any], list[Tensor]]:
    """The fields of a job that state the rule of its steps, and the tensors that they point to.

    Native code reads the offset of each client where it is, if the other vectors are those of all clients.
    """
    steps: dict[str, Any] = {"pulls": not rule.plain, "lr": rule.lr, "kappa": rule.kappa}
    steps |= {"momentum": rule.momentum, "nesterov": rule.nesterov}
    shift, offset, anchor = rule.shift, rule.offset, rule.anchor if rule.mu else None
    if offset is None or offset.dim() == 1 or any(t is not None and t.dim() == 2 for t in (shift, anchor)):
        constant = rule.constant()
        if constant is None:
            return steps, []
        constant = constant.contiguous()
        stride = d if constant.dim() == 2 else 0
        return steps | {"constant": constant.data_ptr(), "constant_stride": stride}, [constant]
    named = {"constant": shift, "offset": offset, "anchor": anchor}
    kept = {name: t.contiguous() for name, t in named.items() if t is not None}
    return steps | {"mu": rule.mu} | {name: t.data_ptr() for name, t in kept.items()}, list(kept.values())


def _check_status(status: int, y: Tensor) -> None:
    if status == _NO_MEMORY:
        raise MemoryError("no memory for the weights and activations of a client in native code")
    if status == _NO_CLASS:
        raise IndexError(f"Target {int(y.min())} or {int(y.max())} is out of bounds.")


def _check_rows(at: Tensor, x: Tensor, dtype: torch.dtype) -> None:
    """Refuse rows that native code would misread: it reads a row by its address, as bytes or in the dtype of θ."""
    if x.dtype not in (torch.uint8, dtype):
        raise TypeError(f"rows of {x.dtype} for a model of {dtype}")
    if not len(at):  # aminmax needs a number
        return
    low, high = map(int, at.aminmax())
    if low < 0 or high >= len(x):
        raise outside(at, len(x))


def _targets(program: Program, out: int, y: Tensor, dtype: torch.dtype) -> Tensor:
    """Targets in the shape and dtype that native code reads without a check: one number for each output, or a class."""
    numbers = program.loss != CROSS_ENTROPY
    if numbers and prod(y.shape[1:]) == out:
        return y.to(dtype).contiguous()
    if not numbers and y.dim() == 1 and not y.is_floating_point():
        return y.long().contiguous()
    kind = f"{out} numbers" if numbers else "one class"
    raise ValueError(f"targets of shape {list(y.shape)} ({y.dtype}): a row of this model and loss needs {kind}")


def gradient(program: Program, theta: Tensor, x: Tensor, y: Tensor, counts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The mean gradient of each of K clients over its own rows.

        g_k = 1/n_k Σ_b ∇ℓ(θ_k; x_kb, y_kb),   b < n_k = counts[k]

    Args:
        program: the model as a list of layers, with its loss.
        theta: the parameters of each client, `[K, d]`, float32 or float64.
        x: the rows, `[K, B, …]`. Their dtype is that of theta, or uint8: these values are divided by 255.
        y: the targets, `[K, B]` or `[K, B, …]`.
        counts: the number of rows of each client. The remaining rows are padding.
    Returns:
        Gradients `[K, d]`, and the sum of losses of each client `[K]`.
    Raises:
        IndexError: a target class is negative, or it is not below the number of outputs.
        MemoryError: there is not enough memory for the weights and activations.
    """
    width = x.shape[1]
    rows = Stored(x.flatten(0, 1).contiguous(), torch.arange(len(counts) * width), y.flatten(0, 1))
    return _run(program, theta.contiguous(), rows, [(width, counts)], _GRADIENT)


class CompiledDescent:
    """Gradient descent of K clients by the rule of `StepRule`.

    Args:
        program: of the model.
        theta: the start, `[d]` for all clients or `[K, d]`.
        lanes: K.
        rule: the rule of the steps.

    `loss`, `[K]`, is the sum of losses over the rows of all steps.
    """

    def __init__(self, program: Program, theta: Tensor, lanes: int, rule: StepRule) -> None:
        self._program, self._start, self._rule, self._steps = program, theta.contiguous(), rule, 0
        self.loss, self._update = theta.new_zeros(lanes), theta.new_zeros(lanes, 0)
        self._velocity: Tensor | None = None

    def update(self) -> Tensor:
        """The update of each client, y₀ − y_k, `[K, d]`."""
        return self._update

    @property
    def moved(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Buffers `[K, 0]` and no counters: a model with buffers is not served."""
        return self.loss.new_empty(len(self.loss), 0), {}

    def follow(self, rows: StepRows, steps: Steps) -> None:
        """Make these steps. Rows that are not in memory are read for several steps at a time."""
        first, *others = _portions(
            list(steps), None if rows.in_memory else limits.NATIVE_READ_AHEAD // max(1, rows.width)
        )
        if not others:
            self._update = self.step(rows, first, self._start, _UPDATE)
            return
        theta = self._start.expand(len(self.loss), -1).clone(memory_format=torch.contiguous_format)
        self._velocity = torch.zeros_like(theta) if self._rule.momentum else None
        for portion in (first, *others):
            theta[: len(portion[0][1])] = self.step(rows, portion, theta[: len(portion[0][1])], _MODEL)
        self._update = self._start - theta

    def step(self, rows: StepRows, steps: list[tuple[Tensor, tuple[int, ...]]], theta: Tensor, result: int) -> Tensor:
        """Make some steps of all lanes in one call of native code: the updates, or the models, `[K, d]`."""
        stored = rows.stored(torch.cat([places.reshape(-1) for places, _ in steps]))
        shapes = [(places.shape[1], counts) for places, counts in steps]
        out, losses = _run(self._program, theta, stored, shapes, result, self._rule, self._velocity)
        for (_, counts), step_losses in zip(steps, losses.split([len(counts) for _, counts in steps]), strict=True):
            self.loss[: len(counts)] += step_losses
            if rows.on_step is not None:
                rows.stepped(self._steps, step_losses, counts)
            self._steps += 1
        return out


def _portions(
    steps: list[tuple[Tensor, tuple[int, ...]]], most: int | None
) -> Iterator[list[tuple[Tensor, tuple[int, ...]]]]:
    """Split the steps into portions of at most `most` rows, or of one step if it has more rows."""
    some, size = list[tuple[Tensor, tuple[int, ...]]](), 0
    for step in steps:
        if some and most is not None and size + step[0].numel() > most:
            yield some
            some, size = [], 0
        some.append(step)
        size += step[0].numel()
    yield some
