"""The models of single clients of a run: with their own parts, or their second models.

Tests: tests/surface/test_personal_runs.py
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from atoll.base.errors import UsageError, unknown_name
from atoll.base.lines import Line
from atoll.compute.model_state import Model
from atoll.compute.task import Task
from atoll.plan.plan import Plan
from atoll.plan.state import State, part_of


@dataclass(frozen=True)
class ClientModels:
    """The models of the clients of a training.

    Args:
        plan: the plan.
        state: the state after the last round, with the client memory.
        task: the model.
        clients: the number of clients.
        names: the names of natural clients; None: clients are numbers.
    """

    plan: Plan
    state: State
    task: Task
    clients: int
    names: Sequence[str] | None = None

    def module(self, client: int | str) -> nn.Module:
        """A new module with the model of a client; see `Run.personal`."""
        return self.task.result(model_of(self.plan, self.state, self.id_of(client), self.task))

    def id_of(self, client: Any) -> int:
        """The id of a client, by its name or its id.

        Raises:
            UsageError: there is no such client, or clients have no models of their own.
        """
        if not self.plan.local.trains_personal:
            raise UsageError(
                f"The model of client {client!r}, of a run with {self.plan.local!r:.100}.",
                "a plan with models of clients: an own part, or Ditto.",
                "all clients have the model of the server.",
                Line(python="run.model"),
            )
        if self.names is not None and client in self.names:
            return self.names.index(client)
        if isinstance(client, int) and not isinstance(client, bool) and 0 <= client < self.clients:
            return client
        if self.names is not None:
            raise unknown_name("client", str(client), self.names, lambda name: Line(python=f"run.personal({name!r})"))
        required = f"a number from 0 to {self.clients - 1}."
        raise UsageError(f"There is no client {client!r}.", required, write=Line(python="run.personal(0)"))


def evaluated_state(plan: Plan, state: State) -> State:
    """A state with the parameters that are evaluated, in the layout of the server."""
    theta = plan.local.evaluated(state.model.theta, state.server["local"])
    return replace(state, model=state.model._replace(theta=theta), sent=None)


def model_of(plan: Plan, state: State, client: int, task: Task) -> Model:
    """The model of one client, a single model: that of the server if clients have none of their own."""
    state = evaluated_state(plan, state)
    if not plan.local.trains_personal:
        return plan.local.whole(state.model, task)
    memory = state.memory.take(torch.tensor([client]))
    own = {n: t.to(task.device) for n, t in part_of(memory, "local").items()}
    return plan.local.personal(state.model, own, task).of(0)
