"""Fleets as values: they print, parse back, draw by the laws that they name, and refuse ambiguous settings."""

import math
import shlex
import subprocess

import pytest
import torch
from fleets import FLEETS, LAWS, SIZES
from hypothesis import given
from hypothesis import strategies as st

from atoll.base.errors import UsageError
from atoll.base.grammar import parse
from atoll.base.random import Key
from atoll.engine.simulation.availability import window_index
from atoll.engine.simulation.clock import Clock
from atoll.engine.simulation.fleet import (
    FLEET,
    Between,
    ByRows,
    Chance,
    Each,
    Exponential,
    Fleet,
    HalfNormal,
    LogNormal,
    Trace,
    Windows,
    Zipf,
    rate,
)


@given(FLEETS)
def test_the_text_of_a_fleet_builds_it(fleet):
    assert parse(repr(fleet), FLEET) == fleet
    assert hash(parse(repr(fleet), FLEET)) == hash(fleet)


def test_the_default_fleet_has_a_short_text():
    assert repr(Fleet()) == "Fleet()"
    assert parse("Fleet(ByRows(HalfNormal()), server='100 Mb/s')", FLEET) == Fleet(
        ByRows(HalfNormal(1.0)), server="100 Mb/s"
    )


@pytest.mark.parametrize(
    ("text", "bytes_a_second"),
    [
        ("100 Mb/s", 12.5e6),
        ("10 Gb/s", 1.25e9),
        ("1.5 MB/s", 1.5e6),
        ("8b/s", 1.0),
        ("56 kb/s", 7000.0),
        ("56 Kb/s", 7000.0),
        ("1 MiB/s", 2.0**20),
        ("2e3 B/s", 2000.0),
        (" 1 TB/s ", 1e12),
        (3, 3.0),
        (0.5, 0.5),
    ],
)
def test_rates(text, bytes_a_second):
    assert rate(text) == bytes_a_second


N = 100_000


@pytest.mark.parametrize(
    ("law", "mean", "sd"),
    [
        (HalfNormal(3.0), 3 * math.sqrt(2 / math.pi), 3 * math.sqrt(1 - 2 / math.pi)),
        (LogNormal(2.0, 0.5), 2 * math.exp(0.125), 2 * math.exp(0.125) * math.sqrt(math.exp(0.25) - 1)),
        (Exponential(4.0), 4.0, 4.0),
        (Between(1.0, 3.0), 2.0, 1 / math.sqrt(3)),
    ],
)
def test_means_of_the_laws(law, mean, sd):
    x = law.draws(Key(3), SIZES)(torch.arange(N))
    assert bool((x > 0).all())
    low, high = law.bounds
    assert low <= float(x.min()) and float(x.max()) <= high
    # Six standard errors: one false alarm in 10⁹.
    assert abs(float(x.mean()) - mean) < 6 * sd / math.sqrt(N)
    assert abs(float(x.std()) / sd - 1) < 0.1


@pytest.mark.parametrize("a", [1.2, 2.0, 4.0])
def test_zipf_draws_k_to_the_minus_a(a):
    k = Zipf(a, scale=0.5).draws(Key(3), SIZES)(torch.arange(N)) / 0.5
    mass = torch.arange(1, 10**6 + 1, dtype=torch.float64) ** -a
    chance = mass / mass.sum()
    assert torch.equal(k, k.floor())
    for value in (1, 2, 3, 10):
        p = float(chance[value - 1])
        assert abs(float((k == value).double().mean()) - p) < 6 * math.sqrt(p * (1 - p) / N)
    tail = float(chance[100:].sum())
    assert abs(float((k > 100).double().mean()) - tail) < 6 * math.sqrt(tail * (1 - tail) / N)


@given(LAWS, st.integers(0, 10**6), st.integers(0, 10**6))
def test_a_draw_depends_on_its_own_id_alone(law, seed, number):
    draw = law.draws(Key(seed), SIZES)
    if isinstance(law, Each):
        number %= len(SIZES)
    others = torch.tensor([4, number, 2])
    assert draw(others)[1] == draw(torch.tensor([number]))[0]


def test_a_client_with_more_rows_computes_longer():
    plain = Clock(Fleet(HalfNormal()), SIZES, 7)
    by_rows = Clock(Fleet(ByRows(HalfNormal())), SIZES, 7)
    for client, rows in enumerate(SIZES.tolist()):
        share = by_rows.compute_seconds(client, 0) / plain.compute_seconds(client, 0)
        assert share == pytest.approx(rows / 4)
    flights = Clock(Fleet(ByRows(HalfNormal(per="flight"))), SIZES, 7)
    assert flights.compute_seconds(4, 1) == pytest.approx(10 * flights.compute_seconds(0, 1))
    assert flights.compute_seconds(4, 1) != flights.compute_seconds(4, 2)


# Traces


def written(tmp_path, text):
    path = tmp_path / "a trace.csv"
    path.write_text(text)
    return str(path)


def test_a_trace_is_read_by_its_header(tmp_path):
    path = written(tmp_path, "region,client,seconds\nnorth,1,2.5\n\nsouth,0,1e1\n")
    clock = Clock(Fleet(Trace(path, column="seconds")), torch.tensor([1, 1]), 0)
    assert [clock.compute_seconds(client, 9) for client in (0, 1)] == [10.0, 2.5]
    assert parse(repr(Trace(path)), FLEET) == Trace(path)


def test_windows_repeat_with_the_latest_end(tmp_path):
    path = written(tmp_path, "client,start,end\n0,0,1\n1,3,4\n0,2,3\n")
    clock = Clock(Fleet(availability=Windows(path)), torch.tensor([1, 1]), 0)
    seen = []
    for _ in range(9):
        seen.append((clock.now, clock.available(0), clock.available(1)))
        assert clock.present().tolist() == list(seen[-1][1:])
        clock.next(until=clock.next_change())
    one = [(True, False), (False, False), (True, False), (False, True)]
    assert seen == [(float(t), *one[t % 4]) for t in range(9)]


BAD_VALUES = [
    ("", "no header"),
    ("client,size\n0,1\n", "another column"),
    ("client,value,value\n0,1,1\n", "a column twice"),
    ("client,value\n0,1\n1,2,3\n", "a longer line"),
    ("client,value\n0,1\n1\n", "a shorter line"),
    ("client,value\n0,1\n0,1\n", "a client twice"),
    ("client,value\n0,1\n2,1\n", "an unknown client"),
    ("client,value\n0,1\n-1,1\n", "a negative client"),
    ("client,value\n0,1\nx,1\n", "a client that is no number"),
    ("client,value\n0,1\n", "a client missing"),
    ("client,value\n0,1\n1,nan\n", "not a number"),
    ("client,value\n0,1\n1,\n", "an empty cell"),
    ("client,value\n0,1\n1,inf\n", "infinite"),
    ("client,value\n0,1\n1,-2\n", "negative"),
    ("client,value\n0,1\n1,0\n", "zero"),
    ('client,value\n0,1\n1,"2\n', "an open quote"),
]
BAD_WINDOWS = [
    ("client,start\n0,1\n", "no end"),
    ("client,start,end\n0,0,1\n1,2,2\n", "of no length"),
    ("client,start,end\n0,0,1\n1,2,1\n", "backwards"),
    ("client,start,end\n0,0,1\n1,-1,1\n", "before 0"),
    ("client,start,end\n0,0,1\n1,0,nan\n", "without end"),
    ("client,start,end\n0,0,1\n1,4,6\n1,0,5\n", "over another"),
    ("client,start,end\n0,0,1\n", "nothing of a client"),
    ("client,start,end\n0,0,1\n1,0,1\n2,0,1\n", "an unknown client"),
]


def command_works(line):
    done = subprocess.run(shlex.split(line), capture_output=True, text=True, check=False)
    assert done.returncode == 0, (line, done.stderr)
    return done.stdout


@pytest.mark.parametrize(("text", "what"), BAD_VALUES, ids=[what for _, what in BAD_VALUES])
def test_a_trace_with_gaps_is_refused(tmp_path, text, what):
    path = written(tmp_path, text)
    for fleet in (Fleet(Trace(path)), Fleet(uplink=Trace(path)), Fleet(ByRows(Trace(path)))):
        with pytest.raises(UsageError) as caught:
            Clock(fleet, torch.tensor([1, 1]), 0)
    out = command_works(caught.value.line)
    if caught.value.given.startswith("Line"):
        number = int(caught.value.given.split()[1])
        assert out.strip() == text.splitlines()[number - 1]


@pytest.mark.parametrize(("text", "what"), BAD_WINDOWS, ids=[what for _, what in BAD_WINDOWS])
def test_windows_with_gaps_are_refused(tmp_path, text, what):
    path = written(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        Clock(Fleet(availability=Windows(path)), torch.tensor([1, 1]), 0)
    command_works(caught.value.line)


def test_the_overlap_is_found_at_its_line(tmp_path):
    path = written(tmp_path, "client,start,end\n0,0,1\n1,4,6\n1,0,5\n")
    with pytest.raises(UsageError, match=r"^Line 3 of .* client 1 start at 4, inside its window that ends at 5"):
        Clock(Fleet(availability=Windows(path)), torch.tensor([1, 1]), 0)


def test_files_that_are_not_there_or_no_text(tmp_path):
    (tmp_path / "bytes.csv").write_bytes(b"client,value\n\xff\xfe\n")
    for path in (tmp_path / "missing.csv", tmp_path, tmp_path / "bytes.csv"):
        with pytest.raises(UsageError) as caught:
            Clock(Fleet(Trace(path)), torch.tensor([1]), 0)
        command_works(caught.value.line)


# Bad values

REFUSED = [
    lambda: HalfNormal(0.0),
    lambda: HalfNormal(math.nan),
    lambda: HalfNormal("fast"),
    lambda: HalfNormal(1.0, per="round"),
    lambda: HalfNormal(-1.0, per=3),
    lambda: LogNormal(-1.0),
    lambda: LogNormal(1.0, -0.5),
    lambda: LogNormal(1.0, 1e3),
    lambda: Exponential(math.inf),
    lambda: Exponential(True),
    lambda: Zipf(1.0),
    lambda: Zipf(2.0, scale=0),
    lambda: Zipf(2.0, scale=1e300),
    lambda: Between(0.0, 1.0),
    lambda: Between(2.0, 1.0),
    lambda: Between(1.0, 1.0),
    lambda: Between(1.0, math.nan),
    lambda: Each(()),
    lambda: Each((1.0, -2.0)),
    lambda: Each((1.0, math.nan)),
    lambda: Each(3.0),
    lambda: Each("ab"),
    lambda: Trace(""),
    lambda: Trace(3),
    lambda: Windows(None),
    lambda: ByRows(0.0),
    lambda: ByRows("1 s"),
    lambda: ByRows(ByRows(1.0)),
    lambda: Chance(0.0),
    lambda: Chance(1.5),
    lambda: Chance(0.5, window=0),
    lambda: Fleet(-1.0),
    lambda: Fleet("1 s"),
    lambda: Fleet(compute=math.nan),
    lambda: Fleet(uplink="100 Mbps"),
    lambda: Fleet(uplink="fast", downlink="1.2.3 Mb/s", server="-1 Mb/s"),
    lambda: Fleet(downlink=0),
    lambda: Fleet(downlink=True),
    lambda: Fleet(uplink=ByRows(1.0)),
    lambda: Fleet(server=HalfNormal()),
    lambda: Fleet(server=math.inf),
    lambda: Fleet(server="1 ib/s"),
    lambda: Fleet(availability=0.0),
    lambda: Fleet(availability=1.1),
    lambda: Fleet(availability=HalfNormal()),
    lambda: Fleet(dropout=1.0),
    lambda: Fleet(dropout=-0.1),
    lambda: Fleet(latency=-1.0),
    lambda: rate("100"),
    lambda: rate(""),
    lambda: rate(None),
]


@pytest.mark.parametrize("act", REFUSED)
def test_ambiguous_values_are_refused(act):
    with pytest.raises(UsageError) as caught:
        act()
    instead = parse(caught.value.line, FLEET)
    if isinstance(instead, str):
        assert rate(instead) == 12.5e6
    elif not isinstance(instead, float):
        assert parse(repr(instead), FLEET) == instead


@pytest.mark.parametrize("clients", [1, 2, 5])
def test_values_for_another_population_are_refused(clients):
    fleet, sizes = Each((1.0, 2.0, 3.0)), torch.ones(clients, dtype=torch.int64)
    with pytest.raises(UsageError, match=f"3 values, and there are {clients} clients") as caught:
        Clock(Fleet(uplink=fleet), sizes, 0)
    Clock(Fleet(uplink=parse(caught.value.line, FLEET)), sizes, 0)


@pytest.mark.parametrize("sizes", [[], [[1]], [1.5], [-1, 2]])
def test_sizes_are_whole_numbers_of_rows(sizes):
    with pytest.raises(UsageError, match="Sizes of shape"):
        Clock(Fleet(), torch.tensor(sizes), 0)


def test_columns_without_a_holder_have_no_mean():
    with pytest.raises(UsageError, match="no client holds a row"):
        Clock(Fleet(ByRows(1.0)), torch.tensor([0, 0]), 0)


@given(st.floats(0, 1e6), st.floats(1e-3, 1e3))
def test_a_moment_lies_in_one_turn(now, length):
    i = window_index(now, length)
    assert i * length <= now < (i + 1) * length
