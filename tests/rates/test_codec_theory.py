"""Each codec has its theoretical error on normal, log-normal and real updates."""

import math
from functools import lru_cache

import pytest
import torch
from quick_cases import one_in, only
from torch import Tensor, nn

from atoll.base.random import Key, global_scope
from atoll.plan.codec.eden import Eden
from atoll.plan.codec.quantize import Quantize, Sign
from atoll.plan.codec.rotate import Rotate
from atoll.plan.codec.sparse import RandomK, TopK
from atoll.plan.codec.stage import Codec, flat_layout, roundtrip

# Published mean square error of the unbiased quantiser, relative to |x|², by bits (EDEN, DRIVE).
UNBIASED = {1: 0.57080, 2: 0.13312, 3: 0.03578, 4: 0.009592, 5: 0.002511, 6: 0.000645}
BITS = pytest.mark.parametrize("bits", UNBIASED)


def normal(clients: int, d: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(clients, d, generator=generator)


def log_normal(clients: int, d: int) -> Tensor:
    return normal(clients, d, 1).exp() * normal(clients, d, 2).sign()


@lru_cache(maxsize=1)
def real(clients: int = 24) -> Tensor:
    """Updates of a network on the digits after 20 local steps of each client: 64 × 128 × 64 × 10, d = 17,226."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    with global_scope(Key(5)):
        for layer in (net[0], net[2], net[4]):
            layer.reset_parameters()
    first = {n: t.clone() for n, t in net.state_dict().items()}
    rows = []
    for i in range(clients):
        net.load_state_dict(first)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        for batch in Key(6).fold(i).integers(20 * 32, len(x)).view(20, 32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
            optimizer.step()
        rows.append(torch.cat([(first[n] - p.detach()).flatten() for n, p in net.named_parameters()]))
    return torch.stack(rows)


def sent(codec: Codec, x: Tensor, round: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return each client's decoded row."""
    key, layout = Key(11).fold("round", round).of(torch.arange(len(x))), flat_layout(x.shape[-1], dtype)
    codec = codec.bind(layout)
    payload, side, *_ = codec.encode(x, {}, codec.server(layout), key)
    return roundtrip(codec, payload, side, key)


def error(codec: Codec, x: Tensor) -> float:
    """Compute the mean of |x̂ − x|²/|x|² over the rows."""
    return float(((sent(codec, x) - x).double().square().sum(-1) / x.double().square().sum(-1)).mean())


def bits_each(codec: Codec, d: int) -> float:
    return codec.nbytes(flat_layout(d)) * 8 / d


# ---- Eden


@BITS
@pytest.mark.parametrize("draw", [normal, log_normal], ids=["normal", "log-normal"])
def test_eden_has_the_published_error(bits, draw):
    """48 vectors of 10⁴ numbers: the standard error is below 0.2 %."""
    assert error(Eden(bits), draw(48, 10_000)) == pytest.approx(UNBIASED[bits], rel=0.02)
    assert bits_each(Eden(bits), 10_000) < bits + 0.02


@BITS
def test_eden_has_the_published_error_on_real_updates(bits):
    assert error(Eden(bits), real()) == pytest.approx(UNBIASED[bits], rel=0.02)


@BITS
def test_eden_that_rotates_the_whole_has_the_published_error(bits):
    assert error(Eden(bits, block=None), log_normal(32, 10_000)) == pytest.approx(UNBIASED[bits], rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("d", [10**6, 10**7])
@BITS
@pytest.mark.parametrize("draw", [normal, log_normal], ids=["normal", "log-normal"])
def test_eden_has_the_published_error_at_length(bits, d, draw):
    assert error(Eden(bits), draw(1, d)) == pytest.approx(UNBIASED[bits], rel=0.02)
    assert bits_each(Eden(bits), d) < bits + 0.009


@pytest.mark.parametrize(
    ("codec", "one"),
    [(Eden(1), 0.57080), (Eden(3), 0.03578), (Rotate() >> Quantize(4), None), (Quantize(levels=1), None)],
    ids=repr,
)
@pytest.mark.parametrize("n", only([4], [4, 64]))
def test_the_error_of_a_mean_falls_as_one_over_n(codec, one, n):
    """All clients have the same vector, the hardest case: equal errors would not cancel."""
    x = normal(1, 10_000).expand(n, -1)
    mean = torch.stack([sent(codec, x, r).mean(0) for r in range(128 // n)])
    got = float(((mean - x[0]).double().square().sum(-1) / x[0].double().square().sum()).mean())
    assert got == pytest.approx((one or error(codec, x)) / n, rel=0.06)


@pytest.mark.parametrize("bits", [1, 4])
def test_below_a_bit_some_are_left_out(bits):
    """RandomK(¼) >> Eden(b) has error ((1 + 3)(1 + v) − 1)·|x|² on average over rounds, at b/4 bits per number."""
    codec = RandomK(0.25) >> Eden(bits)
    x = normal(1, 40_000)
    got = sum(float((sent(codec, x, r) - x).square().sum() / x.square().sum()) for r in range(24)) / 24
    assert got == pytest.approx(4 * (1 + UNBIASED[bits]) - 1, rel=0.02)
    assert bits_each(codec, 40_000) == pytest.approx(bits / 4, abs=0.005)


# ---- levels


def rounding_error(x: Tensor, levels: int, norm: Tensor) -> Tensor:
    """Compute the error of stochastic rounding for any x: (M/s)² Σ f(1 − f)/|x|², f the fractional part of s|x|/M."""
    f = (x.abs().double() * levels / norm) % 1
    return ((norm / levels) ** 2 * f * (1 - f)).sum() / x.double().square().sum()


@pytest.mark.parametrize("levels", one_in(2, [1, 3, 7, 20, 127]))
@pytest.mark.parametrize("draw", [normal, log_normal], ids=["normal", "log-normal"])
def test_stochastic_rounding_has_the_error_of_its_formula(levels, draw):
    row = draw(1, 3000)
    x = row.expand(400, -1)
    for norm, size in (("max", row.abs().max()), ("l2", row.norm())):
        theory = float(rounding_error(row, levels, size.double()))
        assert error(Quantize(levels=levels, bucket=None, norm=norm), x) == pytest.approx(theory, rel=0.02)


@pytest.mark.parametrize(
    ("codec", "d", "expected"),
    [
        (Quantize(4, bucket=None), 10**4, 0.057),
        (Quantize(8, bucket=None), 10**4, 1.7e-4),
        (Quantize(levels=1, bucket=None), 10**4, 2.2),
        (Quantize(levels=256, bucket=None, norm="l2"), 10**4, 0.025),
        (Quantize(levels=15, norm="l2"), 10**4, 0.38),
        (Quantize(levels=127, norm="l2"), 10**4, 0.0053),
        pytest.param(Quantize(4, bucket=None), 10**6, 0.084, marks=pytest.mark.slow),
        pytest.param(Quantize(8, bucket=None), 10**6, 2.5e-4, marks=pytest.mark.slow),
        (Quantize(levels=1, bucket=None), 10**6, 3.0),
        (Quantize(levels=256, bucket=None, norm="l2"), 10**6, 2.1),
    ],
    ids=repr,
)
def test_levels_have_the_published_errors(codec, d, expected):
    """The errors are published to two digits. The maximum of 10⁴ numbers varies by 8 %, its square by 16 %."""
    many = 40 if d == 10**4 else 4
    assert error(codec, normal(many, d, 3)) == pytest.approx(expected, rel=0.06 if d == 10**4 else 0.08)


def test_ternary_takes_sixteen_tenths_of_a_bit():
    assert bits_each(Quantize(levels=1, bucket=None), 10**6) == pytest.approx(1.6, abs=1e-3)
    assert bits_each(Quantize(4), 10**6) == pytest.approx(4 + 32 / 512, abs=1e-3)


# ---- top-k, sign


@pytest.mark.parametrize(
    ("fraction", "of_normal", "of_laplace", "entropy"),
    [(0.1, 0.561, 0.405, 3.67), (0.01, 0.916, 0.838, 0.401), (0.001, 0.987, 0.968, 0.043)],
)
def test_top_k_has_the_published_errors_and_lengths(fraction, of_normal, of_laplace, entropy):
    d = 10**6
    uniform = torch.rand(1, d, generator=torch.Generator().manual_seed(5), dtype=torch.float64) - 0.5
    laplace = (-uniform.sign() * torch.log1p(-2 * uniform.abs())).float()
    assert error(TopK(fraction), normal(1, d)) == pytest.approx(of_normal, abs=1.5e-3)
    assert error(TopK(fraction), laplace) == pytest.approx(of_laplace, abs=2.5e-3)
    # The minimum is 32 bits per value plus the entropy of k positions of d. Here a position uses at most 0.6 bits more.
    least = fraction * 32 - (fraction * math.log2(fraction) + (1 - fraction) * math.log2(1 - fraction))
    assert least == pytest.approx(entropy, abs=0.006)
    assert least <= bits_each(TopK(fraction), d) < 1.02 * least


def test_sign_has_the_error_of_one_biased_bit():
    assert error(Sign(), normal(8, 10_000)) == pytest.approx(0.36338, rel=0.02)
