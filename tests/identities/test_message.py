"""A message as bytes gives the contribution that the server decodes in process, and has the counted length."""

import struct
from dataclasses import replace

import pytest
import torch
from quick_cases import one_in

from atoll.base.random import Key
from atoll.engine.client_state import Memory
from atoll.engine.contribution import Fold, contribute_chunk, decode_contribution, encode_contribution
from atoll.engine.inprocess import InProcessEngine
from atoll.plan.aggregate import Mean
from atoll.plan.codec import (
    EF21,
    Cast,
    Eden,
    Entropy,
    ErrorFeedback,
    Identity,
    LowRank,
    MessageError,
    Quantize,
    RandomK,
    Rotate,
    Sign,
    TopK,
)
from atoll.plan.form import Field, Form, from_bytes
from atoll.plan.local import Custom, Evaluate, Gradient, Moments, Train
from atoll.plan.message import MessageForm
from atoll.plan.optimizer.rules import sgd
from atoll.plan.plan import Plan
from atoll.plan.protocols import Ids
from atoll.plan.round import bind
from atoll.plan.state import State
from atoll.testing.contract import same
from atoll.testing.local import clients, problem

TRAIN = Train(sgd(0.1), epochs=1, batch=4)
CODECS = [
    Identity(),
    Cast("bf16"),
    Quantize(8),
    TopK(0.2),
    RandomK(0.3),
    Sign(),
    LowRank(2),
    Eden(4),
    Rotate() >> Quantize(4),
    Quantize(4) >> Entropy(),
    ErrorFeedback(TopK(0.1) >> Quantize(4, bucket=256)),
    EF21(TopK(0.2)),
]
PLANS = [Plan(TRAIN, Mean(), codec=codec) for codec in CODECS] + [
    Plan(local, Mean()) for local in (Gradient(), Evaluate(), Moments((0.0, 1.0, 2.0), classes=3))
]
ids = Ids(torch.tensor([3, 1]), torch.tensor([0, 0]))


def _problem(plan, norm=True):
    task, data = replace(problem(norm=norm), numerics="lanes"), clients()
    plan = bind(plan, InProcessEngine(task, data))
    state = State.first(plan, task, 3, Memory(plan.memory(task)))
    return plan, task, data, state


def test_one_client_sends_the_counter_of_a_normalisation():
    plan, task, data, state = _problem(PLANS[0])
    one = ids.select(torch.tensor([1]))
    given = plan, task, data, state.broadcast, one, state.key(), state.memory.take(one.client)
    form, (_, message, _) = MessageForm.of(plan, task), encode_contribution(*given)
    assert any(t.stride(-1) == 0 for t in message.rest.counters.values())  # an expanded tensor
    assert same(form.from_bytes(form.to_bytes(message)).rest.counters, message.rest.counters)


@pytest.mark.parametrize("plan", one_in(2, PLANS), ids=repr)
def test_bytes_give_the_same_contribution(plan):
    plan, task, data, state = _problem(plan)
    given = plan, task, data, state.broadcast, ids, state.key(), state.memory.take(ids.client)
    chunk = contribute_chunk(*given)
    _, message, memory = encode_contribution(*given)
    form = MessageForm.of(plan, task)
    bodies = form.to_bytes(message)
    assert [len(body) for body in bodies] == chunk.bytes.tolist()
    assert same(memory, chunk.memory)
    decoded = decode_contribution(plan, form.from_bytes(bodies))
    assert same(decoded._asdict(), chunk.decoded._asdict())
    assert all(decoded.means[n].dtype == t.dtype for n, t in chunk.decoded.means.items())


def test_a_batch_of_messages_folds_like_single_messages():
    plan, task, data, state = _problem(PLANS[10])
    form = MessageForm.of(plan, task)
    _, message, _ = encode_contribution(
        plan, task, data, state.broadcast, ids, state.key(), state.memory.take(ids.client)
    )
    bodies = form.to_bytes(message)
    sizes = torch.tensor([len(body) for body in bodies])
    together, single = Fold(plan, 0), Fold(plan, 0)
    together.add(0, ids, sizes, sizes, decode_contribution(plan, form.from_bytes(bodies)))
    for k in (1, 0):
        one = decode_contribution(plan, form.from_bytes(bodies[k : k + 1]))
        single.add(0, ids.select(torch.tensor([k])), sizes[k : k + 1], sizes[k : k + 1], one)
    totals = [plan.aggregator.total(fold.results.partials[0])._asdict() for fold in (together, single)]
    assert same(*totals)


@pytest.mark.parametrize("change", [lambda b: b[:-1], lambda b: b + b"\0", lambda b: b"", lambda b: b[:8]])
def test_a_message_of_another_length_is_refused_before_it_is_read(change):
    plan, task, data, state = _problem(PLANS[0])
    form = MessageForm.of(plan, task)
    _, message, _ = encode_contribution(plan, task, data, state.broadcast, ids, state.key(), {})
    body = form.to_bytes(message)[0]
    with pytest.raises(MessageError, match="bytes"):
        form.check_length(len(change(body)))
    with pytest.raises(MessageError, match="bytes"):
        form.from_bytes([change(body)])


def test_a_number_that_is_not_finite_is_refused():
    plan, task, data, state = _problem(PLANS[0])
    form = MessageForm.of(plan, task)
    _, message, _ = encode_contribution(plan, task, data, state.broadcast, ids, state.key(), {})
    body = bytearray(form.to_bytes(message)[0])
    body[-4:] = b"\xff\xff\xff\x7f"
    with pytest.raises(MessageError, match="not finite"):
        form.from_bytes([bytes(body)])


def test_vectors_of_any_name_are_refused_with_a_line():
    def train(model, loader, ctx):
        return {"loss": 1.0}

    plan, task, *_ = _problem(Plan(Custom(train), Mean()), norm=False)
    with pytest.raises(Exception, match="vectors of any name"):
        MessageForm.of(plan, task)


def test_a_vector_with_another_dtype_than_declared_is_refused():
    plan, task, data, state = _problem(PLANS[0])
    _, message, _ = encode_contribution(plan, task, data, state.broadcast, ids, Key(0), {})
    wrong = message.rest._replace(sums={n: t.double() for n, t in message.rest.sums.items()})
    with pytest.raises(Exception, match="dtype"):
        MessageForm.of(plan, task).to_bytes(message._replace(rest=wrong))


@pytest.mark.parametrize("kind", [bytearray, memoryview, lambda body: memoryview(bytearray(body))])
def test_any_buffer_of_the_same_bytes_is_the_same_message(kind):
    """A message alone is read in place, several are copied; a number that is not finite is refused in both."""
    form = Form({"scale": Field(torch.float32, 1)}, Field(torch.float32, 3))
    body = struct.pack("<4f", 1.5, -2.0, 0.0, 3.25)
    for count in (1, 2):
        payload, side = from_bytes(form, [kind(body)] * count)
        assert payload.tolist() == [[-2.0, 0.0, 3.25]] * count and side["scale"].tolist() == [[1.5]] * count
        for bad in (float("nan"), float("inf"), -float("inf")):
            with pytest.raises(MessageError, match="not finite"):
                from_bytes(form, [kind(body)] * (count - 1) + [kind(struct.pack("<4f", 1.5, 0.0, bad, 0.0))])
