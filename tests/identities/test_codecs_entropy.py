"""Entropy coding changes only the number of bytes, and a decoder bounds the output before it decompresses."""

import importlib
import re
import sys
import tomllib
from itertools import product
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atoll.base.errors import UsageError
from atoll.base.random import Key
from atoll.plan.codec import entropy
from atoll.plan.codec.eden import Eden
from atoll.plan.codec.entropy import Entropy
from atoll.plan.codec.feedback import EF21, ErrorFeedback
from atoll.plan.codec.quantize import Cast, Quantize, Sign
from atoll.plan.codec.rotate import Rotate
from atoll.plan.codec.sparse import RandomK, TopK
from atoll.plan.codec.stage import Chain, Codec, Identity, flat_layout, roundtrip
from atoll.plan.form import MessageError

zstd = importlib.import_module("compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd")

PLAIN = [
    Identity(),
    Cast("bf16"),
    Quantize(8),
    Quantize(levels=15, norm="l2"),
    Eden(3),
    Sign(),
    TopK(0.1),
    TopK(0.01) >> Quantize(8),
    RandomK(0.2),
    Rotate() >> Quantize(4),
    ErrorFeedback(TopK(0.1)),
    EF21(TopK(0.1) >> Cast("fp16")),
]
EACH = pytest.mark.parametrize("codec", PLAIN, ids=repr)


def encoded(codec: Codec, d: int, k: int = 3, seed: int = 0) -> tuple:
    """(the bound codec, payload, side, decoded vectors) of normal updates."""
    layout, key = flat_layout(d), Key(seed).fold("codec").of(torch.arange(k))
    codec = codec.bind(layout, k)
    x = key.fold("x").normal(d, torch.float32)
    memory = {n: t.expand(k, -1) for n, t in codec.memory(layout).items()}
    payload, side, _, after = codec.encode(x, memory, codec.server(layout), key)
    return codec, payload, side, [roundtrip(codec, payload, side, key), *after.values()]


def bits(codec: Codec, d: int) -> float:
    codec, payload, side, _ = encoded(codec, d, 1)
    return 8 * int(codec.sizes(payload, side)) / d


@EACH
@given(st.integers(1, 300), st.integers(0, 99))
@settings(max_examples=8)
def test_numbers_are_as_without(codec, d, seed):
    # A chain of one stage has the same draws as that stage followed by another.
    plain, _, _, numbers = encoded(codec if isinstance(codec, Chain) else Chain((codec,)), d, seed=seed)
    placed, payload, side, same = encoded(codec >> Entropy(), d, seed=seed)
    assert all(torch.equal(a, b) for a, b in zip(numbers, same, strict=True))
    messages = placed.to_bytes(payload, side)
    again = placed.from_bytes(messages)
    assert placed.to_bytes(*again) == messages
    assert torch.equal(placed.decode(*again), placed.decode(payload, side))
    assert placed.sizes(payload, side).tolist() == [len(m) for m in messages]
    assert placed.nbytes(flat_layout(d)) == plain.nbytes(flat_layout(d)) >= max(map(len, messages))


@pytest.mark.parametrize(
    ("codec", "entropy"),
    [(Eden(b), h) for b, h in {1: 1.0, 2: 1.911, 3: 2.825, 4: 3.765, 5: 4.730, 6: 5.710}.items()],
    ids=repr,
)
def test_codes_take_their_entropy(codec, entropy):
    """The published entropies of the normal quantizer. Scales take .009 bits each; whole bits waste 1 of 40."""
    assert entropy <= bits(codec >> Entropy(), 200_000) < 1.026 * entropy + 0.009


@pytest.mark.parametrize(
    ("codec", "share"),
    [
        (Identity(), 0.88),
        (Cast("bf16"), 0.77),
        (Quantize(4, norm="l2"), 0.38),
        (Quantize(levels=1), 0.72),
        (TopK(0.1), 0.91),
        (TopK(0.01) >> Quantize(8), 0.985),
    ],
    ids=repr,
)
def test_messages_shrink(codec, share):
    """The limits were measured on 200,000 normal numbers and rounded up."""
    assert bits(codec >> Entropy(), 200_000) < share * bits(codec, 200_000)


def test_incompressible_values_are_sent_as_they_are():
    codec, payload, side, _ = encoded(Sign() >> Entropy(), 4096)
    plain = Chain((Sign(),)).bind(flat_layout(4096))
    assert codec.to_bytes(payload, side) == plain.to_bytes(payload, side)


def test_lengths_differ_by_client():
    d, key = 20_000, Key(0).of(torch.arange(3))
    codec = (Quantize(8) >> Entropy()).bind(flat_layout(d))
    x = torch.stack((torch.zeros(d), torch.ones(d), key.shared().normal(d, torch.float32)))
    payload, side, *_ = codec.encode(x, {}, {}, key)
    sizes = codec.sizes(payload, side).tolist()
    assert sizes[0] < sizes[1] < 100 < 18_000 < sizes[2] <= codec.nbytes(flat_layout(d))


def test_a_level_is_only_a_matter_of_size():
    quick, *sent, _ = encoded(Identity() >> Entropy(1), 5000)
    small = (Identity() >> Entropy(22)).bind(flat_layout(5000))
    assert quick.to_bytes(*sent) != small.to_bytes(*sent)
    assert torch.equal(quick.from_bytes(small.to_bytes(*sent))[0], sent[0])


# ---- hostile messages


def frame(data: bytes, **options: int) -> bytes:
    return zstd.compress(data, options={zstd.CompressionParameter[n]: v for n, v in options.items()})


def hostile(n: int) -> dict[str, bytes]:
    """Invalid messages for a codec whose layout has n bytes."""
    good = frame(bytes(n), checksum_flag=1)
    stream = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: 27})
    wide = stream.compress(bytes(n)) + stream.flush()  # unknown length: a decoder would allocate the window
    return {
        "empty": b"",
        "no frame": b"\1" * 20,
        "half": good[: len(good) // 2],
        "no end": good[:-1],
        "checksum": good[:-1] + bytes([good[-1] ^ 1]),
        "more behind": good + b"\0",
        "two frames": good + good,
        "one byte less": frame(bytes(n - 1)),
        "one byte more": frame(bytes(n + 1)),
        "bomb": frame(bytes(1 << 26)),
        "window": wide,
        "skippable": b"\x50\x2a\x4d\x18\4\0\0\0abcd",
    }


HOSTILE = list(hostile(1000))


@pytest.mark.parametrize(("codec", "name"), [*product([Identity(), TopK(0.1) >> Quantize(8)], HOSTILE)], ids=str)
def test_hostile_messages_are_refused(codec, name):
    codec, payload, side, _ = encoded(codec >> Entropy(), 50_000, 1)
    good = codec.to_bytes(payload, side)[0]
    bad = hostile(codec.nbytes(flat_layout(50_000)))[name]
    with pytest.raises(MessageError, match=r"Message 1\b"):
        codec.from_bytes([good, bad])


def test_a_bomb_is_not_unpacked(monkeypatch):
    """The decoder does not allocate the length that the header of a frame of a few bytes states."""
    asked = []

    class Opener:
        def __init__(self, options):
            self.inner = zstd.ZstdDecompressor(options=options)

        def decompress(self, data, max_length):
            out = self.inner.decompress(data, max_length=max_length)
            asked.append((max_length, len(out)))
            return out

    monkeypatch.setattr(entropy, "_zstd", lambda: type("zstd", (), {**vars(zstd), "ZstdDecompressor": Opener}))
    codec = (Sign() >> Entropy()).bind(flat_layout(80_000))
    plain = codec.nbytes(flat_layout(80_000))
    with pytest.raises(MessageError):
        codec.from_bytes([frame(bytes(1 << 28), window_log=10)])
    assert not asked  # longer than any message
    with pytest.raises(MessageError, match=f"more than {plain} bytes"):
        codec.from_bytes([frame(bytes(1 << 20), window_log=10)])
    assert asked == [(plain + 1, plain + 1)]


@settings(max_examples=4 * settings().max_examples)
@given(st.binary(max_size=400), st.booleans())
def test_any_bytes_are_refused_or_are_a_message(data, framed):
    codec = (TopK(0.5) >> Entropy()).bind(flat_layout(100))
    try:
        payload, side = codec.from_bytes([frame(data) if framed else data])
    except MessageError:
        return
    assert codec.decode(payload, side).shape == (1, 100)


# ---- without the extra


def test_without_the_extra_the_error_names_the_install_line(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(entropy.importlib, "import_module", missing)
    with pytest.raises(UsageError, match=r"the extra atoll\[zstd\]") as caught:
        (TopK(0.1) >> Entropy()).bind(flat_layout(10))
    name, extra = re.fullmatch(r"pip install '(\w+)\[(\w+)\]'", caught.value.line).groups()
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["name"] == name
    assert any(need.startswith("backports.zstd") for need in project["optional-dependencies"][extra])
