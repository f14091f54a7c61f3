"""The ledger of privacy: one line for each round that may be released, written before the release.

Each line of `ledger.jsonl` contains the SHA-256 digest of the line before it. A line is flushed to disk before its
round is computed. So after a crash a round may be charged twice, and no released round is missing.

Tests: tests/faults/test_ledger.py
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

from atoll.base.errors import RunError, UsageError
from atoll.base.lines import Change, Line
from atoll.plan.plan import Plan
from atoll.privacy.account import UNIT, Charge, charge_of, check_delta, composed, default_delta, noise_for, selection_of

START = "0" * 64
_KEYS = {"run", "round", "attempt", "event", "relation", "unit", "clients", "epsilon", "delta", "previous", "hash"}


class Ledger:
    """The charges of one population: in a file that several runs may share, or in memory.

    Args:
        path: the file; None: the charges stay in memory.
    Raises:
        RunError: the file was altered, or it cannot be read, or its folder does not exist.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._rows: list[dict[str, Any]] = []
        if path is not None and path.exists():
            with self._locked() as file:
                self._read(file)
        elif path is not None and not path.absolute().parent.is_dir():
            with _writing(path):  # before a run folder is made
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The rows in the order of their charges."""
        return self._rows

    @property
    def last(self) -> str:
        """The digest of the last row."""
        return self._rows[-1]["hash"] if self._rows else START

    @contextlib.contextmanager
    def charging(self) -> Iterator[Ledger]:
        """Lock the ledger and read the rows of other runs, so that no run charges in between."""
        if self.path is None:
            yield self
            return
        with self._locked() as file:
            self._read(file)
            self._file: IO[bytes] | None = file
            try:
                yield self
            finally:
                self._file = None

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row inside `charging`. It is on disk when the method returns."""
        whole = {**row, "previous": self.last}
        whole["hash"] = _digest(whole)
        if self.path is not None and self._file is not None:
            with _writing(self.path):
                self._file.seek(0, os.SEEK_END)
                self._file.write(json.dumps(whole, ensure_ascii=False).encode() + b"\n")
                self._file.flush()
                os.fsync(self._file.fileno())
        self._rows.append(whole)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[IO[bytes]]:
        path = self.path or Path()
        new = not path.exists()
        with _writing(path):
            file = open(path, "a+b", buffering=0)  # noqa: SIM115  closed below
        with contextlib.closing(file):
            fcntl.flock(file, fcntl.LOCK_EX)
            if new:
                with _writing(path):
                    folder = os.open(path.parent, os.O_RDONLY)
                    try:
                        os.fsync(folder)
                    finally:
                        os.close(folder)
            yield file

    def _read(self, file: IO[bytes]) -> None:
        """Read and verify all rows. An incomplete last line was no charge yet, and is removed."""
        file.seek(0)
        data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        rows: list[dict[str, Any]] = []
        previous = START
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = json.loads(line)
                good = row.keys() == _KEYS and row["previous"] == previous and row["hash"] == _digest(row)
                Charge(**row["event"])
            except (ValueError, TypeError, AttributeError, KeyError):
                good = False
            if not good:
                raise _altered(self.path, f"line {number} does not follow from the lines before it")
            previous = row["hash"]
            rows.append(row)
        if rows[: len(self._rows)] != self._rows:
            raise _altered(self.path, "it lacks rows that it had before")
        if len(whole) < len(data):
            with _writing(self.path or Path()):
                file.truncate(len(whole))
        self._rows = rows

    def check(self, rows: int, digest: str) -> None:
        """Refuse a ledger that lacks rows of a checkpoint.

        Args:
            rows: the number of rows at the time of the checkpoint.
            digest: the digest of the last of these rows.
        Raises:
            RunError: the ledger is shorter, or it is that of another run.
        """
        there = START if rows == 0 else self._rows[rows - 1]["hash"] if rows <= len(self._rows) else ""
        if there != digest:
            raise _altered(self.path, f"it is older than the checkpoint, which has {rows} rows, or of another run")


def _digest(row: Mapping[str, Any]) -> str:
    plain = {name: value for name, value in row.items() if name != "hash"}
    return sha256(json.dumps(plain, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _altered(path: Path | None, fault: str) -> RunError:
    return RunError(
        f"The ledger {path} cannot be used: {fault}.",
        "the ledger with all rows, as it was written.",
        "a round that is not charged would make the printed ε too small.",
        "atoll run",
    )


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(
            f"The ledger {path} could not be written: {error.strerror}.",
            "space on the disk, and permission to write.",
            "a round is charged before it is released.",
            Change("ledger", "ledger.jsonl"),
        ) from error


@dataclass
class Budget:
    """The charges of a run, and its limit.

    Args:
        plan: a plan with noise.
        clients: the number of clients.
        delta: δ; None: the largest power of ten ≤ 1/(10·clients).
        limit: the largest ε; None: there is no limit.
        ledger: the ledger; it may be shared with other runs on the same population.
    Raises:
        UsageError: δ or the limit is out of range, or no round fits into the limit.
    """

    plan: Plan
    clients: int
    delta: float | None
    limit: float | None
    ledger: Ledger
    run: str = "memory"
    rounds: int = field(default=0, init=False)
    _known: tuple[tuple[str, int], Charge, float] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.delta = default_delta(self.clients) if self.delta is None else check_delta(self.delta, self.clients)
        self.relation = selection_of(self.plan, self.clients, 1).relation
        self._check_population()
        if not self.ledger.rows and not self.fits(0):
            limit = self.limit or 0.0
            z = noise_for(self.plan, clients=self.clients, rounds=1, epsilon=limit, delta=self.delta)
            raise UsageError(
                f"budget = {limit:g}: one round costs ε = {self.after(0)[1]:.4g}.",
                "a budget for at least one round.",
                "the run would end before its first round.",
                Line(python=f"Noise({z})", shell=f"--budget {_above(self.after(0)[1])}"),
            )

    def _check_population(self) -> None:
        for row in self.ledger.rows:
            if (row["clients"], row["relation"], row["unit"]) != (self.clients, self.relation, UNIT):
                raise UsageError(
                    f"The ledger {self.ledger.path} has rows of {row['clients']} clients ({row['relation']}).",
                    f"a ledger of {self.clients} clients ({self.relation}).",
                    "charges add up for one population and one relation of neighbours.",
                    Change("ledger", "ledger.jsonl"),
                )

    @property
    def epsilon(self) -> float:
        """ε of all rows."""
        # The rows of a shared ledger may have been charged with another δ.
        if not self.ledger.rows or self.delta is None:
            return 0.0
        return composed([Charge(**row["event"]) for row in self.ledger.rows], self.delta)

    def after(self, round: int) -> tuple[Charge, float]:
        """The charge of a round, and ε after it."""
        state = (self.ledger.last, round)
        if self._known is None or self._known[0] != state:
            again = any(row["run"] == self.run and row["round"] == round for row in self.ledger.rows)
            charge = charge_of(self.plan, self.clients, round, again)
            rows = [Charge(**row["event"]) for row in self.ledger.rows]
            self._known = state, charge, composed([*rows, charge], float(self.delta or 0.0))
        return self._known[1], self._known[2]

    def fits(self, round: int) -> bool:
        """Whether a round can be charged."""
        return self.limit is None or self.after(round)[1] <= self.limit

    def charge(self, round: int) -> float:
        """Write the row of a round to disk, before the round is computed. Returns ε after it.

        Raises:
            RunError: the budget is spent, or the ledger cannot be written.
        """
        with self.ledger.charging():
            self._check_population()
            charge, epsilon = self.after(round)
            if not self.fits(round):
                raise RunError(
                    f"Round {round} would cost ε = {epsilon:.4g}, and the budget is {self.limit:g}.",
                    "a budget that is not spent.",
                    "another run on the same clients, or another attempt of the round, has spent it.",
                    Change("budget", _above(epsilon)),
                )
            attempt = sum(row["run"] == self.run and row["round"] == round for row in self.ledger.rows)
            self.ledger.add(
                {
                    "run": self.run,
                    "round": round,
                    "attempt": attempt,
                    "event": charge._asdict(),
                    "relation": self.relation,
                    "unit": UNIT,
                    "clients": self.clients,
                    "epsilon": epsilon,
                    "delta": self.delta,
                }
            )
        return epsilon


def _above(epsilon: float) -> float:
    """A number of three digits that is not below ε."""
    return float(f"{epsilon * 1.005:.3g}")
