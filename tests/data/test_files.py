"""Every file and every frame is one door to the same table: equal clients, notes and errors."""

import gzip

import numpy as np
import pandas
import pytest

from atoll.base.errors import UsageError
from atoll.data import csv, files, frame, load
from atoll.data.files import read_table, stream_table

TABLE = pandas.DataFrame(
    {
        "site": ["n", "s", "s", "n"] * 15,
        "whole": np.arange(60) % 13,
        "part": np.round(np.linspace(-3, 9, 60), 3),
        "text": ["a", "b, c", 'd "e"'] * 20,
        "y": ["no", "yes", "no"] * 20,
    }
)
TABLE.loc[4, "part"] = np.nan
TABLE.loc[7, "text"] = None


def fingerprint(source):
    data = source.split(seed=3)
    return data.fingerprint(), data.columns, data.input


def test_all_doors_give_equal_clients(tmp_path):
    import polars
    import pyarrow

    TABLE.to_csv(tmp_path / "t.csv", index=False)
    with gzip.open(tmp_path / "t.csv.gz", "wt") as file:
        TABLE.to_csv(file, index=False)
    TABLE.to_csv(tmp_path / "semi.csv", index=False, sep=";", decimal=",")
    TABLE.to_parquet(tmp_path / "t.parquet")
    TABLE.to_excel(tmp_path / "t.xlsx", index=False)
    options = {"target": "y", "by": "site"}
    expected = fingerprint(frame(TABLE, **options))
    for name in ("t.csv", "t.csv.gz", "semi.csv", "t.parquet", "t.xlsx"):
        assert fingerprint(load(tmp_path / name, **options)) == expected, name
    for df in (polars.from_pandas(TABLE), pyarrow.Table.from_pandas(TABLE), TABLE.assign(part=TABLE["part"].map(str))):
        assert fingerprint(frame(df, **options)) == expected
    marked = TABLE.astype({"part": object}).fillna({"part": "NA"})
    marked.to_excel(tmp_path / "t.xlsx", index=False)
    assert fingerprint(load(tmp_path / "t.xlsx", **options)) == fingerprint(frame(marked, **options)) == expected


@pytest.mark.parametrize(
    "text",
    [
        "a,b,y\n1, x,0\n2,y ,1\n3,x,0\n",
        'a,b,y\n1,"x\ny",0\n2,"p, q",1\n\n3,"""z""",0\n',
        "a;b;y\n1,5;u;0\n2;v;1\n-3,25;u;0\n",
        "a,b,y\r\n+1,NA,0\r\n?,none,1\r\n3,q,0\r\n",
        "a\tb\ty\n1e3\tx\t0\n.5\tz\t1\n7.\tx\t0\n",
        "a,b,y\n1,x,0\n2,x\n",
        'a,b,y\n1,"x,0\n',
        "a,b,y\n1,x,inf\n",
        "a,b,y\n1,é,0\n2,ü,1\n",
        "a,b,y\n" + "".join(f"{i},,{i}.5\n" for i in range(150)) + "x,1,7.5\n ?, 2,8.5\n",
        "a,b,y\n" + "".join(f"{i}, ?,{i}.5\n" for i in range(150)) + "NA,+1,7.5\n3, x,8.5\n",
    ],
)
def test_both_readers_give_equal_sources_and_errors(tmp_path, text, monkeypatch):
    path = tmp_path / "t.csv"
    path.write_text(text, newline="")

    def outcome():
        try:
            source = csv(path, target="y")
        except UsageError as error:
            return str(error)
        x, y = source.rows.take(np_range(len(source)))
        return str(x.tolist()), y.tolist(), source.notes, source.columns

    one = outcome()
    monkeypatch.setattr(files._Csv, "_plain", lambda self: False)
    assert outcome() == one


def test_a_number_that_means_missing_is_missing_at_every_door(tmp_path, monkeypatch):
    df = pandas.DataFrame({"a": [1.0, -9.0, 3.0, 4.5], "b": [-9, 1, 2, 3], "y": [0.5, 1.5, 2.5, 3.5]})
    df.to_csv(tmp_path / "t.csv", index=False)
    text = df.astype({"a": str}).replace({"a": {"1.0": "+1"}})
    text.to_csv(tmp_path / "u.csv", index=False)
    doors = [
        lambda: frame(df, na="none,-9"),
        *(lambda n=n: csv(tmp_path / n, na="none,-9") for n in ("t.csv", "u.csv")),
    ]

    def gaps():
        return [door().rows.take(np_range(4))[0].isnan().tolist() for door in doors]

    assert gaps() == [[[False, True], [True, False], [False, False], [False, False]]] * 3
    monkeypatch.setattr(files._Csv, "_plain", lambda self: False)
    assert gaps() == gaps()[:1] * 3


def np_range(n):
    import torch

    return torch.arange(n)


def test_batches_have_equal_rows_and_the_reader_of_python_continues(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("a,b\n" + "".join(f"{i},t{i}\n" for i in range(1000)) + "x,y,z\n")
    stream = stream_table(path, rows=256)
    sizes, first = [], []
    with pytest.raises(UsageError, match=r"Line 1002 of .* has 3 cells"):
        for batch in stream.batches:
            sizes.append(len(batch.cells["a"]))
            first += batch.cells["a"].strings()
    assert first == [str(i) for i in range(len(first))] and set(sizes) <= {256, 232}


def test_only_used_columns_are_read(tmp_path):
    path = tmp_path / "t.csv"
    TABLE.to_csv(path, index=False)
    assert list(read_table(path, lambda header: ["part", "y"]).columns) == ["part", "y"]
    assert csv(path, target="y", drop="text,site").columns == ("whole", "part")
    assert csv(path, target="y", columns="part").columns == ("part",)


def test_globs_folders_and_files_as_clients(tmp_path):
    for i, (name, part) in enumerate(TABLE.groupby("site")):
        folder = tmp_path / "parts" / f"ward={name}"
        folder.mkdir(parents=True)
        part.drop(columns="site").to_parquet(folder / "part0.parquet")
        part.drop(columns="site").to_csv(tmp_path / f"w{i}.csv", index=False)
    folders = load(tmp_path / "parts", target="y", by="ward")
    assert folders.names == ("n", "s") and len(folders) == 60
    several = load(f"{tmp_path}/w*.csv", target="y", by="@file")
    assert several.names == ("w0", "w1") and several.columns == folders.columns
    (tmp_path / "w2.csv").write_text("other,y\n1,no\n")
    with pytest.raises(UsageError, match=r"w2\.csv and .*w0\.csv have different columns"):
        load(f"{tmp_path}/w*.csv", target="y")
    (tmp_path / "w2.csv").write_text("whole,other,y\n1,2,no\n")
    assert len(load(f"{tmp_path}/w*.csv", target="y", columns="whole")) == 61
    with pytest.raises(UsageError, match="No file matches"):
        load(f"{tmp_path}/v*.csv")


def test_latin_1_binary_and_nested_files(tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes("a,b,y\n1,é,0\n2,ü,1\n3,é,0\n".encode("latin-1"))
    with pytest.raises(UsageError, match="cannot be read") as error:
        load(path, target="y")
    assert "latin-1" in error.value.line
    assert load(path, target="y", encoding="latin-1").columns == ("a", "b=é", "b=ü")
    path.write_bytes(b"a,b,y\n\0\xff\xfe\0,1,2\n")
    with pytest.raises(UsageError, match="the bytes are no text"):
        load(path)
    nested = tmp_path / "n.parquet"
    pandas.DataFrame({"a": [[1], [2]], "y": [0, 1]}).to_parquet(nested)
    with pytest.raises(UsageError, match="Column 'a' contains List"):
        load(nested)
    TABLE.to_excel(tmp_path / "t.xlsx", index=False, sheet_name="May")
    codes = pandas.DataFrame({"u": range(4), "by": ["007", "7"] * 2, "y": ["a", "b"] * 2})
    codes.to_excel(tmp_path / "codes.xlsx", index=False)
    assert load(tmp_path / "codes.xlsx", target="y", by="by").names == ("007", "7")
    with pytest.raises(UsageError, match="no sheet 'Mai'"):
        load(tmp_path / "t.xlsx", sheet="Mai")
    with pytest.raises(UsageError, match="no sheet 'Sales'") as refusal:
        load(tmp_path / "t.xlsx", sheet="Sales")
    assert not refusal.value.line, "no sheet is similar"


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(files.importlib.util, "find_spec", lambda name: None)
    for name in ("t.parquet", "t.xlsx"):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(UsageError, match=r"pip install 'atoll\[tables\]'"):
            load(tmp_path / name)
