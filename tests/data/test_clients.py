"""`Clients`: offsets into an array of row numbers, its measures of imbalance, and its fingerprint."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon

from atoll.base.errors import UsageError
from atoll.data import IID, ArrayRows, Clients, Dirichlet, Quantity, arrays, load
from atoll.data.clients import offsets_of
from atoll.data.measure import effective_clients, label_divergence, size_gini

sizes_of = st.lists(st.integers(1, 50), min_size=1, max_size=15).map(torch.tensor)


@pytest.fixture(scope="module")
def digits():
    return load("digits").split(20, Dirichlet(0.3))


@given(sizes=sizes_of, data=st.data())
def test_only_takes_the_rows_of_the_clients_asked_for(sizes, data):
    order = torch.arange(int(sizes.sum())).flip(0)
    rows = ArrayRows(torch.zeros(len(order), 1), torch.zeros(len(order)))
    whole = Clients("made", rows, order, offsets_of(sizes), None, "regression", None, (1,))
    ids = data.draw(st.lists(st.integers(0, len(sizes) - 1), unique=True, min_size=1))
    some = whole.only(torch.tensor(ids))
    assert some.count == len(ids)
    for place, client in enumerate(ids):
        assert torch.equal(some.client_rows(place), whole.client_rows(client))


def test_pooled_is_the_same_for_every_split():
    pooled = [load("wine").split(n, by).pooled() for n, by in [(3, IID()), (9, Dirichlet(0.5)), (5, Quantity(1.0))]]
    assert len({data.fingerprint() for data in pooled}) == 1
    assert pooled[0].count == 1 and len(pooled[0].held_out) == 36


def test_take_has_any_leading_shape(digits):
    rows = digits.order[:12]
    x, y = digits.take(rows.reshape(3, 4))
    assert x.shape == (3, 4, 1, 8, 8) and x.dtype == torch.float32 and y.shape == (3, 4)
    assert y.dtype == torch.int64 and x.min() == 0 and x.max() == 1
    assert torch.equal(x.reshape(12, 1, 8, 8), digits.take(rows)[0])
    assert digits.take(rows[0])[0].shape == (1, 8, 8)
    assert digits.take(rows[:0].reshape(0, 4))[0].shape == (0, 4, 1, 8, 8)


def test_histogram_counts_every_row_once(digits):
    table = digits.histogram()
    assert table.shape == (20, 10)
    assert torch.equal(table.sum(1), digits.sizes)
    labels = digits.take(digits.client_rows(7))[1]
    assert torch.equal(table[7], labels.bincount(minlength=10))
    with pytest.raises(UsageError, match="without a list of classes"):
        load("diabetes").split().histogram()


@given(table=st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3).filter(any), min_size=1, max_size=6))
def test_label_divergence_equals_scipys(table):
    counts = torch.tensor(table)
    p = (counts / counts.sum(1, keepdim=True)).double()
    q = (counts.sum(0) / counts.sum()).double()
    expected = sum(jensenshannon(row, q, base=2) ** 2 for row in p) / len(p)
    assert label_divergence(counts) == pytest.approx(expected, abs=1e-6)


@given(sizes=sizes_of)
def test_gini_equals_its_definition(sizes):
    """G = Σᵢⱼ |nᵢ − nⱼ| / (2 C Σ n)."""
    n = sizes.double()
    expected = (n[:, None] - n).abs().sum() / (2 * len(n) * n.sum())
    assert size_gini(sizes) == pytest.approx(float(expected), abs=1e-12)
    assert 1 <= effective_clients(sizes) <= len(sizes) + 1e-9


def test_extremes_of_imbalance():
    even = torch.tensor([[4, 4], [2, 2]])
    apart = torch.tensor([[6, 0], [0, 6]])
    assert label_divergence(even) == 0
    assert label_divergence(apart) == pytest.approx(0.3112781, abs=1e-6)  # JS of (1/2, 1/2) and (1, 0)
    assert size_gini(torch.tensor([5, 5, 5])) == 0 and effective_clients(torch.tensor([5, 5, 5])) == 3


def test_imbalance_names(digits):
    assert set(digits.imbalance()) == {"label_divergence", "size_gini", "effective_clients"}
    assert set(load("diabetes").split().imbalance()) == {"size_gini", "effective_clients"}


def test_fingerprint_tells_data_and_split_apart(digits):
    again = load("digits").split(20, Dirichlet(0.3))
    assert digits.fingerprint() == again.fingerprint() and len(digits.fingerprint()) == 16
    others = [
        load("digits").split(20, Dirichlet(0.3), seed=1),
        load("digits").split(19, Dirichlet(0.3)),
        load("digits").split(20, IID()),
        load("digits").split(20, Dirichlet(0.3), held_out=0.1),
        load("digits", scale="standard").split(20, Dirichlet(0.3)),
    ]
    x, y = load("digits").rows.x.clone(), load("digits").rows.y.clone()
    x[5, 0, 0, 0] += 0.5  # one pixel
    others.append(arrays(x, y).split(20, Dirichlet(0.3)))
    y[7] = (y[7] + 1) % 10  # one label
    others.append(arrays(load("digits").rows.x, y).split(20, Dirichlet(0.3)))
    assert len({data.fingerprint() for data in [digits, *others]}) == 8
    assert replace(digits, name="other").fingerprint() == digits.fingerprint()
