"""Chunks of clients: a chunk is trained at once, and its contributions are folded into the partial sum of its version.

A chunk is K clients whose batches are padded to one width. The size of a chunk, the order of chunks and the process
that runs a chunk change no bit: the numbers of a lane depend on its own client only, and the sum does not depend on the
order.

Tests: tests/identities/test_chunks.py
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from itertools import groupby
from operator import itemgetter
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from atoll.base.errors import AtollError, RunError, UsageError
from atoll.base.random import Key
from atoll.compute.batches import HOST, ClientBatch, OnStep
from atoll.compute.device import empty_cache, out_of_memory
from atoll.compute.task import Task
from atoll.compute.tensor_notes import drop
from atoll.data.clients import Clients
from atoll.engine.chunk_limit import ChunkLimit, chunk_size, no_sum, too_large
from atoll.engine.simulation.arrivals import Arrivals, nbytes
from atoll.plan.aggregate.exact import LARGEST, bounded
from atoll.plan.codec import Identity
from atoll.plan.conflicts import check_contribution, check_partials, check_rows
from atoll.plan.in_flight import Flight
from atoll.plan.plan import Plan
from atoll.plan.protocols import Aggregator, Broadcast, Contribution, Ids, Tensors
from atoll.plan.round import Failure, Gathered, Kept
from atoll.plan.state import State, part_of

_DROPPED = "dropped out"

Start = Callable[[int], tuple[Broadcast, Key]]  # model version → broadcast and round key of its clients


class Chunk(NamedTuple):
    """The results of K clients.

    Args:
        contribution: the contribution as the local part returned it.
        decoded: the contribution as the server receives it: its update was encoded, and each message was decoded.
        bytes: the length of each client's message in bytes, int64 `[K]`, in CPU memory.
        memory: the client state after the round, rows `[K, …]`; the keys are `part/name`.
    """

    contribution: Contribution
    decoded: Contribution
    bytes: Tensor
    memory: dict[str, Tensor]


def contribute_chunk(
    plan: Plan,
    task: Task,
    data: Clients,
    broadcast: Broadcast,
    ids: Ids,
    key: Key,
    memory: Tensors,
    on_step: OnStep | None = None,
    share: float = 1.0,
) -> Chunk:
    """Train K clients and encode their updates. This is a pure function.

    gᵢ = local(θ, dataᵢ) ;  mᵢ = encode(gᵢ) ;  decoded = decode(mᵢ)

    Args:
        plan: the algorithm, after `bind`.
        task: the model and loss; `task.numerics` names the backend.
        data: all clients.
        broadcast: the broadcast that these clients received. It contains one model for all lanes (θ `[d]`), or one
            model for each lane (θ `[K, d]`).
        ids: the K starts, clients with more rows first.
        key: the key of the round in which the clients started, `state.key(version)`.
        memory: the client state before the round, rows `[K, …]`; the keys are `part/name`.
        on_step: is called after each step with the lane, the number of the step and the mean loss of the lane's batch.
        share: the fraction of its steps that each client makes, in (0, 1].
    Raises:
        UsageError: a tensor of the contribution or of the codec has no row for each client.
        Exception: the error of the client that failed. It does not name the client: run a chunk of one client.
    """
    far = task.device != HOST
    lanes = ClientBatch(data, ids.client, task.layout.dtype, share, task.device, on_step)
    if far:
        memory = {n: t.to(task.device) for n, t in memory.items()}
    key = key.starts(ids.client, ids.repeat)
    contribution, local = plan.local.contribute(
        broadcast, lanes, part_of(memory, "local"), key.fold("clients", "local"), task
    )
    start = len(ids.client), int(ids.client[0]), broadcast.round
    weight = {"weight": contribution.weight}
    for tensors in (contribution.means, contribution.sums, contribution.counters, weight):
        check_rows(plan.local, tensors, *start)
    after = {f"local/{n}": t for n, t in local.items()}
    overhead = overhead_bytes(contribution)
    update = contribution.means.get("update")
    if update is None:
        return Chunk(contribution, contribution, torch.full(ids.client.shape, overhead), after)
    key = key.fold("codec")
    payload, side, sums, codec = plan.codec.encode(
        update, part_of(memory, "codec"), broadcast.shared["codec"], key.to(task.device) if far else key
    )
    check_rows(plan.codec, sums, *start)
    after |= {f"codec/{n}": t for n, t in codec.items()}
    opened = plan.codec.decode(payload, side)
    if plan.codec != Identity():
        drop(opened)
    decoded = contribution._replace(means={**contribution.means, "update": opened})
    if sums:
        decoded = decoded._replace(sums={**contribution.sums, **sums})
        overhead = overhead_bytes(decoded)
    sizes = plan.codec.sizes(payload, side)
    return Chunk(contribution, decoded, (sizes.to(HOST) if far else sizes) + overhead, after)


class ClientRows(Protocol):
    """The client state that chunks read and write. Later chunks of a client read the rows that `put` wrote."""

    def take(self, ids: Tensor) -> dict[str, Tensor]: ...
    def put(self, ids: Tensor, rows: Tensors) -> None: ...


class Results(NamedTuple):
    """Results of running some clients: a partial sum for each model version, and the ids of the clients.

    Args:
        partials: the partial sums; the keys are model versions.
        failures: the contributions that were lost.
        errors: the exceptions that clients raised.
        arrived: the ids of accepted clients, one tensor int64 `[K]` for each chunk.
        facts: the columns of the report, one table for each chunk, with one row for each accepted client.
        memory: the new client state of accepted clients, one pair for each chunk: ids `[K]` and rows `[K, …]`.
        kept: the contributions that the caller asked for.
    """

    partials: dict[int, Any]
    failures: list[Failure]
    errors: list[Exception]
    arrived: list[Tensor]
    facts: list[Tensors]
    memory: list[tuple[Tensor, Tensors]]
    kept: list[Kept]

    @classmethod
    def empty(cls) -> Results:
        """Empty results, before any client has run."""
        return cls({}, [], [], [], [], [], [])

    def add(self, rule: Aggregator, other: Results) -> None:
        """Add the results of other clients, in place."""
        for version, partial in other.partials.items():
            mine = self.partials.get(version)
            if mine is not None:
                check_partials(rule, mine, partial)
                partial = rule.merge(mine, partial)
            self.partials[version] = partial
        self.failures.extend(other.failures)
        self.errors.extend(other.errors)
        self.arrived.extend(other.arrived)
        self.facts.extend(other.facts)
        self.memory.extend(other.memory)
        self.kept.extend(other.kept)


def task_for(plan: Plan, task: Task) -> Task:
    """The task with the backend that the local part requires, if it requires one."""
    own = plan.local.numerics
    return task if own is None or own == task.numerics else replace(task, numerics=own)


def by_version(flights: list[Flight]) -> Iterator[tuple[int, Ids, Tensor]]:
    """Group flights by the model version that their clients started from.

    A start is the event that a client receives the model and begins to train. A client may start several times in one
    round. `repeat` is 0 for its first start in the round, 1 for the second, and so on, so that the pair (client,
    repeat) identifies one start among those of a round.

    Yields:
        For each version, ascending: the version, the starts of its K flights, and the bytes that the server sent to
        the client for each start, int64 `[K]`.
    """
    by: dict[int, list[tuple[int, int, int]]] = {}
    for client, version, repeat, _, size, _ in flights:
        by.setdefault(version, []).append((client, repeat, size))
    for version in sorted(by):
        clients, repeats, sizes = zip(*by[version], strict=True)
        ids, down = torch.tensor((clients, sizes)).unbind()
        yield version, Ids(ids, torch.tensor(repeats) if any(repeats) else torch.zeros_like(ids)), down


def partial_work(flights: list[Flight]) -> dict[tuple[int, int], float]:
    """The fraction of its work that a client had time for, for each start (client, repeat) with a fraction below 1."""
    return {(f.client, f.again): f.share for f in flights if f.share < 1}


def chunks(
    plan: Plan,
    task: Task,
    data: Clients,
    ids: Ids,
    down: Tensor,
    most: int | None,
    room: int | None = None,
    scale: float = 1.0,
) -> Iterator[tuple[Ids, Tensor]]:
    """Cut starts into chunks of one padded width, clients with more rows first.

    Args:
        plan, task, data: the algorithm, the model and all clients.
        ids, down: the K starts, and the bytes that the server sent to the client for each start, int64 `[K]`.
        most, room: limits on the size of a chunk, explained at `chunk_size`.
        scale: a factor that multiplies the size of a chunk.
    Yields:
        The K starts of a chunk, and the bytes that the server sent to the client for each start, int64 `[K]`.
    """
    if down.shape[0] < 2:
        if down.shape[0]:
            yield ids, down
        return
    sizes = data.sizes[ids.client]
    largest = int(sizes.max())
    chunk = max(1, int(scale * chunk_size(plan, task, data, largest, most, room)))
    if largest == int(sizes.min()):
        for *pair, sent in zip(ids.client.split(chunk), ids.repeat.split(chunk), down.split(chunk), strict=True):
            yield Ids(*pair), sent
        return
    sizes, order = torch.sort(sizes, descending=True, stable=True)
    values, counts = (t.tolist() for t in torch.unique_consecutive(sizes, return_counts=True))
    equal = groupby(zip(map(plan.local.padded_batch, values), counts, strict=True), key=itemgetter(0))
    runs = [sum(count for _, count in group) for _, group in equal]
    for run in order.split(runs):
        for some in run.split(chunk):
            yield ids.select(some), down[some]


class ChunkRunner:
    """Runs chunks of a round and collects their results.

    Args:
        plan: the algorithm, bound to the engine.
        task: the result of `task_for`.
        data: all clients.
        start: returns the broadcast and the round key of a model version.
        memory: the client state.
        now: the number of the open round.
        shares: the result of `partial_work`.
        room: the limit on the size of a chunk that fits into memory; the runner lowers it when memory runs out.
        keep: the ids of the clients whose contributions are kept in the results.
        compare: whether the runner checks the next contribution against the declarations of the plan's parts. It
            checks only one and then sets `compare` to False.
    """

    def __init__(
        self,
        plan: Plan,
        task: Task,
        data: Clients,
        start: Start,
        memory: ClientRows,
        now: int,
        shares: Mapping[tuple[int, int], float] = MappingProxyType({}),
        room: ChunkLimit | None = None,
        keep: Collection[int] = (),
        compare: bool = True,
    ) -> None:
        self.plan, self.task, self.data, self.start, self.memory, self.now = plan, task, data, start, memory, now
        self.shares, self.room, self.keep, self.compare = shares, room or ChunkLimit(), frozenset(keep), compare
        self.far = task.device != HOST
        self.results = Results.empty()
        self._wave: list[tuple[Tensor, Tensors]] = []

    def run(self, version: int, ids: Ids, down: Tensor) -> None:
        """Train a chunk and fold its contributions. If a client raises, the chunk is halved until the client is found.

        Args:
            version: the round whose model the clients started from.
            ids: the K starts of the chunk.
            down: the bytes that the server sent to the client for each start, int64 `[K]`.
        """
        broadcast, key = self.start(version)
        todo = [(ids, down)] if not self.shares else self._by_share(ids, down)
        while todo:
            ids, down = todo.pop()
            most, count = self.room.most, down.shape[0]
            if most is not None and count > most:
                todo += [(ids.select(at), down[at]) for at in reversed(torch.arange(count).split(most))]
                continue
            share = self.shares.get((int(ids.client[0]), int(ids.repeat[0])), 1.0) if self.shares else 1.0
            memory = self.memory.take(ids.client)
            try:
                chunk = contribute_chunk(self.plan, self.task, self.data, broadcast, ids, key, memory, share=share)
            except AtollError:
                raise
            except Exception as error:
                if not self._fits_in_halves(version, ids, error):
                    continue
            else:
                if self.compare:
                    self._compare(version, ids, chunk)
                if not self.keep:
                    chunk = chunk._replace(contribution=chunk.decoded)  # frees the updates as they were before encoding
                self._fold(version, ids, down, chunk)
                del chunk
                continue
            empty_cache(self.task.device)  # the error and all tensors of the chunk are gone by now
            half = -(-count // 2)
            todo += [(ids.select(at), down[at]) for at in (slice(half, None), slice(half))]

    def _compare(self, version: int, ids: Ids, chunk: Chunk) -> None:
        """Compare the first contribution with the declarations of the local part and the codec."""
        given, received = chunk.contribution, chunk.decoded.sums
        added = {} if received is given.sums else {n: t for n, t in received.items() if n not in given.sums}
        check_contribution(self.plan, self.task, given, added, int(ids.client[0]), version)
        self.compare = False

    def _by_share(self, ids: Ids, down: Tensor) -> list[tuple[Ids, Tensor]]:
        """One chunk of all clients that make all their steps, and one for each other client, in reverse order."""
        short = torch.tensor([pair in self.shares for pair in zip(*(t.tolist() for t in ids), strict=True)])
        parts = [part for part in ((~short).nonzero()[:, 0], *short.nonzero()) if len(part)]
        return [(ids.select(part), down[part]) for part in reversed(parts)]

    def _fits_in_halves(self, version: int, ids: Ids, error: Exception) -> bool:
        """Whether to try the two halves of a chunk that raised. If it is a single client, record its failure."""
        count, client = ids.client.shape[0], int(ids.client[0])
        if out_of_memory(error):
            if count == 1:
                raise too_large(self.plan, self.task, client, int(self.data.sizes[client]), error) from error
            self.room.lower(-(-count // 2))
        if count > 1:
            return True
        self._fail(client, version, "local", f"{type(error).__name__}: {error}")
        self.results.errors.append(error)
        return False

    def _fold(self, version: int, ids: Ids, down: Tensor, chunk: Chunk) -> None:
        """Fold the finite contributions of a chunk into the partial sum of its version."""
        try:
            self._accept(version, ids, down, chunk, self._finite(version, ids.client, chunk.decoded))
        except Exception as error:
            if not out_of_memory(error):
                raise
            # A part of the rows has been added; they cannot be added a second time.
            raise no_sum(self.task, ids.client.shape[0], error) from error

    def _finite(self, version: int, clients: Tensor, contribution: Contribution) -> Tensor | None:
        """Which rows are finite and small enough for the exact sum, bool `[K]`; None: all."""
        count, good = clients.shape[0], None
        for name, rows in (*contribution.means.items(), *contribution.sums.items()):
            flat = rows if rows.dim() == 2 else rows.reshape(count, -1)  # a view has no cached facts
            if rows.numel() and bounded(flat):
                continue
            high, low = flat.amax(1).double(), flat.amin(1).double()  # in float32 the bound itself is infinite
            finite = ((high <= LARGEST) & (low >= -LARGEST)).to(clients.device)
            good = torch.ones_like(finite) if good is None else good
            for client in clients[good & ~finite].tolist():
                self._fail(client, version, "check", f"{name} is not finite")
            good &= finite
        return good

    def _accept(self, version: int, ids: Ids, down: Tensor, chunk: Chunk, good: Tensor | None) -> None:
        _, contribution, sizes, memory = chunk
        facts = {**contribution.per_client, "rows": contribution.weight, "bytes_up": sizes, "bytes_down": down}
        if self.plan.pace.asynchronous:
            facts["staleness"] = torch.full_like(ids.client, self.now - version)
        contribution = contribution._replace(per_client=facts)
        if good is not None:
            ids, contribution = ids.select(good), rows_of(contribution, good)
            memory = {n: t[good] for n, t in memory.items()}
        if not ids.client.shape[0]:
            return
        if self.far:  # sums stay on the device; per-client values go to the host
            sums = {n: t.to(self.task.device) for n, t in contribution.sums.items()}
            facts = {n: t.to(HOST) for n, t in contribution.per_client.items()}
            memory = {n: t.to(HOST) for n, t in memory.items()}
            contribution = contribution._replace(sums=sums, weight=contribution.weight.to(HOST), per_client=facts)
        rule, partials = self.plan.aggregator, self.results.partials
        partial = partials.get(version)
        partials[version] = rule.fold(rule.zero() if partial is None else partial, contribution, ids)
        self.results.arrived.append(ids.client)
        self.results.facts.append(contribution.per_client)
        if memory:
            self._wave.append((ids.client, memory))
        if self.keep:
            raw = chunk.contribution if good is None else rows_of(chunk.contribution, good)
            self._keep(version, ids, raw, contribution)

    def _keep(self, version: int, ids: Ids, contribution: Contribution, decoded: Contribution) -> None:
        """Copy the contributions that the caller asked for."""
        for k, (client, repeat) in enumerate(zip(*(t.tolist() for t in ids), strict=True)):
            if client in self.keep:
                at = torch.tensor([k])
                self.results.kept.append(Kept(client, repeat, version, rows_of(contribution, at), rows_of(decoded, at)))

    def commit_wave(self) -> None:
        """Write the new state of the clients that have run, so that a later start of the same client reads it."""
        for ids, rows in self._wave:
            self.memory.put(ids, rows)
        self.results.memory.extend(self._wave)
        self._wave = []

    def _fail(self, client: int, version: int, stage: str, cause: str) -> None:
        self.results.failures.append(Failure(client, version, stage, cause))


def rows_of(contribution: Contribution, index: Tensor) -> Contribution:
    """Copies of some rows of a contribution, by position or by a mask `[K]`."""

    def some(tensors: Tensors) -> dict[str, Tensor]:
        return {n: t[index.to(t.device)] for n, t in tensors.items()}

    means, sums, weight, counters, columns = contribution
    return Contribution(some(means), some(sums), weight[index.to(weight.device)], some(counters), some(columns))


def kept_to_tensors(kept: list[Kept]) -> dict[str, Tensor]:
    """Convert kept contributions to named tensors in CPU memory."""
    out: dict[str, Tensor] = {}
    for i, (client, repeat, version, *both) in enumerate(kept):
        out[f"{i}/start"] = torch.tensor([client, repeat, version])
        for which, contribution in zip(("contribution", "decoded"), both, strict=True):
            for part, tensors in contribution._asdict().items():
                named = {"": tensors} if part == "weight" else tensors
                out |= {f"{i}/{which}/{part}/{n}": t.to(HOST) for n, t in named.items()}
    return out


def kept_from_tensors(tensors: Tensors) -> list[Kept]:
    """The inverse of `kept_to_tensors`. It copies the tensors."""
    out: list[Kept] = []
    for i in range(sum(name.endswith("/start") and name.count("/") == 1 for name in tensors)):
        both = []
        for which in ("contribution", "decoded"):
            parts: dict[str, Any] = {part: {} for part in Contribution._fields}
            for path, t in part_of(tensors, f"{i}/{which}").items():
                part, _, name = path.partition("/")
                parts[part][name] = t.clone()
            both.append(Contribution(**{**parts, "weight": parts["weight"][""]}))
        client, repeat, version = tensors[f"{i}/start"].tolist()
        out.append(Kept(client, repeat, version, *both))
    return out


def gathered(
    plan: Plan, state: State, flown: Arrivals, results: Results, room: ChunkLimit, keep: Collection[int] = ()
) -> Gathered:
    """The results of a round as an engine returns them.

    Raises:
        RunError: all clients failed with the same error, or more failed than the plan allows.
        UsageError: a client of `keep` did not arrive.
    """
    # All clients that participated: those that started in this round, and those that started earlier.
    asked = len(state.air.flights) + flown.started - flown.late
    dropped = [Failure(f.client, f.version, "network", _DROPPED) for f in flown.dropped]
    failures = sorted([*dropped, *results.failures])  # by client: the order of chunks carries no information
    if failures and len(failures) == asked:
        _all_failed(failures, results.errors)
    if len(failures) > plan.max_failed * asked:
        first = failures[0]
        raise RunError(
            f"{len(failures)} of {asked} clients failed in round {state.round}; "
            f"first client {first.client}, at {first.stage}: {first.cause}.",
            f"at most the fraction max_failed = {plan.max_failed}.",
            "the rest would be another cohort than the sampler drew. The state is that of the round before.",
            "atoll lr" if "not finite" in first.cause else "--set plan.max_failed=1.0",
        )
    ids, facts = _columns(results)
    kept = tuple(sorted(results.kept, key=itemgetter(2, 1, 0)))
    missing = sorted(set(keep) - {k.client for k in kept}) if keep else ()
    if missing:
        raise UsageError(
            f"keep = {sorted(keep)}: no contribution of client {missing[0]} arrived in round {state.round}.",
            f"clients that arrived: {', '.join(map(str, ids.tolist()[:20]))}{', …' if len(ids) > 20 else ''}.",
            "only the contribution of a client that arrived can be kept.",
            f"keep=({int(ids[0])},)" if len(ids) else "keep=()",
        )
    return Gathered(
        results.partials or {state.round: plan.aggregator.zero()},
        ids,
        tuple(results.memory),
        facts,
        tuple(failures),
        int(facts["bytes_up"].sum()) if facts else 0,
        flown.sent,
        flown.air,
        flown.started,
        flown.late,
        flown.now,
        flown.trips,
        room.take_note(),
        kept,
    )


def _columns(results: Results) -> tuple[Tensor, dict[str, Tensor]]:
    """The ids of the clients that arrived, ascending, and their columns."""
    if not results.arrived:
        return torch.empty(0, dtype=torch.int64), {}
    names = sorted(set.intersection(*map(set, results.facts)))
    if len(results.arrived) == 1 and results.arrived[0].shape[0] == 1:
        return results.arrived[0], {n: results.facts[0][n] for n in names}
    ids = torch.cat(results.arrived)
    order = torch.argsort(ids, stable=True)
    return ids[order], {n: torch.cat([f[n] for f in results.facts])[order] for n in names}


def _all_failed(failures: list[Failure], errors: list[Exception]) -> None:
    """Raise if all clients failed in the same way: then the cause is the program, not a client."""
    (cause, count), *_ = Counter(f.cause for f in failures).most_common()
    if count < len(failures) or (not errors and cause == _DROPPED):
        return  # a lost connection is no fault of the program
    first = failures[0]
    raise RunError(
        f"Every client of round {first.round} failed in the same way, at {first.stage}: {cause}.",
        "a model, a loss and data that fit each other, and a step that stays finite.",
        "all clients failed with the same error, so the cause is the model, the loss or the learning rate.",
        "atoll lr" if first.stage == "check" else "atoll run --smoke",
    ) from (errors[0] if errors else None)


def overhead_bytes(contribution: Contribution) -> int:
    """The bytes of a client's message without the encoded update: other means, sums, counters, and 8 for the weight."""
    whole = nbytes(contribution.means) + nbytes(contribution.sums) + nbytes(contribution.counters)
    if "update" in contribution.means:
        update = contribution.means["update"]
        whole -= update.numel() * update.element_size()
    return whole // contribution.weight.shape[0] + 8
