"""Fed-Heart-Disease: logistic regression on four hospitals, each method of the published benchmark and Newton's.

A model has an accuracy, an AUC and a loss on the test rows of each hospital and on all test rows. `clients` is the mean
of the hospitals; in `pooled` all features are scaled by pooled statistics, as published.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

import atoll
from atoll import recipes
from atoll.data import Clients
from atoll.plan import Plan
from atoll.plan.aggregate import Mean
from atoll.plan.local import Proximal, Scaffold, Train
from atoll.plan.optimizer import adagrad, adam, sgd, yogi
from atoll.plan.protocols import Optimizer

from .rows import NONE, Cell, Means, Result, Row, Table

COLUMNS = ("cleveland", "hungary", "switzerland", "va", "clients", "pooled")
SPREAD = ("clients", "pooled")  # the columns with a published deviation
Runner = Callable[[int, int | None, Path | None], Result]
PENALTIES = (0.005, 0.01, 0.02, 0.05, 0.07, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
BEST = {"clients": 0.7314, "pooled": 0.7787}  # FedYogi, the best published federated row


def available() -> bool:
    """Whether ATOLL_DATA names the folder of the files."""
    return (Path(os.environ.get("ATOLL_DATA", "")) / "heart.processed.va.data").is_file()


# 1. Measures on test rows


def _measures(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float, float]:
    """Accuracy, AUC and mean loss of a model on rows `[n, 13]` with classes `[n]`."""
    from sklearn.metrics import roc_auc_score

    with torch.no_grad():
        logits = model(x.to(next(model.parameters())))[:, 0].double()
    loss = binary_cross_entropy_with_logits(logits, y.double())
    return float(((logits > 0).long() == y).double().mean()), float(roc_auc_score(y, logits)), float(loss)


def _named(each: Sequence[tuple[float, float, float]], columns: Sequence[str]) -> dict[str, float]:
    """The measures of each column, as accuracy, `column auc` and `column loss`."""
    found = {}
    for column, values in zip(columns, each, strict=True):
        found |= dict(zip((column, f"{column} auc", f"{column} loss"), values, strict=True))
    return found


def _mean(each: Sequence[tuple[float, float, float]]) -> tuple[float, float, float]:
    accuracy, auc, loss = (statistics.fmean(column) for column in zip(*each, strict=True))
    return accuracy, auc, loss


def _test_rows(data: Clients) -> tuple[Tensor, Tensor, Tensor]:
    """The held-out rows, their classes and their hospitals."""
    if data.held_out is None or data.held_owner is None:
        raise RuntimeError("The hospitals have no test rows.")
    return *data.held_out.take(torch.arange(len(data.held_out))), data.held_owner


def _own(models: Sequence[nn.Module], data: Clients) -> list[tuple[float, float, float]]:
    """The measures of the model of each hospital on its own test rows."""
    x, y, owner = _test_rows(data)
    return [_measures(model, x[owner == i], y[owner == i]) for i, model in enumerate(models)]


def _cells(model: nn.Module, data: Clients) -> dict[str, float]:
    """The measures of one model in every column."""
    own = _own([model] * data.count, data)
    x, y, _ = _test_rows(_hospitals("standard"))
    return _named([*own, _mean(own), _measures(model, x, y)], COLUMNS)


# 2. The published methods


@cache
def _hospitals(scale: str = "client") -> Clients:
    from tests.heart import heart

    return heart(scale)


def _start(seed: int) -> nn.Module:
    from tests.heart import heart_model

    return heart_model(seed)


def _federated(lr: float, server: Optimizer | None = None, tuned: bool = False, **corrected: Any) -> Runner:
    """15 rounds of 100 steps of each hospital, averaged by train rows; `tuned`: then 100 more steps at each one."""
    local = Train(sgd(lr), steps=100, batch=4, keep=("order",))
    plan = Plan(replace(local, **corrected), Mean(), server or sgd(1.0))

    def run(seed: int, rounds: int | None, place: Path | None) -> Result:
        data = _hospitals()
        done = atoll.train(_start(seed), data, plan, rounds=rounds or 15, seed=seed, out=None)
        if not tuned:
            return Result(_cells(done.model, data), done.rounds, done.seconds, done.bytes_up)
        models = [_after(done.model, data.only(i), plan, 1, seed) for i in range(data.count)]
        own = _own(models, data)
        return Result(_named([*own, _mean(own)], COLUMNS[:5]), done.rounds, done.seconds, done.bytes_up)

    return run


def _after(model: nn.Module, data: Clients, plan: Plan, rounds: int, seed: int) -> nn.Module:
    words: dict[str, Any] = {"rounds": rounds, "seed": seed, "evaluate_every": 0}
    return atoll.train(model, data, plan, out=None, **words).model


def _pooled(seed: int, rounds: int | None, place: Path | None) -> Result:
    """50 epochs of Adam on all rows, scaled by pooled statistics; at the hospitals rows have their own scale."""
    from tests.heart import CLASSES, heart_parts

    x, y = zip(*heart_parts()[0].values(), strict=True)
    rows = (torch.cat(x), [label for labels in y for label in labels])
    joined = atoll.data.federate({"all": rows}, classes=CLASSES, scale="standard", held_out=0)
    plan, start = Plan(Train(adam(0.001), epochs=rounds or 50, batch=4), Mean()), time.perf_counter()
    model = _after(_start(seed), joined, plan, 1, seed)
    return Result(_cells(model, _hospitals()), 1, time.perf_counter() - start)


def _local(seed: int, rounds: int | None, place: Path | None) -> Result:
    """50 epochs of Adam at each hospital by itself, on its own test rows. Switzerland has one class in training."""
    data, plan = _hospitals(), Plan(Train(adam(0.001), epochs=rounds or 50, batch=4), Mean())
    start = time.perf_counter()
    models = [_after(_start(seed), data.only(i), plan, 1, seed) for i in range(data.count)]
    own = _own(models, data)
    return Result(_named([*own, _mean(own)], COLUMNS[:5]), 1, time.perf_counter() - start)


# 3. Newton's method, with a penalty that train rows choose

Part = tuple[Tensor, Tensor]  # features, scaled by the train rows of their hospital, and classes
Folds = list[tuple[list[Part], Part]]  # train rows by hospital, and the rows that are left out


def _train_rows() -> list[Part]:
    """The scaled train rows of each hospital."""
    data = _hospitals()
    return [data.take(data.client_rows(i)) for i in range(data.count)]  # type: ignore[misc]


def _ten_folds() -> Folds:
    """Ten folds of the train rows of each hospital; row i of a random order is in fold i mod 10."""
    rng, parts = torch.Generator().manual_seed(0), _train_rows()
    folds = [torch.randperm(len(x), generator=rng) % 10 for x, _ in parts]
    found = []
    for k in range(10):
        train = [(x[fold != k], y[fold != k]) for (x, y), fold in zip(parts, folds, strict=True)]
        left = [(x[fold == k], y[fold == k]) for (x, y), fold in zip(parts, folds, strict=True)]
        x, y = (torch.cat(column) for column in zip(*left, strict=True))
        found.append((train, (x, y)))
    return found


def _hospitals_left_out() -> Folds:
    """Each hospital is left out in turn."""
    parts = _train_rows()
    return [([part for part in parts if part is not left], left) for left in parts]


RULES: Mapping[str, tuple[str, Callable[[], Folds]]] = {
    "newton": ("log loss with one hospital left out", _hospitals_left_out),
    "newton-folds": ("ten-fold log loss", _ten_folds),
}


@cache
def _penalty(rule: str, rounds: int) -> tuple[float, str]:
    """The penalty with the smallest mean of the log losses on the train rows that each fold leaves out; a sentence."""
    losses = {}
    for l2 in PENALTIES:
        each = []
        for train, left in RULES[rule][1]():
            data = atoll.data.federate(train, held_out=left, classes=("0", "1"))
            words: dict[str, Any] = {
                "rounds": rounds,
                "dtype": "float64",
                "evaluate": "pooled",
                "evaluate_every": rounds,
            }
            done = atoll.train("logistic", data, recipes.newton(l2), out=None, **words)
            each.append(done.metrics["held_out_loss"])
        losses[l2] = statistics.fmean(each)
    chosen = min(losses, key=lambda l2: losses[l2])
    shown = ", ".join(f"{l2:g} {loss:.4f}" for l2, loss in losses.items())
    return chosen, f"l2 = {chosen:g}, chosen by the {RULES[rule][0]} on train rows: {shown}"


def _newton(rule: str) -> Runner:
    def run(seed: int, rounds: int | None, place: Path | None) -> Result:
        rounds = rounds or 10
        l2, why = _penalty(rule, rounds)
        data = _hospitals()
        words: dict[str, Any] = {"rounds": rounds, "seed": seed, "dtype": "float64", "evaluate_every": 0}
        done = atoll.train("logistic", data, recipes.newton(l2), out=None, **words)
        return Result(_cells(done.model, data), done.rounds, done.seconds, done.bytes_up, (why,))

    return run


# 4. The table


def _published(values: Sequence[float], deviations: Sequence[float] = (NONE, NONE)) -> dict[str, Cell]:
    """Cells within .03 of a hospital, and within one deviation of the last two columns, or .01 without one."""
    cells = {column: Cell(value, within=0.03) for column, value in zip(COLUMNS[:4], values, strict=False)}
    for column, value, sd in zip(SPREAD, values[4:], deviations, strict=False):
        cells[column] = Cell(value, sd, 0.01 if sd != sd else sd)
    return cells


def heart() -> Table:
    """Fed-Heart-Disease, means over seeds."""
    average = _published((0.731, 0.719, 0.650, 0.640, 0.685, 0.748), (0.028, 0.027))
    adaptive = _published((0.760, 0.753, 0.738, 0.676, 0.731, 0.779), (0.013, 0.015))
    scaffold = _published((0.727, 0.719, 0.650, 0.640, 0.684, 0.748), (0.028, 0.027))
    adams = _published((0.752, 0.746, 0.738, 0.667, 0.726, 0.779), (0.014, 0.015))
    pooled = _published((0.783, 0.764, 0.750, 0.644, 0.735, 0.795), (0.003, 0.003))
    rows = {
        "fedavg": Row(_federated(0.001), average),
        "fedprox": Row(_federated(0.001, correction=Proximal(0.01)), average),
        "scaffold": Row(_federated(0.001, correction=Scaffold()), scaffold),
        "fedadam": Row(_federated(0.01, adam(0.01, betas=(0.9, 0.999), eps=1e-8, correct=False)), adams),
        "fedyogi": Row(_federated(0.003162, yogi(0.01, betas=(0.9, 0.999), eps=1e-8)), adaptive),
        "fedadagrad": Row(_federated(0.003162, adagrad(0.316228, beta=0.9, eps=1e-8)), adaptive),
        "pooled": Row(_pooled, pooled),
        "local": Row(_local, _published((0.746, 0.746, 0.725, 0.702, 0.730))),
        "finetuned": Row(_federated(0.003162, tuned=True), {"clients": Cell(0.735, within=0.01)}),
    }
    better = {column: Cell(value, within=0.0, side="least") for column, value in BEST.items()}
    rows["newton"] = Row(_newton("newton"), better)
    rows["newton-folds"] = Row(_newton("newton-folds"))
    return Table(rows, "42-46", remarks=_remarks)


def _remarks(means: Means) -> list[str]:
    ours = [means.get(("newton", column)) for column in BEST]
    if ours[0] is None or ours[1] is None:
        return []
    word = "is above" if all(a > b for a, b in zip(ours, BEST.values(), strict=True)) else "is not above"
    return [f"newton {word} the best published federated row, {BEST['clients']} and {BEST['pooled']}, in both columns."]
