"""Inference from a training with `newton`: standard errors of the coefficients from the Hessian.

    covariance = H⁻¹/n          logistic, softmax, Poisson and Cox models
    covariance = σ² (XᵀX)⁻¹     linear models, σ² = Σ e²/(n − d), with Student's t of n − d degrees of freedom

H is the mean Hessian of the loss, of the last point before the last step. With l2 > 0 the estimate is that of H + P for
P = l2·I on the weights: covariance = (H + P)⁻¹ H (H + P)⁻¹/n, and σ² = Σ e²/(n − tr (H + P)⁻¹ H).

Reference: le Cessie and van Houwelingen, Ridge Estimators in Logistic Regression, 1992.

Tests: tests/identities/test_inference.py
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from atoll.compute.curvature import ignores_shift
from atoll.compute.layout import Layout
from atoll.compute.loss import ClassWeighted, mse
from atoll.compute.task import Task
from atoll.data.input import Input
from atoll.plan.local.newton import Newton, full
from atoll.plan.state import State
from atoll.runs.inference import COLUMNS, Inference

CONSTANT = "the constant"
_ROUNDING = 1e-13  # of the largest eigenvalue
_MOVED = 1e-3  # of a standard error: a larger last step has not converged


def parameter_names(layout: Layout, columns: Sequence[str]) -> list[str]:
    """The column of each parameter in θ; the constant for a bias.

    Args:
        layout: the layout of a model with one linear layer.
        columns: the names of the features; without names they are numbered.
    """
    names: list[str] = []
    for entry in layout.segment("params"):
        if len(entry.shape) < 2:
            names += [CONSTANT] * entry.size
            continue
        width = math.prod(entry.shape[1:])
        own = columns if len(columns) == width else [f"feature {i}" for i in range(width)]
        names += [*own] * entry.shape[0]
    return names


def infer(part: Newton, state: State, task: Task, input: Input, columns: Sequence[str]) -> Inference | None:
    """The inference of a training with `newton`; None before its first step.

    Args:
        part: the local part.
        state: the state after the last round.
        task: the model and the loss.
        input: the scale of the columns and of the target.
        columns: the names of the features.
    """
    server = {n: t.cpu() for n, t in state.server["local"].items()}
    n, theta = int(server["_rows"]), state.model.theta.cpu().double()
    if not n:
        return None
    outputs, d = task.layout.segment("params")[0].shape[0], len(theta)
    h, step, penalty = full(server["_hessian"], d), server["_step"], part.l2 * _weights(task.layout)
    cov, used = _spread(h, penalty)
    cov, freedom, notes, linear = cov / n, math.inf, [], task.loss is mse
    exact = linear and state.model.theta.dtype == torch.float64
    if ignores_shift(task.loss):
        centre = _centring(task.layout, outputs)
        cov, theta = centre @ cov @ centre, centre @ theta  # no row depends on the mean over classes
    elif outputs > 1:
        cov = torch.full_like(cov, math.nan)
        notes.append("note    There are no standard errors for a model of several targets.")
    elif linear:
        freedom = max(0.0, n - used)
        # The loss is that before the last step; it is a quadratic function, so its value after the step is known.
        squares = server["_loss"] + n * step @ (penalty * (theta + step / 2) - 0.5 * h @ step)
        cov = cov * 2 * squares.reshape(()) / freedom if freedom else torch.full_like(cov, math.nan)
    if isinstance(task.loss, ClassWeighted):
        cov = torch.full_like(cov, math.nan)
        notes.append("note    Class weights change the likelihood: there are no standard errors.")
    se = cov.diagonal().clamp(min=0).sqrt()
    if part.l2:
        notes.append("note    With l2 > 0 the coefficients are biased towards 0: there are no p-values and intervals.")
    if not linear and bool((step.abs() > se).any()):  # the point may be a step that the next round takes back
        cov = torch.full_like(cov, math.nan)
        notes.append("note    The last step was longer than a standard error: no errors are given, run more rounds.")
    elif not exact and bool((step.abs() > _MOVED * se).any()):
        notes.append("note    The last step was longer than a thousandth of a standard error: run more rounds.")
    names = _row_names(task.layout, columns, input, outputs)
    kept = [("scaled", theta, cov)]
    change = _to_raw(task, input, outputs)
    if change is not None:
        matrix, offset = change
        kept.insert(0, ("raw", matrix @ theta + offset, matrix @ cov @ matrix.T))
    tables = [_table(values, c.diagonal().clamp(min=0).sqrt(), freedom, bool(part.l2)) for _, values, c in kept]
    joined = {name: tuple(v for table in tables for v in table[name].tolist()) for name in COLUMNS}
    units = tuple(unit for unit, _, _ in kept for _ in names)
    return Inference(tuple(names) * len(kept), units, joined, "z" if freedom == math.inf else "t", tuple(notes))


def _table(values: Tensor, se: Tensor, freedom: float, penalized: bool) -> dict[str, Tensor]:
    """Coefficients, standard errors, statistics, p-values and 95 % intervals."""
    from scipy.special import ndtr, ndtri, stdtr, stdtrit  # not at the start of a run, which seldom needs it

    z = values / se
    normal = freedom == math.inf
    tail = ndtr(-z.abs().numpy()) if normal else stdtr(freedom, -z.abs().numpy())
    half = se * float(ndtri(0.975) if normal else stdtrit(freedom, 0.975))
    found = {"z": z, "p": 2 * torch.as_tensor(tail), "low": values - half, "high": values + half}
    if penalized:
        found = {name: torch.full_like(t, math.nan) for name, t in found.items()}
    return {"coefficient": values, "se": se, **found}


def _weights(layout: Layout) -> Tensor:
    """1 for a weight, 0 for a bias, float64 `[d]`."""
    return torch.cat([torch.full((e.size,), float(len(e.shape) > 1)).double() for e in layout.segment("params")])


def _spread(h: Tensor, penalty: Tensor) -> tuple[Tensor, float]:
    """The covariance of the estimate times n, `[d, d]`, and the number of parameters that the rows determine.

    Args:
        h: the Hessian of loss and penalty, `[d, d]`.
        penalty: its part on the diagonal that no row contributes, `[d]`.
    """
    scale = h.diagonal().sqrt()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h / scale / scale[:, None]))
    if not bool(penalty.any()):
        return inverse / scale / scale[:, None], len(h)
    # Directions without rows have only rounding errors, which the inverse of a small penalty would enlarge.
    values, vectors = torch.linalg.eigh(h / scale / scale[:, None] - torch.diag(penalty / scale.square()))
    root = inverse @ (vectors * values.where(values > _ROUNDING * values[-1], 0.0).sqrt()) / scale[:, None]
    return root @ root.T, len(h) - float((inverse.diagonal() * penalty / scale.square()).sum())


def _centring(layout: Layout, outputs: int) -> Tensor:
    """The projection `[d, d]` on coefficients whose sum over classes is 0."""
    centre = torch.eye(outputs, dtype=torch.float64) - 1 / outputs
    blocks = [torch.eye(entry.size // outputs, dtype=torch.float64) for entry in layout.segment("params")]
    project: Tensor = torch.block_diag(*(torch.kron(centre, block) for block in blocks))
    return project


def _row_names(layout: Layout, columns: Sequence[str], input: Input, outputs: int) -> list[str]:
    """The column of each parameter, with the class or the target before it if there are several outputs."""
    names = parameter_names(layout, columns)
    if outputs == 1:
        return names
    classes = input.classes or input.target.names
    heads = list(classes) if len(classes) == outputs else [str(j) for j in range(outputs)]
    owners = [head for entry in layout.segment("params") for head in heads for _ in range(entry.size // outputs)]
    return [f"{owner}: {name}" for owner, name in zip(owners, names, strict=True)]


def _to_raw(task: Task, input: Input, outputs: int) -> tuple[Tensor, Tensor] | None:
    """The map from θ to coefficients of raw columns, matrix `[d, d]` and offset `[d]`; None if there are none."""
    entries = task.layout.segment("params")
    if input.clients or input.tables is None:
        return None
    _, centre, spread = (table[0].reshape(-1) for table in input.tables)
    width, d = len(centre), sum(entry.size for entry in entries)
    if entries[0].size != outputs * width:
        return None
    matrix, offset = torch.zeros(d, d, dtype=torch.float64), torch.zeros(d, dtype=torch.float64)
    scaled = task.loss is mse and len(input.target.spread) == 1
    unit = input.target.spread[0] if scaled else 1.0
    for j in range(outputs):
        own, bias = slice(j * width, (j + 1) * width), outputs * width + j
        matrix[own, own] = torch.diag(unit / spread)
        if d > outputs * width:
            matrix[bias, own], matrix[bias, bias] = -unit * centre / spread, unit
            offset[bias] = input.target.centre[0] if scaled else 0.0
    return matrix, offset
