"""Shared parts of the speed benchmarks: a manual implementation of FedAvg, the images, and a clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import atoll
from atoll.data import Clients
from atoll.data.arrays import Source


def images() -> Source:
    """Load Fashion-MNIST; if it is not installed, return noise of its shape."""
    try:
        return atoll.data.load("fashion_mnist")
    except atoll.UsageError as error:
        print(f"noise in place of the images: {error.given}")
        noise = torch.randint(256, (60_000, 28, 28), dtype=torch.uint8)
        return atoll.data.arrays(noise, torch.randint(10, (60_000,)))


@dataclass
class Bare:
    """A manual FedAvg: one module, one optimizer, client after client, the rows as floats in memory.

    Args:
        module: the model, trained in place.
        data: the clients.
        lr, batch: learning rate and batch size of their SGD.
    """

    module: nn.Module
    data: Clients
    lr: float
    batch: int

    def __post_init__(self) -> None:
        self.x, self.y = self.data.take(self.data.order)
        self.generator = torch.Generator().manual_seed(0)
        self.theta = {n: t.clone() for n, t in self.module.state_dict().items()}

    def drawn(self, cohort: int) -> list[int]:
        """Draw a cohort of clients."""
        return torch.randperm(self.data.count, generator=self.generator)[:cohort].tolist()

    def round(self, clients: Iterable[int]) -> None:
        """Run one round: train the clients in turn, then average them, weighted by rows."""
        total, rows = {n: torch.zeros_like(t) for n, t in self.theta.items()}, 0
        for client in clients:
            begin, end = self.data.offsets[client : client + 2].tolist()
            x, y = self.x[begin:end], self.y[begin:end]
            self.module.load_state_dict(self.theta)
            optimizer = torch.optim.SGD(self.module.parameters(), self.lr)
            for batch in torch.randperm(end - begin, generator=self.generator).split(self.batch):
                optimizer.zero_grad()
                loss(self.module(x[batch]), y[batch]).backward()
                optimizer.step()
            rows += end - begin
            for name, tensor in self.module.state_dict().items():
                total[name] += tensor * (end - begin)
        self.theta = {n: t / rows for n, t in total.items()}

    def accuracy(self) -> float:
        """Return the accuracy on the held-out rows."""
        self.module.load_state_dict(self.theta)
        return accuracy(self.module, self.data)


def loss(output: Tensor, y: Tensor) -> Tensor:
    """Compute the mean cross-entropy, with one output per row or one per position."""
    return F.cross_entropy(output.flatten(0, -2), y.flatten())


def accuracy(module: nn.Module, data: Clients) -> float:
    """Return the fraction of held-out rows that a model classifies correctly."""
    held = data.held()
    x, y = held.take(held.order)
    with torch.no_grad():
        return float((module(x).argmax(1) == y).double().mean())


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Return wall-clock seconds, and CPU seconds of all cores."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu
