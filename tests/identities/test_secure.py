"""The secure sum equals the sum of the plain words, for every pattern of clients that drop out."""

from __future__ import annotations

import hmac
import itertools
import struct
from functools import lru_cache
from hashlib import sha256

import numpy as np
import pytest
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from quick_cases import only

from atoll.base.errors import UsageError
from atoll.secure import client, keys, messages, server, shamir
from atoll.secure.client import Floors
from atoll.secure.graph import neighbours, permutation
from atoll.secure.masks import masked
from atoll.secure.params import COMPLETE_UP_TO, Topology, safe_topology, topology
from atoll.secure.refusals import SessionError
from atoll.secure.server import SumServer
from tests.secure_session import STAGES, Group, agreement

SID = sha256(b"atoll test session").digest()
SEED = bytes(range(32))
# The private key and the peer's public key of RFC 7748.
OWN = "77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a"
PEER = "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"


# 1. Vectors


def test_the_exchange_and_the_keys_equal_their_vectors() -> None:
    shared = keys.exchange(X25519PrivateKey.from_private_bytes(bytes.fromhex(OWN)), bytes.fromhex(PEER))
    assert shared.hex() == "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"
    pair = keys.pair_key(keys.extract(SID, shared), 1, 2, "update", 8, 32)
    assert pair.hex() == "facebf9376762f6123dfe234464ad742544323b63f3bc359aedfbaf2049b483c"
    wide = keys.pair_key(keys.extract(SID, shared), 1, 2, "update", 8, 64)
    assert wide.hex() == "54f69eb475b5b57621695ab23a5e554de1fa5e25e5a6a4fc0150bfb303de4897"
    channel = keys.channel_key(SID, shared, 1, 2)
    assert channel.hex() == "3f0153995b0143d6487f2814e6ef976c372b040ed1598881d83781a001b71543"
    own = keys.self_key(SID, SEED, 1, "update", 8, 32)
    assert own.hex() == "311ec787edca2c85a28fdbc4ac0c9faf96fefad5bcdfb746f84a9cdd63a6bcbe"
    zeros = np.zeros(4, dtype=np.uint32)
    assert masked(zeros, [pair], [1]).tolist() == [329428743, 2561923276, 4102532326, 411546442]
    assert masked(zeros, [own], [1]).tolist() == [3734048259, 2953542935, 1598741391, 1621327110]


def test_the_mask_keys_of_a_seed_equal_their_vectors() -> None:
    mask = keys.MaskKeys(SEED, hybrid=True)
    assert mask.public.hex() == "b342c1046d7f2aa5e71bc18081ce127705fd4904eefa7a4153fb454d8f2c7217"
    kem = sha256(mask.kem_public).hexdigest()
    assert kem == "f279b79c80e991d82c9b6ca3a6999531553f6335cac1c10d20c0f971cb97d931"


def test_hkdf_equals_rfc_5869() -> None:
    key = keys.extract(bytes(range(13)), b"\x0b" * 22)
    assert key.hex() == "077709362c2e32df0ddc3f0dc47bba6390b6c73bb50f9c3122ec844ad7c2b3e5"
    assert key == hmac.new(bytes(range(13)), b"\x0b" * 22, sha256).digest()
    expanded = keys.expand(key, bytes(range(0xF0, 0xFA)), 42)
    assert expanded.hex() == ("3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf34007208d5b887185865")


def test_chacha20_with_zero_counter_and_nonce_equals_its_vector() -> None:
    stream = Cipher(algorithms.ChaCha20(bytes(32), bytes(16)), mode=None).encryptor().update(bytes(32))
    assert stream.hex().startswith("76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7")


def test_aes_counter_mode_equals_its_vector() -> None:
    stream = masked(np.zeros(8, dtype=np.uint32), [bytes(32)], [1]).tobytes()
    assert stream.hex() == "dc95c078a2408989ad48a21492842087530f8afbc74536b9a963b4f1c4cb738b"


# The points of order 1, 2, 4 and 8 of Curve25519 and its twist, and their other encodings below 2^255.
_LOW_ORDER = [
    "00" * 32,
    "01" + "00" * 31,
    "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
    "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
    "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
]


def test_a_low_order_key_is_refused() -> None:
    for point in _LOW_ORDER:
        with pytest.raises(ValueError):
            keys.exchange(X25519PrivateKey.generate(), bytes.fromhex(point))


def test_the_graph_equals_its_vector() -> None:
    seed = sha256(b"atoll test graph").digest()
    assert permutation(seed, 10) == [4, 1, 6, 2, 5, 0, 9, 3, 8, 7]
    assert neighbours(seed, 10, 4)[:3] == [(2, 3, 5, 9), (2, 4, 6, 7), (0, 1, 5, 6)]


@pytest.mark.parametrize(("n", "k"), [(5, 2), (9, 4), (40, 12), (6, 5)])
def test_the_graph_is_regular_and_symmetric(n: int, k: int) -> None:
    graph = neighbours(sha256(bytes([n])).digest(), n, k)
    assert all(len(row) == k and i not in row for i, row in enumerate(graph))
    assert all(i in graph[j] for i, row in enumerate(graph) for j in row)


_CURIOUS = [
    (100, 0.45, 0.45, 92, 46), (10, 0.33, 0.33, 8, 4), (100, 0.33, 0.33, 68, 34), (1000, 0.33, 0.33, 286, 150),
    (10, 0.05, 0.33, 4, 2), (100, 0.05, 0.33, 28, 6), (1000, 0.05, 0.33, 72, 24), (10, 0.33, 0.05, 4, 4),
    (100, 0.33, 0.05, 34, 29), (1000, 0.33, 0.05, 78, 60), (10_000, 0.33, 0.33, 422, 221),
]  # fmt: skip
_MALICIOUS = [
    (100, 0.3, 0.3, 92, 62), (10, 0.05, 0.33, 8, 5), (100, 0.05, 0.33, 74, 41), (1000, 0.05, 0.33, 398, 223),
]  # fmt: skip


@pytest.mark.parametrize("row", _CURIOUS)
def test_the_size_of_the_graph_for_a_curious_server(row: tuple[int, float, float, int, int]) -> None:
    assert safe_topology(*row[:3]) == Topology(row[0], *row[3:])


@pytest.mark.parametrize("row", _MALICIOUS)
def test_the_size_of_the_graph_for_a_malicious_server(row: tuple[int, float, float, int, int]) -> None:
    assert safe_topology(*row[:3], malicious=True) == Topology(row[0], *row[3:])


def test_shares_that_no_graph_can_serve_are_refused() -> None:
    with pytest.raises(UsageError):
        safe_topology(100, 0.5, 0.5)
    with pytest.raises(UsageError):
        safe_topology(100, 0.31, 0.3, malicious=True)


def test_shamir_equals_its_vectors() -> None:
    prime = (1 << 31) + 11
    shares = [
        (112, 207, 118, 46, 110, 212, 170, 28), (48, 160, 197, 172, 38, 235, 145, 204),
        (63, 115, 238, 144, 40, 68, 183, 71),
        (29, 72, 240, 207, 114, 224, 26, 141), (74, 31, 204, 116, 6, 189, 187, 136),
    ]  # fmt: skip
    for points in itertools.combinations(range(1, 6), 3):
        for first, chunk in ((0, 0), (4, 33)):
            part = {x: int.from_bytes(bytes(shares[x - 1][first : first + 4]), "big") for x in points}
            assert shamir.rebuild(part, prime=prime) == chunk
    numbers = [shamir.share_bytes(share).hex() for share in shamir.share_out(SEED, 2, [1, 2, 3], [(1 << 256) - 1])]
    assert numbers[0] == "00000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1cf5"
    assert [number[-6:] for number in numbers[1:]] == ["1d1bcb", "1d1aa1"]


def test_every_set_of_t_shares_rebuilds_the_secret_and_smaller_ones_do_not() -> None:
    secret = sha256(b"secret").digest()
    shares = dict(zip(range(1, 8), shamir.share_out(secret, 4, range(1, 8)), strict=True))
    for size in (3, 4, 5):
        for chosen in itertools.combinations(shares, size):
            rebuilt = shamir.rebuild({x: shares[x] for x in chosen})
            assert (rebuilt == int.from_bytes(secret, "big")) == (size >= 4)


# 2. The sum


@pytest.mark.parametrize("ring", [32, 64])
@pytest.mark.parametrize("hybrid", [False, True])
def test_the_secure_sum_equals_the_plain_sum(ring: int, hybrid: bool) -> None:
    group = Group(7, agreement(ring=ring, hybrid=hybrid))
    result = group.run({1: "masked", 3: "unmask"})
    survivors = [i for i in range(7) if i != 1]
    assert set(result.words) == {"update", "loss"}
    for name, words in group.expected(survivors).items():
        np.testing.assert_array_equal(result.words[name], words)
    assert result.weight == sum(int(group.weights[i]) for i in survivors)
    assert result.survivors == tuple(group.fingerprints[i] for i in survivors)


def _pattern(n: int, threshold: int, stages: tuple[str, ...]) -> bool:
    """Run one pattern; whether a sum came out. A sum that comes out must be right."""
    group = Group(n, agreement(2), threshold=threshold)
    lost = {i: stage for i, stage in enumerate(stages) if stage != "stays"}
    try:
        result = group.run(lost)
    except SessionError as error:
        assert error.reason in ("few", "few_shared", "few_survivors")
        return False
    survivors = [i for i in range(n) if lost.get(i) not in ("shares", "masked")]
    for name, words in group.expected(survivors).items():
        np.testing.assert_array_equal(result.words[name], words)
    return True


@pytest.mark.parametrize(("n", "step"), [(4, 5), *(pytest.param(n, 1, marks=pytest.mark.slow) for n in (4, 5, 6))])
def test_a_pattern_of_lost_clients_sums_if_all_but_one_stay_or_stops_by_name(n: int, step: int) -> None:
    for stages in itertools.islice(itertools.product(STAGES, repeat=n), 0, None, step):
        assert _pattern(n, n - 1, stages) == (stages.count("stays") >= n - 1), stages


class AnyShape(Floors):
    """Floors of a client that accepts a regular graph of few clients; the floors themselves have their own tests."""

    def check(self, shape: Topology) -> None:
        pass


@pytest.mark.parametrize("seed", only([0], range(3)))
def test_random_patterns_on_a_regular_graph(seed: int) -> None:
    draw = np.random.default_rng(seed)
    group = Group(24, agreement(50), AnyShape(cohort=3), neighbours=14, threshold=6, seed=seed)
    lost = {int(i): STAGES[int(draw.integers(3))] for i in draw.choice(24, 5, replace=False)}
    result = group.run(lost)
    survivors = [i for i in range(24) if lost.get(i) not in ("shares", "masked")]
    np.testing.assert_array_equal(result.words["update"], group.expected(survivors)["update"])


@pytest.fixture
def remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """All clients are in one process: what each of them verifies for itself is computed once."""
    for module, name in ((client, "verified"), (server, "verified"), (messages, "neighbours")):
        monkeypatch.setattr(module, name, lru_cache(None)(getattr(module, name)))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("remembered")
@pytest.mark.parametrize("most", [12, 32, 100, 1000])
def test_two_hundred_random_patterns(most: int) -> None:
    """Complete graphs and regular ones: the sum is that of the clients whose vectors arrived, or the session stops."""
    draw = np.random.default_rng(most)
    for _ in range({12: 120, 32: 62, 100: 17, 1000: 1}[most]):
        n = most if most == 1000 else int(draw.integers(4, most + 1))
        group = Group(n, agreement(20), AnyShape(cohort=3), seed=int(draw.integers(1 << 30)))
        chance = draw.choice([0.02, 0.1, 0.3])
        lost = {i: STAGES[int(draw.integers(3))] for i in range(n) if draw.random() < chance}
        survivors = [i for i in range(n) if lost.get(i) not in ("shares", "masked")]
        try:
            words = group.run(lost).words["update"]
        except SessionError as error:
            assert error.reason in ("few", "few_shared", "few_survivors")
            summed = False
        else:
            np.testing.assert_array_equal(words, group.expected(survivors)["update"])
            summed = True
        if n <= COMPLETE_UP_TO:
            assert summed == (n - len(lost) >= topology(n).threshold)


@pytest.mark.slow
@pytest.mark.parametrize(("n", "regular"), [(50, False), (200, True)])
def test_large_groups(n: int, regular: bool) -> None:
    draw = np.random.default_rng(n)
    group = Group(n, agreement(1000))
    lost = {int(i): STAGES[int(draw.integers(3))] for i in draw.choice(n, n // 10, replace=False)}
    result = group.run(lost)
    assert regular == (len(group.clients) > 100)
    survivors = [i for i in range(n) if lost.get(i) not in ("shares", "masked")]
    np.testing.assert_array_equal(result.words["update"], group.expected(survivors)["update"])


def test_a_wrong_share_is_found_and_its_client_named() -> None:
    group = Group(6, agreement())
    group.until_masked({5: "masked"})
    for i, answer in group.down(group.server.close()).items():
        group.up(i, answer)
    for i, answer in group.down(group.server.close()).items():
        assert answer is not None
        if i == 2:
            entries = messages.read_unmask(answer.body)
            answer = messages.SumMessage(8, messages.unmask_body((x, kind, share ^ 1) for x, kind, share in entries))
        group.up(i, answer)
    # Six holders, one lost, threshold five: every set contains the liar, so the sum is refused and not wrong.
    with pytest.raises(SessionError) as caught:
        group.server.result()
    assert caught.value.reason == "shares"
    group = Group(6, agreement())
    group.until_masked({})
    for i, answer in group.down(group.server.close()).items():
        group.up(i, answer)
    for i, answer in group.down(group.server.close()).items():
        assert answer is not None
        if i == 2:
            entries = messages.read_unmask(answer.body)
            answer = messages.SumMessage(8, messages.unmask_body((x, kind, share ^ 1) for x, kind, share in entries))
        group.up(i, answer)
    result = group.server.result()
    np.testing.assert_array_equal(result.words["update"], group.expected(list(range(6)))["update"])
    assert result.liars == (group.fingerprints[2],)


def test_masks_that_do_not_cancel_are_found() -> None:
    group = Group(4, agreement())
    group.until_masked({})
    group.server._session.total["check"][2] += 1  # type: ignore[union-attr]
    for i, answer in group.down(group.server.close()).items():
        group.up(i, answer)
    for i, answer in group.down(group.server.close()).items():
        group.up(i, answer)
    with pytest.raises(SessionError) as caught:
        group.server.result()
    assert caught.value.reason == "mask_residue"


# 3. The server


def test_the_server_never_holds_both_shares_of_a_client() -> None:
    group = Group(5, agreement())
    group.until_masked({1: "masked"})
    for i, answer in group.down(group.server.close()).items():
        group.up(i, answer)
    answers = group.down(group.server.close())
    answer = answers[0]
    assert answer is not None
    entries = messages.read_unmask(answer.body)
    other = [(x, 3 - kind, share) for x, kind, share in entries]
    for wrong in (entries + other, other, entries[:-1], entries + entries[:1]):
        with pytest.raises(SessionError) as caught:
            group.up(0, messages.SumMessage(8, messages.unmask_body(wrong)))
        assert caught.value.reason == "both_shares"
    for i, message in answers.items():
        group.up(i, message)
    kinds: dict[int, set[int]] = {}
    for message in group.transcript:
        if message.kind == messages.UNMASK and message.body in {a.body for a in answers.values() if a}:
            for x, kind, _ in messages.read_unmask(message.body):
                kinds.setdefault(x, set()).add(kind)
    assert all(len(kind) == 1 for kind in kinds.values())
    group.server.result()


@pytest.mark.parametrize("kind", range(9))
def test_a_message_of_another_step_or_of_a_wrong_length_costs_only_its_client(kind: int) -> None:
    group = Group(4, agreement())
    with pytest.raises(SessionError):
        group.server.receive(group.fingerprints[0], messages.SumMessage(kind, b"short"))
    group.until_masked({})
    with pytest.raises(SessionError):
        group.server.receive(group.fingerprints[0], messages.SumMessage(kind, b"short"))
    for i, answer in group.down(group.server.close()).items():
        group.up(i, answer)
    for i, answer in group.down(group.server.close()).items():
        group.up(i, answer)
    np.testing.assert_array_equal(group.server.result().words["update"], group.expected([0, 1, 2, 3])["update"])


def test_a_late_vector_is_not_read() -> None:
    group = Group(4, agreement())
    group.until_masked({3: "masked"})
    survivors = group.server.close()
    with pytest.raises(SessionError):
        group.up(3, group.clients[3].mask(group.plain[3], 1))
    for i, answer in group.down(survivors).items():
        group.up(i, answer)
    for i, answer in group.down(group.server.close()).items():
        group.up(i, answer)
    np.testing.assert_array_equal(group.server.result().words["update"], group.expected([0, 1, 2])["update"])


def test_a_sum_of_two_is_refused() -> None:
    with pytest.raises(UsageError):
        SumServer(agreement(), {}.get, least=2)


def test_hybrid_keys_without_ml_kem_are_refused_and_not_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    class Without:
        @staticmethod
        def from_seed_bytes(seed: bytes) -> None:
            raise UnsupportedAlgorithm("ML-KEM-768")

    monkeypatch.setattr(keys, "MLKEM768PrivateKey", Without)
    with pytest.raises(UsageError, match="Masks\\(hybrid=False\\)"):
        Group(4, agreement(hybrid=True))


# 4. What stays secret


def test_nothing_in_the_messages_shows_a_plain_vector_or_a_secret() -> None:
    group = Group(5, agreement(64), least=4)
    secret = [(c._secrets.a, c._secrets.b) for c in group.clients if c._secrets]
    group.run({1: "masked"})
    data = b"".join(message.body for message in group.transcript)
    for a, b in secret:
        assert a not in data and b not in data
    for plain in group.plain:
        assert plain["update"].tobytes() not in data and plain["update"][:4].tobytes() not in data
    assert all(client._secrets is None and client._session is None for client in group.clients if client.answered)
    assert "object" not in repr(group.clients[0]) and struct.pack(">I", 1) not in repr(group.clients[0]).encode()


def test_masked_words_are_uniform() -> None:
    group = Group(4, agreement(1 << 14, vectors=(("update", 1 << 14),)))
    for plain in group.plain:
        plain["update"][:] = 7
    group.until_masked({})
    body = next(message.body for message in group.transcript if message.kind == messages.MASKED)
    words = messages.read_words(body, group.agreed)["update"]
    counts = np.bincount(words.view(np.uint8), minlength=256)
    expected = words.nbytes / 256
    assert ((counts - expected) ** 2 / expected).sum() < 255 + 6 * np.sqrt(2 * 255)
    bits = np.unpackbits(words.view(np.uint8).reshape(-1, 4), axis=1).mean(axis=0)
    assert np.abs(bits - 0.5).max() < 6 * 0.5 / np.sqrt(len(words))


@pytest.mark.slow
def test_two_to_the_16_masks_have_no_collision_and_no_missing_value() -> None:
    """The masks of 2^16 pairs: distinct, each bit balanced, and each value of a half word is reached."""
    n, shared = 1 << 16, keys.extract(SID, SEED)
    zeros, masks = np.zeros(16, dtype=np.uint32), np.empty((n, 16), dtype=np.uint32)
    for i in range(n):
        masks[i] = masked(zeros, [keys.pair_key(shared, i, i + 1, "update", 16, 32)], [1])
    assert len(np.unique(masks[:, :2].copy().view(np.uint64))) == n
    assert len(np.unique(masks.reshape(-1)[: 1 << 10])) == 1 << 10
    bits = np.unpackbits(masks.view(np.uint8), axis=1).mean(axis=0)
    assert np.abs(bits - 0.5).max() < 6 * 0.5 / np.sqrt(n)
    counts = np.bincount(masks.view(np.uint16).reshape(-1), minlength=1 << 16)
    expected = masks.nbytes / 2 / (1 << 16)
    assert counts.min() > 0 and counts[-1] > 0
    assert abs(float(((counts - expected) ** 2 / expected).sum()) - (1 << 16)) < 6 * np.sqrt(2 * (1 << 16))
    both = masked(zeros, [keys.pair_key(shared, 0, 1, "loss", 16, 32)], [1])
    assert not np.array_equal(both, masks[0])  # another vector of the same pair
