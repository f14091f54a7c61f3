"""Models that a name selects. A named model takes its sizes from the data. A user may also pass a module.

    linear         one linear layer, for regression
    logistic       one linear layer with one logit, for two classes
    softmax        one linear layer with a logit for each class
    mlp            fully connected layers d-200-outputs, where d is the length of a row
    2nn            fully connected layers d-200-200-outputs, as in the FedAvg paper
    cnn            two convolutions with 16 and 32 channels, then fully connected layers
    lstm           an LSTM, and a linear layer that reads the LSTM's output at the last position of the sequence
    transformer    a transformer with layer norm before each block and learned position embeddings
    mcmahan-cnn    conv 32-64, fc 512, same padding: the model of the FedAvg paper; 1,663,370 parameters on MNIST
    niid-cnn       conv 6-16, fc 120-84: the model of Flower's niid_bench; 44,426 parameters on MNIST
    pfl-cnn        conv 3 × 3 32-64, fc 128, dropout: the model of pfl-research; 1,626,442 parameters on CIFAR-10

The weights of the convex models (linear, logistic, softmax) are initially zero, as in their theory. All other initial
weights are random and depend only on the key that `build` receives. They follow torch's default distributions, with
two exceptions: Glorot for the weights of pfl-cnn, and the standard deviation 0.02 for the embeddings of transformer.
A model returns logits, not probabilities; the last axis exists even for one output.

References: McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data, 2017;
Li et al., Federated Learning on Non-IID Data Silos, 2022; Granqvist et al., pfl-research, 2024.

Tests: tests/identities/test_models.py, tests/identities/test_order.py.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from atoll.base.errors import UsageError
from atoll.base.lines import Change
from atoll.base.names import load_from_user
from atoll.base.random import Key, user_scope
from atoll.models.named import KINDS, build, names

__all__ = ["KINDS", "Sized", "build", "factory", "names", "resolve"]


class Sized(Protocol):
    """The properties of data that determine the sizes of a model."""

    @property
    def features(self) -> tuple[int, ...]:
        """The shape of one row."""

    @property
    def classes(self) -> tuple[str, ...] | None:
        """The names of the classes; None if the target is a number."""

    @property
    def kind(self) -> str:
        """One of `KINDS`."""


def factory(text: str) -> Callable[..., Any]:
    """Import the class or function `module:name`. Call it only with text that a person at this machine typed.

    The working folder is searched last, so that a file in it cannot replace an installed package.

    Args:
        text: `module:name`.
    Raises:
        UsageError: no such module, or no such name in it. In the second case the module was imported.
    Example:
        >>> factory("torch.nn:Bilinear").__name__
        'Bilinear'
    """
    found = load_from_user(text)
    if not callable(found):
        raise UsageError(f"{text} is not callable.", "a class or a function.", write="")
    return found  # type: ignore[no-any-return]


def resolve(
    model: str | nn.Module | Callable[..., nn.Module],
    data: Sized,
    key: Key,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """Build a model from a name, `module:name`, or a class or function; return a module unchanged.

    A class or function receives those of `features`, `outputs` and `kind` that it has as parameters. It runs with
    the global generators seeded from the key, like the models by name. With a module, training starts from its
    weights.

    Args:
        model: a name of `names()`, `"module:name"`, a callable, or a module.
        data: determines the sizes; if its `vocab` is not None, rows contain tokens.
        key: key of the initial weights.
        dtype: dtype of models by name; the user's own module keeps its dtypes.
    Raises:
        UsageError: no such model, a model that does not fit the data, or a result that is not a module with all its
            weights.
    Example:
        >>> from types import SimpleNamespace
        >>> data = SimpleNamespace(features=(4,), classes=("no", "yes"), kind="classification")
        >>> resolve(lambda features, outputs: nn.Linear(*features, outputs), data, Key(7))
        Linear(in_features=4, out_features=2, bias=True)
    """
    fields = tuple(getattr(data, "fields", ()))  # of rows of several tensors; an input has their texts
    if isinstance(model, str) and ":" not in model:
        if fields:
            raise UsageError(
                f"The model {model!r}, and rows of several tensors: {', '.join(map(str, fields))}.",
                f"a module of your own, with forward({', '.join(str(field).split()[0] for field in fields)}).",
                "a model by name takes one tensor.",
            )
        return build(model, data.features, _outputs(data), data.kind, key, dtype, getattr(data, "vocab", None))
    made: Any = factory(model) if isinstance(model, str) else model
    if callable(made) and not isinstance(made, nn.Module):
        shape = {f.name: f.shape for f in fields} or data.features
        made = _made(made, {"features": shape, "outputs": _outputs(data), "kind": data.kind}, key)
    if not isinstance(made, nn.Module):
        raise UsageError(
            f"The model has type {type(made).__name__}.",
            "a name, 'module:name', a torch module, or a class or function that returns one.",
            write=Change("model", "mlp" if getattr(data, "vocab", None) is None and data.kind != "tokens" else "lstm"),
        )
    for name, parameter in made.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise UsageError(
                f"The weights {name!r} have no shape yet.",
                "a module whose weights are all initialized.",
                "the length of the model vector must be known before the first round.",
                f"model(torch.zeros(2, {', '.join(map(str, data.features))}))",
            )
    return made


def _outputs(data: Sized) -> int:
    """Return how many numbers a model of this data outputs for one row."""
    if data.classes is not None:
        return len(data.classes)
    outputs = getattr(data, "outputs", None)
    if outputs is not None:
        return int(outputs)
    example = getattr(data, "example", None)
    return 1 if example is None else math.prod(example[1].shape[1:])


def _made(make: Callable[..., Any], sizes: Mapping[str, Any], key: Key) -> Any:
    """Call a class or function with the sizes that it has as parameters, with generators seeded from the key."""
    try:
        parameters: Iterable[inspect.Parameter] = inspect.signature(make).parameters.values()
    except ValueError:  # some callables written in C have no signature
        parameters = ()
    free = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    wanted = [p.name for p in parameters if p.default is p.empty and p.kind not in free]
    missing = [name for name in wanted if name not in sizes]
    if missing:
        called = getattr(make, "__name__", "make").replace("<lambda>", "make")
        raise UsageError(
            f"{called} requires {', '.join(missing)}.",
            "a class or function without parameters, or with any of features, outputs, kind.",
            "only these are known before the first round.",
            f"lambda: {called}({', '.join(f'{name}=1' for name in wanted)})",
        )
    given = {p.name for p in parameters} & sizes.keys()
    with user_scope(key):
        return make(**{name: sizes[name] for name in given})
