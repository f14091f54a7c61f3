"""A task: a model, its loss and its metrics, with one value per example.

This module contains all computation on the user's module. A lane is one client's row in a batch of clients.
`gradient` and `measure` take θ `[K, d]` and a batch `[K, B, …]` of K lanes, and have four backends:

    lanes     all K clients together by `torch.func`: `vmap(grad(loss))`; always at least two lanes, because a
              single lane uses other kernels and rounds differently
    loop      one client after another by autograd, on a module whose parameters and gradients are views of flat
              vectors (`atoll.compute.autograd`); plain SGD finishes one client before it starts the next
    fused     all K clients together with explicit layer formulas (`atoll.compute.fused`), for stacks of known layers;
              it can apply the SGD step inside the backward pass
    compiled  the same formulas in native code (`atoll.compute.compiled`): one core makes all steps of a client

Tests: tests/identities/test_numerics.py, tests/identities/test_one_algorithm.py, tests/identities/test_precision.py.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils._pytree import tree_map, tree_map_only

from atoll.base.errors import UsageError, unknown_name
from atoll.base.random import Key, global_scope
from atoll.compute import compiled, fused
from atoll.compute.autograd import FlatModule, SequentialDescent
from atoll.compute.fused import Program, UnsupportedModel, shares, total_of
from atoll.compute.layout import Layout
from atoll.compute.loss import LOSSES, METRICS, Metric, PerExample
from atoll.compute.model_state import Batch, GradientResult, Model
from atoll.compute.overrides import KeyedDropout, VmapOverrides, may_drop

BACKENDS = ("lanes", "loop", "fused", "compiled")


@dataclass(frozen=True)
class Task:
    """A model, its loss and its metrics, computed for K clients together.

    loss(θ; rows) = (1/n) Σ ℓ(f_θ(x), y),  with one value ℓ per row.

    Args:
        module: the model; a private copy, never the user's own object.
        layout: positions of its tensors in flat vectors.
        start: the initial tensors. The tensors of `module` change with every pass.
        loss: `(output, y) → [B]`, one value per row.
        metrics: reported by evaluation in addition to the loss.
        numerics: the backend, `"lanes"`, `"loop"`, `"fused"` or `"compiled"`.
        noisy: whether the model draws random numbers other than dropout masks. If so, every pass seeds the global
            generators.
        precision: `"full"` or `"bf16"`. With `"bf16"` the model's output is computed under torch's bfloat16
            autocast. θ, its gradient, the loss and every sum keep the dtype of the run.
    """

    module: nn.Module
    layout: Layout
    start: Model
    loss: PerExample
    metrics: tuple[Metric, ...] = ()
    numerics: str = "loop"
    noisy: bool = False
    precision: str = "full"

    @classmethod
    def of(
        cls,
        module: nn.Module,
        loss: str | PerExample,
        metrics: tuple[str | Metric, ...] = (),
        dtype: torch.dtype = torch.float32,
    ) -> Task:
        """Build a task on a private copy of a module.

        Args:
            module: the model.
            loss: a name in `LOSSES`, or a function `(output, y) → [B]`.
            metrics: names in `METRICS`, or `Metric` values.
            dtype: dtype of θ and of float buffers, float32 or float64.
        Raises:
            UsageError: an unknown name, a complex tensor, or no trainable parameter.
        """
        if isinstance(loss, str) and loss not in LOSSES:
            raise unknown_name("loss", loss, LOSSES)
        for m in metrics:
            if isinstance(m, str) and m not in METRICS:
                raise unknown_name("metric", m, METRICS)
        layout = Layout.of(module, dtype)
        theta, buffers, fixed = layout.flatten(module.state_dict())
        counters = {e.name: fixed.pop(e.name) for e in layout.counters}
        return cls(
            copy.deepcopy(module).to(dtype),
            layout,
            Model(theta, buffers, counters, fixed),
            LOSSES[loss] if isinstance(loss, str) else loss,
            tuple(METRICS[m] if isinstance(m, str) else m for m in metrics),
        )

    @cached_property
    def device(self) -> torch.device:
        """The device on which the model computes."""
        return self.start.theta.device

    def on(self, device: torch.device) -> Task:
        """Copy the task to a device; return `self` if it is already on it."""
        if device == self.device:
            return self
        return replace(self, module=copy.deepcopy(self.module).to(device), start=self.start.to(device))

    @property
    def batch_statistics(self) -> bool:
        """Whether a row's output depends on the other rows of its batch, so that no row may be padding."""
        return any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.module.modules())

    @property
    def slow_in_lanes(self) -> str:
        """The reason why `loop` is faster than `lanes` for this model; empty if it is not."""
        kinds = {type(m) for m in self.module.modules()}
        if any(issubclass(kind, nn.modules.conv._ConvNd) for kind in kinds):
            return "the convolutions of many clients become one grouped convolution, slower than one by one"
        if any(issubclass(kind, nn.RNNBase) for kind in kinds):
            return "torch runs a recurrent layer one lane at a time in any case"
        return ""

    def initial(self) -> Model:
        """Copy the initial tensors of the module, as a single model."""
        return tree_map(torch.clone, self.start)  # type: ignore[no-any-return]

    def rebuilt(self, model: Model) -> nn.Module:
        """Build a new module from a single model (θ `[d]`), in the dtype of the run, for further training."""
        module = copy.deepcopy(self.module)
        flat = {
            **self.layout.params(model.theta),
            **self.layout.buffers(model.buffers),
            **model.counters,
            **model.fixed,
        }
        module.load_state_dict({e.name: flat[e.alias or e.name] for e in self.layout.entries})
        return module

    def result(self, model: Model) -> nn.Module:
        """Build a new module from a single model (θ `[d]`), in the user's original dtypes.

        The module is in host memory, independent of the device that computed it.
        """
        host = torch.device("cpu")
        module, model = self.rebuilt(model).to(host), model.to(host)
        own = self.layout.state_dict(model.theta, model.buffers, {**model.counters, **model.fixed})
        for name, tensor in module.state_dict(keep_vars=True).items():
            tensor.data = own[name]
        return module

    def gradient(self, model: Model, batch: Batch, key: Key) -> GradientResult:
        """Compute the mean gradient of the loss over each client's rows, and the new buffers and counters.

        g_k = ∇θ (1/n_k) Σ_{i<n_k} ℓ(f_θk(x_ki), y_ki)

        Args:
            model: θ `[K, d]`, buffers `[K, b]`; not changed.
            batch: x, y `[K, B, …]`; counts n_k in 0 … B. A client without rows gets a zero gradient.
            key: key of this step, with the K clients.
        """
        if self.by_hand:
            return self._gradient_by_hand(model, batch)
        if self.numerics != "lanes":
            return self._loop_gradient(model, batch, key)
        if not self.batch_statistics:
            return self._lanes_gradient(model, batch, key)
        return self._by_length(model, batch, key)

    def measure(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        """Sum the loss and every metric over each client's rows in evaluation mode, float64 `[K]` by name."""
        self.module.eval()
        with torch.no_grad():
            if self.numerics == "lanes" and len(batch.counts) > 1:
                return self._lanes_measure(model, batch)
            if self.by_hand and len(batch.counts) > 1:
                return self._measure_by_hand(model, batch)
            rows = [self._loop_measure(model, batch, k) for k in range(len(batch.counts))]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _answer(self, x: Tensor, tensors: dict[str, Tensor] | None = None) -> Any:
        """Compute the model's output for rows x with these tensors, or with its own, in the dtype of the run."""
        call = self.module if tensors is None else partial(functional_call, self.module, tensors)
        if self.precision == "full":
            return call(x)
        # No cast is cached: the cache is keyed by the parameter, whose storage we replace between passes.
        with torch.autocast(x.device.type, torch.bfloat16, cache_enabled=False):
            output = call(x)
        return tree_map_only(Tensor, lambda t: t.to(self.layout.dtype) if t.is_floating_point() else t, output)

    # lanes

    def _by_length(self, model: Model, batch: Batch, key: Key) -> GradientResult:
        """Compute lanes of equal batch length together, because batch statistics allow no padding."""
        out: GradientResult | None = None
        for length in sorted(set(batch.counts)):
            lanes = torch.tensor([k for k, n in enumerate(batch.counts) if n == length])
            index = lanes.to(self.device)
            part = Batch(batch.x[index, :length], batch.y[index, :length], (length,) * len(index))
            some = model.select(index)
            result = self._lanes_gradient(some, part, key.select(lanes)) if length else _zero_gradient(some)
            if len(index) == len(batch.counts):
                return result
            if out is None:
                out = tree_map(lambda t: t.new_empty(len(batch.counts), *t.shape[1:]), result)
            tree_map(lambda whole, rows, at=index: whole.index_copy_(0, at, rows), out, result)
        if out is None:
            raise UsageError("The batch has no client.", "at least one client.")
        return out

    def _lanes_gradient(self, model: Model, batch: Batch, key: Key) -> GradientResult:
        self.module.train()
        lanes = len(batch.counts)
        words = key.state().to(self.device).expand(lanes)
        mask, count = _mask(batch, model.theta)
        columns = (model.theta, model.buffers, dict(model.counters), batch.x, batch.y, mask, count, words)
        step = vmap(grad(partial(self._lane, model.fixed), has_aux=True))
        g, (buffers, counters, loss) = step(*_at_least_two(columns))
        return GradientResult(g[:lanes], buffers[:lanes], {n: c[:lanes] for n, c in counters.items()}, loss[:lanes])

    def _lane(
        self,
        fixed: Mapping[str, Tensor],
        theta: Tensor,
        buffers: Tensor,
        counters: dict[str, Tensor],
        x: Tensor,
        y: Tensor,
        mask: Tensor,
        count: Tensor,
        word: Tensor,
    ) -> tuple[Tensor, tuple[Tensor, dict[str, Tensor], Tensor]]:
        """Compute the loss of one lane and its changed tensors; a pure function, since it changes only copies."""
        moving = {n: t.clone() for n, t in (self.layout.buffers(buffers) | counters).items()}
        with VmapOverrides(lambda: word):
            tensors = {**self.layout.params(theta), **fixed, **moving}
            output = self._answer(x, tensors)
        loss = (self.loss(output, y) * mask).sum()
        moving = {n: tensors[n] for n in moving}  # the pass may have replaced a buffer by another tensor
        after = [moving[e.name].reshape(-1) for e in self.layout.segment("buffers")]
        return loss / count, (
            torch.cat(after) if after else buffers,
            {n: moving[n] for n in counters},
            loss.detach(),
        )

    def _lanes_measure(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        mask, _ = _mask(batch, model.theta)

        def lane(theta: Tensor, buffers: Tensor, x: Tensor, y: Tensor, mask: Tensor) -> dict[str, Tensor]:
            tensors = {**self.layout.params(theta), **self.layout.buffers(buffers), **model.fixed}
            output = self._answer(x, tensors)
            return {name: (each(output, y) * mask).sum() for name, each in self._measures().items()}

        return {n: s.double() for n, s in vmap(lane)(model.theta, model.buffers, batch.x, batch.y, mask).items()}

    # fused and compiled

    @property
    def by_hand(self) -> bool:
        """Whether the backend uses explicit layer formulas: `fused` or `compiled`."""
        return self.numerics in ("fused", "compiled")

    @cached_property
    def program(self) -> Program:
        """The model as a list of known layers.

        Raises:
            UsageError: the model is not a stack of known layers.
        """
        try:
            return Program.of(self.module, self.loss, self.layout)
        except UnsupportedModel as why:
            raise UsageError(
                f"numerics = {self.numerics!r} does not support this model: {why}.",
                "a Sequential of Linear, Conv2d, ReLU, MaxPool2d and Flatten, with cross_entropy or mse.",
                "forward and backward passes are implemented for these layers only.",
                "--numerics auto",
            ) from why

    def descent(
        self, model: Model, lanes: int, lr: float, key: Key | None = None
    ) -> fused.FusedDescent | compiled.CompiledDescent | SequentialDescent:
        """Plain gradient descent of K clients that all start at one model (θ `[d]`), by the backend; not for "lanes".

        Args:
            model: the start.
            lanes: K.
            lr: the learning rate.
            key: of the K clients; the loop draws dropout by it.
        """
        if self.numerics == "loop":
            self.module.train()
            return SequentialDescent(self.bound, model, lanes, lr, partial(self._lane_loss, key or Key(0), lanes))
        kind = compiled.CompiledDescent if self.numerics == "compiled" else fused.FusedDescent
        return kind(self.program, model.theta, lanes, lr)

    @torch.no_grad()
    def _gradient_by_hand(self, model: Model, batch: Batch) -> GradientResult:
        if self.numerics == "compiled":
            grad, loss = compiled.gradient(self.program, model.theta, batch.x, batch.y, batch.counts)
            return GradientResult(grad, model.buffers, dict(model.counters), loss)
        lanes = len(batch.counts)
        theta, x, y, share = _at_least_two((model.theta, batch.x, batch.y, shares(batch.counts, batch.y, model.theta)))
        parts, each = self.program.gradient(self.program.split(theta), x, y, share)
        grad = torch.cat([part.flatten(1) for part in parts], 1)[:lanes]
        return GradientResult(grad, model.buffers, dict(model.counters), total_of(each, share)[:lanes])

    def _measure_by_hand(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        mask, _ = _mask(batch, model.theta)
        output = self.program.output(batch.x, self.program.split(model.theta)).flatten(0, 1)
        y = batch.y.flatten(0, 1)
        each = {name: of(output, y).view(mask.shape) for name, of in self._measures().items()}
        return {name: (values * mask).sum(1).double() for name, values in each.items()}

    # loop

    def _loop_gradient(self, model: Model, batch: Batch, key: Key) -> GradientResult:
        self.module.train()
        out = [self._loop_one(model, batch, key, k) for k in range(len(batch.counts))]
        if len(out) == 1:
            return out[0]
        return GradientResult(
            torch.cat([o.grad for o in out]),
            torch.cat([o.buffers for o in out]),
            {n: torch.cat([o.counters[n] for o in out]) for n in out[0].counters},
            torch.cat([o.loss for o in out]),
        )

    def _loop_one(self, model: Model, batch: Batch, key: Key, k: int) -> GradientResult:
        if not batch.counts[k]:
            return _zero_gradient(model.select(torch.tensor([k], device=model.theta.device)))
        gradient = self.bound.bind(model, k)
        if self.bound.taken:
            self.bound.free()
        else:
            gradient.zero_()
        keyed = self._keyed(lambda: key.state().to(self.device).expand(len(batch.counts))[k])
        with global_scope(key.only(k)) if self.noisy else contextlib.nullcontext(), keyed:
            output = self._answer(batch.x[k, : batch.counts[k]])
        loss = self.loss(output, batch.y[k, : batch.counts[k]]).sum()
        (loss / max(batch.counts[k], 1)).backward(self.bound.scale)
        buffers, counters = self.bound.buffers()
        keep = gradient if len(batch.counts) == 1 else gradient.clone()
        return GradientResult(keep[None], buffers[None], counters, loss.detach()[None])

    def _keyed(self, word: Callable[[], Tensor]) -> contextlib.AbstractContextManager[Any]:
        """Return the context that draws dropout from a key; without dropout a null context, which costs no time."""
        return KeyedDropout(word) if self._drops else contextlib.nullcontext()

    @cached_property
    def _drops(self) -> bool:
        return may_drop(self.module)

    def _lane_loss(self, key: Key, lanes: int, x: Tensor, y: Tensor, step: int, k: int) -> Tensor:
        """Σ of the losses of rows `[n, …]` of client k in a step, by the bound module; the key is of all clients."""
        if not self.noisy and not self._drops:
            return self.loss(self._answer(x), y).sum()
        key = key.fold("pass", step)
        keyed = self._keyed(lambda: key.state().to(self.device).expand(lanes)[k])
        with global_scope(key.only(k)) if self.noisy else contextlib.nullcontext(), keyed:
            output = self._answer(x)
        return self.loss(output, y).sum()

    def _loop_measure(self, model: Model, batch: Batch, k: int) -> dict[str, Tensor]:
        self.bound.bind(model, k)
        y = batch.y[k, : batch.counts[k]]
        output = self._answer(batch.x[k, : batch.counts[k]])
        return {name: each(output, y).sum().double() for name, each in self._measures().items()}

    def _measures(self) -> dict[str, PerExample]:
        return {"loss": self.loss, **{m.name: m.each for m in self.metrics}}

    @cached_property
    def bound(self) -> FlatModule:
        """The module of the loop backend, with parameters and gradients as views of flat vectors."""
        return FlatModule(self.module, self.layout)


def _zero_gradient(model: Model) -> GradientResult:
    """Return the result of a pass over no rows: a zero gradient and unchanged buffers."""
    loss = model.theta.new_zeros(len(model.theta))
    return GradientResult(torch.zeros_like(model.theta), model.buffers, dict(model.counters), loss)


def _mask(batch: Batch, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mask of valid rows `[K, B]` and their number per client, at least 1, `[K]`, in the dtype of θ."""
    counts = torch.tensor(batch.counts, device=like.device)
    rows = torch.arange(batch.y.shape[1], device=like.device)
    return (rows < counts[:, None]).to(like.dtype), counts.clamp(min=1).to(like.dtype)


def _at_least_two(columns: tuple[Any, ...]) -> tuple[Any, ...]:
    """Duplicate a single lane, so that every call has at least two; leave more lanes unchanged."""
    if columns[0].shape[0] > 1:
        return columns
    return tree_map(lambda t: t.expand(2, *t.shape[1:]), columns)  # type: ignore[no-any-return]
