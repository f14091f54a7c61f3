"""Personal models: the own part of a model, which stays at the client, and a second training of each client.

    whole model of client i = (shared part of the server, own part of client i)

The names of `Train(own=…)` select the own part, which is in client memory and in no message. With `alternate=True`
it is trained first, and then the shared part. A correction with `personal_mu` trains a whole model v of each client,
pulled to θ.

Tests: tests/identities/test_personal.py
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from atoll.base.errors import UsageError
from atoll.base.names import under, without_prefix
from atoll.compute.buffer_pool import empty
from atoll.compute.layout import Layout
from atoll.compute.model_state import Model, OwnSplit, joined_parts, split_of
from atoll.compute.task import Task
from atoll.plan.local.contribution import Trained
from atoll.plan.protocols import Conflict, Pull, Tensors

if TYPE_CHECKING:
    from atoll.plan.local.train import Train

OWN, PERSONAL = "own.", "personal."  # the prefixes of names in client memory
Names = tuple[str, ...] | Literal["norms"]
_HOST = torch.device("cpu")


@lru_cache(64)
def shared_layout(layout: Layout, own: Names) -> Layout:
    """The layout of the shared part; see `Layout.without`."""
    return layout.without(own) if own else layout


class OwnPart(NamedTuple):
    """The own part of K clients in a round.

    Args:
        split: the places of the two parts.
        own: the own part before the round, `[K, …]` by name.
    """

    split: OwnSplit
    own: dict[str, Tensor]

    @classmethod
    def of(cls, own: Names, memory: Tensors, layout: Layout) -> OwnPart | None:
        """The own part in a client memory; None if the whole model is shared."""
        return cls(split_of(layout, shared_layout(layout, own)), without_prefix(memory, OWN)) if own else None

    def pull(self, pull: Pull) -> Pull:
        """A pull of the shared part as one of the whole model.

        The start of the own part is its start in the round, its anchor is this start, and its shift and offset are 0.
        """
        start = self.own["theta"]

        def whole(shared: Tensor | None, own: Tensor) -> Tensor | None:
            return None if shared is None else joined_parts(shared, own, self.split.theta)

        shift, offset = (whole(t, torch.zeros_like(start)) for t in (pull.shift, pull.offset))
        return Pull(whole(pull.start, start), whole(pull.anchor, start), shift, pull.mu, offset)

    def divide(self, trained: Trained) -> tuple[Trained, dict[str, Tensor]]:
        """The result of the shared part, and the own part after the round."""
        moved = Model(trained.update, trained.buffers, trained.counters, {})
        shared, own = self.split.shared(moved), self.split.own(moved)
        own["theta"] = self.own["theta"] - own["theta"]
        given = trained._replace(update=shared.theta, buffers=shared.buffers, counters=shared.counters)
        return given, under(OWN, own)


def first_own(own: Names, task: Task) -> dict[str, Tensor]:
    """The own part of a client before its first round, in CPU memory."""
    if not own:
        return {}
    return under(OWN, split_of(task.layout, shared_layout(task.layout, own)).own(task.start.to(_HOST)))


def first_personal(task: Task) -> dict[str, Tensor]:
    """The memory of a client without a personal model: it begins with the model of its first round."""
    zeros = _tensors(task.start.to(_HOST))
    return under(PERSONAL, {n: torch.zeros_like(t) for n, t in zeros.items()}) | {
        f"{PERSONAL}rounds": torch.zeros((), dtype=torch.int64)
    }


def personal_models(model: Model, memory: Tensors) -> Model:
    """The personal models of K clients, θ `[K, d]`: that of the server for a client that never took part."""
    before, rounds = without_prefix(memory, PERSONAL), memory[f"{PERSONAL}rounds"]
    if bool((rounds > 0).all()):
        counters = {n: before[f"counters.{n}"] for n in model.counters}
        return Model(before["theta"], before["buffers"], counters, model.fixed)
    server = model.lanes(len(rounds))
    own = {
        n: torch.where((rounds > 0).view(-1, *[1] * (t.dim() - 1)), before[n], t) for n, t in _tensors(server).items()
    }
    counters = {n: own[f"counters.{n}"] for n in model.counters}
    return Model(own["theta"], own["buffers"], counters, model.fixed)


def after_personal(start: Model, trained: Trained, memory: Tensors) -> dict[str, Tensor]:
    """The memory after a training of the personal models that began at `start`."""
    theta = torch.sub(start.theta, trained.update, out=empty(trained.update, trained.update.shape))
    moved = Model(theta, trained.buffers, trained.counters, {})
    return {**under(PERSONAL, _tensors(moved)), f"{PERSONAL}rounds": memory[f"{PERSONAL}rounds"] + 1}


def _tensors(model: Model) -> dict[str, Tensor]:
    return {"theta": model.theta, "buffers": model.buffers, **{f"counters.{n}": t for n, t in model.counters.items()}}


def check_own(own: Any, alternate: Any) -> Names:
    """The names of the own part.

    Raises:
        UsageError: they are no tuple of patterns and not `"norms"`, or `alternate` has no own part to train first.
    """
    names: Any = tuple(own) if isinstance(own, list) else own
    if names != "norms" and not (isinstance(names, tuple) and all(isinstance(n, str) and n for n in names)):
        raise UsageError(
            f"Train(own={own!r}).",
            "a tuple of patterns of names, or 'norms'.",
            "the parameters and buffers with these names stay at the client.",
            'Train(sgd(0.1), epochs=1, batch=10, own=("fc2.*",))',
        )
    if not isinstance(alternate, bool) or (alternate and not names):
        raise UsageError(
            f"Train(alternate={alternate!r}) with own={own!r}.",
            "True or False; True with names in own.",
            "the own part is trained first, then the shared part.",
            'Train(sgd(0.1), epochs=1, batch=10, own=("fc2.*",), alternate=True)',
        )
    return cast("Names", names)


def conflicts_of_own(local: Train) -> Iterable[Conflict]:
    """Reasons to refuse two trainings of a client in a round with a kept state, or with each other."""
    second = local.correction is not None and local.correction.personal_mu is not None
    plain = "Train(sgd(0.1), epochs=1, batch=10)"
    if second and local.own:
        why = "each of them makes a personal model of a client."
        yield Conflict(f"{local.correction!r} with own={local.own!r}.", "one of the two.", why, plain)
    if local.keep and (second or local.alternate):
        given = f"{local.correction!r}" if second else "alternate=True"
        why = "a client trains twice in a round, and would keep the state of one training."
        yield Conflict(f"{given} with keep={local.keep!r}.", "clients that keep no state.", why, plain)
    if local.alternate and local.correction is not None:
        why = "a correction counts the steps of one training of the whole model."
        yield Conflict(f"alternate=True with {local.correction!r}.", "no correction.", why, plain)
