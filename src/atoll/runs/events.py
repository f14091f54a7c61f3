"""The run that a training returns, and the protocol of an observer of its rounds.

Tests: tests/surface/test_public.py, tests/surface/test_report.py
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from torch import nn

from atoll.base.errors import UsageError
from atoll.base.lines import Line
from atoll.base.markup import mimebundle, preformatted
from atoll.compute.metric_names import base_metric
from atoll.compute.task import Task
from atoll.data.clients import Clients
from atoll.data.input import Input
from atoll.plan.plan import Plan
from atoll.plan.round import Failure, Report
from atoll.plan.state import State
from atoll.runs.confusion import Confusion
from atoll.runs.format import format_number, plain
from atoll.runs.frames import Backend, all_rows, frame_of
from atoll.runs.inference import Inference
from atoll.runs.personal import ClientModels, no_models_here
from atoll.runs.predictor import Predictor, predictor_of
from atoll.runs.summary import summary


class SavedPlot(Protocol):
    """A figure of a run. A notebook shows it as SVG."""

    def save(self, path: str | Path, width: float = 6.5) -> Path:
        """Write the figure as .svg, .png or .pdf.

        Args:
            path: the file.
            width: the width in inches, > 0.
        """
        ...


class Plotter(Protocol):
    """Draws columns of rows of metrics.jsonl."""

    def __call__(self, rows: Sequence[Mapping[str, Any]], metrics: Sequence[str], x: str) -> SavedPlot: ...


@dataclass(frozen=True, repr=False)
class Run:
    """The result of a training.

    Args:
        path: the run folder; None if nothing was written.
        rounds: the number of finished rounds.
        metrics: the last value of each metric.
        best: the name of the selection metric, its best value, and the round of this value.
        reason: why the training ended.
        status: "done", "failed" or "interrupted".
        seconds: the sum of the durations of all rounds.
        bytes_up, bytes_down: the bytes of all messages to the server, and of all messages to clients.
        failures: the contributions that were lost since the training started or resumed.
        reports: one report for each round since the training started or resumed.
        model: a new module with the final parameters. It takes prepared rows: `predictor.prepare` makes them.
        baselines: metrics of the final model (`federated`), of the constant answers (`constant`, `constant_clients`)
            and, if they were requested, of pooled and local-only training (`pooled`, `local`).
        notes: the choices that atoll made for the user, and problems after the last round.
        input: the map from a user's rows to tensors, and from outputs to words.
        task: the model, its loss and its metrics.
        wall: the seconds from the start or the resumption of the training to its end, with evaluation and baselines.
        privacy: `epsilon`, `delta`, `unit`, `relation` and `claim` of a run with noise; {} for another run.
        confusion: the held-out rows of each class by predicted class, if the metric `confusion` was computed.
        client_models: the models of clients; None if they are on the machines of the clients.
        inference: coefficients, standard errors and p-values of a run of `newton`; None for another run.
        plotter: draws `plot`; a training sets it.
    """

    path: Path | None
    rounds: int
    metrics: Mapping[str, float]
    best: Mapping[str, Any]
    reason: str
    status: str
    seconds: float
    bytes_up: int
    bytes_down: int
    failures: tuple[Failure, ...]
    reports: tuple[Report, ...]
    model: nn.Module
    baselines: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    input: Input | None = field(default=None, repr=False)
    task: Task | None = field(default=None, repr=False)
    wall: float = 0.0
    privacy: Mapping[str, Any] = field(default_factory=dict)
    confusion: Confusion | None = field(default=None, repr=False)
    client_models: ClientModels | None = field(default=None, repr=False)
    inference: Inference | None = field(default=None, repr=False)
    plotter: Plotter | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        name = None if self.path is None else plain(self.path.name, 80)
        metrics = [f"{plain(n, 40)}={format_number(v)}" for n, v in self.metrics.items() if not base_metric(n)]
        shown = ", ".join(metrics[:5])
        return f"Run({name!r}, {self.status}, rounds={self.rounds}, {shown})"[:400]

    def _repr_html_(self) -> str:
        return preformatted(f"{self!r}\n{self.summary()}")

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        return mimebundle(self)

    def summary(self) -> str:
        """The text that the command line prints at the end: outcome, notes, comparison, best round, costs, files."""
        return summary(self)

    def frame(
        self,
        kind: Literal["rounds", "clients"] = "rounds",
        backend: Backend = "pandas",
    ) -> Any:
        """Return all rounds of the run as a data frame. Those before a resumption are read from the run folder.

        Args:
            kind: "rounds": one row for each round, with the columns of metrics.csv; "clients": one row for each
                contribution of each round, with the columns of `Report.clients`. The folder has at most 1,000 of them
                for each round, with six decimals, and without values on held-out rows.
            backend: the package of the frame.
        Returns:
            A frame of this package. A missing value is null.
        Raises:
            UsageError: an unknown kind or backend, or the package is not installed.
        Example:
            >>> import atoll
            >>> data = atoll.data.load("digits").split(clients=3)
            >>> run = atoll.train("softmax", data, atoll.recipes.fedavg(0.1), rounds=2, out=None)
            >>> run.frame()["round"].tolist(), len(run.frame("clients"))
            ([0, 1], 6)
        """
        return frame_of(self.reports, self.rounds, self.path, kind, backend)

    def plot(self, *metrics: str, x: str = "round") -> SavedPlot:
        """Draw columns of metrics.jsonl, one panel each. A notebook shows the figure; `save` writes it.

        Args:
            metrics: the columns; none: the metric that selects the best round.
            x: "round", "bytes" or "seconds" up to the round, or "clock", the virtual time.
        Returns:
            The figure.
        Raises:
            UsageError: an unknown column or axis, or a run without virtual time.
        Example:
            >>> import atoll, tempfile
            >>> data = atoll.data.load("digits").split(clients=3)
            >>> run = atoll.train("softmax", data, atoll.recipes.fedavg(0.1), rounds=2, out=None)
            >>> run.plot("accuracy", "loss").save(tempfile.mkdtemp() + "/accuracy.svg").name
            'accuracy.svg'
        """
        if self.plotter is None:
            raise UsageError("A run that no training made.", "a run of `atoll.train`.")
        chosen = metrics or (str(self.best.get("metric", "loss")),)
        return self.plotter(all_rows(self.reports, self.rounds, self.path), chosen, x)

    def personal(self, client: int | str) -> nn.Module:
        """A new module with the final model of a client: the shared model with its own part, or its second model.

        A client that never took part has the model of the server.

        Args:
            client: the name of a natural client, or the number of a client.
        Raises:
            UsageError: there is no such client, clients have no models of their own, or they are on the machines of the
                clients.
        Example:
            >>> import atoll
            >>> data = atoll.data.load("digits").split(clients=3)
            >>> run = atoll.train("mlp", data, atoll.recipes.ditto(0.1), rounds=1, out=None)
            >>> type(run.personal(2)).__name__
            'Sequential'
        """
        if self.client_models is None:
            raise no_models_here("the run" if self.path is None else self.path.name)
        return self.client_models.module(client)

    @property
    def predictor(self) -> Predictor:
        """A predictor with a copy of the final model: it takes raw rows. `model` takes prepared rows.

        Raises:
            UsageError: the run has no input.
        """
        if self.input is None or self.task is None:
            raise UsageError("The run has no input.", "a run of `atoll.train`.")
        own = self.client_models
        models = own if own is not None and own.plan.local.trains_personal else None
        return predictor_of(self.model, self.input, self.task.loss, self.task.metrics, models)


class TrainingView(Protocol):
    """The members of a training that an observer may read.

    Members:
        plan, task, data, settings, fleet: the algorithm, the model, the clients, the settings and the durations.
        state: the state after the last round.
        judge: the engine that evaluates held-out rows; None if the data has no held-out rows.
        reason: why this backend was chosen.
        notes: the choices that atoll made for the user.
        judged_by: the metric that selects the best round, and whether larger values are better.
        outcome: why the training ended; None before its end.
        bytes_up, bytes_down: bytes of all messages so far.
    """

    @property
    def plan(self) -> Plan: ...
    @property
    def task(self) -> Task: ...
    @property
    def data(self) -> Clients: ...
    @property
    def settings(self) -> Any: ...
    @property
    def state(self) -> State: ...
    @property
    def fleet(self) -> Any: ...
    @property
    def reason(self) -> str: ...
    @property
    def notes(self) -> tuple[str, ...]: ...
    @property
    def selection_metric(self) -> tuple[str, bool]: ...
    @property
    def evaluator(self) -> Any: ...
    @property
    def outcome(self) -> Any: ...
    @property
    def bytes_up(self) -> int: ...
    @property
    def bytes_down(self) -> int: ...


class Observer(Protocol):
    """An object that receives the start, each round and the end of a run.

    An observer of `atoll.train` may lack some of the methods, or be a function of a `Report`. Without a run folder
    (`out=None`) the `path` of `start` is None.
    """

    def start(self, training: TrainingView, path: Path | None) -> None: ...
    def round(self, report: Report) -> None: ...
    def end(self, run: Run) -> None: ...


@runtime_checkable
class SeesStart(Protocol):
    """An observer of the start."""

    def start(self, training: TrainingView, path: Path | None) -> None: ...


@runtime_checkable
class SeesRound(Protocol):
    """An observer of rounds."""

    def round(self, report: Report) -> None: ...


@runtime_checkable
class SeesEnd(Protocol):
    """An observer of the end."""

    def end(self, run: Run) -> None: ...


AnyObserver = SeesStart | SeesRound | SeesEnd | Callable[[Report], object]


class _Whole:
    """An observer with all three methods, of an object with some of them, or of a function of a report."""

    def __init__(self, given: AnyObserver) -> None:
        self._start = given.start if isinstance(given, SeesStart) else None
        self._end = given.end if isinstance(given, SeesEnd) else None
        self._round: Callable[[Report], object] | None = given.round if isinstance(given, SeesRound) else None
        if not (self._start or self._end or self._round) and callable(given):
            self._round = given

    def start(self, training: TrainingView, path: Path | None) -> None:
        if self._start is not None:
            self._start(training, path)

    def round(self, report: Report) -> None:
        if self._round is not None:
            self._round(report)

    def end(self, run: Run) -> None:
        if self._end is not None:
            self._end(run)


def whole_observers(observers: Sequence[AnyObserver]) -> tuple[Observer, ...]:
    """Observers with all three methods.

    Args:
        observers: objects with any of `start`, `round` and `end`, or functions of a `Report`.
    Raises:
        UsageError: an object has none of them and is no function.
    Example:
        >>> (watch,) = whole_observers([lambda report: print(report)])
        >>> watch.round("a report")
        a report
    """
    for each in observers:
        if isinstance(each, type) or not (callable(each) or isinstance(each, (SeesStart, SeesRound, SeesEnd))):
            kind = f"the class {each.__name__}" if isinstance(each, type) else repr(each)[:200]
            raise UsageError(
                f"observers contains {kind}.",
                "an object with start, round or end, or a function of a report.",
                write=Line(python="observers=[lambda report: print(report.round, report.metrics)]"),
            )
    return tuple(_Whole(each) for each in observers)
