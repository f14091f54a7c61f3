"""Laws of the split: held-out rows depend only on the rows and the seed; statistics use only train rows."""

import types

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from atoll.base.errors import UsageError
from atoll.base.random import Key
from atoll.data import (
    IID,
    ArrayRows,
    ByColumn,
    Dirichlet,
    Quantity,
    Shards,
    Source,
    arrays,
    load,
)
from atoll.data.held_out import draw_held_out


def source(labels, **more):
    labels = torch.as_tensor(labels)
    names = tuple(map(str, range(int(labels.max()) + 1)))
    rows = ArrayRows(torch.arange(len(labels)).double()[:, None], labels)
    return Source("made", rows, "classification", names, (1,), **more)


def held_rows(data):
    return data.held().rows.take(torch.arange(len(data.held_out)))[0].flatten().long()


@given(
    labels=st.lists(st.integers(0, 4), min_size=20, max_size=200),
    part=st.floats(0.01, 0.95),
    seed=st.integers(-5, 2**40),
)
def test_held_out_is_stratified_and_leaves_every_class_a_row(labels, part, seed):
    labels = torch.tensor(labels)
    held = draw_held_out(labels, len(labels), part, Key(seed))
    sizes, gone = labels.bincount(minlength=5), labels[held].bincount(minlength=5)
    assert ((gone - part * sizes).abs() <= 1 + 1e-9).all()
    assert (gone < sizes)[sizes > 0].all()
    assert int(held.sum()) <= round(part * len(labels))


@given(seed=st.integers(0, 1000), part=st.floats(0.05, 0.5))
def test_held_out_rows_are_the_same_for_every_split(seed, part):
    labels = torch.arange(120) % 4
    splits = [(2, IID()), (7, IID()), (5, Dirichlet(0.2)), (6, Shards()), (3, Quantity(1.0))]
    ways = [source(labels).split(clients, by, held_out=part, seed=seed) for clients, by in splits]
    for data in ways[1:]:
        assert torch.equal(held_rows(data), held_rows(ways[0]))
        assert torch.equal(data.pooled().order, ways[0].pooled().order)


def test_held_out_goes_by_each_rows_own_hash():
    """If the set grows by a row, only a few rows near the cut change between train and held-out."""
    small = draw_held_out(None, 1000, 0.2, Key(1)).nonzero()
    large = draw_held_out(None, 1001, 0.2, Key(1)).nonzero()
    assert len(set(small.flatten().tolist()) ^ set(large.flatten().tolist())) <= 2


def test_no_rows_held_out():
    data = source(torch.arange(40) % 2).split(4, held_out=0)
    assert data.held_out is None and len(data.order) == 40
    with pytest.raises(UsageError, match="held-out rows"):
        data.held()


def test_regression_is_held_out_at_random():
    data = arrays(torch.arange(50.0)[:, None], torch.arange(50.0)).split(5)
    assert len(data.held_out) == 10 and data.kind == "regression" and data.classes is None
    assert data.take(data.order)[1].dtype == torch.float32


def test_the_sets_own_test_rows_win():
    test = (torch.full((3, 1), 9.0), [0, 1, 1])
    data = arrays(torch.zeros(20, 1), [0, 1] * 10, test=test).split(4)
    assert len(data.order) == 20 and len(data.held_out) == 3
    assert data.held_out.take(torch.tensor([1, 0]))[1].tolist() == [1, 0]
    assert arrays(torch.zeros(20, 1), [0, 1] * 10, test=test).split(4, held_out=0).held_out is None


def test_natural_clients_are_the_default_and_keep_their_rows():
    by = ["b", "a", "a", "b", "c"] * 8
    data = arrays(torch.arange(40.0)[:, None], torch.arange(40.0), by=by).split()
    assert data.names == ("a", "b", "c")
    for client, name in enumerate(data.names):
        assert {by[row] for row in data.client_rows(client).tolist()} == {name}
    assert arrays(torch.zeros(40, 1), torch.zeros(40), by=by).split(5, IID()).names is None


def test_a_small_natural_client_is_left_out_with_a_note():
    by = ["big"] * 30 + ["tiny"] + ["small"] * 4
    data = arrays(torch.arange(35.0)[:, None], torch.arange(35.0), by=by).split(held_out=0)
    assert data.names == ("big", "small") and data.sizes.tolist() == [30, 4]
    assert 30 not in data.order
    note = (
        "1 of 3 natural clients have fewer than 2 train rows; they and their 1 train rows were left out (tiny: 1 row)."
    )
    assert note in data.notes
    every = arrays(torch.zeros(35, 1), torch.zeros(35), by=by).split(held_out=0, min_rows=1)
    assert every.names == ("big", "small", "tiny")


def test_the_note_on_clients_that_are_left_out_gives_the_reason():
    by = ["a"] * 4 + ["b"] * 2 + ["c"] * 3
    held = torch.tensor([False] * 4 + [True] * 2 + [True, True, False])
    data = arrays(torch.zeros(9, 1), torch.zeros(9), by=by).split(held_out=held)
    assert data.names == ("a",) and data.held_owner.tolist() == [-1] * 4
    assert any("(b: both rows were held out; c: 2 of 3 rows were held out)" in note for note in data.notes)


@pytest.mark.parametrize("min_rows", [1, 2])
def test_a_held_out_row_of_a_client_without_statistics_is_refused(min_rows):
    """Statistics of another client would be a wrong number."""
    by = ["a"] * 6 + ["b"] * (1 + min_rows)
    held = torch.tensor([False] * 5 + [True] + [False] * (min_rows - 1) + [True] * 2)
    source = arrays(torch.arange(len(by))[:, None].float(), torch.zeros(len(by)), by=by, scale="client")
    with pytest.raises(UsageError, match="its client 'b' has no train rows"):
        source.split(held_out=held, min_rows=min_rows)


@given(seed=st.integers(0, 200))
def test_scaling_uses_train_rows_alone(seed):
    """Standardised train rows have mean 0 and standard deviation 1, and no held-out value can change them."""
    x = Key(seed).normal(120).reshape(40, 3) * torch.tensor([1.0, 100.0, 1e-3]) + 5
    data = arrays(x, torch.zeros(40), scale="standard").split(4, seed=seed)
    train = data.take(data.order)[0]
    assert torch.allclose(train.mean(0), torch.zeros(3, dtype=torch.float64), atol=1e-9)
    assert torch.allclose(train.std(0), torch.ones(3, dtype=torch.float64), atol=1e-9)
    held = torch.ones(40, dtype=torch.bool)
    held[data.order] = False
    wild = torch.where(held[:, None], 1e6, x)
    again = arrays(wild, torch.zeros(40), scale="standard").split(4, seed=seed)
    assert torch.equal(again.take(again.order)[0], train)
    assert again.held().take(torch.tensor([0]))[0].min() > 100


def test_scaling_by_client():
    x = torch.arange(40.0, dtype=torch.float64)[:, None]
    data = arrays(x, torch.zeros(40), by=[0] * 20 + [1] * 20, scale="client").split(held_out=0)
    for client in (0, 1):
        mine = data.take(data.client_rows(client))[0]
        assert abs(mine.mean()) < 1e-12 and mine.std() == pytest.approx(1)


def test_a_constant_column_is_harmless():
    x = torch.full((30, 1), 0.1, dtype=torch.float64)
    data = arrays(x, torch.zeros(30), scale="standard").split(3)
    assert data.take(data.order)[0].abs().max() < 1e-9


@pytest.mark.slow
def test_scaling_does_not_depend_on_threads():
    x = Key(0).normal(200_000).reshape(-1, 4)
    got = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        got.append(arrays(x, torch.zeros(len(x)), scale="standard").split(2).fingerprint())
        torch.set_num_threads(before)
    assert got[0] == got[1]


def test_as_many_clients_as_rows():
    data = load("diabetes").split(442, held_out=0, min_rows=1)
    assert data.sizes.unique().tolist() == [1]


@pytest.mark.parametrize(
    "words",
    [
        {"clients": 81},
        {"clients": 41},
        {"clients": 40, "min_rows": 3},
        {"clients": 3, "min_rows": 100},
        {"clients": 100, "by": Shards()},
        {"clients": 0},
        {"clients": 2.5},
        {"by": "IID"},
        {"by": ByColumn()},
        {"held_out": 1.0},
        {"held_out": -0.1},
        {"held_out": float("nan")},
        {"min_rows": 0},
        {"seed": "x"},
        {"clients": 30, "by": Shards(3)},
    ],
    ids=lambda value: "by hand" if isinstance(value, types.FunctionType) else repr(value),
)
def test_data_without_a_split_names_the_line_to_write(words):
    data = source(torch.arange(100) % 4)
    with pytest.raises(UsageError) as error:
        data.split(**words)
    names = {"data": data, "IID": IID, "Shards": Shards}
    assert eval(error.value.line, names).count >= 1  # the line that the error suggests works


def test_natural_clients_are_counted_by_the_data():
    data = arrays(torch.zeros(40, 1), torch.zeros(40), by=[0, 1, 2, 3] * 10)
    assert data.split(4).count == 4
    with pytest.raises(UsageError, match="4 natural clients") as error:
        data.split(7)
    assert eval(error.value.line, {"data": data, "IID": IID}).count == 7
    with pytest.raises(UsageError, match="None of the 4"):
        data.split(min_rows=50)


def test_classes_need_classes():
    data = arrays(torch.zeros(40, 1), torch.zeros(40))
    for by in (Dirichlet(1.0), Shards()):
        with pytest.raises(UsageError, match="one class per row") as error:
            data.split(5, by)
        assert eval(error.value.line, {"data": data, "IID": IID, "Quantity": Quantity}).count == 5


def test_a_label_unseen_in_training():
    with pytest.raises(UsageError, match="row 1 has label 'newt', which no train row has"):
        arrays(torch.zeros(4, 1), ["cat", "dog"] * 2, test=(torch.zeros(2, 1), ["cat", "newt"]))
    by = ["a"] * 20 + ["b"]
    labels = ["x", "y"] * 10 + ["z"]
    held = (torch.zeros(1, 1), ["z"])
    data = arrays(torch.zeros(21, 1), labels, by=by, test=held)
    with pytest.raises(UsageError, match="label 'z', which no train row has") as error:
        data.split()  # only client b has label z; it is too small and left out
    assert eval(error.value.line, {"data": data}).count == 1
