"""Time to accuracy over a slow link: FedAvg with compression in both directions and plain, on a virtual clock.

    python benchmarks/links.py [--target 0.85] [--clients 100] [--cohort 100] [--lr 0.1] [--limit 400]

The cohort shares the server's link; a client computes 0.2 s per round. The run uses 100 Mb/s. If a round waits for all
clients, other links change only the clock, so their results follow from the bytes of the same rounds:

    seconds = Σ over rounds of (bytes down + bytes up) / rate + 0.2
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

import atoll
from atoll.base.grammar import parse
from atoll.engine.inprocess import InProcessEngine
from atoll.engine.simulation.fleet import Fleet, rate
from atoll.plan.aggregate import Mean
from atoll.plan.local import Train
from atoll.plan.optimizer.rules import sgd
from atoll.plan.plan import Plan
from atoll.plan.registry import PARTS

RATES = ("10 Mb/s", "100 Mb/s", "1 Gb/s", "10 Gb/s")
COMPUTE = 0.2
CODECS = (
    ("Identity()", "Identity()"),
    ("Eden(1)", "Eden(2)"),
    ("ErrorFeedback(TopK(0.02) >> Quantize(8))", "TopK(0.05) >> Quantize(8)"),
)


def cnn() -> nn.Module:
    """Build a model of 80,202 parameters: two 5 × 5 convolutions, each with a pool of 2, and two dense layers."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 10)),
    )


def run(up: str, down: str, data: atoll.data.Clients, options: argparse.Namespace) -> dict:
    """Measure rounds, bytes and seconds until the target."""
    local = Train(sgd(options.lr), steps=options.steps, batch=options.batch, keep=("order",))
    plan = Plan(
        local,
        Mean(),
        sgd(1.0),
        cohort=options.cohort,
        codec=parse(up, PARTS),
        downlink=parse(down, PARTS),
    )
    fleet = Fleet(COMPUTE, server="100 Mb/s")
    training = atoll.rounds(cnn, data, plan, rounds=options.limit, seed=options.seed, fleet=fleet, evaluate_every=0)
    judge = InProcessEngine(training.task, data.held())
    total = {"rounds": 0, "up": 0, "down": 0, "clock": 0.0, "accuracy": 0.0}
    for report in training:
        total["rounds"] += 1
        total["up"] += report.bytes_up
        total["down"] += report.bytes_down
        total["clock"] = report.now
        if report.round % options.every == 0:
            total["accuracy"] = training.evaluate(judge)["accuracy"]
            if options.verbose:
                print(total, flush=True)
            if total["accuracy"] >= options.target:
                break
    return total


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--clients", type=int, default=100)
    ask.add_argument("--cohort", type=int, default=100)
    ask.add_argument("--target", type=float, default=0.6)
    ask.add_argument("--lr", type=float, default=0.1)
    ask.add_argument("--batch", type=int, default=10)
    ask.add_argument("--steps", type=int, default=6)
    ask.add_argument("--limit", type=int, default=400)
    ask.add_argument("--every", type=int, default=2)
    ask.add_argument("--seed", type=int, default=0)
    ask.add_argument("--verbose", action="store_true")
    ask.add_argument("--plans", type=int, nargs="+", default=[0, 1, 2], help="which of the codecs, 0 is plain FedAvg")
    options = ask.parse_args()
    data = atoll.data.load("fashion_mnist").split(options.clients, atoll.data.IID())
    rows = [(up, down, run(up, down, data, options)) for up, down in (CODECS[i] for i in options.plans)]
    print(f"{'up':38}{'down':28}{'rounds':>8}{'MB up':>9}{'MB down':>9}" + "".join(f"{r:>16}" for r in RATES))
    first = None
    for up, down, total in rows:
        seconds = [(total["up"] + total["down"]) / rate(r) + COMPUTE * total["rounds"] for r in RATES]
        first = first or seconds
        cells = "".join(f"{s:9.1f} {f / s:5.1f}x" for s, f in zip(seconds, first, strict=True))
        reached = "" if total["accuracy"] >= options.target else f"  reached {total['accuracy']:.3f} only"
        sent = f"{total['up'] / 1e6:9.1f}{total['down'] / 1e6:9.1f}"
        print(f"{up:38}{down:28}{total['rounds']:8}{sent}{cells}{reached}  clock {total['clock']:.1f} s", flush=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
