"""Client events and asynchronous steps per second of the training loop, with clients that compute nothing.

    python benchmarks/events.py [--clients 1000] [--cohort 100] [--repeat 5]

An event is a start, an arrival or a drop. The table shows medians of some runs, also for the clock without training.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass

import torch

from atoll.data import arrays
from atoll.engine.simulation.clock import Clock
from atoll.engine.simulation.fleet import Fleet, HalfNormal
from atoll.plan.aggregate import Mean
from atoll.plan.optimizer.rules import sgd
from atoll.plan.pace import Buffered, Sync
from atoll.plan.plan import Plan
from atoll.plan.protocols import Contribution, Local, Pace
from atoll.plan.round import step
from atoll.training.rounds import rounds


@dataclass(frozen=True, repr=False)
class Null(Local):
    """A client that computes nothing: its update is 0."""

    def padded_batch(self, rows):
        return 0

    def contribute(self, broadcast, lanes, memory, key, task):
        update = broadcast.model.theta.new_zeros(len(lanes.ids), broadcast.model.theta.shape[0])
        return Contribution({"update": update}, {}, lanes.rows, {}, {}), {}


def training(pace: Pace, clients: int, cohort: int):
    x, y = torch.zeros(2 * clients, 9), torch.zeros(2 * clients)
    data = arrays(x, y).split(clients, held_out=0.0)
    fleet = Fleet(HalfNormal(), dropout=0.05)
    return rounds("linear", data, Plan(Null(), Mean(), sgd(1.0), cohort=cohort, pace=pace), rounds=10**9, fleet=fleet)


def measure(pace: Pace, clients: int, cohort: int, seconds: float = 1.0) -> tuple[float, float]:
    """Measure events and steps per second."""
    it = training(pace, clients, cohort)
    state, engine, events, steps = it.state, it.engine, 0, 0
    for _ in range(3):
        state, _ = step(it.plan, state, engine)
    began = time.perf_counter()
    while (spent := time.perf_counter() - began) < seconds:
        state, report = step(it.plan, state, engine)
        events += report.cohort + len(report.trips)
        steps += 1
    return events / spent, steps / spent


def clock_alone(clients: int, cohort: int, seconds: float = 1.0) -> float:
    """Measure events per second of the clock, without training steps."""
    clock, number = Clock(Fleet(HalfNormal(), dropout=0.05), torch.full((clients,), 2), 0), cohort
    for i in range(cohort):
        clock.start(i, i, 100, 100)
    began = time.perf_counter()
    while (spent := time.perf_counter() - began) < seconds:
        for _ in range(1000):
            client = clock.next().client
            clock.start(number, client, 100, 100)
            number += 1
        clock.trips()
    return 2 * (number - cohort) / spent


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--clients", type=int, default=1000)
    ask.add_argument("--cohort", type=int, default=100)
    ask.add_argument("--repeat", type=int, default=5)
    options = ask.parse_args()
    rows = {"the clock alone": [(clock_alone(options.clients, options.cohort), 0.0) for _ in range(options.repeat)]}
    for pace in (Buffered(100), Buffered(10), Buffered(1), Sync()):
        rows[repr(pace)] = [measure(pace, options.clients, options.cohort) for _ in range(options.repeat)]
    print(f"{'':18}{'events/s':>12}{'steps/s':>10}")
    for name, runs in rows.items():
        events, steps = (statistics.median(column) for column in zip(*runs, strict=True))
        print(f"{name:18}{events:12,.0f}{steps:10,.0f}")


if __name__ == "__main__":
    main()
