"""A predictor: a trained model with its input. It takes a user's rows and answers in the user's words.

Tests: tests/surface/test_predict.py
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from atoll.base.errors import UsageError
from atoll.base.names import with_noun
from atoll.compute.loss import ClassWeighted, PerExample, poisson, values_of
from atoll.compute.metrics import Counts, Metric, row_sums, summed
from atoll.compute.outputs import logits_of
from atoll.data.arrays import several_labels, tensor_of
from atoll.data.cells import Cells, boxed_cells, cells_of, client_names, name_of
from atoll.data.input import Input
from atoll.data.rows import IGNORED, Array
from atoll.runs.personal import ClientModels

PIECE = 1024  # rows of one pass, as in the evaluation of a training
LARGEST_WHOLE = 2**24  # outputs and targets that are kept for metrics over all rows


@dataclass(frozen=True)
class PredictionScores:
    """The loss and the metrics of a model on some rows.

    Args:
        rows: the number of rows with a target.
        metrics: the loss and each metric. Without rows, and for a class unseen in training, some are absent.
        clients: the rows and the metrics of each client, by its name.
        unseen: the number of rows of classes that training did not have.
    """

    rows: int
    metrics: Mapping[str, float]
    clients: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    unseen: int = 0


@dataclass(frozen=True)
class Predictor:
    """A trained model with its input.

    Args:
        model: the model, in evaluation mode.
        input: the map from rows to tensors, and from outputs to words.
        loss: the loss, one value for each row, without class weights; None: unknown, for a run with a loss of the user
            that is read from its folder.
        metrics: the metrics of `evaluate`.
        models: the models of clients, for rows with a known client; None: all rows use `model`.
    Example:
        >>> import atoll
        >>> data = atoll.data.load("wine").split(clients=3)
        >>> run = atoll.train("softmax", data, atoll.recipes.fedavg(0.1), rounds=3, out=None)
        >>> row = {name: [1.0] for name in data.columns}
        >>> run.predictor.predict(row).tolist()[0] in data.classes
        True
    """

    model: nn.Module
    input: Input
    loss: PerExample | None
    metrics: tuple[Metric, ...] = ()
    models: ClientModels | None = field(default=None, repr=False)

    def prepare(self, x: Any, clients: Any = None) -> Tensor:
        """Convert rows to the tensor of the model, `[rows, *features]`, in the dtype of the run.

        Args:
            x: a frame (pandas, polars, pyarrow) or a dict of columns, matched by name; or an array of rows.
            clients: the client of each row; needed if each client is scaled by its own rows.
        Raises:
            UsageError: a column is missing, or the rows have another type or shape than in training.
        """
        names = _names(clients)
        table = self.table(x)
        if table is None:
            return self.input.array(_array(x), names)
        return self.input.tensor(self.input.values(table).numbers, self._clients(table, names))

    def _clients(self, table: Mapping[str, Cells], clients: list[str] | None) -> list[str] | None:
        by = self.input.by
        if not self.input.clients or clients is not None or by is None or by not in table:
            return clients
        return client_names(table[by])

    def owners(self, x: Any, clients: Any = None) -> list[str] | None:
        """The client of each row, if clients have models: as given, or the column of the client in a table."""
        if self.models is None:
            return None
        if clients is not None:
            return _names(clients)
        table = self.table(x)
        return None if table is None or self.input.by not in table else client_names(table[str(self.input.by)])

    def table(self, x: Any) -> dict[str, Cells] | None:
        """Return the cells of a frame, of a dict, or of an array of a table's columns; None for other arrays."""
        if isinstance(x, (np.ndarray, Tensor, list, tuple)):
            return self._named(x) if self.input.columns else None
        self.input.refuse_fields("a predictor reads tables and single arrays.")
        return cells_of(x)

    def _named(self, x: Any) -> dict[str, Cells]:
        """The columns of an array; column i is the i-th column of the input."""
        array = x.numpy() if isinstance(x, Tensor) else np.asarray(x)
        names = [column.name for column in self.input.columns]
        if array.ndim != 2 or array.shape[1] != len(names):
            raise UsageError(
                f"The rows have shape {array.shape[1:]}.",
                f"the {with_noun(len(names), 'column')} {', '.join(names)}, in this order; or a frame.",
                "without names the order determines the columns.",
            )
        if array.dtype.kind in "biuf":
            return cells_of(dict(zip(names, array.T, strict=True)))
        return {name: boxed_cells(list(values)) for name, values in zip(names, array.T.tolist(), strict=True)}

    def output(self, x: Tensor, clients: Sequence[str] | None = None) -> Tensor:
        """Compute the output of the model for prepared rows, `[rows, …]`.

        Args:
            x: the rows.
            clients: the client of each row, whose model is used if it has one; None: the model of the server.
        Raises:
            UsageError: an output is NaN or infinite.
        """
        if self.models is None or clients is None:
            return outputs_of(self.model, x)
        ids = {name: self.models.owner(name.strip()) for name in dict.fromkeys(clients)}
        owner = torch.tensor([-1 if (i := ids[name]) is None else i for name in clients], dtype=torch.int64)
        out: Tensor | None = None
        for client in owner.unique().tolist():
            model, place = (
                self.model if client < 0 else self.models.module(client).eval(),
                (owner == client).nonzero()[:, 0],
            )
            some = outputs_of(model, x[place])
            out = some.new_empty(len(x), *some.shape[1:]) if out is None else out
            out[place] = some
        return outputs_of(self.model, x) if out is None else out

    def predict(self, x: Any, clients: Any = None) -> Array:
        """Predict the class of each row by its name, or the number in the target's units.

        Args:
            x, clients: as in `prepare`.
        """
        return self.words(self.output(self.prepare(x, clients), self.owners(x, clients)))

    def words(self, output: Tensor) -> Array:
        """Convert outputs to names of classes, or to numbers in the target's units.

        Args:
            output: the output of the model, `[rows, …]`; with the loss `poisson` the logarithm of a rate.
        """
        return self.input.words(output.double().exp() if self.loss is poisson else output)

    def predict_proba(self, x: Any, clients: Any = None) -> Array:
        """Predict the probability of each class, float64 `[rows, classes]`, in the order of `input.classes`.

        Args:
            x, clients: as in `prepare`.
        Raises:
            UsageError: the model predicts numbers.
        """
        return self.input.probabilities(self.output(self.prepare(x, clients), self.owners(x, clients))).numpy()

    def score(self, x: Any, y: Any) -> float:
        """Compute the accuracy (of several labels their mean), or R² = 1 − Σ (y − ŷ)² / Σ (y − mean y)² for numbers.

        Args:
            x: as in `prepare`.
            y: the target of each row.
        """
        found = self.predict(x)
        if self.input.kind == "labels":
            return float((found == self.targets(y).numpy()).mean())
        if self.input.kind != "regression":
            wanted = _names(np.asarray(y, dtype=object)) or []
            return float(np.mean([name_of(a) == b for a, b in zip(found.tolist(), wanted, strict=True)]))
        numbers = np.asarray(y, dtype=np.float64).reshape(found.shape)
        centred = numbers - numbers.mean(0)
        return float(1 - ((numbers - found) ** 2).sum() / (centred**2).sum())

    def evaluate(self, x: Any, y: Any, clients: Any = None) -> PredictionScores:
        """Compute the loss and the metrics over all rows, and by client.

        Args:
            x: as in `prepare`.
            y: the target of each row: classes by name, or numbers in the target's units.
            clients: the client of each row; None: all rows together.
        """
        if not len(y):
            raise UsageError("The data have 0 rows.", "at least one row.", "a mean over no rows is undefined.")
        tally = ScoreSums(self)
        names = _names(clients)
        tally.add(self.output(self.prepare(x, names), self.owners(x, names)), self.targets(y), names)
        return tally.result()

    def targets(self, y: Any) -> Tensor:
        """Convert targets to class codes or numbers; −1 is a class unseen in training, −2 or NaN a missing target.

        Args:
            y: one value for each row; of several numbers or labels an array `[rows, n]`, or a frame or a dict of the
                columns of the target.
        """
        labels = self.input.kind == "labels"
        if isinstance(y, Mapping) or hasattr(y, "columns"):
            cells = cells_of(y)
            found = torch.stack([self.input.targets(cells[name]) for name in self.input.target.names], -1)
            return found if labels else found.squeeze(-1)
        if labels:
            return several_labels(_array(y), "y")
        if self.input.classes is None and self.input.kind != "regression":
            return _array(y).long()
        array = y.numpy() if isinstance(y, Tensor) else np.asarray(y)
        if array.ndim == 2 and array.shape[1] > 1:
            return torch.from_numpy(array.astype(np.float64))
        return self.input.targets(cells_of({"y": array.reshape(-1)})["y"])


def _names(values: Any) -> list[str] | None:
    """Names of clients or classes without blanks at their ends, as tables are read."""
    return None if values is None else [name_of(value).strip() for value in np.asarray(values).tolist()]


@torch.no_grad()
def outputs_of(model: nn.Module, x: Tensor) -> Tensor:
    """Compute the output of a model for prepared rows, `[rows, …]`, in passes of `PIECE` rows.

    Raises:
        UsageError: an output is NaN or infinite.
    """
    if x.is_floating_point():  # a module keeps the dtype that the program gave it, also if the run had another one
        x = x.to(next((p.dtype for p in model.parameters() if p.is_floating_point()), x.dtype))
    out = torch.cat([logits_of(model(piece)) for piece in x.split(PIECE)]) if len(x) else logits_of(model(x))
    if not bool(torch.isfinite(out).all()):
        row = int((~torch.isfinite(out)).flatten(1).any(1).nonzero()[0])
        raise UsageError(
            f"The output of the model for row {row} is not finite.",
            "a model of finite numbers.",
            "NaN usually means that the training diverged.",
            "atoll lr",
        )
    return out


class ScoreSums:
    """Sums of losses and metrics over batches of rows, for all rows and for each client.

    A metric over all rows at once, such as an exact `auc`, keeps outputs and targets, up to `LARGEST_WHOLE` numbers.
    Beyond that its sums are used, if it has any.
    """

    def __init__(self, predictor: Predictor) -> None:
        self.predictor, self.unseen = predictor, 0
        self.names: dict[str, int] = {}
        self.owners: list[Tensor] = []
        self.sums: dict[str, Tensor] = {}  # [1 + clients] or [1 + clients, k]; the first row is that of all rows
        self.kept: list[tuple[Tensor, Tensor]] = []
        self._numbers = 0

    @property
    def rows(self) -> int:
        """The number of rows with a target."""
        return sum(map(len, self.owners))

    def add(self, output: Tensor, y: Tensor, clients: Sequence[str] | None) -> None:
        """Add rows.

        Args:
            output: the output of the model, `[rows, …]`.
            y: the targets, as `Predictor.targets` returns them.
            clients: the client of each row; None: unknown.
        """
        it = self.predictor.input
        flat = y.reshape(len(y), -1)
        missing = flat.isnan().any(1) if y.is_floating_point() else ((flat == -2) | (flat == IGNORED)).all(1)
        keep = ~missing
        names = None if clients is None else [n for n, kept in zip(clients, keep.tolist(), strict=True) if kept]
        output, y = output[keep], y[keep]
        new = torch.zeros(len(y), dtype=torch.bool) if y.is_floating_point() or y.dim() > 1 else y == -1
        self.unseen += int(new.sum())
        known = torch.where(new, 0, y) if new.any() else y
        known = it.scaled_target(known).to(output.dtype) if known.is_floating_point() else known
        owner = self._owner(names, len(y))
        self.owners.append(owner)
        if self.predictor.loss is not None:
            self._add("loss", values_of(self.predictor.loss, output, known).double(), owner)
        for metric in self.predictor.metrics:
            if metric.sums is not None:
                rows = row_sums(metric, output, known)
                if metric.name == "accuracy" and isinstance(rows, Tensor):
                    rows = torch.where(new, 0.0, rows)
                self._add(metric.name, rows, owner)
        self._keep(output, known)

    def _owner(self, names: Sequence[str] | None, rows: int) -> Tensor:
        """The place of each row's client, from 1; 0 for an unknown client."""
        if names is None:
            return torch.zeros(rows, dtype=torch.int64)
        return torch.tensor([self.names.setdefault(name, len(self.names) + 1) for name in names], dtype=torch.int64)

    def _add(self, name: str, rows: Tensor | Counts, owner: Tensor) -> None:
        each = summed(rows, owner, len(self.names) + 1)
        each[0] = each.sum(0)
        old = self.sums.get(name)
        if old is not None:
            each[: len(old)] += old
        self.sums[name] = each

    def _keep(self, output: Tensor, y: Tensor) -> None:
        if any(metric.over_rows is not None for metric in self.predictor.metrics):
            self._numbers += output.numel() + y.numel()
            self.kept = [*self.kept, (output, y)] if self._numbers <= LARGEST_WHOLE else []

    def result(self) -> PredictionScores:
        """The metrics of all rows that were added."""
        if not self.rows:
            return PredictionScores(0, {})
        owner = torch.cat(self.owners)
        rows = owner.bincount(minlength=len(self.names) + 1)
        rows[0] = len(owner)
        each = {"loss": self.sums["loss"] / rows} if "loss" in self.sums else {}
        whole = (torch.cat([o for o, _ in self.kept]), torch.cat([y for _, y in self.kept])) if self.kept else None
        for metric in self.predictor.metrics:
            if metric.over_rows is not None and whole is not None:
                values = metric.each_over_rows(*whole, owner, len(self.names) + 1)
                values[0] = metric.over_all(*whole)
                each[metric.name] = values
            elif metric.name in self.sums:
                each[metric.name] = metric.each(self.sums[metric.name], rows)
        if self.unseen:
            each = {name: values for name, values in each.items() if name == "accuracy"}
        clients = {name: self._values(each, place, int(rows[place])) for name, place in sorted(self.names.items())}
        return PredictionScores(int(rows[0]), self._values(each, 0, None), clients, self.unseen)

    def _values(self, each: Mapping[str, Tensor], place: int, rows: int | None) -> dict[str, float]:
        """The values of one client; an undefined value is absent."""
        found = {name: float(values[place]) for name, values in each.items()}
        defined = {name: value for name, value in found.items() if value == value}
        return defined if rows is None else {"rows": float(rows), **defined}


def _array(x: Any) -> Tensor:
    return x if isinstance(x, Tensor) else tensor_of(np.asarray(x))


def predictor_of(
    model: nn.Module,
    input: Input,
    loss: PerExample | None,
    metrics: tuple[Metric, ...],
    models: ClientModels | None = None,
) -> Predictor:
    """Return a predictor of a copy of a model, in evaluation mode, and of the models of clients if there are any."""
    loss = loss.loss if isinstance(loss, ClassWeighted) else loss
    return Predictor(copy.deepcopy(model).eval(), input, loss, metrics, models)
