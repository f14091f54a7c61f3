"""The contract of local parts, checked on a small federation of clients of several sizes.

Tests: tests/conformance/test_parts.py
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from atoll.base.random import Key, user_scope
from atoll.compute.batches import ClientBatch
from atoll.compute.layout import Layout
from atoll.compute.model_state import split_of
from atoll.compute.task import Task
from atoll.data.clients import Clients, offsets_of
from atoll.data.rows import ArrayRows
from atoll.plan.aggregate import Mean
from atoll.plan.local import Train
from atoll.plan.optimizer.rules import sgd
from atoll.plan.protocols import Broadcast, Contribution, Finished, Ids, Pull, StepFacts, Tensors, Total
from atoll.testing.contract import (
    check_declared,
    check_value,
    conformity,
    lanes,
    leading,
    pure,
    require,
    round_info,
    row,
    same,
    same_names,
)

SIZES = (18, 18, 17, 5, 5, 4, 2)  # 18 and 17 rows share a width


def problem(norm: bool = False, dtype: torch.dtype = torch.float32, linear: bool = False) -> Task:
    """A classifier with three features and three classes for `clients()`, with or without batch statistics."""
    with user_scope(Key(7).fold("model")):
        middle: nn.Module = nn.BatchNorm1d(4) if norm else nn.Tanh()
        module: nn.Module = nn.Linear(3, 3) if linear else nn.Sequential(nn.Linear(3, 4), middle, nn.Linear(4, 3))
    return Task.of(module, "cross_entropy", ("accuracy",), dtype)


def clients(sizes: tuple[int, ...] = SIZES) -> Clients:
    """Clients with `sizes` rows. A row has three features and one of three classes."""
    rows, key = sum(sizes), Key(7).fold("data")
    x = key.fold("x").normal(rows * 3, torch.float32).reshape(rows, 3)
    y = key.fold("y").integers(rows, 3)
    offsets = offsets_of(torch.tensor(sizes))
    return Clients("check", ArrayRows(x, y), torch.arange(rows), offsets, None, "classification", tuple("abc"), (3,))


@conformity
def check_local(part: Any, linear: bool = False) -> None:
    """Check the contract of a local part.

    It returns one row per client: float means, sums with the number of rows that they cover, and as weight the number
    of rows of the client. The row of a client depends neither on the other clients of the chunk nor on their
    number. Memory and server state keep names, shapes and dtypes. Means and sums are as declared. Results depend only
    on the key and the arguments. The check uses a model with and a model without batch statistics, on the backend that
    the part requires (`numerics`), else on `lanes`.

    Args:
        part: a local part, as `atoll.plan.protocols.Local` declares it.
        linear: whether the part needs a model of one linear layer.
    Raises:
        Nonconformity: the part breaks the contract.
    Example:
        >>> from atoll.plan.local import Gradient
        >>> check_local(Gradient(batch=4))
    """
    check_value(part)
    data = clients()
    for norm in (False,) if linear else (False, True):
        task = replace(problem(norm=norm, linear=linear), numerics=part.numerics or "lanes")
        for ids in _chunks(part, data):
            _check_chunk(part, task, data, ids)


@conformity
def check_correction(part: Any) -> None:
    """Check the contract of a correction of local training, as a part of `Train(..., correction=part)`.

    `pull` and `finish` return their named tuples, with tensors of the dtype and shape of θ, and change no argument. The
    further checks are those of `check_local`.

    Args:
        part: a correction, as `atoll.plan.protocols.Correction` declares it.
    Raises:
        Nonconformity: the part breaks the contract.
    Example:
        >>> from atoll.plan.local import Proximal
        >>> check_correction(Proximal(0.1))
    """
    check_value(part)
    local = Train(sgd(0.1), steps=2, batch=4, correction=part)
    task, data, ids = problem(), clients(), torch.arange(3)
    broadcast = Broadcast(0, task.initial(), {"local": {}, "correction": part.server(task.layout), "codec": {}})
    memory, batch = lanes(part.memory(task.layout), len(ids)), _lanes(task, data, ids)
    steps = torch.full_like(ids, 2)
    facts = StepFacts(0.1, 0.0, batch.rows, steps, None, batch.class_counts)
    pull = pure(f"{part!r}.pull", part.pull, broadcast, memory, facts)
    require(isinstance(pull, Pull), f"{part!r}.pull gave {pull!r}.", "a Pull.", "the backends read its fields.")
    for name in ("start", "anchor", "shift", "offset"):
        tensor = getattr(pull, name)
        shapes = ((task.layout.d,), (len(ids), task.layout.d))
        require(
            tensor is None or (tensor.shape in shapes and tensor.dtype == task.layout.dtype),
            f"{part!r}.pull gave {name} as {None if tensor is None else (tensor.dtype, list(tensor.shape))}.",
            f"None, or {task.layout.dtype} [d] or [K, d].",
            "the backends add it to the parameters of each client.",
        )
    update = torch.zeros(len(ids), task.layout.d, dtype=task.layout.dtype)
    facts = facts._replace(weights=steps.double(), loss=torch.ones(len(ids)), gradient=torch.ones_like(update))
    found = pure(f"{part!r}.finish", part.finish, broadcast, memory, update, facts)
    require(isinstance(found, Finished), f"{part!r}.finish gave {found!r}.", "a Finished.", "its fields are joined.")
    check_local(local)


def _chunks(part: Any, data: Clients) -> list[Tensor]:
    """Group client ids by the padded length of their batches. An engine computes clients of equal length together."""
    widths = [part.padded_batch(n) for n in data.sizes.tolist()]
    require(
        all(isinstance(w, int) and w >= 1 for w in widths),
        f"{part!r}.padded_batch gave {widths}.",
        "a positive int for each size.",
        "it is the padded length of a client's batch.",
    )
    ids = torch.arange(data.count)
    return [ids[torch.tensor([w == width for w in widths])] for width in sorted(set(widths))]


def _check_chunk(part: Any, task: Task, data: Clients, ids: Tensor) -> None:
    subject, k, layout = f"{part!r}.contribute", len(ids), part.server_layout(task.layout)
    model = split_of(task.layout, layout).shared(task.initial())
    first, server = part.first_memory(task), part.server(layout)
    memory = lanes(first, k)
    for t in range(2):
        broadcast = Broadcast(t, model, {"local": server, "codec": {}})
        key = Key(7).fold("round", t, "clients", "local")
        given, after = pure(subject, part.contribute, broadcast, _lanes(task, data, ids), memory, key.of(ids), task)
        _check_contribution(subject, given, data.sizes[ids], layout)
        check_declared(subject, part.declare(task), given.means, given.sums)
        same_names(f"{subject}: memory", first, after, (k,))
        for i in range(k if t == 0 and k > 1 else 0):
            one = ids[i : i + 1]
            single = part.contribute(broadcast, _lanes(task, data, one), row(memory, i), key.of(one), task)
            require(
                same(single, row((given, after), i)),
                f"{subject} gave client {int(one)} other numbers if {k - 1} other clients are in the batch.",
                "the same bits.",
                "the number of clients that are computed together must change no bit.",
            )
        _check_settle(part, given, server)
        memory = dict(after)


def _lanes(task: Task, data: Clients, ids: Tensor) -> ClientBatch:
    return ClientBatch(data, ids, task.layout.dtype)


def _check_contribution(subject: str, given: Contribution, sizes: Tensor, layout: Layout) -> None:
    k = len(sizes)
    require(isinstance(given, Contribution), f"{subject} gave {given!r}.", "a Contribution.", "the server adds it.")
    for name in ("means", "sums", "per_client"):
        leading(f"{subject}: {name}", getattr(given, name), k)
    leading(f"{subject}: counters", given.counters, k, whole=True)
    for name, length in (("update", layout.d), ("buffers", layout.b)):
        mean = given.means.get(name)
        require(
            mean is None or (mean.shape == (k, length) and mean.dtype == layout.dtype),
            f"{subject} gave {name} as {None if mean is None else (mean.dtype, list(mean.shape))}.",
            f"{layout.dtype} [{k}, {length}].",
            "an update is a vector of the same kind as the model.",
        )
    _check_finite(subject, {**given.means, **given.sums})
    require(
        same(given.weight, sizes),
        f"{subject} gave the weights {given.weight.tolist()}.",
        f"int64, the rows that each client holds: {sizes.tolist()}.",
        "the weight counts all rows of a client, also if it used fewer in this round.",
    )
    require(
        not given.sums or "rows" in given.sums,
        f"{subject} gave the sums {sorted(given.sums)}.",
        "a sum named rows: the number of rows that the other sums cover.",
        "a metric is a sum divided by its number of rows.",
    )


def _check_finite(subject: str, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        good = bool(torch.isfinite(tensor).all())
        require(
            good, f"{subject}: {name} is not finite.", "finite numbers.", "the data are finite and the step is small."
        )


def _check_settle(part: Any, given: Contribution, server: Tensors) -> None:
    rule = Mean()
    starts = Ids(torch.arange(len(given.weight)), torch.zeros_like(given.weight))
    total: Total = rule.total(rule.fold(rule.zero(), given, starts))

    def updated(total: Total, server: Tensors) -> tuple[Total, Tensors]:
        return part.server_update(total, server, round_info(), Key(7).fold("settle"))  # type: ignore[no-any-return]

    settled, after = pure(f"{part!r}.server_update", updated, total, server)
    same_names(f"{part!r}.server_update: server", server, after)
    same_names(f"{part!r}.server_update: means", total.means, settled.means)
