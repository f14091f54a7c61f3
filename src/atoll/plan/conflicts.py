"""Checks of a plan when it is built: every slot contains a part of its kind, and no two parts exclude each other.

A rule that concerns one part is a method of that part, `conflicts(slots)`. Rules that follow from the declared members
of two slots are here. `check` raises the first conflict: of the parts in the order of slots, then of the rules here.

Tests: tests/surface/test_contract.py, tests/faults/test_bad_input.py
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from functools import cache
from types import FunctionType
from typing import Any, get_args

import torch
from torch import Tensor

from atoll.base.concepts import concept, part_for
from atoll.base.errors import UsageError
from atoll.base.lines import Change, Line, Part
from atoll.base.validation import class_instead_of_value
from atoll.compute.shapes import kind_of
from atoll.compute.task import BACKENDS, Task
from atoll.plan import protocols
from atoll.plan.aggregate.ring import grid_of
from atoll.plan.codec.stage import flat_layout
from atoll.plan.protocols import (
    OPEN,
    Aggregator,
    Conflict,
    Contribution,
    Declared,
    Local,
    Optimizer,
    Pace,
    Population,
    Sampler,
    Slots,
    Stage,
    Tensors,
    default,
)
from atoll.plan.sampler import binomial_tail
from atoll.plan.schedule import Schedule

# slot: its protocol, the class to inherit, a part that fills the slot
SLOTS: dict[str, tuple[type, str, str]] = {
    "local": (Local, "atoll.plan.protocols.Local", "Gradient()"),
    "aggregator": (Aggregator, "atoll.plan.protocols.Aggregator", "Mean()"),
    "optimizer": (Optimizer, "atoll.plan.optimizer.base.OptimizerBase", "sgd(0.1)"),
    "cohort": (Sampler, "atoll.plan.protocols.Sampler", "Uniform(10)"),
    "codec": (Stage, "atoll.plan.codec.Codec", "Identity()"),
    "pace": (Pace, "atoll.plan.protocols.Pace", "Sync()"),
    "downlink": (Stage, "atoll.plan.codec.Codec", "Identity()"),
}


def check_plan(slots: Slots) -> None:
    """Refuse a plan with a part of the wrong kind, or with two parts that exclude each other.

    Raises:
        UsageError: the error names the part or the two parts, the reason, and a part to use instead.
    """
    parts: dict[str, Any] = {
        "local": slots.local,
        "aggregator": slots.aggregator,
        "optimizer": slots.optimizer,
        "cohort": slots.sampler,
        "codec": slots.codec,
        "pace": slots.pace,
        "downlink": slots.downlink,
    }
    for slot, part in parts.items():
        check_part(slot, part)
    for conflict in plan_conflicts(slots):
        raise UsageError(*conflict)


def plan_conflicts(slots: Slots) -> Iterator[Conflict]:
    """All conflicts of a plan. The first one is the error of its construction."""
    parts = (
        ("local", slots.local),
        ("aggregator", slots.aggregator),
        ("optimizer", slots.optimizer),
        ("cohort", slots.sampler),
        ("codec", slots.codec),
        ("pace", slots.pace),
    )
    for slot, part in parts:  # a downlink has no aggregator and no clients: its rules are all in `_downlink`
        yield from _conflicts_of(slot, part, slots)
    for rules in (_backend, _codec, _values, _pace, _downlink, _sends):
        yield from rules(slots)


def check_part(slot: str, part: Any) -> None:
    """Refuse a value that is not a part of the kind that a slot requires.

    Raises:
        UsageError: a member is missing or has a wrong type. The error names the member and the class to inherit.
    """
    protocol, base, example = SLOTS[slot]
    kind = type(part).__name__
    if isinstance(part, type):
        raise class_instead_of_value(f"The slot {slot} of the plan", part)
    inherits = protocol in type(part).__mro__  # a quick answer for nearly all parts: `isinstance` reads each member
    if isinstance(part, Tensor) or not (inherits or isinstance(part, protocol)):  # a sparse tensor's members may raise
        given = f"The slot {slot} of the plan holds {part!r:.80}"
        tensor = isinstance(part, Tensor)
        _refuse_foreign(slot, part, f"{given}.")
        lacking = "" if tensor else next((n for n in _members(protocol) if not hasattr(part, n)), "")
        raise UsageError(
            f"{given}, and {kind} has no member {lacking}." if lacking else f"{given}.",
            f"a part of a class that inherits {base}.",
            "that class declares every member that the package reads, and has a default for most of them.",
            example,
        )
    for name, hint in _members(protocol).items():
        value = getattr(part, name)
        if not _fits(value, hint):
            raise UsageError(
                f"{kind}.{name} is {value!r}, in the slot {slot} of the plan.",
                f"{_named(hint)}, as {base} declares it.",
                "the package reads this member.",
                example,
            )


def _refuse_foreign(slot: str, part: Any, given: str) -> None:
    """Refuse a text, a function or an optimizer of torch in a slot; the line has the part that the user means."""
    text, of_torch = isinstance(part, str), type(part).__module__.startswith("torch.optim")
    known = part_for(slot, part) if text or of_torch or isinstance(part, FunctionType) else ""
    if not text and not known:
        return
    line = Line(python=known) if isinstance(part, FunctionType) else known  # a text has module:name for a function
    why, write = (concept(part) if text and not known else None) or ("", line)
    raise UsageError(given, f"a part of the plan, a value such as {SLOTS[slot][2]}.", why, write)


@cache
def _members(protocol: type) -> dict[str, str]:
    """The declared members of a protocol in their order, each with its type as text; a method has the type `method`."""
    out: dict[str, str] = {}
    for name, member in vars(protocol).items():
        if isinstance(member, default):
            out[name] = member.get.__annotations__["return"]  # type: ignore[attr-defined]
        elif callable(member) and (not name.startswith("_") or name == "__call__"):
            out[name] = "method"
    return out


# Annotations are compared as text: their evaluation would run code while a plan text is read.
_LITERALS = {
    "Sends": get_args(protocols.Sends),
    "Weights": get_args(protocols.Weights),
    "Over": get_args(protocols.Over),
    "SumKind": get_args(protocols.SumKind),
}
_TYPES: dict[str, type | tuple[type, ...]] = {
    "bool": bool,
    "int": int,
    "float": (int, float),
    "str": str,
    "None": type(None),
    "Schedule": Schedule,
}


def _fits(value: Any, hint: str) -> bool:
    """Whether a value is of a declared type; a type that no rule here covers admits every value."""
    if hint == "method":
        return callable(value)
    return any(_fits_one(value, part) for part in hint.split(" | "))


def _fits_one(value: Any, hint: str) -> bool:
    if hint in _LITERALS:
        return isinstance(value, str) and value in _LITERALS[hint]
    if hint.startswith("tuple"):
        return isinstance(value, tuple)
    if hint in ("int", "float") and isinstance(value, bool):
        return False
    return isinstance(value, _TYPES.get(hint, object))


def _named(hint: str) -> str:
    """A declared type in words."""
    words = {"method": "a method", "bool": "True or False"}
    return " or ".join(
        " or ".join(map(repr, _LITERALS[part])) if part in _LITERALS else words.get(part, part)
        for part in hint.split(" | ")
    )


def _conflicts_of(slot: str, part: Any, slots: Slots) -> Iterator[Conflict]:
    """The conflicts that a part names."""
    try:
        found = list(part.conflicts(slots))
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(
            f"{type(part).__name__}.conflicts of {part!r} raised {type(error).__name__}: {error}.",
            "an iterable of atoll.plan.protocols.Conflict.",
            f"the plan asks the part in its slot {slot} for the parts that it excludes.",
            SLOTS[slot][2],
        ) from error
    for conflict in found:
        if not isinstance(conflict, Conflict) or not all(isinstance(text, str) for text in conflict):
            raise UsageError(
                f"{type(part).__name__}.conflicts of {part!r} gave {conflict!r}.",
                "atoll.plan.protocols.Conflict, four texts.",
                f"the plan asks the part in its slot {slot} for the parts that it excludes.",
                SLOTS[slot][2],
            )
        yield conflict


def _backend(slots: Slots) -> Iterator[Conflict]:
    local = slots.local
    if local.numerics is not None and local.numerics not in BACKENDS:
        given = f"{type(local).__name__}.numerics is {local.numerics!r}, in the slot local of the plan."
        yield Conflict(given, f"None, or one of {', '.join(BACKENDS)}.", "no other backend exists.", "Gradient()")


def _codec(slots: Slots) -> Iterator[Conflict]:
    rule, codec = slots.aggregator, slots.codec
    if not rule.linear and codec.per_sum:
        why = "the codec is decoded once on the sum, and this rule forms no sum."
        yield Conflict(f"{rule!r} with the codec {codec!r}.", "an aggregator that is linear.", why, "Mean()")


def _values(slots: Slots) -> Iterator[Conflict]:
    rule, codec, sampler = slots.aggregator, slots.codec, slots.sampler
    if not sampler.needs_values:
        return
    why = "the sampler reads values of single clients, which the server does not receive."
    if rule.secure is not None:
        yield Conflict(f"{sampler!r} with {rule!r}.", "a cohort that needs no values.", why, "Uniform(10)")
    if codec.event(1.0) is not None:
        yield Conflict(f"{sampler!r} with {codec!r}.", "a cohort that needs no values.", why, "Uniform(10)")


def _pace(slots: Slots) -> Iterator[Conflict]:
    rule, pace, sampler = slots.aggregator, slots.pace, slots.sampler
    if pace.partial and not slots.local.can_stop_early:
        why = "only local training can stop early: the steps that it has made are an update."
        write = "Train(sgd(0.1), epochs=1, batch=10)"
        yield Conflict(f"{slots.local!r} with {pace!r}.", "Train(...).", why, write)
    if pace.asynchronous and not rule.linear:
        why = "updates of several model versions are decoded and weighted as sums, and this rule forms no sum."
        yield Conflict(f"{rule!r} with {pace!r}.", "an aggregator that is linear.", why, "Mean()")
    if pace.cohort_size(1000) > 1000 and sampler.resized(pace.cohort_size) is None:
        why = "the sampler cannot select more clients."
        yield Conflict(f"{sampler!r} with {pace!r}.", "a cohort of n out of more clients.", why, "Uniform(10)")


def _downlink(slots: Slots) -> Iterator[Conflict]:
    codec, layout = slots.downlink, flat_layout(64)
    contraction = codec.contraction()
    if codec.uses_entropy:
        why = "the server sends the change of the model, and no part draws noise for it."
        yield Conflict(f"downlink={codec!r}.", "a codec without noise.", why, "Identity()")
    elif codec.needs_model_coordinates or codec.memory(layout) or codec.server(layout):
        why = "the next change contains the error of the last one, since the server knows the clients' θ."
        yield Conflict(f"downlink={codec!r}.", "a codec without state between rounds.", why, _stateless(codec))
    elif contraction != codec:
        why = "its error can exceed its input, and the clients' θ would drift away from θ."
        yield Conflict(f"downlink={codec!r}.", "a codec whose error is less than its input.", why, repr(contraction))


def _stateless(codec: Stage) -> str:
    """The text of the stages of a codec that keep no state; a wrapper counts as the stages in it."""
    layout = flat_layout(64)
    plain = [
        repr(stage)
        for stage in _leaves(codec)
        if not (stage.needs_model_coordinates or stage.memory(layout) or stage.server(layout))
    ]
    return " >> ".join(plain) or "TopK(0.1)"


def _leaves(codec: Stage) -> Iterator[Stage]:
    if not codec.parts:
        yield codec
    for part in codec.parts:
        yield from _leaves(part)


def _sends(slots: Slots) -> Iterator[Conflict]:
    local, rule, codec = slots.local, slots.aggregator, slots.codec
    if local.sends != "model":
        return
    if not rule.linear:
        why = "the server relates the clients' models to its own θ as a sum, and this rule forms no sum."
        yield Conflict(f"{local!r} with {rule!r}.", "an aggregator that is linear.", why, "Mean()")
    if codec.averages_all_clients:
        required, why = "a codec whose server keeps no updates.", "the kept updates are relative to an older θ."
        yield Conflict(f"{local!r} with {codec!r}.", required, why, _stateless(codec))


def undeclared(declared: Mapping[str, Declared], means: Tensors, sums: Tensors) -> tuple[str, str]:
    """The first name of a contribution that differs from its declaration, and the difference; empty if there is none.

    Args:
        declared: the declaration of each name; the name `"*"` allows further names.
        means: tensors `[K, length]`; the keys are the names of means.
        sums: tensors `[K]` or `[K, length]`; the keys are the names of sums.
    Example:
        >>> import torch
        >>> undeclared({"update": Declared(3, torch.float32, "mean")}, {"update": torch.zeros(2, 4)}, {})
        ('update', 'it has length 4, and the declared length is 3')
    """
    open_kind = declared.get(OPEN)
    for kind, tensors in (("mean", means), ("sum", sums)):
        for name, tensor in tensors.items():
            declaration = declared.get(name, open_kind if open_kind is not None and open_kind.kind == kind else None)
            if tensor.dim() == 0:
                return name, "it has no dimension, and one row for each client is required"
            length = tensor[0].numel() if len(tensor) else 0
            if declaration is None:
                return name, f"no {kind} of this name is declared"
            if declaration.kind != kind:
                return name, f"it is a {kind}, and a {declaration.kind} is declared"
            if len(tensor) and length != declaration.length:
                return name, f"it has length {length}, and the declared length is {declaration.length}"
    for name in declared:
        if name != OPEN and name not in means and name not in sums:
            return name, "it is declared, and the contribution lacks it"
    return "", ""


def check_contribution(
    slots: Slots, task: Task, contribution: Contribution, sums: Tensors, client: int, round: int
) -> None:
    """Refuse a contribution with names or lengths that its local part or its codec does not declare.

    Args:
        slots: the plan, after `bind`.
        task: the task of the run.
        contribution: the contribution of some clients, before the codec adds its sums.
        sums: the sums that the codec adds.
        client, round: the first of the clients, and the round in which it started, for the error.
    Raises:
        UsageError: a name or a length is not declared. The error states the part, the name, the client and the round.
    """
    codec = {n: d for n, d in slots.codec.declare(slots.local.server_layout(task.layout)).items() if n != "update"}
    codec |= slots.aggregator.added()
    for part, declared, means, added in (
        (slots.local, slots.local.declare(task), contribution.means, contribution.sums),
        (slots.codec, codec, {}, sums),
    ):
        name, difference = undeclared(declared, means, added)
        if name:
            raise UsageError(
                f"{part!r}, client {client}, round {round}, {name}: {difference}.",
                f"the names and lengths that {type(part).__name__}.declare gives.",
                "the server adds contributions by name.",
            )


def check_rows(part: object, named: Mapping[str, Tensor], count: int, client: int, round: int) -> None:
    """Refuse tensors of a contribution that have no row for each client.

    Args:
        part: the part that made the tensors, for the error.
        named: the tensors; the keys are their names, for the error.
        count: the number of clients.
        client, round: the first of the clients, and the round in which it started, for the error.
    Raises:
        UsageError: a tensor has another number of rows. The error states the part, the name, the client and the round.
    Example:
        >>> import torch
        >>> check_rows("Gradient()", {"loss": torch.zeros(3)}, 3, 0, 0)
    """
    for name, tensor in named.items():
        if tensor.dim() == 0 or len(tensor) != count:
            raise UsageError(
                f"{part!r}, client {client}, round {round}, {name}: a tensor of shape {tuple(tensor.shape)}.",
                f"one row for each client: a shape that starts with {count}.",
                "row k of each tensor belongs to client k of the chunk.",
                "torch.zeros(len(lanes.sizes))",
            )


MISSED = 2.0**-40  # largest chance that a cohort is too large, or too small, for a secure sum with noise
_MANY = 1 << 20  # clients that a message proposes, at most
_ROUNDED = 2.0**-11  # part of the bound by which the rounding of a secure sum may enlarge an update


def check_noised_sum(slots: Slots, task: Task, population: Population) -> None:
    """Refuse a secure sum with noise for which the accountant has no proof.

    Rounding moves each number by at most 2^-k, so the norm of an update grows by at most √d · 2^-k. The noise
    covers 2⁻¹¹ of the bound: its deviation is larger by 2⁻¹⁰, of which other rounding needs 2⁻¹².

    A client can decide whether a round has a sum only if, without it, too few clients of a cohort are left. So a cohort
    needs one client more than a sum, except with a chance of 2⁻⁴⁰, which the accountant adds to δ.

    Args:
        slots: the plan, with bound codecs and noise.
        task: the model and loss.
        population: all clients.
    Raises:
        UsageError: the grid is too coarse, or cohorts may be too small.
    """
    rule, clients = slots.aggregator, population.clients
    update = slots.codec.declare(slots.local.server_layout(task.layout))["update"]
    largest, bound = slots.sampler.largest(population), float(update.bound or 0.0)
    exponent = grid_of(rule.secure, update, largest, 1, bound).exponent
    if math.sqrt(update.length) * 2.0**-exponent > _ROUNDED * bound:
        raise UsageError(
            f"{rule!r} with noise, {update.length} parameters and cohorts of up to {largest} clients.",
            "a finer grid.",
            "the rounding of each update would enlarge it by more than the noise covers.",
            Part("Mean(weights='equal', over='expected', secure=Masks(ring=64))", "aggregator"),
        )
    smallest, largest = _cohorts(slots.sampler, clients)
    if not _large_enough(rule, (smallest, largest)):
        least = next(n for n in itertools.count(1) if _large_enough(rule, (n, n)))
        write = _more_clients(slots, clients)
        raise UsageError(
            f"{rule!r} with noise and {slots.sampler!r} of {clients} clients: cohorts of {smallest} to {largest}.",
            f"cohorts of more clients than a sum needs, at least {least}.",
            "one client could decide whether a round has a sum, and no noise hides that.",
            Change("clients", write) if write else Change("plan.cohort", f"Uniform({least})"),
        )


def _cohorts(sampler: Sampler, clients: int) -> tuple[int, int]:
    """The least and the largest cohort of some clients, each except with a chance of 2⁻⁴⁰."""
    largest = sampler.largest(Population(clients, torch.ones(clients, dtype=torch.int64)))
    selection = sampler.selection(clients, 1)
    coins = selection is not None and selection.relation == "add or remove" and selection.rate < 1
    rate = 1.0 if selection is None else selection.rate
    return (clients - binomial_tail(clients, 1 - rate, MISSED) if coins else largest), largest


def _large_enough(rule: Aggregator, cohorts: tuple[int, int]) -> bool:
    """Whether cohorts of these sizes have a sum, also without one of their clients."""
    return all(n - 1 >= rule.least(n) for n in cohorts)


def _more_clients(slots: Slots, clients: int) -> int:
    """A number of clients whose cohorts are large enough, at most twice the least; 0: more clients do not help."""
    while clients < _MANY:
        clients *= 2
        if _large_enough(slots.aggregator, _cohorts(slots.sampler, clients)):
            return clients
    return 0


def check_memory(part: object, before: Tensors, after: Tensors, client: int, round: int) -> None:
    """Refuse client memory whose names, shapes or dtypes are not those of the memory before the round.

    A part that returns no memory, such as `Evaluate`, changes none.

    Args:
        part: the part that made the memory, for the error.
        before, after: the memory of K clients before and after the round, tensors `[K, …]`.
        client, round: the first of the clients, and the round in which it started, for the error.
    Raises:
        UsageError: the error states the part, the client, the round and the first name that differs.
    Example:
        >>> import torch
        >>> check_memory("Train()", {"taken": torch.zeros(1)}, {"taken": torch.ones(1)}, 0, 0)
    """
    for name in {**before, **after} if after else ():
        ours, given = before.get(name), after.get(name)
        if ours is None or given is None or given.shape != ours.shape or given.dtype != ours.dtype:
            raise UsageError(
                f"{part!r}, client {client}, round {round}: the client memory {name!r} of the chunk was "
                f"{kind_of(ours)} before the round and is {kind_of(given)} after it.",
                "the names, shapes and dtypes of `first_memory` for a local part, and of `memory` for a codec.",
                "the memory of a client is stored under these names.",
            )


def check_partials(rule: Aggregator, a: object, b: object) -> None:
    """Refuse to merge partials of two kinds.

    Raises:
        UsageError: the partials differ in kind. The error names the aggregator and both kinds.
    """
    if type(a) is not type(b):
        raise UsageError(
            f"{rule!r} has a partial of type {type(a).__name__} and one of type {type(b).__name__}.",
            "one type of partial for `zero`, `fold`, `merge` and `reduce`.",
            "partials of two kinds have no common aggregate.",
        )
