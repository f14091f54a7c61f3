"""Efron's partial likelihood of survival times, and its derivatives.

    ℓ = Σ_events  log( Σ_{j at risk} e^{z_j} − (l/m) Σ_{j tied} e^{z_j} ) − z_i

At risk are the rows with the same time or a later one; tied are the m events of the same time, of which this is the
l-th, from 0. All rows are one stratum.

Tests: tests/identities/test_cox.py
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Ties(NamedTuple):
    """The rows of a stratum in the order of their times, latest first. All tensors are `[B]`.

    Args:
        order: the place of each row of the order.
        first: the first position with the same time.
        last: the last position with the same time: the rows up to it are at risk.
        event: whether the row has an event.
        share: l/m of an event, 0 for other rows.
    """

    order: Tensor
    first: Tensor
    last: Tensor
    event: Tensor
    share: Tensor


def ties(y: Tensor) -> Ties:
    """The order of the rows and their ties; it can be vectorised over strata.

    Args:
        y: time and event, 0 or 1, `[B, 2]`.
    """
    order = torch.argsort(y[:, 0], descending=True, stable=True)
    time, event = y[:, 0].gather(0, order), y[:, 1].gather(0, order) > 0
    rows, place = len(y), torch.arange(len(y), device=y.device)
    change = time[1:] != time[:-1]
    edge = torch.ones_like(event[:1])
    first = torch.where(torch.cat((edge, change)), place, 0).cummax(0).values
    last = torch.where(torch.cat((change, edge)), place, rows).flip(0).cummin(0).values.flip(0)
    each = event.long()
    count = each.cumsum(0)
    many = torch.zeros_like(each).scatter_add(0, first, each).gather(0, first)
    before = count - each - (count - each).gather(0, first)
    share = torch.where(event, before / many.clamp(min=1), 0.0)
    return Ties(order, first, last, event, share)


def added(values: Tensor, at: Ties) -> Tensor:
    """Σ of the values of the events of the same time, `[B]`."""
    events = torch.where(at.event, values, 0.0)
    return torch.zeros_like(events).scatter_add(0, at.first, events).gather(0, at.first)


def partial_likelihood(z: Tensor, y: Tensor) -> Tensor:
    """−log of Efron's partial likelihood, one value for each row `[B]`; 0 for a row without an event.

    Args:
        z: logarithms of relative hazards, `[B]`.
        y: time and event, `[B, 2]`.
    """
    at = ties(y)
    sorted_z = z.gather(0, at.order)
    top = sorted_z.detach().amax()
    e = (sorted_z - top).exp()
    denominator = e.cumsum(0).gather(0, at.last) - at.share.to(z) * added(e, at)
    each = torch.where(at.event, denominator.log() + top - sorted_z, 0.0)
    return torch.zeros_like(each).scatter(0, at.order, each)


class Survival(NamedTuple):
    """The derivatives of the partial likelihood: of z `[B]`, and the Hessian of a linear model, `[p, p]`."""

    slope: Tensor
    hessian: Tensor


def derivatives(x: Tensor, z: Tensor, y: Tensor) -> Survival:
    """The gradient by z, and the Hessian by w for z = x·w: Xᵀ diag(q) X − MᵀM, one row of M for each event.

    Args:
        x: rows `[B, p]`. A column that is constant in the stratum has no influence.
        z, y: as for `partial_likelihood`.
    """
    at = ties(y)
    mean = x.mean(0)
    far = x - mean
    far = torch.where(far.abs().amax(0) > 1e-12 * mean.abs(), far, 0.0)[at.order]
    e = (z[at.order] - z.amax()).exp()
    share = at.share.to(z)
    denominator = e.cumsum(0)[at.last] - share * added(e, at)
    weight = torch.where(at.event, 1 / denominator, 0.0)
    later = weight.flip(0).cumsum(0).flip(0)[at.first]  # Σ over events whose set at risk has the row
    q = e * (later - torch.where(at.event, added(share * weight, at), 0.0))
    sums = (e[:, None] * far).cumsum(0)[at.last]
    own = (e * at.event)[:, None] * far
    tied = torch.zeros_like(own).index_add_(0, at.first, own)[at.first]
    means = weight[:, None] * (sums - share[:, None] * tied)
    slope = torch.empty_like(z)
    slope[at.order] = q - at.event.to(z)
    return Survival(slope, far.T @ (q[:, None] * far) - means.T @ means)
