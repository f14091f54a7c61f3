"""The summary of a run as text: outcome, comparison with constants and baselines, costs, files, the next command.

Tests: tests/surface/test_summary.py, tests/surface/test_cli.py
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from atoll.base.intervals import Interval
from atoll.base.names import with_noun
from atoll.compute.metric_names import OVER_CLIENTS, PERSONAL, base_metric
from atoll.runs.confusion import FILE, Confusion
from atoll.runs.format import better, duration, format_number, label, plain, rises, size, whole
from atoll.runs.inference import Inference
from atoll.runs.next_line import called, near, program_of, resume_line

_WIDE = 12  # classes of a confusion table that fits on a terminal
HIDDEN = ("gradient_norm", "lr")
ROWS = {
    "federated": "federated",
    "personal": "personal",
    "pooled": "pooled",
    "local": "local only",
    "constant": "constant",
    "constant_clients": "constant by client",
}
Baselines = Mapping[str, Mapping[str, Any]]


class Summarized(Protocol):
    """The members of a `Run` that its summary reads."""

    @property
    def path(self) -> Path | None: ...
    @property
    def rounds(self) -> int: ...
    @property
    def metrics(self) -> Mapping[str, float]: ...
    @property
    def best(self) -> Mapping[str, Any]: ...
    @property
    def reason(self) -> str: ...
    @property
    def status(self) -> str: ...
    @property
    def seconds(self) -> float: ...
    @property
    def bytes_up(self) -> int: ...
    @property
    def bytes_down(self) -> int: ...
    @property
    def failures(self) -> Sequence[Any]: ...
    @property
    def reports(self) -> Sequence[Any]: ...
    @property
    def baselines(self) -> Baselines: ...
    @property
    def privacy(self) -> Mapping[str, Any]: ...
    @property
    def notes(self) -> Sequence[str]: ...
    @property
    def wall(self) -> float: ...
    @property
    def confusion(self) -> Confusion | None: ...
    @property
    def inference(self) -> Inference | None: ...


def judged(names: Iterable[str]) -> list[str]:
    """The names of metrics over all rows, then of losses: the order of columns.

    Example:
        >>> judged(["loss", "lr", "held_out_loss", "auc", "auc_clients"])
        ['auc', 'held_out_loss', 'loss']
    """
    names = list(names)
    there = [n for n in names if n not in HIDDEN and base_metric(n) not in names and not n.startswith(PERSONAL)]
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


def summary(run: Summarized) -> str:
    """The last lines of a run: outcome, comparison, costs, files, and the next command.

    Args:
        run: the run.
    """
    lines = ["", f"{run.status}: {run.reason}", ""]
    lines += [f"note    {plain(note, 500)}" for note in run.notes] + ([""] if run.notes else [])
    lines += comparison(run.metrics, run.baselines, run.best.get("metric"))
    lines += confused(run.confusion)
    lines += [] if run.inference is None else ["", *run.inference.text().splitlines()]
    if run.best:
        best = run.best
        lines += ["", f"best    {label(best['metric'])} {format_number(best['value'])}, in round {best['round']}"]
    else:
        lines.append("")
    if run.privacy:
        p = run.privacy
        lines.append(f"privacy ε = {p['epsilon']:.4g} at δ = {p['delta']:g} for each {p['unit']} ({p['relation']})")
        lines.append(f"        {p['claim']}")
    failures = f", {whole(len(run.failures))} failures" if run.failures else ""
    now = run.reports[-1].now if run.reports else None
    lines.append(spent(run.rounds, run.seconds, run.bytes_up, run.bytes_down, now, run.wall) + failures)
    if run.path is not None:
        lines.append(f"run     {near(run.path)}")
        for title, name in (("model", "model.safetensors"), ("report", "report.html")):
            if (run.path / name).is_file():
                lines.append(f"{title:<8}{near(run.path / name)}")
        lines.append(f"page    atoll ui {called(run.path)}")
    lines.append(f"next    {following(run)}")
    return "\n".join(lines)


def confused(table: Confusion | None) -> list[str]:
    """The lines of a confusion table; for a wide one, the name of its file."""
    if table is None:
        return []
    few = len(table.classes) <= _WIDE
    return ["", *table.text().splitlines()] if few else ["", f"confusion of {len(table.classes)} classes: {FILE}"]


def spent(rounds: int, seconds: float, up: int, down: int, now: float | None = None, wall: float | None = None) -> str:
    """The costs of a run. `seconds` is the time of its rounds.

    `now` is the time of its virtual clock, if it has one, and `wall` the time from start to end.

    Example:
        >>> spent(3, 0.5, 2408, 2400)
        'spent   3 rounds, 0.50 s, ↑ 2.41 kB ↓ 2.40 kB'
        >>> spent(3, 0.5, 2408, 2400, 75.0)
        'spent   3 rounds, 0.50 s, ↑ 2.41 kB ↓ 2.40 kB, 1:15 min on the clock'
    """
    clock = "" if now is None else f", {duration(now)} on the clock"
    command = "" if wall is None else f" of {duration(wall)}"
    return f"spent   {with_noun(rounds, 'round')}, {duration(seconds)}{command}, ↑ {size(up)} ↓ {size(down)}{clock}"


def following(run: Summarized) -> str:
    """The next command."""
    if run.path is None:
        return "atoll run"
    if run.status == "interrupted":
        return resume_line(run.path)
    if "local" not in run.baselines and "skipped" not in run.baselines and not run.privacy:
        same = "--baselines" if program_of(run.path) is None else "baselines=True"
        return f"atoll show {called(run.path)}, or the same with {same}, for pooled and local-only training"
    return f"atoll show {called(run.path)}"


def comparison(metrics: Mapping[str, Any], baselines: Baselines, chief: str | None = None) -> list[str]:
    """Tables of the last values: the federated model, the trained baselines and the constants; then the findings.

    If clients were evaluated on their own rows, these values come first.

    Args:
        metrics: the last value of each metric of the run.
        baselines: as in `Run.baselines`.
        chief: the selection metric; None: the first metric.
    Example:
        >>> baselines = {"federated": {"accuracy": 0.95}, "constant": {"accuracy": 0.1}}
        >>> print("\\n".join(comparison({"accuracy": 0.95, "lr": 1.0}, baselines)))
                     accuracy
        federated      0.9500
        constant       0.1000
    """
    names = judged(metrics)
    if not names:
        return []
    chief = (chief or "").removeprefix(PERSONAL)  # the models of clients are a row of the table
    chief = chief if chief in names else names[0]
    table = {"federated": {**metrics, **baselines.get("federated", {})}}
    table |= {name: dict(baselines[name]) for name in ROWS if name in baselines and name != "federated"}
    own = own_row_cells(table, chief)
    lines = [f"{label(chief)} of clients, each on its own held-out rows", *grid(own), ""] if own else []
    lines += ["all held-out rows"] if own else []
    lines += grid(all_row_cells(table, [chief, *(n for n in names if n != chief)], [chief]))
    lines += [line for text in findings(table, chief) for line in ("", text)]
    skipped = baselines.get("skipped")
    return [*lines, f"no comparison: {skipped['reason']}"] if skipped else lines


def own_row_cells(table: Baselines, chief: str) -> list[list[str]]:
    """The cells of the table over clients: mean, median, worst tenth, worst client, standard deviation, and the number
    of clients that have a value.

    [] if no client was evaluated.
    """
    heads = ("mean", "median", "worst tenth", "worst client", "sd", "clients")  # in the order of OVER_CLIENTS
    found = {n: row for n, row in table.items() if row.get(f"{chief}_clients") is not None}
    if "federated" not in found:
        return []
    cells = []
    for name, row in found.items():
        count = row["defined"].get(chief) if isinstance(row.get("defined"), Mapping) else None
        values = (format_number(row.get(f"{chief}_{of}")) for of in OVER_CLIENTS)
        cells.append([ROWS[name], *values, whole(count) if isinstance(count, int) else "–"])
    return [["", *heads], *cells]


def all_row_cells(table: Baselines, names: Sequence[str], measured: Collection[str]) -> list[list[str]]:
    """The cells of the table over all held-out rows.

    Args:
        table: the rows of the comparison by name.
        names: the metrics, one column each.
        measured: the metrics that are shown with their interval, if one is known.
    """
    shown = {n: row for n, row in table.items() if any(row.get(name) is not None for name in names)}
    work = [w for w in ("samples", "steps") if any(w in row for row in shown.values())]
    out = [["", *map(label, names), *work]]
    for name, row in shown.items():
        intervals = {n: interval_of(row, n) for n in measured}
        cells = [str(intervals.get(n) or format_number(row.get(n))) for n in names]
        out.append([ROWS[name], *cells, *("–" if row.get(w) is None else whole(row[w]) for w in work)])
    return out


def interval_of(row: Mapping[str, Any], metric: str) -> Interval | None:
    """The 95 % interval of a metric in a row of the comparison; None if it has none."""
    found, value = row.get("intervals"), row.get(metric)
    ends = found.get(metric) if isinstance(found, Mapping) else None
    numbers = (value, *ends) if isinstance(ends, (list, tuple)) else ()
    if len(numbers) != 4 or not all(isinstance(v, (int, float)) for v in numbers):
        return None
    return Interval(float(value or 0.0), float(numbers[1]), float(numbers[2]), int(numbers[3]))


def findings(table: Baselines, chief: str) -> list[str]:
    """Sentences about a run: whether it is no better than a constant, and for how many clients it beats local models.

    Args:
        table: the rows of the comparison, with `federated`.
        chief: the selection metric.
    Example:
        >>> rows = {"federated": {"accuracy": 0.93}, "constant": {"accuracy": 0.93}}
        >>> findings(rows, "accuracy")
        ['The model is no better than the constant answer: accuracy 0.9300, constant 0.9300.']
    """
    out = []
    rising, federated = rises(chief), table.get("personal", table.get("federated", {}))
    for constant, name, whose in (
        ("constant", chief, "the constant answer"),
        ("constant_clients", f"{chief}_clients", "the constant answer of each client on its own rows"),
    ):
        ours, theirs = federated.get(name), table.get(constant, {}).get(name)
        if rising is None or ours is None or theirs is None or better(ours, theirs, rising):
            continue
        values = f"{label(name)} {format_number(ours)}, constant {format_number(theirs)}"
        out.append(f"The model is no better than {whose}: {values}.")
    local = table.get("local", {})
    names = ("federated_better", "compared", "median_difference", "worst_difference")
    numbers = [v for n in names if isinstance(v := local.get(n), (int, float))]
    if local.get("metric") == chief and len(numbers) == len(names):
        ahead, of, middle, worst = numbers
        out.append(
            f"Federated beats local only for {whole(ahead)} of {whole(of)} clients on their own rows: the gain in "
            f"{label(chief)} is {middle:.3g} in the median, {worst:.3g} at worst."
        )
    return out
