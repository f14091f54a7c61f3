"""Lines and bands of any number of runs: numpy's means and deviations, notes, files and refusals."""

import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
from scipy import stats

import atoll
from atoll.base.errors import UsageError
from atoll.cli import main
from atoll.report.figure import Estimate, mean

RNG = np.random.default_rng(3)


def made(folder, values, seed=0, recipe="gd(0.1)", rows="A", done=True, **more):
    """A run folder with a metric in each round."""
    folder.mkdir(parents=True)
    config = f'recipe = "{recipe}"\nseed = {seed}\nout = "{folder.parent}"\n'
    (folder / "config.toml").write_text(config)
    (folder / "environment.json").write_text(json.dumps({"held_out": f"{rows}{seed}"} if rows else {}))
    costs = {"bytes_up": 100, "bytes_down": 50, "seconds": 0.5 + seed, **more}
    lines = [{"round": t, "fingerprint": f"{v!r}", "accuracy": v, **costs} for t, v in enumerate(values)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "events.jsonl").write_text(json.dumps({"event": "stop", "status": "done"}) if done else "")
    return folder


@pytest.fixture
def grid(tmp_path, monkeypatch):
    """Two recipes with three seeds, in runs/."""
    monkeypatch.chdir(tmp_path)
    values = RNG.random((2, 3, 6))
    for i, recipe in enumerate(("gd(0.1)", "gd(0.5)")):
        for seed in range(3):
            made(tmp_path / "runs" / f"r{i}{seed}", values[i, seed].tolist(), seed, recipe)
    return values


def test_the_plot_of_a_run_has_its_rows(tmp_path):
    data = atoll.data.load("wine").split(clients=3)
    run = atoll.train("softmax", data, "fedavg(lr=0.1)", rounds=3, out=tmp_path, report=False)
    frame = run.frame()
    plot = run.plot("accuracy", "loss", x="bytes")
    first, second = (panel.marks[0] for panel in plot.drawing.rows[0])
    spent = (frame["bytes_up"] + frame["bytes_down"]).cumsum()
    assert first.x == spent.tolist() and first.y == frame["accuracy"].tolist() and second.y == frame["loss"].tolist()
    assert run.plot().drawing.rows[0][0].title == "accuracy"
    assert plot._repr_mimebundle_()["image/svg+xml"].startswith("<svg") and len(repr(plot)) < 400
    assert (
        plot.save(tmp_path / "a.svg").read_bytes()
        == run.plot("accuracy", "loss", x="bytes").save(tmp_path / "b.svg").read_bytes()
    )
    for metrics, x, match in (
        (["acuracy"], "round", "accuracy"),
        (["loss"], "byte", "bytes"),
        (["loss"], "clock", "fleet"),
    ):
        with pytest.raises(UsageError, match=match):
            run.plot(*metrics, x=x)


def test_means_and_deviations_are_those_of_numpy(grid):
    found = atoll.compare("r*")
    assert [g.name for g in found.groups] == ["gd(0.1)", "gd(0.5)"] and found.notes == ()
    frame = found.frame()
    for i, g in enumerate(found.groups):
        mine = frame[frame["line"] == g.name]
        assert np.abs(mine["mean"] - grid[i].mean(axis=0)).max() < 1e-12
        assert np.abs(mine["sd"] - grid[i].std(axis=0, ddof=1)).max() < 1e-12
        low, high = g.band("ci")
        ends = stats.t.interval(0.95, 2, grid[i].mean(axis=0), stats.sem(grid[i], axis=0))
        assert np.allclose([low, high], ends, atol=1e-12, rtol=0)
        assert np.array_equal(g.band("range"), [grid[i].min(axis=0), grid[i].max(axis=0)])
        assert (g.last.mean, g.last.n) == (pytest.approx(grid[i, :, -1].mean(), abs=1e-12), 3)
        assert g.best(True).sd == pytest.approx(grid[i].max(axis=1).std(ddof=1), abs=1e-12)
    assert found.same_rows and found.text().count(" *") == 1


@pytest.mark.parametrize(("x", "last"), [("bytes", 900), ("seconds", 9.0)])
def test_a_cost_is_the_mean_of_the_sums_of_the_runs(grid, x, last):
    assert atoll.compare("runs", x=x).groups[0].x(x)[-1] == last


def test_a_figure_has_a_line_and_a_band_for_each_group_and_equal_bytes(grid, tmp_path):
    files = [atoll.compare("r*").save(tmp_path / f"{i}.svg") for i in range(2)]
    text = files[0].read_text()
    assert files[1].read_text() == text and 'width="316.8"' in text
    assert "gd(0.1) (n=3)" in text and "± sd" in text and text.count("<text") > 5
    marks = atoll.compare("r*").figure().drawing.rows[0][0].marks
    assert [type(mark).__name__ for mark in marks] == ["Band", "Band", "Series", "Series"]
    pdfs = [atoll.compare("r*").save(tmp_path / f"{i}.pdf").read_bytes() for i in range(2)]
    assert pdfs[0] == pdfs[1] and pdfs[0][:4] == b"%PDF"


def test_different_held_out_rows_have_panels_and_no_winner(grid, tmp_path):
    made(tmp_path / "runs" / "s0", [0.1, 0.9], recipe="other", rows="B")
    found = atoll.compare("r*", "s0")
    figure = found.figure()
    assert [panel.title for panel in figure.drawing.rows[0]] == ["held-out rows 1", "held-out rows 2"]
    assert figure._repr_mimebundle_()["image/svg+xml"].startswith("<svg") and len(repr(figure)) < 400
    # A title fills a narrow panel, so the remark is below it.
    heights = re.findall(r'y="([\d.]+)"[^>]*>(held-out rows 1|± sd)<', found.save(tmp_path / "narrow.svg").read_text())
    assert len(heights) == 2 and float(heights[0][0]) < float(heights[1][0])
    assert not found.same_rows and "*" not in found.text() and "no winner" in found.notes[-1]
    made(tmp_path / "runs" / "u0", [0.1, 0.9], recipe="unknown", rows="")
    assert "not known" in atoll.compare("u0", "r00").notes[-1]
    # The third seed of one recipe is missing: its mean is over other rows.
    assert not atoll.compare("r0*", "r10", "r11").same_rows


def test_notes_state_seeds_lengths_ends_and_repetitions(tmp_path):
    made(tmp_path / "a", [0.1, 0.2, 0.3], 0, done=False)
    made(tmp_path / "b", [0.2, 0.3], 1)
    made(tmp_path / "c", [0.2, 0.3], 1)
    found = atoll.compare(tmp_path)
    (group,) = found.groups
    assert group.runs == ("a", "b") and len(group.by_round) == 2 and len(group.curves) == 2
    assert found.notes == (
        "c repeats b, and is left out.",
        "a is not finished: 3 rounds.",
        "a: runs of 2 to 3 rounds; the line ends at round 2.",
    )
    assert atoll.compare(tmp_path / "b").notes == ("One seed for every line: no band.",)
    assert len(atoll.compare(tmp_path, group="seed").groups) == 2


def test_a_title_names_a_line(grid, tmp_path):
    for seed in range(3):
        main(["tag", f"r0{seed}", "--title", "small steps"])
    assert atoll.compare("r*").groups[0].name == "small steps"


def test_tables_carry_the_digits_of_the_deviation(grid, tmp_path):
    found = atoll.compare("r*", target=0.0)
    table = np.genfromtxt(found.save(tmp_path / "t.csv"), delimiter=",", names=True, dtype=None, encoding="utf-8")
    assert table["last"] == pytest.approx(grid[:, :, -1].mean(axis=1), abs=1e-12)
    assert table["rounds"].tolist() == [1.0, 1.0]
    assert r"$\pm$" in found.save(tmp_path / "t.tex").read_text()
    assert found.save(tmp_path / "t.md").read_text().splitlines()[1] == "| --- | --- | --- | --- | --- |"
    assert Estimate(0.91234, 0.0999, 3).text() == "0.91 ± 0.10"
    assert atoll.compare("r*", target=2.0).rows()[0]["rounds"] is None


def test_the_command_writes_figure_table_and_json(grid, tmp_path, capsys):
    assert main(["compare", "r*", "--to", "f.svg", "--table", "t.md", "--band", "range", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["files"] == ["f.svg", "t.md"] and facts["lines"][0]["runs"] == ["r00", "r01", "r02"]
    assert main(["compare", "r00", "r10", "--to", "pair.svg"]) == 0
    assert "settings that differ" in capsys.readouterr().out  # two runs without a flag of many


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["r*", "--metric", "acuracy"], "--metric accuracy"),
        (["r*", "--group", "recipes"], "--group recipe"),
        (["r*", "--x", "clock"], "--x seconds"),
        (["r*", "--table", "x.svgg"], "--to figure.svg"),
        (["r*", "--to", "x.svg", "--width", "0"], "--width 3.3"),
        (["q*"], "atoll runs"),
        (["r*", "n0"], "atoll runs"),
        (["r*", "m0", "--metric", "extra"], "no values of extra"),
        ([], "atoll runs"),
    ],
)
def test_a_wrong_request_is_refused(words, part, grid, tmp_path, capsys):
    made(tmp_path / "runs" / "n0", [])
    made(tmp_path / "runs" / "m0", [0.5], extra=1.0)
    assert main(["compare", *words]) == 2
    assert part in capsys.readouterr().err


def test_a_pdf_without_matplotlib_names_the_extra(grid, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match=r"pip install 'atoll\[plots\]'"):
        atoll.compare("r*").save(tmp_path / "x.pdf")


def test_a_table_of_runs_starts_without_numpy(grid):
    """The import of NumPy would take a quarter of the command's time."""
    code = "import sys; from atoll.cli import main; main(['compare', 'r*']); print('numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False" and "± " in done.stdout


def test_values_that_are_not_finite(tmp_path):
    made(tmp_path / "a", [0.1, math.nan], 0)
    made(tmp_path / "b", [0.2, math.inf], 1)
    (group,) = atoll.compare(tmp_path).groups
    assert math.isnan(group.last.mean) and math.isnan(group.last.sd) and group.best(True).mean == pytest.approx(0.15)
    assert all(math.isnan(end[-1]) for kind in ("sd", "range") for end in group.band(kind))
    assert math.isnan(mean([math.inf, -math.inf])) and mean([1e308, 1e308]) == math.inf
