"""Actors on a cluster of two nodes: the same bits as in one process, deaths of actors and nodes, and refusals."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import types
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import importable_parts
import numpy as np
import pytest
import torch
from problems import COMPILED, classification, far, federation, regression, run, seeded, task_of
from torch import nn

import atoll
from atoll import recipes
from atoll.base.errors import RunError, UsageError
from atoll.cli.answer import answer
from atoll.compute.task import Task
from atoll.data import ArrayRows, Clients
from atoll.engine.inprocess import InProcessEngine
from atoll.engine.workers.ray import RayEngine
from atoll.plan.aggregate import Mean
from atoll.plan.codec import Clip, ErrorFeedback, Noise, Quantize, Rotate, TopK
from atoll.plan.local import Custom, Gradient, Train
from atoll.plan.optimizer.rules import adam, sgd
from atoll.plan.pace import Bounded, Buffered, Sync
from atoll.plan.plan import Plan
from atoll.testing import check_engine

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # before Ray is imported
os.environ.update(
    RAY_worker_niceness="0"
)  # Ray's default is 15: if other programs run, actors would start after minutes
ray = pytest.importorskip("ray", reason="the extra atoll[ray] is not installed")

FAIR = Mean("equal", over="expected")
SIZES = (9, 9, 7, 4, 4, 3, 2, 1)
STORE = 100 << 20
# Ray needs seconds to start an actor. On a slow machine its head node may start too late.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def cluster():
    """A cluster with two nodes of one core. The second has a simulated GPU. This program is connected to the first."""
    from ray.cluster_utils import Cluster

    folder = tempfile.mkdtemp(prefix="atoll-test-")  # short, since paths of sockets are limited
    first = {"num_cpus": 1, "object_store_memory": STORE, "include_dashboard": False, "temp_dir": folder}
    nodes = Cluster(initialize_head=True, head_node_args=first)
    nodes.add_node(num_cpus=1, num_gpus=1, object_store_memory=STORE)
    ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR", configure_logging=False)
    yield nodes
    ray.shutdown()
    nodes.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


class Both(NamedTuple):
    ours: RayEngine
    theirs: InProcessEngine


@pytest.fixture(scope="module")
def crosses(tmp_path_factory):
    """The counter file of the deadly row for the actors of `mlp`: each missing byte kills one actor during a round."""
    path = tmp_path_factory.mktemp("ray") / "crosses"
    path.write_bytes(b"+")
    return path


@pytest.fixture(scope="module")
def mlp(cluster, crosses):
    """An engine with two actors for a small classifier, and an in-process engine."""
    data = classification(SIZES)
    module = seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)))
    task = task_of(module, data, dtype=torch.float32)
    with RayEngine(task, killing_row(data, crosses, 1), workers=2, cpus=0.1) as engine:
        yield Both(engine, InProcessEngine(task, data))


def killing_row(data: Clients, crosses: Path, times: int) -> Clients:
    """The same clients; one row of client 2 kills its reader until the file has `times` bytes."""
    row = int(data.order[int(data.offsets[2])])
    return replace(data, rows=importable_parts.Deadly(data.rows, row, times, str(crosses)))


@pytest.fixture(scope="module")
def alone(cluster, mlp):
    """The same with one actor."""
    with RayEngine(mlp.theirs.task, mlp.theirs.data, workers=1, cpus=0.1) as engine:
        yield Both(engine, mlp.theirs)


def same(plan: Plan, both: Both, rounds: int = 2) -> None:
    """Check that model, memory and reports are equal, bit for bit."""
    (a, found), (b, expected) = run(plan, both.ours, rounds), run(plan, both.theirs, rounds)
    assert torch.equal(a.model.theta, b.model.theta)
    assert torch.equal(a.model.buffers, b.model.buffers)
    everyone = torch.arange(both.theirs.population.clients)
    kept, expected_kept = a.memory.take(everyone), b.memory.take(everyone)
    assert kept.keys() == expected_kept.keys()
    assert all(torch.equal(kept[n], expected_kept[n]) for n in expected_kept)
    for r, e in zip(found, expected, strict=True):
        assert (r.metrics, r.arrived, r.bytes_up, r.bytes_down, r.failures) == (
            e.metrics,
            e.arrived,
            e.bytes_up,
            e.bytes_down,
            e.failures,
        )
        assert r.clients.keys() == e.clients.keys()
        assert all(torch.equal(r.clients[n], e.clients[n]) for n in e.clients)


# parity


OTHER_MODELS = (recipes.fedbn, recipes.newton)  # they need layers of normalisation, or one linear layer


@pytest.mark.usefixtures("known_secrets")
@pytest.mark.parametrize("recipe", [r for r in recipes.RECIPES if r not in OTHER_MODELS], ids=lambda r: r.__name__)
def test_every_recipe_has_the_bits_of_one_process(recipe, mlp, alone):
    own = {"own": ("2.*",)}
    words = {recipes.diloco: {"steps": 3, "batch": 4}, recipes.fedper: own, recipes.fedrep: own}
    plan = recipe(**words.get(recipe, {}))
    same(plan, alone if plan.pace.asynchronous else mlp)


@pytest.mark.parametrize(
    "plan",
    [
        Plan(Train(adam(0.01), steps=2, batch=2, keep=("optimizer", "order")), Mean(), cohort=4),
        Plan(Train(sgd(0.1), epochs=1, batch=4), Mean(), codec=ErrorFeedback(TopK(0.3))),
        Plan(Train(sgd(0.1), epochs=1, batch=4), Mean(), codec=Rotate() >> Quantize(4), downlink=Quantize(8)),
        Plan(Custom(importable_parts.descend, batch=4), Mean()),
        Plan(Custom(importable_parts.remember, batch=4, memory=importable_parts.personal), Mean(), cohort=0.6),
        Plan(Gradient(batch=3), Mean(), adam(0.01), codec=importable_parts.Halve(), cohort=0.5),
        Plan(Train(sgd(0.1), epochs=1, batch=4), Mean(), pace=Bounded(0)),
        Plan(Train(sgd(0.1), epochs=1, batch=4), Mean("equal", secure=True), codec=Clip(1.0)),
        Plan(Train(sgd(0.1), epochs=1, batch=4), FAIR, codec=Clip(1.0) >> Noise(1.0, by="client")),
    ],
    ids=lambda plan: repr(plan.local)[:8] + repr(plan.codec) + repr(plan.pace),
)
@pytest.mark.usefixtures("known_secrets")
def test_parts_and_memory_have_the_bits_of_one_process(plan, mlp):
    same(plan, mlp, rounds=3)


def test_rows_of_several_tensors_have_the_bits_of_one_process(cluster):
    data = importable_parts.masked(classification(SIZES))
    task = task_of(seeded(importable_parts.Masked), data, "loop", torch.float32)
    with RayEngine(task, data, workers=2, cpus=0.1) as engine:
        same(Plan(Train(sgd(0.1), epochs=1, batch=4), Mean()), Both(engine, InProcessEngine(task, data)))


@pytest.mark.parametrize("pace", [Buffered(3), Bounded(2), Sync(over_select=1.5)], ids=repr)
def test_one_actor_has_the_bits_of_one_process_under_every_pace(pace, alone):
    local = Train(adam(0.01), steps=2, batch=2, keep=("optimizer", "order"))
    same(Plan(local, Mean(), cohort=4, pace=pace), alone, rounds=5)


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "chunk"), [(1, 3), (3, 1)])
@pytest.mark.parametrize("numerics", ["lanes", "loop", "fused", COMPILED])
def test_number_of_actors_and_chunks_change_no_bit(workers, chunk, numerics, mlp):
    task, data = replace(mlp.theirs.task, numerics=numerics), mlp.theirs.data
    with RayEngine(task, data, workers, chunk, cpus=0.1) as engine:
        assert len(set(engine.pids)) == workers
        same(recipes.fedadam(), Both(engine, InProcessEngine(task, data)))


@pytest.mark.slow
def test_contract_of_engines(cluster):
    made: list[RayEngine] = []

    def make(task: Task, data: Clients) -> RayEngine:
        for engine in made:
            engine.close()  # the contract checks one engine at a time
        made.append(RayEngine(task, data, workers=2, cpus=0.1))
        return made[-1]

    check_engine(make)
    made[-1].close()


@pytest.mark.slow
@pytest.mark.parametrize("pace", [Sync(over_select=1.5, deadline_s=30.0), Buffered(3), Bounded(2)], ids=repr)
def test_arrivals_of_two_actors_come_to_least_squares(pace, cluster):
    data = regression((12, 10, 9, 8))
    task = task_of(seeded(nn.Linear, 3, 1), data, "loop")
    x, y = data.take(data.order)
    best = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1), y).solution
    rate = atoll.plan.schedule.inverse(12.0, t0=60) if pace.asynchronous else 0.2
    plan = Plan(Gradient(), Mean(weights="equal"), sgd(rate), pace=pace, cohort=None if pace.asynchronous else 2)
    with RayEngine(task, data, workers=2, cpus=0.1) as engine:
        state, reports = run(plan, engine, 100)
    assert far(state.model.theta, best) < 0.02
    if pace.asynchronous:
        assert {0} < {int(s) for r in reports for s in r.clients["staleness"]}


@pytest.mark.slow
def test_a_run_on_ray_goes_on_in_this_process_and_the_other_way_round(cluster, tmp_path):
    data = atoll.data.load("digits").split(clients=6)
    plan = recipes.diloco(steps=3, batch=8)
    settings, there = {"numerics": "lanes", "report": False}, {"engine": "Ray(workers=2, cpus=0.1)"}
    whole = atoll.train("softmax", data, plan, rounds=4, out=tmp_path / "whole", **settings)
    for first, then in ((there, {}), ({}, there)):
        half = atoll.train("softmax", data, plan, rounds=2, out=tmp_path / "halves", **settings, **first)
        about = json.loads((half.path / "environment.json").read_text(encoding="utf-8"))
        assert about["engine"] == ("ray" if first else "inprocess")
        again = atoll.train("softmax", data, plan, rounds=4, resume=half.path, **settings, **then)
        assert again.reports[-1].fingerprint == whole.reports[-1].fingerprint
        assert again.metrics == whole.metrics


# failures of clients


@pytest.mark.slow
def test_clients_that_fail_are_the_failures_of_one_process(cluster, mlp):
    x, y = mlp.theirs.data.rows.take(torch.arange(sum(SIZES)))
    x[mlp.theirs.data.order[int(mlp.theirs.data.offsets[3])]] = torch.inf
    broken = federation(x, y, SIZES)
    with RayEngine(mlp.theirs.task, broken, workers=2, cpus=0.1) as engine:
        both = Both(engine, InProcessEngine(mlp.theirs.task, broken))
        same(Plan(Gradient(), Mean(), max_failed=0.5), both)
        _, (report,) = run(Plan(Gradient(), Mean(), max_failed=0.5), engine, 1)
        found = []
        for one in both:
            with pytest.raises(RunError, match="1 of 8 clients failed") as error:
                run(Plan(Gradient(), Mean(), max_failed=0.0), one, 1)
            found.append(str(error.value))
    assert [f.client for f in report.failures] == [3]
    assert found[0] == found[1]


# deaths


def test_an_actor_killed_in_mid_round_changes_no_bit(crosses, mlp):
    before = mlp.ours.deaths
    crosses.write_bytes(b"")
    same(recipes.fedavg(lr=0.1, batch=4), mlp)
    assert crosses.read_bytes() == b"+"
    assert mlp.ours.deaths == before + 1
    assert len(set(mlp.ours.pids)) <= 2


@pytest.mark.slow
def test_a_client_that_kills_every_actor_is_a_failure_and_ends_a_run_that_allows_none(tmp_path, mlp):
    crosses = tmp_path / "crosses"
    crosses.touch()
    mined = killing_row(mlp.theirs.data, crosses, times=100)
    plan = recipes.fedavg(lr=0.1, batch=4)
    with RayEngine(mlp.theirs.task, mined, workers=2, cpus=0.1) as engine:
        _, (report,) = run(plan, engine, 1)
        assert [(f.client, f.stage) for f in report.failures] == [(2, "local")]
        assert "died" in report.failures[0].cause and report.arrived == len(SIZES) - 1
        with pytest.raises(RunError, match="1 of 8 clients failed"):
            run(replace(plan, max_failed=0.0), engine, 1)
    assert crosses.stat().st_size >= 6


@pytest.mark.slow
def test_an_actor_that_ray_kills_in_mid_round_is_replaced(tmp_path, mlp):
    def kill(engine: RayEngine, pid: int) -> None:
        (worker,) = [worker for worker in engine._pool._workers if worker.pid == pid]
        ray.kill(worker.connection._actor)

    struck(tmp_path, mlp, recipes.fedavg(lr=0.1, batch=4), kill, (here(),), workers=2, cpus=0.1)


@pytest.mark.slow
def test_actors_killed_between_rounds_are_replaced(mlp):
    with RayEngine(mlp.theirs.task, mlp.theirs.data, workers=2, cpus=0.1) as engine:
        for pid in engine.pids:
            os.kill(pid, signal.SIGKILL)
        same(recipes.fedavg(lr=0.1, batch=4), Both(engine, mlp.theirs))
        assert engine.deaths == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plan", "workers", "gpus"),
    [
        pytest.param(recipes.fedavg(lr=0.1, batch=4), 2, 1.0, id="no place for another actor"),
        pytest.param(recipes.diloco(steps=3, batch=4), 3, 0.5, id="kept by clients"),
    ],
)
def test_a_node_lost_in_mid_round_changes_no_bit(plan, workers, gpus, tmp_path, cluster, mlp):
    """Without the third node there is no room for all actors, so one of them runs on it."""
    before = tuple(node["NodeID"] for node in ray.nodes() if node["Alive"])
    node = cluster.add_node(num_cpus=1, num_gpus=1, object_store_memory=STORE)
    cluster.wait_for_nodes()

    def lose(engine: RayEngine, pid: int) -> None:
        cluster.remove_node(node, allow_graceful=False)

    try:
        struck(tmp_path, mlp, plan, lose, before, workers=workers, cpus=0.1, gpus=gpus)
    finally:
        if node in cluster.worker_nodes:
            cluster.remove_node(node)
        cluster.wait_for_nodes()  # until all nodes know


def here() -> str:
    """The node to which this program is connected."""
    return ray.get_runtime_context().get_node_id()


def struck(tmp_path: Path, both: Both, plan: Plan, end, spared: tuple[str, ...], **room) -> None:
    """Check that bits do not change if `end` hits the first actor that works on a node outside `spared`."""
    door, crosses = tmp_path / "door", tmp_path / "crosses"
    os.mkfifo(door)
    crosses.touch()
    data = both.theirs.data
    mined = replace(data, rows=importable_parts.Knocking(data.rows, spared, 1, str(crosses), str(door)))
    with RayEngine(both.theirs.task, mined, **room) as engine:
        assert len(engine.pids) == engine.workers
        striker = threading.Thread(target=lambda: end(engine, int(door.read_text())), daemon=True)
        striker.start()
        same(plan, Both(engine, both.theirs))
        striker.join(timeout=30)
        assert engine.deaths >= 1
    assert crosses.stat().st_size == 1


# resources


@pytest.mark.slow
def test_actors_share_a_gpu_that_only_pretends_to_be_one(cluster, mlp):
    with RayEngine(mlp.theirs.task, mlp.theirs.data, cpus=0.1, gpus=0.5) as engine:
        assert engine.workers == 2
        same(recipes.fedavg(lr=0.1, batch=4), Both(engine, mlp.theirs), rounds=1)
    with pytest.raises(UsageError, match="device = 'cuda', and torch finds no GPU"):
        RayEngine(mlp.theirs.task, mlp.theirs.data, 1, cpus=0.1, gpus=0.5, device="cuda")


@pytest.mark.parametrize(
    ("settings", "write"),
    [
        ({"workers": 7}, "--workers 2"),
        ({"workers": 9, "gpus": 0.25, "cpus": 0.1}, "--workers 4"),
        ({"gpus": 2.0}, "--gpus 0"),
        ({"cpus": 64.0}, "--cpus 1"),
        ({"workers": 0}, "--workers 2"),
    ],
    ids=str,
)
def test_more_than_the_cluster_has_is_refused(settings, write, mlp):
    with pytest.raises(UsageError) as found:
        RayEngine(mlp.theirs.task, mlp.theirs.data, **settings)
    assert found.value.at("shell").line == write
    assert ray.is_initialized()


@pytest.mark.slow
def test_actors_that_find_no_place_end_the_run(mlp):
    task, data = mlp.theirs.task, mlp.theirs.data
    with RayEngine(task, data, workers=1, cpus=0.1, gpus=0.5) as first:
        first._ready()
        with pytest.raises(RunError, match="1 of 2 actors waited 20 s for a place") as found:
            RayEngine(task, data, workers=2, cpus=0.1, gpus=0.5, patience_s=20.0)
        assert found.value.at("shell").line == "--workers 1"


# the connection


def test_the_connection_of_the_program_stays(cluster, mlp):
    engine = RayEngine(mlp.theirs.task, mlp.theirs.data, workers=1, cpus=0.1, address=cluster.address)
    engine.close()
    engine.close()
    assert ray.is_initialized()
    with pytest.raises(UsageError, match="closed"):
        run(Plan(Gradient(), Mean()), engine, 1)
    with pytest.raises(UsageError, match="connected to Ray at"):
        RayEngine(mlp.theirs.task, mlp.theirs.data, address="127.0.0.1:6")


@pytest.mark.slow
def test_a_cluster_of_another_version_is_refused(cluster, tmp_path):
    from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

    name, space = b"CLUSTER_METADATA", b"cluster"
    found = _internal_kv_get(name, namespace=space)
    assert found
    try:
        other = json.loads(found) | {"ray_version": "2.41.0", "python_version": "3.12.1"}
        _internal_kv_put(name, json.dumps(other).encode(), overwrite=True, namespace=space)
        words = ["-m", "atoll", "run", "--engine", "ray", "--address", cluster.address, "--out", str(tmp_path)]
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=60)
    finally:
        _internal_kv_put(name, found, overwrite=True, namespace=space)
    assert done.returncode == 2
    assert "is of another version" in done.stderr and "Write: pip install ray==2.41.0" in done.stderr


@pytest.mark.slow
def test_the_command_line_runs_on_a_cluster(cluster, tmp_path, capsys):
    words = ["run", "--clients", "6", "--rounds", "2", "--model", "softmax", "--quiet", "--json", "--numerics", "lanes"]
    printed = []
    for engine in (["--engine", "ray", "--address", cluster.address, "--cpus", "0.1", "--workers", "2"], []):
        assert answer([*words, *engine, "--out", str(tmp_path)]) == 0
        printed.append(json.loads(capsys.readouterr().out)["metrics"])
    assert printed[0] == printed[1]


# serialization


@pytest.mark.slow
def test_code_that_workers_lack_is_an_error(cluster):
    """The error for code that this program can import and the nodes cannot."""

    class Local(nn.Linear):
        pass

    data = classification((3, 2))
    Local.__module__, Local.__qualname__ = "only_here", "Local"
    sys.modules["only_here"] = types.ModuleType("only_here")
    sys.modules["only_here"].Local = Local
    try:
        task = task_of(seeded(Local, 4, 3), data, dtype=torch.float32)
        with pytest.raises(RunError, match="No module") as found:
            RayEngine(task, data, workers=1, cpus=0.1)
    finally:
        del sys.modules["only_here"]
    assert "only_here" in found.value.given and "same code and files on every node" in found.value.required


def test_a_virtual_clock_and_partial_work_are_refused(mlp):
    data = atoll.data.load("digits").split(clients=4)
    with pytest.raises(UsageError, match=r"fleet = .*HalfNormal") as found:
        atoll.rounds("softmax", data, recipes.fedavg(lr=0.1), engine="ray", fleet="Fleet(HalfNormal())")
    assert found.value.at("shell").line == "--engine inprocess"
    with pytest.raises(UsageError, match="without partial work"):
        run(Plan(Train(sgd(0.1), epochs=1), Mean(), pace=Sync(deadline_s=5, partial=True)), mlp.ours, 1)


@pytest.mark.slow
def test_mapped_files_are_read_by_their_names(cluster, tmp_path):
    data = classification(SIZES)
    x, y = data.rows.take(torch.arange(sum(SIZES)))
    np.save(tmp_path / "x.npy", x.numpy())
    mapped = replace(data, rows=ArrayRows(np.load(tmp_path / "x.npy", mmap_mode="r"), y))
    task = task_of(seeded(nn.Linear, 4, 3), data, dtype=torch.float32)
    with RayEngine(task, mapped, workers=1, cpus=0.1) as engine:
        same(recipes.fedavg(lr=0.1, batch=4), Both(engine, InProcessEngine(task, data)))
