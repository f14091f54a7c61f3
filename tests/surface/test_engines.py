"""Engines as values: names, texts, fields, refusals before data is read, and the calls that an engine gets."""

import json
import os
import signal
from pathlib import Path

import fake_engine
import pytest
import torch

import atoll
from atoll import recipes, runs
from atoll.base.errors import AtollError, UsageError
from atoll.cli import main
from atoll.data import named
from atoll.engine import InProcess, Processes, Ray, Torchrun
from atoll.engine.spec import ENGINES, engine, fill, spec_name
from atoll.training import Experiment, Settings
from atoll.training.stop import Diverged

DATA = atoll.data.load("digits").split(clients=5)
PLAN = recipes.fedavg(0.1)
FAKE = "fake_engine:Fake()"


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fake_engine.CALLS.clear()
    for name in [n for n in os.environ if n.startswith("ATOLL_") and n != "ATOLL_DATA"]:
        monkeypatch.delenv(name)


@pytest.fixture
def unread(monkeypatch):
    """Data that cannot be read: what is refused now is refused before."""

    def fail(*args, **words):
        raise AssertionError("data was read")

    monkeypatch.setattr(named, "load_named", fail, raising=False)
    monkeypatch.setattr("atoll.data.load", fail)


def refused(act, *parts):
    with pytest.raises(UsageError) as caught:
        act()
    error = caught.value
    for part in parts:
        assert part in str(error), str(error)
    assert error.given and error.required
    return error


def run(**settings):
    return atoll.train("softmax", DATA, PLAN, **{"rounds": 2, "out": None, **settings})


# values


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("inprocess", InProcess()),
        ("processes", Processes()),
        ("torchrun", Torchrun()),
        ("ray", Ray()),
        ("Processes(workers=2)", Processes(workers=2)),
        ("Ray('auto', gpus=0.25)", Ray("auto", gpus=0.25)),
        ("Torchrun(backend='nccl')", Torchrun(backend="nccl")),
        (FAKE, fake_engine.Fake()),
    ],
)
def test_a_text_and_its_value(text, value):
    assert engine(text) == value == engine(value)
    if ":" not in text:
        assert engine(repr(value)) == value


def test_short_names_are_the_names_of_the_table():
    assert {spec_name(engine(name)) for name in ENGINES} == set(ENGINES)
    assert spec_name(fake_engine.Fake()) == "Fake"


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ("inproces", ("'inproces'", 'Write: engine="inprocess"')),
        ("Process(2)", ("'Process'", 'Write: engine="Processes(2)"')),
        ("Processes(n=2)", ("n", "one of workers")),
        ("Processes(workers=0)", ("workers = 0", 'Write: engine="Processes(2)"')),
        ("Processes(workers='two')", ("workers = 'two'", 'Write: engine="Processes(2)"')),
        ("Torchrun(backend='mpi')", ("backend = 'mpi'", "Write: engine=\"Torchrun(backend='auto')\"")),
        ("Ray(gpus=1.5)", ("gpus = 1.5", 'Write: engine="Ray(gpus=0.5)"')),
        ("Ray(cpus=0)", ("cpus = 0", 'Write: engine="Ray()"')),
        ("Ray(address=3)", ("address = 3", "Write: engine=\"Ray('auto')\"")),
        (3, ("engine = 3", 'Write: engine="inprocess"')),
        (Processes, ("engine is the class Processes", "Write: Processes()")),
    ],
)
def test_bad_engines(value, parts):
    error = refused(lambda: Settings(engine=value), *parts)
    if error.line.startswith("engine="):
        engine(*eval(f"dict({error.line})").values())
    elif error.line and "(" in error.line:
        engine(error.line)


def test_a_foreign_engine_in_a_run_folder_needs_trust(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text(f'engine = "{FAKE}"\n', encoding="utf-8")
    error = refused(lambda: Experiment.read("run").training(), "names code outside atoll")
    assert error.at("shell").line == "--trust"
    assert Experiment.read("run", trust=True).spec() == fake_engine.Fake()


# fields of an engine as flags, keys and variables


def test_a_flag_fills_the_field_of_the_named_engine():
    it = Experiment().override(engine="processes", workers=2)
    assert it.spec() == Processes(2)
    assert Experiment().with_environment({"ATOLL_WORKERS": "3"}).override(engine="torchrun").spec() == Torchrun(3)
    assert it.override(workers=4).spec() == Processes(4)
    assert Experiment().override(engine="Processes(workers=2)").override(workers=3).spec() == Processes(3)
    assert Experiment().override(engine="ray", workers=2).override(engine="Ray(gpus=1)").spec() == Ray(gpus=1)
    assert fill(Ray(), {"gpus": 0.25, "address": "auto"}) == Ray("auto", gpus=0.25)


@pytest.mark.parametrize(
    "it",
    [
        Experiment().override(engine="processes", workers=2),
        Experiment().override(engine="ray", gpus=0.25, address="auto"),
        Experiment().override(engine="Torchrun(backend='gloo')"),
        Experiment().override(engine="Processes(workers=2)").override(workers=3),
        Experiment().override(engine="fake_engine:Plain()").override(workers=2),
        Experiment(engine=fake_engine.Fake(planets=2)),
    ],
)
def test_the_engine_of_a_file_reads_back_equal(tmp_path, it):
    (tmp_path / "it.toml").write_text(it.toml(), encoding="utf-8")
    assert Experiment.read("it.toml").spec() == it.spec()


def test_a_config_of_an_older_run_is_read():
    """It holds every field of every engine; those with their old default mean nothing."""
    old = 'engine = "inprocess"\nbackend = "auto"\ncpus = 1.0\ngpus = 0.0\n'
    Path("config.toml").write_text(old, encoding="utf-8")
    assert Experiment.read("config.toml").spec() == InProcess()
    Path("config.toml").write_text(old.replace("inprocess", "processes") + "workers = 2\n", encoding="utf-8")
    assert Experiment.read("config.toml").spec() == Processes(2)


def test_a_default_in_the_file_of_a_user_is_a_value():
    Path("user.toml").write_text('engine = "Ray(gpus=0.5)"\ngpus = 0.0\n', encoding="utf-8")
    refused(lambda: Experiment.read("user.toml"), "gpus is given twice")
    Path("atoll.toml").write_text('engine = "Ray(gpus=0.5)"\ngpus = 0.0\n', encoding="utf-8")
    refused(Experiment.found, "gpus is given twice")
    Path("config.toml").write_text('engine = "ray"\ngpus = false\n', encoding="utf-8")
    refused(lambda: Experiment.read("config.toml"), "gpus = False")


def test_a_field_that_two_variables_set_is_refused():
    both = {"ATOLL_ENGINE": "Processes(workers=2)", "ATOLL_WORKERS": "3"}
    error = refused(lambda: Experiment().with_environment(both), "workers is given twice")
    assert error.at("shell").line == '--engine "Processes(workers=3)"'


@pytest.mark.parametrize(
    ("words", "given", "works"),
    [
        (["--workers", "2"], "workers = 2 with the engine InProcess()", Processes(2)),
        (["--engine", "processes", "--gpus", "1"], "gpus = 1.0 with the engine Processes()", Ray(gpus=1.0)),
        (["--engine", "Processes(workers=2)", "--workers", "3"], "workers is given twice", Processes(3)),
        (["--engine", "processes", "--fleet", "Fleet(HalfNormal())"], "fleet = Fleet", InProcess()),
        (["--engine", "processes", "--device", "cuda"], "device = 'cuda'", InProcess()),
        (["--engine", "torchrun"], "a process that torchrun did not start", None),
    ],
)
def test_refused_before_data_is_read(unread, capsys, monkeypatch, words, given, works):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert main(["run", "--rounds", "1", *words]) == 2
    error = capsys.readouterr().err
    assert given in error and "Required:" in error and "Write: " in error
    if works is not None:
        write = error.rpartition("Write: ")[2].strip().removeprefix("--engine ").strip('"')
        assert engine(write) == works


def test_ray_that_is_not_installed(unread, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    error = refused(lambda: Experiment(engine="ray").train(), "Ray is not installed")
    assert error.line == "pip install 'atoll[ray]'"


@pytest.mark.parametrize("settings", [{"fleet": "Fleet(HalfNormal())"}, {"device": "cuda:1"}])
def test_ray_refuses(settings):
    pytest.importorskip("ray")
    refused(lambda: Settings(engine="ray", **settings), "with the engine Ray()")


@pytest.mark.parametrize(
    ("settings", "write"),
    [
        ({"workers": 2}, 'engine="Processes(workers=2)"'),
        ({"workers": 2, "engine": "torchrun"}, 'engine="Torchrun(workers=2)"'),
        ({"gpus": 0.25}, 'engine="Ray(gpus=0.25)"'),
        ({"address": "auto", "engine": "Ray(gpus=0.5)"}, "engine=\"Ray(gpus=0.5, address='auto')\""),
    ],
)
def test_a_field_of_an_engine_is_no_setting(settings, write):
    error = refused(lambda: run(**settings), "a field of the engine")
    assert error.line == write
    for call in (Experiment().training, Experiment().train):
        assert refused(lambda call=call: call(**settings), "a field of the engine").line == write
    (text,) = eval(f"dict({write})").values()
    assert repr(engine(text))
    assert "Write: --engine " in str(error.at("shell"))


# the calls that an engine gets


def test_a_foreign_engine_trains_from_python():
    ours, theirs = run(engine=FAKE), run()
    assert ours.reports[-1].fingerprint == theirs.reports[-1].fingerprint
    assert fake_engine.CALLS == ["open", 0, 1, "close"]
    fake_engine.CALLS.clear()
    assert len(list(atoll.rounds("softmax", DATA, PLAN, rounds=2, engine=fake_engine.Fake(2)))) == 2
    assert fake_engine.CALLS == ["open", 0, 1, "close"]


def test_a_foreign_engine_trains_from_the_command_line(capsys):
    words = [
        "run",
        "--clients",
        "5",
        "--model",
        "softmax",
        "--rounds",
        "2",
        "--engine",
        FAKE,
        "--quiet",
        "--json",
        "--set",
        "report=false",
    ]
    assert main(words) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["status"] == "done"
    about = runs.read_environment(Path(printed["path"]))
    assert (about["engine"], about["planet"]) == ("Fake", "Mars")
    assert fake_engine.CALLS == ["open", 0, 1, "close"]
    assert main(["resume", printed["run"], "--rounds", "3", "--quiet"]) == 2
    assert main(["resume", printed["run"], "--rounds", "3", "--quiet", "--trust"]) == 0
    assert fake_engine.CALLS[4:] == ["open", 2, "close"]


class Stops:
    """An observer that raises, or interrupts the program, after the first round."""

    def __init__(self, act):
        self.act = act

    def start(self, training, path): ...

    def round(self, report):
        self.act()

    def end(self, run): ...


def test_it_is_closed_once_after_an_error():
    def fail():
        raise OSError("stop")

    with pytest.raises(OSError, match="stop"):
        run(engine=FAKE, observers=[Stops(fail)])
    assert fake_engine.CALLS == ["open", 0, "close"]


def test_it_is_closed_once_after_ctrl_c():
    done = run(engine=FAKE, observers=[Stops(lambda: os.kill(os.getpid(), signal.SIGINT))], rounds=5)
    assert done.status == "interrupted"
    assert fake_engine.CALLS == ["open", 0, "close"]


def test_a_failed_round_is_not_committed(monkeypatch):
    gather = fake_engine.FakeEngine.gather

    def fails(self, plan, state, cohort, key):
        if state.round == 1:
            raise AtollError("no")
        return gather(self, plan, state, cohort, key)

    monkeypatch.setattr(fake_engine.FakeEngine, "gather", fails)
    with pytest.raises(AtollError):
        run(engine=FAKE)
    assert fake_engine.CALLS == ["open", 0, "close"]
    fake_engine.CALLS.clear()
    with pytest.raises(AtollError):
        list(atoll.rounds("softmax", DATA, PLAN, rounds=2, engine=FAKE))
    assert fake_engine.CALLS == ["open", 0, "close"]


@pytest.fixture
def unclosable(monkeypatch):
    """Engines whose `close` raises."""

    def fails(self):
        fake_engine.CALLS.append("close")
        raise OSError("workers are lost")

    monkeypatch.setattr(fake_engine.FakeEngine, "close", fails)


def test_an_error_of_close_keeps_the_result(unclosable, tmp_path):
    ended = []

    class Ends(Stops):
        def end(self, run):
            ended.append(run.status)

    with pytest.warns(RuntimeWarning, match="Closing the engine failed: OSError: workers are lost"):
        done = run(engine=FAKE, out=tmp_path, report=False, observers=[Ends(lambda: None)])
    assert (done.status, done.rounds, ended) == ("done", 2, ["done"])
    expected = run()
    assert all(map(torch.equal, done.model.parameters(), expected.model.parameters()))
    assert (done.path / "model.safetensors").is_file()
    notes = [e for e in runs.read_rows(done.path / "events.jsonl") if e["event"] == "note"]
    assert [(e["round"], "workers are lost" in e["text"]) for e in notes] == [(1, True)]
    assert fake_engine.CALLS == ["open", 0, 1, "close"]


def test_an_error_of_close_does_not_hide_an_earlier_error(unclosable, monkeypatch):
    def fail(*_):
        raise ValueError("first")

    with pytest.raises(UsageError, match="absent"):
        run(engine=FAKE, init="absent")
    with pytest.raises(ValueError, match="first"):
        run(engine=FAKE, observers=[Stops(fail)])
    monkeypatch.setattr(fake_engine.FakeEngine, "gather", fail)
    with pytest.raises(ValueError, match="first"):
        list(atoll.rounds("softmax", DATA, PLAN, rounds=2, engine=FAKE))


def test_an_error_of_close_is_raised_at_the_end_of_rounds(unclosable):
    seen = []
    with pytest.raises(OSError, match="workers are lost"):
        for report in atoll.rounds("softmax", DATA, PLAN, rounds=2, engine=FAKE):
            seen.append(report.round)
    assert seen == [0, 1]
    with pytest.raises(ValueError, match="first") as caught, atoll.rounds("softmax", DATA, PLAN, engine=FAKE) as it:
        it.next()
        raise ValueError("first")
    assert caught.value.__notes__ == ["Closing the engine failed too: OSError: workers are lost"]


@pytest.mark.parametrize("leave", ["break", "error", "with"])
def test_a_loop_that_is_left_closes_the_engine(leave):
    training = atoll.rounds("softmax", DATA, PLAN, rounds=3, engine=FAKE)
    if leave == "with":
        with training:
            training.next()
    elif leave == "break":
        for _ in training:
            break
    else:
        with pytest.raises(ValueError, match="own"):
            for _ in training:
                raise ValueError("own")
    assert fake_engine.CALLS == ["open", 0, "close"]
    assert training.state.round == 1 and training.evaluate()["accuracy"] > 0


def test_it_is_closed_if_the_training_cannot_begin():
    with pytest.raises(UsageError):
        run(engine=FAKE, init="absent")
    assert fake_engine.CALLS == ["close"]  # the start is read before the engine opens


def test_a_diverged_round_is_not_committed():
    with pytest.raises(AtollError):
        atoll.train("softmax", DATA, recipes.gd(1e38), out=None, rounds=5, engine=FAKE, stop=())
    assert fake_engine.CALLS[0] == "open" and fake_engine.CALLS[-1] == "close"
    assert len([c for c in fake_engine.CALLS if isinstance(c, int)]) < 5


@pytest.mark.parametrize(("lr", "commits"), [(0.1, [0]), (1e38, [])])
def test_an_error_of_the_evaluation_keeps_state_and_commits_equal(monkeypatch, lr, commits):
    training = atoll.rounds("softmax", DATA, recipes.gd(lr), rounds=5, engine=FAKE, stop=Diverged(factor=2, rounds=1))
    if not commits:
        training.next()  # the next loss is far above the first
        fake_engine.CALLS.clear()

    def fails(*args):
        raise OSError("no memory")

    monkeypatch.setattr(training, "_present_values", fails)
    with pytest.raises(OSError, match="no memory"):
        training.next()
    assert [call for call in fake_engine.CALLS if isinstance(call, int)] == commits
    assert training.state.round == (1 if commits else 2)
    assert (training.outcome is not None) == (not commits)
    training.close()
