"""Rows whose sets are not available here: their settings and published values, on random images, for the time only.

Left out: texts of StackOverflow and the auto-encoder of adaptive server optimizers, and the rows of FedNova in which
each client draws its own number of epochs: a plan has one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import atoll
from atoll.data import IID, Clients, Dirichlet, FeatureShift, Partition, Pathological, Quantity
from atoll.plan import Plan
from atoll.plan.aggregate import Mean
from atoll.plan.local import Normalised, Proximal, Scaffold, Train
from atoll.plan.optimizer import adagrad, adam, sgd, yogi
from atoll.plan.protocols import Correction, Optimizer

from .rows import NONE, Cell, Result, Row, Table

Runner = Callable[[int, int | None, Path | None], Result]
Model = str | Callable[[], nn.Module]
CIFAR10, CIFAR100, EMNIST = ("CIFAR-10", (3, 32, 32), 10), ("CIFAR-100", (3, 32, 32), 100), ("EMNIST", (1, 28, 28), 62)
_Set = tuple[str, tuple[int, ...], int]


def _images(of: _Set, rows: int, clients: int, split: Partition, seed: int) -> Clients:
    """Random images with random classes, in the shape of a set."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randint(256, (rows, *of[1]), generator=rng, dtype=torch.uint8)
    y = torch.arange(rows) % of[2]
    source = atoll.data.arrays(x, y.numpy(), task="classification", name=f"random images of {of[0]}")
    return source.split(clients, split, held_out=0, seed=seed)


def _timed(of: _Set, rows: int, clients: int, split: Partition, model: Model, plan: Plan, note: str = "") -> Runner:
    """One round, or the given number of rounds, without an evaluation."""

    def run(seed: int, rounds: int | None, place: Path | None) -> Result:
        data = _images(of, rows, clients, split, seed)
        torch.manual_seed(seed)
        words: dict[str, Any] = {"rounds": rounds or 1, "seed": seed, "evaluate_every": 0}
        done = atoll.train(model if isinstance(model, str) else model(), data, plan, out=None, **words)
        cells = {"seconds a round": done.seconds / done.rounds}
        return Result(cells, done.rounds, done.seconds, done.bytes_up, (note,) if note else ())

    return run


# 1. NIID-Bench: CIFAR-10, its small convolutional network

_NIID: Mapping[str, tuple[int, Partition, Sequence[float]]] = {
    "10-dirichlet": (10, Dirichlet(0.5), (68.2, 67.9, 69.8, 66.8)),
    "10-labels2": (10, Pathological(2), (49.8, 50.7, 49.1, 46.5)),
    "10-noise": (10, FeatureShift(noise=0.1), (68.9, 69.3, 70.1, 68.5)),
    "10-quantity": (10, Quantity(1.0), (72.0, 71.2, 62.4, 10.0)),
    "100-dirichlet": (100, Dirichlet(0.5), (59.4, 58.8, 10.0, 60.0)),
    "100-labels2": (100, Pathological(2), (45.3, 39.3, 10.0, 48.0)),
    "100-iid": (100, IID(), (65.6, 66.0, 10.0, 66.1)),
}


def niid_bench() -> dict[str, Row]:
    """10 epochs of all of 10 clients, or of 10 of 100. Quantity is a power law here and a Dirichlet draw there."""
    corrections: Sequence[tuple[str, Correction | None]] = (
        *(("fedavg", None), ("fedprox", Proximal(0.01)), ("scaffold", Scaffold()), ("fednova", Normalised())),
    )
    rows = {}
    for name, (clients, split, values) in _NIID.items():
        for (method, correction), value in zip(corrections, values, strict=True):
            local = Train(sgd(0.01, momentum=0.9), epochs=10, batch=64, correction=correction)
            plan = Plan(local, Mean(), cohort=None if clients == 10 else 10)
            run = _timed(CIFAR10, 50_000, clients, split, "niid-cnn", plan)
            rows[f"cifar10-{name}-{method}"] = Row(run, {"accuracy": Cell(value)}, "CIFAR-10")
    return rows


# 2. Adaptive server optimizers: one local epoch of 10 clients, batch 20


class _Residual(nn.Module):
    """Two 3 × 3 convolutions with group normalisation, and a way around them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.GroupNorm(2, outputs), nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.GroupNorm(2, outputs),
        )  # fmt: skip
        same = inputs == outputs and stride == 1
        around = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.GroupNorm(2, outputs))
        self.around = nn.Identity() if same else around

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.around(x))


def resnet18(classes: int) -> nn.Module:
    """ResNet-18 for 32 × 32 images with group normalisation."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.GroupNorm(2, 64), nn.ReLU()]
    wide = 64
    for outputs in (64, 128, 256, 512):
        layers += [_Residual(wide, outputs, 1 if outputs == 64 else 2), _Residual(outputs, outputs, 1)]
        wide = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes))


def emnist_cnn() -> nn.Module:
    """Two 3 × 3 convolutions, one pool, a hidden layer of 128, dropout."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25),
        nn.Flatten(), nn.Linear(9216, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 62),
    )  # fmt: skip


_METHODS = ("fedadagrad", "fedadam", "fedyogi", "fedavgm", "fedavg")
_NO_TAU = (NONE, NONE)
_ADAPTIVE: Mapping[str, tuple[_Set, int, int, Partition, Model, str, Sequence[Sequence[float]]]] = {
    # task: set, rows, clients, split, model, note, then by method: log10 of client lr, of server lr, of τ; accuracy
    "cifar100": (
        CIFAR100, 50_000, 500, Dirichlet(0.1), lambda: resnet18(100), "",
        ((-1, -1.5, -1.5, -1.5, -1), (-1, 0, 0, 0, 0.5), (-2, -1, -1, *_NO_TAU), (47.9, 52.5, 52.4, 52.4, 44.7)),
    ),
    "emnist": (
        EMNIST, 68_000, 340, IID(), emnist_cnn, "340 of the 3,400 clients; a round trains 10 of either.",
        (
            (-1.5, -1.5, -1.5, -1.5, -1), (-1, -2.5, -2.5, -0.5, 0), (-2, -4, -4, *_NO_TAU),
            (85.1, 85.6, 85.5, 85.2, 84.9),
        ),
    ),
    "cifar10": (
        CIFAR10, 50_000, 500, Dirichlet(0.1), lambda: resnet18(10), "",
        ((-1.5, -1.5, -1.5, -1.5, -0.5), (-1, -2, -2, -0.5, 0), (-2, -3, -3, *_NO_TAU), (73.1, 77.4, 78.0, 77.4, 72.8)),
    ),
}  # fmt: skip


def _server(method: str, lr: float, tau: float) -> Optimizer:
    rules: Mapping[str, Callable[[], Optimizer]] = {
        "fedadagrad": lambda: adagrad(lr, beta=0.9, eps=tau),
        "fedadam": lambda: adam(lr, betas=(0.9, 0.99), eps=tau, correct=False),
        "fedyogi": lambda: yogi(lr, betas=(0.9, 0.99), eps=tau),
        "fedavgm": lambda: sgd(lr, momentum=0.9),
        "fedavg": lambda: sgd(lr),
    }
    return rules[method]()


def adaptive() -> Table:
    """Five server optimizers on three tasks, with the published rates of clients and server, and τ."""
    rows = {}
    for task, (of, count, clients, split, model, note, columns) in _ADAPTIVE.items():
        for method, lr, server_lr, tau, accuracy in zip(_METHODS, *columns, strict=True):
            plan = Plan(
                Train(sgd(10.0**lr), epochs=1, batch=20), Mean(), _server(method, 10.0**server_lr, 10.0**tau), 10
            )
            run = _timed(of, count, clients, split, model, plan, note)
            rows[f"{task}-{method}"] = Row(run, {"accuracy": Cell(accuracy)}, of[0])
    return Table(rows, form=".1f")


# 3. FedNova: CIFAR-10 over 16 clients, VGG-11


def vgg11() -> nn.Module:
    """VGG-11 for 32 × 32 images."""
    layers: list[nn.Module] = []
    wide = 3
    for outputs in (64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0):
        layers += [nn.Conv2d(wide, outputs, 3, padding=1), nn.ReLU()] if outputs else [nn.MaxPool2d(2)]
        wide = outputs or wide
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    )


def fednova() -> Table:
    """Two local epochs, batch 32, lr 0.02, weight decay 1e-4, with and without momentum of the clients."""
    rows = {}
    values = {"fedavg": (62.35, 1.33), "fednova": (67.04, 0.94)}, {"fedavg": (70.78, NONE), "fednova": (73.01, NONE)}
    for momentum, published in zip((0.0, 0.9), values, strict=True):
        for method, (value, sd) in published.items():
            correction = Normalised() if method == "fednova" else None
            optimizer = sgd(0.02, momentum=momentum, weight_decay=1e-4)
            plan = Plan(Train(optimizer, epochs=2, batch=32, correction=correction), Mean())
            note = "A tenth of the 50,000 rows: a round of the whole set takes ten times as long."
            run = _timed(CIFAR10, 5_000, 16, Dirichlet(0.1), vgg11, plan, note)
            name = f"{method}{'-momentum' if momentum else ''}"
            rows[name] = Row(run, {"accuracy": Cell(value, sd)}, "CIFAR-10")
    return Table(rows, form=".1f")
