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
from math import prod
from operator import itemgetter
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor

from atoll.base.errors import AtollError, ClientError, RunError, UsageError, place_of
from atoll.base.lines import Change, Line, Write
from atoll.base.random import Key
from atoll.compute import limits
from atoll.compute.batches import HOST, ROWS
from atoll.compute.device import empty_cache, out_of_memory
from atoll.compute.task import Task
from atoll.data.clients import Clients
from atoll.engine.chunk_limit import ChunkLimit, chunk_size, no_sum, too_large
from atoll.engine.contribution import IN_CODEC, Chunk, Fold, Results, encode_contribution
from atoll.engine.simulation.arrivals import Arrivals
from atoll.plan.conflicts import check_contribution
from atoll.plan.in_flight import Flight
from atoll.plan.plan import Plan
from atoll.plan.protocols import Broadcast, Contribution, Ids, Tensors
from atoll.plan.round import Failure, Gathered, Kept, read_only_memory
from atoll.plan.state import State, part_of

Start = Callable[[int], tuple[Broadcast, Key]]  # model version → broadcast and round key of its clients


class ClientRows(Protocol):
    """The client state that chunks read and write. Later chunks of a client read the rows that `put` wrote."""

    def take(self, ids: Tensor, read_only: str = "") -> dict[str, Tensor]: ...
    def put(self, ids: Tensor, rows: Tensors) -> None: ...


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
    """Cut starts into chunks, clients with more rows first.

    A chunk has one padded width. If the local part takes several widths together, clients whose rows have few bytes
    share a chunk, since the Python code of a chunk then takes longer than its arithmetic.

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
    runs = [(width, sum(count for _, count in group)) for width, group in equal]
    for run in order.split(_joined(runs, prod(data.features) * task.layout.dtype.itemsize, plan.local.mixes_widths)):
        for some in run.split(chunk):
            yield ids.select(some), down[some]


def _joined(runs: list[tuple[int, int]], row_bytes: int, mixes: bool) -> list[int]:
    """Join neighbouring runs of clients while their padded rows have at most `limits.JOINED_BYTES` bytes.

    Args:
        runs: the padded width and the number of clients of each run.
        row_bytes: the bytes of the features of a row.
        mixes: whether the local part takes clients of several widths together.
    Returns:
        The number of clients of each joined run.
    """
    out: list[int] = []
    total = limits.JOINED_BYTES + 1
    for width, count in runs:
        size = width * count * row_bytes if mixes and width <= ROWS else limits.JOINED_BYTES + 1
        if total + size > limits.JOINED_BYTES:
            out.append(count)
            total = size
        else:
            out[-1] += count
            total += size
    return out


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
        self.fold = Fold(plan, now, keep, task.device)
        self._wave: list[tuple[Tensor, Tensors]] = []
        self._read_only = read_only_memory(plan)

    @property
    def results(self) -> Results:
        """The results of the chunks that have run."""
        return self.fold.results

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
            memory = self.memory.take(ids.client, self._read_only)
            try:
                plan, task, data = self.plan, self.task, self.data
                # Without a name for the encoded updates: after an error no tensor of the chunk stays in memory.
                chunk = Chunk.of(plan, *encode_contribution(plan, task, data, broadcast, ids, key, memory, share=share))
            except Exception as error:
                if isinstance(error, AtollError) and not isinstance(error, ClientError):
                    raise
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
        own = error.given.rstrip(".") if isinstance(error, ClientError) else ""
        stage = "encode" if IN_CODEC in vars(error).get("__notes__", ()) else "local"
        name = type(error).__name__
        cause = (
            name if not self.plan.shows_clients else own or f"{name}: {error}"
        )  # a text may contain numbers of the rows
        self.fold.fail(client, version, stage, cause)
        self.results.errors.append(error)
        return False

    def _fold(self, version: int, ids: Ids, down: Tensor, chunk: Chunk) -> None:
        """Fold the finite contributions of a chunk into the partial sum of its version."""
        given, decoded, sizes, memory = chunk
        try:
            ids, rows = self.fold.add(version, ids, down, sizes, decoded, memory, given)
        except Exception as error:
            if not out_of_memory(error):
                raise
            # A part of the rows has been added; they cannot be added a second time.
            raise no_sum(self.task, ids.client.shape[0], error) from error
        if rows:
            self._wave.append((ids.client, rows))

    def commit_wave(self) -> None:
        """Write the new state of the clients that have run, so that a later start of the same client reads it."""
        for ids, rows in self._wave:
            self.memory.put(ids, rows)
        self.results.memory.extend(self._wave)
        self._wave = []


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
    absent = [Failure(d.flight.client, d.flight.version, d.stage, d.cause) for d in flown.dropped]
    broken = sorted(results.failures)
    failures = sorted([*absent, *broken])  # by client: the order of chunks carries no information
    if broken and len(broken) == asked:
        _all_failed(broken, results.errors)
    # An absent client is no error of the program: an outage does not end a run.
    if len(broken) > plan.max_failed * asked:
        first = broken[0]
        raise RunError(
            f"{len(broken)} of {asked} clients failed in round {state.round}; "
            f"first client {first.client}, at {first.stage}: {first.cause}.",
            f"at most the fraction max_failed = {plan.max_failed}.",
            "the rest would be another cohort than the sampler drew. The state is that of the round before.",
            "atoll lr" if "not finite" in first.cause else Change("plan.max_failed", 1.0),
        )
    ids, facts = _columns(results)
    kept = tuple(sorted(results.kept, key=itemgetter(2, 1, 0)))
    missing = sorted(set(keep) - {k.client for k in kept}) if keep else ()
    if missing:
        raise UsageError(
            f"keep = {sorted(keep)}: no contribution of client {missing[0]} arrived in round {state.round}.",
            f"clients that arrived: {', '.join(map(str, ids.tolist()[:20]))}{', …' if len(ids) > 20 else ''}.",
            "only the contribution of a client that arrived can be kept.",
            Line(python=f"keep=({int(ids[0])},)" if len(ids) else "keep=()"),
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
    if count < len(failures):
        return
    first = failures[0]
    required, source, write = _CAUSES.get(first.stage, _CAUSES["local"])
    place = place_of(errors[0]) if errors else ""
    raise RunError(
        f"Every client of round {first.round} failed in the same way, at {first.stage}: {cause}."
        f"{f' It was raised in {place}.' if place else ''}",
        required,
        f"all clients failed with the same error, so the cause is {source}.",
        write,
    ) from (errors[0] if errors else None)


# stage of the failure: the requirement, the possible causes, the line to write
_CAUSES: dict[str, tuple[str, str, Write]] = {
    "check": ("a step that stays finite.", "the learning rate, the model or the loss", "atoll lr"),
    "encode": ("a codec that encodes every update.", "the codec of the plan", ""),
    "local": (
        "a model, a loss, an optimizer and data that fit each other.",
        "the model, the loss, the data or the local part of the plan, with its optimizer",
        Line(shell="atoll run --smoke"),
    ),
}
