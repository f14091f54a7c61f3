"""Published tables, reproduced: our value, the published value and its deviation, in one row for each method.

    ATOLL_DATA=FOLDER python benchmarks/papers.py heart [--rows fedavg,fedprox] [--rounds N] [--seeds 42-46] [--json]

| table | content |
|---|---|
| heart | Fed-Heart-Disease: logistic regression on four hospitals; accuracy at each, their mean, all test rows |

`--json` prints one object on the last line: {"table", "rows": [{"row", "column", "ours", "sd", "published",
"published_sd", "ok"}]}. A cell is ok within one published deviation; a cell without one within .03.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import atoll
from atoll.data import Clients
from atoll.plan import Plan
from atoll.plan.aggregate import Mean
from atoll.plan.local import Proximal, Scaffold, Train
from atoll.plan.optimizer import adagrad, adam, sgd, yogi
from atoll.plan.protocols import Optimizer

COLUMNS = ("cleveland", "hungary", "switzerland", "va", "clients", "pooled")
WITHOUT_DEVIATION = 0.03
Cells = Mapping[str, float]


@dataclass(frozen=True)
class Row:
    """A method of a table.

    Args:
        published: the published values, in the order of `COLUMNS`; NaN for none.
        deviations: the published deviations of the last two columns.
        run: (seed, rounds) → the value of each column and the bytes that the clients sent.
    """

    published: tuple[float, ...]
    deviations: tuple[float, float]
    run: Callable[[int, int | None], tuple[Cells, int]]


# 1. Heart disease


def _accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float(((model(x.float())[:, 0] > 0).long() == y).double().mean())


def _cells(model: nn.Module, clients: Clients, pooled: Clients) -> Cells:
    """The accuracy on the test rows of each hospital and their mean; on all test rows, scaled by pooled statistics."""
    judge, owner = clients.held_out, clients.held_owner
    if judge is None or owner is None or pooled.held_out is None:
        raise RuntimeError("The hospitals have no test rows.")
    x, y = judge.take(torch.arange(len(judge)))
    own = [_accuracy(model, x[owner == i], y[owner == i]) for i in range(clients.count)]
    everyone = _accuracy(model, *pooled.held_out.take(torch.arange(len(pooled.held_out))))
    return dict(zip(COLUMNS, (*own, statistics.fmean(own), everyone), strict=True))


def _federated(
    lr: float, server: Optimizer | None = None, **corrected: object
) -> Callable[[int, int | None], tuple[Cells, int]]:
    """15 rounds of 100 steps of each hospital; updates are averaged by train rows."""
    from tests.heart import heart, heart_model

    steps = 100
    local = Train(sgd(lr), steps=steps, batch=4, keep=("order",))
    plan = Plan(replace(local, **corrected), Mean(), server or sgd(1.0))  # type: ignore[arg-type]

    def run(seed: int, rounds: int | None) -> tuple[Cells, int]:
        data = heart()
        done = atoll.train(heart_model(seed), data, plan, rounds=rounds or 15, seed=seed, out=None)
        return _cells(done.model, data, heart("standard")), done.bytes_up

    return run


def _pooled(seed: int, rounds: int | None) -> tuple[Cells, int]:
    """50 epochs of Adam on all rows, scaled by pooled statistics; at the hospitals it receives their own scale."""
    from tests.heart import heart, heart_model, heart_parts

    x, y = zip(*heart_parts()[0].values(), strict=True)
    rows = (torch.cat(x), [label for labels in y for label in labels])
    joined = atoll.data.federate({"all": rows}, classes=("healthy", "disease"), scale="standard", held_out=0)
    plan = Plan(Train(adam(0.001), epochs=rounds or 50, batch=4), Mean())
    done = atoll.train(heart_model(seed), joined, plan, rounds=1, seed=seed, out=None)
    return _cells(done.model, heart(), heart("standard")), 0


def _local(seed: int, rounds: int | None) -> tuple[Cells, int]:
    """50 epochs of Adam at each hospital alone, on its own test rows."""
    from tests.heart import heart, heart_model

    data, plan = heart(), Plan(Train(adam(0.001), epochs=rounds or 50, batch=4), Mean())
    own = []
    for i, name in enumerate(data.names or ()):
        done = atoll.train(heart_model(seed), data.only(name), plan, rounds=1, seed=seed, out=None)
        own.append(_cells(done.model, data, heart("standard"))[COLUMNS[i]])
    return dict(zip(COLUMNS, (*own, statistics.fmean(own)), strict=False)), 0


def _heart() -> dict[str, Row]:
    nan = float("nan")
    average = ((0.731, 0.719, 0.650, 0.640, 0.685, 0.748), (0.028, 0.027))
    adaptive = ((0.760, 0.753, 0.738, 0.676, 0.731, 0.779), (0.013, 0.015))
    return {
        "fedavg": Row(*average, _federated(0.001)),
        "fedprox": Row(*average, _federated(0.001, correction=Proximal(0.01))),
        "scaffold": Row(
            (0.727, 0.719, 0.650, 0.640, 0.684, 0.748), (0.028, 0.027), _federated(0.001, correction=Scaffold())
        ),
        "fedadam": Row(
            (0.752, 0.746, 0.738, 0.667, 0.726, 0.779),
            (0.014, 0.015),
            _federated(0.01, adam(0.01, betas=(0.9, 0.999), eps=1e-8, correct=False)),
        ),
        "fedyogi": Row(*adaptive, _federated(0.003162, yogi(0.01, betas=(0.9, 0.999), eps=1e-8))),
        "fedadagrad": Row(*adaptive, _federated(0.003162, adagrad(0.316228, beta=0.9, eps=1e-8))),
        "pooled": Row((0.783, 0.764, 0.750, 0.644, 0.735, 0.795), (0.003, 0.003), _pooled),
        "local": Row((0.746, 0.746, 0.725, 0.702, 0.730, nan), (nan, nan), _local),
    }


# 2. The command


def _seeds(text: str) -> list[int]:
    first, _, last = text.partition("-")
    return list(range(int(first), int(last or first) + 1))


def _measured(name: str, row: Row, seeds: list[int], rounds: int | None) -> list[dict[str, object]]:
    """One line for each cell of a row, printed; the fields of `--json`."""
    start, runs = time.perf_counter(), [row.run(seed, rounds) for seed in seeds]
    seconds, sent = time.perf_counter() - start, max(up for _, up in runs)
    found = []
    for i, column in enumerate(COLUMNS):
        values = [cells[column] for cells, _ in runs if column in cells]
        published = row.published[i]
        if not values or published != published:
            continue
        ours, sd = statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
        deviation = row.deviations[i - 4] if i >= 4 else float("nan")
        has = deviation == deviation
        ok = abs(ours - published) <= (deviation if has else WITHOUT_DEVIATION)
        found.append(
            {
                "row": name, "column": column, "ours": ours, "sd": sd, "published": published,
                "published_sd": deviation if has else None, "ok": ok,
            }
        )  # fmt: skip
        apart = f"{(ours - published) / deviation:+.1f} sd" if has else f"{ours - published:+.3f}"
        print(f"{name:11}{column:12}{ours:.3f} ± {sd:.3f}   published {published:.3f}   {apart:9}{'' if ok else '  !'}")
    print(f"{'':11}{seconds:.0f} s, {sent:,} bytes sent by the hospitals in a run")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=["heart"])
    parser.add_argument("--rows", help="methods, separated by commas; default: all")
    parser.add_argument("--rounds", type=int, help="rounds or epochs instead of the published number")
    parser.add_argument("--seeds", default="42-46")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if not (Path(os.environ.get("ATOLL_DATA", "")) / "heart.processed.va.data").is_file():
        parser.error("the heart files are not in the folder that ATOLL_DATA names")
    table = _heart()
    wanted = given.rows.split(",") if given.rows else list(table)
    unknown = [name for name in wanted if name not in table]
    if unknown:
        parser.error(f"no row {unknown[0]!r}; rows: {', '.join(table)}")
    cells = [cell for name in wanted for cell in _measured(name, table[name], _seeds(given.seeds), given.rounds)]
    if given.json:
        print(json.dumps({"table": given.table, "rows": cells}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
