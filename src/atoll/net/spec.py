"""The network as an engine value. This module loads without aiohttp and cryptography.

Tests: tests/surface/test_network_commands.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from atoll.base import grammar
from atoll.base.errors import UsageError
from atoll.base.lines import Line
from atoll.engine.protocols import Engine, EngineSpec, RunOptions

if TYPE_CHECKING:
    import torch

MODULES = ("aiohttp", "cryptography")


@dataclass(frozen=True, repr=False)
class Server(grammar.Value, EngineSpec):
    """Train the clients on the machines of their owners, which connect to this server over TLS.

    Args:
        home: the folder of the server: its authority, its database and its runs.
        listen: `host:port`; port 0 takes a free one. None: the address of the last start, else 127.0.0.1:0.
        hosts: further host names and addresses in the certificate of the server.
        clients: the number of clients of a closed run; None: the run is open.
        min_clients: the number of clients that must be present before a round of an open run opens, ≥ 1.
        absent_s: the seconds after which the work of an absent client fails; None: it is awaited without limit.
        lease_s: the seconds of a lease without a sign of life, > 0.
        work_s: the seconds after which a work fails although its client gives signs of life, > 0, if the work of an
            absent client fails, as in an open run.
        step_s: the seconds that a client has for each step of a secure sum, > 0. Then the sum leaves the client out.
        keys_s: the same for the first step, which follows the training: seconds in which the client is connected, once
            enough clients for a sum have sent their keys.
        max_rows: the most rows of a client.
        window: the bytes of large messages that may be in flight, for the whole server.
        share: whether the clients receive the final model.
        drain: the seconds in which the clients may leave at the end.
        split: the partition of a known data set, if the clients take their seats of it.
        seed: the seed of that split, and of the held-out rows of a site.
        held_out, min_rows: the fraction of held-out rows of the split and of a site, and the smallest number of train
            rows of a client.
        files: the paths of a certificate, its key and the authority of the clients, if an institution has its own.
        scaled: whether the sites scale their rows by the statistics of the input; false while these are gathered.
        keep_updates: whether the messages of all accepted contributions stay on disk, for `atoll verify`.
        insecure: whether connections have no TLS, on the loopback interface only. It is not kept for a restart.
        schema: the path of an `input.json`, if the server has no rows; None: the server's data gives the input.
    Raises:
        UsageError: a number is out of range.
    Example:
        >>> Server("federation", clients=4)
        Server('federation', clients=4)
    """

    home: str
    listen: str | None = None
    hosts: tuple[str, ...] = ()
    clients: int | None = None
    min_clients: int = 2
    absent_s: float | None = None
    lease_s: float = 60.0
    work_s: float = 86400.0
    step_s: float = 60.0
    keys_s: float = 3600.0
    max_rows: int = 1 << 24
    window: int = 256 << 20
    share: bool = True
    drain: float = 30.0
    split: str | None = None
    seed: int = 0
    held_out: float = 0.2
    min_rows: int = 2
    schema: str | None = None
    scaled: bool = True
    files: tuple[str, str, str] | None = None
    keep_updates: bool = False
    insecure: bool = False

    def __post_init__(self) -> None:
        low = {"clients": 1, "min_clients": 1, "max_rows": 1, "window": 1 << 16, "absent_s": 0, "drain": 0}
        for name, least in low.items():
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or value < least):
                raise UsageError(
                    f"net.{name} = {value!r}.",
                    f"at least {least}.",
                    write=Line(f"{name}={least}", f"--set net.{name}={least}"),
                )
        if self.insecure and self.files is not None:
            raise UsageError(
                "--insecure with --cert.",
                "one of them.",
                "a certificate has no use without TLS.",
                Line(shell="--insecure"),
            )
        for name in ("lease_s", "work_s", "step_s", "keys_s"):
            if getattr(self, name) <= 0:
                raise UsageError(
                    f"net.{name} = {getattr(self, name)}.",
                    "more than 0 seconds.",
                    write=Line(f"{name}=60", f"--set net.{name}=60"),
                )

    @property
    def needs_rows(self) -> bool:
        """False: the clients have their rows on their own machines."""
        return False

    def check(self, options: RunOptions) -> None:
        """Refuse a missing extra, a fleet, and a pace with partial work."""
        check_extra()
        if options.fleet is not None:
            raise UsageError(
                f"fleet = {options.fleet!r} with a server.",
                "no fleet.",
                "a fleet simulates durations, and real clients take the time that they take.",
                "atoll run",
            )
        if options.plan is not None and options.plan.pace.partial:
            raise UsageError(
                f"{options.plan.pace!r} with a server.",
                "a pace without partial work.",
                "a computation that is cut at a deadline in real time cannot be repeated.",
                "Sync()",
            )

    def device(self, wanted: str) -> torch.device:
        """The device of the server, which evaluates the model and makes the server's step."""
        from atoll.compute.batches import HOST

        return HOST

    def build(self, options: RunOptions) -> Engine:
        """Build the engine. It listens in `open`."""
        from atoll.net.engine import ServerEngine

        return ServerEngine(self, options)


def check_extra() -> None:
    """Refuse a missing installation of the extra.

    Raises:
        UsageError: the extra `atoll[net]` is not installed.
    """
    from importlib.util import find_spec

    missing = [name for name in MODULES if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"The package {missing[0]} is not installed.",
            "the extra atoll[net].",
            "a network uses TLS and HTTP.",
            "pip install 'atoll[net]'",
        )
