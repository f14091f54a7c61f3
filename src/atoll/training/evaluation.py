"""HeldOutValues of a model: over all held-out rows, and over the held-out rows of each client.

Tests: tests/identities/test_evaluation.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from atoll.base.errors import ClientError, RunError, UsageError
from atoll.base.intervals import Interval, hanley_mcneil, normal, wilson
from atoll.base.lines import Change
from atoll.compute import limits
from atoll.compute.metric_names import PERSONAL
from atoll.compute.metrics import Counts, Metric, summed
from atoll.compute.task import Task
from atoll.data.clients import Clients
from atoll.engine.client_state import Memory
from atoll.engine.inprocess import InProcessEngine
from atoll.engine.protocols import SiteScores
from atoll.plan.aggregate import Mean
from atoll.plan.in_flight import InFlight
from atoll.plan.local.evaluate import ScoreRows
from atoll.plan.plan import Plan
from atoll.plan.round import open_round
from atoll.plan.state import State
from atoll.training.reference import constant_outputs, form_of, shaped

_CONSTANT_ROWS, _PIECE_NUMBERS, _CONSTANT_NUMBERS = 8192, 1 << 22, 1 << 26


@dataclass(frozen=True)
class HeldOutValues:
    """The values of a model on held-out rows.

    Args:
        metrics: `held_out_loss` and each metric that is defined, by name.
        tables: metrics that are tables, such as `confusion`, by name.
        intervals: the 95 % intervals of the metrics that have one.
        clients: `rows`, `held_out_loss` and each metric of each client, `[clients]`, NaN if it is undefined; {} if
            clients were not evaluated.
    """

    metrics: dict[str, float]
    tables: dict[str, Tensor] = field(default_factory=dict)
    intervals: dict[str, Interval] = field(default_factory=dict)
    clients: dict[str, Tensor] = field(default_factory=dict)


class RowScores:
    """Adds the scores of held-out rows: `ScoreRows(RowScores(...))` passes them in the order of the rows.

    Args:
        task: the metrics.
        owner: the client of each row, int64 `[rows]`, in the order of the passes, −1 for none; None: clients are not
            evaluated.
        owners: the number of clients.
    """

    def __init__(self, task: Task, owner: Tensor | None = None, owners: int = 0) -> None:
        # Rows without a client go to one more owner, which is left out at the end.
        self.task, self.owners, self.rows = task, owners, 0
        self.owner = None if owner is None else torch.where(owner < 0, owners, owner)
        self.totals: dict[str, Tensor] = {}  # `[]` or `[k]`
        self.sums: dict[str, Tensor] = {}  # of each client, `[owners]` or `[owners, k]`
        self.squares: dict[str, float] = {}  # Σ x² of scores with one number for each row
        self._outputs: list[Tensor] = []
        self._targets: list[Tensor] = []
        self._whole = {m.name for m in task.metrics if m.over_rows is not None}
        self._numbers = 0

    def __call__(self, output: Any, y: Tensor, scores: Mapping[str, Tensor | Counts]) -> None:
        """Add the scores of some rows."""
        everyone = torch.zeros(len(y), dtype=torch.int64, device=y.device)
        owner = None if self.owner is None else self.owner[self.rows : self.rows + len(y)].to(y.device)
        for name, rows in scores.items():
            if name in self._whole:
                continue
            each = None if owner is None else summed(rows, owner, self.owners + 1).cpu()
            if each is not None:
                _add(self.sums, name, each)
            # Counts are whole numbers, so their sum over clients has the bits of the sum over rows.
            exact = each if isinstance(rows, Counts) else None
            _add(self.totals, name, summed(rows, everyone, 1)[0].cpu() if exact is None else exact.sum(0))
            if isinstance(rows, Tensor) and rows.dim() == 1:
                self.squares[name] = self.squares.get(name, 0.0) + float(rows.square().sum())
        if self._whole:
            self._keep(output, y)
        self.rows += len(y)

    def _keep(self, output: Tensor, y: Tensor) -> None:
        """Keep outputs and targets for metrics over all rows, in CPU memory."""
        self._numbers += output.numel() + y.numel()
        if self._numbers > limits.WHOLE_METRIC_NUMBERS:
            names = ", ".join(sorted(self._whole))
            raise RunError(
                f"The evaluation has more than {limits.WHOLE_METRIC_NUMBERS} outputs and targets, for {names}.",
                "fewer held-out rows, or metrics that are sums over rows.",
                "these metrics keep the outputs of all rows in memory.",
                Change("metrics", ["accuracy"]),
            )
        self._outputs.append(output.cpu())
        self._targets.append(y.cpu())

    def together(self) -> tuple[Tensor, Tensor]:
        """Outputs and targets of all rows."""
        return torch.cat(self._outputs), torch.cat(self._targets)

    def finished(self) -> HeldOutValues:
        """The values of the loss and of each metric. An undefined value is absent."""
        found = HeldOutValues({"held_out_loss": float(self.totals["loss"]) / self.rows})
        self._interval(found, "held_out_loss", "loss", None)
        for metric in self.task.metrics:
            self._measure(found, metric)
        if self.owner is not None:
            found.clients.update(self._by_client(self.owner))
            rises = {m.name: m.higher_is_better for m in self.task.metrics}
            for name in ("held_out_loss", *rises):
                found.metrics.update(over_clients(name, found.clients[name], rises.get(name, False)))
        return found

    def _measure(self, found: HeldOutValues, metric: Metric) -> None:
        """Add a metric over all rows."""
        if metric.over_rows is not None:
            value: float | Tensor = metric.over_all(*self.together())
        else:
            value = metric.value(self.totals[metric.name], self.rows)
        if isinstance(value, Tensor):
            found.tables[metric.name] = value
        elif not math.isnan(value):
            found.metrics[metric.name] = value
            self._interval(found, metric.name, metric.name, metric)

    def _interval(self, found: HeldOutValues, name: str, score: str, metric: Metric | None) -> None:
        """Add the 95 % interval of a value: of a proportion, of a mean over rows, or of an area under the ROC curve."""
        rows, finish = self.rows, None if metric is None else metric.finish
        if metric is not None and metric.name == "auc" and metric.built_in:
            _, y = self.together()
            if y.dim() == 1 and int(y.max()) <= 1:
                positive = int((y == 1).sum())
                found.intervals[name] = hanley_mcneil(found.metrics[name], positive, rows - positive)
        elif score in self.squares and rows > 1:
            total, squares = float(self.totals[score]), self.squares[score]
            if total == squares and finish is None:  # every score is 0 or 1
                found.intervals[name] = wilson(total, rows)
                return
            mean = total / rows
            ends = normal(mean, math.sqrt(max(0.0, squares / rows - mean * mean) * rows / (rows - 1)), rows)
            low, high = ends.low, ends.high
            if metric is not None and metric.built_in:  # its scores are not negative
                low = max(0.0, low)
            if metric is not None and finish is not None:
                low, high = (_number(metric.value(torch.tensor(end * rows).double(), rows)) for end in (low, high))
            found.intervals[name] = Interval(found.metrics[name], low, high, rows)

    def _by_client(self, owner: Tensor) -> dict[str, Tensor]:
        """The rows, the loss and each metric of each client, `[clients]`."""
        count = self.owners + 1
        rows = owner.bincount(minlength=count)
        out = {"rows": rows, "held_out_loss": self.sums["loss"] / rows}
        for metric in self.task.metrics:
            if metric.over_rows is not None:
                out[metric.name] = metric.each_over_rows(*self.together(), owner, count)
            else:
                out[metric.name] = metric.each(self.sums[metric.name], rows)
        return {name: values[: self.owners] for name, values in out.items()}


def _add(table: dict[str, Tensor], name: str, some: Tensor) -> None:
    table[name] = table[name] + some if name in table else some


def _number(value: float | Tensor) -> float:
    return math.nan if isinstance(value, Tensor) else value


def evaluate(state: State, engine: InProcessEngine, owner: Tensor | None = None, owners: int = 0) -> HeldOutValues:
    """Evaluate the model of a state on the rows of an engine. The loss has the name `held_out_loss`.

    Args:
        state: the model.
        engine: of one client, which has all rows.
        owner: the client of each row, int64 `[rows]`; None: only all rows together are evaluated.
        owners: the number of clients.
    Raises:
        RunError: a row cannot be read.
    """
    scores = RowScores(engine.task, owner, owners)
    judge = Plan(ScoreRows(scores), Mean())
    model = replace(state, memory=Memory({}), air=InFlight(), versions={}, sent=None)
    opened = open_round(judge, model, engine)
    try:
        gathered = engine.gather(judge, opened.state, opened.cohort, opened.key)
    except RunError as error:
        if isinstance(error.__cause__, ClientError):  # one federation, such as the held-out rows: the row is the cause
            raise _no_evaluation(error.__cause__.given) from error.__cause__
        raise
    if gathered.failures:
        raise _no_evaluation(gathered.failures[0].cause)
    return scores.finished()


def join_clients(pooled: HeldOutValues, own: HeldOutValues) -> HeldOutValues:
    """Return the values of all rows together, with the values of clients from another evaluation.

    Args:
        pooled: the values of all rows together.
        own: the values of the clients, on rows with the feature shift of each client.
    """
    summaries = {n: value for n, value in own.metrics.items() if n not in own.clients or n.startswith(PERSONAL)}
    return replace(pooled, metrics=pooled.metrics | summaries, clients=own.clients)


def of_sites(task: Task, scores: SiteScores, clients: bool = True) -> HeldOutValues:
    """The values of a model from the sums of clients with rows on their own machines.

    Args:
        task: the metrics. A metric that needs all rows at once is absent.
        scores: the sums of each client.
        clients: whether the values of each client and their summaries are part of the result.
    """
    rows = scores.rows
    found = HeldOutValues({"held_out_loss": float(scores.sums["loss"].sum()) / int(rows.sum())})
    columns = {"rows": rows, "held_out_loss": scores.sums["loss"] / rows}
    rises = {"held_out_loss": False}
    for metric in task.metrics:
        if metric.name not in scores.sums:
            continue
        totals = scores.sums[metric.name].double()
        value = metric.value(totals.sum(0), int(rows.sum()))
        if isinstance(value, Tensor):
            found.tables[metric.name] = value
        elif not math.isnan(value):
            found.metrics[metric.name] = value
        columns[metric.name] = metric.each(totals, rows)
        rises[metric.name] = metric.higher_is_better
    for name, rising in rises.items() if clients else ():
        found.metrics.update(over_clients(name, columns[name], rising))
    return replace(found, clients=columns if clients else {})


def constant_answer(
    task: Task, data: Clients, owner: Tensor | None = None, owners: int | None = None, *, own: bool = False
) -> HeldOutValues:
    """Evaluate the constant answer: the class shares, or the mean of y, of the train rows, for every held-out row.

    Args:
        task: the model, whose output gives the shape of an answer, the loss and the metrics.
        data: the clients and the held-out rows.
        owner: the client of each held-out row, int64 `[rows]`, −1 for none; None: clients are not evaluated.
        owners: the number of clients that `owner` counts; None: those of the data.
        own: whether each client has a constant of its own train rows, for its own held-out rows. Rows of no client, and
            of a client without train rows, are then left out.
    Returns:
        The values of the constant on the held-out rows. They are empty if the output of the model is no tensor with
        classes, logits or numbers, or if the constants of all clients together would have more than 2²⁶ numbers.
    """
    if data.held_out is None or not data.count:
        return HeldOutValues({})
    x, y = (t.to(task.device) for t in data.example)
    output = task.output(task.initial(), x.to(task.layout.dtype) if x.is_floating_point() else x)
    form = form_of(task.loss, output, y)
    if form is None or (own and data.count * output.numel() > _CONSTANT_NUMBERS):
        return HeldOutValues({})
    giver = torch.zeros(len(data.order), dtype=torch.int64)
    place = torch.zeros(len(data.held_out), dtype=torch.int64)
    if own and owner is not None:
        giver, place = torch.arange(data.count).repeat_interleave(data.sizes), owner
    found = constant_outputs(form, data.rows.targets()[data.order], giver, data.count if own else 1)
    known = torch.cat((~found.reshape(len(found), -1).isnan().any(1), torch.tensor([False])))  # the last is that of −1
    rows = known[place].nonzero()[:, 0]
    answers, targets = shaped(found, form, task.loss, output, y), data.held_out.targets()
    scores = RowScores(task, None if owner is None else owner[rows], data.count if owners is None else owners)
    for piece in rows.split(max(1, min(_CONSTANT_ROWS, _PIECE_NUMBERS // output.numel()))):
        some = targets[piece].to(output if targets.is_floating_point() else output.device)
        answer = answers[place[piece].to(answers.device)]
        scores(answer, some, task.scores(answer, some))
    return scores.finished() if scores.rows else HeldOutValues({})


def over_clients(name: str, values: Tensor, higher_is_better: bool) -> dict[str, float]:
    """Summarise a metric over the clients that have a value, each with the same weight.

    Args:
        name: M, the name of the metric.
        values: of each client, float64 `[clients]`; NaN if it is undefined.
        higher_is_better: whether larger values are better.
    Returns:
        `M_clients` (mean), `M_median`, `M_worst10` (mean of the worst tenth), `M_min` (the worst client) and `M_sd`
        (standard deviation); {} if no client has a value.
    Example:
        >>> over_clients("accuracy", torch.tensor([0.5, 1.0, torch.nan]), True)["accuracy_clients"]
        0.75
    """
    defined = values[~values.isnan()].double()
    if not len(defined):
        return {}
    worst = defined.sort(descending=not higher_is_better).values
    tenth = worst[: math.ceil(len(worst) / 10)]
    return {
        f"{name}_clients": float(defined.mean()),
        f"{name}_median": float(defined.quantile(0.5)),
        f"{name}_worst10": float(tenth.mean()),
        f"{name}_min": float(worst[0]),
        f"{name}_sd": float(defined.std(correction=0)),
    }


def class_weights(weight: str | Mapping[Any, float], counts: Tensor, classes: tuple[str, ...]) -> tuple[float, ...]:
    """The weight of each class.

    balanced: w_c = n / (C · n_c)

    Args:
        weight: "balanced", or the weight of each class by its name.
        counts: the train rows of each class, int64 `[C]`.
        classes: the names of the C classes.
    Raises:
        UsageError: an unknown class, a negative weight, or no positive weight.
    Example:
        >>> class_weights("balanced", torch.tensor([3, 1]), ("no", "yes"))
        (0.6666666666666666, 2.0)
    """
    if weight == "balanced":
        rows = int(counts.sum())
        return tuple((rows / (len(classes) * counts.double().clamp(min=1))).tolist())
    if not isinstance(weight, Mapping):
        raise UsageError(
            f"class_weight={weight!r}.",
            '"balanced", or a weight for each class.',
            write=Change("class_weight", "balanced"),
        )
    named = {str(name): value for name, value in weight.items()}
    unknown = sorted(set(named) - set(classes))
    numbers = all(isinstance(v, (int, float)) and not isinstance(v, bool) and v >= 0 for v in named.values())
    if unknown or not numbers or not any(named.get(c, 1.0) for c in classes):
        raise UsageError(
            f"class_weight={weight!r}.",
            f"weights of at least 0, not all 0, for the classes {', '.join(classes[:20])}.",
            f"{unknown[0]!r} is no class of the data." if unknown else "each row's loss is multiplied by it.",
            Change("class_weight", "balanced"),
        )
    return tuple(float(named.get(c, 1.0)) for c in classes)


def _no_evaluation(cause: str) -> RunError:
    """The error for a row that cannot be evaluated: a mean over the other rows would be another number."""
    return RunError(
        f"The evaluation failed. {cause.rstrip('.')}.",
        "readable, finite rows.",
        "a metric over the other rows is not the metric of the data set.",
    )
