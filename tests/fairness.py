"""Two federations in which some clients are hard: fairness and selection by loss help by theory, not by chance."""

import math

import torch

import atoll


def opposed_groups(seed, clients=10, minority=2, rows=200, degrees=100.0):
    """Two groups whose classes are separated along directions that differ by an angle: no linear model serves both.

    The mean over rows follows the majority. A model between the two directions has equal accuracy for both groups.
    """
    noise = torch.Generator().manual_seed(seed)
    x, owner = torch.randn(clients * rows, 2, generator=noise), torch.arange(clients * rows) // rows
    angle = torch.where(owner >= clients - minority, math.radians(degrees), 0.0)
    y = (x[:, 0] * angle.cos() + x[:, 1] * angle.sin() > 0).long()
    return atoll.data.arrays(x.numpy(), y.numpy(), by=owner.numpy()).split(held_out=0.25)


def slow_group(seed, clients=20, slow=6, rows=40):
    """Two groups with features of their own: those of one group are an eighth as large, so it is learned slowly.

    After a few rounds the updates of the other clients are small, and only those of the slow ones lower the loss.
    """
    noise = torch.Generator().manual_seed(seed)
    part, owner = torch.randn(clients * rows, 2, generator=noise), torch.arange(clients * rows) // rows
    part[:, 0] += 0.3 * part[:, 0].sign()
    is_slow = (owner >= clients - slow)[:, None]
    x = torch.cat([torch.where(is_slow, 0.0, 4.0 * part), torch.where(is_slow, 0.5 * part, 0.0)], 1)
    return atoll.data.arrays(x.numpy(), (part[:, 0] > 0).long().numpy(), by=owner.numpy()).split(held_out=0.25)


def trained(data, plan, rounds, seed=0):
    """The run of a softmax regression, with the metrics of each client."""
    return atoll.train("softmax", data, plan, rounds=rounds, seed=seed, evaluate="both", report=False, out=None)


def rounds_to(run, loss):
    """The first round with at most this held-out loss; the number of rounds if there is none."""
    return next((r.round for r in run.reports if r.metrics["held_out_loss"] <= loss), len(run.reports))
