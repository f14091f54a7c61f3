"""Under torchrun every plan has the same bits as in one process, also if a rank dies and is restarted."""

import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from parity import ranks as theirs
from quick_cases import only

from atoll import recipes, rounds, runs
from atoll.base.errors import RunError, UsageError
from atoll.engine import RunOptions, Torchrun
from atoll.engine.inprocess import InProcessEngine
from atoll.engine.ranks.process_group import ProcessGroup
from atoll.plan.pace import Bounded, Buffered
from atoll.plan.round import Report
from atoll.training.rounds import check_same, sync_report

ROOT = Path(__file__).parents[2]
RANKS = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1", "LOCAL_WORLD_SIZE": "2"}


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests'}"}


def torchrun(words, folder):
    """Start ranks in a folder, with the command that users write."""
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", *words]
    return subprocess.run(line, cwd=folder, env=environment(), capture_output=True, text=True, timeout=280)


def outcomes(folder, ranks, *which):
    """The results that each rank wrote. On request, the second rank dies once."""
    words = ["--max-restarts", "1", "--nproc-per-node", str(ranks), theirs.__file__, str(folder), *which]
    done = torchrun(words, folder)
    assert done.returncode == 0, done.stderr[-4000:]
    return written(folder, ranks)


def written(folder, ranks):
    return [json.loads((folder / f"{ranks}-{rank}.json").read_text()) for rank in range(ranks)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def two(folder):
    """Two ranks as torchrun starts them, forked from one process that has imported torch."""
    line = [sys.executable, theirs.__file__, str(folder), "forked"]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    return written(folder, 2)


# Importing torch takes most of the time. After a death, torchrun restarts all ranks, so it happens five times.
@pytest.fixture(scope="module", params=only(["all ranks run"], ["all ranks run", "one rank exits"]))
def restarted(request, tmp_path_factory):
    """The number of restarts, the results of each rank, and the folder."""
    if request.param == "all ranks run":
        return "0", request.getfixturevalue("two"), request.getfixturevalue("folder")
    folder = tmp_path_factory.mktemp("dying")
    return "1", outcomes(folder, 2, "exits"), folder


@pytest.fixture(scope="module")
def clients():
    return theirs.clients()


@pytest.mark.parametrize("case", theirs.quick(), ids=lambda case: case[0])
def test_every_rank_has_the_bits_of_one_process(case, two, clients):
    name, module, numerics, plan, words = case
    alone = theirs.outcome(module, numerics, plan, clients, InProcessEngine, **words)
    for rank in two:
        assert rank[name] == alone


@pytest.mark.parametrize("case", list(theirs.quick_floats()), ids=lambda case: case[0])
def test_gradients_are_added_up_within_the_backward_pass(case, two):
    check_floats(case, two)


def check_floats(case, ranks):
    """The results equal those of one process up to rounding. All ranks have the same bits and the same failures."""
    name, module, plan, data = case
    alone = theirs.floats(module, plan, data, InProcessEngine)
    first, *others = (rank[name] for rank in ranks)
    assert all(other == first for other in others)
    assert first["outcome_rows"] == alone["outcome_rows"]
    assert first["sent"] is (name not in ("batch norm", "local training"))
    for numbers in ("theta", "losses"):
        assert first[numbers] == pytest.approx(alone[numbers], rel=1e-5, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_in_every_body(ranks, clients, tmp_path):
    each = outcomes(tmp_path, ranks, "all", "exits")
    for name, module, numerics, plan, words in theirs.cases():
        alone = theirs.outcome(module, numerics, plan, clients, InProcessEngine, **words)
        assert [rank[name] for rank in each] == [alone] * ranks, name
    for case in theirs.float_cases():
        check_floats(case, each)


def test_a_rank_that_dies_changes_no_bit_and_no_row(restarted, clients):
    """The second rank was killed in round 3. torchrun restarted both ranks, and they resumed the run of this job."""
    restarts, two, folder = restarted
    assert [rank["run"]["restarts"] for rank in two] == [restarts] * 2
    (path,) = runs.list_runs(folder / "runs")
    assert [rank["run"]["path"] for rank in two] == [path.name, None], "only rank 0 writes"
    rows = runs.read_rows(path / "metrics.jsonl")
    alone = [r.fingerprint for r in rounds("mlp", clients, theirs.KILLED, rounds=6, numerics="loop")]
    assert [(row["round"], row["fingerprint"]) for row in rows] == list(enumerate(alone))
    assert runs.read_environment(path)["ranks"] == 2


def test_all_ranks_draw_the_noise_of_one_secret(two):
    for name in ("noised", "noised by clients"):
        first, second = (rank[name] for rank in two)
        assert first == second


def test_ranks_give_a_secure_sum_the_bits_of_one_process(two, clients):
    alone = [r.fingerprint for r in rounds("softmax", clients, theirs.SECURE, rounds=2, numerics="loop")]
    assert [rank["secure"] for rank in two] == alone[-1:] * 2


def test_all_ranks_have_the_model_of_rank_0(two, clients):
    torch.manual_seed(0)
    alone = [r.fingerprint for r in rounds(theirs.norm(), clients, recipes.fedavg(0.1), rounds=1, numerics="loop")]
    assert [rank["one model"] for rank in two] == alone * 2


@pytest.mark.slow
def test_the_line_to_write_works(tmp_path):
    """`--engine torchrun` without torchrun is refused. The suggested command gives the same run as one process."""
    words = shlex.split(
        "run --data wine --clients 5 --rounds 2 --quiet --engine torchrun --out theirs --set report=false"
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    found = subprocess.run(
        [sys.executable, "-m", "atoll", *words], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert found.returncode == 2
    line = shlex.split(found.stderr.splitlines()[-1].removeprefix("Write: "))
    assert line == ["torchrun", "--nproc-per-node", "2", "-m", "atoll", *words]
    done = torchrun(line[1:], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held-out") == 1, "one summary, of rank 0"
    (path,) = runs.list_runs(tmp_path / "theirs")
    ours = [{"torchrun": "inprocess", "theirs": "ours"}.get(word, word) for word in words]
    alone = subprocess.run(
        [sys.executable, "-m", "atoll", *ours],
        cwd=tmp_path,
        env=env,
    )
    assert alone.returncode == 0
    (own,) = runs.list_runs(tmp_path / "ours")
    both = [[row["fingerprint"] for row in runs.read_rows(p / "metrics.jsonl")] for p in (path, own)]
    assert both[0] == both[1]


# bad input


def refused(environ, monkeypatch, workers=None, backend="auto"):
    for name in RANKS:
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError) as caught:
        ProcessGroup.join(workers, backend)
    return caught.value


def test_without_torchrun(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--fast"])
    assert refused({}, monkeypatch).line == "torchrun --nproc-per-node 2 train.py --fast"
    assert refused({}, monkeypatch, workers=3).line == "torchrun --nproc-per-node 3 train.py --fast"


def test_fewer_ranks_than_asked(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/atoll", "run", "--workers", "4"])
    error = refused(RANKS, monkeypatch, workers=4)
    assert "workers = 4, and torchrun started 2 ranks" in str(error)
    assert error.line == "torchrun --nproc-per-node 4 -m atoll run --workers 4"


@pytest.mark.skipif(torch.cuda.device_count() > 1, reason="here is a GPU for each rank")
def test_nccl_without_a_gpu(monkeypatch):
    error = refused(RANKS, monkeypatch, backend="nccl")
    assert "nccl" in str(error) and error.line == "engine=\"Torchrun(backend='gloo')\""
    assert error.at("shell").line == "--set backend=gloo"


@pytest.mark.parametrize("pace", [Buffered(2), Bounded(1)], ids=repr)
def test_a_pace_with_overlapping_rounds_is_refused(pace, clients, monkeypatch):
    for name, value in RANKS.items():  # the start is checked before the plan
        monkeypatch.setenv(name, value)
    plan = replace(recipes.fedavg(0.1, cohort=5), pace=pace)
    with pytest.raises(UsageError, match="Sync") as caught:
        Torchrun().check(RunOptions(plan=plan))
    assert caught.value.at("shell").line == '--set "plan.pace=Sync()"'


@pytest.mark.parametrize("settings", [{"workers": 2}, {"engine": "Torchrun(workers=0)"}], ids=repr)
def test_workers_that_cannot_be(settings, clients):
    with pytest.raises(UsageError, match="workers"):
        rounds("softmax", clients, recipes.fedavg(0.1), **settings)


class Two:
    """A fake group of two ranks: this one, and one that sends the values of `other`."""

    primary = True

    def __init__(self, **other):
        self.other = other

    def exchange(self, data):
        return [data, json.dumps({**json.loads(data), **self.other}).encode()]


def test_ranks_of_other_data_are_refused():
    check_same(Two(), {"data": "a", "seed": 1})
    with pytest.raises(UsageError, match="Rank 1 has another data than rank 0: b, and not a"):
        check_same(Two(data="b"), {"data": "a", "seed": 1})


def test_ranks_that_drift_apart_end_the_run():
    report = Report(7, {"loss": 0.1}, 2, 2, (), 0, 0, 1.5, "abc")
    assert sync_report(Two(seconds=9.0), report) == report, "the report of rank 0 counts"
    with pytest.raises(RunError, match="After round 7 rank 1 has another model"):
        sync_report(Two(model="xyz"), report)
