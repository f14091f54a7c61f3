"""Partial participation: SCAFFOLD, FedDyn and FedNova next to federated averaging on six splits of two sets.

    python benchmarks/partial.py [--sets digits,fashion_mnist] [--splits 0,1] [--seeds 3] [--rounds 100] [--json]
                                 [--out FILE.jsonl]

10 of 100 clients in a round, softmax regression, lr 0.1, 5 epochs, batch 10; the settings were fixed before the first
run. A cell is the median over seeds of the accuracy on all held-out rows after the last round. It is marked if it is
more than one point below federated averaging. |c| is the norm of SCAFFOLD's control variate at the end, the largest
over seeds. `--out` appends each result to a file and skips the results that the file has. `--json` prints one object on
the last line: {"rows": [{"set", "split", "method", "accuracy", "seeds", "ok"}]}.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from paper_tables.rows import Result, Results

import atoll
from atoll import recipes
from atoll.data import Dirichlet, FeatureShift, Partition, Pathological, Quantity, Shards

SETS = ("digits", "fashion_mnist")
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
REQUIRED = 10  # of 12 cells of each method


def trained(source: str, split: Partition, method: str, seed: int, rounds: int) -> Result:
    """The accuracy after the last round, and the norm of the control variate if the method has one."""
    data = atoll.data.load(source).split(100, by=split, min_rows=1, seed=seed)
    words: dict[str, Any] = {"rounds": rounds, "seed": seed, "evaluate_every": rounds, "evaluate": "pooled"}
    with atoll.rounds("softmax", data, METHODS[method], **words) as training:
        reports = list(training)
        control = training.state.server["local"].get("correction.control")
    cells = {"accuracy": reports[-1].metrics["accuracy"]}
    if control is not None:
        cells["|c|"] = float(control.norm())
    return Result(cells, len(reports), sum(r.seconds for r in reports), sum(r.bytes_up for r in reports))


def compared(results: Results, source: str, split: Partition, seeds: int, rounds: int) -> list[dict[str, Any]]:
    """The rows of one set and split, printed on one line."""
    rows, shown, base = [], [], 0.0
    for method in METHODS:
        found = []
        for seed in range(seeds):
            key = ("partial", source, repr(split), method, seed, rounds)
            found.append(results.measured(key, lambda _, m=method, s=seed: trained(source, split, m, s, rounds)))
        values = [result.cells["accuracy"] for result in found]
        value = statistics.median(values)
        base = value if method == "fedavg" else base
        ok = value >= base - BELOW
        rows.append(
            {"set": source, "split": repr(split), "method": method, "accuracy": value, "seeds": values, "ok": ok}
        )
        control = max((result.cells.get("|c|", 0.0) for result in found), default=0.0)
        shown.append(f"{method} {value:.3f}{'' if ok else ' !'}{f' (|c| {control:.2f})' if control else ''}")
    print(f"{source:15}{split!r:26}{'   '.join(shown)}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", default=",".join(SETS))
    parser.add_argument("--splits", default="0,1,2,3,4,5", help="numbers of splits, in the order above")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    results, rows = Results(given.out), []
    for source in given.sets.split(","):
        for split in (SPLITS[int(number)] for number in given.splits.split(",")):
            rows += compared(results, source, split, given.seeds, given.rounds)
    held, cells = Counter(row["method"] for row in rows if row["ok"]), len(rows) // len(METHODS)
    for method in METHODS:
        print(f"{method:9} holds {held[method]} of {cells} cells (required: {REQUIRED} of 12)")
    if given.json:
        print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
