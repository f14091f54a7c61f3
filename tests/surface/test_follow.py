"""A growing log: each complete row once, cuts by a resumed run, damaged lines, strict JSON."""

import json
import random

from atoll.runs.follow import Follower, as_json


def line(t, **more):
    return json.dumps({"round": t, **more}) + "\n"


def test_a_reader_of_rows_and_cuts_has_the_rows_of_the_file(tmp_path):
    """Whatever is appended, half written, cut off or replaced between two polls, the reader ends with the file."""
    draw = random.Random(3)
    file = tmp_path / "metrics.jsonl"
    follower, held, cuts, rows = Follower(file), [], 0, []
    for step in range(200):
        if rows and draw.random() < 0.1:  # a resumed run: rows are dropped and others are written
            rows = rows[: draw.randrange(len(rows))]
        rows += [line(len(rows) + n, loss=draw.random(), step=step) for n in range(draw.randrange(4))]
        half = draw.choice(["", '{"round": 9', line(0)[:-1]])
        file.write_text("".join(rows) + half)
        follower.poll()
        for cut in follower.cuts[cuts:]:
            held = [(t, row) for t, row in held if t < cut]
        cuts = len(follower.cuts)
        while found := follower.rows(len(held), 200):
            held += found
        assert [row.decode() for _, row in held] == [row.strip() for row in rows]
        assert [t for t, _ in held] == list(range(len(rows))) and follower.after(1) == min(2, len(rows))


def test_a_poll_reads_only_new_bytes(tmp_path, monkeypatch):
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(line(t) for t in range(1000)))
    follower = Follower(file)
    assert follower.poll() and not follower.poll()
    read, usual = [], follower._bytes
    monkeypatch.setattr(follower, "_bytes", lambda *at: read.append(usual(*at)) or read[-1])
    with open(file, "a") as log:
        log.write(line(1000))
    assert follower.poll() and sum(map(len, read)) == len(line(999)) + len(line(1000))


def test_damaged_huge_and_missing_logs(tmp_path):
    file = tmp_path / "metrics.jsonl"
    follower = Follower(file)
    assert not follower.poll() and follower.rows(0, 10) == [] and follower.ended()
    file.write_bytes(b"\xff[\n" + b'{"a": 1}\n' + line(0).encode() + b"half\n" + line(1, text="x" * 3_000_000).encode())
    follower.poll()
    assert follower.rows(0, 1 << 30) == [(0, b'{"round": 0}'), (1, b'{"round":1}')]
    file.unlink()
    assert not follower.poll() and follower.rounds == [0, 1]
    assert as_json('{"round": 2, "a": [Infinity, "\u2028é"]}'.encode()) == b'{"round":2,"a":[null,"\\u2028\\u00e9"]}'


def test_damaged_lines_are_no_rows_and_no_line_ends_a_line_of_a_stream(tmp_path):
    """A row is passed on as JSON or not at all, also half a line with the next one behind it."""
    file = tmp_path / "metrics.jsonl"
    deep = b'{"round": 2, "a": ' + b"[" * 100_000 + b"}"
    bad = [b'{"round": 1, "lo{"round": 1, "loss": 1}', b'{"round": 1, "loss": NaN, oops}', deep, b'{"round": 1, "\xff}']
    file.write_bytes(
        b"\n".join([line(0).strip().encode(), *bad, b'{"round": 3,\r"loss": -Infinity}', b'{"round":4,\r"a":1}', b""])
    )
    follower = Follower(file)
    follower.poll()
    assert follower.rows(0, 1 << 30) == [
        (0, b'{"round": 0}'),
        (3, b'{"round":3,"loss":null}'),
        (4, b'{"round":4,"a":1}'),
    ]


def test_rows_that_the_file_no_longer_has_are_not_read(tmp_path):
    """A run may be resumed or deleted between a poll and the reading of its rows."""
    file = tmp_path / "metrics.jsonl"
    file.write_text(line(0) + line(1) + line(2, loss=1))
    follower = Follower(file)
    follower.poll()
    file.write_text(line(0) + line(1) + line(2, loss=2))
    assert [t for t, _ in follower.rows(0, 1 << 20)] == [0, 1]
    file.unlink()
    assert follower.rows(0, 1 << 20) == []
