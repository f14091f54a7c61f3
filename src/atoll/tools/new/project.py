"""Write the files of a new project.

    atoll new heart --data heart.csv --target ill

Tests: tests/surface/test_new.py
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import NamedTuple

import numpy as np

from atoll.base.errors import UsageError, unknown_name
from atoll.base.files import write_output
from atoll.base.lines import Line, quoted
from atoll.data.cells import Cells, Missing
from atoll.data.files import stream_table
from atoll.data.tabular import WHOLE_CLASSES
from atoll.tools.new import texts
from atoll.training.experiment import REGRESSION_RECIPE

# Words of column names, the likeliest first. A guess becomes a comment, never a setting.
CLIENTS = (
    *("client", "hospital", "site", "clinic", "centre", "center", "institution", "bank", "branch", "school", "station"),
    *("store", "shop", "owner", "device", "user", "city", "region", "state", "country"),
)
TARGETS = ("target", "label", "class", "outcome", "diagnosis", "y")


class Kind(NamedTuple):
    """A template.

    Args:
        about: its purpose, for the README.
        data: the data set without `--data`.
        module, text: the name and the text of the module.
        model, recipe: settings of the experiment.
        shown: the line of the README about the module.
    """

    about: str
    data: str
    module: str
    text: str
    model: str
    recipe: str
    shown: str


_FEDAVG = "fedavg(lr=0.1, batch=10)"
TEMPLATES: dict[str, Kind] = {
    "tabular": Kind(
        "Predict a column of a table by federated averaging.",
        "breast_cancer",
        "study.py",
        texts.STUDY,
        "mlp",
        _FEDAVG,
        "python study.py                       # the same training from Python",
    ),
    "torch": Kind(
        "Train a PyTorch model of your own by federated averaging.",
        "digits",
        "my_model.py",
        texts.NET,
        "my_model:net",
        _FEDAVG,
        "atoll predict latest ROWS             # predict rows; the model is in my_model.py",
    ),
    "own-loop": Kind(
        "Train by a loop of your own at each client.",
        "digits",
        "my_loop.py",
        texts.LOOP,
        "mlp",
        "Plan(Custom(my_loop:train, batch=10, lr=0.02), Mean())",
        "atoll predict latest ROWS             # predict rows; the loop is in my_loop.py",
    ),
    "transformers": Kind(
        "Train a BERT of the package transformers, in which each feature is a token, by federated averaging.",
        "wine",
        "my_model.py",
        texts.TRANSFORMER,
        "my_model:net",
        _FEDAVG,
        "atoll predict latest ROWS             # predict rows; the model is in my_model.py",
    ),
    "sklearn": Kind(
        "Fit a pipeline of scikit-learn by federated averaging.",
        "breast_cancer",
        "study.py",
        texts.ESTIMATOR,
        "mlp",
        _FEDAVG,
        "python study.py                       # fit the pipeline, and print its score",
    ),
}


@dataclass(frozen=True)
class Proposal:
    """Proposed settings of a table, each with its reason.

    Args:
        path: the file.
        target, why_target: the column to predict.
        by, why_by: the column of the client; empty if no column has a usual name.
        task, why_task: the kind of task.
    """

    path: Path
    target: str
    why_target: str
    by: str
    why_by: str
    task: str
    why_task: str


def new_project(
    folder: str | Path, template: str = "tabular", data: str | Path | None = None, target: str | None = None
) -> tuple[Path, ...]:
    """Write experiment.toml, a module, a README and a test in a new folder.

    Args:
        folder: the folder; it is made if it does not exist, else it must be empty.
        template: a name of `TEMPLATES`.
        data: a CSV, Parquet or Excel file; None: a data set that comes with the installation.
        target: the column to predict; None: proposed from the header.
    Returns:
        the paths of the files.
    Raises:
        UsageError: the folder is not empty, or the template, the file or the column does not exist.
    Example:
        >>> import tempfile
        >>> [path.name for path in new_project(tempfile.mkdtemp() + "/heart")]
        ['experiment.toml', 'study.py', 'README.md', 'test_experiment.py']
    """
    home = Path(folder)
    if template not in TEMPLATES:
        line = lambda near: Line(f'new_project(folder, "{near}")', f"--template {near}")  # noqa: E731
        raise unknown_name("template", template, TEMPLATES, line)
    if home.exists() and not (home.is_dir() and not any(home.iterdir())):
        other = home.with_name(f"{home.name}-2")
        raise UsageError(
            f"{home} exists and is not an empty folder.",
            "a new name, or an empty folder.",
            "no file is replaced.",
            Line(f'new_project("{other}")', f"atoll new {quoted(str(other))}"),
        )
    if target is not None and data is None:
        raise UsageError(f"The target {target!r} without a file.", "a file with this column.")
    found = None if data is None else _proposal(Path(data), target)
    kind = TEMPLATES[template]
    files = {
        "experiment.toml": _toml(kind, found),
        kind.module: _module(template, kind, found),
        "README.md": Template(texts.README).substitute(name=home.name, about=kind.about, module_line=kind.shown),
        "test_experiment.py": texts.TEST,
    }
    for name, text in files.items():
        write_output(home / name, text.encode())
    return tuple(home / name for name in files)


def _proposal(path: Path, target: str | None) -> Proposal:
    """Read the header and the first rows, and propose the target, the column of the client and the task."""
    header, batches = stream_table(path)
    names = list(header)
    if target is not None and target not in names:
        raise unknown_name("column", target, names, lambda near: Line(f'target="{near}"', f"--target {quoted(near)}"))
    batch = next(batches, None)
    if batch is None or len(names) < 2:
        amount = "0 rows" if batch is None else "one column"
        raise UsageError(f"{path} has {amount}.", "a target, at least one feature, and at least one row.")
    by, why_by = _client_column([n for n in names if n != target], batch.cells)
    if target is not None:
        why = "it was given."
    elif usual := next((n for word in TARGETS for n in names if n.lower() == word), None):
        target, why = usual, "this is a usual name of a target."
    else:
        target, why = next(n for n in reversed(names) if n != by), "it is the last column that names no client."
    return Proposal(path.resolve(), target, why, by, why_by, *_task(batch.cells[target]))


def _client_column(names: list[str], cells: dict[str, Cells]) -> tuple[str, str]:
    """The column whose name contains a usual word for a client, and which repeats its values; else an empty name."""
    for word in CLIENTS:
        for name in names:
            texts_of = cells[name].texts()
            levels = len(texts_of.levels)
            if word in re.split(r"[^a-z]+", name.lower()) and 2 <= levels <= len(texts_of.codes) / 2:
                return name, f"its name contains {_text(word)}, and the first rows have {levels} values of it."
    return "", ""


def _task(cells: Cells) -> tuple[str, str]:
    """The kind of task by the first rows, by the rule of `atoll.data.csv`."""
    values = cells.numbers(Missing())
    if values is None:
        return "classification", "the column contains texts."
    good = values[np.isfinite(values)]
    if bool((good == good.round()).all()) and len(np.unique(good)) <= WHOLE_CLASSES:
        return "classification", f"the first rows have at most {WHOLE_CLASSES} different whole numbers."
    return "regression", "the column contains numbers."


def _toml(kind: Kind, found: Proposal | None) -> str:
    """The experiment with one comment above each key."""
    table = [] if found is None else _table_keys(found)
    data = kind.data if found is None else str(found.path)
    fedavg = kind.recipe == _FEDAVG and found is not None and found.task == "regression"
    keys = [
        ("Data: a name, or the path of a table.", f"data = {_text(data)}"),
        *table,
        ("Number of clients, if no column names them.", f"{'' if found is None else '# '}clients = 10"),
        ("Fraction of the rows that no client gets. The metrics are computed on them.", "held_out = 0.2"),
        ("Model: a name, or module:function of your own code.", f"model = {_text(kind.model)}"),
        (
            "Recipe: the algorithm. A rate lr that is too large diverges; atoll lr finds one.",
            f"recipe = {_text(REGRESSION_RECIPE if fedavg else kind.recipe)}",
        ),
        ("Largest number of rounds.", "rounds = 20"),
        ("Seed of all random draws.", "seed = 0"),
    ]
    return "\n".join(f"# {comment}\n{key}" for comment, key in keys) + "\n"


def _table_keys(found: Proposal) -> list[tuple[str, str]]:
    target = _text(found.target)
    by = (
        ("Column of the client: none was found by its name. Write it here if there is one.", '# by = "…"')
        if not found.by
        else (
            f"Column of the client. Proposed: {_text(found.by)}, because {found.why_by} Without it, rows are dealt.",
            f"# by = {_text(found.by)}",
        )
    )
    return [
        (f"Target: the column to predict: {target}, because {found.why_target}", f"target = {target}"),
        by,
        (
            f"Task. Proposed: {found.task}, because {found.why_task} Without it, all rows decide.",
            f"# task = {_text(found.task)}",
        ),
    ]


def _module(template: str, kind: Kind, found: Proposal | None) -> str:
    if template != "sklearn" or found is None:
        return kind.text
    parquet, excel = found.path.suffix == ".parquet", found.path.suffix == ".xlsx"
    return Template(texts.TABLE_ESTIMATOR).substitute(
        estimator="FederatedClassifier" if found.task == "classification" else "FederatedRegressor",
        data=repr(str(found.path)),
        target=repr(found.target),
        reader="read_parquet" if parquet else "read_excel" if excel else "read_csv",
        separator="" if parquet or excel else ', sep=None, engine="python"',
    )


def _text(value: str) -> str:
    """A text as TOML writes it, on one line."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
