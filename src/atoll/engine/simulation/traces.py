"""Traces of fleets: CSV files with a header. A file is read completely, and the first invalid line raises an error.

Tests: tests/identities/test_fleet.py.
"""

from __future__ import annotations

import csv
import math
import shlex
from collections.abc import Container, Iterator
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from atoll.base.errors import UsageError


def values(path: str, column: str, clients: int) -> Tensor:
    """Read one positive number for each client from the columns `client` and `column`.

    Args:
        path: a CSV file in UTF-8 with a header. Other columns and blank lines are ignored.
        column: the name of the column of numbers.
        clients: the number of clients, ≥ 1; the file names each of 0 … clients−1 once.
    Returns:
        float64 `[clients]`.
    Raises:
        UsageError: the file or the column does not exist; a client is missing, unknown or named twice; or a number is
            not finite and positive. The error names the line.
    """
    found: dict[int, float] = {}
    for line, (name, text) in _rows(path, ("client", column)):
        client = _client(path, line, name, clients)
        if client in found:
            raise _wrong(path, line, f"names client {client} again", "one line for each client.")
        found[client] = _number(path, line, text, math.ulp(0.0), f"a {column} above 0")
    _everyone(path, found, clients)
    return torch.tensor([found[client] for client in range(clients)], dtype=torch.float64)


def windows(path: str, clients: int) -> list[list[tuple[float, float]]]:
    """Read the windows of availability of each client from the columns `client`, `start` and `end`, in seconds.

    Args:
        path: a CSV file in UTF-8 with a header. The lines may have any order.
        clients: the number of clients, ≥ 1; each of 0 … clients−1 has at least one line.
    Returns:
        For each client its windows (start, end) in order of time, 0 ≤ start < end, without overlap.
    Raises:
        UsageError: as in `values`; also if a window does not end after its start, or overlaps another window of the
            same client.
    """
    found: dict[int, list[tuple[float, float, int]]] = {}
    for line, (name, first, last) in _rows(path, ("client", "start", "end")):
        client = _client(path, line, name, clients)
        start = _number(path, line, first, 0.0, "a start of at least 0 seconds")
        end = _number(path, line, last, math.nextafter(start, math.inf), "an end after the start")
        found.setdefault(client, []).append((start, end, line))
    _everyone(path, found, clients)
    for client, spans in found.items():
        spans.sort()
        for (_, before, _), (start, _, line) in pairwise(spans):
            if start < before:
                overlap = f"has client {client} start at {start:g}, inside its window that ends at {before:g}"
                raise _wrong(path, line, overlap, "windows of one client that do not overlap.")
    return [[(start, end) for start, end, _ in found[client]] for client in range(clients)]


def _rows(path: str, columns: tuple[str, ...]) -> Iterator[tuple[int, list[str]]]:
    """Yield the number of each line that is not blank, and its cells in these columns."""
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file, strict=True)
            header = [name.strip() for name in next(lines, [])]
            for column in columns:
                if header.count(column) != 1:
                    raise UsageError(
                        f"The header of {path} has {header.count(column)} columns {column!r}: {','.join(header)}.",
                        f"a header line that names each of {', '.join(columns)} once.",
                        "a column is found by its name.",
                        f"head -n 1 {shlex.quote(path)}" if header else f"cat {shlex.quote(path)}",
                    )
            places = [header.index(column) for column in columns]
            for cells in lines:
                if cells and len(cells) != len(header):
                    raise _wrong(
                        path, lines.line_num, f"has {len(cells)} cells", f"{len(header)} cells, as in the header."
                    )
                if cells:
                    yield lines.line_num, [cells[place].strip() for place in places]
    except FileNotFoundError:
        folder = shlex.quote(str(Path(path).parent))
        raise UsageError(f"There is no file {path}.", "the path of a CSV file.", write=f"ls {folder}") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(
            f"{path} cannot be read: {error}.", "a CSV file in UTF-8.", write=f"ls -ld {shlex.quote(path)}"
        ) from error


def _wrong(path: str, line: int, what: str, required: str) -> UsageError:
    return UsageError(
        f"Line {line} of {path} {what}.",
        required,
        "a simulation needs one well-defined trace for each client.",
        f"sed -n {line}p {shlex.quote(path)}",
    )


def _client(path: str, line: int, text: str, clients: int) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) < clients):
        raise _wrong(path, line, f"names client {text!r}", f"one of the {clients} clients, 0 … {clients - 1}.")
    return int(text)


def _number(path: str, line: int, text: str, least: float, required: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < least:
        raise _wrong(path, line, f"contains {text!r}", f"{required}, a finite number.")
    return value


def _everyone(path: str, found: Container[int], clients: int) -> None:
    missing = [client for client in range(clients) if client not in found]
    if missing:
        few = ", ".join(map(str, missing[:5])) + (", …" if len(missing) > 5 else "")
        raise UsageError(
            f"{path} has no line for {len(missing)} of {clients} clients: {few}.",
            f"a line for each of the clients 0 … {clients - 1}.",
            "missing values are not filled in.",
            f"head {shlex.quote(path)}",
        )
