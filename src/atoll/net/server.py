"""The event loop of a server: TLS, routes, channels and blobs. It never calls torch.

    GET  /healthz                no certificate
    GET  /v1/ca                  no certificate: the certificate of the authority
    POST /v1/enrol               no certificate: a token for a certificate
    POST /v1/renew               a certificate for a new one
    GET  /v1/link                the WebSocket of a client
    GET  /v1/blobs/{sha256}      bytes that a message to this client names; ranges
    HEAD /v1/messages/{work}     the bytes of an upload that have arrived
    PUT  /v1/messages/{work}     a message that is too long for the channel

Every other route is 404. The coordinator decides; this module only moves bytes. Its thread runs the event loop, and the
thread of the training calls `handle`, which is the same state machine under one lock.

Tests: tests/faults/test_federation.py, tests/faults/test_rehearsal.py
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import errno
import json
import queue
import re
import socket
import ssl
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from aiohttp import WSMsgType, web

from atoll.base.errors import UsageError
from atoll.base.files import atomic_write
from atoll.base.lines import Line, form
from atoll.base.validation import required
from atoll.net import coordinator as events
from atoll.net import identity, systemd, wire
from atoll.net.coordinator import Coordinator
from atoll.net.loop import return_memory, run_loop
from atoll.net.store import ClientRecord, Database, DeniedError, channels_of

PING_S = 20.0
MAX_TRIES = 10  # failed enrolments of one address in a minute
MAX_QUEUED = 4 << 20  # bytes that wait for a client that does not read
RETURN_EVERY = 8  # ended transfers of a crowded server; each may have freed 256 KiB
PIECE = 1 << 18
SHORT_PIECE = 1 << 14  # a record of TLS
MANY = 64  # connections; beyond, each keeps short buffers
SENDING = 64  # downloads of a crowded server that start together
SENDING_S = 1.0  # for which others wait for the end of a download; a longer one is that of a slow client
TOGETHER = 4 << 20  # bytes of contributions that are folded in one call
COLLECT_S = 0.05  # seconds in which a contribution waits for others without which its round cannot close
HEAD_S = 10.0  # from the opening of a connection to the end of its first request's head, also for the handshake
BODY_S = 10.0  # in which the body of an enrolment arrives, and at least `FLOOR` bytes of an upload
FLOOR = 10 << 10
GUARD_S = 0.5  # between two looks at the open connections
PROGRESS_S = 0.5  # between two reports of the progress of an upload
ROTATED_S = 86400.0  # between two certificates of a running server
LONG = 1 << 20  # bytes of a message whose buffers a crowded server does not keep
HASH_STEP = 4 << 20  # bytes of an upload that another thread hashes at a time, so that the loop goes on
_INSTITUTION = (
    "The server has certificates of an institution, and knows no client by this one.",
    "a certificate whose alternative name `atoll invite NAME --san VALUE` has recorded.",
    "atoll join - --home DIR --data DATA --cert site.pem --key site.key --ca ca.pem",
)
_LOOP = (events.Send, events.Close, events.Grant, events.Finish, events.Discard)


@dataclass(eq=False)
class _Channel:
    """One open WebSocket: its number, its client, and the frames that wait to be sent."""

    number: int
    client: int
    socket: web.WebSocketResponse
    name: str  # of the client
    waiting: deque[bytes] = field(default_factory=deque)
    queued: int = 0
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    closing: bool = False


_STAGES = {
    "away": "not connected",
    "joined": "connected, without a greeting",
    "greeted": "connected, its data are not checked",
    "ready": "connected, computes",
}


class Listener:
    """The event loop of a federation's server, in a thread of its own.

    Args:
        home: the home of the server.
        store: its database.
        authority: its certificate authority.
        coordinator: the state machine.
        hosts: further host names and addresses in its certificate.
        files: the certificate of an institution, which replaces the authority.
        insecure: whether connections have no TLS. A client then states its certificate, without a proof of its key.
    """

    def __init__(
        self,
        home: Path,
        store: Database,
        authority: identity.Authority,
        coordinator: Coordinator,
        hosts: tuple[str, ...] = (),
        files: identity.Files | None = None,
        insecure: bool = False,
    ) -> None:
        self.files, self.insecure = files, insecure
        self.home, self.store, self.authority, self.coordinator, self.hosts = home, store, authority, coordinator, hosts
        self.inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self.address = ""
        self.blobs: dict[bytes, bytes] = {}
        self._channels: dict[int, _Channel] = {}
        self._uploads: dict[int, _Upload] = {}
        self._partial: dict[bytes, _Partial] = {}
        self._count = 0
        self._tries: dict[str, deque[float]] = {}
        self._lock = threading.Lock()
        self._directory = store.directory()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._wakes: asyncio.Event | None = None
        self.awaits = 0  # the contributions that the round still awaits, if they may be delivered together
        self._gathered = 0  # the bytes of the contributions in `_inward`
        self._urgent = False  # whether `_inward` has another action
        self._collecting: asyncio.TimerHandle | None = None
        self._inward: list[Any] = []  # actions of the training that are not in the inbox yet
        self._posted: list[Any] = []  # events of the training that the coordinator has not received yet
        self._outward: list[Any] = []  # actions of the loop that the thread of the training has caused
        self._flushes = self._checked = False
        self._planned = 0.0
        self.most = self.last_descriptor = _most_connections()
        self._opened: dict[Any, float] = {}  # the open connections
        self._guarded = 0.0
        self._spoke: set[Any] = set()  # those with a request
        self._server: web.Server | None = None
        self._sending = asyncio.Semaphore(SENDING)
        self._ended = 0  # the transfers of a crowded server since the last return of memory
        self.lag = 0.0  # seconds by which the last timer was late
        self._watchdog, self._signed = systemd.watchdog_s(), 0.0
        self.seen: dict[int, float] = {}
        self.awaited: Callable[[], Sequence[int]] = tuple
        self.step: Callable[[], str] = str
        self.step_cap = 0  # the longest step that the plan declares; 0: it has none
        self._published = 0.0

    # the thread of the training

    def start(self, host: str, port: int) -> str:
        """Listen. Returns the address, `host:port`.

        Raises:
            UsageError: the address is in use, it does not belong to this machine, or others can reach it without TLS.
        """
        if self.insecure:
            identity.plain_address(f"{host}:{port}")
        started: queue.SimpleQueue[str | BaseException] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._main, args=(host, port, started), name="atoll-net", daemon=True)
        self._thread.start()
        answer = started.get()
        if isinstance(answer, OSError):
            raise UsageError(
                f"The server cannot listen on {host}:{port}: {answer.strerror or answer}.",
                "a free port and an address of this machine.",
                write=Line(shell="--listen 127.0.0.1:0"),
            ) from answer
        if isinstance(answer, BaseException):
            raise answer
        self.address = answer
        return answer

    def handle(self, *happened: Any) -> None:
        """Pass events of the training to the coordinator, and carry out its actions.

        Several events in one call wake the loop once.
        """
        with self._lock:
            actions = self._decide(happened)
            self._deliver()
            wakes = bool(actions) and not self._outward
            self._outward += actions
        if wakes and self._loop is not None:
            self._loop.call_soon_threadsafe(self._carry_posted)

    def post(self, *happened: Any) -> None:
        """Pass events of the training with the next call of `handle`, without a wake of the loop for them.

        An event of the loop takes them too, so they wait for a second at most.
        """
        with self._lock:
            self._posted += happened

    def _decide(self, happened: Sequence[Any]) -> list[Any]:
        """The actions of the loop for events. Those of the training wait for `_deliver`. The caller holds the lock."""
        mine: list[Any] = []
        now = time.monotonic()
        posted, self._posted = self._posted, []
        for event in (*posted, *happened):
            for action in self.coordinator.handle(event, now):
                if isinstance(action, _LOOP):
                    mine.append(action)
                    continue
                self._inward.append(action)
                if isinstance(action, events.Deliver):
                    self._gathered += len(action.body)
                else:
                    self._urgent = True
        return _without_settled(mine) if posted else mine

    def _deliver(self) -> None:
        """Put the actions of the training into its inbox, in their order. The caller holds the lock."""
        for action in self._inward:
            self.inbox.put(action)
        self._inward.clear()
        self._gathered, self._urgent = 0, False
        if self._collecting is not None and threading.current_thread() is self._thread:
            self._collecting.cancel()
            self._collecting = None

    def offer(self, data: bytes) -> wire.Blob:
        """Keep bytes for download by the clients to which a message names them."""
        blob = wire.Blob(wire.digest(data), len(data))
        with self._lock:
            self.blobs[blob.hash] = data
        return blob

    def keep_blobs(self, needed: set[bytes]) -> None:
        """Forget all blobs except these."""
        with self._lock:
            self.blobs = {h: data for h, data in self.blobs.items() if h in needed}

    @property
    def present(self) -> frozenset[int]:
        """The clients with an open channel."""
        return frozenset(channel.client for channel in list(self._channels.values()))

    def lease_ages(self) -> tuple[float, ...]:
        """The seconds since the last sign of life of each open lease."""
        with self._lock:
            now, lease = time.monotonic(), self.coordinator.limits.lease_s
            works = [work for client in self.coordinator.status() for work in client.works]
        return tuple(max(0.0, now - expires + lease) for _, state, expires in works if state in ("leased", "expired"))

    def stop(self) -> bool:
        """Close all channels and end the thread. Returns whether it has ended."""
        if self._loop is not None and self._thread is not None and self._thread.is_alive():
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._end)
            self._thread.join(60)
        return self._thread is None or not self._thread.is_alive()

    def _end(self) -> None:
        self._stopping.set()
        required(self._wakes, "event loop").set()

    # the thread of the loop

    def _main(self, host: str, port: int, started: queue.SimpleQueue[str | BaseException]) -> None:
        try:
            run_loop(self._serve(host, port, started), self._end)
        except BaseException as error:
            started.put(error)
            self.inbox.put(error)

    async def _serve(self, host: str, port: int, started: queue.SimpleQueue[str | BaseException]) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping, self._wakes, self._emptied = asyncio.Event(), asyncio.Event(), asyncio.Event()
        # The routes are few, and an application of aiohttp would take a third of the CPU of a short request.
        serving = web.Server(
            self._answer,
            request_factory=self._request,
            auto_decompress=False,
            keepalive_timeout=75,
            lingering_time=1,  # for the rest of a body that was refused
            access_log=None,
        )
        runner = web.ServerRunner(serving, shutdown_timeout=1)
        await runner.setup()
        listening: list[socket.socket] = []
        accepting: list[asyncio.Task[None]] = []
        try:
            self._rotate = self._rotation(host) if self.files is None else self._reloading(self.files)
            context, listening = self._rotate(), await _listening(host, port)
            self._server = serving
            bound = listening[0].getsockname()
            shown = f"[{bound[0]}]" if ":" in bound[0] else bound[0]
            started.put(f"{shown}:{bound[1]}")
            tls = None if self.insecure else context
            accepting = [asyncio.create_task(self._accept(one, serving, tls)) for one in listening]
            timer = asyncio.create_task(self._timer())
            await self._stopping.wait()
            wakes = required(self._wakes, "event loop")
            wakes.set()
            await timer
            for channel in list(self._channels.values()):
                self._close(channel, None)
            if self._channels:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._emptied.wait(), 5)
        finally:
            for task in accepting:
                task.cancel()
            if accepting:
                await asyncio.wait(accepting)
            for one in listening:
                one.close()
            await runner.cleanup()

    async def _accept(self, listening: socket.socket, make: Any, context: ssl.SSLContext | None) -> None:
        """Accept connections. One that would take the descriptors of files is closed before its handshake."""
        loop, beginning = asyncio.get_running_loop(), set[asyncio.Task[None]]()
        limit = None if context is None else HEAD_S

        async def begin(link: socket.socket) -> None:
            try:
                await loop.connect_accepted_socket(make, sock=link, ssl=context, ssl_handshake_timeout=limit)
            except (OSError, TimeoutError):  # the handshake failed
                link.close()

        try:
            while True:
                try:
                    link, _ = await loop.sock_accept(listening)
                except OSError:  # the peer has gone, or no descriptor is free
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(self._stopping.wait(), 0.05)
                    continue
                if link.fileno() >= self.last_descriptor:
                    link.close()
                    continue
                link.setblocking(False)
                task = asyncio.create_task(begin(link))
                beginning.add(task)
                task.add_done_callback(beginning.discard)
        finally:
            await asyncio.sleep(0)  # each handshake begins, and so owns its socket
            for task in beginning:
                task.cancel()

    def _rotation(self, host: str) -> Callable[[], ssl.SSLContext]:
        """Returns the TLS context. Each call gives it a new certificate for the host names of the server."""
        hosts = tuple(dict.fromkeys((*self.hosts, *_own_names(host))))
        key, path, ca = self.home / "server.key", self.home / "server.pem", self.home / "ca.pem"
        if not key.exists():
            identity.write_key(key, identity.new_key())
        contexts: list[ssl.SSLContext] = []

        def rotate() -> ssl.SSLContext:
            certificate = self.authority.server(identity.read_key(key), hosts, datetime.now(UTC))
            atomic_write(path, identity.certificate_pem(certificate))
            if contexts:
                contexts[0].load_cert_chain(path, key)  # connections from now on have it
            else:
                contexts.append(identity.server_context(path, key, ca))
            self._rotated = time.monotonic()
            return contexts[0]

        return rotate

    def _reloading(self, files: identity.Files) -> Callable[[], ssl.SSLContext]:
        """As `_rotation`, with the files of an institution, which may be replaced while the server runs."""
        context = identity.server_context(*map(Path, files))

        def reload() -> ssl.SSLContext:
            self._rotated = time.monotonic()
            with contextlib.suppress(OSError):  # the former certificate stays until both files are there
                context.load_cert_chain(files.certificate, files.key)
            return context

        return reload

    def _request(self, message: Any, payload: Any, protocol: Any, writer: Any, task: Any) -> web.BaseRequest:
        """A request whose head has arrived on a connection."""
        self._spoke.add(protocol)
        loop = required(self._loop, "event loop")
        return web.BaseRequest(message, payload, protocol, writer, task, loop, client_max_size=1 << 16)

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        """Call the handler of a route, with the hash or the work at the end of the path."""
        named = _NAMED.fullmatch(request.path)
        path, name = (named[1], named[2]) if named else (request.path, "")
        handler = _ROUTES.get((request.method, path, len(name)))
        if handler is None:
            raise web.HTTPNotFound()
        answer: web.StreamResponse = await handler(self, request, bytes.fromhex(name))
        return answer

    @property
    def connections(self) -> Sequence[Any]:
        """The open connections, the oldest first."""
        return [] if self._server is None else self._server.connections

    def _guard(self) -> None:
        """End connections without a request, and the newest ones beyond the limit; renew the certificate in time."""
        now = time.monotonic()
        if now - self._guarded < GUARD_S:  # it reads all connections, and many timers of clients may end together
            return
        self._guarded = now
        self._transferred(0, least=1)
        self._opened = {connection: self._opened.get(connection, now) for connection in self.connections}
        self._spoke &= self._opened.keys()
        for number, (connection, opened) in enumerate(self._opened.items()):
            silent = connection not in self._spoke and now - opened > HEAD_S
            if (silent or number >= self.most) and connection.transport is not None:
                connection.transport.abort()
        if now - self._rotated > ROTATED_S:
            self._rotate()

    async def _timer(self) -> None:
        """Wake the coordinator at its next deadline, and notice revocations while no frame arrives."""
        wakes = required(self._wakes, "event loop")
        while not self._stopping.is_set():
            wake, now = self.coordinator.wake, time.monotonic()
            wait = 1.0 if wake is None else min(1.0, max(0.0, wake - now))
            wait = wait if self._watchdog is None else min(wait, self._watchdog)
            self._planned = now + wait
            try:
                await asyncio.wait_for(wakes.wait(), wait)
            except TimeoutError:
                self.lag = max(0.0, time.monotonic() - self._planned)
            wakes.clear()
            if self._watchdog is not None and time.monotonic() - self._signed >= self._watchdog:
                self._signed = time.monotonic()
                systemd.notify("WATCHDOG=1")
            if self._stopping.is_set():
                return  # the store may be closed as soon as this thread has ended
            self._refresh()
            if self.coordinator.below_relay:
                self._end_renumbered()
            self._event(events.Tick())
            self._guard()
            self._publish()

    def _publish(self) -> None:
        """Replace status.json at most once a second, without fsync: `atoll status` reads it."""
        if time.monotonic() - self._published < 1.0:
            return
        self._published = time.monotonic()
        with self._lock:
            clients = self.coordinator.status()
        names = {record.id: record.name for record in self._directory.clients}
        places = channels_of(self._directory.clients)
        stages: dict[int, str] = {c.client: c.stage for c in clients}
        awaited, step = list(self.awaited()), self.step()
        each = ", ".join(
            f"{names.get(i, str(i))} ({_STAGES[stages.get(places.get(i, i), 'away')]})" for i in awaited[:20]
        )
        facts = {
            "time": time.time(),
            "awaited": awaited,
            "why": f"The run waits for {each}{step and ': '}{step}." if each else "",
            "step": step,
            "clients": [{"client": c.client, "stage": c.stage, "seen": self.seen.get(c.client)} for c in clients],
        }
        new = self.home / "status.json.new"
        with contextlib.suppress(OSError):  # a full disk must not stop the loop
            new.write_text(json.dumps(facts))
            new.replace(self.home / "status.json")

    def _event(self, event: Any) -> None:
        """Pass an event of the loop to the coordinator, and carry out its actions.

        The thread of the training is woken once for all events of an iteration of the loop.
        """
        with self._lock:
            posted, self._outward = self._outward, []
            actions = self._decide((event,))
            wake, flushes = self.coordinator.wake, bool(self._inward) and not self._flushes
        if flushes:
            self._flushes = True
            required(self._loop, "event loop").call_soon(self._flush)
        self._carry_out(posted)
        self._carry_out(actions)
        if wake is not None and wake < self._planned and self._wakes is not None:
            self._wakes.set()

    def _flush(self) -> None:
        """Put the actions of this iteration into the inbox. Contributions wait a moment for others of their round.

        One fold of many contributions, and one wake of the thread of the training, cost less than many.
        """
        self._flushes = False
        with self._lock:
            if self._urgent or self._gathered >= TOGETHER or len(self._inward) >= self.awaits:
                self._deliver()
            elif self._inward and self._collecting is None:
                self._collecting = required(self._loop, "event loop").call_later(COLLECT_S, self._collected)

    def _collected(self) -> None:
        self._collecting = None
        with self._lock:
            self._deliver()

    def _carry_posted(self) -> None:
        """Carry out the actions that the thread of the training has caused."""
        with self._lock:
            posted, self._outward = self._outward, []
        self._carry_out(posted)
        if (wake := self.coordinator.wake) is not None and wake < self._planned and self._wakes is not None:
            self._wakes.set()

    def _refresh(self) -> None:
        """Read the directory again if an identity has changed, and end the channels of revoked clients.

        The frames of one iteration of the loop share one look at the database.
        """
        if self._checked:
            return
        self._checked = True
        required(self._loop, "event loop").call_soon(self._check_again)
        if not self.store.stale():
            return
        self._directory = self.store.directory()
        revoked = {client.id for client in self._directory.clients if client.state == "revoked"}
        for client in revoked & set(self.present) | revoked:
            self._event(events.Revoked(client))

    def _end_renumbered(self) -> None:
        """End the channels of clients of a relay that have a number in the run now."""
        waiting = [channel for channel in self._channels.values() if channel.client >= wire.RELAYS]
        if waiting:
            numbers = {client.name: client.id for client in self._directory.clients}
            for channel in waiting:
                if numbers.get(channel.name) != channel.client:
                    self._event(events.Renumbered(channel.number))

    def _check_again(self) -> None:
        self._checked = False

    def _carry_out(self, actions: list[Any]) -> None:
        for action in actions:
            match action:
                case events.Send(channel=number, message=message):
                    channel = self._channels.get(number)
                    if channel is not None:
                        self._queue(channel, wire.encode_frame(message, self.step_cap))
                case events.Close(channel=number, bye=bye):
                    channel = self._channels.get(number)
                    if channel is not None:
                        self._close(channel, bye)
                case events.Grant(upload=number):
                    self._settle_upload(number, None)
                case events.Finish(upload=number, code=code):
                    self._settle_upload(number, code)
                case events.Discard(work=work):
                    self._partial.pop(work, None)

    def _queue(self, channel: _Channel, frame: bytes) -> None:
        channel.waiting.append(frame)
        channel.queued += len(frame)
        channel.ready.set()
        if channel.queued > MAX_QUEUED:
            self._close(channel, wire.Bye("slow", "the client does not read", 1.0, None))

    def _close(self, channel: _Channel, bye: wire.Bye | None) -> None:
        if not channel.closing:
            if bye is not None:
                channel.waiting.append(wire.encode_frame(bye))
            channel.closing = True
            channel.ready.set()

    # channels

    def _peer(self, request: web.BaseRequest) -> tuple[ClientRecord, identity.Peer]:
        """The client with the certificate of this connection.

        Raises:
            HTTPForbidden: no certificate, or one of no client of the federation.
        """
        if self.insecure:
            der = self._stated(request)
        else:
            transport = request.transport
            tls = None if transport is None else transport.get_extra_info("ssl_object")
            der = None if tls is None else tls.getpeercert(binary_form=True)
        if not der:
            raise web.HTTPUnauthorized(text="no client certificate")
        self._refresh()
        peer = identity.peer_of(der)
        client = self._directory.admit(peer)
        if client is None:
            raise web.HTTPForbidden(text="no client of this federation has this certificate")
        return client, peer

    def _stated(self, request: web.BaseRequest) -> bytes | None:
        """The certificate that a client without TLS states, if the authority has issued it and it is valid now."""
        with contextlib.suppress(ValueError):
            der = base64.b64decode(request.headers.get(wire.CERTIFICATE, ""), validate=True)
            return der if self.authority.has_issued(der, datetime.now(UTC)) else None
        return None

    async def _link(self, request: web.BaseRequest, _: bytes) -> web.StreamResponse:
        client, peer = self._peer(request)
        socket = web.WebSocketResponse(
            heartbeat=PING_S, autoping=True, compress=False, max_msg_size=wire.MAX_FRAME, timeout=5.0
        )
        await socket.prepare(request)
        self._count += 1
        channel = _Channel(self._count, client.id, socket, client.name)
        self._channels[channel.number] = channel
        if len(client.serials) > 1 or client.state == "invited":
            await asyncio.get_running_loop().run_in_executor(None, self.store.used, client.id, peer.serial)
        writer = asyncio.create_task(self._write(channel))
        try:
            self._event(events.Joined(channel.number, client.id))
            async for frame in socket:
                if frame.type is WSMsgType.ERROR:
                    break  # no pong, or a connection that ended within a frame
                self.seen[client.id] = time.time()
                self._refresh()
                if frame.type is not WSMsgType.BINARY:
                    self._event(events.Garbled(channel.number, "type"))
                    continue
                try:
                    message = wire.decode_up(frame.data, self.step_cap)
                except wire.FrameError as error:
                    self._event(events.Garbled(channel.number, error.code))
                    continue
                self._event(events.Arrived(channel.number, message))
        finally:
            self._channels.pop(channel.number, None)
            if not self._channels:
                self._emptied.set()
            self._event(events.Left(channel.number))
            channel.closing = True
            channel.ready.set()
            with contextlib.suppress(Exception):
                await writer
        return socket

    async def _write(self, channel: _Channel) -> None:
        """Send the frames that wait, in order; then close the channel if it ends."""
        while True:
            await channel.ready.wait()
            channel.ready.clear()
            while channel.waiting:
                frame = channel.waiting.popleft()
                try:
                    await channel.socket.send_bytes(frame)
                except (ConnectionError, RuntimeError):
                    return
                channel.queued -= len(frame)
            if channel.closing:
                await channel.socket.close()
                return

    # enrolment

    async def _healthz(self, request: web.BaseRequest, _: bytes) -> web.Response:
        return web.Response(text="ok")

    async def _ca(self, request: web.BaseRequest, _: bytes) -> web.Response:
        if self.files is not None:
            return _refused(403, *_INSTITUTION)
        return web.Response(body=identity.certificate_pem(self.authority.certificate))

    async def _enrol(self, request: web.BaseRequest, _: bytes) -> web.Response:
        """Exchange a token for a certificate. An address has ten failed tries a minute."""
        address, now = request.remote or "", time.monotonic()
        tries = self._tries.setdefault(address, deque())
        while tries and now - tries[0] > 60:
            tries.popleft()
        if len(tries) >= MAX_TRIES:
            return _refused(429, "Too many failed enrolments of this address.", "at most ten a minute.")
        try:
            async with asyncio.timeout(BODY_S):
                fields = json.loads(await request.read())
            name, pem = str(fields["name"]), str(fields["request"]).encode()
            secret = identity.secret_hash(bytes.fromhex(fields["secret"]))
            key, proof = identity.identity_bytes(str(fields["identity"])), bytes.fromhex(fields["proof"])
        except TimeoutError:
            tries.append(now)
            raise web.HTTPRequestTimeout() from None
        except (ValueError, KeyError, TypeError):
            tries.append(now)
            return _refused(400, "The request cannot be read.", "name, secret, request, identity and proof.")
        if self.files is not None and self._named(request) != name:
            tries.append(now)
            return _refused(403, *_INSTITUTION)
        work = (
            self._issue(name, pem, secret, key) if self.files is None else self._bind(request, name, secret, pem, key)
        )
        try:
            identity.check_identity(proof, key, self.store.federation, name, secret, pem)
            certificate = await asyncio.get_running_loop().run_in_executor(None, work)
        except (DeniedError, UsageError) as error:
            tries.append(now)
            return _refused(403, error.given, error.required, form(error.write, "shell"))
        return web.Response(body=certificate)

    def _issue(self, name: str, pem: bytes, secret: bytes, key: bytes) -> Callable[[], bytes]:
        def signed() -> tuple[bytes, identity.Peer]:
            der = self.authority.client(pem, name, datetime.now(UTC))
            return der, identity.peer_of(der)

        return lambda: self.store.enrol(name, secret, pem, int(time.time()), signed, key).certificate

    def _named(self, request: web.BaseRequest) -> str | None:
        """The name of the client with the certificate of this connection; None if there is none."""
        with contextlib.suppress(web.HTTPException):
            return self._peer(request)[0].name
        return None

    def _bind(self, request: web.BaseRequest, name: str, secret: bytes, pem: bytes, key: bytes) -> Callable[[], bytes]:
        """Use a token for a client that has a certificate of its institution: it registers the identity key."""
        _, peer = self._peer(request)
        der = required(request.transport, "connection").get_extra_info("ssl_object").getpeercert(binary_form=True)
        return lambda: self.store.enrol(name, secret, pem, int(time.time()), lambda: (der, peer), key).certificate

    async def _renew(self, request: web.BaseRequest, _: bytes) -> web.Response:
        client, peer = self._peer(request)
        try:
            async with asyncio.timeout(BODY_S):
                pem = await request.read()
        except TimeoutError:
            raise web.HTTPRequestTimeout() from None

        def signed(name: str) -> tuple[bytes, identity.Peer]:
            der = self.authority.client(pem, name, datetime.now(UTC))
            return der, identity.peer_of(der)

        renew = lambda: self.store.renew(client.id, peer.serial, signed).certificate  # noqa: E731
        try:
            certificate = await asyncio.get_running_loop().run_in_executor(None, renew)
        except (DeniedError, UsageError) as error:
            return _refused(403, error.given, error.required, form(error.write, "shell"))
        return web.Response(body=certificate)

    # bodies

    async def _blob(self, request: web.BaseRequest, hash: bytes) -> web.StreamResponse:
        """Bytes that a message to this client names, from the start of its range."""
        client, _ = self._peer(request)
        with self._lock:
            data = self.blobs.get(hash) if self.coordinator.may_read(client.id, hash) else None
        if data is None:
            raise web.HTTPNotFound()
        try:
            span = request.http_range
        except ValueError:
            raise web.HTTPRequestRangeNotSatisfiable() from None
        start = span.start or 0
        if start < 0 or start > len(data) or span.stop is not None:
            raise web.HTTPRequestRangeNotSatisfiable()
        headers = {"Content-Length": str(len(data) - start), "Content-Type": "application/octet-stream"}
        status = 200
        if start:
            status, headers["Content-Range"] = 206, f"bytes {start}-{len(data) - 1}/{len(data)}"
        answer = web.StreamResponse(status=status, headers=headers)
        await answer.prepare(request)
        async with self._turn():
            await self._send_pieces(request, answer, memoryview(data)[start:])
        if len(data) - start > LONG and self._is_crowded():
            self._transferred()
        return answer

    async def _send_pieces(self, request: web.BaseRequest, answer: web.StreamResponse, view: memoryview) -> None:
        """Send the body of a download. The connection keeps buffers of the longest bytes that wait, until it ends."""
        piece = SHORT_PIECE if self._is_crowded() else PIECE
        if request.transport is not None:  # the next piece waits until this one has left; the default is 512 KiB
            request.transport.set_write_buffer_limits(high=1, low=0)
        for at in range(0, len(view), piece):
            await answer.write(view[at : at + piece])
            await request.writer.drain()  # `write` waits only after each 64 KiB
        await answer.write_eof()

    @contextlib.asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """If the server is crowded, let few downloads start at a time, so that few have full buffers.

        A download delays others by at most `SENDING_S`, so a client that does not read blocks none.
        """
        if not self._is_crowded():
            yield
            return
        await self._sending.acquire()
        held = True

        def give() -> None:
            nonlocal held
            if held:
                held = False
                self._sending.release()

        timer = required(self._loop, "event loop").call_later(SENDING_S, give)
        try:
            yield
        finally:
            timer.cancel()
            give()

    async def _offset(self, request: web.BaseRequest, work: bytes) -> web.Response:
        client, _ = self._peer(request)
        with self._lock:
            announced = self.coordinator.announced(client.id, work)
        partial = self._partial.get(work)
        have = partial.filled if announced is not None and partial is not None else 0
        return web.Response(status=204, headers={"Upload-Offset": str(have)})  # a 200 would end the connection

    async def _put(self, request: web.BaseRequest, work: bytes) -> web.Response:
        """Receive a long message after its grant."""
        client, _ = self._peer(request)
        if request.headers.get("Content-Encoding"):
            raise web.HTTPUnsupportedMediaType()
        if request.content_length is None:
            raise web.HTTPLengthRequired()
        start, total = _range(request)
        with self._lock:
            announced = self.coordinator.announced(client.id, work)
        if announced is None or announced.length != total:
            return web.Response(status=410, text="late")
        have = self._partial[work].filled if work in self._partial else 0
        if start != have or request.content_length != total - start:
            return web.Response(status=416, headers={"Upload-Offset": str(have)})
        self._count += 1
        upload = _Upload(self._count, client.id, work, asyncio.get_running_loop().create_future(), request.content)
        self._uploads[upload.number] = upload
        try:
            self._event(events.Offered(upload.number, client.id, work))
            code = await upload.decided
            if code is not None:
                return web.Response(status=wire.HTTP_STATUS.get(code, 429), text=code)
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n") if _expects(request) else None
            partial = self._partial.get(work) or self._partial.setdefault(
                work, _Partial(np.empty(total, np.uint8).data)
            )
            upload.decided = asyncio.get_running_loop().create_future()
            await self._read_body(upload, partial)
            self._partial.pop(work, None)
            hash, data = await partial.digest(), partial.data
            del partial
            self._event(events.Uploaded(upload.number, hash, data))
            del data
            code = upload.decided.result() if upload.decided.done() else await asyncio.wait_for(upload.decided, 10)
            done = web.Response(status=wire.HTTP_STATUS.get(code, 429), text=code)
            if total > LONG and self._is_crowded():
                self._transferred()
                done.force_close()  # it has the buffers of a long upload, which idle connections would keep
            return done
        except _EndedError:  # after 503 the client connects and sends it again
            code = upload.decided.result()
            ended = web.Response(status=503 if code == "quota" else wire.HTTP_STATUS[code], text=code)
            ended.force_close()
            return ended
        except (ConnectionError, TimeoutError, asyncio.CancelledError):
            self._event(events.Aborted(upload.number))
            raise
        finally:
            self._uploads.pop(upload.number, None)

    async def _read_body(self, upload: _Upload, partial: _Partial) -> None:
        """Read the rest of a message. The coordinator ends an upload without progress (`_settle_upload`)."""
        upload.reading, view, total, clock = True, partial.data, len(partial.data), time.monotonic
        reported = clock()
        due, least, sent = reported + BODY_S, partial.filled + FLOOR, partial.filled
        while partial.filled < total:
            piece = await upload.content.readany()
            now = clock()
            if now >= due:
                if partial.filled < least:
                    raise ConnectionResetError("the upload is too slow")
                due, least = now + BODY_S, partial.filled + FLOOR
            end = partial.filled + len(piece)
            if not piece:
                raise ConnectionResetError("the upload ended early")
            if end > total:
                raise web.HTTPRequestEntityTooLarge(max_size=total, actual_size=end)
            view[partial.filled : end] = piece
            partial.filled = end
            if end - partial.hashed >= HASH_STEP:
                partial.hash_on()
            if now - reported >= PROGRESS_S:  # the coordinator waits for longer, and a fast upload has many pieces
                self._event(events.UploadProgress(upload.number, end - sent))
                reported, sent = now, end
        upload.reading = False

    def _is_crowded(self) -> bool:
        return len(self.connections) > MANY

    def _transferred(self, count: int = 1, least: int = RETURN_EVERY) -> None:
        """Count transfers of a crowded server that have ended, and return the buffers of `least` of them."""
        self._ended += count
        if self._ended >= least:
            self._ended = 0
            return_memory()

    def _settle_upload(self, number: int, code: Any) -> None:
        upload = self._uploads.get(number)
        if upload is not None and not upload.decided.done():
            upload.decided.set_result(code)
            if upload.reading:
                upload.content.set_exception(_EndedError())


def _without_settled(actions: list[Any]) -> list[Any]:
    """The actions without the receipts of works whose `Settled` is among them: it says more."""
    settled = {
        work
        for action in actions
        if isinstance(action, events.Send) and isinstance(action.message, wire.Settled)
        for work in action.message.works
    }
    if not settled:
        return actions
    return [
        action
        for action in actions
        if not (isinstance(action, events.Send) and isinstance(action.message, wire.Receipt))
        or action.message.code != "received"
        or action.message.work not in settled
    ]


class _EndedError(Exception):
    """The coordinator has ended an upload."""


@dataclass(eq=False)
class _Partial:
    """The bytes of an upload that have arrived, in a buffer of its length, and the SHA-256 of the first of them."""

    data: memoryview
    filled: int = 0
    hashed: int = 0
    hash: Any = field(default_factory=sha256)
    hashing: asyncio.Future[None] | None = None

    def hash_on(self) -> None:
        """Hash what has arrived in another thread, unless it still hashes earlier bytes."""
        if self.hashing is None or self.hashing.done():
            fresh, self.hashed = self.data[self.hashed : self.filled], self.filled
            self.hashing = asyncio.get_running_loop().run_in_executor(None, self.hash.update, fresh)

    async def digest(self) -> bytes:
        """The SHA-256 of all bytes."""
        while self.hashing is not None and self.hashed < self.filled:
            await asyncio.wait([self.hashing])
            self.hash_on()
        if self.hashing is None:
            self.hash.update(self.data)
        else:
            await self.hashing
        return bytes(self.hash.digest())


@dataclass(eq=False)
class _Upload:
    number: int
    client: int
    work: bytes
    decided: asyncio.Future[Any]
    content: Any  # the stream of its body
    reading: bool = False


def _expects(request: web.BaseRequest) -> bool:
    return request.headers.get("Expect", "").lower() == "100-continue"


_NAMED = re.compile("(/v1/blobs/|/v1/messages/)([0-9a-f]{32}|[0-9a-f]{64})")
_ROUTES: Mapping[tuple[str, str, int], Callable[..., Any]] = {  # a method, a path, and the digits after it
    ("GET", "/healthz", 0): Listener._healthz,
    ("HEAD", "/healthz", 0): Listener._healthz,
    ("GET", "/v1/ca", 0): Listener._ca,
    ("POST", "/v1/enrol", 0): Listener._enrol,
    ("POST", "/v1/renew", 0): Listener._renew,
    ("GET", "/v1/link", 0): Listener._link,
    ("GET", "/v1/blobs/", 64): Listener._blob,
    ("HEAD", "/v1/messages/", 32): Listener._offset,
    ("PUT", "/v1/messages/", 32): Listener._put,
}


def _range(request: web.BaseRequest) -> tuple[int, int]:
    """The first byte of an upload, and its whole length."""
    text = request.headers.get("Content-Range", "")
    with contextlib.suppress(ValueError):
        unit, _, rest = text.partition(" ")
        span, _, total = rest.partition("/")
        first, _, last = span.partition("-")
        if unit == "bytes" and int(last) == int(total) - 1 and 0 <= int(first) <= int(last):
            return int(first), int(total)
    raise web.HTTPBadRequest(text="Content-Range: bytes FIRST-LAST/TOTAL is required")


def _refused(status: int, given: str, required: str, write: str = "") -> web.Response:
    body = {"given": given, "required": required, "write": write}
    return web.json_response(body, status=status)


async def _listening(host: str, port: int) -> list[socket.socket]:
    """Sockets that listen at all addresses of a host, on one port. Addresses that this machine lacks are left out."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    made: list[socket.socket] = []
    missing: OSError | None = None
    with contextlib.ExitStack() as opened:
        for family, address in dict.fromkeys((place[0], place[4]) for place in found):
            try:
                one = socket.create_server((address[0], port, *address[2:]), family=family, backlog=1024)
            except OSError as error:
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                missing = error
                continue
            made.append(opened.enter_context(one))
            one.setblocking(False)
            port = one.getsockname()[1]
        opened.pop_all()
    if not made:
        raise required(missing, "address of the host")
    return made


def _own_names(host: str) -> tuple[str, ...]:
    """The names and addresses under which clients dial a server that listens on this host."""
    if host in ("0.0.0.0", "::", ""):
        return "127.0.0.1", "::1", "localhost"
    found: list[str] = []
    with contextlib.suppress(OSError):  # the server does not listen then
        found = [str(place[4][0]) for place in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
    return host, *(address for address in found if "%" not in address), "127.0.0.1", "localhost"


def _most_connections() -> int:
    """The connections that the descriptors of this process allow, with some left for files."""
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(16, soft - 64) if soft != resource.RLIM_INFINITY else 1 << 20
