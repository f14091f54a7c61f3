"""Runs a training round by round, evaluates its model, and applies the rules that end it.

Tests: tests/surface/test_engines.py
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from types import FunctionType
from typing import Any, Self, Unpack, cast

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from atoll import models
from atoll.base.concepts import part_for
from atoll.base.entropy import entropy_source
from atoll.base.errors import AtollError, FeatureError, Note, RunError, UsageError
from atoll.base.lines import Change, Line, literal, quoted
from atoll.base.names import under, without_prefix
from atoll.base.random import GeneratorWatch, Key, SecretKey, user_modes, user_scope
from atoll.compute import limits
from atoll.compute.buffer_pool import BufferPool, use_pool
from atoll.compute.device import check_precision, move_rows
from atoll.compute.loss import ClassWeighted, PerExample, built_in, cox, loss_of, poisson
from atoll.compute.metric_names import OVER_CLIENTS, PERSONAL
from atoll.compute.metrics import Metric, metrics_of
from atoll.compute.model_state import Model
from atoll.compute.task import Task
from atoll.compute.user_code import PASSES, missed_draw
from atoll.data.clients import Clients
from atoll.data.input import Input, first_difference
from atoll.data.rows import in_memory, keyed
from atoll.data.schema import Schema, TrainRows
from atoll.data.sources import Source
from atoll.engine.check_answers import fitting_metrics, has_single_logit, sum_lengths
from atoll.engine.choose_backend import Choice, choose, choose_without_rows
from atoll.engine.client_state import Memory
from atoll.engine.inprocess import InProcessEngine, threads_for
from atoll.engine.protocols import Engine
from atoll.engine.simulation.fleet import Fleet
from atoll.engine.spec import spec_name
from atoll.plan.codec import Identity
from atoll.plan.local import Gradient, Train
from atoll.plan.plan import Plan
from atoll.plan.registry import read_part
from atoll.plan.round import Report, bind, draw_cohort, step
from atoll.plan.state import State, evaluated_model
from atoll.privacy.account import UNIT
from atoll.recipes import RECIPES
from atoll.runs.checkpoint import state_from_tensors, state_to_tensors
from atoll.runs.fingerprint import fingerprint
from atoll.runs.folder import HIDDEN
from atoll.runs.personal import ClientModels, evaluated_state
from atoll.training import stop as stops
from atoll.training.evaluation import HeldOutValues, class_weights, evaluate, join_clients, of_sites
from atoll.training.inference import parameter_names
from atoll.training.personal import check_tune, held_by_client, of_models, values_of_clients
from atoll.training.privacy import budget_of, check_clients, claim_of, notes_of, refuse_leaks
from atoll.training.reference import WORSE_THAN_CONSTANT, constant_loss, known_constant_loss, reference_rows
from atoll.training.settings import Settings, SettingsDict, listed

MOST_EVALUATED = 10_000  # clients that are evaluated on their own rows
HELD_OUT = "held_out_"  # before the name of a column of `Report.clients` that is measured on held-out rows
DTYPES = {"float32": torch.float32, "float64": torch.float64}
LOSSES = {
    "classification": "cross_entropy",
    "regression": "mse",
    "tokens": "cross_entropy",
    "labels": "binary_cross_entropy",
}
JUDGES = {
    "classification": ("accuracy", "balanced_accuracy"),
    "regression": ("rmse", "mae", "r2"),
    "tokens": ("accuracy",),
    "labels": ("accuracy", "balanced_accuracy", "auc"),
}


class Training:
    """A training that runs round by round: `for report in atoll.rounds(model, data, plan): ...`.

    Each step is `atoll.plan.round.step`. Between two rounds `state`, `model` and `evaluate()` may be used. The end of
    the loop closes the engine, also after `break` or an error. A caller of `next` uses `with atoll.rounds(...) as it`.

    Args:
        model: a name, an `nn.Module`, or a function that makes one.
        data: the clients; or a `Schema`, if the engine is a network and the clients have their own rows.
        plan: the algorithm, or its text, such as "fedavg(0.1)".
        settings: the settings of the training.
    Raises:
        UsageError: model, data, plan and settings do not fit.
    """

    def __init__(self, model: Any, data: Clients | Schema, plan: Plan | str, settings: Settings) -> None:
        plan = plan_from_text(plan) if isinstance(plan, str) else plan
        with user_scope(Key(settings.seed).fold("start")):
            self._open(model, data, plan, settings)
        for note in self.task.notes:
            warnings.warn(note, Note, stacklevel=3)

    def _open(self, model: Any, data: Clients | Schema, plan: Plan, settings: Settings) -> None:
        """Build the task and the engine, and set the state before the first round."""
        _refuse_other(data, plan, settings)
        if isinstance(data, Clients) and not settings.spec.needs_rows:
            data = Schema.of(data)
        self.known = data.known if isinstance(data, Schema) else None
        data = data.without_clients() if isinstance(data, Schema) else data
        if settings.draws:
            held, view = (
                None if rows is None else keyed(rows, None, forced=True) for rows in (data.held_out, data.held_view)
            )
            data = replace(data, rows=keyed(data.rows, None, forced=True), held_out=held, held_view=view)
        self.data, self.settings = data, settings
        self.input = data.described(settings.dtype)
        if isinstance(settings.init, (str, Path)):
            path = Path(settings.init)
            folder = path if path.is_dir() else path.parent
            refuse_other_input(folder, self.input)
        self.fleet = settings.fleet if isinstance(settings.fleet, Fleet) else None
        options = settings.options(plan, model if isinstance(model, str) else None)
        settings.spec.check(options)
        task = _task(model, data, settings, plan.releases, self.known)
        self._closed = False
        self.engine = settings.spec.build(options)
        try:
            self._begin(task, plan)
        except BaseException as error:
            self.close_after(error)
            raise

    def _begin(self, task: Task, plan: Plan) -> None:
        """Open the engine and set the state before the first round."""
        settings = self.settings
        self.task, self.reason = _chosen(task, self.data, plan, settings, self.engine)
        rows = self.data if self.data.count else Schema.of(self.data).synthetic()
        self.task = replace(self.task, lengths=sum_lengths(self.task, rows))
        if settings.init is not None:
            self.task = replace(self.task, start=start_from(settings.init, self.task))
        # The fingerprint of the data is taken from the rows on the host.
        self._near = move_rows(self.data, task.device)
        self.engine.open(self.task, self._near)
        self.evaluator, self.evaluation, self.evaluated_round = None, HeldOutValues({}), -1
        names = self.data.names
        # The names of the evaluated clients.
        self.client_names: Sequence[Any] = [names[i] if names else i for i in self.evaluated_ids.tolist()]
        if self.data.held_out is not None and settings.evaluate_every:
            self.evaluator = self._held_out
        if settings.evaluate in ("clients", "both") and self.data.held_owner is None and not self.engine.judges:
            raise UsageError(
                f"evaluate={settings.evaluate!r}, and no held-out row belongs to a client.",
                "held-out rows of natural clients, or clients that a partition draws.",
                "the rows of each client are evaluated.",
                Change("evaluate", "pooled"),
            )
        if self.engine.judges and self.evaluator is None:
            _refuse_whole(self.task, settings)
        check_tune(plan, self.data, settings)
        self.memory = Memory(plan.memory(self.task))
        self.state = State.first(plan, self.task, settings.seed, self.memory)
        self.plan, self._bound = plan, -1
        self.budget = budget_of(self.plan, self.data, settings)
        self._spent: dict[str, float] = {}  # ε after the last charge
        if self.budget is not None:
            refuse_leaks(self)
        self.commits = True  # False: a recorder that commits every round reports its commits to the engine
        if self.data.count:
            self._bind()
        replaced = any(isinstance(rule, stops.Diverged) for _, rule in stops.each(settings.stop))
        self.rules = (stops.Rounds(settings.rounds), () if replaced else stops.Diverged(), settings.stop)
        if (names := self.metric_names) is not None:
            stops.refuse_unknown(self.rules, names)
        self._buffers = BufferPool()
        self.watch: dict[str, Any] = {}
        self.outcome: stops.Outcome | None = None
        self.seconds = 0.0
        self.bytes_up = self.bytes_down = self._site_bytes = 0
        check_same(self.engine, identity(self))
        self.share()
        # The start of the training; the loop backend writes into the module itself.
        self.first = self.plan.local.whole(self.state.model, self.task)

    @property
    def notes(self) -> tuple[str, ...]:
        """The choices that atoll made for the user: about the data, and about the model, the loss and the metrics."""
        few = self.by_client and self.evaluated.count < self.data.count
        some = (
            f"{self.evaluated.count} of {self.data.count} clients, drawn by the seed, are evaluated on their own rows."
        )
        return (*notes_of(self), *self.data.notes, *self.task.notes, *((some,) if few else ()), *self._class_notes)

    @cached_property
    def _class_notes(self) -> tuple[str, ...]:
        """A note if clients lack classes, and the correction reads their class counts."""
        local, data = self.plan.local, self.data
        read = isinstance(local, Train) and local.correction is not None and local.correction.reads_classes
        if not read or not data.count or not data.classes or not in_memory(data.rows):
            return ()
        y, classes = data.rows.targets()[data.order], len(data.classes)
        if y.dim() != 1:
            return ()
        pairs = (torch.arange(data.count).repeat_interleave(data.sizes) * classes + y)[y >= 0].unique() // classes
        lacking = int((pairs.bincount(minlength=data.count) < classes).sum())
        text = f"{lacking} of {data.count} clients have no row of some class: their class counts begin at half a row."
        return (text,) if lacking else ()

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the features; () if they have no names."""
        return self.input.names or self.data.columns or ()

    def _bind(self) -> None:
        """Bind the plan to the population, when it is known and each time that it has changed."""
        population = self.engine.population
        check_clients(self.budget, population.clients)
        draw_cohort(self.plan, self.state, population, self.state.key())  # refuses a cohort that cannot be drawn
        self.plan, self._bound = bind(self.plan, self.engine, self.task), population.version
        self.engine.check_start(self.plan, self.state)

    def where(self) -> dict[str, Any]:
        """Facts about the engine for `environment.json`."""
        return {"engine": spec_name(self.settings.spec), **self.engine.describe()}

    def close(self) -> None:
        """Close the engine. The state remains available. A second call does nothing."""
        if not self._closed:
            self._closed = True
            self.engine.close()

    def close_after(self, error: BaseException) -> None:
        """Close the engine because of an error. An error of the closing becomes a note of the first error."""
        try:
            self.close()
        except Exception as other:
            error.add_note(f"Closing the engine failed too: {type(other).__name__}: {other}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, GeneratorExit):
            self.close()
        else:
            self.close_after(error)

    def __iter__(self) -> Iterator[Report]:
        with self:  # also closes the engine if the caller leaves the loop
            while self.outcome is None:
                yield self.next()

    def next(self) -> Report:
        """Run one round, evaluate the model, and apply the rules that end the training.

        Raises:
            RunError: the round failed; the state is the one before this round. An error of the evaluation comes after
                the step: the state is then the one after this round, and the engine has committed the round.
        """
        self.engine.await_clients(self.plan, self.state)
        if self.engine.population.version != self._bound:
            self._bind()
        self.charge()
        watched = self._runs_user_code and not self.settings.draws
        with user_scope(self.state.key().fold("user")) if self.settings.draws else user_modes():
            draws = GeneratorWatch() if watched else None
            before, began = self.state, time.perf_counter()
            with use_pool(self._buffers), self._threads(), self._secrets():
                try:
                    self.state, report = step(self.plan, self.state, self.engine)
                except FeatureError as error:
                    raise error.named(parameter_names(self.task.layout, self.columns)) from error
            spent = time.perf_counter() - began
            metrics, every = self._training_metrics(report), self.settings.evaluate_every
            last = self.state.round >= self.settings.rounds
            if self.judged and (last or self.state.round % every == 0):
                try:
                    self.evaluation, self.evaluated_round = self._present_values(), self.state.round
                    metrics |= self.evaluation.metrics
                    report = report.to(bytes_up=report.bytes_up + self._site_bytes)
                except BaseException:
                    self._accept(report.to(metrics=metrics, seconds=spent))
                    raise
            clients = {**report.clients, **self._held_out_columns(report)}
            print_ = fingerprint(self.state.model.theta)
            report = report.to(metrics={**metrics, **self._spent}, seconds=spent, fingerprint=print_, clients=clients)
            if draws is not None and draws.found():
                draws.restore()
                self.state = before
                raise missed_draw(before.round)
            report = sync_report(self.engine, report)
            self._accept(report)
            return report

    def _held_out_columns(self, report: Report) -> dict[str, Tensor]:
        """The values of the clients of a round on their own held-out rows: `held_out_rows`, `held_out_loss`, …"""
        if self.evaluated_round != self.state.round or not self.evaluation.clients:
            return {}
        found = self.values_by_client(report.clients["id"])
        return {n if n.startswith(HELD_OUT) else f"{HELD_OUT}{n}": values for n, values in found.items()}

    def charge(self) -> None:
        """Charge the next round, or another attempt of it, in the primary process. Nothing without noise."""
        if self.budget is not None:
            mine = self.budget.charge(self.state.round) if self.engine.primary else 0.0
            self._spent = {"epsilon": float(self.engine.agree(repr(mine).encode()))}

    def _secrets(self) -> AbstractContextManager[None]:
        """The source of the secrets of rounds: the seed if the settings ask for it."""
        seeded = self.settings.randomness == "seed"
        return entropy_source(SecretKey.of_seed(self.settings.seed)) if seeded else nullcontext()

    def end_if_spent(self) -> None:
        """End the training if the next round does not fit into the budget of privacy."""
        if self.budget is None or self.outcome is not None:
            return
        fits = self.budget.fits(self.state.round) if self.engine.primary else True
        if self.engine.agree(b"1" if fits else b"0") == b"0":
            spent = f"budget ε = {self.settings.budget:g} is spent after {self.state.round} rounds"
            self.outcome = stops.Outcome(spent)

    @property
    def privacy(self) -> dict[str, Any]:
        """ε so far, δ, the unit, the relation of neighbours and the claim; {} without noise."""
        if self.budget is None:
            return {}
        return {
            "epsilon": self.budget.epsilon,
            "delta": self.budget.delta,
            "unit": UNIT,
            "relation": self.budget.relation,
            "claim": claim_of(self.plan, self.settings.randomness),
        }

    @cached_property
    def _runs_user_code(self) -> bool:
        """Whether a round calls code of the user: a module, a loss, a metric or a Dataset."""
        return not self.task.findings.built_in or not in_memory(self.data.rows)

    def _training_metrics(self, report: Report) -> dict[str, float]:
        """The metrics of the clients in a round. One with the name of a metric of held-out rows gets a prefix."""
        judged = {m.name for m in self.task.metrics} if self.judged else set()
        metrics = {n: v for n, v in report.metrics.items() if n not in judged}
        for name in judged & report.metrics.keys():
            free = f"training_{name}"
            while free in metrics:
                free = f"training_{free}"
            metrics[free] = report.metrics[name]
        return metrics

    def _accept(self, report: Report) -> None:
        """Add a round to the totals, apply the rules, and commit it in the engine, except if the training diverged."""
        self.seconds += report.seconds
        self.bytes_up += report.bytes_up
        self.bytes_down += report.bytes_down
        self.watch, self.outcome = stops.update(self.rules, self._referred(report), report)
        if self.outcome is not None and not self.outcome.failed:
            self.outcome = self._judged(report, self.outcome)
        self.end_if_spent()
        if self.commits and (self.outcome is None or not self.outcome.failed):
            self.engine.commit(report.round)

    def _referred(self, report: Report) -> dict[str, Any]:
        """The memory of the rules, with the references of `Diverged`.

        The loss of the start model needs a pass over the rows. It is computed only if the loss of a round is high.
        """
        watch, loss = dict(self.watch), report.metrics.get("loss")
        if loss is None or not self._comparable:
            return watch
        for name, rule in stops.each(self.rules):
            if isinstance(rule, stops.Diverged):
                memory = {**(watch.get(name) or rule.init())}
                if memory["first"] is None:
                    memory["first"] = self._constant
                if self.known is not None and report.round == 0:  # without rows, in place of the start model
                    memory["start"] = loss
                    memory["first"] = max(loss, memory["first"] or loss)
                known = memory["first"]
                if known is not None and "start" not in memory and rule.exceeded(loss, known):
                    memory["start"] = self._start_loss
                    memory["first"] = max(known, memory["start"] or known)
                watch[name] = memory
        return watch

    def _judged(self, report: Report, outcome: stops.Outcome) -> stops.Outcome:
        """The outcome of the last round: failed if its loss is far above the reference of `Diverged`."""
        loss, constant = report.metrics.get("loss"), self._constant
        if loss is None or not self._comparable:
            return outcome
        for name, rule in stops.each(self.rules):
            if isinstance(rule, stops.Diverged):
                reference = self.watch[name]["first"] if constant is not None else self._start_loss
                failed = None if reference is None else rule.last_round(loss, reference, report.round)
                if failed is not None:
                    return failed
        if constant and loss > WORSE_THAN_CONSTANT * constant:
            worse = f"The training loss {loss:.4g} is above {constant:.4g}, the loss of a constant answer"
            return replace(outcome, reason=f"{outcome.reason} {worse}: `atoll lr` suggests a learning rate.")
        return outcome

    @cached_property
    def _comparable(self) -> bool:
        """Whether the loss in reports is the loss of the task. The loss of a `Custom` part may be any number."""
        return isinstance(self.plan.local, (Gradient, Train))

    @cached_property
    def _reference(self) -> Clients | None:
        return reference_rows(self.data, self.settings.seed)

    @cached_property
    def _constant(self) -> float | None:
        if self._reference is not None:
            return constant_loss(self.task.loss, self._reference)
        return None if self.known is None else known_constant_loss(self.task.loss, self.known, self.input)

    @cached_property
    def _start_loss(self) -> float | None:
        """The loss of the start model on the reference rows; None if it cannot be computed."""
        if self._reference is None:
            return None
        engine = InProcessEngine(self.task, move_rows(self._reference, self.task.device), self.settings.chunk)
        try:
            return evaluate(replace(self.state, model=self.first), engine).metrics["held_out_loss"]
        except AtollError:
            return None
        finally:
            engine.close()

    def _threads(self) -> AbstractContextManager[None]:
        """One thread for torch during short native code, because threads that torch wakes up would occupy its cores."""
        small = self.task.layout.d < limits.THREADED_PARAMETERS
        native = self.task.numerics == "compiled"
        return threads_for(self.task, plan=self.plan) if small and native else nullcontext()

    def evaluate(self, engine: InProcessEngine | None = None) -> dict[str, float]:
        """Evaluate the current model on the held-out rows, or on the rows of another engine."""
        if engine is None:
            return self._present_values().metrics if self.judged else {}
        with user_scope(self.state.key().fold("user")):
            return evaluate(self._evaluated_state, engine).metrics

    @property
    def _evaluated_state(self) -> State:
        return replace(self.state, model=self.evaluated_model)

    def _present_values(self) -> HeldOutValues:
        """The values of the current model on the held-out rows, here and on the machines of clients."""
        scores = self.engine.score(self._evaluated_state) if self.engine.judges else None
        own, self._site_bytes = HeldOutValues({}), 0 if scores is None else scores.bytes_up
        if scores is not None:
            self.client_names, self.evaluated_ids = scores.names, torch.arange(len(scores.names))
            own = of_sites(self.task, scores, clients=self._shows_clients)
            if self.evaluates_personal:
                own = self._with_models(own)
        if self.evaluator is None:
            return own
        pooled = self._values_here()
        return join_clients(pooled, own) if own.clients else pooled

    def _with_models(self, server: HeldOutValues) -> HeldOutValues:
        """The values of the server's model on the machines of clients, and those of the models of these clients."""
        scores = self.engine.score(evaluated_state(self.plan, self.state), self.plan.local)
        if scores is None:
            return server
        self._site_bytes += scores.bytes_up
        own = of_models(self.task, scores, self.evaluated_ids, self.evaluated_ids)
        return replace(server, metrics=server.metrics | own.metrics, clients=server.clients | own.clients)

    def _values_here(self) -> HeldOutValues:
        """The values of the server's model on the held-out rows here, and those of the models of clients."""
        found = self.values_of(self.evaluated_model)
        if not self.evaluates_personal or self._held_by_client is None:
            return found
        state, tune = evaluated_state(self.plan, self.state), cast("Train | None", self.settings.tune)
        with user_scope(self.state.key().fold("user")):
            own = values_of_clients(self.plan, state, self._train_rows, self._held_by_client, self.evaluated_ids, tune)
        return replace(found, metrics=found.metrics | own.metrics, clients=found.clients | own.clients)

    @cached_property
    def _held_by_client(self) -> Clients | None:
        return held_by_client(self._near) if isinstance(self._near, Clients) else None

    @cached_property
    def _train_rows(self) -> InProcessEngine:
        """The engine of the train rows in this process, which evaluates the models of clients."""
        return InProcessEngine(self.task, self._near, self.settings.chunk)

    @property
    def client_models(self) -> ClientModels | None:
        """The current models of clients; None if they are on the machines of the clients."""
        if not self.data.count:
            return None
        model = evaluated_state(self.plan, self.state).model
        return ClientModels(self.plan, model, self.memory, self.task, self.data.count, self.data.names)

    def final_values(self) -> HeldOutValues:
        """The values of the current model on the held-out rows. They are computed again only if they are older."""
        if self.evaluated_round != self.state.round and self.data.held_out is not None:
            self.evaluation, self.evaluated_round = self._values_here(), self.state.round
        return self.evaluation

    def values_of(self, model: Model, client: int | None = None) -> HeldOutValues:
        """The values of a model on the held-out rows, and on the rows of each client if clients are evaluated.

        Args:
            model: the model.
            client: evaluate the rows of this client only, as client 0; None: the rows of each client.
        """
        state, owner, owners = replace(self.state, model=model), self.held_owner, self.evaluated.count
        if client is not None and owner is not None and self.data.held_owner is not None:
            owner, owners = torch.where(self.data.held_owner == client, 0, -1), 1
        with user_scope(self.state.key().fold("user")):
            if owner is None or self._view is None:
                return evaluate(state, self._held_out, owner, owners)
            return join_clients(evaluate(state, self._held_out), evaluate(state, self._view, owner, owners))

    @cached_property
    def _held_out(self) -> InProcessEngine:
        """The engine of the held-out rows."""
        return InProcessEngine(self.task, self._near.held(), self.settings.chunk)

    @cached_property
    def _view(self) -> InProcessEngine | None:
        """The engine of the held-out rows with the feature shift of their clients; None if there is no shift."""
        if self.data.held_view is None:
            return None
        return InProcessEngine(self.task, self._near.held(view=True), self.settings.chunk)

    @property
    def held_owner(self) -> Tensor | None:
        """The place of the client of each held-out row in `evaluated`, int64 `[rows]`, −1 for none.

        None if clients are not evaluated.
        """
        return self.evaluated.held_owner if self.by_client else None

    @cached_property
    def evaluated_ids(self) -> Tensor:
        """The ids of the clients that are evaluated on their own rows: all, or 10,000 that are drawn by the seed."""
        count = self.data.count
        if count <= MOST_EVALUATED:
            return torch.arange(count)
        return Key(self.settings.seed).fold("evaluated").distinct(MOST_EVALUATED, count).sort().values

    @cached_property
    def evaluated(self) -> Clients:
        """The clients that are evaluated on their own rows."""
        return self.data if self.data.count <= MOST_EVALUATED else self.data.only(self.evaluated_ids)

    def values_by_client(self, ids: Tensor) -> dict[str, Tensor]:
        """The last values of some clients on their own held-out rows, `[len(ids)]` by name; NaN without a value.

        Args:
            ids: the clients, int64 `[n]`.
        """
        place = torch.full((1 + max([0, *ids.tolist(), *self.evaluated_ids.tolist()]),), -1)
        place[self.evaluated_ids] = torch.arange(len(self.evaluated_ids))
        at = place[ids.cpu()]
        values = self.evaluation.clients
        return {n: torch.where(at < 0, 0 if n == "rows" else torch.nan, v[at]) for n, v in values.items()}

    @property
    def by_client(self) -> bool:
        """Whether the held-out rows of each client are evaluated."""
        if self.data.held_owner is None or not self._shows_clients:
            return False
        personal = self.plan.local.trains_personal or self.settings.tune is not None
        return self.settings.evaluate is not None or self.data.names is not None or personal

    @property
    def _shows_clients(self) -> bool:
        """Whether values of single clients may be reported. With a secure sum only on request: `M_min` is one."""
        if self.plan.releases:
            return False
        if self.settings.evaluate is None:
            return self.plan.aggregator.secure is None
        return self.settings.evaluate != "pooled"

    @property
    def evaluates_personal(self) -> bool:
        """Whether the models of clients are evaluated on their own held-out rows."""
        sites = self.engine.judges and self.settings.evaluate_every > 0 and self._shows_clients
        personal = self.plan.local.trains_personal or self.settings.tune is not None
        return (self.by_client or sites) and personal

    @property
    def judged(self) -> bool:
        """Whether there are held-out rows, here or on the machines of clients."""
        return self.evaluator is not None or (self.engine.judges and self.settings.evaluate_every > 0)

    @property
    def metric_names(self) -> tuple[str, ...] | None:
        """The names of the metrics that rounds may report; None if a part of the plan reports others too."""
        held = ("held_out_loss", *(m.name for m in self.task.metrics)) if self.judged else ()
        sites = self.engine.judges and self._shows_clients
        each = tuple(f"{n}_{over}" for n in held for over in OVER_CLIENTS) if self.by_client or sites else ()
        if self.plan.releases:
            return ("epsilon", "gradient_norm", "lr", *(held if self.evaluator else ()), *each)
        if not isinstance(self.plan.local, (Gradient, Train)) or not isinstance(self.plan.codec, Identity):
            return None
        # `personal_M` is a mean over clients, and there is no median of it.
        over = ("", *(f"_{each}" for each in OVER_CLIENTS if each not in ("clients", "median")))
        own = tuple(f"{PERSONAL}{n}{o}" for n in held for o in over) if self.evaluates_personal else ()
        return ("loss", "gradient_norm", "lr", *held, *each, *own)

    @property
    def selection_metric(self) -> tuple[str, bool]:
        """The metric that selects the best round, and whether larger values are better."""
        if not self.judged:
            return "loss", False
        # The server never trains an own part, so its model does not show the state of the training.
        whose = PERSONAL if self.plan.local.own and self.evaluates_personal else ""
        for metric in self.task.metrics:
            if not whose or metric.sums is not None:
                return f"{whose}{metric.name}", metric.higher_is_better
        return f"{whose}held_out_loss", False

    @property
    def model(self) -> nn.Module:
        """A new module with the current parameters."""
        with user_modes():
            return self.task.result(self.evaluated_model)

    @property
    def evaluated_model(self) -> Model:
        """The tensors of the model that is evaluated and exported."""
        return evaluated_model(self.plan, self.state, self.task)

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
        **({"buffers": repr(training.settings.rules)} if training.settings.rules else {}),
        **({} if training.fleet is None else {"fleet": repr(training.fleet)}),
        **({"randomness": training.settings.randomness} if training.plan.releases else {}),
    }


def plan_from_text(text: str) -> Plan:
    """The plan of a text that a program contains: a recipe, or a whole plan.

    Raises:
        UsageError: the text describes no plan.
    Example:
        >>> plan_from_text("fedavg(0.1)").optimizer
        sgd(1.0)
    """
    plan = read_part(text, {r.__name__: r for r in RECIPES} | {"Plan": Plan}, trust=True, kind="recipe")
    if not isinstance(plan, Plan):
        raise UsageError(f"{text!r} is a {type(plan).__name__}.", "a recipe, or a whole plan.", write='"fedavg(0.1)"')
    return plan


def _refuse_whole(task: Task, settings: Settings) -> None:
    """Refuse chosen metrics over all rows at once if the held-out rows are on other hosts."""
    whole = [metric.name for metric in task.metrics if metric.sums is None]
    if whole and settings.metrics is not None:
        raise UsageError(
            f"The metric {whole[0]!r} needs all held-out rows at once, and they are on other hosts.",
            "metrics that are sums over rows.",
            "a host sends sums of its rows, and no rows.",
            Change("metrics", [m.name for m in task.metrics if m.sums is not None] or ["log_loss"]),
        )


def _task(model: Any, data: Clients, settings: Settings, private: bool = False, known: TrainRows | None = None) -> Task:
    """The model, its loss and its metrics on the device of the engine. If it is private, they follow from no rows."""
    dtype = DTYPES[settings.dtype]
    module = models.resolve(model, data, Key(settings.seed).fold("model"), dtype)
    loss = settings.loss or default_loss(model, data.kind)
    if loss_of(loss) is poisson:
        _check_counts(data)
    if loss_of(loss) is cox:
        _check_survival(data, dtype)
    if isinstance(model, str) and ":" not in model and loss == "cross_entropy":
        loss = "cross_entropy(axis=-1)"  # the classes of a named model are on the last axis
    # Settings has put a single metric into a tuple.
    usual = default_metrics(data, loss, private, known)
    names = usual if settings.metrics is None else cast("tuple[str | Metric, ...]", settings.metrics)
    metrics = metrics_of(names, loss, data.described(), 0.0 if private else _centre(data))
    device = settings.spec.device(settings.device)
    check_precision(settings.precision, settings.dtype, settings.numerics, device)
    task = replace(Task.of(module, loss, metrics, dtype, settings.rules), precision=settings.precision).on(device)
    task = task.with_fields(data.fields)
    two = settings.loss is None and data.classes is not None and len(data.classes) == 2
    rows = data if data.count else Schema.of(data).synthetic()
    if two and has_single_logit(task, rows):
        task = replace(task, loss=loss_of("binary_cross_entropy"))
    if settings.class_weight is not None:
        task = replace(task, loss=_weighted(task.loss, data, settings.class_weight, known))
    if settings.loss is not None and settings.metrics is None:
        task = fitting_metrics(task, rows)
    if isinstance(model, str) and ":" not in model and task.built_in:
        task = replace(task, findings=replace(task.findings, probed=True, built_in=True))
    if settings.draws:
        task = replace(task, findings=replace(task.findings, draws=PASSES, built_in=False))
    return task


def default_loss(model: Any, kind: str) -> str:
    """The name of the loss, if the user names none.

    Example:
        >>> default_loss("cox", "regression"), default_loss("mlp", "regression")
        ('cox', 'mse')
    """
    return "cox" if model == "cox" else LOSSES[kind]


def metrics_of_kind(kind: str, classes: Sequence[str] | None) -> tuple[str, ...]:
    """The metrics of a kind of target, without an order by the shares of the classes.

    Example:
        >>> metrics_of_kind("classification", ("no", "yes"))[-1]
        'auc'
    """
    two = kind == "classification" and classes is not None and len(classes) == 2
    return (*JUDGES[kind], "auc") if two else JUDGES[kind]


def _check_counts(data: Clients) -> None:
    """Refuse targets that are no numbers of at least 0 in their own units, for the loss `poisson`."""
    if data.classes is not None:
        raise UsageError(
            'loss="poisson" with a target of classes.', "numbers.", "a class has no rate.", Change("task", "regression")
        )
    if data.described().target.spread:
        raise UsageError(
            'loss="poisson" with a scaled target.',
            "counts in their own units.",
            "a scaled count may be negative.",
            Change("scale_target", "none"),
        )
    least = float(data.rows.targets()[data.order].min()) if data.count and in_memory(data.rows) else 0.0
    if least < 0:
        raise UsageError(f'loss="poisson", and a target is {least:g}.', "numbers of at least 0.", "a rate is positive.")


def _check_survival(data: Clients, dtype: torch.dtype) -> None:
    """Refuse targets that are no time of at least 0 and an event of 0 or 1, or times that round, for the loss `cox`."""
    given, target = "The loss cox", data.described().target
    if data.kind != "regression" or (data.count and data.example[1].numel() != 2):
        raise UsageError(
            f"{given} with a target of {'classes' if data.classes else 'other numbers'}.",
            "two targets of numbers: a time, and an event of 0 or 1.",
            "the loss orders the events by their times.",
            Line('atoll.data.load("trial.csv", target=["time", "event"])', "--target time,event"),
        )
    if target.spread:
        raise UsageError(
            f"{given} with a scaled target.",
            "times and events in their own units.",
            "a scaled event is neither 0 nor 1.",
            Change("scale_target", "none"),
        )
    if not data.count or not in_memory(data.rows):
        return
    time, event = data.rows.targets()[data.order].reshape(-1, 2).T
    names = ", ".join(target.names)
    if not bool((time >= 0).all()):
        raise UsageError(f"{given}, and a time is {float(time.min()):g} ({names}).", "times of at least 0.")
    other = event[(event != 0) & (event != 1)]
    if len(other):
        raise UsageError(f"{given}, and an event is {float(other[0]):g} ({names}).", "events of 0 or 1.")
    if not bool(event.any()):
        raise UsageError(f"{given}, and no row has an event ({names}).", "at least one event.", "the loss is 0.")
    if len(time.unique()) > len(time.to(dtype).unique()):
        raise UsageError(
            f"{given}, and times that differ are equal in {str(dtype).removeprefix('torch.')} ({names}).",
            "times that stay distinct.",
            "the loss depends on which events have the same time.",
            Change("dtype", "float64"),
        )


def default_metrics(
    data: Clients, loss: str | PerExample, private: bool = False, known: TrainRows | None = None
) -> tuple[str, ...]:
    """The metrics of a kind of data. The first one selects the best round.

    If one class has at least 80 % of the train rows, accuracy is high for a constant answer. The first metric is then
    `auc` for two classes, else `balanced_accuracy`. A private training reads no train row, and keeps the usual order.
    """
    names = metrics_of_kind(data.kind, data.classes)
    if loss_of(loss) is cox:
        return ("c_index",)
    if loss_of(loss) is poisson:
        return ("poisson_deviance", *names)
    if data.kind != "classification" or data.classes is None:
        return names
    counts = None if private else _class_counts(data, known)
    if counts is not None and int(counts.max()) >= limits.IMBALANCED * int(counts.sum()):
        first = "auc" if len(data.classes) == 2 else "balanced_accuracy"
        return (first, *(n for n in names if n != first))
    return names


def _class_counts(data: Clients, known: TrainRows | None) -> Tensor | None:
    """The train rows of each class, int64 `[C]`; None if they are not known or not in memory."""
    if known is not None and known.classes:
        return torch.tensor(known.classes)
    if not data.count or not in_memory(data.rows):
        return None
    y = data.rows.targets()[data.order].reshape(-1)
    return y[y >= 0].bincount(minlength=len(data.classes or ()))


def _centre(data: Clients) -> float:
    """A number near the targets of a regression, against cancellation."""
    if data.kind != "regression" or not data.count:
        return 0.0
    return float(data.example[1].double().mean())


def _weighted(
    loss: PerExample, data: Clients, weight: Mapping[str, float] | str, known: TrainRows | None = None
) -> PerExample:
    """A loss with class weights."""
    if data.classes is None or not built_in(loss):
        raise UsageError(
            f"class_weight={weight!r} with {'a loss of your own' if data.classes is not None else data.kind}.",
            "classification with a loss of atoll.",
            "the weight of a row is that of its class.",
            Change("loss", "cross_entropy") if data.classes is not None else "",
        )
    if weight == "balanced" and not data.count and known is None:
        raise UsageError(
            'class_weight="balanced" with a server, which has no train rows.',
            "the weight of each class.",
            "balanced weights are computed from the train rows of all clients.",
            Change("class_weight", ",".join(f"{name}=1" for name in data.classes[:20])),
        )
    y = data.rows.targets()[data.order].reshape(-1) if data.count else torch.zeros(0, dtype=torch.int64)
    counts = torch.tensor(known.classes) if known is not None else y.bincount(minlength=len(data.classes))
    return ClassWeighted(loss, class_weights(_by_name(weight), counts, data.classes))


def _by_name(weight: Mapping[str, float] | str) -> Mapping[str, float] | str:
    """Read the text no=1,yes=3 as the weights of classes."""
    if not isinstance(weight, str) or "=" not in weight:
        return weight
    pairs = [pair.rpartition("=") for pair in weight.split(",")]
    try:
        return {name.strip(): float(value) for name, _, value in pairs}
    except ValueError:
        return weight


def _chosen(task: Task, data: Clients, plan: Plan, settings: Settings, engine: Engine) -> Choice:
    """The backend of the local steps. The primary process chooses it for all processes."""
    wanted, rounds = settings.numerics, settings.rounds
    if not data.count:
        return choose_without_rows(task, Schema.of(data).synthetic(), plan, wanted)
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
                    Change("seed", first) if name == "seed" else "atoll doctor",
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
                Change("engine", "inprocess"),
            )
    return report.to(seconds=reports[0]["seconds"], metrics=reports[0]["metrics"])


def _refuse_other(data: object, plan: object, settings: Settings) -> None:
    """Refuse data that are not clients, such as a source before `split`, and a plan that is not a `Plan`."""
    if isinstance(data, Schema) and settings.spec.needs_rows:
        raise UsageError(
            f"data is {data!r:.60} with the engine {settings.spec!r}.",
            "clients: a data set that was split.",
            "only the clients of a network have rows of their own.",
            Line('atoll.data.load("digits").split(10)'),
        )
    if not isinstance(data, (Clients, Schema)):
        raise UsageError(
            f"data is {data!r:.60}.",
            "clients: a data set that was split.",
            "a training needs the rows of each client.",
            Line(f"{_source_of(data)}.split(10)"),
        )
    if not isinstance(plan, Plan):
        name = plan.__name__ if isinstance(plan, FunctionType) else ""
        own = f"Plan({part_for('local', plan)}, Mean())" if part_for("local", plan).startswith("Custom") else ""
        line = f"atoll.recipes.{name}(0.1)" if name in {r.__name__ for r in RECIPES} else own
        raise UsageError(f"plan is {plan!r:.60}.", "a plan.", write=Line(line or "atoll.recipes.fedavg(0.1)"))


def _source_of(data: object) -> str:
    """The text of the source that data of another library make."""
    match data:
        case Source():
            return "data"
        case str():
            return f"atoll.data.load({literal(data)})"
        case DataLoader():
            return "atoll.data.dataset(data.dataset)"
        case Dataset():
            return "atoll.data.dataset(data)"
        case (_, _):  # features and targets
            return "atoll.data.arrays(*data)"
    return 'atoll.data.load("digits")'


def refuse_other_input(folder: Path, ours: Input) -> None:
    """Refuse to start from a run with another input. A folder without input.json is accepted.

    Args:
        folder: the run folder.
        ours: the input of this training.
    Raises:
        UsageError: the inputs differ; the error names the first column that differs.
    """
    if not (folder / "input.json").is_file():
        return
    difference = first_difference(ours, Input.read(folder))
    if difference:
        raise UsageError(
            f"{folder.name} has another input. This training has {difference}.",
            "the same columns, levels, classes and statistics.",
            "the model of the run would read other numbers.",
            Line(f"data.split(input={str(folder)!r})", f"--input {quoted(str(folder))}"),
        )


def start_from(init: Mapping[str, Tensor] | str | Path, task: Task) -> Model:
    """The model to start from."""
    if isinstance(init, (str, Path)):
        path = Path(init)
        path = path / "model.safetensors" if path.is_dir() else path
        if not path.is_file():
            raise UsageError(
                f"init = {str(init)!r} is no file.",
                "a run folder or a safetensors file.",
                write="atoll runs",
            )
        hidden = path.with_name(path.stem + HIDDEN)
        init = {**(load_file(hidden) if hidden.is_file() else {}), **load_file(path)}
    theta, buffers, fixed = task.layout.flatten(init, task.first_tensors())
    counters = {e.name: fixed.pop(e.name) for e in task.layout.counters}
    return Model(theta, buffers, counters, fixed).to(task.device)


@listed
def rounds(model: Any, data: Clients, plan: Plan | str, **settings: Unpack[SettingsDict]) -> Training:
    """Run a training round by round in your own loop; no file is written.

    Args:
        model: a name, an `nn.Module`, or a function that makes one.
        data: the clients.
        plan: the algorithm, or its text, such as "fedavg(0.1)".
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
