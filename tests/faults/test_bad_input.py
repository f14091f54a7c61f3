"""Bad input is refused with one error that has four parts, and its line to write works."""

import multiprocessing
import sys
import warnings
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import atoll
from atoll import recipes
from atoll.base.errors import RunError, UsageError
from atoll.base.grammar import DEEPEST, LONGEST, Value, parse
from atoll.data import partition
from atoll.plan import local, optimizer, schedule
from atoll.plan.aggregate import Mean, Sum
from atoll.plan.plan import Plan
from atoll.plan.protocols import Cohort, Sampler
from atoll.plan.registry import PARTS
from atoll.training.stop import RULES

PARTITIONS = {c.__name__: c for c in vars(partition).values() if isinstance(c, type) and c is not partition.Partition}
CALLABLE = {**PARTS, **RULES}  # all names that a text of a plan or of a stop rule may call
KNOWN = {**{r.__name__: r for r in recipes.RECIPES}, **CALLABLE, **PARTITIONS}


DIGITS = atoll.data.load("digits")
DATA = DIGITS.split(10)


def refused(act, *says, kind=UsageError):
    with pytest.raises(kind) as caught:
        act()
    error = caught.value
    for text in says:
        assert text in str(error), str(error)
    assert error.exit_code == (2 if kind is UsageError else 1)
    return error


def train(model="softmax", data=DATA, plan=None, out=None, rounds=2, **words):
    return atoll.train(model, data, plan or recipes.fedavg(0.1), rounds=rounds, out=out, report=False, **words)


# Names


@pytest.mark.parametrize(
    ("act", "near"),
    [
        (lambda: atoll.data.load("digit"), 'atoll.data.load("digits")'),
        (lambda: train("softmaks"), 'model="softmax"'),
        (lambda: train(loss="cros_entropy"), 'loss="cross_entropy"'),
        (lambda: train(metrics=("acuracy",)), 'metrics="accuracy"'),
        (lambda: parse("Plan(Gradint(), Mean())", PARTS), "Plan(Gradient(), Mean())"),
        (lambda: parse("Diriclet(0.3)", PARTITIONS), "Dirichlet(0.3)"),
        (lambda: parse("fedavgg(lr=0.1)", {r.__name__: r for r in recipes.RECIPES}), "fedavg(lr=0.1)"),
        (lambda: atoll.data.arrays(np.eye(3), [0, 1, 2], task="clasification"), 'task="classification"'),
        (lambda: atoll.data.arrays(np.eye(3), [0, 1, 2], scale="standart"), 'scale="standard"'),
    ],
)
def test_unknown_name(act, near):
    assert refused(act, "is called").line == near


def test_a_constructor_without_its_call():
    assert refused(lambda: parse("Plan(Gradient, Mean())", PARTS)).line == "Plan(Gradient(), Mean())"


def test_a_class_in_a_slot():
    for part in (Plan, Mean):
        refused(lambda part=part: Plan(local.Gradient(), part), "slot aggregator")


# Files


def test_missing_file(tmp_path):
    refused(lambda: atoll.data.load(tmp_path / "absent.csv"), "absent.csv")
    refused(lambda: atoll.data.load(tmp_path), "x.npy")
    refused(lambda: atoll.data.load("mnist", folder=tmp_path), "mnist.npz")
    refused(lambda: train(init=tmp_path / "absent"), "is no file")


@pytest.mark.parametrize("content", [b"", b"\x00\xff\xfe\x80", b"\x93NUMPY\x01\x00", b"PK\x03\x04"])
def test_malformed_file(tmp_path, content):
    for name in ("x.npy", "y.npy", "mnist.npz"):
        (tmp_path / name).write_bytes(content)
    refused(lambda: atoll.data.load(tmp_path), "malformed")
    refused(lambda: atoll.data.load("mnist", folder=tmp_path), "malformed")


def test_start_from_another_model(tmp_path):
    run = train(out=tmp_path)
    refused(lambda: train("2nn", init=run.path), "does not fit the model")


# Data


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_number_that_is_none(bad):
    x, y = np.ones((6, 2)), np.arange(6.0)
    x[4, 1] = bad
    refused(lambda: atoll.data.arrays(x, y), "row 4, column 1", "finite")
    x[4, 1], y[2] = 0.0, bad
    refused(lambda: atoll.data.arrays(x, y), "row 2", "finite")


def test_number_that_is_none_in_a_file_read_by_rows(tmp_path):
    """Rows that are never all in memory are checked when they are read. The client that holds the row fails."""
    x = np.ones((60, 3), np.float32)
    x[37, 2] = np.nan
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", np.arange(60) % 2)
    data = atoll.data.load(tmp_path).split(3, held_out=0)
    (failure,) = train(data=data, plan=recipes.fedsgd(0.1), rounds=1).failures
    assert 37 in data.client_rows(failure.client) and failure.cause == "The features contain nan at row 37, column 2"


def test_more_clients_than_rows():
    """The suggested split works (the fixture above makes it)."""
    assert refused(lambda: DIGITS.split(1500), "1438 train rows").line
    assert refused(lambda: DIGITS.split(1000), "at least 2 per client").line
    assert refused(lambda: DIGITS.split(20, min_rows=100), "at least 100 per client").line


def test_label_that_training_never_sees():
    x, y = np.random.default_rng(0).normal(size=(30, 2)), np.arange(30) % 2
    refused(lambda: atoll.data.arrays(x, y, test=(x[:3], [0, 1, 2])), "label '2'", "no train row")


@pytest.mark.parametrize("cohort", [11, 10**9, local.Gradient(), "ten", True, 0, -1, 1.5, 0.0, float("nan")], ids=str)
def test_cohort(tmp_path, cohort):
    """A cohort larger than the population, or not a number of clients, is refused before a folder is made.

    The suggested line is a sampler, or the recipe with a sampler.
    """
    error = refused(lambda: train(plan=recipes.fedavg(0.1, cohort=cohort), out=tmp_path))
    assert not list(tmp_path.iterdir())
    line = error.line if error.line.startswith("fedavg") else f"fedavg(0.1, cohort={error.line})"
    assert train(plan=line).rounds == 2


# Numbers


RATES = [
    *optimizer.OPTIMIZERS.values(),
    schedule.constant,
    lambda lr: schedule.cosine(lr, rounds=5),
    lambda lr: schedule.step(lr, every=5),
    schedule.inverse,
    schedule.plateau,
    recipes.fedavg,
    recipes.gd,
    lambda lr: recipes.fedadam(server_lr=lr),
]


@pytest.mark.parametrize("lr", [0, -0.1, float("nan"), float("inf"), "0.1", None, True], ids=str)
@pytest.mark.parametrize("make", RATES, ids=lambda make: make.__name__)
def test_learning_rate(make, lr):
    error = refused(lambda: make(lr))
    assert parse(error.line, KNOWN) is not None


@pytest.mark.parametrize(
    "act",
    [
        lambda: local.Gradient(batch=0),
        lambda: local.Gradient(batch=2.5),
        lambda: local.Train(optimizer.sgd(0.1), epochs=1, batch=-1),
        lambda: local.Train(optimizer.sgd(0.1)),
        lambda: local.Train(optimizer.sgd(0.1), epochs=1, steps=1),
        lambda: local.Train(optimizer.sgd(0.1), epochs=0),
        lambda: local.Train(optimizer.sgd(0.1), epochs=1, keep=("order",)),
        lambda: local.Train(optimizer.sgd(0.1), epochs=1, keep="optimizer"),
        lambda: local.Train(0.1, epochs=1),
        lambda: local.Custom("train"),
        lambda: Mean(weights="rows"),
        lambda: Sum(sum="fast"),
        lambda: replace(recipes.gd(), max_failed=1.5),
        lambda: replace(recipes.gd(), max_failed="half"),
        lambda: replace(recipes.gd(), codec=Mean()),
        lambda: schedule.cosine(0.1, rounds=5) >> schedule.constant(0.1),
        lambda: schedule.warmup(5) >> schedule.warmup(5),
        lambda: optimizer.sgd(schedule.warmup(5)),
        lambda: optimizer.sgd(0.1, nesterov=True),
        lambda: optimizer.adam(0.1, betas=(0.9, 1.0)),
        lambda: partition.Dirichlet(0.0),
        lambda: partition.FeatureShift(),
        lambda: train(rounds=0),
        lambda: train(dtype="float16"),
        lambda: train(numerics="fast"),
        lambda: train(chunk=0),
        lambda: DIGITS.split(10, held_out=1.0),
        lambda: DIGITS.split(10, by="IID"),
        lambda: DIGITS.split(0),
    ],
)
def test_number_out_of_range(act):
    """The number is refused, and the suggested line works (the fixture above tries it)."""
    error = refused(act)
    assert error.required


# Models


class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x.flatten(1)), x


@pytest.mark.parametrize("numerics", ["auto", "loop"])
@pytest.mark.parametrize(
    "module",
    [
        nn.Sequential(nn.Flatten(), nn.Linear(64, 5)),
        nn.Sequential(nn.Flatten(), nn.Linear(63, 10)),
        nn.Linear(8, 10),
        Pair(64, 10),
        nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.Flatten(0)),
    ],
    ids=["five logits for ten classes", "63 features", "a logit too many axes", "a pair", "no rows"],
)
def test_model_of_the_wrong_shape(tmp_path, module, numerics):
    """The model is refused before the first round, and no run is started."""
    error = refused(lambda: train(module, out=tmp_path, numerics=numerics))
    assert error.required and error.why
    assert not list(tmp_path.iterdir())


def test_regression_of_the_wrong_shape():
    data = atoll.data.load("diabetes").split(5)
    refused(lambda: train(nn.Linear(10, 2), data), "shape (4, 2) for targets of shape (4,)")


def test_nothing_to_train():
    refused(lambda: train(nn.Sequential(nn.Flatten(), nn.ReLU())), "no trainable parameter")


def test_loss_of_one_number():
    refused(lambda: train(loss=lambda output, y: nn.functional.cross_entropy(output, y)), "one value a row")


class Broken(nn.Module):
    """Works for a few rows, as in the test before the first round; then gives NaN or raises."""

    def __init__(self, how):
        super().__init__()
        self.linear, self.how = nn.Linear(64, 10), how

    def forward(self, x):
        if len(x) > 8 and self.how == "raises":
            raise ValueError("of mine")
        out = self.linear(x.flatten(1))
        return out * float("nan") if len(x) > 8 and self.how == "nan" else out


@pytest.mark.parametrize("numerics", ["lanes", "loop"])
def test_a_loss_that_is_nan_for_every_client(tmp_path, numerics):
    """All clients fail in the same way, so the error names the learning rate, not a client."""
    error = refused(lambda: train(Broken("nan"), numerics=numerics, out=tmp_path), "Every client", kind=RunError)
    assert error.line == "atoll lr" and "learning rate" in error.why
    (path,) = (p for p in tmp_path.iterdir() if not p.is_symlink())
    assert (path / "events.jsonl").read_text().count('"failed"') == 1


@pytest.mark.parametrize("numerics", ["lanes", "loop"])
def test_a_model_that_always_raises(numerics):
    """The user's exception is the cause of the error."""
    error = refused(lambda: train(Broken("raises"), numerics=numerics), "ValueError: of mine", kind=RunError)
    assert isinstance(error.__cause__, ValueError)


def test_a_step_that_is_too_long():
    error = refused(lambda: train("2nn", plan=recipes.fedavg(1e30)), kind=RunError)
    assert error.line == "atoll lr"


def test_diverged():
    plan = recipes.distributed_gd(1.0)
    data = atoll.data.load("diabetes").split(3)
    error = refused(lambda: train("linear", data, plan, rounds=100), "diverged", "lr", kind=RunError)
    assert error.line == "atoll lr"


def test_too_many_failures():
    """Half of the clients may fail, not more: then the round would differ too much from the drawn cohort."""

    def each(model, loader, ctx):
        if ctx.client % 3:
            raise ValueError(f"client {ctx.client}")

    plan = Plan(local.Custom(each), Mean())
    error = refused(lambda: train(plan=plan), "clients failed in round 0", kind=RunError)
    assert "max_failed" in error.line
    assert len(train(plan=replace(plan, max_failed=1.0)).failures) == 2 * 6


# Texts


HOSTILE = [
    "__import__('os').system('true')",
    "Mean().__class__",
    "Mean.__init__()",
    "(lambda: Mean())()",
    "[Mean() for _ in (1, 2)]",
    "{Mean()}",
    "{'weights': 'equal'}",
    "Mean(**{'weights': 'equal'})",
    "Mean(*('equal',))",
    "Mean() if True else Sum()",
    "Mean() or Sum()",
    "Mean()[0]",
    "f'{Mean()}'",
    "b'bytes'",
    "1j",
    "...",
    "(x := Mean())",
    "await Mean()",
    "eval('Mean()')",
    "print('x')",
    "getattr(Mean(), 'zero')()",
    "Mean()()",
    "os:system('true')",
    "Custom(os:system)",
    "Custom(fn=subprocess:run)",
    "builtins:eval('1')",
    "sgd(0.1) << sgd(0.1)",
    "sgd(0.1) + sgd(0.1)",
    "not Mean()",
    "-Mean()",
    "~1",
    "1 < 2",
    "Mean(); Sum()",
    "Mean()\nSum()",
    "import os",
    "",
    "(",
    "Mean(",
    "\x00",
    "\ud800",
    "_external_0",
    "1 >> -1",
    "'a' >> 1",
    "Mean() >> Mean()",
    "Plan(Plan(Gradient(), Mean()), Mean())",
    "Mean(weights=[])",
    "Mean('equal', weights='equal')",
    "Mean(nothing=1)",
    "Uniform(1e400)",
    "sgd(1e400)",
    "Poisson('a')",
    "Train(sgd(0.1), epochs=1, keep=5)",
    "Target(5)",
    "step(0.1, every=1" + "0" * 400 + ")",
    "-" * 2000 + "1",
    "not " * 900 + "1",
    "(" * 500 + "1" + ")" * 500,
    "[" * 90 + "1" + "]" * 90,
    "Mean(" * 100 + ")" * 100,
    "1" + " >> 1" * 600,
    "x" * (LONGEST + 1),
    "9" * (LONGEST + 1),
]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text[:30]))
def test_hostile_text(text):
    refused(lambda: parse(text, CALLABLE))


def test_depth_is_counted():
    deep = "(" * DEEPEST + "1" + ",)" * DEEPEST
    parse(deep, CALLABLE)
    refused(lambda: parse(f"({deep},)", CALLABLE), "nested deeper")


def test_a_colon_in_a_text_names_no_code():
    """A quoted text with a colon is read back unchanged."""
    rule = parse("Patience('val:loss', rounds=3, better='lower')", CALLABLE)
    assert rule.metric == "val:loss" and parse(repr(rule), CALLABLE) == rule


def plain(value):
    """Whether a value consists of constants and parts only."""
    if isinstance(value, (tuple, list)):
        return all(map(plain, value))
    return value is None or isinstance(value, (bool, int, float, str, *CALLABLE.values(), *EXTRA))


EXTRA = (Value, schedule.Schedule)
WORDS = [*CALLABLE, "os", "__import__", "lr", "weights", "cohort", "keep", "lambda", "for", "in", "if"]
token = st.one_of(
    st.sampled_from(WORDS),
    st.sampled_from(["(", ")", "[", "]", ",", "=", ">>", ".", ":", "*", "**", "'", '"', " ", "\n", "-", "{", "}"]),
    st.integers().map(str),
    st.floats(allow_nan=False).map(repr),
    st.text(max_size=3),
)
values = st.recursive(
    st.one_of(
        st.integers().map(repr),
        st.floats().map(repr),
        st.text(max_size=5).map(repr),
        st.sampled_from(["None", "True", "'equal'", "'exact'", "('optimizer',)", "os:system", "Mean", "1e999"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda items: f"({', '.join(items)},)" if items else "()"),
        st.tuples(inner, inner).map(" >> ".join),
        st.tuples(
            st.sampled_from(sorted(CALLABLE)),
            st.lists(inner, max_size=4),
            st.dictionaries(
                st.sampled_from(["lr", "n", "q", "batch", "epochs", "rounds", "cohort", "weights"]), inner, max_size=3
            ),
        ).map(lambda c: f"{c[0]}({', '.join([*c[1], *(f'{n}={v}' for n, v in c[2].items())])})"),
    ),
    max_leaves=8,
)
texts = st.one_of(st.text(max_size=80), st.lists(token, max_size=20).map("".join), values)


def only_values(text):
    """parse returns a value of the grammar, or raises UsageError."""
    try:
        value = parse(text, CALLABLE)
    except UsageError:
        return
    assert plain(value), value


@pytest.mark.slow
@given(texts)
def test_any_text_is_a_value_or_refused(text):
    only_values(text)


def audited(file):
    """Write the audit events while many texts are parsed, and then those of a parser that does import."""
    armed, seen = [False], []

    def hook(event, args):
        quiet = event in ("compile", "builtins.id")
        quiet = quiet or event.startswith(("object.__getattr__", "sys._getframe", "code.__new__"))
        if armed[0] and not quiet:
            seen.append((event, repr(args)[:200]))

    def watched(text, *, read):
        armed[0] = True
        try:
            read(text)
        finally:
            armed[0] = False

    @settings(max_examples=4 * settings().max_examples, database=None)
    @given(texts)
    def many(text):
        watched(text, read=only_values)

    parse("Mean()", CALLABLE)
    sys.addaudithook(hook)
    for text in HOSTILE:
        watched(text, read=only_values)
    many()
    before = list(seen)
    sys.modules.pop("sched", None)
    watched("sched:scheduler()", read=lambda text: parse(text, CALLABLE, trust=True))
    file.write_text(f"{before}\n{seen}\n")


@pytest.fixture(scope="module")
def watch(tmp_path_factory):
    """What `audited` writes, of a forked process, since an audit hook cannot be removed."""
    file = tmp_path_factory.mktemp("watch") / "events"
    child = multiprocessing.get_context("fork").Process(target=audited, args=(file,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # from Python 3.12 on, of a fork beside threads
        child.start()
    child.join(110)
    assert child.exitcode == 0
    return file.read_text().splitlines()


def test_reading_a_text_runs_nothing(watch):
    """Of all audit events, parsing some hundred texts causes only the compilation of an expression."""
    assert watch[0] == "[]"


def test_the_watch_sees_executed_code(watch):
    assert "'exec'" in watch[1] and "sched" in watch[1]


# Cohorts


@dataclass(frozen=True, repr=False)
class Fixed(Sampler):
    """Selects the same ids in every round."""

    ids: tuple[float, ...]

    def __call__(self, population, round, key):
        return Cohort(torch.tensor(self.ids), torch.ones((), dtype=torch.float64))


@pytest.mark.parametrize("ids", [(0, 10), (-1, 2), (3, 3), (4, 2), (1.0, 2.0), ((0, 1), (2, 3))])
def test_a_cohort_of_wrong_ids_is_refused(ids):
    plan = replace(recipes.fedavg(0.1), cohort=Fixed(ids))
    refused(lambda: train(plan=plan), f"{Fixed(ids)!r} selected", "round 0", "ids that increase, from 0 to 9")
