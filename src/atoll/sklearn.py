"""Estimators of scikit-learn that train by federated learning.

    FederatedClassifier().fit(X, y).predict(X)        each row has a client: given, or dealt at random

They are a layer over `atoll.data.arrays`, `atoll.train` and the predictor of a run. Importing this module imports
scikit-learn.

Tests: tests/surface/test_sklearn.py
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils import column_or_1d
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import nn

from atoll.base.errors import Note, UsageError
from atoll.base.lines import Change
from atoll.base.names import with_noun
from atoll.data.arrays import arrays, tensor_of
from atoll.data.clients import Clients
from atoll.data.input import Input
from atoll.runs.predictor import outputs_of
from atoll.training.rounds import plan_from_text
from atoll.training.train import train

Array = NDArray[Any]
ArrayLike: TypeAlias = Any  # what `validate_data` of scikit-learn accepts


def _clients(estimator: Any, X: Array, y: Array, owner: ArrayLike | None, classes: int | None) -> Clients:
    """The rows of `fit`, divided among clients."""
    if owner is not None:
        owner = np.asarray(owner)
        if owner.shape != (len(X),):
            raise ValueError(f"clients has shape {owner.shape}; one client for each of {len(X)} rows is required.")
    if estimator.scale == "client":
        raise UsageError(
            'scale = "client".',
            '"standard" or "none".',
            "predict receives rows without their clients.",
            Change("scale", "standard"),
        )
    names = None if classes is None else [str(i) for i in range(classes)]
    kind = "regression" if classes is None else "classification"
    source = arrays(X, y, by=owner, task=kind, scale=estimator.scale, classes=names, name=type(estimator).__name__)
    if classes is None and estimator.scale != "none":
        source = replace(source, scale_target="standard")
    count = None if owner is not None else estimator.clients
    if count is not None and len(X) < 2 * count:
        count = max(1, len(X) // 2)
        warnings.warn(f"{len(X)} rows: {count} clients instead of {estimator.clients}.", Note, stacklevel=4)
    return source.split(count, estimator.split, held_out=0, seed=estimator.seed, min_rows=1, input=estimator.input)


def _train(estimator: Any, data: Clients, model: Any, rounds: int) -> None:
    """Train, and store what the run gave."""
    recipe = estimator.recipe
    plan = plan_from_text(recipe) if isinstance(recipe, str) else recipe
    if plan.releases and estimator.scale != "none" and estimator.input is None:
        raise UsageError(
            f"scale = {estimator.scale!r} with a noised plan.",
            "an input file, or scaled columns and scale = 'none'.",
            "means and deviations are computed from the rows of the clients, outside the accountant.",
            Change("input", "input.json"),
        )
    run = train(
        model,
        data,
        plan,
        out=estimator.out,
        report=False,
        progress="none",
        rounds=rounds,
        seed=estimator.seed,
        dtype=str(estimator._dtype).removeprefix("torch."),
        engine=estimator.engine,
        stop=estimator.stop,
        **({} if estimator.metrics is None else {"metrics": estimator.metrics}),
        **estimator._loss_settings(),
    )
    if estimator.verbose:
        length = with_noun(run.rounds, "round")
        print(f"{type(estimator).__name__}: {length}, loss {run.metrics['loss']:.4g}. {run.reason}")
    estimator.run_ = run
    predictor = run.predictor
    estimator.module_, estimator.input_ = predictor.model, predictor.input
    estimator.n_iter_ = getattr(estimator, "_rounds_before", 0) + run.rounds
    estimator.history_ = [dict(report.metrics) for report in run.reports]


def _output(estimator: Any, X: ArrayLike) -> Array:
    """The outputs of the model for rows of a user, float64 `[rows, outputs]`."""
    check_is_fitted(estimator)
    X = validate_data(estimator, X, reset=False, dtype=[np.float64, np.float32])
    out: Array = outputs_of(estimator.module_, estimator.input_.array(tensor_of(X))).double().numpy()
    return out.reshape(len(out), -1)


def _linear(estimator: Any) -> tuple[Array, Array]:
    """The weights `[outputs, features]` and biases of a linear model, in the units of the user's columns and target.

    Raises:
        AttributeError: the model is not one linear layer.
    """
    check_is_fitted(estimator)
    layers = [m for m in estimator.module_.modules() if next(m.parameters(recurse=False), None) is not None]
    if len(layers) != 1 or not isinstance(layers[0], nn.Linear):
        raise AttributeError("Only a linear model has coefficients.")
    weight = layers[0].weight.detach().double().numpy()
    bias = np.zeros(len(weight)) if layers[0].bias is None else layers[0].bias.detach().double().numpy()
    statistics, target = estimator.input_.statistics, estimator.input_.target
    if statistics is not None:
        weight = weight / np.array(statistics.spread)
        bias = bias - weight @ np.array(statistics.centre)
    if target.spread:
        spread, centre = np.array(target.spread), np.array(target.centre)
        weight, bias = weight * spread[:, None], bias * spread + centre
    return weight, bias


def _prepare(estimator: Any, X: ArrayLike, y: ArrayLike, reset: bool) -> tuple[Array, Array]:
    """Check rows as scikit-learn does, and keep their dtype for the training."""
    X, y = validate_data(estimator, X, y, reset=reset, dtype=[np.float64, np.float32], multi_output=False)
    if len(X) < 2:
        raise ValueError("Found array with 1 sample(s); at least 2 are required to train.")
    estimator._dtype = torch.float32 if X.dtype == np.float32 else torch.float64
    return X, y


class FederatedClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """A classifier that clients train together; each keeps its rows.

    θ ← θ − Σ wᵢ gᵢ / Σ wᵢ over the clients i of a round, by the recipe

    Args:
        model: a name, an `nn.Module` or a function that makes one; None: "logistic" for two classes, else "softmax".
        recipe: the plan, or its text.
        clients: the number of clients if `fit` receives no owner of the rows, ≥ 1.
        split: the partition or its text, such as "Dirichlet(0.3)"; None: at random.
        rounds: the number of rounds, ≥ 1.
        scale: "standard" or "none", as in `atoll.data.arrays`.
        input: an `Input`, or the path of one, whose statistics are used instead of those of the rows.
        class_weight: "balanced", or a weight by class; None: 1.
        metrics: metrics by name; None: by the data.
        stop: stop rules.
        seed: the seed of partition, order of the rows and model.
        engine: where clients are trained, such as "inprocess" or "Processes(workers=2)".
        out: the parent of run folders; None writes no file.
        verbose: 1 prints one line after training.
    Attributes:
        classes_: the classes in ascending order.
        n_iter_: the number of rounds.
        history_: the training loss of each round, the norm of its update, and the rate of the server.
        module_: the model, which takes prepared rows; `input_`: the map from rows to tensors.
        run_: the run. A pickled estimator does not contain it.
        coef_, intercept_: of a linear model, in the units of the user's columns.
    Example:
        >>> from sklearn.datasets import load_iris
        >>> X, y = load_iris(return_X_y=True)
        >>> model = FederatedClassifier(recipe="fedavg(lr=0.5)", clients=5, rounds=20).fit(X, y)
        >>> bool(model.score(X, y) > 0.9)
        True
    """

    def __init__(
        self,
        model: Any = None,
        recipe: Any = "fedavg(lr=0.1)",
        clients: int = 10,
        split: Any = None,
        rounds: int = 50,
        scale: str = "standard",
        input: Input | str | Path | None = None,
        class_weight: str | Mapping[Any, float] | None = None,
        metrics: Any = None,
        stop: Sequence[Any] = (),
        seed: int = 0,
        engine: Any = "inprocess",
        out: str | Path | None = None,
        verbose: int = 0,
    ) -> None:
        self.model = model
        self.recipe = recipe
        self.clients = clients
        self.split = split
        self.rounds = rounds
        self.scale = scale
        self.input = input
        self.class_weight = class_weight
        self.metrics = metrics
        self.stop = stop
        self.seed = seed
        self.engine = engine
        self.out = out
        self.verbose = verbose

    def fit(self, X: ArrayLike, y: ArrayLike, clients: ArrayLike | None = None) -> Self:
        """Train a new model.

        Args:
            X: numbers `[rows, features]`.
            y: the class of each row.
            clients: the owner of each row, of any type; None: rows are dealt to `self.clients` clients.
        Returns:
            The estimator.
        Raises:
            ValueError: y has one class only, or the lengths differ.
        """
        X, y = _prepare(self, X, y, reset=True)
        check_classification_targets(y)
        self.classes_, codes = np.unique(column_or_1d(y, warn=True), return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError("y has one class only; at least two classes are required.")
        self._rounds_before = 0
        model = self.model or ("logistic" if len(self.classes_) == 2 else "softmax")
        _train(self, _clients(self, X, codes, clients, len(self.classes_)), model, self.rounds)
        return self

    def partial_fit(
        self, X: ArrayLike, y: ArrayLike, classes: ArrayLike | None = None, clients: ArrayLike | None = None
    ) -> Self:
        """Train the model for one more round on these rows. The first call needs `classes` and fixes the scale.

        Args:
            X, y, clients: as in `fit`.
            classes: all classes; needed in the first call only.
        """
        first = not hasattr(self, "module_")
        X, y = _prepare(self, X, y, reset=first)
        if first:
            if classes is None:
                raise ValueError("classes must be passed on the first call to partial_fit.")
            self.classes_ = np.unique(classes)
            self._rounds_before = 0
        codes = np.searchsorted(self.classes_, y).clip(max=len(self.classes_) - 1)
        if (self.classes_[codes] != y).any():
            raise ValueError("y has a class that is not in classes.")
        model = self.model or ("logistic" if len(self.classes_) == 2 else "softmax")
        _continue(self, X, codes, clients, model, len(self.classes_))
        return self

    def decision_function(self, X: ArrayLike) -> Array:
        """The logits `[rows, classes]`; for two classes the log-odds of the second class `[rows]`."""
        out = _output(self, X)
        if out.shape[1] == 1:
            return out[:, 0]
        return out[:, 1] - out[:, 0] if len(self.classes_) == 2 else out

    def predict_proba(self, X: ArrayLike) -> Array:
        """The probability of each class, `[rows, classes]`."""
        out = torch.from_numpy(_output(self, X))
        out = torch.cat([torch.zeros_like(out), out], 1) if out.shape[1] == 1 else out
        result: Array = out.softmax(1).numpy()
        return result

    def predict(self, X: ArrayLike) -> Array:
        """The class of each row."""
        scores = self.decision_function(X)
        result: Array = self.classes_[(scores > 0).astype(int) if scores.ndim == 1 else scores.argmax(1)]
        return result

    @property
    def coef_(self) -> Array:
        """The weights of a linear model, `[classes, features]`, `[1, features]` for two classes."""
        weight, _ = _linear(self)
        return weight[1:] - weight[:1] if len(weight) == 2 else weight

    @property
    def intercept_(self) -> Array:
        """The biases of a linear model."""
        _, bias = _linear(self)
        return bias[1:] - bias[:1] if len(bias) == 2 else bias

    def __getstate__(self) -> dict[str, Any]:
        """The fitted model without the run, which contains functions that cannot be pickled."""
        return {name: value for name, value in super().__getstate__().items() if name != "run_"}

    def _loss_settings(self) -> dict[str, Any]:
        if self.class_weight is None or isinstance(self.class_weight, str):
            return {} if self.class_weight is None else {"class_weight": self.class_weight}
        codes = {name: str(code) for code, name in enumerate(self.classes_.tolist())}
        missing = [name for name in self.class_weight if name not in codes]
        if missing:
            raise UsageError(f"class_weight has the class {missing[0]!r}.", f"one of {', '.join(map(str, codes))}.")
        return {"class_weight": {codes[name]: float(weight) for name, weight in self.class_weight.items()}}


class FederatedRegressor(RegressorMixin, BaseEstimator):  # type: ignore[misc]
    """A regression model that clients train together; each keeps its rows.

    θ ← θ − Σ wᵢ gᵢ / Σ wᵢ over the clients i of a round, by the recipe

    Args:
        model: a name, an `nn.Module` or a function that makes one; None: "linear".
        recipe, clients, split, rounds, scale, input, metrics, stop, seed, engine, out, verbose: as in
            `FederatedClassifier`. Unless `scale` is "none", the target is scaled by mean and deviation of the rows.
    Attributes:
        n_iter_, history_, module_, input_, run_, coef_, intercept_: as in `FederatedClassifier`.
    Example:
        >>> X = np.arange(40.0).reshape(20, 2)
        >>> model = FederatedRegressor(clients=4, rounds=30).fit(X, X.sum(1))
        >>> bool(model.score(X, X.sum(1)) > 0.99)
        True
    """

    def __init__(
        self,
        model: Any = None,
        recipe: Any = "fedavg(lr=0.1)",
        clients: int = 10,
        split: Any = None,
        rounds: int = 50,
        scale: str = "standard",
        input: Input | str | Path | None = None,
        metrics: Any = None,
        stop: Sequence[Any] = (),
        seed: int = 0,
        engine: Any = "inprocess",
        out: str | Path | None = None,
        verbose: int = 0,
    ) -> None:
        self.model = model
        self.recipe = recipe
        self.clients = clients
        self.split = split
        self.rounds = rounds
        self.scale = scale
        self.input = input
        self.metrics = metrics
        self.stop = stop
        self.seed = seed
        self.engine = engine
        self.out = out
        self.verbose = verbose

    def fit(self, X: ArrayLike, y: ArrayLike, clients: ArrayLike | None = None) -> Self:
        """Train a new model.

        Args:
            X: numbers `[rows, features]`.
            y: one number for each row.
            clients: the owner of each row, of any type; None: rows are dealt to `self.clients` clients.
        """
        X, y = _prepare(self, X, y, reset=True)
        self._rounds_before = 0
        target = np.asarray(column_or_1d(y, warn=True), dtype=np.float64)
        _train(self, _clients(self, X, target, clients, None), self.model or "linear", self.rounds)
        return self

    def partial_fit(self, X: ArrayLike, y: ArrayLike, clients: ArrayLike | None = None) -> Self:
        """Train the model for one more round on these rows. The first call fixes the scale."""
        first = not hasattr(self, "module_")
        X, y = _prepare(self, X, y, reset=first)
        if first:
            self._rounds_before = 0
        _continue(self, X, np.asarray(y, dtype=np.float64), clients, self.model or "linear", None)
        return self

    def predict(self, X: ArrayLike) -> Array:
        """The predicted number of each row, in the target's units."""
        out = _output(self, X)
        target = self.input_.target
        if target.spread:
            out = out * np.array(target.spread) + np.array(target.centre)
        return out[:, 0] if out.shape[1] == 1 else out

    @property
    def coef_(self) -> Array:
        """The weights of a linear model, `[features]`."""
        weight, _ = _linear(self)
        result: Array = weight[0]
        return result

    @property
    def intercept_(self) -> float:
        """The bias of a linear model."""
        _, bias = _linear(self)
        return float(bias[0])

    def __getstate__(self) -> dict[str, Any]:
        """The fitted model without the run, which contains functions that cannot be pickled."""
        return {name: value for name, value in super().__getstate__().items() if name != "run_"}

    def _loss_settings(self) -> dict[str, Any]:
        return {}


def _continue(estimator: Any, X: Array, y: Array, owner: ArrayLike | None, model: Any, classes: int | None) -> None:
    """One more round, from the current model and with its input."""
    if hasattr(estimator, "module_"):
        estimator._rounds_before = estimator.n_iter_
        model = copy.deepcopy(estimator.module_).train()  # predictions need evaluation mode
        given, estimator.input = estimator.input, estimator.input_
        try:
            data = _clients(estimator, X, y, owner, classes)
        finally:
            estimator.input = given
    else:
        data = _clients(estimator, X, y, owner, classes)
    _train(estimator, data, model, 1)


__all__ = ["FederatedClassifier", "FederatedRegressor"]
