"""Distributed gradient descent under torchrun, and DistributedDataParallel: seconds per step, and equality of losses.

    python benchmarks/data_parallel.py [--ranks 2] [--repeat 7] [--steps 20] [--check 100]
        [--model 784,1024,1024,1024,10] [--batch 64]           # --model 10: convolutions, 10 classes

The same model, the same rows in every step, plain SGD, gloo, one thread per rank; the programs take turns of some
steps each.
A step of DDP is `zero_grad`, forward, backward, `step`; one of atoll is `atoll.plan.round.step`, report included.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from torch import nn

from atoll.base.random import Key
from atoll.compute.buffer_pool import BufferPool, use_pool
from atoll.compute.task import Task
from atoll.data import arrays
from atoll.engine.client_state import Memory
from atoll.engine.ranks.process_group import ProcessGroup
from atoll.engine.ranks.torchrun import TorchrunEngine
from atoll.plan.round import step
from atoll.plan.state import State
from atoll.recipes import distributed_gd

LR, SEED = 0.05, 0
CYCLE = 128  # the rows of DDP are drawn in advance for this number of steps


def model(widths: list[int]) -> nn.Sequential:
    """Build a perceptron with these widths, equal on all ranks; one width n: convolutions with n classes."""
    torch.manual_seed(SEED)
    if len(widths) == 1:
        wide = (3, 32, 64, 128)
        blocks = [m for a, b in pairwise(wide) for m in (nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))]
        head = (nn.Flatten(), nn.Linear(2048, 640), nn.ReLU(), nn.Linear(640, widths[0]))
        return nn.Sequential(nn.Unflatten(1, (3, 32, 32)), *blocks, *head)
    layers = [m for a, b in pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def clients(widths: list[int], ranks: int, batch: int):
    """Return one client per rank, each with 32 batches of rows."""
    n, wide = 32 * batch * ranks, widths[0] if len(widths) > 1 else 3072
    x = Key(1).normal(n * wide, torch.float32).reshape(n, wide)
    y = (x @ Key(2).normal(wide * widths[-1], torch.float32).reshape(wide, -1)).argmax(1)
    return arrays(x, y, task="classification").split(ranks, held_out=0.0)


class Atoll:
    """Steps of atoll, with the float sum or the exact sum."""

    def __init__(self, widths, data, batch: int, ranks: ProcessGroup, sum_: str) -> None:
        task = replace(Task.of(model(widths), "cross_entropy"), numerics="loop")
        self.plan = distributed_gd(LR, batch=batch, sum=sum_)
        self.engine = TorchrunEngine(task, data, ranks=ranks)
        self.state, self.shelf = State.first(self.plan, task, SEED, Memory({})), BufferPool()

    def step(self) -> float:
        with use_pool(self.shelf):  # as in a training
            self.state, report = step(self.plan, self.state, self.engine)
        return report.metrics["loss"]


class Ddp:
    """The usual training loop with DistributedDataParallel."""

    def __init__(self, widths, data, batch: int, ranks: ProcessGroup, view: bool) -> None:
        self.ddp = nn.parallel.DistributedDataParallel(model(widths), gradient_as_bucket_view=view)
        self.optimizer = torch.optim.SGD(self.ddp.parameters(), LR)
        self.ranks, self.t, mine = ranks, 0, data.client_rows(ranks.rank)
        self.rows = []
        for t in range(CYCLE):  # the same rows that atoll draws
            key = Key(SEED).fold("round", t).of(torch.tensor([ranks.rank])).fold("clients", "local").fold("order")
            self.rows.append(mine[key.permutations(torch.tensor([len(mine)]), len(mine))[0, :batch]])
        self.data = data

    def step(self) -> torch.Tensor:
        x, y = self.data.take(self.rows[self.t % CYCLE])
        self.t += 1
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.ddp(x), y)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def mean(self, losses: list[torch.Tensor]) -> list[float]:
        """Average the losses over all ranks; DDP has a separate loss on each rank."""
        return (self.ranks.all_reduce_sum([torch.stack(losses).double()])[0] / self.ranks.size).tolist()


def work(options: argparse.Namespace) -> None:
    """Run the program of one rank."""
    ranks, widths = ProcessGroup.join(), [int(n) for n in options.model.split(",")]
    data = clients(widths, ranks.size, options.batch)
    ways = {
        "DDP": Ddp(widths, data, options.batch, ranks, False),
        "DDP, gradient_as_bucket_view": Ddp(widths, data, options.batch, ranks, True),
        'atoll, sum="float"': Atoll(widths, data, options.batch, ranks, "float"),
        'atoll, sum="exact"': Atoll(widths, data, options.batch, ranks, "exact"),
    }
    losses = {name: [way.step() for _ in range(options.check)] for name, way in ways.items()}
    losses = {n: ways[n].mean(each) if isinstance(ways[n], Ddp) else each for n, each in losses.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.repeat):
        for name, way in ways.items():
            torch.distributed.barrier()
            began = time.perf_counter()
            for _ in range(options.steps):
                way.step()
            seconds[name].append((time.perf_counter() - began) / options.steps)
    if ranks.first:
        Path(options.to).write_text(json.dumps({"seconds": seconds, "losses": losses}))


def table(options: argparse.Namespace, found: dict) -> str:
    """Format the time per step of each program, and the distance of its losses from those of DDP."""
    size = sum(p.numel() for p in model([int(n) for n in options.model.split(",")]).parameters())
    lines = [f"{size:,} parameters, {options.ranks} ranks, {options.batch} rows each, median of {options.repeat} turns"]
    lines += [f"{'':30}{'ms a step':>10}{'beside DDP':>12}{'loss, relative':>16}"]
    first, reference = found["seconds"]["DDP"], found["losses"]["DDP"]
    for name, seconds in found["seconds"].items():
        off = max(abs(a - b) / abs(b) for a, b in zip(found["losses"][name], reference, strict=True))
        ratio = statistics.median(a / b for a, b in zip(seconds, first, strict=True))
        lines.append(f"{name:30}{1e3 * statistics.median(seconds):10.2f}{ratio:12.3f}{off:16.1e}")
    return "\n".join(lines)


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--ranks", type=int, default=2)
    ask.add_argument("--repeat", type=int, default=7)
    ask.add_argument("--steps", type=int, default=20)
    ask.add_argument("--model", default="784,1024,1024,1024,10")
    ask.add_argument("--batch", type=int, default=64)
    ask.add_argument("--check", type=int, default=100, help="steps whose losses are compared, at most 128")
    ask.add_argument("--to", default="")
    options = ask.parse_args()
    if options.to:
        return work(options)
    with tempfile.TemporaryDirectory() as folder:
        to = Path(folder) / "found.json"
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.ranks)]
        words = [__file__, *sys.argv[1:], "--to", str(to)]
        subprocess.run([*start, *words], env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
        print(table(options, json.loads(to.read_text())))


if __name__ == "__main__":
    main()
