"""Published tables, reproduced: our value next to the published value and its deviation, for each row.

    ATOLL_DATA=FOLDER python benchmarks/papers.py TABLE [--rows a,b] [--rounds N] [--seeds 42-46] [--synthetic] [--json]
                                                  [--out FILE.jsonl]

| table | content |
|---|---|
| heart | Fed-Heart-Disease: logistic regression on four hospitals; accuracy, AUC and loss |
| niid | Fashion-MNIST over 10 clients, three splits: the best of 50 rounds |
| mcmahan | MNIST over 100 clients: rounds to 97 % and 99 % |
| adaptive | server optimizers on CIFAR-100, EMNIST and CIFAR-10: for the time only |
| scaffold | 10 of 100 clients of MNIST: FedAvg and SCAFFOLD; NIID-Bench on CIFAR-10 for the time only |
| fednova | CIFAR-10 over 16 clients: for the time only |
| personal | Fashion-MNIST over 20 clients, two label skews: models of clients |
| robust | digits over 20 clients: rules under simulated attacks; no published values |
| newton | Newton's method over clients next to pooled scikit-learn and statsmodels: distances |

`--rows` takes names and patterns, such as `iid-*`. `--out` appends each result to a file when it is measured and skips
the results that the file has, so a command that was stopped continues; a training that was stopped continues from its
last checkpoint. Rows whose data is not available run only with `--synthetic`, on random images of the same shape, for
their time.

`--json` prints one object on the last line: {"table", "rows": [{"row", "column", "ours", "sd", "published",
"published_sd", "ok"}]}. `ok` is null for values that stand next to each other without a demand.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from paper_tables import absent, attacked, hospitals, images, statistics_tables
from paper_tables.rows import Cell, Result, Results, Row, Table, missing

TABLES: Mapping[str, Callable[[], Table]] = {
    "heart": hospitals.heart,
    "niid": images.niid,
    "mcmahan": images.mcmahan,
    "adaptive": absent.adaptive,
    "scaffold": images.scaffold,
    "fednova": absent.fednova,
    "personal": images.personal,
    "robust": attacked.robust,
    "newton": statistics_tables.newton,
}


def seeds_of(text: str) -> list[int]:
    """The seeds of "42" or "42-46".

    Raises:
        argparse.ArgumentTypeError: the text is neither.
    """
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    seeds = [] if found is None else list(range(int(found[1]), int(found[2] or found[1]) + 1))
    if not seeds:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a seed nor a range such as 42-46")
    return seeds


def rounds_of(text: str) -> int:
    """A whole number of rounds, at least 1.

    Raises:
        argparse.ArgumentTypeError: the text is something else.
    """
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of rounds, at least 1")
    return int(text)


def selected(table: Table, patterns: str | None, synthetic: bool) -> list[str]:
    """The names of the rows to run. Without patterns, these are the rows whose data is available, or with `synthetic`
    those whose data is not.

    Raises:
        ValueError: a pattern selects no row, or a row needs data that is not available.
    """
    if patterns is None:
        names = [name for name, row in table.rows.items() if bool(row.absent) == synthetic]
        if not names:
            raise ValueError(refusal(next(iter(table.rows.values())).absent))
        return names
    names = []
    for pattern in re.split(r",(?![^(]*\))", patterns):  # names of rules have commas in parentheses
        found = fnmatch.filter(table.rows, pattern)
        if not found:
            raise ValueError(f"no row {pattern!r}; rows: {', '.join(table.rows)}")
        names += [name for name in found if name not in names]
    for name in names:
        if bool(table.rows[name].absent) != synthetic:
            raise ValueError(f"row {name}: {refusal(table.rows[name].absent)}")
    return names


def refusal(absent: str) -> str:
    """The reason why a row is refused: its data is not available, or it is, and `--synthetic` was given."""
    if not absent:
        return "its data is available; leave out --synthetic"
    return (
        f"{absent} is not available. --synthetic runs on random images of the same shape, for the time only: "
        "this is no reproduction"
    )


def cells_of(name: str, row: Row, results: Sequence[Result]) -> list[dict[str, Any]]:
    """The cells of a row, as in `--json`: means over seeds, and the published values."""
    found = []
    for column in {**row.cells, **results[0].cells}:
        values = [result.cells[column] for result in results if column in result.cells]
        reached = [value for value in values if not missing(value)]
        cell = row.cells.get(column, Cell())
        ours = statistics.fmean(reached) if reached and len(reached) == len(values) else None
        sd = statistics.stdev(reached) if ours is not None and len(reached) > 1 else 0.0
        ok = (None if cell.within is None else False) if ours is None else cell.ok(ours)
        published = None if missing(cell.published) else cell.published
        spread = None if missing(cell.sd) else cell.sd
        found.append(
            {
                "row": name, "column": column, "ours": ours, "sd": sd, "published": published,
                "published_sd": spread, "ok": ok,
            }
        )  # fmt: skip
    return found


def line(cell: Mapping[str, Any], wide: int, form: str, next_to: Sequence[str] = ()) -> str:
    """A cell as a line of text: our value, the published one, and their distance in published deviations.

    Args:
        cell: the cell, as in `--json`.
        wide: the width of the column names.
        form: the format of a value.
        next_to: further measures of the same column, as text.
    """
    ours, published, spread = cell["ours"], cell["published"], cell["published_sd"]
    shown = "–" if ours is None else f"{ours:{form}} ± {cell['sd']:{form}}"
    text = f"{cell['row']:32}{cell['column']:{wide}}{shown:18}"
    if published is not None:
        text += f"published {published:{form}}{'' if spread is None else f' ± {spread:{form}}':10}"
        if ours is not None:
            text += f"{ours - published:+{form}}" if spread is None else f"{(ours - published) / spread:+.1f} sd"
    text = f"{text:94}  {'  '.join(next_to)}".rstrip()
    return f"{text}{'   !' if cell['ok'] is False else ''}"


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=list(TABLES), nargs="?", default="heart")
    parser.add_argument("--rows", help="names or patterns of rows, separated by commas; default: all")
    parser.add_argument("--rounds", type=rounds_of, help="rounds or epochs instead of the published number")
    parser.add_argument("--seeds", type=seeds_of, help="42 or 42-46; default: 42-46 for heart, else 42")
    parser.add_argument(
        "--synthetic", action="store_true", help="random images in place of a set that is not available"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl", help="append results, and skip those it has")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(words)
    table = TABLES[given.table]()
    try:
        names = selected(table, given.rows, given.synthetic)
    except ValueError as error:
        parser.error(str(error))
    if given.table == "heart" and not hospitals.available():
        parser.error("the heart files are not in the folder that ATOLL_DATA names")
    if given.out is not None and not given.out.absolute().parent.is_dir():
        parser.error(f"--out {given.out}: there is no folder {given.out.absolute().parent}")
    results, cells = Results(given.out), []
    for name in names:
        row, found = table.rows[name], []
        for seed in given.seeds or seeds_of(table.seeds):
            key = (given.table, name, seed, given.rounds)
            found.append(results.measured(key, lambda place, row=row, seed=seed: row.run(seed, given.rounds, place)))
        cells += shown(name, row, found, table.form)
    means = {(cell["row"], cell["column"]): cell["ours"] for cell in cells if cell["ours"] is not None}
    for remark in table.remarks(means):
        print(remark)
    if given.synthetic:
        print("Random images of the same shape: the times are measured, and no value is a reproduction.")
    if given.json:
        print(json.dumps({"table": given.table, "rows": cells}))
    return 0


def shown(name: str, row: Row, results: Sequence[Result], form: str) -> list[dict[str, Any]]:
    """Print a row with its costs and notes; returns its cells."""
    cells = cells_of(name, row, results)
    measures = {cell["column"]: cell["ours"] for cell in cells}
    wide = max(18, *(len(column) + 2 for column in measures))
    for cell in cells:
        column = cell["column"].rpartition(" ")[0]
        if column and column in measures:
            continue  # an AUC or a loss stands next to the accuracy
        next_to = [c for c in measures if c.startswith(f"{cell['column']} ")]
        print(line(cell, wide, form, [f"{c.rpartition(' ')[2]} {measures[c]:{form}}" for c in next_to]))
    rounds, seconds, sent = (max(getattr(r, field) for r in results) for field in ("rounds", "seconds", "sent"))
    print(f"{'':32}{rounds} rounds, {seconds:.1f} s, {sent:,} bytes sent by the clients in a run")
    for note in dict.fromkeys(note for result in results for note in result.notes):
        print(f"{'':32}{note}")
    sys.stdout.flush()
    return cells


if __name__ == "__main__":
    sys.exit(main())
