"""Timelines: flights of a run's log in rows, and the numbers of the report about them."""

import io
import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import atoll.data
from atoll import recipes, rounds, train
from atoll.plan.pace import Bounded, Buffered, Sync
from atoll.report import LiveTable, timeline
from atoll.report.draw import draw
from atoll.report.flight_log import MOST_LANES, FlightLog
from atoll.report.flight_rows import FATES, Tally, read_trips
from atoll.report.live import columns
from atoll.report.run_data import RunData
from atoll.runs.folder import read_rows
from atoll.runs.format import size

FIELDS = ("number", "client", "birth", "start", "loaded", "computed", "end", "fate")
STRAGGLER = "Fleet(Each((1, 1, 1, 5)), uplink='1 Mb/s', downlink='1 Mb/s')"


@st.composite
def flown(draw_, clients=st.integers(1, 70)):
    """Flights of clients, one at a time for each client, with pauses, as in a log: in the order of their ends."""
    rows, ends = [], {}
    many = draw_(clients)
    for _ in range(draw_(st.integers(1, 120))):
        client = draw_(st.integers(0, many - 1))
        start = ends.get(client, 0.0) + draw_(st.sampled_from([0.0, 0.5, 3.0]))
        steps = [draw_(st.sampled_from([0.0, 0.25, 1.0, 7.0])) for _ in range(3)]
        times = np.cumsum([start, *steps]).tolist()
        ends[client] = times[-1]
        rows.append([start, (client, 0, *times, draw_(st.integers(0, 2)))])
    rows.sort(key=lambda row: row[0])
    return sorted(((n, *row) for n, (_, row) in enumerate(rows)), key=lambda row: row[6])


@given(flown())
@settings(max_examples=settings().max_examples // 2)
def test_a_row_of_the_timeline_has_no_overlaps(rows):
    flights = FlightLog.of(rows)
    row, clients = flights.lanes()
    for at in range(int(row.max()) + 1):
        here = np.flatnonzero(row == at)
        order = here[np.lexsort((flights.end[here], flights.start[here]))]
        assert (flights.start[order][1:] >= flights.end[order][:-1]).all()
    moments = np.concatenate([flights.start, flights.end])
    above = [int(((flights.start <= t) & (t < flights.end)).sum()) for t in moments]
    if clients:
        assert [clients[i] for i in row] == flights.client.tolist()
    elif (flights.end > flights.start).all():
        assert int(row.max()) + 1 == max(above)  # no more rows than concurrent flights


@given(flown(st.integers(1, 8)), st.floats(0.1, 30))
@settings(max_examples=settings().max_examples // 2)
def test_work_is_the_time_in_flight(rows, until):
    flights = FlightLog.of(rows).among(until)
    row, _ = flights.lanes()
    if not len(flights):
        return
    count = int(row.max()) + 1
    by_fate = sum(flights.at_work(until, row, count, fate) for fate in range(3))
    every = flights.at_work(until, row, count, None)
    assert every == pytest.approx(by_fate) and (every <= 1 + 1e-9).all()
    assert every.sum() * until == pytest.approx((np.minimum(flights.end, until) - flights.start).sum())


def test_the_window_ends_at_a_missing_client():
    def flight(number, start, end):
        return (number, number % 3, 0, start, start, end, end, 0)

    whole = FlightLog.of([flight(n, float(n), n + 1.0) for n in range(10)])
    assert whole.window(np.arange(1.0, 11), flying=False) == 10
    assert whole.window(np.arange(1.0, 11), flying=True) == 9  # later flights may be missing
    assert whole.window(np.arange(1.0, 11), flying=False, flights=2.0) == 3  # at least three rounds
    holes = FlightLog.of([flight(n, float(n), n + 1.0) for n in range(10) if n != 7])
    assert holes.window(np.empty(0), flying=True) == 8
    early = FlightLog.of([flight(n, float(n), n + 1.0) for n in range(10) if n != 1])
    assert early.window(np.empty(0), flying=True) == 10  # a straggler does not shorten the window


def test_lines_that_are_no_flights_are_left_out():
    good = dict(zip(FIELDS, ([0], [1], [0], [0.0], [0.5], [1.0], [2.0], ["arrived"]), strict=True))
    assert read_trips(good, 5) == [(0, 1, 0, 0.0, 0.5, 1.0, 2.0, 0)]
    assert read_trips(good, 0) == []
    bad = {"number": [-1], "client": ["x"], "birth": [True], "start": [9.0], "loaded": [None], "computed": [np.nan],
           "end": [np.inf], "fate": ["<b>"]}  # fmt: skip
    for name, value in bad.items():
        assert read_trips({**good, name: value}, 5) == [], name
    assert read_trips({**good, "end": []}, 5) == read_trips({"event": "trips"}, 5) == []


def test_a_tally_counts_its_entries():
    tally = Tally()
    tally.add({"id": [1, 2], "bytes_up": [10, 20], "bytes_down": [5, 5], "staleness": [0, 3]})
    tally.add({"id": [1, "x"], "bytes_up": [10, 20], "staleness": [1]})
    tally.add({"id": None})
    assert (tally.up, tally.down, dict(tally.staleness), tally.rounds) == (
        {1: 20, 2: 20},
        {1: 5, 2: 5},
        {0: 1, 3: 1},
        2,
    )


# A run


@pytest.fixture(scope="module")
def data():
    return atoll.data.load("wine").split(4)


def flew(data, tmp_path, pace, fleet=STRAGGLER, count=12, recipe=None, **words):
    plan = replace(recipe or recipes.fedavg(lr=0.1), pace=pace)
    return train("softmax", data, plan, rounds=count, out=tmp_path, fleet=fleet, numerics="fused", **words)


def test_a_straggler_delays_all_clients_or_none(data, tmp_path):
    parts = {}
    for pace in (Sync(), Bounded(5)):
        record = RunData.read(flew(data, tmp_path, pace, count=20, report=False).path)
        flights = record.events.flights
        until = flights.window(record.series("clock")[1], flying=pace.asynchronous)
        shown = flights.among(until)
        row, clients = shown.lanes()
        assert clients == (0, 1, 2, 3)
        parts[pace] = shown.at_work(until, row, 4)
    assert (parts[Sync()][:3] < 0.25).all() and parts[Sync()][3] > 0.99
    assert (parts[Bounded(5)] > 0.9).all()


def test_columns_of_the_event_trips(data, tmp_path):
    run = flew(data, tmp_path, Buffered(2), count=2, report=False)
    rows = [json.loads(line) for line in (run.path / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    found = [list(row) for row in rows if row["event"] == "trips"]
    assert found and all(tuple(n for n in each if n not in ("event", "time", "round")) == FIELDS for each in found)
    flights = RunData.read(run.path).events.flights
    assert flights.number.tolist() == [trip.number for report in run.reports for trip in report.trips]


def test_a_run_with_a_clock_shows_its_times(data, tmp_path):
    run = flew(data, tmp_path, Buffered(2))
    text = (run.path / "report.html").read_text(encoding="utf-8")
    for said in ("virtual time", "simulated clock", "Staleness", "bytes up", "Timeline of 4 clients", "waits"):
        assert said in text, said
    assert {"timeline", "staleness", "clock", "client_bytes"} <= {p.stem for p in (run.path / "plots").iterdir()}
    record = RunData.read(run.path)
    assert not {"clock", "flying", "late", "staleness", "versions"} & {*record.columns, *run.metrics}
    assert sum(record.events.tally.up.values()) == run.bytes_up
    rows = read_rows(run.path / "metrics.jsonl")
    births = [{b for b, e in _flying(run.path, t)} for t in range(len(rows))]
    assert all(row["versions"] >= len(b) for row, b in zip(rows, births, strict=True))
    assert max(row["versions"] for row in rows) > 0


def _flying(folder, closed):
    """(version, round of arrival) of flights that started up to a round and ended after it."""
    for event in read_rows(folder / "events.jsonl"):
        if event["event"] == "trips" and event["round"] > closed:
            yield from ((b, event["round"]) for b in event["birth"] if b <= closed)


def test_late_and_lost_contributions_are_marked(data, tmp_path):
    fleet = "Fleet(Each((1, 1, 1, 5)), dropout=0.3)"
    run = flew(data, tmp_path, Sync(deadline_s=2), fleet, recipe=replace(recipes.fedavg(lr=0.1), max_failed=1.0))
    record = RunData.read(run.path)
    assert {FATES[f] for f in record.events.flights.fate} == {"arrived", "dropped", "late"}
    assert "late contributions" in (run.path / "report.html").read_text(encoding="utf-8")
    words = timeline.alt_text(record)
    assert "4 clients" in words and " 0 % in flights" not in words


def test_many_clients_are_places(tmp_path):
    rows = [(n, n, n // 60, n // 60, n // 60 + 0.1, n // 60 + 0.6, n // 60 + 1.0, 0) for n in range(180)]
    event = {"event": "trips", "round": 0, **{f: list(c) for f, c in zip(FIELDS, zip(*rows, strict=True), strict=True)}}
    event["fate"] = ["arrived"] * 180
    closed = [{"round": t, "loss": 1.0, "clock": t + 1.0, "fingerprint": "", "seconds": 0.1} for t in range(3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in closed))
    (tmp_path / "events.jsonl").write_text(json.dumps(event) + "\n")
    record = RunData.read(tmp_path)
    row, clients = record.events.flights.lanes()
    assert clients == () and int(row.max()) + 1 == 60 > MOST_LANES
    assert "60 concurrent flights" in timeline.alt_text(record)
    draw(tmp_path)
    assert (tmp_path / "plots" / "timeline.svg").stat().st_size > 1000


# A training in progress


@pytest.mark.parametrize(
    ("pace", "fleet", "more"),
    [
        (Sync(), None, set()),
        (Sync(), STRAGGLER, {"clock"}),
        (Sync(over_select=2.0), None, {"late"}),
        (Buffered(1), STRAGGLER, {"clock", "flying", "staleness"}),
    ],
)
def test_the_table_has_only_columns_with_information(data, pace, fleet, more):
    plan = replace(recipes.fedavg(lr=0.1, cohort=2), pace=pace)
    training = rounds("softmax", data, plan, rounds=2, fleet=fleet, numerics="lanes")
    shown = {c.key for c in columns(training)}
    assert shown & {"late", "flying", "staleness", "clock"} == more
    file = io.StringIO()
    with LiveTable(plain=True, file=file) as table:
        run = train("softmax", data, plan, rounds=2, fleet=fleet, numerics="lanes", out=None, observers=[table])
    last = file.getvalue().splitlines()[-1]
    assert f"↑ {size(run.bytes_up)}" in last and ("of virtual time" in last) == (fleet is not None)
