"""`federation.db`: clients, invitations, committed rounds, accepted work and the audit chain of a federation.

    meta          the federation, the epoch, the open run, the last address, the number of the last identity change
    invitations   the hash of a secret, the name, the expiry, and the request that used it
    clients       number, name, alternative name, serials, state, rows, hash of the `Input`
    rounds        one row for a committed round: pointer to the state, the state itself if it is small, metrics
    accepted      the works of each committed round, with the digests of their messages and their weights
    events        events of identities and rounds, each with the next link of the chain

    link(n) = SHA-256("atoll/audit/v1" ‖ link(n − 1) ‖ event(n))
    link(0) = SHA-256("atoll/audit/v1" ‖ federation ‖ authority)

The database is in WAL mode with `synchronous=FULL`, so a commit is one fsync. A round is one transaction. A state of
more than `SMALL_STATE` bytes is a blob: a file that is written, synced and renamed before the transaction. The states
of two rounds are kept. A state is read only if its SHA-256 and its HMAC match. The HMAC has a key in a file of its own.

After any error of the disk the store is closed for good and each call raises `StorageError`: SQLite reports success for
a commit that follows a failed sync, and the content of the disk is unknown. The process has to end. The next start
continues from the last committed round.

One process can use a store in several threads. `stale` and `directory` belong to one thread, which no commit blocks.

Tests: tests/faults/test_store.py
"""

from __future__ import annotations

import contextlib
import fcntl
import hmac
import json
import os
import secrets
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from atoll.base.errors import RunError, UsageError
from atoll.base.files import atomic_write
from atoll.base.lines import Line
from atoll.net.failpoints import failpoint
from atoll.net.identity import Peer, check_name, san_of
from atoll.net.wire import RELAYS, Blob, DenialCode, chain_link

SMALL_STATE = 1 << 20
GENERATIONS = 2
RECENT = 128  # the works of a client that `recent` returns: at most 64 of them are not settled
BUSY_S = 30.0

_TAG = b"atoll/audit/v1"
_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value ANY) STRICT;
CREATE TABLE invitations (
    hash BLOB PRIMARY KEY, name TEXT NOT NULL, expires INTEGER NOT NULL, state TEXT NOT NULL, request BLOB) STRICT;
CREATE TABLE clients (
    id INTEGER PRIMARY KEY, name TEXT UNIQUE NOT NULL, san TEXT UNIQUE NOT NULL, pinned INTEGER NOT NULL,
    state TEXT NOT NULL, serial TEXT, former TEXT, certificate BLOB, expires INTEGER,
    identity BLOB, rows INTEGER, held INTEGER, input BLOB, memory_from INTEGER NOT NULL DEFAULT 0) STRICT;
CREATE TABLE rounds (
    run TEXT NOT NULL, round INTEGER NOT NULL, model BLOB NOT NULL, pointer BLOB NOT NULL, state BLOB,
    blobs BLOB NOT NULL, mac BLOB NOT NULL, metrics TEXT NOT NULL,
    attempt INTEGER NOT NULL, PRIMARY KEY (run, round)) STRICT, WITHOUT ROWID;
CREATE TABLE accepted (
    seq INTEGER PRIMARY KEY, run TEXT NOT NULL, round INTEGER NOT NULL, client INTEGER NOT NULL,
    version INTEGER NOT NULL, repeat INTEGER NOT NULL, work BLOB UNIQUE NOT NULL, after BLOB, digest BLOB NOT NULL,
    weight INTEGER NOT NULL) STRICT;
CREATE INDEX accepted_client ON accepted (run, client, seq);
CREATE INDEX accepted_round ON accepted (run, round);
CREATE TABLE events (seq INTEGER PRIMARY KEY, run TEXT, round INTEGER, event TEXT NOT NULL, link BLOB NOT NULL) STRICT;
"""
_INSERT_ACCEPTED = (
    "INSERT INTO accepted (run, round, client, version, repeat, work, after, digest, weight) "
    "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
)
_ACCEPTED = (
    "SELECT client, version, repeat, work, after, digest, weight FROM accepted WHERE run = ? AND round = ? ORDER BY seq"
)
_RECENT = (
    "SELECT client, work, after, digest FROM ("
    " SELECT a.client, a.work, a.after, a.digest, a.seq,"
    " row_number() OVER (PARTITION BY a.client ORDER BY a.seq DESC) AS n"
    " FROM accepted a JOIN clients c ON c.id = a.client WHERE a.run = ? AND a.seq > c.memory_from"
    ") WHERE n <= ? ORDER BY seq"
)
_STATE = (
    "SELECT round, model, pointer, state, blobs, mac FROM rounds WHERE run = ? ORDER BY round DESC LIMIT 1 OFFSET ?"
)
_ENROL = (
    "UPDATE clients SET state = 'enrolled', serial = ?, former = NULL, certificate = ?, expires = ?, memory_from = ?, "
    "identity = ? WHERE id = ?"
)

ClientState = Literal["invited", "enrolled", "revoked"]


class StorageError(RunError):
    """The disk failed. The process has to end; the last committed round is kept."""


class Enrolment(NamedTuple):
    """The result of an enrolment: the number of the client and its certificate as DER."""

    client: int
    certificate: bytes


class DeniedError(UsageError):
    """An enrolment or a renewal is refused; `code` is the code for the client."""

    def __init__(self, code: DenialCode, given: str, required: str, write: str = "") -> None:
        super().__init__(given, required, write=write)
        self.code = code


@dataclass(frozen=True)
class ClientRecord:
    """One client of the federation.

    Args:
        id: its number, in the order of invitation from 0.
        name: its name.
        san: the alternative name of its certificates, as in `Peer.sans`.
        pinned: whether only the recorded serials are admitted; false for certificates of an existing authority.
        state: "invited", "enrolled" or "revoked".
        serials: the serial of its certificate, and the one before it if that is still admitted.
        expires: the end of its certificate, in Unix seconds; None before its enrolment.
        identity: its public identity key, 32 bytes; None before its enrolment, or without one.
        rows, held: the numbers of its rows; None before they are known.
        input: the hash of its `Input`; None before it is known.
    """

    id: int
    name: str
    san: str
    pinned: bool
    state: ClientState
    serials: tuple[str, ...]
    expires: int | None
    identity: bytes | None
    rows: int | None
    held: int | None
    input: bytes | None


@dataclass(frozen=True)
class Directory:
    """The clients at one moment, for the check of each frame.

    Args:
        clients: the clients by number.
    """

    clients: tuple[ClientRecord, ...]
    _by_san: Mapping[str, ClientRecord] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_san", {client.san: client for client in self.clients})

    def admit(self, peer: Peer) -> ClientRecord | None:
        """The client with this verified certificate; None if no client of the federation has it, or it is revoked."""
        for san in peer.sans:
            client = self._by_san.get(san)
            if client is not None and client.state != "revoked":
                known = peer.serial in client.serials if client.pinned else True
                return client if known else None
        return None


def channels_of(clients: Iterable[ClientRecord]) -> dict[int, int]:
    """The client with the channel of each client: its relay, if it is called RELAY/NAME, or itself, by numbers."""
    numbers = {client.name: client.id for client in clients}
    return {number: numbers.get(name.partition("/")[0], number) for name, number in numbers.items()}


class Accepted(NamedTuple):
    """A contribution of a committed round: its work, its `after`, and the digest and the weight of its message."""

    client: int
    version: int
    repeat: int
    work: bytes
    after: bytes | None
    digest: bytes
    weight: int


@dataclass(frozen=True)
class RoundCommit:
    """Everything that one round changes, committed in one transaction.

    Args:
        run: the name of the run.
        round: the round.
        model: the SHA-256 of the model after the round.
        pointer: bytes from which the run folder finds the state, at most 1 MiB.
        state: the state itself, at most `SMALL_STATE` bytes; None if it is in blobs.
        blobs: the blobs that the pointer needs, from `Database.put_blob`.
        accepted: the contributions of the round, in the order of their chains.
        metrics: the row of `metrics.jsonl`, or its text as JSON.
        events: the rows of `events.jsonl` of this round, or their texts as JSON.
        attempt: the number of the last attempt of its secure sum; 0 without one.
    """

    run: str
    round: int
    model: bytes
    pointer: bytes
    state: bytes | None
    blobs: tuple[Blob, ...]
    accepted: tuple[Accepted, ...]
    metrics: Mapping[str, Any] | str
    events: tuple[Mapping[str, Any] | str, ...] = ()
    attempt: int = 0


class CommittedRound(NamedTuple):
    """A committed round whose state is complete on disk."""

    round: int
    model: bytes
    pointer: bytes
    state: bytes | None
    blobs: tuple[Blob, ...]


class Database:
    """The database of a federation, in the home of its server.

    Args:
        home: the folder; `Database.create` has made the database.
    Raises:
        UsageError: the home has no database of a federation.
        StorageError: the disk failed.
    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as home:
        ...     with Database.create(Path(home), "hospitals", bytes(32)) as store:
        ...         store.begin_epoch(1_800_000_000), store.begin_epoch(0)
        (1800000000, 1800000001)
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self.path = home / "federation.db"
        self._lock = threading.RLock()
        self._failure: StorageError | None = None
        if not self.path.exists():
            raise UsageError(
                f"The folder {home} has no federation.db.",
                "the home of a server.",
                write=f"atoll serve --home {home} --data digits --listen 0.0.0.0:4433",
            )
        with self._guarded():
            self._key = (home / "store.key").read_bytes()
            self._db, self._watch = self._connect(), self._connect()
            _sync_folder(home)
            self.federation = str(self._meta("federation"))
            self._seen = (-1, -1)
        self._has_blobs = True  # until a look finds none

    @classmethod
    def create(cls, home: Path, federation: str, authority: bytes) -> Database:
        """Make the database of a new federation.

        Args:
            home: the folder, which exists.
            federation: the name of the federation.
            authority: the SHA-256 of its authority, which begins the audit chain.
        Raises:
            UsageError: the home has a database, or the name is not valid.
            StorageError: the disk failed.
        """
        check_name(federation, "federation")
        path = home / "federation.db"
        if path.exists():
            raise UsageError(
                f"The folder {home} has a federation.db.", "a new home.", write=f"atoll serve --home {home}"
            )
        new = home / "federation.new"
        try:
            _unlink(new, home / "federation.new-wal", home / "federation.new-shm")
            atomic_write(home / "store.key", secrets.token_bytes(32), 0o600)
            os.close(os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            with contextlib.closing(sqlite3.connect(new, isolation_level=None)) as db:
                db.execute("PRAGMA synchronous=FULL")
                first = sha256(_TAG + federation.encode() + authority).digest()
                values = {"schema": 1, "federation": federation, "authority": authority, "epoch": 0, "identities": 0,
                          "link": first, "events": 0}  # fmt: skip
                db.executescript(f"BEGIN;{_SCHEMA}COMMIT;")
                db.executemany("INSERT INTO meta VALUES (?, ?)", values.items())
            (home / "blobs").mkdir(mode=0o700, exist_ok=True)
            os.replace(new, path)
            _sync_folder(home)
        except (OSError, sqlite3.Error) as error:
            raise _storage_error(path, error) from error
        return cls(home)

    def __enter__(self) -> Database:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the database. A second call does nothing."""
        with self._lock:
            self._db.close()
            self._watch.close()

    # Connections and transactions

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.path, timeout=BUSY_S, isolation_level=None, check_same_thread=False)
        for pragma in ("trusted_schema=OFF", "foreign_keys=ON", "cell_size_check=ON", "synchronous=FULL"):
            db.execute(f"PRAGMA {pragma}")
        mode = db.execute("PRAGMA journal_mode=WAL").fetchone()[0]
        if mode != "wal":
            raise UsageError(
                f"The file system of {self.path} gives SQLite the journal mode {mode}.",
                "WAL.",
                "a network file system cannot share the memory of the log.",
            )
        return db

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        """Close the store for good at the first error of the disk."""
        if self._failure is not None:
            raise self._failure
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            if isinstance(error, sqlite3.IntegrityError) or _locked(error):
                raise
            self._failure = _storage_error(self.path, error)
            raise self._failure from error

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._guarded():
            try:
                self._db.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as error:
                if not _locked(error):
                    raise
                busy = f"Another process has written to {self.path} for {BUSY_S:g} s."
                raise RunError(busy, "a database that no other program keeps open for writing.") from error
            try:
                yield self._db
                failpoint("commit.before")
                self._db.execute("COMMIT")
                failpoint("commit.after")
            except BaseException:
                # After an error of the disk SQLite has rolled back by itself.
                with contextlib.suppress(sqlite3.Error):
                    self._db.execute("ROLLBACK")
                raise

    def _rows(self, sql: str, *values: Any) -> list[Any]:
        with self._lock, self._guarded():
            return self._db.execute(sql, values).fetchall()

    def _meta(self, key: str) -> Any:
        found = self._rows("SELECT value FROM meta WHERE key = ?", key)
        return found[0][0] if found else None

    # Facts of the server

    def get(self, key: str) -> str | None:
        """A text that `put` stored; None if there is none."""
        found = self._meta(f"user.{key}")
        return None if found is None else str(found)

    def put(self, key: str, value: str | None) -> None:
        """Database a text, such as the run or the address of the last start; None removes it."""
        with self._transaction() as db:
            db.execute("DELETE FROM meta WHERE key = ?", (f"user.{key}",))
            if value is not None:
                db.execute("INSERT INTO meta VALUES (?, ?)", (f"user.{key}", value))

    def begin_epoch(self, unix: int) -> int:
        """Begin a start of the server: epoch = max(epoch + 1, Unix seconds).

        Args:
            unix: the time, in Unix seconds.
        Returns:
            The epoch. Leases and `Welcome` contain it; a client refuses a lower one.
        """
        with self._transaction() as db:
            epoch = max(int(self._meta("epoch")) + 1, unix)
            db.execute("UPDATE meta SET value = ? WHERE key = 'epoch'", (epoch,))
            _append(db, {"event": "start", "epoch": epoch})
        with self._guarded():
            _sync_folder(self.home)  # the first write of a start can make the log
        return epoch

    # Identities

    def invite(
        self,
        name: str,
        secret: bytes,
        expires: int,
        san: str | None = None,
        limit: int | None = None,
        relay: bool = False,
        leaves: int | None = None,
    ) -> int:
        """Record an invitation. An earlier unused invitation of the same name ends.

        Args:
            name: the name of the client.
            secret: `secret_hash` of the token's secret.
            expires: the expiry of the token, in Unix seconds.
            san: the alternative name under an existing authority, such as `DNS:site.example`.
            limit: the number of clients of a closed run; None: no limit.
            relay: whether it is a relay, which is no client of a run, or a client of a relay without a number.
            leaves: the most clients of a relay; None: it is no relay.
        Returns:
            The number of the client.
        Raises:
            UsageError: a name is not valid or belongs to another client, or the run has no further place.
        """
        check_name(name, "client")
        with self._transaction() as db:
            found = db.execute("SELECT id, san FROM clients WHERE name = ?", (name,)).fetchone()
            if found is None:
                client = self._next_number(db, name, limit, relay)
                self._insert_client(db, client, name, san)
            else:
                client = int(found[0])
                if relay != (client >= RELAYS) and not self._meta("user.relay"):
                    again = Line(shell=f"atoll invite {name}{'' if relay else ' --relay 4'}")
                    given = f"{name!r} was invited {'without' if relay else 'with'} --relay."
                    raise UsageError(given, "another name, or the same kind.", write=again)
                if san is not None and san != found[1]:
                    self._check_san(db, name, san)
                    db.execute("UPDATE clients SET san = ?, pinned = 0 WHERE id = ?", (san, client))
            db.execute("UPDATE invitations SET state = 'replaced' WHERE name = ? AND state = 'open'", (name,))
            db.execute("INSERT INTO invitations VALUES (?, ?, ?, 'open', NULL)", (secret, name, expires))
            if leaves is not None:
                db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (f"user.leaves {name}", str(leaves)))
            self._identity_changed(db, {"event": "invited", "client": client, "name": name, "expires": expires})
        return client

    def _next_number(self, db: sqlite3.Connection, name: str, limit: int | None, relay: bool) -> int:
        """The number of a further client, or of a further relay."""
        if relay:
            return int(db.execute("SELECT max(?, max(id) + 1) FROM clients", (RELAYS,)).fetchone()[0] or RELAYS)
        (count,) = db.execute("SELECT count(*) FROM clients WHERE id < ?", (RELAYS,)).fetchone()
        if limit is not None and count >= limit:
            raise UsageError(f"{name!r} is invited as client {count + 1}.", f"at most {limit} clients.",
                             "the run is closed, and its number of clients is fixed.")  # fmt: skip
        return int(count)

    def leaves(self, relay: str) -> int:
        """The most clients of a relay, of its last invitation."""
        return int(self.get(f"leaves {relay}") or 0)

    def number_leaves(self, relay: str, names: Sequence[str], limit: int | None) -> tuple[int, ...]:
        """The numbers of the clients of a relay in the run. A client that is new gets the next one, or `RELAYS`.

        Args:
            relay: the name of the relay. In the database of the root its clients are called RELAY/NAME.
            names: the names of the clients.
            limit: the number of clients of a closed run; None: no limit. Further clients have no number, nor have those
                beyond `leaves`.
        """
        out, most = [], self.leaves(relay)
        with self._transaction() as db:
            numbered = [row[0] for row in db.execute("SELECT name FROM clients") if row[0].startswith(f"{relay}/")]
            for name in (f"{relay}/{one}" for one in names):
                found = db.execute("SELECT id FROM clients WHERE name = ?", (name,)).fetchone()
                if found is None and len(numbered) >= most:
                    out.append(RELAYS)
                    continue
                try:
                    number = self._next_number(db, name, limit, relay=False) if found is None else int(found[0])
                except UsageError:
                    number = RELAYS
                out.append(number)
                if found is None and number < RELAYS:
                    numbered.append(name)
                    values = (number, name, f"relay:{name}", True)
                    insert = "INSERT INTO clients (id, name, san, pinned, state) VALUES (?, ?, ?, ?, 'enrolled')"
                    db.execute(insert, values)
                    self._identity_changed(db, {"event": "numbered", "client": number, "name": name})
        return tuple(out)

    def renumber(self, numbers: Mapping[str, int]) -> None:
        """Give the clients of a relay the numbers that they have at its root.

        Args:
            numbers: the number by name.
        Raises:
            RunError: a client has another number, or another client has the number: works belong to numbers.
        """
        with self._transaction() as db:
            for name, number in numbers.items():
                found = db.execute("SELECT id FROM clients WHERE name = ?", (name,)).fetchone()
                if found is not None and found[0] != number:
                    other = db.execute("SELECT name FROM clients WHERE id = ?", (number,)).fetchone()
                    if found[0] < RELAYS or other is not None:
                        has = f"it is client {found[0]}" if other is None else f"{other[0]!r} has this number"
                        given = f"The root calls {name!r} client {number}, and {has}."
                        raise RunError(given, "the numbers that the root gave before.", "works belong to numbers.")
                    db.execute("UPDATE clients SET id = ? WHERE name = ?", (number, name))
                    self._identity_changed(db, {"event": "numbered", "client": number, "name": name})

    def _insert_client(self, db: sqlite3.Connection, number: int, name: str, san: str | None) -> None:
        if san is not None:
            self._check_san(db, name, san)
        values = (number, name, san or san_of(self.federation, name), san is None)
        db.execute("INSERT INTO clients (id, name, san, pinned, state) VALUES (?, ?, ?, ?, 'invited')", values)

    def _check_san(self, db: sqlite3.Connection, name: str, san: str) -> None:
        other = db.execute("SELECT name FROM clients WHERE san = ? AND name != ?", (san, name)).fetchone()
        if other is not None:
            raise UsageError(
                f"The alternative name {san} belongs to client {other[0]!r}.", "a name of its own for each client."
            )
        kind, colon, value = san.partition(":")
        printable = san.isprintable() and len(san) <= 300
        if kind not in ("URI", "DNS", "IP", "EMAIL") or not colon or not value or not printable:
            required = "URI:…, DNS:…, IP:… or EMAIL:…, at most 300 characters."
            raise UsageError(f"The alternative name is {san[:300]!r}.", required, "the kind is part of the name.")

    def enrol(
        self,
        name: str,
        secret: bytes,
        request: bytes,
        now: int,
        issue: Callable[[], tuple[bytes, Peer]],
        identity: bytes | None = None,
    ) -> Enrolment:
        """Exchange a token for a certificate.

        Args:
            name: the name in the token.
            secret: `secret_hash` of the secret.
            request: the certificate request. The same request with the same token gets the same certificate again.
            now: the time, in Unix seconds.
            issue: returns the certificate as DER and its facts; it is called if the token is valid.
            identity: the public identity key of the client, 32 bytes.
        Raises:
            DeniedError: the token is unknown, used, expired or replaced, or another client has the identity key.
            UsageError: the request is not valid; the token stays unused.
        """
        mine = sha256(request).digest()
        with self._transaction() as db:
            state, used_by = self._invitation(db, name, secret, now)
            client, certificate, san = db.execute(
                "SELECT id, certificate, san FROM clients WHERE name = ?", (name,)
            ).fetchone()
            if state == "used":
                if used_by != mine or certificate is None:
                    raise DeniedError(
                        "used", f"The token of {name!r} has been used.", "a new token.", f"atoll invite {name}"
                    )
                return Enrolment(client, certificate)
            if db.execute("SELECT 1 FROM clients WHERE identity = ? AND id != ?", (identity, client)).fetchone():
                raise DeniedError(
                    "request",
                    f"The identity key of {name!r} is that of another client.",
                    "a key of its own, which `atoll join` makes in a new folder.",
                )
            der, peer = issue()
            db.execute("UPDATE invitations SET state = 'used', request = ? WHERE hash = ?", (mine, secret))
            # A token means a new machine: the former certificate ends, and the memory of the former machine is lost.
            last = db.execute("SELECT coalesce(max(seq), 0) FROM accepted").fetchone()[0]
            db.execute(_ENROL, (peer.serial, der, peer.expires, last, identity, client))
            event = {"event": "enrolled", "client": client, "name": name, "serial": peer.serial, "san": san}
            event |= {} if identity is None else {"identity": identity.hex()}
            self._identity_changed(db, event)
        return Enrolment(client, der)

    def _invitation(self, db: sqlite3.Connection, name: str, secret: bytes, now: int) -> tuple[str, bytes | None]:
        """The state of the invitation with this secret, and the request that used it."""
        found = None
        for row in db.execute("SELECT hash, expires, state, request FROM invitations WHERE name = ?", (name,)):
            if hmac.compare_digest(row[0], secret):
                found = row
        again = f"atoll invite {name}"
        if found is None:
            raise DeniedError(
                "unknown", f"No invitation of {name!r} has this secret.", "a token of this federation.", again
            )
        if found[2] == "replaced":
            raise DeniedError("replaced", f"A later token for {name!r} exists.", "the last token.", again)
        if found[2] == "open" and now >= found[1]:
            raise DeniedError("expired", f"The token of {name!r} has expired.", "a token that is valid now.", again)
        return str(found[2]), found[3]

    def renew(self, client: int, serial: str, issue: Callable[[str], tuple[bytes, Peer]]) -> Enrolment:
        """Replace the certificate of a client that has proved its present one.

        Args:
            client: the number of the client.
            serial: the serial of the certificate of the channel. It stays valid until the new one is used.
            issue: returns the new certificate as DER and its facts, for the name of the client.
        Raises:
            DeniedError: the client is revoked or unknown, or its certificate is of another authority.
        """
        with self._transaction() as db:
            found = db.execute("SELECT name, state, pinned FROM clients WHERE id = ?", (client,)).fetchone()
            if found is None or found[1] != "enrolled" or not found[2]:
                raise DeniedError(
                    "revoked", f"Client {client} has no certificate of this federation.", "an enrolled client."
                )
            der, peer = issue(found[0])
            values = (peer.serial, serial, der, peer.expires, client)
            db.execute("UPDATE clients SET serial = ?, former = ?, certificate = ?, expires = ? WHERE id = ?", values)
            self._identity_changed(db, {"event": "renewed", "client": client, "serial": peer.serial})
        return Enrolment(client, der)

    def used(self, client: int, serial: str) -> None:
        """Record that a client has opened a channel: an earlier serial than this one ends."""
        with self._transaction() as db:
            found = db.execute("SELECT state, serial, former, pinned FROM clients WHERE id = ?", (client,)).fetchone()
            if found is None or (found[0] != "invited" and (found[1] != serial or found[2] is None)):
                return
            db.execute("UPDATE clients SET former = NULL WHERE id = ?", (client,))
            if not found[3] and found[0] == "invited":
                db.execute("UPDATE clients SET state = 'enrolled', serial = ? WHERE id = ?", (serial, client))
            self._identity_changed(db, {"event": "certificate", "client": client, "serial": serial})

    def revoke(self, name: str) -> int:
        """Revoke a client: its certificates and its open invitations end. Returns its number.

        Raises:
            UsageError: no client has this name.
        """
        with self._transaction() as db:
            found = db.execute("SELECT id FROM clients WHERE name = ?", (name,)).fetchone()
            if found is not None and "/" in name:
                relay, _, leaf = name.partition("/")
                raise UsageError(
                    f"{name!r} is a client of the relay {relay!r}.",
                    "its name at the relay.",
                    "the relay has issued its certificate.",
                    Line(shell=f"atoll revoke {leaf} --home {relay}"),
                )
            if found is None:
                names = [row[0] for row in db.execute("SELECT name FROM clients ORDER BY id LIMIT 20")]
                raise UsageError(
                    f"No client is called {name!r}.", f"one of {', '.join(names)}." if names else "a client."
                )
            client = int(found[0])
            db.execute("UPDATE clients SET state = 'revoked', former = NULL WHERE id = ?", (client,))
            db.execute("UPDATE invitations SET state = 'replaced' WHERE name = ? AND state = 'open'", (name,))
            self._identity_changed(db, {"event": "revoked", "client": client, "name": name})
        return client

    def _identity_changed(self, db: sqlite3.Connection, event: Mapping[str, Any]) -> None:
        db.execute("UPDATE meta SET value = value + 1 WHERE key = 'identities'")
        _append(db, event)

    def record_rows(self, client: int, rows: int, held: int, input: bytes) -> None:
        """Record the rows of a client and the hash of its `Input`."""
        with self._transaction() as db:
            values = (rows, held, input)
            if db.execute("SELECT rows, held, input FROM clients WHERE id = ?", (client,)).fetchone() == values:
                return
            db.execute("UPDATE clients SET rows = ?, held = ?, input = ? WHERE id = ?", (*values, client))
            self._identity_changed(db, {"event": "rows", "client": client, "rows": rows, "held": held})

    def clients(self) -> tuple[ClientRecord, ...]:
        """All clients, in the order of their numbers."""
        return tuple(map(_client, self._rows(_CLIENTS)))

    def stale(self) -> bool:
        """Whether an identity changed since `directory` was called. It takes a few microseconds without a change."""
        if self._failure is not None:
            raise self._failure
        version = self._data_version()
        if version == self._seen[0]:
            return False
        identities = self._watched("SELECT value FROM meta WHERE key = 'identities'")[0][0]
        changed = bool(identities != self._seen[1])
        # After a commit that changed no identity the next call is fast again.
        self._seen = (version if not changed else self._seen[0], self._seen[1])
        return changed

    def directory(self) -> Directory:
        """The clients now; `stale` compares with this moment."""
        version = self._data_version()
        identities = self._watched("SELECT value FROM meta WHERE key = 'identities'")[0][0]
        clients = tuple(map(_client, self._watched(_CLIENTS)))
        self._seen = (version, identities)
        return Directory(clients)

    def _data_version(self) -> int:
        return int(self._watched("PRAGMA data_version")[0][0])

    def _watched(self, sql: str) -> list[Any]:
        with self._guarded():
            return self._watch.execute(sql).fetchall()

    # Rounds

    def put_blob(self, parts: Iterable[bytes | memoryview]) -> Blob:
        """Write bytes to a file whose name is their SHA-256 hash.

        The bytes are first written to a temporary file and flushed to disk. Then the file is renamed. So a file with a
        hash as its name is always complete. The next commit removes the file if neither of
        the last two rounds uses it.

        Args:
            parts: the bytes, in order; they are not copied.
        Returns:
            The hash and the length.
        """
        self._has_blobs = True
        with self._guarded():
            new, hashed, length = self.home / "blobs" / f"new-{secrets.token_hex(8)}", sha256(), 0
            with open(os.open(new, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb", buffering=0) as file:
                for part in parts:
                    hashed.update(part)
                    length += _write(file, part)
                failpoint("blob.written")
                os.fsync(file.fileno())
            failpoint("blob.synced")
            os.replace(new, self._blob_path(hashed.digest()))
            failpoint("blob.renamed")
            _sync_folder(new.parent)
        return Blob(hashed.digest(), length)

    def read_blob(self, blob: Blob) -> bytes:
        """The bytes of a blob.

        Raises:
            RunError: the file is missing or damaged.
        """
        path = self._blob_path(blob.hash)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise RunError(
                f"The file {path} is missing.", "the state of the run.", "a run never begins again by itself."
            ) from None
        if len(data) != blob.length or sha256(data).digest() != blob.hash:
            raise RunError(f"The file {path} is damaged.", "the bytes that were committed.", "its SHA-256 differs.")
        return data

    def _blob_path(self, hash: bytes) -> Path:
        return self.home / "blobs" / hash.hex()

    def commit_round(self, commit: RoundCommit) -> None:
        """Commit a round: state, accepted works, metrics, events and the next link, in one transaction.

        Only after this call may a client receive `Settled` or work of the next model version.

        Raises:
            RunError: the round does not follow the last one, or one of the works has been committed before.
            StorageError: the disk failed; nothing was committed, or the next start finds the round.
        """
        if commit.state is not None and len(commit.state) > SMALL_STATE:
            raise RunError(
                f"The state has {len(commit.state)} bytes.", f"at most {SMALL_STATE}; larger states are blobs."
            )
        blobs = b"".join(blob.hash + blob.length.to_bytes(8, "big") for blob in commit.blobs)
        mac = self._mac(commit.run, commit.round, commit.model, commit.pointer, commit.state, blobs)
        state = (commit.run, commit.round, commit.model, commit.pointer, commit.state, blobs, mac)
        row = (*state, _json(commit.metrics), commit.attempt)
        try:
            with self._transaction() as db:
                (last,) = db.execute("SELECT max(round) FROM rounds WHERE run = ?", (commit.run,)).fetchone()
                if last is not None and commit.round != last + 1:
                    raise RunError(f"Round {commit.round} of {commit.run} is committed.", f"round {last + 1}.")
                db.execute("INSERT INTO rounds VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
                db.executemany(
                    _INSERT_ACCEPTED,
                    [(commit.run, commit.round, *accepted) for accepted in commit.accepted],
                )
                failpoint("commit.inserted")
                db.execute(
                    "UPDATE rounds SET state = NULL WHERE run = ? AND round = ?",
                    (commit.run, commit.round - GENERATIONS),
                )
                _append(db, *commit.events, _round_event(commit), run=commit.run, round=commit.round)
        except sqlite3.IntegrityError as error:
            given = f"A work of round {commit.round} of {commit.run} has been committed before."
            raise RunError(given, "each work once.") from error
        self._sweep(commit.run)

    def settle(self, run: str, round: int, accepted: Sequence[Accepted]) -> None:
        """Record works of the clients of a relay that the root has committed. A second call changes nothing."""
        with self._transaction() as db:
            new = [
                one
                for one in accepted
                if db.execute("SELECT 1 FROM accepted WHERE work = ?", (one.work,)).fetchone() is None
            ]
            db.executemany(_INSERT_ACCEPTED, [(run, round, *one) for one in new])
            failpoint("settle.inserted")
            if new:
                event = {"event": "settled", "run": run, "round": round, "accepted": _accepted_digest(new)}
                _append(db, event)

    def _mac(self, run: str, round: int, model: bytes, pointer: bytes, state: bytes | None, blobs: bytes) -> bytes:
        parts = (run.encode(), round.to_bytes(8, "big"), model, pointer, b"" if state is None else state, blobs)
        text = b"".join(len(part).to_bytes(8, "big") + part for part in parts)
        return hmac.digest(self._key, text, "sha256")

    def _sweep(self, run: str) -> None:
        """Remove blobs that neither of the last two rounds needs."""
        if not self._has_blobs:
            return
        folder = self.home / "blobs"
        with self._guarded():
            present = {entry.name for entry in os.scandir(folder)}
        self._has_blobs = bool(present)
        rows = self._rows("SELECT blobs FROM rounds WHERE run = ? ORDER BY round DESC LIMIT ?", run, GENERATIONS)
        needed = {blob.hash.hex() for (packed,) in rows for blob in _unpacked(packed)}
        with self._guarded():
            _unlink(*(folder / name for name in present - needed))
        failpoint("commit.swept")

    def last_round(self, run: str, back: int = 0) -> CommittedRound | None:
        """A committed round of a run whose state is kept, the last one or one before it.

        Args:
            run: the name of the run.
            back: 0 for the last round, 1 for the round before.
        Returns:
            None if the run has no such round.
        Raises:
            RunError: the state is missing or damaged. Nothing of it is returned.
        """
        found = self._rows(_STATE, run, back)
        if not found or back >= GENERATIONS:
            return None
        round, model, pointer, state, packed, mac = found[0]
        if not hmac.compare_digest(mac, self._mac(run, round, model, pointer, state, packed)):
            raise RunError(
                f"The state of round {round} in {self.path} is damaged.",
                "the state that was committed.",
                "its HMAC differs: the row was changed, or store.key is of another home.",
            )
        blobs = _unpacked(packed)
        for blob in blobs:
            self.read_blob(blob)
        return CommittedRound(round, model, pointer, state, blobs)

    def metrics(self, run: str) -> list[dict[str, Any]]:
        """The rows of `metrics.jsonl` of all committed rounds, in order."""
        return [
            json.loads(text) for (text,) in self._rows("SELECT metrics FROM rounds WHERE run = ? ORDER BY round", run)
        ]

    def events(self, run: str) -> list[dict[str, Any]]:
        """The events of a run that its commits contained, in order, without those of the audit."""
        rows = self._rows("SELECT event FROM events WHERE run = ? ORDER BY seq", run)
        return [event for (text,) in rows if (event := json.loads(text)).get("event") != "committed"]

    def models(self, run: str) -> list[bytes]:
        """The SHA-256 of the model after each committed round, in order."""
        return [model for (model,) in self._rows("SELECT model FROM rounds WHERE run = ? ORDER BY round", run)]

    def accepted(self, run: str, round: int) -> tuple[Accepted, ...]:
        """The contributions of a committed round."""
        return tuple(Accepted(*row) for row in self._rows(_ACCEPTED, run, round))

    def recent(self, run: str) -> dict[int, tuple[tuple[bytes, bytes, bytes], ...]]:
        """The last `RECENT` committed works of each client, oldest first, since its machine was enrolled.

        Returns:
            For each client: work, digest of its message, and the `chain_link` after it.
        """
        out: dict[int, list[tuple[bytes, bytes, bytes]]] = {}
        for client, work, after, digest in self._rows(_RECENT, run, RECENT):
            out.setdefault(client, []).append((work, digest, chain_link(after, work, digest)))
        return {client: tuple(works) for client, works in out.items()}

    def forget_memory(self, client: int) -> None:
        """Record that the committed works of a client belong to the memory of a machine that is gone."""
        with self._transaction() as db:
            last = db.execute("SELECT coalesce(max(seq), 0) FROM accepted").fetchone()[0]
            db.execute("UPDATE clients SET memory_from = ? WHERE id = ?", (last, client))

    def log(self, event: Mapping[str, Any]) -> None:
        """Append an event to the audit chain, in a transaction of its own."""
        with self._transaction() as db:
            _append(db, event)

    def verify(self) -> list[str]:
        """Check the audit chain, the accepted works and the kept states.

        Returns:
            One sentence for each fault; empty if everything matches.
        """
        faults = list(self._chain_faults())
        for (run,) in self._rows("SELECT DISTINCT run FROM rounds ORDER BY run"):
            faults += self._run_faults(run)
        return faults

    def _chain_faults(self) -> Iterator[str]:
        link = sha256(_TAG + self.federation.encode() + bytes(self._meta("authority"))).digest()
        count = 0
        for seq, text, stored in self._rows("SELECT seq, event, link FROM events ORDER BY seq"):
            count += 1
            link = _next_link(link, text)
            if link != stored or seq != count:
                yield f"The audit chain breaks at event {seq}."
                return
        if link != self._meta("link") or count != self._meta("events"):
            yield f"The audit chain ends after {count} events; {self._meta('events')} were appended."

    def _run_faults(self, run: str) -> Iterator[str]:
        texts = self._rows("SELECT round, event FROM events WHERE run = ? ORDER BY seq", run)
        found = [(round, json.loads(text)) for round, text in texts]
        logged = {round: event for round, event in found if event.get("event") == "committed"}
        rounds = self._rows("SELECT round, model, pointer FROM rounds WHERE run = ? ORDER BY round", run)
        if [row[0] for row in rounds] != sorted(logged):
            yield f"The rounds of {run} differ from those of the audit chain."
        for round, model, pointer in rounds:
            event = logged.get(round, {})
            if event.get("model") != model.hex() or event.get("pointer") != sha256(pointer).hexdigest():
                yield f"The model of round {round} of {run} differs from the audit chain."
            if event.get("accepted") != _accepted_digest(self.accepted(run, round)):
                yield f"The accepted works of round {round} of {run} differ from the audit chain."
        newest = self._rows("SELECT run FROM events WHERE run IS NOT NULL ORDER BY seq DESC LIMIT 1")[0][0]
        # Of an earlier run only the run folder keeps the model.
        for back in range(min(GENERATIONS, len(rounds)) if run == newest else 0):
            try:
                self.last_round(run, back)
            except RunError as error:
                yield error.given


_CLIENTS = (
    "SELECT id, name, san, pinned, state, serial, former, expires, identity, rows, held, input FROM clients ORDER BY id"
)


def _client(row: Sequence[Any]) -> ClientRecord:
    id, name, san, pinned, state, serial, former, *rest = row
    return ClientRecord(id, name, san, bool(pinned), state, tuple(s for s in (serial, former) if s), *rest)


def _append(
    db: sqlite3.Connection, *events: Mapping[str, Any] | str, run: str | None = None, round: int | None = None
) -> None:
    """Append events and their links."""
    values = dict(db.execute("SELECT key, value FROM meta WHERE key IN ('link', 'events')").fetchall())
    link, seq, rows = values["link"], int(values["events"]), []
    for event in events:
        text, seq = _json(event), seq + 1
        link = _next_link(link, text)
        rows.append((seq, run, round, text, link))
    db.executemany("INSERT INTO events VALUES (?, ?, ?, ?, ?)", rows)
    db.executemany("UPDATE meta SET value = ? WHERE key = ?", ((link, "link"), (seq, "events")))


def _next_link(link: bytes, text: str) -> bytes:
    return sha256(_TAG + link + text.encode()).digest()


def _round_event(commit: RoundCommit) -> dict[str, Any]:
    pointer = sha256(commit.pointer).hexdigest()
    accepted = _accepted_digest(commit.accepted)
    place = {"event": "committed", "run": commit.run, "round": commit.round, "arrived": len(commit.accepted)}
    return {**place, "model": commit.model.hex(), "pointer": pointer, "accepted": accepted}


def _accepted_digest(accepted: Sequence[Accepted]) -> str:
    hashed = sha256()
    for one in accepted:
        numbers = (one.client, one.version, one.repeat, one.weight)
        hashed.update(
            b"".join(number.to_bytes(8, "big") for number in numbers) + one.work + (one.after or b"") + one.digest
        )
    return hashed.hexdigest()


def _unpacked(packed: bytes) -> tuple[Blob, ...]:
    starts = range(0, len(packed), 40)
    return tuple(Blob(packed[i : i + 32], int.from_bytes(packed[i + 32 : i + 40], "big")) for i in starts)


def _json(value: Mapping[str, Any] | str) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"), ensure_ascii=False)


def _locked(error: Exception) -> bool:
    return isinstance(error, sqlite3.OperationalError) and error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY


def _storage_error(path: Path, error: Exception) -> StorageError:
    return StorageError(
        f"The disk of {path} failed: {error}.",
        "a disk that works and has free space.",
        "after a failed write or sync the content of the disk is unknown, so the process ends.",
    )


def _write(file: IO[bytes], part: bytes | memoryview) -> int:
    view = memoryview(part).cast("B")
    at = 0
    while at < len(view):
        at += file.write(view[at:])
    return at


def _unlink(*paths: Path) -> None:
    for path in paths:
        path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def claim_home(home: Path) -> IO[bytes]:
    """Lock the home of a server or a client for this process, until the returned file is closed.

    Raises:
        UsageError: another process uses the home.
    """
    file = open(os.open(home / "lock", os.O_CREAT | os.O_RDWR, 0o600), "r+b")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UsageError(f"Another process uses the home {home}.", "one process for each home.") from None
    return file
