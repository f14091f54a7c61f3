"""The models of single clients in a training, each evaluated on the held-out rows of its own client.

A client has a model of its own if it has an own part, or a second model of `Ditto`. With the setting `tune`, a copy of
its model, or of the server's, is first trained on the rows of the client. The state of the training does not change.

Tests: tests/surface/test_personal_runs.py
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from atoll.base.errors import RunError, UsageError
from atoll.base.lines import Change
from atoll.compute.metric_names import PERSONAL
from atoll.compute.task import Task
from atoll.data.clients import Clients
from atoll.data.schema import Schema
from atoll.engine.inprocess import InProcessEngine
from atoll.engine.protocols import SiteScores
from atoll.plan.aggregate import Mean
from atoll.plan.in_flight import InFlight
from atoll.plan.local import Train
from atoll.plan.local.evaluate import SCORE, ScorePersonal
from atoll.plan.plan import Plan
from atoll.plan.protocols import Cohort
from atoll.plan.state import State
from atoll.training.evaluation import HeldOutValues, of_sites, over_clients
from atoll.training.settings import Settings

_SHOWN = ("clients", "worst10", "min", "sd")  # of a metric over clients; the first one is their mean


def check_tune(plan: Plan, data: Clients | Schema, settings: Settings) -> None:
    """Refuse fine-tuning at each evaluation, if no client is evaluated on rows of its own.

    Raises:
        UsageError: no held-out row belongs to a client, only all rows together are evaluated, the plan has noise, or it
            has a secure sum and `evaluate` is not set.
    """
    if settings.tune is None:
        return
    why, unasked = "", settings.evaluate is None and plan.aggregator.secure is not None
    if not isinstance(data, Clients) or not data.count:
        why = "the rows of clients are on their own machines"
    elif data.held_owner is None:
        why = "no held-out row belongs to a client"
    elif settings.evaluate == "pooled" or not settings.evaluate_every:
        why = "clients are not evaluated"
    elif plan.releases:
        why = "a plan with noise shows no values of clients"
    elif unasked:
        why = "a run with a secure sum shows values of clients only on request"
    if why:
        raise UsageError(
            f"tune={settings.tune!r}, and {why}.",
            "clients that are evaluated on held-out rows of their own.",
            "each client tunes a copy of the model on its own rows, and evaluates it on its own held-out rows.",
            Change("evaluate", "both") if settings.evaluate == "pooled" or unasked else "",
        )


def held_by_client(data: Clients) -> Clients | None:
    """The held-out rows of each client, under its id, with its feature shift; None if none belongs to a client."""
    rows = data.held_out if data.held_view is None else data.held_view
    if rows is None or data.held_owner is None:
        return None
    order = torch.argsort(data.held_owner, stable=True)
    order = order[int((data.held_owner < 0).sum()) :]
    counts = data.held_owner[data.held_owner >= 0].bincount(minlength=data.count)
    offsets = torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0)))
    return replace(data, rows=rows, order=order, offsets=offsets, held_out=None, held_owner=None, held_view=None)


def values_of_clients(
    plan: Plan, state: State, engine: InProcessEngine, held: Clients, ids: Tensor, tune: Train | None
) -> HeldOutValues:
    """The values of the model of each client on its own held-out rows.

    Args:
        plan: the plan of the training.
        state: its state, with the model that is evaluated.
        engine: of the train rows.
        held: the result of `held_by_client`.
        ids: the clients, int64 `[n]`.
        tune: the training of a copy of each model before its evaluation, or None.
    Returns:
        `metrics` with `personal_M`, the mean over clients with equal weights, `personal_M_worst10`, `personal_M_min`
        and `personal_M_sd` for each M, and `clients` with `personal_M` of each of these clients, `[n]`.
    Raises:
        RunError: a client cannot be evaluated.
    """
    counts = (held.offsets[1:] - held.offsets[:-1]).cpu()
    some = ids[counts[ids] > 0]
    chance = torch.ones((), dtype=torch.float64)
    judge, state = Plan(ScorePersonal(plan.local, held, tune), Mean()), replace(state, air=InFlight(), versions={})
    gathered = engine.gather(judge, state, Cohort(some, chance), state.key().fold("personal"))
    if gathered.failures:
        first = gathered.failures[0]
        raise RunError(
            f"The evaluation of client {first.client} failed. {first.cause.rstrip('.')}.",
            "readable, finite rows.",
            "a mean over the other clients is another metric.",
        )
    arrived = gathered.arrived.cpu()
    sums = {n.removeprefix(SCORE): t.cpu() for n, t in gathered.facts.items() if n.startswith(SCORE)}
    return of_models(engine.task, SiteScores(("",) * len(arrived), counts[arrived], sums), arrived, ids)


def of_models(task: Task, scores: SiteScores, arrived: Tensor, ids: Tensor) -> HeldOutValues:
    """The values of the models of clients, as `values_of_clients` returns them, from sums.

    Args:
        task: the metrics.
        scores: the sums of each client that arrived.
        arrived: the ids of these clients, int64, ascending.
        ids: the clients, int64 `[n]`.
    """
    each = of_sites(task, scores).clients
    rises = {"held_out_loss": False} | {m.name: m.higher_is_better for m in task.metrics}
    found, place = HeldOutValues({}), torch.searchsorted(arrived, ids).clamp(max=max(len(arrived) - 1, 0))
    for name, rising in rises.items():
        if name not in each:
            continue
        values = torch.where(arrived[place] == ids, each[name].double()[place], torch.nan)
        over = over_clients(name, values, rising)
        shown = {of: over[f"{name}_{of}"] for of in _SHOWN if f"{name}_{of}" in over}
        found.metrics.update({f"{PERSONAL}{name}{'' if of == 'clients' else f'_{of}'}": v for of, v in shown.items()})
        found.clients[f"{PERSONAL}{name}"] = values
    return found
