"""The rounds and the clients of a run as a data frame of pandas, polars or pyarrow.

Tests: tests/surface/test_summary.py
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from atoll.base.errors import UsageError, unknown_name
from atoll.base.lines import Line
from atoll.runs.folder import read_rows

if TYPE_CHECKING:
    from atoll.plan.round import Report

BACKENDS = ("pandas", "polars", "pyarrow")
Backend = Literal["pandas", "polars", "pyarrow"]
KINDS = ("rounds", "clients")


def metrics_row(report: Report, versions: int = 0) -> dict[str, Any]:
    """Convert the report of a round to one row of metrics.jsonl.

    Args:
        report: the report of the round.
        versions: the number of older model versions that clients in flight started from.
    """
    staleness = report.clients.get("staleness")
    stale = {} if staleness is None else {"staleness": float(staleness.double().mean()) if len(staleness) else 0.0}
    return {
        "round": report.round,
        "fingerprint": report.fingerprint,
        **report.metrics,
        "cohort": report.cohort,
        "arrived": report.arrived,
        "failed": len(report.failures),
        **({"late": report.late} if report.late else {}),
        **({"flying": report.flying, **stale, "versions": versions} if stale else {}),
        "bytes_up": report.bytes_up,
        "bytes_down": report.bytes_down,
        "seconds": round(report.seconds, 6),
        **({} if report.now is None else {"clock": report.now}),
    }


def frame_of(reports: Sequence[Report], rounds: int, path: Path | None, kind: str, backend: Backend) -> Any:
    """The frame of `Run.frame`.

    Args:
        reports: the reports since the training started or resumed.
        rounds: the number of rounds of the run.
        path: the run folder, which has the rounds before; None: there are no such rounds.
        kind, backend: as in `Run.frame`.
    Raises:
        UsageError: an unknown kind or backend, or the backend is not installed.
    """
    if kind not in KINDS:
        raise unknown_name("kind of a frame", kind, KINDS, lambda near: Line(python=f'run.frame("{near}")'))
    if backend not in BACKENDS:
        raise unknown_name(
            "backend of a frame", backend, BACKENDS, lambda near: Line(python=f'run.frame("{kind}", "{near}")')
        )
    first = reports[0].round if reports else rounds
    rows: list[Mapping[str, Any]] = []
    if kind == "rounds":
        rows = all_rows(reports, rounds, path)
    else:
        for event in _before(path, "events.jsonl", first):
            if event["event"] == "clients":
                rows += _clients(event["round"], {n: v for n, v in event.items() if isinstance(v, list)})
        for report in reports:
            rows += _clients(report.round, {name: values.tolist() for name, values in report.clients.items()})
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [row.get(name) for row in rows] for name in names or ("round",)}
    return frame_of_columns(columns, backend, f"run.frame(backend={backend!r})")


def all_rows(reports: Sequence[Report], rounds: int, path: Path | None) -> list[Mapping[str, Any]]:
    """The rows of all rounds of a run; those before a resumption are read from the run folder.

    Args:
        reports, rounds, path: as in `frame_of`.
    """
    first = reports[0].round if reports else rounds
    before = [_columns(row) for row in _before(path, "metrics.jsonl", first)]
    return before + [_columns(metrics_row(report)) for report in reports]


def frame_of_columns(columns: Mapping[str, Sequence[Any]], backend: Backend, call: str) -> Any:
    """A frame of columns, all of one length.

    Args:
        columns: by name; None is a missing value.
        backend: the package of the frame.
        call: the call of the user, for the error.
    Raises:
        UsageError: the package is unknown or not installed.
    """
    import narwhals

    if backend not in BACKENDS:
        raise unknown_name("backend of a frame", backend, BACKENDS, lambda near: Line(python=f'.frame("{near}")'))
    try:
        return narwhals.from_dict(dict(columns), backend=backend).to_native()
    except ImportError:
        raise UsageError(
            f"{call}, and {backend} is not installed.",
            "an installed package for data frames.",
            write=f"pip install {backend}",
        ) from None


def _before(path: Path | None, log: str, first: int) -> list[dict[str, Any]]:
    """The rows of a log about the rounds before `first`, those before the run was resumed."""
    if path is None or not first:
        return []
    return [row for row in read_rows(path / log) if row.get("round", first) < first]


def _columns(row: Mapping[str, Any]) -> Mapping[str, Any]:
    # The number of older model versions is known to the recorder only.
    return {name: value for name, value in row.items() if name != "versions"}


def _clients(at: int, columns: Mapping[str, Sequence[Any]]) -> list[Mapping[str, Any]]:
    """One row for each contribution of a round."""
    each = zip(*columns.values(), strict=True)
    return [{"round": at, **dict(zip(columns, values, strict=True))} for values in each]
