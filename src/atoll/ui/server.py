"""The HTTP server of the page: runs as JSON, rows as a stream, files of a fixed list. It answers `GET` only.

Tests: tests/surface/test_ui.py
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

from atoll.base.errors import UsageError
from atoll.base.lines import Line
from atoll.runs.folder import LOGS
from atoll.runs.follow import Follower
from atoll.ui import access

STREAMS = 64
_PAGES = 4  # answers about one run that are kept
_PERIOD = 0.1  # seconds between two looks at the files of open streams
_CHUNK = 256 << 10  # bytes of rows in one write
_PATIENCE = 10.0  # seconds that a write may wait for its reader
_MOST_ANSWER = 4 << 20  # bytes of rows in one answer
_PLAIN = {".json", ".jsonl", ".csv", ".toml"}
_FRAMED = (
    "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"
)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass
class PageServer:
    """Serves the runs of a folder.

    Args:
        out: the parent of run folders. It may be missing or empty.
        host, port: the address to listen on; port 0: a free one.
        run: the run that the page opens first; empty: the list of runs.
        token: the secret of the URL.
    """

    out: Path
    host: str = "127.0.0.1"
    port: int = 0
    run: str = ""
    token: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    _followers: dict[str, Follower] = field(default_factory=dict)
    _open: dict[str, int] = field(default_factory=dict)
    _ended: dict[str, bool] = field(default_factory=dict)
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)
    _news: bool = False
    _briefs: dict[str, tuple[Any, dict[str, Any]]] = field(default_factory=dict)
    _pages: dict[str, tuple[Any, bytes]] = field(default_factory=dict)  # the last one at the end

    @property
    def cookie(self) -> str:
        """The name of the cookie. It contains the port, because cookies ignore ports."""
        return f"atoll-{self.port}"

    @property
    def url(self) -> str:
        """The address with the token, and with the run that opens first."""
        host = socket.gethostname() if self.host in ("0.0.0.0", "::") else self.host  # all addresses of this machine
        host = f"[{host}]" if ":" in host else host
        return f"http://{host}:{self.port}/?token={self.token}" + (f"#{self.run}" if self.run else "")

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[PageServer]:
        """Listen until the block ends.

        Raises:
            UsageError: the address cannot be used.
        """
        runner = web.AppRunner(self._application(), access_log=None, shutdown_timeout=0.5)
        await runner.setup()
        try:
            site = web.TCPSite(runner, self.host, self.port)
            try:
                await site.start()
            except OSError as error:
                raise UsageError(
                    f"--host {self.host} --port {self.port}: {error.strerror or error}.",
                    "an address and a port that are free.",
                    write=Line(shell="atoll ui --port 0"),
                ) from error
            self.port = runner.addresses[0][1]
            watcher = asyncio.create_task(self._watch())
            try:
                yield self
            finally:
                watcher.cancel()
        finally:
            await runner.cleanup()

    def _application(self) -> web.Application:
        app = web.Application(middlewares=[self._guard])
        for path, handler in (
            ("/", self._index),
            ("/api/runs", self._runs),
            ("/api/runs/{name}", self._page),
            ("/api/runs/{name}/rows", self._rows),
            ("/api/runs/{name}/clients", self._clients),
            ("/api/runs/{name}/live", self._live),
            ("/files/{name}/{file:.+}", self._file),
        ):
            app.router.add_get(path, handler, allow_head=False)
        return app

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        given = request.query.get("token", "")
        host = request.headers.get("Host", "")
        if not access.allowed(host, self.host, self.token, given, request.cookies, self.cookie):
            raise web.HTTPForbidden(text="403: open the address that `atoll ui` prints.\n", headers=access.HEADERS)
        try:
            response = await handler(request)
        except web.HTTPException as error:
            error.headers.update(access.HEADERS)
            raise
        if not response.prepared:
            response.headers.update(access.HEADERS)
            if "Content-Security-Policy" not in response.headers:
                response.headers["Content-Security-Policy"] = "default-src 'none'; frame-ancestors 'none'"
            if given:
                response.set_cookie(self.cookie, self.token, httponly=True, samesite="Strict", path="/")
        return response

    def _folder(self, request: web.Request) -> Path:
        """The run folder of a request: a folder in `out` itself, and no link."""
        name = request.match_info["name"]
        folder = self.out / name
        plain = name == Path(name).name and name not in ("", ".", "..") and not folder.is_symlink()
        if not plain or not (folder / "config.toml").is_file():
            raise web.HTTPNotFound(text="404: no such run.\n")
        return folder

    async def _index(self, request: web.Request) -> web.Response:
        from atoll.report.bundle import live_page

        text, policy = live_page()
        response = web.Response(text=text, content_type="text/html")
        response.headers["Content-Security-Policy"] = policy
        return response

    async def _runs(self, request: web.Request) -> web.Response:
        return _json(await asyncio.to_thread(self._all_briefs))

    def _all_briefs(self) -> list[dict[str, Any]]:
        """One entry for each run, newest first. A run whose files have not changed is not read again."""
        from atoll import runs
        from atoll.report.page_data import run_brief

        found = []
        for folder in reversed(runs.list_runs(self.out)):
            stamp = (runs.is_locked(folder), *(_stamp(folder / name) for name in (*LOGS, "labels.json")))
            known = self._briefs.get(folder.name)
            if known is None or known[0] != stamp:
                try:
                    known = self._briefs[folder.name] = (stamp, run_brief(folder))
                except OSError:  # the run was deleted in between
                    continue
            found.append(known[1])
        return found

    async def _page(self, request: web.Request) -> web.Response:
        body = await asyncio.to_thread(self._page_of, self._folder(request))
        return web.Response(body=body, content_type="application/json")

    def _page_of(self, folder: Path) -> bytes:
        """The JSON of a run. An open page asks again and again; files that have not changed are not read again."""
        from atoll.report.page_data import page_data, to_json

        stamp = _contents(folder)
        known = self._pages.pop(folder.name, None)
        if known is None or known[0] != stamp:
            known = stamp, to_json(page_data(folder))
        self._pages[folder.name] = known
        for name in list(self._pages)[:-_PAGES]:
            self._pages.pop(name, None)
        return known[1]

    async def _rows(self, request: web.Request) -> web.Response:
        try:
            after = int(request.query.get("after", "-1"))
        except ValueError:
            raise web.HTTPBadRequest(text="400: after=K is the number of a round.\n") from None
        follower = self._follower(self._folder(request))
        rows = follower.rows(follower.after(after), _MOST_ANSWER)
        return web.Response(body=b"[" + b",".join(row for _, row in rows) + b"]", content_type="application/json")

    async def _clients(self, request: web.Request) -> web.Response:
        from atoll.report.page_data import client_curves, page_data

        folder, name = self._folder(request), request.query.get("name")
        if name is None:
            return _json((await asyncio.to_thread(page_data, folder)).clients)
        found = await asyncio.to_thread(client_curves, folder, name)
        if found is None:
            raise web.HTTPNotFound(text="404: no such client.\n")
        return _json(found)

    async def _file(self, request: web.Request) -> web.StreamResponse:
        from atoll.report.page_data import files

        folder, name = self._folder(request), request.match_info["file"]
        file = folder / name
        if name not in files(folder) or not file.resolve().is_relative_to(folder.resolve()):
            raise web.HTTPNotFound(text="404: no such file.\n")
        headers = {"Content-Security-Policy": _FRAMED}
        if file.suffix in _PLAIN:
            headers["Content-Type"] = "text/plain; charset=utf-8"
        elif file.suffix == ".safetensors":
            headers["Content-Type"] = "application/octet-stream"
            headers["Content-Disposition"] = f'attachment; filename="{file.name}"'
        return web.FileResponse(file, headers=headers)

    # Streams

    def _follower(self, folder: Path) -> Follower:
        follower = self._followers.setdefault(folder.name, Follower(folder / "metrics.jsonl"))
        self._look(folder.name, follower)
        return follower

    def _look(self, name: str, follower: Follower) -> bool:
        """Read new rows of a run. Whether the run has ended is asked first, so that its last rows are read."""
        ended = follower.ended()
        changed = follower.poll()
        changed |= self._ended.get(name) != ended
        self._ended[name] = ended
        self._news |= changed
        return changed

    async def _watch(self) -> None:
        """Look at the files of open streams, and wake the streams if one has changed."""
        never = asyncio.Event()
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(never.wait(), _PERIOD)
            for name in list(self._open):
                self._look(name, self._followers[name])
            if self._news:  # of this look, or of one for another request
                self._news = False
                async with self._changed:
                    self._changed.notify_all()

    async def _live(self, request: web.Request) -> web.StreamResponse:
        folder = self._folder(request)
        if sum(self._open.values()) >= STREAMS:
            raise web.HTTPServiceUnavailable(text=f"503: at most {STREAMS} streams are open at a time.\n")
        try:
            last = int(request.headers.get("Last-Event-ID") or request.query.get("after", "-1"))
        except ValueError:
            last = -1
        self._open[folder.name] = self._open.get(folder.name, 0) + 1
        try:
            return await self._stream(request, folder, last)
        finally:
            self._open[folder.name] -= 1
            if not self._open[folder.name]:
                del self._open[folder.name]

    async def _stream(self, request: web.Request, folder: Path, last: int) -> web.StreamResponse:
        """Send each row once: those after round `last`, then new ones, a reset after each cut, and the end."""
        follower = self._follower(folder)
        response = web.StreamResponse(headers=access.HEADERS)
        response.headers["Content-Type"] = "text/event-stream"
        await response.prepare(request)
        # A reader that was away may have missed a cut: it drops the rounds that any cut has dropped, and those that the
        # log no longer has.
        there = follower.rounds[-1] if follower.rounds else -1
        cut = min([c for c in (*follower.cuts, there + 1) if c <= last], default=None)
        seen, at = len(follower.cuts), follower.after(last)
        with contextlib.suppress(ConnectionError, TimeoutError, asyncio.CancelledError):
            while True:
                if len(follower.cuts) > seen:
                    cut, seen = min(follower.cuts[seen:]), len(follower.cuts)
                if cut is not None:
                    await _send(response, b"event: reset\ndata: %d\n\n" % cut)
                    at, cut = min(at, follower.after(cut - 1)), None
                    continue
                rows = follower.rows(at, _CHUNK)
                if rows:
                    at += len(rows)
                    await _send(response, b"".join(b"id: %d\nevent: round\ndata: %s\n\n" % row for row in rows))
                elif self._ended[folder.name] and not self._look(folder.name, follower):
                    await _send(response, b"event: end\ndata: {}\n\n")
                    break
                else:
                    async with self._changed:
                        # Rows that the follower has but the file has not: the next look records the cut.
                        missing = at < len(follower.rounds)
                        if missing or not self._ended[folder.name]:
                            with contextlib.suppress(TimeoutError):
                                await asyncio.wait_for(self._changed.wait(), _PERIOD if missing else 15.0)
                    if at >= len(follower.rounds):
                        await _send(response, b": wait\n\n")  # a closed connection is seen by a write only
        return response


async def _send(response: web.StreamResponse, data: bytes) -> None:
    """Write to a stream, and give up if its reader does not read."""
    await asyncio.wait_for(response.write(data), _PATIENCE)


def _stamp(file: Path) -> tuple[int, int, int]:
    try:
        found = file.stat()
    except OSError:
        return (0, 0, 0)
    return (found.st_ino, found.st_mtime_ns, found.st_size)


def _contents(folder: Path) -> tuple[Any, ...]:
    """What changes with any file that the page of a run shows."""
    from atoll import runs

    found: list[Any] = [runs.is_locked(folder), _stamp(folder.parent.parent / "status.json")]
    for place in (folder, folder / "plots"):
        with contextlib.suppress(OSError):
            found += [(name, _stamp(place / name)) for name in sorted(os.listdir(place))]
    return tuple(found)


def _json(value: Any) -> web.Response:
    from atoll.report.page_data import to_json

    return web.Response(body=to_json(value), content_type="application/json")
