"""Seconds per round for many kinds of models and federations: atoll and a bare PyTorch loop, in turns, medians.

    python benchmarks/shapes.py                                      every row, some minutes
    python benchmarks/shapes.py --only lstm cohort --rounds 9        rows by prefix of their names
    python benchmarks/shapes.py --only transformer --numerics loop --threads 1

In each row of the table both programs train the same clients with the same number of rows, batches and threads, by
SGD, without evaluation. The bare loop has the data as floats in memory. Rounds alternate; two of each are warm-up.
Ratios below 0.95 are marked.

ragged   1,000 clients of 600 / rank rows, at least 1; 100 of them per round
batch    1,000 clients of 60 images of Fashion-MNIST, 20 of them per round; all other rows use batch 10
cohort   the same clients
cifar    noise of 3 × 32 × 32, clients of 50; four convolutions and two dense layers, 1.6 million parameters
others   models that are not a plain stack: tokens for the transformers and the LSTM, images for the rest
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch
from bare import Bare, images, seconds
from torch import Tensor, nn

import atoll
from atoll import models, recipes
from atoll.base.random import Key, global_scope
from atoll.data import Clients
from atoll.data.clients import offsets_of

LR, LEAST = 0.05, 0.95
VOCAB, LENGTH = 65, 32
KEY = Key(0).fold("shapes")


@dataclass(frozen=True)
class Shape:
    """One row of the table.

    Args:
        name: name of the row.
        data: the clients.
        model: builds a new model, equal each time.
        batch: rows in a batch.
        cohort: clients per round.
    """

    name: str
    data: Callable[[], Clients]
    model: Callable[[Clients], nn.Module]
    batch: int = 10
    cohort: int = 100


# Federations


@lru_cache(1)
def clothes() -> Clients:
    """1,000 clients of 60 images."""
    return images().split(1000, atoll.data.IID())


@lru_cache(1)
def ragged() -> Clients:
    """1,000 clients of 600 / rank images, at least 1."""
    sizes = (600 // torch.arange(1, 1001)).clamp(min=1)[KEY.fold("ranks").permutation(1000)]
    return replace(clothes(), order=clothes().order[: int(sizes.sum())], offsets=offsets_of(sizes))


@lru_cache(1)
def pictures() -> Clients:
    """20 clients of 50 images in color, noise."""
    noise = KEY.fold("pictures").uniform(20 * 50 * 3 * 32 * 32).mul(256).to(torch.uint8)
    labels = torch.arange(20 * 50) % 10
    return atoll.data.arrays(noise.view(-1, 3, 32, 32), labels).split(20, atoll.data.IID(), held_out=0.0)


@lru_cache(1)
def texts() -> Clients:
    """100 clients of 20 texts, noise: at each position the model predicts the next letter."""
    letters = KEY.fold("texts").uniform(100 * 20 * (LENGTH + 1)).mul(VOCAB).long().view(-1, LENGTH + 1)
    return atoll.data.arrays(letters[:, :-1], letters[:, 1:]).split(100, atoll.data.IID(), held_out=0.0)


# Models


def named(name: str, data: Clients) -> nn.Module:
    """Build a model of atoll by name."""
    if data.vocab is not None:
        return models.build(name, data.features, VOCAB, "tokens", KEY.fold("model"), vocab=VOCAB)
    return models.build(name, data.features, 10, "classification", KEY.fold("model"))


def drawn(make: Callable[[], nn.Module], data: Clients) -> nn.Module:
    """Build the user's own model under a key."""
    with global_scope(KEY.fold("model")):
        return make()


def four_convolutions(drop: float) -> nn.Module:
    """The usual small network for CIFAR-10: 1,642,666 parameters."""

    def pair(inputs: int, outputs: int) -> list[nn.Module]:
        first, second = nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, padding=1)
        thin = [nn.Dropout(drop)] if drop else []
        return [first, nn.ReLU(), second, nn.ReLU(), nn.MaxPool2d(2), *thin]

    head = [nn.Flatten(), nn.Linear(64 * 8 * 8, 384), nn.ReLU(), nn.Linear(384, 10)]
    return nn.Sequential(*pair(3, 32), *pair(32, 64), *head)


def normed_dense() -> nn.Module:
    """Build dense layers with batch norm."""
    hidden = nn.Linear(784, 200), nn.BatchNorm1d(200), nn.ReLU()
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(200, 10))


def normed_maps() -> nn.Module:
    """Build convolutions with batch norm."""
    first = nn.Conv2d(1, 16, 5), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)
    second = nn.Conv2d(16, 32, 5), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 10))


class Encoder(nn.Module):
    """A transformer of torch's own layers with their defaults: attention without a mask, dropout in every layer."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(64, 4, 256, batch_first=True)
        self.embed, self.place = nn.Embedding(VOCAB, 64), nn.Parameter(torch.zeros(LENGTH, 64))
        self.layers, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(64, VOCAB)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.layers(self.embed(x) + self.place))
        return out


class Stubborn(nn.Module):
    """A model with data-dependent control flow, which vmap does not support."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(784, 200), nn.Linear(200, 200), nn.Linear(200, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1)).relu()
        for _ in range(1 + int(x.mean().item() > 0.1)):
            x = self.second(x).relu()
        out: Tensor = self.last(x)
        return out


# The table


def shapes() -> Iterator[Shape]:
    """Return the rows of the table."""
    mlp, softmax = partial(named, "mlp"), partial(named, "softmax")
    yield Shape("ragged mlp", ragged, mlp)
    yield Shape("ragged cnn", ragged, partial(named, "cnn"))
    for batch in (1, 10, 32, 100):
        yield Shape(f"batch {batch} softmax", clothes, softmax, batch, 20)
        yield Shape(f"batch {batch} mlp", clothes, mlp, batch, 20)
    for cohort in (1, 10, 100, 1000):
        yield Shape(f"cohort {cohort} softmax", clothes, softmax, cohort=cohort)
        yield Shape(f"cohort {cohort} mlp", clothes, mlp, cohort=cohort)
    for drop in (0.0, 0.25):
        make = partial(four_convolutions, drop)
        yield Shape("cifar dropout" if drop else "cifar", pictures, partial(drawn, make), cohort=2)
    yield Shape("transformer", texts, partial(named, "transformer"), cohort=5)
    yield Shape("transformer of torch", texts, partial(drawn, Encoder), cohort=10)
    yield Shape("lstm", texts, partial(named, "lstm"), cohort=4)
    yield Shape("batch norm mlp", clothes, partial(drawn, normed_dense), cohort=20)
    yield Shape("batch norm cnn", clothes, partial(drawn, normed_maps), cohort=20)
    yield Shape("dropout cnn", clothes, partial(named, "pfl-cnn"), cohort=4)
    yield Shape("no vmap", clothes, partial(drawn, Stubborn), cohort=20)


def compare(shape: Shape, options: argparse.Namespace) -> float:
    """Print one line of the table; return the ratio."""
    data = shape.data()
    plan = recipes.fedavg(LR, batch=shape.batch, cohort=shape.cohort)
    rounds = options.rounds + 2
    ours = atoll.rounds(
        shape.model(data), data, plan, rounds=rounds, evaluate_every=0, numerics=options.numerics, chunk=options.chunk
    )
    bare, pairs = Bare(shape.model(data), data, LR, shape.batch), []
    for _ in range(rounds):
        cohorts: list[Tensor] = []
        mine = seconds(lambda cohorts=cohorts: cohorts.append(ours.next().clients["id"]))
        pairs.append((mine, seconds(partial(bare.round, cohorts[0].tolist()))))
    mine, theirs = ([statistics.median(c) for c in zip(*side, strict=True)] for side in zip(*pairs[2:], strict=True))
    ratio = theirs[0] / mine[0]
    mark = "" if ratio >= LEAST else "  slower"
    print(
        f"{shape.name:22s}{ours.task.layout.d:10,d}  {ours.task.numerics:6s} {mine[0]:9.4f} {theirs[0]:9.4f}"
        f" {ratio:7.2f}x {mine[1]:9.4f} {theirs[1]:9.4f} {theirs[1] / mine[1]:7.2f}x{mark}",
        flush=True,
    )
    return ratio


def main() -> None:
    """Read the options, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], metavar="ROW", help="prefixes of the names of rows")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each")
    parser.add_argument("--numerics", default="auto")
    parser.add_argument("--chunk", type=int)
    parser.add_argument("--threads", type=int, help="torch threads; default: torch's choice")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    print(" " * 22 + "parameters  body    atoll [s]  bare [s]   ratio   atoll and bare of CPU [s]")
    rows = [shape for shape in shapes() if shape.name.startswith(tuple(options.only))]
    ratios = [compare(shape, options) for shape in rows]
    slower = sum(ratio < LEAST for ratio in ratios)
    print(f"{len(rows)} rows, {slower} of them below {LEAST}x")


if __name__ == "__main__":
    main()
