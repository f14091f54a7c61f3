"""The database of a federation: identities, commits, audit chain; crashes at every failpoint, damage, failing disks."""

import json
import os
import re
import resource
import signal
import sqlite3
import stat
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from net_rounds import RUN, commit, work
from quick_cases import one_in

from atoll.base.errors import RunError, UsageError
from atoll.net import identity as ids
from atoll.net.identity import Authority, Peer
from atoll.net.store import SMALL_STATE, Database, DeniedError, StorageError, claim_home
from atoll.net.wire import chain_link, digest

FAR = 4_000_000_000


@pytest.fixture
def store(tmp_path):
    with Database.create(tmp_path, "hospitals", bytes(32)) as made:
        yield made


def issued(serial="a1", expires=FAR):
    return lambda *_: (b"der " + serial.encode(), Peer((), serial, bytes(32), expires))


# 1. Identities


def test_numbers_follow_the_order_of_invitation(store):
    assert [store.invite(name, bytes([i] * 32), FAR) for i, name in enumerate(("b", "a", "c"))] == [0, 1, 2]
    assert store.invite("a", bytes([9] * 32), FAR) == 1
    assert [(c.id, c.name, c.state) for c in store.clients()] == [
        (0, "b", "invited"),
        (1, "a", "invited"),
        (2, "c", "invited"),
    ]
    with pytest.raises(UsageError, match="at most 3"):
        store.invite("d", bytes(32), FAR, limit=3)
    assert store.invite("c", bytes([8] * 32), FAR, limit=3) == 2


def test_a_token_is_valid_once_and_its_answer_can_be_repeated(store):
    store.invite("north", bytes(32), 1000)
    assert store.enrol("north", bytes(32), b"request", 999, issued()) == (0, b"der a1")
    # The answer was lost: the same machine asks again, also after the expiry.
    assert store.enrol("north", bytes(32), b"request", 2000, issued("zz")) == (0, b"der a1")
    with pytest.raises(DeniedError) as error:
        store.enrol("north", bytes(32), b"another machine", 999, issued())
    assert error.value.code == "used" and "atoll invite north" in str(error.value)


def test_wrong_tokens_have_their_codes(store):
    store.invite("north", bytes([1] * 32), 1000)
    store.invite("north", bytes([2] * 32), 1000)
    for secret, now, code in (
        (bytes([1] * 32), 0, "replaced"),
        (bytes([2] * 32), 1000, "expired"),
        (bytes(32), 0, "unknown"),
    ):
        with pytest.raises(DeniedError) as error:
            store.enrol("north", secret, b"r", now, issued())
        assert error.value.code == code
    with pytest.raises(DeniedError):
        store.enrol("south", bytes([2] * 32), b"r", 0, issued())


def test_a_request_that_is_refused_uses_no_token(store):
    store.invite("north", bytes(32), FAR)

    def refuse():
        raise UsageError("The certificate request cannot be read.")

    with pytest.raises(UsageError):
        store.enrol("north", bytes(32), b"r", 0, refuse)
    assert store.enrol("north", bytes(32), b"r", 0, issued()).client == 0


def test_two_clients_have_no_common_identity_key(store):
    """A client with the key of another one would receive its messages of a secure sum."""
    for i, name in enumerate(("north", "south")):
        store.invite(name, bytes([i] * 32), FAR)
    store.enrol("north", bytes(32), b"r", 0, issued(), b"\x01" * 32)
    with pytest.raises(DeniedError, match="another client") as error:
        store.enrol("south", bytes([1] * 32), b"r", 0, issued("b2"), b"\x01" * 32)
    assert error.value.code == "request"
    assert store.enrol("south", bytes([1] * 32), b"r", 0, issued("b2"), b"\x02" * 32).client == 1
    store.invite("north", bytes([9] * 32), FAR)  # the same folder with a new token
    assert store.enrol("north", bytes([9] * 32), b"s", 0, issued("c3"), b"\x01" * 32).client == 0


def peer(serial, *sans):
    return Peer(sans or (ids.san_of("hospitals", "north"),), serial, bytes(32), FAR)


def test_admission_checks_name_serial_and_state(store):
    store.invite("north", bytes(32), FAR)
    store.invite("site", bytes([1] * 32), FAR, san="DNS:site.example")
    assert store.directory().admit(peer("a1")) is None  # not enrolled
    store.enrol("north", bytes(32), b"r", 0, issued("a1"))
    directory = store.directory()
    assert directory.admit(peer("a1")).id == 0
    assert directory.admit(peer("b2")) is None
    assert directory.admit(peer("a1", "URI:urn:atoll:other:north")) is None
    assert directory.admit(peer("a1", "DNS:other.example", "DNS:site.example")).id == 1
    store.revoke("north")
    store.revoke("site")
    assert store.directory().admit(peer("a1")) is store.directory().admit(peer("a1", "DNS:site.example")) is None
    with pytest.raises(UsageError, match=r"one of north, site"):
        store.revoke("south")


def test_a_renewed_certificate_replaces_the_former_when_it_is_used(store):
    store.invite("north", bytes(32), FAR)
    store.enrol("north", bytes(32), b"r", 0, issued("a1"))
    store.renew(0, "a1", issued("b2"))
    assert {s for s in ("a1", "b2", "c3") if store.directory().admit(peer(s))} == {"a1", "b2"}
    # The answer was lost: the client renews again with its old certificate.
    store.renew(0, "a1", issued("c3"))
    assert {s for s in ("a1", "b2", "c3") if store.directory().admit(peer(s))} == {"a1", "c3"}
    store.used(0, "c3")
    assert {s for s in ("a1", "b2", "c3") if store.directory().admit(peer(s))} == {"c3"}
    store.revoke("north")
    with pytest.raises(DeniedError):
        store.renew(0, "c3", issued("d4"))


def test_a_later_token_renews_the_identity_and_ends_the_former_certificate(store):
    store.invite("north", bytes(32), FAR)
    store.enrol("north", bytes(32), b"r", 0, issued("a1"))
    store.commit_round(commit(0, clients=(0,)))
    assert [w for w, _, _ in store.recent(RUN)[0]] == [work(0, 0)]
    assert store.invite("north", bytes([1] * 32), FAR) == 0
    store.enrol("north", bytes([1] * 32), b"new machine", 0, issued("b2"))
    assert {s for s in ("a1", "b2") if store.directory().admit(peer(s))} == {"b2"}
    # The memory of the lost machine is gone, so the chain of this client begins again.
    assert store.recent(RUN) == {}


def test_alternative_names_belong_to_one_client(store):
    store.invite("a", bytes(32), FAR, san="DNS:site.example")
    for san in ("DNS:site.example", "site.example", "DNS:", "DNS:a\nb", "URI:" + "x" * 300):
        with pytest.raises(UsageError):
            store.invite("b", bytes([1] * 32), FAR, san=san)
    assert [c.name for c in store.clients()] == ["a"]


def test_another_process_changes_identities(store, tmp_path):
    assert store.stale()
    store.directory()
    assert not store.stale()
    with Database(tmp_path) as other:
        other.commit_round(commit(0))
        assert not store.stale()
        other.invite("north", bytes(32), FAR)
        assert store.stale() and store.stale()
        assert [c.name for c in store.directory().clients] == ["north"]
        assert not store.stale()
        other.revoke("north")
        assert store.stale()


def test_a_whole_enrolment_with_real_certificates(store):
    now = datetime.now(UTC)
    authority = Authority.new("hospitals", now)
    token = ids.new_token(["a.example:1"], authority.fingerprint, "hospitals", "north", FAR)
    store.invite("north", ids.secret_hash(token.secret), FAR)
    request = ids.request_pem(ids.new_key())

    def issue():
        der = authority.client(request, "north", now)
        return der, ids.peer_of(der)

    enrolled = store.enrol("north", ids.secret_hash(token.secret), request, 0, issue)
    assert store.directory().admit(ids.peer_of(enrolled.certificate)).id == enrolled.client == 0
    assert token.secret not in (store.path.read_bytes() + store.path.with_name("federation.db-wal").read_bytes())


# 2. Rounds


def test_epochs_and_facts(store, tmp_path):
    assert [store.begin_epoch(unix) for unix in (100, 50, 500)] == [100, 101, 500]
    store.put("run", RUN)
    store.put("address", "a:1")
    store.put("address", None)
    with Database(tmp_path) as again:
        assert (again.get("run"), again.get("address"), again.federation) == (RUN, None, "hospitals")


def test_a_round_is_committed_once_and_read_back(store, tmp_path):
    assert store.last_round(RUN) is None
    for round in range(3):
        store.commit_round(commit(round, state=b"s%d" % round, events=({"event": "failure", "client": round},)))
    with Database(tmp_path) as again:
        last = again.last_round(RUN)
        assert (last.round, last.model, last.state) == (2, digest(b"model 2"), b"s2")
        assert json.loads(last.pointer) == {"round": 2}
        assert again.last_round(RUN, 1).state == b"s1" and again.last_round(RUN, 2) is None
        assert again.accepted(RUN, 1) == commit(1).accepted
        assert [row["round"] for row in again.metrics(RUN)] == [0, 1, 2]
        assert again.events(RUN) == [{"event": "failure", "client": client} for client in range(3)]
        assert again.verify() == []
    for wrong in (
        commit(2),
        commit(4),
        commit(3, accepted=commit(1).accepted),
        commit(3, state=bytes(SMALL_STATE + 1)),
    ):
        with pytest.raises(RunError):
            store.commit_round(wrong)
    assert store.last_round(RUN).round == 2 and store.verify() == []


def test_recent_works_of_a_client_are_in_order(store):
    store.invite("a", bytes(32), FAR)
    store.invite("b", bytes([1] * 32), FAR)
    for round in range(140):
        store.commit_round(commit(round, clients=(0, 1) if round % 2 else (0,)))
    recent = store.recent(RUN)
    assert [w for w, _, _ in recent[0]] == [work(0, r) for r in range(12, 140)]
    assert [w for w, _, _ in recent[1]] == [work(1, r) for r in range(1, 140, 2)]
    assert recent[1][0] == (work(1, 1), digest(b"message 1"), chain_link(None, work(1, 1), digest(b"message 1")))
    store.forget_memory(1)
    assert store.recent(RUN).keys() == {0}


def test_large_states_are_blobs_of_two_generations(store, tmp_path):
    for round in range(4):
        parts = [bytes([round]) * 100, memoryview(bytes(SMALL_STATE))]
        blob = store.put_blob(parts)
        store.commit_round(commit(round, state=None, blobs=(blob,)))
        assert store.read_blob(blob) == b"".join(map(bytes, parts))
    assert len(list((tmp_path / "blobs").iterdir())) == 2
    assert store.last_round(RUN).blobs == (blob,)
    store.put_blob([b"of no round"])
    (tmp_path / "blobs" / "new-left-by-a-crash").write_bytes(b"x")
    store.commit_round(commit(4, state=None, blobs=(store.put_blob([b"small"]),)))
    assert len(list((tmp_path / "blobs").iterdir())) == 2


def test_files_are_private(store, tmp_path):
    store.commit_round(commit(0, state=None, blobs=(store.put_blob([b"x"]),)))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 4 and {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}


def test_a_home_belongs_to_one_process(tmp_path):
    first = claim_home(tmp_path)
    with pytest.raises(UsageError, match="Another process"):
        claim_home(tmp_path)
    first.close()
    claim_home(tmp_path).close()


def test_a_folder_without_a_database_and_a_second_create(store, tmp_path):
    with pytest.raises(UsageError, match=r"federation\.db"):
        Database.create(tmp_path, "hospitals", bytes(32))
    with pytest.raises(UsageError, match="no federation"):
        Database(tmp_path / "blobs")


# 3. Damage


@pytest.mark.parametrize(
    ("sql", "fault"),
    [
        ("UPDATE rounds SET state = x'00' WHERE round = 1", "damaged"),
        ("UPDATE rounds SET pointer = x'00' WHERE round = 1", "differs from the audit chain"),
        ("UPDATE rounds SET model = zeroblob(32) WHERE round = 0", "round 0"),
        ("UPDATE accepted SET weight = 1 WHERE round = 0 AND client = 0", "accepted works of round 0"),
        ("UPDATE accepted SET digest = zeroblob(32) WHERE round = 1", "accepted works of round 1"),
        ("DELETE FROM accepted WHERE round = 1 AND client = 1", "accepted works of round 1"),
        ("UPDATE events SET event = replace(event, 'failure', 'success')", "chain breaks"),
        ("DELETE FROM events WHERE seq = (SELECT max(seq) FROM events)", "chain ends after"),
        ("DELETE FROM events WHERE seq = 1", "chain breaks at event 2"),
        ("UPDATE rounds SET mac = zeroblob(32) WHERE round = 1", "HMAC|damaged"),
        ("DELETE FROM rounds WHERE round = 1", "differ from those of the audit chain"),
    ],
)
def test_every_changed_row_is_found(store, tmp_path, sql, fault):
    for round in range(2):
        store.commit_round(commit(round, events=({"event": "failure"},)))
    assert store.verify() == []
    db = sqlite3.connect(store.path)
    db.execute(sql)
    db.commit()
    db.close()
    assert any(re.search(fault, sentence) for sentence in store.verify())


def test_damaged_blobs_are_refused(store, tmp_path):
    blob = store.put_blob([b"model"])
    store.commit_round(commit(0, state=None, blobs=(blob,)))
    path = tmp_path / "blobs" / blob.hash.hex()
    for damage in (b"modem", b"mode", b"model ", b""):
        path.write_bytes(damage)
        with pytest.raises(RunError, match="damaged"):
            store.last_round(RUN)
    path.unlink()
    with pytest.raises(RunError, match="missing"):
        store.last_round(RUN)
    assert store.verify()


def test_a_state_under_another_key_is_refused(store, tmp_path):
    store.commit_round(commit(0))
    (tmp_path / "store.key").write_bytes(bytes(32))
    with Database(tmp_path) as other, pytest.raises(RunError, match=r"store\.key"):
        other.last_round(RUN)


# 4. Disks and crashes

PROGRAM = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from net_rounds import commit
from atoll.net.store import SMALL_STATE, Database
with Database(Path(sys.argv[1])) as store:
    for round in range(3):
        blob = store.put_blob([bytes([round]) * (SMALL_STATE + 1)])
        print("begin", round, flush=True)
        store.commit_round(commit(round, state=None, blobs=(blob,)))
        print("done", round, flush=True)
"""
FAILPOINTS = (
    "blob.written",
    "blob.synced",
    "blob.renamed",
    "commit.inserted",
    "commit.before",
    "commit.after",
    "commit.swept",
)


def child(home, **more):
    source = Path(sys.modules[Database.__module__].__file__).parents[2]
    command = [sys.executable, "-c", PROGRAM, str(home), str(Path(__file__).parents[1]), str(source)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, **more)


@pytest.mark.parametrize("name", one_in(2, FAILPOINTS))
def test_a_process_killed_at_a_failpoint_loses_no_acknowledged_round(tmp_path, name):
    Database.create(tmp_path, "hospitals", bytes(32)).close()
    done = child(tmp_path, env={**os.environ, "ATOLL_FAILPOINT": f"{name}:2"})
    assert done.returncode == -signal.SIGKILL, done.stderr
    acknowledged = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("done")]
    assert acknowledged == [0]
    with Database(tmp_path) as store:
        last = store.last_round(RUN)
        assert last.round == (1 if name in ("commit.after", "commit.swept") else 0)
        assert store.read_blob(last.blobs[0])[0] == last.round
        assert store.verify() == []
        # The run goes on, and no work can be committed twice.
        with pytest.raises(RunError):
            store.commit_round(commit(last.round + 1, accepted=commit(0).accepted))
        store.commit_round(commit(last.round + 1, state=None, blobs=(store.put_blob([b"next"]),)))
        assert len(list((tmp_path / "blobs").iterdir())) == 2 and store.verify() == []


def test_every_failpoint_is_swept():
    source = Path(sys.modules[Database.__module__].__file__).read_text(encoding="utf-8")
    of_relays = {"settle.inserted"}  # tests/faults/test_relay.py
    assert set(re.findall(r'failpoint\("([\w.]+)"\)', source)) == {*FAILPOINTS, *of_relays}


def test_a_disk_without_space_ends_the_store(store, tmp_path):
    store.commit_round(commit(0))
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(StorageError, match="full"):
        store.commit_round(commit(1, state=bytes(SMALL_STATE)))
    for call in (
        lambda: store.commit_round(commit(1)),
        lambda: store.begin_epoch(0),
        store.stale,
        store.clients,
        store.verify,
    ):
        with pytest.raises(StorageError):
            call()
    with Database(tmp_path) as again:
        assert again.last_round(RUN).round == 0 and again.verify() == []


def test_a_write_that_fails_ends_the_process_and_keeps_the_last_round(tmp_path):
    Database.create(tmp_path, "hospitals", bytes(32)).close()

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL_STATE // 2,) * 2)

    done = child(tmp_path, preexec_fn=limit)
    assert done.returncode != 0 and "StorageError" in done.stderr
    with Database(tmp_path) as again:
        assert again.last_round(RUN) is None and again.verify() == []


def test_an_error_of_the_folder_ends_the_store(store, monkeypatch, tmp_path):
    def fail(_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StorageError, match="Input/output error"):
        store.put_blob([b"x"])
    monkeypatch.undo()
    # A sync that succeeds later proves nothing about the bytes of the first.
    with pytest.raises(StorageError):
        store.commit_round(commit(0))
