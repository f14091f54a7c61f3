"""The server of the page: access, answers, files, and the stream of rows."""

import asyncio
import contextlib
import json
import socket

import aiohttp
import pytest
from network import TICK

from atoll.base.errors import UsageError
from atoll.cli.answer import answer
from atoll.report import page_data
from atoll.runs.folder import RunFolder
from atoll.ui import access, server
from atoll.ui.server import PageServer


def line(t, **more):
    return json.dumps({"round": t, "loss": 1 / (t + 1), **more}) + "\n"


def run(parent, name, rows=3, **more):
    folder = parent / name
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(line(t, **more) for t in range(rows)))
    (folder / "config.toml").write_text("rounds = 9\n")
    return folder


async def _nothing(*_):
    pass


def served(out, ask, **more):
    """Run `ask(session, base, server)` against a server."""

    async def go():
        jar = aiohttp.CookieJar(unsafe=True)
        async with PageServer(out, **more).listening() as made, aiohttp.ClientSession(cookie_jar=jar) as session:
            return await ask(session, made.url.partition("/?")[0], made)

    return asyncio.run(asyncio.wait_for(go(), 60))


async def status(session, url, **more):
    async with session.get(url, **more) as answer:
        return answer.status


async def events(session, url, last=None, most=10_000):
    """The events of a stream until its end, or until `most` rounds."""
    found, headers = [], {} if last is None else {"Last-Event-ID": str(last)}
    async with session.get(url, headers=headers) as stream:
        kind = ""
        async for raw in stream.content:
            text = raw.decode().rstrip("\n")
            if text.startswith("event: "):
                kind = text[7:]
            elif text.startswith("data: "):
                found.append((kind, json.loads(text[6:])))
                if kind == "end" or len([k for k, _ in found if k == "round"]) >= most:
                    return found
    return found


def test_a_request_needs_the_token_or_its_cookie_and_a_known_host(tmp_path):
    run(tmp_path / "runs", "2026-01-02-calm-reef")

    async def ask(session, base, made):
        assert await status(session, f"{base}/api/runs") == 403
        assert await status(session, f"{base}/?token=wrong") == 403
        async with session.get(made.url) as page:
            headers = page.headers
            assert page.status == 200 and "<script>" in await page.text()
        assert headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'sha256-")
        assert "unsafe" not in headers["Content-Security-Policy"] and headers["Referrer-Policy"] == "no-referrer"
        assert not [h for h in headers if h.lower().startswith("access-control")]
        cookie = headers["Set-Cookie"]
        assert f"atoll-{made.port}=" in cookie and "HttpOnly" in cookie and "SameSite=Strict" in cookie
        async with session.get(f"{base}/api/runs") as found:
            assert [r["run"] for r in await found.json()] == ["2026-01-02-calm-reef"]
        for host, wanted in (
            ("localhost:9", 200),
            ("[::1]", 200),
            ("127.0.0.1", 200),
            ("evil.example", 403),
            ("", 403),
        ):
            assert await status(session, f"{base}/api/runs", headers={"Host": host}) == wanted, host
        for method in (session.post, session.put, session.delete, session.head, session.options):
            async with method(f"{base}/api/runs") as refused:
                assert refused.status == 405

    served(tmp_path / "runs", ask)


def test_only_runs_of_the_folder_and_files_of_the_list_are_served(tmp_path):
    folder = run(tmp_path / "runs", "a")
    run(tmp_path / "other", "secret")
    (tmp_path / "runs" / "link").symlink_to(tmp_path / "other" / "secret")
    (folder / "metrics.csv").symlink_to(tmp_path / "other" / "secret" / "config.toml")
    (folder / "report.html").write_text("<p>report")

    async def ask(session, base, made):
        await status(session, made.url)
        for path, wanted in (
            *(("/api/runs/a", 200), ("/api/runs/link", 404), ("/api/runs/..", 404), ("/api/runs/%2e%2e", 404)),
            *(("/api/runs/..%2Fother%2Fsecret", 404), ("/files/a/config.toml", 200), ("/files/a/metrics.csv", 404)),
            *(("/files/a/..%2F..%2Fother", 404), ("/files/a/lock", 404), ("/files/link/config.toml", 404)),
            *(("/api/runs/a/rows?after=x", 400), ("/api/runs/a/clients?name=x", 404), ("/elsewhere", 404)),
        ):
            assert await status(session, base + path) == wanted, path
        async with session.get(f"{base}/files/a/report.html") as report:
            assert report.headers["Content-Security-Policy"].startswith("sandbox")
        async with session.get(f"{base}/api/runs/a/rows?after=0") as rows:
            assert [r["round"] for r in await rows.json()] == [1, 2]

    served(tmp_path / "runs", ask)
    served(tmp_path / "missing", lambda session, base, made: status(session, made.url))


def test_a_stream_has_each_row_once_over_cuts_and_a_resumed_run(tmp_path):
    """Two connections are cut off, the log is truncated and written again: the reader has the rows of the file."""
    folder = run(tmp_path / "runs", "a", rows=0)

    async def ask(session, base, made):
        await status(session, made.url)
        url, held = f"{base}/api/runs/a/live", []

        def take(found):
            for kind, data in found:
                held[:] = [r for r in held if r["round"] < data] if kind == "reset" else held
                held.extend([data] if kind == "round" else [])

        def write(text, keep=None):
            with open(folder / "metrics.jsonl", "ab") as log:
                if keep is not None:
                    log.truncate(len(keep))
                log.write(text.encode())

        first = asyncio.create_task(events(session, url, most=5))
        for t in range(8):
            write(line(t))
            await asyncio.to_thread(TICK.wait, 0.05)
        take(await first)
        take(await events(session, url, last=held[-1]["round"], most=2))
        assert [r["round"] for r in held] == list(range(7))
        write("".join(line(t, again=1) for t in range(4, 12)), keep="".join(line(t) for t in range(4)))
        last = asyncio.create_task(events(session, url, last=held[-1]["round"]))
        await asyncio.to_thread(TICK.wait, 0.3)
        lock.close()
        take(await last)
        assert held == [json.loads(each) for each in (folder / "metrics.jsonl").read_text().splitlines()]

    lock = RunFolder(folder)
    lock.lock()
    with contextlib.closing(lock):
        served(tmp_path / "runs", ask)


def test_two_readers_have_a_row_at_once_and_a_reader_ahead_of_the_log_is_reset(tmp_path):
    """The look of another request at the files must not hide a new row from an open stream."""
    folder = run(tmp_path / "runs", "a")

    async def ask(session, base, made):
        await status(session, made.url)
        url = f"{base}/api/runs/a"
        stream = asyncio.create_task(events(session, f"{url}/live", most=4))
        await asyncio.to_thread(TICK.wait, 0.3)
        with open(folder / "metrics.jsonl", "a") as log:
            log.write(line(3))
        made._look("a", made._followers["a"])
        assert [r["round"] for _, r in await asyncio.wait_for(stream, 3)] == [0, 1, 2, 3]
        ahead = await events(session, f"{url}/live", last=9, most=0)
        assert ahead == [("reset", 4)]

    lock = RunFolder(folder)
    lock.lock()
    with contextlib.closing(lock):
        served(tmp_path / "runs", ask)


def test_streams_are_limited_and_a_reader_that_never_reads_is_dropped(tmp_path, monkeypatch):
    folder = run(tmp_path / "runs", "a", rows=30, text="x" * 500_000)
    monkeypatch.setattr(server, "STREAMS", 2)
    monkeypatch.setattr(server, "_PATIENCE", 0.2)

    async def ask(session, base, made):
        await status(session, made.url)
        url = f"{base}/api/runs/a/live"
        async with session.get(url), session.get(url):
            assert await status(session, url) == 503
            for _ in range(100):
                if not made._open:
                    break
                await asyncio.to_thread(TICK.wait, 0.05)
            assert not made._open
        assert len(await events(session, url)) == 31

    lock = RunFolder(folder)
    lock.lock()
    lock.close()
    served(tmp_path / "runs", ask)


def test_a_run_is_read_again_only_after_one_of_its_files_has_changed(tmp_path, monkeypatch):
    folder, read = run(tmp_path / "home" / "runs", "a"), []
    usual = page_data.page_data
    monkeypatch.setattr(page_data, "page_data", lambda given: read.append(given) or usual(given))

    async def ask(session, base, made):
        await status(session, made.url)
        changes = (
            lambda: None,
            lambda: (folder / "labels.json").write_text('{"title": "new", "tags": []}'),
            lambda: (folder / "plots").mkdir(),
            lambda: (folder / "plots" / "a.svg").write_text("<svg/>"),
            lambda: (folder.parent.parent / "status.json").write_text('{"clients": [], "why": "waits"}'),
            lambda: (folder / "metrics.jsonl").write_text(line(0)),
        )
        for reads, change in enumerate(changes, 1):
            change()
            for _ in range(2):
                async with session.get(f"{base}/api/runs/a") as found:
                    assert await found.read() == page_data.to_json(usual(folder))
            assert len(read) == reads

    served(tmp_path / "home" / "runs", ask)


def test_addresses_beyond_this_machine_and_taken_ports_are_refused(tmp_path, capsys):
    for host in ("0.0.0.0", "::", "192.168.1.2", "example.org"):
        with pytest.raises(UsageError, match="ssh -L"):
            access.refuse_open_host(host, insecure=False)
    access.refuse_open_host("0.0.0.0", insecure=True)
    for host, own, wanted in (
        ("192.168.1.2:8000", "0.0.0.0", True),
        ("[fe80::1]:8000", "::", True),
        (f"{socket.gethostname()}:8000", "0.0.0.0", True),
        ("evil.example:8000", "0.0.0.0", False),
        ("", "0.0.0.0", False),
        ("192.168.1.2", "127.0.0.1", False),
        ("192.168.1.2", "192.168.1.2", True),
    ):
        assert access.names_host(host, own) == wanted, host
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UsageError, match="in use"):
        served(tmp_path, _nothing, port=taken.getsockname()[1])


def test_tag_and_follow_print_the_run(tmp_path, capsys):
    run(tmp_path, "2026-01-02-calm-reef")
    words = ["--out", str(tmp_path)]
    assert answer(["tag", "calm-reef", "--title", "<b>", "--add", "one", "--add", "two", "--json", *words]) == 0
    assert answer(["tag", "calm-reef", "--remove", "one", "--json", *words]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {
        "run": "2026-01-02-calm-reef", "title": "<b>", "tags": ["two"],
    }  # fmt: skip
    assert answer(["tag", "calm-reef", "--title", "\x1b[2J\u202ea", *words]) == 0
    assert not {"\x1b", "\u202e"} & set(capsys.readouterr().out)
    assert answer(["show", "calm-reef", "--follow", "--json", *words]) == 0
    assert [json.loads(text)["round"] for text in capsys.readouterr().out.splitlines()] == [0, 1, 2]


def test_a_run_of_another_folder_opens_the_page_of_its_folder(tmp_path, monkeypatch):
    path = run(tmp_path / "elsewhere", "2026-01-02-calm-reef")
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr("atoll.cli.ui.serve_page", lambda out, name, *_, **more: asked.append((out, name)) or 0)
    assert answer(["ui", str(path)]) == 0
    assert [(out.resolve(), name) for out, name in asked] == [(path.parent, path.name)]
