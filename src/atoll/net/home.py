"""The home of a server: its authority, its database, its key and its runs.

Tests: tests/faults/test_rehearsal.py, tests/surface/test_network_commands.py
"""

from __future__ import annotations

import contextlib
import json
import re
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from cryptography import x509

from atoll import runs
from atoll.base.errors import UsageError
from atoll.base.files import atomic_write
from atoll.base.lines import Line
from atoll.net import identity
from atoll.net.store import Database, channels_of, claim_home
from atoll.net.wire import MAX_LEAVES

DAY = 86400
MOST_ADDRESSES = 8  # of a token


class ServerHome:
    """The home of a server.

    Args:
        path: the folder.
        authority: the certificate authority.
        database: the database.
        lock: the lock of a running server; None: this process only reads, invites or revokes.
    """

    def __init__(
        self, path: Path, authority: identity.Authority, database: Database, lock: IO[bytes] | None = None
    ) -> None:
        self.path, self.authority, self.database, self._lock = path, authority, database, lock

    @classmethod
    def open(cls, path: Path, *, serve: bool = True) -> ServerHome:
        """Open a home. A new folder gets an authority and a database.

        Args:
            path: the folder.
            serve: whether this process serves; at most one process does.
        Raises:
            UsageError: another process serves from this home, or its files are not complete.
        """
        path = path.resolve()
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = claim_home(path) if serve else None
        try:
            if not (path / "federation.db").exists():
                _create(path)
            key = identity.read_key(path / "ca.key")
            certificate = x509.load_pem_x509_certificate((path / "ca.pem").read_bytes())
            database = Database(path)
        except BaseException:
            if lock is not None:
                lock.close()
            raise
        return cls(path, identity.Authority(database.federation, certificate, key), database, lock)

    @property
    def is_relay(self) -> bool:
        """Whether this is the home of a relay, whose clients get their numbers from its root."""
        return self.database.get("relay") is not None

    def verify(self) -> list[str]:
        """Check the audit chain and the committed rounds, and the final model of each run. One sentence a fault."""
        return self.database.verify()

    def status(self) -> dict[str, Any]:
        """The state of the server, from the database and status.json; also while the server is down."""
        live: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            live = json.loads((self.path / "status.json").read_bytes())
        run, end = self.database.get("run"), ""
        if run is None and (ended := runs.list_runs(self.path / "runs")):
            run, end = ended[-1].name, runs.last_end(ended[-1])
        rounds = 0 if run is None else len(self.database.metrics(run))
        stages = {c["client"]: c for c in live.get("clients", [])}
        records = self.database.clients()
        places = channels_of(records)
        clients = [
            {
                "client": c.id,
                "name": c.name,
                "state": c.state,
                "rows": c.rows,
                "stage": stages.get(places[c.id], {}).get("stage", "away"),
                "seen": stages.get(places[c.id], {}).get("seen"),
            }
            for c in records
        ]
        return {
            "federation": self.database.federation,
            "address": self.database.get("address"),
            "running": self._is_served(),
            "run": run,
            "rounds": rounds,
            "end": end,
            "why": live.get("why", ""),
            "step": live.get("step", ""),
            "awaited": live.get("awaited", []),
            "time": live.get("time"),
            "clients": clients,
        }

    def _is_served(self) -> bool:
        """Whether a server has locked this home."""
        try:
            claim_home(self.path).close()
        except UsageError:
            return True
        return False

    def close(self) -> None:
        """Close the database and release the lock. A second call does nothing."""
        self.database.close()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def listen_address(self, wanted: str | None) -> tuple[str, int]:
        """The host and the port to listen on: those that were given, else those of the last start.

        Raises:
            UsageError: the address has no port.
        """
        text = wanted or self.database.get("address") or "127.0.0.1:0"
        host, colon, port = text.rpartition(":")
        if not colon or not port.isdigit() or not host:
            raise UsageError(f"--listen {text}.", "HOST:PORT.", write=Line(shell="--listen 0.0.0.0:4433"))
        if wanted is not None and int(port) == 0 and (last := self.database.get("address")):
            last_host, _, last_port = last.rpartition(":")
            if last_host.strip("[]") == host.strip("[]"):
                port = last_port  # a restart keeps its address, which tokens contain
        return host.strip("[]"), int(port)

    def addresses(self) -> tuple[str, ...]:
        """The addresses at which sites may reach the server: where it listened, and its further names.

        A server that listens on all addresses is dialled by its names. A token has place for a few of them.
        """
        listened = self.database.get("address")
        if listened is None:
            return ()
        host, _, port = listened.rpartition(":")
        names = json.loads(self.database.get("hosts") or "[]")
        named = [f"[{name}]:{port}" if ":" in name else f"{name}:{port}" for name in names]
        every = named if named and host in ("0.0.0.0", "[::]") else [listened, *named]
        return tuple(dict.fromkeys(every))[:MOST_ADDRESSES]

    def _token(self, addresses: tuple[str, ...], name: str, expires: int) -> identity.Token:
        """A token with as many of these addresses as it has place for."""
        fixed = self.authority.fingerprint, self.database.federation, name, expires
        token = identity.new_token(addresses, *fixed)
        while len(addresses) > 1 and not token.is_short:
            addresses = addresses[:-1]
            token = identity.new_token(addresses, *fixed)
        return token

    def invite(
        self, name: str, address: str | None, san: str | None, days: float, relay: int | None = None
    ) -> identity.Token:
        """Make a token for a client.

        Args:
            name: the name of the client.
            address: the address that sites dial; None: the one that the server listens on, and the names in its
                certificate.
            san: the alternative name of its certificate under an existing authority; None: atoll's own.
            days: the days until the token expires.
            relay: the most clients of a relay, if the token is for one.
        Raises:
            UsageError: a name or the address is not valid, or the run has no further place.
        """
        known = self.addresses() if address is None else (address,)
        if not known:
            raise UsageError(
                f"The server of {self.path} has never listened.",
                "the address that sites dial.",
                "a token contains it.",
                f"atoll invite {name} --home {self.path} --address server.example.org:4433",
            )
        if self.database.get("insecure"):
            known = (identity.plain_address(known[0]),)
        clients = self.database.get("clients")
        expires = int(time.time() + days * DAY)
        token = self._token(known, name, expires)
        limit = None if clients is None else int(clients)
        if relay is not None and self.is_relay:
            raise UsageError(
                f"{self.path} is the home of a relay.", "the home of a server.", "no relay is below a relay."
            )
        if relay is not None and not 1 <= relay <= MAX_LEAVES:
            raise UsageError(
                f"--relay {relay} for {name!r}.",
                f"its number of clients, 1 to {MAX_LEAVES}.",
                "a relay names its clients itself, and a closed run has places for some only.",
                f"atoll invite {name} --relay 4 --home {self.path}",
            )
        if self.is_relay and len(self.database.clients()) >= MAX_LEAVES:
            raise UsageError(f"The relay {self.path} has {MAX_LEAVES} clients.", "a further relay.")
        numbered_later = relay is not None or self.is_relay
        secret = identity.secret_hash(token.secret)
        self.database.invite(name, secret, expires, san, limit, numbered_later, relay)
        return token


def _create(path: Path) -> None:
    """Make the authority and the database of a new federation, named after the folder."""
    name = re.sub(r"[^a-z0-9-]+", "-", path.name.lower()).strip("-")[:40] or "federation"
    if not (path / "ca.key").exists() or not (path / "ca.pem").exists():
        made = identity.Authority.new(name, datetime.now(UTC))
        identity.write_key(path / "ca.key", made.key)
        atomic_write(path / "ca.pem", identity.certificate_pem(made.certificate))
    certificate = x509.load_pem_x509_certificate((path / "ca.pem").read_bytes())
    Database.create(path, name, identity.certificate_hash(certificate))
