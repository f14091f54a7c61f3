"""The relays of a server: which clients are below which relay, and the open work of each relay.

Tests: tests/faults/test_relay.py
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import get_args

from atoll.base.errors import UsageError
from atoll.base.lines import Line
from atoll.net import coordinator as events
from atoll.net.partial import PartialForm, Received, read_answers
from atoll.net.store import ClientRecord
from atoll.net.wire import MAX_HEADER, RELAYS, Place, PlaceCode, Start, Work
from atoll.plan.form import Buffer
from atoll.plan.in_flight import Flight
from atoll.plan.message import MessageForm
from atoll.plan.plan import Plan

_HEAD = 1 << 12  # bytes of the head of a partial for each client at most, with the reason of a failure


@dataclass(frozen=True)
class RelayWork:
    """The open work of a relay.

    Args:
        relay: the number of the relay.
        work: the work.
        starts: its clients.
        flights: the flight of each start; None outside the rounds.
        sums: the form of its partial in a round.
        answers: the form of the message of each client outside the rounds.
    """

    relay: int
    work: Work
    starts: tuple[Start, ...]
    flights: Mapping[tuple[int, int], Flight] | None
    sums: PartialForm | None
    answers: MessageForm | None

    def read(self, body: Buffer, rows: Mapping[int, int], plan: Plan) -> Received:
        """Read its contribution.

        Args:
            body: the bytes.
            rows: the enrolled rows of each client.
            plan: the algorithm of the run.
        Raises:
            MessageError: it is not valid.
        """
        if self.sums is None:
            return read_answers(body, self.starts)
        return self.sums.from_bytes(body, self.starts, rows, plan.aggregator)

    def assigned(self) -> events.Assigned:
        """The event that sends it."""
        each = 0 if self.answers is None else self.answers.longest
        sums = 0 if self.sums is None else self.sums.longest
        most = sums + min(MAX_HEADER, (_HEAD + 64) * len(self.starts) + _HEAD) + (each + 256) * len(self.starts)
        return events.Assigned(self.relay, self.work, 4, most, starts=self.starts)


@dataclass
class Relays:
    """The relays of a run.

    Args:
        of_leaf: the relay of each client that has one.
        open: the open works, by name.
        flights: flights below relays whose work has not been sent yet.
        noted: whether a report has the note about relays.
        refused: the places of clients that take no part, of the last report of each relay, by their code.
    """

    of_leaf: dict[int, int] = field(default_factory=dict)
    open: dict[bytes, RelayWork] = field(default_factory=dict)
    flights: list[Flight] = field(default_factory=list)
    noted: bool = False
    refused: dict[tuple[int, str], tuple[Place, ...]] = field(default_factory=dict)

    def refuse(self, relay: int, places: Sequence[Place]) -> Iterator[tuple[str, tuple[Place, ...]]]:
        """The clients of a relay that take no part, by code, if they are others than in its last report."""
        for code in get_args(PlaceCode):
            found = tuple(place for place in places if place.code == code)
            if found and found != self.refused.get((relay, code)):
                yield code, found
            self.refused[relay, code] = found

    @classmethod
    def of(cls, clients: Iterable[ClientRecord]) -> Relays:
        """The relays in a database: the name of a client of a relay is RELAY/NAME."""
        clients = list(clients)
        relays = {client.name: client.id for client in clients if client.id >= RELAYS}
        return cls({one.id: relays[one.name.partition("/")[0]] for one in clients if "/" in one.name})

    @property
    def awaited(self) -> list[int]:
        """The clients of all open works."""
        return [start.client for work in self.open.values() for start in work.starts]

    def take_note(self) -> tuple[str, ...]:
        """The note of the first report with relays."""
        if not self.of_leaf or self.noted:
            return ()
        self.noted = True
        count, relays = len(self.of_leaf), len(set(self.of_leaf.values()))
        return (
            f"{count} clients are below {relays} relays. A relay is trusted: the server checks its clients, their rows "
            "and the range of its sums, and not the sums.",
        )

    def split(self, pairs: Iterable[tuple[int, int]]) -> dict[int, tuple[Start, ...]]:
        """The starts of each relay, ascending. Clients without a relay are left out."""
        out: dict[int, list[Start]] = {}
        for client, repeat in sorted(pairs):
            if client in self.of_leaf:
                out.setdefault(self.of_leaf[client], []).append(Start(client, repeat))
        return {relay: tuple(starts) for relay, starts in sorted(out.items())}

    def send(
        self,
        relay: int,
        work: Work,
        starts: tuple[Start, ...],
        flights: Mapping[tuple[int, int], Flight],
        form: PartialForm,
    ) -> events.Assigned:
        """Open the work of a round."""
        made = self.open[work.work] = RelayWork(relay, work, starts, flights, form, None)
        return made.assigned()

    def ask(self, relay: int, work: Work, starts: tuple[Start, ...], form: MessageForm) -> events.Assigned:
        """Open a work outside the rounds."""
        made = self.open[work.work] = RelayWork(relay, work, starts, None, None, form)
        return made.assigned()

    def withdraw(self) -> Sequence[bytes]:
        """Forget all open works. Returns their names."""
        names = tuple(self.open)
        self.open.clear()
        return names

    def check_kept(self, keep: Collection[int]) -> None:
        """Refuse to keep single contributions of clients of relays.

        Raises:
            UsageError: one of the clients is below a relay.
        """
        for client in sorted(set(keep) & self.of_leaf.keys()):
            raise UsageError(
                f"keep = {sorted(keep)}: client {client} is below a relay.",
                "clients without a relay.",
                "the server receives no single contribution of it.",
                Line(python="keep=()"),
            )
