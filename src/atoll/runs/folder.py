"""Reads and writes the folder of a run. People can read it, and an interrupted run resumes from it.

    config.toml          every setting of the run
    environment.json     versions, machine, numerics
    input.json           the map from a user's rows to tensors, and from outputs to words
    metrics.jsonl .csv   one row a round
    events.jsonl         failures, clients, notes, the reason for the end
    clients.jsonl .csv   values of clients on their own held-out rows: one line for each evaluation; at the end
    model.safetensors    the model at the end;  best.safetensors  the best one so far
    model.nonpersistent.safetensors   buffers that `state_dict` leaves out, if the model has any; also for best
    checkpoint/          the state to resume from, and one pointer file that is replaced atomically
    plots/  report.html  figures and a page

The files of a new checkpoint are written next to those of the last one and flushed to disk. Then the pointer is
replaced. The pointer contains the SHA-256 digest of every file and of itself, and the lengths of the logs. On resume,
logs are truncated to these lengths and every file's digest is verified. So no row appears twice, and a damaged file is
never loaded.

Tests: tests/faults/test_folder.py, tests/surface/test_tools.py.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import fcntl
import io
import json
import os
import platform
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

from atoll.base.errors import RunError, UsageError
from atoll.base.files import atomic_write
from atoll.base.lines import Change, Line
from atoll.runs.confusion import FILE, Confusion
from atoll.runs.inference import FILE as INFERENCE
from atoll.runs.inference import Inference
from atoll.runs.next_line import resume_line

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
HIDDEN = ".nonpersistent.safetensors"  # after `model` or `best`: the buffers that `state_dict` leaves out
LOGS = ("metrics.jsonl", "events.jsonl")
CLIENTS = "clients.jsonl"  # only in a run that evaluates clients
_WORDS = (
    "amber azure brisk calm clear coral deep early fair fresh gentle golden green high jade kind late light lunar mild "
    "new noble north open pale quiet rapid silver slow small soft south still sunny swift tidal warm wide windy",
    "bay beach bird boat bow breeze buoy cape cloud cove crab current drift dune fin fish gull harbor heron isle kelp "
    "lagoon marlin oar palm pearl pier port ray reef sail sand seal shell shoal shore sky spray star surf tide wave",
)


def library_versions() -> dict[str, str]:
    """The versions of Python, atoll, torch and NumPy. Bits are equal only between equal versions."""
    return {"python": platform.python_version(), **_installed()}


@lru_cache(maxsize=1)
def _installed() -> dict[str, str]:
    """The versions of the packages, cached: the lookup takes longer than writing a small checkpoint."""
    from importlib.metadata import PackageNotFoundError, version

    out = {}
    for package in ("atoll", "torch", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            out[package] = version(package)
    return out


def environment(**more: Any) -> dict[str, Any]:
    """Describe the environment of a run: versions, machine, system, CPU, number of threads.

    Args:
        more: further entries: names with values that JSON can store.
    """
    import torch

    return {
        **library_versions(),
        "machine": platform.machine(),
        "system": platform.system(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        **more,
    }


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn an OSError of a write into an error that names the cause and a command."""
    try:
        yield
    except OSError as error:
        cause = {
            errno.ENOSPC: "the disk is full",
            errno.EDQUOT: "the quota is used up",
            errno.EFBIG: "a file may not grow further",
        }
        raise RunError(
            f"{path} could not be written: {cause.get(error.errno or 0, error.strerror)}.",
            "space on the disk, and permission to write.",
            "the last checkpoint is intact, and the run can resume from it.",
            resume_line(_run_of(path)),
        ) from error


def _run_of(path: Path) -> Path:
    """The run folder that contains this file or folder."""
    folder = path.parent if path.suffix else path
    return folder.parent if folder.name == "checkpoint" else folder


@contextlib.contextmanager
def _beginning(parent: Path) -> Iterator[None]:
    """Turn an error about a new run folder into a UsageError, since the run has not started yet."""
    try:
        yield
    except (OSError, RunError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        raise UsageError(
            f"No run can be made in {parent}: {getattr(cause, 'strerror', cause)}.",
            "a folder with permission to write, and space on its disk.",
            "every round of a run is written to its folder.",
            Change("out", "runs"),
        ) from error


def write(path: Path, data: bytes) -> None:
    """Replace a file of a run in one step.

    Raises:
        RunError: the file could not be written.
    """
    with _writing(path):
        atomic_write(path, data)


@dataclass(frozen=True)
class Checkpoint:
    """A saved state of a run: named tensors, client memory, the best model so far or None, and JSON values."""

    tensors: Mapping[str, Tensor]
    memory: tuple[Mapping[str, Tensor], ...]
    best: Mapping[str, Tensor] | None
    facts: Mapping[str, Any]


class Commit(Protocol):
    """A store that commits a run after every round, in one transaction. The run folder is then its readable form."""

    def save(self, checkpoint: Checkpoint, lines: Mapping[str, bytes]) -> None:
        """Commit the state after a round. It is on disk when the method returns.

        Args:
            checkpoint: the state; its fact `round` is the number of finished rounds. A later call for the same round
                replaces the state.
            lines: the lines that were added to each log since the last call.
        Raises:
            RunError: the transaction failed; the last committed state is intact.
        """

    def load(self) -> Checkpoint | None:
        """The last committed state; None if no round was committed."""

    def log(self, name: str) -> bytes:
        """All committed lines of a log."""


@dataclass
class RunFolder:
    """The folder of one run. At most one process at a time can lock it.

    Args:
        path: the folder.
        store: the store that receives every checkpoint. None: checkpoints are files in the folder itself, and
            `checkpoint/pointer.json` names the files of the last complete one.
    """

    path: Path
    store: Commit | None = None
    latest_before: str | None = None  # the run to which `latest` pointed before a new folder
    _lock: IO[str] | None = None
    _logs: dict[str, IO[bytes]] = field(default_factory=dict)
    _files: dict[str, str] = field(default_factory=dict)  # files that the last pointer names → their digests
    _alive: dict[str, set[int]] = field(default_factory=dict)  # segment → clients whose newest row it contains
    _lengths: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(LOGS, 0))
    _lines: dict[str, bytes] = field(default_factory=dict)  # lines that the store has not committed yet
    _rounds: int = 0  # rounds that the store had committed when the run was opened

    @classmethod
    def create(
        cls,
        parent: Path,
        config: str,
        about: Mapping[str, Any],
        store: Commit | None = None,
        input: bytes = b"",
    ) -> RunFolder:
        """Create and lock a folder `parent/<date>-<two words>`, and point the link `parent/latest` to it.

        Args:
            parent: the folder of all runs; it is created if it does not exist.
            config: the text of config.toml.
            about: the content of environment.json.
            store: commits every round; None: the folder itself contains the checkpoints.
            input: the bytes of input.json; empty: no such file.
        Returns:
            The locked folder.
        Raises:
            UsageError: the folder cannot be written.
        """
        with _beginning(parent):
            parent.mkdir(parents=True, exist_ok=True)
            while True:
                words = "-".join(_drawn(w.split()) for w in _WORDS)
                path = parent / f"{datetime.now():%Y-%m-%d}-{words}"
                try:
                    path.mkdir()
                    break
                except FileExistsError:
                    continue
            folder = cls(path, store)
            try:
                folder.lock()
                about = {**about, "input": _input_digest(input)} if input else about
                write(path / "environment.json", _json(about, indent=2))
                if input:
                    write(path / "input.json", input)
                for name in LOGS:
                    folder._open(name)
                # Last, since this file marks a folder as a run.
                write(path / "config.toml", config.encode())
                folder.latest_before = _target(parent / "latest")
                _point(parent / "latest", path.name)
            except BaseException:
                folder.close()
                raise
        return folder

    @classmethod
    def open(cls, path: Path, store: Commit | None = None) -> RunFolder:
        """Lock the folder of an existing run, to resume it.

        Args:
            path: the folder.
            store: the store that has committed its rounds; None: the folder itself contains the checkpoints.

        Raises:
            UsageError: the folder has no config.toml, or another process has locked it.
        """
        if not (path / "config.toml").is_file():
            raise UsageError(
                f"{path} is not the folder of a run.",
                "a folder that contains a config.toml.",
                write="atoll runs",
            )
        folder = cls(path, store)
        folder.lock()
        return folder

    def lock(self) -> None:
        """Lock the folder. The system releases the lock when the process ends.

        Raises:
            UsageError: another process has locked the folder.
        """
        with _writing(self.path):
            handle = open(self.path / "lock", "a")  # noqa: SIM115  open until `close`
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.close()
            raise UsageError(
                f"{self.path} is in use by another process.",
                "one process for each run folder.",
                "two processes would mix the rows of two trainings.",
                f"atoll show {self.path.name}",
            ) from None
        self._lock = handle

    def close(self) -> None:
        """Close the logs and release the lock."""
        for log in self._logs.values():
            log.close()
        self._logs.clear()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def discard(self) -> None:
        """Remove a new folder, and point the link `latest` to the run to which it pointed before."""
        self.close()
        shutil.rmtree(self.path, ignore_errors=True)
        link = self.path.parent / "latest"
        if _target(link) != self.path.name:
            return  # another run began meanwhile
        if self.latest_before is not None and (self.path.parent / self.latest_before).is_dir():
            _point(link, self.latest_before)
        else:
            link.unlink(missing_ok=True)

    def _open(self, name: str) -> IO[bytes]:
        if name not in self._logs:
            with _writing(self.path / name):
                self._logs[name] = open(self.path / name, "ab", buffering=0)  # noqa: SIM115
        return self._logs[name]

    def metric(self, row: Mapping[str, Any]) -> None:
        """Add a round's row to metrics.jsonl."""
        self._append("metrics.jsonl", row)

    def event(self, kind: str, **what: Any) -> None:
        """Add an event to events.jsonl."""
        time = datetime.now().astimezone().isoformat(timespec="seconds")
        self._append("events.jsonl", {"event": kind, "time": time, **what})

    def clients(self, row: Mapping[str, Any]) -> None:
        """Add the values of clients in a round to clients.jsonl."""
        self._append(CLIENTS, row)

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        line, log = _json(row) + b"\n", self._open(name)
        if self.store is not None:
            self._lines[name] = self._lines.get(name, b"") + line
        with _writing(self.path / name):
            while line:
                line = line[log.write(line) :]

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors as safetensors, atomically. Equal tensors give equal bytes."""
        write(self.path / name, _packed(tensors))

    def checkpoint(
        self,
        tensors: Mapping[str, Tensor],
        memory: Mapping[str, Tensor],
        facts: Mapping[str, Any],
        best: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Save the state of the run: write the changed tensors, then replace the pointer.

        Args:
            tensors: the state as named tensors.
            memory: the client memory that changed since the last checkpoint, with the client `ids`, int64 [n]; {} if
                nothing changed.
            facts: further JSON values; the value `round` is part of the file names.
            best: the best model so far; None if it has not changed since the last checkpoint.
        Raises:
            RunError: a file cannot be written. The last checkpoint is intact.
        """
        if self.store is not None:
            lines, self._lines = self._lines, {}
            if CLIENTS in self._logs:  # this log is not in the store: its committed lines must be on disk first
                with _writing(self.path / CLIENTS):
                    os.fsync(self._logs[CLIENTS].fileno())
            self.store.save(Checkpoint(tensors, (memory,) if memory else (), best, facts), lines)
            return
        folder, digests = self.path / "checkpoint", dict(self._files)
        with _writing(folder):
            folder.mkdir(exist_ok=True)
        names = {"state": f"state-{facts['round']}.safetensors", "best": self._named("best")}
        digests[names["state"]] = self._put(folder / names["state"], tensors)
        if best is not None:
            names["best"] = f"best-{facts['round']}.safetensors"
            digests[names["best"]] = self._put(folder / names["best"], best)
        alive = self._add_segment(memory, digests)
        lengths = {}
        for name in (*LOGS, *((CLIENTS,) if (self.path / CLIENTS).exists() else ())):
            log = self._open(name)
            with _writing(self.path / name):
                os.fsync(log.fileno())
                lengths[name] = os.fstat(log.fileno()).st_size
        files = {name: digests[name] for name in (*filter(None, names.values()), *alive)}
        pointer = {
            "format": FORMAT,
            "versions": library_versions(),
            **names,
            "segments": list(alive),
            "files": files,
            "logs": lengths,
            "facts": dict(facts),
        }
        write(folder / "pointer.json", _json({**pointer, "sha256": _sha256(_json(pointer))}, indent=2))
        self._files, self._alive, self._lengths = files, alive, lengths
        if best is not None:
            write(self.path / "best.safetensors", _packed(best))
        for old in folder.glob("*.safetensors*"):
            if old.name not in files:
                old.unlink(missing_ok=True)

    def _named(self, kind: str) -> str:
        """The file of this kind that the last pointer names; "" if it names no such file."""
        return next((name for name in self._files if name.startswith(f"{kind}-")), "")

    def _add_segment(self, memory: Mapping[str, Tensor], digests: dict[str, str]) -> dict[str, set[int]]:
        """Write changed rows as a new segment. A segment is dropped once newer segments contain all its clients."""
        if not memory:
            return self._alive
        ids = set(memory["ids"].tolist())
        alive = {name: rest for name, old in self._alive.items() if (rest := old - ids)}
        last = max((int(name.split("-")[1].split(".")[0]) for name in self._alive), default=-1)
        name = f"memory-{last + 1}.safetensors"
        digests[name] = self._put(self.path / "checkpoint" / name, memory)
        return {**alive, name: ids}

    def _put(self, path: Path, tensors: Mapping[str, Tensor]) -> str:
        data = _packed(tensors)
        write(path, data)
        return _sha256(data)

    def restore(self, *, any_version: bool = False) -> Checkpoint | None:
        """Read the last checkpoint. The folder does not change.

        Args:
            any_version: whether to accept a checkpoint of other versions of torch, NumPy or atoll.
        Returns:
            The checkpoint; None if the run has none.
        Raises:
            UsageError: the checkpoint was written with other versions.
            RunError: the checkpoint is damaged.
        """
        if self.store is not None:
            found = self.store.load()
            self._rounds = 0 if found is None else int(found.facts["round"])
            return found
        if not (self.path / "checkpoint" / "pointer.json").exists():
            return None
        pointer = read_pointer(self.path)
        if not any_version:
            self._check_versions(pointer)
        loaded = {name: self._get(name, digest) for name, digest in pointer["files"].items()}
        memory = {name: loaded[name] for name in pointer["segments"]}
        self._files, self._lengths = dict(pointer["files"]), dict(pointer["logs"])
        self._alive = {}
        for name, rows in memory.items():
            ids = set(rows["ids"].tolist())
            self._alive = {older: old - ids for older, old in self._alive.items()} | {name: ids}
        best = loaded[pointer["best"]] if pointer["best"] else None
        return Checkpoint(loaded[pointer["state"]], tuple(memory.values()), best, pointer["facts"])

    def _get(self, name: str, digest: str) -> dict[str, Tensor]:
        from safetensors import SafetensorError
        from safetensors.torch import load

        path = self.path / "checkpoint" / name
        try:
            data = path.read_bytes()
            if _sha256(data) != digest:
                raise _damaged(path)
            return load(data)
        except (OSError, SafetensorError) as error:
            raise _damaged(path) from error

    def truncate_logs(self) -> None:
        """Resume from the checkpoint that `restore` returned: truncate the logs, and restore best.safetensors.

        If a store commits the rounds, the logs are rebuilt from it, and clients.jsonl is truncated to these rounds.
        """
        if self.store is not None:
            if (self.path / CLIENTS).is_file():
                kept = [_json(row) + b"\n" for row in read_rows(self.path / CLIENTS) if row["round"] < self._rounds]
                write(self.path / CLIENTS, b"".join(kept))
            for name in LOGS:
                committed = self.store.log(name)
                if not (self.path / name).is_file() or (self.path / name).read_bytes() != committed:
                    write(self.path / name, committed)
            return
        if CLIENTS not in self._lengths:
            with _writing(self.path / CLIENTS):
                (self.path / CLIENTS).unlink(missing_ok=True)
        for name, length in self._lengths.items():
            log = self._open(name)
            with _writing(self.path / name):
                os.ftruncate(log.fileno(), length)
        best = self._named("best")
        if best:
            write(self.path / "best.safetensors", (self.path / "checkpoint" / best).read_bytes())

    def _check_versions(self, pointer: Mapping[str, Any]) -> None:
        ours = library_versions()
        other = [f"{n} {v}" for n, v in pointer["versions"].items() if n != "python" and ours.get(n) != v]
        if other:
            raise UsageError(
                f"{self.path.name} was written with {', '.join(other)}.",
                f"the versions of this machine: {', '.join(f'{n} {ours.get(n)}' for n in ours if n != 'python')}.",
                "other versions may compute other bits, so the second half of the run would not match the first.",
                resume_line(self.path, any_version=True),
            )

    def finish(self) -> None:
        """Write metrics.csv from the rows of metrics.jsonl."""
        rows = read_rows(self.path / "metrics.jsonl")
        columns = list(dict.fromkeys(name for row in rows for name in row))
        text = io.StringIO(newline="")
        table = csv.DictWriter(text, columns)
        table.writeheader()
        table.writerows(rows)
        write(self.path / "metrics.csv", text.getvalue().encode())

    def save_clients(self, columns: Mapping[str, Sequence[Any]]) -> None:
        """Write clients.csv: the held-out values of each client at the end of the run, one line for each client.

        Args:
            columns: by name, all of one length; the first names the clients. None is an empty cell.
        """
        text = io.StringIO(newline="")
        table = csv.writer(text)
        table.writerow(columns)
        table.writerows(zip(*columns.values(), strict=True))
        write(self.path / "clients.csv", text.getvalue().encode())

    def save_confusion(self, table: Confusion) -> None:
        """Write confusion.csv: the rows of each class by predicted class."""
        write(self.path / FILE, table.csv().encode())

    def save_inference(self, table: Inference) -> None:
        """Write inference.csv: the coefficients of a run of `newton`."""
        write(self.path / INFERENCE, table.csv().encode())


def read_pointer(path: Path) -> dict[str, Any]:
    """Read and verify the pointer of a run's checkpoint.

    Args:
        path: the run folder.
    Returns:
        The content of pointer.json, without its own digest.
    Raises:
        UsageError: the checkpoint has another format.
        RunError: the pointer is missing, or its digest does not match.
    """
    file = path / "checkpoint" / "pointer.json"
    try:
        pointer = json.loads(file.read_bytes())
        digest = pointer.pop("sha256", None)
        if pointer["format"] != FORMAT:
            raise UsageError(
                f"{path.name} has a checkpoint of format {pointer['format']}.",
                f"format {FORMAT}.",
                "it was written by another version of atoll.",
                f"pip install atoll=={pointer['versions'].get('atoll', '')}",
            )
        if _sha256(_json(pointer)) != digest:
            raise ValueError("the digest does not match")
        return dict(pointer)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UsageError):
            raise
        raise _damaged(file) from error


def is_locked(path: Path) -> bool:
    """Whether a process has locked the folder, that is, whether the run is in progress."""
    try:
        with open(path / "lock") as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False  # a folder that no process has locked yet, or one that cannot be read
    return False


def rounds_to_run(path: Path, rounds: int | None, more: int | None) -> int | None:
    """The total number of rounds of a resumed run.

    Args:
        path: the run folder.
        rounds: the requested total; None: the total that the run was started with.
        more: the number of rounds beyond those that are done; None: `rounds` counts.
    Returns:
        None if neither is given.
    Raises:
        UsageError: both are given, `more` is below 1, or the run has done more rounds than the total.
    """
    if rounds is not None and more is not None:
        raise UsageError(f"rounds = {rounds} and more = {more}.", "one of the two.", write=Change("rounds", rounds))
    if more is not None and (isinstance(more, bool) or not isinstance(more, int) or more < 1):
        raise UsageError(
            f"more = {more!r}.", "an integer, at least 1.", write=Line(python="more=10", shell="--more 10")
        )
    pointer = path / "checkpoint" / "pointer.json"
    done = int(read_pointer(path)["facts"]["round"]) if pointer.exists() else 0
    if more is not None:
        return done + more
    if rounds is not None and rounds < done:
        raise UsageError(
            f"rounds = {rounds}, and {path.name} has done {done} rounds.",
            f"a total of at least {done} rounds.",
            "rounds that are done stay. The total counts all rounds of the run.",
            Line(python="more=10", shell=resume_line(path, 10)),
        )
    return rounds


def write_input(path: Path, data: bytes) -> None:
    """Write input.json of a run that continues, and its digest; runs of before lack them.

    Args:
        path: the run folder.
        data: the bytes of input.json.
    """
    write(path / "input.json", data)
    about, digest = read_environment(path), _input_digest(data)
    if about and about.get("input") != digest:
        write(path / "environment.json", _json({**about, "input": digest}, indent=2))


def has_own_input(path: Path) -> bool:
    """Whether input.json has the bytes that the run wrote. A run of before did not record their digest."""
    recorded = read_environment(path).get("input")
    return recorded is None or recorded == _input_digest((path / "input.json").read_bytes())


def read_environment(path: Path) -> dict[str, Any]:
    """The content of environment.json; {} if it cannot be read."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return dict(json.loads((path / "environment.json").read_bytes()))
    return {}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a log, without an incomplete last line."""
    return parsed_rows(path.read_bytes()) if path.exists() else []


def parsed_rows(data: bytes) -> list[dict[str, Any]]:
    """The values of lines of JSON, without damaged lines. NaN, which strict JSON lacks, takes the slower parser.

    Example:
        >>> parsed_rows(b'{"round": 0}\\n{"loss": NaN}\\n{"ro')
        [{'round': 0}, {'loss': nan}]
    """
    import msgspec

    with contextlib.suppress(ValueError, RecursionError):
        rows = msgspec.json.Decoder().decode_lines(data)  # a tenth of the time of single lines
        if len(rows) == data.count(b"\n") and data.endswith(b"\n"):
            return rows
    rows = []
    for line in data.splitlines():
        try:
            rows.append(msgspec.json.decode(line))
        except (ValueError, RecursionError):
            with contextlib.suppress(ValueError, RecursionError):
                rows.append(json.loads(line.decode("utf-8", "replace")))
    return rows


def last_end(path: Path) -> str:
    """The last end of a run, such as "done: Finished 3 rounds."; an empty text if it has not ended."""
    stops = [row for row in read_rows(path / "events.jsonl") if isinstance(row, dict) and row.get("event") == "stop"]
    return f"{stops[-1].get('status')}: {stops[-1].get('reason')}" if stops else ""


def find_run(run: str | Path, parent: Path) -> Path:
    """Find a run by its path, its name, the first characters of its name, a part of its two words, or `latest`.

    Args:
        run: the path or the name.
        parent: the folder of all runs.
    Returns:
        The run folder.
    Raises:
        UsageError: no run matches, or several match.
    """
    for path in (Path(run), parent / str(run)):
        if (path / "config.toml").is_file():
            return path.resolve()
    known, name = list_runs(parent), str(run)
    fits = [p for p in known if name and (p.name.startswith(name) or name in p.name[11:])]
    if len(fits) == 1:
        return fits[0]
    names = ", ".join(p.name for p in (fits or known)[-5:])
    raise UsageError(
        f"{'Several runs are' if fits else 'No run is'} called {str(run)!r} in {parent}.",
        f"one of {names}." if names else "the name of a run. This folder has no runs.",
        write="atoll runs" if known else "atoll run",
    )


def list_runs(parent: Path) -> list[Path]:
    """The run folders in a parent folder, oldest first."""
    if not parent.is_dir():
        return []
    found = []
    with os.scandir(parent) as entries:  # it asks the disk once for each folder
        for entry in entries:
            with contextlib.suppress(OSError, ValueError):
                about = None if entry.is_symlink() else os.stat(os.path.join(entry.path, "config.toml"))
                if about is not None and stat.S_ISREG(about.st_mode):
                    found.append((about.st_mtime, entry.name))
    return [parent / name for _, name in sorted(found)]


def _drawn(words: Sequence[str]) -> str:
    """A word at random. It does not depend on any seed: two runs with one seed have different names."""
    return words[int.from_bytes(os.urandom(8), "little") % len(words)]


def _packed(tensors: Mapping[str, Tensor]) -> bytes:
    from safetensors.torch import save

    return save({n: t.detach().cpu().contiguous().clone() for n, t in sorted(tensors.items())})


def _json(value: Any, indent: int | None = None) -> bytes:
    return json.dumps(value, default=_plain, indent=indent, ensure_ascii=False).encode()


def _sha256(data: bytes) -> str:
    from hashlib import sha256  # it loads OpenSSL, and a list of runs needs no digest

    return sha256(data).hexdigest()


def _input_digest(data: bytes) -> str:
    """The digest of input.json in environment.json."""
    return _sha256(data)[:16]


def _plain(value: Any) -> Any:
    """A tensor as a list, and any other object as its text."""
    from torch import Tensor

    return value.tolist() if isinstance(value, Tensor) else str(value)


def _damaged(path: Path) -> RunError:
    return RunError(
        f"{path} is damaged or missing.",
        "the bytes that were written.",
        "training from a damaged state would give another result.",
        f"atoll show {path.parent.parent.name}",
    )


def _target(link: Path) -> str | None:
    """The target of a link; None if there is none."""
    return os.readlink(link) if link.is_symlink() else None


def _point(link: Path, target: str) -> None:
    beside = link.with_name(f".latest-{os.urandom(4).hex()}")
    with _writing(link):
        beside.symlink_to(target)
        os.replace(beside, link)
