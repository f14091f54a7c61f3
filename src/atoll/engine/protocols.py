"""The contract of engines: the options that an engine reads, the running engine, and the spec that builds it.

This module loads without torch.

Tests: tests/surface/test_engines.py
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch

    from atoll.base.random import Key
    from atoll.compute.layout import Layout
    from atoll.compute.task import Task
    from atoll.data.clients import Clients
    from atoll.engine.simulation.fleet import Fleet
    from atoll.plan.plan import Plan
    from atoll.plan.protocols import Cohort, Local, Population, Tensors
    from atoll.plan.round import Gathered
    from atoll.plan.state import State


@dataclass(frozen=True)
class RunOptions:
    """The settings of a training that an engine reads.

    Args:
        device: the name of the device, as in `Settings`.
        numerics: the backend that the user asked for, or "auto".
        precision: "full" or "bf16".
        chunk: the number of clients that are computed together; None lets the engine choose.
        fleet: the simulated durations; None: durations are not simulated.
        seed: the seed of the training.
        plan: the algorithm; None before it is known.
        model: the name that the model was built from, which workers use to build it again; None: it has no name.
    """

    device: str = "auto"
    numerics: str = "auto"
    precision: str = "full"
    chunk: int | None = None
    fleet: Fleet | None = None
    seed: int = 0
    plan: Plan | None = None
    model: str | None = None


class SiteScores(NamedTuple):
    """The scores of a model on the held-out rows that clients have on their own machines.

    Args:
        names: the name of each client.
        rows: the held-out rows of each client, int64 `[clients]`; 0 if it has none or keeps its values.
        sums: the sums of the loss and of each metric over these rows, float64 `[clients]` or `[clients, k]`, by name.
        bytes_up: the bytes of the messages that contained them.
    """

    names: tuple[str, ...]
    rows: torch.Tensor
    sums: Tensors
    bytes_up: int = 0


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
        """The id of the job, if a supervisor has restarted this process; None if this is the first start.

        The primary process then resumes the run whose `environment.json` contains this id as `job`.
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
            data: the clients; none if `EngineSpec.needs_rows` is False.
        Raises:
            UsageError: the engine cannot run this model or this data.
        """

    def await_clients(self, plan: Plan, state: State) -> None:
        """Wait until enough clients are available to start a round. The default does not wait.

        The training calls this method before each round. The population may change during the call.

        Args:
            plan: the algorithm. Before the first round, `bind` may not yet have adapted it to the population.
            state: the state before the round.
        """
        return None

    def check_start(self, plan: Plan, state: State) -> None:
        """Refuse a plan that this engine cannot run. A training calls it with the plan each time that it was bound.

        Raises:
            UsageError: this engine cannot run the plan; the error names the part of the plan.
        """
        return None  # a method of a protocol without a statement counts as abstract

    @abstractmethod
    def gather(self, plan: Plan, state: State, cohort: Cohort, key: Key, keep: Collection[int] = ()) -> Gathered:
        """Train the cohort.

        Args:
            plan: the algorithm, bound to this engine.
            state: the state of `Opened`, after `open_round`; it must not change.
            cohort: the clients that start.
            key: the key of the round.
            keep: the ids of clients whose contributions are returned in `Gathered.kept`.
        Raises:
            RunError: all clients failed with the same error, or more failed than the plan allows.
            UsageError: a client of `keep` did not arrive.
        """

    @property
    def judges(self) -> bool:
        """Whether clients have held-out rows on their own machines. It is known before the first round."""
        return False

    def score(self, state: State, of: Local | None = None) -> SiteScores | None:
        """Evaluate a model on the held-out rows that clients have on their own machines.

        Args:
            state: contains the model.
            of: the local part, to evaluate the model of each client, which it builds from that of the state; None: the
                model of the state is evaluated.
        Returns:
            The scores; None if no client has such rows.
        """
        return None

    def commit(self, round: int) -> None:
        """Take note that the state after this round was accepted. A failed round is never committed."""
        return None

    def interrupt(self) -> None:
        """Take note that Ctrl-C was pressed. An engine that waits for clients may end the wait."""
        return None

    def agree(self, value: bytes) -> bytes:
        """Send the primary process's value to every process of the training, and return it."""
        return self.exchange(value)[0]

    def exchange(self, value: bytes) -> list[bytes]:
        """Collect the values of all processes of the training. The value of the primary process is first."""
        return [value]

    def describe(self) -> Mapping[str, Any]:
        """Facts for `environment.json` and `atoll show`."""
        return {}

    def close(self) -> None:
        """Stop the workers and free their memory. A second call does nothing."""
        return None


@runtime_checkable
class EngineSpec(Protocol):
    """The description of an engine that a user writes, a frozen value such as `Processes(workers=2)`.

    A class that inherits from this protocol gets the defaults.
    """

    @property
    def needs_rows(self) -> bool:
        """Whether the engine reads the train rows of the clients. If not, the clients have them on their machines."""
        return True

    @property
    def primary(self) -> bool:
        """Whether this process prints. It must be known before the engine is built."""
        return True

    def check(self, options: RunOptions) -> None:
        """Refuse options that the engine does not support.

        A training calls it before data is loaded, and again when the plan is known.

        Raises:
            UsageError: a device, fleet, precision or pace that the engine does not support.
        """
        return None

    def device(self, wanted: str) -> torch.device:
        """The device that this process uses, for a name such as "auto", "cpu" or "cuda:1"."""
        from atoll.compute.device import resolve_device

        return resolve_device(wanted)

    @abstractmethod
    def build(self, options: RunOptions) -> Engine:
        """Build the engine. This may join a process group, but starts no workers: `open` starts them."""
