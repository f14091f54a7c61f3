"""Under a secure sum and under noise no view of a run contains a loss, a metric or a row count of one client."""

import re

import pytest
import torch
from memory_tracker import Memory

import atoll
from atoll import recipes
from atoll.plan.aggregate import Mean
from atoll.plan.codec import Clip
from atoll.plan.local import Train
from atoll.plan.optimizer import sgd
from atoll.plan.plan import Plan
from atoll.report.page_data import page_data, run_brief, to_json

SIZES = (1237, 2311, 1709, 1873, 2621)  # rows of the clients: no other number of the run is equal to one of them
LOCAL = Train(sgd(0.1), epochs=1, batch=None)
PLAIN = Plan(LOCAL, Mean("equal"), codec=Clip(1.0))
SECURE = Plan(LOCAL, Mean("equal", secure=True), codec=Clip(1.0))
NOISE = recipes.dp_fedavg(lr=0.1, clip=1.0, noise=2.0, q=0.9, batch=None)


@pytest.fixture(scope="module")
def data():
    key = torch.Generator().manual_seed(0)
    parts = {}
    for at, size in enumerate(SIZES):
        x = torch.randn(size, 3, generator=key)
        parts[f"hospital {at}"] = (x, (x.sum(1) + at > 0.5).long())
    return atoll.data.federate(parts, held_out=0)


def train(data, plan, out, **more):
    return atoll.train("softmax", data, plan, rounds=2, out=out, evaluate_every=0, progress="none", **more)


def texts(run, memory):
    """All views of a run by name: the page, the report and all files, HTML views, the rows of a tracker."""
    found = {
        p.name: p.read_text() for p in run.path.rglob("*") if p.suffix in (".html", ".jsonl", ".csv", ".svg", ".json")
    }
    views = (run, *run.reports)
    found |= {f"HTML {at}": each._repr_html_() + repr(each) for at, each in enumerate(views)}
    found |= {"page": to_json(page_data(run.path)).decode(), "list": str(run_brief(run.path)), "summary": run.summary()}
    return found | {"tracker": repr(memory.runs), "frame": str(run.frame("clients", "pyarrow").to_pydict())}


@pytest.fixture(scope="module")
def planted(data, tmp_path_factory):
    """The row counts and the losses of single clients, as a run without protection shows them."""
    memory = Memory(clients=True)
    run = train(data, PLAIN, tmp_path_factory.mktemp("plain"), observers=[memory])
    losses = [float(v) for v in run.reports[1].clients["loss"]]  # in round 0 each is log 2
    values = [rf"(?<![\d.]){size:_}(?!\d)".replace("_", ",?") for size in SIZES] + [f"{v:.6f}"[:6] for v in losses]
    seen = "".join(texts(run, memory).values())
    assert all(re.search(value, seen) for value in values)  # so that a search for them means something
    return values


@pytest.mark.parametrize("plan", [SECURE, NOISE], ids=["secure sum", "noise"])
@pytest.mark.filterwarnings("ignore::atoll.base.errors.Note")
def test_no_value_of_a_single_client_is_shown(plan, data, planted, tmp_path):
    memory = Memory(clients=True)
    private = {"randomness": "seed", "delta": 1e-5} if plan is NOISE else {}
    run = train(data, plan, tmp_path, observers=[memory], **private)
    for name, text in texts(run, memory).items():
        assert not [value for value in planted if re.search(value, text)], name
    page = page_data(run.path)
    absent = {c.name: c.absent for c in page.clients.columns}
    assert absent["loss"].startswith("not collected: ") and absent["rows"] == absent["loss"]
    if plan is NOISE:
        last = (run.path / "ledger.jsonl").read_text().splitlines()[-1]
        assert f'"epsilon": {page.privacy["epsilon"]!r}' in last or str(page.privacy["epsilon"]) in last
