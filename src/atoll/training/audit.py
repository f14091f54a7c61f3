"""Compute a served run again from the updates that its server has kept.

    atoll serve --keep-updates         writes each accepted message to HOME/updates/RUN
    atoll verify                       folds them again and makes each step of the server again

A round is right if the SHA-256 of the model after it is the one of the audit chain.

Tests: tests/faults/test_kept_updates.py
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from atoll.base import grammar
from atoll.base.errors import AtollError, RunError
from atoll.base.random import Key
from atoll.compute.batches import HOST
from atoll.compute.layout import Layout
from atoll.compute.task import Task
from atoll.data.clients import Clients
from atoll.data.input import Input
from atoll.data.schema import Schema
from atoll.engine.chunk_limit import ChunkLimit
from atoll.engine.chunks import gathered
from atoll.engine.contribution import Fold, decode_contribution
from atoll.engine.protocols import Engine, EngineSpec, RunOptions
from atoll.engine.simulation.arrivals import Arrivals
from atoll.net.home import ServerHome
from atoll.net.store import Accepted
from atoll.net.tensors import tensor_parts
from atoll.net.wire import digest
from atoll.plan.in_flight import Flight, InFlight
from atoll.plan.message import MessageForm
from atoll.plan.plan import Plan
from atoll.plan.protocols import Cohort, Ids, Population
from atoll.plan.round import Gathered
from atoll.plan.state import State
from atoll.training.experiment import Experiment
from atoll.training.rounds import Training


@dataclass(frozen=True, repr=False)
class KeptUpdates(grammar.Value, EngineSpec):
    """Take the contributions of a run from the updates that its server has kept.

    Args:
        home: the folder of the server.
        run: the name of the run.
        clients: the number of clients of a closed run; None: the run was open.
    """

    home: str
    run: str
    clients: int | None = None

    @property
    def needs_rows(self) -> bool:
        """False: the contributions are on disk."""
        return False

    def device(self, wanted: str) -> torch.device:
        """The CPU, as that of the server."""
        return HOST

    def build(self, options: RunOptions) -> Engine:
        """Read the accepted contributions of the run."""
        return KeptUpdatesEngine(self)


class KeptUpdatesEngine(Engine):
    """The running engine of `KeptUpdates`.

    Args:
        spec: the home and the run.
    """

    task: Task

    def __init__(self, spec: KeptUpdates) -> None:
        home = ServerHome.open(Path(spec.home), serve=False)
        try:
            database = home.database
            self._folder = home.path / "updates" / spec.run
            rows = {client.id: client.rows for client in database.clients() if client.rows}
            self._started = [int(row["cohort"]) for row in database.metrics(spec.run)]
            self._accepted = [database.accepted(spec.run, round) for round in range(len(self._started))]
        finally:
            home.close()
        # A later run may have changed the rows and added clients. The weight of a contribution is its rows.
        rows |= {one.client: one.weight for accepted in self._accepted for one in accepted}
        sizes = torch.zeros(spec.clients or 1 + max(rows, default=0), dtype=torch.int64)
        for client, count in rows.items():
            sizes[client : client + 1] = count
        self._population = Population(len(sizes), sizes, 1)

    @property
    def population(self) -> Population:
        """The clients and the rows of each, from the database."""
        return self._population

    @property
    def layout(self) -> Layout:
        """The layout of the model vector."""
        return self.task.layout

    def open(self, task: Task, data: Clients) -> None:
        """Take the task."""
        self.task = task

    def gather(self, plan: Plan, state: State, cohort: Cohort, key: Key, keep: Collection[int] = ()) -> Gathered:
        """Fold the contributions that the round has accepted.

        Raises:
            RunError: an update is missing or differs from the audit chain.
        """
        fold, form = Fold(plan, state.round, keep), MessageForm.of(plan, self.task)
        accepted = self._accepted[state.round]
        for one in accepted:
            body = self._body(one)
            decoded = decode_contribution(plan, form.from_bytes([body]))
            ids = Ids(torch.tensor([one.client]), torch.tensor([one.repeat]))
            fold.add(one.version, ids, torch.zeros(1, dtype=torch.int64), torch.tensor([len(body)]), decoded)
        flights = [Flight(one.client, one.version, one.repeat, i) for i, one in enumerate(accepted)]
        flown = Arrivals(flights, [], 0, self._started[state.round], 0, self._air(state.round), None, ())
        return gathered(plan, state, flown, fold.results, ChunkLimit(), keep)

    def _air(self, round: int) -> InFlight:
        """The contributions of later rounds that started in this one or before: their models are still needed."""
        later = [one for accepted in self._accepted[round + 1 :] for one in accepted if one.version <= round]
        return InFlight(tuple(Flight(one.client, one.version, one.repeat, i) for i, one in enumerate(later)))

    def _body(self, one: Accepted) -> bytes:
        path = self._folder / one.work.hex()
        try:
            body = path.read_bytes()
        except OSError as error:
            raise RunError(f"The update {path} cannot be read: {error.strerror}.", "each accepted update.") from error
        if digest(body) != one.digest:
            raise RunError(f"The update {path} differs from the audit chain.", "the bytes that the server accepted.")
        return body


def recomputed(home: Path) -> Iterator[tuple[str, int, list[str]]]:
    """Compute each run again whose updates are kept.

    Args:
        home: the folder of the server.
    Returns:
        The name of each run, the number of its rounds whose model was found again, and one sentence for each fault.
    """
    for folder in sorted((home / "updates").glob("*")):
        yield folder.name, *_recomputed(home, folder.name)


def _recomputed(home: Path, run: str) -> tuple[int, list[str]]:
    config = home / "runs" / run
    try:
        it = Experiment.read(config)
        it = it.override(data=str(config / "input.json"), report=False, evaluate_every=0, stop=())
        schema = Schema.of_input(Input.read(config))
        with Training(
            it._model(), schema, it.plan(), it.check(engine=KeptUpdates(str(home), run, it.clients))
        ) as training:
            return _compared(training, run, _models(home, run))
    except AtollError as error:
        return 0, [f"The run {run} cannot be computed again: {error.given}"]


def _compared(training: Training, run: str, models: list[bytes]) -> tuple[int, list[str]]:
    """Make the steps of a run, up to the first model that differs."""
    for round, model in enumerate(models):
        try:
            training.next()
        except AtollError as error:
            return round, [f"Round {round} of {run} cannot be computed again: {error.given}"]
        (theta,) = tensor_parts({"": training.state.model.theta})[1:]
        if digest(theta) != model:
            return round, [f"The model of round {round} of {run} is not the one of its updates."]
    return len(models), []


def _models(home: Path, run: str) -> list[bytes]:
    """The SHA-256 of the model after each round."""
    at = ServerHome.open(home, serve=False)
    try:
        return at.database.models(run)
    finally:
        at.close()
