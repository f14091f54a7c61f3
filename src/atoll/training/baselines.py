"""Baselines of a federated run: a constant, training on all rows in one place, and training of each client by itself.

    constant           the class shares, or the mean of y, of all train rows
    constant_clients   the same of each client's train rows, for its own held-out rows
    pooled             one client that has every training row trains with the local part of the run
    local              each client trains on its own rows only

The constants are part of every run with held-out rows. The trained baselines start from the first model of the run and
see the same number of samples. A client that is selected with probability q trains in round(q·T) of the T rounds. These
rounds are evenly spaced, so that a schedule passes through all its rates. The pooled client trains in the number of
rounds, or with the number of steps per round, in which it sees the samples of the whole cohort. There is no server: a
client keeps the model that it trained. If clients send gradients, the client uses the optimizer of the server.

Tests: tests/identities/test_baselines.py
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from atoll.base.errors import RunError
from atoll.base.random import Key, user_scope
from atoll.compute.metric_names import PERSONAL
from atoll.compute.model_state import Model
from atoll.engine.client_state import Memory
from atoll.engine.contribution import contribute_chunk
from atoll.engine.inprocess import InProcessEngine, threads_for
from atoll.plan.aggregate import Mean, Sum
from atoll.plan.aggregate.exact import LARGEST
from atoll.plan.buffers import join_buffers
from atoll.plan.local import Gradient, Train
from atoll.plan.optimizer.base import OptimizerBase
from atoll.plan.optimizer.rules import sgd
from atoll.plan.plan import Plan
from atoll.plan.protocols import Broadcast, Cohort, Ids, Local, Population, Sampler
from atoll.plan.round import bind, step
from atoll.plan.schedule import NOTHING, Schedule, Tensors
from atoll.plan.state import State
from atoll.training.evaluation import HeldOutValues, constant_answer, over_clients
from atoll.training.rounds import Training

MAX_CLIENTS = 200  # largest number of clients that train one by one
_LANE_BYTES = 256 << 20


@user_scope(Key(0).fold("tool"))
def compare_constants(training: Training) -> dict[str, dict[str, Any]]:
    """Evaluate the final model and the constant answers on the held-out rows.

    Args:
        training: a training; it is not changed.
    Returns:
        `federated`: the metrics of the final model, `samples` and `steps`; `constant`; and `constant_clients` if the
        rows of each client are evaluated. Each has `intervals`: the 95 % interval of a metric
        as [low, high, rows]. {} without held-out rows.
    """
    if training.data.held_out is None:
        return {}
    data, owner = training.data, training.held_owner
    if not data.count:  # a server has no train rows
        return {"federated": _row(training.final_values())}
    found = {"federated": _row(training.final_values()) | _work(training)} | _personal(training)
    constants = {"constant": constant_answer(training.task, data, owner, training.evaluated.count)}
    if owner is not None:
        constants["constant_clients"] = constant_answer(training.task, training.evaluated, owner, own=True)
    return found | {name: _row(values) for name, values in constants.items() if values.metrics}


@user_scope(Key(0).fold("tool"))
def compare_baselines(training: Training) -> dict[str, dict[str, Any]]:
    """Train the pooled and local-only baselines of a run: same model, lr, batch and number of samples seen.

    Args:
        training: a training with at least one round; it is not changed.
    Returns:
        Plain values. `pooled` contains `held_out_loss`, every metric M, `intervals`, and `samples` and `steps`, the
        numbers of samples seen and of optimizer steps.

        `local` contains `clients`, the number of trained clients, at most 200, selected at random from all `population`
        clients; the mean of `samples` and `steps` over clients; and for each metric M the mean over the models of the
        clients, each evaluated on all held-out rows, with `M_models_sd`, `M_models_min` and `M_models_max`. If the rows
        of each client are evaluated, `M_clients`, `M_median`, `M_worst10`, `M_min` and `M_sd` are those of each model
        on the held-out rows of its own client. For the selection metric `metric` there are then `federated_better`, the
        number of clients for which the federated model is better on their own rows, `compared`, the number of clients
        with both values, and `median_difference` and `worst_difference` over these clients; positive: federated is
        better.

        If a model becomes non-finite, its last finite state is evaluated. `diverged` is then the round in which the
        pooled model diverged, or the number of clients that diverged. Without held-out rows no model can be evaluated,
        and `skipped` contains the `reason`.
    Example:
        >>> import atoll
        >>> data = atoll.data.load("digits").split(clients=5)
        >>> training = atoll.rounds("softmax", data, atoll.recipes.fedavg(lr=0.1), rounds=2)
        >>> reports = list(training)
        >>> {name: sorted(values)[:2] for name, values in compare_baselines(training).items()}
        {'pooled': ['accuracy', 'balanced_accuracy'], 'local': ['accuracy', 'accuracy_models_max']}

    Reference: McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data, 2017.
    """
    reason = (
        "there are no held-out rows to evaluate a model on: data.split(held_out=0.2)"
        if training.data.held_out is None
        else ""
        if training.state.round
        else "no round was run"
    )
    if reason:
        return {"skipped": {"reason": reason}}
    with threads_for(training.task):
        return {"pooled": pooled(training), "local": alone(training)}


def pooled(training: Training) -> dict[str, Any]:
    """Train one client that has every row, and evaluate its model; see `compare_baselines`."""
    data, count = training.data.pooled(), training.state.round
    plan, share = _gathered(_solo(training.plan), training.data.sizes, _chances(training))
    # The loop is the fastest backend for one client. Another backend changes only the last bits.
    task = replace(training.task, module=copy.deepcopy(training.task.module), numerics="loop")
    state, failed = _train(training, InProcessEngine(task, data), plan, _turns(torch.tensor([share]), count)[:, 0], 0)
    out = _row(training.values_of(state.model))
    turns, rows = float(_turns(torch.tensor([share]), count).sum()), data.sizes.double()
    out |= {"samples": round(turns * float(_seen(plan.local, rows)))}
    steps = _steps(plan.local, rows)
    out |= {} if steps is None else {"steps": round(turns * float(steps))}
    return out | ({} if failed is None else {"diverged": failed})


def alone(training: Training) -> dict[str, Any]:
    """Train each client on its own rows, and evaluate each model on all rows and its own; see `compare_baselines`."""
    population = training.data.count
    ids = torch.arange(population)
    if population > MAX_CLIENTS:
        ids = Key(training.settings.seed).fold("baselines").distinct(MAX_CLIENTS, population).sort().values
    plan = _solo(training.plan)
    turns = _turns(_chances(training)[ids], training.state.round)
    lanes = _in_lanes(training, plan)
    models = _many(training, plan, ids, turns) if lanes else _one_by_one(training, plan, ids, turns)
    values, diverged = dict[int, HeldOutValues](), 0
    for at, model, finite in models:
        values[at] = training.values_of(model, int(ids[at]))
        diverged += not finite
    out = _over_models(training, ids, [values[at] for at in range(len(ids))])
    rows, trained = training.data.sizes[ids].double(), turns.sum(0)
    out |= {"clients": len(ids), "population": population}
    out |= {"samples": round(float((trained * _seen(plan.local, rows)).mean()))}
    steps = _steps(plan.local, rows)
    out |= {} if steps is None else {"steps": round(float((trained * steps).mean()))}
    return out | ({"diverged": diverged} if diverged else {})


def _personal(training: Training) -> dict[str, dict[str, Any]]:
    """`personal`: each metric over the models of clients, on the held-out rows of each; {} if there are none."""
    rises = {"held_out_loss": False} | {m.name: m.higher_is_better for m in training.task.metrics}
    each = {n: training.evaluation.clients.get(f"{PERSONAL}{n}") for n in rises}
    found = {k: v for n, t in each.items() if t is not None for k, v in over_clients(n, t, rises[n]).items()}
    return {"personal": {**found, **_defined({n: t for n, t in each.items() if t is not None})}} if found else {}


def _row(values: HeldOutValues) -> dict[str, Any]:
    """The metrics of a model, and their intervals as lists, as JSON stores them."""
    intervals = {n: [i.low, i.high, i.rows] for n, i in values.intervals.items()}
    return {**values.metrics, "intervals": intervals, **_defined(values.clients)}


def _defined(clients: Mapping[str, Tensor]) -> dict[str, dict[str, int]]:
    """`defined`: the number of clients that have a value of each metric, over which its mean is taken."""
    counts = {name: int((~values.isnan()).sum()) for name, values in clients.items() if name != "rows"}
    return {"defined": counts} if counts else {}


def _over_models(training: Training, ids: Tensor, values: list[HeldOutValues]) -> dict[str, Any]:
    """Each metric over the models of clients: on all held-out rows, and on the rows of the client of each model."""
    out: dict[str, Any] = {}
    rises = {"held_out_loss": False} | {m.name: m.higher_is_better for m in training.task.metrics}
    for name, rising in rises.items():
        each = torch.tensor([v.metrics.get(name, math.nan) for v in values], dtype=torch.float64)
        defined = each[~each.isnan()]
        if len(defined):
            spread = {"sd": defined.std(correction=0), "min": defined.min(), "max": defined.max()}
            out |= {name: float(defined.mean())} | {f"{name}_models_{n}": float(v) for n, v in spread.items()}
        if training.by_client:
            own = torch.stack([v.clients[name][0] for v in values]).double()
            out |= over_clients(name, own, rising)
            out.setdefault("defined", {}).update(_defined({name: own})["defined"])
            chief = training.selection_metric[0]
            if name == chief.removeprefix(PERSONAL):
                training.final_values()
                out |= _differences(name, training.values_by_client(ids)[chief].double(), own, rising)
    return out


def _differences(name: str, federated: Tensor, local: Tensor, rising: bool) -> dict[str, Any]:
    """Compare two models on each client's own rows, over the clients with both values; a gain is positive."""
    gain = federated - local if rising else local - federated
    gain = gain[~gain.isnan()]
    if not len(gain):
        return {}
    return {
        "metric": name,
        "federated_better": int((gain > 0).sum()),
        "compared": len(gain),
        "median_difference": float(gain.quantile(0.5)),
        "worst_difference": float(gain.min()),
    }


def _work(training: Training) -> dict[str, int]:
    """The expected numbers of samples that all clients saw, and of local steps from the first model to the last.

    {} if the clients of the run are not known here.
    """
    local, rows, rounds = training.plan.local, training.data.sizes.double(), training.state.round
    if not len(rows) or not rounds:
        return {}
    chance = _chances(training)
    out = {"samples": round(rounds * float((chance * _seen(local, rows)).sum()))}
    steps = _steps(local, rows)
    return out if steps is None else out | {"steps": round(rounds * float((chance * steps).sum() / chance.sum()))}


@dataclass(frozen=True, repr=False)
class _Only(Sampler):
    """A sampler that selects one client in every round."""

    client: int

    def __call__(self, population: Population, round: int, key: Key) -> Cohort:
        return Cohort(torch.tensor([self.client]), torch.tensor(1.0, dtype=torch.float64))


def _solo(plan: Plan) -> Plan:
    """The plan of a single client: the local part, no compression, and the server optimizer only for gradients.

    A correction is for clients that differ, so a client alone has none.
    """
    if plan.local.needs_everyone:  # its one client is the whole population
        return Plan(plan.local, Mean(), sgd(1.0))
    if not isinstance(plan.local, Gradient):
        local = plan.local
        if isinstance(local, Train):
            local = replace(local, correction=None, own=(), alternate=False)
        return Plan(local, Mean(weights="equal", sum="float"), sgd(1.0))
    # With Sum() the learning rate is chosen for gradients that are multiplied by the number of rows.
    rule = plan.aggregator if isinstance(plan.aggregator, Sum) else Mean(weights="equal", sum="float")
    return Plan(plan.local, rule, plan.optimizer)


def _chances(training: Training) -> Tensor:
    """The probability that a client is selected in a round, float64 `[C]`."""
    population = Population(training.data.count, training.data.sizes)
    key = Key(training.settings.seed).fold("round", 0).fold("cohort")
    chance = training.plan.sampler(population, 0, key).chance
    return chance.to(torch.float64).expand(training.data.count)


def _turns(chance: Tensor, rounds: int) -> Tensor:
    """The rounds in which a client with selection probability `chance` trains: bool `[rounds, len(chance)]`."""
    works = (chance.double() * rounds).round().clamp(1, rounds).long()
    t = torch.arange(rounds)[:, None]
    return (t + 1) * works // rounds > t * works // rounds


def _seen(local: Local, rows: Tensor) -> Tensor:
    """The number of samples that a client with this number of rows sees in one round."""
    if isinstance(local, Gradient):
        return rows if local.batch is None else rows.clamp(max=local.batch)
    if isinstance(local, Train) and local.steps is not None:
        return (local.steps_at(0) or 1) * (rows if local.batch is None else rows / (rows / local.batch).ceil())
    return local.examples_per_round(rows)


def _steps(local: Local, rows: Tensor) -> Tensor | None:
    """The number of optimizer steps of a client with this number of rows in one round; None if the part has its own."""
    if isinstance(local, Gradient):
        return torch.ones_like(rows)
    if not isinstance(local, Train):
        return None
    if local.epochs is not None:
        return local.epochs * (torch.ones_like(rows) if local.batch is None else (rows / local.batch).ceil())
    return torch.full_like(rows, local.steps_at(0) or 1)


@dataclass(frozen=True, repr=False)
class _Times(Schedule):
    """A schedule of steps, multiplied for a client that does the work of several clients."""

    steps: Schedule
    ratio: float

    def __call__(self, t: int, memory: Tensors = NOTHING) -> float:
        return round(self.steps(t)) * self.ratio


def _gathered(plan: Plan, sizes: Tensor, chance: Tensor) -> tuple[Plan, float]:
    """The plan of the pooled client, and the fraction of rounds in which it sees the samples of the cohort."""
    local = plan.local
    rows = sizes.double()
    ratio = float((chance * _seen(local, rows)).sum() / _seen(local, rows.sum()))
    if ratio <= 1:
        return plan, ratio
    if isinstance(local, Train) and local.steps is not None:
        steps = _Times(local.steps, ratio) if isinstance(local.steps, Schedule) else round(local.steps * ratio)
        return replace(plan, local=replace(local, steps=steps)), 1.0
    if isinstance(local, Gradient) and isinstance(plan.optimizer, OptimizerBase) and round(ratio) > 1:
        local = Train(plan.optimizer, steps=round(ratio), batch=local.batch, keep=("optimizer", "order"))
        return Plan(local, Mean(weights="equal", sum="float"), sgd(1.0)), 1.0
    return plan, 1.0


def _train(
    training: Training, engine: InProcessEngine, plan: Plan, turns: Tensor, client: int
) -> tuple[State, int | None]:
    """Train one client. Returns the last good state, and the round that failed or became non-finite, if any."""
    plan = bind(replace(plan, cohort=_Only(client)), engine)
    memory = Memory(plan.memory(training.task))
    state = State.first(plan, training.task, training.settings.seed, memory, training.first)
    for t in turns.nonzero().squeeze(1).tolist():
        try:
            state, _ = step(plan, replace(state, round=t), engine)
        except RunError:
            return state, t
    return state, None


def _one_by_one(training: Training, plan: Plan, ids: Tensor, turns: Tensor) -> Iterator[tuple[int, Model, bool]]:
    """Train each client with `step`. This works for any local part. Place in `ids`, model, and whether it is finite."""
    engine = InProcessEngine(training.task, training.data)
    for at, client in enumerate(ids.tolist()):
        if plan.local.needs_everyone:
            single = InProcessEngine(training.task, training.data.only([client]))
            state, failed = _train(training, single, plan, turns[:, at], 0)
        else:
            state, failed = _train(training, engine, plan, turns[:, at], client)
        yield at, state.model, failed is None


def _in_lanes(training: Training, plan: Plan) -> bool:
    """Whether several clients can train as lanes of one batch: the server keeps no state that differs between them."""
    rule = plan.optimizer
    return (
        training.task.numerics == "lanes"
        and isinstance(plan.local, (Train, Gradient))
        and not plan.local.server(training.task.layout)
        and isinstance(plan.aggregator, Mean)
        and isinstance(rule, OptimizerBase)
        and not rule.schedule.init()
    )


def _many(training: Training, plan: Plan, ids: Tensor, turns: Tensor) -> Iterator[tuple[int, Model, bool]]:
    """Train clients as lanes, in batches whose memory is limited. Place in `ids`, model, and whether it is finite."""
    each = 8 * training.task.layout.d * training.task.layout.dtype.itemsize
    largest = max(2, min(64, _LANE_BYTES // each))
    order = torch.argsort(training.data.sizes[ids], descending=True, stable=True)
    widths = torch.tensor([plan.local.padded_batch(n) for n in training.data.sizes[ids[order]].tolist()])
    for width in widths.unique().tolist():
        for at in order[widths == width].split(largest):
            model, finite = _lanes(training, plan, ids[at], turns[:, at])
            for lane, (place, good) in enumerate(zip(at.tolist(), finite.tolist(), strict=True)):
                yield place, model.of(lane), good


Groups = dict[str, dict[str, Tensor]]  # tensors `[K, …]` of K clients: model, counters, optimizer, kept


def _lanes(training: Training, plan: Plan, ids: Tensor, turns: Tensor) -> tuple[Model, Tensor]:
    """The models of clients that train as lanes, as `step` trains them, and whether each model stayed finite."""
    first = training.first.lanes(len(ids))
    kept = plan.memory(training.task)
    now: Groups = {
        "model": {"theta": first.theta, "buffers": first.buffers},
        "counters": dict(first.counters),
        "optimizer": dict(plan.optimizer.init(first.theta)),
        "kept": {n: t.to(training.task.device).repeat(len(ids), *[1] * t.dim()) for n, t in kept.items()},
    }
    finite = torch.ones(len(ids), dtype=torch.bool)
    for t in range(len(turns)):
        at = (turns[t] & finite).nonzero().squeeze(1)
        if not len(at):
            continue
        everyone = len(at) == len(ids)
        before = now if everyone else {g: {n: x[at] for n, x in group.items()} for g, group in now.items()}
        after, good = _round(training, plan, ids[at], t, before)
        finite[at] = good
        for g, group in after.items():
            for name, x in group.items():
                if everyone and bool(good.all()):
                    now[g][name] = x
                else:
                    now[g][name][at[good]] = x[good]
    return Model(now["model"]["theta"], now["model"]["buffers"], now["counters"], first.fixed), finite


def _round(training: Training, plan: Plan, ids: Tensor, t: int, before: Groups) -> tuple[Groups, Tensor]:
    """One round of each client. Returns the new tensors, and whether all numbers of each client are finite."""
    task, data = training.task, training.data
    start = Model(before["model"]["theta"], before["model"]["buffers"], before["counters"], training.first.fixed)
    broadcast, key = Broadcast(t, start, {"local": {}, "codec": {}}), Key(training.settings.seed).fold("round", t)
    chunk = contribute_chunk(plan, task, data, broadcast, _starts(ids), key, before["kept"])
    given = chunk.decoded
    good = torch.ones(len(ids), dtype=torch.bool)
    for rows in (*given.means.values(), *given.sums.values()):
        good &= (rows.reshape(len(ids), -1).abs().amax(1) <= LARGEST).to(good.device)
    theta, state = plan.optimizer.update(start.theta, given.means["update"], {}, before["optimizer"], t)
    buffers, counters = join_buffers(task.layout, start.buffers, theta, given.means, given.counters)
    model = {"theta": theta, "buffers": buffers}
    after = {"model": model, "counters": {**start.counters, **counters}, "optimizer": state, "kept": chunk.memory}
    return {g: dict(group) for g, group in after.items()}, good


def _starts(clients: Tensor) -> Ids:
    """The first start of each of these clients."""
    return Ids(clients, torch.zeros_like(clients))
