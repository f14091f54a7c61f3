"""k-means over clients whose rows stay with them: each round is one step of Lloyd's algorithm on all rows.

    θ_c ← Σᵢ Σ_{x in cluster c of client i} x / Σᵢ n_ic          n_ic: the rows of client i that are nearest to θ_c

A client sends sums by cluster as means of its rows. The server adds them exactly, so the centres are those of the
joined rows, for every number of clients. A cluster without rows keeps its centre.

    python examples/kmeans.py                    a few seconds

Reference: Lloyd, Least Squares Quantization in PCM, 1982.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import atoll
from atoll.base.random import Key
from atoll.compute.batches import ClientBatch
from atoll.compute.task import Task
from atoll.data import Clients
from atoll.plan.aggregate import Mean
from atoll.plan.protocols import Broadcast, Contribution, Declared, Local, RoundInfo, Tensors, Total


@dataclass(frozen=True, repr=False)
class Lloyd(Local):
    """One step of Lloyd's algorithm. θ contains k centres, one after another.

    Args:
        k: the number of clusters.
    """

    k: int

    def declare(self, task: Task) -> Mapping[str, Declared]:
        layout = task.layout
        sums = {"loss": Declared(1, torch.float64, "sum"), "rows": Declared(1, torch.int64, "sum")}
        means = {"update": layout.d, "share": self.k}
        return {n: Declared(length, layout.dtype, "mean") for n, length in means.items()} | sums

    def contribute(
        self, broadcast: Broadcast, lanes: ClientBatch, memory: Tensors, key: Key, task: Task
    ) -> tuple[Contribution, Tensors]:
        centres = broadcast.model.theta.reshape(self.k, -1)
        each = [self._of_client(centres, torch.cat([x for x, _ in lanes.read(i)])) for i in range(len(lanes.sizes))]
        moved, share, loss = (torch.stack(values) for values in zip(*each, strict=True))
        sums = {"loss": loss, "rows": lanes.rows}
        return Contribution({"update": moved.flatten(1), "share": share}, sums, lanes.rows, {}, {}), {}

    def _of_client(self, centres: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = x.flatten(1).to(centres)
        squares = torch.cdist(x, centres).square()
        nearest, cluster = squares.min(1)
        member = nn.functional.one_hot(cluster, self.k).to(x)
        share = member.mean(0)
        return share[:, None] * centres - member.T @ x / len(x), share, nearest.double().sum()

    def server_update(self, total: Total, server: Tensors, info: RoundInfo, key: Key) -> tuple[Total, Tensors]:
        if "update" not in total.means:
            return total, server
        share = total.means["share"] / total.weight
        update = total.means["update"].reshape(self.k, -1) / share[:, None]
        update = torch.where(share[:, None] > 0, update, 0.0).flatten()
        return total._replace(means={**total.means, "update": update}), server


def clusters(data: Clients, start: Tensor, rounds: int) -> Tensor:
    """The centres after some rounds, `[k, p]`.

    Args:
        data: the clients.
        start: the first centres, `[k, p]`.
        rounds: the number of rounds.
    """
    k, features = start.shape
    holder = nn.Linear(features, k, bias=False, dtype=start.dtype)
    with torch.no_grad():
        holder.weight.copy_(start)
    plan = atoll.Plan(Lloyd(k), Mean())
    dtype = str(start.dtype).removeprefix("torch.")
    run = atoll.train(holder, data, plan, rounds=rounds, dtype=dtype, evaluate_every=0, out=None)
    weight: Tensor = next(run.model.parameters()).detach()
    return weight


def main() -> None:
    data = atoll.data.load("wine").split(clients=5, by=atoll.data.Dirichlet(0.5))
    start = data.take(torch.tensor([0, 70, 140]))[0].double()
    centres = clusters(data, start, rounds=10)
    rows, labels = data.take(data.order)
    cluster = torch.cdist(rows.double(), centres).argmin(1)
    table = [torch.bincount(labels[cluster == c], minlength=3).tolist() for c in range(3)]
    print("rows of each class in each cluster:", table)


if __name__ == "__main__":
    main()
