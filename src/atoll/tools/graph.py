"""Export a run as one graph, from a user's rows to predictions: `atoll export RUN --format pt2`, or `--format onnx`.

    program = torch.export.load("model.pt2").module()
    predictions = program(values)

For a table, `values` is float64 `[rows, columns]` in the order of the columns of the run: a number or NaN; days
since 1970-01-01 for a date; the code of a text among the levels of its column, −1 for an unknown text. For arrays it is
`[rows, *features]` as in training, uint8 for images with intensities. The result is float64: the probability of each
class or label, or numbers in the target's units. The archive contains the input of the run as `input.json`, with names
and levels; an ONNX file has it in its metadata.

Tests: tests/surface/test_export_graph.py.
"""

from __future__ import annotations

import copy
import importlib.util
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from atoll.base.errors import UsageError
from atoll.base.files import write_output
from atoll.base.lines import Line
from atoll.base.random import Key, user_scope
from atoll.compute.loss import poisson
from atoll.data.input import Input, TextColumn
from atoll.data.rows import numbers
from atoll.data.scale import standardize
from atoll.runs.predictor import Predictor
from atoll.training.experiment import predictor as predictor_of_run
from atoll.training.rounds import DTYPES

LARGEST_DIFFERENCE = 1e-6  # between the graph and the predictor, relative to 1 or to the value
_ROWS = 5


class WholeModel(nn.Module):
    """A model between the transform of its input and that of its output.

    Args:
        predictor: the model with its input.
    Raises:
        UsageError: a row has several tensors.
    Example:
        >>> import atoll
        >>> data = atoll.data.load("wine").split(clients=3)
        >>> run = atoll.train("softmax", data, atoll.recipes.fedavg(0.1), rounds=1, out=None)
        >>> WholeModel(run.predictor)(torch.zeros(2, 13, dtype=torch.float64)).sum(1).round().tolist()
        [1.0, 1.0]
    """

    def __init__(self, predictor: Predictor) -> None:
        super().__init__()
        predictor.input.refuse_fields("the graph takes one tensor.")
        self.model, self.input = copy.deepcopy(predictor.model), predictor.input
        self.requires_grad_(False)
        self.rates = predictor.loss is poisson
        self.tables = None if self.input.tables is None else tuple(table[0] for table in self.input.tables)

    def forward(self, values: Tensor) -> Tensor:
        it, x = self.input, values
        if it.columns:
            x = it.expand(x)
        elif it.tokens is None:
            x = numbers(x)
        if self.tables is not None:
            x = standardize(x, *self.tables)
        out = self.model(x.to(DTYPES[it.dtype]) if it.tokens is None else x)
        if it.kind != "regression":
            return it.probabilities(out)
        out = out.double().reshape(out.shape[0], -1)  # len(out) would fix the number of rows
        return it.in_units(out.exp() if self.rates else out)


@user_scope(Key(0).fold("tool"))
def export_graph(
    path: str | Path,
    out: str | Path | None = None,
    trust: bool = False,
    format: str = "pt2",
    client: int | str | None = None,
) -> str:
    """Write the final model of a run, with the transforms of its input and its output, as a graph.

    Args:
        path: the run folder.
        out: the file to write; None is `model.pt2` or `model.onnx` in the run folder.
        trust: whether the run folder may import code.
        client: export the model of this client; None: that of the server.
        format: "pt2" for `torch.export`, or "onnx".
    Returns:
        One line about the file.
    Raises:
        UsageError: torch cannot export the model, each client has its own statistics, the graph has other values than
            the model, or the libraries of ONNX are not installed. No file is written.
    """
    if format == "onnx":
        _require_onnx()
    folder = Path(path)
    target = Path(out) if out is not None else folder / f"model.{format}"
    found = predictor_of_run(folder, trust=trust, client=client)
    it = found.input
    if it.clients:
        raise UsageError(
            f'{folder.name} was trained with scale="client".',
            "one table of statistics.",
            "the graph does not receive the client of a row.",
        )
    whole = WholeModel(found).eval()
    values = _example(it)
    try:
        program = torch.export.export(whole, (values,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
        written, graph = (_pt2 if format == "pt2" else _onnx)(program, it)
        worst = max(_difference(graph(some), whole(some)) for some in (values, values[:2]))
    except Exception as error:  # torch.export raises errors of many types
        reason = str(error).strip().splitlines()[0][:300] if str(error).strip() else "no reason"
        raise UsageError(
            f"torch.export cannot export the model: {type(error).__name__}: {reason}",
            "a model whose graph does not depend on its numbers.",
            "the file contains a graph, and no Python code.",
            f"atoll export {folder.name} --format safetensors",
        ) from error
    if worst > LARGEST_DIFFERENCE:
        raise UsageError(
            f"The graph differs from the model by {worst:.2g}.", f"at most {LARGEST_DIFFERENCE:g}.", "it is not equal."
        )
    write_output(target, written)
    answers = "numbers in the target's units" if it.kind == "regression" else "probabilities"
    return f"{target}: {len(written):,} bytes, from [rows, {', '.join(map(str, values.shape[1:]))}] to {answers}"


Graph = Callable[[Tensor], Tensor]


def _pt2(program: torch.export.ExportedProgram, it: Input) -> tuple[bytes, Graph]:
    """The bytes of a file of `torch.export`, and the function that it contains."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={"input.json": it.encode().decode()})
    return buffer.getvalue(), program.module()


def _onnx(program: torch.export.ExportedProgram, it: Input) -> tuple[bytes, Graph]:
    """The bytes of an ONNX file, and its function by the reference evaluator of onnx."""
    reference: Any = importlib.import_module("onnx.reference")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations within torch's exporter
        exported: Any = torch.onnx.export(program, dynamo=True, verbose=False)
    proto = exported.model_proto
    proto.metadata_props.add(key="input.json", value=it.encode().decode())
    session, name = reference.ReferenceEvaluator(proto), proto.graph.input[0].name
    return proto.SerializeToString(), lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def _require_onnx() -> None:
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f"ONNX needs {' and '.join(missing)}, not installed here.",
            "the exporter of torch to ONNX.",
            "torch writes ONNX with these libraries.",
            Line("pip install onnx onnxscript", "pip install onnx onnxscript"),
        )


def _example(it: Input) -> Tensor:
    """A few rows as a user has them, with missing numbers and unknown texts."""
    key = Key(0).fold("graph")
    if it.tokens is not None:
        return torch.arange(_ROWS * it.features[0]).reshape(_ROWS, -1) % it.tokens
    if not it.columns:
        x = key.normal(_ROWS * torch.Size(it.features).numel(), torch.float32).reshape(_ROWS, *it.features)
        return (x.abs() * 50).clamp(max=255).to(torch.uint8) if it.intensities else x
    x = key.normal(_ROWS * len(it.columns)).reshape(_ROWS, len(it.columns))
    for place, column in enumerate(it.columns):
        if isinstance(column, TextColumn):
            x[:, place] = torch.arange(_ROWS).double() % (len(column.levels) + 1) - 1
        else:
            x[:, place] = x[:, place] * column.spread + column.centre
            x[place % _ROWS, place] = torch.nan
    return x


def _difference(one: Tensor, other: Tensor) -> float:
    return float(((one - other).abs() / other.abs().clamp(min=1)).max())
