"""The sums of `Moments` over any partition, chunk and engine are those of all rows together."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import federation

from atoll.base.errors import UsageError
from atoll.compute.task import Task
from atoll.data.rows import IGNORED, ArrayRows
from atoll.data.scale import centred_sums, deviation_of, exact_total, mean_of, moments
from atoll.engine.client_state import Memory
from atoll.engine.inprocess import InProcessEngine
from atoll.plan.aggregate import Mean
from atoll.plan.codec import Clip, Noise
from atoll.plan.local import Moments
from atoll.plan.plan import Plan
from atoll.plan.round import open_round
from atoll.plan.state import State


def table(rows=40, seed=0):
    """Features of very different sizes, with missing numbers, and one number to predict."""
    draw = np.random.default_rng(seed)
    x = draw.normal([1e9, 0.0, -3.0], [1e3, 1e6, 2.0], (rows, 3)).round(2)
    x[draw.random(x.shape) < 0.1] = np.nan
    return torch.from_numpy(x), torch.from_numpy(draw.normal(100.0, 5.0, rows))


def gathered(part, data, chunk=None):
    task = Task.of(torch.nn.Linear(data.features[0], 1), "mse" if data.classes is None else "cross_entropy", ())
    engine, plan = InProcessEngine(task, data, chunk), Plan(part, Mean())
    opened = open_round(plan, State.first(plan, task, 0, Memory({})), engine)
    partials = engine.gather(plan, opened.state, opened.cohort, opened.key).partials
    return Mean().total(partials[0]).sums


def statistics(data, chunk=None):
    """Mean and deviation by two gathers."""
    first = Moments((0.0,) * 4)
    mean = mean_of(first.sums_of(gathered(first, data, chunk)))
    second = Moments(tuple(mean.tolist()))
    return mean, deviation_of(second.sums_of(gathered(second, data, chunk)), mean)


@pytest.mark.parametrize("sizes", [(1, 2, 37), (1,) * 40], ids=len)
@pytest.mark.parametrize("chunk", [1, None])
def test_two_gathers_give_the_pooled_statistics(sizes, chunk):
    x, y = table()
    mean, deviation = statistics(federation(x, y, sizes), chunk)
    whole = np.column_stack([x.numpy(), y.numpy()])
    np.testing.assert_allclose(mean, np.nanmean(whole, 0), rtol=1e-12)
    np.testing.assert_allclose(deviation, np.nanstd(whole, 0, ddof=1), rtol=1e-12)
    pooled = moments(ArrayRows(x, y), torch.arange(40))
    torch.testing.assert_close(mean[:3], pooled[0][0], rtol=1e-15, atol=0)
    torch.testing.assert_close(deviation[:3], pooled[1][0], rtol=1e-15, atol=0)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-1e12, 1e12), min_size=1, max_size=40), st.data())
def test_sums_of_parts_add_to_the_bits_of_the_exact_sum(numbers, data):
    """The levels of any parts add to the correctly exact_total sum, so a partition changes no bit."""
    x, centre = torch.tensor(numbers, dtype=torch.float64)[:, None], torch.tensor([0.3], dtype=torch.float64)
    cut = sorted(data.draw(st.lists(st.integers(0, len(x)), max_size=3)))
    each = [centred_sums(part.split(7), centre) for part in torch.tensor_split(x, cut)]
    terms = [n - 0.3 for n in numbers]
    assert float(exact_total(torch.cat([s.sum for s in each]))) == math.fsum(terms)
    assert float(exact_total(torch.cat([s.square for s in each]))) == math.fsum(t * t for t in terms)
    assert sum(int(s.present) for s in each) == len(numbers)


def test_counts_of_classes_labels_and_tokens():
    x = torch.arange(10.0)[:, None]
    classes = gathered(Moments(classes=3), federation(x, torch.tensor([0, 1, 2, 1, 1] * 2), (3, 7)))
    assert classes["classes"].tolist() == [2, 6, 2] and classes["rows"] == 10
    labels = federation(x, torch.tensor([[0, 1], [1, IGNORED]] * 5), (4, 6))
    sums = gathered(Moments((0.0,) * 3), replace(labels, kind="labels", classes=None))
    assert sums["present"].tolist() == [10, 10, 5] and sums["sum_1"].tolist() == [45, 5, 5]


def test_another_width_fails_the_client():
    x, y = table()
    with pytest.raises(Exception, match="A row has 4 numbers"):
        gathered(Moments((0.0,) * 3, first=2), federation(x, y, (20, 20)))
    some, whole = Moments((0.0,) * 2, first=1), Moments((0.0,) * 4)
    part, all_of_them = (mean_of(m.sums_of(gathered(m, federation(x, y, (20, 20))))) for m in (some, whole))
    torch.testing.assert_close(part, all_of_them[1:3], rtol=1e-15, atol=0)


@pytest.mark.parametrize(
    "slots", [{"aggregator": Mean(secure=True)}, {"aggregator": Mean(), "codec": Clip(1.0) >> Noise(1.0)}], ids=list
)
def test_sums_of_rows_are_refused_under_a_secure_sum_and_with_noise(slots):
    with pytest.raises(UsageError, match="Moments"):
        Plan(Moments((0.0,)), **slots)
    with pytest.raises(UsageError, match="whole number"):
        Moments(classes=-1)
