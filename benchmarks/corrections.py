"""CPU time of a round with a correction, relative to federated averaging, by backend.

    python benchmarks/corrections.py [--rounds 5] [--models mlp,cnn] [--numerics fused,compiled,lanes,loop]

A cohort of 30 clients with 60 rows each, batch 10, one epoch. The plans take turns; the value is the median of the
process CPU time of each plan, divided by that of `fedavg`.
"""

import argparse
import statistics
import time
from dataclasses import replace

import torch

import atoll
from atoll import models, recipes
from atoll.base.random import Key
from atoll.compute.buffer_pool import BufferPool, use_pool
from atoll.compute.task import Task
from atoll.data import ArrayRows, Clients
from atoll.engine.client_state import Memory
from atoll.engine.inprocess import InProcessEngine
from atoll.plan.optimizer.rules import sgd
from atoll.plan.round import bind, step
from atoll.plan.state import State

CLIENTS, ROWS, OWN = 30, 60, "fc2.*"


def data():
    """Thirty clients with 60 images of 28 × 28 pixels each, in ten classes."""
    key, n = Key(0), CLIENTS * ROWS
    x = key.fold("x").uniform(n * 784, torch.float32).reshape(n, 1, 28, 28)
    ends = torch.arange(CLIENTS + 1) * ROWS
    rows = ArrayRows(x, key.fold("y").integers(n, 10))
    return Clients("images", rows, torch.arange(n), ends, None, "classification", tuple("0123456789"), (1, 28, 28))


def plans():
    """The plans by name."""
    fedavg = recipes.fedavg(0.05)
    momentum = replace(fedavg, local=replace(fedavg.local, optimizer=sgd(0.05, momentum=0.9)))
    return {
        "fedavg": fedavg,
        "fedprox": recipes.fedprox(0.05, mu=0.1),
        "momentum": momentum,
        "scaffold": recipes.scaffold(0.05),
        "feddyn": recipes.feddyn(0.05, alpha=0.1),
        "fednova": recipes.fednova(0.05),
        "fedexp": recipes.fedexp(0.05),
        "own": replace(fedavg, local=replace(fedavg.local, own=(OWN,))),
        "ditto": recipes.ditto(0.05, lam=0.1),
    }


def measured(model, numerics, rounds):
    """The median CPU seconds of a round of each plan."""
    clients, times = data(), {}
    runs = {}
    for name, plan in plans().items():
        module = models.build(model, (1, 28, 28), 10, "classification", Key(1))
        task = replace(Task.of(module, "cross_entropy", (), torch.float32), numerics=numerics)
        engine = InProcessEngine(task, clients)
        state = State.first(plan, task, 0, Memory(plan.memory(task)))
        runs[name] = [bind(plan, engine), state, engine, BufferPool()]
        times[name] = []
    for _ in range(rounds + 1):
        for name, run in runs.items():
            start = time.process_time()
            with use_pool(run[3]):  # as a training does
                run[1], _ = step(run[0], run[1], run[2])
            times[name].append(time.process_time() - start)
    return {name: statistics.median(each[1:]) for name, each in times.items()}


def main():
    """Print one line for each model and backend."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", default="mlp,cnn")
    parser.add_argument("--numerics", default="fused,compiled,lanes,loop")
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"atoll {atoll.__version__}, torch {torch.__version__}: CPU time of a round relative to fedavg")
    for model in given.models.split(","):
        for numerics in given.numerics.split(","):
            found = measured(model, numerics, given.rounds)
            base = found.pop("fedavg")
            relative = "  ".join(f"{name} {value / base:.2f}" for name, value in found.items())
            print(f"{model:4} {numerics:8} fedavg {base * 1e3:6.1f} ms  {relative}", flush=True)


if __name__ == "__main__":
    main()
