"""The output of the commands: results as text, and as one JSON object.

Tests: tests/surface/test_cli.py
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atoll.report.format import duration, format_number, label, size, whole

if TYPE_CHECKING:
    from atoll.runs.events import Run

HIDDEN = ("gradient_norm", "lr")
COMPARED = {"pooled": "pooled", "local": "local only"}


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
        "metrics": dict(run.metrics),
        "best": dict(run.best),
        "bytes_up": run.bytes_up,
        "bytes_down": run.bytes_down,
        "failures": len(run.failures),
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


def judged(names: Iterable[str]) -> list[str]:
    """The names of metrics, then of losses: the order of columns."""
    there = [n for n in names if n not in HIDDEN]
    losses = [n for n in ("held_out_loss", "loss") if n in there]
    return [n for n in there if n not in losses] + losses


def grid(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table. The first column is left-aligned, the others are right-aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [c.ljust(w) if not i else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("   ".join(cells).rstrip())
    return lines


def called(path: Path) -> str:
    """The shortest name that the commands accept for a run: its two words if it is in ./runs, else its path.

    Example:
        >>> called(Path("runs/2026-11-22-calm-reef")), called(Path("other/2026-11-22-calm-reef"))
        ('calm-reef', 'other/2026-11-22-calm-reef')
    """
    here = path.resolve().parent == Path("runs").resolve()
    return path.name[11:] if here and len(path.name) > 11 else near(path)


def near(path: Path) -> str:
    """A path relative to the working folder if it is inside it, else the path itself."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def summary(run: Run, wall: float | None = None) -> str:
    """The last lines of a run: outcome, comparison, costs, files, and the next command.

    Args:
        run: the run.
        wall: the number of seconds since the command started, with reading of data and reports.
    """
    lines = ["", f"{run.status}: {run.reason}", ""]
    lines += comparison(run.metrics, run.baselines)
    if run.best:
        best = run.best
        lines += ["", f"best    {label(best['metric'])} {format_number(best['value'])}, in round {best['round']}"]
    else:
        lines.append("")
    failures = f", {whole(len(run.failures))} failures" if run.failures else ""
    now = run.reports[-1].now if run.reports else None
    lines.append(spent(run.rounds, run.seconds, run.bytes_up, run.bytes_down, now, wall) + failures)
    if run.path is not None:
        lines.append(f"run     {near(run.path)}")
        for title, name in (("model", "model.safetensors"), ("report", "report.html")):
            if (run.path / name).is_file():
                lines.append(f"{title:<8}{near(run.path / name)}")
    lines.append(f"next    {following(run)}")
    return "\n".join(lines)


def spent(rounds: int, seconds: float, up: int, down: int, now: float | None = None, wall: float | None = None) -> str:
    """The costs of a run. `seconds` is the time of its rounds.

    `now` is the time of its virtual clock, if it has one, and `wall` the time of the command.

    Example:
        >>> spent(3, 0.5, 2408, 2400)
        'spent   3 rounds, 0.50 s, ↑ 2.41 kB ↓ 2.40 kB'
        >>> spent(3, 0.5, 2408, 2400, 75.0)
        'spent   3 rounds, 0.50 s, ↑ 2.41 kB ↓ 2.40 kB, 1:15 min on the clock'
    """
    clock = "" if now is None else f", {duration(now)} on the clock"
    command = "" if wall is None else f" of {duration(wall)}"
    return f"spent   {rounds} rounds, {duration(seconds)}{command}, ↑ {size(up)} ↓ {size(down)}{clock}"


def following(run: Run) -> str:
    """The next command."""
    if run.path is None:
        return "atoll run"
    if run.status == "interrupted":
        return f"atoll resume {called(run.path)}"
    if not run.baselines:
        return f"atoll show {called(run.path)}, or the same with --baselines, for pooled and local-only training"
    return f"atoll show {called(run.path)}"


def comparison(metrics: Mapping[str, Any], baselines: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A table of last values: the federated model, and the baselines that were trained.

    Example:
        >>> baselines = {"pooled": {"accuracy": 0.96}, "local": {"accuracy": 0.5, "accuracy_sd": 0.1}}
        >>> print("\\n".join(comparison({"accuracy": 0.95, "lr": 1.0}, baselines)))
                     accuracy
        federated      0.9500
        pooled         0.9600
        local only     0.5000   ± 0.1000 between clients
    """
    names = judged(metrics)
    rows = [["", *map(label, names)], ["federated", *(format_number(metrics[n]) for n in names)]]
    for name, title in COMPARED.items():
        if name in baselines:
            rows.append([title, *(format_number(baselines[name].get(n)) for n in names)])
    lines = grid(rows)
    spread = baselines.get("local", {}).get(f"{names[0]}_sd") if names else None
    if spread is not None:
        lines[-1] += f"   ± {format_number(spread)} between clients"
    skipped = baselines.get("skipped")
    return [*lines, f"no comparison: {skipped['reason']}"] if skipped else lines


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
