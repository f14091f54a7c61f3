"""The contract of engines: the options that an engine reads, the running engine, and the spec that builds it.

This module loads without torch.

Tests: tests/surface/test_engines.py
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch

    from atoll.base.random import Key
    from atoll.compute.layout import Layout
    from atoll.compute.task import Task
    from atoll.data.clients import Clients
    from atoll.engine.simulation.fleet import Fleet
    from atoll.plan.plan import Plan
    from atoll.plan.protocols import Cohort, Population
    from atoll.plan.round import Gathered
    from atoll.plan.state import State


@dataclass(frozen=True)
class RunOptions:
    """The settings of a training that an engine reads.

    Args:
        device: the name of the device, as in `Settings`.
        numerics: the backend that the user asked for, or "auto".
        precision: "full" or "bf16".
        chunk: clients computed together; None lets the engine choose.
        fleet: the simulated durations; None simulates none.
        seed: of the training.
        plan: the algorithm; None before it is known.
        model: the name of the model, if it was made by a name; workers build it from this name.
    """

    device: str = "auto"
    numerics: str = "auto"
    precision: str = "full"
    chunk: int | None = None
    fleet: Fleet | None = None
    seed: int = 0
    plan: Plan | None = None
    model: str | None = None


class Engine(Protocol):
    """A running engine: it trains the clients of a cohort and returns one sum for each model version.

    A class that inherits from this protocol gets the defaults and defines `open`, `gather`, `population` and `layout`.
    `open` is called once, before the first `gather`. `close` is called once at the end, also after an error.
    """

    @property
    @abstractmethod
    def population(self) -> Population:
        """The number of clients and the rows of each; valid after `open`."""

    @property
    @abstractmethod
    def layout(self) -> Layout:
        """The layout of the model vector; valid after `open`."""

    @property
    def primary(self) -> bool:
        """Whether this process writes the run and prints."""
        return True

    @property
    def restart_of(self) -> str | None:
        """The job that a supervisor restarted as this process; None if this is a first start.

        The primary process resumes the run whose `environment.json` holds this `job`.
        """
        return None

    def numerics_for(self, plan: Plan) -> tuple[str, str] | None:
        """The backend that this engine prefers for a plan, and the reason; None leaves the choice to the model."""
        return None

    @abstractmethod
    def open(self, task: Task, data: Clients) -> None:
        """Start the workers, if the engine has any.

        Args:
            task: the model, loss and metrics; `task.numerics` names the backend.
            data: the clients.
        Raises:
            UsageError: the engine cannot run this model or this data.
        """

    def check_start(self, plan: Plan, state: State) -> None:
        """Refuse a plan that this engine cannot run, before the first round; `plan` is bound.

        Raises:
            UsageError: the part of the plan, and the line to write.
        """
        return None  # a method of a protocol without a statement counts as abstract

    @abstractmethod
    def gather(self, plan: Plan, state: State, cohort: Cohort, key: Key, keep: Collection[int] = ()) -> Gathered:
        """Train the cohort.

        Args:
            plan: the algorithm, bound to this engine.
            state: after `open_round`; it stays as it is.
            cohort: the clients that start.
            key: of the round.
            keep: ids of clients whose contributions are returned in `Gathered.kept`.
        Raises:
            RunError: all clients failed with the same error, or more failed than the plan allows.
            UsageError: a client of `keep` did not arrive.
        """

    def commit(self, round: int) -> None:
        """Take note that the state after this round was accepted. A failed round is never committed."""
        return None

    def agree(self, value: bytes) -> bytes:
        """The value of the primary process, in every process of the training."""
        return self.exchange(value)[0]

    def exchange(self, value: bytes) -> list[bytes]:
        """The values of all processes of the training; the primary process is first."""
        return [value]

    def describe(self) -> Mapping[str, Any]:
        """Facts for `environment.json` and `atoll show`."""
        return {}

    def close(self) -> None:
        """End the workers and free their memory. A second call does nothing."""
        return None


@runtime_checkable
class EngineSpec(Protocol):
    """An engine as a user writes it: a frozen value of the grammar. A class that inherits gets the defaults."""

    @property
    def primary(self) -> bool:
        """Whether this process prints; known before the engine is built."""
        return True

    def check(self, options: RunOptions) -> None:
        """Refuse options that the engine cannot serve. It is called before data is loaded, and again with the plan.

        Raises:
            UsageError: a device, fleet, precision or pace that the engine does not support.
        """
        return None

    def device(self, wanted: str) -> torch.device:
        """The device of this process for a name such as "auto", "cpu" or "cuda:1"."""
        from atoll.compute.device import resolve_device

        return resolve_device(wanted)

    @abstractmethod
    def build(self, options: RunOptions) -> Engine:
        """The engine. It joins a process group if there is one, and starts nothing else."""
