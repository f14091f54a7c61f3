"""Statistics of all clients from sums equal those of pandas on the joined rows, in Python and on the command line."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from problems import federation, tokens

import atoll
from atoll.base.errors import UsageError
from atoll.cli import main
from atoll.tools.stats import BINS, QUANTILES


def table(rows=120):
    draw = np.random.default_rng(0)
    x = draw.normal([1e9, 0.0, -3.0], [1e3, 1e6, 2.0], (rows, 3)).round(2)
    frame = pd.DataFrame(x, columns=["income", "gain", "depth"])
    frame["gain"] += 3e5 * frame["depth"]
    frame = frame.mask(draw.random(frame.shape) < 0.1)
    frame["site"] = draw.choice(["north", "south", "west"], rows)
    frame["y"] = draw.normal(5, 1, rows)
    return frame


@pytest.mark.parametrize("clients", [1, 40])
def test_the_statistics_are_those_of_the_joined_rows(clients, tmp_path):
    frame = table().drop(columns="site")
    frame.to_csv(tmp_path / "t.csv", index=False)
    data = atoll.data.load(tmp_path / "t.csv", target="y", scale="standard").split(clients, held_out=0, min_rows=1)
    found = atoll.describe(data).frame().set_index("column")
    for ours, theirs in (("count", frame.count()), ("mean", frame.mean()), ("sd", frame.std())):
        np.testing.assert_allclose(found[ours], theirs, rtol=1e-12)
    np.testing.assert_array_equal(found["missing"], frame.isna().sum())
    np.testing.assert_array_equal(found[["min", "max"]], np.column_stack((frame.min(), frame.max())))
    width = (frame.max() - frame.min()) / BINS
    for q in QUANTILES:
        # Between two values each number is a quantile.
        low, high = (np.nanquantile(frame, q, axis=0, method=m) for m in ("lower", "higher"))
        ours = found[f"q{round(100 * q):02d}"].to_numpy()
        assert ((ours >= low - width) & (ours <= high + width)).all()
    centred = frame - frame.mean()  # pandas would lose digits of the income
    np.testing.assert_allclose(atoll.describe(data).correlation, centred.corr(), atol=1e-12)
    assert [sum(c.histogram) for c in atoll.describe(data).columns] == found["count"].tolist()


def test_classes_of_clients_and_empty_columns():
    x = torch.stack((torch.full((9,), torch.nan), torch.ones(9)), 1).double()
    data = federation(x, torch.tensor([0, 1, 1, 0, 0, 0, 1, 1, 1]), (4, 5))
    found = atoll.describe(data)
    assert found.classes == {"0": {"0": 2, "1": 2}, "1": {"0": 2, "1": 3}}
    empty, ones = found.columns
    assert (empty.count, empty.missing) == (0, 9) and np.isnan([empty.mean, empty.low, empty.sd]).all()
    assert (ones.mean, ones.sd, ones.low, ones.high, ones.quantiles[0.5]) == (1.0, 0.0, 1.0, 1.0, 1.0)
    assert np.isnan(found.correlation).all() and "9 rows of 2 clients" in found.text()


def test_the_command_describes_a_table_by_its_clients(tmp_path, capsys):
    path = tmp_path / "t.csv"
    table().to_csv(path, index=False)
    assert main(["stats", str(path), "--by", "site", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["clients"]) == {"north", "south", "west"} and found["rows"] == 120
    assert [c["column"] for c in found["columns"]] == ["income", "gain", "depth", "y"]
    assert main(["stats", "wine"]) == 0
    shown = capsys.readouterr().out
    assert "178 rows of 1 clients" in shown and "alcohol" in shown and "client   class_0" in shown


def test_a_natural_client_with_one_row_is_described():
    frame = pd.DataFrame({"x": [1.0, 2.0, 30.0], "y": [0.5, 0.25, 0.125], "site": ["north", "north", "solo"]})
    found = atoll.describe(atoll.data.frame(frame, target="y", by="site"))
    assert (found.rows, found.clients) == (3, {"north": 2, "solo": 1}) and found.columns[0].mean == 11.0


def test_token_ids_are_refused():
    with pytest.raises(UsageError, match="token ids"):
        atoll.describe(tokens((4, 4)))
