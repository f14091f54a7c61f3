"""The recorder of a training: it writes rows, events, checkpoints, the best model and the result to a run folder.

Tests: tests/faults/test_folder.py, tests/faults/test_kill.py
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from atoll import runs
from atoll.base.errors import RunError, UsageError
from atoll.base.lines import Line
from atoll.base.names import COUNTS, under, without_prefix
from atoll.base.random import Key
from atoll.compute.model_state import Model
from atoll.compute.shapes import kind_of
from atoll.plan.formula import renamed
from atoll.plan.local import Newton
from atoll.plan.round import FlightTimes, Report
from atoll.privacy.ledger import START, Ledger
from atoll.report.run_plot import run_plot
from atoll.runs.checkpoint import model_from_tensors, model_to_tensors, state_from_tensors, state_to_tensors
from atoll.runs.confusion import Confusion
from atoll.runs.events import Run
from atoll.runs.folder import HIDDEN, write_input
from atoll.runs.frames import metrics_row
from atoll.runs.inference import Inference
from atoll.training import stop as stops
from atoll.training.inference import infer
from atoll.training.rounds import HELD_OUT, Training, identity, refuse_other_input, start_from

# The columns of the event "trips", in the order of the fields of `FlightTimes`. Readers of run folders use these names.
_TRIP_COLUMNS = ("number", "client", "birth", "start", "loaded", "computed", "end", "fate")
MOST_NAMES = 10_000  # names of clients in the first event


class Recorder:
    """Writes the run folder of a training.

    Args:
        training: the training.
        out: the parent of the run folder; None writes no file.
        config: the text of config.toml.
        checkpoint_s: the number of seconds between two checkpoints.
        store: commits every round in one transaction, before the engine commits it. None: checkpoints are
            written by time.
    """

    def __init__(
        self,
        training: Training,
        out: str | Path | None,
        config: str,
        checkpoint_s: float,
        store: runs.Commit | None = None,
    ) -> None:
        self.training, self.out, self.config, self.checkpoint_s = training, out, config, checkpoint_s
        self.store = store
        training.commits = store is None
        self.folder: runs.RunFolder | None = None
        self.reports: list[Report] = []
        self.best: dict[str, Any] = {}
        self.best_model: Model | None = None
        self._saved_best, self._resumed = -1, False
        self._same: tuple[Any, Any, dict[str, Any]] | None = None
        self._recorded = 0  # the number of rounds that are written
        self._last = self._began = time.monotonic()

    @property
    def path(self) -> Path | None:
        """The path of the run folder, which is created at the first use; None if no file is written."""
        if self.folder is None and self.out is not None:
            t = self.training
            about = runs.environment(why=t.reason, **identity(t), **t.where(), **t.data.held_out_fingerprints())
            self.folder = runs.RunFolder.create(Path(self.out), self.config, about, self.store, t.input.encode())
            self._begin_log()
            self._use_ledger(self.folder.path, None)
        return None if self.folder is None else self.folder.path

    def _use_ledger(self, path: Path, checkpoint: Mapping[str, Any] | None) -> None:
        """Charge the rounds of this run in its folder, or in the ledger that runs share.

        Raises:
            RunError: a run with released rounds lacks its ledger, or the ledger lacks rows of the checkpoint.
        """
        t = self.training
        if t.budget is None:
            return
        shared = t.settings.ledger is not None
        file = Path(str(t.settings.ledger)) if shared else path / "ledger.jsonl"
        if checkpoint is not None and checkpoint["round"] and not file.is_file():
            raise RunError(
                f"{path.name} has released {checkpoint['round']} rounds, and its ledger {file} is missing.",
                "the ledger of the run.",
                "without it the printed ε would be too small.",
                f"atoll show {path.name}",
            )
        t.budget.ledger, t.budget.run = (t.budget.ledger if shared else Ledger(file)), path.name
        if checkpoint is not None:
            t.budget.ledger.check(*checkpoint.get("ledger", (0, START)))

    def _begin_log(self) -> None:
        """Write the first event of a run."""
        t = self.training
        if self.folder is not None:
            name, rising = t.selection_metric
            facts = {"plan": repr(t.plan), "numerics": t.task.numerics, "why": t.reason, "notes": list(t.notes)}
            names = t.data.names
            called: dict[str, Any] = {"clients": t.data.count} if names is None else {"names": list(names[:MOST_NAMES])}
            self.folder.event("start", **facts, selection=name, rising=rising, **called)

    def begin(self, resume: str | Path | None, any_version: bool) -> None:
        """If a run is resumed, load its last checkpoint in every process of the training."""
        if resume is not None:
            self.resume(Path(resume), any_version)
        self.training.share()

    def resume(self, path: Path, any_version: bool) -> None:
        """Continue a run from its last checkpoint. A folder that is refused is not changed."""
        self.folder, self._resumed = runs.RunFolder.open(path, self.store), True
        try:
            checkpoint = self.folder.restore(any_version=any_version)
            refuse_other_input(path, self.training.input)
            self._refuse_other(checkpoint.facts if checkpoint else runs.read_environment(path), path)
            self._use_ledger(path, None if checkpoint is None else checkpoint.facts)
            if checkpoint is not None:
                self._load(checkpoint)
            self.folder.truncate_logs()
            write_input(path, self.training.input.encode())
            if checkpoint is None and self.store is not None:
                self._begin_log()  # the first event was not committed
        except BaseException:
            self.folder.close()
            raise

    def _refuse_other(self, recorded: Mapping[str, Any], path: Path) -> None:
        """Refuse to resume if model, data, plan or settings of the training differ from those of the run."""
        name = path.name
        if "plan" in recorded:  # a run of before recorded former names of renamed parts
            recorded = {**recorded, "plan": renamed(recorded["plan"])}
        for fact, ours in identity(self.training).items():
            if recorded.get(fact, ours) != ours:
                name_of_fact = "model" if fact == "layout" else fact
                raise UsageError(
                    f"{name} started with another {name_of_fact}: {recorded[fact]}. This training has {ours}.",
                    f"the same {name_of_fact}.",
                    "the result would belong to neither training.",
                    Line(f"init={str(path)!r}", f"atoll run --init {name} --input {name}")
                    if name_of_fact == "data"
                    else f"atoll show {name}",
                )

    def _load(self, checkpoint: runs.Checkpoint) -> None:
        t, facts = self.training, checkpoint.facts
        first = without_prefix(checkpoint.tensors, "first/")
        _check_memory(t.memory.first, {n: row for n, row in first.items() if row.dim()})
        for segment in checkpoint.memory:
            _check_memory(t.memory.first, {n: r[0] for n, r in without_prefix(segment, "rows/").items()})
        t.state = state_from_tensors(checkpoint.tensors, facts["round"], t.state)
        for segment in checkpoint.memory:
            t.memory.put(segment["ids"], without_prefix(segment, "rows/"))
        t.memory.changed()
        t.watch = dict(facts["watch"])
        t.seconds, t.bytes_up, t.bytes_down = facts["seconds"], facts["bytes_up"], facts["bytes_down"]
        self.best, self._recorded = dict(facts["best"]), t.state.round
        if checkpoint.best is not None:
            self._saved_best = self.best["round"]
            found = checkpoint.best
            whole = self.store is not None and "model/theta" in found
            self.best_model = model_from_tensors(found).to(t.task.device) if whole else start_from(found, t.task)
        if t.state.round >= t.settings.rounds:
            t.outcome = stops.Outcome(f"all {t.settings.rounds} rounds were run", False)
        t.end_if_spent()

    def round(self, report: Report) -> Report:
        """Write the row of a round. Write a checkpoint if `checkpoint_s` seconds have passed or the training ends."""
        t = self.training
        self.reports.append(report)
        self._keep_best(report)
        if self.path is not None and self.folder is not None:
            self.folder.metric(metrics_row(report, len(t.state.versions)))
            for failure in report.failures:
                self.folder.event("failure", **failure._asdict())
            for note in report.notes:
                self.folder.event("note", round=report.round, text=note)
            trained = {n: t for n, t in report.clients.items() if not n.startswith(HELD_OUT)}
            self.folder.event("clients", round=report.round, **_brief(trained))
            if t.evaluation.clients and t.evaluated_round == t.state.round:
                self.folder.clients({"round": report.round, **_client_values(t)})
            if report.trips:
                self.folder.event("trips", round=report.round, **_columns(report.trips))
            due = (
                self.store is not None
                or t.plan.releases
                or time.monotonic() - self._last >= self.checkpoint_s
                or t.outcome is not None
            )
            if due and not (t.outcome and t.outcome.failed):
                self.checkpoint()
                if self.store is not None:
                    t.engine.commit(report.round)
        self._recorded = t.state.round
        return report

    def _keep_best(self, report: Report) -> None:
        metric, higher = self.training.selection_metric
        value = report.metrics.get(metric)
        if value is None or value != value:
            return
        if not self.best or (value > self.best["value"] if higher else value < self.best["value"]):
            self.best = {"metric": metric, "value": value, "round": report.round}
            self.best_model = self.training.evaluated_model

    def checkpoint(self) -> None:
        """Write a checkpoint of the current state."""
        if self.folder is None:
            return
        t = self.training
        best = None
        if self.best_model is not None and self.best["round"] != self._saved_best:
            # In a store the best model is a part of the state if the round of the state is the best one.
            best = _state_dict(t, self.best_model) if self.store is None else model_to_tensors(self.best_model)
            self._save_hidden("best", self.best_model)
        ids, rows = t.memory.changed()
        memory = {"ids": ids, **under("rows/", rows)} if len(ids) else {}
        facts = {
            "round": t.state.round,
            **self._identity(),
            "watch": t.watch,
            "best": self.best,
            "seconds": t.seconds,
            "bytes_up": t.bytes_up,
            "bytes_down": t.bytes_down,
            **({} if t.budget is None else {"ledger": [len(t.budget.ledger.rows), t.budget.ledger.last]}),
        }
        self.folder.checkpoint(state_to_tensors(t.state), memory, facts, best)
        self._saved_best = self.best["round"] if self.best else -1
        self._last = time.monotonic()

    def _identity(self) -> dict[str, Any]:
        """`identity` of the training, computed once for each plan: it takes as long as a small checkpoint."""
        t = self.training
        if self._same is None or self._same[0] is not t.plan or self._same[1] is not t.task:
            self._same = t.plan, t.task, identity(t)
        return self._same[2]

    def _save_hidden(self, stem: str, model: Model) -> None:
        """Write the buffers that `state_dict` leaves out, if the model has any, next to the file of the model."""
        layout = self.training.task.layout
        names = [e.name for e in layout.entries if not e.persistent]
        if names and self.folder is not None:
            tensors = layout.state_dict(model.theta, model.buffers, {**model.counters, **model.fixed}, hidden=True)
            self.folder.save(f"{stem}{HIDDEN}", {n: tensors[n] for n in names})

    def _save_adapter(self, model: nn.Module) -> None:
        """Write the adapter of a model of PEFT into `adapter`, in the format of PEFT; an error becomes a note."""
        save = getattr(model, "save_pretrained", None)
        if self.folder is not None and save is not None and hasattr(model, "peft_config"):
            try:
                save(str(self.folder.path / "adapter"), save_embedding_layers=False)
            except Exception as error:
                self.note(f"The adapter was not written: {type(error).__name__}: {error}")

    def fail(self, error: BaseException) -> None:
        """Record that an error ended the training, and write a checkpoint of the state before the failed round.

        No checkpoint is written in two cases: the training already has the state after the failed round, or the user
        pressed Ctrl-C a second time. (The first Ctrl-C lets the round finish.) The run then resumes from its last
        checkpoint. A refusal in the first round leaves no folder, unless the plan has a budget: its ledger stays.

        Args:
            error: the error. A `KeyboardInterrupt` is recorded as "interrupted", any other error as "failed". An error
                of the disk only interrupts a run whose rounds are in a store.
        """
        if self.folder is None:
            return
        new = not (self._recorded or self._resumed or self.store) and self.training.budget is None
        if new and isinstance(error, UsageError):  # such as a metric of other classes
            self.refuse(error)
            return
        of_disk = self.store is not None and isinstance(error.__cause__, OSError)
        interrupted = isinstance(error, KeyboardInterrupt) or of_disk
        with (
            contextlib.suppress(RunError),
            contextlib.closing(self.folder),
        ):  # if the disk is full, the first error is reported
            status = "interrupted" if interrupted else "failed"
            self.folder.event("stop", status=status, reason=str(error) or type(error).__name__)
            if not interrupted and self.training.state.round == self._recorded:
                self.checkpoint()

    def refuse(self, error: BaseException) -> None:
        """Remove the folder of a run whose observer refused to start. A run with rounds is interrupted.

        Args:
            error: the error of the observer, such as a tracker.
        """
        folder, self.folder = self.folder, None
        if folder is None:
            return
        if not self._resumed and self.store is None:  # a store names the run already
            folder.discard()
            return
        with contextlib.suppress(RunError), contextlib.closing(folder):
            folder.event("stop", status="interrupted", reason=str(error) or type(error).__name__)

    def note(self, text: str) -> None:
        """Write a text into the run as a note of the last round."""
        if self.folder is not None:
            with contextlib.suppress(RunError):  # if the disk is full, `end` reports it
                self.folder.event("note", round=max(self.training.state.round - 1, 0), text=text)

    def end(self, interrupted: bool, *, baselines: bool, report: bool, formats: Sequence[str] = ()) -> Run:
        """Train the baselines if they were requested, write the result, and draw the report. Returns the run."""
        t = self.training
        outcome = t.outcome or stops.Outcome("interrupted", False)
        status = "interrupted" if t.outcome is None and interrupted else "failed" if outcome.failed else "done"
        compared, problem = _compared(t, baselines and status == "done") if status != "failed" else ({}, ())
        wall = time.monotonic() - self._began
        run = Run(
            self.path,
            t.state.round,
            self._last_metrics(),
            self.best,
            outcome.reason,
            status,
            t.seconds,
            t.bytes_up,
            t.bytes_down,
            tuple(f for r in self.reports for f in r.failures),
            tuple(self.reports),
            t.model,
            compared,
            (*t.notes, *problem),
            t.input,
            t.task,
            wall,
            t.privacy,
            _confusion(t),
            t.client_models,
            _inference(t),
            run_plot,
        )
        if self.folder is None:
            return run
        try:
            for name, metrics in compared.items():
                self.folder.event("baseline", name=name, **metrics)
            for text in problem:
                self.note(text)
            wall_s = round(wall, 3)
            self.folder.event("stop", status=status, reason=outcome.reason, round=t.state.round, wall=wall_s)
            if status != "failed":
                self.checkpoint()
                self.folder.save("model.safetensors", _state_dict(t, t.evaluated_model))
                self._save_hidden("model", t.evaluated_model)
                self._save_adapter(run.model)
            self.folder.finish()
            if t.evaluation.clients:
                self.folder.save_clients(_client_table(t))
            if run.confusion is not None:
                self.folder.save_confusion(run.confusion)
            if run.inference is not None:
                self.folder.save_inference(run.inference)
            if report:
                from atoll.report.draw import draw

                # A page about a private run shows no rows of clients.
                draw(self.folder.path, t.data if t.data.count and not t.plan.releases else None, formats)
        finally:
            self.folder.close()
        return run

    def _last_metrics(self) -> dict[str, float]:
        out: dict[str, float] = {}
        for r in self.reports:
            out |= r.metrics
        if not out and self.folder is not None:
            for row in runs.read_rows(self.folder.path / "metrics.jsonl"):
                out |= {n: v for n, v in row.items() if n not in COUNTS and v is not None}
        return out


def _compared(t: Training, baselines: bool) -> tuple[dict[str, dict[str, Any]], tuple[str, ...]]:
    """The final model, the constant answers, and the trained baselines if they were requested; and a note, if any.

    A metric of the user may fail for a constant. The training is done then, and its result must not be lost. With noise
    there is no comparison: the constants are computed from all train rows.
    """
    if t.plan.releases or not t.engine.primary or (t.evaluator is None and not baselines):
        return {}, ()
    from atoll.training.baselines import compare_baselines, compare_constants

    found: dict[str, dict[str, Any]] = {}
    problem: tuple[str, ...] = ()
    try:
        found = compare_constants(t)
    except Exception as error:
        problem = (f"The constant answer was not evaluated: {type(error).__name__}: {error}",)
    trained = compare_baselines(t) if baselines else {}
    order = ("federated", "personal", *trained, *found)
    both = found | trained
    return {name: both[name] for name in dict.fromkeys(order) if name in both}, problem


def _client_table(t: Training) -> dict[str, list[Any]]:
    """The held-out values of each client by column; an undefined value is None."""
    columns = {n: [None if v != v else v for v in values.tolist()] for n, values in t.evaluation.clients.items()}
    return {"client": list(t.client_names), **columns}


def _client_values(t: Training, limit: int = 1000) -> dict[str, list[Any]]:
    """The ids and the held-out values of the evaluated clients, of at most `limit` that are drawn by the seed."""
    ids = t.evaluated_ids
    if len(ids) > limit:
        ids = ids[Key(t.settings.seed).fold("clients").distinct(limit, len(ids)).sort().values]
    columns = {n: values.tolist() for n, values in t.values_by_client(ids).items()}
    return {"id": ids.tolist(), **{n: [_short(v) for v in values] for n, values in columns.items()}}


def _short(value: float) -> float | None:
    """A number with six significant digits; None for NaN."""
    return value if isinstance(value, int) else None if value != value else float(f"{value:.6g}")


def _check_memory(first: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Refuse to resume if a saved tensor of a client's memory is not one with which clients of this training begin.

    Args:
        first: the memory with which clients begin.
        saved: tensors of the memory of one client.
    """
    for name, row in saved.items():
        if name not in first or kind_of(row) != kind_of(first[name]):
            raise UsageError(
                f"The saved client memory has {name!r}, {kind_of(row)}; this training has {kind_of(first.get(name))}.",
                "the names, shapes and dtypes of the run.",
                "clients of the run continue with the saved tensors.",
            )


def _brief(clients: Mapping[str, Any], limit: int = 1000) -> dict[str, Any]:
    """The columns of the event "clients", with at most `limit` clients."""
    whole = {n: t[:limit].tolist() for n, t in clients.items()}
    return {n: [round(v, 6) if isinstance(v, float) else int(v) for v in values] for n, values in whole.items()}


def _columns(trips: tuple[FlightTimes, ...], limit: int = 10_000) -> dict[str, list[Any]]:
    """The columns of the event "trips", with at most `limit` flights."""
    return {name: list(column) for name, column in zip(_TRIP_COLUMNS, zip(*trips[:limit], strict=True), strict=True)}


def _state_dict(training: Training, model: Model) -> dict[str, Tensor]:
    return training.task.layout.state_dict(model.theta, model.buffers, {**model.counters, **model.fixed})


def find_interrupted(training: Training, out: str | Path) -> Path | None:
    """The interrupted run of this training, if a supervisor such as `torchrun` has restarted its processes."""
    job = training.engine.restart_of
    if job is not None:
        ours = {**identity(training), "job": job}
        for path in reversed(runs.list_runs(Path(out))):
            facts = runs.read_environment(path)
            if all(facts.get(name) == value for name, value in ours.items()):
                return path
    return None


def _inference(training: Training) -> Inference | None:
    """The coefficients of a training with `newton`, with their standard errors."""
    part = training.plan.local
    if not isinstance(part, Newton):
        return None
    return infer(part, training.state, training.task, training.input, training.columns)


def _confusion(training: Training) -> Confusion | None:
    """The confusion table of the last evaluation, if the metric was computed."""
    table = training.evaluation.tables.get("confusion")
    return None if table is None else Confusion.of(training.data.classes, table)
