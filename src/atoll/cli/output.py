"""The output of the commands: results as text, and as one JSON object.

Tests: tests/surface/test_cli.py
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from atoll.runs.format import format_number, label
from atoll.runs.next_line import called
from atoll.runs.summary import grid, judged

if TYPE_CHECKING:
    from atoll.runs.events import Run


def print_json(value: Any) -> None:
    """Print one JSON value. NaN and infinity become null, because JSON has no such numbers."""
    print(json.dumps(_finite(value), ensure_ascii=False))


def _finite(value: Any) -> Any:
    match value:
        case float() if not math.isfinite(value):
            return None
        case dict():
            return {name: _finite(each) for name, each in value.items()}
        case list() | tuple():
            return [_finite(each) for each in value]
    return value


def outcome(run: Run) -> dict[str, Any]:
    """A run as one JSON object; `failures` is the number of contributions that were lost."""
    out = {
        "run": run.path.name if run.path else None,
        "path": str(run.path) if run.path else None,
        "status": run.status,
        "reason": run.reason,
        "rounds": run.rounds,
        "seconds": round(run.seconds, 3),
        "wall": round(run.wall, 3),
        "metrics": dict(run.metrics),
        "best": dict(run.best),
        "bytes_up": run.bytes_up,
        "bytes_down": run.bytes_down,
        "failures": len(run.failures),
        **run.privacy,
    }
    return out | ({"baselines": {n: dict(m) for n, m in run.baselines.items()}} if run.baselines else {})


def outcomes(done: Sequence[tuple[int, Run]]) -> dict[str, Any]:
    """Runs of several seeds as one JSON object: `metrics` are means, `sd` standard deviations, `runs` the runs."""
    each = [outcome(run) | {"seed": seed} for seed, run in done]
    moments = {name: _moments(done, name) for name in _names(run for _, run in done)}
    return {
        "run": [one["run"] for one in each],
        "path": [one["path"] for one in each],
        "rounds": max(one["rounds"] for one in each),
        "seconds": round(sum(one["seconds"] for one in each), 3),
        "wall": round(sum(one["wall"] for one in each), 3),
        "metrics": {name: mean for name, (mean, _) in moments.items()},
        "sd": {name: sd for name, (_, sd) in moments.items()},
        "bytes_up": sum(one["bytes_up"] for one in each),
        "bytes_down": sum(one["bytes_down"] for one in each),
        "failures": sum(one["failures"] for one in each),
        "runs": each,
    }


def _names(found: Iterable[Run]) -> list[str]:
    return list(dict.fromkeys(name for run in found for name in run.metrics))


def _moments(done: Sequence[tuple[int, Run]], name: str) -> tuple[float, float]:
    """Mean, and standard deviation with n − 1 in the denominator; 0 for a single run."""
    values = [run.metrics[name] for _, run in done if name in run.metrics]
    if not all(map(math.isfinite, values)):
        return math.nan, math.nan
    import statistics

    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def seeds(done: Sequence[tuple[int, Run]]) -> str:
    """A table of the runs of several seeds, with mean ± sd of each metric."""
    names = judged(_names(run for _, run in done))
    rows = [["seed", *map(label, names), "run"]]
    for seed, run in done:
        where = called(run.path) if run.path else ""
        rows.append([str(seed), *(format_number(run.metrics.get(n)) for n in names), where])
    moments = [_moments(done, n) for n in names]
    rows.append(["mean", *(format_number(mean) for mean, _ in moments), ""])
    rows.append(["± sd", *(format_number(sd) for _, sd in moments), ""])
    return "\n".join(["", *grid(rows)])


def format_checks(found: Sequence[Any]) -> str:
    """The results of `doctor`, with a fix for each problem."""
    width = max(len(check.name) for check in found)
    lines = []
    for check in found:
        lines.append(f"{'ok ' if check.ok else 'NO '}  {check.name.ljust(width)}  {check.text}")
        if not check.ok and check.fix:
            lines.append(f"     {' ' * width}  Write: {check.fix}")
    return "\n".join(lines)
