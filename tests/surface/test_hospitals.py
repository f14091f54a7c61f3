"""The example with four hospitals runs, and the manual quotes its table."""

import csv
import importlib.util
from pathlib import Path

import pandas
import pytest
from heart import heart_folder

from atoll.cli.answer import answer

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_example_prints_the_table_of_the_manual(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ATOLL_DATA", heart_folder())
    spec = importlib.util.spec_from_file_location("hospitals", ROOT / "examples" / "hospitals.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.main(["--out", str(tmp_path)])
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    manual = (ROOT / "docs" / "fair_evaluation.md").read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(manual) if line.startswith("hospital "))
    quoted = manual[start : start + 5]
    assert quoted == printed[printed.index(quoted[0]) :][:5]

    rows = list(csv.reader((tmp_path / "heart.csv").read_text(encoding="utf-8").splitlines()))
    assert len(rows) + len(pandas.read_csv(tmp_path / "new.csv")) == 920 + 1
    assert "?" in rows[1][:13] or any("?" in row for row in rows)
    path, out = next(p for p in tmp_path.iterdir() if p.is_dir()), tmp_path / "predictions.csv"
    assert answer(["predict", str(path), str(tmp_path / "new.csv"), "--to", str(out), "--proba", "--quiet"]) == 0
    predicted = pandas.read_csv(out)
    accuracy = (predicted["prediction"] == predicted["diagnosis"]).mean()
    assert f"{len(predicted)} new patients: accuracy {accuracy:.3f}" in "\n".join(printed)
