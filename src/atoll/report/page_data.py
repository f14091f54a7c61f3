"""The JSON of a run: everything that its page, its report and the HTML views show. Reads files only, without torch.

It contains only values that the run folder contains. A column of clients that a secure sum or noise keeps from the
server is marked as not collected. NaN and infinity become null.

Tests: tests/surface/test_page_data.py
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from operator import add
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from atoll import runs
from atoll.base.names import COUNTS
from atoll.compute.metric_names import PERSONAL
from atoll.plan.formula import without_identity
from atoll.report.chart import thin
from atoll.report.run_data import NUMBERS, RunData
from atoll.runs.folder import CLIENTS
from atoll.runs.format import client_name, duration, label, plain, rises, spread
from atoll.runs.labels import Labels
from atoll.runs.next_line import model_name, program_call
from atoll.runs.summary import all_row_cells, findings, interval_of, judged, own_row_cells

VERSION = 1
MOST_POINTS = 2000  # of a curve
MOST_CLIENTS = 5000  # rows of the table of clients
MOST_NAMED = 40  # clients with curves of their own
_POINTS = 60  # of the curve of one client
_MOST_COLUMNS = 200
_MOST_LOST, _MOST_NOTES, _MOST_TEXT = 50, 200, 20_000
_MOST_READ = 8 << 20  # bytes of clients.jsonl that are read at most
NOT_PRIVATE = "not private: noise follows the seed"
FILES = (
    *("report.html", "metrics.csv", "metrics.jsonl", "events.jsonl", "clients.csv", "clients.jsonl", "confusion.csv"),
    *("config.toml", "environment.json", "input.json", "labels.json", "ledger.jsonl"),
    *("model.safetensors", "best.safetensors"),
)


class ClientColumn(Struct, omit_defaults=True, frozen=True):
    """A column of the table of clients.

    Args:
        name: its key in the run folder.
        label: its label.
        unit: number, count, bytes or seconds; it decides the form of a value.
        values: one value for each client; None: the client has none.
        absent: the reason why the run has no such column; empty: it has one.
    """

    name: str
    label: str
    unit: str = "number"
    values: list[float | None] = []
    absent: str = ""


class ClientTable(Struct, omit_defaults=True, frozen=True):
    """The clients: ids, names, columns, the number of clients that the table omits, and curves of single clients.

    Args:
        curves: by metric: `x`, the rounds, and `y`, the values of each client in these rounds.
    """

    ids: list[int] = []
    names: list[str] = []
    columns: list[ClientColumn] = []
    omitted: int = 0
    curves: dict[str, dict[str, Any]] = {}


class TextTable(Struct, frozen=True):
    """A table of texts: its caption, and its rows. The first row has the heads, the first column the names."""

    caption: str
    cells: list[list[str]]


class Page(Struct, omit_defaults=True, kw_only=True, frozen=True):
    """The data of one run.

    Args:
        version: of this structure.
        run: the name of the folder.
        title, tags: the labels of the user.
        status: running, done, failed, interrupted or unfinished.
        rounds, total: the rounds that are done, and the rounds of the settings.
        columns: the columns of metrics.jsonl with numbers: metrics in reading order, then counts.
        labels: the label of each column.
        rising: whether a higher value is better, for the columns with a known direction.
        curves: by column: rounds and values, at most `MOST_POINTS` of them.
        costs: rounds, and the bytes, the seconds and the clock up to the end of each; at most `MOST_POINTS` rounds.
        chief: the selection metric.
        best: the best value of each metric, and its round.
        answers: the tables of the answer; own rows of clients come first.
        rules: the values of trained and constant baselines by metric, for lines in the curves.
        sums: totals of bytes, seconds, time on the clock, lost and late contributions.
        banner: a warning above everything else.
        privacy: `epsilon`, `budget`, `delta`.
        waiting: the times of clients on the simulated clock.
        lines: lines of Python or shell: load, predict, resume; none of a failed run.
        server: the present clients and the reason why nothing proceeds, of a served run.
    """

    version: int
    run: str
    title: str = ""
    tags: list[str] = []
    status: str
    reason: str = ""
    began: str = ""
    ended: str = ""
    rounds: int = 0
    total: int | None = None
    data: str = ""
    model: str = ""
    plan: str = ""
    formula: str = ""
    columns: list[str] = []
    labels: dict[str, str] = {}
    rising: dict[str, bool] = {}
    curves: dict[str, list[list[float | None]]] = {}
    costs: dict[str, list[float | None]] = {}
    chief: str = ""
    best: dict[str, list[float]] = {}
    answers: list[TextTable] = []
    findings: list[str] = []
    rules: dict[str, dict[str, float]] = {}
    sums: dict[str, float | None] = {}
    banner: str = ""
    privacy: dict[str, float | None] = {}
    confusion: TextTable | None = None
    clients: ClientTable = ClientTable()
    waiting: TextTable | None = None
    failures: TextTable | None = None
    notes: list[str] = []
    files: list[str] = []
    settings: dict[str, str] = {}
    config: str = ""
    lines: list[str] = []
    server: dict[str, Any] | None = None


def page_data(folder: Path, record: RunData | None = None, *, report: bool = False) -> Page:
    """Read a run folder, also one that is unfinished, old, or damaged in part.

    Args:
        folder: the run folder.
        record: its contents, if they have been read; None: they are read.
        report: whether report.html is listed in any case: the data are for this file, which is not written yet.
    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     page = page_data(Path(folder))
        >>> page.version, page.status, page.rounds
        (1, 'unfinished', 0)
    """
    record = RunData.read(folder) if record is None else record
    labels, events, chief = Labels.read(folder), record.events, record.judged
    running = not events.stopped and runs.is_locked(folder)
    columns = _columns(record)
    total = record.config.get("rounds")
    return Page(
        version=VERSION,
        run=record.name,
        title=labels.title,
        tags=list(labels.tags),
        status="running" if running else events.status or "unfinished",
        reason="" if running else events.reason[:2000],
        began=events.began,
        ended="" if running else events.ended,
        rounds=record.rows[-1]["round"] + 1 if record.rows else 0,
        total=total if isinstance(total, int) and not isinstance(total, bool) else None,
        data=_short(record.config.get("data")),
        model=_short(record.config.get("model")),
        plan=_short(record.environment.get("plan") or record.config.get("plan")),
        formula=without_identity(record.formula)[:_MOST_TEXT],
        columns=columns,
        labels={name: label(name) for name in columns},
        rising={name: up for name in columns if (up := rises(name)) is not None},
        curves={name: _curve(record, name) for name in columns},
        costs=_costs(record),
        chief=chief,
        best={n: [row[n], row["round"]] for n in record.columns if (row := record.best(n)) is not None},
        answers=_answers(record),
        findings=findings(record.compared, chief.removeprefix(PERSONAL)) + _skipped(record),
        rules=_rules(record),
        sums=_sums(record),
        banner=_banner(record),
        privacy=_privacy(record),
        confusion=_confusion(record),
        clients=_clients(folder, record),
        waiting=_waiting(record),
        failures=_failures(record),
        notes=events.notes[:_MOST_NOTES],
        files=files(folder, report),
        settings={str(n): _short(v, 300) for n, v in record.environment.items() if n not in ("plan", "why")},
        config=record.config_text[:_MOST_TEXT],
        lines=_lines(record),
        server=_server(folder),
    )


def run_brief(folder: Path) -> dict[str, Any]:
    """One entry of the list of runs, with a small curve of the selection metric."""
    record, labels = RunData.read(folder, clients=False), Labels.read(folder)
    events, chief = record.events, record.judged
    running = not events.stopped and runs.is_locked(folder)
    best, epsilon = record.best(chief), _finite(record.last("epsilon"))
    interval = interval_of(record.compared["federated"], chief)
    total = record.config.get("rounds")
    rounds, values = record.numbers(chief)
    points = spread(len(rounds), 40)
    return {
        "run": folder.name,
        "title": labels.title,
        "tags": labels.tags,
        "status": "running" if running else events.status or "unfinished",
        "plan": _short(record.environment.get("plan") or record.config.get("plan")),
        "data": _short(record.config.get("data")),
        "model": _short(record.config.get("model")),
        "began": events.began,
        "chief": label(chief),
        "best": None if best is None else [best[chief], best["round"]],
        "interval": None if interval is None else str(interval),
        "rounds": record.rows[-1]["round"] + 1 if record.rows else 0,
        "total": total if _is_number(total) else None,
        "bytes": record.total("bytes_up") + record.total("bytes_down"),
        "seconds": record.total("seconds"),
        **({} if epsilon is None else {"epsilon": epsilon}),
        "spark": [[rounds[i] for i in points], [_finite(values[i]) for i in points]],
    }


def client_curves(folder: Path, name: str) -> dict[str, dict[str, Any]] | None:
    """The curves of one client by its name or its id; None if the run has no such client."""
    record = RunData.read(folder)
    names, why = _names(folder, record), removed(record)
    known = _known_clients(record, [], names)
    found = [i for i in known if name == client_name(i, names, 80)] or [i for i in known if name == str(i)]
    if not found:
        return None
    return {} if why else _client_curves(record, _held_out(folder), found[:1], names)


def to_json(value: Any) -> bytes:
    """A value as JSON bytes. NaN and infinity become null, and half a surrogate pair becomes a question mark.

    Example:
        >>> to_json([1.5, float("nan"), "a"])
        b'[1.5,null,"a"]'
    """
    try:
        return msgspec.json.encode(value)
    except UnicodeEncodeError:
        text = json.dumps(msgspec.to_builtins(value), ensure_ascii=False).encode("utf-8", "replace")
        return msgspec.json.encode(json.loads(text))


def files(folder: Path, report: bool = False) -> list[str]:
    """The files that a page may show: names of a fixed list, and the figures in `plots`."""
    plots = sorted(p.name for p in (folder / "plots").glob("*") if p.suffix in (".svg", ".png", ".pdf"))
    there = [n for n in FILES if (folder / n).is_file() or (report and n == "report.html")]
    return there + [f"plots/{n}" for n in plots[:100]]


def _short(value: Any, most: int = 500) -> str:
    return "" if value is None else str(value)[:most]


def _columns(record: RunData) -> list[str]:
    """The columns with numbers: metrics by `judged`, values over clients, the rest, and counts."""
    first = judged(record.columns)
    metrics = [*first, *(n for n in record.columns if n not in first)]
    counts = [n for n in COUNTS if n not in ("round", "fingerprint")]
    counted = [n for n in counts if record.has(n)]
    return (metrics + counted)[:_MOST_COLUMNS]


def _is_number(value: Any) -> bool:
    return type(value) in NUMBERS


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _curve(record: RunData, name: str) -> list[list[float | None]]:
    x, y = thin(*record.numbers(name), MOST_POINTS)
    return [[int(v) for v in x], [_finite(v) for v in y]]


def _costs(record: RunData) -> dict[str, list[float | None]]:
    """The running totals of a run, for curves over bytes and time."""
    chosen = spread(len(record.rows), MOST_POINTS)
    if not chosen:
        return {}
    up, down, seconds = (_amounts(record, name) for name in ("bytes_up", "bytes_down", "seconds"))
    clocks: list[Any] = [row.get("clock") for row in record.rows]
    clock: Iterable[Any] = accumulate(clocks, lambda last, v: v if _is_number(v) else last)
    columns: dict[str, list[Any]] = {
        "round": [row["round"] for row in record.rows],
        "bytes": list(accumulate(map(add, up, down))),
        "seconds": list(accumulate(seconds)),
        "clock": [_finite(v) if _is_number(v) else None for v in clock],
    }
    return {name: [column[i] for i in chosen] for name, column in columns.items()}


def _amounts(record: RunData, name: str) -> list[float]:
    """The numbers of a column; 0 where a row has no finite number."""
    values: Iterable[Any] = (row.get(name) for row in record.rows)
    return [float(v) if _is_number(v) and math.isfinite(v) else 0.0 for v in values]


def _answers(record: RunData) -> list[TextTable]:
    table, chief = record.compared, record.judged.removeprefix(PERSONAL)
    names = judged(record.columns)
    own, out = own_row_cells(table, chief), []
    if own:
        out.append(TextTable(f"{label(chief)} of clients, each on its own held-out rows", own))
    if names:
        order = [chief, *(n for n in names if n != chief)]
        out.append(TextTable("all held-out rows, with 95 % intervals in brackets", all_row_cells(table, order, order)))
    return out


def _skipped(record: RunData) -> list[str]:
    reason = record.events.baselines.get("skipped", {}).get("reason")
    return [] if reason is None else [f"Not compared: {plain(reason, 300)}"]


def _rules(record: RunData) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for name in ("pooled", "local", "constant", "constant_clients"):
        for metric in record.columns:
            value = _finite(record.baseline(name, metric))
            if value is not None:
                found.setdefault(metric, {})[name] = value
    return found


def _sums(record: RunData) -> dict[str, float | None]:
    sums: dict[str, float | None] = {n: record.total(n) for n in ("bytes_up", "bytes_down", "seconds", "cohort")}
    return sums | {
        "clock": _finite(record.last("clock")),
        "wall": _finite(record.events.wall),
        "late": record.total("late"),
        "lost": sum(each.count for each in record.events.lost.values()),
        "active": _finite(record.last("arrived")),
        "selected": _finite(record.last("cohort")),
    }


def removed(record: RunData) -> str:
    """The reason why the server of a run has no values of single clients; empty if it has them."""
    plan = str(record.environment.get("plan") or record.config.get("plan") or "")
    if re.search(r"\bsecure=(?!None\b|False\b)", plan):
        return "secure sum"
    return "noise" if re.search(r"\bNoise\(", plan) or record.last("epsilon") is not None else ""


def _banner(record: RunData) -> str:
    seeded = record.config.get("randomness") == "seed" or any(NOT_PRIVATE in note for note in record.events.notes)
    return NOT_PRIVATE if seeded and removed(record) == "noise" else ""


def _privacy(record: RunData) -> dict[str, float | None]:
    epsilon = record.last("epsilon")
    if epsilon is None:
        return {}
    config = record.config
    given = {n: float(config[n]) for n in ("budget", "delta") if _is_number(config.get(n))}
    return {"epsilon": _finite(epsilon), **given}


def _confusion(record: RunData) -> TextTable | None:
    caption = "Rows: the class of the held-out rows. Columns: the predicted class."
    return None if record.confusion is None else TextTable(caption, record.confusion.cells(40))


def _clients(folder: Path, record: RunData) -> ClientTable:
    events, why = record.events, removed(record)
    held = _held_out(folder) if not why else []
    own = held[-1] if held else {}
    names = _names(folder, record)
    known = _known_clients(record, own.get("id", []), names)
    ids = known[:MOST_CLIENTS]
    columns = [*_own_columns(own, ids), *_training_columns(record, ids, why)]
    tally = events.tally
    part = "" if tally.rounds == tally.of else f", in {tally.rounds:,} of {tally.of:,} rounds"  # of a long log
    for name, each in (("bytes_up", tally.up), ("bytes_down", tally.down)):
        columns.append(ClientColumn(name, f"{name.replace('_', ' ')}{part}", "bytes", [each.get(i) for i in ids]))
    late = _late(record)
    columns.append(ClientColumn("late", "late", "count", [late.get(i, 0) for i in ids] if late is not None else []))
    columns.append(
        ClientColumn("lost", "lost", "count", [events.lost[i].count if i in events.lost else 0 for i in ids])
    )
    seen: list[float | None] = [events.seen[i][0] if i in events.seen else None for i in ids]
    columns.append(ClientColumn("seen", f"last seen in round{part}", "count", seen))
    columns = [c for c in columns if c.absent or any(v is not None for v in c.values)]
    shown = [client_name(i, names, 80) for i in ids]
    curves = {} if why else _client_curves(record, held, ids, names)
    return ClientTable(ids, shown, columns, len(known) - len(ids), curves) if ids else ClientTable()


def _known_clients(record: RunData, held: Iterable[Any], names: Sequence[str] | None) -> list[int]:
    events = record.events
    known = {*events.seen, *events.lost, *events.tally.up, *(i for i in held if isinstance(i, int))}
    return sorted(known | set(range(len(names or ()))))


def _names(folder: Path, record: RunData) -> Sequence[str] | None:
    """The names of the clients: of the first event of the run, or of clients.csv."""
    if record.events.names:
        return record.events.names
    file = folder / "clients.csv"
    if not file.is_file() or file.stat().st_size > _MOST_READ:
        return None
    import csv

    with open(file, encoding="utf-8", errors="replace", newline="") as text:
        rows = list(csv.reader(text))
    return [row[0] for row in rows[1:] if row] if rows and rows[0][:1] == ["client"] else None


def _own_columns(own: Mapping[str, Any], ids: Sequence[int]) -> list[ClientColumn]:
    """The last held-out values of clients on their own rows."""
    at = {client: n for n, client in enumerate(own.get("id", []))}
    found = []
    for name, values in own.items():
        if name not in ("id", "round", "rows"):
            column = [_cell(values, at.get(i)) for i in ids]
            found.append(ClientColumn(f"own_{name}", f"{label(name)}, own held-out rows", "number", column))
    return found


def _cell(values: Any, at: int | None) -> float | None:
    there = isinstance(values, list) and at is not None and at < len(values) and _is_number(values[at])
    return _finite(float(values[at])) if there and at is not None else None


def _training_columns(record: RunData, ids: Sequence[int], why: str) -> list[ClientColumn]:
    seen, absent = record.events.seen, f"not collected: {why}" if why else ""
    loss = [] if why else [_finite(seen[i][1]) if i in seen else None for i in ids]
    rows = [] if why else [_finite(seen[i][2]) if i in seen else None for i in ids]
    return [
        ClientColumn("loss", "training loss", "number", loss, absent),
        ClientColumn("rows", "train rows", "count", rows, absent),
    ]


def _late(record: RunData) -> dict[int, int] | None:
    """The number of late flights of each client; None if the run has no simulated clock."""
    if not record.events.trips:
        return None
    late: dict[int, int] = {}
    for trip in record.events.trips:
        if trip[7] == 2:
            late[trip[1]] = late.get(trip[1], 0) + 1
    return late


def _held_out(folder: Path) -> list[dict[str, Any]]:
    """Lines of clients.jsonl at equal distances, with the last one."""
    lines = _some_lines(folder / CLIENTS)
    found = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("id"), list) and isinstance(row.get("round"), int):
            found.append(row)
    return found


def _some_lines(file: Path) -> Iterable[bytes]:
    if not file.is_file():
        return []
    with open(file, "rb") as log:
        places, at = [], 0
        for line in log:
            places.append((at, len(line)))
            at += len(line)
        most = max(2, min(_POINTS, _MOST_READ // max((n for _, n in places), default=1)))
        out = []
        for n in spread(len(places), most):
            log.seek(places[n][0])
            out.append(log.read(places[n][1]))
    return out


def _client_curves(
    record: RunData, held: Sequence[Mapping[str, Any]], ids: Sequence[int], names: Sequence[str] | None
) -> dict[str, dict[str, Any]]:
    """The curves of up to `MOST_NAMED` clients: the selection metric on their own rows, else the training loss."""
    few = list(ids)[:MOST_NAMED]
    found: dict[str, dict[str, Any]] = {}
    chief = record.judged if any(record.judged in row for row in held) else "held_out_loss"
    own = [row for row in held if chief in row]
    if len(own) > 1:
        found[f"own_{chief}"] = _by_client([(r["round"], r["id"], r[chief]) for r in own], few, names)
    log = record.events.client_rows
    losses = [log[i] for i in spread(len(log), _POINTS)]
    if len(losses) > 1:
        found["loss"] = _by_client(losses, few, names)
    return found


def _by_client(
    rows: Sequence[tuple[int, list[int], Any]], ids: Sequence[int], names: Sequence[str] | None
) -> dict[str, Any]:
    at = [{client: n for n, client in enumerate(row[1])} for row in rows]
    y = [[_cell(row[2], places.get(i)) for row, places in zip(rows, at, strict=True)] for i in ids]
    return {"x": [row[0] for row in rows], "names": [client_name(i, names, 80) for i in ids], "y": y}


def _waiting(record: RunData) -> TextTable | None:
    """How long each client computed, sent and waited on the simulated clock."""
    trips = record.events.trips
    end = max((t[6] for t in trips), default=0.0)
    if not trips or end <= 0:
        return None
    work: dict[int, list[float]] = {}
    for _, client, _, start, loaded, computed, ended, fate in trips:
        each = work.setdefault(client, [0.0, 0.0, 0.0])
        each[0] += (loaded - start) + (ended - computed)
        each[1] += computed - loaded
        each[2] += ended - start if fate else 0.0
    rows = [["client", "sends and receives", "computes", "waits", "in work that was lost"]]
    for client in sorted(work, key=lambda c: sum(work[c][:2]))[:200]:
        sends, computes, lost = work[client]
        waits = max(0.0, end - sends - computes)
        name = client_name(client, record.events.names, 80)
        rows.append([name, *(duration(v) if v else "0 s" for v in (sends, computes, waits, lost))])
    return TextTable(f"time of each client within {duration(end)} of the simulated clock", rows)


def _failures(record: RunData) -> TextTable | None:
    lost = sorted(record.events.lost.items(), key=lambda pair: (-pair[1].count, pair[0]))
    if not lost:
        return None
    rows = [["client", "lost", "last round", "stage", "most frequent cause"]]
    for client, those in lost[:_MOST_LOST]:
        stage, cause = max(those.causes, key=lambda each: those.causes[each], default=("", ""))
        name = client_name(client, record.events.names, 80)
        rows.append([name, str(those.count), str(those.last), plain(stage, 40), plain(cause, 300)])
    more = f"; events.jsonl lists {len(lost) - _MOST_LOST} more clients" if len(lost) > _MOST_LOST else ""
    return TextTable(f"lost contributions by client{more}", rows)


def _lines(record: RunData) -> list[str]:
    if record.events.status == "failed":  # it has no model, and continues to the same failure
        return []
    name = record.name
    program = record.config if record.config.get("python") else None
    unnamed = program is not None and not model_name(program)  # no command can build it
    return [
        f'model = atoll.load("{name}"{", model" if unnamed else ""})',
        *([] if unnamed else [f"atoll predict {name} rows.csv"]),
        f"atoll resume {name} --more 10" if program is None else program_call(program, resume=name, more=10),
    ]


def _server(folder: Path) -> dict[str, Any] | None:
    """The state of the server in whose home the run is: `clients` with id, stage and time, `why`, `time`."""
    file = folder.parent.parent / "status.json"
    if folder.parent.name != "runs" or not file.is_file() or file.stat().st_size > _MOST_READ:
        return None
    try:
        status = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(status, dict) or not isinstance(status.get("clients"), list):
        return None
    clients = [c for c in status["clients"] if isinstance(c, dict)][:MOST_CLIENTS]
    return {"why": _short(status.get("why")), "time": status.get("time"), "clients": clients}
