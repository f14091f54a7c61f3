"""Rows in memory, in mapped files and in Datasets give equal results; rows outside memory are not loaded."""

import os
import subprocess
import sys
import textwrap

import numpy as np
import pandas
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Dataset, IterableDataset, TensorDataset

import atoll
from atoll.base.errors import RunError, UsageError
from atoll.base.lines import form
from atoll.data import (
    IID,
    ArrayRows,
    ConcatRows,
    DatasetRows,
    Dirichlet,
    FeatureShift,
    PickedRows,
    arrays,
    dataset,
    federate,
    frame,
    load,
)
from atoll.data.cells import name_of

X = torch.arange(60.0).reshape(20, 3)
Y = torch.arange(20) % 3


class Counted(Dataset):
    """A map-style Dataset that records the rows that were read."""

    def __init__(self, x=X, y=Y):
        self.x, self.y, self.asked = x, y, []

    def __len__(self):
        return len(self.x)

    def __getitem__(self, row):
        self.asked.append(row)
        return self.x[row], int(self.y[row])


class Stream(IterableDataset):
    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


@pytest.fixture
def mapped(tmp_path):
    np.save(tmp_path / "x.npy", X.numpy())
    np.save(tmp_path / "y.npy", Y.numpy())
    return tmp_path


def kinds(folder):
    """Return the same twenty rows in every kind of storage."""
    x, y = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in "xy")
    return [
        ArrayRows(X, Y),
        ArrayRows(x, y),
        DatasetRows(Counted()),
        ConcatRows((ArrayRows(X[:7], Y[:7]), DatasetRows(Counted(X[7:], Y[7:])))),
        PickedRows(ArrayRows(X.flip(0), Y.flip(0)), torch.arange(20).flip(0)),
        dataset(Stream([(X[i], int(Y[i])) for i in range(20)])).rows,
    ]


@given(index=st.lists(st.integers(0, 19), max_size=12), columns=st.integers(1, 3))
def test_every_kind_of_rows_gives_the_same(tmp_path_factory, index, columns):
    folder = tmp_path_factory.mktemp("rows")
    np.save(folder / "x.npy", X.numpy())
    np.save(folder / "y.npy", Y.numpy())
    where = torch.tensor(index, dtype=torch.int64)
    where = where[: len(where) // columns * columns].reshape(-1, columns)
    for rows in kinds(folder):
        x, y = rows.take(where)
        assert torch.equal(x, X[where]) and torch.equal(y, Y[where])
        assert x.dtype == torch.float32 and y.dtype == torch.int64
        assert len(rows) == 20 and torch.equal(rows.targets(), Y)


def test_storage_types_as_a_model_takes_them():
    rows = torch.tensor([0])
    for stored, taken, value in [
        (torch.tensor([[51]], dtype=torch.uint8), torch.float32, 0.2),
        (torch.tensor([[7]], dtype=torch.int32), torch.int64, 7),
        (torch.tensor([[True]]), torch.float32, 1),
        (torch.tensor([[0.5]], dtype=torch.float16), torch.float32, 0.5),
        (torch.tensor([[0.1]], dtype=torch.float64), torch.float64, 0.1),
    ]:
        x = ArrayRows(stored, torch.zeros(1)).take(rows)[0]
        assert x.dtype == taken and x.item() == pytest.approx(value)
    # A target is a class or a number, never an intensity.
    y = torch.tensor([200], dtype=torch.uint8)
    assert ArrayRows(X, y).take(rows)[1].item() == 200
    assert ArrayRows(X, y, real=True).take(rows)[1].dtype == torch.float64


def test_big_endian_files_are_read(tmp_path):
    np.save(tmp_path / "x.npy", X.numpy().astype(">f4"))
    np.save(tmp_path / "y.npy", Y.numpy().astype(">i2"))
    data = load(tmp_path)
    assert torch.equal(data.rows.take(torch.arange(20))[0], X)


def test_arrays_share_memory():
    x = X.clone().numpy()
    assert arrays(x, Y).rows.x.data_ptr() == x.ctypes.data


def test_a_map_style_dataset_is_read_row_by_row():
    rows = Counted()
    data = dataset(rows).split(4)
    rows.asked.clear()
    data.take(data.client_rows(2)[:3])
    assert rows.asked == data.client_rows(2)[:3].tolist()


def test_labels_come_from_the_targets_of_a_dataset():
    class Listed(Counted):
        targets = Y.tolist()

    rows = Listed()
    assert dataset(rows).classes == ("0", "1", "2")
    assert len(set(rows.asked)) == 20  # up to 32 rows are compared
    rows.target_transform = lambda y: 2 - y  # now the labels must be read row by row
    dataset(rows)
    assert len(rows.asked) > 20


def test_a_tensor_dataset_is_its_arrays():
    data = dataset(TensorDataset(X, Y), test=TensorDataset(X[:2], Y[:2]))
    assert isinstance(data.rows, ArrayRows) and len(data.split(2).held_out) == 2


def test_a_dataset_with_test_rows_and_natural_clients():
    data = dataset(Counted(), by=["n", "s"] * 10, test=Counted(X[:3], Y[:3])).split()
    assert data.names == ("n", "s") and len(data.held_out) == 3
    assert dataset(Counted(), task="regression").rows.take(torch.tensor([1]))[1].dtype == torch.float64


def test_federate_keeps_each_clients_rows():
    parts = {"a": (X[:5], Y[:5]), "b": (X[5:14], Y[5:14]), "c": (X[14:], Y[14:])}
    for data in (
        federate(parts, held_out=0),
        federate({name: Counted(*part) for name, part in parts.items()}, held_out=0),
        federate({**parts, "b": Stream(list(zip(*parts["b"], strict=True)))}, held_out=0),
    ):
        assert data.names == ("a", "b", "c") and data.held_out is None
        for client, (x, y) in enumerate(parts.values()):
            got = data.take(data.client_rows(client))
            assert torch.equal(got[0], x) and torch.equal(got[1], y)


def test_federate_holds_out_the_given_part():
    parts = [(X[:10], ["no", "yes"] * 5), (X[10:], ["yes", "no"] * 5)]
    assert len(federate(parts).held_out) == 4
    data = federate(parts, held_out=(X[:3], ["yes", "no", "yes"]))
    assert data.held_out.take(torch.arange(3))[1].tolist() == [1, 0, 1] and len(data.order) == 20
    assert federate([Counted(), Counted()], held_out=Counted(X[:4], Y[:4])).held().sizes.tolist() == [4]


def test_federate_takes_the_held_out_rows_of_each_client():
    """Each client has its own held-out rows, scaled by its own train rows; no train row changes."""
    parts = {"a": (X[:5], Y[:5]), "b": (X[5:9], Y[5:9]), "c": (X[9:12], Y[9:12])}
    own = {"c": (X[12:14], Y[12:14]), "a": (X[14:17], Y[14:17])}
    plain = federate(parts, held_out=0)
    for data in (
        federate(parts, held_out=own),
        federate(parts, held_out={name: Counted(*part) for name, part in own.items()}),
        federate({name: Counted(*part) for name, part in parts.items()}, held_out=own),
    ):
        assert data.names == ("a", "b", "c") and data.held_owner.tolist() == [0, 0, 0, 2, 2]
        x, y = data.held_out.take(data.held_order)
        assert torch.equal(x, torch.cat((X[14:17], X[12:14]))) and torch.equal(y, torch.cat((Y[14:17], Y[12:14])))
        assert all(map(torch.equal, data.take(data.order), plain.take(plain.order)))
        assert "1 of 3 clients have no held-out rows." in data.notes
    scaled = federate(parts, held_out=own, scale="client")
    mean, sd = X[:5].mean(0), X[:5].std(0)
    assert torch.allclose(scaled.held_out.take(torch.arange(3))[0], (X[14:17] - mean) / sd, atol=1e-6)


def test_federate_takes_classes_and_rules():
    parts = {"a": (X[:6], ["no"] * 6), "b": (X[6:16], ["no", "yes"] * 5)}
    data = federate(parts, held_out="PerClient(0.5)", classes=["yes", "no"])
    assert data.classes == ("yes", "no") and data.held_owner.bincount().tolist() == [3, 5]
    assert set(data.take(data.client_rows("a"))[1].tolist()) == {1}
    with pytest.raises(UsageError, match="contains 'no' at row 0"):
        federate(parts, classes=["yes", "maybe"])
    with pytest.raises(UsageError, match="called 'north'"):
        federate(parts, held_out={"north": parts["a"]})
    with pytest.raises(UsageError, match="at least one client"):
        federate(parts, held_out={})


LIMITED = """
    import resource, sys
    import numpy as np, torch
    from torch.utils.data import Dataset
    from atoll.data import Dirichlet, FeatureShift, dataset, load

    torch.set_num_threads(1)
    warm = load("wine").split(3, Dirichlet(1.0)).imbalance()
    with open("/proc/self/status") as status:
        used = next(int(line.split()[1]) for line in status if line.startswith("VmData")) << 10
    resource.setrlimit(resource.RLIMIT_DATA, (used + int(sys.argv[2]), resource.RLIM_INFINITY))
    {body}
    seen = 0
    for client in range(data.count):
        rows = data.client_rows(client)
        for batch in rows.split(64):
            x, y = data.take(batch)
            assert x.shape[1:] == data.features
            seen += len(batch)
    assert seen == len(data.order) > 6_000, seen
    data.fingerprint()
    try:
        data.rows.take(torch.arange(7_500))
    except (MemoryError, RuntimeError):
        print("the limit holds")
"""
FROM_FILES = 'data = load(sys.argv[1], scale="standard").split(8, Dirichlet(1.0))'
FROM_DATASET = """
    class Files(Dataset):
        x = np.load(sys.argv[1] + "/x.npy", mmap_mode="r")
        def __len__(self): return len(self.x)
        def __getitem__(self, row): return torch.from_numpy(np.array(self.x[row])), row % 10
    data = dataset(Files()).split(8, {by})
"""
BODIES = [
    pytest.param(FROM_FILES, 4096, id="memory map", marks=pytest.mark.slow),
    pytest.param(FROM_DATASET.format(by="Dirichlet(1.0)"), 4096, id="Dataset", marks=pytest.mark.slow),
    pytest.param(FROM_DATASET.format(by="FeatureShift(noise=0.1)"), 8192, id="noise", marks=pytest.mark.slow),
]


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts mapped memory only on Linux")
@pytest.mark.parametrize(("body", "width"), BODIES)
def test_data_four_times_larger_than_memory(tmp_path, body, width):
    """A process scales, splits and reads a set of 128 or 256 MB, and grows by at most a quarter of that size."""
    x = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, (8192, width))  # sparse: uses no disk space
    x[::97, 3] = 1.0
    x.flush()
    np.save(tmp_path / "y.npy", np.arange(8192) % 10)
    program = textwrap.dedent(LIMITED).format(body=textwrap.dedent(body))
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", program, str(tmp_path), str(x.nbytes // 4)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == "the limit holds\n"


def test_a_bad_number_outside_memory_is_found_as_it_is_read(mapped):
    x = np.load(mapped / "x.npy")
    x[4, 2] = np.nan
    np.save(mapped / "x.npy", x)
    data = load(mapped)
    assert data.rows.take(torch.tensor([0, 1]))[0].shape == (2, 3)
    with pytest.raises(RunError, match="nan at row 4, column 2"):
        data.rows.take(torch.tensor([[1, 3], [4, 0]]))
    with pytest.raises(RunError, match="targets contain nan at row 1"):
        DatasetRows([(X[0], 0.0), (X[1], float("nan"))]).take(torch.tensor([0, 1]))
    with pytest.raises(RunError, match="inf at row 9, column 1"):
        DatasetRows([(torch.tensor([0.0, float("inf") if i == 9 else 0.0]), 0) for i in range(12)]).take(
            torch.tensor([8, 9])
        )


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: arrays(torch.tensor([[0.0, 1.0], [float("nan"), 0.0]]), [0, 1]), "x contains nan at row 1, column 0"),
        (lambda: arrays(np.full((2, 1, 2, 2), np.inf), [0, 1]), r"inf at row 0, position \(0, 0, 0\)"),
        (lambda: arrays(torch.zeros(2, 1), [0.0, float("inf")]), "y contains inf at row 1"),
        (lambda: arrays(torch.zeros(2, 1), ["a", None]), "y has no value at row 1"),
        (lambda: arrays(torch.zeros(2, 1), [0.0, float("nan")], task="classification"), "no value at row 1"),
        (lambda: arrays(torch.zeros(3, 1), [0, 1]), "x has 3 rows, y has 2"),
        (lambda: arrays(torch.zeros(3), [0, 1, 1]), r"x has shape \(3,\)"),
        (lambda: arrays(torch.zeros(0, 3), []), r"x has shape \(0, 3\)"),
        (lambda: arrays([["a", "b"]], [0]), "x is an array of <U1"),
        (lambda: arrays([[1.0], [1.0, 2.0]], [0, 1]), "x is not an array"),
        (lambda: arrays(torch.zeros(2, 1), ["a", "b"], task="regression"), "y is an array of <U1"),
        (lambda: arrays(torch.zeros(2, 1), [0, 1], task="clasification"), "No task is called"),
        (lambda: arrays(torch.zeros(2, 1), [0, 1], scale="standart"), "No scale is called"),
        (lambda: arrays(torch.zeros(2, 1), [0, 1], scale="client"), "natural client for every row"),
        (lambda: arrays(torch.zeros(2, 1, dtype=torch.int64), [0, 1], scale="standard"), "token ids"),
        (lambda: arrays(torch.zeros(2, 1), [0, 1], by=["a"]), "by has 1 entries for 2 rows"),
        (lambda: arrays(torch.zeros(2, 1), [0, 1], test=(torch.zeros(1, 2), [0])), r"the test x have shape \(2,\)"),
        (lambda: dataset([]), "has no rows"),
        (lambda: dataset(Stream([])), "has no rows"),
        (lambda: dataset([1, 2, 3]), "Row 0 of the dataset is a int"),
        (lambda: dataset([(object(), 0)]), "Row 0 of the dataset is"),
        (lambda: dataset(7), "The data has type int"),
        (lambda: dataset([(X[0], 0), (X[0, :2], 1)]).rows.take(torch.arange(2)), r"Row 1 .* \(2,\), row 0 .* \(3,\)"),
        (lambda: dataset(Stream([(X[0], 0), (X[0, :2], 1)])), r"Row 1 of the dataset"),
        (lambda: dataset([(X[0], 1), (X[0], 5)], test=[(X[0], 3)]).test.targets(), "Row 0 has label 3, which no train"),
        (lambda: federate([]), "no clients"),
        (lambda: federate({"a": (X, Y), "b": (X[:, :2], Y)}), r"client b have shape \(2,\)"),
        (lambda: federate([(X, Y), (X, Y[:3])]), "x of client 1 has 20 rows, y has 3"),
        (lambda: arrays(X.long(), Y).split(2, FeatureShift(noise=1.0)), "float features"),
        (lambda: arrays(X, Y).split(2, FeatureShift(rotation=90)), "images"),
    ],
)
def test_bad_data_is_refused_by_row_and_column(make, match):
    with pytest.raises(UsageError, match=match) as error:
        make()
    if error.value.line.startswith("data."):
        assert eval(error.value.line, {"data": arrays(X, Y), "IID": IID, "FeatureShift": FeatureShift}).count == 2


def test_the_line_that_drops_bad_rows_works():
    x, y = np.array([[0.0], [np.nan], [2.0]]), np.array([0, 1, 2])
    with pytest.raises(UsageError) as error:
        arrays(x, y)
    names = {"np": np, "x": x, "y": y}
    exec(error.value.line, names)
    assert len(arrays(names["x"], names["y"])) == 2


LABELS = {
    "integers": np.array([5, 10, 0] * 8),
    "negative": np.array([-1, 1, 1] * 8),
    "gaps": np.array([1, 3, 1] * 8, dtype=np.uint8),
    "floats": np.array([2.0, 10.0, 1.5] * 8),
    "booleans": np.array([True, False, False] * 8),
    "texts": np.array(["b", "a", "10"] * 8),
    "boxed integers": np.array([5, 10, 0] * 8, dtype=object),
    "boxed floats": np.array([5.0, 10, np.float32(0)] * 8, dtype=object),
    "boxed texts": np.array(["no", "yes", "no"] * 8, dtype=object),
    "numbers and texts": np.array([1.0, "x", 1] * 8, dtype=object),
    "categories": pandas.Categorical(["low", "high", "mid"] * 8, categories=["low", "mid", "high", "none"]),
    "categories of numbers": pandas.Categorical([2, 1, 2] * 8, categories=[2, 1]),
}
EXPECTED = {
    "integers": ("0", "5", "10"),
    "boxed integers": ("0", "5", "10"),
    "boxed floats": ("0", "5", "10"),
    "floats": ("1.5", "2", "10"),
    "texts": ("10", "a", "b"),
    "numbers and texts": ("1", "x"),
    "categories": ("low", "mid", "high"),
    "categories of numbers": ("2", "1"),
}


@pytest.mark.parametrize("kind", LABELS)
def test_every_door_gives_equal_classes_and_targets(kind):
    y, task = LABELS[kind], "classification"
    x = np.arange(24.0)[:, None]
    whole = arrays(x, y, task=task)
    assert whole.classes == EXPECTED.get(kind, whole.classes)
    assert [whole.classes[i] for i in whole.rows.targets().tolist()] == [name_of(v) for v in np.asarray(y).tolist()]
    table = pandas.DataFrame({"x": x[:, 0], "y": y if isinstance(y, pandas.Categorical) else list(y)})
    doors = [
        arrays(x, list(y), task=task) if not isinstance(y, pandas.Categorical) else whole,
        arrays(x, pandas.Series(y), task=task),
        frame(table, target="y", task=task, scale="none"),
        federate([(x[:10], y[:10]), (x[10:], y[10:])], held_out=0, task=task),
        federate([(x[:10], y[:10])], held_out=(x[10:], y[10:]), task=task),
    ]
    if not isinstance(y, pandas.Categorical) and y.dtype.kind in "biuf":
        doors.append(dataset([(torch.tensor(a), b) for a, b in zip(x, y, strict=True)], task=task))
    for door in doors:
        assert (door.classes, door.kind) == (whole.classes, task)
        targets = door.rows.targets()
        assert torch.equal(targets, whole.rows.targets()[: len(targets)])
        assert torch.equal(door.rows.take(torch.arange(5))[1], targets[:5])


class Fine(Dataset):
    """Six classes, listed in `targets`."""

    def __init__(self):
        self.targets = [row % 6 for row in range(60)]

    def __len__(self):
        return 60

    def __getitem__(self, row):
        return torch.full((2,), float(row)), self.targets[row]


class Coarse(Fine):
    """Two classes, by `__getitem__` only."""

    def __getitem__(self, row):
        x, y = super().__getitem__(row)
        return x, y // 3


class Plain(Coarse):
    """The same labels without the attribute."""

    def __init__(self):
        super().__init__()
        self.labels = self.targets
        del self.targets

    def __getitem__(self, row):
        return torch.full((2,), float(row)), self.labels[row] // 3


def test_wrong_listed_labels_change_nothing():
    """Classes, split, held-out rows and histogram are those of `__getitem__`, and a note names the first difference."""
    source, plain = dataset(Coarse()), dataset(Plain())
    assert source.classes == ("0", "1") and "targets" in source.notes[-1] and not plain.notes[1:]
    one, other = source.split(4, Dirichlet(0.5)), plain.split(4, Dirichlet(0.5))
    assert one.fingerprint() == other.fingerprint() and torch.equal(one.histogram(), other.histogram())
    odd = Fine()
    odd.targets = ["a"] * 60  # labels of another kind cannot be compared
    with pytest.raises(UsageError, match="Row 0"):
        dataset(odd)
    short = Coarse()
    short.targets = Ragged([0, 1])
    assert dataset(short).classes == ("0", "1")


class Ragged(list):
    """A list that answers every index."""

    def __getitem__(self, row):
        return list.__getitem__(self, row % 2) * 3


def test_a_late_label_unlike_the_listed_one_ends_the_run():
    class Late(Fine):
        wrong = ()

        def __getitem__(self, row):
            x, y = super().__getitem__(row)
            return x, 5 - y if row in self.wrong else y

    rows = Late()
    data = dataset(rows).split(3, held_out=0)
    rows.wrong = (17,)
    with pytest.raises(RunError, match="Row 17 of the dataset has the label 0"):
        data.take(data.order)
    rows.wrong = ()
    training = atoll.rounds("softmax", data, atoll.recipes.distributed_gd(0.1), rounds=1, evaluate_every=0)
    rows.wrong = (17,)
    with pytest.raises(RunError, match="Row 17"):
        training.next()


@pytest.mark.parametrize("width", [1, 3])
def test_a_row_without_any_label_is_refused_with_its_number(tmp_path, width):
    """From every door; a label of −100 marks a place without a label."""
    y = np.arange(6 * width).reshape(6, width) % 3
    y[4] = -100
    x = np.ones((6, 2), np.float32)
    rows = y if width > 1 else y[:, 0]
    for make in (
        lambda: arrays(x, rows),
        lambda: arrays(x, rows, test=(x, rows)),
        lambda: federate([(x, rows), (x, rows)]),
        lambda: dataset(TensorDataset(torch.from_numpy(x), torch.from_numpy(rows))),
    ):
        with pytest.raises(UsageError, match="no label at row 4") as error:
            make()
        names = {"np": np, "x": x, "y": rows}
        exec(form(error.value.write, "python"), names)
        assert len(names["y"]) == 5
    pairs = [(torch.from_numpy(a), torch.from_numpy(b)) for a, b in zip(x, y, strict=True)]
    with pytest.raises((UsageError, RunError), match="row 4"):
        dataset(pairs if width > 1 else [(a, int(b)) for a, b in pairs]).rows.take(torch.arange(6))
