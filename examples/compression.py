"""Federated averaging on Fashion-MNIST with updates fifty times smaller and the same accuracy.

    p = x + e,   send C(p),   e⁺ = p − Ĉ(p)          x: the update of a client, e: the error not sent so far

C keeps the largest 6 % of the numbers, rounds them to 4 bits and compresses the result without loss. Each training
runs with and without C: with all clients in every round, and with a tenth of them. A client that does not participate
keeps its error until it does.

    python examples/compression.py                    about two minutes on two idle cores
    python examples/compression.py --rounds 300 --part-rounds 1000 --model mlp --clients 100

Accuracy is the mean over the last tenth of the evaluations on held-out images. Bytes are those of the messages.
"""

import argparse
import time
from dataclasses import replace

import torch
from torch import nn

import atoll
from atoll.base.grammar import parse
from atoll.data import Clients, Dirichlet
from atoll.plan.registry import PARTS
from atoll.plan.schedule import cosine
from atoll.recipes import local_sgd

CODEC = "ErrorFeedback(TopK(0.06) >> Quantize(4, bucket=256) >> Entropy())"


def small() -> nn.Module:
    """784 × 64 × 10, 50,890 numbers."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))


def train(model, data: Clients, plan: atoll.Plan, rounds: int, seed: int) -> tuple[float, int]:
    """Return the final accuracy, and the sum of all bytes from clients to server."""
    looks = max(1, rounds // 30)
    seen, sent = [], 0
    for report in atoll.rounds(model, data, plan, rounds=rounds, evaluate_every=looks, seed=seed):
        sent += report.bytes_up
        if "accuracy" in report.metrics:
            seen.append(report.metrics["accuracy"])
    last = torch.tensor(seen[-max(1, len(seen) // 10) :])
    return float(last.mean()), sent


def main() -> None:
    parser = argparse.ArgumentParser(description="Federated averaging with compressed updates.")
    parser.add_argument("--model", default="small", help="small, or a model name of atoll: mlp, cnn")
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=150, help="with all clients")
    parser.add_argument("--part-rounds", type=int, default=900, help="with a tenth of them")
    parser.add_argument("--steps", type=int, default=4, help="local steps in a round")
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--codec", default=CODEC)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()

    codec = parse(given.codec, PARTS)
    model = small if given.model == "small" else given.model
    data = atoll.data.load("fashion_mnist").split(given.clients, Dirichlet(0.5), seed=given.seed)
    print(f"{given.clients} clients, {given.steps} local steps of {given.batch} rows; {codec!r}\n")
    print("at work  rounds       codec  accuracy  points     MB up   bytes  seconds")
    for share, rounds in ((None, given.rounds), (0.1, given.part_rounds)):
        # A decreasing learning rate: the clients' stored errors are proportional to it, so they decrease too.
        plain = local_sgd(cosine(given.lr, rounds), steps=given.steps, batch=given.batch)
        rows = {}
        for name, plan in {"none": plain, "compressed": replace(plain, codec=codec)}.items():
            start = time.perf_counter()
            accuracy, sent = rows[name] = train(model, data, replace(plan, cohort=share), rounds, given.seed)
            first, whole = rows["none"]
            work, seconds = "all" if share is None else f"{share:.0%}", time.perf_counter() - start
            line = f"{work:>7} {rounds:7} {name:>11} {accuracy:9.2%} {100 * (accuracy - first):+7.2f} {sent / 1e6:9.2f}"
            print(f"{line} {f'1/{whole / sent:.0f}':>7} {seconds:8.1f}", flush=True)


if __name__ == "__main__":
    main()
