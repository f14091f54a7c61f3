"""Tables on MNIST and Fashion-MNIST: niid_bench, the FedAvg paper, NIID-Bench's MLP, personal models."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

import atoll
from atoll.data import IID, Clients, Dirichlet, Partition, Pathological, Shards
from atoll.data.rows import ArrayRows
from atoll.plan import Plan
from atoll.plan.aggregate import Mean
from atoll.plan.local import Calibrated, Ditto, Normalised, Proximal, Scaffold, Train
from atoll.plan.optimizer import sgd
from atoll.plan.protocols import Correction
from atoll.runs.events import Run
from atoll.training.stop import Target

from . import absent
from .rows import NONE, Cell, Means, Result, Row, Table, missing, trained

Runner = Callable[[int, int | None, Path | None], Result]


def _result(run: Run, cells: Mapping[str, float], notes: tuple[str, ...] = ()) -> Result:
    return Result(dict(cells), run.rounds, run.seconds, run.bytes_up, notes)


def _curve(run: Run) -> list[float]:
    """The accuracy on the test rows after each evaluated round."""
    return [float(value) for value in run.frame()["accuracy"].dropna()]


# 1. niid_bench: 10 clients, all in each round

_SPLITS: Mapping[str, Partition] = {"iid": IID(), "dirichlet": Dirichlet(0.5), "labels2": Pathological(2)}
_MUS = (0.001, 0.01, 0.1, 1.0)
_BEST: Mapping[str, Mapping[str, tuple[float, float]]] = {
    "iid": {"fedavg": (89.23, 0.45), "fedprox": (89.42, 0.09), "scaffold": (89.33, 0.27), "fednova": (89.36, 0.09)},
    "dirichlet": {
        "fedavg": (88.09, 0.29), "fedprox": (88.15, 0.42), "scaffold": (88.44, 0.25), "fednova": (88.22, 0.12),
    },
    "labels2": {"fedavg": (78.10, NONE), "fedprox": (78.05, NONE), "scaffold": (33.8, 41.0), "fednova": (71.67, NONE)},
}  # fmt: skip


def _niid(split: Partition, corrections: Mapping[str, Correction | None]) -> Runner:
    """50 rounds of 10 epochs, batch 64; the best of several corrections by the best round."""

    def run(seed: int, rounds: int | None, place: Path | None) -> Result:
        data = atoll.data.load("fashion_mnist").split(10, split, seed=seed, min_rows=10)
        tried: dict[str, tuple[float, float, Run]] = {}
        for name, correction in corrections.items():
            optimizer = sgd(0.01, momentum=0.9, weight_decay=1e-5)
            plan = Plan(Train(optimizer, epochs=10, batch=64, correction=correction), Mean())
            words = {"rounds": rounds or 50, "seed": seed, "evaluate": "pooled"}
            done = trained("niid-cnn", data, plan, None if place is None else place / (name or "run"), **words)
            curve = _curve(done)
            tried[name] = 100 * max(curve), 100 * curve[-1], done
        name = max(tried, key=lambda name: tried[name][0])
        best, last, done = tried[name]
        each = ", ".join(f"{name}: {value[0]:.2f}" for name, value in tried.items())
        return _result(done, {"best": best, "last": last}, (f"best of {each}",) if len(tried) > 1 else ())

    return run


def _niid_remarks(means: Means) -> list[str]:
    found = ["best is the largest of 50 values on test rows, as published; last is the value after the last round."]
    pair = [means.get((f"labels2-{method}", "best")) for method in ("scaffold", "fedavg")]
    if pair[0] is not None and pair[1] is not None:
        holds = "is" if pair[0] >= pair[1] - 1 else "is not"
        found.append(f"With two labels SCAFFOLD {holds} at least FedAvg − 1: {pair[0]:.2f} and {pair[1]:.2f}.")
    return found


def niid() -> Table:
    """Fashion-MNIST over 10 clients: four methods on three splits, the best test accuracy of 50 rounds, in percent."""
    methods: Mapping[str, Mapping[str, Correction | None]] = {
        "fedavg": {"": None},
        "fedprox": {f"mu={mu}": Proximal(mu) for mu in _MUS},
        "scaffold": {"": Scaffold()},
        "fednova": {"": Normalised()},
    }
    rows = {}
    for split, partition in _SPLITS.items():
        for method, corrections in methods.items():
            within = None if split == "labels2" else 0.7
            cell = Cell(*_BEST[split][method], within)
            rows[f"{split}-{method}"] = Row(_niid(partition, corrections), {"best": cell})
    return Table(rows, form=".2f", remarks=_niid_remarks)


# 2. The FedAvg paper: 10 of 100 clients


def rounds_to(curve: list[float], target: float) -> float:
    """The number of rounds until the best accuracy so far crosses a target, interpolated; NaN if it does not."""
    before = 0.0
    for done, value in enumerate(curve, 1):
        if value >= target:
            return done - (value - target) / (value - before)
        before = max(before, value)
    return NONE


def _mcmahan(model: str, split: Partition, epochs: int, target: float, most: int) -> Runner:
    plan = Plan(Train(sgd(0.1), epochs=epochs, batch=10), Mean(), cohort=10)

    def run(seed: int, rounds: int | None, place: Path | None) -> Result:
        data = atoll.data.load("mnist").split(100, split, seed=seed)
        stop = (Target("accuracy", target),)
        done = trained(model, data, plan, place, rounds=rounds or most, seed=seed, evaluate="pooled", stop=stop)
        curve = _curve(done)
        needed = rounds_to(curve, target)
        short = f"{target:.0%} was not reached in {done.rounds} rounds; the best accuracy is {max(curve):.2%}."
        return _result(done, {"rounds": needed}, (short,) if missing(needed) else ())

    return run


def mcmahan() -> Table:
    """MNIST over 100 clients, lr 0.1: rounds until the best test accuracy so far is 97 % (2NN) or 99 % (CNN)."""
    return Table(
        {
            "2nn-iid": Row(_mcmahan("2nn", IID(), 1, 0.97, 200), {"rounds": Cell(87, within=0, side="most")}),
            "2nn-shards": Row(_mcmahan("2nn", Shards(), 1, 0.97, 1000), {"rounds": Cell(664)}),
            "cnn-e5-iid": Row(_mcmahan("mcmahan-cnn", IID(), 5, 0.99, 60), {"rounds": Cell(20)}),
            "cnn-e1-iid": Row(_mcmahan("mcmahan-cnn", IID(), 1, 0.99, 120), {"rounds": Cell(34)}),
            "cnn-e1-shards": Row(_mcmahan("mcmahan-cnn", Shards(), 1, 0.99, 700), {"rounds": Cell(350)}),
            "cnn-e5-shards": Row(_mcmahan("mcmahan-cnn", Shards(), 5, 0.99, 460), {"rounds": Cell(229)}),
        },
        form=".1f",
    )


# 3. SCAFFOLD with partial participation


def small_mlp() -> nn.Module:
    """The MLP 784-64-10."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))


def _partial(correction: Correction | None) -> Runner:
    optimizer = sgd(0.01, momentum=0.9)
    plan = Plan(Train(optimizer, epochs=10, batch=64, correction=correction), Mean(), cohort=10)

    def run(seed: int, rounds: int | None, place: Path | None) -> Result:
        data = atoll.data.load("mnist").split(100, Dirichlet(0.5), seed=seed)
        torch.manual_seed(seed)
        settings = {"rounds": rounds or 100, "seed": seed, "evaluate_every": rounds or 100, "evaluate": "pooled"}
        with atoll.rounds(small_mlp(), data, plan, **settings) as training:
            reports = list(training)
            control = training.state.server["local"].get("correction.control")
        cells = {"accuracy": 100 * reports[-1].metrics["accuracy"]}
        if control is not None:
            cells["|c|"] = float(control.norm())
        return Result(
            cells, len(reports), sum(report.seconds for report in reports), sum(report.bytes_up for report in reports)
        )

    return run


def scaffold() -> Table:
    """MNIST, 10 of 100 clients, 100 rounds of 10 epochs: FedAvg and SCAFFOLD, accuracy in percent and |c|; CIFAR-10."""
    rows = {
        "mnist-fedavg": Row(_partial(None), {"accuracy": Cell(95.4)}),
        "mnist-scaffold": Row(_partial(Scaffold()), {"accuracy": Cell(97.1), "|c|": Cell(0.09)}),
        **absent.niid_bench(),
    }
    return Table(rows, form=".2f", remarks=_scaffold_remarks)


def _scaffold_remarks(means: Means) -> list[str]:
    ours, average = (means.get((f"mnist-{name}", "accuracy")) for name in ("scaffold", "fedavg"))
    if ours is None or average is None:
        return []
    return [f"SCAFFOLD {'is' if ours >= average else 'is not'} at least FedAvg: {ours:.2f} and {average:.2f}."]


# 4. Personal models: 20 clients, all in each round

_SKEWS: Mapping[str, Partition] = {"labels2": Pathological(2), "dirichlet": Dirichlet(0.1)}
_SERVER = {"labels2": 80.41, "dirichlet": 85.85}
_DITTO = {"labels2": 99.44, "dirichlet": 97.47}
_STEPS = {"epochs": 1, "batch": 10}
_LR = 0.005
_TUNED = Train(sgd(_LR), **_STEPS)
_PERSONAL: Mapping[str, Train] = {
    "fedavg": _TUNED,
    "finetuned": _TUNED,
    "local": _TUNED,
    "ditto": replace(_TUNED, correction=Ditto(0.1)),
    "fedper": replace(_TUNED, own=("fc3.*",)),
    "fedrep": replace(_TUNED, own=("fc3.*",), alternate=True),
    "calibrated": replace(_TUNED, correction=Calibrated(1.0)),
}


def _skewed(split: Partition, seed: int) -> Clients:
    """All 70,000 rows over 20 clients; a quarter of each client's rows is held out."""
    source = atoll.data.load("fashion_mnist")
    both = (source.rows, source.test)
    rows = ArrayRows(torch.cat([part.x for part in both]), torch.cat([part.y for part in both]))  # type: ignore[union-attr]
    return replace(source, rows=rows, test=None).split(20, split, held_out=0.25, seed=seed, min_rows=10)


def _worst_class(run: Run) -> float:
    """The smallest share of rows of a class that the server's model recognises."""
    if run.confusion is None:
        raise RuntimeError("The run has no confusion table.")
    return min(row[i] / max(sum(row), 1) for i, row in enumerate(run.confusion.counts))


def _personal(split: Partition, method: str) -> Runner:
    plan = Plan(_PERSONAL[method], Mean())

    def run(seed: int, rounds: int | None, place: Path | None) -> Result:
        rounds = rounds or 100
        data = _skewed(split, seed)
        settings = {"rounds": rounds, "seed": seed, "evaluate_every": rounds, "evaluate": "both"}
        if method == "local":
            return _alone(data, plan, place, settings)
        tune = _TUNED if method == "finetuned" else None
        done = trained("niid-cnn", data, plan, place, tune=tune, metrics=("accuracy", "confusion"), **settings)
        cells = {}
        if not plan.local.own:  # the server never trains the own part
            cells = {"server": 100 * done.metrics["accuracy"], "worst class": 100 * _worst_class(done)}
        for column in ("personal_accuracy", "personal_accuracy_worst10"):
            if column in done.metrics:
                cells[column.replace("_accuracy", "").replace("_", " ")] = 100 * done.metrics[column]
        return _result(done, cells)

    return run


def _alone(data: Clients, plan: Plan, place: Path | None, settings: Mapping[str, object]) -> Result:
    """Each client trains by itself for the same number of epochs."""
    values, seconds, rounds = [], 0.0, 0
    for client in range(data.count):
        own = None if place is None else place / f"client-{client}"
        done = trained("niid-cnn", data.only(client), plan, own, **{**settings, "evaluate": "clients"})
        values.append(100 * done.metrics["accuracy_clients"])
        seconds, rounds = seconds + done.seconds, done.rounds
    worst = sorted(values)[: max(1, len(values) // 10)]
    return Result({"personal": statistics.fmean(values), "personal worst10": statistics.fmean(worst)}, rounds, seconds)


def _personal_remarks(means: Means) -> list[str]:
    found = []
    for split in _SKEWS:
        server = means.get((f"{split}-fedavg", "server"))
        models = {name: means.get((f"{split}-{name}", "personal")) for name in ("ditto", "fedper", "fedrep")}
        simple = {name: means.get((f"{split}-{name}", "personal")) for name in ("local", "finetuned")}
        known = {name: value for name, value in models.items() if value is not None}
        if server is not None and known:
            above = ", ".join(f"{name} {value - server:+.2f}" for name, value in known.items())
            found.append(f"{split}: above the server's model of FedAvg: {above} (required: +8).")
        for name, value in simple.items():
            if value is not None and known and value >= max(known.values()) - 0.5:
                found.append(f"{split}: {name} is as good as personal models, to half a point: {value:.2f}.")
    pair = [means.get((f"dirichlet-{name}", "worst class")) for name in ("calibrated", "fedavg")]
    if pair[0] is not None and pair[1] is not None:
        word = "raises" if pair[0] > pair[1] else "does not raise"
        found.append(f"Calibrated(1) {word} the worst class on Dirichlet(0.1): {pair[1]:.2f} to {pair[0]:.2f}.")
    return found


def personal() -> Table:
    """Fashion-MNIST over 20 clients, two label skews, 100 rounds: server's model and clients' models, in percent."""
    rows = {}
    for split, partition in _SKEWS.items():
        near = Cell(_DITTO[split], within=1.5, side="least")
        cells: Mapping[str, Mapping[str, Cell]] = {
            "fedavg": {"server": Cell(_SERVER[split])},
            **{name: {"personal": near} for name in ("ditto", "fedper", "fedrep")},
        }
        for method in _PERSONAL:
            if method != "calibrated" or split == "dirichlet":
                rows[f"{split}-{method}"] = Row(_personal(partition, method), cells.get(method, {}))
    return Table(rows, form=".2f", remarks=_personal_remarks)
