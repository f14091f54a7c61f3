"""The models of single clients of a run: with their own parts, or their second models.

Tests: tests/surface/test_personal_runs.py
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from atoll.base.errors import UsageError, unknown_name
from atoll.base.lines import Line
from atoll.base.validation import class_instead_of_value
from atoll.compute.model_state import Model, split_of
from atoll.compute.task import Task
from atoll.plan.plan import Plan
from atoll.plan.protocols import Tensors
from atoll.plan.state import State, part_of
from atoll.runs.folder import RunFolder, read_rows


class MemoryRows(Protocol):
    """The memory of clients, one row for each."""

    def take(self, ids: Tensor) -> Tensors: ...


@dataclass(frozen=True)
class ClientModels:
    """The models of the clients of a run.

    Args:
        plan: the plan.
        model: the model of the server as clients receive it.
        memory: the client memory.
        task: the model of the module.
        clients: the number of clients.
        names: the names of natural clients; None: clients are numbers.
    """

    plan: Plan
    model: Model
    memory: MemoryRows
    task: Task
    clients: int
    names: Sequence[str] | None = None

    @classmethod
    def of_folder(cls, folder: Path, plan: Plan, task: Task, whole: Model) -> ClientModels:
        """The models of the clients of a run that has ended.

        Args:
            folder: the run folder.
            plan: its plan.
            task: its model.
            whole: the final model of the server, with all tensors of the module.
        Raises:
            UsageError: the folder is that of a server, whose clients keep their own parts.
        """
        checkpoint = RunFolder(folder).restore(any_version=True)
        if checkpoint is None:
            raise no_models_here(folder.name)
        rows: dict[int, dict[str, Tensor]] = {}
        for segment in checkpoint.memory:
            each = {n.removeprefix("rows/"): t for n, t in segment.items() if n.startswith("rows/")}
            for k, client in enumerate(segment["ids"].tolist()):
                rows[client] = {n: t[k] for n, t in each.items()}
        layout = plan.local.server_layout(task.layout)
        model = whole if layout is task.layout else split_of(task.layout, layout).shared(whole)
        started = next((row for row in read_rows(folder / "events.jsonl") if row.get("event") == "start"), {})
        names = started.get("names")
        count = len(names) if names else int(started.get("clients") or 1 + max([*rows, 0]))
        return cls(plan, model, _Saved(plan.memory(task), rows), task, count, names)

    def module(self, client: int | str) -> nn.Module:
        """A new module with the model of a client; see `Run.personal`."""
        return self.task.result(model_of(self.plan, self.model, self.memory, self.id_of(client), self.task))

    def id_of(self, client: Any) -> int:
        """The id of a client, by its name or its id; the id may be a text. If a name is a number, ids are not used.

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
        found = self.find(client)
        if found is not None:
            return found
        if self.names is not None:
            raise unknown_name("client", str(client), self.names, _line)
        raise UsageError(f"There is no client {client!r}.", f"a number from 0 to {self.clients - 1}.", write=_line(0))

    def find(self, client: Any) -> int | None:
        """The id of a client, by its name or its id; None if there is no such client. See `id_of`."""
        if isinstance(client, type):
            raise class_instead_of_value("The client", client)
        named = self.owner(str(client)) if self.names is not None else None
        if named is not None or any(name.isdecimal() for name in self.names or ()):
            return named
        number = int(client) if isinstance(client, str) and client.isdecimal() else client
        known = isinstance(number, int) and not isinstance(number, bool) and 0 <= number < self.clients
        return number if known else None

    def owner(self, name: str) -> int | None:
        """The id of the client of a row, by its name in the table; None for another client."""
        if self.names is None:
            return self.find(name)
        return list(self.names).index(name) if name in self.names else None


@dataclass
class _Saved:
    """The client memory of a checkpoint."""

    first: dict[str, Tensor]
    rows: Mapping[int, Mapping[str, Tensor]] = field(default_factory=dict)

    def take(self, ids: Tensor) -> dict[str, Tensor]:
        rows = [self.rows.get(i, self.first) for i in ids.tolist()]
        return {n: torch.stack([row[n] for row in rows]) for n in self.first}


def _line(client: Any) -> Line:
    return Line(python=f"run.personal({client!r})", shell=f"--client {client}")


def no_models_here(name: str) -> UsageError:
    """The error for the model of a client at the server of a network."""
    return UsageError(
        f"The model of a client of {name}, at the server of a network.",
        "the site of this client.",
        "own parts stay at the sites.",
        "atoll predict",
    )


def evaluated_state(plan: Plan, state: State) -> State:
    """A state with the parameters that are evaluated, in the layout of the server."""
    theta = plan.local.evaluated(state.model.theta, state.server["local"])
    return replace(state, model=state.model._replace(theta=theta), sent=None)


def model_of(plan: Plan, model: Model, memory: MemoryRows, client: int, task: Task) -> Model:
    """The model of one client, a single model.

    Args:
        plan: the plan, which has models of clients.
        model: the model of the server, in its layout.
        memory: the client memory.
        client: the id of the client.
        task: the model of the module.
    """
    own = {n: t.to(task.device) for n, t in part_of(memory.take(torch.tensor([client])), "local").items()}
    return plan.local.personal(model, own, task).of(0)
