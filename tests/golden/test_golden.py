"""Recorded draws, texts, names and orders that run folders and users' files depend on.

`golden.json` in this folder contains them. A change that alters one deliberately rewrites the file with
ATOLL_GOLDEN=rewrite, and its commit message states it.
"""

import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import atoll
from atoll import recipes, runs
from atoll.base.random import Key
from atoll.compute.layout import Layout
from atoll.plan.registry import PARTS
from atoll.training.stop import RULES

FILE = Path(__file__).with_name("golden.json")


def golden(name, value, grows=False):
    """Compare with the file, or write to it if ATOLL_GOLDEN=rewrite; a table that grows may have additional entries."""
    known = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    value = json.loads(json.dumps(value))
    if os.environ.get("ATOLL_GOLDEN") == "rewrite":
        known[name] = value
        FILE.write_text(text_of(known), encoding="utf-8")
    if grows:
        value = {word: value.get(word) for word in known[name]}
    assert known[name] == value


def text_of(known):
    """Format two levels of JSON with one entry per line, so that a change is one line of the diff."""

    def entry(value):
        if not isinstance(value, dict):
            return json.dumps(value, ensure_ascii=False)
        lines = (f"  {json.dumps(n)}: {json.dumps(v, ensure_ascii=False)}" for n, v in sorted(value.items()))
        return "{\n" + ",\n".join(lines) + "\n }"

    return "{\n" + ",\n".join(f" {json.dumps(n)}: {entry(v)}" for n, v in sorted(known.items())) + "\n}\n"


NORMAL = [-1.6954729819465748, 0.6270753636947913, -1.520707342146652, -0.8398219080518595]


def test_draws():
    """Replay of run folders uses these numbers: a changed number would change every old run."""
    key = Key(2024).fold("round", 3, "order")
    both = key.of(torch.tensor([0, 7]))
    golden(
        "draws",
        {
            "word": key.word(),
            "state": both.state().tolist(),
            "hash": both.hash(3).tolist(),
            "bits": both.bits(5).tolist(),
            "uniform": [x.hex() for x in key.uniform(3).tolist()],
            "uniform32": [x.hex() for x in key.uniform(3, torch.float32).tolist()],
            "integers": key.integers(6, 10).tolist(),
            "permutation": key.permutation(10).tolist(),
            "permutations": both.permutations(torch.tensor([6, 4]), 6).tolist(),
            "distinct": key.distinct(5, 1000).tolist(),
            "torch_seed": key.torch_seed(),
            "of two": key.of(torch.tensor([1, 2]), torch.tensor([5, 5])).hash(1).tolist(),
        },
    )


def test_normal_draws():
    """Box–Muller uses sine and logarithm, whose last bit may differ between machines."""
    draw = Key(2024).fold("normal").normal(4)
    torch.testing.assert_close(draw, torch.tensor(NORMAL, dtype=torch.float64), rtol=1e-14, atol=0)


def test_cohorts():
    from atoll.plan import sampler
    from atoll.plan.protocols import Population

    population = Population(20, torch.arange(1, 21))
    parts = (
        sampler.Uniform(4),
        sampler.Fraction(0.2),
        sampler.Poisson(0.2),
        sampler.Weighted(4),
        sampler.RoundRobin(4),
    )
    golden(
        "cohorts",
        {
            repr(part): [part(population, t, Key(5).fold("round", t, "cohort")).ids.tolist() for t in range(4)]
            for part in parts
        },
    )


def test_splits():
    """The partition of a seed never changes."""
    from atoll.data import partition

    source = atoll.data.load("wine")
    parts = (
        partition.IID(),
        partition.Dirichlet(0.3),
        partition.Pathological(2),
        partition.Shards(),
        partition.Quantity(1.0),
    )
    golden(
        "splits",
        {
            repr(part): {"sizes": (s := source.split(4, part)).sizes.tolist(), "first": s.order[:8].tolist()}
            for part in parts
        },
    )


def test_texts_of_recipes():
    """These texts appear in `config.toml` of a run and in `print(plan)`."""
    golden("recipes", {recipe.__name__: repr(recipe()) for recipe in recipes.RECIPES}, grows=True)
    golden("formula", str(recipes.fedavg(0.1, cohort=10)).splitlines())


def test_names_of_the_grammar():
    """Users' files contain these names: a name may be added, but not removed."""
    golden(
        "grammar",
        {
            name: [f.name for f in dataclasses.fields(part)] if dataclasses.is_dataclass(part) else None
            for name, part in sorted({**PARTS, **RULES}.items())
        },
        grows=True,
    )


class Mixed(nn.Module):
    """All kinds of tensors: tied weights, running statistics, a counter, a frozen weight, an integer buffer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(64, 10, bias=False)
        self.norm = nn.BatchNorm1d(10)
        self.frozen = nn.Parameter(torch.ones(10), requires_grad=False)
        self.register_buffer("mask", torch.ones(10, dtype=torch.int64))
        self.again = nn.Linear(10, 10)
        self.tied = nn.Linear(10, 10)
        self.tied.weight = self.again.weight

    def forward(self, x):
        x = self.norm(self.first(x.flatten(1))) * self.frozen * self.mask
        return self.tied(self.again(x))


def test_order_of_the_layout():
    layout = Layout.of(Mixed())
    assert [e.name for e in layout.entries] == list(Mixed().state_dict())
    golden("layout", [[e.name, list(e.shape), str(e.dtype), e.segment, e.alias] for e in layout.entries])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    data = atoll.data.load("digits").split(4)
    plan = dataclasses.replace(recipes.diloco(lr=0.01, steps=2, batch=8), cohort=2)
    return atoll.train(Mixed(), data, plan, rounds=3, out=tmp_path_factory.mktemp("golden"), report=False)


def test_files_of_a_run(run):
    names = sorted(str(p.relative_to(run.path)) for p in run.path.rglob("*") if p.is_file())
    golden(
        "files", [n.split("-")[0] + "-N.safetensors" if n.startswith("checkpoint/") and "-" in n else n for n in names]
    )


def test_rows_of_a_run(run):
    rows = runs.read_rows(run.path / "metrics.jsonl")
    golden("row", {name: type(value).__name__ for name, value in rows[0].items()})
    assert (run.path / "metrics.csv").read_text().splitlines()[0] == ",".join(rows[0])
    events = runs.read_rows(run.path / "events.jsonl")
    golden("events", {event["event"]: sorted(event) for event in events})


def shapes(path):
    return {n: f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for n, t in sorted(load_file(path).items())}


def test_tensors_of_a_run(run):
    """Keys, dtypes and shapes of all tensors on disk: `load_state_dict` and later versions must read them."""
    pointer = runs.read_pointer(run.path)
    golden("model", shapes(run.path / "model.safetensors"))
    golden("state", shapes(run.path / "checkpoint" / pointer["state"]))
    golden("memory", sorted(shapes(run.path / "checkpoint" / pointer["segments"][-1])))
    golden("pointer", sorted(pointer))
    golden("facts", sorted(pointer["facts"]))
    assert set(run.model.state_dict()) == set(load_file(run.path / "model.safetensors"))
    Mixed().load_state_dict(load_file(run.path / "model.safetensors"))


def test_environment_of_a_run(run):
    golden("environment", sorted(runs.read_environment(run.path)))


TRACED = {
    "distributed_gd": lambda: recipes.distributed_gd(0.5),
    "fedavg": lambda: recipes.fedavg(0.1, cohort=3),
    "local_sgd": lambda: recipes.local_sgd(0.1, steps=3, batch=8),
    "fedadam": lambda: recipes.fedadam(0.1),
    "diloco": lambda: recipes.diloco(0.01, steps=3, batch=8),
}


@pytest.mark.parametrize("name", TRACED)
def test_trace(name):
    """Six decimals of five rounds. Bits differ between types of CPU; a changed algorithm differs by more than that."""
    data = atoll.data.load("digits").split(5, atoll.data.Dirichlet(0.5))
    run = atoll.train("softmax", data, TRACED[name](), rounds=5, out=None, dtype="float64", seed=4)
    trace = [
        [round(r.metrics[m], 6) for m in ("loss", "gradient_norm", "held_out_loss", "accuracy")] for r in run.reports
    ]
    known = json.loads(FILE.read_text(encoding="utf-8")).get(f"trace of {name}") if FILE.exists() else None
    if os.environ.get("ATOLL_GOLDEN") == "rewrite":
        golden(f"trace of {name}", trace)
    else:
        torch.testing.assert_close(torch.tensor(trace), torch.tensor(known), rtol=1e-5, atol=2e-6)
