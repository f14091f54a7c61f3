"""The laws of codecs, for any vector: every codec of a table satisfies every law of a list."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quick_cases import by_turns, one_in, only
from torch import Tensor

from atoll.base.errors import RunError, UsageError
from atoll.base.grammar import parse
from atoll.base.random import Key
from atoll.plan.codec.eden import Eden
from atoll.plan.codec.entropy import Entropy
from atoll.plan.codec.feedback import EF21, ErrorFeedback
from atoll.plan.codec.lowrank import LowRank
from atoll.plan.codec.quantize import Cast, Quantize, Sign
from atoll.plan.codec.rotate import Rotate
from atoll.plan.codec.sparse import RandomK, TopK, largest, magnitude
from atoll.plan.codec.stage import Chain, Codec, Identity, flat_layout, roundtrip
from atoll.plan.form import MessageError
from atoll.plan.protocols import Total
from atoll.testing import round_info

PARTS = (Identity, Cast, Quantize, Rotate, Eden, TopK, RandomK, Sign, LowRank, Entropy, ErrorFeedback, EF21)
NAMES = {part.__name__: part for part in PARTS}
PLAIN = [
    Identity(),
    Cast("bf16"),
    Cast("fp16"),
    Cast("fp8"),
    Quantize(8),
    Quantize(3, bucket=64),
    Quantize(16),
    Quantize(levels=1),
    Quantize(levels=10),
    Quantize(4, bucket=None),
    Quantize(levels=256, bucket=None, norm="l2"),
    Rotate(),
    Rotate(None),
    Rotate(64),
    Eden(1),
    Eden(3),
    Eden(8, block=256),
    Eden(4, block=None),
    TopK(0.1),
    TopK(0.001),
    TopK(1.0),
    RandomK(0.1),
    RandomK(0.3, unbiased=False),
    Sign(),
    LowRank(2),
    Entropy(),
]
CHAINS = [
    TopK(0.01) >> Quantize(8),
    RandomK(0.25) >> Eden(1),
    Rotate() >> Quantize(4),
    Rotate() >> RandomK(0.5) >> Quantize(8),
    TopK(0.1) >> Eden(2),
    ErrorFeedback(TopK(0.05) >> Cast("bf16")),
    ErrorFeedback(Rotate() >> Sign()),
    ErrorFeedback(TopK(0.1)) >> Quantize(8),
    EF21(TopK(0.1)),
    EF21(RandomK(0.1, unbiased=False)),
    ErrorFeedback(LowRank(1)),
    TopK(0.1) >> Quantize(8) >> Entropy(),
    ErrorFeedback(Rotate() >> Quantize(6) >> Entropy(19)),
    EF21(TopK(0.1)) >> Entropy(1),
]
EVERY = pytest.mark.parametrize("codec", PLAIN + CHAINS, ids=repr)
SOME = pytest.mark.parametrize("codec", one_in(3, CHAINS + PLAIN), ids=repr)


def draw(k: int, d: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Key]:
    """Normal numbers for k clients, and the clients' key."""
    key = Key(seed).fold("round", 3).of(torch.arange(k) + 10)
    return key.fold("x").normal(d, dtype), key.fold("codec")


def start(codec: Codec, d: int, k: int, dtype: torch.dtype = torch.float32) -> tuple:
    """(the bound codec, first memories, first server state)."""
    layout = flat_layout(d, dtype)
    memory = {n: t.expand(k, *t.shape) for n, t in codec.memory(layout).items()}
    return codec.bind(layout, k), memory, codec.server(layout)


def send(codec: Codec, x: Tensor, key: Key, memory=None) -> Tensor:
    """Send each row by itself and return the decoded vectors."""
    codec, zero, shared = start(codec, x.shape[-1], len(x), x.dtype)
    payload, side, *_ = codec.encode(x, memory or zero, shared, key)
    return roundtrip(codec, payload, side, key)


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


# ---- messages


LENGTHS = [*itertools.product([1, 2, 7, 513, 5000, 66_000, 140_001], [torch.float64, torch.float32])]


@pytest.mark.parametrize("case", only([*LENGTHS[:10:6], LENGTHS[9]], LENGTHS), ids=str)
def test_a_message_is_as_long_as_its_form_and_reads_back(case):
    d, dtype = case
    for codec in PLAIN + CHAINS:
        for k in (1, 3) if d < 1000 else (2,):
            x, key = draw(k, d, dtype)
            before = x.clone()
            placed, memory, shared = start(codec, d, k, dtype)
            payload, side, _, after = placed.encode(x, memory, shared, key)
            assert same(x, before), f"{codec} changed its input"
            size = codec.nbytes(flat_layout(d, dtype))
            assert sum(t.numel() * t.element_size() for t in (payload, *side.values())) == k * size
            messages = placed.to_bytes(payload, side)
            assert [len(m) for m in messages] == placed.sizes(payload, side).tolist()
            assert all(len(m) <= size if placed.compressor else len(m) == size for m in messages)
            again, sides = placed.from_bytes(messages)
            assert same(payload, again) and side.keys() == sides.keys()
            assert all(same(side[n], sides[n]) for n in side)
            opened = placed.decode(payload, side)
            assert same(opened, placed.decode(again, sides))
            decoded = placed.decode_sum(opened, key)
            assert decoded.shape == x.shape and decoded.dtype == dtype and decoded.isfinite().all(), codec
            assert after.keys() == memory.keys() and all(after[n].shape == memory[n].shape for n in after)


@EVERY
def test_messages_of_another_length_are_refused(codec):
    codec, memory, shared = start(codec, 1000, 1)
    x, key = draw(1, 1000)
    payload, side, *_ = codec.encode(x, memory, shared, key)
    (good,) = codec.to_bytes(payload, side)
    for bad in (b"", good[:-1], good + b"\0", good * 2, b"\0" * 2**16):
        with pytest.raises(MessageError, match="bytes"):
            codec.from_bytes([good, bad])


@SOME
def test_an_altered_message_is_refused_or_decodes_to_its_fields(codec):
    """Any bytes of the right length decode to a message that encodes to the same bytes, or they are refused."""
    x, key = draw(1, 70)
    codec, memory, shared = start(codec, 70, 1)
    payload, side, *_ = codec.encode(x, memory, shared, key)
    (good,) = codec.to_bytes(payload, side)
    refused = 0
    for i in range(24):
        draws = Key(i).fold("corrupt").integers(3, 1 << 30).tolist()
        bad = bytearray(good)
        if i % 3:
            bad[draws[0] % len(bad)] ^= 1 << draws[1] % 8
        else:
            bad = bytearray(Key(i).fold("noise").integers(len(good), 256).tolist())
        try:
            read = codec.from_bytes([bytes(bad)])
        except MessageError as error:
            assert "Message 0" in str(error)
            refused += 1
            continue
        # A frame has one or two unused bits. With a checksum any accepted message is the one that was sent.
        assert codec.to_bytes(*read) == [
            good if codec.compressor and len(good) < codec.nbytes(flat_layout(70)) else bytes(bad)
        ]
        assert codec.decode_sum(codec.decode(*read), key).shape == x.shape
    assert refused or not side


def test_hostile_fields_are_refused_by_name():
    x, key = draw(2, 70)
    for codec, name, value, message in (
        (Quantize(8), "step", math.nan, "step is not finite"),
        (Quantize(8), "step", -1.0, "a step is negative"),
        (Eden(2), "scale", -1.0, "a scale is negative"),
        (Eden(2), "scale", math.inf, "scale is not finite"),
        (Sign(), "scale", -1.0, "the scale is negative"),
        (Cast("fp8"), "scale", 0.0, "the scale is not positive"),
        (TopK(0.1), "index", 255, "the positions are not 7 different numbers below 70"),
        (TopK(0.1), "index", 0, "the positions are not 7 different numbers below 70"),
    ):
        codec, _, _ = start(codec, 70, 2)
        payload, side, *_ = codec.encode(x, {}, {}, key)
        side[name][1, :] = value
        with pytest.raises(MessageError, match=f"Message 1: {message}"):
            codec.from_bytes(codec.to_bytes(payload, side))
    for codec, spoil, message in (
        (Quantize(levels=4), lambda p: p | 240, "Message 0: a code is above 8"),
        (Quantize(levels=1), lambda p: p * 0 + 243, "Message 0: bits after the last code are set"),
        (Eden(1), lambda p: p | 128, "Message 0: bits after the last code are set"),
    ):
        codec, _, _ = start(codec, 70, 2)
        payload, side, *_ = codec.encode(x, {}, {}, key)
        with pytest.raises(MessageError, match=message):
            codec.from_bytes(codec.to_bytes(spoil(payload), side))


# ---- lanes


@pytest.mark.parametrize(("codec", "d"), one_in(4, by_turns(PLAIN + CHAINS, [70_000, 1000])))
def test_a_lane_depends_on_its_own_client_alone(codec, d):
    x, key = draw(5, d)
    codec, memory, shared = start(codec, d, 5)
    memory = {n: key.fold(n).normal(d, torch.float32) for n in memory}

    def run(rows):
        mine, own = key.select(rows), {n: t[rows] for n, t in memory.items()}
        payload, side, sums, after = codec.encode(x[rows], own, shared, mine)
        opened = codec.decode(payload, side)
        return [payload, *side.values(), *sums.values(), *after.values(), opened, codec.decode_sum(opened, mine)]

    together = run(torch.arange(5))
    for rows in (torch.tensor([3]), torch.tensor([4, 1]), torch.arange(4, -1, -1)):
        assert all(same(a[rows], b) for a, b in zip(together, run(rows), strict=True))


@SOME
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_arrives_and_changes_no_other(codec, bad):
    x, key = draw(3, 3000)
    clean = send(codec, x, key)
    x[1, 1234] = bad
    dirty = send(codec, x, key)
    assert not dirty[1].isfinite().all()
    assert same(clean[[0, 2]], dirty[[0, 2]])


@EVERY
def test_zero_arrives_as_zero(codec):
    _, key = draw(2, 3000)
    assert not send(codec, torch.zeros(2, 3000), key).any()


@SOME
@pytest.mark.parametrize("power", [-60, 60])
def test_scaling_by_a_power_of_two_scales_the_decoded_update(codec, power):
    x, key = draw(2, 3000)
    assert same(
        send(codec, torch.ldexp(x, torch.tensor(power)), key), torch.ldexp(send(codec, x, key), torch.tensor(power))
    )


@EVERY
def test_decoding_is_linear_and_the_same_for_all(codec):
    x, key = draw(3, 5000, torch.float64)
    codec, memory, shared = start(codec, 5000, 3, torch.float64)
    payload, side, *_ = codec.encode(x, memory, shared, key)
    opened = codec.decode(payload, side)
    weights = torch.tensor([[1.0], [5.0], [0.5]], dtype=torch.float64)
    sum_first = codec.decode_sum((weights * opened).sum(0), key.shared())
    sum_last = (weights * codec.decode_sum(opened, key)).sum(0)
    assert sum_first.shape == (5000,)
    torch.testing.assert_close(sum_first, sum_last, rtol=0, atol=1e-12)


@pytest.mark.slow  # tests/identities/test_device.py runs every codec
@EVERY
def test_parts_run_on_any_device(codec):
    """On the `meta` device no number can be read, so a part that leaves its device fails here."""
    key = Key(0).of(torch.arange(2))
    codec, memory, shared = start(codec, 70_000, 2)
    memory, shared = ({n: t.to("meta") for n, t in table.items()} for table in (memory, shared))
    payload, side, *_ = codec.encode(torch.empty(2, 70_000, device="meta"), memory, shared, key)
    opened = codec.decode(payload, side)
    assert codec.decode_sum(opened, key).shape == (2, 70_000)
    assert payload.is_meta and all(t.is_meta for t in side.values())


# ---- values and grammar


@EVERY
def test_a_codec_prints_as_its_constructor(codec):
    again = parse(repr(codec), NAMES)
    assert again == codec and repr(again) == repr(codec) and hash(again) == hash(codec)


REFUSED = [
    ("Cast('fp4')", "one of 'bf16', 'fp16', 'fp8'"),
    ("Quantize()", "either bits or levels"),
    ("Quantize(8, levels=3)", "either bits or levels"),
    ("Quantize(1)", "2 to 16 bits"),
    ("Quantize(17)", "2 to 16 bits"),
    ("Quantize(3.5)", "2 to 16 bits"),
    ("Quantize(True)", "2 to 16 bits"),
    ("Quantize(levels=0)", "1 to 32,767 levels"),
    ("Quantize(8, bucket=100)", "a power of two"),
    ("Quantize(8, bucket=131072)", "a power of two"),
    ("Quantize(8, norm='l1')", "'max', 'l2'"),
    ("Rotate(0)", "a power of two"),
    ("Rotate(1000)", "a power of two"),
    ("Eden(0)", "1 to 8 bits"),
    ("Eden(9)", "1 to 8 bits"),
    ("Eden(0.5)", "1 to 8 bits"),
    ("Eden(4, block=1000)", "a power of two"),
    ("TopK(0)", "0 < fraction ≤ 1"),
    ("TopK(1.5)", "0 < fraction ≤ 1"),
    ("TopK(-0.1)", "0 < fraction ≤ 1"),
    ("TopK('all')", "0 < fraction ≤ 1"),
    ("RandomK(2)", "0 < fraction ≤ 1"),
    ("LowRank(0)", "a rank ≥ 1"),
    ("LowRank(1.5)", "a rank ≥ 1"),
    ("Entropy(0)", "a level of zstd"),
    ("Entropy(23)", "a level of zstd"),
    ("Entropy(3.0)", "a level of zstd"),
    ("ErrorFeedback(3)", "a codec"),
    ("EF21('TopK')", "a codec"),
    ("ErrorFeedback(RandomK(0.1))", "whose error is less than its input"),
    ("ErrorFeedback(TopK(0.1) >> Quantize(levels=1))", "whose error is less than its input"),
    ("EF21(Quantize(4))", "whose error is less than its input"),
    ("EF21(Quantize(8, bucket=None))", "whose error is less than its input"),
    ("ErrorFeedback(ErrorFeedback(TopK(0.1)))", "without a memory of its own"),
    ("EF21(ErrorFeedback(TopK(0.1)))", "without a memory of its own"),
    ("TopK(0.1) >> Rotate()", "stages with per_sum before stages with per_message"),
    ("TopK(0.1) >> RandomK(0.1)", "stages with per_sum before stages with per_message"),
    ("ErrorFeedback(TopK(0.1)) >> RandomK(0.5)", "stages with per_sum before stages with per_message"),
    ("Quantize(8) >> TopK(0.1)", "a stage that packs at the end"),
    ("Eden(2) >> Rotate()", "a stage that packs at the end"),
    ("Quantize(8) >> Sign()", "a stage that packs at the end"),
    ("Entropy() >> Quantize(8)", "a stage that packs at the end"),
    ("Entropy() >> Entropy()", "a stage that packs at the end"),
    ("ErrorFeedback(TopK(0.1) >> Entropy()) >> Quantize(8)", "a stage that packs at the end"),
    ("ErrorFeedback(TopK(0.1) >> Entropy()) >> Entropy()", "a stage that packs at the end"),
    ("Entropy() >> ErrorFeedback(TopK(0.1))", "before any stage that changes coordinates"),
    ("ErrorFeedback(Quantize(8)) >> TopK(0.1)", "a stage that packs at the end"),
    ("Rotate() >> ErrorFeedback(TopK(0.1))", "ErrorFeedback before any stage that changes coordinates"),
    ("RandomK(0.1) >> EF21(TopK(0.1))", "EF21 before any stage that changes coordinates"),
    ("TopK(0.1) >> LowRank(2)", "LowRank before any stage that changes coordinates"),
    ("ErrorFeedback(TopK(0.1)) >> ErrorFeedback(Sign())", "ErrorFeedback before any stage that changes coordinates"),
    (
        "ErrorFeedback(RandomK(0.1, unbiased=False) >> EF21(TopK(0.1)))",
        "EF21 before any stage that changes coordinates",
    ),
]


@pytest.mark.parametrize(("text", "required"), REFUSED, ids=[text for text, _ in REFUSED])
def test_invalid_settings_are_refused_with_a_line_that_works(text, required):
    with pytest.raises(UsageError) as caught:
        parse(text, NAMES)
    assert required in str(caught.value)
    instead = parse(caught.value.line, NAMES)
    assert isinstance(instead, Codec)
    x, key = draw(2, 300)
    assert send(instead, x, key).shape == x.shape


@EVERY
def test_an_unbound_codec_names_the_call_of_bind_that_it_needs(codec):
    x, key = draw(2, 300)
    layout = flat_layout(300)
    placed, memory, shared = start(codec, 300, 2)
    payload, side, *_ = placed.encode(x, memory, shared, key)
    for ask in (lambda c: c.to_bytes(payload, side), lambda c: c.from_bytes(placed.to_bytes(payload, side))):
        with pytest.raises(RunError, match="has no layout") as caught:
            ask(codec)
        assert caught.value.line == "codec.bind(layout)"
        ask(codec.bind(layout))
    assert codec.bind(layout) == codec and hash(codec.bind(layout)) == hash(codec)


def test_ef21_without_the_total_weight_names_the_call_of_bind_that_it_needs():
    codec, layout, total_weight = EF21(TopK(0.1)), flat_layout(10), 3
    total = Total({"update": torch.zeros(10)}, {}, torch.tensor(1), torch.tensor(1), {})
    with pytest.raises(RunError, match="has no total weight of all clients") as caught:
        codec.bind(layout).server_update(total, codec.server(layout), round_info(), Key(0))
    assert caught.value.line == "codec.bind(layout, total_weight)"
    codec.bind(layout, total_weight).server_update(total, codec.server(layout), round_info(), Key(0))


@pytest.mark.parametrize("codec", [Entropy(), TopK(0.1) >> Entropy(), LowRank(1), ErrorFeedback(Eden(1))], ids=repr)
def test_a_shortened_message_is_refused(codec):
    x, key = draw(1, 70)
    codec, memory, shared = start(codec, 70, 1)
    (good,) = codec.to_bytes(*codec.encode(x, memory, shared, key)[:2])
    for n in range(len(good)):
        with pytest.raises(MessageError, match="Message 0"):
            codec.from_bytes([good[:n]])


def test_a_chain_of_nothing_but_stages_is_refused_otherwise():
    with pytest.raises(UsageError, match="a stage"):
        Chain((Identity(), 3))


# ---- single codecs


def test_rotation_keeps_length_and_comes_back():
    for d in (1, 2, 3, 5, 100, 4095, 4096, 4097, 65_537, 131_071):
        for block in (None, 2, 64, 4096, 65_536):
            x, key = draw(2, d)
            y, *_ = Rotate(block).encode(x, {}, {}, key)
            back = Rotate(block).decode_sum(y, key)
            assert (back - x).norm() <= 1e-6 * x.norm()
            assert abs(y.double().norm() / x.double().norm() - 1) < 1e-6
            products = (y.double()[0] @ y.double()[1], x.double()[0] @ x.double()[1])
            assert abs(products[0] - products[1]) <= 1e-5 * x.double().norm() ** 2 / 2


def test_rotation_makes_a_hard_vector_normal():
    """A vector with one large number in fifty: the rotation gives kurtosis 3 and the block's size everywhere."""
    d = 1 << 17
    x = torch.full((1, d), 1e-3)
    x[0, Key(6).permutation(d)[: d // 50]] = 1.0
    y, *_ = Rotate().encode(x, {}, {}, Key(5))
    z = y / x.norm() * d**0.5
    assert abs(z.pow(4).mean() - 3) < 0.15
    assert z.abs().max() < 7


@given(st.data())
def test_top_k_is_exact_and_takes_the_earliest_of_equals(data):
    d = data.draw(st.integers(1, 200))
    k = data.draw(st.integers(1, d))
    numbers = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, -3.0, 1e-40, 1e30])
    x = torch.tensor([data.draw(st.lists(numbers, min_size=d, max_size=d))])
    expected = sorted(sorted(range(d), key=lambda j: (-abs(x[0, j].item()), j))[:k])
    assert largest(x, k, magnitude)[0].tolist() == expected


@pytest.mark.parametrize(("share", "d"), by_turns([0.0, 0.001, 0.1, 0.99999, 1.0], [5_000, 70_000, 1_200_000]))
def test_top_k_by_sample_is_top_k(share, d):
    x, _ = draw(2, d)
    k = max(1, int(share * d))
    x[0, ::7] = 0.25  # many equal numbers
    x[1] = torch.where(torch.arange(d) % 16 == 1, 100.0 + x[1], 0.0)  # numbers that a regular sample may miss
    for row in x:
        order = torch.sort(row.abs(), descending=True, stable=True).indices[:k].sort().values
        assert torch.equal(largest(row[None], k, magnitude)[0], order)


def test_top_k_keeps_the_tail_energy_out():
    x, key = draw(3, 20_000)
    tail = x.square().sort(-1).values[:, :18_000].double().sum(-1)
    error = (send(TopK(0.1), x, key) - x).double().square().sum(-1)
    torch.testing.assert_close(error, tail, rtol=1e-5, atol=0)
    assert (tail <= (1 - 0.1) * x.double().square().sum(-1)).all()


def test_sign_has_the_error_of_its_identity():
    x, key = draw(3, 70_000)
    x = x.double()
    error = (send(Sign(), x, key) - x).square().sum(-1) / x.square().sum(-1)
    torch.testing.assert_close(error, 1 - x.abs().sum(-1) ** 2 / (70_000 * x.square().sum(-1)), rtol=0, atol=1e-12)


@given(st.integers(1, 3000), st.floats(0.001, 1.0), st.integers(0, 999))
def test_random_k_keeps_one_of_each_stretch_of_a_circle(d, fraction, seed):
    k = max(1, round(fraction * d))
    kept = RandomK(fraction).support(Key(seed), d, torch.device("cpu"))
    steps = (kept - kept.roll(1)) % d
    assert len(kept) == k == len(kept.unique()) and int(kept.min()) >= 0 and int(kept.max()) < d
    assert int(steps.max()) < 2 * -(-d // k) and int((kept.diff() < 0).sum()) <= 1


@pytest.mark.slow
@pytest.mark.parametrize("fraction", only([0.1], [0.1, 0.5]))
def test_random_k_has_error_d_over_k_minus_one_on_average_over_all_supports(fraction):
    d, rounds = 200, 500
    x = torch.randn(1, d, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    codec, errors, counts = RandomK(fraction), [], torch.zeros(d)
    for r in range(rounds):
        key = Key(r)
        errors.append((send(codec, x, key) - x).square().sum() / x.square().sum())
        counts[codec.support(key, d, x.device)] += 1
    errors = torch.stack(errors)
    # 4.9 standard errors: one false alarm in 10⁶.
    assert abs(errors.mean() - (1 / fraction - 1)) < 4.9 * errors.std() / rounds**0.5 + 1e-12
    z = (counts - rounds * fraction) / (rounds * fraction * (1 - fraction)) ** 0.5
    assert z.abs().max() < 5.5  # 200 counts: one false alarm in 10⁵


def test_random_k_is_one_support_for_all_clients_of_a_round():
    x, key = draw(4, 1000)
    codec, _, _ = start(RandomK(0.1), 1000, 4)
    payload, side, *_ = codec.encode(x, {}, {}, key)
    assert not side and payload.shape == (4, 100)
    summed = codec.decode_sum(payload.double().sum(0), key.shared())
    alone = codec.decode_sum(payload.double(), key).sum(0)
    assert torch.equal(summed, alone) and (summed != 0).sum() == 100
    assert not torch.equal(summed != 0, codec.decode_sum(payload.double().sum(0), key.fold(1)) != 0)


def test_ternary_sends_three_values():
    x, key = draw(2, 512)
    rows, top = send(Quantize(levels=1), x, key).abs(), x.abs().amax(-1, keepdim=True)
    assert ((rows == 0) | (rows == top)).all() and (rows == 0).any()


@pytest.mark.parametrize("norm", ["max", "l2"])
@pytest.mark.parametrize("levels", [1, 2, 7, 15])
def test_codecs_under_error_feedback_are_contractions(levels, norm):
    """The worst vector for rounding: one number of full size among many of a fraction f of a step."""
    tame = Quantize(levels=levels, bucket=1024, norm=norm).contraction()
    if not isinstance(tame, Quantize):
        assert levels == 1
        return
    n = tame.bucket
    for f in torch.linspace(0.02, 0.98, 25).tolist():
        x = torch.full((64, n), float(f))
        if norm == "max":
            x[:, 0] = levels
        else:
            x *= min(1.0, levels / (f * n**0.5))
            x[:, 0] = (levels**2 - x[0, 1:].square().sum()).clamp(min=0).sqrt()
        key = Key(3).of(torch.arange(64))
        error = (send(tame, x, key) - x).square().sum(-1).mean() / x[0].square().sum()
        assert error < 1, f


# ---- without bias

UNBIASED = [
    Quantize(8),
    Quantize(3, bucket=64),
    Quantize(levels=1),
    Quantize(levels=16, norm="l2"),
    Rotate() >> Quantize(4),
    Eden(1),
    Eden(2),
    Eden(4),
    Eden(2, block=None),
]


@pytest.mark.parametrize(("codec", "kind"), by_turns(UNBIASED, ["normal", "log-normal"]), ids=repr)
def test_mean_of_many_draws_is_the_vector(codec, kind):
    """The error of 800 clients with one vector, along that vector and 29 random directions: each mean is normal.

    The largest of 30 exceeds 5.4 standard errors once in 500,000 tests.
    """
    clients, d = 800, 3000
    row = Key(2).fold(kind).normal(d, torch.float32)
    x = (row if kind == "normal" else row.exp() * row.roll(1).sign()).expand(clients, d)
    error = (send(codec, x, Key(4).of(torch.arange(clients))) - x).double()
    directions = Key(3).normal(29 * d).view(29, d)
    directions = torch.cat((directions, x[:1].double() / x[0].std()))
    along = error @ directions.T
    z = along.mean(0) / (along.std(0) / clients**0.5).clamp(min=1e-6 * x[0].norm())
    assert z.abs().max() < 5.4


def test_random_k_has_no_bias_over_rounds():
    d, rounds = 300, 500
    x = Key(2).normal(d)[None]
    key = Key(5).of(torch.arange(1))
    error = torch.cat([send(RandomK(0.2), x, key.fold(r)) - x for r in range(rounds)])
    z = error.mean(0) / (error.std(0) / rounds**0.5)
    assert z.abs().max() < 5.4


def test_a_vector_of_few_numbers_stays_biased_behind_a_hadamard_rotation():
    """The documented limit of Eden, and a codec without this limit on the same vector."""
    x = torch.zeros(400, 4096)
    x[:, 7], x[:, 99] = 1.0, 0.5
    key = Key(1).of(torch.arange(400))
    assert abs(send(Eden(1), x, key)[:, 99].mean() - 0.5) > 0.2
    assert abs(send(Quantize(8), x, key)[:, 99].mean() - 0.5) < 1e-3
