"""The privacy of a training: its budget, its claim, and the rows that may not be read outside the accountant.

Tests: tests/surface/test_private_runs.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch

from atoll.base.errors import RunError, UsageError
from atoll.base.lines import Change, Line, Part
from atoll.base.random import Key
from atoll.compute.task import Task
from atoll.data.clients import Clients
from atoll.engine.protocols import Engine
from atoll.net.spec import Server
from atoll.plan.codec.privacy import noises_messages
from atoll.plan.plan import Plan
from atoll.plan.protocols import OPEN, Population
from atoll.privacy.ledger import Budget, Ledger
from atoll.training.settings import Settings

NOT_PRIVATE = "not private: noise follows the seed"
_CLAIM = (
    "models and noised sums of a trusted server{}; not covered: the log of the operator (ids, times, bytes), and "
    "held-out rows, which must be the server's own"
)
CLIENTS_ROWS = (
    "The held-out rows are rows of the clients. ε covers neither their metrics, which have no noise, nor a choice of a "
    "round by them: publish the model and not these metrics, or pass held_out=0 and evaluate on rows of the server."
)


class Private(Protocol):
    """The members of a training that `notes_of` and `refuse_leaks` read."""

    @property
    def plan(self) -> Plan: ...
    @property
    def data(self) -> Clients: ...
    @property
    def settings(self) -> Settings: ...
    @property
    def task(self) -> Task: ...
    @property
    def engine(self) -> Engine: ...
    @property
    def budget(self) -> Budget | None: ...


def budget_of(plan: Plan, data: Clients, settings: Settings) -> Budget | None:
    """The budget of a training; None if its plan releases nothing.

    Raises:
        UsageError: a setting of privacy without a plan with noise, an open run, or numbers out of range.
    """
    if not plan.releases:
        for name, value in (("budget", settings.budget), ("delta", settings.delta), ("ledger", settings.ledger)):
            if value is not None:
                raise UsageError(
                    f"{name} = {value!r} with {plan.codec!r}.",
                    "a plan with Clip(...) >> Noise(...).",
                    "ε has a proof only for noise of this kind on clipped updates.",
                    Part("Clip(1.0) >> Noise(1.0)", "codec"),
                )
        return None
    clients = settings.spec.clients if isinstance(settings.spec, Server) else data.count
    if clients is None:
        raise UsageError(
            f"{plan.codec!r} in an open run.",
            "a closed run, whose clients are fixed.",
            "the divisor of the sum and ε follow from the number of clients.",
            Change("clients", 100),
        )
    if settings.ledger is not None and settings.randomness == "seed":
        raise UsageError(
            f"ledger = {settings.ledger!r} with randomness = 'seed'.",
            "randomness = 'system'.",
            "a ledger counts private releases, and noise that follows the seed is not private.",
            Change("randomness", "system"),
        )
    ledger = Ledger(None if settings.ledger is None else Path(settings.ledger))
    return Budget(plan, clients, settings.delta, settings.budget, ledger)


def claim_of(plan: Plan, randomness: str) -> str:
    """The outputs that ε of a plan with noise covers."""
    messages = ", and each message of a client" if noises_messages(plan.codec) else ""
    return NOT_PRIVATE if randomness == "seed" else _CLAIM.format(messages)


def check_clients(budget: Budget | None, clients: int) -> None:
    """Refuse a federation with another number of clients than the one that the charges are for.

    Raises:
        RunError: the numbers differ.
    """
    if budget is not None and clients != budget.clients:
        raise RunError(
            f"The federation has {clients} clients, and the run with noise has clients = {budget.clients}.",
            "the number of clients of the federation.",
            "the divisor of the sum and ε follow from the number of clients.",
            Change("clients", clients),
        )


def notes_of(training: Private) -> tuple[str, ...]:
    """The notes of a plan with noise: noise that is not private, rows that ε does not cover, and very small rounds."""
    plan, data, budget = training.plan, training.data, training.budget
    if budget is None:
        return ()
    clients = budget.clients
    notes = [NOT_PRIVATE] if training.settings.randomness == "seed" else []
    owned = data.names is not None and data.held_owner is not None and bool((data.held_owner >= 0).any())
    if owned or training.engine.judges:
        notes.append(CLIENTS_ROWS)
    chance = plan.sampler(Population(clients, torch.ones(clients, dtype=torch.int64)), 0, Key(0)).chance
    expected = float(chance.sum() if chance.dim() else chance * clients)
    if expected < 1:
        few = f"A round has {expected:.2g} clients in expectation, so most rounds add noise alone."
        notes.append(f"{few} A larger cohort helps.")
    return tuple(notes)


def refuse_leaks(training: Private) -> None:
    """Refuse a training that reads rows of clients in a way that the accountant does not see.

    Raises:
        UsageError: the error names the setting or the part, and a line that builds.
    """
    settings, plan = training.settings, training.plan
    why = "it is computed from the rows of the clients, outside the accountant."
    if training.data.reads_rows:
        write = Line(python='data.split(100, input="input.json")', shell="--input input.json")
        given = (
            f"{plan.codec!r} with columns, levels or statistics that were read from the rows of {training.data.name}."
        )
        raise UsageError(given, "an input file.", why, write)
    if settings.class_weight == "balanced":
        weights = ",".join(f"{name}=1" for name in training.data.classes or ())
        raise UsageError('class_weight = "balanced".', "a weight for each class.", why, Change("class_weight", weights))
    if settings.evaluate in ("clients", "both"):
        required = "held-out rows of the server, evaluated together."
        raise UsageError(f"evaluate = {settings.evaluate!r}.", required, why, Change("evaluate", "pooled"))
    for name, declared in plan.local.declare(training.task).items():
        if declared.kind == "mean" and name not in ("update", "buffers", OPEN):
            raise UsageError(
                f"{plan.local!r} sends the mean {name} with {plan.codec!r}.",
                "a local part that sends an update only.",
                "only vectors that pass the clip may leave a client.",
                Part("Train(sgd(0.1), epochs=1, batch=10)", "local"),
            )


def refuse_baselines(training: Private, baselines: bool) -> None:
    """Refuse baselines with noise: they train on the rows of the clients without it.

    Raises:
        UsageError: baselines were requested for a plan with noise.
    """
    if baselines and training.plan.releases:
        raise UsageError(
            f"baselines = True with {training.plan.codec!r}.",
            "baselines = False.",
            "the baselines train on the rows of the clients without noise, and their metrics would be printed.",
            Change("baselines", False),
        )
