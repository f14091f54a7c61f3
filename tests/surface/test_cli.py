"""The command line: output streams, exit codes, and all refusals."""

import ast
import importlib.metadata
import inspect
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from atoll import runs
from atoll.cli import main
from atoll.cli.app import app
from atoll.plan.round import step


def base(**settings):
    """The flags of a quick run; arguments replace or add flags."""
    values = {"data": "diabetes", "model": "linear", "recipe": "distributed_gd(0.1)", "clients": 5, **settings}
    return [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def quick(**settings):
    """The flags of a quick run without progress output."""
    return [*base(**{"rounds": 2, **settings}), "--quiet"]


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    """Each test has its own folder and environment. Plots are off, because they take a second."""
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith("ATOLL_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("ATOLL_REPORT", "0")


@pytest.fixture
def atoll(capsys):
    """Run one command in this process: exit code, stdout, stderr."""

    def call(*words):
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return call


@pytest.fixture
def refused(atoll):
    """Run a command that must be refused by one error on stderr, with nothing on stdout."""

    def call(*words, code=2, parts=()):
        done = atoll(*words)
        assert (done.code, done.out) == (code, ""), done.err
        assert "Traceback" not in done.err
        for part in parts:
            assert part in done.err
        return done.err

    return call


def only_run():
    (path,) = runs.list_runs(Path("runs"))
    return path


# Commands that answer at once


@pytest.mark.parametrize(
    "commands", [[["--version"]], [["--help"], ["run", "--help"], ["--install-completion", "--help"]]]
)
def test_torch_is_not_imported_for_a_quick_answer(commands):
    code = f"import sys; from atoll.cli import main; print([main(w) for w in {commands!r}], sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    codes, _, modules = done.stdout.splitlines()[-1].partition("] ")
    loaded = {name.partition(".")[0] for name in ast.literal_eval(modules)}
    assert set(ast.literal_eval(codes + "]")) == {0}
    assert not loaded & {"torch", "numpy", "matplotlib", "sklearn", "pandas", "msgspec", "safetensors"}
    if commands == [["--version"]]:
        assert not loaded & {"cyclopts", "rich"}
        assert done.stdout.splitlines()[0] == importlib.metadata.version("atoll")


def test_lists_and_refusals_import_no_large_module(tmp_path):
    """Commands that list runs or refuse a setting take .2 s: they load neither torch nor a parser nor OpenSSL."""
    commands = [["runs"], *(["run", *words] for words in (["--data", "no.csv"], ["--recipe", "no"]))]
    commands.append(["run", "--engine", "torchrun"])
    code = f"import sys; from atoll.cli import main; print([main(w) for w in {commands!r}], sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    codes, _, modules = done.stdout.splitlines()[-1].partition("] ")
    loaded = {name.partition(".")[0] for name in ast.literal_eval(modules)}
    assert codes == "[0, 2, 2, 2"
    assert not loaded & {"torch", "numpy", "msgspec", "safetensors", "hashlib", "tempfile", "subprocess", "rich"}


def test_rounds_import_nothing_heavy(tmp_path):
    """A run imports neither torch's compiler nor sympy, and no library for plots or data sets."""
    np.save(tmp_path / "x.npy", np.random.default_rng(0).random((40, 5), np.float32))
    np.save(tmp_path / "y.npy", np.arange(40) % 2)
    words = ["run", "--data", ".", "--clients", "4", "--model", "softmax", "--rounds", "2", "--set", "report=false"]
    code = f"import sys; from atoll.cli import main; code = main({words!r}); print(code, sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    code, _, modules = done.stdout.splitlines()[-1].partition(" ")
    assert code == "0"
    assert "numerics fused" in done.stderr
    heavy = {"torch._dynamo", "sympy", "sklearn", "scipy", "matplotlib", "pandas", "ray", "rich.live"}
    assert heavy & set(ast.literal_eval(modules)) == set()


def test_help_names_every_command_and_every_flag(atoll):
    text = atoll("--help").out
    commands = [
        "run",
        "resume",
        "new",
        "plan",
        "runs",
        "show",
        "ui",
        "tag",
        "track",
        "compare",
        "replay",
        "lr",
        "attack",
        "sweep",
        "export",
        "doctor",
    ]
    assert all(f" {name} " in text for name in commands)
    flags = (
        "--data --model --clients --split --held-out --recipe --rounds --seed --seeds --dtype --engine --numerics "
        "--workers --chunk --out --baselines --smoke --init --set --json --quiet --target --by --task --missing "
        "--scale --folder"
    )
    text = atoll("run", "--help").out
    assert [flag for flag in flags.split() if f"{flag} " not in text] == []
    assert "ATOLL_HELD_OUT" in text


def test_alone_it_shows_the_help(atoll):
    done = atoll()
    assert done.code == 0
    assert done.out == atoll("--help").out


def test_examples_of_the_help_are_commands(atoll):
    lines = [*atoll("--help").out.splitlines(), *atoll("run", "--help").out.splitlines()]
    examples = [shlex.split(line)[1:] for line in lines if line.startswith("    atoll ")]
    assert len(examples) >= 6
    for words in examples:
        app.parse_args(words, exit_on_error=False, print_error=False)


def test_completion_can_be_installed(atoll, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SHELL", "/bin/bash")
    assert atoll("--install-completion", "--shell", "bash").code == 0
    assert any(path.is_file() and "atoll" in path.read_text() for path in tmp_path.rglob("*atoll*"))


# A run


def test_run_prints_the_result_on_stdout_and_progress_on_stderr(atoll):
    done = atoll("run", *base(rounds=2), "--baselines")
    assert done.code == 0
    path = only_run()
    for part in (
        "done: Finished 2 rounds",
        "federated",
        "pooled",
        "local only",
        f"atoll show {path.name[11:]}",
        "model.safetensors",
    ):
        assert part in done.out
    assert "held-out loss" in done.err
    assert (path / "model.safetensors").is_file()


def test_quiet_is_quiet(atoll):
    done = atoll("run", *quick())
    assert (done.code, done.err) == (0, "")
    assert "--baselines" in done.out


def test_json_of_a_run_that_diverged(atoll):
    done = atoll("run", *base(recipe="distributed_gd(100.0)", rounds=30), "--json", "--quiet")
    found = json.loads(done.out)
    assert done.code == 1 and found["status"] == "failed" and "diverged" in found["reason"] and "diverged" in done.err
    assert Path(found["path"]).name == found["run"] == only_run().name


def test_json_is_one_object(atoll):
    done = atoll("run", *base(rounds=2), "--json", "--baselines")
    found = json.loads(done.out)
    assert done.out.count("\n") == 1
    wanted = {"run", "path", "rounds", "seconds", "metrics", "bytes_up", "bytes_down", "failures", "baselines"}
    assert wanted <= found.keys()
    assert (found["rounds"], found["failures"]) == (2, 0)
    assert found["bytes_up"] > 0
    assert Path(found["path"]).name == found["run"] == only_run().name
    assert {"federated", "pooled", "local", "constant"} == found["baselines"].keys()
    assert "rmse" in found["metrics"]
    assert done.err, "progress goes on, on stderr"


def test_seeds_give_mean_and_sd(atoll):
    done = atoll("run", *quick(), "--seeds", "3", "--json", "--seed", "5")
    found = json.loads(done.out)
    assert [one["seed"] for one in found["runs"]] == [5, 6, 7]
    values = [one["metrics"]["rmse"] for one in found["runs"]]
    assert found["metrics"]["rmse"] == pytest.approx(np.mean(values))
    assert found["sd"]["rmse"] == pytest.approx(np.std(values, ddof=1))
    text = atoll("run", *quick(), "--seeds", "2").out
    assert "mean" in text
    assert "± sd" in text


def test_smoke_tries_every_stage_and_leaves_nothing(atoll, monkeypatch):
    monkeypatch.setenv("ATOLL_REPORT", "1")
    done = atoll("run", *quick(), "--smoke", "--baselines")
    assert done.code == 0
    for stage in ("a round", "an evaluation", "a checkpoint", "resuming", "the report", "the baselines"):
        assert f"{stage}" in done.out
    assert list(Path().iterdir()) == []


def test_stop_rules_end_a_run(atoll):
    found = json.loads(atoll("run", *quick(), "--json", "--stop", "Bytes(1)", "--stop", 'Target("rmse", 1e-9)').out)
    assert found["rounds"] == 1
    assert "bytes" in found["reason"]


# Sources of settings


def test_flags_win_over_set_over_environment_over_file(atoll, monkeypatch):
    Path("experiment.toml").write_text("seed = 1\nrounds = 1\nheld_out = 0.3\nmin_rows = 3\n")
    monkeypatch.setenv("ATOLL_SEED", "2")
    monkeypatch.setenv("ATOLL_ROUNDS", "9")
    monkeypatch.setenv("ATOLL_HELD_OUT", "0.25")
    words = ["run", "experiment.toml", *base(), "--quiet", "--set", "seed=3", "--set", "rounds=7", "--rounds", "2"]
    assert atoll(*words).code == 0
    config = (only_run() / "config.toml").read_text()
    for line in ("seed = 3", "rounds = 2", "held_out = 0.25", "min_rows = 3"):
        assert f"\n{line}\n" in config


def test_found_files_are_read_and_switches_come_from_the_environment(atoll, monkeypatch):
    Path("pyproject.toml").write_text("[tool.atoll]\nrounds = 1\nout = 'elsewhere'\n")
    monkeypatch.setenv("ATOLL_QUIET", "1")
    monkeypatch.setenv("ATOLL_JSON", "1")
    found = json.loads(atoll("run", *base()).out)
    assert (found["rounds"], Path(found["path"]).parent.name) == (1, "elsewhere")
    monkeypatch.delenv("ATOLL_JSON")
    assert found["run"] in atoll("runs").out


def test_no_baselines_wins_over_the_file(atoll):
    Path("atoll.toml").write_text("baselines = true\n")
    assert "\npooled" not in atoll("run", *quick(), "--no-baselines").out
    assert "\npooled" in atoll("run", *quick()).out


# Runs


def test_runs_show_and_ids(atoll):
    assert "No runs in runs yet" in atoll("runs").out
    assert atoll("run", *quick(), "--baselines").code == 0
    path = only_run()
    assert path.name in atoll("runs").out
    (brief,) = json.loads(atoll("runs", "--json").out)
    assert (brief["run"], brief["status"], brief["rounds"], brief["data"]) == (path.name, "done", 2, "diabetes")
    for name in (path.name, path.name[11:], str(path), "latest", "runs/latest"):
        text = atoll("show", name).out
        for part in (path.name, "done", "sgd(0.1)", "rmse", "pooled", "config.toml", f"atoll export {path.name[11:]}"):
            assert part in text, name
    assert json.loads(atoll("show", "latest", "--json").out) == brief | {"path": str(path.resolve())}


def test_show_why_prints_the_reason_for_the_backend(atoll):
    done = atoll("run", *quick())
    about = json.loads((only_run() / "environment.json").read_text(encoding="utf-8"))
    assert about["why"] and about["why"] not in done.err
    assert atoll("show", "latest", "--why").out == f"numerics  {about['numerics']}: {about['why']}\n"
    backend = {"numerics": about["numerics"], "why": about["why"]}
    assert json.loads(atoll("show", "latest", "--why", "--json").out) == backend
    assert "--why" in atoll("show", "--help").out


def test_resume_goes_on_to_more_rounds_and_keeps_them(atoll):
    assert atoll("run", *quick()).code == 0
    done = atoll("resume", "latest", "--rounds", "4", "--json", "--quiet")
    assert json.loads(done.out)["rounds"] == 4
    assert "\nrounds = 4\n" in (only_run() / "config.toml").read_text()
    assert [row["round"] for row in runs.read_rows(only_run() / "metrics.jsonl")] == [0, 1, 2, 3]
    straight = json.loads(atoll("run", *base(rounds=4), "--quiet", "--json").out)
    assert straight["metrics"] == json.loads(done.out)["metrics"]


def test_a_run_can_be_run_again_from_its_folder(atoll):
    first = json.loads(atoll("run", *quick(), "--json").out)
    again = json.loads(atoll("run", Path(first["path"]) / "config.toml", "--quiet", "--json").out)
    assert again["metrics"] == first["metrics"]
    assert again["run"] != first["run"]


def test_init_takes_a_run(atoll):
    atoll("run", *quick())
    name = only_run().name
    assert atoll("run", *quick(), "--init", name[11:]).code == 0
    assert atoll("run", *quick(), "--init", f"runs/{name}/model.safetensors").code == 0


def test_the_other_commands_reach_their_tools(atoll, monkeypatch):
    said = []

    def tool(name, **made):
        def call(*args, client=None):
            said.append((name, *args))
            return SimpleNamespace(text=lambda: f"{name} said", **made)

        return call

    fix = SimpleNamespace(name="torch", ok=False, text="absent", fix="pip install torch")
    for name, functions in {
        "compare": {"compare_pair": tool("compare"), "find_runs": lambda *_: [only_run().resolve()] * 2},
        "replay": {"replay": tool("replay")},
        "export": {"export": tool("export")},
        "lr": {"find_rate": tool("lr", suggestion=0.1, plot=Path("lr.png"))},
        "doctor": {"examine": lambda: [SimpleNamespace(name="python", ok=True, text="3.11", fix=""), fix]},
    }.items():
        monkeypatch.setitem(sys.modules, f"atoll.tools.{name}", SimpleNamespace(**functions))
    atoll("run", *quick())
    path = only_run().resolve()
    assert atoll("compare", "latest", path).out == "compare said\n"
    assert atoll("replay", "latest", "--round", "1", "--client", "3", "--trust").out == "replay said\n"
    assert atoll("export", "latest", "--dtype", "int8").out == "export said\n"
    assert atoll("lr", "--which", "server", *base()).out == "lr said\n"
    assert json.loads(atoll("lr", *base(), "--json").out) == {"which": "local", "suggestion": 0.1, "plot": "lr.png"}
    assert said[:3] == [
        ("compare", path, path, Path("runs"), None),
        ("replay", path, 1, 3, True, None, 0),
        ("export", path, "int8", None, False),
    ]
    assert [call[2:] for call in said[3:]] == [("server", Path("runs")), ("local", Path("runs"))]
    done = atoll("doctor")
    assert done.code == 1
    assert "Write: pip install torch" in done.out


# Bad input: exit 2, one error


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["rnu"], ("rnu", "run")),
        (["run", "--clents", "3"], ("--clents", "Write: --clients 3")),
        (["run", "--rounds", "ten"], ("ten", "Write: atoll run --help")),
        (["replay", "latest"], ("--round", "Write: atoll replay --help")),
        (["export", "latest", "--dtype", "int9"], ("int9",)),
        (["run", "--set", "rounds"], ("KEY=VALUE", "Write: --set rounds=10")),
        (["run", "--set", "rouns=3"], ("'rouns'", "Write: --rounds 3")),
        (["run", "--set", "plan.pce=Sync()"], ("'plan.pce'", 'Write: --set "plan.pace=Sync()"')),
        (["run", "--seeds", "0"], ("--seeds 0", "Write: --seeds 5")),
        (["run", "absent.toml"], ("There is no file absent.toml",)),
        (["run", *quick(data="digitss")], ("'digitss'", "Write: --data digits")),
        (["run", *quick(data="absent.csv")], ("absent.csv",)),
        (["run", *quick(model="linera")], ("'linera'", "Write: --model linear")),
        (["run", *quick(model="nomodule:make")], ("nomodule",)),
        (["run", *quick(recipe="fedavgg()")], ("'fedavgg'", 'Write: --recipe "fedavg()"')),
        (["run", *quick(recipe="fedavg(lr=0.1")], ("cannot be read",)),
        (["run", *quick(recipe="fedavg(rl=0.1)")], ("rl",)),
        (["run", *quick(recipe="gd(0)")], ("lr",)),
        (["run", *quick(recipe="gd(-1.0)")], ("lr",)),
        (["run", *quick(), "--set", "plan.optimizer=sgd(-0.1)"], ("lr",)),
        (["run", *quick(clients="5000")], ("5000", "Write: --clients ")),
        (["run", *quick(), "--split", "Dirichlet(0)"], ("Dirichlet",)),
        (["run", *quick(), "--held-out", "1.5"], ("1.5", "Write: --held-out 0.2")),
        (
            ["run", *quick(recipe="fedavg(0.1, cohort=6)")],
            ("A cohort of 6 clients out of 5", 'Write: --set "plan.cohort=Uniform(5)"'),
        ),
        (["run", *quick(), "--dtype", "float16"], ("float16", "Write: --dtype float32")),
        (["run", *quick(), "--engine", "inproces"], ("'inproces'", "Write: --engine inprocess")),
        (["run", *quick(rounds="0")], ("rounds = 0",)),
        (["run", *quick(), "--init", "absent"], ("'absent'",)),
        (["show", "absent"], ("'absent'", "Write: atoll run")),
        (["resume", "absent"], ("'absent'",)),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else "",
)
def test_invalid_arguments_exit_2(refused, words, parts):
    refused(*words, parts=parts)
    assert not Path("runs").exists(), "nothing was started"


@pytest.mark.parametrize(
    "text", ["__import__('os').mkdir('pwned')", "os.mkdir('pwned')", "fedavg(lr=__import__('os').mkdir('pwned'))"]
)
def test_a_plan_text_cannot_call_something_else(refused, text):
    refused("run", *quick(recipe=text))
    refused("run", *quick(), "--set", f"plan.local={text}")
    refused("run", *quick(), "--split", text)
    assert not Path("pwned").exists()


def test_suggested_flags_work(refused, atoll):
    error = refused("run", *quick(clients="5000"))
    flags = shlex.split(error.partition("Write: ")[2])
    found = dict(zip(flags[::2], flags[1::2], strict=True))
    assert (
        atoll("run", *quick(clients=found.pop("--clients")), *(word for pair in found.items() for word in pair)).code
        == 0
    )


def test_data_that_is_malformed_or_not_finite_exits_2(refused):
    rows = "\n".join(f"{i},{i % 5}.5" for i in range(40))
    Path("short.csv").write_text(f"x,y\n{rows}\n7\n")
    Path("infinite.csv").write_text(f"x,y\n{rows}\ninf,3.0\n")
    words = ["run", "--model", "linear", "--clients", "2", "--quiet"]
    refused(*words, "--data", "short.csv", parts=("short.csv",))
    refused(*words, "--data", "infinite.csv", parts=("inf",))
    refused(*words, "--data", "infinite.csv", "--target", "z", parts=("'z'",))
    Path("arrays").mkdir()
    np.save("arrays/x.npy", np.full((40, 3), np.nan, dtype=np.float32))
    np.save("arrays/y.npy", np.arange(40) % 2)
    refused(*words, "--data", "arrays", "--model", "mlp")


def test_a_label_unseen_in_training_exits_2(refused):
    Path("arrays").mkdir()
    rng = np.random.default_rng(0)
    for name, labels in (("", np.arange(40) % 2), ("_test", np.arange(10) % 3)):
        np.save(f"arrays/x{name}.npy", rng.normal(size=(len(labels), 3)).astype(np.float32))
        np.save(f"arrays/y{name}.npy", labels)
    refused("run", "--data", "arrays", "--clients", "2", "--quiet", parts=("label",))


def test_a_model_of_the_wrong_shape_exits_2(refused, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    Path("own_shapes.py").write_text(
        "from torch import nn\ndef narrow(features):\n    return nn.Linear(features[0], 2)\n"
    )
    refused("run", *quick(data="wine", model="own_shapes:narrow"), parts=("(4, 2)",))


def test_code_of_a_run_folder_is_not_imported(refused, atoll, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    Path("own_code.py").write_text(
        "import pathlib\npathlib.Path('imported').touch()\nfrom torch import nn\n"
        "def make(features):\n    return nn.Sequential(nn.Linear(features[0], 1))\n"
    )
    assert atoll("run", *quick()).code == 0
    config = only_run() / "config.toml"
    config.write_text(config.read_text().replace('model = "linear"', 'model = "own_code:make"'))
    refused("resume", "latest", "--rounds", "3", parts=("own_code:make", "Write: --trust"))
    refused("run", config, parts=("own_code:make", "Write: --trust"))
    assert not Path("imported").exists()
    assert atoll("run", config, "--quiet", "--trust").code == 0
    assert Path("imported").exists()
    assert atoll("resume", "latest", "--rounds", "3", "--quiet", "--trust").code == 0


# Bad input about runs: files that exist stay


def snapshot(path):
    names = ("config.toml", "metrics.jsonl", "events.jsonl", "model.safetensors", "checkpoint/pointer.json")
    return {name: (path / name).read_bytes() for name in names}


def test_a_run_of_another_version_exits_2_and_stays(refused, atoll, monkeypatch):
    with monkeypatch.context() as past:
        past.setattr("atoll.runs.folder.library_versions", lambda: {"atoll": "0.1.0", "torch": "1.0.0"})
        atoll("run", *quick())
    path = only_run()
    before = snapshot(path)
    error = refused("resume", "latest", "--rounds", "3", "--quiet", parts=("torch 1.0.0", "--any-version"))
    assert snapshot(path) == before
    words = shlex.split(error.partition("Write: atoll ")[2])
    assert atoll(*words, "--rounds", "3", "--quiet").code == 0


def test_other_data_on_resume_exits_2_and_stays(refused, atoll):
    rows = [f"{i},{i % 5}.5" for i in range(40)]
    Path("table.csv").write_text("\n".join(["x,y", *rows]))
    words = ["--data", "table.csv", "--model", "linear", "--recipe", "distributed_gd(0.1)", "--clients", "2"]
    assert atoll("run", *words, "--rounds", "2", "--quiet").code == 0
    before = snapshot(only_run())
    Path("table.csv").write_text("\n".join(["x,y", *rows[:-1], "39,7.5"]))
    refused("resume", "latest", "--rounds", "3", "--quiet", parts=("another input", "the target: centre"))
    assert snapshot(only_run()) == before


def test_a_folder_in_use_exits_2_and_stays(refused, atoll):
    atoll("run", *quick())
    before = snapshot(only_run())
    folder = runs.RunFolder.open(only_run())
    try:
        refused("resume", "latest", "--rounds", "3", "--quiet", parts=("in use by another process",))
    finally:
        folder.close()
    assert snapshot(only_run()) == before
    assert atoll("resume", "latest", "--rounds", "3", "--quiet").code == 0


# A run that fails: exit 1


def test_a_loss_that_is_always_nan_exits_1_and_keeps_the_files(refused, atoll):
    words = ["run", "--data", "wine", "--clients", "5", "--quiet", "--rounds", "40"]
    refused(*words, "--recipe", "fedavg(lr=1e30)", code=1, parts=("finite", "atoll lr"))
    path = only_run()
    assert (path / "config.toml").is_file()
    assert "failed" in atoll("show", "latest").out


def test_a_full_disk_exits_1_and_the_run_goes_on_later(refused, atoll):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    words = ["run", "--data", "wine", "--model", "mlp", "--clients", "5", "--rounds", "3", "--quiet"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, hard))
    try:
        error = refused(*words, code=1, parts=("could not be written", "Write: atoll resume"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    resumed = shlex.split(error.partition("Write: atoll ")[2])
    assert atoll(*resumed, "--quiet").code == 0
    assert [row["round"] for row in runs.read_rows(only_run() / "metrics.jsonl")] == [0, 1, 2]


def test_traceback_is_shown_on_demand(atoll, monkeypatch):
    monkeypatch.setenv("ATOLL_TRACEBACK", "1")
    done = atoll("run", *quick(data="digitss"))
    assert done.code == 2
    assert "Traceback" in done.err


# Ctrl-C


def went_on(atoll, out):
    """The output of an interrupted command agrees with its run folder, and another command resumes from it."""
    found = json.loads(out)
    assert found["status"] == "interrupted"
    rows = runs.read_rows(only_run() / "metrics.jsonl")
    assert [row["round"] for row in rows] == list(range(found["rounds"]))
    done = atoll("resume", "latest", "--rounds", found["rounds"] + 2, "--json", "--quiet")
    assert json.loads(done.out)["rounds"] == found["rounds"] + 2
    return found["rounds"]


def test_first_interrupt_finishes_the_round(atoll, monkeypatch):
    """Ctrl-C in the middle of the third round; this round still counts."""
    begun = []

    def interrupted(plan, state, engine):
        begun.append(state.round)
        if state.round == 2:
            signal.raise_signal(signal.SIGINT)
        return step(plan, state, engine)

    with monkeypatch.context() as patch:
        patch.setattr("atoll.training.rounds.step", interrupted)
        done = atoll("run", *quick(rounds=100), "--json")
    assert done.code == 130, done.err
    assert begun == [0, 1, 2]
    assert went_on(atoll, done.out) == 3


@pytest.mark.slow
def test_first_interrupt_finishes_the_round_and_second_command_goes_on(atoll):
    words = [*base(rounds=100000), "--set", "evaluate_every=0", "--json"]
    started = subprocess.Popen(
        [sys.executable, "-m", "atoll", "run", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    heads = iter(started.stderr.readline, "")
    assert any(line.split()[:1] == ["0"] for line in heads), "the first round is found as a plain line"
    started.send_signal(signal.SIGINT)
    out, err = started.communicate(timeout=60)
    assert started.returncode == 130, err
    went_on(atoll, out)


def test_interrupt_while_data_is_read_exits_130(atoll, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("atoll.data.load", stop)
    done = atoll("run", *quick())
    assert (done.code, done.out) == (130, "")
    assert "Stopped" in done.err


def test_a_closed_output_is_no_error(atoll):
    atoll("run", *quick())
    code = "import sys; from atoll.cli import main; sys.exit(main(['runs']))"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert done.stderr == ""


def test_shared_options_of_commands_are_declared_once():
    """Each command uses the declaration in cli/options.py or cli/flags.py."""
    shared = {"out": "Out", "as_json": "Json", "quiet": "Quiet", "trust": "Trust", "flags": "ExperimentFlags"}
    commands = [inspect.unwrap(app[name].default_command) for name in app if not name.startswith("-")]
    found = [item for command in commands for item in command.__annotations__.items() if item[0] in shared]
    assert set(found) == {*shared.items(), ("as_json", "Lines")} and len(found) > 3 * len(shared)
