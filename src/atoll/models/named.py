"""Models by name, with sizes from the data, and checks that a model fits the rows.

Tests: tests/identities/test_models.py.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from atoll.base.errors import UsageError, unknown_name
from atoll.base.lines import Change, Line, literal
from atoll.base.random import Key, user_scope
from atoll.models.sequence import Lstm, Transformer

KINDS = ("classification", "regression", "tokens", "labels")


@dataclass(frozen=True)
class _Wanted:
    """A requested model, and the rows that it must fit."""

    name: str
    features: tuple[int, ...]
    outputs: int
    kind: str
    vocab: int | None

    def refusal(self, required: str, why: str, instead: str) -> UsageError:
        rows = "numbers" if self.vocab is None else f"tokens below {self.vocab}"
        target = {"regression": "target(s)", "labels": "labels"}.get(self.kind, "classes")
        given = f"The model {self.name!r} was requested for rows of {self.features} {rows}, "
        return UsageError(given + f"{self.kind} with {self.outputs} {target}.", required, why, Change("model", instead))

    @property
    def flat(self) -> int:
        """The count of numbers in a row; tokens are refused."""
        if self.vocab is not None:
            raise self.refusal("rows of numbers.", "a token id is a name, not a quantity to multiply.", "lstm")
        return math.prod(self.features)

    def image(self, smallest: int) -> tuple[int, int, int]:
        """Return channels, height and width of a row; refuse rows that are not images of ≥ `smallest` pixels a side."""
        if self.vocab is not None or len(self.features) not in (2, 3):
            raise self.refusal(
                "images: rows (height, width) or (channels, height, width).",
                "a convolution combines neighbouring pixels, and these rows have no pixels.",
                "mlp" if self.vocab is None else "lstm",
            )
        channels, height, width = (1, *self.features)[-3:]
        if min(height, width) < smallest:
            raise self.refusal(
                f"images of at least {smallest} × {smallest} pixels, channels first.",
                "convolutions and pools shrink an image, and this one would shrink to nothing.",
                "cnn" if min(height, width) >= 4 else "mlp",
            )
        return channels, height, width

    def sequence(self) -> int:
        """Return the count of numbers at each position of a sequence, 1 for tokens; refuse other rows."""
        if len(self.features) != (2 if self.vocab is None else 1):
            raise self.refusal(
                "sequences: rows (length, width) of numbers, or (length,) of tokens.",
                "it reads one position after another, and these rows are not sequences.",
                "cnn" if len(self.features) == 3 and min(self.features[1:]) >= 4 else "mlp",
            )
        return (*self.features, 1)[1]

    def classification(self) -> None:
        """Refuse tasks other than one class per row."""
        if self.kind != "classification":
            instead = {"labels": "logistic"}.get(self.kind, "linear") if self.vocab is None else "lstm"
            raise self.refusal("classification.", "its outputs are logits of a row's classes.", instead)


def _stack(**layers: nn.Module) -> nn.Sequential:
    """Return the layers as a Sequential, with names for reports."""
    return nn.Sequential(OrderedDict(layers))


def _from_zero(inputs: int, outputs: int) -> nn.Module:
    linear = nn.Linear(inputs, outputs)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return _stack(flat=nn.Flatten(), linear=linear)


def _linear(w: _Wanted) -> nn.Module:
    if w.kind != "regression":
        instead = {"labels": "logistic"}.get(w.kind, "softmax") if w.vocab is None else "lstm"
        raise w.refusal("regression.", "a class is not a number to approximate.", instead)
    return _from_zero(w.flat, w.outputs)


def _cox(w: _Wanted) -> nn.Module:
    if w.kind != "regression" or w.outputs != 2:
        instead = {"regression": "linear", "labels": "logistic"}.get(w.kind, "softmax") if w.vocab is None else "lstm"
        raise w.refusal(
            "two targets: a time, and an event of 0 or 1.",
            "it models the hazard of an event over time.",
            instead,
        )
    linear = nn.Linear(w.flat, 1, bias=False)
    nn.init.zeros_(linear.weight)
    return _stack(flat=nn.Flatten(), linear=linear)


def _logistic(w: _Wanted) -> nn.Module:
    if w.kind == "labels":
        return _from_zero(w.flat, w.outputs)
    w.classification()
    inputs = w.flat
    if w.outputs > 2:
        raise w.refusal("two classes.", "one logit separates two classes.", "softmax")
    return _from_zero(inputs, 1)


def _softmax(w: _Wanted) -> nn.Module:
    w.classification()
    return _from_zero(w.flat, w.outputs)


def _dense(inputs: int, *widths: int) -> dict[str, nn.Module]:
    """Return linear layers with ReLU between them: fc1, relu_fc1, fc2, …"""
    layers: dict[str, nn.Module] = {}
    for i, width in enumerate(widths, 1):
        if i > 1:
            layers[f"relu_fc{i - 1}"] = nn.ReLU()
        layers[f"fc{i}"] = nn.Linear(inputs, width)
        inputs = width
    return layers


def _mlp(w: _Wanted) -> nn.Module:
    return _stack(flat=nn.Flatten(), **_dense(w.flat, 200, w.outputs))


def _2nn(w: _Wanted) -> nn.Module:
    return _stack(flat=nn.Flatten(), **_dense(w.flat, 200, 200, w.outputs))


def _channel(w: _Wanted) -> dict[str, nn.Module]:
    """Return a layer that adds the channel axis to an image without one; else no layer."""
    return {"channel": nn.Unflatten(1, (1, w.features[0]))} if len(w.features) == 2 else {}


def _two_convolutions(
    w: _Wanted, channels: tuple[int, int], kernel: int, padding: int, smallest: int
) -> tuple[dict[str, nn.Module], int]:
    """Return convolution, ReLU and pool, twice, and how many numbers they output for an image."""
    inputs, *sides = w.image(smallest)
    first, second = channels
    left = [((n + 2 * padding - kernel + 1) // 2 + 2 * padding - kernel + 1) // 2 for n in sides]
    layers = {
        **_channel(w),
        "conv1": nn.Conv2d(inputs, first, kernel, padding=padding),
        "relu1": nn.ReLU(),
        "pool1": nn.MaxPool2d(2),
        "conv2": nn.Conv2d(first, second, kernel, padding=padding),
        "relu2": nn.ReLU(),
        "pool2": nn.MaxPool2d(2),
        "flat": nn.Flatten(),
    }
    return layers, second * math.prod(left)


def _cnn(w: _Wanted) -> nn.Module:
    # Two 5 × 5 convolutions without padding need at least 16 pixels; smaller images use 3 × 3 with padding.
    kernel, padding = (5, 0) if min(w.image(4)[1:]) >= 16 else (3, 1)
    layers, left = _two_convolutions(w, (16, 32), kernel, padding, smallest=4)
    return _stack(**layers, **_dense(left, 128, w.outputs))


def _mcmahan_cnn(w: _Wanted) -> nn.Module:
    layers, left = _two_convolutions(w, (32, 64), kernel=5, padding=2, smallest=4)
    return _stack(**layers, **_dense(left, 512, w.outputs))


def _niid_cnn(w: _Wanted) -> nn.Module:
    layers, left = _two_convolutions(w, (6, 16), kernel=5, padding=0, smallest=16)
    return _stack(**layers, **_dense(left, 120, 84, w.outputs))


def _pfl_cnn(w: _Wanted) -> nn.Module:
    inputs, *sides = w.image(smallest=6)
    dense = _dense(64 * math.prod((n - 4) // 2 for n in sides), 128, w.outputs)
    last = dense.pop("fc2")
    model = _stack(
        **_channel(w),
        conv1=nn.Conv2d(inputs, 32, 3),
        relu1=nn.ReLU(),
        conv2=nn.Conv2d(32, 64, 3),
        relu2=nn.ReLU(),
        pool=nn.MaxPool2d(2),
        drop1=nn.Dropout(0.25),
        flat=nn.Flatten(),
        **dense,
        drop2=nn.Dropout(0.5),
        fc2=last,
    )
    for name, parameter in model.named_parameters():
        if name.endswith("weight"):
            nn.init.xavier_uniform_(parameter)
    return model


def _lstm(w: _Wanted) -> nn.Module:
    return Lstm(w.vocab, w.sequence(), w.outputs, every_place=w.kind == "tokens")


def _transformer(w: _Wanted) -> nn.Module:
    width = w.sequence()
    return Transformer(w.vocab, w.features[0], width, w.outputs, every_place=w.kind == "tokens")


_MODELS: Mapping[str, Callable[[_Wanted], nn.Module]] = {
    "linear": _linear,
    "logistic": _logistic,
    "softmax": _softmax,
    "cox": _cox,
    "mlp": _mlp,
    "cnn": _cnn,
    "lstm": _lstm,
    "transformer": _transformer,
    "2nn": _2nn,
    "mcmahan-cnn": _mcmahan_cnn,
    "niid-cnn": _niid_cnn,
    "pfl-cnn": _pfl_cnn,
}


def names() -> tuple[str, ...]:
    """Return the names that `build` accepts.

    Example:
        >>> names()[:4]
        ('linear', 'logistic', 'softmax', 'cox')
    """
    return tuple(_MODELS)


def build(
    name: str,
    features: tuple[int, ...],
    outputs: int,
    kind: str,
    key: Key,
    dtype: torch.dtype = torch.float32,
    vocab: int | None = None,
) -> nn.Module:
    """Build a model by name, with sizes from the data and weights that depend only on the key.

    Args:
        name: one of `names()`.
        features: shape of one row: `(d,)`; images `(height, width)` or `(channels, height, width)`; sequences
            `(length, width)` of numbers or, with `vocab`, `(length,)` of tokens.
        outputs: the number of classes or targets, ≥ 1. `logistic` has one logit for two classes, `cox` one output for
            two targets.
        kind: `"classification"`, `"regression"`, `"labels"` (several labels of 0 and 1, one logit for each), or
            `"tokens"`: a class at every position, from this and earlier positions.
        key: key of the initial weights; the global generators are restored afterwards.
        dtype: dtype of the weights. They are drawn in float32, so both dtypes start from the same point.
        vocab: the number of tokens, if rows contain int64 tokens; for `"tokens"` the default is `outputs`.
    Returns:
        A module in training mode: x `[B, *features]` → `[B, outputs]`, for `"tokens"` `[B, length, outputs]`.
    Raises:
        UsageError: an unknown name, or the model does not fit these rows; the error suggests a model that does.
    Example:
        >>> model = build("mlp", (28, 28), outputs=10, kind="classification", key=Key(7).fold("model"))
        >>> sum(p.numel() for p in model.parameters())
        159010
    """
    if name not in _MODELS:
        raise unknown_name("model", name, _MODELS, lambda near: Change("model", near))
    if kind not in KINDS:
        raise unknown_name("kind of task", kind, KINDS, lambda near: Line(f"kind={literal(near)}"))
    if kind == "tokens" and vocab is None:
        vocab = outputs
    with user_scope(key):
        return _MODELS[name](_Wanted(name, tuple(features), outputs, kind, vocab)).to(dtype)
