"""Compare two versions of atoll bit by bit: the same trainings in two environments, on every engine and numerics.

    python benchmarks/bits.py --before ENV/bin/python                  all cases on all engines
    python benchmarks/bits.py --before ENV/bin/python --cases quick    a subset, under two minutes
    python benchmarks/bits.py --out before.jsonl                       only write the results of this environment
    python benchmarks/bits.py --before before.jsonl                    compare with results that were written earlier

The cases are in `trainings.py`: every recipe, every codec, every pace, and further parts of a plan, 3 rounds each, on 4
numerics (loop, lanes, fused, compiled) and 4 engines (inprocess; processes with 2 workers; torchrun with 2 ranks; ray
with 2 actors, if Ray is installed). For each environment and engine, one process runs all cases. Processes and Ray take
seconds to start their workers for each training: there, each case runs on one numerics, in rotation. `--cases all` runs
the whole product.

The program compares the fingerprint, bytes, metrics, counts, failures, client columns and flight times of each round,
and the tensors of the final model. It ignores wall-clock times and the texts of errors and notes. It reports a training
in which a client started twice in one round separately: draws of such a second start may differ between versions. It
also reports float sums on workers separately: they have the order of arrival, so one version differs from itself.
A combination that both versions refuse is listed with its reason. The exit status is 1 if anything else differs.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TRAININGS = Path(__file__).with_name("trainings.py")
ENGINES = ("inprocess", "processes", "torchrun", "ray")
Results = dict[str, dict[str, Any]]


def results(source: str, engine: str, which: str, only: str) -> Results:
    """The results of an environment on one engine: of its Python, or of a file of results."""
    if source.endswith(".jsonl"):
        rows = map(json.loads, Path(source).read_text().splitlines())
        return {row.pop("case"): row for row in rows if row["case"].startswith(f"{engine},") and only in row["case"]}
    command, began = [source], time.perf_counter()
    if engine == "torchrun":
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    if source != sys.executable:
        environment.pop("PYTHONPATH", None)  # it would hide the atoll of that environment
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "results.jsonl"
        done = subprocess.run([*command, str(TRAININGS), engine, str(out), which, only], env=environment)
        rows = map(json.loads, out.read_text().splitlines() if out.exists() else ())
        found = {row.pop("case"): row for row in rows}
    ended = f", ended with status {done.returncode}" if done.returncode else ""
    print(f"{engine}: {len(found)} cases, {time.perf_counter() - began:.0f} s, {source}{ended}", file=sys.stderr)
    return found


def difference(a: Any, b: Any, place: str = "") -> str:
    """The first field in which two results differ, with both values; empty if they are equal."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        each = ((a[n], b[n], f"{place}.{n}") for n in a)
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        each = ((a[i], b[i], f"{place}[{i}]") for i in range(len(a)))
    else:
        before, after = json.dumps(a), json.dumps(b)  # as texts, NaN equals NaN
        return "" if before == after else f"{place.lstrip('.')}: {before:.80} before, {after:.80} after"
    return next((found for pair in each if (found := difference(*pair))), "")


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> int:
    """Print the summary and every case that is not equal; the number of unexpected differences."""
    lines: dict[str, list[str]] = {"equal": [], "refused": [], "second start": [], "arrival": [], "different": []}
    for name in sorted({**before, **after}):
        a, b = (found.get(name, {"missing": True}) for found in (before, after))
        if "refused" in a and a["refused"] == b.get("refused"):
            lines["refused"].append(f"{name}: {a['refused']}: {a['why']}")
        elif found := difference(a, b):
            kind = "second start" if a.get("twice") and b.get("twice") else "different"
            if "sum='float'" in name and name.startswith(("processes", "ray")):
                kind = "arrival"
            lines[kind].append(f"{name}: {found}")
        else:
            lines["equal"].append(name)
    for kind in ("refused", "second start", "arrival", "different"):
        for line in lines[kind]:
            print(f"{kind:>12}  {line}")
    counts = {kind: len(each) for kind, each in lines.items()}
    print(f"{sum(counts.values())} cases: {counts['equal']} equal, {counts['different']} different.")
    twice = sum(bool(row.get("twice")) for row in before.values())
    print(f"{counts['refused']} are refused by both. {counts['second start']} of {twice} with a second start differ.")
    print(f"{counts['arrival']} float sums on workers differ: they have the order of arrival.")
    print("Overlapping rounds do not run on processes and ray: there they follow real arrivals, which no seed repeats.")
    return counts["different"]


def main() -> None:
    """Read the options, run the trainings, print the comparison."""
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--before", help="the Python of the other environment, or its results (.jsonl)")
    ask.add_argument("--out", help="a .jsonl file for the results of this environment")
    ask.add_argument("--cases", choices=["quick", "full", "all"], default="full")
    ask.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    ask.add_argument("--only", default="", help="a part of the names of the cases to run")
    options = ask.parse_args()
    before: Results = {}
    after: Results = {}
    for engine in options.engines:
        if engine == "ray" and (options.cases == "quick" or importlib.util.find_spec("ray") is None):
            print("ray: left out", file=sys.stderr)
            continue
        if options.before:
            before |= results(options.before, engine, options.cases, options.only)
        after |= results(sys.executable, engine, options.cases, options.only)
    if options.out:
        rows = ({"case": name, **row} for name, row in after.items())
        Path(options.out).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    if options.before:
        sys.exit(compare(before, after) > 0)


if __name__ == "__main__":
    main()
