"""The rows of a site, read by the input of its federation, are those of the joined table, to the bit."""

import numpy as np
import pandas
import pytest
import torch

from atoll.base.errors import UsageError
from atoll.base.random import Key
from atoll.data import arrays, csv, load
from atoll.data.schema import Schema
from atoll.data.site_rows import site_rows

SITES = ("north", "south", "west")


def joined(rows=60):
    draw = np.random.default_rng(3)
    age = draw.integers(20, 90, rows).astype(object)
    age[draw.integers(0, rows, 5)] = ""
    city = draw.choice(["Oslo", "Rome", "Bonn"], rows)
    when = [f"2024-01-{day:02}" for day in draw.integers(1, 28, rows)]
    ill = draw.choice(["no", "yes"], rows)
    site = [SITES[i % 3] for i in range(rows)]
    return pandas.DataFrame({"age": age, "city": city, "when": when, "ill": ill, "site": site})


@pytest.fixture
def folder(tmp_path):
    table = joined()
    table.to_csv(tmp_path / "all.csv", index=False)
    for name in SITES:
        table[table.site == name].drop(columns="site").to_csv(tmp_path / f"{name}.csv", index=False)
    return tmp_path


def whole(folder, **options):
    return csv(folder / "all.csv", target="ill", by="site", **options).split(held_out=0)


def taken(data, client):
    return data.take(data.client_rows(client))


@pytest.mark.parametrize("options", [{}, {"missing": "drop"}, {"scale": "none"}, {"max_levels": "2,other"}])
def test_the_rows_of_a_site_are_those_of_the_joined_table(folder, options):
    data = whole(folder, **options)
    for client, name in enumerate(data.names):
        mine = site_rows(folder / f"{name}.csv", data.input, client)
        assert mine.sizes[client] == data.sizes[client] and mine.count == client + 1
        for ours, theirs in zip(taken(mine, client), taken(data, client), strict=True):
            assert torch.equal(ours, theirs)


def test_a_client_with_its_own_statistics_names_its_column(folder):
    data = whole(folder, scale="client")
    table = joined()
    for client, name in enumerate(data.names):
        mine = site_rows(table[table.site == name], data.input, client)
        assert torch.equal(taken(mine, client)[0], taken(data, client)[0])
    with pytest.raises(UsageError, match="'site'"):
        site_rows(folder / "north.csv", data.input)


def test_numbers_and_arrays(tmp_path):
    whole = load("diabetes").split(2, held_out=0)
    mine = site_rows(load("diabetes"), whole.input, 1)
    assert torch.equal(mine.take(mine.order)[1], whole.take(torch.arange(len(mine.order)))[1])
    digits = load("digits").split(2, held_out=0)
    x, y = load("digits").rows.take(torch.arange(50))
    mine = site_rows((x.numpy(), y.numpy()), digits.described(), 3, held_out=0.2)
    assert mine.sizes.tolist() == [0, 0, 0, 40] and mine.held_owner.tolist() == [3] * 10


def test_held_out_rows_belong_to_the_site(folder):
    data = whole(folder)
    one = site_rows(folder / "north.csv", data.input, 0, held_out=0.25)
    other = site_rows(folder / "north.csv", data.input, 1, held_out=0.25)
    again = site_rows(folder / "north.csv", data.input, 0, held_out=0.25)
    assert len(one.held_out) == 5 and one.sizes[0] == 15
    assert torch.equal(one.order, again.order) and not torch.equal(one.order, other.order)
    numbers = torch.cat((one.order, one.held_out.index)).sort().values
    assert numbers.tolist() == list(range(20))


def changed(**columns):
    table = joined().drop(columns="site")[:12].astype(object)
    for name, (row, value) in columns.items():
        table.loc[row, name] = value
    return table


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (joined().drop(columns=["city", "site"]), "no column 'city'"),
        (changed(city=(7, "Lima")), "'city' contains 'Lima' at row 7"),
        (changed(ill=(4, "dead")), "'ill' contains 'dead' at row 4"),
        (changed(age=(3, "old")), "'age' contains 'old' at row 3"),
        (changed(when=(2, "soon")), "'when' contains 'soon' at row 2"),
        (changed()[:0], "0 rows"),
        ((np.zeros((4, 3)), np.array(["no"] * 4)), "rows of shape"),
    ],
)
def test_a_row_that_does_not_fit_is_named(folder, data, message):
    with pytest.raises(UsageError, match=message):
        site_rows(data, whole(folder).input)


def test_a_row_without_a_target_is_left_out(folder):
    mine = site_rows(changed(ill=(4, "")), whole(folder).input)
    assert mine.sizes.tolist() == [11] and "1 row " in mine.notes[0]


def test_arrays_of_another_kind_are_refused():
    given = load("digits").split(2).described()
    x = Key(0).integers(64 * 3, 255).reshape(3, 1, 8, 8).to(torch.uint8)
    with pytest.raises(UsageError, match="intensities"):
        site_rows((x, torch.tensor([0, 1, 2])), given)
    with pytest.raises(UsageError, match="table"):
        site_rows(joined(), given)
    tokens = arrays(torch.arange(12).reshape(4, 3), torch.tensor([0, 1, 0, 1]), task="classification")
    given = tokens.split(2, held_out=0, min_rows=1).described()
    with pytest.raises(UsageError, match="Row 1 contains a token above"):
        site_rows((torch.tensor([[0, 1, 2], [0, 1, 99]]), torch.tensor([0, 1])), given)


def test_several_labels(tmp_path):
    draw = np.random.default_rng(5)
    table = pandas.DataFrame({"a": draw.normal(size=12), "b": draw.integers(0, 2, 12), "c": draw.integers(0, 2, 12)})
    table.to_csv(tmp_path / "all.csv", index=False)
    data = csv(tmp_path / "all.csv", target="b,c", task="labels").split(1, held_out=0)
    mine = site_rows(tmp_path / "all.csv", data.input)
    assert all(torch.equal(a, b) for a, b in zip(taken(mine, 0), taken(data, 0), strict=True))
    assert Schema.of_input(data.input).target == (2,) == Schema.of(data).target
    table["c"] = [None, *table.c[1:]]
    assert site_rows(table, data.input).sizes.tolist() == [11]
