"""Tables: columns that are read, guesses with their notes, and files that are refused."""

import gzip

import numpy as np
import pandas
import pyarrow
import pytest
import torch

import atoll
from atoll.base.errors import UsageError
from atoll.data import csv, frame, load
from atoll.data.tabular import table

FLATS = """area,city,floor,site,price
60,Oslo,1,north,3.5
80,Rome,2,south,3.0
?,Oslo,3,north,4.5
45,,1,south,2.25
70,Rome,NA,north,3.75
90,Oslo,2,south,5.5
"""


@pytest.fixture
def flats(tmp_path):
    path = tmp_path / "flats.csv"
    path.write_text(FLATS)
    return path


def test_columns_levels_and_guesses(flats):
    data = csv(flats, by="site")
    assert data.columns == ("area", "city=Oslo", "city=Rome", "city=?", "floor")
    assert data.kind == "regression" and data.names == ("north", "south")
    assert data.by.tolist() == [0, 1, 0, 1, 0, 1]
    assert data.notes == (
        "Target guessed: the last column, 'price'.",
        "2 rows lack a value: filled with the train rows' means.",
        "Column 'city': 1 missing cell has the level '?'.",
        "Column 'city' contains texts: one column for each of 3 levels, found in all rows.",
        "Task guessed from numbers in column 'price': regression.",
        "Predictions of the target 'price' are in its own units.",
        "The loss is in units of the standard deviation of 'price' over the train rows.",
    )
    assert csv(flats, target="price", by="site", task="regression", missing="drop").notes[0].startswith("3 rows")


def test_missing_values_are_the_train_rows_means(flats):
    data = csv(flats, target="price", scale="none").split(2, held_out=0.3)
    x = data.rows.take(torch.arange(6))[0]
    raw = csv(flats, target="price", scale="none").rows.take(torch.arange(6))[0]
    train = raw[data.pooled().order]
    assert x[2, 0] == train[:, 0].nanmean()
    assert x[3, 1:4].tolist() == [0, 0, 1]  # a missing text has a level of its own
    assert not x.isnan().any()
    scaled = csv(flats, target="price").split(2, held_out=0.3).rows.take(torch.arange(6))[0]
    assert scaled[2, 0] == 0


def test_incomplete_rows_are_dropped(flats):
    data = csv(flats, target="price", missing="drop")
    assert len(data) == 3 and data.columns[1:3] == ("city=Oslo", "city=Rome")


def test_a_level_that_training_never_sees_does_no_harm():
    df = pandas.DataFrame({"a": np.arange(20.0), "c": ["x"] * 19 + ["rare"], "y": np.linspace(0, 1, 20)})
    for seed in range(20):
        data = frame(df, target="y").split(2, seed=seed)
        x = data.rows.take(torch.arange(20))[0]
        assert torch.isfinite(x).all() and x.abs().max() < 10


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
def test_separators_gzip_and_byte_order_mark(tmp_path, mark):
    path = tmp_path / "flats.csv.gz"
    with gzip.open(path, "wt", encoding="utf-8-sig") as file:
        file.write(FLATS.replace(",", mark))
    data = csv(path, by="site", target="price")
    assert data.columns[0] == "area" and len(data) == 6
    assert any("guessed to end" in note for note in data.notes) == (mark != ",")


def test_load_takes_a_path_and_quotes_are_read(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('a,"b, c",y\n1,"x ""y""",no\n2,z,yes\n')
    data = load(path, target="y", scale="none")
    assert data.columns == ("a", 'b, c=x "y"', "b, c=z") and data.classes == ("no", "yes")


@pytest.mark.parametrize(
    ("target", "task", "kind"),
    [
        (["a", "b", "a"], None, "classification"),
        ([1, 2, 1], None, "classification"),
        ([1.0, 2.0, 1.0], None, "classification"),
        ([1.5, 2.0, 1.0], None, "regression"),
        ([True, False, True], None, "classification"),
        ([1, 2, 1], "regression", "regression"),
        ([1.5, 2.0, 1.0], "classification", "classification"),
    ],
)
def test_the_task_follows_from_the_target_with_a_note(target, task, kind):
    data = frame(pandas.DataFrame({"x": [1, 2, 3], "y": target}), target="y", task=task)
    assert data.kind == kind
    assert any("Task guessed" in note for note in data.notes) == (task is None)


def test_many_whole_numbers_are_a_regression():
    assert frame(pandas.DataFrame({"x": range(30), "y": range(30)}), target="y").kind == "regression"


def test_frames_keep_their_own_types():
    df = pandas.DataFrame(
        {
            "whole": pandas.array([1, None, 3, 4], dtype="Int64"),
            "flag": [True, False, True, True],
            "level": pandas.Categorical(["a", "b", None, "a"]),
            "code": pandas.Categorical(["1", "2", "1", "2"]),
            "text": ["1.5", "2", "?", "4"],
            "y": [0.5, 1.5, 2.5, 3.5],
        },
        index=[7, 7, 8, 9],
    )
    data = frame(df, target="y", scale="none")
    assert data.columns == ("whole", "flag", "level=a", "level=b", "level=?", "code=1", "code=2", "text")
    x = data.rows.take(torch.arange(4))[0]
    assert x[1, 0].isnan() and x[:, 1].tolist() == [1, 0, 1, 1] and x[2, 2:5].tolist() == [0, 0, 1]
    assert x[[0, 1, 3], 7].tolist() == [1.5, 2, 4] and x[2, 7].isnan()
    assert "Column 'text' contains texts that are numbers" in " ".join(data.notes)


def test_rows_without_a_target_are_left_out_with_a_note(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("x,site,y\n1,a,0\n2,b,\n3,a,1\n4,b,NA\n")
    data = csv(path, by="site")
    assert len(data) == 2 and data.names == ("a",)
    assert "2 rows without a target were left out: '' (1 row), 'NA' (1 row)." in data.notes


@pytest.mark.parametrize(
    ("text", "words", "match"),
    [
        ("a,b\n1,2\n3\n", {}, r"Line 3 of .* has 1 cell"),
        ("a,b\n", {}, "has 0 rows"),
        ("", {}, "has 0 rows"),
        ("1,2\n3,4\n", {}, "contains only numbers"),
        ("a,a\n1,2\n", {}, "Two columns are called 'a'"),
        ("a,b\n1,inf\n", {}, "Column 'b' contains inf at row 0"),
        ("a,b\n1,2\n-Infinity,3\n", {}, "Column 'a' contains -inf at row 1"),
        ("a,b\n1,\n", {}, "Of 1 row, 1 lack a target"),
        ("a,b\n?,1\n", {"missing": "drop"}, "1 lack another value"),
        ("a,b\n1,2\n", {"target": "c"}, "No column is called 'c'"),
        ("price,b\n1,2\n", {"target": "prize"}, 'Write: target="price"'),
        ("a,b\n1,2\n", {"by": "c"}, "No column is called 'c'"),
        ("a,b\n1,2\n", {"missing": "median"}, "drop, mean"),
        ("a,b\n1,2\n2,3\n", {"scale": "minmax"}, "No scale is called 'minmax'"),
        ("a,b\n1,2\n2,3\n", {"task": "ranking"}, "No task is called 'ranking'"),
        ("a,b\n1,x\n2,y\n", {"task": "regression"}, "Column 'b' contains texts, such as 'x'"),
        ("a\n1\n", {}, "a target, and at least one feature"),
        ("a,b\n1,2\n", {"by": "a"}, "a target, and at least one feature"),
        ("a,s,b\n1,,2\n3,x,4\n", {"by": "s"}, "column 's' has no value at row 0"),
        ("a,b\n" + "".join(f"t{i % 101},1\n" for i in range(102)), {}, "101 different texts, 't0' at row 0"),
        ('a,b\n"1,2\n', {}, "cannot be read"),
    ],
)
def test_bad_tables_are_refused(tmp_path, text, words, match):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(UsageError, match=match) as error:
        csv(path, **words)
    assert error.value.exit_code == 2


def test_one_word_among_numbers_is_found(tmp_path):
    path = tmp_path / "bad.csv"
    path.write_text("age,y\n" + "".join(f"{i}.5,1\n" for i in range(200)) + "12 years,0\n")
    with pytest.raises(UsageError, match="'12 years' at row 200"):
        csv(path)


def test_files_that_are_not_there_or_not_text(tmp_path):
    with pytest.raises(UsageError, match="There is no file"):
        load(tmp_path / "none.csv")
    with pytest.raises(UsageError, match="cannot be read"):
        (tmp_path / "a.csv").write_bytes(b"a,b\n\xff\xfe,1\n")
        load(tmp_path / "a.csv")
    with pytest.raises(UsageError, match="cannot be read"):
        (tmp_path / "a.csv.gz").write_bytes(b"a,b\n1,2\n")
        load(tmp_path / "a.csv.gz")


def test_twin_columns_in_frames():
    with pytest.raises(UsageError, match="Two columns"):
        frame(pandas.DataFrame([[1, 2]], columns=["a", "a"]))


def test_the_text_none_is_a_level_and_changes_no_bit_of_a_training(tmp_path):
    """`none|some|heavy` trains as `never|some|heavy`: a text is a level, and no missing value."""
    losses = []
    for word in ("none", "never"):
        rows = [
            f"{i % 7},{(word, 'some', 'heavy')[i % 3]},{'yes' if i % 3 == 2 or i % 7 > 4 else 'no'}" for i in range(90)
        ]
        (tmp_path / "t.csv").write_text("\n".join(["age,alcohol,ill", *rows]) + "\n")
        data = load(tmp_path / "t.csv", target="ill").split(3)
        training = atoll.rounds("logistic", data, atoll.recipes.gd(0.5), rounds=10, dtype="float64")
        losses.append(list(training)[-1].metrics["held_out_loss"])
    assert losses[0] == pytest.approx(losses[1], abs=1e-12)


@pytest.mark.parametrize("plain", [True, False])
def test_codes_keep_all_their_digits(tmp_path, monkeypatch, plain):
    """Clients and classes such as 007 and numbers beyond 2^53 are not merged, by both readers and in frames."""
    monkeypatch.setattr("atoll.data.files._Csv._plain", lambda self: plain)
    path, big = tmp_path / "t.csv", 2**53
    ids, classes = ["007", "7", str(big), str(big + 1)], ["01", "1.0", "02", str(big + 1)]
    path.write_text("u,by,y\n" + "\n".join(f"{i},{ids[i % 4]},{classes[i % 4]}" for i in range(40)))
    source = csv(path, target="y", by="by")
    assert source.names == ("007", "7", str(big), str(big + 1)) and source.classes == ("01", "02", "1", str(big + 1))
    run = atoll.train("softmax", source.split(), atoll.recipes.fedavg(0.1), rounds=1, out=None, metrics="accuracy")
    assert set(run.predictor.evaluate({"u": [1]}, ["02"], ["007"]).clients) == {"007"}
    whole = pandas.DataFrame(
        {"u": range(40), "by": [big + i % 2 for i in range(40)], "y": [big + i % 3 for i in range(40)]}
    )
    for df in (whole, pyarrow.Table.from_pandas(whole)):
        found = frame(df, target="y", by="by")
        assert (len(found.names), len(found.classes)) == (2, 3)
    assert len(table("t", {"u": [1.0, 2, 3, 4], "y": [big, big + 1, big, big]}, target="y").classes) == 2


@pytest.mark.parametrize("plain", [True, False])
def test_a_typographic_minus_is_a_minus_and_an_underscore_is_no_digit(tmp_path, monkeypatch, plain):
    monkeypatch.setattr("atoll.data.files._Csv._plain", lambda self: plain)
    path = tmp_path / "t.csv"
    path.write_text("u;v;w;y\n" + "\n".join(f"−{i};−{i},5;{i % 3}_0;{i % 2}" for i in range(40)))
    source = csv(path, target="y")
    x, _ = source.rows.take(torch.tensor([3]))
    assert source.columns == ("u", "v", "w=0_0", "w=1_0", "w=2_0") and x.tolist() == [[-3.0, -3.5, 1.0, 0.0, 0.0]]


def test_a_target_of_one_class_has_a_note():
    found = table("t", {"u": [1.0, 2.0], "y": ["x", "x"]}, target="y")
    assert "All rows have the class 'x' in column 'y': every answer is right." in found.notes
