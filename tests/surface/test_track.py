"""Trackers: what is sent, each tracker's own reader, errors, resumption, and values of single clients."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from memory_tracker import Memory

import atoll
from atoll.base.errors import Note, UsageError
from atoll.cli import main
from atoll.runs import find_run, last_end, list_runs, read_rows
from atoll.track.tracking import STATE, Tracking, tracker

PLAN = "fedavg(lr=0.1)"


@pytest.fixture(scope="module")
def data():
    return atoll.data.load("wine").split(clients=5)


def train(data, out, rounds=5, **more):
    return atoll.train("softmax", data, PLAN, rounds=rounds, out=out, report=False, progress="none", **more)


def test_rows_parameters_and_files(data, tmp_path):
    memory = Memory()
    run = train(data, tmp_path, observers=[memory])
    (sent,) = memory.runs.values()
    rows = read_rows(run.path / "metrics.jsonl")
    assert [at for at, _ in sent["rows"]] == [0, 1, 2, 3, 4] and sent["status"] == "done"
    for (_, values), row in zip(sent["rows"], rows, strict=True):
        assert values == {n: v for n, v in row.items() if n not in ("round", "fingerprint")}
    assert sent["parameters"]["rounds"] == "5" and sent["parameters"]["plan"].startswith("Plan(")
    assert {"config.toml", "input.json", "model.safetensors"} <= set(sent["files"])
    assert not set(sent["files"]) & {"report.html", "clients.csv"}
    again = Memory()
    Tracking(again).start(None, run.path)  # a finished run
    assert [at for at, _ in next(iter(again.runs.values()))["rows"]] == [0, 1, 2, 3, 4]


def test_a_tracker_that_raises_changes_no_bit_and_leaves_one_note(data, tmp_path):
    plain, memory = train(data, tmp_path / "a"), Memory(fails=3)
    with pytest.warns(Note, match="store is full"):
        run = train(data, tmp_path / "b", observers=[memory])
    prints = [[row["fingerprint"] for row in read_rows(r.path / "metrics.jsonl")] for r in (plain, run)]
    assert prints[0] == prints[1] and run.status == "done"
    assert [sent["status"] for sent in memory.runs.values()] == ["failed"]  # the tracker's run is ended
    notes = [row["text"] for row in read_rows(run.path / "events.jsonl") if row.get("event") == "note"]
    assert [note for note in notes if "tracker Memory failed" in note] == [
        "The tracker Memory failed and ended: OSError: the store is full"
    ]


@pytest.mark.parametrize("reads", [True, False])
def test_a_resumed_run_continues_the_trackers_run(data, tmp_path, reads):
    class Stop:
        def round(self, report):
            if report.round == 2:
                raise RuntimeError("cut")

    memory = Memory(reads=reads)
    with pytest.raises(RuntimeError, match="cut"):
        train(data, tmp_path, observers=[memory, Stop()], checkpoint_s=1e9)
    (path,) = list_runs(tmp_path)
    assert next(iter(memory.runs.values()))["status"] == "failed"
    shutil.rmtree(path / "checkpoint")  # the process was killed before a checkpoint
    train(data, tmp_path, observers=[memory], resume=path)
    (sent,) = memory.runs.values()
    assert [at for at, _ in sent["rows"]] == [0, 1, 2, 3, 4] and sent["status"] == "done"
    assert memory.opened == [(None, 0), ("run-0", 0 if reads else 2)]
    assert next(iter(json.loads((path / STATE).read_text()).values()))["id"] == "run-0"


def test_values_of_single_clients_only_on_request(data, tmp_path):
    rows = np.random.default_rng(0)
    parts = [(rows.normal(size=(20, 3)), rows.integers(0, 2, 20)) for _ in range(3)]
    held = atoll.data.federate(parts, held_out="PerClient(0.5)")
    for clients in (False, True):
        memory = Memory(clients=clients)
        train(held, tmp_path, rounds=1, observers=[memory])
        names = set(next(iter(memory.runs.values()))["rows"][0][1])
        assert any(n.startswith("client/") for n in names) == clients
        assert ("clients.csv" in next(iter(memory.runs.values()))["files"]) == clients


def test_refusals(data, tmp_path):
    class Broken(Memory):
        def open_session(self, files, known, first):
            raise PermissionError("read-only")

    with pytest.raises(UsageError, match="Broken does not start: PermissionError: read-only"):
        train(data, tmp_path, observers=[Broken()])
    assert not list(tmp_path.iterdir())
    run = train(data, tmp_path, rounds=2)
    for kept in ([Broken()], [Memory(), Broken()]):
        with pytest.raises(UsageError, match="Broken"):
            train(data, tmp_path, observers=kept)
        assert list_runs(tmp_path) == [run.path] and find_run("latest", tmp_path) == run.path
    with pytest.raises(UsageError, match="Broken"):
        train(data, tmp_path, observers=[Broken()], resume=run.path, rounds=4)
    assert last_end(run.path).startswith("interrupted")
    assert train(data, tmp_path, resume=run.path, rounds=4).rounds == 4
    with pytest.raises(UsageError, match="out = None"):
        train(data, None, observers=[Memory()])
    with pytest.raises(UsageError, match="MLflow"):
        tracker("mlfow")
    with pytest.raises(UsageError, match="offline"):
        tracker("WandB(mode='live')")


def test_an_observer_that_refuses_leaves_no_run(data, tmp_path):
    class Refuses:
        def start(self, training, path):
            raise ValueError("not here")

    with pytest.raises(ValueError, match="not here"):
        train(data, tmp_path, observers=[Refuses()])
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_refused_before_the_run_folder(data, tmp_path, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n: None if n in ("mlflow", "wandb", "tensorboardX") else find(n)
    )
    for name in ("mlflow", "wandb", "tensorboard"):
        with pytest.raises(UsageError, match=rf"atoll\[{name}\]"):
            train(data, tmp_path, observers=[tracker(name)])
    assert not list(tmp_path.iterdir())


# each tracker's own reader


@pytest.fixture
def cut_run(data, tmp_path):
    """Train with a tracker, cut the training after round 2, and resume it."""

    def made(one):
        class Stop:
            def round(self, report):
                if report.round == 2:
                    raise RuntimeError("cut")

        with pytest.raises(RuntimeError, match="cut"):
            train(data, tmp_path, observers=[one, Stop()], checkpoint_s=1e9)
        (path,) = list_runs(tmp_path)
        shutil.rmtree(path / "checkpoint")  # the process was killed before a checkpoint
        return train(data, tmp_path, observers=[one], resume=path)

    return made


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.filterwarnings("ignore")  # of MLflow and SQLAlchemy
def test_mlflow(cut_run, data, tmp_path):
    mlflow = pytest.importorskip("mlflow", reason="the extra atoll[mlflow] is not installed")
    run = cut_run(atoll.track.MLflow())
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    (found,) = client.search_runs([client.get_experiment_by_name("atoll").experiment_id])
    assert found.info.status == "FINISHED" and found.info.run_name == run.path.name
    rows = read_rows(run.path / "metrics.jsonl")
    for name in ("loss", "accuracy", "bytes_up"):
        history = client.get_metric_history(found.info.run_id, name)
        assert [(m.step, m.value) for m in history] == [(row["round"], row[name]) for row in rows]
    assert found.data.params["rounds"] == "5"
    place = Path(re.sub("^file://", "", found.info.artifact_uri))
    assert (place / "input.json").read_bytes() == (run.path / "input.json").read_bytes()
    model = mlflow.pyfunc.load_model(str(place / "model"))
    import pandas

    table = pandas.DataFrame(np.random.default_rng(0).normal(size=(20, 13)) * 3 + 10, columns=data.columns)
    assert model.predict(table).tolist() == run.predictor.predict(table).tolist()
    assert [c.name for c in model.metadata.signature.inputs] == list(data.columns)


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.filterwarnings("ignore")  # of MLflow and SQLAlchemy
def test_the_program_of_the_manual_runs(tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="the extra atoll[mlflow] is not installed")
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "log_to_a_tracker.md").read_text()
    (block,) = re.findall(r"^```py\n(.*?)^```", page, re.M | re.S)
    exec(block.replace("observers=", "rounds=1, report=False, observers="), {})
    assert (tmp_path / "runs" / "mlflow.db").is_file()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_tensorboard(cut_run):
    pytest.importorskip("tensorboardX", reason="the extra atoll[tensorboard] is not installed")
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard, the reader, is not installed"
    )
    run = cut_run(atoll.track.TensorBoard())
    events = reader.EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    rows = read_rows(run.path / "metrics.jsonl")
    for name in ("loss", "accuracy"):
        assert [e.step for e in events.Scalars(name)] == [row["round"] for row in rows]
        assert [e.value for e in events.Scalars(name)] == pytest.approx([row[name] for row in rows], rel=1e-6)


def records_of(data):
    """The records of an offline run: a log of LevelDB in blocks of 32 KiB after a head of 7 bytes."""
    at, parts = 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # a whole record, or its last part
            yield parts
            parts = b""


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_wandb_offline(cut_run, tmp_path):
    wandb = pytest.importorskip("wandb", reason="the extra atoll[wandb] is not installed")
    from wandb.proto import wandb_internal_pb2 as records

    run = cut_run(atoll.track.WandB())
    wandb.teardown()  # wandb 0.31 writes the last bytes of a file after `finish` has returned
    ids, rows = set(), []
    for file in sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"), key=lambda p: p.stat().st_mtime):
        for data in records_of(file.read_bytes()):
            record = records.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
            if record.WhichOneof("record_type") == "history":
                each = record.history.item
                items = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in each}
                rows.append((items["_step"], items["loss"]))
    assert len(ids) == 1
    assert rows == [(row["round"], row["loss"]) for row in read_rows(run.path / "metrics.jsonl")]


@pytest.mark.slow
def test_the_commands(tmp_path, capsys):
    pytest.importorskip("tensorboardX", reason="the extra atoll[tensorboard] is not installed")
    words = [
        "--data",
        "wine",
        "--clients",
        "5",
        "--model",
        "softmax",
        "--rounds",
        "2",
        "--quiet",
        "--set",
        "report=false",
    ]
    assert main(["run", *words, "--recipe", PLAN, "--out", str(tmp_path), "--track", "tensorboard"]) == 0
    (path,) = list_runs(tmp_path)
    assert list((path / "tensorboard").glob("events*")) and last_end(path).startswith("done")
    assert main(["track", str(path), "--to", f"TensorBoard({str(tmp_path / 'other')!r})"]) == 0
    assert list((tmp_path / "other" / path.name / "tensorboard").glob("events*"))
    assert main(["track", str(path), "--to", "neptune"]) == 2
