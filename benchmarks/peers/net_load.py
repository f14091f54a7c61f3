"""Clients for benchmarks/net.py: they follow the protocol and send prepared bytes, without training."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import aiohttp
import numpy as np
from cryptography import x509

from atoll.net import identity, wire
from atoll.net.client import BACKENDS, own_versions, pieces_of, read_hashed
from atoll.net.home import ServerHome
from atoll.net.loop import run_loop

ROWS = 100


def enrol(home: Path, folder: Path, count: int) -> list[tuple[Path, Path, Path]]:
    """Enrol clients in the database. Returns certificate, key and authority of each."""
    folder.mkdir(exist_ok=True)
    key, now = identity.new_key(), datetime.now(UTC)
    identity.write_key(folder / "key.pem", key)
    request = identity.request_pem(key)
    at = ServerHome.open(home, serve=False)
    places = []
    try:
        for i in range(count):
            name, secret = f"site-{i}", i.to_bytes(32, "big")
            der = at.authority.client(request, name, now)
            at.database.invite(name, secret, int(time.time()) + 3600)
            at.database.enrol(name, secret, request, int(time.time()), lambda der=der: (der, identity.peer_of(der)))
            path = folder / f"{name}.pem"
            path.write_bytes(identity.certificate_pem(x509.load_der_x509_certificate(der)))
            places.append((path, folder / "key.pem", home / "ca.pem"))
    finally:
        at.close()
    return places


def body_of(length: int, head: int) -> bytes:
    """A valid message: the weight at the end of the head, and small numbers as the update."""
    rng = np.random.default_rng(0)
    update = rng.standard_normal((length - head) // 4, dtype=np.float32) * 1e-3
    return bytes(head - 8) + struct.pack("<q", ROWS) + update.tobytes()


@dataclass
class Load:
    """Clients in one event loop.

    Args:
        address: the address of the server.
        places: certificate, key and authority of each client.
        head: the bytes of a message before the update.
        hold: whether clients keep their answers until `release` is set.
    """

    address: str
    places: Sequence[tuple[Path, Path, Path]]
    head: int = 0
    hold: bool = False
    ready: int = 0
    working: int = 0
    answered: int = 0
    codes: dict[str, int] = field(default_factory=dict)
    release: asyncio.Event = field(default_factory=asyncio.Event)
    opened: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(64))
    _bodies: dict[int, bytes] = field(default_factory=dict)

    def body(self, length: int) -> bytes:
        """The message of this length."""
        if length not in self._bodies:
            self._bodies = {length: body_of(length, self.head)}
        return self._bodies[length]

    async def run(self, client: int, length: int) -> None:
        """Keep one client connected until it is cancelled."""
        certificate, key, ca = self.places[client]
        context = identity.client_context(certificate, key, ca)
        while True:
            with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError, ConnectionError):
                await self._connected(context, length)
            self.codes["disconnected"] = self.codes.get("disconnected", 0) + 1
            await asyncio.sleep(0.1 + 0.4 * (client % 10) / 10)

    async def _connected(self, context: ssl.SSLContext, length: int) -> None:
        async with contextlib.AsyncExitStack() as stack:
            async with self.opened:  # handshakes at a time, so that the listening queue does not overflow
                connector = aiohttp.TCPConnector(keepalive_timeout=60)
                session = aiohttp.ClientSession(f"https://{self.address}", connector=connector)
                await stack.enter_async_context(session)
                link = session.ws_connect("/v1/link", ssl=context, compress=0, max_msg_size=wire.MAX_FRAME)
                channel = await stack.enter_async_context(link)
                hello = wire.Hello(wire.PROTOCOL, own_versions(), "", BACKENDS, None, None, ())
                await channel.send_bytes(wire.encode_frame(hello))
            present = False
            try:
                async for frame in channel:
                    if frame.type is not aiohttp.WSMsgType.BINARY:
                        return
                    message = wire.decode_down(frame.data)
                    if isinstance(message, wire.Welcome) and message.input is not None:
                        await channel.send_bytes(wire.encode_frame(wire.Ready(message.input.hash, ROWS, 0)))
                        present, self.ready = True, self.ready + 1
                    elif isinstance(message, wire.Work):
                        await self._work(session, context, channel, message, length)
                    elif isinstance(message, wire.Receipt):
                        self.codes[message.code] = self.codes.get(message.code, 0) + 1
            finally:
                self.ready -= present

    async def _work(
        self,
        session: aiohttp.ClientSession,
        context: ssl.SSLContext,
        channel: aiohttp.ClientWebSocketResponse,
        work: wire.Work,
        length: int,
    ) -> None:
        if isinstance(work.model, wire.Blob):
            async with session.get(f"/v1/blobs/{work.model.hash.hex()}", ssl=context) as answer:
                _, found = await read_hashed(answer, work.model.length)
            if found != work.model.hash:
                raise ValueError("the server sent other bytes than it announced")
        body = self.body(length)
        self.working += 1
        if self.hold:
            await self.release.wait()
        if len(body) <= wire.MAX_INLINE:
            await channel.send_bytes(wire.encode_frame(wire.Update(work.work, work.lease, None, body)))
        else:
            sent = wire.Sent(work.work, work.lease, None, len(body), wire.digest(body))
            await channel.send_bytes(wire.encode_frame(sent))
            headers = {"Content-Range": f"bytes 0-{len(body) - 1}/{len(body)}", "Content-Length": str(len(body))}
            path = f"/v1/messages/{work.work.hex()}"
            async with session.put(
                path, data=pieces_of(memoryview(body)), headers=headers, ssl=context, expect100=True
            ) as answer:
                await answer.read()
        self.answered += 1


def serve_load(pipe, make, length: int) -> None:
    """Run clients in this process. Commands: status, hold, release, cpu, stop."""
    run_loop(_follow(pipe, make, length))


async def _follow(pipe, make, length: int) -> None:
    load: Load = make()
    load.body(length)
    tasks = [asyncio.create_task(load.run(i, length)) for i in range(len(load.places))]
    asked: asyncio.Queue = asyncio.Queue()
    asyncio.get_running_loop().add_reader(pipe.fileno(), lambda: asked.put_nowait(pipe.recv()))
    while True:
        command = await asked.get()
        if command == "stop":
            break
        if command == "hold":
            load.hold, load.working = True, 0
            load.release.clear()
        elif command == "release":
            load.release.set()
        facts = {"ready": load.ready, "working": load.working, "answered": load.answered, "codes": dict(load.codes)}
        pipe.send({**facts, "cpu": time.process_time()})
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
