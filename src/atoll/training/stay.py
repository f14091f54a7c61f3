"""A server that stays between two runs: its clients stay connected, and the next run is handed to it.

    atoll serve --home DIR --stay           after a run the server listens, and waits for the next one
    atoll serve next.toml --home DIR        hands a run to the server that stays at DIR, and ends

The run that waits is the file `handed.toml` of the home.

Tests: tests/faults/test_stay.py
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from atoll.base.errors import UsageError
from atoll.base.files import atomic_write
from atoll.net.spec import Server
from atoll.runs.events import Run
from atoll.training.experiment import Experiment
from atoll.training.serve import NO_TLS, Terminated, serve_run, unfinished

if TYPE_CHECKING:
    from atoll.net.client import Notify
    from atoll.net.server import Listener

HANDED = "handed.toml"
STAYS = "stays"  # the file exists while a server waits for its next run
LOOK_S = 0.5
LEAVE_S = 2.0  # in which connected clients receive the end of the wait


def hand_over(it: Experiment, spec: Server) -> bool:
    """Give the next run to the server that stays at a home.

    Args:
        it: the run.
        spec: names the home, and the schema if the server has no rows.
    Returns:
        Whether a server stays there; if not, nothing is written.
    Raises:
        UsageError: the run has a wrong setting, or another one waits already.
    """
    from atoll.data.named import NAMED
    from atoll.net.store import claim_home

    home = Path(spec.home)
    if not (home / STAYS).exists():
        return False
    with suppress(UsageError):
        claim_home(home).close()
        return False  # a server that was killed has left the file
    data = Path(spec.schema or it.dataset)
    it = it.override(data=str(data.resolve())) if str(data) not in NAMED and data.exists() else it
    it.check(engine=spec)
    if (home / HANDED).exists():
        raise UsageError(f"Another run waits at {home}.", "one run at a time.", write=f"atoll status --home {home}")
    atomic_write(home / HANDED, it.toml().encode())
    return True


def serve_runs(
    it: Experiment | None,
    spec: Server,
    ended: Callable[[Run], None],
    *,
    notify: Notify = lambda facts: None,
    trust: bool = False,
    metrics: str | None = None,
    over: threading.Event | None = None,
) -> int:
    """Serve runs one after the other, until a signal ends the server or a run fails.

    Args:
        it: the first run; None: the unfinished one of the home, else the first that is handed over.
        spec: the settings of the server.
        ended: receives each run after its end, also a failed one.
        notify, trust, metrics: as for `serve_run`.
        over: ends the wait for a run if it is set.
    Returns:
        The exit code: 0 after a signal to end, 130 after Ctrl-C.
    Raises:
        UsageError: the first run is refused. A run that was handed over is reported as refused.
        RunError: a run failed.
    """
    chosen, handed = spec, False
    while True:
        if it is None and unfinished(Path(spec.home)) is None:
            with Terminated() as terminated:
                found = next_run(spec, notify, over)
            if found is None:
                return 0 if terminated.asked else 130
            (it, chosen), handed = found, True
        try:
            run, signalled = serve_run(it, chosen, ended, notify=notify, trust=trust, metrics=metrics)
        except UsageError as error:
            if not handed:
                raise
            notify({"event": "refused", "reason": f"{error.given} Required: {error.required}"})
            it, handed = None, False
            continue
        if signalled or run.status != "done":
            return 0 if signalled else 130
        it, chosen, handed = None, spec, False


def next_run(
    spec: Server, notify: Notify = lambda facts: None, over: threading.Event | None = None
) -> tuple[Experiment, Server] | None:
    """Listen, and wait for the run that is handed over. Clients enrol and stay connected meanwhile.

    Args:
        spec: the settings of the server.
        notify: receives the address.
        over: ends the wait if it is set.
    Returns:
        The run, and the settings of the server with its schema; None after a signal to end, or after Ctrl-C.
    """
    home = Path(spec.home)
    try:
        with _waiting(spec, notify) as net:
            while over is None or not over.is_set():
                if (home / HANDED).is_file():
                    it = Experiment.read(home / HANDED)
                    (home / HANDED).unlink()
                    return it, replace(spec, schema=it.dataset) if it.dataset.endswith(".json") else spec
                with suppress(queue.Empty):
                    action = net.inbox.get(timeout=LOOK_S)
                    if isinstance(action, BaseException):
                        raise action
    except KeyboardInterrupt:
        pass
    return None


@contextmanager
def _waiting(spec: Server, notify: Notify) -> Iterator[Listener]:
    """A server without a run: it enrols and welcomes clients, which wait."""
    from atoll.net import coordinator as events
    from atoll.net import wire
    from atoll.net.engine import listen, listener_of
    from atoll.net.home import ServerHome

    at = ServerHome.open(Path(spec.home))
    try:
        limits = events.Limits(spec.lease_s, window=spec.window, max_rows=spec.max_rows)
        net = listener_of(at, spec, limits)
        address = listen(net, at, spec)
        try:
            (at.path / STAYS).touch()
            notify({"event": "listening", "address": address, "home": str(at.path)})
            if spec.insecure:
                notify({"event": "insecure", "reason": NO_TLS})
            yield net
        finally:
            (at.path / STAYS).unlink(missing_ok=True)
            net.handle(events.Closing(wire.Bye("draining", "the server begins a run, or stops", 0.2, None), LEAVE_S))
            with suppress(queue.Empty):
                while not isinstance(net.inbox.get(timeout=LEAVE_S), (events.Drained, BaseException)):
                    pass
            net.stop()
    finally:
        at.close()
