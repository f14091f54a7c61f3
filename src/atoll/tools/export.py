"""Export the model of a run to a smaller file, and measure the loss of accuracy.

    atoll export RUN --dtype int8

The file is safetensors. Its metadata contains `format: atoll export 1`, `dtype` and the name of the run. Tensors have
the names of the model's `state_dict`. A float tensor `w` is stored, depending on dtype, as

    float32   `w` in float32
    bf16      `w` in bfloat16, rounded to nearest: |ŵ − w| ≤ 2⁻⁸ |w|
    int8      with two or more axes: `w` in int8 with the same shape, and `w.scale` in float32, one number per row of
              the first axis:  ŵ[r, …] = scale[r] · w[r, …],  scale[r] = max |w[r, …]| / 127, or 1 if the row is 0, so
              that |ŵ − w| ≤ scale[r] / 2;  with fewer axes: `w` in float32, because biases and norms are small, and
              rounding them costs accuracy

Integer and boolean tensors are stored unchanged. `load_exported` returns a `state_dict` in float32.

Tests: tests/surface/test_tools.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from atoll.base.errors import UsageError, unknown_name
from atoll.base.files import write_output
from atoll.base.lines import Change, Line, literal
from atoll.base.random import Key, user_scope
from atoll.compute.metric_names import direction
from atoll.engine.inprocess import InProcessEngine
from atoll.runs.folder import HIDDEN
from atoll.runs.next_line import near, resume_line
from atoll.runs.personal import ClientModels
from atoll.tools.rebuild import training_in
from atoll.training.evaluation import evaluate
from atoll.training.personal import held_by_client
from atoll.training.rounds import Training, start_from

FORMAT = "atoll export 1"
DTYPES = ("float32", "bf16", "int8")
_OTHER_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pt2", ".onnx")


@dataclass(frozen=True)
class Exported:
    """An exported model.

    Args:
        path: the path of the file.
        dtype: "float32", "bf16" or "int8".
        bytes: the size of the file in bytes.
        full: the size of the run's own model.safetensors in bytes.
        before, after: held-out loss and metrics of the run's model and of the exported model; {} without held-out rows.
        worst: the name and the relative change ‖ŵ − w‖ / ‖w‖ of the tensor that changed most.
    """

    path: Path
    dtype: str
    bytes: int
    full: int
    before: Mapping[str, float] = field(default_factory=dict)
    after: Mapping[str, float] = field(default_factory=dict)
    worst: tuple[str, float] = ("", 0.0)

    @property
    def ratio(self) -> float:
        """The compression ratio: the size of the run's model.safetensors by the size of the file."""
        return self.full / self.bytes

    @property
    def lost(self) -> dict[str, float]:
        """The loss in each metric, positive if the exported model is worse."""
        return {n: (self.before[n] - self.after[n]) * (direction(n) or -1) for n in self.before}

    def text(self) -> str:
        """Format the result as text: file sizes, metrics before and after, and the tensor that changed most."""
        size = f"{self.ratio:.2f} times smaller" if self.ratio >= 1 else f"{1 / self.ratio:.2f} times larger"
        lines = [f"{self.path}: {self.dtype}, {self.bytes:,} bytes, {size} than {self.full:,}"]
        for name, loss in self.lost.items():
            change = f"{abs(loss):.3g} {'lost' if loss > 0 else 'gained'}" if loss else "nothing lost"
            lines.append(f"{name}: {self.before[name]:.6g} before, {self.after[name]:.6g} after: {change}")
        if not self.before:
            lines.append("no held-out rows: the loss of accuracy cannot be measured")
        if self.worst[0]:
            lines.append(f"most changed: {self.worst[0]}, by {100 * self.worst[1]:.3g} % of its norm")
        return "\n".join(lines)


@user_scope(Key(0).fold("tool"))
def export(
    path: str | Path,
    dtype: str = "int8",
    out: str | Path | None = None,
    trust: bool = False,
    training: Training | None = None,
    client: int | str | None = None,
) -> Exported:
    """Write the final model of a run to a smaller file, and measure the loss of accuracy on the held-out rows.

    Args:
        path: the run folder.
        dtype: "float32", "bf16" or "int8"; `atoll.tools.export` describes the format of the file.
        out: the file to write; None is `model-<dtype>.safetensors` in the run folder.
        trust: whether the config.toml of the run may name code outside atoll.
        training: the same training before its first round, for a run that was started from Python; None builds it from
            config.toml.
        client: the name or the number of the client whose model is written; it is measured on the client's own held-out
            rows, if it has any. None: the model of the server.
    Returns:
        the path, the sizes, and the metrics before and after.
    Raises:
        UsageError: the dtype is unknown, or the run has no final model or one that is not finite. No file is written.
        RunError: the file cannot be written.
    """
    folder = Path(path)
    file = folder / "model.safetensors"
    if dtype not in DTYPES:
        raise unknown_name("dtype of an export", dtype, DTYPES, lambda near: Change("dtype", near))
    if not file.is_file():
        raise UsageError(
            f"{file} does not exist.",
            "a run that has ended.",
            "a run writes its model at the end.",
            resume_line(folder),
        )
    target = Path(out) if out is not None else folder / f"model-{dtype}.safetensors"
    if target.suffix in _OTHER_SUFFIXES:
        raise UsageError(
            f"{target} has the suffix of another format.",
            "a file that ends in .safetensors.",
            "torch.load reads no safetensors. `--format pt2` and `--format onnx` write a graph.",
            Line(f'out="{target.with_suffix(".safetensors")}"', f"--to {target.with_suffix('.safetensors')}"),
        )
    state = load_file(file)
    training = (
        training_in(folder, _python(folder, dtype, out, client), trust=trust, start=False)
        if training is None
        else training
    )
    hidden = file.with_name(file.stem + HIDDEN)
    others = load_file(hidden) if hidden.is_file() else {}
    number = None
    if client is not None:
        models = ClientModels.of_folder(
            folder, training.plan, training.task, start_from({**others, **state}, training.task)
        )
        number = models.id_of(client)
        state = models.module(number).state_dict()
        target = target if out is not None else folder / f"client-{number}-{dtype}.safetensors"
    written = save(pack(state, dtype), {"format": FORMAT, "dtype": dtype, "run": folder.resolve().name})
    write_output(target, written)
    back = load_exported(target)
    before, after = (_measured(training, {**others, **s}, number) for s in (state, back))
    moved = {n: _moved(state[n], back[n]) for n in state if state[n].is_floating_point()}
    worst = max(moved.items(), key=lambda item: item[1], default=("", 0.0))
    return Exported(target, dtype, len(written), file.stat().st_size, before, after, worst)


def pack(state: Mapping[str, Tensor], dtype: str) -> dict[str, Tensor]:
    """Convert a `state_dict` to the tensors of an exported file.

    Args:
        state: the `state_dict`; all numbers are finite.
        dtype: "float32", "bf16" or "int8".
    Returns:
        the tensors by name, sorted by the names of `state`.
    Raises:
        UsageError: a number is not finite, or too large for float32.
    Example:
        >>> packed = pack({"w": torch.tensor([[1.0, -0.5], [0.0, 0.0]])}, "int8")
        >>> packed["w"].tolist(), packed["w.scale"].tolist()
        ([[127, -64], [0, 0]], [0.007874015718698502, 1.0])
    """
    out: dict[str, Tensor] = {}
    for name, tensor in sorted(state.items()):
        if not tensor.is_floating_point():
            out[name] = tensor.contiguous()
            continue
        plain = tensor.detach().float().contiguous()
        if not bool(torch.isfinite(plain).all()):
            raise UsageError(
                f"The tensor {name} of the model contains NaN or infinity in float32.",
                "finite numbers.",
                "these values usually mean that the training diverged. A lower learning rate may help.",
                "atoll lr",
            )
        if dtype == "int8" and plain.dim() >= 2 and plain.numel():
            rows = plain.flatten(1)
            largest = rows.abs().amax(1)
            scale = torch.where(largest > 0, largest / 127, 1.0).clamp(min=torch.finfo(torch.float32).tiny)
            out[name] = (rows / scale[:, None]).round().clamp(-127, 127).to(torch.int8).reshape(plain.shape)
            out[f"{name}.scale"] = scale
        else:
            out[name] = plain.to(torch.bfloat16) if dtype == "bf16" else plain.clone()
    return out


def load_exported(file: str | Path) -> dict[str, Tensor]:
    """Read an exported file as a `state_dict`.

    Args:
        file: a file that `export` wrote.
    Returns:
        the tensors by name: floats in float32, integers and booleans unchanged.
    Raises:
        UsageError: the file cannot be read, or `export` did not write it.
    """
    path = Path(file)
    try:
        with safe_open(path, "pt") as opened:
            about = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  it is no mapping
    except (OSError, SafetensorError) as error:
        raise UsageError(
            f"{path} cannot be read: {error}.",
            "a safetensors file.",
            "`atoll export` writes this format.",
            "atoll export latest",
        ) from None
    if about.get("format") != FORMAT:
        raise UsageError(
            f"{path} has the format {about.get('format', 'plain safetensors')!r}.",
            f"the format {FORMAT!r}, which `atoll export` writes.",
            "another format may scale int8 tensors differently.",
            "safetensors.torch.load_file(path)",
        )
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        scale = tensors.get(f"{name}.scale")
        if tensor.dtype == torch.int8 and scale is not None and about.get("dtype") == "int8":
            out[name] = tensor.float() * scale.reshape(-1, *(1,) * (tensor.dim() - 1))
        elif not (name.endswith(".scale") and f"{name[:-6]}" in tensors and tensors[name[:-6]].dtype == torch.int8):
            out[name] = tensor.float() if tensor.is_floating_point() else tensor
    return out


def _measured(training: Training, state: Mapping[str, Tensor], client: int | None) -> dict[str, float]:
    if training.data.held_out is None:
        return {}
    at, rows = replace(training.state, model=start_from(state, training.task)), training.data.held()
    if client is not None:
        held = held_by_client(training.data)
        if held is None or not int(held.sizes[client]):
            return {}
        rows = held.only(client)
    return evaluate(at, InProcessEngine(training.task, rows, training.settings.chunk)).metrics


def _python(folder: Path, dtype: str, out: str | Path | None, client: int | str | None) -> Callable[[str], str]:
    """The lines of an export with a training that a program makes."""
    more = {n: str(v) if isinstance(v, Path) else v for n, v in (("out", out), ("client", client)) if v is not None}
    words = [literal(near(folder)), literal(dtype), *(f"{n}={literal(v)}" for n, v in more.items())]
    return lambda training: (
        f"from atoll.tools.export import export\nprint(export({', '.join(words)}, training={training}).text())"
    )


def _moved(was: Tensor, now: Tensor) -> float:
    norm = float(torch.linalg.vector_norm(was.double()))
    return float(torch.linalg.vector_norm(was.double() - now.double())) / norm if norm else 0.0
