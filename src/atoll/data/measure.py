"""Measures of how uneven a federation is, in its labels and in its sizes.

Tests: tests/data/test_clients.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def entropy(p: Tensor) -> Tensor:
    """Compute the Shannon entropy in bits over the last axis: −Σ p log₂ p.

    Args:
        p: probabilities `[..., n]`, in [0, 1].
    Returns:
        `[...]`, in [0, log₂ n].
    Example:
        >>> entropy(torch.tensor([[0.5, 0.5], [1.0, 0.0]])).tolist()
        [1.0, 0.0]
    """
    bits: Tensor = torch.special.entr(p).sum(-1) / math.log(2)
    return bits


def label_divergence(histogram: Tensor) -> float:
    """Compute the mean Jensen–Shannon divergence, in bits, between a client's labels and the labels of all clients.

    JS(p, q) = H((p + q) / 2) − (H(p) + H(q)) / 2, between 0 (equal) and 1 (no class in common).

    Args:
        histogram: rows of each class, int64 `[clients, classes]`, at least one row per client.
    Example:
        >>> label_divergence(torch.tensor([[5, 5], [3, 3]]))
        0.0

    Reference: Lin, Divergence Measures Based on the Shannon Entropy, 1991.
    """
    counts = histogram.double()
    p = counts / counts.sum(1, keepdim=True)
    q = counts.sum(0) / counts.sum()
    return float((entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2).mean().clamp(0, 1))


def size_gini(sizes: Tensor) -> float:
    """Compute the Gini coefficient of the clients' sizes: 0 if all are equal, near 1 if one has almost all rows.

    G = Σᵣ (2r − C − 1) n₍ᵣ₎ / (C Σ n), sizes n₍₁₎ ≤ … ≤ n₍C₎.

    Args:
        sizes: rows of each client, int64 `[clients]`.
    Example:
        >>> size_gini(torch.tensor([1, 1, 1, 5]))
        0.375
    """
    ordered, count = sizes.sort().values.double(), len(sizes)
    rank = torch.arange(1, count + 1, dtype=torch.float64)
    return float(((2 * rank - count - 1) * ordered).sum() / (count * ordered.sum()))


def effective_clients(sizes: Tensor) -> float:
    """Compute the number of equal-sized clients whose mean has the same variance: (Σ n)² / Σ n².

    Args:
        sizes: rows of each client, int64 `[clients]`.
    Example:
        >>> effective_clients(torch.tensor([10, 10, 10]))
        3.0

    Reference: Kish, Survey Sampling, 1965.
    """
    n = sizes.double()
    return float(n.sum() ** 2 / (n**2).sum())
