"""The engine on Ray without an existing cluster: refusals before a start, and cleanup after the end."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from problems import classification, seeded, task_of
from torch import nn

import atoll
from atoll import recipes
from atoll.base.errors import RunError, UsageError
from atoll.cli.answer import answer
from atoll.engine import Ray
from atoll.engine.spec import engine
from atoll.engine.workers import ray as module
from atoll.engine.workers.ray import RayEngine, from_buffers, to_buffers
from atoll.training.experiment import Experiment

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # before Ray is imported
os.environ.update(RAY_worker_niceness="0")  # as in test_ray.py
ray = pytest.importorskip("ray", reason="the extra atoll[ray] is not installed")

pytestmark = pytest.mark.timeout(400)


@pytest.fixture()
def no_cluster(monkeypatch):
    """A program that is not connected to Ray."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", lambda *a, **k: pytest.fail("Ray would have been started"))


def small() -> tuple:
    data = classification((3, 2))
    return task_of(seeded(nn.Linear, 4, 3), data, dtype=torch.float32), data


@pytest.mark.parametrize("fields", [{"cpus": 0.0}, {"gpus": -1.0}, {"gpus": 1.5}, {"cpus": float("nan")}], ids=str)
def test_parts_of_a_machine_that_there_are_not_are_refused(fields):
    with pytest.raises(UsageError, match="pus = ") as refusal:
        Ray(**fields)
    assert isinstance(engine(refusal.value.line), Ray)


def test_a_gpu_that_no_actor_has_is_refused():
    data = atoll.data.load("digits").split(clients=4)
    with pytest.raises(UsageError, match="device = 'cuda' with actors that have no GPU") as refusal:
        atoll.rounds("softmax", data, recipes.fedavg(lr=0.1), engine="ray", device="cuda")
    assert refusal.value.at("shell").line == "--device cuda --gpus 1"


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("127.0.0.1:1", "No Ray cluster answers at 127.0.0.1:1"),
        ("no.such.host.invalid:6379", "No Ray cluster answers"),
        ("127.0.0.1:99999999", "No Ray cluster answers"),
        ("127.0.0.1", r"Ray\('127.0.0.1:6379'\)"),
        ("ray://127.0.0.1:10001", r"Ray\('127.0.0.1:6379'\)"),
    ],
)
def test_an_address_without_an_answer_is_refused_within_seconds(address, words, no_cluster):
    began = time.monotonic()
    with pytest.raises(UsageError, match=words):
        RayEngine(*small(), address=address)
    assert time.monotonic() - began < 15


def test_a_server_that_is_no_cluster_is_refused(no_cluster, monkeypatch):
    monkeypatch.setattr(module, "_REACH_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as mute, pytest.raises(UsageError, match="timed out"):
        RayEngine(*small(), address=f"127.0.0.1:{mute.getsockname()[1]}")
    monkeypatch.undo()
    with socket.create_server(("127.0.0.1", 0)) as web:

        def refuse() -> None:
            with web.accept()[0] as caller:
                caller.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        threading.Thread(target=refuse, daemon=True).start()
        with pytest.raises(UsageError, match="not a Ray head node"):
            module._reach(f"127.0.0.1:{web.getsockname()[1]}")


def test_the_address_file_of_an_ended_cluster_is_refused(no_cluster, monkeypatch, tmp_path):
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with pytest.raises(UsageError, match=r"No Ray cluster answers at 127\.0\.0\.1:1"):
        RayEngine(*small(), address="auto")


def test_a_ray_that_does_not_start_is_an_error(no_cluster, monkeypatch):
    def fail(**settings: object) -> None:
        assert settings["address"] == "local" and not settings["include_dashboard"]
        folders.append(Path(str(settings["_temp_dir"])))
        assert folders[0].is_dir()
        raise Exception("The current node timed out during startup.")

    folders: list[Path] = []
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr(ray, "init", fail)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with pytest.raises(RunError, match="did not start on this machine: The current node timed out") as settings:
        RayEngine(*small())
    assert settings.value.at("shell").line == "--engine processes"
    assert not folders[0].exists()


def test_no_ray_and_an_old_one_are_refused(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(ray, "__version__", "2.3.1")
        with pytest.raises(UsageError, match=r"Ray 2\.3\.1 is installed") as found:
            RayEngine(*small())
        assert found.value.line == "pip install 'ray>=2.40'"
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match="not installed") as found:
        RayEngine(*small())
    assert found.value.line == "pip install 'atoll[ray]'"


def test_the_command_line_refuses_an_unreachable_cluster(no_cluster, capsys, tmp_path):
    words = ["run", "--engine", "ray", "--address", "127.0.0.1:1", "--out", str(tmp_path), "--quiet"]
    assert answer(words) == 2
    assert "Write: ray start --head --port 6379" in capsys.readouterr().err
    assert answer(["run", "--gpus", "1"]) == 2
    assert '--engine "Ray(gpus=1.0)"' in capsys.readouterr().err


def test_code_that_an_actor_cannot_import_is_refused_before_the_start(no_cluster):
    class Notebook(nn.Linear):
        pass

    Notebook.__module__, Notebook.__qualname__ = "__main__", "Notebook"
    data = classification((3, 2))
    with pytest.raises(UsageError, match="from my_notebook import Notebook"):
        RayEngine(task_of(seeded(Notebook, 4, 3), data, dtype=torch.float32), data)


def test_tensors_lie_as_they_were():
    found = {
        "a": torch.ones(2, 3, dtype=torch.bfloat16),
        "b": torch.tensor(True),
        "c": torch.empty(0, 4),
        "": torch.ones(3).t(),
    }
    for arrays in (lambda a: a, lambda a: [np.concatenate([[1], one])[1:].astype(np.uint8) for one in a]):
        places, out = to_buffers(found)
        back = from_buffers(places, arrays(out))
        assert back.keys() == found.keys()
        assert all(torch.equal(back[n], t) and back[n].dtype == t.dtype for n, t in found.items())


PROGRAM = """
import atoll
from atoll.engine import Ray
data = atoll.data.load("digits").split(clients=20)
plan, settings = atoll.recipes.fedavg(lr=0.1), dict(rounds=10**6, numerics="fused")  # auto looks at the rounds
training = atoll.rounds("softmax", data, plan, **settings, engine=Ray(ADDRESS, workers=1))
if __name__ == "__main__":
    for report in training:
        if report.round == 1:
            print(report.fingerprint, flush=True)
            print(training.engine._transport._end.peek()[2][1], *training.engine.pids, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "kill -9"])
def test_nothing_is_left_behind(sent):
    """A cluster that the engine started leaves no process, and no file after Ctrl-C."""
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.replace("ADDRESS", "address=None")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        process_group=0,
    )
    assert program.stdout is not None
    fingerprint = program.stdout.readline().strip()
    folder, *pids = program.stdout.readline().split()
    processes = psutil.Process(program.pid).children(recursive=True)
    assert Path(folder).is_dir() and {int(pid) for pid in pids} <= {p.pid for p in processes}
    os.killpg(program.pid, sent)
    program.communicate(timeout=60)
    _gone, alive = psutil.wait_procs(processes, timeout=30)
    assert not alive
    if sent == signal.SIGINT:
        assert not Path(folder).exists()
    shutil.rmtree(folder, ignore_errors=True)
    data = atoll.data.load("digits").split(clients=20)
    *_, last = atoll.rounds("softmax", data, recipes.fedavg(lr=0.1), rounds=2, numerics="fused")
    assert fingerprint == last.fingerprint


def test_a_gpu_by_its_number_is_refused():
    data = atoll.data.load("digits").split(clients=4)
    with pytest.raises(UsageError, match="device = 'cuda:1' with the engine Ray"):
        atoll.rounds("softmax", data, recipes.fedavg(lr=0.1), engine="Ray(gpus=1.0)", device="cuda:1")


@pytest.mark.parametrize(
    ("placed", "given", "line"),
    [
        (0, "3 of 4 actors waited 9 s for a place", "--workers 1"),
        (2, "1 of 4 actors waited 9 s for a place", "--workers 3"),
        (3, "3 of 4 actors have a place, and did not start within 9 s", "--patience-s 90.0"),
    ],
)
def test_no_place_and_a_late_start_are_different_errors(placed, given, line):
    """Three of four actors have not started; some of them have answered that Ray has placed them."""

    class Library:
        def wait(self, futures, num_returns, timeout):
            assert num_returns == len(futures) == 3 and timeout == 0
            return futures[:placed], futures[placed:]

    class Call:
        placed = object()

    actors = object.__new__(module._Actors)
    actors.ray, actors._patience_s = Library(), 9.0
    error = actors._late([Call(), Call(), Call()], 4)
    assert given in error.given and error.at("shell").line == line


def test_patience_is_a_field_of_the_engine_and_a_flag():
    it = Experiment().with_settings({"engine": "ray", "patience_s": "5"})
    assert it.spec() == Ray(patience_s=5)
    with pytest.raises(UsageError, match="patience_s: a finite number, 0 < it"):
        Ray(patience_s=0)
