"""The contribution of a relay as bytes: the exact sums of its clients, in every grouping, and hostile partials."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quick_cases import only

from atoll.base.errors import UsageError
from atoll.engine.client_state import Memory
from atoll.engine.contribution import Fold, encode_contribution
from atoll.engine.inprocess import InProcessEngine
from atoll.net.partial import PartialForm, check_additive, read_answers, read_messages, write_answers
from atoll.net.wire import Counted, Lost, PartialHead, Start, encode_head
from atoll.plan.aggregate import Combine, Mean, Median, Sum, exact
from atoll.plan.codec import Clip, Eden, ErrorFeedback, Identity, LowRank, MessageError, Noise, Quantize, RandomK, TopK
from atoll.plan.local import Train
from atoll.plan.message import MessageForm
from atoll.plan.optimizer.rules import sgd
from atoll.plan.pace import Bounded, Buffered, Sync
from atoll.plan.plan import Plan
from atoll.plan.protocols import Ids
from atoll.plan.round import bind
from atoll.plan.state import State
from atoll.testing.contract import same
from atoll.testing.local import clients, problem

TRAIN = Train(sgd(0.1), epochs=1, batch=4)
CODECS = [
    Identity(),
    ErrorFeedback(TopK(0.1) >> Quantize(4, bucket=256)),
    RandomK(0.3),
    LowRank(2),
    Eden(4),
    ErrorFeedback(RandomK(0.5, unbiased=False) >> TopK(0.3)),
]


class Below:
    """Clients of a relay, and their messages of one round."""

    def __init__(self, plan):
        self.task, data = replace(problem(norm=True), numerics="lanes"), clients()
        self.plan = bind(plan, InProcessEngine(self.task, data))
        state = State.first(self.plan, self.task, 3, Memory(self.plan.memory(self.task)))
        self.form = MessageForm.of(self.plan, self.task)
        self.sums = PartialForm.of(self.plan, self.task, self.form)
        self.rows = {client: int(rows) for client, rows in enumerate(data.sizes)}
        self.bodies = {}
        for client in range(3):
            ids = Ids(torch.tensor([client]), torch.tensor([0]))
            given = self.plan, self.task, data, state.broadcast, ids, state.key(), state.memory.take(ids.client)
            self.bodies[client] = self.form.to_bytes(encode_contribution(*given)[1])[0]
        self.starts = tuple(Start(client, 0) for client in range(3))

    def fold(self, *order):
        """The partial over clients in an order, and their columns."""
        fold, columns = Fold(self.plan, 0), []
        for client in order:
            ids, rows = Ids(torch.tensor([client]), torch.tensor([0])), torch.tensor([self.rows[client]])
            decoded = read_messages(self.plan, self.form, [self.bodies[client]], rows)
            fold.add(0, ids, rows, rows, decoded)
            columns.append(decoded.per_client)
        return fold.results.partials[0], {n: torch.cat([c[n] for c in columns]) for n in self.sums.columns}

    def counted(self, *order):
        return [Counted(client, 0, self.rows[client], len(self.bodies[client])) for client in order]

    def body(self, *order, lost=()):
        partial, columns = self.fold(*order)
        by = torch.tensor(order).argsort()
        return self.sums.to_bytes(self.counted(*sorted(order)), lost, partial, {n: t[by] for n, t in columns.items()})

    def read(self, body, starts=None):
        return self.sums.from_bytes(body, self.starts if starts is None else starts, self.rows, self.plan.aggregator)


@cache
def below():
    return Below(Plan(TRAIN, Mean()))


@pytest.mark.parametrize("codec", only(CODECS[1:3], CODECS), ids=repr)
def test_partials_of_relays_give_the_bits_of_the_whole_sum(codec):
    it = Below(Plan(TRAIN, Mean(), codec=codec))
    rule = it.plan.aggregator
    whole = rule.total(it.fold(0, 1, 2)[0])
    one, two = it.read(it.body(2, 0), it.starts[::2]), it.read(it.body(1), it.starts[1:2])
    assert same(rule.total(rule.merge(one.partial, two.partial))._asdict(), whole._asdict())
    assert it.body(0, 1, 2) == it.body(2, 0, 1) == it.body(1, 2, 0)  # a relay that is killed sends the same bytes
    assert same(one.columns, it.fold(0, 2)[1])


@settings(max_examples=10, deadline=None)
@given(st.lists(st.floats(-(2.0**90), 2.0**90, width=32, allow_subnormal=False), min_size=1, max_size=6), st.randoms())
def test_equal_sums_have_equal_integers(numbers, draw):
    rows, weights = torch.tensor([numbers]).repeat(3, 1), torch.tensor([1, 5, 1 << 20])
    rows[1] *= -0.5
    order = draw.sample(range(3), 3)
    digits = exact.add({}, rows, weights)
    low, found = exact.to_integers(digits)
    parts = {}
    for k in order:
        exact.merge(parts, exact.add({}, rows[[k]], weights[[k]]))
    again = exact.to_integers(parts)
    assert (low, found.tolist()) == (again[0], again[1].tolist())
    assert torch.equal(exact.total(exact.from_integers(low, found)), exact.total(digits))


def test_a_number_takes_at_most_24_bytes_for_any_number_of_clients():
    for count in (2, 8, 500):
        rows = torch.randn(count, 2000, generator=torch.Generator().manual_seed(count)) * 0.05
        _, numbers = exact.to_integers(exact.add({}, rows, torch.full((count,), 300)))
        assert numbers.element_size() * len(numbers) <= 24


def test_hostile_partials_are_refused_by_name():
    it = below()
    good, all_three = it.body(0, 1, 2), it.counted(0, 1, 2)
    partial, columns = it.fold(0, 1, 2)
    assert it.read(good).head.arrived == tuple(all_three)

    def made(arrived=all_three, lost=(), partial=partial, columns=columns):
        return it.sums.to_bytes(arrived, lost, partial, columns)

    more = Counted(0, 0, it.rows[0] + 1, 1)
    nan = {n: t * float("nan") for n, t in columns.items()}
    head = PartialHead(tuple(all_three), (), ((0, 0),) * (len(it.sums.means) + len(it.sums.sums)))
    far = replace(
        partial,
        means={n: {35: torch.full((length,), 2.0**930, dtype=torch.float64)} for n, length in it.sums.means.items()},
    )
    for body, fault in {
        made([more, *all_three[1:]]): f"has {more.rows} rows",
        made([*all_three[:2], all_three[1]]): "twice",
        made(all_three, [Lost(2, 0, "failed", "")]): "twice",
        made([*all_three[:2], Counted(7, 0, 1, 1)]): "not asked",
        made([*all_three[:2], Counted(2, 1, it.rows[2], 1)]): "not asked",
        made(all_three[:2]): "missing",
        made(columns=nan): "not finite",
        made(partial=far): "too large",
        good[:-1]: "bytes",
        good + b"\0": "bytes",
        b"\xff" * 40: "head",
        encode_head(head): "bytes",
        encode_head(PartialHead(tuple(all_three), (), ())): "places",
        encode_head(PartialHead(tuple(all_three), (), ((60, 1), *head.places[1:]))): "places",
    }.items():
        with pytest.raises(MessageError, match=fault):
            it.read(body)
    low, numbers = exact.to_integers(next(iter(partial.means.values())))
    assert numbers.max() < 1 << 25 and low < 0
    wrong = bytearray(good)
    wrong[good.index(numbers.numpy().tobytes()) + 3] = 0x7F  # a digit of more than 26 bits
    with pytest.raises(MessageError, match="only form"):
        it.read(bytes(wrong))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1 << 30), st.binary(max_size=9), st.integers(0, 8))
def test_one_exception_leaves_the_reader_of_a_partial(at, piece, cut):
    it = below()
    body = it.body(0, 1, 2)
    at %= len(body)
    changed = body[:at] + piece + body[at + cut :]
    for read in (it.read, lambda given: read_answers(given, it.starts)):
        try:
            found = read(changed)
        except MessageError:
            continue
        assert all(bool(t.isfinite().all()) for table in (found.partial.means, found.partial.sums)
                   for digits in table.values() for t in digits.values())  # fmt: skip


def test_answers_of_clients_travel_as_they_are():
    starts = (Start(3, 0), Start(5, 0))
    lost = [Lost(5, 0, "policy-values", "no")]
    body = write_answers([Counted(3, 0, 10, 4)], lost, [b"sums"])
    found = read_answers(body, starts)
    assert [bytes(b) for b in found.bodies] == [b"sums"] and found.head.lost == tuple(lost)
    for wrong in (body[:-1], body + b"x"):
        with pytest.raises(MessageError):
            read_answers(wrong, starts)
    with pytest.raises(MessageError, match="not asked"):
        read_answers(body, starts[:1])


@pytest.mark.parametrize(
    ("plan", "fault"),
    [
        (Plan(TRAIN, Median()), "Median"),
        (Plan(TRAIN, Combine(lambda updates, weights: updates.mean(0))), "Combine"),
        (Plan(TRAIN, Mean(secure=True), codec=Clip(1.0)), "secure"),
        (Plan(TRAIN, Mean(sum="float")), "float"),
        (Plan(TRAIN, Sum(sum="float")), "float"),
        (Plan(TRAIN, Mean(), pace=Buffered(2)), "Buffered"),
        (Plan(TRAIN, Mean(), pace=Bounded(2)), "Bounded"),
        (Plan(TRAIN, Mean(), pace=Sync(deadline_s=9.0)), "deadline"),
        (Plan(TRAIN, Mean(), downlink=Quantize(8)), "Quantize"),
        (Plan(TRAIN, Mean("equal", over="expected"), codec=Clip(1.0) >> Noise(1.0)), "Noise"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_plans_that_are_no_sum_are_refused_by_name(plan, fault):
    with pytest.raises(UsageError, match=fault) as error:
        check_additive(plan)
    assert error.value.write
    check_additive(Plan(TRAIN, Sum()))
