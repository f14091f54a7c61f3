"""Views of runs on disk: a summary of one run, a list with one line per run, one run in full.

Tests: tests/surface/test_cli.py
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from atoll import runs
from atoll.base.lines import quoted
from atoll.report.run_data import RunData
from atoll.runs.confusion import Confusion
from atoll.runs.format import duration, format_number, label, plain, spread
from atoll.runs.inference import Inference
from atoll.runs.next_line import called, load_line, near, program_of, resume_line
from atoll.runs.summary import comparison, confused, grid, judged, spent


def brief(path: Path) -> dict[str, Any]:
    """The summary of a run folder."""
    run = RunData.read(path, clients=False)
    judged = run.judged
    best, running = run.best(judged), runs.is_locked(path)
    return {
        "run": run.name,
        "path": str(path),
        "status": "running" if running else _status(path, run),
        "reason": "" if running else run.events.reason,
        "began": run.events.began,
        "rounds": run.rows[-1]["round"] + 1 if run.rows else 0,
        "seconds": round(run.total("seconds"), 3),
        "wall": run.events.wall,
        "data": run.config.get("data"),
        "model": run.config.get("model"),
        "plan": run.environment.get("plan"),
        "metrics": {n: run.last(n) for n in run.columns},
        "best": {"metric": judged, "value": best[judged], "round": best["round"]} if best else {},
        "bytes_up": int(run.total("bytes_up")),
        "bytes_down": int(run.total("bytes_down")),
        "failures": sum(lost.count for lost in run.events.lost.values()),
        "baselines": {name: _values(event) for name, event in run.events.baselines.items()},
    }


def backend(path: Path) -> dict[str, Any]:
    """The compute backend of a run, and the reason why it was chosen."""
    about = RunData.read(path).environment
    return {"numerics": about.get("numerics"), "why": about.get("why")}


def backend_text(backend: Mapping[str, Any]) -> str:
    """The compute backend and its reason as a line of text.

    Example:
        >>> print(backend_text({"numerics": "loop", "why": "the setting numerics names it"}))
        numerics  loop: the setting numerics names it
    """
    name, why = (plain(backend[key] or "not recorded", 500) for key in ("numerics", "why"))
    return f"numerics  {name}: {why}"


def home_of(path: Path) -> tuple[Path, str]:
    """The home of a network that has a run, and its kind: "server", "site", or an empty text for another folder."""
    home = path.resolve().parent.parent
    server, site = ((home / name).is_file() for name in ("federation.db", "site.json"))
    return home, "server" if server else "site" if site else ""


def _status(path: Path, run: RunData) -> str:
    """The status of a run. A site has no events of it: it gets the model at the end of the run."""
    status = run.events.status
    return "done" if status != "done" and home_of(path)[1] == "site" else status


def _next(path: Path, status: str) -> str:
    """The command that continues with a run. A served run continues at its server, and a site predicts."""
    home, kind = home_of(path)
    if kind == "site":
        return f"atoll predict {called(path)} my.csv"
    if kind == "server" and status in ("interrupted", "unfinished"):
        return f"atoll serve --home {quoted(near(home))}"
    if status in ("interrupted", "unfinished"):
        return resume_line(path)
    if status != "running" and program_of(path) is not None:  # no command has the data that `export` measures
        return load_line(path)
    return f"atoll {'show' if status == 'running' else 'export'} {called(path)}"


def _values(event: Mapping[str, Any]) -> dict[str, Any]:
    """The values of an event, without its kind, its time and its name."""
    return {name: value for name, value in event.items() if name not in ("event", "time", "name")}


def listing(found: Sequence[Mapping[str, Any]]) -> str:
    """A table with one run per line."""
    rows = [["run", "status", "rounds", "data", "model", "best", "time"]]
    for run in found:
        best = run["best"]
        value = f"{label(best['metric'])} {format_number(best['value'])}" if best else "–"
        cells = (run["run"], run["status"], run["rounds"], run["data"] or "–", run["model"] or "–", value)
        rows.append([*(plain(c, 40) for c in cells), duration(run["seconds"])])
    return "\n".join(grid(rows))


def record(path: Path) -> str:
    """A run in full: outcome, formula, a selection of its rounds with the best values marked, failures, files."""
    run, about = RunData.read(path), brief(path)
    why = f": {plain(about['reason'], 500)}" if about["reason"] else ""
    lines = [f"{run.name}   {about['status']}{why}", ""]
    lines += [
        f"data    {plain(about['data'] or '–')}   model {plain(about['model'] or '–')}   began {about['began']}",
        "",
    ]
    lines += [f"  {plain(line)}" for line in run.formula.splitlines()]
    lines += [f"note    {plain(note, 500)}" for note in run.events.notes]
    lines += ["", *_rounds(run)] if run.rows else []
    if run.events.baselines:
        lines += ["", *comparison(about["metrics"], _known(run), run.judged)]
    lines += confused(Confusion.read(path))
    inference = Inference.read(path)
    lines += [] if inference is None else ["", *inference.text().splitlines()]
    lines += ["", *_lost(run)]
    lines.append(
        spent(
            about["rounds"],
            about["seconds"],
            about["bytes_up"],
            about["bytes_down"],
            run.last("clock"),
            run.events.wall,
        )
    )
    files = ", ".join(sorted(file.name for file in path.iterdir() if file.name != "lock"))
    lines.append(f"files   {near(path)}: {files}")
    if about["status"] != "failed":  # it has no model, and continues to the same failure
        lines.append(f"next    {_next(path, about['status'])}")
    return "\n".join(lines)


def _known(run: RunData) -> dict[str, Any]:
    """The rows of the comparison, and the reason if there are none."""
    reason = run.events.baselines.get("skipped", {}).get("reason")
    return run.compared if reason is None else run.compared | {"skipped": {"reason": plain(reason, 500)}}


def _rounds(run: RunData, max_rows: int = 10) -> list[str]:
    """A table of evenly spaced rounds, and of the rounds with the best value of a metric."""
    names = judged(run.columns)
    marks = {n: best["round"] for n in names if (best := run.best(n)) is not None}
    shown = {run.rows[i]["round"]: run.rows[i] for i in spread(len(run.rows), max_rows)}
    shown |= {row["round"]: row for row in run.rows if row["round"] in marks.values()}
    rows = [["round", *map(label, names), "clients", "failed"]]
    for at, row in sorted(shown.items()):
        values = [format_number(_number(row.get(n))) + ("*" if marks.get(n) == at else " ") for n in names]
        clients = f"{row.get('arrived', '–')}/{row.get('cohort', '–')}"
        rows.append([str(at), *values, plain(clients), plain(row.get("failed", 0))])
    return [*grid(rows), "* the best"]


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


def _lost(run: RunData, max_clients: int = 5) -> list[str]:
    """The clients with the largest number of failures, with the most frequent cause."""
    lines = []
    for client, lost in sorted(run.events.lost.items(), key=lambda item: -item[1].count)[:max_clients]:
        stage, cause = max(lost.causes, key=lambda each: lost.causes[each], default=("?", "?"))
        text = f"{lost.count} times, last in round {lost.last} ({plain(stage)}): {plain(cause)}"
        lines.append(f"failed  client {client}, {text}")
    return lines
