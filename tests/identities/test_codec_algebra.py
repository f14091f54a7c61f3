"""The algebra of codecs (identity 6): decode∘Σ∘encode = Σ, exactly for a rotation and in the limit for error feedback.

This file defines toy stages with one property each.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import classification, far, run, seeded, task_of
from quick_cases import by_turns, one_in
from torch import nn

from atoll.base import grammar
from atoll.base.errors import UsageError
from atoll.base.random import Key
from atoll.engine.inprocess import InProcessEngine
from atoll.plan import optimizer as rules
from atoll.plan.aggregate import Mean, Sum
from atoll.plan.codec import Codec, Identity
from atoll.plan.local import Gradient, Train
from atoll.plan.plan import Plan
from atoll.plan.protocols import Contribution, Declared, Ids, Local

SIZES = (9, 5, 9, 3, 7)


@dataclass(frozen=True, repr=False)
class Flip(Codec):
    """A rotation: each coordinate times a keyed sign that all clients share. It is its own inverse on the sum."""

    per_sum = True

    def encode(self, x, memory, shared, key):
        return x * self._signs(x, key), {}, {}, memory

    def decode_sum(self, x, key):
        return x * self._signs(x, key)

    def _signs(self, x, key):
        return (1 - 2 * (key.shared().hash(x.shape[-1]) & 1)).to(x.dtype)


@dataclass(frozen=True, repr=False)
class Shuffle(Codec):
    """A rotation: the coordinates in a keyed order."""

    per_sum = True

    def encode(self, x, memory, shared, key):
        return x[..., key.shared().permutation(x.shape[-1])], {}, {}, memory

    def decode_sum(self, x, key):
        return x[..., key.shared().permutation(x.shape[-1]).argsort()]


@dataclass(frozen=True, repr=False)
class Round(Codec):
    """Integer multiples of a step in 8 bits; each message has its own step. The server state counts the extremes."""

    levels: int = 100
    per_message = True

    def encode(self, x, memory, shared, key):
        step = x.abs().amax(-1, keepdim=True).clamp(min=1e-30) / self.levels
        whole = (x / step).round()
        return whole.to(torch.int8), {"step": step}, {"at_most": (whole.abs() == self.levels).sum(-1)}, memory

    def decode(self, x, side):
        return x.to(side["step"].dtype) * side["step"]

    def declare(self, layout):
        return {**super().declare(layout), "at_most": Declared(1, torch.int64, "sum")}


@dataclass(frozen=True, repr=False)
class ErrorFeedback(Codec):
    """A coarse rounding with error feedback: it stores the error and adds it to the next vector.

    sent = step · round((x + e) / step),  e ← x + e − sent
    """

    step: float = 0.25

    def memory(self, layout):
        return {"e": torch.zeros(layout.d, dtype=layout.dtype)}

    def encode(self, x, memory, shared, key):
        meant = x + memory["e"]
        sent = (meant / self.step).round() * self.step
        return sent, {}, {}, {"e": meant - sent}


@dataclass(frozen=True, repr=False)
class Says(Local):
    """Clients that send given vectors, whole multiples of 1/64; some messages do not arrive."""

    lost: frozenset[tuple[int, int]] = frozenset()
    how: str = "raises"

    def padded_batch(self, rows):
        return 1

    def contribute(self, broadcast, lanes, memory, key, task):
        lost = torch.tensor([(int(i), broadcast.round) in self.lost for i in lanes.ids])
        if self.how == "raises" and lost.any():
            raise TimeoutError("no answer")
        update = said(lanes.ids, broadcast.round, task.layout.d)
        update[lost] = float("nan")
        sums = {"rows": lanes.rows, "loss": torch.zeros(len(lanes.ids))}
        return Contribution({"update": update}, sums, lanes.rows, {}, {}), {}


def said(ids, round, d):
    return (Key(5).fold(round).of(ids).integers(d, 129) - 64).double() / 64


def setting(dtype=torch.float64, body="lanes"):
    data = classification(SIZES)
    module = seeded(lambda: nn.Sequential(nn.Linear(4, 33), nn.Tanh(), nn.Linear(33, 3)))
    return InProcessEngine(task_of(module, data, body, dtype), data)


ROTATIONS = [Flip(), Shuffle(), Flip() >> Shuffle(), Shuffle() >> Flip() >> Shuffle() >> Identity()]


@pytest.mark.parametrize(
    ("codec", "aggregator", "dtype"),
    one_in(2, by_turns(ROTATIONS, [Mean(), Mean(weights="equal"), Sum()], [torch.float32, torch.float64])),
)
def test_a_rotation_changes_no_bit_of_a_training(codec, aggregator, dtype):
    engine = setting(dtype)
    for local in (Gradient(), Train(rules.sgd(0.1), epochs=2, batch=4)):
        plain = Plan(local, aggregator, rules.sgd(0.01))
        rotated = replace(plain, codec=codec)
        assert torch.equal(run(rotated, engine, 3)[0].model.theta, run(plain, engine, 3)[0].model.theta)


@given(
    st.integers(0, 10**6),
    st.integers(1, 6),
    st.integers(1, 40),
    st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from(ROTATIONS),
)
def test_decoded_sum_of_encoded_is_the_sum(seed, clients, d, dtype, codec):
    key, mean = Key(seed).fold("round", 3), Mean()
    x = (key.of(torch.arange(clients)).normal(d) * 10.0 ** key.fold("size").integers(1, 20)).to(dtype)
    weight = key.fold("weight").integers(clients, 1000) + 1
    encode = key.of(torch.arange(clients)).fold("codec")
    payload, side, _, _ = codec.encode(x, {}, {}, encode)
    starts = Ids(torch.arange(clients), torch.zeros(clients, dtype=torch.int64))
    sums = [
        mean.total(mean.fold(mean.zero(), Contribution({"update": rows}, {}, weight, {}, {}), starts)).means["update"]
        for rows in (codec.decode(payload, side), x)
    ]
    assert torch.equal(codec.decode_sum(sums[0], key.fold("codec")), sums[1])


def test_keys_of_two_stages_and_two_rounds_differ():
    """Flip() >> Flip() would be the identity if both drew the same signs."""
    x, key = torch.ones(1, 200), Key(0).fold("round", 0, "codec")
    twice = (Flip() >> Flip()).encode(x, {}, {}, key)[0]
    assert not torch.equal(twice, x)
    assert not torch.equal(
        Flip().encode(x, {}, {}, key)[0], Flip().encode(x, {}, {}, Key(0).fold("round", 1, "codec"))[0]
    )


def test_a_rounded_update_is_close_and_small():
    engine = setting()
    plain, rounded = Plan(Gradient(), Mean(), rules.sgd(0.1)), Plan(Gradient(), Mean(), rules.sgd(0.1), codec=Round())
    (one, (exact, _)), (other, (report, _)) = (run(plan, engine) for plan in (plain, rounded))
    d = engine.task.layout.d
    # in each message at most half a step of 1/100 of the largest coordinate
    assert 0 < far(other.model.theta, one.model.theta) < 2 * 0.1 * 0.005 * d**0.5
    # a byte per coordinate and 8 for the step, instead of 8 per coordinate; and one more sum, of 8
    assert report.bytes_up == exact.bytes_up + len(SIZES) * (d + 8 + 8 - 8 * d)
    assert report.metrics["at_most"] * sum(SIZES) >= len(SIZES)


def test_rotating_before_rounding_is_legal_and_undone():
    engine = setting()
    plan = Plan(Gradient(), Mean(), rules.sgd(0.1), codec=Flip() >> Shuffle() >> Round())
    plain = run(replace(plan, codec=Round()), engine)[0].model.theta
    assert torch.equal(run(plan, engine)[0].model.theta, plain)  # rounding depends neither on signs nor on positions


@pytest.mark.parametrize(
    "wrong", [(Round(7), Flip()), (Identity(), Round(), Identity(), Shuffle()), (Round(), Round(), Flip())]
)
def test_a_stage_that_decodes_behind_one_that_opens_is_refused_with_a_line_that_works(wrong):
    with pytest.raises(UsageError, match="stages with per_sum before stages with per_message") as caught:
        codec = wrong[0]
        for stage in wrong[1:]:
            codec = codec >> stage
    names = {part.__name__: part for part in (Flip, Shuffle, Round, Identity)}
    instead = grammar.parse(caught.value.line, names)
    assert instead.per_message and instead.per_sum
    run(Plan(Gradient(), Mean(), rules.sgd(0.1), codec=instead), setting(), 1)


@pytest.mark.parametrize(("body", "how"), by_turns(["lanes", "loop"], ["raises", "nan"]))
@settings(max_examples=5)
@given(st.sets(st.tuples(st.integers(0, 3), st.integers(0, 4)), max_size=10))
def test_sums_of_messages_and_memory_equal_the_sums_of_updates(body, how, lost):
    """Σ sent + Σ e = Σ meant, over the rounds in which a client's message arrived; θ moved by the sum of the messages.

    All numbers are multiples of 1/64, so that only the stage itself rounds.
    """
    engine, rounds = setting(body=body), 5
    plan = Plan(Says(frozenset(lost), how), Sum(weights="equal"), rules.sgd(1.0), codec=ErrorFeedback(), max_failed=1.0)
    d = engine.task.layout.d
    state, reports = run(plan, engine, rounds, init=torch.zeros(d, dtype=torch.float64))

    assert {(f.client, f.round) for report in reports for f in report.failures} == lost
    everyone = torch.arange(len(SIZES))
    arrived = [torch.tensor([(i, r) not in lost for i in range(len(SIZES))]) for r in range(rounds)]
    meant = sum((said(everyone, r, d) * arrived[r][:, None] for r in range(rounds)), torch.zeros(len(SIZES), d))
    kept = state.memory.take(everyone)["codec/e"]
    assert kept.abs().max() <= 0.125
    assert torch.equal(-state.model.theta + kept.sum(0), meant.sum(0))
    for i in range(len(SIZES)):  # a lost message of one client does not change the memory of another
        alone = torch.zeros(1, d, dtype=torch.float64)
        for r in range(rounds):
            if arrived[r][i]:
                alone = ErrorFeedback().encode(said(torch.tensor([i]), r, d), {"e": alone}, {}, Key(0))[3]["e"]
        assert torch.equal(alone[0], kept[i])
