"""nanoGPT's benchmark, a transformer on tiny Shakespeare, trained with frequent and with rare communication.

    data-parallel    every worker sends the gradient of its share of the batch in every iteration; the server: AdamW
    local SGD        every worker makes H local steps of AdamW; the server: the mean of the models
    DiLoCo, 8 bits   the same steps; a worker sends its update in 8 bits per number; the server: Nesterov momentum

All three read the same number of characters: `--batch` windows of `--block` characters in each of `--iterations`
iterations. Each iteration is divided evenly among the workers, and so is the text. The model is `transformer`:
4 layers, 4 heads, width 128, no dropout; AdamW, 1e-3 → 1e-4 along a cosine after a warm-up of 100 iterations,
β₂ = 0.99.

    ATOLL_DATA=FOLDER python examples/shakespeare.py             short and small: a demonstration
    ATOLL_DATA=FOLDER python examples/shakespeare.py --full      nanoGPT's setting for a CPU: batch 12, block 64, 2000
                                                                 iterations; its loss on held-out text is 1.88

FOLDER contains tinyshakespeare.txt. The loss is in nats per character, on the last tenth of the text.

Reference: Karpathy, nanoGPT, 2022; Stich, Local SGD Converges Fast and Communicates Little, 2019; Douillard et al.,
DiLoCo: Distributed Low-Communication Training of Language Models, 2023.
"""

import argparse
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import atoll
from atoll.data import Clients
from atoll.data.clients import offsets_of
from atoll.engine.inprocess import InProcessEngine
from atoll.plan.aggregate import Mean
from atoll.plan.codec import Quantize
from atoll.plan.local import Gradient, Train
from atoll.plan.optimizer.rules import adamw, sgd
from atoll.plan.plan import Plan
from atoll.plan.schedule import cosine, warmup

STRIDE = 16  # characters between the starts of two training windows


@dataclass(frozen=True)
class Windows:
    """Rows of a text: x is `block` characters from each start, y the same window one character later, to predict."""

    text: Tensor  # uint8 [N], symbol ids
    starts: Tensor  # int64 [rows]
    block: int

    def __len__(self) -> int:
        return len(self.starts)

    def take(self, index: Tensor) -> tuple[Tensor, Tensor]:
        window = self.text[self.starts[index][..., None] + torch.arange(self.block + 1)].long()
        return window[..., :-1], window[..., 1:]

    def targets(self) -> Tensor:
        return self.take(torch.arange(len(self)))[1]


def shakespeare(file: Path, workers: int, block: int, every: int = 1) -> Clients:
    """Cut the text into windows: the first nine tenths go evenly to the workers, every `every`-th other is held out."""
    raw = file.read_text(encoding="ascii")
    symbols = sorted(set(raw))
    number = {s: i for i, s in enumerate(symbols)}
    text = torch.tensor([number[s] for s in raw], dtype=torch.uint8)
    cut = int(0.9 * len(text))
    starts, held = torch.arange(0, cut - block, STRIDE), torch.arange(cut, len(text) - block, block * every)
    each = len(starts) // workers
    order, offsets = torch.arange(each * workers), offsets_of(torch.full((workers,), each))
    rows, judged = Windows(text, starts, block), Windows(text, held, block)
    return Clients("tiny Shakespeare", rows, order, offsets, judged, "tokens", tuple(symbols), (block,))


def plans(share: int, iterations: int, steps: int) -> dict[str, tuple[Plan, int]]:
    """Return the three plans, each with the number of iterations in one of its rounds."""

    def adam(every: int) -> adamw:
        """Return AdamW with nanoGPT's schedule, for rounds of `every` iterations."""
        rise = min(100, iterations // 4)
        fall = cosine(1e-3, rounds=max(1, (iterations - rise) // every), end=1e-4)
        return adamw(warmup(max(1, rise // every)) >> fall, betas=(0.9, 0.99), weight_decay=0.1)

    local = Train(adam(steps), steps=steps, batch=share, keep=("optimizer", "order"))
    outer = sgd(0.7, momentum=0.9, nesterov=True)
    return {
        "data-parallel": (Plan(Gradient(share), Mean(), adam(1)), 1),
        "local SGD": (Plan(local, Mean()), steps),
        "DiLoCo, 8 bits": (Plan(local, Mean(), outer, codec=Quantize(8)), steps),
    }


@dataclass
class Curve:
    """Results of a plan: at some iterations the bytes of one worker and the loss; the last loss on all windows."""

    iterations: list[int]
    sent: list[float]
    received: list[float]
    loss: list[float]
    last: float
    seconds: float


def trained(plan: Plan, every: int, data: Clients, whole: Clients, iterations: int, looks: int, seed: int) -> Curve:
    """Train; evaluate on the held-out windows of `data` about `looks` times, and on those of `whole` at the end."""
    rounds = iterations // every
    settings = {"rounds": rounds, "evaluate_every": max(1, rounds // looks), "metrics": (), "seed": seed}
    training, curve, began = atoll.rounds("transformer", data, plan, **settings), Curve([], [], [], [], 0, 0), 0.0
    began = time.perf_counter()
    for report in training:
        if "held_out_loss" not in report.metrics:
            continue
        curve.iterations.append((report.round + 1) * every)
        curve.sent.append(training.bytes_up / data.count)
        curve.received.append(training.bytes_down / data.count)
        curve.loss.append(report.metrics["held_out_loss"])
        print(f"   {curve.iterations[-1]:5}  {curve.loss[-1]:.4f}", file=sys.stderr, flush=True)
    curve.seconds = time.perf_counter() - began
    curve.last = training.evaluate(InProcessEngine(training.task, whole.held()))["held_out_loss"]
    return curve


def draw(out: str, curves: dict[str, Curve]) -> None:
    """Draw the loss against the bytes sent by a worker, and against iterations."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    by_bytes, by_work = figure.subplots(1, 2, sharey=True)
    for name, curve in curves.items():
        by_bytes.semilogx([b / 1e6 for b in curve.sent], curve.loss, "o-", ms=3, label=name)
        by_work.plot(curve.iterations, curve.loss, "o-", ms=3, label=name)
    by_bytes.set(xlabel="MB sent by a worker", ylabel="loss on held-out text, nats a character")
    by_work.set(xlabel="iterations")
    for panel in (by_bytes, by_work):
        panel.legend(frameon=False, fontsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description="A transformer on tiny Shakespeare: loss against bytes.")
    parser.add_argument("--full", action="store_true", help="nanoGPT's setting for a CPU: 2000 × 12 windows of 64")
    parser.add_argument("--iterations", type=int, help="of --batch windows each [60; 2000]")
    parser.add_argument("--batch", type=int, default=12, help="windows an iteration, shared by the workers [12]")
    parser.add_argument("--block", type=int, help="characters in a window [16; 64]")
    parser.add_argument("--workers", type=int, default=4, help="a divisor of the batch [4]")
    parser.add_argument("--steps", type=int, help="iterations per round, a divisor of --iterations [10; 20]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="shakespeare.png", help="file of the figure")
    args = parser.parse_args()
    iterations, block, steps = (
        given or (full if args.full else small)
        for given, small, full in ((args.iterations, 60, 2000), (args.block, 16, 64), (args.steps, 10, 20))
    )
    if args.batch % args.workers or iterations % steps:
        parser.error("the workers must divide the batch, and --steps the iterations")
    file = Path(os.environ.get("ATOLL_DATA", ".")) / "tinyshakespeare.txt"
    if not file.is_file():
        parser.error(f"{file} does not exist: set ATOLL_DATA to the folder that contains tinyshakespeare.txt")

    # Evaluations during training use some of the held-out windows. The last one uses all of them with --full.
    sparse, looks = ((256 // block, 1), 10) if args.full else ((1024 // block, 16), 5)
    looked, whole = (shakespeare(file, args.workers, block, every) for every in sparse)
    print(f"{args.workers} workers, {iterations} iterations of {args.batch} windows of {block} characters\n")
    curves = {}
    for name, (plan, every) in plans(args.batch // args.workers, iterations, steps).items():
        print(name, file=sys.stderr, flush=True)
        curves[name] = trained(plan, every, looked, whole, iterations, looks, args.seed)
    head = ("loss", "rounds", "MB sent", "MB received", "less sent", "seconds")
    print(f"{'':16}{head[0]:>8}{head[1]:>9}{head[2]:>12}{head[3]:>14}{head[4]:>12}{head[5]:>10}")
    most = curves["data-parallel"].sent[-1]
    for name, curve in curves.items():
        rounds = iterations if name == "data-parallel" else iterations // steps
        sent, received = curve.sent[-1] / 1e6, curve.received[-1] / 1e6
        less = f"{most / curve.sent[-1]:.0f}x"
        print(f"{name:16}{curve.last:8.4f}{rounds:9}{sent:12.1f}{received:14.1f}{less:>12}{curve.seconds:10.0f}")
    draw(args.out, curves)
    print(f"\nBytes are one worker's.  {args.out}")


if __name__ == "__main__":
    main()
