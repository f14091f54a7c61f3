"""The work of some clients: chunks of them computed in lanes and folded as they come; what every engine runs.

A chunk is K clients whose batches are padded to one width. How large it is, in which order chunks run and in which
process changes no bit: a lane's numbers depend on its own client alone, and the sum does not depend on order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import groupby
from operator import itemgetter
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from atoll.data.clients import Clients
from atoll.engine.arrivals import Flown, nbytes
from atoll.engine.device import give_back, out_of_memory
from atoll.engine.room import Room, lanes_of, no_sum, too_large
from atoll.errors import AtollError, RunError
from atoll.known import forget
from atoll.plan.aggregate.exact import LARGEST, bounded
from atoll.plan.codec import Identity
from atoll.plan.conflicts import check_contribution, check_partials
from atoll.plan.in_flight import Flight
from atoll.plan.lanes import HOST, Lanes
from atoll.plan.plan import Plan
from atoll.plan.protocols import Aggregator, Broadcast, Contribution, Ids, Tensors
from atoll.plan.round import Failure, Gathered
from atoll.plan.state import State, part_of
from atoll.rng import Key
from atoll.task import Task

_DROPPED = "dropped out"

Start = Callable[[int], tuple[Broadcast, Key]]  # of a birth: what its clients were told, and what they draw by


class Kept(Protocol):
    """What clients keep, as the work reads it; what is put here is what the same clients read afterwards."""

    def take(self, ids: Tensor) -> dict[str, Tensor]: ...
    def put(self, ids: Tensor, rows: Mapping[str, Tensor]) -> None: ...


class Haul(NamedTuple):
    """What some work came to: partial sums by birth, and the record of who gave them.

    Args:
        partials: by birth.
        failures: contributions that were lost.
        errors: what clients raised.
        arrived: ids of accepted clients, int64 `[K]` a chunk.
        facts: one row an accepted client, a chunk each.
        memory: what accepted clients keep: ids `[K]` and rows `[K, …]`, a chunk each.
    """

    partials: dict[int, Any]
    failures: list[Failure]
    errors: list[Exception]
    arrived: list[Tensor]
    facts: list[Mapping[str, Tensor]]
    memory: list[tuple[Tensor, Mapping[str, Tensor]]]

    @classmethod
    def none(cls) -> Haul:
        """What no work comes to."""
        return cls({}, [], [], [], [], [])

    def add(self, rule: Aggregator, other: Haul) -> None:
        """Add what other work came to, in place."""
        for birth, partial in other.partials.items():
            mine = self.partials.get(birth)
            self.partials[birth] = partial if mine is None else _merged(rule, mine, partial)
        self.failures.extend(other.failures)
        self.errors.extend(other.errors)
        self.arrived.extend(other.arrived)
        self.facts.extend(other.facts)
        self.memory.extend(other.memory)


def _merged(rule: Aggregator, a: Any, b: Any) -> Any:
    """The partial of both."""
    check_partials(rule, a, b)
    return rule.merge(a, b)


def own_task(plan: Plan, task: Task) -> Task:
    """The task in the body that a local part asks for, where it asks for one of its own."""
    own = plan.local.numerics
    return task if own is None or own == task.numerics else replace(task, numerics=own)


def births(flights: list[Flight]) -> Iterator[tuple[int, Ids, Tensor]]:
    """The starts of these flights by model version, and the bytes that each client was sent, int64 `[K]`.

    A client may start more than once in a round. The pair (client, repeat) names a start of a round.
    """
    by: dict[int, list[tuple[int, int, int]]] = {}
    for client, birth, again, _, size, _ in flights:
        by.setdefault(birth, []).append((client, again, size))
    for birth in sorted(by):
        clients, repeats, down = torch.tensor(list(zip(*by[birth], strict=True))).unbind()
        yield birth, Ids(clients, repeats), down


def cut(flights: list[Flight]) -> dict[tuple[int, int], float]:
    """The fraction of its work that a start (client, repeat) had time for, if that is less than 1."""
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
    """Clients of one width together, largest first, a chunk of at most `most` at a time; None chooses by the model.

    Args:
        plan, task, data: what is computed.
        ids, down: the starts, and the bytes that each client was sent, int64 `[K]`.
        most, room: see `lanes_of`.
        scale: how many times as many as that.
    Yields:
        The starts of a chunk, and the bytes that each client was sent, int64 `[K]`.
    """
    if down.shape[0] < 2:
        if down.shape[0]:
            yield ids, down
        return
    sizes = data.sizes[ids.client]
    largest = int(sizes.max())
    chunk = max(1, int(scale * lanes_of(plan, task, data, largest, most, room)))
    if largest == int(sizes.min()):
        for *pair, sent in zip(ids.client.split(chunk), ids.repeat.split(chunk), down.split(chunk), strict=True):
            yield Ids(*pair), sent
        return
    sizes, order = torch.sort(sizes, descending=True, stable=True)
    values, counts = (t.tolist() for t in torch.unique_consecutive(sizes, return_counts=True))
    alike = groupby(zip(map(plan.local.padded_batch, values), counts, strict=True), key=itemgetter(0))
    runs = [sum(count for _, count in group) for _, group in alike]
    for run in order.split(runs):
        for some in run.split(chunk):
            yield ids.select(some), down[some]


class Work:
    """Work under way: what has been computed so far.

    Args:
        plan: the algorithm, bound to the engine.
        task: in the body that computes, `own_task`.
        data: all clients.
        start: what the clients of a birth were told, and their key.
        kept: what clients keep.
        now: the round that is open.
        cut: the fraction of its work that a start (client, repeat) had time for, if that is less than 1.
        room: what is known of the memory; what does not fit is learned here.
    """

    def __init__(
        self,
        plan: Plan,
        task: Task,
        data: Clients,
        start: Start,
        kept: Kept,
        now: int,
        cut: Mapping[tuple[int, int], float] = MappingProxyType({}),
        room: Room | None = None,
    ) -> None:
        self.plan, self.task, self.data, self.start, self.kept, self.now = plan, task, data, start, kept, now
        self.cut, self.room = cut, room or Room()
        self.far = task.device != HOST
        self._compared = False
        self.haul = Haul.none()
        self._wave: list[tuple[Tensor, Mapping[str, Tensor]]] = []

    def run(self, birth: int, ids: Ids, down: Tensor) -> None:
        """Compute a chunk and fold what it gives; a client that raises is found by halving the chunk.

        Args:
            birth: the round whose model the clients started from.
            ids: the starts.
            down: the bytes that each was sent, int64 `[K]`.
        """
        if not self.cut:
            return self._run_chunk(birth, ids, down)
        # Those who had time for all their work together, each of the others by itself.
        short = torch.tensor([pair in self.cut for pair in zip(*(t.tolist() for t in ids), strict=True)])
        for part in ((~short).nonzero()[:, 0], *short.nonzero()):
            if len(part):
                self._run_chunk(birth, ids.select(part), down[part])

    def _run_chunk(self, birth: int, ids: Ids, down: Tensor) -> None:
        most = self.room.most
        if most is not None and down.shape[0] > most:
            for at in torch.arange(down.shape[0]).split(most):
                self._run_chunk(birth, ids.select(at), down[at])
            return
        halves = self._try_chunk(birth, ids, down)
        if halves:  # by now nothing holds what the whole chunk had computed
            give_back(self.task.device)
        for half in halves:
            self._run_chunk(birth, ids.select(half), down[half])

    def _try_chunk(self, birth: int, starts: Ids, down: Tensor) -> tuple[slice, ...]:
        """Compute a chunk and fold what it gives; or the halves of it that are to be tried instead."""
        ids = starts.client
        many, half = ids.shape[0], -(-ids.shape[0] // 2)
        try:
            contribution, memory, sizes = self.contribute(birth, starts)
        except AtollError:
            raise
        except Exception as error:
            if out_of_memory(error):
                if many == 1:
                    client = int(ids[0])
                    raise too_large(self.plan, self.task, client, int(self.data.sizes[client]), error) from error
                self.room.learn(half)
            if many == 1:
                self._fail(int(ids[0]), birth, "local", f"{type(error).__name__}: {error}")
                self.haul.errors.append(error)
                return ()
            return slice(half), slice(half, None)
        try:
            self._check(birth, starts, down, contribution, memory, sizes)
        except Exception as error:
            if not out_of_memory(error):
                raise
            raise no_sum(self.task, many, error) from error  # a sum that was begun cannot be begun again
        return ()

    def _check(
        self,
        birth: int,
        starts: Ids,
        down: Tensor,
        contribution: Contribution,
        memory: Mapping[str, Tensor],
        sizes: Tensor,
    ) -> None:
        """Accept what is finite of a chunk."""
        ids = starts.client
        many = ids.shape[0]
        good = None
        for name, rows in (*contribution.means.items(), *contribution.sums.items()):
            flat = rows if rows.dim() == 2 else rows.reshape(many, -1)  # a view would not know what was told of it
            if rows.numel() and bounded(flat):
                continue
            high, low = flat.amax(1).double(), flat.amin(1).double()  # in float32 the bound itself is infinite
            finite = ((high <= LARGEST) & (low >= -LARGEST)).to(ids.device)
            good = torch.ones_like(finite) if good is None else good
            for i in ids[good & ~finite].tolist():
                self._fail(i, birth, "check", f"{name} is not finite")
            good &= finite
        facts = {**contribution.per_client, "rows": contribution.weight, "bytes_up": sizes, "bytes_down": down}
        if self.plan.pace.asynchronous:
            facts["staleness"] = torch.full_like(ids, self.now - birth)
        self._accept(birth, starts, good, contribution._replace(per_client=facts), memory)

    def _accept(
        self, birth: int, starts: Ids, good: Tensor | None, contribution: Contribution, memory: Mapping[str, Tensor]
    ) -> None:
        if good is not None:
            starts, memory = starts.select(good), {n: t[good] for n, t in memory.items()}
            picked = (
                {n: t[good] for n, t in part.items()}
                for part in (contribution.means, contribution.sums, contribution.counters, contribution.per_client)
            )
            means, sums, largest, facts = picked
            contribution = Contribution(means, sums, contribution.weight[good], largest, facts)
        ids = starts.client
        if not ids.shape[0]:
            return
        if self.far:  # sums are taken where they were computed; what is told of single clients comes to the host
            sums = {n: t.to(self.task.device) for n, t in contribution.sums.items()}
            facts = {n: t.to(HOST) for n, t in contribution.per_client.items()}
            memory = {n: t.to(HOST) for n, t in memory.items()}
            contribution = contribution._replace(sums=sums, weight=contribution.weight.to(HOST), per_client=facts)
        rule, partials = self.plan.aggregator, self.haul.partials
        partial = partials.get(birth)
        partials[birth] = rule.fold(rule.zero() if partial is None else partial, contribution, starts)
        self.haul.arrived.append(ids)
        self.haul.facts.append(contribution.per_client)
        if memory:
            self._wave.append((ids, memory))

    def landed(self) -> None:
        """What a wave of clients keeps is what the same clients start from in the next wave."""
        for ids, rows in self._wave:
            self.kept.put(ids, rows)
        self.haul.memory.extend(self._wave)
        self._wave = []

    def contribute(self, birth: int, starts: Ids) -> tuple[Contribution, Mapping[str, Tensor], Tensor]:
        """The contributions of a chunk, opened, with the size of each message in bytes, int64 `[K]`."""
        ids, repeats = starts
        share = self.cut.get((int(ids[0]), int(repeats[0])), 1.0) if self.cut else 1.0
        lanes = Lanes(self.data, ids, self.task.layout.dtype, share, self.task.device)
        kept = self.kept.take(ids)
        if self.far:
            kept = {n: t.to(self.task.device) for n, t in kept.items()}
        broadcast, key = self.start(birth)
        key = key.starts(ids, repeats)
        contribution, local = self.plan.local.contribute(
            broadcast, lanes, part_of(kept, "local"), key.fold("clients", "local"), self.task
        )
        memory = {f"local/{n}": t for n, t in local.items()}
        rest = rest_of(contribution)
        update = contribution.means.get("update")
        if update is None:
            self._compare(contribution, {}, ids, birth)
            return contribution, memory, torch.full(ids.shape, rest)
        payload, side, sums, codec = self.plan.codec.encode(
            update, part_of(kept, "codec"), broadcast.shared["codec"], self._key(key.fold("codec"))
        )
        memory |= {f"codec/{n}": t for n, t in codec.items()}
        self._compare(contribution, sums, ids, birth)
        if sums:
            contribution = contribution._replace(sums={**contribution.sums, **sums})
            rest = rest_of(contribution)
        opened = {**contribution.means, "update": self.plan.codec.decode(payload, side)}
        if self.plan.codec != Identity():
            forget(opened["update"])
        sizes = self.plan.codec.sizes(payload, side)
        return contribution._replace(means=opened), memory, (sizes.to(HOST) if self.far else sizes) + rest

    def _compare(self, contribution: Contribution, sums: Tensors, ids: Tensor, birth: int) -> None:
        """Compare the first contribution with the declarations of the local part and the codec."""
        if not self._compared:
            check_contribution(self.plan, self.task, contribution, sums, int(ids[0]), birth)
            self._compared = True

    def _key(self, key: Key) -> Key:
        """A key whose draws meet what was computed."""
        return key.to(self.task.device) if self.far else key

    def _fail(self, client: int, birth: int, stage: str, cause: str) -> None:
        self.haul.failures.append(Failure(client, birth, stage, cause))


def gathered(plan: Plan, state: State, flown: Flown, haul: Haul, room: Room) -> Gathered:
    """What a round brought back, or the reason to end the run.

    Raises:
        RunError: the same error struck every client, or more failed than the plan allows.
    """
    # Everybody who was at work: who started in this round, and who still was from earlier ones.
    asked = len(state.air.flights) + flown.started - flown.late
    dropped = [Failure(f.client, f.birth, "network", _DROPPED) for f in flown.dropped]
    failures = sorted([*dropped, *haul.failures])  # by client: the order of chunks tells nothing
    if failures and len(failures) == asked:
        _all_failed(failures, haul.errors)
    if len(failures) > plan.max_failed * asked:
        first = failures[0]
        raise RunError(
            f"{len(failures)} of {asked} clients failed in round {state.round}; "
            f"first client {first.client}, at {first.stage}: {first.cause}.",
            f"at most the fraction max_failed = {plan.max_failed}.",
            "what is left would be another cohort than the sampler drew. The state is that of the round before.",
            "atoll lr" if "not finite" in first.cause else "--set plan.max_failed=1.0",
        )
    ids, facts = _columns(haul)
    return Gathered(
        haul.partials or {state.round: plan.aggregator.zero()},
        ids,
        tuple(haul.memory),
        facts,
        tuple(failures),
        int(facts["bytes_up"].sum()) if facts else 0,
        flown.sent,
        flown.air,
        flown.started,
        flown.late,
        flown.now,
        flown.trips,
        room.said(),
    )


def _columns(haul: Haul) -> tuple[Tensor, dict[str, Tensor]]:
    """Who arrived, by rising id, and what each told in the clear."""
    if not haul.arrived:
        return torch.empty(0, dtype=torch.int64), {}
    names = sorted(set.intersection(*map(set, haul.facts)))
    if len(haul.arrived) == 1 and haul.arrived[0].shape[0] == 1:
        return haul.arrived[0], {n: haul.facts[0][n] for n in names}
    ids = torch.cat(haul.arrived)
    order = torch.argsort(ids, stable=True)
    return ids[order], {n: torch.cat([f[n] for f in haul.facts])[order] for n in names}


def _all_failed(failures: list[Failure], errors: list[Exception]) -> None:
    """Every client failed: the same way is a fault of the program, not of the clients."""
    (cause, count), *_ = Counter(f.cause for f in failures).most_common()
    if count < len(failures) or (not errors and cause == _DROPPED):
        return  # who is cut off says nothing about the program
    first = failures[0]
    raise RunError(
        f"Every client of round {first.round} failed in the same way, at {first.stage}: {cause}.",
        "a model, a loss and data that fit each other, and a step that stays finite.",
        "what strikes every client alike is a fault of the program or of the learning rate, not of a client.",
        "atoll lr" if first.stage == "check" else "atoll run --smoke",
    ) from (errors[0] if errors else None)


def rest_of(contribution: Contribution) -> int:
    """The bytes of one client's message beside the encoded update: other means, sums, counters, 8 for the weight."""
    whole = nbytes(contribution.means) + nbytes(contribution.sums) + nbytes(contribution.counters)
    if "update" in contribution.means:
        update = contribution.means["update"]
        whole -= update.numel() * update.element_size()
    return whole // contribution.weight.shape[0] + 8
