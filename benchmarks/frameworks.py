"""Seconds per round of atoll, of a bare PyTorch loop and of other frameworks, in turns, in one run.

    python benchmarks/frameworks.py                                      atoll and the bare loop
    python benchmarks/frameworks.py --fedjax ENV/bin/python --pfl ENV/bin/python --flower ENV/bin/python
    python benchmarks/frameworks.py --models mlp --rounds 9 --out frameworks.png
    python benchmarks/frameworks.py --before ENV/bin/python --rounds 9   also another version of atoll, and the ratio

Each framework runs in a process of its own, with the Python of its own environment (fedjax 0.0.17 with jax < 0.5; pfl
0.6; flwr[simulation] 1.41), on one workload: Fashion-MNIST divided among 1,000 clients of 60 images. In a round 100
clients train one epoch of SGD, batch 10, lr .05. Only one process computes at a time. Two rounds of each warm up. Then
the processes take turns of several rounds, as in a training. With `--turn 1` a turn is one round: before it the core
was idle, and the caches hold the data of other processes. The table has medians, the ratio to atoll, the accuracy on
held-out images after the last round, the seconds to an accuracy, from the number of rounds that it takes, and the
memory of all processes (proportional shares) after the last round.
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
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import torch

import atoll

HERE = Path(__file__).parent / "peers"
SOURCE = Path(atoll.__file__).parents[1]
BEFORE = "atoll before"
SCRIPTS = {
    "atoll": "ours.py",
    BEFORE: "ours.py",
    "bare loop": "bare.py",
    "FedJAX": "fedjax_peer.py",
    "pfl-research": "pfl_peer.py",
    "Flower": "flower_peer.py",
}


@dataclass
class Peer:
    """A framework in a process of its own."""

    name: str
    python: str
    folder: str
    seconds: list[float] = field(default_factory=list)
    accuracy: dict[int, float] = field(default_factory=dict)  # by rounds made
    memory: float = 0.0

    def __post_init__(self) -> None:
        requests, ask = os.pipe()
        answers, answer = os.pipe()
        script = str(HERE / SCRIPTS[self.name])
        paths = [HERE, SOURCE] if self.name == "atoll" else [HERE]  # the other version is in its own environment
        self.log = open(Path(self.folder) / f"{self.name}.log", "w")  # noqa: SIM115 - as long as the process
        self.process = subprocess.Popen(
            [self.python, script, self.folder, str(requests), str(answer)],
            pass_fds=(requests, answer),
            stdout=self.log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "PYTHONDONTWRITEBYTECODE": "1"},
        )
        os.close(requests), os.close(answer)
        self.requests, self.answers = os.fdopen(ask, "w"), os.fdopen(answers)
        self._answer()

    def _answer(self) -> str:
        line = self.answers.readline().strip()
        if not line:
            self.log.flush()
            tail = Path(self.log.name).read_text()[-2000:]
            raise SystemExit(f"{self.name} has ended:\n{tail}")
        return line

    def _request(self, text: str) -> None:
        self.requests.write(text + "\n")
        self.requests.flush()

    def turn(self, rounds: int, timed: bool) -> None:
        """Run some rounds, then evaluate; the evaluation is not timed."""
        for _ in range(rounds):
            began = time.perf_counter()
            self._request("go")
            self._answer()
            if timed:
                self.seconds.append(time.perf_counter() - began)
        self._request("judge")
        self.accuracy[max(self.accuracy, default=0) + rounds] = float(self._answer())

    def end(self) -> None:
        """Measure the memory, then end the process."""
        family = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        self.memory = sum(p.memory_full_info().pss for p in family) / 2**20
        self._request("end")
        self.process.wait(30)
        for child in family[1:]:
            if child.is_running():
                child.kill()


def written(folder: str, model: str, args: argparse.Namespace) -> None:
    """The workload, the same for every framework."""
    data = atoll.data.load(args.data)
    clients = data.split(args.clients, atoll.data.IID())
    x, y = (t.numpy() for t in clients.rows.take(torch.arange(len(clients.rows))))
    held = clients.held()
    held_x, held_y = (t.numpy() for t in held.take(held.order))
    images = [np.rint(a.reshape(-1, 28, 28) * 255).astype(np.uint8) for a in (x, held_x)]
    np.savez(
        Path(folder) / "data.npz",
        x=images[0],
        held_x=images[1],
        y=y.astype(np.uint8),
        held_y=held_y.astype(np.uint8),
        order=clients.order.numpy(),
        offsets=clients.offsets.numpy(),
    )
    work = {"model": model, "cohort": args.cohort, "batch": 10, "lr": 0.05, "rounds": args.rounds + 2}
    work["numerics"] = args.numerics
    (Path(folder) / "work.json").write_text(json.dumps(work))


def compared(model: str, pythons: dict[str, str], args: argparse.Namespace) -> list[Peer]:
    """Run all frameworks on one model, in turns."""
    with tempfile.TemporaryDirectory() as folder:
        written(folder, model, args)
        peers: list[Peer] = []
        try:
            peers.extend(Peer(name, python, folder) for name, python in pythons.items())
            turns = [2, *(min(args.turn, args.rounds - i) for i in range(0, args.rounds, args.turn))]
            for number, rounds in enumerate(turns):
                for peer in peers:
                    peer.turn(rounds, timed=number > 0)
            for peer in peers:
                peer.end()
        finally:
            for peer in peers:
                peer.process.kill()
    return peers


def printed(model: str, peers: list[Peer], target: float) -> None:
    """Print the table of one model."""
    ours = statistics.median(peers[0].seconds)
    for peer in peers:
        median = statistics.median(peer.seconds)
        reached = next((rounds for rounds, a in peer.accuracy.items() if a >= target), None)
        last = peer.accuracy[max(peer.accuracy)]
        until = f"{reached * median:10.2f}" if reached else f"{'–':>10}"
        print(
            f"{model:8} {peer.name:14}{median:10.4f}{median / ours:9.2f}x{last:10.4f}{until}{peer.memory:10.0f}",
            flush=True,
        )
    before = next((peer for peer in peers if peer.name == BEFORE), None)
    if before is not None:
        print(f"{model:8} after / before: {ours / statistics.median(before.seconds):.3f}", flush=True)


def drawn(tables: dict[str, list[Peer]], out: Path) -> None:
    """Draw the seconds per round, one group of bars for each model."""
    import matplotlib.pyplot as plt

    names = [peer.name for peer in next(iter(tables.values()))]
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for i, name in enumerate(names):
        places = [j + 0.8 * i / len(names) for j in range(len(tables))]
        heights = [statistics.median(peers[i].seconds) for peers in tables.values()]
        axes.bar_label(axes.bar(places, heights, 0.75 / len(names), label=name), fmt="%.2g", fontsize=7)
    axes.set(yscale="log", ylabel="seconds a round", title="1,000 clients of 60 images, 100 a round, one epoch")
    axes.set_xticks([j + 0.4 - 0.4 / len(names) for j in range(len(tables))], list(tables))
    axes.legend(fontsize=8)
    figure.savefig(out, dpi=150)


def main() -> None:
    """Read the options and print the tables."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--models", nargs="+", default=["softmax", "mlp", "cnn"])
    ask.add_argument("--rounds", type=int, default=5, help="timed rounds of each, after two that warm up")
    ask.add_argument("--turn", type=int, default=4, help="rounds that a framework makes one after the other")
    ask.add_argument("--data", default="fashion_mnist", help="or mnist, which has the same shapes")
    ask.add_argument("--clients", type=int, default=1000)
    ask.add_argument("--cohort", type=int, default=100)
    ask.add_argument("--numerics", default="compiled", help="of atoll: what auto takes for a run of some 100 rounds")
    ask.add_argument("--target", type=float, default=0.7, help="accuracy")
    for name in ("fedjax", "pfl", "flower"):
        ask.add_argument(f"--{name}", metavar="PYTHON", help=f"of an environment that has {name}")
    ask.add_argument("--before", metavar="PYTHON", help="of an environment that has another version of atoll")
    ask.add_argument("--out", type=Path, help="where to draw")
    args = ask.parse_args()
    given = {BEFORE: args.before, "FedJAX": args.fedjax, "pfl-research": args.pfl, "Flower": args.flower}
    pythons = {"atoll": sys.executable, "bare loop": sys.executable} | {n: p for n, p in given.items() if p}
    print(f"{'':23}{'s/round':>10}{'of ours':>10}{'accuracy':>10}{f's to {args.target}':>10}{'MB':>10}")
    tables = {}
    for model in args.models:
        tables[model] = compared(model, pythons, args)
        printed(model, tables[model], args.target)
    if args.out:
        drawn(tables, args.out)


if __name__ == "__main__":
    main()
