"""Entropy: its numbers follow their distributions, no seed determines those of the system, and a round passes it on."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from problems import run

from atoll.base.entropy import Keystream, entropy_source, round_secret
from atoll.base.errors import UsageError
from atoll.base.random import Key, SecretKey
from atoll.engine.inprocess import InProcessEngine
from atoll.plan.aggregate import Mean
from atoll.plan.codec import Identity
from atoll.plan.local import Gradient
from atoll.plan.optimizer.rules import sgd
from atoll.plan.plan import Plan
from atoll.testing import known_entropy
from atoll.testing.local import clients, problem


@dataclass(frozen=True, repr=False)
class Noise(Identity):
    """Adds a normal number to each coordinate of the sum."""

    uses_entropy = True

    def server_update(self, total, server, info, key):
        noise = info.entropy.normal(total.means["update"].shape, torch.float64)
        return total._replace(means={**total.means, "update": total.means["update"] + noise}), server


PLAN = Plan(Gradient(), Mean(), sgd(0.1), codec=Noise())


def theta(seed=None):
    engine = InProcessEngine(replace(problem(), numerics="lanes"), clients())
    if seed is None:
        return run(PLAN, engine, 2)[0].model.theta
    with entropy_source(known_entropy(seed)):
        return run(PLAN, engine, 2)[0].model.theta


def test_normal_numbers_have_the_moments_of_the_normal_distribution():
    n = 1 << 20
    z = known_entropy(3).normal((n,), torch.float64)
    for power, moment in ((1, 0.0), (2, 1.0), (3, 0.0), (4, 3.0)):
        spread = math.sqrt({1: 1, 2: 2, 3: 15, 4: 96}[power] / n)
        assert abs(float((z**power).mean()) - moment) < 6 * spread  # odds of a false alarm: 2e-9 each
    pairs = z.view(2, -1)
    assert abs(float((pairs[0] * pairs[1]).mean())) < 6 / math.sqrt(n / 2)
    assert z.isfinite().all() and known_entropy(3).normal((2, 3), torch.float32).dtype == torch.float32


@pytest.mark.parametrize("high", [1, 2, 3, 10, 3 << 60])
def test_integers_are_uniform(high):
    n = 1 << 16
    drawn = known_entropy(high).integers((n,), high)
    assert int(drawn.min()) >= 0 and int(drawn.max()) < high
    if 1 < high <= 10:
        counts = torch.bincount(drawn, minlength=high)
        assert float((counts - n / high).abs().max()) < 6 * math.sqrt(n / high)


@pytest.mark.parametrize("high", [0, -1, 2**62 + 1])
def test_a_range_without_numbers_is_refused(high):
    with pytest.raises(UsageError) as caught:
        known_entropy().integers((3,), high)
    assert "integers((3,), 10)" in caught.value.line


def test_the_same_secret_gives_the_same_numbers_and_other_secrets_others():
    for shape in ((0,), (), (7,), (2, 3)):
        a, b = (known_entropy(5).normal(shape, torch.float64) for _ in range(2))
        assert a.shape == torch.Size(shape) and a.equal(b)
    assert not known_entropy(5).normal((7,), torch.float64).equal(known_entropy(6).normal((7,), torch.float64))
    assert round_secret(0, bytes) != round_secret(0, bytes)


def test_a_stream_is_aes_256_ctr_under_hkdf_sha256():
    """RFC 5869, case 1, gives the derivation; SP 800-38A, F.5.5, the cipher."""
    import hmac

    extracted = hmac.digest(bytes(range(13)), b"\x0b" * 22, "sha256")
    info = bytes(range(0xF0, 0xFA))
    first = hmac.digest(extracted, info + b"\x01", "sha256")
    assert first.hex() == "3cb25f25faacd57a90434f64d0362f2a2d2d0a90cf1a5a4c5db02d56ecc4c5bf"
    key = hmac.digest(hmac.digest(b"atoll/entropy/v1", bytes(32), "sha256"), b"noise\x01", "sha256")
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    block = Cipher(algorithms.AES(key), modes.ECB()).encryptor().update(bytes(15) + b"\x01")
    stream, filled = Keystream(bytes(32), b"noise"), bytearray(1 << 17)
    assert stream.read(0) == b"" and stream.read(40)[16:32] == block
    Keystream(bytes(32), b"noise").fill(memoryview(filled))
    assert filled[40:] == stream.read((1 << 17) - 40)


def test_each_path_and_each_client_has_its_own_stream():
    key = known_entropy(1)
    ids = torch.tensor([4, 9, 2])
    rows = key.of(ids).hash(5)
    assert rows.shape == (3, 5) and rows[1].equal(key.of(torch.tensor([9])).hash(5)[0])
    drawn = [key.bytes(16), key.fold("a").bytes(16), key.fold("a", 0).bytes(16), key.fold(0).bytes(16)]
    drawn += [key.of(ids[k : k + 1])._words(2).numpy().tobytes() for k in range(3)]
    assert len(set(drawn)) == len(drawn)
    assert key.of(ids).normal((2, 3)).shape == (3, 2, 3) and key.of(ids).integers(4, 3).shape == (3, 4)
    assert len(set(key.distinct(50, 60).tolist())) == 50 == len(set(key.distinct(50, 10**6).tolist()))


def test_a_key_carries_its_secret_and_shows_it_in_no_text():
    secret = bytes(range(32))
    key, ids = Key(7, secret=secret), torch.tensor([3, 8])
    derived = key.fold("clients").starts(ids, torch.tensor([0, 1])).select(slice(1, 2)).to(torch.device("cpu"))
    assert derived.entropy.clients.equal(derived.clients) and derived.entropy.path == derived.path
    assert derived.only(0).secret == derived.shared().secret == secret
    other = replace(derived, seed=8)
    assert derived.entropy.hash(3).equal(other.entropy.hash(3)) and not derived.hash(3).equal(other.hash(3))
    for shown in (repr(key), repr(key.entropy), str(key)):
        assert secret.hex() not in shown and repr(secret) not in shown
    assert key == Key(7) and key.fold("x").uniform(3).equal(Key(7).fold("x").uniform(3))


@pytest.mark.parametrize(
    "draw", [lambda: Key(7).entropy, lambda: SecretKey(7).normal(3), lambda: SecretKey(7).bytes(0)]
)
def test_a_round_without_a_secret_has_no_entropy(draw):
    with pytest.raises(UsageError, match="uses_entropy"):
        draw()


def test_ranks_agree_on_the_secret_of_the_first():
    sent = []

    def agree(value):
        sent.append(value)
        return b"\1" * len(value)

    assert round_secret(3, agree) == b"\1" * 32 and len(sent) == 1 and len(sent[0]) == 32
    with entropy_source(known_entropy(1)):
        assert round_secret(3, agree) == round_secret(3, agree) != round_secret(4, agree)
    assert len(sent) == 1


def test_runs_with_known_entropy_are_equal_and_with_that_of_the_system_differ():
    assert theta(1).equal(theta(1)) and not theta(1).equal(theta(2)) and not theta().equal(theta())


def test_a_replay_of_a_part_that_uses_entropy_is_refused():
    from atoll.tools.replay import _refuse_entropy

    _refuse_entropy(Plan(Gradient(), Mean()), "run")
    with pytest.raises(UsageError) as caught:
        _refuse_entropy(PLAN, "run")
    assert "Noise()" in caught.value.given and caught.value.line == "atoll show run"


def test_a_downlink_with_noise_is_refused():
    with pytest.raises(UsageError, match="a codec without noise"):
        Plan(Gradient(), Mean(), downlink=Noise())
