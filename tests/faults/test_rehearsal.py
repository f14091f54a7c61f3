"""A server and clients as processes on loopback give the bits of `atoll run`, also if they are killed."""

import json

import pytest
from network import Federation, comparable, rows_of

from atoll.training.experiment import Experiment

FEEDBACK = "ErrorFeedback(TopK(0.1) >> Quantize(4, bucket=256))"


def flags(**settings):
    words = []
    for name, value in settings.items():
        words += ["--set", f"{name.replace('__', '.')}={value}"]
    return words


def reference(folder, **settings):
    """The run folder of the same experiment in one process."""
    texts = {name.replace("__", "."): str(value) for name, value in settings.items()}
    return Experiment().with_settings({**texts, "out": str(folder / "alone"), "report": "false"}).train().path


SMALL = {
    "data": "digits",
    "clients": 2,
    "split": "Dirichlet(0.3)",
    "model": "softmax",
    "recipe": "fedavg(lr=0.5, batch=50)",
    "plan__codec": FEEDBACK,
    "numerics": "fused",
    "report": "false",
}


def same_bits(a, b):
    return (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kills_change_no_bit(tmp_path):
    settings = {**SMALL, "rounds": 5}
    with Federation(tmp_path, *flags(**settings)) as it:
        address = it.serve()
        it.invite()
        for client in range(2):
            it.join(client)
        it.server.after_round(1)
        it.server.kill()
        assert it.serve() == address
        it.server.after_round(2)
        it.clients[1].kill()
        it.join(1, token=False)
        assert [it.server.code(), it.clients[0].code(), it.clients[1].code()] == [0, 0, 0], it.server.stderr()
        served, alone = it.path(), reference(tmp_path, **settings)
        assert same_bits(served, alone) and comparable(served) == comparable(alone)
        assert [row["round"] for row in rows_of(served)] == list(range(5))
        assert json.loads(it.run("verify", "--home", it.home, "--json"))["ok"]
        ledger = [json.loads(line) for line in (tmp_path / "site-0" / "ledger.jsonl").read_text().splitlines()]
        assert {row["round"] for row in ledger} == set(range(5))
        kept = tmp_path / "site-0" / "runs" / served.name / "model.safetensors"
        assert kept.read_bytes() == (served / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_four_clients_with_error_feedback_give_the_bits_of_a_run(tmp_path):
    settings = {**SMALL, "clients": 4, "model": "mlp", "recipe": "fedavg(lr=0.5, batch=10)", "numerics": "lanes"}
    settings["rounds"] = 10
    with Federation(tmp_path, *flags(**settings), clients=4) as it:
        it.serve()
        it.invite()
        clients = [it.join(client) for client in range(4)]
        assert [it.server.code(), *(client.code() for client in clients)] == [0] * 5
        served, alone = it.path(), reference(tmp_path, **settings)
        assert same_bits(served, alone) and comparable(served) == comparable(alone)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_kills_of_the_server_and_one_of_a_client_in_thirty_rounds(tmp_path):
    settings = {**SMALL, "clients": 3, "rounds": 30}
    with Federation(tmp_path, *flags(**settings), clients=3) as it:
        address = it.serve()
        it.invite()
        for client in range(3):
            it.join(client)
        it.server.after_round(8)
        it.server.kill()
        it.clients[0].kill()
        assert it.serve() == address
        it.join(0, token=False)
        it.server.after_round(18)
        it.server.kill()
        assert it.serve() == address
        assert [it.server.code(), *(client.code() for client in it.clients.values())] == [0] * 4
        rows = rows_of(it.path())
        assert [(row["round"], row["arrived"]) for row in rows] == [(number, 3) for number in range(30)]
        assert same_bits(it.path(), reference(tmp_path, **settings))
