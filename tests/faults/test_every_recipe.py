"""Each recipe over a network gives the model, the fingerprints and bytes of `atoll run`, with 1, 4 and 10 clients."""

import json

import pytest
from faults.test_federation import alone, federation
from quick_cases import only

from atoll import recipes
from atoll.net import wire
from atoll.net.client import _Channel
from atoll.net.site import Site
from atoll.plan.pace import Sync
from atoll.plan.state import MAX_DELTAS

# A pace with real arrivals has another order in each run: tests/faults/test_arrivals.py. No named model of images has
# the layers of normalisation that `fedbn` keeps at a client; its local part is that of `fedper` with other names.
NAMES = [r.__name__ for r in recipes.RECIPES if r().pace == Sync() and r.__name__ != "fedbn"]
ARGUMENTS = {
    "diloco": "steps=5",
    "dp_fedavg": "q=0.5, batch=100",
    "ditto": "batch=50",
    "local_sgd": "steps=4",
    "newton": "l2=0.1",
    "post_local_sgd": "switch=1, steps=4",
}
MORE = {
    "dp_fedavg": {"delta": 0.01, "randomness": "seed"},
    "fedper": {"model": "mlp"},
    "newton": {"numerics": "auto"},
    "fedrep": {"model": "mlp"},
}
CODECS = {
    "memory of the error": "ErrorFeedback(TopK(0.1) >> Quantize(4, bucket=256))",
    "memory of a gradient": "EF21(TopK(0.1))",
    "memory of a factor": "ErrorFeedback(LowRank(2))",
}


THETA = 4 * (64 * 200 + 200 + 200 * 10 + 10)  # bytes of `mlp` for digits


def rows(run):
    names = ("round", "fingerprint", "arrived", "failed", "bytes_up", "bytes_down", "loss", "held_out_loss")
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    return [[json.loads(line).get(name) for name in names] for line in lines]


def equal(folder, settings, clients):
    served, events = federation(folder, settings, clients)
    reference = alone(folder, settings, clients)
    assert rows(served) == rows(reference)
    models = [(run.path / "model.safetensors").read_bytes() for run in (served, reference)]
    assert models[0] == models[1]
    assert sum(event["bytes"] for each in events for event in each if event["event"] == "work") == served.bytes_up


@pytest.mark.slow
@pytest.mark.parametrize("clients", [1, 4, 10])
@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_over_a_network_gives_the_bits_of_a_run(name, clients, tmp_path):
    settings = {"model": "softmax", "recipe": f"{name}({ARGUMENTS.get(name, '')})", "rounds": 2, **MORE.get(name, {})}
    equal(tmp_path, {"numerics": "fused", "seed": 3, **settings}, clients)


@pytest.mark.slow
@pytest.mark.parametrize("clients", [1, 4, 10])
@pytest.mark.parametrize("codec", CODECS)
def test_a_codec_with_memory_over_a_network_gives_the_bits_of_a_run(codec, clients, tmp_path):
    settings = {"model": "mlp", "recipe": "fedavg(lr=0.5, batch=50)", "plan__codec": CODECS[codec], "rounds": 3}
    equal(tmp_path, {**settings, "numerics": "fused", "seed": 3}, clients)


DOWNLINKS = {"short": "TopK(0.05)", "random": "RandomK(0.05, unbiased=False)", "long": "Quantize(8, bucket=256)"}


@pytest.mark.parametrize("case", only(["short"], DOWNLINKS))
def test_the_deltas_of_a_downlink_travel_and_give_the_bits_of_a_run(case, tmp_path, monkeypatch):
    """A site reads the whole version once; then the bytes that it reads are those that the run counts."""
    fetched, made = [], []
    whole, next_version = _Channel._blob, Site.next_version

    async def _blob(self, blob, most):
        fetched.append(blob.length)
        return await whole(self, blob, most)

    def next(self, work, deltas, rest):
        made.append(sum(map(len, deltas)))
        return next_version(self, work, deltas, rest)

    monkeypatch.setattr(_Channel, "_blob", _blob)
    monkeypatch.setattr(Site, "next_version", next)
    settings = {"model": "mlp", "recipe": "fedavg(lr=0.5, batch=100, cohort=2)", "rounds": 4, "seed": 3}
    equal(tmp_path, {**settings, "numerics": "fused", "plan__downlink": DOWNLINKS[case]}, 3)
    lines = (tmp_path / "alone" / "latest" / "metrics.jsonl").read_text().splitlines()
    counted = sum(json.loads(line)["bytes_down"] for line in lines)
    assert counted == sum(made) + 3 * THETA
    assert sum(length > THETA for length in fetched) == 3 + 3  # the first version and the final model
    assert wire.MAX_DELTAS == MAX_DELTAS


@pytest.mark.slow
def test_a_site_whose_version_has_another_hash_reads_the_whole_version(tmp_path, monkeypatch):
    """Another kind of processor, and a process that was started again, give the same bits from the whole version."""
    fetched, read, made = [], _Channel._blob, iter(range(100))

    async def _blob(self, blob, most):
        fetched.append(blob.length)
        return await read(self, blob, most)

    monkeypatch.setattr(_Channel, "_blob", _blob)
    monkeypatch.setattr(Site, "next_version", lambda self, work, deltas, rest: None)
    monkeypatch.setattr(Site, "has_base", lambda self, work: bool(work.deltas) and next(made) % 2 == 0)
    settings = {"model": "mlp", "recipe": "fedavg(lr=0.5, batch=100)", "rounds": 3, "seed": 3, "numerics": "fused"}
    equal(tmp_path, {**settings, "plan__downlink": "TopK(0.05)"}, 2)
    assert sum(length > THETA for length in fetched) == 3 * 2 + 2  # three rounds and the final model
