"""Random numbers that must never change: published vectors, and recorded draws."""

import pytest
import torch

from atoll.base.random import Key, mix64, philox

# Random123's known answers for Philox4x32-10: (counter, key) → words.
PHILOX = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), PHILOX)
def test_philox_gives_the_published_words(counter, key, words):
    assert philox(torch.tensor(counter), torch.tensor(key)).tolist() == words


def test_splitmix_gives_the_published_sequence():
    """SplitMix64 from seed 1234567: the finaliser of multiples of its golden-ratio constant."""
    state = torch.tensor([1234567 + k * 0x9E3779B97F4A7C15 & 2**64 - 1 for k in range(1, 4)], dtype=torch.uint64)
    words = [word & 2**64 - 1 for word in mix64(state.view(torch.int64)).tolist()]
    assert words == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("n", [5, 64, 72, 300, 20_000])
def test_bits_of_every_length_are_words_of_philox(n):
    """Short draws are computed by Python integers or NumPy."""
    key = Key(2**63 + 5).fold("cohort", 3)
    blocks, word = torch.arange(-(-n // 4)), key.word()
    counter = torch.stack((blocks, *[torch.zeros_like(blocks)] * 3), -1)
    words = philox(counter, torch.tensor([word & 0xFFFFFFFF, word >> 32]))
    assert torch.equal(key.bits(n), words.flatten()[:n])


def test_draws_stand_still():
    key = Key(7).fold("order", 3)
    assert key.permutation(8).tolist() == FROZEN["permutation"]
    assert key.of(torch.tensor([4, 9])).integers(3, 1000).tolist() == FROZEN["integers"]
    assert key.distinct(4, 10**6).tolist() == FROZEN["distinct"]
    assert key.torch_seed() == FROZEN["seed"]


FROZEN = {
    "permutation": [0, 2, 1, 7, 4, 6, 3, 5],
    "integers": [[261, 932, 316], [640, 50, 932]],
    "distinct": [771093, 786344, 206363, 360069],
    "seed": 1068641617574463658,
}


def test_short_and_long_draws_by_mix64_have_the_same_words():
    key, few = Key(7).of(torch.tensor([3, 1 << 40])), 9
    assert torch.equal(key.hash(few), key.hash(1 << 14)[:, :few])  # NumPy and torch
    state = key.state()[:, None]
    assert torch.equal(key.hash(few), mix64(state + (torch.arange(few) + 1) * (0x9E3779B97F4A7C15 - (1 << 64))))
