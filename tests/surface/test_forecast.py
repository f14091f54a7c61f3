"""`atoll plan`: the forecast equals the run to the byte and to the second, and it trains nothing."""

import json
import shlex
from dataclasses import replace

import pytest
import torch
from problems import classification, seeded
from quick_cases import one_in, only
from torch import nn

import atoll
from atoll import recipes
from atoll.base.grammar import parse
from atoll.cli import main
from atoll.engine.simulation.fleet import Between, Chance, Each, Fleet, HalfNormal
from atoll.plan.aggregate import Mean
from atoll.plan.codec import (
    EF21,
    Cast,
    Clip,
    Eden,
    Entropy,
    ErrorFeedback,
    Identity,
    LowRank,
    Noise,
    Quantize,
    RandomK,
    Rotate,
    Sign,
    TopK,
)
from atoll.plan.local import Custom, Gradient, Train
from atoll.plan.optimizer.rules import adam, sgd
from atoll.plan.pace import Bounded, Buffered, Sync
from atoll.plan.plan import Plan
from atoll.plan.registry import PARTS
from atoll.plan.sampler import Poisson, Uniform
from atoll.tools.forecast import LINKS, predict, simulate

SIZES = (4, 7, 5, 9, 6, 3, 8, 5)
DATA = classification(SIZES, (12,))
SLOW = Fleet(HalfNormal(), uplink="4 kB/s", server="10 kB/s", latency=0.01)
KEEPING = Train(adam(0.01), steps=2, batch=3, keep=("optimizer", "order"))
CODECS = [
    Identity(),
    Cast("bf16"),
    Quantize(8),
    Quantize(levels=1),
    Rotate() >> Eden(4),
    Eden(1),
    RandomK(0.25) >> Eden(1),
    Sign(),
    LowRank(1),
    ErrorFeedback(TopK(0.1) >> Quantize(8)),
    EF21(TopK(0.1)),
]


def module():
    """A model with buffers and a counter: those of BatchNorm."""
    return seeded(lambda: nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)))


def training(plan, fleet=None, rounds=3, data=DATA, model=module):
    return atoll.rounds(model(), data, plan, rounds=rounds, fleet=fleet, evaluate_every=0)


def compared(plan, fleet=None, rounds=3):
    """The forecast and the reports of a run; every exact value of the forecast equals that of the run."""
    it = training(plan, fleet, rounds)
    predicted, reports = predict(it), list(it)
    assert predicted.flights.down == tuple(r.bytes_down for r in reports)
    assert predicted.flights.started == tuple(r.cohort for r in reports)
    assert predicted.flights.arrived == tuple(r.arrived for r in reports)
    assert predicted.flights.now == tuple(r.now for r in reports if r.now is not None)
    assert predicted.bytes_down == it.bytes_down
    if fleet is not None:
        assert predicted.seconds == pytest.approx(reports[-1].now, rel=1e-12)
        assert predicted.flights.parts.total == pytest.approx(reports[-1].now / rounds, rel=1e-9)
    return predicted, reports, it


@pytest.mark.parametrize("codec", only(CODECS[2:9:6] + CODECS[10:], CODECS), ids=repr)
def test_bytes_of_every_codec(codec):
    predicted, reports, it = compared(Plan(Gradient(), Mean(), sgd(0.1), codec=codec))
    assert predicted.exact
    assert predicted.flights.up == tuple(r.bytes_up for r in reports)
    assert predicted.bytes_up == it.bytes_up == 3 * len(SIZES) * predicted.message


@pytest.mark.parametrize(
    ("slots", "fleet"),
    [
        pytest.param({"cohort": 3, "downlink": TopK(0.05)}, None, marks=pytest.mark.slow),
        ({"cohort": Poisson(0.4), "downlink": Quantize(8)}, SLOW),
        pytest.param({"pace": Buffered(3), "downlink": TopK(0.02)}, None, marks=pytest.mark.slow),
        ({"pace": Buffered(3), "downlink": TopK(0.02), "cohort": 4}, replace(SLOW, availability=Chance(0.7))),
        ({"pace": Bounded(2), "local": KEEPING}, replace(SLOW, dropout=0.3)),
        pytest.param({"pace": Sync(1.5), "cohort": 4}, replace(SLOW, dropout=0.2), marks=pytest.mark.slow),
        ({"pace": Sync(deadline_s=1.0, quorum=0.25)}, SLOW),
        ({"pace": Sync(deadline_s=1.0, partial=True), "local": Train(sgd(0.1), steps=5, batch=3)}, SLOW),
    ],
    ids=repr,
)
def test_bytes_and_seconds_of_every_pace(slots, fleet):
    """Also with random fleets: every draw is keyed, so the forecast simulates the flights of the run."""
    plan = Plan(**{"local": Gradient(), "aggregator": Mean(), "optimizer": sgd(0.1), "max_failed": 1, **slots})
    predicted, reports, _ = compared(plan, fleet, rounds=6)
    assert predicted.flights.up == tuple(r.bytes_up for r in reports)


@pytest.mark.parametrize(
    "recipe",
    one_in(7, [r for r in recipes.RECIPES if not r().releases and r not in (recipes.fedbn, recipes.newton)]),
    ids=lambda recipe: recipe.__name__,
)
def test_bytes_of_every_recipe(recipe):
    plan = recipe()
    if recipe is recipes.diloco:
        plan = recipe(steps=2)  # of 500
    if recipe in (recipes.fedper, recipes.fedrep):
        plan = recipe(own=("*bias",))
    predicted, reports, _ = compared(plan, rounds=2)
    assert predicted.exact and predicted.flights.up == tuple(r.bytes_up for r in reports)


def test_a_compressed_message_is_no_longer():
    predicted, _, it = compared(Plan(Gradient(), Mean(), sgd(0.1), codec=Quantize(4) >> Entropy()))
    assert not predicted.exact and "at most" in predicted.text()
    assert 0.5 * predicted.bytes_up < it.bytes_up < predicted.bytes_up


def test_the_message_of_an_own_loop_is_unknown():
    def loop(model, loader, ctx):
        return {"one": 1.0, "two": 2.0}

    assert not predict(training(Plan(Custom(loop, lr=0.1), Mean()))).exact


def test_a_forecast_changes_nothing():
    plan = Plan(KEEPING, Mean(), codec=ErrorFeedback(TopK(0.1)), downlink=TopK(0.1), pace=Buffered(3))
    alone, watched = training(plan, SLOW), training(plan, SLOW)
    predict(watched)
    assert [r.fingerprint for r in alone] == [r.fingerprint for r in watched]


def test_rounds_without_flights_equal_the_others():
    it = training(Plan(Gradient(), Mean(), sgd(0.1), cohort=4, pace=Buffered(2)), SLOW, rounds=400)
    plan = it.plan
    whole = predict(it)
    assert len(whole.flights.up) == 400
    part = simulate(plan, it.state, it.engine, 400, limit=300)
    assert 100 < len(part.up) < 200
    about = replace(whole, flights=part)
    assert about.bytes_up == whole.bytes_up
    assert about.seconds == pytest.approx(whole.seconds, rel=0.15)
    assert "rounds were simulated" in about.text() and "rounds were simulated" not in whole.text()


# time


def test_the_parts_of_a_round_by_hand():
    """Equal transfers share the link and end together; faster clients wait for slower ones."""
    fleet = Fleet(Each(tuple(float(i + 1) for i in range(len(SIZES)))), server="1 kB/s")
    predicted = predict(training(Plan(Gradient(), Mean(), sgd(0.1)), fleet))
    parts, n = predicted.flights.parts, len(SIZES)
    down, up = predicted.flights.down[1] / 1000, predicted.message / 1000
    assert parts.download == pytest.approx(down)
    assert parts.compute == pytest.approx((n + 1) / 2)
    assert up <= parts.upload < n * up
    assert parts.total == pytest.approx(predicted.seconds / 3)
    assert min(parts) >= 0


@pytest.mark.parametrize("pace", [Sync(), Buffered(2), Bounded(3)], ids=repr)
def test_a_clients_time_is_all_accounted_for(pace):
    """The share of computing, times the time of the whole cohort, equals the computing time."""
    fleet = Fleet(Each((0.5,) * len(SIZES)))
    predicted = predict(training(Plan(Gradient(), Mean(), sgd(0.1), pace=pace), fleet, rounds=8))
    parts = predicted.flights.parts
    assert parts.waiting == pytest.approx(0, abs=1e-9)
    assert parts.compute == pytest.approx(parts.total) and parts.link == 0


def test_a_table_of_links_equals_the_clock():
    plan = Plan(Gradient(), Mean(), sgd(0.1), codec=Quantize(8))
    predicted = predict(training(plan))
    assert predicted.seconds is None and predicted.flights.parts is None and predicted.help is None
    for link in LINKS:
        clocked = predict(training(plan, Fleet(0.0, server=link)))
        assert predicted.links[link] == pytest.approx(clocked.seconds / 3)
        assert link in predicted.text()


def settings(write):
    """The slots of the flags that a forecast suggests."""
    texts = [word for word in shlex.split(write) if word != "--set"]
    return {text.partition("=")[0].removeprefix("plan."): parse(text.partition("=")[2], PARTS) for text in texts}


@pytest.mark.parametrize(
    ("slots", "fleet", "changed"),
    [
        ({}, Fleet(0.5, uplink="2 kB/s"), {"codec"}),
        pytest.param({}, Fleet(0.5, downlink="2 kB/s"), {"downlink"}, marks=pytest.mark.slow),
        ({}, Fleet(0.5, server="6 kB/s"), {"codec", "downlink"}),
        ({"codec": Quantize(8)}, Fleet(0.1, uplink="2 kB/s"), {"codec"}),
    ],
    ids=["uplink", "downlink", "server", "compressed"],
)
def test_the_proposed_change_removes_the_bottleneck(slots, fleet, changed):
    plan = Plan(Gradient(), Mean(), sgd(0.1), **slots)
    predicted = predict(training(plan, fleet, rounds=30))
    assert predicted.dominates == "link" and predicted.help.enough
    assert predicted.help.write in predicted.text()
    parts = settings(predicted.help.write)
    assert parts.keys() == changed
    after = predict(training(replace(plan, **parts), fleet, rounds=30))
    assert after.dominates == "compute" and after.help is None
    assert after.flights.parts == predicted.help.parts
    assert "No codec can save more" in after.text()


def test_the_best_codec_is_proposed_if_none_is_enough():
    predicted = predict(training(Plan(Gradient(), Mean(), sgd(0.1)), Fleet(1e-6, server="1 kB/s")))
    assert predicted.dominates == "link" and not predicted.help.enough
    assert predicted.help.parts.link < predicted.flights.parts.link and "still more than computing" in predicted.text()
    plan = Plan(Gradient(), Mean(), sgd(0.1), **settings(predicted.help.write))
    least = predict(training(plan, Fleet(1e-6, server="1 kB/s")))
    assert least.help is None and "No codec that was tried sends fewer bytes" in least.text()


def test_long_waits_propose_another_pace():
    data = classification((3,) * 40, (12,))
    plan = Plan(Gradient(), Mean(), sgd(0.1), Uniform(20))
    predicted = predict(training(plan, Fleet(HalfNormal()), rounds=5, data=data))
    assert settings(predicted.help.write) == {"pace": Buffered(2)} and "Most of the time is waiting" in predicted.text()
    assert predicted.help.arrivals > 1.3 * 20 / predicted.flights.parts.total
    patient = predict(training(replace(plan, pace=Buffered(2)), Fleet(HalfNormal()), rounds=5, data=data))
    assert patient.flights.parts.waiting < 1e-9 < predicted.flights.parts.waiting


def test_a_change_that_does_not_fit_is_not_proposed():
    """A mean over the expected clients is valid with `Sync()` only."""
    plan = Plan(Gradient(), Mean(over="expected"), sgd(0.1), cohort=4)
    predicted = predict(training(plan, Fleet(Between(0.01, 9.0))))
    assert predicted.help is None and predicted.values()["time"]["help"] is None


# memory


@pytest.mark.parametrize("dtype", only(["float64"], ["float32", "float64"]))
def test_predicted_memory_equals_the_sizes_of_the_tensors(dtype):
    plan = Plan(KEEPING, Mean(), adam(0.01), codec=ErrorFeedback(TopK(0.1)), downlink=TopK(0.1), pace=Buffered(3))
    it = atoll.rounds(module(), DATA, plan, rounds=12, fleet=SLOW, dtype=dtype, evaluate_every=0)
    predicted, versions = predict(it).memory, []
    for _ in it:
        versions.append(sum(map(size, (v.model for v in it.state.versions.values()))))
    state = it.state
    assert predicted["model"] == size(state.model) + size(state.sent.theta)
    assert predicted["versions"] == max(versions) > 0
    assert predicted["optimizer"] == size(state.optimizer)
    assert predicted["clients"] == size(it.memory.take(it.memory.touched()))
    assert predicted["chunk"] == 6 * it.task.layout.d * it.task.layout.dtype.itemsize * predict(it).lanes


def size(tree):
    leaves = [t for t in torch.utils._pytree.tree_leaves(tree) if isinstance(t, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_sum_uses_at_most_the_forecast_memory(dtype):
    data = classification(SIZES, (12,), dtype=dtype)
    plan = Plan(Gradient(), Mean(), sgd(0.1))
    it = atoll.rounds(module(), data, plan, rounds=1, dtype=str(dtype).removeprefix("torch."), evaluate_every=0)
    key = it.state.key()
    cohort = plan.sampler(it.engine.population, 0, key.fold("cohort"))
    (partial,) = it.engine.gather(plan, it.state, cohort, key).partials.values()
    predicted, layout = predict(it).memory["sum"], it.task.layout
    assert 8 * layout.d < size(list(partial.tensors().values())) <= predicted + 8 * 64


# the command


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def call(*words):
        code = main([str(word) for word in words])
        out, err = capsys.readouterr()
        assert not list(tmp_path.glob("runs*")), "it wrote something"
        return code, out, err

    return call


WORDS = ["plan", "--data", "digits", "--model", "softmax", "--recipe", "fedavg(0.1, cohort=10)", "--rounds", "4"]


def test_the_command_tells_people_and_programs(run):
    code, out, _ = run(*WORDS, "--json")
    predicted = json.loads(out)
    assert code == 0 and predicted["time"] is None and predicted["exact"] and predicted["parameters"] == 650
    assert predicted["bytes"]["up"] == {"client": 2620, "round": 26200, "run": 104800}
    assert list(predicted["links"]) == list(LINKS)
    fleet = ("--fleet", "Fleet(0.5, server='100 kb/s')", "--rounds", "60")
    code, text, _ = run(*WORDS[:-2], *fleet)
    assert code == 0 and "The link dominates" in text and "26.2 kB" in text
    flags = shlex.split(text[text.index("--set") :])
    code, after, _ = run(*WORDS[:-2], *fleet, *flags)
    assert code == 0 and "Computing dominates" in after


def test_the_command_refuses_the_same_plans_as_a_run(run):
    code, out, err = run(*WORDS, "--set", "plan.pace=Sync(deadline_s=5)")
    assert (code, out) == (2, "") and "without a clock" in err
    code, out, err = run(*WORDS, "--fleet", "Fleet()", "--set", "plan.pace=Sync(deadline_s=0.5)")
    assert (code, out) == (2, "") and "no client can meet" in err


def test_a_file_is_read(run, tmp_path):
    file = tmp_path / "experiment.toml"
    file.write_text('data = "diabetes"\nmodel = "linear"\nclients = 5\nrounds = 2\n[plan]\npace = "Buffered(2)"\n')
    code, out, _ = run("plan", file, "--json")
    assert code == 0 and json.loads(out)["bytes"]["up"]["run"] == 2 * 2 * 64


@pytest.mark.slow
def test_a_plan_with_noise_states_its_epsilon_and_the_noise_for_a_budget():
    data = atoll.data.load("digits").split(100, min_rows=1)
    plan = atoll.recipes.dp_fedavg(lr=0.5, clip=0.5, noise=2.0, q=0.1)
    predicted = predict(atoll.rounds("softmax", data, plan, rounds=10, budget=1.0, delta=1e-3))
    assert predicted.privacy.epsilon == pytest.approx(
        atoll.privacy.epsilon(plan, clients=100, rounds=10, delta=1e-3), rel=1e-12
    )
    fits = replace(plan, codec=Clip(0.5) >> Noise(predicted.noise))
    assert atoll.privacy.epsilon(fits, clients=100, rounds=10, delta=1e-3) <= 1.0
    assert predicted.privacy.text() in predicted.text() and f"Noise({predicted.noise})" in predicted.text()
    assert predicted.values()["privacy"]["noise_for_budget"] == predicted.noise
    assert predict(training(Plan(Gradient(), Mean()))).values()["privacy"] is None
