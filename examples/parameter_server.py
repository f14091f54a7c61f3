"""A parameter server and four workers, one of them five times slower, with three waiting rules (paces).

    θ ← θ − lr · g        the server, when the pace closes a round
    gᵢ = ∇Jᵢ(θᵢ)          a worker, on its own rows, from the last θ that it received

    Sync()        the server waits for all workers: the slow worker determines the speed of all
    Buffered(1)   the server steps at every arrival; older gradients get smaller steps; no worker waits
    Bounded(5)    no worker may start more than five times while an older gradient is in flight

The workers are real processes with real arrival times. Only the duration of a gradient is simulated, because this
machine may have fewer cores than workers: after its computation a worker sleeps until 40 ms or 200 ms have passed
since it began. All other costs are those of this machine.

Each pace runs twice: with the three fast workers only, and with all four. Without waiting, the rows of the slow
worker have less weight, because its gradients arrive less often. Here all workers have rows of the same distribution,
so the effect is almost zero.

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
from atoll.plan.optimizer.rules import sgd
from atoll.plan.pace import Bounded, Buffered, Sync
from atoll.plan.plan import Plan
from atoll.plan.protocols import Local

TIMES_S = (0.04, 0.04, 0.04, 0.2)  # a gradient of each worker
FAST = 3
PACES = (Sync(), Buffered(1), Bounded(5))
ROWS, FEATURES = 40_000, 8


@dataclass(frozen=True, repr=False)
class Paced(Local):
    """The gradient, with a fixed duration for each worker.

    Args:
        times_s: seconds per gradient, by worker.
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
    """A training: the time in seconds when each round closed, θ after it, and gradients of fast workers per second."""

    seconds: Tensor
    thetas: Tensor
    fast: float


def regression() -> Clients:
    """Draw rows y = x·a + 1 + noise, divided evenly among four workers."""
    x, noise = atoll.Key(0).fold("rows").normal(ROWS * (FEATURES + 1)).split([ROWS * FEATURES, ROWS])
    x = x.reshape(ROWS, FEATURES)
    y = x @ torch.linspace(-2, 2, FEATURES, dtype=torch.float64) + 1 + noise
    return atoll.data.arrays(x, y, task="regression").split(len(TIMES_S), IID(), held_out=0)


def least_squares(data: Clients) -> tuple[Tensor, float]:
    """Return θ* and J(θ*) over the rows of all workers."""
    x, y = data.take(data.order)
    x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)  # the last column is the intercept
    best = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
    return best, float((x @ best - y).square().mean())


def losses(data: Clients, thetas: Tensor) -> Tensor:
    """Compute J of each θ `[n, d]` over the rows of all workers."""
    x, y = data.take(data.order)
    return torch.stack([(x @ theta[:-1] + theta[-1] - y).square().mean() for theta in thetas])


def run(data: Clients, pace, seconds: float) -> Ran:
    """Train for `seconds` after the end of the first round, when every worker has imported torch."""
    from parameter_server import Paced  # workers import this file by its module name, not as `__main__`

    plan = Plan(Paced(TIMES_S), Mean(), sgd(0.1), pace=pace)
    settings = {"dtype": "float64", "numerics": "loop", "evaluate_every": 0, "rounds": 10**6}
    training = atoll.rounds("linear", data, plan, engine=Processes(workers=data.count), **settings)
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
    parser.add_argument("--seconds", type=float, default=8.0, help="duration of each training")
    parser.add_argument("--out", default="parameter_server.png", help="file of the figure")
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
    """Draw the excess of the loss over least squares against seconds."""
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
