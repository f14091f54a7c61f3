"""The input of a model: golden bytes, one path for training and prediction, and damaged files that are refused."""

from pathlib import Path

import msgspec
import numpy as np
import pandas
import pyarrow
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from atoll.base.errors import UsageError
from atoll.data import arrays, csv, frame, input
from atoll.data.cells import ArrowCells, Missing, TextCells, comma_number
from atoll.data.input import DateColumn, Input, InputTarget, NumberColumn, Statistics, TextColumn, first_difference

GOLDEN = Path(__file__).parents[1] / "golden" / "input.json"
WHOLE = Input(
    target=InputTarget("regression", ("price",), None, None, (3.0,), (0.5,)),
    features=(5,),
    outputs=1,
    columns=(
        NumberColumn("area", 61.25, 61.25, 17.3),
        TextColumn("city", ("Oslo", "Rome", "?"), (0.5, 0.25, 0.25), (0.5, 0.4, 0.4)),
        DateColumn("built", "%d.%m.%Y", 19000.0, 19000.0, 365.25),
    ),
    clients={"north": Statistics((1.0,) * 5, (2.0,) * 5, (3.0,) * 5)},
    by="site",
    dtype="float64",
    missing="drop",
    na=("none", "-9"),
)


def test_golden_bytes():
    """Run folders contain these bytes: another encoding could not be read by runs of before."""
    assert WHOLE.encode() == GOLDEN.read_bytes()
    assert Input.decode(GOLDEN.read_bytes()) == WHOLE
    assert WHOLE.encode() == structs.replace(WHOLE).encode()


def _mess(rows=60, seed=0):
    rng = np.random.default_rng(seed)
    table = {
        "a": rng.normal(5, 3, rows),
        "level": rng.choice(["low", "mid", "high"], rows),
        "day": pandas.Timestamp("2020-01-01") + pandas.to_timedelta(rng.integers(0, 900, rows), "D"),
        "site": rng.choice(["n", "s"], rows),
        "y": rng.normal(100, 20, rows),
    }
    df = pandas.DataFrame(table)
    df.loc[3, "a"] = np.nan
    df.loc[5, "level"] = None
    return df


@pytest.mark.parametrize("scale", ["standard", "client", "none"])
def test_prepared_rows_are_those_of_training(scale):
    df = _mess()
    data = frame(df, target="y", by="site", scale=scale).split(seed=1)
    it = data.described("float64")
    x = it.prepare(df.drop(columns="y"), df["site"].tolist())
    train = data.order
    assert torch.equal(x[train], data.take(train)[0])
    assert torch.equal(x[data.held_out.index], data.held_out.take(torch.arange(len(data.held_out)))[0])
    backwards = it.prepare(df[df.columns[::-1]].drop(columns="y"), df["site"].tolist())
    assert torch.equal(x, backwards)
    y = data.take(train)[1]
    assert torch.allclose(it.in_units(y), torch.tensor(df["y"].to_numpy())[train], rtol=1e-14)
    assert abs(float(y.mean())) < 1e-12 and abs(float(y.std()) - 1) < 1e-12


def test_a_given_input_replaces_the_statistics():
    df = _mess()
    first = frame(df, target="y", by="site").split(seed=1)
    other = frame(_mess(seed=1), target="y", by="site")
    again = other.split(seed=1, input=first.input)
    assert again.input == first.input and first.columns == again.columns
    expected = first.described("float64").prepare(_mess(seed=1))
    assert torch.equal(again.take(again.order)[0], expected[again.order])
    renamed = frame(_mess().rename(columns={"a": "b"}), target="y", by="site")
    with pytest.raises(UsageError, match="no column 'a'"):
        renamed.split(input=first.input)
    texts = _mess().astype({"a": str}).assign(a="x1")
    texts.loc[0, "a"] = "x2"
    with pytest.raises(UsageError, match="Column 'a' contains 'x2' at row 0"):
        frame(texts, target="y", by="site").split(input=first.input)


def test_arrays_have_an_input_too():
    x = np.random.default_rng(0).integers(0, 256, (40, 3, 3)).astype(np.uint8)
    data = arrays(x, np.arange(40) % 2).split(2)
    it = data.described()
    assert it.intensities and it.features == (3, 3) and it.classes == ("0", "1")
    assert torch.equal(it.array(torch.from_numpy(x))[data.order], data.take(data.order)[0])
    scaled = arrays(x.astype(np.float32), np.arange(40) % 2, scale="standard").split(2)
    assert torch.equal(
        scaled.described().array(torch.from_numpy(x).float())[scaled.order], scaled.take(scaled.order)[0]
    )
    flat = arrays(x.reshape(40, 9), np.arange(40) % 2).split(2)
    assert flat.take(flat.order)[0].max() > 1 and "not divided by 255" in flat.notes[-2]
    tokens = arrays(np.arange(40).reshape(20, 2) % 7, np.arange(20) % 2).split(2).described()
    assert tokens.tokens == 7 and tokens.array(torch.tensor([[1, 2]])).dtype == torch.int64


def test_unknown_levels_and_missing_values():
    it = Input(
        target=InputTarget("classification", classes=("no", "yes")),
        features=(3,),
        outputs=2,
        columns=(TextColumn("c", ("a", "b")), NumberColumn("n", 7.0)),
    )
    values = it.values({"c": TextCells(["a", "z", "", "z"]), "n": TextCells(["1", "?", "3", " 4 "])})
    assert values.unknown == {("c", "z"): 2, ("c", "?"): 1}
    assert it.tensor(values.numbers).tolist() == [[1, 0, 1], [0, 0, 7], [0, 0, 3], [0, 0, 4]]
    other = structs.replace(it, columns=(TextColumn("c", ("a", "other"), other=True), NumberColumn("n")))
    assert not other.values({"c": TextCells(["q"]), "n": TextCells(["1"])}).unknown
    strict = structs.replace(it, missing="drop")
    with pytest.raises(UsageError, match="Row 12 has no value in column 'n'"):
        strict.values({"c": TextCells(["a", "b"]), "n": TextCells(["1", ""])}, first=11)


def test_numbers_of_another_spelling_and_of_another_type():
    it = Input(target=InputTarget("regression"), features=(1,), outputs=1, columns=(NumberColumn("n"),))
    read = lambda *cells: it.values({"n": TextCells(cells)}).numbers[:, 0].tolist()  # noqa: E731
    assert read("1,5", "1.234,5", "2") == [1.5, 1234.5, 2.0]
    for cells, text in (
        (("1,5", "1.5"), "mixes two forms"),
        (("1", "old"), "'old' at row 1"),
        (("inf",), "inf at row 0"),
    ):
        with pytest.raises(UsageError, match=text):
            read(*cells)
    dates = structs.replace(it, columns=(DateColumn("n"),))
    assert dates.values({"n": TextCells(["1970-01-02", ""])}).numbers[0, 0] == 1
    with pytest.raises(UsageError, match=r"'1\.2\.2024' at row 0"):
        dates.values({"n": TextCells(["1.2.2024"])})


CELL = st.sampled_from(["1", " 2.5", "-3e2", "", "NA", "?", "nan", "+4", "none", ".5", "7.", "x", "1_0", "1,5", "inf"])


@settings(max_examples=2 * settings().max_examples)
@given(st.lists(CELL, min_size=1, max_size=8), st.sampled_from([None, ("x",), ("-9", "NA")]))
def test_both_readers_give_equal_cells(cells, na):
    pa = pytest.importorskip("pyarrow")
    one, two, missing = TextCells(cells), ArrowCells(pa.array(cells, pa.string())), Missing(na)
    a, b = one.numbers(missing), two.numbers(missing)
    assert (a is None) == (b is None)
    assert a is None or np.array_equal(a, b, equal_nan=True)
    assert one.texts().levels == two.texts().levels and one.texts().codes.tolist() == two.texts().codes.tolist()
    assert one.strings() == two.strings()


def test_a_comma_between_thousands_is_no_decimal_mark():
    """The mean of the train rows tells which one it is."""
    column = NumberColumn("pay", fill=4900.0)
    it = Input(target=InputTarget("regression"), features=(1,), outputs=1, columns=(column,))
    with pytest.raises(UsageError, match="'1,651' at row 1"):
        it.prepare({"pay": ["900", "1,651"]})
    small = structs.replace(it, columns=(NumberColumn("pay", fill=2.0),))
    assert small.prepare({"pay": ["900", "1,651"]})[:, 0].tolist() == pytest.approx([900, 1.651])


@pytest.mark.parametrize("scale", ["standard", "client"])
def test_a_mark_between_thousands_of_new_rows_is_no_decimal_mark(scale):
    """Also a point, if the number is far from the train rows, and near without it; by both readers of cells."""
    df = pandas.DataFrame({"a": np.linspace(1000, 2000, 40), "by": ["s", "t"] * 20, "y": ["n", "y"] * 20})
    given = frame(df, target="y", by="by", scale=scale).split().input
    for text in ("1,537", "1.537"):
        for cells in (TextCells([text]), ArrowCells(pyarrow.array([text]))):
            with pytest.raises(UsageError, match=r"the mean of the train rows is 1[45]"):
                given.values({"a": cells})
    assert given.values({"a": TextCells(["1.5", "0.125"])}).numbers.tolist() == [[1.5], [0.125]]


def test_numbers_with_a_comma():
    assert [comma_number(t) for t in ("1,5", "-1.234.567,25", "12", "1.5", "1,5,5", "1.23,5")] == [
        *(1.5, -1234567.25, 12.0, None, None, None)
    ]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda d: d | {"features": [4]}, "5 features of the columns"),
        (lambda d: d | {"format": 2}, "has format 2"),
        (lambda d: d | {"code": "x"}, "damaged"),
        (lambda d: d | {"features": [2**30]}, "a row of shape"),
        (lambda d: d | {"columns": [*d["columns"][:1] * 2]}, "two columns have one name"),
        (lambda d: d | {"columns": [d["columns"][0] | {"spread": 0.0}, *d["columns"][1:]]}, "spread that is not above"),
        (lambda d: d | {"columns": [d["columns"][0] | {"fill": None}, *d["columns"][1:]]}, "damaged"),
        (lambda d: d | {"clients": {"n": {"fill": [1.0], "centre": [1.0], "spread": [1.0]}}}, "statistics of 'n'"),
        (lambda d: d | {"dtype": "int8"}, "dtype 'int8'"),
        (lambda d: d | {"target": d["target"] | {"classes": ["a", "a"]}}, "two classes have one name"),
        (lambda d: d | {"target": d["target"] | {"positive": "a"}}, "is no class"),
    ],
)
def test_damaged_inputs_are_refused(tmp_path, change, match):
    path = tmp_path / "input.json"
    path.write_bytes(msgspec.json.encode(change(msgspec.json.decode(WHOLE.encode()))))
    with pytest.raises(UsageError, match=match):
        Input.read(path)


def test_truncated_and_oversized_inputs_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "input.json"
    path.write_bytes(WHOLE.encode()[:-40])
    with pytest.raises(UsageError, match="damaged"):
        Input.read(path)
    monkeypatch.setattr(input, "LARGEST_FILE", 100)
    with pytest.raises(UsageError, match="at most 100 bytes"):
        Input.read(path)
    with pytest.raises(UsageError, match="cannot be read"):
        Input.read(tmp_path / "none")


def test_the_first_difference_names_a_column():
    a = WHOLE
    number, text, date = a.columns
    for other, words in (
        (structs.replace(a, columns=(structs.replace(number, centre=1.0), text, date)), "column 'area': centre"),
        (
            structs.replace(a, columns=(number, structs.replace(text, levels=("Rome", "Oslo", "?")), date)),
            "column 'city': lev",
        ),
        (structs.replace(a, by="ward"), "by: 'site', and not 'ward'"),
        (structs.replace(a, clients={}), "the statistics of client 'north'"),
        (structs.replace(a, dtype="float32"), ""),
    ):
        found = first_difference(a, other)
        assert found.startswith(words) and bool(found) == bool(words)


def test_a_table_without_a_statistic_of_held_out_rows(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("a,y\n" + "".join(f"{i}.5,{i % 2}\n" for i in range(40)))
    data = csv(path).split(2)
    (number,) = data.input.columns
    train = np.array([i + 0.5 for i in sorted(data.order.tolist())])
    assert number.centre == pytest.approx(train.mean(), rel=1e-15)
    assert number.spread == pytest.approx(train.std(ddof=1), rel=1e-14)
