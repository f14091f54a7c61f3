"""Commits of rounds, for tests of the database and for the processes that these tests end."""

from atoll.net.store import Accepted, RoundCommit
from atoll.net.wire import digest

RUN = "2026-11-30-calm-bay"


def work(client, round):
    return digest(f"{client}/{round}".encode())[:16]


def commit(round, clients=(0, 1), state=b"state", blobs=(), **changes):
    accepted = tuple(Accepted(c, round, 0, work(c, round), None, digest(b"message %d" % c), 10 + c) for c in clients)
    pointer = b'{"round": %d}' % round
    fields = dict(run=RUN, round=round, model=digest(b"model %d" % round), pointer=pointer, state=state, blobs=blobs)
    return RoundCommit(**{**fields, "accepted": accepted, "metrics": {"round": round, "loss": 0.5}, **changes})
