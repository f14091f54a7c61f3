"""Partial participation: SCAFFOLD, FedDyn and FedNova next to federated averaging on six splits of digits.

    python benchmarks/partial.py [--rounds 100] [--seeds 3] [--splits 0,1] [--json]

10 of 100 clients in a round, softmax regression, lr 0.1, 5 epochs, batch 10; the settings were fixed before the first
run. A cell is the median over seeds of the accuracy on all held-out rows after the last round. It is marked if it is
more than one point below federated averaging. `--json` prints one object on the last line:
{"rows": [{"split", "method", "accuracy", "seeds", "ok"}]}.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import atoll
from atoll import recipes
from atoll.data import Dirichlet, FeatureShift, Partition, Pathological, Quantity, Shards

SPLITS: tuple[Partition, ...] = (
    *(Dirichlet(0.1), Dirichlet(0.5), Pathological(2), Shards(), Quantity(1.0), FeatureShift(noise=0.5)),
)
WORDS: dict[str, Any] = {"lr": 0.1, "epochs": 5, "batch": 10, "cohort": 10}
METHODS = {
    "fedavg": recipes.fedavg(**WORDS),
    "fednova": recipes.fednova(**WORDS),
    "scaffold": recipes.scaffold(**WORDS),
    "feddyn": recipes.feddyn(**WORDS, alpha=0.1),
}
BELOW = 0.01  # points that a method may lie below federated averaging


def accuracy(method: str, split: Partition, seed: int, rounds: int) -> float:
    data = atoll.data.load("digits").split(100, by=split, min_rows=1, seed=seed)
    words: dict[str, Any] = {"evaluate_every": rounds, "report": False, "out": None}
    return atoll.train("softmax", data, METHODS[method], rounds=rounds, seed=seed, **words).metrics["accuracy"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--splits", default="0,1,2,3,4,5", help="numbers of splits, in the order above")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    rows, start = [], time.process_time()
    for split in (SPLITS[int(number)] for number in given.splits.split(",")):
        base, cells = 0.0, []
        for method in METHODS:
            values = [accuracy(method, split, seed, given.rounds) for seed in range(given.seeds)]
            value = statistics.median(values)
            base = value if method == "fedavg" else base
            ok = value >= base - BELOW
            rows.append({"split": repr(split), "method": method, "accuracy": value, "seeds": values, "ok": ok})
            cells.append(f"{method} {value:.3f}{'' if ok else ' !'}")
        print(f"{split!r:26}{'   '.join(cells)}", flush=True)
    print(f"{time.process_time() - start:.0f} s of CPU time")
    if given.json:
        print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
