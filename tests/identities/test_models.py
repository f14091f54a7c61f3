"""Models by name: they have their published size, fit the data, are drawn from the key, and are refused if unfit."""

import random
import sys
from types import SimpleNamespace

import doors
import numpy as np
import pytest
import torch
from quick_cases import one_in
from torch import nn
from torch.func import functional_call, grad, vmap

from atoll.base.errors import UsageError
from atoll.base.random import Key
from atoll.models import build, factory, names, resolve

KEY = Key(7).fold("model")

# name, features, outputs, parameters: as published, or by the formulas `conv`, `fc` and `d`
SIZES = [
    ("linear", (13,), 1, 14),
    ("logistic", (30,), 2, 31),
    ("softmax", (28, 28), 10, 7_850),
    ("mlp", (28, 28), 10, 159_010),
    ("2nn", (1, 28, 28), 10, 199_210),
    ("cnn", (28, 28), 10, 80_202),
    ("cnn", (1, 28, 28), 10, 80_202),
    ("cnn", (8, 8), 10, 22_602),
    ("mcmahan-cnn", (28, 28), 10, 1_663_370),
    ("niid-cnn", (28, 28), 10, 44_426),
    ("niid-cnn", (3, 32, 32), 10, 62_006),
    ("pfl-cnn", (3, 32, 32), 10, 1_626_442),
]

# rows: features, outputs, kind, vocab
ROWS = [
    ((13,), 1, "regression", None),
    ((10,), 3, "regression", None),
    ((30,), 2, "classification", None),
    ((64,), 10, "classification", None),
    ((8, 8), 10, "classification", None),
    ((1, 28, 28), 10, "classification", None),
    ((3, 32, 32), 2, "regression", None),
    ((3, 7, 9), 4, "classification", None),
    ((32, 32, 3), 10, "classification", None),  # channels last: too narrow an image
    ((2, 3, 3, 3), 2, "classification", None),
    ((12, 5), 2, "classification", None),
    ((12,), 5, "classification", 20),
    ((12,), 1, "regression", 20),
    ((12,), 20, "tokens", 20),
]


def model_of(name, features, outputs, kind, vocab=None, **more):
    return build(name, features, outputs, kind, KEY, vocab=vocab, **more)


def rows_of(features, vocab, *leading):
    generator = torch.Generator().manual_seed(1)
    if vocab is None:
        return torch.randn(*leading, *features, generator=generator)
    return torch.randint(0, vocab, (*leading, *features), generator=generator)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(("name", "features", "outputs", "parameters"), SIZES)
def test_number_of_parameters(name, features, outputs, parameters):
    model = model_of(name, features, outputs, "regression" if name == "linear" else "classification")
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("rows", ROWS, ids=str)
@pytest.mark.parametrize("name", names())
def test_fits_the_rows_or_names_a_model_that_does(name, rows):
    features, outputs, kind, vocab = rows
    try:
        model = model_of(name, *rows)
    except UsageError as error:
        assert error.required and error.why
        name = error.write.value
        model = model_of(name, *rows)
    shape = (3, *([] if kind != "tokens" else features), 1 if name in ("logistic", "cox") else outputs)
    assert model(rows_of(features, vocab, 3)).shape == shape


@pytest.mark.parametrize("rows", ROWS, ids=str)
def test_every_kind_of_rows_has_models(rows):
    fitting = []
    for name in names():
        try:
            fitting.append(model_of(name, *rows) and name)
        except UsageError:
            continue
    assert len(fitting) >= 2


@pytest.mark.parametrize(
    ("name", "rows", "instead"),
    [
        ("cnn", ((30,), 2, "classification", None), "mlp"),
        ("lstm", ((1, 8, 8), 10, "classification", None), "cnn"),
        ("transformer", ((30,), 2, "classification", None), "mlp"),
        ("logistic", ((64,), 10, "classification", None), "softmax"),
        ("linear", ((64,), 10, "classification", None), "softmax"),
        ("softmax", ((13,), 1, "regression", None), "linear"),
        ("niid-cnn", ((8, 8), 10, "classification", None), "cnn"),
        ("mlp", ((12,), 20, "tokens", None), "lstm"),
        ("cnnn", ((8, 8), 10, "classification", None), "cnn"),
        ("mlp", ((8, 8), 10, "clasification", None), "classification"),
    ],
)
def test_an_unfitting_model_names_another(name, rows, instead):
    with pytest.raises(UsageError) as caught:
        model_of(name, *rows)
    assert caught.value.line in (f'model="{instead}"', f'kind="{instead}"', instead)
    assert repr(name) in str(caught.value) or repr(rows[2]) in str(caught.value)


# for each name the rows that it fits
FIT = {
    "linear": ((13,), 1, "regression", None),
    "cox": ((13,), 2, "regression", None),
    "logistic": ((30,), 2, "classification", None),
    "lstm": ((12,), 20, "tokens", 20),
    "transformer": ((12,), 20, "tokens", 20),
    "niid-cnn": ((16, 16), 3, "classification", None),
}


def fitting(name):
    return FIT.get(name, ((8, 8), 3, "classification", None))


@pytest.mark.parametrize("name", names())
def test_weights_depend_on_the_key_alone(name):
    torch.manual_seed(1)
    one = model_of(name, *fitting(name))
    torch.rand(3)
    other = model_of(name, *fitting(name))
    assert same(one, other)
    elsewhere = build(name, *fitting(name)[:3], Key(8), vocab=fitting(name)[3])
    convex = name in ("linear", "logistic", "softmax", "cox")
    assert same(one, elsewhere) == convex
    assert all(not p.any() for p in one.parameters()) == convex


@pytest.mark.parametrize("name", names())
def test_both_dtypes_start_from_one_point(name):
    single, double = (model_of(name, *fitting(name), dtype=t) for t in (torch.float32, torch.float64))
    for a, b in zip(single.parameters(), double.parameters(), strict=True):
        assert b.dtype == torch.float64
        assert torch.equal(a.double(), b)


def test_global_generators_are_left_as_they_were():
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()

    def draws():
        torch.rand(1), np.random.rand(), random.random()
        raise RuntimeError("inside")

    model_of("mlp", *fitting("mlp"))
    with pytest.raises(RuntimeError, match="inside"):
        resolve(draws, SimpleNamespace(features=(2,), classes=None, kind="regression"), KEY)
    assert torch.equal(before[0], torch.get_rng_state())
    assert all(np.array_equal(a, b) for a, b in zip(before[1], np.random.get_state(), strict=True))
    assert before[2] == random.getstate()


def test_a_causal_transformer_sees_no_later_place():
    model = model_of("transformer", *FIT["transformer"])
    x = rows_of((12,), 20, 2)
    y = x.clone()
    y[:, 7:] = (y[:, 7:] + 1) % 20
    assert torch.equal(model(x)[:, :7], model(y)[:, :7])
    assert not torch.equal(model(x)[:, 7], model(y)[:, 7])
    assert model(x[:, :5]).shape == (2, 5, 20)


@pytest.mark.parametrize("name", one_in(4, names()))
def test_a_lane_does_not_depend_on_how_many_there_are(name):
    features, outputs, kind, vocab = fitting(name)
    model = model_of(name, features, outputs, kind, vocab).eval()  # no dropout
    theta = {k: p.detach() for k, p in model.named_parameters()}
    noise = torch.Generator().manual_seed(2)
    five = {k: p + 0.01 * torch.randn(5, *p.shape, generator=noise) for k, p in theta.items()}
    x = rows_of(features, vocab, 5, 4)

    def loss(theta, x):
        return functional_call(model, theta, (x,)).square().mean()

    def gradients(lanes):
        return vmap(grad(loss))({k: p[:lanes] for k, p in five.items()}, x[:lanes])

    every = gradients(5)
    for lanes in (2, 3, 4):
        some = gradients(lanes)
        assert all(torch.equal(some[k], every[k][:lanes]) for k in theta)
    alone = grad(loss)({k: p[3] for k, p in five.items()}, x[3])
    for k in theta:
        torch.testing.assert_close(every[k][3], alone[k], rtol=1e-4, atol=1e-6)


TABULAR = SimpleNamespace(features=(4,), classes=("a", "b", "c"), kind="classification")


class Net(nn.Linear):
    def __init__(self, features, outputs=10, hidden=5):
        super().__init__(*features, outputs)
        self.hidden = hidden


def test_resolve_accepts_common_data():
    module = nn.Linear(4, 3)
    assert resolve(module, TABULAR, KEY) is module
    assert same(resolve("mlp", TABULAR, KEY), build("mlp", (4,), 3, "classification", KEY))
    assert resolve("softmax", TABULAR, KEY, torch.float64).linear.weight.dtype == torch.float64
    made = resolve(Net, TABULAR, KEY)
    assert (made.out_features, made.hidden) == (3, 5)
    assert same(made, resolve(Net, TABULAR, KEY))
    assert resolve(lambda: nn.Linear(4, 3), TABULAR, KEY).out_features == 3


def test_resolve_sizes_outputs_from_the_targets_of_a_row():
    for target, outputs in ((torch.zeros(1, 2), 2), (torch.zeros(1), 1)):
        example = (torch.zeros(1, 4), target)
        data = SimpleNamespace(features=(4,), classes=None, kind="regression", example=example)
        assert resolve("linear", data, KEY).linear.out_features == outputs


def test_resolve_hands_on_the_vocabulary():
    data = SimpleNamespace(features=(6,), classes=("no", "yes"), kind="classification", vocab=50)
    assert resolve("lstm", data, KEY).embed.num_embeddings == 50


def test_a_model_from_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "my_own_model.py").write_text(
        "from torch import nn\n\n\ndef make(features, outputs):\n    return nn.Linear(*features, outputs)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert resolve("my_own_model:make", TABULAR, KEY).out_features == 3
    monkeypatch.delitem(sys.modules, "my_own_model")


@pytest.mark.parametrize(
    ("text", "write"),
    [
        ("torch.nn:Linaer", "torch.nn:Linear"),
        ("torch/nn.py:Linear", "torch.nn:Linear"),
        ("torch.nothing:Linear", ""),
        (":Linear", ""),
    ],
)
def test_a_factory_that_is_not_there(text, write):
    with pytest.raises(UsageError) as caught:
        factory(text)
    assert caught.value.line == write
    if write:
        assert factory(write) is nn.Linear


def test_a_package_that_a_module_lacks_is_not_blamed_on_the_text(tmp_path, monkeypatch):
    (tmp_path / "lacking_model.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_there"):
        factory("lacking_model:Net")


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (3, "type int"),
        (lambda: "no module", "type str"),
        (lambda hidden: nn.Linear(4, hidden), "requires hidden"),
        (nn.LazyLinear(3), "no shape yet"),
    ],
)
def test_other_values_than_models_are_refused(model, says):
    with pytest.raises(UsageError, match=says) as caught:
        resolve(model, TABULAR, KEY)
    assert caught.value.exit_code == 2
    doors.check(caught.value.write)
