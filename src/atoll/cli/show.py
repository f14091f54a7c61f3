"""Views of runs on disk: a summary of one run, a list with one line per run, one run in full.

Tests: tests/surface/test_cli.py
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from atoll.cli.output import called, comparison, grid, judged, near, spent
from atoll.report.format import duration, format_number, label, plain, spread
from atoll.report.run_data import RunData


def brief(path: Path) -> dict[str, Any]:
    """A run's folder in a few values."""
    run = RunData.read(path)
    best = run.best(run.judged)
    return {
        "run": run.name,
        "path": str(path),
        "status": run.events.status,
        "reason": run.events.reason,
        "began": run.events.began,
        "rounds": run.rows[-1]["round"] + 1 if run.rows else 0,
        "seconds": round(run.total("seconds"), 3),
        "data": run.config.get("data"),
        "model": run.config.get("model"),
        "plan": run.environment.get("plan"),
        "metrics": {n: run.last(n) for n in run.columns},
        "best": {"metric": run.judged, "value": best[run.judged], "round": best["round"]} if best else {},
        "bytes_up": int(run.total("bytes_up")),
        "bytes_down": int(run.total("bytes_down")),
        "failures": sum(lost.count for lost in run.events.lost.values()),
        "baselines": {name: _told(event) for name, event in run.events.baselines.items()},
    }


def _told(event: Mapping[str, Any]) -> dict[str, Any]:
    """What an event says, without what makes it an event."""
    return {name: value for name, value in event.items() if name not in ("event", "time", "name")}


def listing(found: Sequence[Mapping[str, Any]]) -> str:
    """Runs, one a line."""
    rows = [["run", "status", "rounds", "data", "model", "best", "time"]]
    for run in found:
        best = run["best"]
        told = f"{label(best['metric'])} {format_number(best['value'])}" if best else "–"
        cells = (run["run"], run["status"], run["rounds"], run["data"] or "–", run["model"] or "–", told)
        rows.append([*(plain(c, 40) for c in cells), duration(run["seconds"])])
    return "\n".join(grid(rows))


def record(path: Path) -> str:
    """A run: how it went, its formula, some of its rounds with the best marked, what failed, and its files."""
    run, told = RunData.read(path), brief(path)
    why = f": {plain(told['reason'], 500)}" if told["reason"] else ""
    lines = [f"{run.name}   {told['status']}{why}", ""]
    lines += [f"data    {plain(told['data'] or '–')}   model {plain(told['model'] or '–')}   began {told['began']}", ""]
    lines += [f"  {plain(line)}" for line in run.formula.splitlines()]
    lines += [f"note    {plain(note, 500)}" for note in run.events.notes]
    lines += ["", *_rounds(run)] if run.rows else []
    if run.events.baselines:
        lines += ["", *comparison(told["metrics"], told["baselines"])]
    lines += ["", *_lost(run)]
    lines.append(spent(told["rounds"], told["seconds"], told["bytes_up"], told["bytes_down"], run.last("clock")))
    files = ", ".join(sorted(file.name for file in path.iterdir() if file.name != "lock"))
    lines.append(f"files   {near(path)}: {files}")
    going = told["status"] in ("interrupted", "unfinished")
    lines.append(f"next    atoll {'resume' if going else 'export'} {called(path)}")
    return "\n".join(lines)


def _rounds(run: RunData, most: int = 10) -> list[str]:
    """Some rounds, evenly apart, and those in which something was best."""
    names = judged(run.columns)
    marks = {n: best["round"] for n in names if (best := run.best(n)) is not None}
    shown = {run.rows[i]["round"]: run.rows[i] for i in spread(len(run.rows), most)}
    shown |= {row["round"]: row for row in run.rows if row["round"] in marks.values()}
    rows = [["round", *map(label, names), "clients", "failed"]]
    for at, row in sorted(shown.items()):
        values = [format_number(_number(row.get(n))) + ("*" if marks.get(n) == at else " ") for n in names]
        clients = f"{row.get('arrived', '–')}/{row.get('cohort', '–')}"
        rows.append([str(at), *values, plain(clients), plain(row.get("failed", 0))])
    return [*grid(rows), "* the best"]


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


def _lost(run: RunData, most: int = 5) -> list[str]:
    """The clients that failed most often, and how."""
    lines = []
    for client, lost in sorted(run.events.lost.items(), key=lambda item: -item[1].count)[:most]:
        stage, cause = max(lost.causes, key=lambda each: lost.causes[each], default=("?", "?"))
        told = f"{lost.count} times, last in round {lost.last} ({plain(stage)}): {plain(cause)}"
        lines.append(f"failed  client {client}, {told}")
    return lines
