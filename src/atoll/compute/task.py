"""A task: a model, its loss and its metrics, with one value per example.

This module contains all computation on the user's module. A lane is one client's row in a batch of clients.
`gradient` and `measure` take θ `[K, d]` and a batch `[K, B, …]` of K lanes, and have four backends:

    lanes     all K clients together by `torch.func`: `vmap(grad(loss))`; always at least two lanes, because a
              single lane uses other kernels and rounds differently
    loop      one client after another by autograd, on a module whose parameters and gradients are views of flat
              vectors (`atoll.compute.autograd`); SGD finishes one client before it starts the next
    fused     all K clients together with explicit layer formulas (`atoll.compute.fused`), for stacks of known layers;
              it can apply the SGD step inside the backward pass
    compiled  the same formulas in native code (`atoll.compute.compiled`): one core makes all steps of a client

Tests: tests/identities/test_numerics.py, tests/identities/test_one_algorithm.py, tests/identities/test_precision.py.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils._pytree import tree_map, tree_map_only

from atoll.base.errors import UsageError
from atoll.base.lines import Change, Line
from atoll.base.random import Key, user_scope
from atoll.compute import compiled, fused
from atoll.compute.attributes import Reset, attributes, deep_copy, roots_of, tensors_in
from atoll.compute.autograd import FlatModule, SequentialDescent, constant_changed
from atoll.compute.fused import Program, UnsupportedModel, shares, total_of
from atoll.compute.layout import Layout, named_tensors
from atoll.compute.loss import PerExample, built_in, couples_rows, loss_of, values_of
from atoll.compute.metrics import Counts, Metric, check_metric_names, metric_of, row_sums
from atoll.compute.model_state import Batch, GradientResult, Model
from atoll.compute.outputs import logits_of
from atoll.compute.overrides import KeyedDropout, VmapOverrides, may_drop
from atoll.compute.step_rule import StepRule
from atoll.compute.user_code import Findings, known
from atoll.data.fields import RowField, unpack_fields

_ALL_EVALUATING = "All layers of the model came in evaluation mode. It trains in training mode."
OnRows = Callable[[Any, Tensor, Mapping[str, Tensor | Counts]], None]  # output and targets of rows, and their scores

BACKENDS = ("lanes", "loop", "fused", "compiled")

Descent = fused.FusedDescent | compiled.CompiledDescent | SequentialDescent


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
        lengths: how many numbers the sums of a metric have, by its name; 1 if it is not listed.
        numerics: the backend, `"lanes"`, `"loop"`, `"fused"` or `"compiled"`.
        findings: the facts about the user's code. If it draws, every pass seeds the global generators.
        modes: the mode of each submodule, in the order of `modules()`, as the module came.
        own: the first float buffers in their own dtype, if it is not that of the run.
        derived: the paths of tensor attributes that a computation returned; a pass must compute them again.
        notes: the choices that atoll made for the user.
        fields: the tensors of a row, if rows are dicts of tensors; the model receives each by its keyword.
        precision: `"full"` or `"bf16"`. With `"bf16"` the model's output is computed under torch's bfloat16
            autocast. θ, its gradient, the loss and every sum keep the dtype of the run.
    """

    module: nn.Module
    layout: Layout
    start: Model
    loss: PerExample
    metrics: tuple[Metric, ...] = ()
    numerics: str = "loop"
    findings: Findings = Findings()
    precision: str = "full"
    modes: tuple[bool, ...] = ()
    own: Mapping[str, Tensor] = field(default_factory=dict)
    derived: tuple[str, ...] = ()
    lengths: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    fields: tuple[RowField, ...] = ()

    @classmethod
    def of(
        cls,
        module: nn.Module,
        loss: str | PerExample,
        metrics: tuple[str | Metric, ...] = (),
        dtype: torch.dtype = torch.float32,
        buffers: Mapping[str, str] | None = None,
    ) -> Task:
        """Build a task on private copies of a module, a loss and metrics.

        Args:
            module: the model.
            loss: a name in `LOSSES`, a text such as "cross_entropy(axis=1)", or a function `(output, y) → [B]`.
            metrics: names in `METRICS`, or `Metric` values.
            dtype: dtype of θ and of float buffers, float32 or float64.
            buffers: the rule of buffers by name pattern.
        Raises:
            UsageError: an unknown name, a trained tensor that is not real, no trainable parameter, a loss with weights
                of its own, a hook after the accumulation of a gradient, or a module that cannot be copied.
        """
        declared = ("declared by the loss",) if couples_rows(loss) else ()
        loss = loss_of(loss)
        judged = tuple(metric_of(m, loss) for m in metrics)
        check_metric_names(judged)
        check_hooks(module)
        layout = Layout.of(module, dtype, buffers)
        named = named_tensors(module)
        theta, moving, fixed = layout.flatten(named)
        counters = {e.name: fixed.pop(e.name) for e in layout.counters}
        modes = tuple(m.training for m in module.modules())
        floats = {e.name: named[e.name].detach().clone() for e in layout.segment("buffers") if e.dtype != dtype}
        return cls(
            cast_floats(deep_copy(module, "The model"), dtype),
            layout,
            Model(theta, moving, counters, fixed),
            private_loss(loss, dtype),
            tuple(m if m.built_in else replace(m, sums=deep_copy(m.sums, m.name)) for m in judged),
            findings=replace(known(module), couples=known(module).couples + declared, couples_in_evaluation=declared),
            modes=modes,
            own=floats,
            derived=derived_in(module),
            notes=() if any(modes) else (_ALL_EVALUATING,),
        )

    def with_fields(self, fields: tuple[RowField, ...]) -> Task:
        """The task for rows of these tensors.

        Raises:
            UsageError: `forward` has no argument for one of them, or requires another one.
        """
        if not fields:
            return self
        try:
            signature = inspect.signature(self.module.forward)
        except (TypeError, ValueError):  # of native code: the first pass shows whether the arguments fit
            return replace(self, fields=fields)
        try:
            signature.bind(**{f.name: None for f in fields})
        except TypeError as error:
            raise UsageError(
                f"A row has the tensors {', '.join(f.name for f in fields)}, and forward{signature}: {error}.",
                "a dict whose keys are the arguments of the model's forward.",
                "the model receives each tensor by its keyword.",
            ) from error
        return replace(self, fields=fields)

    def inputs(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        """Rows `[..., *features]` as the model takes them: the dict of their tensors, if a row has several."""
        return unpack_fields(x, self.fields, self.layout.dtype) if self.fields else x

    @cached_property
    def device(self) -> torch.device:
        """The device on which the model computes."""
        return self.start.theta.device

    def on(self, device: torch.device) -> Task:
        """Copy the task to a device; return `self` if it is already on it."""
        if device == self.device:
            return self
        return replace(
            self,
            module=deep_copy(self.module, "The model").to(device),
            start=self.start.to(device),
            loss=moved(self.loss, device),
            metrics=tuple(m if m.sums is None else replace(m, sums=moved(m.sums, device)) for m in self.metrics),
        )

    def with_findings(self, findings: Findings, rules: Mapping[str, str] | None = None) -> Task:
        """A copy with the findings of a probe: constant buffers become fixed tensors, others get a rule.

        Args:
            findings: of the probe.
            rules: the rules of float buffers by name that the probe found.
        """
        if not findings.constant and not rules:
            return replace(self, findings=findings)
        layout = self.layout.with_rules({**(rules or {}), **dict.fromkeys(findings.constant, "constant")})
        old = {**self.layout.params(self.start.theta), **self.layout.buffers(self.start.buffers)}
        old |= {**self.start.fixed, **self.start.counters, **self.own}
        names = {e.name: old[e.alias or e.name] for e in layout.entries}
        _, moving, fixed = layout.flatten(names)
        counters = {e.name: fixed.pop(e.name) for e in layout.counters}
        start = Model(self.start.theta, moving, counters, fixed)
        return replace(self, layout=layout, start=start, findings=findings)

    def first_tensors(self) -> dict[str, Tensor]:
        """The initial tensors by name, in the dtypes of the run."""
        first = self.start
        return {
            **self.layout.params(first.theta),
            **self.layout.buffers(first.buffers),
            **first.counters,
            **first.fixed,
        }

    @cached_property
    def roots(self) -> Mapping[str, Any]:
        """The objects of the user that may have attributes, by the prefix of their paths."""
        out = {"": self.module}
        for role, code in (("loss", self.loss), *((m.name, m.sums) for m in self.metrics)):
            for i, root in enumerate(roots_of(code)):
                out[f"{role}." if not i else f"{role}.{i}."] = root
        return out

    @cached_property
    def reset(self) -> Callable[[], None]:
        """Set the attributes that a pass changes to their first values."""
        if not self.findings.state:
            return lambda: None
        return Reset(self.roots, self.findings.state)

    @cached_property
    def _evaluating(self) -> list[nn.Module]:
        """The submodules that came in evaluation mode; none if all did."""
        if not any(self.modes):
            return []
        return [m for m, mode in zip(self.module.modules(), self.modes, strict=True) if not mode]

    def training_mode(self) -> None:
        """Put the module into training mode, except submodules that came in evaluation mode."""
        self.module.train()
        for module in self._evaluating:
            module.training = False

    @property
    def hooked(self) -> tuple[str, ...]:
        """The names of the parameters with a gradient hook."""
        return tuple(n for n, p in self.module.named_parameters() if p.requires_grad and p._backward_hooks)

    @property
    def draws(self) -> bool:
        """Whether a training pass draws from a global generator."""
        return "training" in self.findings.draws

    @property
    def couples(self) -> bool:
        """Whether a row's output depends on the other rows of its batch, so that no row may be padding."""
        return bool(self.findings.couples)

    @property
    def built_in(self) -> bool:
        """Whether the loss and all metrics are those of atoll."""
        return built_in(self.loss) and all(m.built_in for m in self.metrics)

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
        """Build a new module from a single model (θ `[d]`), in the dtype of the run and the modes of training."""
        self.reset()
        module: nn.Module = deep_copy(self.module, "The model")
        flat = {
            **self.layout.params(model.theta),
            **self.layout.buffers(model.buffers),
            **model.counters,
            **model.fixed,
        }
        named = named_tensors(module)
        with torch.no_grad():
            for e in self.layout.entries:
                named[e.name].copy_(flat[e.alias or e.name])
        module.train()
        for part, mode in zip(module.modules(), self.modes, strict=True):
            part.training = mode or not any(self.modes)
        return module

    def result(self, model: Model) -> nn.Module:
        """Build a new module from a single model (θ `[d]`), in the user's original dtypes and modes.

        The module is in host memory, independent of the device that computed it.
        """
        host = torch.device("cpu")
        module, model = self.rebuilt(model).to(host), model.to(host)
        own = self.layout.state_dict(model.theta, model.buffers, {**model.counters, **model.fixed}, hidden=True)
        for name, tensor in named_tensors(module).items():
            tensor.data = own[name]
        recompute(module, self.findings.state)
        for part, mode in zip(module.modules(), self.modes, strict=True):
            part.training = mode
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
        if not self.couples:
            return self._lanes_gradient(model, batch, key)
        return self._by_length(model, batch, key)

    def measure(
        self, model: Model, batch: Batch, key: Key | None = None, on_rows: OnRows | None = None
    ) -> dict[str, Tensor]:
        """Sum the loss and every metric over each client's rows in evaluation mode, float64 `[K]` or `[K, k]` by name.

        Args:
            model: θ `[K, d]`, buffers `[K, b]`; not changed.
            batch: x, y `[K, B, …]`; counts n_k in 0 … B.
            key: key of this call, with the K clients, if an evaluation draws.
            on_rows: receives the outputs and targets of the rows of one client, and their scores, for K = 1. It adds
                them, and the result is {}.
        """
        self.module.eval()
        draws = "evaluation" in self.findings.draws
        together = len(batch.counts) > 1 and not draws and not self.findings.couples_in_evaluation
        with torch.no_grad():
            if self.numerics == "lanes" and together:
                return self._lanes_measure(model, batch)
            if self.by_hand and together:
                return self._measure_by_hand(model, batch)
            rows = []
            for k in range(len(batch.counts)):
                scope = user_scope((key or Key(0)).only(k)) if draws else contextlib.nullcontext()
                self.reset()
                with scope, torch.no_grad():
                    rows.append(self._loop_measure(model, batch, k, on_rows))
        self.reset()
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def output(self, model: Model, x: Tensor) -> Any:
        """The output of a single model (θ `[d]`) for rows x `[B, …]` in evaluation mode, without a gradient."""
        self.module.eval()
        self.bound.bind(model.lanes(1), 0)
        restore = self.reset if self.findings.probed else Reset(self.roots)
        with torch.no_grad():
            output = self.answer(x)
        restore()
        return output

    def answer(self, x: Tensor, tensors: dict[str, Tensor] | None = None) -> Any:
        """Compute the model's output for rows x with these tensors, or with its own, in the dtype of the run."""
        given = self.inputs(x)
        args, words = ((), given) if isinstance(given, dict) else ((given,), {})
        call: Callable[[], Any] = partial(self.module, *args, **words)
        if tensors is not None:
            tensors.update({name: tensors[first] for name, first in self._tied.items()})
            call = partial(functional_call, self.module, tensors, args, words, tie_weights=False)
        if self.precision == "full":
            return self._chosen(call())
        # No cast is cached: the cache is keyed by the parameter, whose storage we replace between passes.
        with torch.autocast(x.device.type, torch.bfloat16, cache_enabled=False):
            output = self._chosen(call())
        return tree_map_only(Tensor, lambda t: t.to(self.layout.dtype) if t.is_floating_point() else t, output)

    def _chosen(self, output: Any) -> Any:
        """The logits of an output with several fields, if the loss is one of atoll's; a loss of the user takes all."""
        return logits_of(output) if self._own_loss and not isinstance(output, Tensor) else output

    @cached_property
    def _own_loss(self) -> bool:
        return built_in(self.loss)

    @cached_property
    def _tied(self) -> dict[str, str]:
        """The first name of each tied tensor, by its further names; a submodule with two names counts once.

        torch restores a submodule wrongly if it gets a tensor under both names.
        """
        owners = dict(self.module.named_modules(remove_duplicate=False))
        places: set[tuple[int, str]] = set()
        out = {}
        for e in self.layout.entries:
            owner, _, leaf = e.name.rpartition(".")
            place = id(owners[owner]), leaf
            if e.alias and place not in places:
                out[e.name] = e.alias
            places.add(place)
        return out

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
        self.training_mode()
        lanes = len(batch.counts)
        words = key.state().to(self.device).expand(lanes)
        mask, count = _mask(batch, model.theta)
        columns = (model.theta, model.buffers, dict(model.counters), batch.x, batch.y, mask, count, words)
        fixed = self._fixed(model)
        step = vmap(grad(partial(self._lane, fixed), has_aux=True))
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
            constants = {n: (t, t._version) for n in self.layout.constants for t in [fixed[n].clone()]}
            tensors = {**self.layout.params(theta), **fixed, **moving, **{n: t for n, (t, _) in constants.items()}}
            output = self.answer(x, tensors)
        for name, (tensor, version) in constants.items():
            if tensors[name] is not tensor or tensor._version != version:
                raise constant_changed(name)
        loss = (values_of(self.loss, output, y) * mask).sum()
        moving = {n: tensors[n] for n in moving}  # the pass may have replaced a buffer by another tensor
        after = [moving[e.name].reshape(-1) for e in self.layout.segment("buffers")]
        return loss / count, (
            torch.cat(after) if after else buffers,
            {n: moving[n] for n in counters},
            loss.detach(),
        )

    def _fixed(self, model: Model) -> Mapping[str, Tensor]:
        """The fixed tensors of a model, floats in the dtype of the run."""
        dtype = self.layout.dtype
        return {n: t.to(dtype) if t.is_floating_point() else t for n, t in model.fixed.items()}

    def _lanes_measure(self, model: Model, batch: Batch) -> dict[str, Tensor]:
        fixed = self._fixed(model)

        def lane(theta: Tensor, buffers: Tensor, x: Tensor) -> Any:
            return self.answer(x, {**self.layout.params(theta), **self.layout.buffers(buffers), **fixed})

        output = vmap(lane)(model.theta, model.buffers, batch.x)
        return self._summed(tree_map_only(Tensor, lambda t: t.flatten(0, 1), output), batch, model.theta)

    def _summed(self, output: Any, batch: Batch, like: Tensor) -> dict[str, Tensor]:
        """Sum the scores of each client's rows: `output` of the rows `[K · B, …]`, of which some are padding."""
        mask, _ = _mask(batch, like)
        valid, width = mask.bool(), mask.shape[1]
        out = {}
        for name, rows in self.scores(output, batch.y.flatten(0, 1)).items():
            if isinstance(rows, Counts):
                index = rows.index.reshape(len(valid) * width, -1).masked_fill(~valid.reshape(-1, 1), -1)
                owner = torch.arange(len(valid), device=valid.device).repeat_interleave(width)
                out[name] = Counts(index, rows.length).added(owner, len(valid))
            else:
                rows = rows.view(*valid.shape, *rows.shape[1:])
                out[name] = torch.where(valid.view(*valid.shape, *[1] * (rows.dim() - 2)), rows, 0.0).sum(1)
        return out

    # fused and compiled

    @property
    def by_hand(self) -> bool:
        """Whether the backend uses explicit layer formulas: `fused` or `compiled`."""
        return self.numerics in ("fused", "compiled")

    @property
    def exact_counts(self) -> bool:
        """Whether the backend computes each client on its own rows only, so that no bit depends on the padding."""
        return self.numerics in ("compiled", "loop")

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
                "a Sequential of Linear, Conv2d, ReLU, MaxPool2d and Flatten, with cross_entropy, mse or one logit.",
                "forward and backward passes are implemented for these layers only.",
                Change("numerics", "auto"),
            ) from why

    @property
    def rows_are_independent(self) -> bool:
        """Whether no number of a row can depend on other rows: known layers, and a loss and metrics of atoll."""
        if not self.built_in:
            return False
        try:
            return bool(self.program)
        except UsageError:
            return False

    def descent(self, model: Model, lanes: int, rule: StepRule, key: Key | None = None) -> Descent:
        """Gradient descent of K clients by the backend; not for "lanes".

        Args:
            model: the start of all clients, θ `[d]`, or of each client, θ `[K, d]`.
            lanes: K.
            rule: the rule of the steps.
            key: of the K clients; the loop draws dropout by it.
        """
        if self.numerics == "loop":
            self.training_mode()
            return SequentialDescent(
                self.bound, model, lanes, rule, self.reset, partial(self._lane_pass, key or Key(0), lanes)
            )
        kind = compiled.CompiledDescent if self.numerics == "compiled" else fused.FusedDescent
        return kind(self.program, model.theta, lanes, rule)

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
        output = self.program.output(batch.x, self.program.split(model.theta)).flatten(0, 1)
        return self._summed(output, batch, model.theta)

    # loop

    def _loop_gradient(self, model: Model, batch: Batch, key: Key) -> GradientResult:
        self.training_mode()
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
        x, y = batch.x[k, : batch.counts[k]], batch.y[k, : batch.counts[k]]
        keyed = self._keyed(lambda: key.state().to(self.device).expand(len(batch.counts))[k])
        with user_scope(key.only(k)) if self.draws else contextlib.nullcontext():
            with keyed:
                output = self.answer(x)
            loss = values_of(self.loss, output, y).sum()
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

    def _lane_pass(self, key: Key, lanes: int, x: Tensor, y: Tensor, step: int, k: int) -> Tensor:
        """Σ of the losses of rows `[n, …]` of client k in a step, by the bound module, after the backward pass.

        The gradient is that of the mean over the rows. The key is of all clients.
        """
        if not self.draws and not self._drops:
            loss = values_of(self.loss, self.answer(x), y).sum()
            loss.backward(loss.new_tensor(1.0 / len(y)))  # bits of (loss / rows).backward(), two operations fewer
            return loss.detach()
        key = key.fold("pass", step)
        keyed = self._keyed(lambda: key.state().to(self.device).expand(lanes)[k])
        with user_scope(key.only(k)) if self.draws else contextlib.nullcontext():
            with keyed:
                output = self.answer(x)
            loss = values_of(self.loss, output, y).sum()
            loss.backward(loss.new_tensor(1.0 / len(y)))
        return loss.detach()

    def observe(
        self, model: Model, x: Tensor, y: Tensor, key: Key, *, training: bool = True
    ) -> tuple[Any, Tensor, Tensor | None]:
        """One pass of the loop over rows of one client, for a probe: output, values of the loss and gradient.

        Args:
            model: a single model, θ `[d]`.
            x, y: rows `[n, …]`.
            key: of keyed dropout. The caller seeds the global generators.
            training: whether the pass runs in training mode and has a gradient.
        Returns:
            The output; the values of the loss as it returned them; the gradient of their sum, `[d]`, or None.
        """
        if training:
            self.training_mode()
        else:
            self.module.eval()
        gradient = self.bound.bind(model.lanes(1), 0)
        gradient.zero_()
        with torch.set_grad_enabled(training):
            with self._keyed(lambda: key.state().to(self.device)) if training else contextlib.nullcontext():
                output = self.answer(x)
            loss = values_of(self.loss, output, y)
            if not training and not self.built_in:  # metrics of atoll draw nothing
                self.scores(output, y)
        if training:
            loss.sum().backward()
        return output, loss, gradient.clone() if training else None

    def _loop_measure(self, model: Model, batch: Batch, k: int, on_rows: OnRows | None) -> dict[str, Tensor]:
        self.bound.bind(model, k)
        y = batch.y[k, : batch.counts[k]]
        output = self.answer(batch.x[k, : batch.counts[k]])
        scores = self.scores(output, y)
        if on_rows is not None:
            on_rows(output, y, scores)
            return {}
        return {
            name: rows.added(torch.zeros(len(y), dtype=torch.int64, device=y.device), 1)[0]
            if isinstance(rows, Counts)
            else rows.sum(0)
            for name, rows in scores.items()
        }

    def scores(self, output: Any, y: Tensor) -> dict[str, Tensor | Counts]:
        """The loss and the sums of each metric, one number or vector for each row, by name.

        Args:
            output: of the model, `[B, …]`.
            y: targets `[B, …]`.
        Returns:
            float64 `[B]` or `[B, k]`, or counts. A metric without `sums` is absent.
        """
        metrics = {m.name: row_sums(m, output, y) for m in self.metrics if m.sums is not None}
        return {"loss": values_of(self.loss, output, y).double(), **metrics}

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
    if all(isinstance(column, Tensor) for column in columns):  # a walk through the tree would take most of the time
        return tuple(column.expand(2, *column.shape[1:]) for column in columns)
    return tree_map(lambda t: t.expand(2, *t.shape[1:]), columns)  # type: ignore[no-any-return]


def cast_floats(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Convert real floats of a module to a dtype in place. Complex tensors keep theirs: torch would drop a part."""
    kept = [
        (m._buffers, name, b)
        for m in module.modules()
        for name, b in m._buffers.items()
        if b is not None and b.is_complex()
    ]
    frozen = [(p, p.data) for p in module.parameters() if p.is_complex()]
    for parameter, _ in frozen:
        parameter.data = parameter.data.real  # torch warns about complex numbers otherwise
    for table, name, buffer in kept:
        table[name] = buffer.real
    module = module.to(dtype)
    for parameter, data in frozen:
        parameter.data = data
    for table, name, buffer in kept:
        table[name] = buffer
    return module


def check_hooks(module: nn.Module) -> None:
    """Refuse a hook that runs after the accumulation of a gradient."""
    for name, parameter in module.named_parameters():
        if parameter._post_accumulate_grad_hooks:
            raise UsageError(
                f"The parameter {name} has a hook after the accumulation of its gradient.",
                "a hook on the gradient itself, or none.",
                "such a hook usually makes an optimizer step, and the plan makes the steps.",
                Line(python=f"model.get_parameter({name!r}).register_hook(fn)"),
            )


def derived_in(module: nn.Module) -> tuple[str, ...]:
    """The paths of tensors in attributes of a module that a computation with gradients returned."""
    return tuple(
        path
        for attribute in attributes(module)
        for path, tensor in tensors_in(attribute.value, attribute.path)
        if not tensor.is_leaf
    )


def recompute(module: nn.Module, paths: tuple[str, ...]) -> None:
    """Compute tensor attributes that a pre-hook sets, such as a pruned weight, from the tensors of the module.

    If the hook needs a pass, the attribute keeps its first value until the next pass.
    """
    changed = set(paths)
    module.eval()
    owners = dict(module.named_modules())
    for attribute in list(attributes(module)):
        owner = owners.get(attribute.path.rpartition(".")[0])
        if attribute.path in changed and isinstance(attribute.value, Tensor) and owner is not None:
            for hook in list(owner._forward_pre_hooks.values()):
                with contextlib.suppress(Exception), torch.no_grad():
                    hook(owner, ())


def private_loss(loss: PerExample, dtype: torch.dtype) -> PerExample:
    """A copy of the user's loss; of a module with its floats in the dtype of the run.

    Raises:
        UsageError: the loss has trainable weights.
    """
    for root in roots_of(loss):
        if isinstance(root, nn.Module):
            refuse_weights([n for n, p in root.named_parameters() if p.requires_grad], root)
    made = deep_copy(loss, "The loss")
    for root in roots_of(made):
        if isinstance(root, nn.Module):
            cast_floats(root, dtype)
    return made  # type: ignore[no-any-return]


def refuse_weights(names: list[str], loss: Any) -> None:
    """Refuse a loss with trainable weights."""
    if names:
        raise UsageError(
            f"The loss {type(loss).__name__} has trainable weights: {', '.join(names)}.",
            "a loss without weights of its own.",
            "only the model is trained. Move the weights into the model, and return them in its output.",
            Line(python=f"model.{names[0].split('.')[0]} = loss.{names[0].split('.')[0]}"),
        )


def moved(code: Any, device: torch.device) -> Any:
    """A copy of a loss or metric whose modules are on a device."""
    made = deep_copy(code, "The loss or a metric")
    for root in roots_of(made):
        if isinstance(root, nn.Module):
            root.to(device)
    return made
