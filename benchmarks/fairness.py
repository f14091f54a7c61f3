"""Fair weights and selection by loss on clients of which some are hard, with federated averaging next to them.

    python benchmarks/fairness.py [--seeds 5] [--json]

Two groups of clients: `fedavg`, `qffl` and `Agnostic` at equal rounds, means over seeds. A group that is learned
slowly: rounds to a held-out loss of .1 with `Uniform(3)` and `PowerOfChoice(3, 9)` of 20 clients, medians over seeds.
`--json` prints one object on the last line: {"rows": [{"row", "column", "value", "seeds"}]}.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from fairness import opposed_groups, rounds_to, slow_group, trained

from atoll import recipes
from atoll.plan.aggregate import Agnostic
from atoll.plan.sampler import PowerOfChoice, Uniform

COLUMNS = ("accuracy_worst10", "accuracy_min", "accuracy_sd", "accuracy")


def cells(seed: int) -> dict[tuple[str, str], float]:
    """The value of each row and column with one seed."""
    data, words = opposed_groups(seed), {"epochs": 1, "batch": 50}
    average = recipes.fedavg(0.3, **words)
    plans = {
        "fedavg": average,
        "qffl(q=5)": recipes.qffl(0.3, q=5.0, **words),
        "Agnostic(0.1)": replace(average, aggregator=Agnostic(0.1)),
    }
    found = {}
    for name, plan in plans.items():
        run = trained(data, plan, 15, seed)
        found.update({(name, column): run.metrics[column] for column in COLUMNS})
    for cohort in (Uniform(3), PowerOfChoice(3, 9)):
        run = trained(slow_group(seed), recipes.fedavg(0.3, epochs=1, batch=10, cohort=cohort), 40, seed)
        found[repr(cohort), "rounds to .1"] = rounds_to(run, 0.1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    tried, rows = [cells(seed) for seed in range(given.seeds)], []
    for row, column in tried[0]:
        values = [found[row, column] for found in tried]
        value = statistics.median(values) if column.startswith("rounds") else statistics.fmean(values)
        rows.append({"row": row, "column": column, "value": value, "seeds": values})
        print(f"{row:22}{column:18}{value:7.3f}   {' '.join(f'{v:.3g}' for v in values)}")
    if given.json:
        print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
