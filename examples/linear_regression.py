"""Linear regression on all rows in one place, and on rows that stay at workers.

    J(θ) = (1/n) Σ (xᵢ·θ − yᵢ)²             convex; its minimum θ* is known: least squares
    θ ← θ − lr · ∇J(θ)                      gradient descent, in one place or over any split of the rows
    θ ← θ − lrₜ · ∇J(θ; 32 rows)            stochastic gradient descent

Three claims of the theory, tested on scikit-learn's diabetes data (442 patients, ten measurements, one score):

    1  for every split of the rows, gradient descent makes the same steps, and ends at least squares
    2  with a step c/(t + t₀), c > 1/(2μ), stochastic gradient descent converges to θ*: ‖θ − θ*‖² falls as 1/t
    3  with a constant step it stalls at a distance from θ*: ‖θ − θ*‖² falls to a floor proportional to the step

    python examples/linear_regression.py --out linear_regression.png
"""

import argparse
from dataclasses import replace
from math import sqrt

import torch
from torch import Tensor

import atoll
from atoll.data import IID, Clients, Quantity
from atoll.plan.optimizer.rules import sgd as step_of
from atoll.plan.schedule import inverse
from atoll.recipes import distributed_gd, fedsgd, gd, sgd
from atoll.training.stop import Diverged


def least_squares(data: Clients) -> tuple[Tensor, float, float]:
    """Return θ*, and the curvature of J in its flattest and its steepest direction: μ and L."""
    x, y = data.take(data.order)
    x = torch.cat([x, torch.ones(len(x), 1)], 1)  # the last column is the intercept
    curvature = torch.linalg.eigvalsh(2 / len(x) * x.T @ x)
    return torch.linalg.lstsq(x, y).solution, curvature[0].item(), curvature[-1].item()


def iterates(plan: atoll.Plan, data: Clients, rounds: int, **settings) -> Tensor:
    """Return θ after each round of a training."""
    stop = Diverged(factor=100)  # the heavy ball first rises to 19 times the loss of the start
    training = atoll.rounds("linear", data, plan, rounds=rounds, dtype="float64", stop=stop, **settings)
    return torch.stack([training.state.model.theta for _ in training])


def splits(lr: float) -> dict[str, tuple[atoll.Plan, Clients]]:
    """Return plans and data: the same rows in one place, at 2, 7 and 442 workers, and at 3 clients of unequal sizes."""
    rows = atoll.data.load("diabetes")  # with standardised columns
    all_rows = {"held_out": 0, "min_rows": 1}
    return {
        "gd, one place": (gd(lr), rows.split(1, IID(), **all_rows)),
        "distributed_gd, 2 workers": (distributed_gd(lr), rows.split(2, IID(), **all_rows)),
        "distributed_gd, 7 workers": (distributed_gd(lr), rows.split(7, IID(), **all_rows)),
        "distributed_gd, 442 workers": (distributed_gd(lr), rows.split(442, IID(), **all_rows)),
        "fedsgd, Quantity(1.5)": (fedsgd(lr), rows.split(3, Quantity(1.5), **all_rows)),
    }


def with_momentum(plan: atoll.Plan, low: float, high: float) -> atoll.Plan:
    """Add Polyak's heavy ball at the server: as fast as plain descent with condition number √κ instead of κ."""
    a, b = sqrt(low), sqrt(high)
    return replace(plan, optimizer=step_of(lr=(2 / (a + b)) ** 2, momentum=((b - a) / (b + a)) ** 2))


def falling_step(low: float) -> inverse:
    """Return c/(t + t₀) with c = 1.1/(2μ), and t₀ such that the first step is 0.12."""
    c = 1.1 / (2 * low)
    return inverse(c, t0=round(c / 0.12))


def noise(lr, data: Clients, best: Tensor, rounds: int, seeds: int) -> Tensor:
    """Compute the mean over seeds of ‖θ − θ*‖² for SGD. It starts at θ*, so that the noise is the only error."""
    start = {"linear.weight": best[None, :-1], "linear.bias": best[-1:]}
    paths = [iterates(sgd(lr, batch=32), data, rounds, seed=seed, init=start) for seed in range(seeds)]
    return torch.stack(paths).sub(best).square().sum(2).mean(0)


def slope(x: Tensor, y: Tensor) -> float:
    """Return the slope of log y over log x."""
    x, y = x.log(), y.log()
    return float((x - x.mean()) @ y / (x - x.mean()).square().sum())


def main() -> None:
    parser = argparse.ArgumentParser(description="Linear regression in one place and at workers.")
    parser.add_argument("--out", default="linear_regression.png", help="file of the figure")
    out = parser.parse_args().out

    data = atoll.data.load("diabetes").split(1, IID(), held_out=0)
    best, low, high = least_squares(data)
    print(f"Curvature from μ = {low:.3f} to L = {high:.2f}: condition number κ = {high / low:.0f}\n")

    paths = {"gd, no momentum": iterates(gd(2 / (low + high)), data, 220)}  # the best constant step
    for name, (plan, clients) in splits(lr=1.0).items():
        paths[name] = iterates(with_momentum(plan, low, high), clients, 220)
    errors = {name: (path - best).norm(dim=1) / best.norm() for name, path in paths.items()}
    print(f"{'1  After 220 rounds':32}{'‖θ − θ*‖ / ‖θ*‖':>16}{'largest gap to gd':>22}")
    for name, path in paths.items():
        gap = float((path - paths["gd, one place"]).norm(dim=1).max() / best.norm())
        print(f"   {name:29}{errors[name][-1]:16.1e}" + (f"{gap:22.1e}" if name != "gd, no momentum" else ""))

    lr = falling_step(low)
    falling, clock = noise(lr, data, best, rounds=300, seeds=20), torch.arange(300, dtype=torch.float64) + lr.t0
    print(f"\n2  With the step {lr.c:.1f}/(t + {lr.t0:.0f}) ‖θ − θ*‖² falls as t^{slope(clock[30:], falling[30:]):.2f}")

    floors = {lr: noise(lr, data, best, rounds=200, seeds=2) for lr in (0.02, 0.04, 0.08)}
    print()
    for lr, error in floors.items():
        print(f"3  With the step {lr} ‖θ − θ*‖² stalls at {error[50:].mean():.0f} = {error[50:].mean() / lr:.0f} · lr")

    draw(out, errors, clock, falling, floors)
    print(f"\n{out}")


def draw(out: str, errors: dict, clock: Tensor, falling: Tensor, floors: dict) -> None:
    """Draw one panel per claim."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.2), layout="constrained")
    one, two, three = figure.subplots(1, 3)

    for (name, error), width in zip(errors.items(), (1.5, 9, 7, 5, 3, 1), strict=True):
        one.semilogy(error, label=name, lw=width, **({"color": "k", "ls": ":"} if width == 1.5 else {}))
    one.set(xlabel="round", ylabel="‖θ − θ*‖ / ‖θ*‖", title="1  Any split of the rows: the same steps")

    parts = [(t.mean(), e.mean()) for t, e in zip(clock[30:].chunk(9), falling[30:].chunk(9), strict=True)]
    two.loglog(clock, falling, lw=0.8, alpha=0.5, label="mean of 20 seeds")
    two.loglog(*zip(*parts, strict=True), "o", color="C0", label="and of 30 rounds")
    two.loglog(clock[30:], (falling * clock)[30:].mean() / clock[30:], "k--", lw=1, label="slope −1")
    two.set(xlabel="t + t₀", ylabel="‖θ − θ*‖²", title="2  A falling step: the noise averages out", ylim=(30, 200))
    two.set_xticks(ticks := [300, 400, 500], map(str, ticks))
    two.set_xticks([], minor=True)

    for i, (lr, error) in enumerate(floors.items()):
        three.semilogy(error, lw=0.8, alpha=0.6, color=f"C{i}", label=f"lr = {lr}")
        three.axhline(float(error[50:].mean()), ls="--", color=f"C{i}")
    three.set(xlabel="round", ylabel="‖θ − θ*‖²", title="3  A constant step: a floor proportional to it")

    for panel in (one, two, three):
        panel.legend(frameon=False, fontsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, dpi=150)


if __name__ == "__main__":
    main()
