"""Rules of held-out rows: groups and times are not divided, folds cover all rows, clients keep their proportions."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from atoll.base.errors import UsageError
from atoll.base.random import Key
from atoll.data import load
from atoll.data.held_out import (
    After,
    Groups,
    HeldOutPool,
    Mask,
    PerClient,
    check_sides,
    deal_held_out,
    held_out_rule,
)


def pool_of(rows, labels=None, by=None, **columns):
    return HeldOutPool(rows, labels, by, lambda name: np.asarray(columns[name]))


@given(st.lists(st.integers(0, 9), min_size=4, max_size=60), st.integers(2, 4), st.integers(0, 5))
def test_folds_are_disjoint_cover_all_rows_and_divide_no_group(groups, folds, seed):
    if len(set(groups)) < folds:
        return
    pool = pool_of(len(groups), patient=np.array(groups, float))
    held = torch.stack([Groups("patient", 1 / folds, fold=f)(pool, Key(seed)) for f in range(folds)])
    assert (held.sum(0) == 1).all()
    assert held.any(1).all()
    codes = torch.tensor(groups)
    for each in held:
        assert not set(codes[each].tolist()) & set(codes[~each].tolist())


@given(st.lists(st.integers(0, 20), min_size=2, max_size=60), st.floats(0.05, 0.95))
def test_train_times_are_before_held_out_times(times, part):
    held = After("visit", part)(pool_of(len(times), visit=np.array(times, float)), Key(0))
    values = torch.tensor(times)
    assert held.any()
    assert int(held.sum()) >= int(part * len(times))
    if not held.all():
        assert int(values[~held].max()) < int(values[held].min())


def test_a_date_or_a_number_begins_the_held_out_rows():
    days = np.array(["2023-12-31", "2024-01-01", "2024-05-01T10:00", "2022-01-01"], object)
    assert After("visit", "2024-01-01")(pool_of(4, visit=days), Key(0)).tolist() == [False, True, True, False]
    years = np.array([2020.0, 2021.0, 2022.0])
    assert After("year", 2021)(pool_of(3, year=years), Key(0)).tolist() == [False, True, True]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), min_size=1, max_size=80), st.floats(0.05, 0.9))
def test_each_class_of_a_client_holds_out_its_part_to_within_one_row(rows, part):
    by, labels = (torch.tensor(column) for column in zip(*rows, strict=True))
    held = PerClient(part)(pool_of(len(rows), labels, by), Key(1))
    for client in range(4):
        for label in range(3):
            mine = (by == client) & (labels == label)
            count = int(mine.sum())
            out = int((held & mine).sum())
            assert out <= max(0, count - 1)
            assert out > count * part - 1 or out == count - 1
            assert out < count * part + 1


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2)), min_size=3, max_size=60), st.integers(0, 40))
def test_held_out_rows_are_dealt_in_proportion_to_train_rows(rows, seed):
    owner, train = (torch.tensor(column) for column in zip(*rows, strict=True))
    held = train.repeat(2)[torch.randperm(2 * len(train), generator=torch.Generator().manual_seed(seed))]
    dealt = deal_held_out(train, owner, held, Key(seed))
    for client in range(5):
        for label in range(3):
            share = ((owner == client) & (train == label)).sum()
            assert int(((dealt == client) & (held == label)).sum()) == 2 * int(share)


def test_a_mask_a_text_and_an_array_name_the_same_rows():
    pool = pool_of(3, fold=np.array([1.0, 2.0, 1.0]))
    assert Mask("fold", 2)(pool, Key(0)).tolist() == Mask("fold", "2")(pool, Key(0)).tolist() == [False, True, False]
    assert held_out_rule("Mask('fold', 2)", 3) == Mask("fold", 2)
    assert held_out_rule(np.array([True, False, False]), 3).tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: held_out_rule(1.0, 3), "0 ≤ held_out < 1"),
        (lambda: held_out_rule([True, False], 3), "one number for each row"),
        (lambda: held_out_rule([1, 0, 1], 3), "PerClient, Groups, After, Mask"),
        (lambda: held_out_rule("Grups('a')", 3), "Groups"),
        (lambda: Groups("a", 0.2, fold=5), "fold=4"),
        (lambda: Groups("a", 0.2)(pool_of(3, a=np.zeros(3)), Key(0)), "1 group"),
        (lambda: Groups("a", 0.5)(pool_of(3, a=np.array([1.0, np.nan, 2.0])), Key(0)), "row 1 has no value"),
        (lambda: After("a", 0.2)(pool_of(2, a=np.array(["x", "y"], object)), Key(0)), "no order in time"),
        (lambda: After("a", "soon")(pool_of(2, a=np.zeros(2)), Key(0)), "no ISO date"),
        (lambda: Mask("a", "z")(pool_of(2, a=np.array(["x", "y"], object)), Key(0)), "x, y"),
        (lambda: PerClient(0.2)(pool_of(2), Key(0)), "natural clients"),
        (lambda: check_sides(torch.tensor([True, True]), "After('a', 0)"), "2 of 2 rows"),
    ],
)
def test_bad_rules_are_refused(make, text):
    with pytest.raises(UsageError) as error:
        make()
    assert text in str(error.value)


IDS = [str(9007199254740992 + i % 4) for i in range(20)]  # beyond the whole numbers of float64
FEW = ["007", "7", "07", "8"] * 5


def held(tmp_path, column, rule):
    """The cells of the held-out rows of a CSV file."""
    path = tmp_path / "codes.csv"
    path.write_text("x,g,y\n" + "".join(f"{i % 3}.5,{cell},{i}.25\n" for i, cell in enumerate(column)))
    data = load(path, target="y", scale_target="none").split(2, held_out=rule, min_rows=1)
    return [column[int(y)] for y in data.held_out.targets().tolist()]


@pytest.mark.parametrize(
    ("column", "rule", "expected"),
    [
        (FEW, 'Mask("g", "007")', {"007"}),
        (FEW, 'Mask("g", 7)', {"7"}),
        (["7.0", "7", "8", "9"] * 5, 'Mask("g", "7.0")', {"7.0", "7"}),
        (IDS, f'Mask("g", {IDS[1]})', {IDS[1]}),
        (IDS, f'Mask("g", "{IDS[1]}")', {IDS[1]}),
        (IDS, f'After("g", {IDS[1]})', set(IDS[1:4])),
        (IDS, 'After("g", 0.2)', {IDS[3]}),
        (["01", "02", "3", "10"] * 5, 'After("g", 3)', {"3", "10"}),
    ],
)
def test_codes_are_no_numbers(tmp_path, column, rule, expected):
    found = held(tmp_path, column, rule)
    assert set(found) == expected and len(found) == sum(cell in expected for cell in column)


@pytest.mark.parametrize("column", [FEW, IDS])
def test_groups_of_codes_are_apart(tmp_path, column):
    folds = [held(tmp_path, column, f'Groups("g", 0.25, fold={fold})') for fold in range(4)]
    assert all(len(set(fold)) == 1 and len(fold) == 5 for fold in folds)
    assert set().union(*folds) == set(column)


@pytest.mark.parametrize("column", [["a", "b", "", "c"] * 5, ["007", "7", "", "8"] * 5, ["1", "2", "", "3"] * 5])
def test_a_row_without_a_group_is_refused(tmp_path, column):
    with pytest.raises(UsageError, match="row 2 has no value in 'g'"):
        held(tmp_path, column, 'Groups("g", 0.25)')
