"""Newton's method on the rows of several clients next to a fit of scikit-learn or statsmodels on all rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import atoll
from atoll import recipes
from atoll.data import Clients
from atoll.runs.events import Run

from .rows import Cell, Result, Row, Table

WIDE = torch.float64
SIZES = (50, 31, 24, 12)
Runner = Callable[[int, int | None, Path | None], Result]


def _trained(model: str, data: Clients, l2: float, rounds: int, **settings: Any) -> Run:
    words = {"dtype": "float64", "evaluate_every": 0, **settings}
    return atoll.train(model, data, recipes.newton(l2), rounds=rounds, out=None, **words)


def _weights(run: Run) -> Any:
    return torch.cat([p.detach().flatten() for p in run.model.parameters()]).numpy()


def _result(run: Run, **apart: float) -> Result:
    return Result(apart, run.rounds, run.seconds, run.bytes_up)


def _relative(ours: Any, theirs: Any) -> float:
    return float(np.max(np.abs(np.asarray(ours) / np.asarray(theirs) - 1)))


def _errors(run: Run, units: str) -> Any:
    """The coefficients and the standard errors of a run, `[columns + 1, 2]`, the constant last."""
    if run.inference is None:
        raise RuntimeError("The run has no inference.")
    frame = run.inference.frame()
    return frame[frame["units"] == units].iloc[:, 2:4].to_numpy(float)


def _logistic(l2: float, most: int) -> Runner:
    """breast_cancer over 7 clients, Dirichlet(0.3), next to scikit-learn."""

    def run(seed: int, rounds: int | None, place: Path | None) -> Result:
        from sklearn.linear_model import LogisticRegression

        data = atoll.data.load("breast_cancer").split(7, atoll.data.Dirichlet(0.3), seed=seed)
        x, y = (t.numpy() for t in data.take(data.order))
        fit = LogisticRegression(C=1 / (l2 * len(x)), tol=1e-12, solver="newton-cholesky").fit(x, y)
        done = _trained("logistic", data, l2, rounds or most)
        best = np.array([*fit.coef_[0], fit.intercept_[0]])
        return _result(done, weights=float(np.abs(_weights(done) - best).max()))

    return run


def _linear(seed: int, rounds: int | None, place: Path | None) -> Result:
    """diabetes over 5 clients of unequal sizes, in raw units, next to ordinary least squares of statsmodels."""
    import statsmodels.api as sm
    from sklearn.datasets import load_diabetes

    source = atoll.data.load("diabetes", scale_target="standard")
    done = _trained("linear", source.split(5, atoll.data.Quantity(1.0), held_out=0, seed=seed), 0.0, rounds or 1)
    x, y = load_diabetes(return_X_y=True, scaled=False)
    return _compared(done, "raw", sm.OLS(y, sm.add_constant(x)).fit())


def _compared(done: Run, units: str, fit: Any) -> Result:
    ours, theirs = _errors(done, units), np.column_stack((fit.params, fit.bse))
    theirs = np.vstack((theirs[1:], theirs[:1]))
    return _result(done, weights=_relative(ours[:, 0], theirs[:, 0]), errors=_relative(ours[:, 1], theirs[:, 1]))


def _clients(x: Tensor, y: Tensor) -> Clients:
    """Rows over clients of unequal sizes, in their order."""
    parts = [(part_x, part_y) for part_x, part_y in zip(x.split(SIZES), y.split(SIZES), strict=True)]
    return atoll.data.federate(parts, held_out=0)


def _drawn(seed: int) -> tuple[Tensor, torch.Generator]:
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(sum(SIZES), 3, generator=rng, dtype=WIDE), rng


def _poisson(seed: int, rounds: int | None, place: Path | None) -> Result:
    """Counts over 4 clients, next to a generalized linear model of statsmodels."""
    import statsmodels.api as sm

    x, rng = _drawn(seed)
    y = torch.poisson((0.2 * x.sum(1) + 1).exp(), generator=rng)
    done = _trained("linear", _clients(x, y), 0.0, rounds or 10, loss="poisson")
    fit = sm.GLM(y.numpy(), sm.add_constant(x.numpy()), family=sm.families.Poisson()).fit(tol=1e-14)
    return _compared(done, "scaled", fit)


def _survival(seed: int, rounds: int | None, place: Path | None) -> Result:
    """Tied survival times over 4 clients, a stratum each, next to the stratified PHReg of statsmodels."""
    from statsmodels.duration.hazard_regression import PHReg

    x, rng = _drawn(seed)
    hazard = (x @ torch.tensor([0.8, -0.5, 0.0], dtype=WIDE)).exp()
    time = (-torch.rand(len(x), generator=rng, dtype=WIDE).log() / hazard * 8).ceil()
    event = (torch.rand(len(x), generator=rng, dtype=WIDE) < 0.7).to(WIDE)
    done = _trained("cox", _clients(x, torch.stack((time, event), 1)), 0.0, rounds or 8)
    strata = np.repeat(np.arange(len(SIZES)), SIZES)
    fit = PHReg(time.numpy(), x.numpy(), status=event.numpy(), strata=strata, ties="efron").fit()
    return _result(done, weights=float(np.abs(_weights(done) - fit.params).max()))


def newton() -> Table:
    """The largest distance of a weight and of a standard error; the required distance is 1e-6."""

    def cells(columns: Sequence[str]) -> dict[str, Cell]:
        return {column: Cell(within=1e-6, side="most") for column in columns}

    rows = {
        "breast_cancer": Row(_logistic(1e-3, 10), cells(["weights"])),
        "breast_cancer-1e-4": Row(_logistic(1e-4, 11), cells(["weights"])),
        "diabetes": Row(_linear, cells(["weights", "errors"])),
        "poisson": Row(_poisson, cells(["weights", "errors"])),
        "cox": Row(_survival, cells(["weights"])),
    }
    return Table(rows, "0", ".1e")
