"""The example on tiny Shakespeare, on another text: the rows of clients, the messages, and that all three learn."""

import runpy
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from atoll.plan.codec import Quantize

EXAMPLE = Path(__file__).parents[2] / "examples" / "shakespeare.py"
TEXT = "to be, or not to be: that is the question.\n" * 120


@pytest.fixture(scope="module")
def example():
    return runpy.run_path(str(EXAMPLE))


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    file = tmp_path_factory.mktemp("data") / "tinyshakespeare.txt"
    file.write_text(TEXT, encoding="ascii")
    return file


@given(st.integers(1, 6), st.integers(1, 70), st.integers(1, 5))
def test_windows_predict_their_own_text_and_overlap_no_held_out_text(example, file, workers, block, every):
    data = example["shakespeare"](file, workers, block, every)
    symbols, cut = sorted(set(TEXT)), int(0.9 * len(TEXT))
    assert data.count == workers and len(set(data.sizes.tolist())) == 1
    number = {s: i for i, s in enumerate(symbols)}
    text = torch.tensor([number[s] for s in TEXT])
    for rows, low, high in ((data.rows, 0, cut), (data.held_out, cut, len(TEXT))):
        x, y = rows.take(torch.arange(len(rows)))
        assert x.shape == y.shape == (len(rows), block) and torch.equal(x[:, 1:], y[:, :-1])
        assert int(rows.starts.min()) >= low and int(rows.starts.max()) + block < high
        assert torch.equal(y[:, -1], text[rows.starts + block])
    ends = [int(data.rows.starts[data.client_rows(i)].max()) for i in range(workers)]
    begins = [int(data.rows.starts[data.client_rows(i)].min()) for i in range(workers)]
    assert all(end < begin for end, begin in zip(ends, begins[1:], strict=False))


def test_schedules_of_all_three_meet(example):
    """A round of many iterations has about the rate of the iterations in it; both end at a tenth of the highest."""
    plans = example["plans"](3, 2000, 20)
    one, many = plans["data-parallel"][0].optimizer.schedule, plans["DiLoCo, 8 bits"][0].local.optimizer.schedule
    assert many == plans["local SGD"][0].local.optimizer.schedule
    assert one(2000) == many(100) == 1e-4 and one(100) == many(5) == 1e-3
    for t in range(5, 100):
        assert abs(many(t) - one(20 * t)) < 1e-9


@pytest.mark.slow
def test_the_example_as_people_start_it(example, file, tmp_path, monkeypatch, capsys):
    picture = tmp_path / "picture.png"
    monkeypatch.setenv("ATOLL_DATA", str(file.parent))
    words = ["--iterations=8", "--batch=4", "--workers=2", "--block=8", "--steps=4", "--out", str(picture)]
    monkeypatch.setattr("sys.argv", ["shakespeare.py", *words])
    example["main"]()
    printed = capsys.readouterr()
    rows = {line[:16].strip(): line[16:].split() for line in printed.out.splitlines() if "x" in line[60:]}
    often, seldom, coarse = (rows[name] for name in ("data-parallel", "local SGD", "DiLoCo, 8 bits"))
    assert [r[1] for r in (often, seldom, coarse)] == ["8", "2", "2"]
    assert [r[4] for r in (often, seldom, coarse)] == ["1x", "4x", "16x"]
    assert Quantize(8).bits == 8 and float(coarse[2]) < 0.26 * float(seldom[2])
    looks = [line.split() for line in printed.err.splitlines() if line.startswith("   ")]
    losses = [float(loss) for _, loss in looks]
    assert losses[0] < 3.2 and min(losses) < losses[0]
    assert picture.stat().st_size > 10_000


@pytest.mark.parametrize("words", [["--workers=5"], ["--steps=7"]])
def test_values_that_do_not_divide_are_refused(example, file, monkeypatch, capsys, words):
    monkeypatch.setenv("ATOLL_DATA", str(file.parent))
    monkeypatch.setattr("sys.argv", ["shakespeare.py", *words])
    with pytest.raises(SystemExit):
        example["main"]()
    assert "must divide" in capsys.readouterr().err


def test_a_folder_without_the_text_is_named(example, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ATOLL_DATA", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["shakespeare.py"])
    with pytest.raises(SystemExit):
        example["main"]()
    assert str(tmp_path) in capsys.readouterr().err
