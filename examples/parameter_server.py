"""A parameter server and four workers, one of them five times slower: who waits for whom.

    θ ← θ − lr · g        the server, when the pace says that a round is over
    gᵢ = ∇Jᵢ(θᵢ)          a worker, on its own rows, from the θ that it was last sent

    Sync()        the server waits for everybody: the slow worker sets the pace of all
    Buffered(1)   the server steps at every arrival, the later the smaller; nobody waits
    Bounded(5)    nobody may start more than five times while an older gradient is on its way

The workers are real processes, and arrive when they arrive. What is not real is how long a gradient takes: each worker
stands for a machine of its own, and this one may have fewer cores than workers, so a worker that has computed waits
until its machine would be done, 40 ms or 200 ms after it began. Everything else costs what it costs here.

Each pace is run twice: with the three fast workers alone, and with the slow one beside them. Without waiting, a slow
worker's rows count less: it arrives less often. All hold rows of one kind here, so that costs next to nothing.

    python examples/parameter_server.py --out parameter_server.png
"""

import argparse
import time
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import atoll
from atoll.data import IID, Clients
from atoll.engine import Processes
from atoll.plan.aggregate import Mean
from atoll.plan.local import Gradient
from atoll.plan.optimizer import sgd
from atoll.plan.pace import Bounded, Buffered, Sync
from atoll.plan.plan import Plan
from atoll.plan.protocols import Local

TIMES_S = (0.04, 0.04, 0.04, 0.2)  # a gradient of each worker
FAST = 3
PACES = (Sync(), Buffered(1), Bounded(5))
ROWS, FEATURES = 40_000, 8


@dataclass(frozen=True, repr=False)
class Paced(Local):
    """The gradient, on machines that take so long for it.

    Args:
        times_s: seconds, by worker.
    """

    times_s: tuple[float, ...]

    def padded_batch(self, rows):
        return Gradient().padded_batch(rows)

    def contribute(self, broadcast, lanes, memory, key, task):
        began = time.perf_counter()
        out = Gradient().contribute(broadcast, lanes, memory, key, task)
        due = began + sum(self.times_s[i] for i in lanes.ids.tolist())
        time.sleep(max(0.0, due - time.perf_counter()))
        return out


class Ran(NamedTuple):
    """A training: the seconds at which each round closed, θ after it, and gradients of fast workers a second."""

    seconds: Tensor
    thetas: Tensor
    fast: float


def regression() -> Clients:
    """y = x·a + 1 + noise, dealt evenly to four workers."""
    x, noise = atoll.Key(0).fold("rows").normal(ROWS * (FEATURES + 1)).split([ROWS * FEATURES, ROWS])
    x = x.reshape(ROWS, FEATURES)
    y = x @ torch.linspace(-2, 2, FEATURES, dtype=torch.float64) + 1 + noise
    return atoll.data.arrays(x, y, task="regression").split(len(TIMES_S), IID(), held_out=0)


def least_squares(data: Clients) -> tuple[Tensor, float]:
    """θ* and J(θ*) over the rows of all workers."""
    x, y = data.take(data.order)
    x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)  # the last column is the intercept
    best = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
    return best, float((x @ best - y).square().mean())


def losses(data: Clients, thetas: Tensor) -> Tensor:
    """J of each θ `[n, d]`, over the rows of all workers."""
    x, y = data.take(data.order)
    return torch.stack([(x @ theta[:-1] + theta[-1] - y).square().mean() for theta in thetas])


def run(data: Clients, pace, seconds: float) -> Ran:
    """Train for so many seconds, counted from the end of the first round: by then every worker has imported torch."""
    from parameter_server import Paced  # workers import this file under its name, not as the program that was started

    plan = Plan(Paced(TIMES_S), Mean(), sgd(0.1), pace=pace)
    told = {"dtype": "float64", "numerics": "loop", "evaluate_every": 0, "rounds": 10**6}
    training = atoll.rounds("linear", data, plan, engine=Processes(workers=data.count), **told)
    ends, thetas, fast = [], [], 0
    for report in training:
        ends.append(time.perf_counter())
        thetas.append(training.state.model.theta)
        fast += int((report.clients["id"] < FAST).sum()) if report.round else 0
        if ends[-1] - ends[0] >= seconds:
            training.close()
            break
    return Ran(torch.tensor(ends).sub(ends[0]), torch.stack(thetas), fast / (ends[-1] - ends[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description="A parameter server with one slow worker, under three paces.")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each training")
    parser.add_argument("--out", default="parameter_server.png", help="where the picture goes")
    given = parser.parse_args()

    data = regression()
    best, floor = least_squares(data)
    three = data.only(torch.arange(FAST))
    curves = {}
    print(f"{'':14}fast workers' gradients a second       {'':9}after {given.seconds:g} s beside the slow one")
    print(f"{'pace':14}{'alone':>9}{'beside':>9}{'kept':>8}{'rounds':>19}{'J/J* − 1':>12}{'‖θ − θ*‖/‖θ*‖':>17}")
    for pace in PACES:
        alone, beside = run(three, pace, given.seconds / 2), run(data, pace, given.seconds)
        curves[repr(pace)] = beside.seconds, losses(data, beside.thetas) / floor - 1
        far = float((beside.thetas[-1] - best).norm() / best.norm())
        print(
            f"{pace!r:14}{alone.fast:9.1f}{beside.fast:9.1f}{beside.fast / alone.fast:8.0%}"
            f"{len(beside.thetas):19}{float(curves[repr(pace)][1][-1]):12.1e}{far:17.1e}"
        )
    draw(given.out, curves)
    print(f"\n{given.out}")


def draw(out: str, curves: dict) -> None:
    """How far above least squares the loss is, against seconds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    panel = figure.subplots()
    for (name, (seconds, excess)), style in zip(curves.items(), ("o-", "-", "--"), strict=True):
        panel.semilogy(seconds, excess.clamp(min=1e-12), style, ms=2.5, lw=1.5, label=name)
    panel.set(xlabel="seconds", ylabel="J(θ) / J(θ*) − 1", title="Four workers, one of them five times slower")
    panel.legend(frameon=False)
    panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=150)


if __name__ == "__main__":
    main()
