"""Accuracy of private runs by ε: a table of medians over seeds, and a plot.

    python benchmarks/privacy.py [--clients 1000] [--seeds 5] [--rounds 60] [--plot privacy.svg]

The digits are split evenly among the clients, the model is softmax, and the plan is `dp_fedavg(0.5, clip=0.5, q=0.1)`.
The noise is the least with which all rounds cost ε at δ = 1e-5. A last row has no noise.

    1,000 clients    ε 8, 3, 1 and no noise
    100 clients      ε 1: the cost of a small federation
"""

from __future__ import annotations

import argparse
import math
import statistics
from dataclasses import replace
from pathlib import Path

import atoll
from atoll.data import IID, Clients
from atoll.plan.codec import Clip
from atoll.plan.plan import Plan
from atoll.recipes import dp_fedavg
from atoll.report.chart import Axis, Drawing, Panel, Series
from atoll.report.svg import svg

DELTA = 1e-5


def plan_of(epsilon: float, clients: int, rounds: int) -> Plan:
    """The plan whose rounds cost ε; without noise if ε is infinite."""
    plan = dp_fedavg(0.5, clip=0.5, q=0.1)
    if math.isinf(epsilon):
        return replace(plan, codec=Clip(0.5))
    z = atoll.privacy.noise_for(plan, clients=clients, rounds=rounds, delta=DELTA, epsilon=epsilon)
    return dp_fedavg(0.5, clip=0.5, noise=z, q=0.1)


def accuracies(data: Clients, plan: Plan, rounds: int, seeds: int) -> list[float]:
    """The accuracy after the last round, for each seed."""
    found = []
    for seed in range(seeds):
        run = atoll.train("softmax", data, plan, rounds=rounds, seed=seed, out=None, evaluate_every=rounds)
        found.append(float(run.reports[-1].metrics["accuracy"]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--plot", type=Path)
    given = parser.parse_args()
    rows = [(given.clients, epsilon) for epsilon in (math.inf, 8.0, 3.0, 1.0)] + [(100, math.inf), (100, 1.0)]
    medians = {}
    print(f"{'clients':>8} {'ε':>5} {'median':>8} {'least':>8} {'most':>8}")
    for clients, epsilon in rows:
        data = atoll.data.load("digits").split(clients, IID(), min_rows=1)
        found = accuracies(data, plan_of(epsilon, clients, given.rounds), given.rounds, given.seeds)
        medians[clients, epsilon] = statistics.median(found)
        print(
            f"{clients:>8} {epsilon:>5g} {medians[clients, epsilon]:>8.4f} {min(found):>8.4f} {max(found):>8.4f}",
            flush=True,
        )
    if given.plot:
        finite = [(e, m) for (n, e), m in medians.items() if n == given.clients and math.isfinite(e)]
        line = Series([e for e, _ in finite], [m for _, m in finite], "s0", f"{given.clients} clients")
        panel = Panel([line], "Accuracy by ε", "", Axis("ε", log=True), Axis())
        given.plot.write_text(svg(Drawing("privacy", "Accuracy by ε of private runs.", [[panel]], True, 0.5)))


if __name__ == "__main__":
    main()
