"""Parts from outside the package: they use public names, keep their contract, and have the laws of their papers."""

import ast
import io
import itertools
import json
import os
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest
import torch
from clip_noise import Clip, Noise
from conformance import foreign_cases as cases
from fedprox import fedprox
from krum import Krum
from problems import NO_NATIVE, federation, run, seeded, task_of
from quick_cases import by_turns, one_in, only
from scaffold import Scaffold, corrected
from torch import nn

import atoll
from atoll import runs
from atoll.base.errors import RunError, UsageError
from atoll.base.grammar import parse
from atoll.base.random import Key
from atoll.engine.inprocess import InProcessEngine
from atoll.plan.aggregate import Mean
from atoll.plan.codec import ErrorFeedback, Identity, TopK
from atoll.plan.codec.stage import flat_layout
from atoll.plan.local import Gradient, Train
from atoll.plan.optimizer.rules import adam, sgd
from atoll.plan.pace import Buffered, Sync
from atoll.plan.plan import Plan
from atoll.plan.protocols import Contribution, Ids, Total
from atoll.plan.registry import PARTS
from atoll.testing import (
    check_aggregator,
    check_local,
    check_optimizer,
    check_stage,
    entropy_source,
    known_entropy,
    round_info,
)
from atoll.tools import replay
from atoll.training.experiment import Experiment

FOLDER = Path(cases.__file__).parent / "foreign"
LINES = {"fedprox": 25, "scaffold": 45, "krum": 50, "clip_noise": 40}
BASES = {"Local", "Aggregator", "Partial", "OptimizerBase", "Codec", "dict"}
NUMERICS = ["fused", "compiled", "lanes", "loop"]
EQUAL = Mean(weights="equal")
CHECKS = [
    (check_optimizer, fedprox(0.1, mu=0.5)),
    (check_optimizer, corrected(0.1)),
    (check_local, Scaffold(0.05, steps=3, batch=4)),
    (check_aggregator, Krum(2)),
    (check_stage, Clip(1.0)),
    (check_stage, Clip(1.0) >> Noise(1.0)),
]


def code_lines(text):
    """The number of lines with code: a line counts if it has a token that is no comment and no part of a docstring."""
    empty = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type not in empty]
    lines = {line for t in tokens for line in range(t.start[0], t.end[0] + 1)}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


@pytest.mark.parametrize("name", LINES)
def test_length(name):
    assert code_lines((FOLDER / f"{name}.py").read_text(encoding="utf-8")) <= LINES[name]


def test_count_of_lines():
    text = '"""Two\nlines."""\n\n# a comment\nx = (\n    1,  # one\n)\n'
    assert code_lines(text) == 3
    text += '\n\ndef f():\n    """One."""\n    return """a\n\nb"""\n'
    assert code_lines(text) == 3 + 1 + 3


@pytest.mark.parametrize("name", LINES)
def test_public_names_alone(name):
    """No name with a leading underscore, except the documented methods of named tuples; no concrete part as a base."""
    for node in ast.walk(ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            private = [n for n in (*node.module.split("."), *(a.name for a in node.names)) if n.startswith("_")]
            assert not private
        elif isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            assert node.attr in ("_replace", "_asdict") or re.fullmatch("__[a-z_]+__", node.attr)
        elif isinstance(node, ast.ClassDef):
            assert {re.match(r"\w+", ast.unparse(base))[0] for base in node.bases} <= BASES


@pytest.mark.parametrize(("check", "part"), CHECKS, ids=lambda value: getattr(value, "__name__", repr(value)))
def test_contract(check, part):
    check(part)


# engines


@pytest.fixture(scope="module")
def found():
    """The fingerprints of each part on the engine of this process."""
    return {name: cases.fingerprints(cases.plan_of(name)) for name in cases.PLANS}


def test_parts_train_differently(found):
    assert len({row[-1] for row in found.values()}) == len(found)
    assert all(len(set(row)) == len(row) for row in found.values())


@pytest.mark.parametrize(("name", "chunk"), one_in(2, by_turns(cases.PLANS, [1, 3])))
def test_chunks_change_no_bit(name, chunk, found):
    assert cases.fingerprints(cases.plan_of(name), chunk=chunk) == found[name]


@pytest.mark.parametrize("name", only([], cases.PLANS))
def test_workers_change_no_bit(name, found):
    assert cases.fingerprints(cases.plan_of(name), engine="Processes(workers=2)") == found[name]


@pytest.mark.slow
def test_ranks_change_no_bit(found, tmp_path):
    """Two members of a process group, as torchrun starts them, but of one process that imported torch for both."""
    path = os.pathsep.join([str(Path(atoll.__file__).parents[1]), str(FOLDER.parents[1]), str(FOLDER)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    line = [sys.executable, cases.__file__, str(tmp_path)]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == found


def trained(plan, numerics="fused", rounds=3, module=None, data=None, dtype=torch.float32):
    """The state and the reports after some rounds of a plan."""
    if numerics == "compiled" and NO_NATIVE:
        pytest.skip(NO_NATIVE)
    data = data or cases.clients()
    module = module or seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)))
    return run(plan, InProcessEngine(task_of(module, data, numerics, dtype), data), rounds)


def works(error, **names):
    """The part of the line that an error gives."""
    return parse(error.value.line, {**PARTS, **names})


# FedProx


@pytest.mark.parametrize("numerics", one_in(2, NUMERICS))
def test_fedprox_without_the_term_is_sgd(numerics):
    ours, plain = (
        trained(Plan(Train(rule, epochs=2, batch=5), Mean()), numerics)[0].model.theta
        for rule in (fedprox(0.1, mu=0.0), sgd(0.1))
    )
    if numerics in ("loop", "lanes"):
        assert torch.equal(ours, plain)
    else:  # plain descent steps within the backward pass
        assert (ours - plain).abs().max() <= 1e-6


def test_fedprox_steps_down_the_proximal_term():
    rule, theta = fedprox(0.1, mu=2.0), torch.tensor([1.0, -2.0], dtype=torch.float64)
    stepper = rule.stepper(theta, rule.slots(theta), 0.1)
    stepper.step(torch.tensor([1.0, 1.0], dtype=torch.float64))  # θ₀ − 0.1
    stepper.step(torch.tensor([0.0, 0.0], dtype=torch.float64))  # back by 0.1 · 2 · 0.1
    assert torch.allclose(theta, torch.tensor([0.92, -2.08], dtype=torch.float64), atol=1e-15)


def test_fedprox_keeps_clients_near():
    moved = [
        float(
            trained(Plan(Train(fedprox(0.1, mu=mu), epochs=9, batch=5), Mean()), rounds=1)[1][0].metrics[
                "gradient_norm"
            ]
        )
        for mu in (0.0, 1.0, 5.0)
    ]
    assert moved[0] > 1.5 * moved[1] > 1.5 * 1.5 * moved[2]


def test_fedprox_is_not_kept():
    with pytest.raises(UsageError, match="anchor") as error:
        Plan(Train(fedprox(0.1, mu=0.5), steps=2, batch=5, keep=("optimizer",)), Mean())
    Plan(works(error, fedprox=fedprox), Mean())
    Plan(Train(fedprox(0.1, mu=0.5), steps=2, batch=5, keep=("order",)), Mean())


# SCAFFOLD


def quadratics(clients=6, d=4):
    """Clients with the losses (θ − mᵢ)ᵀ diag(hᵢ) (θ − mᵢ)/2 and the minimum of their sum."""
    h = 0.5 + Key(3).fold("h").uniform(clients * d).reshape(clients, d)
    m = Key(3).fold("m").normal(clients * d).reshape(clients, d)
    x = torch.diag_embed((d / 2 * h).sqrt())
    y = (x @ m[..., None])[..., 0]
    data = federation(x.reshape(-1, d), y.reshape(-1), [d] * clients)
    return data, (h * m).sum(0) / h.sum(0)


@pytest.mark.slow
def test_scaffold_has_no_client_drift():
    """With different minima FedAvg stalls at a distance from the optimum, and SCAFFOLD does not."""
    data, best = quadratics()
    errors = [
        float((state.model.theta - best).norm())
        for local in (Scaffold(0.2, steps=5), Train(sgd(0.2), steps=5))
        for state, _ in [
            trained(Plan(local, EQUAL), "fused", 60, nn.Linear(4, 1, bias=False), data, torch.float64),
        ]
    ]
    assert errors[0] <= 1e-12
    assert errors[1] > 1e-3


SCAFFOLDS = {
    "plain": {},
    "server adam": {"optimizer": adam(0.1)},
    "error feedback": {"codec": ErrorFeedback(TopK(0.3))},
    "buffered": {"pace": Buffered(3)},
}


@pytest.mark.parametrize(("numerics", "which"), one_in(2, by_turns(NUMERICS, SCAFFOLDS)))
def test_scaffold_with_other_parts(numerics, which):
    """It trains, and c stays the mean of all cᵢ."""
    plan = Plan(Scaffold(0.3, steps=3, batch=5), EQUAL, cohort=6, **SCAFFOLDS[which])
    state, reports = trained(plan, numerics, rounds=10)
    assert reports[-1].metrics["loss"] < 0.95 * reports[0].metrics["loss"]
    assert "control" not in reports[0].metrics
    mine = state.memory.take(torch.arange(10))["local/control"]
    assert mine.abs().max() > 1e-3
    assert torch.allclose(state.server["local"]["control"], mine.mean(0), atol=1e-6)


def test_scaffold_sends_the_control_variates():
    """Both ways a message is longer by one vector of θ's length."""
    (_, (ours,)), (_, (plain,)) = (
        trained(Plan(local, EQUAL, cohort=6), rounds=1)
        for local in (Scaffold(0.1, steps=3, batch=5), Train(corrected(0.1), steps=3, batch=5))
    )
    d = 4 * 5 + 5 + 5 * 3 + 3
    assert ours.bytes_up - plain.bytes_up == ours.bytes_down - plain.bytes_down == 6 * 4 * d


def test_scaffold_resumes(tmp_path):
    data, plan = cases.clients(), cases.plan_of("scaffold")
    settings = {"numerics": "fused", "report": False}
    whole = atoll.train("softmax", data, plan, rounds=6, out=tmp_path / "whole", **settings)
    half = atoll.train("softmax", data, plan, rounds=3, out=tmp_path / "half", **settings)
    atoll.train("softmax", data, plan, rounds=6, out=tmp_path / "half", resume=half.path, **settings)
    ours, theirs = ((run.path / "model.safetensors").read_bytes() for run in (half, whole))
    assert ours == theirs


def test_scaffold_refuses():
    with pytest.raises(UsageError, match="equal weights") as error:
        Plan(Scaffold(0.1, steps=3), Mean())
    Plan(Scaffold(0.1, steps=3), works(error))
    for numbers in ((0.0, 3), (0.1, 0), (0.1, 3, 0)):
        with pytest.raises(UsageError):
            Plan(Scaffold(*numbers), EQUAL)


# Krum


def contribution(rows):
    """The contribution of n clients with these updates."""
    n = len(rows)
    sums = {"loss": torch.arange(n) / 7, "rows": torch.full((n,), 3)}
    return Contribution({"update": rows}, sums, torch.full((n,), 3), {}, {"loss": torch.arange(n) / 21})


def direct(rows, f):
    """The index that the formula of the paper selects."""
    scores = []
    for i, row in enumerate(rows):
        distances = sorted(float((row - other).square().sum()) for j, other in enumerate(rows) if j != i)
        scores.append(sum(distances[: len(rows) - f - 2]))
    return scores.index(min(scores))


def aggregated(rule, rows, groups):
    """The total of contributions that arrive in these groups of clients, each group in a partial of its own."""
    partial = rule.zero()
    for group in groups:
        ids = torch.tensor(group)
        part = contribution(rows[ids])
        part = part._replace(sums={**part.sums, "loss": ids / 7})
        more = rule.fold(rule.zero(), part, Ids(ids, torch.zeros_like(ids)))
        partial = rule.merge(partial, more)
    return rule.finalize(rule.total(partial), round_info())


@pytest.mark.parametrize(("n", "f"), [(3, 0), (7, 2), (9, 1), (12, 4)])
def test_krum_is_the_formula_for_every_order_of_arrival(n, f):
    rows = Key(n).normal(n * 20).reshape(n, 20) * torch.linspace(0.5, 2.0, n, dtype=torch.float64)[:, None]
    best, first = direct(rows, f), None
    for order in range(12):
        arrival = Key(5).fold(order).permutation(n)
        groups = [group.tolist() for group in arrival.split(1 + order % n)]
        total = aggregated(Krum(f), rows, groups)
        assert torch.equal(total.means["update"], rows[best])
        assert total.per_client["id"][total.per_client["selected"]].tolist() == [best]
        first = first or total
        assert all(torch.equal(total.sums[name], first.sums[name]) for name in first.sums)


def test_krum_selects_no_attacker():
    """Two of nine clients send a far update. The mean follows them, and Krum does not."""
    rows = Key(1).normal(9 * 5).reshape(9, 5)
    rows[[2, 6]] = 1e6
    for order in itertools.islice(itertools.permutations(range(9)), 0, 362880, 60480):
        assert aggregated(Krum(2), rows, [list(order)]).means["update"].abs().max() < 10


class Undone(Identity):
    """A codec with a per-sum half."""

    per_sum = True


@pytest.mark.parametrize(("slot", "part", "other"), [("pace", Buffered(3), Sync()), ("codec", Undone(), Identity())])
def test_krum_refuses_sums(slot, part, other):
    """The conflict is the rule's own: it stands in the plan's error, and the line to write works."""
    with pytest.raises(UsageError, match="the rule selects one of the updates") as error:
        Plan(Gradient(), Krum(2), **{slot: part})
    assert works(error) == other
    Plan(Gradient(), Krum(2), **{slot: works(error)})


def test_krum_needs_contributions():
    with pytest.raises(RunError, match="at least 7"):
        aggregated(Krum(2), torch.ones(6, 2), [list(range(6))])
    for f in (-1, 0.5):
        with pytest.raises(UsageError):
            Krum(f)


def test_krum_reports_and_replays(tmp_path):
    texts = {"plan.aggregator": "krum:Krum(2)", "recipe": "fedavg(lr=0.1, batch=10, cohort=8)"}
    ran = (
        Experiment()
        .override(data="wine", clients=10, rounds=2, numerics="fused", out=str(tmp_path), **texts)
        .train(report=False)
    )
    for report in ran.reports:
        assert int(report.clients["selected"].sum()) == 1
    client = int(ran.reports[1].clients["id"][report.clients["selected"]])
    found = replay.replay(ran.path, 1, client, trust=True)
    assert found.fingerprint == ran.reports[1].fingerprint
    assert found.checked == 2
    assert found.cosine == pytest.approx(1), "the update of the round is that of the selected client"
    events = [e for e in runs.read_rows(ran.path / "events.jsonl") if e["event"] == "clients"]
    assert [sum(e["selected"]) for e in events] == [1, 1]


# Clip >> Noise

CODEC = Clip(2.0) >> Noise(0.5)
SOME = Train(sgd(0.1), epochs=1, batch=5)


def test_clip_bounds_and_counts():
    x = torch.tensor([[0.6, 0.8], [3.0, 4.0], [0.0, 0.0], [0.0, -2.0]])
    payload, _, sums, _ = Clip(2.0).encode(x, {}, {}, Key(0))
    assert torch.allclose(payload, torch.tensor([[0.6, 0.8], [1.2, 1.6], [0.0, 0.0], [0.0, -2.0]]))
    assert sums["clipped"].tolist() == [0, 1, 0, 0]
    for bound, clipped in ((1e-6, 8), (1e6, 0)):
        _, (report,) = trained(Plan(SOME, EQUAL, cohort=8, codec=Clip(bound)), rounds=1)
        rows = int(report.clients["rows"].sum())
        assert report.metrics["clipped"] == pytest.approx(clipped / rows)


def test_noise_has_the_moments_of_the_bound():
    """Normal, with the deviation multiplier · bound, by the first four moments of 40,000 numbers."""
    d = 40_000
    codec = CODEC.bind(flat_layout(d))
    assert codec.stages[1].before.bound == 2.0
    one = torch.ones((), dtype=torch.int64)
    before = Total({"update": torch.full((d,), 3.0, dtype=torch.float64)}, {}, one, one, {})
    after, _ = codec.server_update(before, codec.server(flat_layout(d)), round_info(), Key(0))
    z = after.means["update"] - 3.0
    for power, moment, deviation in ((1, 0, 1), (2, 1, 2**0.5), (3, 0, 15**0.5), (4, 3, 96**0.5)):
        assert abs(float((z**power).mean()) - moment) < 4 * deviation / d**0.5
    assert float((z[1:] * z[:-1]).mean()) == pytest.approx(0, abs=4 / d**0.5)


def test_noise_is_added_once_to_the_sum():
    """The mean of 8 clients has the noise of one draw, divided by 8."""
    noisy, quiet = (
        trained(Plan(SOME, EQUAL, cohort=8, codec=codec), rounds=1)[0].model.theta
        for codec in (Clip(2.0) >> Noise(50.0), Clip(2.0))
    )
    assert 0.5 < float((noisy - quiet).std() * 8 / (50.0 * 2.0)) < 1.5


def test_noise_of_the_system_differs_and_known_noise_does_not():
    def theta():
        return trained(Plan(SOME, EQUAL, codec=CODEC))[0].model.theta

    assert not torch.equal(theta(), theta())
    known = []
    for _ in range(2):
        with entropy_source(known_entropy(1)):
            known.append(theta())
    assert torch.equal(*known)
    with entropy_source(known_entropy(2)):
        assert not torch.equal(known[0], theta())


def test_noise_without_a_bound():
    for codec in (Noise(0.5), TopK(0.5) >> Noise(0.5), Clip(1.0) >> TopK(0.5) >> Noise(0.5)):
        with pytest.raises(UsageError, match=r"Noise\(0\.5\) without a bound") as error:
            trained(Plan(SOME, EQUAL, codec=codec))
        assert works(error, Clip=Clip, Noise=Noise) == Clip(1.0) >> Noise(0.5)
    trained(Plan(SOME, EQUAL, codec=works(error, Clip=Clip, Noise=Noise)), rounds=1)


def test_noise_with_weights_by_rows():
    with pytest.raises(UsageError, match="equal weights") as error:
        Plan(SOME, Mean(), codec=CODEC)
    Plan(SOME, works(error), codec=CODEC)


def test_noise_with_model_buffers():
    def module(norm):
        return nn.Sequential(nn.Linear(4, 9), norm, nn.ReLU(), nn.Linear(9, 3))

    plan = Plan(SOME, EQUAL, codec=CODEC)
    with pytest.raises(UsageError, match="model buffers") as error:
        trained(plan, "lanes", module=module(nn.BatchNorm1d(9)))
    name, *numbers = re.fullmatch(r"torch\.nn\.(\w+)\((\d+), (\d+)\)", error.value.line).groups()
    trained(plan, "lanes", 1, module(getattr(nn, name)(*map(int, numbers))))


def test_noise_is_not_drawn_twice(tmp_path):
    texts = {f"plan.{slot}": text for slot, text in cases.PLANS["clip_noise"].items()}
    texts |= {"data": "wine", "numerics": "fused", "out": str(tmp_path)}
    ran = Experiment().override(clients=3, rounds=1, **texts).train(report=False)
    with pytest.raises(UsageError, match="released noise is not drawn twice"):
        replay.replay(ran.path, 0, 0, trust=True)
