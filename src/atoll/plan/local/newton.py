"""Newton's method for models that are linear in their parameters.

Tests: tests/identities/test_newton.py
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from atoll.base.errors import FeatureError, RunError, UsageError
from atoll.base.lines import Change, Line
from atoll.base.random import Key
from atoll.base.validation import bounded_number, check_fields
from atoll.compute.batches import ROWS, ClientBatch
from atoll.compute.curvature import has_curvature, ignores_shift, quadratic, wrong_outputs
from atoll.compute.layout import Layout
from atoll.compute.loss import cox, name_of_loss, values_of
from atoll.compute.task import Task
from atoll.plan.protocols import (
    Broadcast,
    Conflict,
    Contribution,
    Declared,
    Local,
    RoundInfo,
    Slots,
    Tensors,
    Total,
)

MOST = 2000  # parameters: a Hessian of 2,001,000 numbers
_RISE = 1e-10  # a smaller relative rise of the loss is rounding
_OVERFLOW = 1e200  # a loss that is not finite: the step is halved until it is
_DEPENDENT = 1e-12  # 1 − R² of a column on the columns before it


class Linear(NamedTuple):
    """The layer of a linear model: o outputs of p features, with or without a bias."""

    outputs: int
    features: int
    bias: bool

    def columns(self, device: torch.device) -> Tensor:
        """The place of each parameter of θ in `[o, p + bias]`, int64 `[d]`: θ has all weights, then the biases."""
        width = self.features + self.bias
        places = torch.arange(self.outputs * width, device=device).reshape(self.outputs, width)
        return torch.cat((places[:, : self.features].flatten(), places[:, self.features :].flatten()))


@dataclass(frozen=True, repr=False)
class Newton(Local):
    """Newton's method: the gradient and the Hessian of the loss of all rows, and one exact step in each round.

    θ ← θ − H⁻¹ g,   g = (1/n) Σ ∇ℓ + l2·w,   H = (1/n) Σ ∇²ℓ + l2·I on the weights w; biases are not penalized

    If the loss has risen by more than 1e-10 of itself, θ returns to the last point plus half of the last step, and the
    round reports the loss of the last point. The model is one `nn.Linear`; the loss is `mse`, `binary_cross_entropy`,
    `cross_entropy`, `poisson` or `cox`. A round in which a client is missing makes no step. scikit-learn: C = 1/(l2·n).

    Args:
        l2: weight of the penalty (l2/2)·|w|², ≥ 0.
    Raises:
        UsageError: l2 is out of range. The plan refuses parts that change the exact mean over all clients. A training
            refuses another model or loss, and more than 2,000 parameters.
        RunError: raised in a round: the Hessian is singular, or the rows of a classification are separable.
    Example:
        >>> Newton(0.001)
        Newton(0.001)

    Reference: Nocedal and Wright, Numerical Optimization, 2006, chapter 3.
    """

    l2: float = bounded_number(0.0, least=0, example=1e-3, why="a negative penalty has no minimum.")
    numerics = "loop"  # a chunk of one client: its Hessian may have 2,001,000 numbers
    needs_population = True
    needs_everyone = True

    def __post_init__(self) -> None:
        check_fields(self)

    def server(self, layout: Layout) -> Tensors:
        """The last step, and objective, Σ loss, Hessian and number of rows of the last point. None is broadcast."""
        _check_size(self, layout)
        zero = torch.zeros((), dtype=torch.float64)
        return {
            "_step": zero.expand(layout.d).clone(),
            "_hessian": zero.expand(_triangle(layout.d)).clone(),
            "_objective": torch.tensor(math.inf, dtype=torch.float64),
            "_loss": zero.clone(),
            "_rows": torch.zeros((), dtype=torch.int64),
        }

    def declare(self, task: Task) -> Mapping[str, Declared]:
        """Declares the gradient, the Hessian's upper triangle, the objective, the loss, the rows and wrong classes.

        Raises:
            UsageError: the model or the loss has no Newton step.
        """
        layer, d = linear_of(self, task), task.layout.d
        wide = torch.float64
        wrong = {"wrong": Declared(w, torch.int64, "sum")} if (w := wrong_outputs(task.loss, layer.outputs)) else {}
        return {
            "update": Declared(d, task.layout.dtype, "mean"),
            "hessian": Declared(_triangle(d), wide, "mean"),
            "objective": Declared(1, wide, "mean"),
            "loss": Declared(1, wide, "sum"),
            "rows": Declared(1, torch.int64, "sum"),
            **wrong,
        }

    def contribute(
        self, broadcast: Broadcast, lanes: ClientBatch, memory: Tensors, key: Key, task: Task
    ) -> tuple[Contribution, Tensors]:
        """The gradient, the Hessian and the loss of K clients, one after another, in float64."""
        layer, theta = linear_of(self, task), broadcast.model.theta
        each = [
            _of_client(self, layer, theta if theta.dim() == 1 else theta[k], lanes.lane(k), task)
            for k in range(len(lanes.sizes))
        ]
        found = {n: torch.stack([one[n] for one in each]) for n in each[0]}
        if lanes.on_step is not None:
            lanes.stepped(0, found["loss"], lanes.sizes)
        means = {n: found.pop(n) for n in ("update", "hessian", "objective")}
        means["update"] = means["update"].to(task.layout.dtype)
        sums = {**found, "rows": lanes.rows}
        facts = {"loss": found["loss"] / lanes.rows.to(theta.device)}
        return Contribution(means, sums, lanes.rows, {}, facts), {}

    def server_update(self, total: Total, server: Tensors, info: RoundInfo, key: Key) -> tuple[Total, Tensors]:
        """Replace the mean gradient by the Newton step, or by the way back to the middle of the last step."""
        if "update" not in total.means:
            return total, server
        means = {n: t / total.weight for n, t in total.means.items()}
        sums = {n: t for n, t in total.sums.items() if n != "wrong"}
        last, now = server["_objective"], means["objective"][0]
        if bool(total.weight != info.total_weight):  # the loss of other rows cannot be compared
            step = torch.zeros_like(means["update"])
        elif bool(now > last + _RISE * last.abs()):
            step = -server["_step"] / 2
            server = {**server, "_step": -step}
            sums["loss"] = server["_loss"]  # of the last point: the run has not left it
        else:
            if not self.l2 and "wrong" in total.sums and bool((total.sums["wrong"] == 0).any()):
                raise _separable(self, total)
            step = solve(self, means["hessian"], means["update"])
            server = {
                "_step": step,
                "_hessian": means["hessian"],
                "_objective": now,
                "_loss": sums["loss"],
                "_rows": total.weight,
            }
        return total._replace(means={**total.means, "update": step * total.weight}, sums=sums), server

    def conflicts(self, slots: Slots) -> Iterator[Conflict]:
        """Refuses parts that change the exact mean over all clients, or the length of the step."""
        given = f"{self!r} with"
        rule = slots.aggregator
        many = torch.tensor([1 << 40])  # a limit of the weight would change the mean, too
        by_rows = torch.equal(rule.weigh(torch.zeros_like(many), many), many)
        if not rule.linear or rule.forms_sum or rule.over != "arrived" or not by_rows:
            why = "the loss is the mean over the rows of all clients."
            yield Conflict(f"{given} {rule!r}.", "Mean().", why, "Mean()")
        if not slots.codec.lossless or slots.codec.averages_all_clients:
            why = "the step is exact only with the exact gradient."
            yield Conflict(f"{given} {slots.codec!r}.", "a codec without loss.", why, "Identity()")
        if slots.pace.asynchronous or slots.pace.cohort_size(1000) > 1000:
            why = "all clients start at one point, and no other client could replace one."
            yield Conflict(f"{given} {slots.pace!r}.", "a pace that waits for the clients of a round.", why, "Sync()")
        if not slots.downlink.lossless:
            why = "the clients would compute the Hessian at another point."
            yield Conflict(f"downlink={slots.downlink!r} with {self!r}.", "no loss.", why, "Identity()")
        steps = slots.optimizer.step_rule(1.0)
        if steps is None or not steps.plain or slots.optimizer.lr != 1.0:
            why = "the length of the step follows from the Hessian."
            yield Conflict(f"{given} the server optimizer {slots.optimizer!r}.", "sgd(1.0).", why, "sgd(1.0)")


def linear_of(part: Newton, task: Task) -> Linear:
    """The layer of a linear model.

    Raises:
        UsageError: the model is not one `nn.Linear`, its loss has no second derivative here, or it is too large.
    """
    modules = [m for _, m in task.module.named_modules(remove_duplicate=False)]  # a layer that runs twice is two
    leaves = [m for m in modules if not next(m.children(), None)]
    inner = [m for m in modules if next(m.children(), None)]
    layers = [m for m in leaves if type(m) is nn.Linear]
    others = [m for m in leaves if type(m) not in (nn.Linear, nn.Flatten, nn.Identity)]
    found = len(layers) == 1 and not others and all(type(m) is nn.Sequential for m in inner) and not task.fields
    found = found and not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in modules)
    if not found or task.layout.d != sum(p.numel() for p in (layers[0].weight, layers[0].bias) if p is not None):
        raise UsageError(
            f"{part!r} with a model that is more than one nn.Linear.",
            "one nn.Linear with nn.Flatten and nn.Identity, no hook and no frozen parameter.",
            "the loss is convex in these parameters, so that each Newton step leads to the one minimum.",
            Line(python="nn.Sequential(nn.Flatten(), nn.Linear(30, 1))", shell="--model logistic"),
        )
    layer = Linear(layers[0].out_features, layers[0].in_features, layers[0].bias is not None)
    if not has_curvature(task.loss):
        raise UsageError(
            f"{part!r} with the loss {name_of_loss(task.loss)}.",
            "mse, binary_cross_entropy, cross_entropy, poisson or cox.",
            "Newton's method needs the second derivative of the loss.",
            "fedavg(0.1)",
        )
    if task.loss is cox and layer.bias:
        raise UsageError(
            f"{part!r} with the loss cox and a model with a bias.",
            "a layer without a bias.",
            "the partial likelihood does not depend on it, so it has no value.",
            Change("model", "cox"),
        )
    _check_size(part, task.layout)
    return layer


def _check_size(part: Newton, layout: Layout) -> None:
    if layout.d > MOST:
        raise UsageError(
            f"{part!r} with {layout.d:,} parameters.",
            f"at most {MOST:,}.",
            f"each client would send a Hessian of {_triangle(layout.d):,} numbers.",
            "fedavg(0.1)",
        )


def _triangle(d: int) -> int:
    return d * (d + 1) // 2


def _of_client(part: Newton, layer: Linear, theta: Tensor, lane: ClientBatch, task: Task) -> dict[str, Tensor]:
    """The means of one client, and the sum of its losses, in float64."""
    at = layer.columns(theta.device)
    wide = theta.double()
    weights = torch.empty_like(wide).index_copy_(0, at, wide).reshape(layer.outputs, -1)
    rows, width = lane.sizes[0], weights.shape[1]
    gradient, hessian = torch.zeros_like(weights), wide.new_zeros(layer.outputs, width, layer.outputs, width)
    loss, squares, wrong = wide.new_zeros(()), wide.new_zeros(width), None
    piece = rows if task.couples else ROWS
    for start in range(0, rows, piece):
        count = min(piece, rows - start)
        places = torch.arange(start, start + count, device=lane.ids.device)[None]
        x, y = (t[0] for t in lane.take(lane.places(places), (count,))[:2])
        x = _with_bias(part, layer, x)
        y = y.double() if y.is_floating_point() else y
        z = x @ weights.T
        g, h, bad = quadratic(task.loss, x, z, y)
        gradient += g
        hessian += h
        loss = loss + values_of(task.loss, z, y).sum()
        squares += x.square().sum(0)
        wrong = bad if wrong is None or bad is None else wrong + bad
    penalized = torch.ones_like(weights)
    penalized[:, layer.features :] = 0
    objective = loss / rows + part.l2 / 2 * (penalized * weights.square()).sum()
    gradient = (gradient / rows + part.l2 * penalized * weights).flatten()[at]
    hessian = (hessian / rows).reshape(len(at), len(at))
    hessian.diagonal().add_(part.l2 * penalized.flatten())
    if ignores_shift(task.loss):  # the sum of the class weights has no curvature, and no gradient
        flat = squares / rows * (1 if not part.l2 else 1 - penalized[0])
        hessian += _shifts(layer.outputs, flat)
    upper = torch.triu_indices(len(at), len(at), device=at.device)
    found = {"update": gradient, "hessian": hessian[at][:, at][upper[0], upper[1]], "objective": objective[None]}
    fits = torch.isfinite(objective) & (objective < _OVERFLOW)  # exp overflows after a step that is too long
    found = {n: torch.where(fits, t, _OVERFLOW if n == "objective" else 0.0) for n, t in found.items()}
    found["loss"] = torch.where(fits, loss, _OVERFLOW)
    return found if wrong is None else {**found, "wrong": wrong}


def _with_bias(part: Newton, layer: Linear, x: Tensor) -> Tensor:
    """The rows in float64, `[B, p]`, with a column of ones for the bias."""
    x = x.flatten(1).double()
    if x.shape[1] != layer.features:
        raise UsageError(
            f"{part!r}: rows of {x.shape[1]} numbers, and a layer for {layer.features}.",
            "a layer that takes all numbers of a row.",
            "its Hessian is computed from whole rows.",
            Line(python=f"nn.Sequential(nn.Flatten(), nn.Linear({x.shape[1]}, {layer.outputs}))"),
        )
    return torch.cat((x, x.new_ones(len(x), 1)), 1) if layer.bias else x


def _shifts(outputs: int, flat: Tensor) -> Tensor:
    """A curvature for the parameters' mean over classes, `[o·p, o·p]`: 1/o² in all pairs of classes, times `flat`."""
    return torch.kron(flat.new_full((outputs, outputs), 1 / outputs**2), torch.diag(flat))


def full(upper: Tensor, d: int) -> Tensor:
    """The symmetric matrix `[d, d]` of an upper triangle `[d(d + 1)/2]`."""
    at = torch.triu_indices(d, d, device=upper.device)
    matrix = upper.new_zeros(d, d)
    matrix[at[0], at[1]] = upper
    return matrix + matrix.triu(1).T


def solve(part: Newton, upper: Tensor, gradient: Tensor) -> Tensor:
    """H⁻¹ g by Cholesky's factors of H with a unit diagonal.

    Raises:
        FeatureError: H is singular; the error has the features whose columns depend on each other.
    """
    h = full(upper, len(gradient))
    scale = h.diagonal().clamp(min=0).sqrt()
    if bool((scale == 0).any()):
        raise _singular(part, scale == 0)
    unit = h / scale / scale[:, None]
    factor, failed = torch.linalg.cholesky_ex(unit)
    if bool(failed) or bool(factor.diagonal().square().min() < _DEPENDENT):
        vector = torch.linalg.eigh(unit).eigenvectors[:, 0].abs()
        raise _singular(part, vector > 0.1 * vector.max())
    scaled = (gradient.double() / scale)[:, None]
    return torch.cholesky_solve(scaled, factor)[:, 0] / scale


def _singular(part: Newton, dependent: Tensor) -> FeatureError:
    """The error about parameters whose columns depend on each other, bool `[d]`."""
    return FeatureError(
        tuple(dependent.nonzero()[:, 0].tolist()),
        "The Hessian is singular: some weights of {names} can change together without a change of any prediction.",
        "columns of which none is a sum of the others and a constant, or l2 > 0.",
        "such weights have no unique value.",
        "newton(l2=0.001)" if not part.l2 else f"newton(l2={10 * part.l2:g})",
    )


def _separable(part: Newton, total: Total) -> RunError:
    l2 = 1 / max(1, int(total.weight))
    return RunError(
        "The rows are separable: each train row has its class as the largest answer.",
        "l2 > 0.",
        "without a penalty the loss falls for ever while the weights grow. This l2 is the C = 1 of scikit-learn.",
        f"newton(l2={l2:.3g})",
    )
