"""The JSON of a run: only values of the folder, unfinished and damaged runs, hostile text, removed columns."""

import json
import math

import pytest
from hostile import HOSTILE

from atoll.report.page_data import MOST_POINTS, page_data, run_brief, to_json
from atoll.report.run_data import RunData
from atoll.runs.labels import Labels

PLAN = "Plan(Train(sgd(0.5), epochs=1, batch=10), aggregator=Mean())"
SECURE = "Plan(Train(sgd(0.5)), aggregator=Mean('equal', secure=Masks()), codec=Clip(1.0))"
NOISE = "Plan(Train(sgd(0.5)), aggregator=Mean('equal', over='expected'), codec=Clip(1.0) >> Noise(2.0))"


def written(folder, rows=(), events=(), config='data = "digits"\nrounds = 9\n', plan=PLAN):
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    (folder / "config.toml").write_text(config)
    (folder / "environment.json").write_text(json.dumps({"plan": plan}))
    return folder


def row(t, **more):
    return {"round": t, "accuracy": t / 10, "loss": 1.0 / (t + 1), "arrived": 2, "bytes_up": 5, **more}


def clients(t, **more):
    return {"event": "clients", "round": t, "id": [0, 1], "loss": [0.25, 0.75], "rows": [123, 456], **more}


def as_json(folder):
    return json.loads(to_json(page_data(folder)))


def test_values_are_those_of_the_folder(tmp_path):
    start = {"event": "start", "selection": "accuracy", "rising": True, "names": ["north", "south"]}
    folder = written(tmp_path / "run", [row(t) for t in range(5)], [start, clients(3), clients(4)])
    (folder / "clients.jsonl").write_text('{"round": 4, "id": [1, 0], "rows": [3, 4], "accuracy": [0.5, null]}\n{"ro')
    page = as_json(folder)
    assert page["version"] == 1 and (page["rounds"], page["total"], page["status"]) == (5, 9, "unfinished")
    assert page["curves"]["accuracy"] == [[0, 1, 2, 3, 4], [0.0, 0.1, 0.2, 0.3, 0.4]]
    assert page["best"]["accuracy"] == [0.4, 4] and page["sums"]["bytes_up"] == 25
    table = {c["name"]: c["values"] for c in page["clients"]["columns"]}
    assert page["clients"]["names"] == ["north", "south"]
    assert table["own_accuracy"] == [None, 0.5] and table["rows"] == [123, 456] and table["seen"] == [4, 4]
    assert page["clients"]["curves"]["loss"]["y"] == [[0.25, 0.25], [0.75, 0.75]]


def test_the_last_values_of_a_client_are_those_of_its_newest_round(tmp_path):
    later = {"event": "clients", "round": 7, "id": [1, [2], True], "loss": [0.5, 1.0, 2.0], "rows": [9, 9, 9]}
    folder = written(tmp_path / "run", [row(0)], [clients(3), clients(5), later])
    record = RunData.read(folder)
    assert record.events.seen == {0: (5, 0.25, 123.0), 1: (7, 0.5, 9.0)}
    assert [at for at, _, _ in record.events.client_rows] == [3, 5, 7]
    assert RunData.read(folder, clients=False).events.seen == {} and run_brief(folder)["rounds"] == 1


@pytest.mark.parametrize(("plan", "why"), [(SECURE, "secure sum"), (NOISE, "noise")])
def test_columns_that_were_removed_are_marked_and_their_values_are_absent(tmp_path, plan, why):
    """Planted losses and counts of single clients stay out of the page, although a file contains them."""
    folder = written(tmp_path / "run", [row(0)], [clients(0, loss=[0.31337, 0.42424], rows=[98765, 56789])], plan=plan)
    (folder / "clients.jsonl").write_text('{"round": 0, "id": [0, 1], "accuracy": [0.777123, 0.888123]}\n')
    text = to_json(page_data(folder)).decode()
    assert not [v for v in ("31337", "42424", "98765", "56789", "777123", "888123") if v in text]
    absent = {c["name"]: c.get("absent") for c in json.loads(text)["clients"]["columns"]}
    assert absent["loss"] == absent["rows"] == f"not collected: {why}"


def test_noise_that_follows_the_seed_has_a_banner(tmp_path):
    seeded = written(tmp_path / "a", [row(0, epsilon=1.5)], config='randomness = "seed"\nbudget = 3\n', plan=NOISE)
    assert page_data(seeded).banner == "not private: noise follows the seed"
    assert page_data(seeded).privacy == {"epsilon": 1.5, "budget": 3.0}
    assert page_data(written(tmp_path / "b", [row(0)], config='randomness = "seed"\n')).banner == ""


def test_damaged_old_and_empty_runs(tmp_path):
    assert page_data(tmp_path).rounds == 0
    folder = written(tmp_path / "run", [row(0, accuracy=math.nan, loss=math.inf), row(1)], config="not toml [")
    with open(folder / "metrics.jsonl", "ab") as log:
        log.write(b'[1]\n{"round": "2"}\n\xff\xfe\n{"round": 2, "accu')
    (folder / "events.jsonl").write_bytes(b'{"event": "clients", "id": 3}\n{"event": "start", "names": 7}\nnull\n{"e')
    for name in ("environment.json", "clients.jsonl", "labels.json", "confusion.csv", "clients.csv"):
        (folder / name).write_bytes(b"\x00[")
    page = as_json(folder)
    assert page["curves"]["accuracy"] == [[0, 1], [None, 0.1]] and page["curves"]["loss"][1][0] is None
    home = written(tmp_path / "home" / "runs" / "x", [row(0)])
    (tmp_path / "home" / "status.json").write_text('{"why": "The run waits.", "clients": [{"client": 1}, 2]}')
    assert as_json(home)["server"] == {"why": "The run waits.", "time": None, "clients": [{"client": 1}]}


def test_long_runs_are_thinned(tmp_path):
    rows = [row(t, accuracy=5.0 if t == 4321 else 0.5) for t in range(10_000)]
    x, y = page_data(written(tmp_path / "run", rows)).curves["accuracy"]
    assert len(x) <= MOST_POINTS and max(y) == 5.0 and x[y.index(5.0)] == 4321


def test_hostile_text_survives_as_text(tmp_path):
    for at, text in enumerate(HOSTILE):
        named = {"event": "start", "names": [text, "b"], "notes": [text]}
        failure = {"event": "failure", "client": 0, "round": 0, "stage": text, "cause": text}
        stop = {"event": "stop", "status": "failed", "reason": text}
        folder = written(tmp_path / str(at), [row(0, **{text: 1.0})], [named, clients(0), failure, stop], plan=text)
        page = page_data(folder)
        assert json.loads(to_json(page))
        assert page.notes == [text] and page.reason == text and text in page.columns
        assert not page.lines, "a failed run has no model to load"
    Labels(HOSTILE[0], HOSTILE).write(folder)
    known = [text.encode("utf-8", "replace").decode() for text in HOSTILE]
    assert Labels.read(folder) == Labels(HOSTILE[0], tuple(known))
