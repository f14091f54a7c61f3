"""Rows of several tensors: a dict of one tensor equals the plain tensor in bits, and each tensor keeps its dtype."""

import numpy as np
import pytest
import torch
from problems import classification
from quick_cases import by_turns, only
from torch import nn
from torch.utils.data import IterableDataset

import atoll
from atoll.base.errors import UsageError
from atoll.base.random import Key, user_scope
from atoll.data.fields import pack_fields, unpack_fields
from atoll.data.schema import Schema
from atoll.plan.aggregate import Mean
from atoll.plan.codec import ErrorFeedback, TopK
from atoll.plan.local import Custom, Train
from atoll.plan.optimizer import sgd
from atoll.plan.plan import Plan
from atoll.tools.graph import WholeModel

SIZES = (9, 5, 9, 3, 12)
PLAIN = classification(SIZES)
X, Y = PLAIN.take(torch.arange(sum(SIZES)))
BY = torch.arange(len(SIZES)).repeat_interleave(torch.tensor(SIZES))
PLAN = Plan(Train(sgd(0.1, momentum=0.5), epochs=1, batch=4), Mean(), cohort=4, codec=ErrorFeedback(TopK(0.5)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.2), nn.Tanh(), nn.Linear(6, 3))

    def forward(self, x):
        return self.body(x)


class Two(nn.Module):
    """Token ids, a mask of the padding, a number, and an image."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(9, 5), nn.Linear(5 + 1 + 4, 3)

    def forward(self, ids, mask, age, image):
        assert ids.dtype == torch.int64 and mask.dtype == torch.bool and image.dtype == age.dtype
        known = (~mask)[..., None].to(age)
        mean = (self.embed(ids) * known).sum(-2) / known.sum(-2).clamp(min=1)
        return self.out(torch.cat([mean, age[..., None], image.flatten(-2)], -1))


def seeded(make, seed=0):
    with user_scope(Key(seed)):
        return make()


def two(rows=38):
    draw = np.random.default_rng(0)
    return {
        "ids": draw.integers(0, 9, (rows, 6)),
        "mask": draw.random((rows, 6)) < 0.3,
        "age": draw.normal(size=rows).astype(np.float32),
        "image": draw.integers(0, 256, (rows, 2, 2)).astype(np.uint8),
    }


def trained(data, make, plan=PLAN, **settings):
    training = atoll.rounds(seeded(make), data, plan, rounds=2, **settings)
    return training, list(training)


def bits(training, reports):
    return training.state.model.theta.numpy().tobytes(), [(dict(r.metrics), r.fingerprint) for r in reports]


def items(x, y):
    return [({n: t[i] for n, t in x.items()} if isinstance(x, dict) else x[i], int(y[i])) for i in range(len(y))]


class Stream(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def parts(x, y):
    some = [(i == BY).nonzero()[:, 0] for i in range(len(SIZES))]
    return [({n: t[i] for n, t in x.items()} if isinstance(x, dict) else x[i], y[i]) for i in some]


DOORS = {
    "arrays": lambda x: atoll.data.arrays(x, Y, by=BY).split(),
    "dataset": lambda x: atoll.data.dataset(items(x, Y), by=BY).split(),
    "stream": lambda x: atoll.data.dataset(Stream(items(x, Y)), by=BY).split(),
    "federate": lambda x: atoll.data.federate(parts(x, Y)),
    "federate datasets": lambda x: atoll.data.federate([items(*part) for part in parts(x, Y)]),
    "test rows": lambda x: atoll.data.arrays(x, Y, by=BY, test=(x, Y)).split(),
}


@pytest.mark.parametrize("door", only(["arrays", "stream", "federate datasets"], DOORS))
def test_a_dict_of_one_tensor_has_the_bits_of_the_tensor(door):
    plain, named = DOORS[door](X), DOORS[door]({"x": X})
    assert torch.equal(named.take(named.order)[0]["x"], plain.take(plain.order)[0])
    assert bits(*trained(named, Net, numerics="loop")) == bits(*trained(plain, Net, numerics="loop"))


@pytest.mark.parametrize(("numerics", "dtype"), by_turns(["lanes", "loop"], ["float32", "float64"]))
def test_every_backend_has_the_bits_of_the_tensor(numerics, dtype):
    x = X.to(getattr(torch, dtype))
    plain, named = (DOORS["arrays"](each) for each in (x, {"x": x}))
    words = {"numerics": numerics, "dtype": dtype, "evaluate_every": 1}
    assert bits(*trained(named, Net, **words)) == bits(*trained(plain, Net, **words))


def test_intensities_and_tokens_have_the_bits_of_the_tensor():
    image = torch.arange(38 * 4, dtype=torch.uint8).reshape(38, 2, 2)
    make = lambda: nn.Sequential(nn.Flatten(), nn.Linear(4, 3))  # noqa: E731
    for x, net in ((image, make), (image.flatten(1).long() % 9, lambda: nn.Sequential(nn.Embedding(9, 2), make2()))):
        plain, named = (DOORS["arrays"](each) for each in (x, {"input": x}))
        assert bits(*trained(named, net, numerics="loop")) == bits(*trained(plain, net, numerics="loop"))


def make2():
    return nn.Sequential(nn.Flatten(), nn.Linear(8, 3))


@pytest.mark.parametrize("door", only(["dataset", "federate"], ["arrays", "dataset", "stream", "federate"]))
def test_each_tensor_keeps_its_dtype_and_backends_agree(door):
    x = {n: torch.from_numpy(t) for n, t in two().items()}
    data = DOORS[door](x)
    rows, _ = data.take(data.order[:, None])
    assert {n: (t.dtype, tuple(t.shape[2:])) for n, t in rows.items()} == {
        "ids": (torch.int64, (6,)),
        "mask": (torch.bool, (6,)),
        "age": (torch.float32, ()),
        "image": (torch.float32, (2, 2)),
    }
    order = torch.cat([data.client_rows(i) for i in range(data.count)])
    assert torch.equal(data.take(order)[0]["ids"], x["ids"][order])
    (lanes, _), (loop, _) = (trained(data, Two, numerics=n) for n in ("lanes", "loop"))
    assert torch.allclose(lanes.state.model.theta, loop.state.model.theta, atol=1e-6)


def test_training_equals_torch_by_hand():
    """One full-batch step of one client, from the user's own tensors."""
    x = {n: torch.from_numpy(t) for n, t in two().items()}
    data = atoll.data.arrays(x, Y).split(1, held_out=0)
    training, _ = trained(data, Two, Plan(Train(sgd(0.1), steps=2), Mean()), numerics="loop")
    net = seeded(Two)
    for _ in range(4):
        loss = nn.functional.cross_entropy(net(x["ids"], x["mask"], x["age"], x["image"].float() / 255), Y)
        net.zero_grad()
        loss.backward()
        with torch.no_grad():
            for p in net.parameters():
                p -= 0.1 * p.grad
    theta = torch.cat([p.detach().reshape(-1) for p in net.parameters()])
    assert torch.allclose(training.state.model.theta, theta, atol=1e-6)


def test_a_loop_of_the_user_receives_the_dict():
    seen = []

    def train(model, loader, ctx):
        for x, y in loader:
            nn.functional.cross_entropy(model(**x), y).backward()
            seen.append({n: (t.dtype, len(t)) for n, t in x.items()})
        one, _ = loader.dataset[0]
        assert one["ids"].shape == (6,) and one["age"].shape == ()

    data = atoll.data.arrays(two(), Y, by=BY).split(held_out=0)
    trained(data, Two, Plan(Custom(train, batch=4), Mean()))
    assert seen[0]["mask"] == (torch.bool, 4) and seen[0]["age"][0] == torch.float32


@pytest.mark.parametrize("numerics", ["fused", "compiled"])
def test_known_layers_take_one_tensor(numerics):
    data = DOORS["arrays"]({"input": X})
    make = lambda: nn.Sequential(nn.Linear(4, 3))  # noqa: E731
    with pytest.raises(UsageError, match="a row has several tensors, and known layers take one"):
        trained(data, make, numerics=numerics)
    assert trained(data, make)[0].task.numerics in ("lanes", "loop")


def test_names_and_values_change_the_fingerprint():
    first = {"a": X, "b": X + 1}
    swapped = {"a": X + 1, "b": X}
    each = [atoll.data.arrays(x, Y).split(2).fingerprint() for x in (first, dict(reversed(first.items())), swapped)]
    assert each[0] == each[1] != each[2]
    assert each[0] != atoll.data.arrays({"a": X, "c": X + 1}, Y).split(2).fingerprint()


@pytest.mark.parametrize("axes", [1, 2])
def test_packing_keeps_all_bits(axes):
    draw = torch.Generator().manual_seed(0)
    lead = (3, 5)[:axes]
    x = {
        "wide": torch.randint(-(2**62), 2**62, (*lead, 3), generator=draw),
        "byte": torch.randint(0, 256, (*lead, 5), generator=draw).byte(),
        "flag": torch.rand(*lead, generator=draw) < 0.5,
        "short": torch.rand(*lead, 2, generator=draw),
        "long": torch.rand(*lead, 1, 2, generator=draw, dtype=torch.float64),
        "none": torch.zeros(*lead, 0),
    }
    words, fields = pack_fields(x, axes)
    back = unpack_fields(words[1:], fields)  # the words of 64-bit numbers begin at odd places
    assert sum(f.words for f in fields) == words.shape[-1] == 6 + 2 + 1 + 2 + 4
    for name, t in x.items():
        assert torch.equal(back[name], t[1:].float() / 255 if name == "byte" else t[1:])


class Rows:
    def __init__(self, *rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


ONE = ({"a": torch.zeros(2), "b": torch.zeros(3, dtype=torch.int64)}, 0)


def read(*rows):
    data = atoll.data.dataset(Rows(*rows)).split(1, held_out=0)
    data.take(data.order)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: read(ONE, ({"a": torch.zeros(2)}, 1)), "Row 1 of the dataset has no b, row 0 has b int64"),
        (lambda: read(ONE, ({**ONE[0], "c": torch.zeros(1)}, 1)), "has c float32 .1., row 0 has no c"),
        (lambda: read(ONE, (torch.zeros(2), 1)), "Row 1 of the dataset has one tensor, row 0 has a"),
        (lambda: read((torch.zeros(2), 0), ({"a": torch.zeros(2)}, 1)), "row 0 has one tensor"),
        (lambda: read(ONE, ({**ONE[0], "a": torch.zeros(4)}, 1)), r"has a float32 \[4\], row 0 has a .*\n.*\n?.*pad"),
        (lambda: read(ONE, ({**ONE[0], "a": torch.zeros(2).double()}, 1)), "has a float64"),
        (lambda: read(({"a": {"b": torch.zeros(2)}}, 0)), "a dict that contains a dict, at 'a'"),
        (lambda: read(({3: torch.zeros(2)}, 0)), "a dict with the key 3"),
        (lambda: read(({"a b": torch.zeros(2)}, 0)), "a dict with the key 'a b'"),
        (lambda: read(({}, 0)), "an empty dict"),
        (lambda: read(({"a": torch.tensor([0.0, torch.nan])}, 0)), "The values of 'a' contain nan at row 0, column 1"),
        (lambda: read(({"a": "text"}, 0)), "Row 0 of the dataset"),
        (lambda: read(((torch.zeros(2), torch.zeros(2)), 0)), r"x of row 0 of the dataset is a tuple of 2 arrays"),
        (lambda: read(([torch.zeros(2), torch.zeros(3)], 0)), r"a list of 2 arrays with the shapes \(2,\), \(3,\)"),
        (lambda: atoll.data.arrays((X, X), Y), "x is a tuple of 2 arrays"),
        (lambda: atoll.data.federate([((X, X), Y)]), "x of client 0 is a tuple"),
        (lambda: atoll.data.arrays({"a": X, "b": X[1:]}, Y), r"x\['b'\] has 37 rows, x\['a'\] has 38"),
        (lambda: atoll.data.arrays({"a": X, "b": [[1], [1, 2]] * 19}, Y), r"x\['b'\] is not an array.*\n.*\n?.*pad"),
        (lambda: atoll.data.arrays({"a": {"b": X}}, Y), "contains a dict, at 'a'"),
        (lambda: atoll.data.arrays({"a": X * torch.nan}, Y), r"x\['a'\] contains nan at row 0, column 0"),
        (lambda: atoll.data.arrays({"a": X}, Y, missing="mean"), "missing='mean'"),
        (lambda: atoll.data.arrays({"a": X}, Y, scale="standard"), "rows of several tensors have no mean"),
        (lambda: atoll.data.arrays({"a": X}, Y, test=(X, Y)), "A test row has one tensor, row 0 has a"),
        (lambda: atoll.data.federate([({"a": X}, Y), (X, Y)]), "A row of client 1 has one tensor"),
        (lambda: atoll.data.federate([({"a": X}, Y), items(X, Y)]), "A row of client 1 has one tensor"),
        (lambda: atoll.data.arrays({"a": X}, Y).split(3, "FeatureShift(noise=0.1)"), "rows of several tensors cannot"),
        (lambda: trained(DOORS["arrays"]({"x": X, "z": X}), Net), r"A row has the tensors x, z, and forward\(x\)"),
        (lambda: trained(DOORS["arrays"]({"ids": X}), Two), "missing a required argument: 'mask'"),
        (lambda: atoll.rounds("mlp", DOORS["arrays"]({"x": X}), PLAN), "The model 'mlp', and rows of several tensors"),
    ],
)
def test_rows_that_fit_no_model_are_refused(make, words):
    with pytest.raises(UsageError, match=words):
        make()


class Shrinking(Rows):
    """Rows of which the last ones are gone after the split."""

    def __getitem__(self, i):
        return self.rows[: self.left][i]


def test_a_dataset_that_shrinks_fails_its_clients_with_the_row():
    rows = Shrinking(*items({"x": X}, Y))
    rows.left = 38
    data = atoll.data.dataset(rows, by=BY).split(held_out=0)
    training = atoll.rounds(seeded(Net), data, Plan(PLAN.local, Mean()), rounds=2)
    assert not training.next().failures
    rows.left = 30
    (failure,) = training.next().failures
    assert failure.client == 4 and failure.cause.startswith("Row 3") and "raised IndexError" in failure.cause


def test_a_predictor_names_the_tensors(tmp_path):
    run = atoll.train(seeded(Two), atoll.data.arrays(two(), Y).split(4), PLAN, rounds=1, out=tmp_path, report=False)
    with pytest.raises(UsageError, match="several tensors: age float32"):
        run.predictor.predict(two()["ids"])
    with pytest.raises(UsageError, match="several tensors: age float32") as caught:
        run.predictor.predict(two())
    assert caught.value.line == "run.model(**tensors)"
    with pytest.raises(UsageError, match="several tensors: age float32"):
        WholeModel(run.predictor)
    with pytest.raises(UsageError, match="several tensors: age float32"):
        Schema.of_input(run.input)
    assert run.model(**{n: t for n, t in run_inputs().items()}).shape == (38, 3)


def run_inputs():
    x = {n: torch.from_numpy(t) for n, t in two().items()}
    return {**x, "image": x["image"].float() / 255}


def test_a_model_of_another_width_is_refused_with_the_tensors():
    with pytest.raises(UsageError, match="in_features=10, and its input has shape") as caught:
        trained(DOORS["arrays"]({**two(), "image": np.zeros((38, 3, 3), np.uint8)}), Two)
    assert "mask bool [6]" in str(caught.value)
