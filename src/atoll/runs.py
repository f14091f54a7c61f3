"""A run on disk: one folder that people can read and a killed run can go on from.

    config.toml          what was asked for, every setting
    environment.json     versions, machine, numerics
    metrics.jsonl .csv   one row a round
    events.jsonl         what else happened: failures, clients, notes, why it stopped
    model.safetensors    the model at the end;  best.safetensors  the best one so far
    checkpoint/          everything needed to go on, behind one pointer that is replaced in one step
    plots/  report.html  what people look at

A checkpoint is written beside the last one, made durable, and only then pointed to. The pointer holds the digest of
every file, its own included, and the lengths of the logs, so that going on cuts off what came after it: no row stands
twice, and nothing damaged is taken for a state.
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
import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from atoll.errors import RunError, UsageError
from atoll.files import atomic_write

FORMAT = 1
LOGS = ("metrics.jsonl", "events.jsonl")
COUNTS = (  # the columns of a row that say what it cost and who was there; every other one is a metric
    *("round", "fingerprint", "cohort", "arrived", "failed", "late", "flying", "staleness", "versions"),
    *("bytes_up", "bytes_down", "seconds", "clock"),
)
_WORDS = (
    "amber azure brisk calm clear coral deep early fair fresh gentle golden green high jade kind late light lunar mild "
    "new noble north open pale quiet rapid silver slow small soft south still sunny swift tidal warm wide windy",
    "bay beach bird boat bow breeze buoy cape cloud cove crab current drift dune fin fish gull harbor heron isle kelp "
    "lagoon marlin oar palm pearl pier port ray reef sail sand seal shell shoal shore sky spray star surf tide wave",
)


def versions() -> dict[str, str]:
    """The versions on which equal bits depend."""
    return {"python": platform.python_version(), **_installed()}


@lru_cache(maxsize=1)
def _installed() -> dict[str, str]:
    """Read once: a checkpoint states them, and finding them takes longer than writing a small one."""
    out = {}
    for package in ("atoll", "torch", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            out[package] = version(package)
    return out


def environment(**more: Any) -> dict[str, Any]:
    """What a run was made on: versions, kind of machine, threads, and whatever else is told."""
    return {
        **versions(),
        "machine": platform.machine(),
        "system": platform.system(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        **more,
    }


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn what the system says of a write into what people can act on."""
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
            "room on the disk, and the right to write.",
            "the last checkpoint is whole, and the run goes on from it.",
            f"atoll resume {_run_of(path).name}",
        ) from error


def _run_of(path: Path) -> Path:
    """The run's folder that a file or a folder of a run lies in."""
    folder = path.parent if path.suffix else path
    return folder.parent if folder.name == "checkpoint" else folder


@contextlib.contextmanager
def _beginning(parent: Path) -> Iterator[None]:
    """Turn what the system says of a new run's folder into what people can act on: nothing was started yet."""
    try:
        yield
    except (OSError, RunError) as error:
        cause = error if isinstance(error, OSError) else error.__cause__
        raise UsageError(
            f"No run can be made in {parent}: {getattr(cause, 'strerror', cause)}.",
            "a folder that may be written to, with room on its disk.",
            "a run is written down as it goes.",
            "--out runs",
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
    """Where a run stood: tensors by name, what clients keep, the best model so far if there is one, and plain facts."""

    tensors: Mapping[str, Tensor]
    memory: tuple[Mapping[str, Tensor], ...]
    best: Mapping[str, Tensor] | None
    facts: Mapping[str, Any]


@dataclass
class Folder:
    """One run's folder, held by one process at a time.

    Args:
        path: the folder.
    """

    path: Path
    _lock: IO[str] | None = None
    _logs: dict[str, IO[bytes]] = field(default_factory=dict)
    _files: dict[str, str] = field(default_factory=dict)  # what the last pointer names, with digests
    _alive: dict[str, set[int]] = field(default_factory=dict)  # segment → clients whose newest row it holds
    _lengths: Mapping[str, int] = field(default_factory=lambda: dict.fromkeys(LOGS, 0))

    @classmethod
    def create(cls, parent: Path, config: str, about: Mapping[str, Any]) -> Folder:
        """A new folder `parent/<date>-<two words>`, and `parent/latest` pointing to it."""
        with _beginning(parent):
            parent.mkdir(parents=True, exist_ok=True)
            while True:
                words = "-".join(secrets.choice(w.split()) for w in _WORDS)
                path = parent / f"{datetime.now():%Y-%m-%d}-{words}"
                try:
                    path.mkdir()
                    break
                except FileExistsError:
                    continue
            folder = cls(path)
            try:
                folder.lock()
                write(path / "environment.json", _json(about, indent=2))
                for name in LOGS:
                    folder._open(name)
                # Last, since a folder that holds it is a run.
                write(path / "config.toml", config.encode())
                _point(parent / "latest", path.name)
            except BaseException:
                folder.close()
                raise
        return folder

    @classmethod
    def open(cls, path: Path) -> Folder:
        """An existing run's folder, to go on in."""
        if not (path / "config.toml").is_file():
            raise UsageError(
                f"{path} is not the folder of a run.",
                "a folder that holds a config.toml.",
                write="atoll runs",
            )
        folder = cls(path)
        folder.lock()
        return folder

    def lock(self) -> None:
        """Hold the folder, or refuse because another process does; the system lets go when a process ends."""
        with _writing(self.path):
            handle = open(self.path / "lock", "a")  # noqa: SIM115  held as long as the folder
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.close()
            raise UsageError(
                f"{self.path} is in use by another process.",
                "one process on a run folder.",
                "two writers would mix two trainings.",
                f"atoll show {self.path.name}",
            ) from None
        self._lock = handle

    def close(self) -> None:
        """Let go of the folder."""
        for log in self._logs.values():
            log.close()
        self._logs.clear()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

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
        self._append("events.jsonl", {"event": kind, "time": datetime.now().isoformat(timespec="seconds"), **what})

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        line, log = _json(row) + b"\n", self._open(name)
        with _writing(self.path / name):
            while line:
                line = line[log.write(line) :]

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors as safetensors, in one step; equal tensors give equal bytes."""
        write(self.path / name, _packed(tensors))

    def checkpoint(
        self,
        tensors: Mapping[str, Tensor],
        memory: Mapping[str, Tensor],
        facts: Mapping[str, Any],
        best: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Commit where the run stands: what changed is written, then one pointer is replaced.

        Args:
            tensors: the state, by name.
            memory: rows that clients changed since the last checkpoint, with their `ids`; {} for none.
            facts: plain values; `round` names the files.
            best: the best model so far, where that is another than at the last checkpoint.
        """
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
        for name in LOGS:
            log = self._open(name)
            with _writing(self.path / name):
                os.fsync(log.fileno())
                lengths[name] = os.fstat(log.fileno()).st_size
        files = {name: digests[name] for name in (*filter(None, names.values()), *alive)}
        pointer = {
            "format": FORMAT,
            "versions": versions(),
            **names,
            "segments": list(alive),
            "files": files,
            "logs": lengths,
            "facts": dict(facts),
        }
        write(folder / "pointer.json", _json({**pointer, "sha256": sha256(_json(pointer)).hexdigest()}, indent=2))
        self._files, self._alive, self._lengths = files, alive, lengths
        if best is not None:
            write(self.path / "best.safetensors", _packed(best))
        for old in folder.glob("*.safetensors*"):
            if old.name not in files:
                old.unlink(missing_ok=True)

    def _named(self, kind: str) -> str:
        """The file of a kind that the last pointer names, or nothing."""
        return next((name for name in self._files if name.startswith(f"{kind}-")), "")

    def _add_segment(self, memory: Mapping[str, Tensor], digests: dict[str, str]) -> dict[str, set[int]]:
        """Write changed rows as a new segment; one whose rows have all been written again is no longer named."""
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
        return sha256(data).hexdigest()

    def restore(self, *, any_version: bool = False) -> Checkpoint | None:
        """The last checkpoint; None where none was taken. Nothing in the folder is changed.

        Raises:
            UsageError: it was written by other versions.
            RunError: it is damaged.
        """
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
        path = self.path / "checkpoint" / name
        try:
            data = path.read_bytes()
            if sha256(data).hexdigest() != digest:
                raise _damaged(path)
            return load(data)
        except (OSError, SafetensorError) as error:
            raise _damaged(path) from error

    def go_on(self) -> None:
        """Write again from the checkpoint that `restore` gave: logs are cut back to it, the best model is its own."""
        for name, length in self._lengths.items():
            log = self._open(name)
            with _writing(self.path / name):
                os.ftruncate(log.fileno(), length)
        best = self._named("best")
        if best:
            write(self.path / "best.safetensors", (self.path / "checkpoint" / best).read_bytes())

    def _check_versions(self, pointer: Mapping[str, Any]) -> None:
        ours = versions()
        other = [f"{n} {v}" for n, v in pointer["versions"].items() if n != "python" and ours.get(n) != v]
        if other:
            raise UsageError(
                f"{self.path.name} was written with {', '.join(other)}.",
                f"the versions of this machine: {', '.join(f'{n} {ours.get(n)}' for n in ours if n != 'python')}.",
                "other versions may compute other bits, and the run would no longer be the one it began as.",
                f"atoll resume {self.path.name} --any-version",
            )

    def finish(self) -> None:
        """Write metrics.csv from the rows."""
        rows = read_rows(self.path / "metrics.jsonl")
        columns = list(dict.fromkeys(name for row in rows for name in row))
        text = io.StringIO(newline="")
        table = csv.DictWriter(text, columns)
        table.writeheader()
        table.writerows(rows)
        write(self.path / "metrics.csv", text.getvalue().encode())


def read_pointer(path: Path) -> dict[str, Any]:
    """The pointer of a run's checkpoint."""
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
        if sha256(_json(pointer)).hexdigest() != digest:
            raise ValueError("other bytes than were written")
        return dict(pointer)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, UsageError):
            raise
        raise _damaged(file) from error


def read_environment(path: Path) -> dict[str, Any]:
    """What a run was made on; empty where that cannot be read."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return dict(json.loads((path / "environment.json").read_bytes()))
    return {}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a log; a last line that was cut off is left out."""
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def find(run: str | Path, parent: Path) -> Path:
    """The folder that is meant: a path, the name of a run under `parent`, the beginning of one, its words, or `latest`.

    Raises:
        UsageError: no run, or several, fit.
    """
    for path in (Path(run), parent / str(run)):
        if (path / "config.toml").is_file():
            return path.resolve()
    known = list_runs(parent)
    fits = [p for p in known if p.name.startswith(str(run)) or str(run) in p.name[11:]]
    if len(fits) == 1:
        return fits[0]
    names = ", ".join(p.name for p in (fits or known)[-5:])
    raise UsageError(
        f"{'Several runs are' if fits else 'No run is'} called {str(run)!r} in {parent}.",
        f"one of {names}." if names else "a run; there is none yet.",
        write=f"atoll show {(fits or known)[-1].name}" if known else "atoll run",
    )


def list_runs(parent: Path) -> list[Path]:
    """The folders of runs under a parent, oldest first."""
    if not parent.is_dir():
        return []
    found = [p for p in parent.iterdir() if not p.is_symlink() and (p / "config.toml").is_file()]
    return sorted(found, key=lambda p: ((p / "config.toml").stat().st_mtime, p.name))


def _packed(tensors: Mapping[str, Tensor]) -> bytes:
    return save({n: t.detach().cpu().contiguous().clone() for n, t in sorted(tensors.items())})


def _json(value: Any, indent: int | None = None) -> bytes:
    plain: Callable[[Any], Any] = lambda v: v.tolist() if isinstance(v, Tensor) else str(v)  # noqa: E731
    return json.dumps(value, default=plain, indent=indent, ensure_ascii=False).encode()


def _damaged(path: Path) -> RunError:
    return RunError(
        f"{path} is damaged or missing.",
        "the bytes that were written.",
        "a state that is not whole would train something else.",
        f"atoll show {path.parent.parent.name}",
    )


def _point(link: Path, target: str) -> None:
    beside = link.with_name(f".latest-{secrets.token_hex(4)}")
    with _writing(link):
        beside.symlink_to(target)
        os.replace(beside, link)
