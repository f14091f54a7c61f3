"""Tools for finished runs: replay, compare, export, lr and doctor report the facts of a run."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from atoll import recipes, rounds
from atoll.base import grammar
from atoll.base.errors import RunError, UsageError
from atoll.base.random import Key
from atoll.cli import main, output
from atoll.data import arrays
from atoll.plan.aggregate import Mean
from atoll.plan.local import Custom
from atoll.plan.optimizer.rules import sgd
from atoll.plan.plan import Plan
from atoll.plan.protocols import Optimizer
from atoll.plan.registry import PARTS
from atoll.plan.schedule import cosine
from atoll.runs.folder import read_rows
from atoll.tools import compare, doctor, export, lr, replay
from atoll.training import Settings
from atoll.training.experiment import Experiment
from atoll.training.train import train

RECIPE = "fedavg(lr=0.5, batch=10, cohort=3)"


def quick_experiment(out, **more):
    return Experiment().override(
        **{"data": "wine", "clients": 6, "recipe": RECIPE, "rounds": 4, "out": str(out), **more}
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return quick_experiment(tmp_path_factory.mktemp("runs")).train(report=False).path


@pytest.fixture
def copy(run, tmp_path):
    return Path(shutil.copytree(run, tmp_path / "copy"))


def clients_of(folder):
    """The "clients" events of events.jsonl: the contributions of each round."""
    return [e for e in read_rows(folder / "events.jsonl") if e["event"] == "clients"]


# replay


def test_replay_equals_the_run(run):
    rows = read_rows(run / "metrics.jsonl")
    for t, event in enumerate(clients_of(run)):
        shares = []
        for at, client in enumerate(event["id"]):
            found = replay.replay(run, t, client)
            assert found.fingerprint == rows[t]["fingerprint"]
            assert (found.rows, found.checked, found.first, found.failure) == (event["rows"][at], t + 1, 0, "")
            assert found.metrics["loss"] == pytest.approx(event["loss"][at], abs=1e-5)
            assert (found.seen, found.steps) == (found.rows, -(-found.rows // 10))
            assert (found.birth, found.of, found.bytes_up) == (t, 1, event["bytes_up"][at])
            assert found.losses[0] > 0 and found.update_norm > 0
            shares.append(found.share)
            if t < 3:
                break
    assert sum(shares) == pytest.approx(1, rel=1e-6)
    assert f"client {client}" in found.text()


def test_an_absent_client_is_named_with_its_rounds(run):
    was = [event["id"] for event in clients_of(run)]
    client = next(i for i in range(6) if i not in was[1] and any(i in ids for ids in was))
    rounds_of = [t for t, ids in enumerate(was) if client in ids]
    with pytest.raises(UsageError) as error:
        replay.replay(run, 1, client)
    assert ", ".join(map(str, rounds_of)) in error.value.required
    words = error.value.line.split()
    assert replay.replay(run, int(words[4]), int(words[6])).checked == int(words[4]) + 1


@pytest.mark.parametrize(("round", "client"), [(4, 0), (-1, 0), (0, 6), (0, -1)])
def test_no_such_round_or_client(run, round, client):
    with pytest.raises(UsageError, match="atoll replay"):
        replay.replay(run, round, client)


def test_a_round_that_comes_out_otherwise_is_refused(copy):
    file = copy / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[1]["fingerprint"] = "0" * 12
    file.write_text("\n".join(map(json.dumps, rows)))
    late = clients_of(copy)[3]["id"][0]
    with pytest.raises(RunError, match="Round 1 of copy"):
        replay.replay(copy, 3, late)
    about = json.loads((copy / "environment.json").read_text())
    (copy / "environment.json").write_text(json.dumps({**about, "torch": "1.0"}))
    with pytest.raises(RunError, match=r"torch 1\.0"):
        replay.replay(copy, 3, late)
    (copy / "environment.json").write_text(json.dumps({**about, "data": "other"}))
    with pytest.raises(UsageError, match="other"):
        replay.replay(copy, 3, late)


def small():
    x = Key(1).normal(60).reshape(30, 2).float()
    return arrays(x, (x[:, 0] > 0).long(), task="classification").split(3)


def stumbling(model, loader, ctx):
    if ctx.round == 2:
        raise ArithmeticError("tripped over a row")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for x, y in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return {"loss": 1.0}


def test_the_failed_round_is_replayed_from_its_checkpoint(tmp_path):
    data, plan = small(), Plan(Custom(stumbling, batch=4), Mean())
    with pytest.raises(RunError, match="tripped over a row"):
        train("softmax", data, plan, rounds=4, out=tmp_path, report=False)
    folder = tmp_path / "latest"
    with pytest.raises(UsageError, match="started from Python"):
        replay.replay(folder, 2, 1)
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    found = replay.replay(folder, 2, 1, training=rounds("softmax", data, plan))
    assert (found.first, found.checked, found.fingerprint, found.cosine) == (2, 0, "", None)
    assert "in stumbling" in found.failure and "ArithmeticError: tripped over a row" in found.failure
    assert "tripped over a row" in found.text()
    good = replay.replay(folder, 1, 1, training=rounds("softmax", data, plan))
    assert (good.first, good.checked, good.failure, good.steps) == (0, 2, "", None)
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before


# compare


def test_compare_names_the_first_different_round(run, copy, tmp_path):
    same = compare.compare_pair(run, copy)
    assert (same.settings, same.through, same.parted, same.tensors) == ((), 3, False, ())
    assert same.verdict == "identical in all 4 shared rounds; the final models are bit-identical"
    other = quick_experiment(tmp_path, recipe=None, rounds=5).override(recipe=RECIPE.replace("0.5", "0.4"))
    found = compare.compare_pair(run, other.train(report=False).path)
    assert found.verdict.startswith("different from round 0 on, first differs in fc1.weight (by up to ")
    assert {"recipe", "rounds"} <= {line.name for line in found.settings}
    accuracy = next(line for line in found.metrics if line.name == "accuracy")
    assert accuracy.best == ("" if accuracy.a == accuracy.b else "a" if accuracy.a > accuracy.b else "b")
    text = found.text()
    assert "bytes up" in text and found.verdict in text and RECIPE in text


def test_compare_marks_no_winner_on_other_or_unknown_rows(tmp_path):
    one, other = costing(tmp_path / "one", [1, 2], 10), costing(tmp_path / "other", [1, 3], 10)
    assert compare.compare_pair(one, other).caution == ""
    for fact, caution in (
        ('{"held_out": "aa", "held_out_clients": ""}', "different held-out rows"),
        ("{}", "rows of other are not known"),
    ):
        (other / "environment.json").write_text(fact)
        found = compare.compare_pair(one, other)
        assert caution in found.text().splitlines()[0]
        assert "*" not in found.text() and not any(row.best for row in (*found.metrics, *found.totals, *found.reached))


def test_values_of_clients_are_compared_on_the_same_clients_only(tmp_path):
    folders = [costing(tmp_path / name, [1, v], 10) for name, v in (("one", 2), ("other", 3))]
    for folder, value in zip(folders, (0.2, 0.3), strict=True):
        row = {"round": 2, "accuracy": value, "accuracy_min": value}
        (folder / "metrics.jsonl").write_text(json.dumps(row))
    best = {row.name: row.best for row in compare.compare_pair(*folders).metrics}
    assert best == {"accuracy": "b", "accuracy_min": "b"}
    (folders[1] / "environment.json").write_text('{"held_out": "", "held_out_clients": "bb"}')
    best = {row.name: row.best for row in compare.compare_pair(*folders).metrics}
    assert best == {"accuracy": "b", "accuracy_min": ""}


def test_compare_ignores_the_engine_fields_that_older_runs_wrote(run, copy):
    config = copy / "config.toml"
    lines = config.read_text(encoding="utf-8")
    config.write_text('backend = "auto"\ncpus = 1.0\ngpus = 0.0\n' + lines, encoding="utf-8")
    assert compare.compare_pair(copy, run).settings == ()
    config.write_text("gpus = 0.5\n" + lines, encoding="utf-8")
    assert [(row.name, row.a, row.b) for row in compare.compare_pair(copy, run).settings] == [("gpus", 0.5, None)]


def test_compare_finds_the_round(run, copy):
    file = copy / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for row in rows[2:]:
        row["fingerprint"] = "f" * 12
    file.write_text("\n".join(map(json.dumps, rows)) + '\n{"cut of')
    found = compare.compare_pair(run, copy)
    assert (found.through, found.parted) == (1, True)
    assert found.verdict.startswith("identical through round 1; the final models are bit-identical")
    (copy / "model.safetensors").unlink()
    assert compare.compare_pair(copy, run).verdict == "identical through round 1; a final model is missing"
    with pytest.raises(UsageError, match="not the folder of a run"):
        compare.compare_pair(run, copy / "nowhere")


def costing(folder, accuracy, each, clock=None):
    """A run folder in which every round has the given cost in bytes and seconds."""
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text("")
    (folder / "environment.json").write_text('{"held_out": "", "held_out_clients": ""}')
    quick_experiment = {"bytes_up": each, "bytes_down": each, "seconds": 2.0}
    rows = [
        {"round": t, "fingerprint": f"{t}{each}", "accuracy": v, **quick_experiment} for t, v in enumerate(accuracy)
    ]
    for t, row in enumerate(rows):
        row |= {} if clock is None else {"clock": clock * (t + 1)}
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


curves = st.lists(st.one_of(st.integers(0, 9), st.just(float("nan"))), min_size=1, max_size=9)


@given(curves, curves, st.booleans())
def test_both_reach_the_target_and_not_before(mine, theirs, clocked):
    with TemporaryDirectory() as parent:
        folders = [
            costing(Path(parent) / name, values, each, each / 10 if clocked else None)
            for name, values, each in (("a", mine, 10), ("b", theirs, 1000))
        ]
        found = compare.compare_pair(*folders)
    good = [[v for v in values if v == v] for values in (mine, theirs)]
    if not all(good):
        assert found.metric is None and found.reached == ()
        return
    target = min(map(max, good))
    assert found.metric.target == target
    first = [next(t for t, v in enumerate(values) if v >= target) + 1 for values in (mine, theirs)]
    lines = {line.name: (line.a, line.b) for line in found.reached}
    time = "seconds of virtual time" if clocked else "seconds of computing"
    assert lines["rounds"] == tuple(first)
    assert lines["bytes"] == (20 * first[0], 2000 * first[1])
    assert lines[time] == pytest.approx((1 * first[0], 100 * first[1]) if clocked else (2 * first[0], 2 * first[1]))
    assert f"until accuracy {target:.4f}" in found.text()


@pytest.mark.slow
def test_a_target_that_one_misses(tmp_path):
    a = costing(tmp_path / "a", [0.1, 0.5, 0.9], 10)
    b = costing(tmp_path / "b", [0.1, 0.2, 0.3], 500)
    found = compare.compare_pair(a, b, tmp_path, target=0.5)
    assert [(line.a, line.b, line.best) for line in found.reached] == [(2, None, "a"), (40, None, "a"), (4, None, "a")]
    assert found.plot == tmp_path / "compare-a-b.svg" and found.plot.read_bytes()[:4] == b"<svg"
    assert str(found.plot) in found.text()
    assert compare.compare_pair(a, b, tmp_path / "new" / "x.png").plot.stat().st_size > 5000
    nothing = costing(tmp_path / "c", [], 1)
    assert compare.compare_pair(a, nothing, tmp_path).plot is None
    with pytest.raises(UsageError, match=r"target = 0\.5"):
        compare.compare_pair(a, nothing, target=0.5)


def test_a_long_setting_has_lines_of_its_own(tmp_path):
    a, b = (costing(tmp_path / name, [0.1], 10) for name in "ab")
    (a / "config.toml").write_text(f'plan = "{"x" * 80}"\nseed = 1\n')
    text = compare.compare_pair(a, b).text().splitlines()
    at = text.index("plan")
    assert text[at + 1 : at + 3] == ["  " + "x" * 80, "  –"]
    assert max(len(line) for line in text[: at - 1]) < 80


# export


@pytest.mark.parametrize(("dtype", "ratio"), [("float32", 0.95), ("bf16", 1.5), ("int8", 2.5)])
def test_export_keeps_its_bounds(copy, dtype, ratio):
    found = export.export(copy, dtype)
    state, back = load_file(copy / "model.safetensors"), export.load_exported(found.path)
    assert state.keys() == back.keys()
    for name, tensor in state.items():
        gap = (tensor - back[name]).abs()
        if dtype == "bf16":
            assert (gap <= tensor.abs() * 2**-8).all()
        elif dtype == "int8" and tensor.dim() > 1:
            scale = tensor.abs().amax(1, keepdim=True) / 127
            assert (gap <= scale * 0.5001).all()
        else:
            assert torch.equal(tensor, back[name])
    assert found.ratio > ratio and found.bytes == found.path.stat().st_size
    assert found.before["accuracy"] == read_rows(copy / "metrics.jsonl")[-1]["accuracy"]
    assert abs(found.lost["accuracy"]) < 0.1
    assert "accuracy" in found.text()


def test_packed_rows_may_be_zero_tiny_or_whole_numbers():
    state = {
        "a": torch.tensor([[0.0, 0.0], [1e-44, -1e-44], [3e38, -1.0]]),
        "b": torch.arange(4),
        "c": torch.tensor([0.1, 0.2]),
        "d": torch.zeros(0, 3),
        "e.weight": torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)),
        "f": torch.tensor(True),
    }
    packed = export.pack(state, "int8")
    assert packed["e.weight"].dtype == torch.int8 and packed["e.weight.scale"].shape == (2,)
    assert all(bool(torch.isfinite(t).all()) for t in packed.values())
    assert torch.equal(packed["b"], state["b"]) and torch.equal(packed["c"], state["c"])
    with pytest.raises(UsageError, match="NaN"):
        export.pack({"a": torch.tensor([float("nan")])}, "bf16")


def test_models_without_an_export(copy, tmp_path):
    with pytest.raises(UsageError, match="int8"):
        export.export(copy, "int4")
    with pytest.raises(UsageError, match="plain safetensors"):
        export.load_exported(copy / "model.safetensors")
    with pytest.raises(UsageError, match="cannot be read"):
        export.load_exported(copy / "config.toml")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="could not be written"):
        export.export(copy, "int8", tmp_path / "file" / "model.safetensors")
    (copy / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="does not exist"):
        export.export(copy)


# lr


@pytest.mark.slow
def test_range_test_on_a_quadratic():
    x = Key(3).normal(200).reshape(100, 2)
    data = arrays(x, x @ torch.tensor([1.0, -2.0]).double(), task="regression").split(1, held_out=0)
    rates = [10 ** (k / 4) for k in range(-8, 5)]
    found = lr.range_test("linear", data, recipes.gd(0.01), Settings(dtype="float64"), "server", tried=rates)
    sharp = 2 * torch.linalg.eigvalsh(torch.cov(x.T, correction=0)).max()  # of the mean of squares
    assert found.edge is not None and 1 / sharp < found.edge < 20 / sharp
    assert found.edge / 10 < found.suggestion <= found.edge / 3
    assert found.losses[found.rates.index(found.suggestion)] < found.start
    assert found.plan.optimizer == sgd(found.suggestion)
    assert grammar.parse(found.line, PARTS) == found.plan


@pytest.mark.parametrize(
    ("recipe", "which", "line"),
    [
        pytest.param(
            "fedavg(lr=0.5, batch=10, cohort=3)",
            "local",
            '--recipe "fedavg(lr={}, batch=10, cohort=3)"',
            marks=pytest.mark.slow,
        ),
        pytest.param("fedavg(0.5)", "local", '--recipe "fedavg({})"', marks=pytest.mark.slow),
        pytest.param(
            "fedadam(batch=20)", "server", '--recipe "fedadam(batch=20, server_lr={})"', marks=pytest.mark.slow
        ),
        ("distributed_gd(lr=0.1)", "server", '--recipe "distributed_gd(lr={})"'),
        ("Plan(Train(sgd(0.1), epochs=1), aggregator=Mean())", "local", "--set plan.local.optimizer.lr={}"),
    ],
)
def test_the_line_makes_the_plan(tmp_path, monkeypatch, recipe, which, line):
    monkeypatch.setattr(lr, "rates", lambda plan, which: (0.01, 0.1))
    monkeypatch.setattr(lr, "STEPS", 1)
    experiment = quick_experiment(tmp_path, recipe=recipe)
    found = lr.find_rate(experiment, which, tmp_path)
    assert found.line == line.format(found.suggestion)
    flag, value = found.line.split(" ", 1)
    key, text = ("recipe", value.strip('"')) if flag == "--recipe" else value.split("=", 1)
    assert experiment.with_settings({key: text}).plan() == found.plan
    assert found.plot == tmp_path / f"lr-{which}.svg" and found.plot.read_bytes()[:4] == b"<svg"
    assert found.line in found.text()


def test_rates_that_are_not_there():
    with pytest.raises(UsageError, match="--which server"):
        lr.rates(recipes.gd(0.1), "local")
    with pytest.raises(UsageError, match="--which local"):
        lr.rates(replace(recipes.gd(0.1), optimizer=Anything()), "server")
    with pytest.raises(UsageError, match="client"):
        lr.rates(recipes.gd(0.1), "client")
    with pytest.raises(RunError, match="No rate"):
        lr.suggest((0.1, 1.0), (2.0, float("inf")), start=2.0)
    assert lr.rates(recipes.gd(1e-6), "server")[0] == 1e-7
    kept = lr.with_rate(recipes.gd(cosine(0.1, rounds=9)), "server", 0.3, keep_schedule=True)
    assert kept.optimizer == sgd(cosine(0.3, rounds=9))


class Anything(Optimizer):
    def init(self, theta):
        return {}

    def update(self, theta, g, sums, state, round):
        return theta - g, state

    def lr_at(self, round, state):
        return 1.0


# doctor


@pytest.mark.slow
def test_a_healthy_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    checks = doctor.examine(tmp_path / "runs")
    assert [check.name for check in checks if not check.ok and check.name not in ("processor", "one round")] == []
    assert {"versions", "disk space", "data sets", "lanes: mlp", "lanes: batch norm", "exact sum"} <= {
        c.name for c in checks
    }
    assert not (tmp_path / "runs").exists()
    assert all(check.text for check in checks)


def test_each_failing_check_has_a_fix(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(doctor, "PHILOX", (*doctor.PHILOX[:2], (1, 2, 3, 4)))
    monkeypatch.setattr(doctor, "SLOW", 0.0)
    monkeypatch.setattr(doctor, "ROOM", 1 << 80)
    monkeypatch.setattr(
        doctor, "requires", lambda name: ["torch>=99.0", "no-such-package>=1", "pandas>=2; extra == 'pandas'"]
    )
    monkeypatch.setattr(doctor.exact, "total", lambda digits: torch.rand(3))
    monkeypatch.setattr(doctor, "SMALL", {"odd": ((2,), lambda: nn.Linear(3, 3))})
    monkeypatch.setattr(doctor, "NAMED", {})
    failed = {check.name: check for check in doctor.examine(tmp_path) if not check.ok}
    names = {"versions", "disk space", "data sets", "random numbers", "exact sum", "lanes: odd", "one round"}
    assert names <= failed.keys()
    assert all(check.fix for check in failed.values())
    assert failed["versions"].fix == 'pip install "torch>=99.0" "no-such-package>=1"'
    assert "NO " in output.format_checks(list(failed.values()))


def test_a_client_is_replayed_by_its_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = "".join(f"{i % 7},{'no' if i % 3 else 'yes'},{('oslo', 'rome')[i % 2]}\n" for i in range(60))
    (tmp_path / "wards.csv").write_text("a,ill,site\n" + rows)
    words = "--data wards.csv --target ill --by site --model logistic --rounds 2 --quiet"
    assert main(["run", *words.split()]) == 0
    capsys.readouterr()
    assert main(["replay", "latest", "--round", "1", "--client", "1"]) == 0
    by_number = capsys.readouterr().out
    assert main(["replay", "latest", "--round", "1", "--client", "rome"]) == 0
    assert capsys.readouterr().out == by_number and "client 1 (rome)" in by_number
    assert main(["replay", "latest", "--round", "1", "--client", "rom"]) == 2
    assert "--client rome" in capsys.readouterr().err


def test_an_export_has_no_suffix_of_another_format(tmp_path):
    run = train("softmax", small(), recipes.fedavg(0.1), rounds=1, out=tmp_path, report=False)
    for name in ("model.pt", "model.onnx"):
        with pytest.raises(UsageError, match="another format") as error:
            export.export(run.path, "float32", name)
        assert error.value.write.at("shell") == "--to model.safetensors"
    assert "times larger than" in export.Exported(tmp_path, "int8", 300, 150).text()
