"""Clip, AdaptiveClip and Noise: exact bounds, the deviation of the released sums, secret draws, and refused plans."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import run
from quick_cases import by_turns

from atoll import recipes
from atoll.base.entropy import entropy_source
from atoll.base.errors import UsageError
from atoll.base.random import Key
from atoll.engine.inprocess import InProcessEngine
from atoll.plan.aggregate import Combine, Mean, Sum
from atoll.plan.codec import EF21, AdaptiveClip, Clip, ErrorFeedback, Identity, Noise, Quantize, RandomK, Rotate, TopK
from atoll.plan.codec.stage import Chain, flat_layout
from atoll.plan.local import Calibrated, Ditto, Proximal, Train
from atoll.plan.optimizer import sgd
from atoll.plan.pace import Buffered, Sync
from atoll.plan.plan import Plan
from atoll.plan.protocols import Population, Total
from atoll.plan.registry import read_part
from atoll.plan.round import open_round
from atoll.plan.sampler import Everyone, Poisson, RoundRobin, Uniform, Weighted
from atoll.plan.schedule import plateau
from atoll.testing import check_stage, known_entropy, round_info
from atoll.testing.local import clients, problem

FAIR = Mean(weights="equal", over="expected")
LOCAL = Train(sgd(0.1), epochs=1, batch=4)
MODELS = Train(sgd(0.1), epochs=1, batch=4, sends="model")


def plan(codec, cohort=None, rule=FAIR, **parts):
    return Plan(
        parts.pop("local", LOCAL), rule, parts.pop("optimizer", sgd(1.0)), cohort or Poisson(0.5), codec, **parts
    )


def norm(rows):
    """The norm of each row in exact arithmetic, as far as float64 sums of squares allow; rounded up."""
    return [math.sqrt(math.fsum(float(v) ** 2 for v in row)) for row in rows.double()]


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10**6),
    st.floats(-38, 37),
    st.sampled_from([1e-30, 1e-3, 0.7, 1.0, 1e30]),
    st.sampled_from([1, 5, 300]),
)
def test_the_norm_of_a_message_is_at_most_one(seed, size, bound, d):
    for dtype in (torch.float32, torch.float64):
        x = (Key(seed).normal(2 * d).reshape(2, d) * 10.0**size).to(dtype)
        x[1, 0] = 3e38
        y, *_ = Clip(bound).encode(x, {}, {}, Key(0))
        assert max(norm(y)) <= 1.0
        expected = x.double() / max(norm(x)[0], bound)
        if float(expected[0].abs().max()) > 1e-30:
            assert (y[0] - expected[0]).abs().max() <= 5e-7 * expected[0].abs().max()


def test_a_zero_stays_zero_and_a_small_update_is_not_changed():
    y, *_ = Clip(2.0).encode(torch.tensor([[0.0, 0.0], [1.0, -1.0]]), {}, {}, Key(0))
    total, _ = Clip(2.0).server_update(_total(y.double().sum(0)), {}, round_info(), Key(0))
    assert torch.allclose(total.means["update"], torch.tensor([1.0, -1.0]).double(), rtol=1e-6)
    assert y[0].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("stage", [
    Clip(0.5), AdaptiveClip(0.3, count=2.0), Clip(1.0) >> Noise(2.0), Clip(1.0) >> Noise(2.0, by="client"),
])  # fmt: skip
def test_stages_keep_the_contract_and_their_texts_are_read_back(stage):
    check_stage(stage)
    assert read_part(repr(stage)) == stage


def _total(update, sums=None):
    one = torch.ones((), dtype=torch.int64)
    return Total({"update": update}, sums or {}, one, one, {})


@pytest.mark.parametrize(("codec", "deviation"), [
    (Clip(0.5) >> Noise(2.0), 0.5 * 2.0),
    (Clip(3.0) >> Rotate() >> Noise(0.7), 3.0 * 0.7),
    (Clip(1.0) >> RandomK(0.25) >> Noise(1.0), 4.0),
    (Clip(1.0) >> Noise(1.0) >> Rotate(), 1.0),
])  # fmt: skip
def test_the_released_sum_has_the_deviation_of_the_clip(codec, deviation):
    d = 1 << 16
    bound = codec.bind(flat_layout(d))
    total, _ = bound.server_update(_total(torch.zeros(d).double()), bound.server(flat_layout(d)), round_info(), Key(0))
    found = total.means["update"] / (deviation * (1 + 2**-10))
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (4, 3, 96)):
        assert abs(float((found**power).mean()) - moment) < 6 * math.sqrt(spread / d)


def test_two_stages_of_a_chain_and_two_rounds_share_no_noise():
    codec = (Clip(1.0) >> Noise(1.0) >> Noise(1.0)).bind(flat_layout(512))
    zero, info = _total(torch.zeros(512).double()), round_info()
    both = codec.server_update(zero, {}, info, Key(0))[0].means["update"]
    one = codec.stages[1].server_update(zero, {}, info._replace(entropy=info.entropy.fold(1)), Key(0))[0]
    rest = both - one.means["update"]
    assert abs(float((rest * one.means["update"]).mean())) < 6 / math.sqrt(512)
    engine = InProcessEngine(problem(), clients())
    private = plan(Clip(1.0) >> Noise(1.0), optimizer=sgd(1.0))
    with entropy_source(known_entropy(1)):
        first, again = (run(private, engine, 2)[0].model.theta for _ in range(2))
    assert first.equal(again) and not run(private, engine, 2)[0].model.theta.equal(first)


def test_each_client_adds_noise_of_its_own_to_its_message():
    """y + N(0, (z · bound)²) for each client and round, after `RandomK` of the larger bound, and none at the server."""
    d, x = 1 << 16, torch.ones(2, 1 << 16)
    for middle, deviation in (((), 0.7), ((RandomK(0.25),), 4 * 0.7)):
        chain = Chain((Clip(1.0), *middle, Noise(0.7, by="client"))).bind(flat_layout(d))
        key = replace(Key(0), secret=known_entropy().secret).of(torch.tensor([4, 9]))
        clean, *_ = Chain((Clip(1.0), *middle, Identity())).bind(flat_layout(d)).encode(x, {}, {}, key)
        noisy, *_ = chain.encode(x, {}, {}, key)
        found = (noisy - clean).double() / (deviation * (1 + 2**-10))
        for power, moment, spread in ((1, 0, 1), (2, 1, 2), (4, 3, 96)):
            for row in found:
                assert abs(float((row**power).mean()) - moment) < 6 * math.sqrt(spread / found.shape[1])
        assert abs(float((found[0] * found[1]).mean())) < 6 / math.sqrt(found.shape[1])
        assert chain.encode(x, {}, {}, replace(key, secret=bytes(32)))[0].ne(noisy).any()
        zero = _total(torch.zeros(d).double())
        assert not chain.server_update(zero, {}, round_info(), Key(0))[0].means["update"].any()
        with pytest.raises(UsageError, match="has none"):
            chain.encode(x, {}, {}, Key(0))
    for wrong in (math.nan, math.inf):
        x[0, 0] = wrong
        sent = chain.encode(x, {}, {}, key)[0]
        assert sent[0].isnan().all() and sent[1].isfinite().all()


def test_noise_of_clients_has_the_deviation_of_its_sum():
    """Seven clients of zero gradient: the model moves by the noise of seven clients, divided by seven."""
    engine = InProcessEngine(problem(), clients())
    moved = []
    for seed in range(10):
        still = plan(
            Clip(3.0) >> Noise(2.0, by="client"),
            Everyone(),
            optimizer=sgd(1.0),
            local=Train(sgd(1e-30), epochs=1, batch=4),
        )
        with entropy_source(known_entropy(seed)):
            state, (report,) = run(still, engine, 1)
        moved.append(state.model.theta - engine.task.start.theta)
    found = torch.cat(moved).double() / (3.0 * 2.0 / math.sqrt(7))
    assert report.arrived == 7 and abs(float((found**2).mean()) - 1) < 6 * math.sqrt(2 / found.numel())


def test_the_released_numbers_are_on_the_grid():
    codec = (Clip(1.0) >> Noise(1.0)).bind(flat_layout(100))
    x = torch.linspace(-3, 3, 100).double() / 7
    released = codec.server_update(_total(x), {}, round_info(), Key(0))[0].means["update"]
    steps = released * 2.0**16
    assert steps.equal(steps.round()) and 2.0**-16 * 10 <= 2.0**-12


def test_the_empty_cohort_releases_noise_and_no_count_decides_anything():
    engine = InProcessEngine(problem(), clients())
    private = plan(Clip(1.0) >> Noise(1.0), Poisson(1e-9))
    state, reports = run(private, engine, 1)
    other, _ = run(plan(Identity(), Poisson(1e-9)), engine, 1)
    assert reports[0].arrived == 0 and not state.model.theta.equal(other.model.theta)
    assert float((state.model.theta - other.model.theta).abs().max()) > 0


def test_only_clipped_vectors_and_noised_counts_leave_a_client():
    engine = InProcessEngine(problem(), clients())
    _, (report,) = run(plan(AdaptiveClip() >> Noise(1.0), Everyone()), engine, 1)
    assert set(report.metrics) == {"gradient_norm", "lr"}
    assert set(report.clients) == {"id", "bytes_up", "bytes_down"}


def test_a_cohort_is_secret_only_if_the_plan_releases():
    engine = InProcessEngine(problem(), clients())
    from atoll.engine.client_state import Memory
    from atoll.plan.round import bind
    from atoll.plan.state import State

    def drawn(codec):
        bound = bind(plan(codec), engine)
        state = State.first(bound, engine.task, 0, Memory(bound.memory(engine.task)))
        return [tuple(open_round(bound, state, engine).cohort.ids.tolist()) for _ in range(12)]

    assert len(set(drawn(Identity()))) == 1 and len(set(drawn(Clip(1.0)))) == 1
    assert len(set(drawn(Clip(1.0) >> Noise(1.0)))) > 3


def neighbours(codec, cohort, add, **parts):
    """The distance of two totals before noise: all clients, and the same with one client changed or left out."""
    private = plan(codec, cohort, **parts)
    found = []
    for extreme in (False, True):
        data = clients()
        if extreme:
            rows = data.rows.x.clone()
            first = data.order[data.offsets[0] : data.offsets[1]]
            rows[first] = 1e3 * (-1) ** torch.arange(rows[first].numel()).reshape(rows[first].shape)
            data = replace(data, rows=replace(data.rows, x=rows))
        engine = InProcessEngine(problem(), data)
        from atoll.engine.client_state import Memory
        from atoll.plan.round import bind, decode_sums
        from atoll.plan.state import State

        bound = bind(private, engine)
        state = State.first(bound, engine.task, 0, Memory(bound.memory(engine.task)))
        with entropy_source(known_entropy(3)):
            opened = open_round(bound, state, engine)
        gathered = engine.gather(bound, opened.state, opened.cohort, opened.key)
        if add and extreme:  # the first client is left out
            opened = opened._replace(cohort=opened.cohort._replace(ids=opened.cohort.ids[1:]))
            gathered = engine.gather(bound, opened.state, opened.cohort, opened.key)
        found.append(decode_sums(bound, opened.state, gathered).means["update"])
    return float((found[0] - found[1]).norm())


@pytest.mark.parametrize(("codec", "cohort"), by_turns(
    [Clip(1e-3) >> Noise(1.0), Clip(1e-3) >> Rotate() >> Noise(1.0), Clip(1e-3) >> RandomK(0.5) >> Noise(1.0),
     AdaptiveClip(start=1e-3) >> Noise(1.0)],
    [Everyone(), Uniform(7), RoundRobin(7), Poisson(1.0)],
))  # fmt: skip
def test_a_neighbour_moves_the_total_by_at_most_the_gain(codec, cohort):
    gain = math.prod(stage.gain(flat_layout(64)) for stage in codec.stages[1:])
    moved = neighbours(codec, cohort, add=True)
    assert 0.3 < moved <= (1 + 2**-10) * gain
    assert 0 < neighbours(codec, cohort, add=False) <= 2 * (1 + 2**-10) * gain


@pytest.mark.parametrize("correction", [Proximal(0.5), Calibrated(0.5), Ditto(0.5)])
def test_a_correction_that_passes_moves_the_total_by_at_most_the_clip(correction):
    corrected = {"local": replace(LOCAL, correction=correction)}
    for codec in (Clip(1e-3) >> Noise(1.0), AdaptiveClip(start=1e-3) >> Noise(1.0)):
        assert 0.3 < neighbours(codec, Everyone(), True, **corrected) <= 1 + 2**-10


def follow(shape, start, rounds=400):
    """C after some rounds for 100 clients whose norms are exp(shape · Φ⁻¹((i + ½)/100))."""
    probabilities = (torch.arange(100).double() + 0.5) / 100
    norms = torch.exp(shape * torch.special.ndtri(probabilities))
    stage = AdaptiveClip(start=start)
    server = stage.server(flat_layout(1))
    info = round_info(Population(100, torch.ones(100, dtype=torch.int64)))
    for _ in range(rounds):
        _, _, sums, _ = stage.encode(norms[:, None], {}, server, Key(0))
        total = _total(torch.zeros(1).double(), {"unclipped": sums["unclipped"].sum(0, keepdim=True)})
        settled, server = stage.server_update(total, server, info, Key(0))
        assert "unclipped" not in settled.sums
    return float(server["clip"])


@pytest.mark.parametrize(("shape", "values"), [
    (0.5, (0.9948, 0.9954, 1.0055, 1.0052)),
    pytest.param(1.0, (0.9889, 0.9895, 1.0115, 1.0112), marks=pytest.mark.slow),
])  # fmt: skip
def test_the_adaptive_clip_reaches_its_fixed_points(shape, values):
    found = [follow(shape, start) for start in (0.01, 0.1, 5.0, 100.0)]
    assert found == pytest.approx(values, abs=1e-4)


def test_the_sum_is_scaled_by_the_clip_of_its_own_round():
    stage = AdaptiveClip(start=2.0)
    given_sums = {"unclipped": torch.tensor([-3.5]).double()}
    total = _total(torch.ones(2).double(), given_sums)
    total, server = stage.server_update(total, stage.server(flat_layout(2)), round_info(), Key(0))
    assert total.means["update"].tolist() == [2.0, 2.0] and float(server["clip"]) > 2.0


def test_the_count_has_noise_only_before_a_noise_stage():
    alone, chain = AdaptiveClip(), (AdaptiveClip() >> Noise(1.0)).bind(flat_layout(2))
    assert chain.stages[0].binding.noised and not alone.bind(flat_layout(2)).binding.noised
    assert alone.event(200.0) == (20.0, False, False) and chain.event(200.0).update
    assert chain.event(200.0).noise == pytest.approx((1 + 1 / 400) ** -0.5)
    assert not plan(AdaptiveClip()).releases and plan(chain).releases


REFUSED = [
    (lambda: plan(Noise(1.0)), "without a clip", "Clip(1.0) >> Noise(1.0)"),
    (lambda: plan(Identity() >> Noise(2.0)), "without a clip", "Clip(1.0) >> Noise(2.0)"),
    (lambda: plan(Clip(1.0) >> Noise(1.0) >> Quantize(8)), "finite gain", "Clip(1.0) >> Noise(1.0)"),
    (lambda: plan(Clip(1.0) >> Noise(1.0) >> TopK(0.1)), "finite gain", "Clip(1.0) >> Noise(1.0)"),
    (lambda: plan(Clip(1.0) >> Noise(1.0) >> RandomK(0.5)), "the noise last", "RandomK(0.5) >> Noise(1.0)"),
    (lambda: plan(Clip(1.0) >> Noise(1.0) >> Clip(2.0)), "finite gain", "Clip(1.0) >> Noise(1.0)"),
    (lambda: plan(Clip(1.0) >> EF21(TopK(0.1)) >> Noise(1.0)), "a pace without late ones", "Mean"),
    (lambda: plan(AdaptiveClip(count=0.0) >> Noise(1.0)), "noise on each sum", "AdaptiveClip() >> Noise(1.0)"),
    (lambda: plan(Clip(1.0) >> Noise(1.0), rule=Mean()), 'weights="equal"', 'Mean(weights="equal", over="expected")'),
    (lambda: plan(Clip(1.0) >> Noise(1.0), rule=Mean("equal")), 'over="expected"', 'over="expected"'),
    (lambda: plan(Clip(1.0) >> Noise(1.0), rule=Mean("equal", "expected", "float")), 'sum="exact"', "Mean("),
    (lambda: plan(Clip(1.0) >> Noise(1.0), rule=Sum("equal")), "a mean", "Mean("),
    (lambda: plan(Clip(1.0) >> Noise(1.0), rule=Combine(torch.add, "equal")), "linear", "Mean("),
    (lambda: plan(Clip(1.0) >> Noise(1.0), Uniform(3), pace=Sync(over_select=1.5)), "Sync()", "Sync()"),
    (lambda: plan(Clip(1.0) >> Noise(1.0), Uniform(3), pace=Buffered(2)), "Sync()", "Sync()"),
    (lambda: plan(Clip(1.0) >> Noise(1.0), Weighted(3)), "Poisson, Uniform", "Poisson(0.1)"),
    (lambda: plan(Clip(1.0) >> Noise(1.0), local=MODELS), 'sends="update"', "Train("),
    (lambda: plan(Clip(1.0), rule=Mean(), local=MODELS), 'sends="update"', "Train("),
    (lambda: plan(Clip(1.0) >> Noise(1.0), optimizer=sgd(plateau(0.1))), "a schedule", "sgd(1.0)"),
    (lambda: plan(Clip(1.0) >> Noise(1.0), local=Train(sgd(plateau(0.1)), epochs=1, batch=4)), "a schedule", "Train("),
    (lambda: plan(Clip(1.0), rule=Combine(torch.add)), "linear", "Mean()"),
    (lambda: plan(AdaptiveClip(), rule=Mean(), cohort=Uniform(3), pace=Buffered(2)), "Sync()", "Sync()"),
    (lambda: plan(AdaptiveClip() >> ErrorFeedback(TopK(0.1)), rule=Mean()), "a fixed clip", "Clip(0.1) >> Error"),
    (lambda: plan(AdaptiveClip() >> AdaptiveClip(start=1.0), rule=Mean()), "one AdaptiveClip", "AdaptiveClip("),
    (lambda: ErrorFeedback(Clip(1.0) >> TopK(0.1)), "less than its input", "ErrorFeedback(Identity() >> TopK(0.1))"),
    (lambda: EF21(Clip(1.0) >> Noise(1.0)), "less than its input", "EF21("),
    (lambda: plan(Identity(), downlink=Clip(1.0)), "less than its input", "Identity()"),
    (lambda: plan(Identity(), downlink=Clip(1.0) >> Noise(1.0)), "a codec without noise", "Identity()"),
    (lambda: plan(AdaptiveClip() >> Noise(1.0, by="client")), "a fixed clip", "Clip(0.1) >> Noise(1.0, by='client')"),
    (lambda: plan(Clip(1.0) >> TopK(0.1) >> Noise(1.0, by="client")), "clip and the noise first", "Clip(1.0) >> Noise"),
    (lambda: plan(Noise(1.0, by="client")), "without a clip", "Clip(1.0) >> Noise(1.0, by='client')"),
    (lambda: plan(Clip(1.0) >> Noise(1.0, by="client") >> Noise(1.0)), "finite gain", "Clip(1.0) >> Noise(1.0)"),
    (lambda: plan(Clip(1.0) >> Noise(1.0, by="client"), rule=replace(FAIR, secure=True)), "server", "Noise(1.0)"),
    (lambda: plan(Clip(1.0) >> Noise(1.0, by="client"), rule=Mean()), 'weights="equal"', 'Mean(weights="equal"'),
    (lambda: Noise(1.0, by="cohort"), "'server' or 'client'", "Noise(1.0)"),
    (lambda: Clip(0), "1e-30", "Clip(1.0)"), (lambda: Noise(0), "1e-06", "Noise(1.0)"),
    (lambda: AdaptiveClip(1.0), "it < 1", "AdaptiveClip("),
]  # fmt: skip


@pytest.mark.parametrize(("build", "required", "line"), REFUSED)
def test_a_combination_without_a_proof_is_refused_with_a_line(build, required, line):
    with pytest.raises(UsageError) as caught:
        build()
    assert required in str(caught.value) and line in caught.value.line


def test_a_model_with_buffers_is_refused_with_noise_and_allowed_with_a_clip():
    engine = InProcessEngine(problem(norm=True), clients())
    with pytest.raises(UsageError, match="GroupNorm"):
        run(plan(Clip(1.0) >> Noise(1.0)), engine, 1)
    run(plan(Clip(1.0), rule=Mean(), cohort=Everyone()), engine, 1)


def test_a_clip_that_never_acts_changes_only_rounding():
    engine = InProcessEngine(problem(dtype=torch.float64), clients())
    plain, clipped = (run(plan(codec, Everyone()), engine, 3)[0].model.theta for codec in (Identity(), Clip(1e4)))
    assert float((plain - clipped).abs().max()) < 1e-9


def test_the_recipe_is_one_constructor_call():
    it = recipes.dp_fedavg(0.5, clip=0.5, noise=2.0, q=0.1)
    assert it.releases and it.codec == Clip(0.5) >> Noise(2.0) and it.sampler == Poisson(0.1)
    assert read_part("dp_fedavg(0.5, clip=0.5, noise=2.0)", {"dp_fedavg": recipes.dp_fedavg}).releases
