"""The ledger: hash-chained rows, charged before the round; altered, shortened and foreign files are refused."""

import json

import pytest

from atoll import recipes
from atoll.base.errors import RunError, UsageError
from atoll.privacy import ledger as module
from atoll.privacy.ledger import START, Budget, Ledger

PLAN = recipes.dp_fedavg(clip=0.5, noise=2.0, q=0.1)


def budget(path, limit=None, run="a", clients=1000, plan=PLAN):
    return Budget(plan, clients, 1e-5, limit, Ledger(path), run)


def charged(path, rounds=3):
    it = budget(path)
    for t in range(rounds):
        it.charge(t)
    return it


def test_rows_are_on_disk_before_the_round_and_chained(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(module.os, "fsync", lambda number: synced.append(number))
    path = tmp_path / "ledger.jsonl"
    it = charged(path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 3 and len(synced) >= 3 and Ledger(path).rows == rows
    assert [row["previous"] for row in rows] == [START, rows[0]["hash"], rows[1]["hash"]]
    assert rows[2]["epsilon"] == it.epsilon and [row["round"] for row in rows] == [0, 1, 2]


def test_a_round_that_is_charged_again_counts_again(tmp_path):
    it = charged(tmp_path / "ledger.jsonl", 2)
    again = budget(it.ledger.path)
    epsilon = again.charge(1)
    assert again.ledger.rows[-1]["attempt"] == 1
    assert epsilon > it.epsilon and epsilon == pytest.approx(charged(None, 3).epsilon)


def test_two_runs_share_one_population(tmp_path):
    path = tmp_path / "ledger.jsonl"
    first, second = budget(path, 0.8, "a"), budget(path, 0.8, "b")
    for t in range(5):
        first.charge(t)
        second.charge(t)
    assert first.epsilon == pytest.approx(charged(None, 9).epsilon) and second.epsilon == pytest.approx(
        0.7985, abs=1e-4
    )
    with pytest.raises(RunError, match=r"the budget is 0\.8"):
        first.charge(5)
    assert len(Ledger(path).rows) == 10
    with pytest.raises(UsageError, match="has rows of 1000 clients"):
        budget(path, clients=999)


def altered(text, how):
    lines = text.splitlines(keepends=True)
    match how:
        case "a number":
            return text.replace('"epsilon": 0.', '"epsilon": 1.', 1)
        case "a missing first row":
            return "".join(lines[1:])
        case "a missing middle row":
            return lines[0] + lines[2]
        case "another order":
            return lines[1] + lines[0] + lines[2]
        case "no json":
            return lines[0] + "nonsense\n"
        case _:
            return '{"a": 1}\n'


@pytest.mark.parametrize(
    "how", ["a number", "a missing first row", "a missing middle row", "another order", "no json", "foreign"]
)
def test_an_altered_ledger_is_refused(tmp_path, how):
    path = tmp_path / "ledger.jsonl"
    charged(path)
    path.write_text(altered(path.read_text(), how))
    with pytest.raises(RunError, match="does not follow"):
        Ledger(path)


def test_an_incomplete_last_line_was_no_charge(tmp_path):
    path = tmp_path / "ledger.jsonl"
    charged(path)
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"run": "a", "rou')
    assert len(Ledger(path).rows) == 3 and path.read_bytes() == whole


def test_a_shortened_ledger_is_refused(tmp_path):
    path = tmp_path / "ledger.jsonl"
    it = charged(path)
    last = it.ledger.last
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    with pytest.raises(RunError, match="lacks rows"):
        it.charge(3)
    short = Ledger(path)
    short.check(2, short.last)
    for rows, digest in ((3, last), (2, last), (1, START)):
        with pytest.raises(RunError, match="older than the checkpoint"):
            short.check(rows, digest)


def test_a_ledger_that_cannot_be_written_ends_the_run(tmp_path, monkeypatch):
    it = charged(tmp_path / "ledger.jsonl", 1)

    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(RunError, match="No space left"):
        it.charge(1)
    monkeypatch.undo()

    def read_only(*args, **words):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("builtins.open", read_only)
    with pytest.raises(RunError, match="Read-only"):
        it.charge(1)
    monkeypatch.undo()
    with pytest.raises(RunError, match="could not be written"):
        budget(tmp_path / "no folder" / "ledger.jsonl").charge(0)


def test_a_budget_that_no_round_fits_names_the_noise_that_does():
    with pytest.raises(UsageError) as caught:
        budget(None, 0.1)
    z = float(caught.value.line.removeprefix("Noise(").removesuffix(")"))
    budget(None, 0.1, plan=recipes.dp_fedavg(clip=0.5, noise=z, q=0.1))
    with pytest.raises(UsageError):
        budget(None, 0.1, plan=recipes.dp_fedavg(clip=0.5, noise=0.99 * z, q=0.1))
