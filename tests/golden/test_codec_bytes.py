"""The recorded bytes of small messages: a changed format requires a new version of the wire format."""

import pytest
import torch

from atoll.base.grammar import parse
from atoll.base.random import Key
from atoll.plan.codec.eden import Eden
from atoll.plan.codec.entropy import Entropy
from atoll.plan.codec.feedback import EF21, ErrorFeedback
from atoll.plan.codec.lloyd import lloyd_max
from atoll.plan.codec.lowrank import LowRank
from atoll.plan.codec.pack import pack_bits, pack_index, unpack_bits, unpack_index
from atoll.plan.codec.quantize import Cast, Quantize, Sign
from atoll.plan.codec.rotate import Rotate
from atoll.plan.codec.sparse import RandomK, TopK
from atoll.plan.codec.stage import Identity, flat_layout

PARTS = (Identity, Cast, Quantize, Rotate, Eden, TopK, RandomK, Sign, LowRank, ErrorFeedback, EF21)
NAMES = {part.__name__: part for part in PARTS}
X = torch.tensor([[1.0, -2.0, 0.5, 0.0, 3.0, -0.25, 0.125, -1.5], [0.0, 0.0, 4.0, -4.0, 1.0, 1.0, 1.0, -8.0]])
KEY = Key(7).fold("round", 2).of(torch.tensor([3, 5]))
GOLDEN = {
    "Identity()": [
        "0000803f000000c00000003f0000000000004040000080be0000003e0000c0bf",
        "000000000000000000008040000080c00000803f0000803f0000803f000000c1",
    ],
    "Cast('bf16')": ["803f00c0003f0000404080be003ec0bf", "00000000804080c0803f803f803f00c1"],
    "Cast('fp16')": ["00000039007000f4006c0000007600e8006400f2", "0000003a00000000007000f000680068006800f4"],
    "Cast('fp8')": ["0000803c68f0600074d850ec", "0000803d000068e8585858f0"],
    "Quantize(8)": ["0683c13caa2a947ffe74853f", "0402813d7f7fbf3f8f8f8e00"],
    "Quantize(4, bucket=None)": ["b76ddb3eea628837", "2549923f87877b03"],
    "Quantize(levels=1)": ["00004040320c", "000000412b13"],
    "Quantize(levels=4, norm='l2')": ["bf4a823f75425424", "af321f4054544602"],
    "Rotate()": [
        "52649e3edff5563fd2e6f8beca970a40df3032c0d0e6f8be7c0ca4bfde6b8dbf",
        "cee67840a3b4a9c054641ec0a4b4a940cee678c0e804b5be56641e40f804b53e",
    ],
    "Eden(1)": ["601b355d2d17e8f08cd202404f", "8fc8e84989e35725cc27aa40d6"],
    "Eden(3)": ["601b355d2d17e8f08e24d93f6c8b4a", "8fc8e84989e357252b695740abad82"],
    "Eden(4, block=None)": ["601b355d2d17e8f062b1c53f1d28ab4b", "8fc8e84989e3572589eb6f40952a8da2"],
    "TopK(0.25)": ["0105000000c000004040", "0e0500008040000000c1"],
    "RandomK(0.25)": ["000000c10000003f", "0000000000008040"],
    "Sign()": ["0000863fa2", "0000184088"],
    "TopK(0.25) >> Quantize(8)": ["01050683c13c2afe", "0e050402813dbe00"],
    "Rotate() >> Eden(1)": ["4f2901014af5730b72c0134064", "7383374402f9e852f86fa540d1"],
    "RandomK(0.5) >> Eden(2)": ["4f2901014af5730b171c904000", "7383374402f9e8525988a94089"],
    "ErrorFeedback(TopK(0.25))": ["0105000000c000004040", "0e0500008040000000c1"],
    "EF21(Rotate() >> Quantize(8))": ["9e4bb93c523a7500db769890", "b90a2b3d22feba00dc884376"],
}


@pytest.mark.parametrize("text", GOLDEN)
def test_messages(text):
    codec, layout = parse(text, NAMES), flat_layout(8)
    memory = {n: t.expand(2, -1) for n, t in codec.memory(layout).items()}
    codec = codec.bind(layout)
    payload, side, *_ = codec.encode(X, memory, codec.server(layout), KEY)
    assert [m.hex() for m in codec.to_bytes(payload, side)] == GOLDEN[text]


def test_a_compressed_message_reads_back():
    """Another version of zstd may write other bytes, but it must read these bytes to the same values."""
    sent = [
        "28b52ffd641800fd00006800ffffff00800040c03fc040bf06000112c94ea28e4bb082014b1e0d0e0b4616e72d",
        "28b52ffd641800b501004402c0bf60dfb06fd0bfac23579ca9475ea12b5694ab4f54a12f00800040c03f3f3fc1c140c006003a66a484a5"
        "132f850304379e8231c15a091b",
    ]
    codec = (TopK(0.5) >> Entropy()).bind(flat_layout(128))
    x = X.repeat(1, 16)
    payload, side = codec.from_bytes([bytes.fromhex(one) for one in sent])
    fresh, index, *_ = codec.encode(x, {}, {}, KEY)
    assert torch.equal(payload, fresh) and torch.equal(side["0.index"], index["0.index"])
    assert max(map(len, codec.to_bytes(payload, side))) < codec.nbytes(flat_layout(128)) / 2


def test_codes_lie_in_runs():
    """Byte j of a plane contains codes j, W + j, …; 5 bits are planes of 1 and 4 bits; 5 trits are one byte."""
    codes = torch.arange(10, dtype=torch.int32)
    assert bytes(pack_bits(codes, 4).tolist()).hex() == "5061728394"
    assert bytes(pack_bits(torch.tensor([1, 0, 1, 1], dtype=torch.int32), 1).tolist()).hex() == "0d"
    # The lowest bits are 0 0 0 0 0 and 1 1 1 1 1 in runs of two; the other bits are 8 8 9 9 10 | 10 11 11 12 12.
    assert bytes(pack_bits(codes + 16, 5).tolist()).hex() == "001f" + "a8b8b9c9ca"
    assert bytes(pack_bits(codes + 0x1230, 16).tolist()).hex() == "30313233343536373839" + "12" * 10
    assert pack_bits(torch.tensor([2, 1, 0, 1, 2, 2], dtype=torch.int32), 0).tolist() == [
        2 + 3 * 0 + 9 * 2,
        1 + 3 * 1 + 9 * 2,
    ]


@pytest.mark.parametrize("bits", [0, *range(1, 32)])
@pytest.mark.parametrize("n", [1, 5, 31, 32, 33, 200])
def test_codes_read_back(bits, n):
    high = 3 if bits == 0 else 1 << bits
    codes = Key(n).fold(bits).integers(3 * n, high).to(torch.int32).view(3, n)
    assert torch.equal(unpack_bits(pack_bits(codes, bits), n, bits), codes)


def test_rising_places_lie_as_elias_and_fano_have_them():
    """For k = 3 of d = 1,000: the lowest 8 bits of each position, then a 1 at bit (position ≫ 8) + i."""
    packed = pack_index(torch.tensor([[3, 500, 998]]), 1000)
    # 3, 500 & 255, 998 & 255; ones at 0 + 0, 1 + 1, 3 + 2
    assert bytes(packed[0].tolist()).hex() == "03f4e6" + "25"


@pytest.mark.parametrize("d", [1, 2, 9, 64, 1000, 10**6])
def test_rising_places_read_back(d):
    for k in {1, 2, d // 3, d - 1, d} - {0}:
        if k > min(d, 20_000):
            continue
        index = torch.stack([Key(i).fold(d, k).distinct(k, d).sort().values for i in range(3)])
        assert torch.equal(unpack_index(pack_index(index, d), k, d), index)


def test_centroids_and_errors_of_the_normal_quantiser():
    """They equal the published numbers (Max 1960; EDEN 2022) to the last published digit."""
    table = {
        1: ([0.79788], 0.36338, 0.57080),
        2: ([0.45278, 1.51042], 0.11748, 0.13312),
        3: ([0.24509, 0.75601, 1.34391, 2.15195], 0.03455, 0.03578),
        4: ([0.12840, 0.38805, 0.65676, 0.94234, 1.25623, 1.61805, 2.06902, 2.73259], 0.009501, 0.009592),
        5: (None, 0.002505, 0.002511),
        6: (None, 0.000644, 0.000645),
    }
    for bits, (centroids, error, unbiased) in table.items():
        best = lloyd_max(bits)
        assert len(best.centroids) == 1 << bits - 1 and len(best.thresholds) == len(best.centroids) - 1
        if centroids:
            assert list(best.centroids) == pytest.approx(centroids, abs=6e-6)
        assert best.error == pytest.approx(error, abs=6e-6 if bits < 4 else 6e-7)
        assert best.error / (1 - best.error) == pytest.approx(unbiased, abs=6e-6 if bits < 4 else 6e-7)


@pytest.mark.parametrize("bits", range(1, 9))
def test_centroids_are_means_of_their_cells(bits):
    """The optimality conditions hold, checked by an independent integral."""
    best = lloyd_max(bits)
    edges = [0.0, *best.thresholds, 9.0]
    for i, c in enumerate(best.centroids):
        z = torch.linspace(edges[i], edges[i + 1], 2001, dtype=torch.float64)
        density = torch.exp(-z * z / 2)
        mean = torch.trapezoid(z * density, z) / torch.trapezoid(density, z)
        assert c == pytest.approx(float(mean), abs=2e-5 if edges[i + 1] == 9.0 else 3e-6)
    for t, (a, b) in zip(best.thresholds, zip(best.centroids, best.centroids[1:], strict=False), strict=True):
        assert t == pytest.approx((a + b) / 2, abs=2e-6)
