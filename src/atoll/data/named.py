"""Loads data sets by their names, from scikit-learn or from a folder. Nothing is ever downloaded.

Tests: tests/data/test_named.py.
"""

from __future__ import annotations

import gzip
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from atoll.base.errors import UsageError, unknown_name
from atoll.base.lines import Load, Split, Write
from atoll.base.random import Key, user_scope
from atoll.base.validation import check_arguments
from atoll.data.arrays import arrays, tensor_of
from atoll.data.cells import Missing, TextCells
from atoll.data.files import is_table
from atoll.data.rows import Array, ArrayRows
from atoll.data.sources import Source
from atoll.data.tabular import TableOptions, csv, name_list, table

DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")
HOSPITALS = ("cleveland", "hungarian", "switzerland", "va")
HEART_COLUMNS = ("age", "sex", "cp", "trestbps", "chol", "fbs", "restecg", "thalach", "exang", "oldpeak")
FASHION = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)


@check_arguments
@user_scope(Key(0).fold("door"))
def load(
    name: str | Path,
    *,
    folder: str | Path | None = None,
    encoding: str | None = None,
    sheet: str | None = None,
    **options: Unpack[TableOptions],
) -> Source:
    """Load a data set by its name, by the path of a table, or by a folder with x.npy and y.npy.

    Args:
        name: diabetes, breast_cancer, wine, digits (with scikit-learn); fashion_mnist, mnist, heart (from a
            folder); a CSV, Parquet or Excel file, a glob of them, or a folder of folders `column=NAME`; or a folder
            with x.npy and y.npy, and optionally x_test.npy and y_test.npy. The arrays are read batch by batch and may
            be larger than memory.
        folder: folder of a named set's files; None: the environment variable ATOLL_DATA, then for fashion_mnist
            the folder of Debian's package dataset-fashion-mnist.
        encoding, sheet: as in `csv`.
        options: for a table those of `csv`; for a folder of arrays task, scale, missing and classes; for a named set
            scale and scale_target, for heart also missing.
    Raises:
        UsageError: an unknown name, or a file that is missing or malformed.
    Example:
        >>> load("digits")
        Source('digits', classification, rows=1797, features=(1, 8, 8))
        >>> load("digit")
        Traceback (most recent call last):
        atoll.base.errors.UsageError: No data set is called 'digit'.
        Required: one of breast_cancer, diabetes, digits, fashion_mnist, heart, mnist, wine, or the path of a
            CSV file.
        Write: atoll.data.load("digits")
    """
    text, path = str(name), Path(name)
    given = {option: value for option, value in options.items() if value is not None}
    if text in NAMED:
        return _named(text, folder, given)
    if is_table(text):
        return csv(path, encoding=encoding, sheet=sheet, **options)
    if path.is_dir():
        for option in given:
            if option not in ("task", "scale", "missing", "classes"):
                raise UsageError(f"{option} was given for the folder {path}.", "a table.", "arrays have no columns.")
        return _npy(path, options)
    error = unknown_name("data set", text, NAMED, Load)
    raise UsageError(error.given, f"{error.required[:-1]}, or the path of a CSV file.", write=error.write)


def _is_share(value: object) -> bool:
    """Whether a value is a positive number or its text: the concentration of `Dirichlet`, and no column."""
    try:
        return 0 < float(value) < math.inf  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False


def _named(text: str, folder: str | Path | None, given: dict[str, Any]) -> Source:
    """Load a data set by its name; it has its own columns and target."""
    for option, value in given.items():
        if option not in ("scale", "scale_target", *(("missing",) if text == "heart" else ())):
            raise UsageError(
                f"load({text!r}) was given {option}={value!r}.",
                f"no {option}.",
                f"{text} has its own.",
                Split(by=f"Dirichlet({value})") if option == "by" and _is_share(value) else Load(text),
            )
    source = NAMED[text](folder, given.get("missing"), given.get("scale"))
    wanted = given.get("scale_target")
    return source if wanted is None else replace(source, scale_target=wanted)


def _sklearn(name: str, scale: str | None) -> Source:
    """Load a table of scikit-learn; its columns keep their own units until the split."""
    from sklearn import datasets

    options = {"scaled": False} if name == "diabetes" else {}
    bunch: Any = getattr(datasets, f"load_{name}")(**options)
    columns = dict(zip(map(str, bunch.feature_names), bunch.data.T, strict=True))
    if name == "diabetes":
        return table(
            name,
            columns | {"progression": bunch.target},
            target="progression",
            task="regression",
            scale=scale,
        )
    columns["class"] = bunch.target.astype(np.float64)
    source = table(name, columns, target="class", task="classification", scale=scale)
    return replace(source, classes=tuple(map(str, bunch.target_names)))


@cache
def _small_numbers(path: Path) -> Array:
    """The numbers 0 to 255 of a packed CSV file. They are kept, because reading them takes longer than a short run."""
    with gzip.open(path, "rt") as file:
        return np.loadtxt(file, delimiter=",", dtype=np.uint8)


def _digits(scale: str | None) -> Source:
    """The digits of scikit-learn: 1,797 pictures `[1, 8, 8]` in [0, 1]. Its loader would import for a second."""
    package = find_spec("sklearn")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("scikit-learn is not installed")
    rows = _small_numbers(Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz")
    pictures = (rows[:, :-1] / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    return arrays(pictures, rows[:, -1].astype(int), task="classification", scale=scale or "none", name="digits")


def _folder(folder: str | Path | None, name: str, files: str) -> Path:
    """Return the folder of a set's files: the argument, else ATOLL_DATA."""
    place = folder or os.environ.get("ATOLL_DATA")
    if not place:
        raise UsageError(
            f"{name} needs {files}, and no folder is set.",
            "a folder, by the argument or by the environment variable ATOLL_DATA.",
            "nothing is downloaded.",
            Load(name, {"folder": "data"}),
        )
    return Path(place)


def _absent(name: str, path: Path, write: Write = "") -> UsageError:
    return UsageError(
        f"{name} needs {path}, which does not exist.",
        "the file, in the folder that the argument or ATOLL_DATA names.",
        "nothing is downloaded.",
        write or f"ls {path.parent}",
    )


def _malformed(path: Path, cause: object) -> UsageError:
    return UsageError(f"{path} is malformed: {cause}.", "the file as it was published.", write=f"ls -l {path}")


def _mnist(folder: str | Path | None, scale: str | None) -> Source:
    path = _folder(folder, "mnist", "mnist.npz") / "mnist.npz"
    if not path.is_file():
        raise _absent("mnist", path)
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            parts = [file[key] for key in ("x_train", "y_train", "x_test", "y_test")]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise _malformed(path, error) from error
    return _pictures("mnist", parts, tuple("0123456789"), scale, path)


def _fashion_mnist(folder: str | Path | None, scale: str | None) -> Source:
    first = "train-images-idx3-ubyte"
    configured = folder or os.environ.get("ATOLL_DATA")
    directory = Path(configured) if configured else DEBIAN_FASHION
    if not folder and not _idx_path(directory, first).is_file():
        directory = DEBIAN_FASHION
    parts = []
    for stem in (first, "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"):
        path = _idx_path(directory, stem)
        if not path.is_file():
            raise _absent("fashion_mnist", path, "apt-get install dataset-fashion-mnist")
        parts.append(read_idx(path))
    return _pictures("fashion_mnist", parts, FASHION, scale, directory)


def _idx_path(folder: Path, stem: str) -> Path:
    """Return the plain file if it exists, else the gzipped one."""
    plain = folder / stem
    return plain if plain.is_file() else folder / f"{stem}.gz"


def read_idx(path: Path) -> Array:
    """Read the array of an IDX file, gzipped or not: uint8, with the shape from the header.

    The header is big-endian: two zero bytes, the type (8: unsigned bytes), the number of axes, and the length of
    each axis.

    Args:
        path: the file; its name ends in .gz if it is gzipped.
    Raises:
        UsageError: the header is not valid, or the number of bytes after it does not match its shape.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            zero, kind, axes = struct.unpack(">HBB", file.read(4))
            if zero != 0 or kind != 8:
                raise _malformed(path, f"its first bytes are {zero:#06x}, {kind:#04x} instead of 0x0000, 0x08")
            shape = struct.unpack(f">{axes}I", file.read(4 * axes))
            data = np.frombuffer(file.read(), dtype=np.uint8)
    except (OSError, EOFError, struct.error, zlib.error) as error:
        raise _malformed(path, error) from error
    if data.size != math.prod(shape):
        raise _malformed(path, f"{data.size} bytes follow a header that announces shape {shape}")
    return data.reshape(shape)


def _pictures(name: str, parts: list[Array], classes: tuple[str, ...], scale: str | None, path: Path) -> Source:
    """Build a source from uint8 images and labels: `parts` is train x, train y, test x, test y."""
    both = []
    for x, y in (parts[:2], parts[2:]):
        if x.dtype != np.uint8 or x.ndim != 3 or not len(x) or y.shape != (len(x),) or y.dtype != np.uint8:
            raise _malformed(path, f"it has images {x.dtype} {x.shape} with labels {y.dtype} {y.shape}")
        if y.max() >= len(classes):
            raise _malformed(path, f"it has label {y.max()}, outside 0 to {len(classes) - 1}")
        both.append(ArrayRows(tensor_of(x[:, None]), tensor_of(y.astype(np.int64))))
    train, test = both
    shape = tuple(train.x.shape[1:])
    return Source(name, train, "classification", classes, shape, test=test, scale=scale or "none")


def _heart(folder: str | Path | None, missing: str | None, scale: str | None) -> Source:
    """Load UCI heart disease of four hospitals.

    There are ten columns. Chest pain (cp) and resting ECG (restecg) are categorical: every level except the first is
    a column of 0 and 1.

    Reference: Ogier du Terrail et al., FLamby, 2022, Fed-Heart-Disease; its columns and rows.
    """
    parts: list[Array] = []
    hospitals: list[str] = []
    for hospital in HOSPITALS:
        path = _folder(folder, "heart", "heart.processed.*.data") / f"heart.processed.{hospital}.data"
        if not path.is_file():
            raise _absent("heart", path)
        rows = [line.split(",") for line in path.read_text(errors="replace").splitlines() if line]
        if not rows or any(len(row) != 14 for row in rows):
            raise _malformed(path, "it is empty, or a line does not have 14 cells")
        cells = [TextCells(texts).numbers(Missing()) for texts in zip(*rows, strict=True)]
        if any(values is None for values in cells):
            raise _malformed(path, "a cell is not a number")
        parts.append(np.stack([values for values in cells if values is not None], axis=1))
        hospitals += [hospital] * len(rows)
    raw = np.concatenate(parts)
    columns = {name: raw[:, i] for i, name in enumerate(HEART_COLUMNS) if name not in ("cp", "restecg")}
    for name, levels in (("cp", (2, 3, 4)), ("restecg", (1, 2))):
        values = raw[:, HEART_COLUMNS.index(name)]
        for level in levels:
            columns[f"{name}={level}"] = np.where(np.isnan(values), np.nan, values == level)
    columns["diagnosis"] = (raw[:, 13] > 0).astype(np.float64)
    source = table(
        "heart",
        columns | {"hospital": np.array(hospitals, dtype=object)},
        target="diagnosis",
        by="hospital",
        task="classification",
        missing=missing or "drop",
        scale=scale,
    )
    return replace(source, classes=("healthy", "disease"))


def _npy(folder: Path, options: TableOptions) -> Source:
    """Load a folder with x.npy and y.npy, which are memory-mapped and read when rows are needed."""
    parts = []
    for name in ("x", "y", "x_test", "y_test"):
        path = folder / f"{name}.npy"
        if not path.is_file():
            if name.endswith("test"):
                break
            raise UsageError(f"The folder {folder} has no {name}.npy.", "x.npy and y.npy.", write=f"ls {folder}")
        try:
            # np.load needs the path for a memory map. If the file is not an array it would stay open, so check first.
            with path.open("rb") as file:
                np.lib.format.read_magic(file)
            parts.append(np.load(path, mmap_mode="r", allow_pickle=False))
        except (OSError, ValueError, EOFError) as error:
            raise _malformed(path, error) from error
    test = (parts[2], parts[3]) if len(parts) == 4 else None
    return arrays(
        parts[0],
        parts[1],
        task=options.get("task"),
        scale=options.get("scale") or "none",
        missing=options.get("missing"),
        classes=name_list(options.get("classes")) or None,
        test=test,
        name=folder.name,
    )


NAMED: dict[str, Callable[[str | Path | None, str | None, str | None], Source]] = {
    "diabetes": lambda folder, missing, scale: _sklearn("diabetes", scale),
    "breast_cancer": lambda folder, missing, scale: _sklearn("breast_cancer", scale),
    "wine": lambda folder, missing, scale: _sklearn("wine", scale),
    "digits": lambda folder, missing, scale: _digits(scale),
    "fashion_mnist": lambda folder, missing, scale: _fashion_mnist(folder, scale),
    "mnist": lambda folder, missing, scale: _mnist(folder, scale),
    "heart": _heart,
}
