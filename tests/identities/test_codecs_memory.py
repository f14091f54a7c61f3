"""Codecs with memory: sent and stored vectors add up to the updates, whichever messages get lost."""

import math

import pytest
import torch
from quick_cases import by_turns, one_in
from torch import Tensor, nn

from atoll.base.random import Key
from atoll.compute.layout import Layout
from atoll.plan.codec.eden import Eden
from atoll.plan.codec.entropy import Entropy
from atoll.plan.codec.feedback import EF21, ErrorFeedback
from atoll.plan.codec.lowrank import LowRank, matrices, orthonormal
from atoll.plan.codec.quantize import Cast, Quantize, Sign
from atoll.plan.codec.rotate import Rotate
from atoll.plan.codec.sparse import RandomK, TopK
from atoll.plan.codec.stage import Codec, Identity, flat_layout, roundtrip
from atoll.plan.protocols import Total
from atoll.testing import round_info

INNER = [
    Identity(),
    TopK(0.01),
    TopK(0.01) >> Quantize(8),
    RandomK(0.1, unbiased=False),
    Rotate() >> Quantize(6),
    Sign(),
    Eden(1),
    Cast("fp8"),
    LowRank(1),
]
EACH = pytest.mark.parametrize("inner", INNER, ids=repr)
D, CLIENTS, ROUNDS = 700, 6, 30


class Federation:
    """Some clients and a server that use a codec, without an engine. Memories change only on acceptance."""

    def __init__(self, codec: Codec, weights: Tensor, layout: Layout) -> None:
        self.codec, self.weights = codec.bind(layout, weights.sum()), weights
        self.memory = {n: t.expand(len(weights), -1).clone() for n, t in codec.memory(layout).items()}
        self.server = codec.server(layout)

    def round(self, r: int, x: Tensor, who: Tensor, accepted: Tensor) -> tuple[Tensor, Tensor]:
        """(decoded vector of each accepted client, mean after the per-sum half)."""
        key = Key(9).fold("round", r, "codec")
        own = {n: t[who] for n, t in self.memory.items()}
        shared = {n: t for n, t in self.server.items() if not n.rpartition(".")[2].startswith("_")}
        payload, side, _, after = self.codec.encode(x[who], own, shared, key.of(who))
        opened = self.codec.decode(payload, side)[accepted]
        ids = who[accepted]
        for name in self.memory:
            self.memory[name][ids] = after[name][accepted]
        weight = self.weights[ids].double()
        update = self.codec.decode_sum(weight @ opened.double(), key)
        total = Total({"update": update}, {}, weight.sum(), torch.tensor(len(ids)), {})
        total, self.server = self.codec.server_update(total, self.server, round_info(), key)
        return self.codec.decode_sum(opened, key), total.means["update"] / weight.sum()


def updates(r: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return Key(1).fold("update", r).of(torch.arange(CLIENTS)).normal(D, dtype)


def draw(r: int, keep: float) -> tuple[Tensor, Tensor]:
    """The participating clients, and those whose messages are accepted."""
    who = Key(2).fold(r).permutation(CLIENTS)[:4].sort().values
    accepted = Key(3).fold(r).uniform(4) < keep
    accepted[0] = True
    return who, accepted


@pytest.mark.parametrize(("inner", "keep"), one_in(2, by_turns(INNER, [1.0, 0.7])), ids=repr)
def test_message_plus_memory_equals_the_update(inner, keep):
    layout = Layout.of(nn.Linear(34, 20), torch.float64)
    federation = Federation(ErrorFeedback(inner), torch.ones(CLIENTS, dtype=torch.int64), layout)
    meant, sent = (torch.zeros(CLIENTS, D, dtype=torch.float64) for _ in range(2))
    for r in range(ROUNDS):
        who, accepted = draw(r, keep)
        x = updates(r)
        got, _ = federation.round(r, x, who, accepted)
        meant[who[accepted]] += x[who[accepted]]
        sent[who[accepted]] += got
    torch.testing.assert_close(sent + federation.memory["error"], meant, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("inner", "keep"), one_in(2, by_turns(INNER, [1.0, 0.7])), ids=repr)
def test_a_shift_keeps_the_mean_of_all_clients_last_ones(inner, keep):
    layout = Layout.of(nn.Linear(34, 20), torch.float64)
    weights = torch.tensor([3, 1, 4, 1, 5, 9])
    federation = Federation(EF21(inner), weights, layout)
    for r in range(ROUNDS):
        who, accepted = draw(r, keep)
        _, mean = federation.round(r, updates(r), who, accepted)
        expected = (weights.double() @ federation.memory["shift"]) / weights.sum()
        torch.testing.assert_close(mean, expected, rtol=0, atol=1e-12)


def test_a_shift_declares_a_mean_over_all_clients_that_stays_at_the_server():
    shift = EF21(LowRank(1))
    layout = Layout.of(nn.Linear(34, 20))
    for codec, start in ((shift, ""), (Identity() >> shift, "1."), (shift >> Entropy(), "0.")):
        assert codec.averages_all_clients
        assert set(codec.server(layout)) == {f"{start}_sum", f"{start}codec.q"}
    for codec in (Identity(), TopK(0.1) >> Quantize(8), ErrorFeedback(TopK(0.1))):
        assert not codec.averages_all_clients


@pytest.mark.parametrize("around", [ErrorFeedback, EF21])
def test_around_the_identity_nothing_is_changed(around):
    layout = flat_layout(D)
    federation = Federation(around(Identity()), torch.ones(CLIENTS, dtype=torch.int64), layout)
    everyone = torch.arange(CLIENTS)
    for r in range(5):
        x = updates(r, torch.float32)
        _, mean = federation.round(r, x, everyone, torch.ones(CLIENTS, dtype=torch.bool))
        if around is ErrorFeedback:
            assert torch.equal(mean, x.double().sum(0) / CLIENTS)
            assert not federation.memory["error"].any()
        else:
            torch.testing.assert_close(mean, x.double().mean(0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("inner", one_in(2, INNER), ids=repr)
def test_errors_stay_bounded(inner):
    """Unit updates, 60 rounds: |e| ≤ √(1 − δ)/(1 − √(1 − δ)) for a contraction by 1 − δ in mean square."""
    layout = Layout.of(nn.Linear(34, 20))
    codec = ErrorFeedback(inner).bind(layout)
    memory = {n: t.expand(4, -1) for n, t in codec.memory(layout).items()}
    # A tenth of the coordinates at random: δ = 1/10; the hundredth of top-k: δ = 1/100.
    keep = 0.01 if "TopK" in repr(inner) else 0.1 if "RandomK" in repr(inner) else 0.3
    bound = math.sqrt(1 - keep) / (1 - math.sqrt(1 - keep)) if "LowRank" not in repr(inner) else 60
    for r in range(60):
        key = Key(4).fold(r).of(torch.arange(4))
        x = key.fold("x").normal(D, torch.float32)
        x /= x.norm(dim=-1, keepdim=True)
        *_, memory = codec.encode(x, memory, codec.server(layout), key)
    assert memory["error"].norm(dim=-1).max() < bound


# ---- low rank


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 16, 3)
        self.scale = nn.Parameter(torch.ones(()))
        self.head = nn.Linear(40, 30)
        self.tiny = nn.Linear(2, 2)


def test_low_rank_sends_factors_of_large_matrices():
    layout = Layout.of(Net())
    shapes = {e.name: (p.m, p.n) for e, p in zip(layout.segment("params"), matrices(layout, 2), strict=True)}
    assert shapes == {
        "scale": (1, 0),
        "conv.weight": (16, 72),
        "conv.bias": (16, 0),
        "head.weight": (30, 40),
        "head.bias": (30, 0),
        "tiny.weight": (4, 0),
        "tiny.bias": (2, 0),
    }
    assert LowRank(2).nbytes(layout) == 4 * (2 * (16 + 72) + 2 * (30 + 40) + 1 + 16 + 30 + 4 + 2)


def test_low_rank_is_exact_for_low_rank():
    layout = Layout.of(Net(), torch.float64)
    key = Key(3).of(torch.arange(3))
    x = key.fold("x").normal(layout.d)
    views = layout.params(x)
    for name, (m, n) in {"conv.weight": (16, 72), "head.weight": (30, 40)}.items():
        u, v = key.fold(name, "u").normal(2 * m).view(3, m, 2), key.fold(name, "v").normal(2 * n).view(3, 2, n)
        views[name].copy_((u @ v).view(views[name].shape))
    codec = LowRank(2).bind(layout)
    payload, side, *_ = codec.encode(x, {}, codec.server(layout), key)
    torch.testing.assert_close(roundtrip(codec, payload, side, key), x, rtol=0, atol=1e-10)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_low_rank_tends_to_the_energy_it_cannot_hold(rank):
    layout = Layout.of(nn.Linear(50, 40, bias=False), torch.float64)
    u, _, v = torch.linalg.svd(Key(1).normal(2000).view(40, 50), full_matrices=False)
    sigma = 1.5 ** -torch.arange(40, dtype=torch.float64)
    x = (u * sigma @ v).reshape(1, -1)
    federation = Federation(LowRank(rank), torch.ones(1, dtype=torch.int64), layout)
    one = torch.zeros(1, dtype=torch.int64)
    errors = []
    for r in range(25):
        got, _ = federation.round(r, x, one, one == 0)
        errors.append(float((got - x).square().sum()))
    floor = float(sigma[rank:].square().sum())
    assert errors[0] > errors[3] > floor * (1 - 1e-9)
    assert abs(errors[-1] / floor - 1) < 1e-6


def test_columns_become_orthonormal_or_nothing():
    p = Key(1).normal(60).view(20, 3)
    p = torch.cat((p, p[:, :1] * 2, torch.zeros(20, 1, dtype=torch.float64)), 1)
    q = orthonormal(p)
    expected = torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(q.T @ q, expected, rtol=0, atol=1e-12)


def test_low_rank_of_nothing_seen_keeps_its_start():
    layout = Layout.of(nn.Linear(50, 40))
    federation = Federation(LowRank(2), torch.ones(2, dtype=torch.int64), layout)
    start = federation.server["q"].clone()
    federation.round(0, torch.zeros(2, layout.d), torch.arange(2), torch.ones(2, dtype=torch.bool))
    assert torch.equal(federation.server["q"], start)
