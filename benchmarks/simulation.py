"""Seconds per round on one machine: atoll and a bare PyTorch loop, in turns, medians.

    python benchmarks/simulation.py                                    softmax, mlp and cnn, 5 rounds each
    python benchmarks/simulation.py --models mlp --rounds 20 --threads 2
    python benchmarks/simulation.py --rows ragged --cohort 1000      ragged clients, another cohort
    python benchmarks/simulation.py --accuracy 30                      accuracy of both after 30 rounds as well

Fashion-MNIST on 1,000 clients of 60 images; 100 of them per round make one epoch of SGD, batch 10, lr 0.05. The bare
loop is a typical manual implementation: one module, one optimizer, client after client, the images as floats in
memory. The table also shows the minimal arithmetic and memory traffic of a round, as fractions of the rates that this
machine reaches in the same run for large matrix products and for copies of a large array.
"""

from __future__ import annotations

import argparse
import statistics

import torch
from bare import Bare, accuracy, images, seconds
from torch import Tensor, nn

import atoll
from atoll import models, recipes
from atoll.base.random import Key
from atoll.data import Clients

LR, BATCH = 0.05, 10


def dataset(clients: int, rows: str) -> Clients:
    """Return the images in equal shares, or in very different sizes."""
    return images().split(clients, atoll.data.IID() if rows == "equal" else atoll.data.Quantity(0.8))


def limits() -> tuple[float, float]:
    """Measure this machine: FLOP/s of a large matrix product, bytes/s of a copy."""
    a, b = torch.randn(2, 1024, 1024)
    product = min(seconds(lambda: a @ b)[0] for _ in range(10))
    source, target = torch.empty(2, 1 << 24).fill_(1.0)
    copy = min(seconds(lambda: target.copy_(source))[0] for _ in range(5))
    return 2 * 1024**3 / product, 2 * source.nbytes / copy


def work_of(module: nn.Module, x: Tensor) -> float:
    """Count multiplications and additions of one row, forward and backward; the model's input has no gradient."""
    total, first = 0.0, True

    def count(layer: nn.Module, given: tuple[Tensor], out: Tensor) -> None:
        nonlocal total, first
        weight = layer.weight
        assert isinstance(weight, Tensor)
        total += 2.0 * weight.numel() * (out[0].numel() / weight.shape[0]) * (2 if first else 3)
        first = False

    hooks = [m.register_forward_hook(count) for m in module.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    with torch.no_grad():
        module(x[:1])
    for hook in hooks:
        hook.remove()
    return total


def compare(name: str, data: Clients, options: argparse.Namespace) -> None:
    """Print the table's line for one model."""

    def fresh() -> nn.Module:
        return models.build(name, data.features, 10, "classification", Key(0).fold("model"))

    plan = recipes.fedavg(LR, batch=BATCH, cohort=options.cohort)
    rounds = 1 + max(options.rounds, options.accuracy)
    ours = atoll.rounds(
        fresh(), data, plan, rounds=rounds, evaluate_every=0, numerics=options.numerics, chunk=options.chunk
    )
    bare = Bare(fresh(), data, LR, BATCH)

    def theirs_next() -> None:
        bare.round(bare.drawn(options.cohort))

    ours.next(), theirs_next()  # the first round of both warms up
    pairs = [(seconds(ours.next), seconds(theirs_next)) for _ in range(options.rounds)]
    mine, theirs = ([statistics.median(c) for c in zip(*side, strict=True)] for side in zip(*pairs, strict=True))
    flops, stream = limits()
    rows = BATCH * -(-float(data.sizes.double().mean()) // BATCH) * options.cohort
    theta = 4.0 * ours.task.layout.d
    arithmetic = rows * work_of(bare.module, bare.x) / flops
    memory = (rows / BATCH * 3 * theta + 4 * theta * options.cohort) / stream
    print(
        f"{name:8s} {ours.task.numerics:6s} {mine[0]:9.4f} {theirs[0]:9.4f} {theirs[0] / mine[0]:8.2f}x"
        f" {theirs[1] / mine[1]:8.2f}x {arithmetic / mine[0]:10.0%} {memory / mine[0]:8.0%}",
        flush=True,
    )
    if options.accuracy:
        for _ in range(options.accuracy - options.rounds - 1):
            ours.next(), theirs_next()
        print(f"{'':8s} after {ours.state.round} rounds: {accuracy(ours.model, data):.4f} and {bare.accuracy():.4f}")


def main() -> None:
    """Read the options, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["softmax", "mlp", "cnn"])
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each")
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--cohort", type=int, default=100)
    parser.add_argument("--rows", choices=["equal", "ragged"], default="equal")
    parser.add_argument("--numerics", default="auto")
    parser.add_argument("--chunk", type=int)
    parser.add_argument("--threads", type=int, help="torch threads; default: torch's choice")
    parser.add_argument("--accuracy", type=int, default=0, metavar="ROUNDS")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    data = dataset(options.clients, options.rows)
    flops, stream = limits()
    print(f"{data}, cohort {options.cohort}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"this machine now: {flops / 1e9:.0f} GFLOP/s, {stream / 1e9:.1f} GB/s copied")
    print("model    body    atoll [s]  bare [s]    ratio  of CPU [s]  arithmetic   memory")
    for name in options.models:
        compare(name, data, options)


if __name__ == "__main__":
    main()
