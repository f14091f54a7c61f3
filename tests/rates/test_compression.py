"""The claims of examples/compression.py hold on real images."""

import re
import runpy
from pathlib import Path

import pytest

from atoll.data.named import DEBIAN_FASHION

EXAMPLE = Path(__file__).parents[2] / "examples" / "compression.py"
FASHION = pytest.mark.skipif(not DEBIAN_FASHION.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
ROW = re.compile(r"^ +(all|10%) +(\d+) +(none|compressed) +([\d.]+)% +([-+][\d.]+) +([\d.]+) +1/(\d+) ", re.MULTILINE)


def table(monkeypatch, capsys, *words: str) -> list[tuple[str, str, float, int]]:
    """Return (participation, codec, difference in points, factor of fewer bytes) of each row of the output."""
    monkeypatch.setattr("sys.argv", ["compression.py", *words])
    runpy.run_path(str(EXAMPLE))["main"]()
    rows = ROW.findall(capsys.readouterr().out)
    assert [(who, name) for who, _, name, *_ in rows] == [
        (who, name) for who in ("all", "10%") for name in ("none", "compressed")
    ]
    return [(who, name, float(points), int(times)) for who, _, name, _, points, _, times in rows]


@pytest.mark.slow
@FASHION
def test_the_example_runs(monkeypatch, capsys):
    words = ("--clients", "10", "--rounds", "2", "--part-rounds", "2", "--steps", "1")
    rows = table(monkeypatch, capsys, *words)
    assert [times for *_, times in rows[::2]] == [1, 1] and min(times for *_, times in rows[1::2]) > 50


@FASHION
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_fiftieth_of_the_bytes_costs_less_than_half_a_point(monkeypatch, capsys):
    for _, name, points, times in table(monkeypatch, capsys):
        if name == "compressed":
            assert times >= 50 and points >= -0.5
