"""A run's folder on a full disk, damaged, in use by another process, or of another run: one clear error, no loss."""

import contextlib
import errno
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from quick_cases import by_turns, one_in, only
from safetensors.torch import load_file
from torch import nn

import atoll
from atoll import runs
from atoll.base.errors import AtollError, RunError, UsageError
from atoll.base.grammar import parse
from atoll.engine.client_state import Memory
from atoll.plan.registry import PARTS
from atoll.runs import folder as folders

PLAN = parse(
    "Plan(Train(sgd(0.1, momentum=0.5), steps=3, batch=8, keep=('optimizer', 'order')), Mean(), cohort=3)", PARTS
)
ROUNDS = 5


def split(seed=0):
    return atoll.data.load("digits").split(6, atoll.data.Dirichlet(0.5), seed=seed)


DATA = split()


def train(out=None, resume=None, plan=PLAN, data=DATA, model="softmax", rounds=ROUNDS, observers=(), **words):
    words = {"checkpoint_s": 0, "report": False, **words}
    return atoll.train(model, data, plan, rounds=rounds, out=out, resume=resume, observers=observers, **words)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run without faults."""
    return train(tmp_path_factory.mktemp("whole")).path


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that stopped after three of its rounds."""
    return train(tmp_path_factory.mktemp("stopped"), rounds=3).path


@pytest.fixture
def half(tmp_path, stopped):
    """A copy of the stopped run, to be damaged and resumed."""
    return Path(shutil.copytree(stopped, tmp_path / "runs" / stopped.name))


def contents(path):
    """Every file of a folder except the empty lock file."""
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file() and p.name != "lock"}


def finished_as(path, whole):
    """Resume the run, and check that it ends in the same bytes as the run without faults."""
    train(resume=path)
    for name in ("model", "best"):
        assert (path / f"{name}.safetensors").read_bytes() == (whole / f"{name}.safetensors").read_bytes()
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_bytes().splitlines()]
    assert [row["round"] for row in rows] == list(range(ROUNDS))


class Watching:
    """An observer that calls a function after each round."""

    def __init__(self, act):
        self.act = act

    def start(self, training, path):
        self.path = path

    def round(self, report):
        self.act(report.round)

    def end(self, run):
        pass


# full disk


@contextlib.contextmanager
def files_up_to(size):
    """Limit the size of files of this process to this number of bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", only([2000, 5000], [1000, 2000, 2800, 5000]))
def test_files_may_not_grow(tmp_path, whole, size):
    """A limit of 1000 bytes hits a log, 2000 and 2800 the state or the best model, 5000 a log or client memory."""
    watching = Watching(lambda round: None)
    with files_up_to(size), pytest.raises(RunError, match="a file may not grow further") as stop:
        train(tmp_path, observers=[watching])
    assert stop.value.exit_code == 1
    assert re.fullmatch(rf'atoll\.train\(.*, resume="{watching.path}"\)', stop.value.line)
    finished_as(watching.path, whole)


class FullDisk:
    """A disk that is full from the n-th write on, for a number of writes."""

    def __init__(self, monkeypatch, at, times=1):
        self.count, self.range = 0, range(at, at + times)
        for name in ("fsync", "replace"):
            monkeypatch.setattr(os, name, self._around(getattr(os, name)))

    def _around(self, real):
        def call(*args):
            self.count += 1
            if self.count in self.range:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*args)

        return call


@pytest.fixture(scope="module")
def writes(tmp_path_factory):
    """The number of writes of a run."""
    with pytest.MonkeyPatch.context() as patch:
        disk = FullDisk(patch, -1)
        train(tmp_path_factory.mktemp("counted"))
    return disk.count


@pytest.mark.parametrize(("tenth", "times"), one_in(3, by_turns(range(10), [1, 10**6])))  # for a moment, for good
def test_full_at_any_write(tmp_path, whole, writes, monkeypatch, tenth, times):
    """The last checkpoint is intact, also if the disk has space again for the checkpoint after the failure."""
    at = writes * tenth // 10 + random.Random(tenth).randrange(writes // 10) + 1
    FullDisk(monkeypatch, at, times)
    with pytest.raises(AtollError, match=os.strerror(errno.ENOSPC) if at < 8 else "the disk is full"):
        train(tmp_path / "runs")
    monkeypatch.undo()
    folders = runs.list_runs(tmp_path / "runs")
    if folders:
        finished_as(folders[0], whole)
    else:
        assert at < 8  # nothing was started


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")
def test_a_small_disk(tmp_path, whole):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.strip()}")
    try:
        with pytest.raises(RunError, match="the disk is full"):
            train(disk, rounds=50)
        (path,) = runs.list_runs(disk)
        shutil.copytree(path, tmp_path / "copy")
    finally:
        subprocess.run(["umount", disk], check=True)
    done = runs.read_pointer(tmp_path / "copy")["facts"]["round"]
    assert done >= 1
    rounds = done + 2
    train(resume=tmp_path / "copy", rounds=rounds)
    alone = train(tmp_path / "alone", rounds=rounds).path
    assert (tmp_path / "copy" / "model.safetensors").read_bytes() == (alone / "model.safetensors").read_bytes()


# folders that cannot be written, are not a run, or are in use


def without_rights(act):
    """Call a function in a child process that is not root, since root may write everywhere.

    Returns its error as (class, text).
    """
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            if os.geteuid() == 0:
                os.setuid(65534)
            act()
            found = ["", ""]
        except BaseException as error:
            found = [type(error).__name__, str(error)]
        os.write(write, json.dumps(found).encode())
        os._exit(0)
    os.close(write)
    os.waitpid(pid, 0)
    with open(read, "rb") as pipe:
        return json.loads(pipe.read())


@pytest.fixture
def visible(tmp_path):
    """A folder that every user may read."""
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.geteuid() and folder != folder.parent:
            folder.chmod(folder.stat().st_mode | 0o055)
    return tmp_path


def test_read_only_folder(visible):
    parent = visible / "runs"
    parent.mkdir(mode=0o555)
    name, text = without_rights(lambda: runs.RunFolder.create(parent, "", {}))
    assert name == "UsageError"
    assert "Permission denied" in text and "out=" in text
    assert not list(parent.iterdir())


def test_read_only_run(visible):
    path = train(visible / "runs", rounds=2).path
    before = contents(path)
    for p in (path, *path.rglob("*")):
        p.chmod(0o555 if p.is_dir() else 0o444)
    (visible / "runs").chmod(0o755)
    name, text = without_rights(lambda: runs.RunFolder.open(path))
    assert name == "RunError" and "Permission denied" in text
    assert contents(path) == before


def test_out_is_a_file(tmp_path):
    (tmp_path / "runs").write_text("not a folder")
    with pytest.raises(UsageError, match="No run can be made in") as refusal:
        train(tmp_path / "runs")
    assert refusal.value.exit_code == 2
    assert (tmp_path / "runs").read_text() == "not a folder"


@pytest.mark.parametrize("path", ["", "nowhere"])
def test_no_run(tmp_path, path):
    with pytest.raises(UsageError, match="is not the folder of a run"):
        train(resume=tmp_path / path)
    assert not list(tmp_path.iterdir())


def test_two_processes(half):
    """The second process is refused while the first one has the lock. It can resume once the first one has ended."""
    ready, done = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(done[1])  # so that it does not outlive this process
        held = runs.RunFolder.open(half)
        os.write(ready[1], held.path.name[:1].encode())
        os.read(done[0], 1)
        os._exit(0)
    os.read(ready[0], 1)
    before = contents(half)
    with pytest.raises(UsageError, match="in use by another process") as refusal:
        train(resume=half)
    assert refusal.value.exit_code == 2
    assert refusal.value.line == f"atoll show {half.name}"
    assert contents(half) == before
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    for end in (*ready, *done):
        os.close(end)
    train(resume=half)


# damaged checkpoints


def files(path):
    """The newest file of each kind in a checkpoint."""
    found = {p.name.split("-")[0].split(".")[0]: p for p in sorted((path / "checkpoint").iterdir())}
    assert set(found) == {"best", "memory", "pointer", "state"}
    return found


def refused_as_damaged(path):
    before = contents(path)
    with pytest.raises(RunError, match="is damaged or missing") as stop:
        train(resume=path)
    assert stop.value.exit_code == 1
    assert contents(path) == before


@pytest.mark.parametrize("kind", only(["memory", "state"], ["best", "memory", "pointer", "state"]))
def test_one_bit(half, whole, kind):
    """Forty single-bit errors in each file: none is accepted as a state."""
    file = files(half)[kind]
    good = file.read_bytes()
    draw = random.Random(kind)
    for _ in range(40):
        at, bit = draw.randrange(len(good)), draw.randrange(8)
        file.write_bytes(good[:at] + bytes([good[at] ^ 1 << bit]) + good[at + 1 :])
        folder = runs.RunFolder.open(half)
        with contextlib.closing(folder), pytest.raises(AtollError):
            folder.restore()
    refused_as_damaged(half)
    file.write_bytes(good)
    finished_as(half, whole)


@pytest.mark.parametrize("kind", ["best", "memory", "pointer", "state"])
@pytest.mark.parametrize("length", [0, 1, 9, 0.5], ids=str)
def test_cut_short(half, kind, length):
    file = files(half)[kind]
    os.truncate(file, int(length if length >= 1 else file.stat().st_size * length))
    refused_as_damaged(half)


@pytest.mark.parametrize("kind", ["best", "memory", "state"])
def test_file_missing(half, kind):
    files(half)[kind].unlink()
    refused_as_damaged(half)


@pytest.mark.parametrize("text", ["[]", "null", "{}", '{"format": 1}', "\x00", "9" * 50])
def test_pointer_is_something_else(half, text):
    files(half)["pointer"].write_text(text)
    with pytest.raises(AtollError):
        train(resume=half)


def test_no_checkpoint_yet(half, whole):
    """A run that was killed before its first checkpoint starts again, with empty logs."""
    shutil.rmtree(half / "checkpoint")
    finished_as(half, whole)


def test_published_models_are_the_checkpoints(half, whole):
    """best.safetensors is a copy for people: if it is damaged or missing, resume restores it from the checkpoint."""
    (half / "best.safetensors").unlink()
    finished_as(half, whole)


# resume with another setting


def edited(path, **changes):
    """The pointer with changed facts and the matching digest."""
    pointer = runs.read_pointer(path)
    for name, value in changes.items():
        pointer[name] = value
    digest = sha256(folders._json(pointer)).hexdigest()
    (path / "checkpoint" / "pointer.json").write_bytes(folders._json({**pointer, "sha256": digest}))


def test_other_version(half, whole):
    versions = {**folders.library_versions(), "torch": "1.0"}
    edited(half, versions=versions)
    before = contents(half)
    with pytest.raises(UsageError, match=r"was written with torch 1\.0") as refusal:
        train(resume=half)
    assert re.fullmatch(rf'atoll\.train\(.*, resume="{half}", any_version=True\)', refusal.value.line)
    assert contents(half) == before
    train(resume=half, any_version=True)
    assert (half / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_other_format(half):
    edited(half, format=99)
    before = contents(half)
    with pytest.raises(UsageError, match="a checkpoint of format 99"):
        train(resume=half)
    assert contents(half) == before


OTHERS = {
    "data": {"data": split(seed=1)},
    "plan": {"plan": parse("Plan(Gradient(), Mean(), sgd(0.1))", PARTS)},
    "seed": {"seed": 1},
    "numerics": {"numerics": "loop"},
    "model": {"model": "mlp"},
}


@pytest.mark.parametrize(("what", "begun"), one_in(2, by_turns(OTHERS, ["with a checkpoint", "without"])))
def test_resume_as_something_else(half, whole, what, begun):
    """The resume is refused, and the folder stays unchanged: the run can still resume with its own settings."""
    if begun == "without":
        shutil.rmtree(half / "checkpoint")
    before = contents(half)
    with pytest.raises(UsageError, match=f"started with another {what}") as refusal:
        train(resume=half, **OTHERS[what])
    assert refusal.value.exit_code == 2
    assert half.name in refusal.value.line
    assert contents(half) == before
    finished_as(half, whole)


def test_same_size_is_not_the_same_model(half):
    """The same number of parameters in another order is another model."""
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(UsageError, match="another model"):
        train(resume=half, model=module)


def test_the_body_is_that_of_the_beginning(tmp_path):
    """The backend is chosen before the first round. A resumed run keeps it."""
    path = train(tmp_path / "runs", rounds=3, numerics="loop").path
    alone = train(tmp_path / "alone", numerics="loop").path
    train(resume=path)
    assert (path / "model.safetensors").read_bytes() == (alone / "model.safetensors").read_bytes()


# Ctrl-C


def test_ctrl_c_once(tmp_path, whole):
    """The round is finished, a checkpoint is written, and the run reports that it was interrupted."""
    once = Watching(lambda round: signal.raise_signal(signal.SIGINT) if round == 1 else None)
    run = train(tmp_path, observers=[once], checkpoint_s=1000)
    assert (run.status, run.rounds) == ("interrupted", 2)
    assert runs.read_pointer(run.path)["facts"]["round"] == 2
    assert load_file(run.path / "model.safetensors")
    assert "interrupted" in (run.path / "events.jsonl").read_text()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finished_as(run.path, whole)


def twice():
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)


def test_a_refusal_in_the_first_round_leaves_no_run(tmp_path):
    data = atoll.data.load("digits").split(3)
    with pytest.raises(UsageError, match="computed for 10 classes"):
        atoll.train("softmax", data, "fedavg(0.1)", rounds=1, out=tmp_path, metrics=["f1"], progress="none")
    assert not list(tmp_path.iterdir())


def interrupted_twice(tmp_path, **words):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, **words)
    (path,) = runs.list_runs(tmp_path)
    last = json.loads((path / "events.jsonl").read_bytes().splitlines()[-1])
    assert (last["event"], last["status"]) == ("stop", "interrupted")
    return path


def test_ctrl_c_twice_between_rounds(tmp_path, whole):
    watching = Watching(lambda round: twice() if round == 2 else None)
    finished_as(interrupted_twice(tmp_path, observers=[watching]), whole)


@pytest.mark.parametrize("at", only([3], [3, 7]))
def test_ctrl_c_twice_while_memory_moves(tmp_path, whole, monkeypatch, at):
    """The second Ctrl-C arrives during the commit of a round, when some rows of client memory are already new."""
    put, calls = Memory.put, []

    def interrupted(memory, ids, rows, owned=""):
        put(memory, ids, rows, owned)
        calls.append(ids)
        if len(calls) == at:
            twice()

    monkeypatch.setattr(Memory, "put", interrupted)
    path = interrupted_twice(tmp_path, chunk=1)
    monkeypatch.undo()
    finished_as(path, whole)


def test_ctrl_c_twice_while_a_row_is_written(tmp_path, whole, monkeypatch):
    metric = runs.RunFolder.metric

    def interrupted(folder, row):
        if row["round"] == 2:
            twice()
        metric(folder, row)

    monkeypatch.setattr(runs.RunFolder, "metric", interrupted)
    path = interrupted_twice(tmp_path)
    monkeypatch.undo()
    finished_as(path, whole)


# failed runs


def test_a_watcher_that_breaks(tmp_path, whole):
    """The error of an observer is raised unchanged. The folder is unlocked, and the run can resume."""

    def broken(round):
        if round == 2:
            raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError):
        train(tmp_path, observers=[Watching(broken)])
    (path,) = runs.list_runs(tmp_path)
    finished_as(path, whole)


def test_refused_resume_lets_go(half, whole):
    """After a refusal, the same process can resume the run, also if a notebook keeps the traceback."""
    with pytest.raises(UsageError) as kept:
        train(resume=half, seed=3)
    assert kept.traceback
    finished_as(half, whole)


def test_diverged_keeps_the_last_good_state(tmp_path):
    """A diverged training ends with exit code 1. Its last checkpoint and its rows stay."""
    plan = parse("Plan(Gradient(), Mean(), sgd(1e30))", PARTS)
    with pytest.raises(RunError) as stop:
        train(tmp_path, plan=plan, rounds=20)
    assert stop.value.exit_code == 1 and "atoll lr" in stop.value.line
    (path,) = runs.list_runs(tmp_path)
    assert runs.read_rows(path / "metrics.jsonl")
    assert json.loads((path / "events.jsonl").read_bytes().splitlines()[-1])["status"] == "failed"
    if (path / "checkpoint").exists():
        folder = runs.RunFolder.open(path)
        with contextlib.closing(folder):
            assert bool(torch.isfinite(folder.restore().tensors["model/theta"]).all())


def test_lines_of_clients_that_a_store_did_not_commit_are_cut(tmp_path):
    """The store of a server has no clients.jsonl: on resume the lines of the rounds that it has committed stay."""

    class Committed:
        def save(self, checkpoint, lines): ...

        def log(self, name):
            return b""

        def load(self):
            return folders.Checkpoint({}, (), None, {"round": 2})

    folder = runs.RunFolder.create(tmp_path, "", {}, Committed())
    for at in range(3):
        folder.clients({"round": at, "id": [0], "accuracy": [0.5]})
    with open(folder.path / "clients.jsonl", "a") as log:
        log.write('{"rou')
    folder.close()
    with contextlib.closing(runs.RunFolder.open(folder.path, Committed())) as again:
        again.restore()
        again.truncate_logs()
        again.clients({"round": 2, "id": [0], "accuracy": [0.5]})
        rows = [json.loads(line) for line in (again.path / "clients.jsonl").read_text().splitlines()]
        assert [row["round"] for row in rows] == [0, 1, 2]
