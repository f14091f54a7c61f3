"""Time to accuracy on a virtual clock, with and without waiting for slow clients; the clients' training is real.

    python benchmarks/asynchrony.py [--clients 1000] [--cohort 100] [--target 0.9] [--lr 0.3] [--limit 60]

Each client has one half-normal duration. FedAvg waits for all clients. FedAvg with over-selection starts 1.3 times
the number of clients and keeps the first. FedBuff(10) makes a step at every tenth arrival. The program prints the
virtual seconds until the target and the updates that arrive per second, and draws accuracy against time. Compared with
not waiting, waiting for the first 100 of 130 costs a factor of 1.49 in updates per second, whichever clients are slow.
FedBuff gains more than this factor, because it makes more steps from the same updates.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import atoll
from atoll.engine.inprocess import InProcessEngine
from atoll.engine.simulation.fleet import Fleet, HalfNormal
from atoll.plan.aggregate import Mean
from atoll.plan.local import Train
from atoll.plan.optimizer.rules import sgd
from atoll.plan.pace import Buffered, Sync
from atoll.plan.plan import Plan


def curve(plan: Plan, data: atoll.data.Clients, model: str, seed: int, target: float, limit: float) -> list:
    """Return (virtual seconds, accuracy, updates arrived) of each evaluation, up to target or limit."""
    looks = max(1, 20 // getattr(plan.pace, "k", 20))
    training = atoll.rounds(model, data, plan, rounds=10**6, seed=seed, fleet=Fleet(HalfNormal()), evaluate_every=0)
    judge = InProcessEngine(training.task, data.held())
    points: list = []
    arrived = 0
    for report in training:
        arrived += report.arrived
        if report.round % looks == 0:
            points.append((report.now, training.evaluate(judge)["accuracy"], arrived))
            if points[-1][1] >= target or report.now > limit:
                break
    return points


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--data", default="digits")
    ask.add_argument("--model", default="softmax")
    ask.add_argument("--clients", type=int, default=140)
    ask.add_argument("--cohort", type=int, default=100)
    ask.add_argument("--target", type=float, default=0.93)
    ask.add_argument("--lr", type=float, default=0.1)
    ask.add_argument("--batch", type=int, default=10)
    ask.add_argument("--server-lr", type=float, default=1.0, help="of FedBuff; FedAvg's is 1")
    ask.add_argument("--seeds", type=int, default=3)
    ask.add_argument("--limit", type=float, default=200.0)
    ask.add_argument("--out", type=Path, default=None, help="file of the figure")
    options = ask.parse_args()
    data = atoll.data.load(options.data).split(options.clients)
    local = Train(sgd(options.lr), epochs=1, batch=options.batch)

    def plan(pace, lr=1.0):
        return Plan(local, Mean(), sgd(lr), cohort=options.cohort, pace=pace)

    plans = {
        "FedAvg": plan(Sync()),
        "FedAvg, 1.3 asked": plan(Sync(over_select=1.3)),
        "FedBuff(10)": plan(Buffered(10), options.server_lr),
    }
    print(f"{'':20}{'seconds to ' + str(options.target):>20}{'FedAvg / it':>14}{'updates/s':>12}")
    curves, first = {}, 0.0
    for name, each in plans.items():
        runs = [curve(each, data, options.model, seed, options.target, options.limit) for seed in range(options.seeds)]
        times = sorted(run[-1][0] for run in runs)
        median = times[len(times) // 2]
        first = first or median
        curves[name] = runs[0]
        rate = sorted(run[-1][2] / run[-1][0] for run in runs)[len(runs) // 2]
        reached = "" if all(run[-1][1] >= options.target for run in runs) else "  (not reached)"
        print(f"{name:20}{median:20.2f}{first / median:14.2f}{rate:12.1f}{reached}", flush=True)
    if options.out:
        import matplotlib.pyplot as plt

        for name, points in curves.items():
            plt.plot(*list(zip(*points, strict=True))[:2], label=name)
        plt.xlabel("seconds on the clock")
        plt.ylabel("accuracy on held-out rows")
        plt.legend()
        plt.savefig(options.out, dpi=120)


if __name__ == "__main__":
    main()
