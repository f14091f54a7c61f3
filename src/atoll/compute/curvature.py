"""First and second derivatives of losses with respect to the output of a linear model, for Newton's method.

    z = X̃ Wᵀ,   g_j = X̃ᵀ s_j,   H_jk = X̃ᵀ diag(c_jk) X̃      X̃ = [x, 1],  outputs j, k

s is the slope ∂ℓ/∂z of each row, c its curvature ∂²ℓ/∂z². The loss `cox` couples the rows of a client; its Hessian has
one more term, − MᵀM with one row of M for each event.

Tests: tests/identities/test_newton.py
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from atoll.compute.loss import ClassWeighted, PerExample, binary_cross_entropy, cox, cross_entropy, mse, poisson
from atoll.compute.shapes import aligned
from atoll.compute.survival import derivatives
from atoll.data.rows import IGNORED


class Slopes(NamedTuple):
    """The derivatives of a loss with respect to the outputs of each row.

    Args:
        slope: ∂ℓ/∂z_j, `[B, o]`.
        curvature: ∂²ℓ/∂z_j∂z_k, `[B, o, o]`; or `[B, o]` if the outputs do not interact.
        wrong: the number of rows without a correct class, for each output `[o]` or for all outputs `[1]`, int64; None:
            the targets are no classes. If it is 0, the rows are separable and a loss without penalty has no minimum.
    """

    slope: Tensor
    curvature: Tensor
    wrong: Tensor | None = None


class Quadratic(NamedTuple):
    """The sum of a loss over some rows, its gradient and its Hessian, for a linear model with W `[o, p]`, p with bias.

    Args:
        gradient: `[o, p]`.
        hessian: `[o, p, o, p]`.
        wrong: as in `Slopes`.
    """

    gradient: Tensor
    hessian: Tensor
    wrong: Tensor | None


def _squared(z: Tensor, y: Tensor) -> Slopes:
    error = z - y.reshape(z.shape)
    return Slopes(2 * error / z.shape[1], torch.full_like(z, 2 / z.shape[1]))


def _counts(z: Tensor, y: Tensor) -> Slopes:
    rate = z.exp() / z.shape[1]
    return Slopes(rate - y.reshape(z.shape) / z.shape[1], rate)


def _binary(z: Tensor, y: Tensor) -> Slopes:
    y = y.reshape(z.shape)
    labelled = (y != IGNORED).to(z)
    share = labelled / labelled.sum(1, keepdim=True)
    p = z.sigmoid()
    wrong = torch.where(y > 0, z <= 0, z >= 0) & (y != IGNORED)
    return Slopes((p - y) * share, p * (1 - p) * share, wrong.sum(0))


def _softmax(z: Tensor, y: Tensor) -> Slopes:
    p, own = z.softmax(1), torch.nn.functional.one_hot(y, z.shape[1]).to(z)
    others = z.masked_fill(own.bool(), -torch.inf).amax(1)
    wrong = (z.gather(1, y[:, None])[:, 0] <= others).sum()[None]
    return Slopes(p - own, torch.diag_embed(p) - p[:, :, None] * p[:, None, :], wrong)


_SLOPES: Mapping[PerExample, Callable[[Tensor, Tensor], Slopes]] = {
    mse: _squared,
    poisson: _counts,
    binary_cross_entropy: _binary,
}


def has_curvature(loss: PerExample) -> bool:
    """Whether Newton's method knows the second derivative of a loss.

    Example:
        >>> has_curvature(mse), has_curvature(cross_entropy())
        (True, True)
    """
    return isinstance(_plain(loss), cross_entropy) or _plain(loss) in (*_SLOPES, cox)


def ignores_shift(loss: PerExample) -> bool:
    """Whether the loss does not change if the same number is added to all outputs: the softmax."""
    return isinstance(_plain(loss), cross_entropy)


def wrong_outputs(loss: PerExample, outputs: int) -> int:
    """The length of `Slopes.wrong`; 0 if the targets are no classes."""
    return 1 if ignores_shift(loss) else outputs if _plain(loss) is binary_cross_entropy else 0


def _plain(loss: PerExample) -> PerExample:
    """The loss without class weights."""
    return loss.loss if isinstance(loss, ClassWeighted) else loss


def slopes(loss: PerExample, z: Tensor, y: Tensor) -> Slopes:
    """The derivatives of a loss for each row.

    Args:
        loss: a loss with `has_curvature`.
        z: outputs `[B, o]`.
        y: targets `[B]` or `[B, o]`.
    Example:
        >>> slopes(mse, torch.tensor([[3.0]]), torch.tensor([1.0])).slope
        tensor([[4.]])
    """
    if isinstance(loss, ClassWeighted):
        weight = z.new_tensor(loss.weights)[y.long()].reshape(-1, *[1] * (z.dim() - 1))
        found = slopes(loss.loss, z, y)
        extra = [1] * (found.curvature.dim() - 1)
        return found._replace(slope=found.slope * weight, curvature=found.curvature * weight.reshape(-1, *extra))
    if isinstance(loss, cross_entropy):
        return _softmax(z, y.long())
    aligned(z, y)  # refuses a target of another shape
    return _SLOPES[loss](z, y)


def quadratic(loss: PerExample, x: Tensor, z: Tensor, y: Tensor) -> Quadratic:
    """Σ of the gradient and the Hessian of a loss over rows, of a model that is linear in x.

    Args:
        loss: a loss with `has_curvature`.
        x: rows `[B, p]`, with a column of ones for a bias.
        z: outputs `[B, o]`.
        y: targets `[B, …]`.
    """
    if loss is cox:
        slope, hessian = derivatives(x, z[:, 0], y)
        return Quadratic(slope[None] @ x, hessian[None, :, None], None)
    slope, curvature, wrong = slopes(loss, z, y)
    outputs, width = z.shape[1], x.shape[1]
    hessian = x.new_zeros(outputs, width, outputs, width)
    for j in range(outputs):
        for k in range(j, outputs) if curvature.dim() == 3 else (j,):
            c = curvature[:, j, k] if curvature.dim() == 3 else curvature[:, j]
            block = x.T @ (c[:, None] * x)
            hessian[j, :, k] = block
            hessian[k, :, j] = block
    return Quadratic(slope.T @ x, hessian, wrong)
