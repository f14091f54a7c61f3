"""The pictures of the manual. `python docs/pictures.py` writes all of them to docs/pictures/.

A picture has two versions, for light and for dark pages, or is an SVG for both.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from figures import DARK, LIGHT, Theme, axes, figure, logarithmic, name_ends, png, ramp
from torch import Tensor

import atoll
from atoll.data import IID, Dirichlet, Pathological, Quantity, Shards, arrays
from atoll.plan import schedule
from atoll.plan.pace import Buffered, Sync
from atoll.recipes import fedavg
from atoll.recipes import sgd as sgd_recipe
from atoll.report.run_data import RunData
from atoll.report.svg import svg
from atoll.report.timeline import timeline

FOLDER = Path(__file__).parent / "pictures"


def partitions(theme: Theme) -> Any:
    """The number of rows of each class at each of 20 clients, for five partitions of the digits."""
    source = atoll.data.load("digits")
    kinds = (IID(), Dirichlet(0.3), Pathological(2), Shards(), Quantity(1.5))
    made = figure(theme, 7.2, 2.75)
    for i, kind in enumerate(kinds):
        data = source.split(20, kind)
        left = 0.072 + i * 0.187
        ax = axes(made, theme, (left, 0.17, left + 0.163, 0.88), "", "class", "client" if not i else "")
        ax.yaxis.set_label_coords(-0.26, 0.5)
        ax.set_title(str(kind), fontsize=9, fontweight="bold", color=theme.ink, pad=6)
        ax.imshow(data.histogram().clamp(max=60), cmap=ramp(theme), aspect="auto", vmin=0, vmax=60)
        ax.grid(False)
        ax.set_xticks(range(0, 10, 3))
        ax.set_yticks(range(0, 20, 5) if not i else [])
    return made


def two_hospitals() -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Two clients whose least-squares losses differ in minimum and shape, and the minimum for all rows."""
    root = 2**0.5
    first = (torch.diag(torch.tensor([2.0, 0.6])).double() * root, torch.tensor([2.0, 0.6]).double() * root * 1.5)
    second = (torch.diag(torch.tensor([0.5, 1.8])).double() * root, torch.tensor([-0.5, -1.8]).double() * root)
    x, y = (torch.cat(pair) for pair in zip(first, second, strict=True))
    return [first, second], torch.linalg.lstsq(x, y[:, None]).solution[:, 0]


def path(data: Any, plan: Any, rounds: int, seed: int = 0) -> np.ndarray:
    """θ before the first round and after each round, `[rounds + 1, d]`, starting from zero."""
    model = torch.nn.Linear(data.features[0], 1, bias=False).double()
    torch.nn.init.zeros_(model.weight)
    settings = {"rounds": rounds, "seed": seed, "dtype": "float64", "numerics": "loop"}
    training = atoll.rounds(model, data, plan, **settings)
    seen = [training.state.model.theta.clone()]
    seen += [training.state.model.theta.clone() for _ in training]
    return torch.stack(seen).numpy()


@cache
def walks() -> dict[int, np.ndarray]:
    """The iterates of federated averaging on the two clients, by the number of local steps."""
    data = atoll.data.federate(two_hospitals()[0], held_out=0)
    return {steps: path(data, fedavg(lr=0.1, epochs=steps, batch=None), 800 // steps) for steps in (1, 5, 50)}


def drift(theme: Theme) -> Any:
    """The limit of federated averaging for different clients: with more local steps it is farther from the optimum."""
    clients, best = two_hospitals()
    made = figure(theme, 6.4, 3.3)
    ax = axes(made, theme, (0.07, 0.12, 0.72, 0.95))
    grid = np.stack(np.meshgrid(np.linspace(-1.35, 1.9, 120), np.linspace(-1.35, 1.9, 120)), -1)
    x, y = (torch.cat(pair).numpy() for pair in zip(*clients, strict=True))
    loss = ((grid @ x.T - y) ** 2).mean(-1)
    ax.contour(grid[..., 0], grid[..., 1], loss, levels=12, colors=theme.grid, linewidths=1.1)
    for at, name in (((1.5, 1.5), "client 0"), ((-1.0, -1.0), "client 1")):
        ax.plot(*at, "s", color=theme.soft, markersize=5)
        ax.annotate(name, at, (0, 7), textcoords="offset points", ha="center", fontsize=8, color=theme.soft)
    for steps, color in ((1, theme.series[0]), (5, theme.series[2]), (50, theme.series[1])):
        walk = walks()[steps]
        ax.plot(*walk.T, "-", color=color, linewidth=1.6, zorder=4)
        ax.plot(*walk[-1], "o", color=color, markersize=6, zorder=5)
        words = "1 local step: gradient descent" if steps == 1 else f"{steps} local steps"
        ax.plot([], [], "o-", color=color, label=words, markersize=4.5, linewidth=1.6)
    ax.plot(*best.numpy(), "*", color=theme.ink, markersize=9, zorder=6, label="least squares of all rows")
    legend = ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
    for label in legend.get_texts():
        label.set_color(theme.ink)
    ax.set_xlabel("θ₁", fontsize=8, color=theme.soft)
    ax.set_ylabel("θ₂", fontsize=8, color=theme.soft)
    ax.grid(False)
    ax.set_aspect("equal")
    return made


@cache
def errors() -> dict[str, np.ndarray]:
    """|θ − θ*|² of stochastic gradient descent by round, averaged over three seeds, for three learning rates."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 5, generator=generator, dtype=torch.float64)
    y = x @ torch.arange(1.0, 6.0, dtype=torch.float64) + torch.randn(400, generator=generator, dtype=torch.float64)
    best = torch.linalg.lstsq(x, y[:, None]).solution[:, 0].numpy()
    data = arrays(x, y).split(1, held_out=0)
    out = {}
    for rate in (0.1, 0.01, schedule.inverse(1.0, t0=10)):
        each = [((path(data, sgd_recipe(rate, batch=4), 1500, seed) - best) ** 2).sum(-1) for seed in range(3)]
        out[f"lr = {rate!r}"] = np.mean(each, 0)
    return out


def floor(theme: Theme) -> Any:
    """Stochastic gradient descent on least squares: a constant step size stalls, a decreasing one converges."""
    made = figure(theme, 5.8, 3.0)
    ax = axes(made, theme, (0.115, 0.165, 0.72, 0.93), "", "round", "|θ − θ*|²")
    t = np.unique(np.geomspace(1, 1500, 120).astype(int))
    ends = []
    for color, (name, error) in zip(theme.series, errors().items(), strict=False):
        ax.plot(t, error[t], color=color, linewidth=1.5)
        ends.append((float(error[-100:].mean()), name, color))
    ax.set_xscale("log")
    logarithmic(ax)
    name_ends(ax, ends)
    return made


def schedules(theme: Theme) -> Any:
    """The learning rate by round of six schedules."""
    made = figure(theme, 7.2, 2.9)
    ax = axes(made, theme, (0.08, 0.17, 0.58, 0.94), "", "round", "learning rate")
    t = np.arange(101)
    warm = schedule.warmup(10) >> schedule.cosine(0.1, rounds=90)
    several = (
        (schedule.step(0.1, every=30, factor=0.5), theme.series[0], "-"),
        (schedule.exponential(0.1, decay=0.98), theme.series[1], "-"),
        (schedule.inverse(1.0, t0=10), theme.series[2], "-"),
        (schedule.polynomial(0.1, rounds=100), theme.series[3], "-"),
        (warm, theme.ink, "-"),
        (schedule.constant(0.1), theme.soft, "--"),
    )
    for rate, color, style in several:
        ax.plot(t, [rate(int(i)) for i in t], style, color=color, linewidth=1.5, label=repr(rate))
    legend = ax.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=7.5)
    for label in legend.get_texts():
        label.set_color(theme.ink)
    return made


def loop(theme: Theme) -> Any:
    """One round: the formula as a cycle from θ to θ⁺."""
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

    made = figure(theme, 7.2, 2.5)
    ax = made.add_axes((0, 0, 1, 1))
    ax.set_axis_off()
    ax.set_xlim(0, 72)
    ax.set_ylim(0, 25)

    def box(x: float, y: float, wide: float, high: float, slot: str, words: str, color: str) -> None:
        round_ = "round,pad=0,rounding_size=0.9"
        ax.add_patch(FancyBboxPatch((x, y), wide, high, boxstyle=round_, fc=theme.paper, ec=color, lw=1.3))
        middle = {"x": x + wide / 2, "ha": "center"}
        ax.text(y=y + high - 1.5, s=slot, fontsize=9, fontweight="bold", color=color, va="top", **middle)
        ax.text(y=y + 1.2, s=words, fontsize=7.5, color=theme.soft, va="bottom", linespacing=1.35, **middle)

    def arrow(start: tuple[float, float], end: tuple[float, float], words: str = "", bend: float = 0.0) -> None:
        style = {"connectionstyle": f"arc3,rad={bend}", "arrowstyle": "-|>", "mutation_scale": 9}
        ax.add_patch(FancyArrowPatch(start, end, color=theme.soft, lw=1.1, **style))
        x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 0.7
        ax.text(x, y, words, fontsize=8, color=theme.ink, ha="center", va="bottom")

    blue, green, orange = theme.series[0], theme.series[2], theme.series[1]
    box(1, 13, 11, 7, "cohort", "the clients\nof a round", orange)
    for k in range(3):
        shade = 0.7 * k
        words = ("local", "a gradient, or\nlocal training") if k == 2 else ("", "")
        box(18 + shade, 13.6 - shade, 12, 7, *words, blue)
    box(36, 12.9, 11, 7, "codec", "clip,\ncompress", blue)
    box(53, 12.9, 14, 7, "aggregator", "the exact sum,\nthen the mean", green)
    box(31, 1.2, 14, 6.4, "optimizer", "the server descends", green)
    arrow((12.3, 16.4), (17.7, 16.4), "θ")
    arrow((31.8, 16.4), (35.7, 16.4), "gᵢ")
    arrow((47.3, 16.4), (52.7, 16.4), "mᵢ")
    arrow((60, 12.6), (45.4, 4.3), "", bend=-0.3)
    ax.text(57.2, 6.4, "g", fontsize=8, color=theme.ink)
    arrow((30.7, 5.2), (6.5, 12.7), "", bend=-0.25)
    ax.text(13.0, 3.2, "θ⁺ is the θ of the next round", fontsize=8, color=theme.ink, ha="center")
    ax.text(24.7, 23.0, "at each client", fontsize=8, color=blue, ha="left")
    ax.text(60, 23.0, "at the server", fontsize=8, color=green, ha="center")
    return made


@cache
def _with_a_straggler() -> tuple[Any, ...]:
    """The data of three runs with four workers, of which one is five times slower, under three paces."""
    data = atoll.data.load("digits").split(4)
    settings: dict[str, Any] = {
        "fleet": "Fleet(Each((1, 1, 1, 5)), uplink='200 kb/s', downlink='300 kb/s')",
        "report": False,
    }
    plan, records = fedavg(0.1), []
    for pace, rounds in ((Sync(), 5), (Sync(deadline_s=1.5), 10), (Buffered(1), 80)):
        with TemporaryDirectory() as out:
            run = atoll.train("softmax", data, replace(plan, pace=pace), rounds=rounds, out=out, **settings)
            records.append(RunData.read(run.path))
    return tuple(records)


def waiting() -> str:
    """The timeline of a run in which all clients wait for the slowest one."""
    return svg(timeline(_with_a_straggler()[0], None))


def deadline() -> str:
    """The same with a deadline: contributions of the slowest client are always late."""
    return svg(timeline(_with_a_straggler()[1], None))


def flying() -> str:
    """The same without waiting."""
    return svg(timeline(_with_a_straggler()[2], None))


PICTURES: tuple[Callable[[Theme], Any], ...] = (loop, partitions, drift, floor, schedules)
TIMELINES = (waiting, deadline, flying)


def draw(names: Collection[str]) -> Iterator[Path]:
    """Draw pictures and yield the files: SVG for both themes, or a PNG for each."""
    from PIL import Image

    FOLDER.mkdir(exist_ok=True)
    for picture in (p for p in TIMELINES if p.__name__ in names):
        file = FOLDER / f"{picture.__name__}.svg"
        file.write_text(picture(), encoding="utf-8")
        yield file
    for picture in (p for p in PICTURES if p.__name__ in names):
        for name, theme in (("light", LIGHT), ("dark", DARK)):
            file = FOLDER / f"{picture.__name__}-{name}.png"
            file.write_bytes(png(picture(theme)))
            # 128 colors are enough for lines and letters, and need a third of the bytes.
            Image.open(file).quantize(128, dither=Image.Dither.NONE).save(file, optimize=True)
            yield file


if __name__ == "__main__":
    import sys

    torch.set_num_threads(1)
    for file in draw(sys.argv[1:] or [p.__name__ for p in (*PICTURES, *TIMELINES)]):
        print(f"{file.stat().st_size:7,} bytes  {file.relative_to(FOLDER.parent)}")
