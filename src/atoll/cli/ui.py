"""The commands of the page: `ui`, `tag`, and the following of a run in the terminal.

Tests: tests/surface/test_ui.py
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from atoll.base.errors import RunError
from atoll.base.names import COUNTS
from atoll.runs.follow import Follower
from atoll.runs.format import format_number, label
from atoll.runs.labels import Labels
from atoll.runs.summary import judged

if TYPE_CHECKING:
    from atoll.plan.round import Report
    from atoll.runs.events import Run, TrainingView


def serve_page(out: Path, run: str, host: str, port: int, *, insecure: bool, browser: bool, as_json: bool) -> int:
    """Serve the page until Ctrl-C or SIGTERM, and print its address when the server listens.

    Raises:
        UsageError: other machines reach the address, and `insecure` is not set; or the address is in use.
    """
    from atoll.ui.access import refuse_open_host

    refuse_open_host(host, insecure)
    with _quick_import():
        from atoll.ui.server import PageServer

    async def serve() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        async with PageServer(out, host, port, run).listening() as server:
            print(json.dumps({"url": server.url}) if as_json else f"page    {server.url}", flush=True)
            if browser:
                _open(server.url)
            await stop.wait()

    asyncio.run(serve())
    return 0


@contextmanager
def _quick_import() -> Iterator[None]:
    """Import without garbage collection, and without the certificates that aiohttp reads for its client: .15 s of CPU.

    The process of the page is a server. It sends no request, so that it needs no certificate.
    """
    names, collects = {"SSL_CERT_FILE": os.devnull, "SSL_CERT_DIR": os.devnull}, gc.isenabled()
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _open(url: str) -> None:
    """Open the browser of a desktop. A machine without one prints the address only."""
    if sys.platform.startswith("linux") and not (os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")):
        return
    import webbrowser

    webbrowser.open(url)


@contextmanager
def page_process(out: str) -> Iterator[None]:
    """Run `atoll ui` as a process of its own while the block runs. An open page keeps its data afterwards.

    Raises:
        RunError: the server did not start.
    """
    command = [sys.executable, "-m", "atoll", "ui", "--out", out, "--json", "--no-open"]
    # A process group of its own: Ctrl-C ends the training after its round, and the page shows that round.
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        line = server.stdout.readline() if server.stdout is not None else ""
        if not line:
            raise RunError(
                "--ui: `atoll ui` ended before it listened.", "a free port of this machine.", write="atoll ui"
            )
        url = json.loads(line)["url"]
        print(f"page    {url}", file=sys.stderr, flush=True)
        _open(url)
        yield
    finally:
        server.terminate()
        server.wait(10)
        if server.stdout is not None:
            server.stdout.close()


def follow_run(path: Path, as_json: bool) -> int:
    """Print each row of a run when it is written, until the run ends. A cut by a resumed run is one line."""
    follower, done, cuts = Follower(path / "metrics.jsonl"), 0, 0
    pause = threading.Event()
    while True:
        ended = follower.ended()
        follower.poll()
        for cut in follower.cuts[cuts:]:
            print(json.dumps({"reset": cut}) if as_json else f"The run was resumed before round {cut}.", flush=True)
            done = min(done, follower.after(cut - 1))
        cuts = len(follower.cuts)
        while rows := follower.rows(done, 1 << 20):
            done += len(rows)
            for _, row in rows:
                print(row.decode() if as_json else _line(json.loads(row)), flush=True)
        if ended:
            return 0
        pause.wait(0.1)


def _line(row: dict[str, object]) -> str:
    names = judged([n for n, v in row.items() if n not in COUNTS and isinstance(v, float)])
    values = "   ".join(f"{label(n)} {format_number(float(str(row[n])))}" for n in names[:5])
    return f"round {row.get('round')}   {values}   clients {row.get('arrived', '–')}/{row.get('cohort', '–')}"


class LabelWriter:
    """Writes the title and the tags of a run when its folder exists; an `Observer`."""

    def __init__(self, title: str | None, tags: Sequence[str]) -> None:
        self.title, self.tags = title, tuple(tags)

    def start(self, training: TrainingView, path: Path | None) -> None:
        """Write labels.json, unless there is nothing to write."""
        if path is not None and (self.title is not None or self.tags):
            Labels.read(path).changed(self.title, self.tags).write(path)

    def round(self, report: Report) -> None:
        """Nothing."""

    def end(self, run: Run) -> None:
        """Nothing."""
