"""The rules by which the server joins the float buffers of its clients.

    mean       the mean with the weights of the clients: running means and variances
    unit       the mean, divided by its norm: directions
    largest    the largest value, element by element
    keep       the server's values: changes of clients are dropped

If no client has changed a buffer in a round, the bits of the server stay. The vectors of torch's spectral norm are
refreshed on the new weight: the mean of two singular vectors is not a singular vector of the mean weight.

Tests: tests/identities/test_buffers.py
"""

from __future__ import annotations

import torch
from torch import Tensor

from atoll.compute.layout import CHANGED, Layout, Spectral
from atoll.plan.protocols import Tensors

_ITERATIONS = 32  # of the power iteration, from vectors near the singular vectors


def flags_of(layout: Layout, before: Tensor, after: Tensor) -> Tensor:
    """Whether each float buffer has changed, uint8 `[K, n]`.

    Args:
        layout: the layout of the model.
        before: float buffers `[b]` or `[K, b]`.
        after: float buffers `[K, b]`.
    Example:
        >>> from torch import nn
        >>> layout = Layout.of(nn.BatchNorm1d(1))
        >>> flags_of(layout, torch.zeros(2), torch.tensor([[0.0, 1.0]]))
        tensor([[0, 1]], dtype=torch.uint8)
    """
    owner = layout.owner.to(after.device)
    counted = torch.zeros(len(after), len(layout.segment("buffers")), dtype=torch.int32, device=after.device)
    return (counted.index_add_(1, owner, (after != before).int()) > 0).to(torch.uint8)


def join_buffers(
    layout: Layout, before: Tensor, theta: Tensor, means: Tensors, counters: Tensors
) -> tuple[Tensor, dict[str, Tensor]]:
    """The buffers of the server after a round, and the counters without the flags.

    Args:
        layout: the layout of the model.
        before: float buffers `[..., b]` of the server.
        theta: θ of the server after the round, `[..., d]`.
        means: the means of the round; `buffers` has the buffers that clients send, `[..., s]`.
        counters: the counters of the round, with the flags of the clients.
    """
    others = {n: t for n, t in counters.items() if n != CHANGED}
    if "buffers" not in means:
        return before, others
    mean, sent = means["buffers"], layout.sent
    after = mean.to(before.dtype)
    if sent is not None:
        after = before.index_copy(-1, sent.to(before.device), after)
    views = layout.buffers(after)
    for entry in layout.segment("buffers"):
        if entry.rule == "unit":
            axes = tuple(range(-len(entry.shape), 0))
            norm = torch.linalg.vector_norm(views[entry.name].double(), dim=axes, keepdim=True)
            views[entry.name].copy_(torch.where(norm > 0, views[entry.name] / norm, views[entry.name]))
    weights = layout.params(theta) if layout.spectral else {}
    for spectral in layout.spectral:
        if spectral.weight in weights and spectral.u in views and spectral.v in views:
            _refresh(spectral, weights[spectral.weight], views)
    if CHANGED not in counters:
        return after, others
    changed = counters[CHANGED].to(before.device).bool()[..., layout.owner.to(before.device)]
    return torch.where(changed, after, before), others


def _refresh(spectral: Spectral, weight: Tensor, views: dict[str, Tensor]) -> None:
    """Set u and v to the first singular vectors of the weight by power iteration, in place."""
    lead = views[spectral.u].dim() - 1  # the leading axes of several models
    axes = weight.dim() - lead
    matrix = weight.detach().movedim(lead + spectral.dim % axes, lead).flatten(lead + 1).double()
    v = views[spectral.v].double()
    for _ in range(_ITERATIONS):
        u = torch.nn.functional.normalize((matrix @ v[..., None])[..., 0], dim=-1)
        v = torch.nn.functional.normalize((matrix.mT @ u[..., None])[..., 0], dim=-1)
    views[spectral.u].copy_(u)
    views[spectral.v].copy_(v)
