"""benchmarks/papers.py: its rows, its refusals, its JSON, and a file of results from which it continues."""

import json
import sys
from pathlib import Path

import pytest
from heart import heart_folder

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import papers
from paper_tables import images
from paper_tables.rows import Cell, Result, Row, Table

KEYS = ["row", "column", "ours", "sd", "published", "published_sd", "ok"]
HEART = ["fedavg", "fedprox", "scaffold", "fedadam", "fedyogi", "fedadagrad", "pooled", "local", "finetuned", "newton"]


def made(values, published=0.9):
    """A table without trainings: the value of a seed, and a row whose data is not available."""
    calls = []

    def run(seed, rounds, place):
        calls.append(seed)
        return Result({"accuracy": values[seed]}, rounds or 1, 0.5, 10, ("a note",))

    rows = {"ours": Row(run, {"accuracy": Cell(published, 0.02, 0.02)}), "far": Row(run, absent="CIFAR-10")}
    return Table(rows, "0-1"), calls


def test_a_row_is_its_values_the_published_one_and_one_json_object(monkeypatch, capsys, tmp_path):
    table, calls = made([0.90, 0.92])
    monkeypatch.setitem(papers.TABLES, "niid", lambda: table)
    words = ["niid", "--json", "--out", str(tmp_path / "found.jsonl")]
    assert papers.main(words) == 0
    text = capsys.readouterr().out
    found = json.loads(text.splitlines()[-1])
    assert list(found) == ["table", "rows"] and [list(cell) for cell in found["rows"]] == [KEYS]
    cell = found["rows"][0]
    assert cell["ours"] == pytest.approx(0.91) and cell["ok"] is True and cell["published_sd"] == 0.02
    assert "published 0.900 ± 0.020" in text and "+0.5 sd" in text and "10 bytes" in text and "a note" in text
    with (tmp_path / "found.jsonl").open("a") as file:
        file.write('{"key": ["niid", "ou')  # killed while it wrote
    assert papers.main(words) == 0 and json.loads(capsys.readouterr().out.splitlines()[-1]) == found
    assert calls == [0, 1]  # nothing is measured again


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["other"], "invalid choice: 'other'"),
        (["niid", "--rows", "mine"], "no row 'mine'; rows: ours, far"),
        (["niid", "--rows", "far"], "CIFAR-10 is not available"),
        (["niid", "--rows", "ours", "--synthetic"], "leave out --synthetic"),
        (["niid", "--seeds", "5-4"], "neither a seed nor a range"),
        (["niid", "--rounds", "0"], "no number of rounds"),
        (["niid", "--out", "nowhere/found.jsonl"], "there is no folder"),
        (["robust", "--rows", "Krum(4, m=12),mine"], "no row 'mine'"),
    ],
)
def test_refusals(words, message, monkeypatch, capsys):
    monkeypatch.setitem(papers.TABLES, "niid", lambda: made([1.0])[0])
    with pytest.raises(SystemExit) as error:
        papers.main(words)
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_random_images_are_no_reproduction(monkeypatch, capsys):
    table, _ = made([0.5])
    monkeypatch.setitem(papers.TABLES, "niid", lambda: table)
    papers.main(["niid", "--synthetic", "--seeds", "0"])
    assert "no value is a reproduction" in capsys.readouterr().out


def test_every_table_has_rows_and_cells_of_published_values():
    tables = {name: make() for name, make in papers.TABLES.items()}
    assert list(tables) == [
        "heart",
        "niid",
        "mcmahan",
        "adaptive",
        "scaffold",
        "fednova",
        "personal",
        "robust",
        "newton",
    ]
    assert set(HEART) <= set(tables["heart"].rows) and len(tables["niid"].rows) == 12
    for table in tables.values():
        for row in table.rows.values():
            demands = [cell for cell in row.cells.values() if cell.within is not None and cell.side == "both"]
            assert all(cell.published == cell.published for cell in demands)


def test_rounds_to_a_target_are_interpolated_on_the_best_so_far():
    assert images.rounds_to([0.5, 0.9, 0.8, 1.0], 0.95) == pytest.approx(3.5)
    assert images.rounds_to([0.5], 0.95) != images.rounds_to([0.5], 0.95)  # NaN


@pytest.mark.slow
@pytest.mark.parametrize("words", [["heart", "--seeds", "42-46", "--rows", "fedavg,fedprox,scaffold,fedyogi,newton"]])
def test_published_cells_of_the_hospitals(words, capsys):
    heart_folder()
    papers.main([*words, "--json"])
    cells = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [cell for cell in cells if cell["ok"] is False] == []


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_three_rounds_of_niid_bench(capsys):
    papers.main(["niid", "--rows", "iid-fedavg", "--rounds", "3", "--json"])
    cells = {cell["column"]: cell["ours"] for cell in json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]}
    assert cells["best"] >= cells["last"] > 80
