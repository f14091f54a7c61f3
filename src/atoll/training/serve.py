"""Serve a run to clients on other machines, and join one.

Tests: tests/faults/test_rehearsal.py
"""

from __future__ import annotations

import json
import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple, Self, Unpack

import torch

from atoll.base.errors import AtollError, RunError, UsageError
from atoll.base.files import atomic_write
from atoll.base.lines import Change, Line
from atoll.base.validation import required
from atoll.data.clients import Clients
from atoll.data.input import Input
from atoll.data.rows import ArrayRows, draws_in
from atoll.data.schema import Schema, TrainRows
from atoll.net import systemd
from atoll.net.spec import Server, check_extra
from atoll.plan.aggregate import Mean
from atoll.plan.local import Gradient
from atoll.plan.plan import Plan
from atoll.plan.round import Report
from atoll.runs.events import Observer, Run
from atoll.runs.frames import metrics_row
from atoll.training.experiment import Experiment
from atoll.training.recorder import Recorder
from atoll.training.rounds import Training, plan_from_text
from atoll.training.setting_texts import read_toml
from atoll.training.settings import Settings, SettingsDict, listed
from atoll.training.statistics import gather_statistics, lacks_statistics, refuse_private
from atoll.training.train import python_config, run_rounds

if TYPE_CHECKING:
    from atoll.net.client import Notify
    from atoll.net.engine import ServerEngine
    from atoll.net.metrics import Metrics
    from atoll.net.rounds import RoundStore

_COPIED = 1 << 26  # numbers of held-out rows that are copied, so that no train row stays in memory
_NEXT = "next.toml"
NO_TLS = "connections have no TLS: each process of this machine can read and change the messages"
_ONE_BY_ONE = "a federation trains runs one after the other, and a changed run would have the bits of neither."
_OWN = {f.name for f in fields(Server)} - {"home", "listen", "hosts", "drain", "insecure"}
_DECIDING = ("clients", "split", "seed", "held_out", "min_rows")  # the rows and the clients of a run
_LIMITS = ("min_clients", "absent_s", "lease_s", "work_s", "step_s", "keys_s", "max_rows", "window", "share")


class _Rows:
    """Passes the row and the times of each committed round on."""

    def __init__(self, notify: Notify, training: Training, store: RoundStore) -> None:
        self._notify, self._training, self._store = notify, training, store

    def start(self, training: Any, path: Path | None) -> None: ...

    def round(self, report: Report) -> None:
        self._notify({"event": "round", **metrics_row(report, len(self._training.state.versions))})
        engine: Any = self._training.engine
        stages = {"gather": engine.gather_s, "step": max(0.0, report.seconds - engine.gather_s)}
        self._notify({"event": "stages", **stages, "commit": self._store.seconds})

    def end(self, run: Run) -> None: ...


def unfinished(home: Path) -> tuple[str, dict[str, Any]] | None:
    """The run of a home that has not ended: its name, and the settings of its server; None if there is none."""
    if not (home / "federation.db").exists():
        return None
    name, net = _stored(home, "run", "net")
    if name is None or not (home / "runs" / name / "config.toml").is_file():
        return None
    return name, json.loads(net or "{}")


def _stored(home: Path, *names: str) -> tuple[str | None, ...]:
    """Values of the database of a home."""
    from atoll.net.home import ServerHome

    at = ServerHome.open(home, serve=False)
    try:
        return tuple(at.database.get(name) for name in names)
    finally:
        at.close()


class ServedRun(NamedTuple):
    """A run to serve.

    Args:
        model: a name, or a function that makes a model.
        schema: the input, and the held-out rows of the server.
        plan: the algorithm.
        settings: the settings of the training, with a `Server` as the engine.
        config: the text of config.toml.
        checkpoint_s: the seconds between two checkpoints.
        report: whether plots and report.html are drawn.
        scales: if the sites send statistics first: the scale of features, None to count classes only, and the scale of
            numbers to predict. None: the run needs no statistics.
        unfinished: the name of the run that is continued; None: the run is new.
    """

    model: Any
    schema: Schema
    plan: Plan
    settings: Settings
    config: str
    checkpoint_s: float
    report: bool
    scales: tuple[Any, Any] | None = None
    unfinished: str | None = None


class Serving:
    """A server that listens, and the run that it serves. `atoll.serve` makes it; use it in a `with` statement.

    If the sites send statistics first, the server listens for these, and again at the same address for the run.

    Args:
        job: the run.
        notify: receives the events of the server, such as its address.
        metrics: `host:port` of the loopback interface on which Prometheus reads the metrics; None: no metrics.
    Attributes:
        run: the run after its end, with metrics, model and path; None before.
    """

    def __init__(self, job: ServedRun, notify: Notify = lambda facts: None, metrics: str | None = None) -> None:
        self._job, self._notify = job, notify
        self.run: Run | None = None
        self._recorder: Recorder | None = None
        self._rows: _Rows | None = None
        self._training = self._opened()
        self._metrics: Metrics | None = None
        notify({"event": "listening", "address": self.address, "home": str(self._engine.home.path)})
        if self._engine.spec.insecure:
            notify({"event": "insecure", "reason": NO_TLS})
        systemd.notify("READY=1")
        if metrics is not None:
            self._measure(metrics)

    @property
    def address(self) -> str:
        """The address at which the server listens."""
        address: str = self._engine.net.address
        return address

    def invite(
        self,
        name: str,
        *,
        address: str | None = None,
        san: str | None = None,
        days: float = 7.0,
        relay: int | None = None,
    ) -> str:
        """Make a token, with which one client joins.

        Args:
            name: the name of the client: a-z, 0-9 and -.
            address: HOST:PORT for the site to dial; None: the one that the server listens on.
            san: the alternative name under your own authority.
            days: the days until the token expires.
            relay: the most clients of a relay, if the token is for `atoll relay`.
        Returns:
            The text of the token. It contains a secret.
        Raises:
            UsageError: the name or the address is not valid, or the run has no further place.
        """
        return self._engine.home.invite(name, address, san, days, relay).text()

    def rounds(self) -> Iterator[Report]:
        """Wait for the clients and train: one report after each committed round. A `break` ends the server later.

        Raises:
            RunError: the run failed.
        """
        with self._failing():
            recorder = self._begun()
            while self._training.outcome is None:
                try:
                    report = recorder.round(self._training.next())
                except BaseException as error:
                    self._recorder = None
                    recorder.fail(error)
                    raise
                required(self._rows, "rows").round(report)
                yield report
            self.run = self._ended(False)

    def complete(self, observers: Sequence[Observer] = ()) -> bool:
        """Train to the end, or to Ctrl-C. Returns whether a signal to end, not Ctrl-C, has ended it."""
        from atoll.net.engine import Stopped

        with Terminated() as terminated, self._failing():
            recorder = self._begun()
            try:
                interrupted = run_rounds(self._training, recorder, [required(self._rows, "rows"), *observers])
            except Stopped:
                interrupted = True
            except BaseException:
                self._recorder = None  # the run is recorded as failed
                raise
            self.run = self._ended(interrupted)
        return terminated.asked

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._recorder is not None and self.run is None and self._training.outcome is None:
            self.run = self._ended(True)  # a loop that was left; a failed run has an outcome, or no open server
        if self._metrics is not None:
            self._metrics.close()
        self._training.close()

    def _measure(self, address: str) -> None:
        """Count the events for Prometheus."""
        from atoll.net.metrics import Metrics

        notify = self._notify
        try:
            metrics = self._metrics = Metrics(address)
        except BaseException:
            self._training.close()
            raise
        metrics.watch(self._engine.net)
        notify({"event": "metrics", "address": metrics.address})

        def both(facts: Mapping[str, Any]) -> None:
            metrics.event(facts)
            notify(facts)

        self._notify = both

    @property
    def _engine(self) -> ServerEngine:
        engine: Any = self._training.engine
        return engine  # type: ignore[no-any-return]

    def _opened(self) -> Training:
        """The training, or one that gathers statistics. Its engine listens."""
        job = self._job
        if job.scales is None:
            return Training(job.model, job.schema, job.plan, job.settings)
        spec: Any = job.settings.spec
        facts = {"engine": replace(spec, scaled=job.scales[0] is None), "seed": job.settings.seed}
        settings = Settings.from_kwargs({**facts, "dtype": job.settings.dtype, "metrics": (), "rounds": 1})
        return Training(job.model, job.schema, Plan(Gradient(), Mean()), settings)

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """Send the sites the end of a run that fails."""
        try:
            yield
        except AtollError as error:
            from atoll.net.store import StorageError

            full = isinstance(error, RunError) and isinstance(error.__cause__, OSError) and self.run is None
            if full or isinstance(error, StorageError):  # the run is not over: the next start continues it
                with suppress(StorageError):
                    self._engine.finish("draining", "the disk of the server failed; it continues after a restart")
                if full and not isinstance(error, StorageError):
                    raise self._interrupted(error) from error
            elif self.run is None:
                self._engine.finish("failed", str(error.given))
                self._forget(error)
            raise

    def _interrupted(self, error: AtollError) -> RunError:
        """The error of a run whose folder cannot be written: its committed rounds are in the database."""
        home = self._engine.home.path
        again = Line(f"atoll.serve(model, data, plan, home={str(home)!r})", f"atoll serve --home {home}")
        why = "the run is interrupted: its committed rounds are intact, and the next start continues after them."
        return RunError(error.given, error.required, why, again)

    def _forget(self, error: AtollError) -> None:
        """A failed run is over. A run that was refused can continue with other settings."""
        (self._engine.home.path / _NEXT).unlink(missing_ok=True)
        if isinstance(error, RunError):
            self._engine.home.database.put("run", None)

    def _begun(self) -> Recorder:
        """Gather statistics if the run needs them, and open the run."""
        from atoll.net.rounds import RoundStore

        if self._job.scales is not None:
            self._gather(*self._job.scales)
        job, engine = self._job, self._engine
        engine.notify, engine.charge = self._notify, self._training.charge
        database, path = engine.home.database, engine.home.path
        secure = self._training.plan.aggregator.secure is not None
        store = RoundStore(database, lambda: engine.run, engine.accepted, secure)
        recorder = Recorder(self._training, path / "runs", job.config, job.checkpoint_s, store)
        if job.unfinished is not None:
            engine.run = job.unfinished
            recorder.resume(path / "runs" / engine.run, any_version=False)
        else:
            engine.run = required(recorder.path, "run folder").name
            known = self._training.known
            database.put("net", json.dumps(asdict(engine.spec)))
            database.put("train_rows", None if known is None else json.dumps(known))
            database.put("run", engine.run)
            (path / _NEXT).unlink(missing_ok=True)
        self._recorder, self._rows = recorder, _Rows(self._notify, self._training, store)
        engine.begin(engine.run, self._training.plan)
        self._notify({"event": "run", "run": engine.run})
        return recorder

    def _gather(self, scale: Any, target: Any) -> None:
        """Gather statistics, and open the server of the run at the same address."""
        job, engine, training = self._job, self._engine, self._training
        engine.notify = self._notify
        spec: Any = job.settings.spec
        at = None if spec.schema is None else str(Path(spec.schema).resolve())
        engine.home.database.put("net", json.dumps(asdict(replace(spec, schema=at))))
        atomic_write(engine.home.path / _NEXT, job.config.encode())
        engine.begin(f"statistics-{engine.epoch}", training.plan)
        engine.await_clients(training.plan, training.state)
        found = gather_statistics(job.schema, lambda part: engine.measure(part, training.state), scale, target)
        address = self.address
        engine.finish("draining", "the statistics are complete, and the run follows", retry_s=0.1)
        training.close()
        settings = replace(job.settings, engine=replace(spec, listen=address))
        self._job = job._replace(schema=found, settings=settings, scales=None)
        self._training = self._opened()
        if self._metrics is not None:
            self._metrics.watch(self._engine.net)

    def _ended(self, interrupted: bool) -> Run:
        """Write the result, send it to the clients, and draw the report."""
        engine = self._engine
        self.run = run = required(self._recorder, "recorder").end(interrupted, baselines=False, report=False)
        path = required(run.path, "run folder")
        if run.status == "interrupted":
            engine.finish("draining", "the server stops and continues later")
            return run
        engine.home.database.put("run", None)
        if run.status == "failed":
            engine.finish("failed", run.reason)
            raise required(self._training.outcome, "outcome").error()
        engine.finish("done", run.reason, (path / "model.safetensors").read_bytes())
        if self._job.report:
            from atoll.report.draw import draw

            draw(path)
        return run


def serve_run(
    it: Experiment | None,
    spec: Server,
    ended: Callable[[Run], None] = lambda run: None,
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
        ended: receives the run after its end, also if it failed.
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
    settings, plan, schema, scales = it.check(engine=spec), it.plan(), _schema(it, spec), None
    if open_run is None:
        lacks = spec.schema is not None and (it.scale is not None or lacks_statistics(Path(spec.schema)))
        scales = _scales(schema, plan, settings, it.scale or "standard" if lacks else None, it.scale_target)
    else:
        schema = _with_known(schema, home)
    name = None if open_run is None else open_run[0]
    job = ServedRun(it._model(), schema, plan, settings, it.toml(), it.checkpoint_s, it.report, scales, name)
    with Serving(job, notify, metrics) as serving:
        try:
            terminated = serving.complete(observers)
        finally:
            if serving.run is not None:
                ended(serving.run)
        return required(serving.run, "run"), terminated


@listed
def serve(
    model: Any,
    data: Clients | Input,
    plan: Plan | str,
    *,
    home: str | Path,
    listen: str | None = None,
    hosts: Sequence[str] = (),
    clients: int | None = None,
    min_clients: int = 2,
    split: str | None = None,
    held_out: float = 0.2,
    min_rows: int = 2,
    scale: str | None = None,
    absent_s: float | None = None,
    drain: float = 30.0,
    share: bool = True,
    cert: str | Path | None = None,
    key: str | Path | None = None,
    ca: str | Path | None = None,
    checkpoint_s: float = 15.0,
    report: bool = True,
    notify: Notify = lambda facts: None,
    **settings: Unpack[SettingsDict],
) -> Serving:
    """Serve a run to clients on other machines. An unfinished run of the home continues.

    Args:
        model: the name of a model. Each site builds it from its name.
        data: the clients, of which the server keeps the input and the held-out rows; or an input, without rows.
        plan: the algorithm, or its text, such as "fedavg(0.1)".
        home: the folder of the server: its authority, its database and its runs.
        listen: `host:port`; port 0 takes a free one. None: the address of the last start, else 127.0.0.1:0.
        hosts: further host names and addresses in the certificate of the server.
        clients: the number of clients of a closed run; None: the run is open.
        min_clients: the number of clients that must be present before a round of an open run opens.
        split: the partition of a known data set, if the clients take their seats of it.
        held_out: the fraction of its rows that a site holds out.
        min_rows: the smallest number of train rows of a site.
        scale: "standard": the sites first send statistics of their rows, which fill and scale the columns of an input;
            "none": they only fill missing numbers; None: the statistics of the input are used.
        absent_s: the seconds after which the work of an absent client fails; None: by the kind of run.
        drain: the seconds in which the clients may leave at the end.
        share: whether the clients receive the final model.
        cert, key, ca: PEM files of a certificate of an institution, its key, and the authority of the clients.
        checkpoint_s: the number of seconds between two checkpoints.
        report: whether plots and report.html are drawn at the end.
        notify: receives the events of the server as dicts, such as `{"event": "present", "client": 0, "rows": 30}`.
        settings: the fields of `Settings`.
    Returns:
        The server. Its `rounds()` wait for the clients and train.
    Raises:
        UsageError: model, data, plan and settings do not fit, or another process serves from the home.
    Example:
        >>> import atoll, tempfile
        >>> from pathlib import Path
        >>> data = atoll.data.load("wine").split(2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with atoll.serve("softmax", data, "fedavg(0.1)", home=Path(folder) / "wine", clients=2) as server:
        ...         server.invite("north")[:7]
        'atoll1.'
    """
    check_extra()
    from atoll.net.identity import Files

    own: dict[str, Any] = {
        "files": Files.read(cert, key, ca),
        "listen": listen,
        "hosts": tuple(hosts),
        "clients": clients,
        "min_clients": min_clients,
        "split": split,
    }
    own |= {"held_out": held_out, "min_rows": min_rows, "absent_s": absent_s, "drain": drain, "share": share}
    spec = Server(str(home), **own, seed=settings.get("seed", 0))
    if "engine" in settings:
        write = Line(python=f"atoll.serve(model, data, plan, home={str(home)!r})")
        raise UsageError("engine with atoll.serve.", "no engine.", "the server is the engine.", write)
    plan = plan_from_text(plan) if isinstance(plan, str) else plan
    open_run = unfinished(Path(home))
    if open_run is not None:
        _refuse_others(spec, open_run[1], open_run[0])
        spec = _kept(spec, {n: v for n, v in open_run[1].items() if n != "schema"})
    made = Settings.from_kwargs({**settings, "engine": spec})
    schema = Schema.of_input(data) if isinstance(data, Input) else Schema.of(data)
    scales = None
    if open_run is None:
        scales = _scales(schema, plan, made, scale, None)
    else:
        schema = _with_known(schema, Path(home), replace_input=scale is not None)
    config = python_config(model, schema.name, plan, made, "serve(model, data, plan, home=...)")
    name = None if open_run is None else open_run[0]
    return Serving(ServedRun(model, schema, plan, made, config, checkpoint_s, report, scales, name), notify)


def join(
    token: str | None,
    data: Any,
    *,
    home: str | Path,
    seat: bool = False,
    by: str | None = None,
    device: str = "cpu",
    own: Mapping[str, Callable[..., Any]] | None = None,
    once: bool = True,
    policy: str | Path | None = None,
    check: bool = False,
    cert: str | Path | None = None,
    key: str | Path | None = None,
    ca: str | Path | None = None,
    notify: Notify = lambda facts: None,
) -> None:
    """Take part in a federation with rows of this machine, until the run is over.

    Args:
        token: the text of the token; None: the home is enrolled.
        data: the rows: the path of a table or of a folder of arrays, the name of a data set, `my_site.py:function`, a
            data frame, a dict of columns, a pair `(x, y)`, or a `Source`.
        home: the folder of the site: its key, its client memory, its ledger and the final models.
        seat: whether the client holds its part of the run's split of a known data set.
        by: the column that names the client of each row, if the run scales each client by its own statistics.
        device: cpu, cuda, cuda:1 or auto.
        own: the site's own models, losses, metrics and parts by the names that the run uses.
        once: whether to end with the run; False waits for further runs.
        policy: the path of a policy file; None: everything is allowed.
        check: whether to try everything and send no message of a work.
        cert, key, ca: PEM files of a certificate of an institution, its key, and the authority of the server.
        notify: receives the events of the client as dicts.
    Raises:
        UsageError: the home, the token or the data is not valid, or the server refuses this client.
        RunError: the run failed, or another certificate authority answers.
    """
    check_extra()
    from atoll.net.identity import Files
    from atoll.net.join import join_federation
    from atoll.net.policy import Policy

    limits, files = Policy() if policy is None else Policy.read(Path(policy)), Files.read(cert, key, ca)
    options: dict[str, Any] = dict(
        seat=seat, by=by, device=device, own=own, once=once, policy=limits, check=check, files=files, notify=notify
    )
    join_federation(token, Path(home), data, **options)


def _scales(schema: Schema, plan: Plan, settings: Settings, scale: str | None, target: str | None) -> Any:
    """The scales of the statistics that the sites send first; None if the run needs none.

    Args:
        schema: the schema.
        plan: the plan.
        settings: the settings.
        scale: the scale of features, if the input lacks statistics.
        target: the scale of numbers to predict; None: "standard" for one number of a table.
    """
    if scale is None and settings.class_weight != "balanced":
        return None
    if scale == "client":
        raise UsageError(
            'scale = "client" with --schema.',
            "one scale for all sites, or an input that has the statistics of each site.",
            "only the joined data name the client of each row.",
            Change("scale", "standard"),
        )
    refuse_private(plan)
    given = schema.described()
    one = bool(given.columns) and len(given.target.names) == 1
    return scale, target or ("standard" if one else "none")


def _with_known(schema: Schema, home: Path, replace_input: bool = False) -> Schema:
    """The schema with the statistics that were gathered before the unfinished run."""
    name, rows = _stored(home, "run", "train_rows")
    if replace_input:
        schema = replace(schema, input=Input.read(home / "runs" / str(name)))
    return replace(schema, known=None if rows is None else TrainRows(*map(tuple, json.loads(rows))))


def _chosen(
    it: Experiment | None, spec: Server, open_run: tuple[str, dict[str, Any]] | None, home: Path, trust: bool
) -> tuple[Experiment, Server]:
    """The experiment and the settings of the server: those of the unfinished run if there is one."""
    if open_run is None:
        if it is None and (home / _NEXT).is_file():
            it, spec = _next(home, spec, trust)
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
    if (read_toml(config / "config.toml") or {}).get("python"):
        raise UsageError(
            f"The run {name} of {home} was started from Python.",
            "the program that started it.",
            "its settings are objects of that program.",
            Line(python=f"atoll.serve(model, data, plan, home={str(home)!r})"),
        )
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
            _ONE_BY_ONE,
            f"atoll serve --home {home}",
        )
    return stored, _kept(spec, kept)


def _kept(spec: Server, stored: Mapping[str, Any]) -> Server:
    """The settings of the server with which a run began. Its files may move.

    A limit that is not the default replaces the stored one: a client that a limit excludes can then return to the run.
    """
    if spec.keep_updates and not stored.get("keep_updates"):
        raise UsageError(
            "--keep-updates, and the unfinished run began without it.",
            "the settings with which the run began.",
            "the updates of its first rounds are not on disk, so no model can be computed again.",
            f"atoll serve --home {spec.home}",
        )
    given, usual = vars(spec), {f.name: f.default for f in fields(Server)}
    changed = {n: given[n] for n in _LIMITS if given[n] != usual[n]}
    own = {n: v for n, v in stored.items() if n in _OWN}
    return replace(spec, **own | changed | {"files": spec.files or stored.get("files")})


def _refuse_others(spec: Server, stored: Mapping[str, Any], name: str) -> None:
    """Refuse other clients or rows than those of the unfinished run."""
    given = vars(spec)
    other = [n for n in _DECIDING if n in stored and given[n] != stored[n]]
    if other:
        raise UsageError(
            f"{', '.join(f'{n}={given[n]!r}' for n in other)}, and the run {name} is not finished.",
            f"the settings with which it began: {', '.join(f'{n}={stored[n]!r}' for n in other)}.",
            _ONE_BY_ONE,
        )


def _next(home: Path, spec: Server, trust: bool) -> tuple[Experiment, Server]:
    """The experiment for which the server gathered statistics when it ended."""
    net = json.loads(_stored(home, "net")[0] or "{}")
    return Experiment.read(home / _NEXT, trust=trust), _kept(spec, net)


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


class Terminated:
    """Handles the signal to end: the first drains the server, the second ends it at once."""

    def __init__(self) -> None:
        self.asked = False
        self._before: Any = None

    def __enter__(self) -> Terminated:
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
