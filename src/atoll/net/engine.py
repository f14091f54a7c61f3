"""The engine of a network: its clients train on the machines of their owners.

`gather` sends the work of a round to its clients and folds their messages as they arrive. The number of clients, the
order of arrival and kills of the server or of clients change no bit of a synchronous round.

Tests: tests/faults/test_rehearsal.py
"""

from __future__ import annotations

import json
import queue
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch

from atoll import models
from atoll.base.errors import RunError, UsageError
from atoll.base.lines import Change, Line, Part
from atoll.base.random import Key, lend_generators
from atoll.base.validation import required
from atoll.compute.layout import Layout, named_tensors
from atoll.compute.task import Task
from atoll.data.clients import Clients
from atoll.data.schema import Schema
from atoll.engine.arrival_loop import ArrivalLoop, Landed
from atoll.engine.chunk_limit import ChunkLimit
from atoll.engine.chunks import gathered
from atoll.engine.contribution import Fold
from atoll.engine.protocols import Engine, RunOptions, SiteScores
from atoll.net import coordinator as events
from atoll.net import wire
from atoll.net.client import own_versions, plain_text
from atoll.net.coordinator import Coordinator, Limits
from atoll.net.home import ServerHome
from atoll.net.identity import Files
from atoll.net.loop import ended_at_exit
from atoll.net.partial import PartialForm, Received, check_additive, read_messages
from atoll.net.relays import Relays, RelayWork
from atoll.net.secure import SumOutcome, SumRound, agreement_of
from atoll.net.server import TOGETHER, Listener
from atoll.net.spec import Server
from atoll.net.store import Accepted
from atoll.net.tensors import tensor_bytes
from atoll.net.terms import Terms, bind_codecs, layout_hash, plan_text
from atoll.plan.aggregate import Attacked, Mean
from atoll.plan.codec.stage import Identity
from atoll.plan.form import Buffer, MessageError
from atoll.plan.in_flight import Flight
from atoll.plan.local import Evaluate, Moments
from atoll.plan.message import MessageForm
from atoll.plan.plan import Plan
from atoll.plan.protocols import Broadcast, Cohort, Ids, Local, Population, Tensors
from atoll.plan.round import Gathered, sum_limits
from atoll.plan.state import State, pack_broadcast
from atoll.secure.messages import MASKED, longest_bodies
from atoll.secure.params import Agreement

_ABSENT = ("absent", "expired", "left", "closing")


class Stopped(KeyboardInterrupt):
    """The server stops, although the round is open."""


def listener_of(home: ServerHome, spec: Server, limits: Limits) -> Listener:
    """The event loop of a server in a new epoch. It has not started."""
    database = home.database
    epoch = database.begin_epoch(int(time.time()))
    coordinator = Coordinator(epoch, database.federation, own_versions(), limits)
    files = Files.read(*spec.files) if spec.files is not None else None
    return Listener(home.path, database, home.authority, coordinator, spec.hosts, files, spec.insecure)


def listen(net: Listener, home: ServerHome, spec: Server) -> str:
    """Start an event loop, and return its address, which the home keeps for a restart."""
    address = net.start(*home.listen_address(spec.listen))
    home.database.put("address", address)
    home.database.put("insecure", "1" if spec.insecure else None)
    return address


def _memory_reads_weights(plan: Plan, task: Task) -> bool:
    """Whether the memory with which clients begin depends on the weights of the first model."""
    start = task.start
    moved = replace(task, start=start._replace(theta=start.theta + 1, buffers=start.buffers + 1))
    ours, others = plan.memory(task), plan.memory(moved)
    return ours.keys() != others.keys() or any(not torch.equal(t, others[n]) for n, t in ours.items())


class _Sent(NamedTuple):
    """A flight whose work was assigned."""

    flight: Flight
    work: wire.Work


class _Version(NamedTuple):
    """A model version as bytes: the message field and its hash, and the blob of its frozen tensors.

    If the downlink is compressed, `rest` has the bytes without θ, and the version is a blob of any length.
    """

    field: bytes | wire.Blob
    hash: bytes
    fixed: wire.Blob | None
    rest: bytes = b""


class ServerEngine(Engine):
    """The running engine of `Server`.

    Args:
        spec: its settings.
        options: the settings of the training that it reads.
    """

    task: Task

    def __init__(self, spec: Server, options: RunOptions) -> None:
        self.spec, self._options = spec, options
        self.home = ServerHome.open(Path(spec.home))
        if self.home.is_relay:
            self.home.close()
            write = Line(shell=f"atoll relay --home {spec.home}")
            raise UsageError(f"{spec.home} is the home of a relay.", "a home of its own for a server.", write=write)
        self.run, self.epoch = "", 0
        self.notify: Callable[[Mapping[str, Any]], None] = lambda facts: None
        self.charge: Callable[[], None] = lambda: None  # for another attempt of a round with noise
        self.stop_at: float | None = None
        self._population = Population(0, torch.empty(0, dtype=torch.int64))
        self._present: dict[int, int] = {}
        self._rows: dict[int, int] = {}
        self._new_rows = True  # the population was made before the last change of the rows
        self._assigned: dict[bytes, _Sent] = {}
        self._starting: list[events.Assigned] = []  # works of flights that begin together
        self._versions: dict[int, _Version] = {}
        self._sent_to: dict[int, int] = {}  # client → the version that it was sent last, if the downlink is compressed
        self._accepted: list[Accepted] = []
        self._folded: list[bytes] = []
        self._plan: tuple[Plan, str, MessageForm] | None = None
        self._begun: Plan | None = None  # the plan of the run
        self._flying: set[int] = set()  # the numbers of the flights whose work was assigned
        self._landed: list[Landed] = []
        self._fold: Fold | None = None
        self._drained = False
        self._held: dict[int, int] = {}
        self._refusing: dict[int, str] = {}  # the plan that the policy of a client has refused
        self._asked: dict[bytes, tuple[int, MessageForm, wire.WorkKind]] = {}  # works outside the rounds
        self._answers: dict[int, Tensors] = {}
        self._answered_bytes = 0
        self._measured: tuple[int, ...] = ()  # the sites of the first gather of statistics
        self.awaited: tuple[int, ...] = ()
        self.gather_s = 0.0  # of the last round
        self._net: Listener | None = None
        self._open = ExitStack()
        self._sums: SumRound | None = None  # the secure sum of the open round
        self._relays = Relays()
        self._memory = False  # whether the plan has client memory
        self._void = False  # `SumOutcome.void` of the open round
        self._summing = False  # whether its first attempt has begun
        self._arriving: ArrivalLoop | None = None  # of the open round

    # Engine

    @property
    def population(self) -> Population:
        """The clients whose rows are known, and the rows of each."""
        return self._population

    @property
    def layout(self) -> Layout:
        """The layout of the model vector."""
        return self.task.layout

    @property
    def net(self) -> Listener:
        """The event loop.

        Raises:
            RunError: the engine is not open.
        """
        if self._net is None:
            raise RunError("The server is not open.", "a call of `open`.")
        return self._net

    def open(self, task: Task, data: Clients) -> None:
        """Listen for clients. The run begins with `begin`."""
        self.task = task
        database, spec = self.home.database, self.spec
        share = spec.held_out, spec.min_rows, spec.seed, spec.clients or spec.min_clients, spec.scaled
        self._terms = Terms.of(task, Schema.of(data), self._options.model, *share).encode()
        self._hashes = wire.digest(self._terms), layout_hash(task.layout)
        open_run = spec.clients is None
        absent = spec.absent_s if spec.absent_s is not None or not open_run else 0.0
        limits = Limits(spec.lease_s, absent, spec.work_s, window=spec.window, max_rows=spec.max_rows)
        self._net = listener_of(self.home, spec, limits)
        self.epoch = self._net.coordinator.epoch
        self._net.awaited = lambda: self.awaited
        self._net.step = lambda: "" if self._sums is None else self._sums.step
        listen(self._net, self.home, spec)
        database.put("hosts", json.dumps(spec.hosts))
        if spec.clients is not None:
            database.put("clients", str(spec.clients))
        self._open.enter_context(ended_at_exit(lambda: self._stop_in(0.0)))

    def begin(self, run: str, plan: Plan) -> None:
        """Open a run: clients that connect receive its terms.

        Args:
            run: the name of the run.
            plan: the algorithm.
        Raises:
            UsageError: a network cannot run the plan.
        """
        self._check(plan)
        if any(client.id >= wire.RELAYS and client.state != "revoked" for client in self.home.database.clients()):
            self._check_relays(plan)
        self.run = run
        self.net.step_cap = wire.MAX_STEP if plan.aggregator.secure is not None else 0
        database, terms = self.home.database, self._terms
        blob = self.net.offer(terms)
        known = {c.id: (c.rows, c.held or 0) for c in database.clients() if c.rows and c.input == blob.hash}
        if self.spec.clients is None or len(known) < self.spec.clients:
            known = {} if self.spec.clients is not None else known
        self._rows, self._new_rows = {client: rows for client, (rows, _) in known.items()}, True
        self._held = {client: held for client, (_, held) in known.items()}
        self._populate()
        split, clients = self.spec.split, self.spec.clients
        seat = None if split is None or clients is None else wire.Seat(split, str(self.spec.seed), clients)
        self._memory, recent = bool(plan.memory(self.task)), database.recent(run)
        self._begun = plan
        self._relays = Relays.of(database.clients())
        self.net.handle(events.RunOpened(run, blob, self.spec.clients is not None, self._memory, seat, recent, known))

    def check_start(self, plan: Plan, state: State) -> None:
        """Refuse a plan that a network cannot run, now that the population is known."""
        self._check(plan)
        if self._relays.of_leaf:
            self._check_relays(plan)

    def _check(self, plan: Plan) -> None:
        plan_text(plan)
        self.spec.check(RunOptions(plan=plan))
        if isinstance(plan.aggregator, Attacked):
            raise UsageError(
                f"{plan.aggregator!r:.100} over a network.",
                "a rule without an attack.",
                "an attack is a simulation: it replaces updates of real clients.",
                Part(repr(plan.aggregator.of), "aggregator"),
            )
        self._check_sum(plan)
        self._check_kept(plan)
        bound = bind_codecs(plan, self.layout)
        MessageForm.of(bound, self.task)
        if plan.downlink != Identity():
            bound.downlink.form(plan.local.server_layout(self.layout))  # a codec without a form is refused
        self._check_own(plan)
        if not plan.local.own and _memory_reads_weights(plan, self.task):
            raise UsageError(
                f"The memory with which clients of {plan.local!r:.100} begin depends on the weights of the model.",
                "the same values for any weights.",
                "no code travels: a site builds the model from its name, with other weights than the server's.",
                Line(python='return {"known": torch.zeros(())}'),
            )
        if self.spec.clients is not None:
            return
        needs_all = {
            repr(plan.local): plan.local.needs_population,
            repr(plan.codec): plan.codec.averages_all_clients,
            repr(plan.aggregator): plan.aggregator.over == "expected" or plan.aggregator.needs_population,
            repr(plan.sampler): plan.sampler.needs_population,
        }
        for part in [part for part, needs in needs_all.items() if needs]:
            raise UsageError(
                f"{part} in an open run.",
                "a closed run, whose clients are fixed.",
                "the part needs all clients of the population, and an open run may gain clients in any round.",
                Change("clients", 4),
            )

    def _check_own(self, plan: Plan) -> None:
        """Refuse an own part if the first weights are not those of the seed, which each site draws itself."""
        if not plan.local.own:
            return
        schema, layout, start = Schema.read(Terms.decode(self._terms).schema), self.task.layout, self.task.start
        key = Key(self._options.seed).fold("model")
        name = required(self._options.model, "name of the model")
        module = models.resolve(name, schema.without_clients(), key, layout.dtype)
        theta, buffers, _ = layout.flatten(named_tensors(module))
        if not (torch.equal(theta, start.theta) and torch.equal(buffers, start.buffers)):
            raise UsageError(
                f"own={plan.local.own!r} over a network, and the first weights are not those of the seed.",
                "a named model without `init`.",
                "the own part is in no message, so each site draws its first values by the seed.",
                Change("plan.local.own", "()"),
            )

    def _check_kept(self, plan: Plan) -> None:
        """Refuse to keep updates that a later computation cannot use."""
        if self.spec.keep_updates and (plan.aggregator.secure is not None or plan.releases):
            raise UsageError(
                f"--keep-updates with {plan.aggregator if plan.aggregator.secure is not None else plan.codec!r:.100}.",
                "a plan without a secure sum and without noise.",
                "masked messages and a sum without its noise give no model of the run.",
                Part("Mean()", "aggregator") if plan.aggregator.secure is not None else Part("Identity()", "codec"),
            )

    def _check_relays(self, plan: Plan) -> None:
        """Refuse a run that cannot have relays."""
        check_additive(plan)
        if self.spec.clients is None:
            raise UsageError(
                "A relay in an open run.",
                "a closed run, whose clients are fixed.",
                "a relay waits for each of its clients.",
                Change("clients", 4),
            )
        if self.spec.keep_updates:
            raise UsageError(
                "--keep-updates with a relay.",
                "a run without --keep-updates.",
                "the server receives no single update of the clients of a relay.",
                Line(shell="atoll serve"),
            )
        if self.population.clients and plan.sampler(self.population, 0, Key(0)).chance.dim():
            raise UsageError(
                f"{plan.sampler!r} with a relay.",
                "a sampler that gives all clients the same chance.",
                "a relay weighs its clients by their own rows, and unequal chances depend on the rows of all.",
                Part("Everyone()", "cohort"),
            )

    def _reported(self, relay: int, leaves: tuple[wire.Leaf, ...]) -> None:
        """Number the clients of a relay, and record their rows."""
        database, names = self.home.database, [leaf.name for leaf in leaves]
        try:
            self._check_relays(required(self._begun, "plan"))
            if len(set(names)) < len(names):
                raise UsageError("A relay names a client twice.", "each client once.")
        except UsageError as error:
            self.notify({"event": "refused", "client": relay, "code": "relay", "reason": str(error)})
            return self.net.handle(events.Dismissed(relay, "relay", plain_text(str(error))))
        name = self._name(relay)
        numbers = database.number_leaves(name, names, self.spec.clients)
        rules = self.net.coordinator.limits.rules(required(self.spec.clients, "clients"), database.leaves(name))
        places = tuple(self._place(relay, *pair) for pair in zip(numbers, leaves, strict=True))
        for code, refused in self._relays.refuse(relay, places):
            others = f" and {len(refused) - 1} others" if len(refused) > 1 else ""
            reason = f"{name}/{refused[0].name}{others}: {rules.refusal(refused[0])}"
            self.notify({"event": "refused", "client": relay, "code": code, "reason": reason})
        return self.net.handle(events.Numbered(relay, wire.Numbers(places, int(self._memory), rules)))

    def _place(self, relay: int, number: int, leaf: wire.Leaf) -> wire.Place:
        """The place of a client of a relay. Its rows are recorded, or it has a code."""
        if number >= wire.RELAYS:
            return wire.Place(leaf.name, number, "places")
        self._relays.of_leaf[number] = relay
        if leaf.rows is None:
            return wire.Place(leaf.name, number, "")
        known = self._rows.get(number)
        if known not in (None, leaf.rows) or max(leaf.rows, leaf.held) > self.spec.max_rows:
            return wire.Place(leaf.name, number, "rows")
        if known is None:
            self._rows[number], self._held[number], self._new_rows = leaf.rows, leaf.held, True
            self.home.database.record_rows(number, leaf.rows, leaf.held, self._hashes[0])
            self.notify({"event": "present", "client": number, "rows": leaf.rows, "relay": relay})
        return wire.Place(leaf.name, number, "")

    def _check_sum(self, plan: Plan) -> None:
        """Refuse a secure sum that a network cannot form."""
        if plan.aggregator.secure is None:
            return
        if self.spec.clients is None:
            raise UsageError(
                f"{plan.aggregator!r} in an open run.",
                "a closed run, whose clients are fixed.",
                "the grid of the sum follows from the largest cohort and from the rows of all clients.",
                Change("clients", 6),
            )
        if self.population.clients and plan.sampler(self.population, 0, Key(0)).chance.dim():
            raise UsageError(
                f"{plan.aggregator!r} with {plan.sampler!r} over a network.",
                "a sampler that gives all clients the same chance.",
                "a site masks its contribution times its own weight, which would depend on the rows of all sites.",
                Part("Everyone()", "cohort"),
            )

    def await_clients(self, plan: Plan, state: State) -> None:
        """Wait until the clients of a closed run have joined, or until enough clients of an open run are present."""
        wanted = self.spec.clients
        while True:
            if wanted is not None and len(self._rows) >= wanted:
                break
            if wanted is None and len(self._present) >= self.spec.min_clients:
                break
            self.awaited = tuple(i for i in range(wanted or 0) if i not in self._rows)
            if self.stop_at is not None:
                raise Stopped
            self._take(None)
        self.awaited = ()
        self._populate()

    def _populate(self) -> None:
        """Make the population from the rows that are known."""
        if (
            not self._new_rows
            or not self._rows
            or (self.spec.clients is not None and len(self._rows) < self.spec.clients)
        ):
            return
        sizes = torch.zeros(max(self._rows) + 1, dtype=torch.int64)
        for client, rows in self._rows.items():
            sizes[client] = rows
        if self._population.clients != len(sizes) or not torch.equal(self._population.sizes, sizes):
            self._population = Population(len(sizes), sizes, self._population.version + 1)
        self._new_rows = False

    def gather(self, plan: Plan, state: State, cohort: Cohort, key: Key, keep: Collection[int] = ()) -> Gathered:
        """Send the work of a round and fold the messages that arrive.

        Raises:
            RunError: all clients failed with the same error, more failed than the plan allows, or a client of a closed
                run refuses it.
            UsageError: a client of `keep` did not arrive.
        """
        if self._plan is None or self._plan[0] is not plan:
            self._plan = plan, plan_text(plan), MessageForm.of(plan, self.task)
        self._relays.check_kept(keep)
        self._fold = fold = Fold(plan, state.round, keep)
        self._state, self._key = state, key
        self._flying = {sent.flight.number for sent in self._assigned.values()}
        away = None if self.spec.clients is not None else self._is_away
        send, receive = self._send, self._receive
        if plan.aggregator.secure is not None:
            self._sums, self._void = self._sum_round(plan, state), False
            send, receive = self._sums.start, self._receive_sum
        self._arriving = loop = ArrivalLoop(plan, state, self.population, cohort, send, receive, time.monotonic, away)
        began = time.perf_counter()
        try:
            flown = loop.run()
        finally:
            self.awaited, self._sums, self._summing, self._arriving = (), None, False, None
            self.gather_s = time.perf_counter() - began
        if not plan.pace.asynchronous:
            self._withdraw()
        self._versions = {v: known for v, known in self._versions.items() if v in state.versions or v == state.round}
        needed: list[wire.Blob | bytes | None] = [sent.work.rest for sent in self._assigned.values()]
        needed += [known.fixed for known in self._versions.values()]
        needed += [delta for sent in self._assigned.values() for delta in sent.work.deltas]
        hashes = {blob.hash for blob in needed if isinstance(blob, wire.Blob)}
        self.net.keep_blobs(hashes | {known.hash for known in self._versions.values()} | {self._hashes[0]})
        found = gathered(plan, state, flown, fold.results, ChunkLimit(), keep)
        return found._replace(void=self._void, notes=(*found.notes, *self._relays.take_note()))

    def _is_away(self, client: int) -> bool:
        """Whether a client of an open run cannot start now: it is absent, or its policy has refused this plan."""
        return client not in self._present or self._refusing.get(client) == required(self._plan, "plan")[1]

    @property
    def judges(self) -> bool:
        """Whether sites hold rows out."""
        return self.spec.held_out > 0

    def score(self, state: State, of: Local | None = None) -> SiteScores | None:
        """Evaluate a model, or those of the sites, on their held-out rows. A site that keeps its values is left out."""
        present = self._rows if self.spec.clients is not None else self._present
        clients = [client for client in sorted(present) if self._held.get(client)]
        if not clients:
            return None
        model = Broadcast(state.round, state.model, {})
        # A site draws the first values of its own part by the seed.
        found = self._ask("evaluate", "held", Plan(Evaluate(of), Mean()), model, clients, Key(state.seed))
        count = 1 + max(self._rows)
        names = {record.id: record.name for record in self.home.database.clients()}
        rows = torch.zeros(count, dtype=torch.int64)
        sums: dict[str, torch.Tensor] = {}
        for client, each in found.items():
            rows[client] = int(each["rows"])
            for name, value in each.items():
                if name != "rows":
                    sums.setdefault(name, value.new_zeros(count, *value.shape[1:]))[client] = value[0]
        return (
            SiteScores(tuple(names.get(i, str(i)) for i in range(count)), rows, sums, self._answered_bytes)
            if found
            else None
        )

    def measure(self, part: Moments, state: State) -> dict[str, torch.Tensor]:
        """The sums of the train rows of the sites, `[sites, …]` by name.

        Args:
            part: the sums.
            state: its model travels with the work.
        Raises:
            RunError: a site of a closed run does not answer, no site does, or one that answered before does not.
        """
        present = self._rows if self.spec.clients is not None else self._present
        model = Broadcast(state.round, state.model, {})
        found = self._ask("moments", "train", Plan(part, Mean()), model, self._measured or sorted(present), Key(0))
        if not found:
            raise RunError("No site sends the statistics of its rows.", "one site whose policy allows it.")
        gone = [self._name(client) for client in self._measured if client not in found]
        if gone:
            raise RunError(
                f"The sites {', '.join(gone)} left between two gathers of statistics.",
                "the same sites in all gathers.",
                "a deviation around the mean of other rows is another number.",
            )
        self._measured = tuple(found)
        names = next(iter(found.values()))
        return {name: torch.cat([each[name].reshape(1, -1) for each in found.values()]) for name in names}

    def _ask(
        self, kind: wire.WorkKind, rows: wire.RowsKind, plan: Plan, model: Broadcast, clients: Collection[int], key: Key
    ) -> dict[int, Tensors]:
        """The sums of each of these clients, `[1, …]`, outside the rounds. A client that fails or refuses is absent.

        Raises:
            RunError: a client of a closed run fails.
        """
        # The round whose step the model contains is still open: it is committed after its evaluation.
        text, form = plan_text(plan), MessageForm.of(plan, self.task)
        version = self._packed(model)
        self._answers, self._answered_bytes = {}, 0
        direct = [client for client in clients if client not in self._relays.of_leaf]
        for client in direct:
            name = wire.work_id(self.run, kind, client, model.round, 0, text, version.hash)
            self._asked[name] = client, form, kind
            work = self._work(name, kind, rows, max(0, model.round - 1), model.round, 0, plan, text, key, version)
            self.net.handle(events.Assigned(client, work, form.shortest, form.longest))
        for relay, starts in self._relays.split((client, 0) for client in clients).items():
            name = wire.work_id(self.run, kind, relay, model.round, 0, text, version.hash)
            start = max(0, model.round - 1), model.round, 0
            work = self._work(wire.gather_id(name, starts), kind, rows, *start, plan, text, key, version)
            self.net.handle(self._relays.ask(relay, work, starts, form))
        try:
            while self._asked or self._relays.open:
                awaited = [client for client, _, _ in self._asked.values()]
                self.awaited = tuple(sorted([*awaited, *self._relays.awaited]))
                self._take(None)
        finally:
            self.awaited = ()
        return dict(sorted(self._answers.items()))

    def commit(self, round: int) -> None:
        """Send `Settled` for the contributions of a round that is on disk."""
        works, self._folded = tuple(self._folded), []
        if works:
            self.net.post(events.Committed(works))  # it travels with the work of the next round, or with the end

    def interrupt(self) -> None:
        """End the open round at the latest after `drain` seconds."""
        if self.stop_at is None:
            self._stop_in(self.spec.drain)

    def _stop_in(self, seconds: float) -> None:
        self.stop_at = time.monotonic() + seconds
        if self._net is not None:
            self._net.inbox.put(None)

    def accepted(self) -> tuple[Accepted, ...]:
        """The contributions that were folded since the last call."""
        found, self._accepted = tuple(self._accepted), []
        return found

    def describe(self) -> Mapping[str, Any]:
        """Facts for `environment.json`."""
        return {"federation": self.home.database.federation, "closed": self.spec.clients is not None}

    def finish(self, code: wire.ByeCode, reason: str, final: bytes | None = None, retry_s: float | None = None) -> None:
        """Send the present clients the end of the run, and wait until they have left.

        Args:
            code: the code of the `Bye`.
            reason: the reason for people.
            final: the bytes of the final model; None: it is not shared.
            retry_s: the seconds after which a client connects again; None: by the code.
        """
        if self._net is None:
            return
        blob = self.net.offer(final) if final is not None and self.spec.share else None
        retry = retry_s if retry_s is not None else 1.0 if code == "draining" else 5.0
        self.net.handle(events.Closing(wire.Bye(code, reason, retry, blob), self.spec.drain))
        until = time.monotonic() + self.spec.drain
        while not self._drained and time.monotonic() < until:
            try:
                self._act(self.net.inbox.get(timeout=max(0.0, until - time.monotonic())))
            except queue.Empty:
                return

    def close(self) -> None:
        """End the event loop and close the database. A second call does nothing."""
        ended = self._net is None or self._net.stop()
        self._net = None
        if ended:  # a thread that still reads the database must not find it closed
            self.home.close()
        self._open.close()

    # work

    def _send(self, flight: Flight) -> None:
        """Assign the work of a flight, before the next wait. The work of an earlier round may be assigned already."""
        if flight.number in self._flying:
            return
        if flight.client in self._relays.of_leaf:
            self._flying.add(flight.number)
            return self._relays.flights.append(flight)
        plan, text, form = required(self._plan, "plan")
        state, version = self._state, self._version(flight.version)
        key = self._key if flight.version == state.round else state.key(flight.version)
        name = wire.work_id(self.run, "round", flight.client, flight.version, flight.again, text, version.hash)
        start = state.round, flight.version, flight.again
        work = self._compressed(self._work(name, "round", "train", *start, plan, text, key, version), flight)
        self._assigned[name] = _Sent(flight, work)
        self._flying.add(flight.number)
        deadline = plan.pace.deadline_s
        at = None if deadline is None or plan.pace.asynchronous else time.monotonic() + deadline
        self._starting.append(events.Assigned(flight.client, work, form.shortest, form.longest, at))

    def _relay_works(self) -> list[events.Assigned]:
        """The works of the flights below relays that begin together: one for each relay."""
        flights = {(flight.client, flight.again): flight for flight in self._relays.flights}
        self._relays.flights.clear()
        if not flights:
            return []
        plan, text, form = required(self._plan, "plan")
        state, version, out = self._state, self._version(self._state.round), []
        for relay, starts in self._relays.split(flights).items():
            name = wire.work_id(self.run, "round", relay, state.round, 0, text, version.hash)
            start = state.round, state.round, 0
            work = self._work(wire.gather_id(name, starts), "round", "train", *start, plan, text, self._key, version)
            mine = {(one.client, one.repeat): flights[one.client, one.repeat] for one in starts}
            out.append(self._relays.send(relay, work, starts, mine, PartialForm.of(plan, self.task, form)))
        return out

    def _work(
        self,
        name: bytes,
        kind: wire.WorkKind,
        rows: wire.RowsKind,
        round: int,
        start: int,
        repeat: int,
        plan: Plan,
        text: str,
        key: Key,
        version: _Version,
    ) -> wire.Work:
        """The message of a work, without its lease."""
        return wire.Work(
            name,
            kind,
            rows,
            round,
            start,
            repeat,
            text,
            wire.WireKey(str(key.seed), tuple(key.path)),
            self.task.numerics if plan.local.numerics is None else plan.local.numerics,  # type: ignore[arg-type]
            self._hashes[1],
            self._hashes[0],
            version.field,
            (),
            None,
            version.fixed,
            0,
            None,
            wire.Lease(0, 0),
            None,
        )

    def _compressed(self, work: wire.Work, flight: Flight) -> wire.Work:
        """The work with the deltas that lead from the last version of this client to that of the work.

        A version that was sent before is not sent again. A client that has lost its version asks for the whole blob.
        """
        sent = self._state.sent
        if sent is None or not all(sent.messages):
            return work
        last = self._sent_to.get(flight.client)
        self._sent_to[flight.client] = flight.version
        missed = len(sent.messages) + 1 if last is None else flight.version - last
        if flight.version != self._state.round or not 0 < missed <= len(sent.messages):
            return work
        deltas, rest = sent.messages[-missed:], self._version(flight.version).rest
        if sum(map(len, deltas)) + len(rest) <= wire.MAX_INLINE:
            return msgspec.structs.replace(work, deltas=deltas, rest=rest)
        return msgspec.structs.replace(work, deltas=tuple(map(self.net.offer, deltas)), rest=self.net.offer(rest))

    # secure sums

    def _sum_round(self, plan: Plan, state: State) -> SumRound:
        """The secure sum of a round. Attempts that a former start of the server began are over."""
        database, place = self.home.database, f"{self.run} {state.round} "
        last = database.get("attempt") or ""
        first = int(last.removeprefix(place)) + 1 if last.startswith(place) else 0
        return SumRound(
            plan.aggregator.secure,
            {client.id: client.identity for client in database.clients() if client.identity is not None},
            lambda flight, attempt: self._assign_sum(flight, plan, attempt),
            self._withdraw_works,
            lambda client, piece: self.net.handle(events.Stepping(client, piece)),
            lambda attempt: self._begin_attempt(f"{place}{attempt}"),
            lambda clients: int(self._weights(plan, clients).sum()),
            self.spec.step_s,
            self.spec.keys_s,
            lambda: self._present,
            first,
        )

    def _begin_attempt(self, attempt: str) -> None:
        """Write an attempt to disk. If the one before it has received a contribution, the round is charged again."""
        if self._sums is not None and self._sums.masked:
            self._sums.masked = False
            self.charge()
        self.home.database.put("attempt", attempt)

    def _weights(self, plan: Plan, clients: list[int]) -> torch.Tensor:
        """The weights of clients, by their rows."""
        ids = torch.tensor(clients, dtype=torch.int64)
        return plan.aggregator.weigh(ids, self.population.sizes[ids])

    def _assign_sum(self, flight: Flight, plan: Plan, attempt: int) -> tuple[wire.Work, Agreement]:
        """Assign the work of a flight in an attempt of a secure sum."""
        state, text, version = self._state, required(self._plan, "plan")[1], self._version(flight.version)
        start = flight.client, flight.version, flight.again
        name = wire.work_id(self.run, "round", *start, text, version.hash, attempt)
        whole = state.round, flight.version, flight.again
        plain = self._work(name, "round", "train", *whole, plan, text, self._key, version)
        work = msgspec.structs.replace(plain, attempt=attempt, sum=wire.SumTerms(*sum_limits(plan, self.population)))
        work = self._compressed(work, flight)
        self._assigned[name] = _Sent(flight, work)
        agreement = agreement_of(self.run, work, version.hash, plan, self.task)
        length = longest_bodies(agreement)[MASKED]
        self.net.handle(events.Assigned(flight.client, work, length, length))
        return work, agreement

    def _withdraw_works(self, works: Iterable[bytes]) -> None:
        """Withdraw works of an attempt that has no sum."""
        self.net.handle(events.Withdrawn(tuple(work for work in works if self._assigned.pop(work, None) is not None)))

    def _receive_sum(self, left: float | None) -> list[Landed]:
        """Wait for messages of clients, and close the steps of the secure sum that are complete or overdue."""
        sums = required(self._sums, "secure sum")
        outcome = None if self._summing else sums.begin()
        self._summing = True
        if outcome is None:
            self.awaited = sums.awaited
            if self.awaited:
                self._take(sums.left(time.monotonic()))
            outcome = sums.advance(time.monotonic())
        if outcome is not None:
            self._end_sum(outcome)
        landed, self._landed = self._landed, []
        return landed

    def _end_sum(self, outcome: SumOutcome) -> None:
        """Put the sum of a round into its results."""
        plan, results = required(self._plan, "plan")[0], required(self._fold, "open round").results
        self._void = outcome.void
        for flight, cause in outcome.lost:
            self._landed.append(Landed(flight.number, "sum", cause or "it is not in the sum"))
        if outcome.sum is None or not isinstance(plan.aggregator, Mean):
            return
        ids = torch.tensor([one.flight.client for one in outcome.arrived])
        columns = {"bytes_up": [one.up for one in outcome.arrived], "bytes_down": [one.down for one in outcome.arrived]}
        weights = self._weights(plan, ids.tolist()).tolist()
        total = plan.aggregator.partial(outcome.sum.words, outcome.sum.weight, len(ids))
        results.partials[self._state.round] = total
        results.arrived.append(ids)
        results.facts.append({name: torch.tensor(values) for name, values in columns.items()})
        for one, weight in zip(outcome.arrived, weights, strict=True):
            message, flight = one.delivered, one.flight
            start = flight.client, flight.version, flight.again
            self._accepted.append(Accepted(*start, message.work, message.after, events.NO_DIGEST, weight))
            self._folded.append(message.work)
            self._assigned.pop(message.work, None)
            self._landed.append(Landed(flight.number))

    def _version(self, version: int) -> _Version:
        """The bytes of a model version, which are made once."""
        if version not in self._versions:
            self._versions[version] = self._packed(self._state.version(version), self._state.sent is not None)
        return self._versions[version]

    def _packed(self, model: Broadcast, compressed: bool = False) -> _Version:
        """The bytes of a broadcast without its frozen tensors, for a downlink that is compressed or not."""
        tensors = {n: t for n, t in pack_broadcast(model).items() if not n.startswith("fixed/")}
        data, frozen = tensor_bytes(tensors), model.model.fixed
        fixed = self.net.offer(tensor_bytes({f"fixed/{n}": t for n, t in frozen.items()})) if frozen else None
        if compressed:
            blob = self.net.offer(data)
            del tensors["theta"]
            return _Version(blob, blob.hash, fixed, tensor_bytes(tensors))
        if len(data) <= wire.MAX_INLINE:
            return _Version(data, wire.digest(data), fixed)
        blob = self.net.offer(data)
        return _Version(blob, blob.hash, fixed)

    def _withdraw(self) -> None:
        """Withdraw the works of the round that did not arrive before its end."""
        late: list[events.Rejected] = []
        for action in drained(self.net.inbox):
            if isinstance(action, events.Deliver):
                late.append(events.Rejected(action.work))
            else:
                self._act(action)
        works, self._assigned = (*self._assigned, *self._relays.withdraw()), {}
        if works or late:  # a late message is not an invalid one
            self.net.handle(*([events.Withdrawn(works)] if works else ()), *late)

    # arrivals

    def _receive(self, left: float | None) -> list[Landed]:
        """Assign the works that have begun, wait for messages of clients, and fold all that have arrived."""
        starting, self._starting = [*self._starting, *self._relay_works()], []
        self.net.handle(*starting)
        direct = [sent.flight.client for sent in self._assigned.values()]
        self.awaited = tuple(sorted([*direct, *self._relays.awaited]))
        messages = len(self._assigned) + len(self._relays.open)
        self.net.awaits = min(messages, 1 if self._arriving is None else self._arriving.missing)
        try:
            self._take(left)
        finally:
            self.net.awaits = 0
        landed, self._landed = self._landed, []
        return landed

    def _take(self, left: float | None) -> None:
        """Wait for at least one action of the coordinator, at most `left` seconds, and carry out all that are there."""
        self.net.handle()
        limits = [t for t in (left, None if self.stop_at is None else self.stop_at - time.monotonic()) if t is not None]
        try:
            arrived = self._arrived(time.monotonic() + max(0.0, min(limits)) if limits else None)
        except queue.Empty:
            if self.stop_at is not None and time.monotonic() >= self.stop_at:
                raise Stopped from None
            self.net.handle()  # messages that wait for others have arrived before the deadline, too
            arrived = drained(self.net.inbox)
        messages = [action for action in arrived if isinstance(action, events.Deliver)]
        others = [action for action in arrived if not isinstance(action, events.Deliver)]
        del arrived
        for action in others:
            self._act(action)
        self._fold_all(messages)

    def _arrived(self, until: float | None) -> list[Any]:
        """The actions of the coordinator.

        Raises:
            queue.Empty: there was none until this time.
        """
        arrived = drained(self.net.inbox)
        if not arrived:
            with lend_generators():  # clients in other threads of this process compute meanwhile
                arrived = [self.net.inbox.get(timeout=None if until is None else max(0.0, until - time.monotonic()))]
                arrived += drained(self.net.inbox)
        return arrived

    def _act(self, action: Any) -> None:
        match action:
            case events.Present(client=client, rows=rows, held=held):
                self._present[client], self._held[client] = rows, held
                if self._rows.get(client) != rows:
                    self._rows[client], self._new_rows = rows, True
                    self.home.database.record_rows(client, rows, held, self._hashes[0])
                self.notify({"event": "present", "client": client, "rows": rows})
                if self._sums is not None:
                    self._sums.again(client)
            case events.Stepped(message=message):
                if self._sums is not None:
                    self._sums.stepped(message)
            case events.Gone(client=client):
                self._present.pop(client, None)
                self.notify({"event": "gone", "client": client})
            case events.Failed(client=client, work=work, code=code, reason=reason):
                self._failed(client, work, code, reason)
            case events.Refused(client=client, code=code, reason=reason):
                self.notify({"event": "refused", "client": client, "code": code, "reason": reason})
                if self.spec.clients is not None:
                    name = self._name(client)
                    raise RunError(
                        f"Client {client} ({name}) refuses the run: {code}. {reason}",
                        "clients that take part in the run.",
                        "the run is closed, so it cannot go on without this client.",
                    )
            case events.Reported(client=client, leaves=leaves):
                self._reported(client, leaves)
            case events.Forget(client=client):
                self.home.database.forget_memory(client)
            case events.Noted(client=client, code=code, work=work):
                if code == "session" and self._sums is not None:
                    self._sums.lost(client, "it left the session")
                self.notify({"event": "noted", "client": client, "code": code, "work": _hex(work)})
            case events.Drained():
                self._drained = True
            case BaseException():
                raise action
            case _:
                pass

    def _name(self, client: int) -> str:
        return next((c.name for c in self.home.database.clients() if c.id == client), "")

    def _failed(self, client: int, work: bytes, code: str, reason: str) -> None:
        """Record a work that ended without a contribution."""
        self.notify({"event": "lost", "client": client, "work": work.hex(), "code": code, "reason": reason})
        if work in self._asked:
            _, _, kind = self._asked.pop(work)
            return self._unanswered(client, kind, code, reason)
        if (gather := self._relays.open.pop(work, None)) is not None:
            for start in gather.starts:
                self._lost_below(gather, wire.Lost(start.client, start.repeat, code, reason))
            return
        sent = self._assigned.pop(work, None)
        if sent is None or self._fold is None:
            return
        if self._sums is not None and code == "session":
            return self._sums.lost(client, reason)  # another attempt may have a sum
        if self._sums is not None:
            self._sums.gone(client)
        self._lost_flight(sent.flight, code, reason)

    def _lost_below(self, gather: RelayWork, lost: wire.Lost) -> None:
        """Record a client of a relay without a contribution."""
        if gather.flights is None:
            return self._unanswered(lost.client, gather.work.kind, lost.code, lost.reason)
        return self._lost_flight(gather.flights[lost.client, lost.repeat], lost.code, lost.reason)

    def _lost_flight(self, flight: Flight, code: str, reason: str) -> None:
        """Record a flight that ended without a contribution."""
        client, fold = flight.client, required(self._fold, "open round")
        if code in _ABSENT:
            self._landed.append(Landed(flight.number, "network", reason))
            return
        if code.startswith("policy-") and self.spec.clients is not None:
            raise RunError(
                f"Client {client} ({self._name(client)}) refuses the plan: {code}. {reason}",
                "a plan that the policy of every site allows.",
                "the run is closed, so it cannot go on without this client.",
            )
        if code.startswith("policy-"):
            self._refusing[client] = required(self._plan, "plan")[1]
            self._landed.append(Landed(flight.number, "policy", f"{code}: {reason}"))
            return
        stage = {"failed": "local", "length": "check", "check": "check", "revoked": "identity"}.get(code, "site")
        fold.fail(client, flight.version, stage, reason if code in ("failed", "check") else f"{code}: {reason}")
        if code == "failed":
            fold.results.errors.append(RuntimeError(reason))
        self._landed.append(Landed(flight.number))

    def _unanswered(self, client: int, kind: wire.WorkKind, code: str, reason: str) -> None:
        """Record a work outside the rounds that ended without an answer."""
        self.notify({"event": "refused", "client": client, "code": code, "reason": reason})
        if code == "policy-values" and kind == "evaluate":
            self._held[client] = 0  # it is not asked again
        elif self.spec.clients is not None:
            raise RunError(
                f"Client {client} ({self._name(client)}) sends no sums of its rows: {code}. {reason}",
                "the evaluation, or the statistics, of every site.",
                "the mean over the other sites is another number.",
            )

    def _answered(self, message: events.Deliver) -> None:
        """Read the answer to a work outside the rounds."""
        client, form, kind = self._asked.pop(message.work)
        good = self._take_answer(client, form, kind, message.body)
        self.net.handle((events.Folded if good else events.Rejected)(message.work))

    def _take_answer(self, client: int, form: MessageForm, kind: wire.WorkKind, body: Buffer) -> bool:
        """Read the sums of a client outside the rounds. Returns whether they are valid."""
        try:
            rest = form.from_bytes([body]).rest
            if kind == "moments" and int(rest.sums["rows"]) != self._rows[client]:
                raise MessageError("The sums are of another number of rows.", "the rows of the client.")
        except MessageError as error:
            self._unanswered(client, kind, "invalid", error.given)
            return False
        self._answers[client] = rest.sums
        self._answered_bytes += len(body)
        return True

    def _take_partial(self, message: events.Deliver) -> None:
        """Check the contribution of a relay and put it into the results of its clients."""
        gather = self._relays.open.pop(message.work)
        try:
            found = gather.read(message.body, self._rows, required(self._begun, "plan"))
        except MessageError as error:
            self.notify({"event": "lost", "client": message.client, "work": message.work.hex(), "code": "invalid",
                         "reason": error.given})  # fmt: skip
            for start in gather.starts:
                code = "check" if gather.flights is not None else "invalid"
                self._lost_below(gather, wire.Lost(start.client, start.repeat, code, error.given.rstrip(".")))
            return self.net.handle(events.Rejected(message.work))
        for lost in found.head.lost:
            self._lost_below(gather, lost)
        if gather.flights is None:
            form = required(gather.answers, "form of the answers")
            for one, body in zip(found.head.arrived, found.bodies, strict=True):
                self._take_answer(one.client, form, gather.work.kind, body)
            return self.net.handle(events.Folded(message.work))
        self._merge_partial(gather, found, message)
        return self.net.handle(events.Folded(message.work))

    def _merge_partial(self, gather: RelayWork, found: Received, message: events.Deliver) -> None:
        """Put the partial of a relay into the open round."""
        flights, plan = required(gather.flights, "flights"), required(self._plan, "plan")[0]
        landed = [flights[one.client, one.repeat] for one in found.head.arrived]
        if landed:
            results = required(self._fold, "open round").results
            results.add(plan.aggregator, found.results(gather.work.version, plan, [f.down for f in landed]))
        self._landed += [Landed(flight.number) for flight in landed]
        self._folded.append(message.work)
        start = gather.work.version, gather.work.repeat
        self._accepted.append(Accepted(message.client, *start, message.work, message.after, message.digest, 0))
        for one in found.head.arrived:
            text, hash = gather.work.plan, self._version(gather.work.version).hash
            name = wire.work_id(self.run, "round", one.client, gather.work.version, one.repeat, text, hash)
            mine = one.client, gather.work.version, one.repeat
            self._accepted.append(Accepted(*mine, name, None, message.digest, one.rows))

    def _fold_all(self, messages: list[events.Deliver]) -> None:
        """Check and fold messages: short ones of one version together."""
        groups: dict[int, list[events.Deliver]] = {}
        for message in messages:
            if message.work in self._asked:
                self._answered(message)
                continue
            if message.work in self._relays.open:
                self._take_partial(message)
                continue
            sent = self._assigned.get(message.work)
            if sent is None:
                self.net.handle(events.Rejected(message.work))
                continue
            if self._sums is not None:
                self.net.handle((events.Folded if self._sums.upload(message) else events.Rejected)(message.work))
                continue
            groups.setdefault(sent.flight.version, []).append(message)
        messages.clear()  # a body is freed as soon as it is folded
        for group in groups.values():
            group.reverse()
            while group:
                some = [group.pop()]
                size = len(some[0].body)
                while group and (size := size + len(group[-1].body)) <= TOGETHER:
                    some.append(group.pop())
                self._fold_or_reject(some)

    def _fold_or_reject(self, group: list[events.Deliver]) -> None:
        """Fold messages of one version together, or one by one if one of them is not valid."""
        try:
            self._fold_some(group)
        except MessageError:
            for message in group:
                try:
                    self._fold_some([message])
                except MessageError as error:
                    self._reject(message, error.given.partition(": ")[2].rstrip(".") or error.given)

    def _fold_some(self, group: list[events.Deliver]) -> None:
        """Fold messages of one version.

        Raises:
            MessageError: a message is not valid; then none of them is folded.
        """
        plan, _, form = required(self._plan, "plan")
        fold = required(self._fold, "open round")
        flights = [self._assigned[message.work].flight for message in group]
        ids = Ids(torch.tensor([f.client for f in flights]), torch.tensor([f.again for f in flights]))
        rows = self.population.sizes[ids.client]
        rows = torch.ones_like(rows) if plan.releases else rows  # with noise a client does not send its rows
        decoded = read_messages(plan, form, [message.body for message in group], rows)
        up = torch.tensor([len(message.body) for message in group])
        down = torch.tensor([flight.down for flight in flights])
        good, _ = fold.add(flights[0].version, ids, down, up, decoded)
        kept = set(zip(good.client.tolist(), good.repeat.tolist(), strict=True))
        ends: list[events.Folded | events.Rejected] = []
        for message, flight, weight in zip(group, flights, rows.tolist(), strict=True):
            self._landed.append(Landed(flight.number))
            del self._assigned[message.work]
            if (flight.client, flight.again) not in kept:
                ends.append(events.Rejected(message.work))
                continue
            if self.spec.keep_updates:
                self._keep(message)
            self._folded.append(message.work)
            start = flight.client, flight.version, flight.again
            self._accepted.append(Accepted(*start, message.work, message.after, message.digest, weight))
            ends.append(events.Folded(message.work))
        short = max(len(message.body) for message in group) <= wire.MAX_INLINE
        (self.net.post if short else self.net.handle)(*ends)  # a long one frees its part of the window

    def _keep(self, message: events.Deliver) -> None:
        """Keep an accepted message on disk. A round that is not committed receives it again, with the same bytes."""
        folder = self.home.path / "updates" / self.run
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            (folder / message.work.hex()).write_bytes(message.body)
        except OSError as error:
            raise RunError(
                f"The update {message.work.hex()} cannot be kept in {folder}: {error.strerror or error}.",
                "free space on the disk of the home.",
            ) from error

    def _reject(self, message: events.Deliver, cause: str) -> None:
        self.notify(
            {"event": "lost", "client": message.client, "work": message.work.hex(), "code": "invalid", "reason": cause}
        )
        flight = self._assigned.pop(message.work).flight
        required(self._fold, "open round").fail(flight.client, flight.version, "check", cause)
        self._landed.append(Landed(flight.number))
        self.net.handle(events.Rejected(message.work))


def drained(inbox: queue.SimpleQueue[Any]) -> list[Any]:
    """All actions that are in the inbox now."""
    found = []
    while True:
        try:
            found.append(inbox.get_nowait())
        except queue.Empty:
            return found


def _hex(work: bytes | None) -> str | None:
    return None if work is None else work.hex()
