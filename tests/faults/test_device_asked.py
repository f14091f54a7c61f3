"""A device that does not exist, or an unknown name: one clear error each, with a line to write that works."""

import json

import pytest
import torch

import atoll
from atoll import recipes, runs
from atoll.base.errors import UsageError
from atoll.cli import main
from atoll.compute import device as devices
from atoll.compute.device import check_precision, free, resolve_device
from atoll.training.experiment import Experiment

HOST = torch.device("cpu")


@pytest.fixture
def gpus(monkeypatch):
    """Return a function that lets torch report n GPUs."""

    def have(count):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    for built in ("cuda", "hip"):
        monkeypatch.setattr(torch.version, built, None, raising=False)
    have(0)
    return have


@pytest.fixture(scope="module")
def data():
    return atoll.data.load("digits").split(clients=5)


def test_auto_takes_the_available_device(gpus):
    assert resolve_device("auto") == resolve_device("cpu") == HOST
    gpus(2)
    assert resolve_device("auto") == resolve_device("cuda") == resolve_device("cuda:0") == torch.device("cuda", 0)
    assert resolve_device("cuda:1") == torch.device("cuda", 1) and resolve_device("cpu") == HOST


def test_each_rank_of_a_machine_takes_its_own(gpus):
    gpus(2)
    assert [resolve_device("auto", rank).index for rank in range(4)] == [0, 1, 0, 1]
    assert resolve_device("cuda:1", 0).index == 1


@pytest.mark.parametrize(
    ("asked", "count", "given", "why", "write"),
    [
        ("cuda:3", 0, "torch finds no GPU", "built for CPUs", "--device cpu"),
        ("cuda", 0, "torch finds no GPU", "built for CPUs", "--device cpu"),
        ("cuda:7", 2, "there are 2 GPUs", "counted from 0", "--device cuda:1"),
        ("cuda:1", 1, "there is 1 GPU", "counted from 0", "--device cuda:0"),
        ("mps", 0, "device = 'mps'", "float64", "--device auto"),
        ("mps:0", 0, "device = 'mps:0'", "float64", "--device auto"),
        ("gpu", 0, "device = 'gpu'", "", "--device auto"),
        ("cuda:-1", 2, "device = 'cuda:-1'", "", "--device auto"),
        ("CUDA", 2, "device = 'CUDA'", "", "--device auto"),
        ("", 0, "device = ''", "", "--device auto"),
    ],
)
def test_refused(gpus, asked, count, given, why, write):
    gpus(count)
    with pytest.raises(UsageError) as refusal:
        resolve_device(asked)
    assert given in refusal.value.given and why in refusal.value.why and refusal.value.at("shell").line == write
    resolve_device(write.removeprefix("--device "))


def test_refused_before_anything_is_started(gpus, data, tmp_path):
    with pytest.raises(UsageError, match="torch finds no GPU"):
        atoll.train("mlp", data, recipes.fedavg(0.1), rounds=1, device="cuda:3", out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_at_the_command_line(gpus, tmp_path, monkeypatch, capsys):
    """The command line prints the error with its line to write."""
    monkeypatch.chdir(tmp_path)
    line = [
        "run",
        "--rounds",
        "1",
        "--clients",
        "5",
        "--model",
        "softmax",
        "--json",
        "--quiet",
        "--set",
        "report=false",
    ]
    assert main([*line, "--device", "cuda:3"]) == 2
    printed = capsys.readouterr().err
    assert "torch finds no GPU" in printed and "Write: --device cpu" in printed and "Traceback" not in printed
    assert main([*line, "--device", "cpu", "--precision", "bf16"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "done"
    (run,) = (tmp_path / "runs").glob("*-*")
    about = runs.read_environment(run)
    assert (about["device"], about["precision"]) == ("cpu", "bf16")
    assert Experiment.read(run).precision == "bf16"


def test_in_a_file_and_in_the_environment(tmp_path):
    file = tmp_path / "experiment.toml"
    file.write_text('device = "cpu"\nprecision = "bf16"\n', encoding="utf-8")
    it = Experiment.read(file)
    assert (it.device, it.precision) == ("cpu", "bf16")
    assert Experiment().with_environment({"ATOLL_DEVICE": "cuda:1"}).device == "cuda:1"


@pytest.mark.slow
def test_worker_processes_compute_on_the_cpu(gpus, data):
    gpus(2)
    with pytest.raises(UsageError, match="engine Processes") as refusal:
        atoll.rounds("mlp", data, recipes.fedavg(0.1), engine="processes", device="cuda:0")
    assert refusal.value.at("shell").line == "--engine inprocess"
    training = atoll.rounds("softmax", data, recipes.fedavg(0.1), engine="Processes(workers=1)")
    assert training.task.device == HOST
    training.close()


def test_a_run_resumes_in_its_folder(gpus, data, tmp_path):
    """A run resumes on its own device, even if a GPU is available now. Without that device, the resume is refused."""
    plan, settings = recipes.fedavg(0.1), {"out": tmp_path, "report": False}
    first = atoll.train("softmax", data, plan, rounds=1, **settings)
    gpus(1)
    assert atoll.train("softmax", data, plan, rounds=2, resume=first.path, **settings).rounds == 2
    environment = first.path / "environment.json"
    about = json.loads(environment.read_text(encoding="utf-8"))
    environment.write_text(json.dumps(about | {"device": "cuda"}), encoding="utf-8")
    gpus(0)
    with pytest.raises(UsageError, match="torch finds no GPU"):
        atoll.train("softmax", data, plan, rounds=3, resume=first.path, **settings)


def test_a_gpu_without_bfloat16(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla P40")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    with pytest.raises(UsageError, match="Tesla P40") as refusal:
        check_precision("bf16", "float32", "auto", gpu)
    assert refusal.value.at("shell").line == "--precision full"
    check_precision("full", "float32", "auto", gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    check_precision("bf16", "float32", "auto", gpu)


def test_free_memory_includes_the_unused_cache_of_torch(monkeypatch):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 8000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 500)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 200)
    assert free(gpu) == 1300 and free(HOST) is None
    assert devices.gpu(HOST) == {}
