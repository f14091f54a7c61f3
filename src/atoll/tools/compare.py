"""Compare two runs: different settings, metrics, costs, and the first round and tensor in which they differ. Compare
one metric of any number of runs, with a band over seeds.

    atoll compare A B
    atoll compare "2026-*" --to figure.svg

Tests: tests/surface/test_tools.py, tests/surface/test_figure.py
"""

from __future__ import annotations

import fnmatch
import glob
import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atoll import runs
from atoll.base.errors import UsageError, unknown_name
from atoll.base.files import write_output
from atoll.base.lines import Line
from atoll.base.markup import mimebundle, preformatted
from atoll.base.names import COUNTS, dotted
from atoll.compute.metric_names import base_metric, direction
from atoll.report.comparison import CLOCK, SECONDS, Curve, MetricComparison
from atoll.report.figure import AXES, Comparison, SeedGroup, X
from atoll.report.run_data import Events, RunData
from atoll.runs.format import format_number, label
from atoll.runs.labels import Labels
from atoll.training.engine_fields import is_old_default

if TYPE_CHECKING:
    from atoll.runs.events import Run

_NO_LINE = ("seed", "out", "report", "baselines", "checkpoint_s")  # the seed, and settings that change no metric
_TAIL = 1 << 16  # bytes at the end of events.jsonl that contain its last line
_LONG = 48  # characters; a longer setting is printed on separate lines
# The dtypes of safetensors that NumPy has. A command without torch starts in a quarter of a second.
_OF_NUMPY = ("F64", "F32", "F16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")
PLAIN = ("gradient_norm", "lr")  # shown without a mark, because neither direction is better


@dataclass(frozen=True)
class ComparisonRow:
    """One quantity of both runs.

    Args:
        name: the name of the quantity.
        a, b: its values; None if the run has no value.
        best: "a" or "b", the better run; "" if they are equal, one is missing, no direction is better, or the runs
            were evaluated on different rows.
    """

    name: str
    a: Any
    b: Any
    best: str = ""


@dataclass(frozen=True, repr=False)
class PairComparison:
    """The result of `compare_pair`.

    Args:
        a, b: the names of the run folders.
        settings: the settings of config.toml that differ.
        metrics: the last value of each metric.
        totals: rounds, bytes, seconds, failures.
        through: the last round up to which all fingerprints are equal; −1 if the first one differs, None if the runs
            share no round with a fingerprint.
        parted: whether some round of both runs has different fingerprints.
        tensors: the tensors of the final models that differ, by name, the weight of a layer first: name and largest
            |a − b|, or the reason why they cannot be compared.
        models: whether both final models exist.
        metric: the selection metric of both runs by bytes and by time; None if they share no metric.
        plot: the path of its plot; None if no plot was requested.
        caution: a sentence if the runs were evaluated on different held-out rows, or the rows of one are unknown. No
            value is then marked as the better one.
    """

    a: str
    b: str
    settings: tuple[ComparisonRow, ...]
    metrics: tuple[ComparisonRow, ...]
    totals: tuple[ComparisonRow, ...]
    through: int | None
    parted: bool
    tensors: tuple[tuple[str, float | str], ...]
    models: bool
    metric: MetricComparison | None = None
    plot: Path | None = None
    caution: str = ""

    @property
    def reached(self) -> tuple[ComparisonRow, ...]:
        """The cost of each run until it reached the target: rounds, bytes, time."""
        if self.metric is None:
            return ()
        at = self.metric.at
        out = []
        for name, of, whole in (
            ("rounds", [[t + 1 for t in c.rounds] for c in self.metric.curves], True),
            ("bytes", [c.bytes for c in self.metric.curves], True),
            (self.metric.time, [c.times for c in self.metric.curves], False),
        ):
            costs = [None if i is None else c[i] for c, i in zip(of, at, strict=True)]
            a, b = ((None if c is None else int(c)) if whole else c for c in costs)
            best = "" if a == b or self.caution else "a" if b is None or (a is not None and a < b) else "b"
            out.append(ComparisonRow(name, a, b, best))
        return tuple(out)

    @property
    def verdict(self) -> str:
        """The first difference as one sentence: `identical through round 37, first differs in fc1.weight`."""
        if self.through is None:
            head = "no round to compare"
        elif self.through < 0:
            head = "different from round 0 on"
        elif self.parted:
            head = f"identical through round {self.through}"
        else:
            head = f"identical in all {self.through + 1} shared rounds"
        if not self.tensors:
            models = "the final models are bit-identical" if self.models else "a final model is missing"
            return f"{head}; {models}"
        name, gap = self.tensors[0]
        detail = gap if isinstance(gap, str) else f"by up to {gap:.3g}"
        more = f"; {len(self.tensors)} tensors differ" if len(self.tensors) > 1 else ""
        then = "; the final models are from different rounds:" if self.through is not None and not self.parted else ","
        return f"{head}{then} first differs in {name} ({detail}{more})"

    def __repr__(self) -> str:
        return f"PairComparison({self.a!r}, {self.b!r}, settings={len(self.settings)}, through={self.through})"[:400]

    def _repr_html_(self) -> str:
        return preformatted(self.text())

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        return mimebundle(self)

    def text(self) -> str:
        """Format the result as text; * marks the better run."""
        blocks = [[("", self.a, self.b, "")]]
        long = [x for x in self.settings if max(len(_shown(v)) for v in (x.a, x.b)) > _LONG]
        for title, lines in (
            ("settings that differ", tuple(x for x in self.settings if x not in long)),
            ("metrics", self.metrics),
            ("cost", self.totals),
            (self._goal, self.reached),
        ):
            if lines:
                rows = ((f"  {x.name}", _shown(x.a), _shown(x.b), x.best) for x in lines)
                blocks.append([(title, "", "", ""), *rows])
        cells = [cell for block in blocks for cell in block]
        wide, left = max(len(c[0]) for c in cells), max(len(c[1]) for c in cells)
        out = []
        for name, a, b, mark in cells:
            row = f"{name:<{wide}}  {a:>{left}}{'*' if mark == 'a' else ' '}  {b}{' *' if mark == 'b' else ''}"
            out.append(row.rstrip())
        drawn = [] if self.plot is None else ["", f"plot    {self.plot}"]
        changed = [line for x in long for line in ("", x.name, f"  {_shown(x.a)}", f"  {_shown(x.b)}")]
        first = [self.caution, ""] if self.caution else []
        return "\n".join([*first, *out, *changed, "", self.verdict, *drawn])

    @property
    def _goal(self) -> str:
        it = self.metric
        return "" if it is None else f"until {label(it.metric)} {format_number(it.target)}"


def compare_pair(
    a: str | Path, b: str | Path, out: str | Path | None = None, target: float | None = None
) -> PairComparison:
    """Compare two runs. Both run folders are only read.

    Args:
        a, b: the run folders. The runs may differ in data, model and length.
        out: a folder, or an SVG, PNG or PDF file, for the chart of the selection metric by bytes and by time; None
            draws no chart.
        target: a value of this metric, to compare the cost of reaching it; None is the worse of the two best values.
    Returns:
        the differences, the metrics and the costs.
    Raises:
        UsageError: a folder is not a run folder, or a target is given and the runs share no metric.
    """
    one, other = Path(a).resolve(), Path(b).resolve()
    mine, theirs = _config(one), _config(other)
    rows = [runs.read_rows(folder / "metrics.jsonl") for folder in (one, other)]
    keys = [k for k in dict.fromkeys((*mine, *theirs)) if mine.get(k) != theirs.get(k)]
    through, parted = _through(*rows)
    tensors, models = _tensors(one, other)
    metric = MetricComparison.of(_record(one, rows[0]), _record(other, rows[1]), target)
    caution, clients = _held_out(one, other)
    if metric is None and target is not None:
        raise UsageError(
            f"target = {target:g} for {one.name} and {other.name}.",
            "two runs that share a metric with a known better direction.",
            "a target is a value of a shared metric.",
            f"atoll compare {one.name} {other.name}",
        )
    return PairComparison(
        one.name,
        other.name,
        tuple(ComparisonRow(k, mine.get(k), theirs.get(k)) for k in keys),
        tuple(_unmarked(row, bool(caution) or bool(base_metric(row.name) and clients)) for row in _metrics(*rows)),
        tuple(_unmarked(row, bool(caution)) for row in _totals(*rows)),
        through,
        parted,
        tensors,
        models,
        metric,
        None if out is None or metric is None else _drawn(metric, Path(out)),
        caution,
    )


def _held_out(a: Path, b: Path) -> tuple[str, bool]:
    """A sentence if the held-out rows differ or are unknown, and whether the rows of some clients differ."""
    mine, theirs = runs.read_environment(a), runs.read_environment(b)
    unknown = [path.name for path, about in ((a, mine), (b, theirs)) if "held_out" not in about]
    clients = mine.get("held_out_clients") != theirs.get("held_out_clients")
    if unknown:
        return f"The held-out rows of {' and of '.join(unknown)} are not known: no winner is marked.", clients
    if mine["held_out"] != theirs["held_out"]:
        return "The runs were evaluated on different held-out rows: no winner is marked.", clients
    return "", clients


def _unmarked(row: ComparisonRow, unfair: bool) -> ComparisonRow:
    return replace(row, best="") if unfair else row


def _record(folder: Path, rows: Sequence[Mapping[str, Any]]) -> RunData:
    """The rows of a run as `RunData`, without its events."""
    good = tuple(r for r in rows if isinstance(r, dict) and type(r.get("round")) is int)
    return RunData(folder.name, good, {}, "", {}, Events())


def _drawn(metric: MetricComparison, out: Path) -> Path:
    """Write the plot and return its path."""
    from atoll.report.comparison_chart import comparison_drawing
    from atoll.report.export import rendered

    name = f"compare-{'-'.join(c.name[:60] for c in metric.curves)}.svg"
    file = out if out.suffix in (".svg", ".png", ".pdf") else out / name
    write_output(file, rendered(comparison_drawing(metric), file.suffix[1:]))
    return file


def _config(folder: Path) -> dict[str, Any]:
    try:
        values = dotted(tomllib.loads((folder / "config.toml").read_text(encoding="utf-8")))
        return {key: value for key, value in values.items() if not is_old_default(key, value)}
    except OSError:
        raise UsageError(
            f"{folder} is not the folder of a run.",
            "a folder with a config.toml.",
            "config.toml contains the settings to compare.",
            "atoll runs",
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{folder / 'config.toml'} is malformed: {error}.",
            "valid TOML.",
            "config.toml contains the settings to compare.",
            "atoll runs",
        ) from None


def _metrics(a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]]) -> tuple[ComparisonRow, ...]:
    last: list[dict[str, Any]] = [{}, {}]
    for into, rows in zip(last, (a, b), strict=True):
        for row in rows:
            into |= {n: v for n, v in row.items() if n not in COUNTS and v is not None}
    mine, theirs = last
    return tuple(
        ComparisonRow(n, mine.get(n), theirs.get(n), _best(n, mine.get(n), theirs.get(n)))
        for n in dict.fromkeys((*mine, *theirs))
    )


def _best(name: str, a: Any, b: Any) -> str:
    """The better of two values by the direction of the metric: "a", "b" or ""."""
    sign = direction(name)
    numbers = all(isinstance(x, (int, float)) and math.isfinite(x) for x in (a, b))
    if sign is None or name in PLAIN or not numbers or a == b:
        return ""
    return "a" if (a > b) == (sign > 0) else "b"


def _totals(a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]]) -> tuple[ComparisonRow, ...]:
    out = [ComparisonRow("rounds", len(a), len(b))]
    for name, words in (
        ("bytes_up", "bytes up"),
        ("bytes_down", "bytes down"),
        ("seconds", SECONDS),
        ("failed", "failures"),
        ("late", "late contributions"),
    ):
        mine, theirs = (sum(row.get(name) or 0 for row in rows) for rows in (a, b))
        # Fewer rounds cost less, so only runs of equal length are ranked.
        best = "" if mine == theirs or len(a) != len(b) else "a" if mine < theirs else "b"
        if name != "late" or mine or theirs:
            out.append(ComparisonRow(words, round(mine, 3), round(theirs, 3), best))
    first, second = (_last_clock(rows) for rows in (a, b))
    if first is not None or second is not None:
        fair = len(a) == len(b) and first is not None and second is not None and first != second
        out.append(ComparisonRow(CLOCK, first, second, ("a" if (first or 0) < (second or 0) else "b") if fair else ""))
    return tuple(out)


def _last_clock(rows: Sequence[Mapping[str, Any]]) -> float | None:
    return max((v for r in rows if isinstance(v := r.get("clock"), (int, float))), default=None)


def _through(a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]]) -> tuple[int | None, bool]:
    """The last round up to which all fingerprints agree, and whether a later one differs."""
    mine, theirs = ({row.get("round"): row.get("fingerprint") for row in rows} for rows in (a, b))
    common = sorted(t for t in mine.keys() & theirs.keys() if isinstance(t, int) and mine[t] and theirs[t])
    last = -1 if common else None
    for t in common:
        if mine[t] != theirs[t]:
            return last, True
        last = t
    return last, False


def _tensors(a: Path, b: Path) -> tuple[tuple[tuple[str, float | str], ...], bool]:
    """The tensors of the final models that differ, and whether both models exist."""
    files = [folder / "model.safetensors" for folder in (a, b)]
    if not all(file.is_file() for file in files):
        return (), False
    from safetensors import SafetensorError, safe_open

    out: list[tuple[str, float | str]] = []
    try:
        with safe_open(files[0], "np") as mine, safe_open(files[1], "np") as theirs:
            names, others = set(mine.keys()), set(theirs.keys())
            for name in sorted(names | others, key=_weight_first):
                if name not in others or name not in names:
                    out.append((name, f"only in {a.name if name in names else b.name}"))
                    continue
                kinds = [(s.get_dtype(), s.get_shape()) for s in (mine.get_slice(name), theirs.get_slice(name))]
                if kinds[0] != kinds[1]:
                    out.append((name, " and ".join(f"{dtype} {shape}" for dtype, shape in kinds)))
                elif (gap := _gap(files, name, (mine, theirs) if kinds[0][0] in _OF_NUMPY else ())) is not None:
                    out.append((name, gap))
    except (SafetensorError, OSError):
        return (), False
    return tuple(out), True


def _gap(files: Sequence[Path], name: str, opened: Sequence[Any]) -> float | None:
    """The largest |a − b| of a tensor in two files; None if the tensors are equal.

    Args:
        opened: both files for NumPy; empty: the dtype of the tensor is one of torch only.
    """
    if opened:
        import numpy as np  # a comparison of many runs reads no tensor, and starts without it

        x, y = (file.get_tensor(name) for file in opened)
        return None if np.array_equal(x, y) else float(np.abs(x.astype(np.float64) - y.astype(np.float64)).max())
    import torch
    from safetensors import safe_open

    with safe_open(files[0], "pt") as mine, safe_open(files[1], "pt") as theirs:
        one, other = mine.get_tensor(name), theirs.get_tensor(name)
    return None if torch.equal(one, other) else float((one.double() - other.double()).abs().max())


def _weight_first(name: str) -> tuple[str, bool, str]:
    layer, _, leaf = name.rpartition(".")
    return layer, leaf != "weight", leaf


def _shown(value: Any) -> str:
    match value:
        case None:
            return "–"
        case bool() | str():
            return str(value)
        case int():
            return f"{value:,}"
        case float():
            return f"{value:.6g}"
    return str(value)


@dataclass(frozen=True, eq=False)
class _Found:
    """A run folder: its settings, its rows, its seed, and the settings that runs of one line share."""

    path: Path
    config: Mapping[str, Any]
    record: RunData
    held_out: str

    @property
    def key(self) -> str:
        return repr(sorted((name, repr(value)) for name, value in self.config.items() if name not in _NO_LINE))

    @property
    def prints(self) -> tuple[Any, ...]:
        return tuple(row.get("fingerprint") for row in self.record.rows)

    @classmethod
    def read(cls, path: Path) -> _Found:
        config, about = _config(path), runs.read_environment(path)
        if config.get("python"):  # its settings name objects of a program only
            config |= {"layout": about.get("layout")}
        # A resumed run records the choice of atoll where the run of another seed has "auto".
        config |= {name: about[name] for name in ("numerics", "device") if config.get(name) == "auto" and name in about}
        return cls(path, config, _record(path, runs.read_rows(path / "metrics.jsonl")), str(about.get("held_out", "")))


def compare(
    *given: Run | str | Path,
    group: str | None = None,
    metric: str | None = None,
    x: X = "round",
    target: float | None = None,
    out: str | Path = "runs",
) -> Comparison:
    """Compare one metric of any number of runs. Runs that differ only in the seed form one line.

    Args:
        given: runs, paths and names of run folders, globs of names, and folders that contain run folders.
        group: a setting; runs with an equal value of it form one line. None: runs with all settings equal, except the
            seed and the settings that change no metric.
        metric: a column of metrics.jsonl; None: the selection metric.
        x: the horizontal axis: "round", "bytes" or "seconds" up to the round, or "clock", the virtual time.
        target: a value of the metric; the table then has the rounds to reach it.
        out: the parent of run folders, for names.
    Returns:
        The lines, with `figure`, `frame`, `table` and `save`.
    Raises:
        UsageError: no such run, metric or setting, or a run without the metric or without virtual time.
    Example:
        >>> import atoll, tempfile
        >>> out = tempfile.mkdtemp()
        >>> data = atoll.data.load("digits").split(clients=3)
        >>> options = {"rounds": 2, "out": out, "report": False}
        >>> made = [atoll.train("softmax", data, atoll.recipes.fedavg(0.1), seed=s, **options) for s in (0, 1)]
        >>> found = atoll.compare(*made)
        >>> [(line.name == made[0].path.name, len(line.curves)) for line in found.groups]
        [(True, 2)]
    """
    if x not in AXES:
        raise unknown_name("axis", x, AXES, lambda near: Line(f'x="{near}"', f"--x {near}"))
    found = [_Found.read(path) for path in dict.fromkeys(find_runs(given, Path(out)))]
    if not found:
        raise UsageError("No run.", "at least one run.", write="atoll runs")
    found, notes = _distinct(found)
    column = _column(found, metric)
    if target is not None and direction(column) is None:
        raise UsageError(
            f"target = {target:g} for {column}.", "a metric with a known better direction.", "a target is reached."
        )
    lacking = [f.path.name for f in found if x == "clock" and f.record.last("clock") is None]
    if lacking:
        raise UsageError(
            f"{lacking[0]} has no virtual time.", "runs with a fleet.", write=Line('x="seconds"', "--x seconds")
        )
    lines: dict[str, list[_Found]] = {}
    _check_setting(group, found)
    for one in found:
        lines.setdefault(one.key if group is None else repr(one.config.get(group)), []).append(one)
    names = _line_names(list(lines.values()), group)
    groups = tuple(
        SeedGroup(
            name,
            tuple(f.path.name for f in line),
            frozenset(f.held_out for f in line if all(other.held_out for other in line)),
            _common(line, column, CLOCK if x == "clock" else SECONDS),
        )
        for name, line in zip(names, lines.values(), strict=True)
    )
    return Comparison(column, x, groups, target, (*notes, *_remarks(list(lines.values()), groups)))


def find_runs(given: Sequence[Any], parent: Path) -> list[Path]:
    """The folders of runs: of runs, paths, names, globs, and folders that contain run folders.

    Raises:
        UsageError: no run, or several runs for a name, or a run without a folder.
    """
    found: list[Path] = []
    for one in given:
        where = getattr(one, "path", one)
        if where is None:
            raise UsageError("A run without a folder.", "a run with a folder.", write=Line(python='out="runs"'))
        folder, text = Path(where), str(where)
        within = [] if (folder / "config.toml").is_file() else runs.list_runs(folder) or runs.list_runs(parent / text)
        if within:
            found += within
        elif "*" in text:
            fits = [p for p in runs.list_runs(parent) if fnmatch.fnmatch(p.name, text)]
            fits = fits or [Path(p) for p in sorted(glob.glob(text)) if (Path(p) / "config.toml").is_file()]
            if not fits:
                raise UsageError(f"No run matches {text} in {parent}.", "at least one run.", write="atoll runs")
            found += fits
        else:
            found.append(runs.find_run(where, parent))
    return [path.resolve() for path in found]


def _distinct(found: Sequence[_Found]) -> tuple[list[_Found], list[str]]:
    """The runs without repetitions: equal settings, seed and bits. A repetition would make the band too narrow."""
    kept: dict[tuple[Any, ...], _Found] = {}
    notes = []
    for one in found:
        same = kept.setdefault((one.key, one.config.get("seed"), one.prints), one)
        if same is not one:
            notes.append(f"{one.path.name} repeats {same.path.name}, and is left out.")
    return list(kept.values()), notes


def _column(found: Sequence[_Found], metric: str | None) -> str:
    """The column to compare: every run must have numbers of it."""
    having = [{n for n in f.record.named if f.record.has(n)} - {"round"} for f in found]
    shared = [n for n in found[0].record.named if all(n in each for each in having)]
    empty = next((f.path.name for f, each in zip(found, having, strict=True) if not each), "")
    if empty:
        raise UsageError(f"{empty} has no finished round.", "runs with at least one round.", write="atoll runs")
    if metric is None:
        usual = [n for n in (found[0].record.judged, *found[0].record.columns) if n in shared]
        if not usual:
            raise UsageError("The runs share no metric.", "runs with a metric in common.", write="atoll runs")
        return usual[0]
    lacking = next((f.path.name for f, each in zip(found, having, strict=True) if metric not in each), "")
    if lacking and not any(metric in each for each in having):
        raise unknown_name("metric", metric, shared, lambda near: Line(f'metric="{near}"', f"--metric {near}"))
    if lacking:
        raise UsageError(
            f"{lacking} has no values of {metric}.",
            f"a column of all runs: {', '.join(shared)}.",
            "each line needs it.",
        )
    return metric


def _check_setting(group: str | None, found: Sequence[_Found]) -> None:
    known = {name for f in found for name in f.config}
    if group is not None and group not in known:
        raise unknown_name("setting", group, known, lambda near: Line(f'group="{near}"', f"--group {near}"))


def _line_names(lines: Sequence[Sequence[_Found]], group: str | None) -> list[str]:
    """The title that all runs of a line share, else the settings in which the lines differ, else the first run."""
    first = [line[0] for line in lines]
    keys = dict.fromkeys(name for f in first for name in f.config if name not in _NO_LINE)
    varied = [k for k in keys if len({repr(f.config.get(k)) for f in first}) > 1] if group is None else [group]
    names = []
    for line in lines:
        titles = {Labels.read(f.path).title for f in line}
        values = [(k, _shown(line[0].config.get(k))) for k in varied]
        texts = [value for _, value in values] if len(values) == 1 else [f"{k}={value}" for k, value in values]
        title = titles.pop() if len(titles) == 1 else ""
        names.append(title or ", ".join(texts) or line[0].path.name)
    unique = len({name[:40] for name in names}) == len(names)
    return names if unique else [f"{at}: {name}" for at, name in enumerate(names, 1)]


def _common(line: Sequence[_Found], column: str, time: str) -> tuple[Curve, ...]:
    """The curves of the runs of a line, in the rounds that all of them have."""
    curves = [Curve.of(f.record, column, time) for f in line]
    if all(c.rounds == curves[0].rounds for c in curves):
        return tuple(curves)
    common = set.intersection(*(set(c.rounds) for c in curves))
    if not common:
        raise UsageError(
            f"{' and '.join(f.path.name for f in line[:2])} have no round with {column} in common.",
            "runs with common rounds.",
            "a mean over runs is computed round by round.",
        )
    return tuple(c.at(common) for c in curves)


def _remarks(lines: Sequence[Sequence[_Found]], groups: Sequence[SeedGroup]) -> list[str]:
    """Facts that a reader of the figure must know."""
    notes = []
    for line, made in zip(lines, groups, strict=True):
        notes += [
            f"{f.path.name} is not finished: {f.record.rows[-1]['round'] + 1} rounds." for f in line if not _ended(f)
        ]
        lengths = {len(f.record.rows) for f in line}
        if len(lengths) > 1:
            last = int(made.curves[0].rounds[-1]) + 1
            notes.append(
                f"{made.name}: runs of {min(lengths)} to {max(lengths)} rounds; the line ends at round {last}."
            )
    single = [made.name for made in groups if len(made.curves) == 1]
    if single:
        whose = "every line" if len(single) == len(groups) else ", ".join(single)
        notes.append(f"One seed for {whose}: no band.")
    if any(not made.data for made in groups):
        notes.append("The held-out rows of some runs are not known: no winner is marked.")
    elif len({made.data for made in groups}) > 1:
        notes.append("The runs were evaluated on different held-out rows: one panel for each, and no winner is marked.")
    return notes


def _ended(one: _Found) -> bool:
    """Whether the last line of events.jsonl is the end of a run that is done."""
    try:
        with open(one.path / "events.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL))
            last = json.loads(file.read().splitlines()[-1])
    except (OSError, ValueError, IndexError):
        return False
    return isinstance(last, dict) and last.get("event") == "stop" and last.get("status") == "done"
