"""Serve a run to clients on other machines, and join one.

Tests: tests/faults/test_rehearsal.py
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch

from atoll.base.errors import AtollError, RunError, UsageError
from atoll.base.lines import Change
from atoll.base.validation import required
from atoll.data.input import Input
from atoll.data.rows import ArrayRows, draws_in
from atoll.data.schema import Schema
from atoll.net import systemd
from atoll.net.spec import Server
from atoll.plan.round import Report
from atoll.runs.events import Observer, Run
from atoll.runs.frames import metrics_row
from atoll.training.experiment import Experiment
from atoll.training.recorder import Recorder
from atoll.training.rounds import Training
from atoll.training.train import run_rounds

if TYPE_CHECKING:
    from atoll.net.client import Notify
    from atoll.net.engine import ServerEngine

_COPIED = 1 << 26  # numbers of held-out rows that are copied, so that no train row stays in memory
_OWN = {f.name for f in fields(Server)} - {"home", "listen", "hosts", "drain"}


class _Rows:
    """Passes the row and the times of each committed round on."""

    def __init__(self, notify: Notify, gather_s: Callable[[], float], commit_s: Callable[[], float]) -> None:
        self._notify, self._training, self._gather_s, self._commit_s = notify, None, gather_s, commit_s

    def start(self, training: Any, path: Path | None) -> None:
        self._training = training

    def round(self, report: Report) -> None:
        training: Any = self._training
        self._notify({"event": "round", **metrics_row(report, len(training.state.versions))})
        gather = self._gather_s()
        stages = {"gather": gather, "step": max(0.0, report.seconds - gather), "commit": self._commit_s()}
        self._notify({"event": "stages", **stages})

    def end(self, run: Run) -> None: ...


def unfinished(home: Path) -> tuple[str, dict[str, Any]] | None:
    """The run of a home that has not ended: its name, and the settings of its server; None if there is none."""
    if not (home / "federation.db").exists():
        return None
    from atoll.net.home import ServerHome

    at = ServerHome.open(home, serve=False)
    try:
        name, net = at.database.get("run"), at.database.get("net")
    finally:
        at.close()
    if name is None or not (at.path / "runs" / name / "config.toml").is_file():
        return None
    return name, json.loads(net or "{}")


def serve_run(
    it: Experiment | None,
    spec: Server,
    *,
    notify: Notify = lambda facts: None,
    observers: Sequence[Observer] = (),
    trust: bool = False,
    metrics: str | None = None,
) -> tuple[Run, bool]:
    """Serve one run: the experiment, or the unfinished run of the home.

    Args:
        it: the experiment; None continues the unfinished run.
        spec: the settings of the server. An unfinished run keeps the settings that decide its bits.
        notify: receives the events of the server, such as its address.
        observers: as for `atoll.train`.
        trust: whether the configuration of an unfinished run may name code.
        metrics: `host:port` of the loopback interface on which Prometheus reads the metrics; None: no metrics.
    Returns:
        The run, and whether a signal to end, not Ctrl-C, has ended it.
    Raises:
        UsageError: there is nothing to serve, or the experiment differs from the unfinished run.
        RunError: the run failed.
    """
    home = Path(spec.home)
    open_run = unfinished(home)
    it, spec = _chosen(it, spec, open_run, home, trust)
    settings = it.check(engine=spec)
    training = Training(it._model(), _schema(it, spec), it.plan(), settings)
    engine: Any = training.engine
    with contextlib.ExitStack() as ends:
        ends.callback(training.close)
        notify = _measured(metrics, engine, notify, ends)
        return _serve(it, training, engine, open_run, notify, observers)


def _measured(address: str | None, engine: ServerEngine, notify: Notify, ends: contextlib.ExitStack) -> Notify:
    """The receiver of events, which also counts them for Prometheus if there is an address."""
    if address is None:
        return notify
    from atoll.net.metrics import Metrics

    metrics = Metrics(address)
    ends.callback(metrics.close)
    metrics.watch(engine.net)
    notify({"event": "metrics", "address": metrics.address})

    def both(facts: Mapping[str, Any]) -> None:
        metrics.event(facts)
        notify(facts)

    return both


def _serve(
    it: Experiment,
    training: Training,
    engine: ServerEngine,
    open_run: tuple[str, dict[str, Any]] | None,
    notify: Notify,
    observers: Sequence[Observer],
) -> tuple[Run, bool]:
    from atoll.net.engine import Stopped
    from atoll.net.rounds import RoundStore

    database, path = engine.home.database, engine.home.path
    notify({"event": "listening", "address": engine.net.address, "home": str(path)})
    systemd.notify("READY=1")
    engine.notify = notify
    store = RoundStore(database, lambda: engine.run, engine.accepted)
    recorder = Recorder(training, path / "runs", it.toml(), it.checkpoint_s, store)
    if open_run is not None:
        engine.run = open_run[0]
        recorder.resume(path / "runs" / engine.run, any_version=False)
    else:
        engine.run = required(recorder.path, "run folder").name
        database.put("net", json.dumps(asdict(engine.spec)))
        database.put("run", engine.run)
    with _Terminated() as terminated:
        try:
            engine.begin(engine.run, training.plan)
            notify({"event": "run", "run": engine.run})
            rows = _Rows(notify, lambda: engine.gather_s, lambda: store.seconds)
            interrupted = run_rounds(training, recorder, [rows, *observers])
        except Stopped:
            interrupted = True
        except AtollError as error:
            engine.finish("failed", str(error.given))
            if isinstance(error, RunError):
                database.put("run", None)
            raise
        return _ended(it, training, engine, recorder, interrupted), terminated.asked


def _ended(it: Experiment, training: Training, engine: ServerEngine, recorder: Recorder, interrupted: bool) -> Run:
    """Write the result, send it to the clients, and draw the report."""
    run = recorder.end(interrupted, baselines=False, report=False)
    path = required(run.path, "run folder")
    if run.status == "interrupted":
        engine.finish("draining", "the server stops and continues later")
        return run
    engine.home.database.put("run", None)
    if run.status == "failed":
        engine.finish("failed", run.reason)
        raise required(training.outcome, "outcome").error()
    engine.finish("done", run.reason, (path / "model.safetensors").read_bytes())
    if it.report:
        from atoll.report.draw import draw

        draw(path)
    return run


def _chosen(
    it: Experiment | None, spec: Server, open_run: tuple[str, dict[str, Any]] | None, home: Path, trust: bool
) -> tuple[Experiment, Server]:
    """The experiment and the settings of the server: those of the unfinished run if there is one."""
    if open_run is None:
        if it is None:
            it = Experiment.found().with_environment()
            if it == Experiment() and any((home / "runs").glob("*/config.toml")):
                raise UsageError(
                    f"{home} has no unfinished run, and no settings of a new one are given.",
                    "the data of the next run.",
                    "without settings the server would train the demo, although this home has runs of other data.",
                    f"atoll serve --home {home} --data my.csv --target outcome",
                )
        if it.baselines:
            raise UsageError(
                "--baselines with a server.",
                "no baselines.",
                "pooled training needs the rows of all clients on one machine.",
                f"atoll serve --home {home}",
            )
        if isinstance(it.held_out, str):
            raise UsageError(
                f"held_out = {it.held_out!r} with a server.",
                "a fraction of the rows.",
                "each site holds out its own rows by a random draw.",
                Change("held_out", 0.2),
            )
        whole = _resolved(it, spec)
        return whole, replace(
            spec,
            clients=it.clients,
            split=whole.split if it.clients is not None and spec.schema is None else None,
            seed=it.seed,
            held_out=it.held_out,
            min_rows=it.min_rows,
        )
    name, net = open_run
    config = home / "runs" / name
    stored = Experiment.read(config, trust=trust)
    kept: dict[str, Any] = {n: v for n, v in net.items() if n in _OWN}
    if kept.get("schema"):  # the file may have moved; the folder of the run has its content
        kept["schema"] = str(config / "input.json")
        stored = stored.override(data=kept["schema"])
    given = None if it is None else _resolved(it, spec)
    if given is not None and spec.schema is not None and kept.get("schema"):
        given = given.override(data=kept["schema"])  # the inputs are compared when the run is read
    if given is not None and given != stored:
        changed = [f.name for f in fields(stored) if vars(stored)[f.name] != vars(given)[f.name]]
        raise UsageError(
            f"The run {name} of {home} is not finished, and {', '.join(changed)} differ from it.",
            "the settings with which it began.",
            "a federation trains runs one after the other, and a changed run would have the bits of neither.",
            f"atoll serve --home {home}",
        )
    return stored, replace(spec, **kept)


def _resolved(it: Experiment, spec: Server) -> Experiment:
    """The experiment with the settings that depend on the data. With an input in place of data they depend on it."""
    if spec.schema is None:
        return it.resolved()
    path = Path(spec.schema).resolve()
    given = Input.read(path)
    return it.override(data=str(path), **it.method(given.kind, given.classes is not None))


def _schema(it: Experiment, spec: Server) -> Schema:
    """The input and the held-out rows of the server. No train row is kept."""
    if spec.schema is not None:
        path = Path(spec.schema)
        return Schema.of_input(Input.read(path), path.stem)
    schema = Schema.of(it.data())
    it.__dict__.pop("source", None)  # all rows
    held = schema.held_out
    if held is None or draws_in(held) or len(held) * math.prod(schema.features) > _COPIED:
        return schema
    x, y = held.take(torch.arange(len(held)))
    return replace(schema, held_out=ArrayRows(x, y, schema.kind == "regression"))


class _Terminated:
    """Handles the signal to end: the first drains the server, the second ends it at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def __enter__(self) -> _Terminated:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        systemd.notify("STOPPING=1")
        signal.raise_signal(signal.SIGINT)  # the first ends the training after the round, the second at once

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
