"""Explicit gradients of many clients, for stacks of known layers: forward, backward and step in one pass.

Supports an `nn.Sequential` of Linear, Conv2d, ReLU, MaxPool2d, Flatten (and Unflatten, Identity, Sequential) with
cross-entropy, binary cross-entropy or mean squared error. Support does not depend on a model's name or size. Each
client's matrices are one item of batched matrix products. In the backward pass each layer first propagates the gradient
with the old weights, then adds its weight gradient to a sink with one matrix product. If the sink is θ and the factor
is −lr, this product is the SGD step, and no gradient is stored.

Activations have one of two memory layouts:

    rows     [K, B, …]          for Linear: the numbers of a row are adjacent
    maps     [K, C, H, W, B]    for Conv2d and MaxPool2d: the same pixel of all rows is adjacent, so that every
                                shifted copy reads B · W contiguous numbers

Tests: tests/identities/test_numerics.py, tests/identities/test_walk.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from math import prod
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from atoll.compute import limits
from atoll.compute.buffer_pool import empty
from atoll.compute.layout import Layout
from atoll.compute.loss import ClassWeighted, binary_cross_entropy, cross_entropy, mse
from atoll.compute.step_rule import StepRule
from atoll.data.rows import IGNORED

Steps = Iterable[tuple[Tensor, tuple[int, ...]]]  # per step: row positions [k, B], and each client's number of rows
CROSS_ENTROPY, SQUARED, LOGISTIC = 0, 1, 2  # kinds of loss, also in native code
MAPS = 32  # with maps, the most rows of one client in one pass: bounds the memory of shifted copies


class UnsupportedModel(Exception):
    """The model is not supported. The message is a clause that gives the reason."""


class Sink(NamedTuple):
    """The target of gradients, one tensor per parameter: sink ← keep · sink + factor · gradient.

    Args:
        tensors: the sink of each parameter, `[K, …]`.
        keep, factor: the numbers of the formula.
        then: is called with the parameter and some lanes as soon as their sinks are complete, and are in the cache.
    """

    tensors: Sequence[Tensor]
    keep: float
    factor: float
    then: Callable[[int, slice], None] | None = None

    def add(self, i: int, a: Tensor, b: Tensor) -> None:
        """Add a @ b, `[K, n, m]`, to the sink of parameter i."""
        into = self.tensors[i].view(*a.shape[:2], -1)
        if self.then is None:
            into.baddbmm_(a, b, beta=self.keep, alpha=self.factor)
            return
        for some in _blocks_of_lanes(into):
            into[some].baddbmm_(a[some], b[some], beta=self.keep, alpha=self.factor)
            self.then(i, some)

    def put(self, i: int, g: Tensor) -> None:
        """Add g to the sink of parameter i."""
        if not self.keep:
            torch.mul(g, self.factor, out=self.tensors[i])
        else:
            if self.keep != 1.0:
                self.tensors[i].mul_(self.keep)
            self.tensors[i].add_(g, alpha=self.factor)
        if self.then is not None:
            self.then(i, slice(None))


def _blocks_of_lanes(t: Tensor) -> Iterator[slice]:
    """Blocks of at least two lanes for each thread, since a single lane rounds differently, and of about
    `limits.STEP_BYTES` for each thread; one block on an accelerator."""
    threads = torch.get_num_threads() if t.is_cpu else len(t)
    count = max(1, min(len(t) // (2 * threads), t.nbytes // (limits.STEP_BYTES * threads)))
    return (slice(len(t) * j // count, len(t) * (j + 1) // count) for j in range(count))


class Layer(Protocol):
    """One layer. `forward` returns the output and the tensors that `backward` needs (`kept`)."""

    def forward(self, x: Tensor, theta: Sequence[Tensor]) -> tuple[Tensor, Any]: ...
    def backward(self, dy: Tensor, kept: Any, theta: Sequence[Tensor], sink: Sink, last: bool) -> Tensor: ...


@dataclass(frozen=True)
class Dense:
    """y = x Wᵀ + b on rows `[K, B, in]`; `weight` and `bias` are parameter indices, `bias` is −1 without b."""

    weight: int
    bias: int

    def forward(self, x: Tensor, theta: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        w = theta[self.weight]
        if x.dim() != 3:
            raise UnsupportedModel("a Linear layer gets rows with more than one axis")
        y = torch.bmm(x, w.mT)
        return (y if self.bias < 0 else y.add_(theta[self.bias][:, None])), x

    def backward(self, dy: Tensor, kept: Tensor, theta: Sequence[Tensor], sink: Sink, last: bool) -> Tensor:
        dx = dy if last else torch.bmm(dy, theta[self.weight])
        sink.add(self.weight, dy.mT, kept)
        if self.bias >= 0:
            sink.put(self.bias, dy.sum(1))
        return dx


@dataclass(frozen=True)
class Bias:
    """y = x + b, one number per channel, on maps. It is applied after the pools that follow its convolution."""

    bias: int
    in_place: bool = False

    def forward(self, x: Tensor, theta: Sequence[Tensor]) -> tuple[Tensor, None]:
        b = theta[self.bias][:, :, None, None, None]
        return x.add_(b) if self.in_place else x + b, None

    def backward(self, dy: Tensor, kept: None, theta: Sequence[Tensor], sink: Sink, last: bool) -> Tensor:
        sink.put(self.bias, dy.flatten(2).sum(2))
        return dy


@dataclass(frozen=True)
class Convolution:
    """Maps `[K, C, H, W, B]` → `[K, O, H', W', B]`: shifted copies of the input, then one product per client."""

    weight: int
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]

    def forward(self, x: Tensor, theta: Sequence[Tensor]) -> tuple[Tensor, Any]:
        if any(self.padding):
            (top, side) = self.padding
            x = nn.functional.pad(x, (0, 0, side, side, top, top))
        (k, c, h, w, b), s = x.shape, x.stride()
        (kh, kw), (sh, sw), (dh, dw) = self.kernel, self.stride, self.dilation
        out = ((h - dh * (kh - 1) - 1) // sh + 1, (w - dw * (kw - 1) - 1) // sw + 1)
        shifted = x.as_strided((k, c, kh, kw, *out, b), (s[0], s[1], dh * s[2], dw * s[3], sh * s[2], sw * s[3], s[4]))
        columns = shifted.reshape(k, c * kh * kw, -1)
        y = torch.bmm(theta[self.weight].flatten(2), columns)
        return y.view(k, -1, *out, b), (columns, x.shape)

    def backward(self, dy: Tensor, kept: Any, theta: Sequence[Tensor], sink: Sink, last: bool) -> Tensor:
        columns, shape = kept
        flat = dy.reshape(*dy.shape[:2], -1)
        weight = None if last else theta[self.weight].flatten(2).clone()  # the old weights; a small copy
        sink.add(self.weight, flat, columns.mT)
        if weight is None:
            return dy
        # Write into the memory of the shifted copies: it is in the cache and no longer needed.
        return self._folded(torch.bmm(weight.mT, flat, out=columns), dy, shape)

    def _folded(self, columns: Tensor, dy: Tensor, shape: torch.Size) -> Tensor:
        """Add the gradients of the shifted copies at the positions of their sources (the transpose of the shifts)."""
        (kh, kw), (sh, sw), (dh, dw) = self.kernel, self.stride, self.dilation
        (k, c, h, w, b), (oh, ow) = shape, dy.shape[2:4]
        copies = columns.view(k, c, kh, kw, oh, ow, b)
        dx = dy.new_zeros(shape)
        for i in range(kh):
            for j in range(kw):
                rows = slice(i * dh, i * dh + (oh - 1) * sh + 1, sh)
                dx[:, :, rows, j * dw : j * dw + (ow - 1) * sw + 1 : sw].add_(copies[:, :, i, j])
        (top, side) = self.padding
        return dx[:, :, top : h - top, side : w - side] if top or side else dx


@dataclass(frozen=True)
class Relu:
    """y = max(x, 0)."""

    in_place: bool = False

    def forward(self, x: Tensor, theta: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        y = x.relu_() if self.in_place else x.relu()
        return y, y

    def backward(self, dy: Tensor, kept: Tensor, theta: Sequence[Tensor], sink: Sink, last: bool) -> Tensor:
        return torch.ops.aten.threshold_backward(dy, kept, 0)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class MaxPool:
    """The maximum of `size` neighbours, every `stride`, along one axis of maps.

    The first of several equal maxima receives the gradient.
    """

    axis: int
    size: int
    stride: int

    def forward(self, x: Tensor, theta: Sequence[Tensor]) -> tuple[Tensor, Any]:
        views = self._views(x)
        y = views[0] if self.size == 1 else torch.maximum(views[0], views[1])
        for view in views[2:]:
            torch.maximum(y, view, out=y)
        return y.contiguous(), (x, y)

    def backward(self, dy: Tensor, kept: Any, theta: Sequence[Tensor], sink: Sink, last: bool) -> Tensor:
        x, y = kept
        whole = self.size == self.stride and y.shape[self.axis] * self.size == x.shape[self.axis]
        dx = torch.empty_like(x) if whole else torch.zeros_like(x)
        *others, last_view = zip(self._views(x), self._views(dx), strict=True)
        is_max = torch.empty_like(y)
        for view, into in others:
            torch.ge(view, y, out=is_max)  # floats 1 and 0: a selection by booleans takes ten times longer
            passed = torch.mul(dy, is_max, out=into if whole else None)
            dy = dy - passed  # exact: each number of `passed` is that of dy, or 0
            if not whole:
                into.add_(passed)
        _ = last_view[1].copy_(dy) if whole else last_view[1].add_(dy)
        return dx

    def _views(self, x: Tensor) -> list[Tensor]:
        count = (x.shape[self.axis] - self.size) // self.stride + 1
        reach = (count - 1) * self.stride + 1
        before = (slice(None),) * self.axis
        return [x[(*before, slice(i, i + reach, self.stride))] for i in range(self.size)]


@dataclass(frozen=True)
class Shape:
    """Rows `[K, B, …]` with another shape of each row."""

    change: Callable[[Tensor], Tensor]

    def forward(self, x: Tensor, theta: Sequence[Tensor]) -> tuple[Tensor, torch.Size]:
        return self.change(x), x.shape

    def backward(self, dy: Tensor, kept: torch.Size, theta: Sequence[Tensor], sink: Sink, last: bool) -> Tensor:
        return dy.view(kept)


@dataclass(frozen=True)
class ToMaps:
    """Rows `[K, B, C, H, W]` → maps `[K, C, H, W, B]`."""

    def forward(self, x: Tensor, theta: Sequence[Tensor]) -> tuple[Tensor, None]:
        if x.dim() != 5:
            raise UnsupportedModel("a convolution or a pool gets rows that are not images with channels")
        return x.permute(0, 2, 3, 4, 1).contiguous(), None

    def backward(self, dy: Tensor, kept: None, theta: Sequence[Tensor], sink: Sink, last: bool) -> Tensor:
        return dy.permute(0, 4, 1, 2, 3).contiguous()


@dataclass(frozen=True)
class ToRows:
    """Maps `[K, C, H, W, B]` → rows `[K, B, C, H, W]`."""

    def forward(self, x: Tensor, theta: Sequence[Tensor]) -> tuple[Tensor, None]:
        return x.permute(0, 4, 1, 2, 3).contiguous(), None

    def backward(self, dy: Tensor, kept: None, theta: Sequence[Tensor], sink: Sink, last: bool) -> Tensor:
        return dy.permute(0, 2, 3, 4, 1).contiguous()


@dataclass(frozen=True)
class Program:
    """A model as a list of layers, with its loss.

    Args:
        layers: in the order of the forward pass.
        shapes: shapes of the parameters, in the order of θ.
        loss: the kind of loss: CROSS_ENTROPY, SQUARED or LOGISTIC.
        weights: the weight of each class, or () for equal weights.
        maps: whether some layers use maps. Their shifted copies are many times larger than the input.
    """

    layers: tuple[Layer, ...]
    shapes: tuple[tuple[int, ...], ...]
    loss: int
    weights: tuple[float, ...]
    maps: bool

    @classmethod
    def of(cls, module: nn.Module, loss: Any, layout: Layout) -> Program:
        """Build the program of a model and a loss.

        Raises:
            UnsupportedModel: the model or the loss is not supported.
        """
        weights = loss.weights if isinstance(loss, ClassWeighted) else ()
        kind = _kind(loss.loss if isinstance(loss, ClassWeighted) else loss)
        if kind is None:
            raise UnsupportedModel("its loss is none of cross_entropy, binary_cross_entropy and mse")
        if any(e.segment != "params" or e.alias for e in layout.entries):
            raise UnsupportedModel("it has tied, frozen or computed tensors")
        names = {e.name: i for i, e in enumerate(layout.segment("params"))}
        layers = _arranged([layer for name, m in _leaves(module, "") for layer in _layers(m, name, names)])
        maps = any(isinstance(layer, (Convolution, MaxPool)) for layer in layers)
        return cls(tuple(layers), tuple(e.shape for e in layout.segment("params")), kind, weights, maps)

    def room(self, features: tuple[int, ...], rows: int) -> int:
        """Return how many numbers of memory one client needs for a pass over n = `rows` rows: θ and activations."""
        return _room(self, features, rows)

    def split(self, theta: Tensor) -> list[Tensor]:
        """Return views of θ `[K, d]`, one per parameter, `[K, *shape]`."""
        parts = theta.split([prod(shape) for shape in self.shapes], 1)
        return [part.unflatten(1, shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def output(self, x: Tensor, theta: Sequence[Tensor]) -> Tensor:
        """Compute the model's output for rows x `[K, B, …]`."""
        for layer in self.layers:
            x, _ = layer.forward(x, theta)
        return x

    def run(self, theta: Sequence[Tensor], x: Tensor, y: Tensor, share: Tensor, sink: Sink) -> Tensor:
        """Compute each row's loss, and add Σ share · gradient over the rows to the sink.

        Args:
            theta: one tensor per parameter, `[K, *shape]`.
            x, y: rows `[K, B, …]`.
            share: `[K, B]`: 1/n for each of a client's n valid rows, 0 for padding.
            sink: contiguous tensors; it may be θ itself.
        Returns:
            The losses `[K, B]`.
        """
        kept = []
        for layer in self.layers:
            x, memory = layer.forward(x, theta)
            kept.append(memory)
        each, dy = _LOSSES[self.loss](x, y)
        if self.weights:
            weight = x.new_tensor(self.weights)[y.long()]
            each, share = each * weight, share * weight
        dy = dy.mul_(share.view(*share.shape, *[1] * (dy.dim() - 2)))
        first = min(i for i, layer in enumerate(self.layers) if isinstance(layer, (Dense, Convolution, Bias)))
        for i in range(len(self.layers) - 1, first - 1, -1):
            dy = self.layers[i].backward(dy, kept.pop(), theta, sink, i == first)
        return each

    def gradient(self, theta: Sequence[Tensor], x: Tensor, y: Tensor, share: Tensor) -> tuple[list[Tensor], Tensor]:
        """Compute the gradient, one tensor per parameter `[K, *shape]`, and each row's loss `[K, B]`."""
        sinks = [t.new_empty(t.shape) for t in theta]
        width = MAPS if self.maps else x.shape[1]
        each = []
        for start in range(0, x.shape[1], width):
            xs, ys, shares = (rows[:, start : start + width] for rows in (x, y, share))
            each.append(self.run(theta, xs, ys, shares, Sink(sinks, float(start > 0), 1.0)))
        return sinks, torch.cat(each, 1)


@lru_cache(256)
def _room(program: Program, features: tuple[int, ...], rows: int) -> int:
    # Zeros on the host, not meta tensors: for a product of meta tensors torch imports sympy, which takes half a second.
    theta = [torch.zeros(1, *shape) for shape in program.shapes]
    x = torch.zeros(1, min(rows, MAPS) if program.maps else rows, *features)
    size = sum(t.numel() for t in theta) + x.numel()
    for layer in program.layers:
        x, kept = layer.forward(x, theta)
        size += 0 if isinstance(layer, Shape) else x.numel()
        size += kept[0].numel() if isinstance(layer, Convolution) else 0
    return size


class Lanes(NamedTuple):
    """The active lanes of a descent: one tensor per parameter, `[k, *shape]` or, for `constant`, `[1, *shape]`."""

    theta: list[Tensor]
    velocity: list[Tensor]
    constant: list[Tensor]

    def first(self, k: int) -> Lanes:
        """Views of the first k lanes."""
        return Lanes(*([t[:k] for t in tensors] for tensors in self))

    def pair(self) -> Lanes:
        """The first lane and a copy of it."""
        first = self.first(1)
        theta, velocity = ([t.repeat(2, *[1] * (t.dim() - 1)) for t in some] for some in first[:2])
        return Lanes(theta, velocity, first.constant)


class FusedDescent:
    """Gradient descent of K lanes in place, by the rule of `StepRule`.

    Without a pull the backward pass makes the step. With a pull and without momentum, the step is

        z = y − lr/(1 − ω)·∇ℓ(y),  y ← z + ω·(p − z),  ω = lr·κ,  p = −c/κ,  or  y ← z − lr·c  if κ = 0

    whose first part is a matrix product that keeps y. With momentum the product adds to the velocity.

    Lanes are sorted by their number of steps, largest first, so that the active lanes are always the first k.

    Args:
        program: the model's program.
        theta: the start, `[d]` for all lanes or `[K, d]`.
        lanes: K.
        rule: the rule of the steps.
    """

    def __init__(self, program: Program, theta: Tensor, lanes: int, rule: StepRule) -> None:
        self._program, self._start, self._rule = program, program.split(theta.view(-1, theta.shape[-1])), rule
        width = max(2, lanes)
        of_lanes = [t.expand(width, *t.shape[1:]) for t in self._start]
        self._keep = _kept_share(rule, theta.dtype)
        constant = self._constant()
        self._lanes = Lanes(
            [t.clone(memory_format=torch.contiguous_format) for t in of_lanes],
            [empty(t, t.shape) for t in of_lanes] if rule.momentum else [],
            [] if constant is None else program.split(constant.view(-1, constant.shape[-1])),
        )
        self._momentum = 0.0  # of the first step, which writes the velocity without reading it
        self._active = self._lanes if lanes > 1 else None
        self._pair: Lanes | None = None  # the last active lane and its copy: a single lane rounds differently
        self._share: tuple[tuple[int, ...], Tensor, Tensor] | None = None
        self._loss_sum = theta.new_zeros(width, 1, 1)
        self.count = lanes

    def _constant(self) -> Tensor | None:
        """The number c that a step adds to the gradient, or the point p to which it moves, `[d]` or `[K, d]`."""
        rule = self._rule
        if self._keep is None or not rule.kappa:
            return rule.constant()
        kappa = (1.0 - self._keep) / rule.lr  # of the rounded factor of y
        anchor = None if rule.anchor is None or not rule.mu else rule.anchor * ((kappa - rule.decay) / kappa)
        shift, sign = (rule.offset, 1.0) if rule.shift is None else (rule.shifted(), -1.0)
        if shift is None or anchor is None:
            return anchor if shift is None else shift * (sign / kappa)
        out = empty(shift, torch.broadcast_shapes(shift.shape, anchor.shape))
        return torch.add(anchor, shift, alpha=sign / kappa, out=out)

    @property
    def loss(self) -> Tensor:
        """Sum of the losses over the rows of all steps so far, `[K]`."""
        return self._loss_sum.flatten()[: self.count]

    def follow(self, rows: Any, steps: Steps) -> None:
        """Make these steps on the batches of `rows.batches(steps)`; `rows.stepped` receives the losses of each."""
        for number, (x, y, counts) in enumerate(rows.batches(steps)):
            losses = self.step(x, y, counts)
            if rows.on_step is not None:
                rows.stepped(number, losses, counts)

    @torch.no_grad()
    def step(self, x: Tensor, y: Tensor, counts: tuple[int, ...]) -> Tensor:
        """Make one step of the first k lanes on rows `[k, B, …]`; return the sum of each lane's losses `[k]`.

        Only the first counts[i] rows of lane i are valid; the rest is padding.
        """
        k = len(counts)
        if self._share is None or self._share[0] != counts or self._share[1].shape[1] != x.shape[1]:
            share = shares(counts, y, self._start[0])
            self._share = counts, share, (share > 0).to(share.dtype)[:, None]
        _, share, rows = self._share
        if k == 1:
            if self._pair is None:
                self._pair = self._lanes.pair()
            active = self._pair
            x, y, share, rows = (t.expand(2, *t.shape[1:]) for t in (x, y, share, rows))
        elif self._active is None or len(self._active.theta[0]) != k:
            active = self._lanes.first(k)
        else:
            active = self._active
        self._active = active
        each = self._step(active, x, y, share)
        losses = torch.bmm(rows, each.unsqueeze(2))[:k]
        self._loss_sum[:k] += losses
        return losses.view(k)

    def _step(self, lanes: Lanes, x: Tensor, y: Tensor, share: Tensor) -> Tensor:
        """Make one step of these lanes in place; return each row's loss `[k, B]`."""
        rule, program = self._rule, self._program
        one_pass = not program.maps or x.shape[1] <= MAPS
        if one_pass and self._keep is not None:
            if not lanes.constant:
                return program.run(lanes.theta, x, y, share, Sink(lanes.theta, self._keep, -rule.lr))
            then = partial(self._finish, lanes)
            return program.run(lanes.theta, x, y, share, Sink(lanes.theta, 1.0, -rule.lr / self._keep, then))
        if one_pass and rule.momentum and not rule.nesterov:
            then = partial(_finish_momentum, lanes, rule)
            sink, self._momentum = Sink(lanes.velocity, self._momentum, 1.0, then), rule.momentum
            return program.run(lanes.theta, x, y, share, sink)
        gradient, each = program.gradient(lanes.theta, x, y, share)
        if self._keep is not None:
            for i, (t, g) in enumerate(zip(lanes.theta, gradient, strict=True)):
                if lanes.constant:
                    t.add_(g, alpha=-rule.lr / self._keep)
                    self._finish(lanes, i, slice(None))
                else:
                    (t if self._keep == 1.0 else t.mul_(self._keep)).add_(g, alpha=-rule.lr)
            return each
        self._pull(gradient, lanes)
        if rule.momentum and not self._momentum:
            self._momentum = rule.momentum
            torch._foreach_copy_(lanes.velocity, gradient)
        elif rule.momentum:
            torch._foreach_mul_(lanes.velocity, rule.momentum)
            torch._foreach_add_(lanes.velocity, gradient)
        if rule.nesterov:
            torch._foreach_add_(gradient, lanes.velocity, alpha=rule.momentum)
        torch._foreach_add_(
            lanes.theta, lanes.velocity if rule.momentum and not rule.nesterov else gradient, alpha=-rule.lr
        )
        return each

    def _finish(self, lanes: Lanes, i: int, some: slice) -> None:
        """The last part of a step without momentum, for parameter i of some lanes."""
        if self._keep == 1.0 or self._keep is None:
            _add_constant(lanes.theta, lanes.constant, -self._rule.lr, i, some)
        else:
            point = lanes.constant[i]
            lanes.theta[i][some].lerp_(point if len(point) == 1 else point[some], 1.0 - self._keep)

    def _pull(self, into: list[Tensor], lanes: Lanes) -> None:
        """Add κy + c."""
        if self._rule.kappa:
            torch._foreach_add_(into, lanes.theta, alpha=self._rule.kappa)
        for t, c in zip(into, lanes.constant, strict=False):
            t.add_(c)

    @torch.no_grad()
    def update(self) -> Tensor:
        """Compute each lane's update y₀ − y_k, `[K, d]`."""
        if self._pair is not None:
            for t, pair in zip(self._lanes.theta, self._pair.theta, strict=True):
                t[0].copy_(pair[0])
        out = empty(self._start[0], (self.count, sum(prod(shape) for shape in self._program.shapes)))
        for start, t, part in zip(self._start, self._lanes.theta, self._program.split(out), strict=True):
            torch.sub(start, t[: self.count], out=part)
        return out

    @property
    def moved(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Buffers `[K, 0]` and no counters: a model with buffers is not served."""
        return self._loss_sum.new_empty(self.count, 0), {}


def _add_constant(into: Sequence[Tensor], constant: Sequence[Tensor], factor: float, i: int, some: slice) -> None:
    """Add factor · c to parameter i of some lanes; c is `[1, …]` or `[k, …]`."""
    c = constant[i]
    into[i][some].add_(c if len(c) == 1 else c[some], alpha=factor)


def _finish_momentum(lanes: Lanes, rule: StepRule, i: int, some: slice) -> None:
    """Add κy + c to the velocity v of parameter i of some lanes, and −lr·v to the parameter."""
    y, v = lanes.theta[i][some], lanes.velocity[i][some]
    if rule.kappa:
        v.add_(y, alpha=rule.kappa)
    if lanes.constant:
        _add_constant(lanes.velocity, lanes.constant, 1.0, i, some)
    y.add_(v, alpha=-rule.lr)


def _kept_share(rule: StepRule, dtype: torch.dtype) -> float | None:
    """1 − lr·κ as a number of this dtype, the factor of y in a step without momentum.

    None if the step needs the gradient: with momentum, if lr·κ is so small that 1 − lr·κ loses most of its digits, or
    so large that the gradient is divided by less than a half.
    """
    rate = rule.lr * rule.kappa
    if rule.momentum or 0 < rate < _DIGITS * torch.finfo(dtype).eps or rate > 0.5:
        return None
    if not rate:
        return 1.0
    return float(torch.tensor(1.0 - rate, dtype=dtype, device="cpu"))


_DIGITS = 1024  # lr·κ keeps at least ten binary digits in the factor 1 − lr·κ


def shares(counts: tuple[int, ...], y: Tensor, like: Tensor) -> Tensor:
    """Return 1/n for each of a client's n valid rows and 0 for padding, `[K, B]`, in the dtype of `like`.

    Small results are shared between calls, so no caller may change one in place.
    """
    make = _small_shares if len(counts) * y.shape[1] <= _SMALL else _shares
    return make(counts, y.shape[1], like.dtype, like.device)


def _shares(counts: tuple[int, ...], width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    valid = torch.tensor(counts, device=device)[:, None]
    rows = torch.arange(width, device=device)
    return (rows < valid).to(dtype) / valid.clamp(min=1).to(dtype)


_SMALL = 1 << 13  # numbers of a result that is kept for the next round
_small_shares = lru_cache(128)(_shares)


def total_of(each: Tensor, share: Tensor) -> Tensor:
    """Sum one number per row over each client's valid rows, `[K]`."""
    return (each * (share > 0)).sum(1)


def _entropy(output: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Compute −log softmax(output)[y] and its gradient softmax(output) − 1[y]."""
    if output.dim() != 3:
        raise UnsupportedModel("its output is not one number per class")
    logs, at = output.log_softmax(-1), y.unsqueeze(-1)
    each = logs.gather(-1, at).squeeze(-1).neg_()
    dy = logs.exp_()
    return each, dy.scatter_add_(-1, at, dy.new_full((1, 1, 1), -1.0).expand_as(at))


def _squared(output: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the mean over a row's targets of (output − y)², and its gradient."""
    off = (output.reshape(y.shape) - y).reshape(output.shape)
    flat = off.flatten(2)
    return flat.square().mean(2), off * (2 / flat.shape[2])


def _logistic(output: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the mean over a row's labels of −log σ(±output), and its gradient (σ(output) − y) / labels."""
    z, y = output.reshape(y.shape).flatten(2) if y.dim() > 2 else output.reshape(*y.shape, 1), y.to(output.dtype)
    y = y.reshape(z.shape)
    each = -nn.functional.logsigmoid(-z) - z * y
    # torch.sigmoid rounds differently at the end of a tensor: see engine/position_check.py.
    dy = nn.functional.logsigmoid(z).exp_().sub_(y)
    if z.shape[2] == 1:
        return each.squeeze(2), dy.reshape(output.shape)
    labelled = y != IGNORED
    counts = labelled.sum(2)
    each = torch.where(labelled, each, each.new_zeros(())).sum(2) / counts
    return each, torch.where(labelled, dy, dy.new_zeros(())).div_(counts[..., None]).reshape(output.shape)


_LOSSES = (_entropy, _squared, _logistic)


# Reading a module


def _kind(loss: Any) -> int | None:
    """The kind of a loss; None if it is not supported."""
    if isinstance(loss, cross_entropy):
        return CROSS_ENTROPY
    return SQUARED if loss is mse else LOGISTIC if loss is binary_cross_entropy else None


def _leaves(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the layers of nested Sequentials in order, with their names."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or "forward" in vars(module):
        raise UnsupportedModel(f"its layer {name or 'itself'} has hooks or its own forward")
    if type(module) is nn.Sequential:
        for leaf, child in module.named_children():
            yield from _leaves(child, f"{name}.{leaf}" if name else leaf)
    else:
        yield name, module


def _layers(module: nn.Module, name: str, names: Mapping[str, int]) -> list[Layer]:
    """Convert one torch layer to layers of this module."""
    weight, bias = (names.get(f"{name}.{n}" if name else n, -1) for n in ("weight", "bias"))
    kind = type(module)
    if kind is nn.Linear:
        return [Dense(weight, bias)]
    if isinstance(module, nn.Conv2d) and kind is nn.Conv2d:
        if module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str):
            raise UnsupportedModel(f"its convolution {name} has groups, or padding other than zeros of a given width")
        sides = (_pair(module.kernel_size), _pair(module.stride), _pair(module.padding), _pair(module.dilation))
        return [Convolution(weight, *sides), *([Bias(bias)] if bias >= 0 else [])]
    if isinstance(module, nn.MaxPool2d) and kind is nn.MaxPool2d:
        if any((*_pair(module.padding), *(n - 1 for n in _pair(module.dilation)))) or module.ceil_mode:
            raise UnsupportedModel(f"its pool {name} uses padding, dilation or ceil_mode")
        size, stride = _pair(module.kernel_size), _pair(module.stride)
        return [MaxPool(3, size[1], stride[1]), MaxPool(2, size[0], stride[0])]
    if kind is nn.ReLU:
        return [Relu()]
    if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1):
        return [Shape(partial(torch.flatten, start_dim=2))]
    if isinstance(module, nn.Unflatten) and module.dim == 1:
        return [Shape(partial(torch.unflatten, dim=2, sizes=module.unflattened_size))]
    if kind is nn.Identity:
        return []
    raise UnsupportedModel(f"it has a layer of type {kind.__name__}")


def _pair(n: Any) -> tuple[int, int]:
    return (n, n) if isinstance(n, int) else (n[0], n[1])


def _arranged(layers: list[Layer]) -> list[Layer]:
    """Reorder the layers so that they compute the same function with less work.

    A bias and a ReLU commute with max pooling, so they move after the pools that follow them. They work in place if
    the layer before them has allocated its output and does not need it for the backward pass.
    """
    out: list[Layer] = []
    maps = False
    for layer in layers:
        needs_maps = isinstance(layer, (Convolution, MaxPool)) or (maps and isinstance(layer, (Bias, Relu)))
        if needs_maps != maps:
            out.append(ToMaps() if needs_maps else ToRows())
        maps = needs_maps
        at = len(out)
        while isinstance(layer, MaxPool) and at and isinstance(out[at - 1], (Bias, Relu)):
            at -= 1
        out.insert(at, layer)
    if maps:
        out.append(ToRows())
    for i, layer in enumerate(out):
        fresh = i > 0 and isinstance(out[i - 1], (Dense, Convolution, Bias))
        if isinstance(layer, (Bias, Relu)):
            out[i] = replace(layer, in_place=fresh)
    return out
