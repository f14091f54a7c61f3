"""Principal components of rows that stay with their clients.

    R = V Λ Vᵀ          R: the correlation of the columns over all rows, from sums of the clients; Λ descending

`atoll.describe` adds counts, sums and centred products of the clients, so the components are those of the joined rows.

    python examples/pca.py                    a few seconds

Reference: Jolliffe, Principal Component Analysis, 2002.
"""

import torch
from torch import Tensor

import atoll
from atoll.data import Clients


def components(data: Clients) -> tuple[Tensor, Tensor]:
    """The share of the variance of each component, `[p]`, and the components of standardized features, `[p, p]`.

    Args:
        data: the clients; their features are numbers.
    """
    features = list(data.columns or ())
    described = atoll.describe(data)
    if described.correlation is None:
        raise SystemExit("No correlations above 500 columns.")
    at = [[c.name for c in described.columns].index(name) for name in features]
    correlation = torch.tensor(described.correlation, dtype=torch.float64)[at][:, at]
    values, vectors = torch.linalg.eigh(correlation)
    return values.flip(0) / values.sum(), vectors.flip(1).T


def main() -> None:
    data = atoll.data.load("wine").split(clients=5, by=atoll.data.Dirichlet(0.5))
    share, vectors = components(data)
    for i in range(3):
        largest = vectors[i].abs().topk(3).indices.tolist()
        names = ", ".join((data.columns or ())[j] for j in largest)
        print(f"component {i + 1}: {float(share[i]):.1%} of the variance; {names}")


if __name__ == "__main__":
    main()
