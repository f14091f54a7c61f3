"""The pull of a local step: every backend makes the same step, from the same start, and no pull costs no bit."""

import itertools
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from problems import COMPILED, classification, needs_native, run, seeded, task_of
from quick_cases import one_in, only
from torch import nn
from torch.func import functional_call, grad

from atoll.base.errors import UsageError
from atoll.base.random import Key
from atoll.compute import compiled, limits
from atoll.compute.batches import ClientBatch
from atoll.compute.step_rule import StepRule
from atoll.engine.inprocess import InProcessEngine
from atoll.plan.aggregate import Mean
from atoll.plan.local import Train
from atoll.plan.optimizer.rules import adamw, sgd
from atoll.plan.plan import Plan
from atoll.plan.protocols import Correction, Pull

BODIES = ["lanes", "loop", "fused", COMPILED]
SIZES = (7, 5, 5, 2)
OPTIMIZERS = [
    sgd(0.1),
    sgd(0.1, momentum=0.9),
    sgd(0.1, momentum=0.5, nesterov=True, weight_decay=0.02),
    sgd(0.1, weight_decay=1e-6),
]


def conv():
    return nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)
    )


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 18), nn.ReLU(), nn.Linear(18, 3))


@dataclass(frozen=True, repr=False)
class Fixed(Correction):
    """A pull with random tensors: of one row for all clients, or of one row for each."""

    mu: float
    names: tuple[str, ...]
    each: bool

    def pull(self, broadcast, memory, facts):
        theta = broadcast.model.theta
        shape = (*facts.rows.shape, theta.shape[-1]) if self.each else theta.shape[-1:]

        def draw(name):
            # A row is a function of the rows of the client, so that it does not depend on the chunk.
            row = Key(3).fold(name).normal(theta.shape[-1]).to(theta)
            return 0.1 * (row * facts.rows[:, None] if self.each else row).expand(shape)

        start = theta + draw("start") if "start" in self.names else None
        anchor, shift, offset = (draw(n) if n in self.names else None for n in ("anchor", "shift", "offset"))
        return Pull(start, anchor, shift, self.mu, offset)


def updated(body, make, optimizer, correction, dtype=torch.float64, batch=3, sizes=SIZES, share=1.0):
    """The contribution of all clients and their memory after one round."""
    data = classification(sizes, (1, 6, 6), dtype=dtype)
    task = task_of(seeded(make), data, body, dtype)
    local = Train(optimizer, epochs=2, batch=batch, correction=correction)
    ids = torch.arange(len(sizes))
    lanes = ClientBatch(data, ids, dtype, share)
    broadcast = run_state(Plan(local, Mean()), task).broadcast
    memory = {n: t.expand(len(ids), *t.shape) for n, t in local.first_memory(task).items()}
    given, after = local.contribute(broadcast, lanes, memory, Key(1).of(ids), task)
    return given, after, data, task, local, broadcast, lanes, memory


def run_state(plan, task):
    from atoll.engine.client_state import Memory
    from atoll.plan.state import State

    return State.first(plan, task, 0, Memory(plan.memory(task)))


@cache
def reference(make, optimizer, correction):
    """The steps of the formula in the top of `step_rule`, by autograd, one client after another."""
    found = updated("lanes", make, optimizer, correction)
    _, _, data, task, local, broadcast, lanes, memory = found
    rule = local.optimizer
    batches = list(local._batches(lanes, memory, Key(1).of(lanes.ids), task, None))
    facts = local._facts(lanes, rule.step_rule(0.1), 0.1, task, 0)
    pull = Pull() if local.correction is None else local.correction.pull(broadcast, memory, facts)
    out = []
    for k in range(len(lanes.sizes)):
        theta, anchor, shift, offset = (
            t if t is None or t.dim() == 1 else t[k]
            for t in (broadcast.model.theta if pull.start is None else pull.start, pull.anchor, pull.shift, pull.offset)
        )
        y, v = theta.clone(), torch.zeros_like(theta)
        for places, counts in batches:
            if k >= len(counts):
                break
            x, target = data.take(data.order[places[k, : counts[k]]])

            def loss(y, x=x, target=target):
                return nn.functional.cross_entropy(functional_call(task.module, task.layout.params(y), (x,)), target)

            g = grad(loss)(y) + rule.weight_decay * y
            g = g + pull.mu * (y - (0 if anchor is None else anchor)) + (0 if shift is None else shift)
            g = g - (0 if offset is None else offset)
            v = rule.momentum * v + g
            y = y - 0.1 * (g + rule.momentum * v if rule.nesterov else v)
        out.append(theta - y)
    return torch.stack(out)


CASES = list(
    itertools.zip_longest(
        OPTIMIZERS * 2,
        [
            Fixed(0.5, ("anchor",), False),
            Fixed(0.5, ("anchor", "shift"), True),
            Fixed(0.0, ("shift",), False),
            Fixed(1e-7, ("anchor", "start"), True),
            Fixed(0.0, ("shift", "start"), True),
            None,
            Fixed(0.5, (), False),
            None,
            Fixed(0.0, ("offset",), True),
            Fixed(0.5, ("anchor", "offset"), False),
            Fixed(0.2, ("anchor", "shift", "offset"), True),
        ],
        fillvalue=OPTIMIZERS[0],
    )
)


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("make", only([conv], [mlp, conv]))
def test_every_backend_makes_the_step(body, make):
    for optimizer, correction in CASES:
        got, want = (
            updated(body, make, optimizer, correction)[0].means["update"],
            reference(make, optimizer, correction),
        )
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("body", BODIES)
def test_float32_agrees(body):
    for optimizer, correction in CASES[:4]:
        wide = updated("lanes", mlp, optimizer, correction)[0].means["update"]
        found = updated(body, mlp, optimizer, correction, torch.float32)[0].means["update"]
        assert float((found.double() - wide).norm() / wide.norm()) < 1e-5


@dataclass(frozen=True, repr=False)
class Joined(Correction):
    """The pull of another correction with s − o − μa as its shift."""

    inner: Fixed

    def pull(self, broadcast, memory, facts):
        pull = self.inner.pull(broadcast, memory, facts)
        rule = StepRule(0.1, mu=pull.mu, anchor=pull.anchor, shift=pull.shift, offset=pull.offset)
        return Pull(shift=rule.constant(), mu=pull.mu)


@needs_native
@pytest.mark.parametrize("names", [("offset",), ("anchor", "offset"), ("anchor", "shift", "offset")])
@pytest.mark.parametrize("make", [mlp, conv])
def test_native_code_reads_an_offset_with_the_bits_of_its_sum(names, make):
    """Vectors of all clients, and an offset of each client where it is in memory."""

    class Mixed(Fixed):
        def pull(self, broadcast, memory, facts):
            shared, own = Fixed(0.3, names, False), Fixed(0.3, names, True)
            return shared.pull(broadcast, memory, facts)._replace(offset=own.pull(broadcast, memory, facts).offset)

    for optimizer in OPTIMIZERS[:3]:
        mixed = Mixed(0.3, names, True)
        got, want = (
            updated("compiled", make, optimizer, c, torch.float32)[0].means["update"] for c in (mixed, Joined(mixed))
        )
        assert torch.equal(got, want)


@pytest.mark.parametrize("body", ["fused", COMPILED])
@pytest.mark.parametrize("optimizer", one_in(2, OPTIMIZERS[1:3]))
def test_large_batches_and_rows_in_portions(body, optimizer, monkeypatch):
    """A batch of more rows than one pass of a convolution takes; native code that reads some steps at a time."""
    for sizes, batch in (((80, 70), 40), ((9, 7), 3)):
        want = updated("lanes", conv, optimizer, CASES[1][1], batch=batch, sizes=sizes)[0].means["update"]
        with monkeypatch.context() as patch:
            patch.setattr(limits, "NATIVE_READ_AHEAD", 1)
            patch.setattr(ClientBatch, "in_memory", property(lambda self: False))
            got = updated(body, conv, optimizer, CASES[1][1], batch=batch, sizes=sizes)[0].means["update"]
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("body", ["loop", "fused", COMPILED])
def test_other_clients_change_no_bit(body):
    plan = Plan(
        Train(sgd(0.1, momentum=0.9), epochs=2, batch=3, correction=Fixed(0.3, ("anchor", "shift"), True)), Mean()
    )
    data = classification(SIZES, (1, 6, 6))

    def theta(chunk):
        task = task_of(seeded(mlp), data, body, torch.float32)
        return run(plan, InProcessEngine(task, data, chunk=chunk))[0].model.theta

    assert torch.equal(theta(None), theta(1)) and torch.equal(theta(None), theta(2))


@pytest.mark.parametrize("optimizer", [sgd(0.1), sgd(0.1, momentum=0.9, weight_decay=0.1)])
@pytest.mark.parametrize("each", [True, False])
def test_blocks_of_lanes_change_no_bit(optimizer, each, monkeypatch):
    """A large step is finished for some lanes at a time. Of five lanes a block has two or three."""
    correction, words = Fixed(0.3, ("anchor", "shift"), each), {"dtype": torch.float32, "sizes": (9, 9, 8, 7, 7)}
    found = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    for size in (1, 1 << 40):
        monkeypatch.setattr(limits, "STEP_BYTES", size)
        found.append(updated("fused", mlp, optimizer, correction, **words)[0].means["update"])
    assert torch.equal(*found)


@pytest.mark.parametrize("body", BODIES)
def test_no_pull_changes_no_bit(body):
    for optimizer in (sgd(0.1), adamw(0.01)):
        plain, absent = (updated(body, mlp, optimizer, c)[0].means["update"] for c in (None, Fixed(0.0, (), False)))
        assert torch.equal(plain, absent)


@pytest.mark.parametrize("body", BODIES)
def test_any_optimizer_is_pulled(body):
    """AdamW: the pull is a part of the gradient."""
    got = updated(body, mlp, adamw(0.01), Fixed(0.0, ("shift",), False))[0].means["update"]
    want = updated("lanes", mlp, adamw(0.01), Fixed(0.0, ("shift",), True), sizes=(1, 1))[0].means["update"]
    assert got.shape[1] == want.shape[1] and not torch.equal(
        got, updated(body, mlp, adamw(0.01), None)[0].means["update"]
    )
    torch.testing.assert_close(
        got, updated("loop", mlp, adamw(0.01), Fixed(0.0, ("shift",), False))[0].means["update"], rtol=1e-9, atol=1e-12
    )


def test_the_sum_of_the_weights_of_gradients():
    """|a| of SGD, momentum and a pull: the closed forms of FedNova."""
    plain, momentum, pull = StepRule(0.1), StepRule(0.1, 0.9), StepRule(0.1, mu=2.0)
    assert plain.gradient_weights(7) == list(range(8))
    r, k = 0.9, 7
    assert momentum.gradient_weights(7)[7] == pytest.approx((k - r * (1 - r**k) / (1 - r)) / (1 - r), rel=1e-12)
    assert pull.gradient_weights(7)[7] == pytest.approx((1 - 0.8**7) / 0.2, rel=1e-12)
    nesterov = StepRule(1.0, 0.5, nesterov=True)
    theta = torch.zeros(1, 1, dtype=torch.float64)
    stepper = sgd(1.0, momentum=0.5, nesterov=True).stepper(
        theta, sgd(1.0, momentum=0.5, nesterov=True).slots(theta), 1.0
    )
    for _ in range(4):
        stepper.step(torch.ones_like(theta))
    assert nesterov.gradient_weights(4)[4] == pytest.approx(-float(theta), rel=1e-12)


def test_a_value_that_is_no_correction_is_refused():
    for wrong in (0.1, Fixed, sgd(0.1)):
        with pytest.raises(UsageError, match="correction"):
            Train(sgd(0.1), epochs=1, correction=wrong)
    assert replace(Train(sgd(0.1), epochs=1, correction=Fixed(0.1, (), False)), correction=None) == Train(
        sgd(0.1), epochs=1
    )
    assert compiled.StepRule(0.1).plain
