"""The module of the loop backend: its tensors are views of flat vectors, and clients train one after another.

Tests: tests/identities/test_walk.py, tests/identities/test_numerics.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from atoll.base.errors import RunError, UsageError
from atoll.base.lines import Line
from atoll.compute.buffer_pool import empty
from atoll.compute.layout import Layout, named_tensors
from atoll.compute.step_rule import StepRule

if TYPE_CHECKING:
    from atoll.compute.model_state import Model

PassOf = Callable[[Tensor, Tensor, int, int], Tensor]

MARGIN = 1024  # spare numbers before the flat gradient of the loop backend


class FlatModule:
    """A module whose parameters, gradients and float buffers are views of flat vectors.

    The flat gradient has `MARGIN` spare numbers before it, so that values sent with it are in the same block of
    memory. If `scale` is set, the gradient is multiplied by it.
    """

    scale: Tensor | None = None
    taken: bool = False  # whether a hook copies each parameter's gradient during the backward pass
    flat: bool = True  # whether the gradients are views at this moment

    def __init__(self, module: nn.Module, layout: Layout) -> None:
        self.module, self.layout = module, layout
        tensors = named_tensors(module)
        theta, buffers, _ = layout.flatten(tensors)
        self.room, self.flat_buffers, self.row = theta.new_zeros(MARGIN + len(theta)), buffers, theta
        self.gradient = self.room[MARGIN:]
        named = dict(module.named_parameters(remove_duplicate=False))
        self.parameters = [named[e.name] for e in layout.segment("params")]
        self.gradients = list(layout.params(self.gradient).values())
        for p, view in zip(self.parameters, self.gradients, strict=True):
            p.grad = view
        self.fixed = {e.name: tensors[e.name] for e in layout.segment("fixed")}
        moving = layout.buffers(buffers) | {e.name: self.fixed[e.name] for e in layout.segment("fixed") if e.rule}
        owners = dict(module.named_modules(remove_duplicate=False))
        self.moving = [
            (owners[owner]._buffers, leaf, moving[e.alias or e.name])
            for e in layout.entries
            for owner, _, leaf in [e.name.rpartition(".")]
            if (e.alias or e.name) in moving and leaf in owners[owner]._buffers
        ]

    def bind(self, model: Model, k: int) -> Tensor:
        """Load client k's tensors into the module: θ as views, the rest as copies. Return the flat gradient."""
        if not self.flat:
            for p, view in zip(self.parameters, self.gradients, strict=True):
                p.grad = view
            self.flat = True
        self.place(model.theta[k])
        counted = {n: t[k] for n, t in model.counters.items()}
        self.fill(model.buffers[k], {**model.fixed, **counted})
        return self.gradient

    def free(self) -> None:
        """Set `p.grad = None`, so that autograd allocates gradients and no zeroing is needed."""
        for p in self.parameters:
            p.grad = None
        self.flat = False

    def place(self, row: Tensor) -> None:
        """Make the parameters views of θ `[d]`."""
        # Another task may have moved the parameters of the same module.
        if row.data_ptr() != self.row.data_ptr() or self.parameters[0].data_ptr() != row.data_ptr():
            for p, view in zip(self.parameters, self.layout.params(row).values(), strict=True):
                p.data = view
            self.row = row

    def fill(self, buffers: Tensor, fixed: Mapping[str, Tensor]) -> None:
        """Copy float buffers `[b]`, and counters and fixed tensors by name, into the module."""
        for table, leaf, tensor in self.moving:
            table[leaf] = tensor
        with torch.no_grad():
            self.flat_buffers.copy_(buffers)
            for name, tensor in self.fixed.items():
                tensor.copy_(fixed[name])
        self.server = fixed
        self.versions = [self.fixed[name]._version for name in self.layout.constants]

    def write_buffers_back(self) -> None:
        """If a pass replaced a buffer by another tensor, copy its values and restore the original tensor."""
        for table, leaf, tensor in self.moving:
            now = table[leaf]
            if now is not tensor:
                if now is not None:
                    if now.shape != tensor.shape:
                        raise _reshaped(leaf, tensor, now)
                    tensor.copy_(now.detach())
                table[leaf] = tensor

    def buffers(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Copy the float buffers `[b]` and the counters `[1, …]` after the last pass.

        Raises:
            RunError: a pass has changed a constant buffer.
        """
        self.write_buffers_back()
        for name, version in zip(self.layout.constants, self.versions, strict=True):
            tensor = self.fixed[name]
            if tensor._version != version and not torch.equal(tensor, self.server[name].to(tensor.dtype)):
                raise constant_changed(name)
        counters = {e.name: self.fixed[e.name].detach().clone()[None] for e in self.layout.counters}
        return self.flat_buffers.clone(), counters


def _reshaped(name: str, tensor: Tensor, now: Tensor) -> UsageError:
    return UsageError(
        f"A pass replaced the buffer {name} of shape {tuple(tensor.shape)} by one of shape {tuple(now.shape)}.",
        "one shape for each buffer.",
        "the server joins the buffers of all clients.",
        Line(python=f"self.{name} = torch.zeros({tuple(tensor.shape)})"),
    )


def constant_changed(name: str) -> RunError:
    """The error for a buffer that a client has changed, although no pass of the probe did."""
    return RunError(
        f"A client changed the buffer {name}, which no pass over the first rows had changed.",
        "a rule by which the server joins the clients' values.",
        "a buffer that seems constant is sent once, and clients do not send it.",
        Line(f'buffers={{"{name}": "mean"}}', f"--set buffers={name}=mean", f'buffers = ["{name}=mean"]'),
    )


class SequentialDescent:
    """Gradient descent of K clients by the rule of `StepRule`, one client after another.

    Each step uses the gradients that autograd allocates: they are not zeroed before a pass, not accumulated, and not
    copied into a flat vector. The module loads a client's tensors once.

    Args:
        bound: the module.
        model: the starting point of all clients, θ `[d]`, or of each client, θ `[K, d]`.
        lanes: K.
        rule: the rule of the steps.
        reset: is called before the first step of each client.
        run: `run(x, y, step, k)` runs a forward and a backward pass of the bound module over the rows x, y of client k
            in a step, with the gradient of the mean loss. It returns Σ of their losses, `[]`.
    """

    def __init__(
        self, bound: FlatModule, model: Model, lanes: int, rule: StepRule, reset: Callable[[], None], run: PassOf
    ) -> None:
        self._bound, self._start, self._rule, self._reset, self._run = bound, model, rule, reset, run
        self._theta = model.of(0).theta.clone()
        self._views = list(bound.layout.params(self._theta).values())
        self._update = empty(model.theta, (lanes, len(self._theta)))
        self._velocity = list(bound.layout.params(torch.zeros_like(self._theta)).values()) if rule.momentum else []
        self._all_constants, self._constant = rule.constant(), list[Tensor]()
        self.loss = self._loss_sum = model.theta.new_zeros(lanes)
        self._buffers: list[Tensor] = []
        self._counters: list[dict[str, Tensor]] = []

    def follow(self, rows: Any, steps: Iterable[tuple[Tensor, tuple[int, ...]]]) -> None:
        """Make these steps: all steps of one client before those of the next.

        Args:
            rows: of the clients, a `ClientBatch`.
            steps: places of rows `[k, B]` and counts of the first k clients, for each step.
        """
        steps = list(steps)
        for k in range(len(self.loss)):
            own_steps = [(places[k : k + 1], counts[k : k + 1]) for places, counts in steps if k < len(counts)]
            self.start()
            own = rows.lane(k) if rows.draws else rows
            for number, (x, y, (count,)) in enumerate(own.batches(own_steps)):
                loss_sum = self.step(x[0, :count], y[0, :count], number, k) if count else None
                if rows.on_step is not None:
                    rows.on_step(k, number, 0.0 if loss_sum is None else float(loss_sum) / count)
            self.finish()

    def start(self) -> None:
        """Reset the module to the starting point of the next client."""
        self._reset()
        k = len(self._buffers)
        start, constant = self._start.of(k), self._all_constants
        self._theta.copy_(start.theta)
        self._bound.place(self._theta)
        self._bound.free()
        self._bound.fill(start.buffers, {**start.fixed, **start.counters})
        self._loss_sum = self.loss[k]
        if self._velocity:
            torch._foreach_zero_(self._velocity)
        if constant is not None and (constant.dim() == 2 or not self._constant):
            row = constant[k] if constant.dim() == 2 else constant
            self._constant = list(self._bound.layout.params(row).values())

    def step(self, x: Tensor, y: Tensor, number: int, k: int) -> Tensor:
        """One step of client k on its rows `[n, …]`: Σ of their losses, `[]`."""
        loss_sum = self._run(x, y, number, k)
        if not self._rule.plain:
            self._step_by_rule()
            self._bound.write_buffers_back()
            self._loss_sum.add_(loss_sum)
            return loss_sum
        views, grads = list[Tensor](), list[Tensor]()
        for view, p in zip(self._views, self._bound.parameters, strict=True):
            if p.grad is not None:  # None: the loss does not depend on this parameter
                views.append(view)
                grads.append(p.grad)
                p.grad = None
        if grads:
            torch._foreach_add_(views, grads, alpha=-self._rule.lr)
        self._bound.write_buffers_back()
        self._loss_sum.add_(loss_sum)
        return loss_sum

    @torch.no_grad()
    def _step_by_rule(self) -> None:
        """Make a step with momentum, weight decay or a pull. A parameter without gradient has the gradient 0."""
        rule, views, g = self._rule, self._views, list[Tensor]()
        for view, p in zip(views, self._bound.parameters, strict=True):
            g.append(torch.zeros_like(view) if p.grad is None else p.grad)
            p.grad = None
        if rule.kappa:
            torch._foreach_add_(g, views, alpha=rule.kappa)
        if self._constant:
            torch._foreach_add_(g, self._constant)
        if rule.momentum:
            torch._foreach_mul_(self._velocity, rule.momentum)
            torch._foreach_add_(self._velocity, g)
            if rule.nesterov:
                torch._foreach_add_(g, self._velocity, alpha=rule.momentum)
            else:
                g = self._velocity
        torch._foreach_add_(views, g, alpha=-rule.lr)

    def finish(self) -> None:
        """Store the update, buffers and counters of the current client."""
        k = len(self._buffers)
        torch.sub(self._start.of(k).theta, self._theta, out=self._update[k])
        buffers, counters = self._bound.buffers()
        self._buffers.append(buffers)
        self._counters.append(counters)

    def update(self) -> Tensor:
        """How far each client has come, uphill: y₀ − y_k, `[K, d]`."""
        return self._update

    @property
    def moved(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The buffers `[K, b]` and the counters `[K, …]` of all clients."""
        first, *_ = self._counters
        return torch.stack(self._buffers), {n: torch.cat([c[n] for c in self._counters]) for n in first}
