"""Join a federation: open the home of a site, enrol if it is new, and work until the run is over.

Tests: tests/faults/test_rehearsal.py
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import signal
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from atoll.base import grammar
from atoll.base.errors import RunError, UsageError
from atoll.base.lines import Line
from atoll.base.validation import required
from atoll.compute.device import resolve_device
from atoll.data import load
from atoll.data import partition as partitions
from atoll.data.clients import Clients
from atoll.data.input import Input
from atoll.data.named import NAMED
from atoll.data.schema import Schema
from atoll.data.site_rows import site_rows
from atoll.net import identity, wire
from atoll.net.client import Client, Ended, Membership, Notify, enrol, pause
from atoll.net.home import ServerHome
from atoll.net.ledger import ledger_rows
from atoll.net.loop import run_loop
from atoll.net.policy import Policy
from atoll.net.site import Loader, MemoryChain, Prepared, Site
from atoll.net.spec import Server
from atoll.net.store import claim_home
from atoll.net.terms import Own, RefusedError, Terms

_RENEWED_BY_TOKEN = ("revoked", "behind")
_AGAIN_S = 5.0  # between the end of a run and the next look of a relay


def join_federation(
    token: str | None,
    home: Path,
    data: Any,
    *,
    seat: bool = False,
    by: str | None = None,
    device: str = "cpu",
    own: Own | None = None,
    once: bool = False,
    policy: Policy = Policy(),
    check: bool = False,
    files: identity.Files | None = None,
    notify: Notify = lambda facts: None,
) -> int:
    """Take part in a federation until the run is over.

    Args:
        token: the text of the token; None: the home is enrolled.
        home: the folder of the site.
        data: the rows of the site: a name, a file, a folder of arrays, `my_site.py:function`, or rows in memory.
        seat: whether the client holds its part of the run's split.
        by: the column that names the client of each row, if the run scales each client by its own statistics.
        device: the device of the site.
        own: the site's own code by name.
        once: whether to end with the run.
        policy: the limits of the site.
        check: whether to try everything and send no message of a work.
        files: a certificate of an institution, its key and the authority of the server; None: the token gets one.
        notify: receives the events of the client.
    Returns:
        The exit code: 0 the run is done, 1 it failed, 2 the server refuses this client.
    Raises:
        UsageError: the home, the token or the data is not valid.
        RunError: another certificate authority answers.
    """
    loader = _seated(data) if seat else own_rows(data, by)
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = claim_home(home)
    try:
        make = partial(Site, home, loader, own or {}, resolve_device(device), policy)
        return _run(_until_signal(_work(token, home, make, once, notify, check, files)))
    finally:
        lock.close()


def run_relay(
    token: str | None,
    spec: Server,
    *,
    own: Own | None = None,
    once: bool = False,
    notify: Notify = lambda facts: None,
) -> int:
    """Serve clients, and take part in a federation as one member with their contributions.

    Args:
        token: the text of a token of `atoll invite --relay` at the root; None: the home is enrolled.
        spec: the home of the relay, and how it serves its clients. Its membership at the root is in HOME/root.
        own: code by the names that the run uses.
        once: whether to end with the run.
        notify: receives the events of the relay.
    Returns:
        The exit code: 0 the run is done, 1 it failed, 2 the root refuses this relay.
    Raises:
        UsageError: the home, the token or the address is not valid.
        RunError: another certificate authority answers.
    """
    from atoll.net.relay import Relay

    home = ServerHome.open(Path(spec.home))
    try:
        if home.database.get("run") is not None:
            raise UsageError(f"{spec.home} is the home of a server.", "a home of its own for a relay.")
        root = home.path / "root"
        root.mkdir(mode=0o700, exist_ok=True)
        home.database.put("relay", "1")
        home.database.put("hosts", json.dumps(spec.hosts))
        relay = Relay(home, root, spec, own or {}, notify)
    except BaseException:
        home.close()
        raise
    try:
        notify({"event": "listening", "address": relay.start(), "home": str(home.path)})
        return _run(_until_signal(_pass_on(token, root, relay, once, notify)))
    finally:
        relay.finish("draining", "The relay stops.", 1.0)
        relay.close()


def _run(work: Coroutine[Any, Any, int]) -> int:
    """Run a coroutine to its end, also inside the event loop of a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return run_loop(work)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run_loop, work).result()


async def _work(
    token: str | None,
    home: Path,
    make: Callable[[], Site],
    once: bool,
    notify: Notify,
    check: bool,
    files: identity.Files | None,
) -> int:
    """Work as a site."""
    member = await _member(token, home, notify, files)
    return _exit_code(await Client(member, make(), notify, once, check).run(), member)


async def _pass_on(token: str | None, home: Path, relay: Any, once: bool, notify: Notify) -> int:
    """Work as a relay: each end of a run at the root is the end of the run for its clients."""
    member = await _member(token, home, notify, None, relay.chain.prepared)
    relay.open_chain(home)
    while True:
        client = Client(member, relay, notify, once=True)
        relay.post, relay.is_withdrawn = client.post, client.is_withdrawn
        ended = await client.run()
        await asyncio.get_running_loop().run_in_executor(None, relay.finish, ended.code, ended.reason)
        if once or ended.code not in ("done", "failed"):
            return _exit_code(ended, member)
        await pause(_AGAIN_S)


async def _until_signal(work: Coroutine[Any, Any, int]) -> int:
    """The result of a coroutine, or 130 if a signal ends it."""
    task = required(asyncio.current_task(), "task")
    signals = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
    before = [signal.getsignal(number) for number in signals]
    for number in signals:
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    try:
        return await work
    except asyncio.CancelledError:
        return 130
    finally:
        for number, handler in zip(signals, before, strict=True):  # a program that calls atoll.join keeps its own
            asyncio.get_running_loop().remove_signal_handler(number)
            signal.signal(number, handler or signal.SIG_DFL)


def _exit_code(ended: Ended, member: Membership) -> int:
    if ended.code in ("done", "draining"):
        return 0
    if ended.code == "failed":
        raise RunError(f"The run failed: {ended.reason}")
    again = ended.code in _RENEWED_BY_TOKEN
    write = f"atoll invite {member.name}" if again else ""
    raise UsageError(f"The server refuses this client: {ended.code}. {ended.reason}", write=write)


async def _member(
    token: str | None,
    home: Path,
    notify: Notify,
    files: identity.Files | None,
    partials: Sequence[Prepared] = (),
) -> Membership:
    """The membership of the home. A token enrols a new home; a further token renews the identity of the same client.

    The server forgets which works it has committed of a client with a further token, so a relay with `partials` that
    are not settled could not pass their ends on to its clients.
    """
    member = Membership.open(home)
    if token is None and member is None:
        raise UsageError(
            f"The home {home} is not enrolled.",
            "the token of `atoll invite`, the first time.",
            write=f"atoll join - --home {home} --data digits",
        )
    found = None if token is None else identity.Token.read(token)
    if member is not None and found is not None:
        if (member.federation, member.name) != (found.federation, found.name):
            raise UsageError(
                f"The home {home} belongs to {member.name!r} of {member.federation!r}, and the token to "
                f"{found.name!r} of {found.federation!r}.",
                "a home of its own for each client.",
                write=f"atoll join - --home {found.name} --data digits",
            )
        if member.token == identity.secret_hash(found.secret).hex():
            found = None  # a script may pass the token at each start
    if member is not None and found is None:
        if files is not None and files != member.files:
            member.files = files
            member.save()
        return member
    if member is not None and partials:
        raise UsageError(
            f"A further token for the relay {member.name!r}, which has {len(partials)} sums that are not settled.",
            "a start without a token, until the next round.",
            "the root would forget whether it has committed them, and the memory of the clients depends on that.",
            write=f"atoll relay --home {home.parent}",
        )
    renewed = await enrol(required(found, "token"), home, notify, files)
    if member is not None:
        renewed.epoch, renewed.rounds = member.epoch, member.rounds
        renewed.save()
        MemoryChain.open(home).begin("")  # the server begins a new memory for a new token
    return renewed


def _seated(data: str) -> Loader:
    """The function that returns the part of a client of the run's split of a known data set."""

    def read(terms: Terms, place: wire.Seat | None, client: int) -> Clients:
        if place is None:
            raise RefusedError(
                "data", "The run has no seats.", "a closed run of a known data set, or data of the site."
            )
        whole = load(data).split(
            place.clients,
            grammar.parse(place.split, partitions.PARTITIONS),
            held_out=terms.held_out,
            seed=int(place.seed),
            min_rows=terms.min_rows,
        )
        different = Schema.of(whole).differs(Schema.read(terms.schema))
        if different:
            name, ours, theirs = different
            raise RefusedError("input", f"The {name} of this data is {ours!r:.200}.", f"{theirs!r:.200}, as the run.")
        return whole.seated(client)

    return read


def own_rows(data: Any, by: str | None = None) -> Loader:
    """The function that reads the rows of a site by the `Input` of a run.

    Args:
        data: a name, a file, a folder of arrays, or `my_site.py:function`; without a function it is `data`. Or rows: a
            frame, a dict of columns, a pair `(x, y)`, or a `Source`.
        by: as in `join_federation`.
    Raises:
        UsageError: there is no such file.
    """
    if not isinstance(data, (str, Path)):
        return _reader(lambda: data, by)
    data = str(data)
    path, _, function = data.partition(".py:") if ".py:" in data else (data.removesuffix(".py"), "", "data")
    code = Path(f"{path}.py") if data.endswith(".py") or ".py:" in data else None
    if code is not None and not code.is_file():
        raise UsageError(f"There is no file {code}.", "the file of the function that returns the rows.")
    if code is None and data not in NAMED and "*" not in data and not Path(data).exists():
        known = f"a file, a folder of arrays, my_site.py:function, or one of {', '.join(NAMED)}."
        raise UsageError(f"There is no data {data!r}.", known, write=Line(shell="--data site.csv"))
    return _reader((lambda: data) if code is None else (lambda: _call(code, function)), by)


def _reader(rows: Callable[[], Any], by: str | None) -> Loader:
    """The function that reads what `rows` returns by the input of a run."""

    def read(terms: Terms, place: wire.Seat | None, client: int) -> Clients:
        given = Input.decode(terms.input.encode(), "The input of the run")
        found, seed = rows(), int(terms.seed)
        try:
            return site_rows(found, given, client, held_out=terms.held_out, seed=seed, by=by, scaled=terms.scaled)
        except UsageError as error:
            public = "The data of the site does not fit the input of the run; the site has the column and the row."
            raise RefusedError("input", error.given, error.required, error.why, error.write, public) from error

    return read


def _call(code: Path, function: str) -> Any:
    """The result of a function in a file of the site."""
    spec = importlib.util.spec_from_file_location(code.stem, code)
    module = importlib.util.module_from_spec(required(spec, "module"))
    required(required(spec, "module").loader, "loader").exec_module(module)
    return getattr(module, function)()


def site_status(home: Path) -> dict[str, Any]:
    """The state of a site, from the files of its home.

    Raises:
        RunError: its ledger or its memory is damaged.
    """
    member = required(Membership.open(home), "membership")
    chain = MemoryChain.open(home)
    rows = ledger_rows(home)
    last = rows[-1] if rows else {}
    return {
        "federation": member.federation,
        "name": member.name,
        "identity": identity.own_identity(home / "identity.pem").public_key().public_bytes_raw().hex(),
        "addresses": list(member.addresses),
        "epoch": member.epoch,
        "run": chain.run or last.get("run"),
        "settled": None if chain.settled is None else chain.settled.hex(),
        "prepared": [one.work.hex() for one in chain.prepared],
        "asked": json.loads((home / "asked.json").read_bytes())["plan"] if (home / "asked.json").exists() else None,
        "messages": len(rows),
        "bytes": sum(row["bytes"] for row in rows),
        "last": {n: last[n] for n in ("time", "round", "bytes", "work") if n in last},
    }
