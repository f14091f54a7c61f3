"""A client: it keeps a channel to the server, computes the work that arrives, and sends the results.

The event loop never calls torch: one thread computes, writes the memory and settles, in the order of arrival.

Tests: tests/faults/test_rehearsal.py
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import os
import platform
import random
import ssl
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import aiohttp
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from atoll.base.errors import RunError, UsageError
from atoll.base.files import atomic_write
from atoll.base.lines import Line
from atoll.compute.batches import OnStep
from atoll.data.input import Input
from atoll.net import identity, systemd, wire
from atoll.net.policy import is_approved
from atoll.net.secure import SiteSum, step_pieces
from atoll.net.site import Prepared, Site
from atoll.net.terms import MAX_TERMS, RefusedError, Terms
from atoll.secure.messages import MASKED, SumMessage
from atoll.secure.refusals import SessionError

_PIECE = 256 << 10  # bytes of a long message that are written at once
PING_S = 20.0
PROGRESS_S = 5.0
KEPT_S = 60.0  # of the connection of long messages; the server ends it after 75 idle seconds
_LOOK_S = 60.0  # between two looks at the clock of a site that its policy keeps away
Notify = Callable[[Mapping[str, Any]], None]


@dataclass
class Membership:
    """The identity of a site in a federation: the content of site.json, and the files of its key and certificate.

    Args:
        home: the folder of the site.
        addresses: `host:port` of the server, in the order in which they are tried.
        federation, name: the federation, and the name of the client in it.
        epoch: the highest epoch of the server that this site has seen.
        rounds: the highest round of each run that this site has computed.
        token: the hash of the token with which it enrolled, in hexadecimal digits.
        files: its certificate of an institution; None: the federation has issued its certificate.
    """

    home: Path
    addresses: tuple[str, ...]
    federation: str
    name: str
    epoch: int = 0
    rounds: dict[str, int] = field(default_factory=dict)
    token: str = ""
    files: identity.Files | None = None

    @classmethod
    def open(cls, home: Path) -> Membership | None:
        """The membership of a home; None if it is not enrolled."""
        if not (home / "site.json").exists():
            return None
        facts = json.loads((home / "site.json").read_bytes())
        files = facts.pop("files", None)
        addresses = tuple(facts.pop("addresses"))
        return cls(home, addresses, **facts, files=None if files is None else identity.Files(*files))

    def save(self) -> None:
        """Write site.json in one step."""
        facts = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "home"}
        atomic_write(self.home / "site.json", json.dumps(facts, indent=2).encode(), 0o600)

    def context(self) -> ssl.SSLContext:
        """The TLS context of the channel, after a check of the dates of the own certificate."""
        names = ("certificate.pem", "key.pem", "ca.pem")
        files = [self.home / name for name in names] if self.files is None else [Path(file) for file in self.files]
        certificate = x509.load_pem_x509_certificate(files[0].read_bytes())
        again = f"atoll invite {self.name}" if self.files is None else ""
        identity.check_dates(certificate, datetime.now(UTC), again)
        return identity.client_context(*files)

    def stated(self) -> str:
        """The own certificate as base64, for a server without TLS."""
        certificate = x509.load_pem_x509_certificate((self.home / "certificate.pem").read_bytes())
        return base64.b64encode(certificate.public_bytes(serialization.Encoding.DER)).decode()

    def renewal_due(self) -> bool:
        """Whether two thirds of the lifetime of a certificate of the federation have passed."""
        if self.files is not None:
            return False
        certificate = x509.load_pem_x509_certificate((self.home / "certificate.pem").read_bytes())
        return identity.renewal_due(certificate, datetime.now(UTC))


async def enrol(token: identity.Token, home: Path, notify: Notify, files: identity.Files | None = None) -> Membership:
    """Exchange a token for a certificate. If the server cannot be reached, the client tries again without end.

    Args:
        token: the token.
        home: the folder of the site.
        notify: receives the events of the client.
        files: a certificate of an institution. Then the token only registers the identity key of the site.
    Raises:
        UsageError: the server refuses the token.
        RunError: another certificate authority answers, or a program without TLS.
    """
    if time.time() >= token.expires:
        raise UsageError("The token has expired.", "a token that is valid now.", write=f"atoll invite {token.name}")
    if files is not None:
        request = identity.certificate_pem(x509.load_pem_x509_certificate(Path(files.certificate).read_bytes()))
    else:
        if not (home / "key.pem").exists():
            identity.write_key(home / "key.pem", identity.new_key())
        request = identity.request_pem(identity.read_key(home / "key.pem"))
    tries = Tries()
    while True:
        for address in token.addresses:
            try:
                return await _enrol_at(address, token, home, request, files)
            except aiohttp.ClientConnectorCertificateError as error:
                raise _foreign(address, error) from error
            except (aiohttp.ClientError, TimeoutError, OSError) as error:
                if isinstance(error, aiohttp.ClientHttpProxyError) and error.status < 500:
                    raise _no_way(address, error) from error
                if "WRONG_VERSION_NUMBER" in str(error):
                    raise _without_tls(address, token.name) from error
                notify({"event": "waiting", "address": address, "reason": _reason(error)})
        await pause(tries.next())


async def _enrol_at(
    address: str, token: identity.Token, home: Path, request: bytes, files: identity.Files | None
) -> Membership:
    """Fetch the authority, compare its hash, and send the secret with the certificate request."""
    own, secret = identity.own_identity(home / "identity.pem"), identity.secret_hash(token.secret)
    fields = {
        "name": token.name,
        "secret": token.secret.hex(),
        "request": request.decode(),
        "identity": own.public_key().public_bytes_raw().hex(),
        "proof": identity.prove_identity(own, token.federation, token.name, secret, request).hex(),
    }
    proxied = not address.startswith(identity.PLAIN)  # a proxy would carry the secret beyond this machine
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=30), trust_env=proxied) as session:
        if files is None:
            await _fetch_authority(session, address, token, home)
            context = identity.client_context(None, None, home / "ca.pem")
        else:
            context = identity.client_context(*map(Path, files))
        async with session.post(f"{identity.url_of(address)}/v1/enrol", ssl=context, json=fields) as answer:
            body = await _body(answer, 1 << 16)
            if answer.status != 200:
                raise _denied(answer.status, body)
    if files is None:
        certificate = x509.load_der_x509_certificate(body)
        atomic_write(home / "certificate.pem", identity.certificate_pem(certificate))
    first = (address, *(other for other in token.addresses if other != address))
    found = Membership(home, first, token.federation, token.name, token=secret.hex(), files=files)
    found.save()
    return found


async def _fetch_authority(session: aiohttp.ClientSession, address: str, token: identity.Token, home: Path) -> None:
    """Write the authority of a federation, if it is that of the token."""
    fetch = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    fetch.check_hostname, fetch.verify_mode = False, ssl.CERT_NONE  # the hash in the token decides
    async with session.get(f"{identity.url_of(address)}/v1/ca", ssl=fetch) as answer:
        pem = await _body(answer, 1 << 16)
        if answer.status == 403:
            raise _denied(answer.status, pem)
    identity.check_authority(pem, token.authority)
    atomic_write(home / "ca.pem", pem)


def _denied(status: int, body: bytes) -> UsageError:
    facts = _json(body)
    return UsageError(
        str(facts.get("given", f"The server answered {status}.")),
        str(facts.get("required", "a token that is valid.")),
        write=str(facts.get("write", "")),
    )


def _json(body: bytes) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        found = json.loads(body)
        if isinstance(found, dict):
            return found
    return {}


async def _stay_alive() -> None:
    """Report the start and the life of this loop to the manager of services, if there is one."""
    systemd.notify("READY=1")
    while (seconds := systemd.watchdog_s()) is not None:
        systemd.notify("WATCHDOG=1")
        await pause(seconds)


async def _body(answer: aiohttp.ClientResponse, most: int) -> bytes:
    """The body of an answer, at most `most` bytes."""
    data, _ = await read_hashed(answer, most)
    return data


async def read_hashed(answer: aiohttp.ClientResponse, most: int) -> tuple[bytes, bytes]:
    """The body of an answer and its SHA-256, which is computed while the bytes arrive.

    Args:
        answer: the answer.
        most: the most bytes of its body.
    Raises:
        RunError: the body is longer.
    """
    body, length, hash = io.BytesIO(), 0, sha256()  # its value is not copied
    async for piece in answer.content.iter_any():
        length += len(piece)
        if length > most:
            raise RunError(f"The server sent more than {most} bytes.", "a shorter answer.")
        hash.update(piece)
        body.write(piece)
    return body.getvalue(), hash.digest()


async def pause(seconds: float) -> None:
    """Wait before a further connection. The cancellation of the caller ends the wait."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(asyncio.Event().wait(), seconds)


class Tries:
    """The waits between connections: 0.2 s, doubling to 1 s in the first minute, later to 60 s, with full jitter."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin again, after a connection."""
        self._count, self._began = 0, time.monotonic()

    def next(self) -> float:
        """The seconds to wait."""
        most = 1.0 if time.monotonic() - self._began < 60 else 60.0
        wait = min(most, 0.2 * 2**self._count)
        self._count = min(self._count + 1, 16)
        return random.uniform(0, wait)


_OLDER: Literal["behind"] = "behind"  # the code of a server or a site that is older than the other one


class Ended(Exception):
    """The client ends: the run is over, or the server refuses it for good."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code, self.reason = code, reason


class Client:
    """One client of a federation.

    Args:
        member: its identity.
        site: computes its work.
        notify: receives the events of the client, for people and scripts.
        once: whether the client ends with the run.
    """

    def __init__(self, member: Membership, site: Site, notify: Notify, once: bool = False, check: bool = False) -> None:
        self.member, self.site, self.notify, self.once, self.check = member, site, notify, once, check
        self._pool = ThreadPoolExecutor(1, "atoll-site")
        self._tries = Tries()
        self._terms: tuple[bytes, bytes] | None = None
        self._fixed: dict[bytes, bytes] = {}
        self._dropped: set[bytes] = set()
        self._uploads: set[bytes] = set()  # works whose upload has begun
        self._wait: float | None = None
        self._over = False  # whether the server has ended the run
        self._post: Callable[[wire.Up], None] = _nothing
        self.sum: SiteSum | None = None  # the open session of a secure sum, which outlives a connection

    async def run(self) -> Ended:
        """Work until the run is over or the server refuses this client. Connections are made again without end."""
        alive = asyncio.create_task(_stay_alive())
        try:
            while True:
                away = None if self.check else self.site.absence()
                if away is not None:
                    self.notify({"event": "absent", "code": away[0], "seconds": away[1]})
                    await pause(min(away[1], _LOOK_S))
                    continue
                for address in self.member.addresses:
                    try:
                        await self._connected(address)
                    except Ended as ended:
                        return ended
                    except ssl.SSLCertVerificationError as error:
                        raise _foreign(address, error) from error
                    except aiohttp.ClientConnectorCertificateError as error:
                        raise _foreign(address, error) from error
                    except (aiohttp.ClientError, TimeoutError, OSError) as error:
                        self.notify({"event": "disconnected", "address": address, "reason": _reason(error)})
                wait, self._wait = self._wait, None
                await pause(self._tries.next() if wait is None else wait)
        finally:
            alive.cancel()
            self._pool.shutdown(wait=False, cancel_futures=True)

    async def _connected(self, address: str) -> None:
        """One connection: greet, and handle messages until it ends."""
        context = self.member.context()
        limits = aiohttp.ClientTimeout(total=None, connect=30, sock_connect=10)
        connector = aiohttp.TCPConnector(keepalive_timeout=KEPT_S)
        url, headers = identity.url_of(address), {}
        plain = url.startswith(identity.PLAIN)
        if plain:
            headers[wire.CERTIFICATE] = self.member.stated()
        async with aiohttp.ClientSession(
            url, connector=connector, timeout=limits, trust_env=not plain, headers=headers
        ) as session:
            if self.member.renewal_due():
                await self._renew(session, context)
            link = session.ws_connect(
                "/v1/link", ssl=context, compress=0, max_msg_size=wire.MAX_FRAME, heartbeat=PING_S, autoping=True
            )
            async with link as channel:
                self.notify({"event": "connected", "address": address})
                await _Channel(self, session, context, channel).run()

    async def _renew(self, session: aiohttp.ClientSession, context: ssl.SSLContext) -> None:
        request = identity.request_pem(identity.read_key(self.member.home / "key.pem"))
        async with session.post("/v1/renew", ssl=context, data=request) as answer:
            body = await _body(answer, 1 << 16)
            if answer.status == 200:
                pem = identity.certificate_pem(x509.load_der_x509_certificate(body))
                atomic_write(self.member.home / "certificate.pem", pem)

    def post(self, message: wire.Up) -> None:
        """Send a message from another thread than that of the loop. Without a connection it is lost."""
        self._post(message)

    def is_withdrawn(self, work: bytes) -> bool:
        """Whether the server no longer waits for a work."""
        return self._over or work in self._dropped

    async def compute(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function in the thread of the site."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *args)


class _Channel:
    """The messages of one connection."""

    def __init__(
        self,
        client: Client,
        session: aiohttp.ClientSession,
        context: ssl.SSLContext,
        channel: aiohttp.ClientWebSocketResponse,
    ) -> None:
        self.client, self.session, self.context, self.channel = client, session, context, channel
        self.site, self.notify = client.site, client.notify
        self._tasks: set[asyncio.Task[Any]] = set()
        self._loop = asyncio.get_running_loop()
        self._failure: asyncio.Future[None] = self._loop.create_future()
        self._run: str | None = None
        self._is_over = False  # after the `Bye` that ends the run or refuses this client
        self._leases: dict[bytes, wire.Lease] = {}
        self._answering = asyncio.Lock()
        self._step_cap = wire.MAX_STEP if client.sum is not None else 0

    async def run(self) -> None:
        chain = self.site.chain
        prepared = tuple(one.work for one in chain.prepared)
        self.client._over = False
        hello = wire.Hello(
            wire.PROTOCOL, own_versions(), platform.machine() or "unknown", BACKENDS, chain.run, chain.settled, prepared
        )
        await self._send(hello)
        self._later(self._read())
        try:
            await self._failure
        finally:
            self.client._post = _nothing
            for task in self._tasks:
                task.cancel()

    def _post(self, message: wire.Up) -> None:
        """Send a message from another thread. Its loss is not noticed: the next connection begins with all facts."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(lambda: self._later(self._send(message)))

    async def _read(self) -> None:
        """Handle frames in their order. Nothing here waits for the thread of the site, so that pings are answered."""
        async for frame in self.channel:
            if frame.type is aiohttp.WSMsgType.ERROR and self._is_over:
                return
            if frame.type is aiohttp.WSMsgType.ERROR:  # no pong, or a connection that ended within a frame
                raise aiohttp.ClientConnectionError(_reason(frame.data))
            if frame.type is not aiohttp.WSMsgType.BINARY:
                raise RunError("The server sent a frame of another kind.", "binary frames.")
            self._handle(wire.decode_down(frame.data, self._step_cap))
            self.client._tries.reset()
        if self._is_over:
            return  # `_bye` ends the connection, once the thread of the site is free
        raise aiohttp.ClientConnectionError("the server closed the channel")

    async def _send(self, message: wire.Up) -> None:
        await self.channel.send_bytes(wire.encode_frame(message, self._step_cap))

    def _handle(self, message: wire.Down) -> None:
        """Begin the handling of a message. Calls of the site's thread keep the order of the messages."""
        compute = self.client.compute
        match message:
            case wire.Welcome():
                self._later(self._welcomed(message))
            case wire.Work():
                self._leases[message.work] = message.lease
                self.client._dropped.discard(message.work)  # the server asks again for a work that it cancelled
                if message.sum is not None:
                    self._step_cap = wire.MAX_STEP
                self._later(self._work(message))
            case wire.Gather(work=work):
                self._leases[work.work] = work.lease
                self.client._dropped.discard(work.work)
                self._later(self._work(work, message.starts))
            case wire.Numbers():
                self._later(self._numbered(message))
            case wire.Receipt(work=work, code=code) if code not in ("received", "quota"):
                self.notify({"event": "refused", "work": work.hex(), "code": code})
                self._end_sum((work,))
                chain = self.site.chain
                self._later(compute(chain.drop_continued if code == "predecessor" else chain.drop, work))
            case wire.Settled(works=works):
                self._leases = {work: lease for work, lease in self._leases.items() if work not in works}
                self._end_sum(works)
                self._call(self.site.chain.settle, works)
            case wire.StepMessage():
                self._later(self._stepped(message))
            case wire.Cancel(work=work):
                if not self._end_sum((work,)):  # the next attempt of a secure sum masks the same contribution
                    self.client._dropped.add(work)
                    self._later(compute(self.site.chain.drop, work))
            case wire.Bye(retry_s=retry, code=code):
                self.client._wait = retry  # also if the channel ends before `_bye` is called
                self._is_over = self.client._over = code in ("done", "failed") or retry is None
                self._later(self._bye(message))
            case _:
                pass

    def _later(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        if not self._failure.done():
            self._failure.set_exception(error)

    def _call(self, function: Callable[..., None], *args: Any) -> None:
        """Call a function in the thread of the site. The loop is woken only if it raises an error."""

        def ended(call: Future[None]) -> None:
            if not call.cancelled() and (error := call.exception()) is not None:
                with contextlib.suppress(RuntimeError):  # the loop has ended
                    self._loop.call_soon_threadsafe(self._fail, error)

        self.client._pool.submit(function, *args).add_done_callback(ended)

    async def _welcomed(self, message: wire.Welcome) -> None:
        """Check the epoch, fetch the terms of the run, prepare the data, and report the rows."""
        member = self.client.member
        if message.epoch < member.epoch:
            raise Ended(
                _OLDER,
                f"The server has epoch {message.epoch}, and this site has seen {member.epoch}. Its database is a "
                "restored copy, which cannot continue the run.",
            )
        if message.epoch > member.epoch:
            member.epoch = message.epoch
            await self.client.compute(member.save)
        self._run = message.run
        facts = {"client": message.client, "federation": message.federation, "run": message.run}
        self.notify({"event": "joined", **facts})
        if message.run is None or message.input is None:
            if self.client.check:
                raise Ended("done", "no run is open")
            return
        if self.client._terms is None or self.client._terms[0] != message.input.hash:
            self.client._terms = message.input.hash, await self._blob(message.input, MAX_TERMS)
        self.client._post = self._post  # no message may come before the greeting
        try:
            enter = self.site.enter
            rows = await self.client.compute(enter, message.client, message.run, self.client._terms[1], message.seat)
        except RefusedError as error:
            if self.client.check:
                raise
            await self._refuse(None, error)
            return
        if self.client.check:
            self.notify({"event": "check", **await self.client.compute(self.site.try_step)})
            raise Ended("done", "checked")
        if rows is not None:
            await self._send(wire.Ready(message.input.hash, *rows))

    async def _numbered(self, message: wire.Numbers) -> None:
        """Take the numbers of the clients of a relay, or the reason why a client of a relay waits."""
        waits = await self.client.compute(self.site.number, message)
        if waits is not None:
            self.notify({"event": "waiting", "code": waits.code, "reason": message.rules.refusal(waits)})

    async def _refuse(self, work: bytes | None, error: RefusedError) -> None:
        self.notify({"event": "refusal", "code": error.code, "reason": str(error)})
        code: Any = error.code
        await self._send(wire.Refusal(work, code, plain_text(error.public)))

    async def _work(self, work: wire.Work, starts: tuple[wire.Start, ...] = ()) -> None:
        """Compute a piece of work and send the result."""
        member, client = self.client.member, self.client
        away = self.site.absence()
        if away is not None:
            await self._send(wire.Leave(away[0]))
            raise aiohttp.ClientConnectionError(f"the policy of the site: {away[0]}")
        if not await self._approved(work):
            return
        if self._run is not None and work.round < member.rounds.get(self._run, 0):
            raise RunError(
                f"Round {work.round} of {self._run}; this site has computed round {member.rounds[self._run]}.",
                "a round that is not lower.",
                "the server is a restored copy, which cannot continue the run.",
            )
        model = await self._model(work)
        fixed = None if work.fixed is None else await self._fixed(work.fixed)
        last = [time.monotonic()]

        def on_step(lane: int, step: int, loss: float) -> None:
            if time.monotonic() - last[0] >= PROGRESS_S:
                last[0] = time.monotonic()
                client.post(wire.Progress(work.work, step + 1))  # a later connection carries it, too

        began = time.perf_counter()
        try:
            one, recorded = await client.compute(self._computed, work, model, fixed, on_step, starts)
        except RefusedError as error:
            await self._refuse(work.work, error)
            return
        if not recorded:
            if work.work in client._dropped:
                client._dropped.discard(work.work)
                await client.compute(self.site.chain.drop, work.work)
                return
            if starts and client._over:
                return  # a relay has ended the gathering
            if work.sum is not None:
                return await self._take_part(work, model)
            await client.compute(self._noted, work, one.body, bool(one.memory))
        spent = round(time.perf_counter() - began, 6)
        self.notify({"event": "work", "round": work.round, "bytes": len(one.body), "seconds": spent})
        await self._upload(one.work, one.after, one.body)

    def _computed(
        self, work: wire.Work, model: bytes, fixed: bytes | None, on_step: OnStep, starts: tuple[wire.Start, ...]
    ) -> tuple[Prepared, bool]:
        """Compute a piece of work, and record its message if it is sent now: one call of the site's thread for both.

        Returns:
            The message, and whether it is recorded.
        """
        one: Prepared = self.site.compute(work, model, fixed, on_step, starts)
        sends = work.sum is None and work.work not in self.client._dropped and not (starts and self.client._over)
        if sends:
            self._noted(work, one.body, bool(one.memory))
        return one, sends

    async def _model(self, work: wire.Work) -> bytes:
        """The model version of a work: made from deltas and the last version, or as a whole."""
        if isinstance(work.model, bytes):
            return work.model
        site, client = self.site, self.client
        known: bytes | None = await client.compute(site.kept_version, work)
        if known is None and site.has_base(work):
            deltas = [await self._bytes(delta) for delta in work.deltas]
            rest = b"" if work.rest is None else await self._bytes(work.rest)
            known = await client.compute(site.next_version, work, deltas, rest)
        return await self._blob(work.model, wire.MAX_BLOB) if known is None else known

    async def _bytes(self, field: wire.Blob | bytes) -> bytes:
        return field if isinstance(field, bytes) else await self._blob(field, wire.MAX_BLOB)

    async def _upload(self, work: bytes, after: bytes | None, body: bytes) -> None:
        """Send a contribution, inside a frame or by HTTP."""
        lease = self._leases[work]
        if len(body) <= wire.MAX_INLINE:
            await self._send(wire.Update(work, lease, after, body))
        else:
            await self._send(wire.Sent(work, lease, after, len(body), wire.digest(body)))
            await self._put(work, body)

    async def _take_part(self, work: wire.Work, model: bytes) -> None:
        """Take part in a secure sum. Signs of life renew the lease while other clients are awaited."""
        client = self.client
        if client.sum is None or client.sum.work.work != work.work:
            try:
                client.sum = await client.compute(self.site.open_sum, work, model)
            except RefusedError as error:
                return await self._refuse(work.work, error)
        session: SiteSum = client.sum
        await self._answer(session, session.answer)
        while client.sum is session and not session.over:
            await pause(PROGRESS_S)
            await self._send(wire.Progress(work.work, 0))
        return None

    async def _stepped(self, piece: wire.StepMessage) -> None:
        """Take a piece of a step of a secure sum, and send the answer after its last piece."""
        session = self.client.sum
        if session is None or session.work.work != piece.work:
            return
        try:
            answer = await self.client.compute(session.take, piece)
        except SessionError as error:
            self.client.sum = None
            await self._refuse(piece.work, RefusedError("session", f"{error.reason}: {error.given}", error.required))
            return
        if answer is not None:
            await self._answer(session, answer)

    async def _answer(self, session: SiteSum, answer: SumMessage) -> None:
        """Send a message of a secure sum. A masked contribution is recorded before it is sent."""
        work = session.work
        async with self._answering:
            if answer.kind != MASKED:
                for piece in step_pieces(work.work, answer):
                    await self._send(piece)
                return
            if not session.recorded:
                session.recorded = True
                await self.client.compute(self._noted, work, answer.body, session.after is not None)
                facts = {"round": work.round, "attempt": work.attempt, "bytes": len(answer.body)}
                self.notify({"event": "work", **facts})
            await self._upload(work.work, session.after, answer.body)

    def _end_sum(self, works: tuple[bytes, ...]) -> bool:
        """End the session of one of these works. Returns whether there was one."""
        session = self.client.sum
        if session is None or session.work.work not in works:
            return False
        self.client.sum = None
        return True

    async def _approved(self, work: wire.Work) -> bool:
        """Wait until a person has approved the plan, if the policy asks. False: the server withdrew the work."""
        noted = 0.0
        while self.site.policy.ask and not is_approved(self.client.member.home, self._run or "", work):
            if work.work in self.client._dropped:
                self.client._dropped.discard(work.work)
                return False
            if time.monotonic() - noted >= PROGRESS_S:
                noted = time.monotonic()
                self.notify({"event": "asked", "run": self._run, "plan": work.plan})
                await self._send(wire.Progress(work.work, 0))  # the site is there, and a person decides
            await pause(1.0)
        return True

    def _noted(self, work: wire.Work, body: bytes, memory: bool) -> None:
        """Record the message and the round, before the message is sent."""
        member = self.client.member
        self.site.record(work, body)
        if self._run is not None and work.round > member.rounds.get(self._run, -1):
            member.rounds = {self._run: work.round}
            if memory:
                member.save()

    async def _put(self, work: bytes, message: bytes) -> None:
        """Send a long message by HTTP, from the first byte that the server does not have."""
        path, total, start = f"/v1/messages/{work.hex()}", len(message), 0
        if work in self.client._uploads:  # an earlier connection has ended within this message
            async with self.session.head(path, ssl=self.context) as answer:
                start = int(answer.headers.get("Upload-Offset", "0")) if answer.status == 204 else 0
        self.client._uploads.add(work)
        headers = {"Content-Range": f"bytes {start}-{total - 1}/{total}"}
        body = memoryview(message)[start:]
        headers["Content-Length"] = str(len(body))
        async with self.session.put(
            path, data=pieces_of(body), headers=headers, ssl=self.context, expect100=True
        ) as answer:
            await _body(answer, 1 << 16)
            if answer.status not in (200, 409, 410, 413, 422, 424, 429):
                raise aiohttp.ClientConnectionError(f"the upload was answered with {answer.status}")
        self.client._uploads.discard(work)

    async def _fixed(self, blob: wire.Blob) -> bytes:
        """The frozen tensors, which are fetched once."""
        if blob.hash not in self.client._fixed:
            self.client._fixed = {blob.hash: await self._blob(blob, wire.MAX_BLOB)}
        return self.client._fixed[blob.hash]

    async def _blob(self, blob: wire.Blob, most: int) -> bytes:
        """Fetch bytes and compare their hash.

        Raises:
            RunError: the bytes differ from the announcement.
        """
        if blob.length > most:
            raise RunError(f"The server announced {blob.length} bytes.", f"at most {most} bytes.")
        async with self.session.get(f"/v1/blobs/{blob.hash.hex()}", ssl=self.context) as answer:
            if answer.status != 200:
                raise aiohttp.ClientConnectionError(f"a blob was answered with {answer.status}")
            data, hash = await read_hashed(answer, blob.length)
        if len(data) != blob.length or hash != blob.hash:
            raise RunError("The server sent other bytes than it announced.", "bytes with the announced hash.")
        return data

    async def _bye(self, message: wire.Bye) -> None:
        """Store the final model, and end or connect again as the server asks."""
        await self.client.compute(int)  # the thread of the site has settled everything before
        if message.final is not None and self._run is not None:
            data = await self._blob(message.final, wire.MAX_BLOB)
            data = await self.client.compute(self.client.site.own_model, data)
            await self.client.compute(_keep_model, self.client.member.home, self._run, data, self.client._terms)
        over = message.code in ("done", "failed")
        self.notify({"event": "bye", "code": message.code, "reason": message.reason})
        if (over and self.client.once) or (message.retry_s is None and not over):
            raise Ended(message.code, message.reason)
        self.client._wait = message.retry_s if message.retry_s is not None else 1.0
        raise aiohttp.ClientConnectionError(message.reason or message.code)


BACKENDS: Any = ("compiled", "fused", "lanes", "loop")


async def pieces_of(body: memoryview) -> AsyncIterator[memoryview]:
    """A long body in pieces, so that pings and other messages are not held up while it is written."""
    for start in range(0, len(body), _PIECE):
        yield body[start : start + _PIECE]


def own_versions() -> wire.Versions:
    """The versions of this process."""
    from atoll.runs.folder import library_versions

    found = library_versions()
    return wire.Versions(found["python"], found.get("atoll", "0"), found["torch"], found["numpy"])


def _keep_model(home: Path, run: str, data: bytes, terms: tuple[bytes, bytes] | None) -> None:
    """Write the final model into the home, with the files that `atoll predict` reads."""
    folder = home / "runs" / run
    folder.mkdir(parents=True, exist_ok=True)
    if terms is not None:
        known = Terms.decode(terms[1])
        facts = {"model": known.model, "loss": known.loss, "metrics": list(known.metrics), "dtype": known.dtype}
        text = "".join(f"{name} = {json.dumps(value)}\n" for name, value in facts.items())
        atomic_write(folder / "config.toml", text.encode())
        atomic_write(folder / "input.json", Input.decode(known.input.encode(), "The input of the run").encode())
    atomic_write(folder / "model.safetensors", data)


def _nothing(message: wire.Up) -> None:
    """Send nothing: there is no connection."""


def plain_text(text: str) -> str:
    """A text without control characters, at most 2,000 characters."""
    return "".join(c if c == "\n" or c.isprintable() else "?" for c in text)[:2000]


def _reason(error: BaseException) -> str:
    if isinstance(error, aiohttp.ClientConnectorError):
        return str(error.os_error)  # its own text has the address of a Python object
    text = str(error) or type(error).__name__
    return f"{type(error).__name__}: {text}" if not isinstance(error, aiohttp.ClientError) else text


def _no_way(address: str, error: aiohttp.ClientHttpProxyError) -> RunError:
    return RunError(
        f"The proxy refuses the connection to {address}: {error.status} {error.message}.",
        "a proxy that permits CONNECT to this address; if it asks for a user, http://USER:PASSWORD@HOST:PORT.",
        "a proxy limits the addresses and ports.",
    )


def _without_tls(address: str, name: str) -> RunError:
    return RunError(
        f"The answer of {address} has no TLS.",
        "the port of the server of the federation.",
        "another program listens there, or the server was started with --insecure after the token was made.",
        Line(shell=f"atoll invite {name} --home DIR"),
    )


def _foreign(address: str, error: Exception) -> RunError:
    return RunError(
        f"The certificate of {address} is not of this federation: {error}.",
        "the server of the federation.",
        "a proxy opens TLS, or another server answers at this address.",
        os.environ.get("HTTPS_PROXY", "") and "unset HTTPS_PROXY",
    )
