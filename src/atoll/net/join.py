"""Join a federation: open the home of a site, enrol if it is new, and work until the run is over.

Tests: tests/faults/test_rehearsal.py
"""

from __future__ import annotations

import asyncio
import json
import signal
import threading
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from atoll.base import grammar
from atoll.base.errors import RunError, UsageError
from atoll.base.validation import required
from atoll.compute.device import resolve_device
from atoll.data import load
from atoll.data import partition as partitions
from atoll.data.clients import Clients
from atoll.data.schema import Schema
from atoll.net import identity, wire
from atoll.net.client import Client, Ended, Membership, Notify, enrol, pause
from atoll.net.site import Loader, MemoryChain, Site
from atoll.net.store import claim_home
from atoll.net.terms import Own, RefusedError, Terms

_RENEWED_BY_TOKEN = ("revoked", "behind")
_CLOSE_S = 0.1  # aiohttp closes TLS connections in the background, and has no call that waits for it


def join_federation(
    token: str | None,
    home: Path,
    data: str,
    *,
    seat: bool = False,
    device: str = "cpu",
    own: Own | None = None,
    once: bool = False,
    notify: Notify = lambda facts: None,
) -> int:
    """Take part in a federation until the run is over.

    Args:
        token: the text of the token; None: the home is enrolled.
        home: the folder of the site.
        data: the rows of the site.
        seat: whether the client holds its part of the run's split.
        device: the device of the site.
        own: the site's own code by name.
        once: whether to end with the run.
        notify: receives the events of the client.
    Returns:
        The exit code: 0 the run is done, 1 it failed, 2 the server refuses this client.
    Raises:
        UsageError: the home, the token or the data is not valid.
        RunError: another certificate authority answers.
    """
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = claim_home(home)
    try:
        return asyncio.run(_join(token, home, _loader(data, seat), device, own or {}, once, notify))
    finally:
        lock.close()


async def _join(token: str | None, home: Path, load: Loader, device: str, own: Own, once: bool, notify: Notify) -> int:
    task = required(asyncio.current_task(), "task")
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    try:
        member = await _member(token, home, notify)
        site = Site(home, load, own, resolve_device(device))
        ended = await Client(member, site, notify, once).run()
    except asyncio.CancelledError:
        return 130
    finally:
        await pause(_CLOSE_S)
    return _exit_code(ended, member)


def _exit_code(ended: Ended, member: Membership) -> int:
    if ended.code in ("done", "draining"):
        return 0
    if ended.code == "failed":
        raise RunError(f"The run failed: {ended.reason}")
    again = ended.code in _RENEWED_BY_TOKEN
    write = f"atoll invite {member.name}" if again else ""
    raise UsageError(f"The server refuses this client: {ended.code}. {ended.reason}", write=write)


async def _member(token: str | None, home: Path, notify: Notify) -> Membership:
    """The membership of the home. A token enrols a new home, or renews the identity of the same client."""
    member = Membership.open(home)
    if token is None:
        if member is None:
            raise UsageError(
                f"The home {home} is not enrolled.",
                "the token of `atoll invite`, the first time.",
                write=f"atoll join - --home {home} --data digits",
            )
        return member
    found = identity.Token.read(token)
    if member is not None:
        if (member.federation, member.name) != (found.federation, found.name):
            raise UsageError(
                f"The home {home} belongs to {member.name!r} of {member.federation!r}, and the token to "
                f"{found.name!r} of {found.federation!r}.",
                "a home of its own for each client.",
                write=f"atoll join - --home {found.name} --data digits",
            )
        return member
    return await enrol(found, home, notify)


def _loader(data: str, seat: bool) -> Loader:
    """The function that reads the rows of a site for the terms of a run."""

    def seated(terms: Terms, place: wire.Seat | None, client: int) -> tuple[Schema, Clients]:
        if place is None or terms.rehearsal is None:
            raise RefusedError(
                "data", "The run has no seats.", "a closed run of a known data set, or data of the site."
            )
        partition = grammar.parse(place.split, partitions.PARTITIONS)
        settings = terms.rehearsal
        whole = load(data).split(
            place.clients, partition, held_out=settings.held_out, seed=int(place.seed), min_rows=settings.min_rows
        )
        return Schema.of(whole), whole.seated(client)

    def own_rows(terms: Terms, place: wire.Seat | None, client: int) -> tuple[Schema, Clients]:
        whole = load(data).split(1, partitions.IID(), held_out=0)
        return Schema.of(whole), _renumbered(whole, client)

    return seated if seat else own_rows


def _renumbered(data: Clients, client: int) -> Clients:
    """The rows of a site under the number that it has in the federation."""
    offsets = torch.zeros(client + 2, dtype=torch.int64)
    offsets[-1] = len(data.order)
    return replace(data, offsets=offsets, names=None)


def site_status(home: Path) -> dict[str, Any]:
    """The state of a site, from the files of its home."""
    member = required(Membership.open(home), "membership")
    chain = MemoryChain.open(home)
    rows: deque[dict[str, Any]] = deque(maxlen=1)
    count = total = 0
    ledger = home / "ledger.jsonl"
    for line in ledger.read_bytes().splitlines() if ledger.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        rows.append(row)
        count, total = count + 1, total + row["bytes"]
    last = rows[-1] if rows else {}
    return {
        "federation": member.federation,
        "name": member.name,
        "addresses": list(member.addresses),
        "epoch": member.epoch,
        "run": chain.run or last.get("run"),
        "settled": None if chain.settled is None else chain.settled.hex(),
        "prepared": [one.work.hex() for one in chain.prepared],
        "messages": count,
        "bytes": total,
        "last": {n: last[n] for n in ("time", "round", "bytes", "work") if n in last},
    }
