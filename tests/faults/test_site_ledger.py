"""The ledger of a site: synced before the message leaves, and no row can be removed, changed or exchanged unnoticed."""

import os

import pytest

from atoll.base.errors import RunError
from atoll.net.ledger import SiteLedger, ledger_rows


def written(home, count=3):
    it = SiteLedger(home)
    for number in range(count):
        it.append({"round": number})
    return home / "ledger.jsonl", home / "ledger.head"


def rounds(home):
    return [row["round"] for row in ledger_rows(home)]


def test_a_ledger_continues_after_a_restart_and_a_cut_line(tmp_path):
    path, _ = written(tmp_path)
    with open(path, "ab") as file:
        file.write(b'{"round": 9')  # a kill has cut the line: its message was not sent
    assert rounds(tmp_path) == [0, 1, 2]
    it = SiteLedger(tmp_path)
    it.append({"round": 3})
    assert rounds(tmp_path) == [0, 1, 2, 3] and [row["round"] for row in it.rows] == [0, 1, 2]


def test_every_cut_of_a_ledger_is_found(tmp_path):
    path, _ = written(tmp_path)
    data = path.read_bytes()
    for end in range(0, len(data), 7):
        path.write_bytes(data[:end])
        with pytest.raises(RunError, match="damaged"):
            SiteLedger(tmp_path)
    path.unlink()
    with pytest.raises(RunError, match=r"it has 0 rows, and .* names 3"):
        ledger_rows(tmp_path)


def test_changed_and_exchanged_rows_and_a_lost_head_are_found(tmp_path):
    path, head = written(tmp_path)
    lines, known = path.read_bytes().splitlines(keepends=True), head.read_bytes()
    for wrong in (
        [lines[0], lines[2], lines[1]],
        lines[1:],
        [lines[0].replace(b": 0", b": 7"), *lines[1:]],
        [*lines[:2], lines[2].replace(b": 2", b": 7")],
        [*lines[:2], b"[]\n"],
    ):
        path.write_bytes(b"".join(wrong))
        with pytest.raises(RunError, match="damaged"):
            ledger_rows(tmp_path)
    path.write_bytes(b"".join(lines))
    for wrong in (None, b"", known[:-1], known.replace(b"3", b"4", 1)):
        head.unlink(missing_ok=True)
        if wrong is not None:
            head.write_bytes(wrong)
        with pytest.raises(RunError, match="damaged"):
            ledger_rows(tmp_path)


def test_a_head_that_lags_after_a_loss_of_power_is_no_fault(tmp_path):
    written(tmp_path, 2)
    old = (tmp_path / "ledger.head").read_bytes()
    it = SiteLedger(tmp_path)
    it.append({"round": 2})
    (tmp_path / "ledger.head").write_bytes(old)
    assert rounds(tmp_path) == [0, 1, 2]


def test_no_row_follows_a_failed_sync(tmp_path, monkeypatch):
    written(tmp_path, 1)
    it, sync = SiteLedger(tmp_path), os.fsync

    def broken(descriptor):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(RunError, match="Input/output error"):
        it.append({"round": 1})
    monkeypatch.setattr(os, "fsync", sync)
    with pytest.raises(RunError, match="an earlier row"):
        it.append({"round": 1})


def test_a_row_of_which_the_disk_takes_a_part_is_an_error_and_is_removed_later(tmp_path, monkeypatch):
    written(tmp_path, 1)
    it, write = SiteLedger(tmp_path), os.write
    monkeypatch.setattr(os, "write", lambda file, data: write(file, data[:9]))
    with pytest.raises(RunError, match="a part of the row"):
        it.append({"round": 1})
    monkeypatch.undo()
    SiteLedger(tmp_path).append({"round": 2})
    assert rounds(tmp_path) == [0, 2]
