"""The rules by which the server joins buffers, and buffers that survive a file, a resume and a load."""

import pytest
import torch
from problems import classification, seeded
from torch import nn
from torch.nn.utils import parametrizations

import atoll
from atoll import recipes
from atoll.compute.layout import CHANGED, Layout
from atoll.plan.buffers import flags_of, join_buffers

SIZES = (9, 5, 7)


class Tracks(nn.Module):
    """Each kind of buffer: a direction, a peak, a clock, a constant and a mean; the mean is not persistent."""

    def __init__(self):
        super().__init__()
        self.out = nn.Linear(4, 3)
        self.register_buffer("direction", torch.tensor([1.0, 0, 0, 0]))
        self.register_buffer("peak", torch.zeros(4))
        self.register_buffer("clock", torch.zeros(()))
        self.register_buffer("constant", torch.tensor([0.1, 1 / 3, 0.7, 0.3]))
        self.register_buffer("mean", torch.zeros(4), persistent=False)

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.direction.copy_(nn.functional.normalize(self.direction + x.mean(0), dim=0))
                self.peak.copy_(torch.maximum(self.peak, x.amax(0)))
                self.clock += 1
                self.mean.mul_(0.5).add_(x.mean(0))
        return self.out(x - self.mean + self.constant + 0 * self.direction)


def rounds(module, **settings):
    data = classification(SIZES)
    return atoll.rounds(module, data, recipes.fedavg(0.1), metrics=(), **settings), data


@pytest.mark.parametrize("numerics", ["loop", "lanes"])
def test_each_rule_gives_its_value_and_constants_keep_their_bits(numerics):
    rules = {"peak": "largest", "clock": "keep"}
    training, data = rounds(seeded(Tracks), rounds=3, numerics=numerics, buffers=rules)
    list(training)
    model, before = training.model, Tracks()
    assert torch.equal(model.constant, before.constant)
    assert float(model.clock) == 0
    assert torch.equal(model.peak, data.rows.take(data.order)[0].amax(0).clamp(min=0))
    assert abs(float(model.direction.norm()) - 1) < 1e-6 and model.direction[1:].abs().sum() > 0
    assert training.task.layout.constants == ("constant",)
    assert {e.name: e.rule for e in training.task.layout.entries if e.name == "direction"} == {"direction": "unit"}


@pytest.mark.parametrize("numerics", ["loop", "lanes"])
def test_a_late_change_of_a_constant_is_an_error_that_names_the_rule(numerics):
    class Late(Tracks):
        def forward(self, x):
            if self.training and len(x) == 9:
                self.constant += 1
            return super().forward(x)

    training, _ = rounds(seeded(Late), rounds=1, numerics=numerics)
    with pytest.raises((atoll.RunError, atoll.UsageError), match=r'buffers=\{"constant": "mean"\}') as error:
        training.next()
    training, _ = rounds(seeded(Late), rounds=1, numerics=numerics, buffers={"constant": "mean"})
    training.next()
    assert "constant" in str(error.value)


def test_without_a_change_the_bits_of_the_server_stay():
    layout = Layout.of(nn.BatchNorm1d(3))
    before = torch.tensor([0.1, 1 / 3, 0.7, 1.0, 1.0, 1.0])
    after = before.repeat(2, 1)
    after[1, 5] = 2.0
    flags = flags_of(layout, before, after)
    assert flags.tolist() == [[0, 0], [0, 1]]
    mean = (after.double() * torch.tensor([[0.3], [0.7]], dtype=torch.float64)).sum(0) + 1e-9
    theta = torch.zeros(layout.d)
    joined, others = join_buffers(layout, before, theta, {"buffers": mean}, {CHANGED: flags.amax(0)})
    assert torch.equal(joined[:3], before[:3]) and abs(float(joined[5]) - 1.7) < 1e-6 and not others


def test_stacked_spectral_norms_stay_near_one():
    def make():
        layers = [parametrizations.spectral_norm(nn.Linear(8, 8)) for _ in range(3)]
        return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2], nn.Linear(8, 3))

    parts = []
    for i in range(6):
        x = torch.randn(20, 8, generator=torch.Generator().manual_seed(i))
        parts.append((x * (torch.arange(8) == i).add(0.1) * 3, torch.arange(20) % 3))
    data = atoll.data.federate(parts, held_out=0.2)
    training = atoll.rounds(seeded(make), data, recipes.fedavg(1.0, epochs=5, batch=5), rounds=3, metrics=())
    list(training)
    model = training.model.eval().requires_grad_(False)
    for layer in (0, 2, 4):
        assert abs(float(torch.linalg.matrix_norm(model[layer].weight, 2)) - 1) < 0.12


@pytest.mark.parametrize(
    ("rules", "text"),
    [
        ({"nothing": "mean"}, "no buffer of the model fits"),
        ({"peak": "median"}, "No rule of a buffer is called"),
        ({"count": "mean"}, "torch.int64"),
        (["peak"], "a rule for each name pattern"),
        ({"peak": 3}, "a rule for each name pattern"),
    ],
)
def test_wrong_rules_are_refused(rules, text):
    module = Tracks()
    module.register_buffer("count", torch.zeros((), dtype=torch.int64))
    with pytest.raises(atoll.UsageError, match=text):
        rounds(module, rounds=1, buffers=rules)


def test_buffers_survive_resume_and_load(tmp_path):
    module, data, plan = seeded(Tracks), classification(SIZES), recipes.fedavg(0.1)
    whole = atoll.train(module, data, plan, rounds=4, metrics=(), out=tmp_path, report=False)
    half = atoll.train(module, data, plan, rounds=2, metrics=(), out=tmp_path, report=False)
    again = atoll.train(module, data, plan, rounds=4, metrics=(), out=tmp_path, report=False, resume=half.path)
    loaded = atoll.load(again.path, Tracks())
    for name, tensor in whole.model.named_buffers():
        assert torch.equal(tensor, again.model.get_buffer(name)), name
        assert torch.equal(tensor, loaded.get_buffer(name)), name
    x, _ = data.take(data.client_rows(0))
    assert "mean" not in whole.model.state_dict() and float(whole.model.mean.abs().sum()) > 0
    for mode in (True, False):
        assert torch.equal(whole.model.train(mode)(x), loaded.train(mode)(x))


def test_a_model_in_evaluation_mode_trains_with_a_note():
    module = seeded(lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))).eval()
    with pytest.warns(atoll.Note, match="evaluation mode"):
        training, _ = rounds(module, rounds=1)
    training.next()
    assert any("evaluation mode" in note for note in training.notes)
    assert int(training.model[1].num_batches_tracked) > 0 and not training.model.training and not module.training
