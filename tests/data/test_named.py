"""Data sets by name have the published shapes, columns and rows; missing or malformed files are refused."""

import gzip
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.model_selection import train_test_split

import atoll
from atoll.base.errors import UsageError
from atoll.data import IID, load
from atoll.data.named import DEBIAN_FASHION, FASHION, NAMED, read_idx


def given(name):
    """Return the folder of data files that we may not distribute; skip the test if it is not set."""
    folder = os.environ.get("ATOLL_DATA")
    if not folder or not Path(folder, name).is_file():
        pytest.skip(f"{name} is not in the folder that ATOLL_DATA names ({folder})")
    return folder


@pytest.mark.parametrize(
    ("name", "rows", "features", "kind", "classes"),
    [
        ("diabetes", 442, (10,), "regression", None),
        ("breast_cancer", 569, (30,), "classification", ("malignant", "benign")),
        ("wine", 178, (13,), "classification", ("class_0", "class_1", "class_2")),
        ("digits", 1797, (1, 8, 8), "classification", tuple("0123456789")),
    ],
)
def test_scikit_learns_sets(name, rows, features, kind, classes):
    data = load(name)
    assert (len(data), data.features, data.kind, data.classes) == (rows, features, kind, classes)
    split = data.split()
    x, y = split.take(split.order)
    assert x.shape[1:] == features and split.features == features
    if name != "digits":
        assert len(data.columns) == features[0]
        assert torch.allclose(x.mean(0), torch.zeros(features, dtype=x.dtype), atol=1e-9)
    assert y.dtype == (torch.float64 if kind == "regression" else torch.int64)


def test_labels_and_targets_are_scikit_learns():
    from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits

    assert load("breast_cancer").rows.targets().tolist() == load_breast_cancer().target.tolist()
    assert load("diabetes").rows.targets().tolist() == load_diabetes().target.tolist()
    digits = load("digits").rows.take(torch.arange(1797))
    assert torch.equal(digits[0].reshape(1797, 64) * 16, torch.from_numpy(load_digits().data).float())


def test_heart_is_that_of_the_published_benchmark():
    folder = given("heart.processed.va.data")
    data = load("heart", folder=folder)
    assert data.names == ("cleveland", "hungarian", "switzerland", "va")
    assert data.by.bincount().tolist() == [303, 261, 46, 130]
    assert data.columns == (
        *("age", "sex", "trestbps", "chol", "fbs", "thalach", "exang", "oldpeak"),
        *("cp=2", "cp=3", "cp=4", "restecg=1", "restecg=2"),
    )
    x, y = load("heart", folder=folder, scale="none").rows.take(torch.arange(740))
    assert x[0].tolist() == [63, 1, 145, 233, 1, 150, 0, 2.3, 0, 0, 0, 0, 1] and y[:3].tolist() == [0, 1, 1]
    # The benchmark's own split of these rows has the published sizes and the published majority class per hospital.
    tests = []
    for hospital in range(4):
        label = y[data.by == hospital].numpy()
        few = np.bincount(label, minlength=2).min() <= 2
        words = {"train_size": 0.66, "test_size": 0.34, "random_state": 43, "stratify": None if few else label}
        tests.append(label[train_test_split(np.arange(len(label)), **words)[1]])
    assert [len(label) for label in tests] == [104, 89, 16, 45]
    majority = [max(label.mean(), 1 - label.mean()) for label in tests]
    assert majority == pytest.approx([0.538, 0.629, 0.938, 0.778], abs=5e-4)
    assert len(load("heart", folder=folder, missing="mean")) == 303 + 294 + 123 + 200


def test_heart_by_hospital():
    data = load("heart", folder=given("heart.processed.va.data"), scale="client").split()
    assert data.count == 4
    for client in range(4):
        x = data.take(data.client_rows(client))[0]
        assert torch.allclose(x.mean(0), torch.zeros(13, dtype=x.dtype), atol=1e-9)
    swiss = data.take(data.client_rows(2))[0]
    assert swiss[:, 3].abs().max() == 0  # cholesterol is unknown, coded 0, in all Swiss rows
    assert load("heart", folder=given("heart.processed.va.data")).split(7, IID()).count == 7


def test_mnist():
    data = load("mnist", folder=given("mnist.npz")).split(100)
    assert len(data.order) == 60_000 and len(data.held_out) == 10_000 and data.features == (1, 28, 28)
    assert data.histogram().sum(0).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    x = data.take(torch.arange(60_000))[0]
    assert x.dtype == torch.float32 and x.mean().item() == pytest.approx(0.1307, abs=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(not DEBIAN_FASHION.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_fashion_mnist():
    data = load("fashion_mnist").split(10)
    assert data.histogram().sum(0).tolist() == [6000] * 10 and data.classes == FASHION
    assert len(data.held_out) == 10_000


def idx(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def fashion(tmp_path):
    """Write four tiny IDX files, two of them gzipped; not all classes occur."""
    rng = np.arange(7 * 6 * 6, dtype=np.uint8).reshape(7, 6, 6)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(rng))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.array([3, 4, 3, 4, 3, 4, 9], np.uint8)))
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(rng[:2])))
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.array([4, 9], np.uint8))))
    return tmp_path


def test_idx_files(fashion, monkeypatch):
    data = load("fashion_mnist", folder=fashion)
    assert data.features == (1, 6, 6) and data.rows.targets().tolist() == [3, 4, 3, 4, 3, 4, 9]
    assert data.rows.take(torch.tensor([0]))[0].flatten()[5] == 5 / 255
    monkeypatch.setenv("ATOLL_DATA", str(fashion))
    assert len(load("fashion_mnist")) == 7


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("train-images-idx3-ubyte", b"\0\0\x08\x03\0\0", "malformed"),
        ("train-images-idx3-ubyte", b"\0\0\x0d\x01\0\0\0\0", "0x0d instead of"),
        ("train-images-idx3-ubyte", idx(np.zeros((7, 6, 6), np.uint8)) + b"\0", "253 bytes follow"),
        ("train-images-idx3-ubyte", struct.pack(">HBB3I", 0, 8, 3, 2**31, 2**31, 4), "0 bytes follow"),
        ("train-labels-idx1-ubyte", idx(np.zeros(6, np.uint8)), "with labels"),
        ("train-labels-idx1-ubyte", idx(np.full(7, 10, np.uint8)), "label 10, outside 0 to 9"),
        ("t10k-images-idx3-ubyte.gz", b"not gzip", "malformed"),
        ("t10k-images-idx3-ubyte.gz", gzip.compress(idx(np.zeros((2, 6, 6), np.uint8)), mtime=0)[:-12], "malformed"),
    ],
)
def test_malformed_idx_files(fashion, name, content, match):
    (fashion / name).write_bytes(content)
    with pytest.raises(UsageError, match=match):
        load("fashion_mnist", folder=fashion)


def test_idx_of_any_shape(tmp_path):
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    (tmp_path / "a").write_bytes(idx(array))
    assert np.array_equal(read_idx(tmp_path / "a"), array)


def test_files_that_are_missing(tmp_path, monkeypatch):
    monkeypatch.delenv("ATOLL_DATA", raising=False)
    for name in ("mnist", "heart"):
        with pytest.raises(UsageError, match=f"{name} needs .* no folder is set"):
            load(name)
        with pytest.raises(UsageError, match="which does not exist"):
            load(name, folder=tmp_path)
    with pytest.raises(UsageError, match="apt-get install dataset-fashion-mnist"):
        load("fashion_mnist", folder=tmp_path)


def test_malformed_mnist(tmp_path):
    path = tmp_path / "mnist.npz"
    x, y = np.zeros((4, 28, 28), np.uint8), np.zeros(4, np.uint8)
    bad = [
        lambda: path.write_bytes(b"PK nonsense"),
        lambda: np.savez(path, x_train=x, y_train=y),
        lambda: np.savez(path, x_train=x, y_train=y[:3], x_test=x, y_test=y),
        lambda: np.savez(path, x_train=x.astype(float), y_train=y, x_test=x, y_test=y),
        lambda: np.savez(path, x_train=np.array([{}]), y_train=y, x_test=x, y_test=y),  # would need pickle
    ]
    for write in bad:
        write()
        with pytest.raises(UsageError, match="malformed"):
            load("mnist", folder=tmp_path)
    np.savez(path, x_train=x, y_train=y, x_test=x, y_test=y)
    assert len(load("mnist", folder=tmp_path)) == 4


@pytest.mark.parametrize("content", ["1,2,3\n", "", "x" + ",1" * 13 + "\n"], ids=["short", "empty", "text"])
def test_malformed_heart(tmp_path, content):
    for hospital in ("cleveland", "hungarian", "switzerland", "va"):
        (tmp_path / f"heart.processed.{hospital}.data").write_text(content)
    with pytest.raises(UsageError, match="malformed"):
        load("heart", folder=tmp_path)


def test_a_folder_of_arrays(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).random((50, 4), dtype=np.float32))
    with pytest.raises(UsageError, match=r"has no y\.npy"):
        load(tmp_path)
    np.save(tmp_path / "y.npy", np.arange(50) % 5)
    data = load(tmp_path, scale="standard").split(5)
    assert isinstance(load(tmp_path).rows.x, np.memmap) and len(data.held_out) == 10
    np.save(tmp_path / "x_test.npy", np.zeros((3, 4), np.float32))
    np.save(tmp_path / "y_test.npy", np.array([4, 0, 1]))
    assert load(tmp_path).split(5).held_out.targets().tolist() == [4, 0, 1]
    np.save(tmp_path / "y_test.npy", np.array([4, 0, 7]))
    with pytest.raises(UsageError, match="label '7', which no train row has"):
        load(tmp_path)
    (tmp_path / "x.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(UsageError, match="malformed"):
        load(tmp_path)
    np.save(tmp_path / "x.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(UsageError, match="malformed"):
        load(tmp_path)


def test_unknown_names_and_arguments():
    with pytest.raises(UsageError, match="No data set is called 'digit'") as error:
        load("digit")
    assert len(eval(error.value.line, {"atoll": atoll})) == 1797
    for words in ({"target": "y"}, {"by": "y"}, {"task": "regression"}, {"missing": "drop"}):
        with pytest.raises(UsageError, match=r"load\(.digits.\) was given") as error:
            load("digits", **words)
        assert len(eval(error.value.line, {"atoll": atoll})) == 1797
    with pytest.raises(UsageError, match="No scale is called"):
        load("digits", scale="minmax")
    with pytest.raises(UsageError, match="arrays have no columns"):
        load(Path(__file__).parent, target="y")
    assert sorted(NAMED) == ["breast_cancer", "diabetes", "digits", "fashion_mnist", "heart", "mnist", "wine"]
