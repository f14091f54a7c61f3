"""Gradients and gradient descent of many clients in native code, for the stacks of layers that `atoll.fused` serves.

A client's weights stay near one core from its first step to its last; there is no tensor operation a step, no copy of a
batch where rows lie in memory, and no padding. Clients are dealt out to threads one by one. Every number is one chain
of multiplications and additions in a fixed order (`native/descent.c`), so neighbours, threads and the width of a
CPU's vectors change no bit.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from atoll.fused import Bias, Convolution, Dense, Pool, Program, Relu, Shape, Steps, ToMaps, ToRows, Unserved
from atoll.known import BLOCK, blocks, tell
from atoll.native import library, threads_now, widths
from atoll.shelf import empty

_AHEAD = 1 << 22  # numbers of rows that are read at once where they do not lie in memory
_ALONE = 1 << 21  # products that are over before a second thread has begun
_INT, _REAL, _AT = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
_GRADIENT, _UPDATE, _MODEL = 0, 1, 2
_NO_MEMORY, _NO_CLASS = 1, 2


class Stored(NamedTuple):
    """Rows for who reads them by themselves: an array of rows, numbers in it `[n]`, and their targets `[n, …]`."""

    x: Tensor
    at: Tensor
    y: Tensor


class Source(Protocol):
    """Where rows are read: `atoll.plan.lanes.Lanes`."""

    @property
    def in_memory(self) -> bool: ...
    @property
    def width(self) -> int: ...
    @property
    def on_step(self) -> Any: ...
    def stepped(self, step: int, losses: Tensor, counts: tuple[int, ...]) -> None: ...
    def stored(self, places: Tensor) -> Stored: ...


class Stage(NamedTuple):
    """A convolution, or a linear layer as one that is as large as its input; a bias, perhaps a ReLU and a pool.

    The same fields, in the same order, are `Told` in native/descent.c.
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
    hop_y: int = 1
    hop_x: int = 1
    last_y: int = 1
    last_x: int = 1
    weight: int = 0
    bias: int = -1

    @property
    def flat(self) -> bool:
        """Whether its kernel covers its input, as a linear layer's."""
        return (self.kernel_y, self.kernel_x) == (self.height + 2 * self.pad_y, self.width + 2 * self.pad_x)

    @property
    def products(self) -> int:
        """Multiplications of one row, forward."""
        return self.out_y * self.out_x * self.out * self.kernel_y * self.kernel_x * self.channels


@lru_cache(256)
def stages(program: Program, features: tuple[int, ...]) -> tuple[Stage, ...]:
    """A program for rows of this shape as stages.

    Raises:
        Unserved: with the reason.
    """
    theta = [torch.zeros(1, *shape) for shape in program.shapes]  # for a product of meta tensors torch imports sympy
    begins = [sum(map(prod, program.shapes[:i])) for i in range(len(program.shapes))]
    x, out = torch.zeros(1, 1, *features), list[Stage]()
    for layer in program.layers:
        before, (x, _) = x, layer.forward(x, theta)
        if isinstance(layer, Dense):
            out.append(Stage(0, before.shape[2], 1, 1, 0, 0, x.shape[2], 1, 1, 1, 1, 1, 1))
            out[-1] = out[-1]._replace(weight=begins[layer.weight], bias=_begin(begins, layer.bias))
        elif isinstance(layer, Convolution):
            if any(step != 1 for step in layer.dilation):
                raise Unserved("a convolution leaves out pixels (dilation)")
            (channels, height, width), (y_out, x_out) = before.shape[1:4], x.shape[2:4]
            into, step = (channels, height, width, *layer.padding), (*layer.kernel, *layer.stride)
            sizes = (*into, x.shape[1], *step, y_out, x_out, 1, 1, 1, 1, y_out, x_out)
            out.append(Stage(0, *sizes, begins[layer.weight]))
        elif isinstance(layer, (ToMaps, ToRows, Shape)):
            if isinstance(layer, Shape) and out and x.dim() > 3:
                raise Unserved("numbers become an image behind its first layer")
        elif not out:
            raise Unserved("something stands before its first Linear or Conv2d")
        elif isinstance(layer, Bias):
            out[-1] = out[-1]._replace(bias=begins[layer.bias])
        elif isinstance(layer, Relu):
            out[-1] = out[-1]._replace(relu=1)
        elif isinstance(layer, Pool):
            across = layer.axis == 3
            was = (out[-1].pool_x, out[-1].hop_x) if across else (out[-1].pool_y, out[-1].hop_y)
            if was != (1, 1):
                raise Unserved("a pool stands behind a pool")
            names = ("pool_x", "hop_x", "last_x") if across else ("pool_y", "hop_y", "last_y")
            out[-1] = out[-1]._replace(**dict(zip(names, (layer.size, layer.stride, x.shape[layer.axis]), strict=True)))
    last = out[-1] if out else None
    if last is None or last.relu or not last.flat:
        raise Unserved("it does not end in a Linear layer")
    return tuple(out)


def products(program: Program, features: tuple[int, ...]) -> int:
    """Multiplications of one row, forward and back; the input of the first layer has no gradient."""
    first, *others = (stage.products for stage in stages(program, features))
    return 2 * first + 3 * sum(others)


def _begin(begins: list[int], i: int) -> int:
    return begins[i] if i >= 0 else -1


class _Job(ctypes.Structure):
    """What native/descent.c is told, field by field."""

    _fields_ = [
        ("told", _AT),
        ("stages", _INT),
        ("squares", _INT),
        ("d", _INT),
        ("x", _AT),
        ("bytes", _INT),
        ("features", _INT),
        ("y", _AT),
        ("targets", _INT),
        ("rows", _AT),
        ("offsets", _AT),
        ("widths", _AT),
        ("lanes", _AT),
        ("counts", _AT),
        ("count_offsets", _AT),
        ("steps", _INT),
        ("clients", _INT),
        ("threads", _INT),
        ("theta", _AT),
        ("theta_stride", _INT),
        ("asked", _INT),
        ("lr", _REAL),
        ("out", _AT),
        ("losses", _AT),
        ("peaks", _AT),
        ("block", _INT),
    ]


def build(dtype: torch.dtype) -> ctypes.CDLL:
    """The library for numbers of this type; and those for what comes to the same bits without: sums, dropout.

    Raises:
        atoll.native.Unbuilt: it cannot be had on this machine.
    """
    library("exact"), library("exact", "WIDE"), library("dropout", *widths(dtype))  # metrics are in double
    return library("descent", *widths(dtype))


def _run(
    program: Program,
    theta: Tensor,
    rows: Stored,
    steps: list[tuple[int, tuple[int, ...]]],
    asked: int,
    lr: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Steps of K clients; or the gradient of one step.

    Args:
        program: of the model.
        theta: `[d]`, where all begin; or `[K, d]`, one for each.
        rows: of all steps, one after the other, each `[k, B]`.
        steps: B, and for each of k clients how many of its B rows count; k falls.
        asked: for the gradient, for how far each has come, or for its θ.
        lr: the rate.
    Returns:
        What was asked for, `[K, d]`, and Σ of losses of every client in every step, one after the other.
    """
    x, at = rows.x.contiguous(), rows.at.contiguous()
    features = tuple(x.shape[1:])
    held = stages(program, features)
    y = _targets(program, held[-1].out, rows.y, theta.dtype)
    if x.dtype not in (torch.uint8, theta.dtype):
        raise TypeError(f"rows of {x.dtype} for a model of {theta.dtype}")
    told = torch.tensor(held, dtype=torch.int64)
    sizes = torch.tensor([(width * len(own), len(own), width) for width, own in steps])
    ends = sizes.cumsum(0)
    offsets, count_offsets = (ends - sizes)[:, :2].t().contiguous()
    widths, lanes = sizes[:, 2].contiguous(), sizes[:, 1].contiguous()
    counts = torch.tensor([n for _, own in steps for n in own])
    clients, d = len(steps[0][1]), theta.shape[-1]
    out, losses, peaks = empty(theta, (clients, d)), theta.new_empty(len(counts)), theta.new_empty(clients, blocks(d))
    work = products(program, features) * len(at)
    job = _Job(
        told=told.data_ptr(),
        stages=len(held),
        squares=program.squares,
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
        threads=1 if work < _ALONE else threads_now(torch.get_num_threads()),
        theta=theta.data_ptr(),
        theta_stride=d if theta.dim() == 2 else 0,
        asked=asked,
        lr=lr,
        out=out.data_ptr(),
        losses=losses.data_ptr(),
        peaks=peaks.data_ptr(),
        block=BLOCK,
    )
    trouble = build(theta.dtype).run(ctypes.byref(job))
    if trouble == _NO_MEMORY:
        raise MemoryError("no memory for the buffers of a client's layers")
    if trouble == _NO_CLASS:
        raise IndexError(f"Target {int(y.min())} or {int(y.max())} is out of bounds.")
    tell(out, "peaks", peaks)
    return out, losses


def _targets(program: Program, out: int, y: Tensor, dtype: torch.dtype) -> Tensor:
    """Targets as native code reads them, which looks at no shape or type: as many numbers as outputs, or one class."""
    if program.squares and prod(y.shape[1:]) == out:
        return y.to(dtype).contiguous()
    if not program.squares and y.dim() == 1 and not y.is_floating_point():
        return y.long().contiguous()
    kind = "numbers" if program.squares else "a class"
    raise ValueError(f"targets of shape {list(y.shape)} ({y.dtype}) for {out} outputs, where each row has {kind}")


def gradient(program: Program, theta: Tensor, x: Tensor, y: Tensor, counts: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The mean gradient of K clients, each over its own rows, `[K, d]`, and Σ of their losses `[K]`.

    Args:
        program: of the model.
        theta: `[K, d]`.
        x, y: rows `[K, B, …]`, the first counts[k] of which count.
    """
    wide = x.shape[1]
    rows = Stored(x.flatten(0, 1).contiguous(), torch.arange(len(counts) * wide), y.flatten(0, 1))
    return _run(program, theta.contiguous(), rows, [(wide, counts)], _GRADIENT)


class Descent:
    """Plain gradient descent of K clients from one θ: θ_k ← θ_k − lr ∇ℓ_k.

    Args:
        program: of the model.
        theta: where all begin, `[d]`.
        lanes: K.
        lr: the rate.

    `loss`, `[K]`, is what the rows of all steps lost.
    """

    def __init__(self, program: Program, theta: Tensor, lanes: int, lr: float) -> None:
        self._program, self._start, self._lr, self._steps = program, theta.contiguous(), lr, 0
        self.loss, self._update = theta.new_zeros(lanes), theta.new_zeros(lanes, 0)

    def update(self) -> Tensor:
        """How far each has come, uphill: θ − θ_k, `[K, d]`."""
        return self._update

    @property
    def moved(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Buffers `[K, 0]` and no counters: a model with buffers is not served."""
        return self.loss.new_empty(len(self.loss), 0), {}

    def follow(self, rows: Source, steps: Steps) -> None:
        """Make these steps; rows that do not lie in memory are read some steps at a time."""
        first, *others = _portions(list(steps), None if rows.in_memory else _AHEAD // max(1, rows.width))
        if not others:
            self._update = self.step(rows, first, self._start, _UPDATE)
            return
        theta = self._start.repeat(len(self.loss), 1)
        for portion in (first, *others):
            theta[: len(portion[0][1])] = self.step(rows, portion, theta[: len(portion[0][1])], _MODEL)
        self._update = self._start - theta

    def step(self, rows: Source, steps: list[tuple[Tensor, tuple[int, ...]]], theta: Tensor, asked: int) -> Tensor:
        """Make some steps of all lanes in one call of native code: the updates, or the models, `[K, d]`."""
        stored = rows.stored(torch.cat([places.reshape(-1) for places, _ in steps]))
        shapes = [(places.shape[1], counts) for places, counts in steps]
        out, losses = _run(self._program, theta, stored, shapes, asked, self._lr)
        for (_, counts), lost in zip(steps, losses.split([len(counts) for _, counts in steps]), strict=True):
            self.loss[: len(counts)] += lost
            if rows.on_step is not None:
                rows.stepped(self._steps, lost, counts)
            self._steps += 1
        return out


def _portions(
    steps: list[tuple[Tensor, tuple[int, ...]]], most: int | None
) -> Iterator[list[tuple[Tensor, tuple[int, ...]]]]:
    """Steps in runs of at most so many rows, or of one step."""
    some, held = list[tuple[Tensor, tuple[int, ...]]](), 0
    for step in steps:
        if some and most is not None and held + step[0].numel() > most:
            yield some
            some, held = [], 0
        some.append(step)
        held += step[0].numel()
    yield some
