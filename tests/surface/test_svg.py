"""Charts as SVG: the place of each value, text as text, colours of both themes, bounded size, equal bytes."""

import math
import random
import re
from xml.etree import ElementTree

import pytest

from atoll.report.chart import Axis, Band, Boxes, Drawing, Panel, Points, ReferenceLine, Series, fit, suits_log, thin
from atoll.report.svg import palette, svg

NS = "{http://www.w3.org/2000/svg}"


def one(*marks, width=520, **more):
    return svg(Drawing("a", "A chart.", [[Panel(marks, **more)]]), width)


def path_of(text, selector):
    found = [e.get("d") for e in ElementTree.fromstring(text).iter(f"{NS}path") if e.get("class") == selector]
    return [tuple(map(float, p)) for p in re.findall(r"[ML]([\d.]+) ([\d.]+)", found[0])]


def texts(text):
    return [e.text for e in ElementTree.fromstring(text).iter(f"{NS}text")]


def test_points_match_the_axes():
    """On a linear axis, pixels are an affine function of values; on a log axis, of their logarithms."""
    x, y = [0, 1, 4, 10], [1.0, 10.0, 100.0, 1000.0]
    for log in (False, True):
        placed = path_of(one(Series(x, y), y=Axis(log=log)), "l s0")
        scaled = [math.log(v) if log else v for v in y]
        for got, wanted in ((0, x), (1, scaled)):
            pixels = [p[got] for p in placed]
            slope = (pixels[-1] - pixels[0]) / (wanted[-1] - wanted[0])
            assert pixels == pytest.approx([pixels[0] + slope * (w - wanted[0]) for w in wanted], abs=0.11)


def test_text_is_text_and_never_markup():
    hostile = '<script>alert(1)</script>"&\x00\x1b\ud800'
    made = one(
        *(Series([0, 1], [1, 2], name=hostile), ReferenceLine(1, name=hostile)),
        *(Points([1], [1], name=hostile), Boxes([0], [1], [0], [1], name=hostile)),
        title=hostile, remark=hostile, x=Axis(hostile, ticks=[(0, hostile)]), y=Axis(hostile), names="top",
    )  # fmt: skip
    assert {e.tag for e in ElementTree.fromstring(made).iter()} == {
        f"{NS}{t}" for t in ("svg", "style", "path", "text")
    }
    assert '<script>alert(1)</script>"&···' in texts(made)


def test_equal_input_gives_equal_bytes_without_a_style_attribute():
    marks = (Series([0, 1], [1, 2], name="one"), Band([0, 1], [0, 1], [2, 3]))
    assert one(*marks) == one(*marks)
    assert " style=" not in one(*marks) and "<style>" in one(*marks)
    assert "<style>" not in svg(Drawing("a", "", [[Panel(marks)]]), style=False)


def test_a_value_that_is_not_finite_interrupts_the_line_and_has_a_cross():
    made = one(Series([0, 1, 2, 3, 4], [1, 2, math.nan, 2, math.inf]))
    line = next(e for e in ElementTree.fromstring(made).iter(f"{NS}path") if e.get("class") == "l s0")
    assert line.get("d").count("M") == 2 and made.count("l6 6m-6 0l6 -6") == 2
    for empty in ([], [math.nan]):
        ElementTree.fromstring(one(Series(empty, empty), Band(empty, empty, empty), y=Axis(log=True)))


def test_thin_keeps_the_extremes_the_ends_and_the_bound():
    draw = random.Random(0)
    y = [draw.random() for _ in range(10_000)]
    y[1234], y[7777], y[500] = 5.0, -5.0, math.nan
    x, kept = thin(range(len(y)), y)
    assert len(x) <= 2000 and x == sorted(x) and (x[0], x[-1]) == (0, 9999)
    assert max(kept) == 5.0 and min(kept) == -5.0 and all(y[int(i)] == v for i, v in zip(x, kept, strict=True))
    assert thin([1, 2], [3, 4]) == ([1.0, 2.0], [3.0, 4.0])
    assert all(math.isnan(v) for v in thin(range(9999), [math.nan] * 9999)[1])


def test_ticks_are_round_values_inside_the_axis():
    assert [t for _, t in fit(Axis(unit="bytes"), [0, 3e6]).ticks] == ["0", "1 MB", "2 MB", "3 MB"]
    assert [t for _, t in fit(Axis(unit="seconds"), [0, 240.0]).ticks][-1] == "4 min"
    assert all(v == int(v) for v, _ in fit(Axis(unit="count"), [3, 4]).ticks)
    assert [v for v, _ in fit(Axis(log=True), [1e-6, 1.0]).ticks][:2] == [1e-6, 1e-5]
    draw = random.Random(1)
    for _ in range(200):
        low = draw.uniform(-1, 1) * 10 ** draw.randint(-12, 12)
        scale = fit(Axis(), [low, low + abs(draw.gauss(0, 1)) * 10 ** draw.randint(-12, 12)])
        assert all(scale.low <= v <= scale.high or v == pytest.approx(scale.low) for v, _ in scale.ticks)
    assert suits_log([1.0, 20.0]) and not suits_log([0.0, 20.0]) and not suits_log([math.nan])


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
    return sum(w * v for w, v in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("dark", [False, True])
def test_contrast_of_text_and_lines(dark):
    """WCAG 2.2: at least 4.5 for text and names of lines, at least 3 for lines and edges."""
    colours = palette(dark)
    text = {("card", n) for n in ("ink", "soft", "link", *(f"s{i}" for i in range(8)))} | {("paper", "soft")}
    text |= {("good-paper", "good"), ("bad-paper", "bad"), ("mark", "ink"), ("paper", "ink"), ("paper", "link")}
    for back, front, least in [(b, f, 4.5) for b, f in text] + [("card", "edge", 3), ("paper", "edge", 3)]:
        light, deep = sorted((luminance(colours[back]), luminance(colours[front])), reverse=True)
        assert (light + 0.05) / (deep + 0.05) >= least, (back, front)
