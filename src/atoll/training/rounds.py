"""Runs a training round by round, evaluates its model, and applies the rules that end it.

Tests: tests/surface/test_engines.py
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Unpack, cast

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import load_file, save
from torch import Tensor, nn

from atoll import models
from atoll.base.errors import RunError, UsageError
from atoll.base.names import under, without_prefix
from atoll.base.random import Key
from atoll.compute import limits
from atoll.compute.buffer_pool import BufferPool, use_pool
from atoll.compute.device import check_precision, move_rows
from atoll.compute.loss import Metric
from atoll.compute.model_state import Model
from atoll.compute.task import Task
from atoll.data.clients import Clients
from atoll.engine.choose_backend import Choice, choose
from atoll.engine.client_state import Memory
from atoll.engine.inprocess import InProcessEngine, threads_for
from atoll.engine.protocols import Engine
from atoll.engine.simulation.fleet import Fleet
from atoll.engine.spec import spec_name
from atoll.plan.aggregate import Mean
from atoll.plan.codec import Identity
from atoll.plan.in_flight import InFlight
from atoll.plan.local import Evaluate, Gradient, Train
from atoll.plan.plan import Plan
from atoll.plan.round import Report, bind, close_round, draw_cohort, open_round, step
from atoll.plan.state import State
from atoll.runs.checkpoint import state_from_tensors, state_to_tensors
from atoll.runs.fingerprint import fingerprint
from atoll.training import stop as stops
from atoll.training.settings import Settings, SettingsDict, listed

DTYPES = {"float32": torch.float32, "float64": torch.float64}
LOSSES = {"classification": "cross_entropy", "regression": "mse", "tokens": "cross_entropy"}
JUDGES = {"classification": ("accuracy",), "regression": ("rmse",), "tokens": ("accuracy",)}
_JUDGE = Plan(Evaluate(), Mean())


class Training:
    """A training that runs round by round: `for report in atoll.rounds(model, data, plan): ...`.

    Each step is `atoll.plan.round.step`. Between two rounds `state`, `model` and `evaluate()` may be used.

    Args:
        model: a name, an `nn.Module`, or a function that makes one.
        data: the clients.
        plan: the algorithm.
        settings: the settings of the training.
    Raises:
        UsageError: model, data, plan and settings do not fit.
    """

    def __init__(self, model: Any, data: Clients, plan: Plan, settings: Settings) -> None:
        _refuse_other(data, plan)
        self.data, self.settings = data, settings
        self.fleet = settings.fleet if isinstance(settings.fleet, Fleet) else None
        options = settings.options(plan, model if isinstance(model, str) else None)
        settings.spec.check(options)
        task = _task(model, data, settings)
        self._closed = False
        self.engine = settings.spec.build(options)
        try:
            self._begin(task, plan)
        except BaseException:
            self.close()
            raise

    def _begin(self, task: Task, plan: Plan) -> None:
        """Open the engine and set the state before the first round."""
        settings = self.settings
        self.task, self.reason = _chosen(task, self.data, plan, settings, self.engine)
        near = move_rows(self.data, task.device)  # the fingerprint of the data is taken from the rows on the host
        self.engine.open(self.task, near)
        self.evaluator = None
        if self.data.held_out is not None and settings.evaluate_every:
            self.evaluator = InProcessEngine(self.task, near.held(), settings.chunk)
        self.memory = Memory(plan.memory(self.task.layout))
        start = None if settings.init is None else start_from(settings.init, self.task)
        self.state = State.first(plan, self.task, settings.seed, self.memory, start)
        draw_cohort(plan, self.state, self.engine.population, self.state.key())  # refuses a cohort that cannot be drawn
        self.plan = bind(plan, self.engine)
        self.engine.check_start(self.plan, self.state)
        self.first = self.state.model  # the start of the training; the loop backend writes into the module itself
        self.rules = (stops.Rounds(settings.rounds), stops.Diverged(), settings.stop)
        if isinstance(plan.local, (Gradient, Train)) and isinstance(plan.codec, Identity):
            # No other part adds metrics, so all names are known.
            judged = ("held_out_loss", *(m.name for m in self.task.metrics)) if self.evaluator else ()
            stops.refuse_unknown(self.rules, ("loss", "gradient_norm", "lr", *judged))
        self._buffers = BufferPool()
        self.watch: dict[str, Any] = {}
        self.outcome: stops.Outcome | None = None
        self.seconds = 0.0
        self.bytes_up = self.bytes_down = 0
        check_same(self.engine, identity(self))
        self.share()
        self.first = self.state.model

    def where(self) -> dict[str, Any]:
        """Facts about the engine for `environment.json`."""
        return {"engine": spec_name(self.settings.spec), **self.engine.describe()}

    def close(self) -> None:
        """Close the engine. The state remains available. A second call does nothing."""
        if not self._closed:
            self._closed = True
            self.engine.close()

    def __iter__(self) -> Iterator[Report]:
        while self.outcome is None:
            try:
                report = self.next()
            except BaseException:
                self.close()
                raise
            yield report
        self.close()

    def next(self) -> Report:
        """Run one round, evaluate the model, and apply the rules that end the training.

        Raises:
            RunError: the round failed; the state is the one before this round. An error of the evaluation comes after
                the step: the state is then the one after this round, and the engine has committed the round.
        """
        began = time.perf_counter()
        with use_pool(self._buffers), self._threads():
            self.state, report = step(self.plan, self.state, self.engine)
        spent = time.perf_counter() - began
        last = self.state.round >= self.settings.rounds
        every = self.settings.evaluate_every
        judged = {m.name for m in self.task.metrics} if self.evaluator is not None else set()
        metrics = {f"training_{n}" if n in judged else n: v for n, v in report.metrics.items()}
        if self.evaluator is not None and (last or self.state.round % every == 0):
            try:
                metrics |= self.evaluate()
            except BaseException:
                self._accept(report.to(metrics=metrics, seconds=spent))
                raise
        report = report.to(metrics=metrics, seconds=spent, fingerprint=fingerprint(self.state.model.theta))
        report = sync_report(self.engine, report)
        self._accept(report)
        return report

    def _accept(self, report: Report) -> None:
        """Add a round to the totals, apply the rules, and commit it in the engine, except if the training diverged."""
        self.seconds += report.seconds
        self.bytes_up += report.bytes_up
        self.bytes_down += report.bytes_down
        self.watch, self.outcome = stops.update(self.rules, self.watch, report)
        if self.outcome is None or not self.outcome.failed:
            self.engine.commit(report.round)

    def _threads(self) -> AbstractContextManager[None]:
        """One thread for torch during short native code, because threads that torch wakes up would occupy its cores."""
        small = self.task.layout.d < limits.THREADED_PARAMETERS
        native = self.task.numerics == "compiled"
        return threads_for(self.task, plan=self.plan) if small and native else nullcontext()

    def evaluate(self, engine: InProcessEngine | None = None) -> dict[str, float]:
        """Evaluate the current model on the held-out rows, or on the clients of another engine."""
        engine = engine or self.evaluator
        if engine is None:
            return {}
        return evaluate(self.state, engine)

    @property
    def selection_metric(self) -> tuple[str, bool]:
        """The metric that selects the best round, and whether larger values are better."""
        if self.evaluator is None:
            return "loss", False
        for metric in self.task.metrics:
            return metric.name, metric.higher_is_better
        return "held_out_loss", False

    @property
    def model(self) -> nn.Module:
        """A new module with the current parameters."""
        return self.task.result(self.state.model)

    def share(self) -> None:
        """Copy the state of the primary process to all processes of the training, with its client state and rules."""
        if len(self.engine.exchange(b"")) == 1:
            return
        sent = b""
        if self.engine.primary:
            ids = self.memory.touched()
            facts = {n: getattr(self, n) for n in ("watch", "seconds", "bytes_up", "bytes_down")}
            record = {"round": self.state.round, "outcome": self.outcome, "facts": facts}
            tensors = {
                **under("state/", state_to_tensors(self.state)),
                **under("rows/", self.memory.take(ids)),
                "ids": ids,
            }
            tensors = {n: t.cpu().clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}
            tensors["record"] = torch.frombuffer(bytearray(json.dumps(record).encode()), dtype=torch.uint8)
            sent = save(tensors)
        received = load_tensors(self.engine.agree(sent))
        if self.engine.primary:
            return
        record = json.loads(received["record"].numpy().tobytes())
        self.state = state_from_tensors(without_prefix(received, "state/"), record["round"], self.state)
        self.memory.put(received["ids"], without_prefix(received, "rows/"))
        self.outcome = None if record["outcome"] is None else stops.Outcome(*record["outcome"])
        for name, value in record["facts"].items():
            setattr(self, name, value)


def identity(training: Training) -> dict[str, Any]:
    """The facts that must not change when a run resumes, and that must be equal on all ranks."""
    layout = training.task.layout
    return {
        "data": training.data.fingerprint(),
        "plan": repr(training.plan),
        "numerics": training.task.numerics,
        "precision": training.task.precision,
        "device": training.task.device.type,
        "layout": f"{layout.d} parameters, {layout.dtype}, {sha256(repr(layout.entries).encode()).hexdigest()[:12]}",
        "seed": training.settings.seed,
        **({} if training.fleet is None else {"fleet": repr(training.fleet)}),
    }


def _task(model: Any, data: Clients, settings: Settings) -> Task:
    """The model, its loss and its metrics on the device of the engine."""
    dtype = DTYPES[settings.dtype]
    module = models.resolve(model, data, Key(settings.seed).fold("model"), dtype)
    kind = "binary" if _binary(module, data) else data.kind
    loss = settings.loss or ("binary_cross_entropy" if kind == "binary" else LOSSES[data.kind])
    # Settings has put a single metric into a tuple.
    metrics = JUDGES[data.kind] if settings.metrics is None else cast("tuple[str | Metric, ...]", settings.metrics)
    device = settings.spec.device(settings.device)
    check_precision(settings.precision, settings.dtype, settings.numerics, device)
    return replace(Task.of(module, loss, metrics, dtype), precision=settings.precision).on(device)


def _chosen(task: Task, data: Clients, plan: Plan, settings: Settings, engine: Engine) -> Choice:
    """The backend of the local steps. The primary process chooses it for all processes."""
    wanted, rounds = settings.numerics, settings.rounds
    preferred = engine.numerics_for(plan) if wanted == "auto" and plan.local.numerics is None else None
    if preferred is not None:
        numerics, reason = preferred
        return Choice(choose(task, data, plan, numerics).task, reason)
    choice = choose(task, data, plan, wanted, rounds)
    first = engine.agree(choice.task.numerics.encode()).decode()
    return choice if first == choice.task.numerics else choose(task, data, plan, first, rounds)


def check_same(engine: Engine, facts: Mapping[str, Any]) -> None:
    """Refuse processes that would not compute the same training.

    Args:
        engine: the engine that connects the processes.
        facts: the facts of this process.
    Raises:
        UsageError: a fact of another process differs from the fact of the primary process.
    """
    each = [json.loads(data) for data in engine.exchange(json.dumps(facts).encode())]
    for rank, theirs in enumerate(each):
        for name, first in each[0].items():
            if theirs.get(name) != first:
                raise UsageError(
                    f"Rank {rank} has another {name} than rank 0: {theirs.get(name)}, and not {first}.",
                    f"the same {name} in every process.",
                    "each process computes every step of the server.",
                    f"--seed {first}" if name == "seed" else "atoll doctor",
                )


def sync_report(engine: Engine, report: Report) -> Report:
    """Replace metrics and duration of a report by those of the primary process, so that stop rules agree.

    Raises:
        RunError: two processes have different models.
    """
    mine = {"seconds": report.seconds, "metrics": report.metrics if engine.primary else {}, "model": report.fingerprint}
    each = engine.exchange(json.dumps(mine).encode())
    if len(each) == 1:
        return report
    reports = [json.loads(data) for data in each]
    for rank, theirs in enumerate(reports):
        if theirs["model"] != reports[0]["model"]:
            raise RunError(
                f"After round {report.round} rank {rank} has another model than rank 0.",
                "processes on machines of one kind.",
                "every process computes the step of the server, and another processor may round differently.",
                "--engine inprocess",
            )
    return report.to(seconds=reports[0]["seconds"], metrics=reports[0]["metrics"])


def evaluate(state: State, engine: InProcessEngine) -> dict[str, float]:
    """Evaluate the model of a state on the clients of an engine. The loss has the name `held_out_loss`."""
    opened = open_round(_JUDGE, replace(state, air=InFlight(), versions={}, sent=None), engine)
    gathered = engine.gather(_JUDGE, opened.state, opened.cohort, opened.key)
    each = {n: float(t) for n, t in close_round(opened, gathered).mean.sums.items()}
    out = {"held_out_loss": each.pop("loss")}
    finish = {m.name: m.finish for m in engine.task.metrics}
    return out | {n: finish[n](v) for n, v in each.items()}


def _refuse_other(data: object, plan: object) -> None:
    """Refuse data that are not clients, such as a source before `split`, and a plan that is not a `Plan`."""
    if not isinstance(data, Clients):
        raise UsageError(
            f"data is {data!r:.60}.",
            "clients: a data set that was split.",
            "a training needs the rows of each client.",
            'atoll.data.load("digits").split(10)',
        )
    if not isinstance(plan, Plan):
        raise UsageError(f"plan is {plan!r:.60}.", "a plan.", write="atoll.recipes.fedavg(0.1)")


def _binary(module: nn.Module, data: Clients) -> bool:
    """Whether the model of a task with two classes has one output."""
    if data.kind != "classification" or data.classes is None or len(data.classes) != 2:
        return False
    last = [m for m in module.modules() if isinstance(m, nn.Linear)]
    return bool(last) and last[-1].out_features == 1


def start_from(init: Mapping[str, Tensor] | str | Path, task: Task) -> Model:
    """The model to start from."""
    if isinstance(init, (str, Path)):
        path = Path(init)
        path = path / "model.safetensors" if path.is_dir() else path
        if not path.is_file():
            raise UsageError(
                f"init = {str(init)!r} is no file.",
                "a run folder or a safetensors file.",
                write="--init runs/latest",
            )
        init = load_file(path)
    theta, buffers, fixed = task.layout.flatten(init)
    counters = {e.name: fixed.pop(e.name) for e in task.layout.counters}
    return Model(theta, buffers, counters, fixed).to(task.device)


@listed
def rounds(model: Any, data: Clients, plan: Plan, **settings: Unpack[SettingsDict]) -> Training:
    """Run a training round by round in your own loop; no file is written.

    Args:
        model: a name, an `nn.Module`, or a function that makes one.
        data: the clients.
        plan: the algorithm.
        settings: the fields of `Settings`.
    Returns:
        The training before its first round.
    Raises:
        UsageError: model, data, plan and settings do not fit.
    Example:
        >>> import atoll
        >>> data = atoll.data.load("diabetes").split(clients=5)
        >>> training = rounds("linear", data, atoll.recipes.distributed_gd(0.1), rounds=3)
        >>> [report.round for report in training]
        [0, 1, 2]
    """
    return Training(model, data, plan, Settings.from_kwargs(settings))
