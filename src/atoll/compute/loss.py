"""Losses and metrics: functions of a model's output and the target, with one value per example.

Tests: tests/identities/test_shapes.py, tests/identities/test_numerics.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.loss import _Loss

from atoll.base.errors import UsageError, unknown_name
from atoll.base.grammar import Value, parse
from atoll.base.lines import Change
from atoll.base.validation import bounded_number, check_fields
from atoll.compute.shapes import aligned, check_output, class_axis, labelled_means, row_means, same_axes
from atoll.compute.survival import partial_likelihood
from atoll.data.rows import IGNORED

PerExample = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, repr=False)
class cross_entropy(Value):
    """The loss −log softmax(output)[y], one value per row `[B]`: the mean over the labelled places of the row.

    A label of −100 marks a place without a label.

    Args:
        axis: the axis of the classes, not 0; None: the last axis or axis 1, the one that fits the shape of the labels.
    Raises:
        UsageError: the axis is 0 or no whole number.
    Example:
        >>> cross_entropy()(torch.zeros(1, 2), torch.tensor([0]))
        tensor([0.6931])
        >>> cross_entropy(axis=1)(torch.zeros(1, 2, 2), torch.tensor([[0, -100]]))
        tensor([0.6931])
    """

    axis: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.axis is not None and (isinstance(self.axis, bool) or not isinstance(self.axis, int) or self.axis == 0):
            raise UsageError(
                f"cross_entropy: axis = {self.axis!r}.",
                "an axis other than 0, such as 1 or -1, or None.",
                "axis 0 counts the rows.",
                Change("loss", "cross_entropy(axis=-1)"),
            )

    def __call__(self, output: Tensor, y: Tensor) -> Tensor:
        """The loss of each row.

        Args:
            output: logits `[B, C]`, `[B, …, C]` or `[B, C, …]`.
            y: class ids, int64 `[B]` or `[B, …]`, in [0, C) or −100.
        """
        at, y = class_axis(output, y, self.axis)
        if self.axis is not None and at != self.axis % output.dim():
            raise UsageError(
                f"{self!r}: the model returned shape {tuple(output.shape)} for labels of shape {tuple(y.shape)}.",
                f"the classes on axis {self.axis}.",
                f"the shapes fit classes on axis {at}.",
                Change("loss", f"cross_entropy(axis={at})"),
            )
        logs = F.log_softmax(output, at)
        if y.dim() == 1:
            return -logs.gather(at, y.unsqueeze(at)).squeeze(at)
        labelled = y != IGNORED
        labels = torch.where(labelled, y, 0).unsqueeze(at)
        return labelled_means(-logs.gather(at, labels).squeeze(at), labelled)


def binary_cross_entropy(output: Tensor, y: Tensor) -> Tensor:
    """Compute −log σ(±output), with the sign + for y = 1 and − for y = 0, one value per row `[B]`.

    Args:
        output: logits, in the shape of `y` up to axes of length 1.
        y: 0 or 1, `[B]` or `[B, n]`; −100 marks a place without a label.
    Example:
        >>> binary_cross_entropy(torch.zeros(1, 1), torch.tensor([1]))
        tensor([0.6931])
    """
    logits = aligned(output, y)
    # softplus would be shorter, but it rounds differently at the end of a tensor: see engine/position_check.py.
    if y.dim() == 1:
        return -F.logsigmoid(-logits) - logits * y
    labelled = y != IGNORED
    return labelled_means(-F.logsigmoid(-logits) - logits * torch.where(labelled, y, 0), labelled)


def mse(output: Tensor, y: Tensor) -> Tensor:
    """Compute (output − y)², one value per row `[B]`: the mean over the example's targets.

    Args:
        output: predictions, in the shape of `y` up to axes of length 1.
        y: targets `[B]` or `[B, n]`.
    Example:
        >>> mse(torch.tensor([[3.0]]), torch.tensor([1.0]))
        tensor([4.])
    """
    return row_means((aligned(output, y) - y).square())


def mae(output: Tensor, y: Tensor) -> Tensor:
    """Compute |output − y|, one value per row `[B]`: the mean over the example's targets.

    Args:
        output: predictions, in the shape of `y` up to axes of length 1.
        y: targets `[B]` or `[B, n]`.
    Example:
        >>> mae(torch.tensor([[3.0]]), torch.tensor([1.0]))
        tensor([2.])
    """
    return row_means((aligned(output, y) - y).abs())


def poisson(output: Tensor, y: Tensor) -> Tensor:
    """Compute exp(output) − y · output, one value per row `[B]`: −log of a Poisson likelihood, without log y!.

    The output is the logarithm of the rate. Predictions, and all metrics except `poisson_deviance`, use the rate.

    Args:
        output: logarithms of rates, in the shape of `y` up to axes of length 1.
        y: counts, or other numbers ≥ 0, `[B]` or `[B, n]`.
    Example:
        >>> poisson(torch.tensor([[0.0]]), torch.tensor([2.0]))
        tensor([1.])
    """
    log_rate = aligned(output, y)
    return row_means(log_rate.exp() - y * log_rate)


def cox(output: Tensor, y: Tensor) -> Tensor:
    """Compute −log of Cox's partial likelihood, one value per row `[B]`: 0 for a row without an event.

    ℓᵢ = log( Σ_{tⱼ ≥ tᵢ} e^{zⱼ} − (l/m) Σ_{tied} e^{zⱼ} ) − zᵢ,  for the l-th of m events at one time, from 0 (Efron)

    All rows of a batch are one stratum, so the loss couples them. Of a training, each client is a stratum if a step
    takes all its rows. The output z is the logarithm of a relative hazard.

    Args:
        output: logarithms of relative hazards, `[B]` or `[B, 1]`.
        y: time and event, 0 or 1, `[B, 2]`.
    Example:
        >>> cox(torch.zeros(2, 1), torch.tensor([[1.0, 1.0], [2.0, 0.0]]))
        tensor([0.6931, 0.0000])

    Reference: Efron, The Efficiency of Cox's Likelihood Function for Censored Data, 1977.
    """
    if y.dim() != 2 or y.shape[1] != 2 or output.numel() != len(y):
        raise UsageError(
            f"The loss cox for outputs of shape {tuple(output.shape)} and targets of shape {tuple(y.shape)}.",
            "one output, and two targets: a time and an event.",
            "the output is the logarithm of a relative hazard.",
            Change("model", "cox"),
        )
    return partial_likelihood(output.reshape(len(y)), y)


@dataclass(frozen=True, repr=False)
class huber(Value):
    """The loss ½ e² for |e| ≤ δ, and δ (|e| − ½ δ) beyond, of e = output − y: one value per row `[B]`.

    Args:
        delta: δ, in the units of the loss, > 0. If the target is scaled, this is its standard deviation.
    Example:
        >>> huber(delta=1.0)(torch.tensor([[3.0], [0.5]]), torch.tensor([0.0, 0.0]))
        tensor([2.5000, 0.1250])

    Reference: Huber, Robust Estimation of a Location Parameter, 1964.
    """

    delta: float = bounded_number(1.0, above=0)

    def __post_init__(self) -> None:
        check_fields(self)

    def __call__(self, output: Tensor, y: Tensor) -> Tensor:
        """The loss of each row.

        Args:
            output: predictions, in the shape of `y` up to axes of length 1.
            y: targets `[B]` or `[B, n]`.
        """
        error = (aligned(output, y) - y).abs()
        beyond = self.delta * (error - 0.5 * self.delta)
        return row_means(torch.where(error <= self.delta, 0.5 * error.square(), beyond))


@dataclass(frozen=True, repr=False)
class quantile(Value):
    """The loss max(q e, (q − 1) e) of e = y − output, one value per row `[B]`. Its best constant is the q-quantile.

    Args:
        q: the probability, in (0, 1).
    Example:
        >>> quantile(0.9)(torch.tensor([[0.0], [0.0]]), torch.tensor([1.0, -1.0]))
        tensor([0.9000, 0.1000])

    Reference: Koenker and Bassett, Regression Quantiles, 1978.
    """

    q: float = bounded_number(0.5, above=0, below=1)

    def __post_init__(self) -> None:
        check_fields(self)

    def __call__(self, output: Tensor, y: Tensor) -> Tensor:
        """The loss of each row.

        Args:
            output: predictions, in the shape of `y` up to axes of length 1.
            y: targets `[B]` or `[B, n]`.
        """
        error = y - aligned(output, y)
        return row_means(torch.maximum(self.q * error, (self.q - 1) * error))


def single_logit(output: Tensor, y: Tensor) -> bool:
    """Whether the output has one number for each target: the shapes differ at most by axes of length 1."""
    return output.dim() > 0 and same_axes(output.shape, y.shape)


@dataclass(frozen=True)
class Loss:
    """A loss with a declaration of the way in which it treats the rows of a batch.

    Args:
        fn: (output, y) → one value per row `[B]`.
        couples: whether the value of a row depends on the other rows of its batch. The rows of a step are then never
            padded, and never divided into several passes. A probe of a few rows finds most such losses.
    Example:
        >>> Loss(mse, couples=True)(torch.tensor([3.0]), torch.tensor([1.0]))
        tensor([4.])
    """

    fn: PerExample
    couples: bool = False

    def __call__(self, output: Tensor, y: Tensor) -> Tensor:
        return self.fn(output, y)


@dataclass(frozen=True)
class ClassWeighted:
    """A loss times the weight of the row's class: w[y] ℓ(output, y), one value per row `[B]`.

    Args:
        loss: the loss ℓ of one class per row.
        weights: the weight of each class, ≥ 0.
    Example:
        >>> ClassWeighted(cross_entropy(), (1.0, 3.0))(torch.zeros(1, 2), torch.tensor([1]))
        tensor([2.0794])
    """

    loss: PerExample
    weights: tuple[float, ...]

    def __call__(self, output: Tensor, y: Tensor) -> Tensor:
        return self.loss(output, y) * output.new_tensor(self.weights)[y.long()]


LOSSES: Mapping[str, PerExample] = {
    "cross_entropy": cross_entropy(),
    "binary_cross_entropy": binary_cross_entropy,
    "mse": mse,
    "mae": mae,
    "huber": huber(),
    "poisson": poisson,
    "cox": cox,
}
# The constructors of the grammar.
LOSS_VALUES: Mapping[str, Callable[..., PerExample]] = {
    "cross_entropy": cross_entropy,
    "huber": huber,
    "quantile": quantile,
}


def of_regression(loss: PerExample) -> bool:
    """Whether a loss is one of atoll's own for targets of numbers."""
    return isinstance(loss, (huber, quantile)) or any(loss is own for own in (mse, mae, poisson, cox))


def built_in(loss: PerExample) -> bool:
    """Whether a loss is one of atoll's own, which never draws. Only `cox` couples rows."""
    loss = loss.loss if isinstance(loss, ClassWeighted) else loss
    return isinstance(loss, (cross_entropy, huber, quantile)) or any(loss is own for own in LOSSES.values())


def couples_rows(loss: str | PerExample) -> bool:
    """Whether a loss declares that the value of a row depends on the other rows of its batch."""
    return loss == "cox" or loss is cox or (isinstance(loss, Loss) and (loss.couples or couples_rows(loss.fn)))


def name_of_loss(loss: str | PerExample) -> str:
    """The text of a loss: its name or its call, from which `loss_of` builds it; `module:name` for other functions.

    Example:
        >>> name_of_loss(poisson), name_of_loss(quantile(0.9))
        ('poisson', 'quantile(0.9)')
    """
    if isinstance(loss, str):
        return loss
    names = [name for name, own in LOSSES.items() if own is loss]
    kind = loss if hasattr(loss, "__qualname__") else type(loss)
    return names[0] if names else repr(loss) if built_in(loss) else f"{kind.__module__}:{kind.__qualname__}"


def is_named(text: object) -> bool:
    """Whether a text is a name in `LOSSES`, or a call of a loss of the grammar."""
    return isinstance(text, str) and (text in LOSSES or text.partition("(")[0] in LOSS_VALUES)


def loss_of(loss: str | PerExample) -> PerExample:
    """The loss of a name, of a text of the grammar, or the function itself.

    Raises:
        UsageError: an unknown name, or a loss of `torch.nn` that returns a mean or a sum.
    Example:
        >>> loss_of("cross_entropy(axis=1)")
        cross_entropy(axis=1)
    """
    if isinstance(loss, Loss):
        return loss_of(loss.fn)
    if not isinstance(loss, str):
        refuse_reduction(loss)
        return loss
    if loss in ("quantile", "quantile()"):
        given, why = "The loss quantile without q.", "it is the quantile that the model predicts."
        raise UsageError(given, "q between 0 and 1.", why, Change("loss", "quantile(0.9)"))
    if loss in LOSSES:
        return LOSSES[loss]
    if "(" in loss:
        return parse(loss, LOSS_VALUES, kind="loss")  # type: ignore[no-any-return]
    raise unknown_name("loss", loss, (*LOSSES, "quantile(0.9)"), lambda near: Change("loss", near))


def axis_of(loss: PerExample) -> int | None:
    """The axis of the classes that a loss names; None: the loss finds it from the shapes."""
    loss = loss.loss if isinstance(loss, ClassWeighted) else loss
    return loss.axis if isinstance(loss, cross_entropy) else 1 if isinstance(loss, _LABELS) else None


def values_of(function: PerExample, output: Any, y: Tensor, name: str = "loss") -> Tensor:
    """Call a loss or a metric, and require one value for each row.

    A loss of `torch.nn` gets the output in the shape of the targets, or with the classes on axis 1. Its values are
    averaged over all axes within a row.

    Args:
        function: (output, y) → one value per row.
        output: of the model, `[B, …]`.
        y: targets `[B, …]`.
        name: of the function, for errors.
    Returns:
        Floats `[B]`. Boolean and integer values become floats.
    Raises:
        UsageError: the function returned no tensor, another shape, or a tensor on another device.
    Example:
        >>> values_of(nn.L1Loss(reduction="none"), torch.zeros(2, 1), torch.ones(2))
        tensor([1., 1.])
    """
    each = _of_torch(function, output, y) if isinstance(function, _Loss) else function(output, y)
    if not isinstance(each, Tensor) or each.shape != y.shape[:1] or each.device != y.device or each.is_complex():
        raise _refused_values(function, each, output, y, name)
    return each if each.is_floating_point() else each.to(torch.float32)


_LABELS = (nn.CrossEntropyLoss, nn.NLLLoss)
_ENTRIES = (
    nn.L1Loss,
    nn.MSELoss,
    nn.SmoothL1Loss,
    nn.HuberLoss,
    nn.BCELoss,
    nn.BCEWithLogitsLoss,
    nn.PoissonNLLLoss,
    nn.SoftMarginLoss,
    nn.KLDivLoss,
)


def _of_torch(loss: _Loss, output: Tensor, y: Tensor) -> Tensor:
    """The values of a loss of `torch.nn`, one for each row if it has an axis for rows."""
    check_output(output)
    if isinstance(loss, _LABELS) and not y.is_floating_point():
        at, y = class_axis(output, y, 1)
        each: Tensor = loss(output.movedim(at, 1), y)
        return each if each.dim() < 2 else labelled_means(each, y != loss.ignore_index)
    if isinstance(loss, _ENTRIES):
        y = y if y.is_floating_point() else y.to(output.dtype)
        output = aligned(output, y)
    return row_means(loss(output, y))


def refuse_reduction(loss: Any) -> None:
    """Refuse a loss of `torch.nn` that returns the mean or the sum over rows.

    Raises:
        UsageError: the error has the same constructor call with `reduction="none"`.
    """
    if isinstance(loss, _Loss) and loss.reduction != "none":
        raise UsageError(
            f"loss = {type(loss).__name__}(reduction={loss.reduction!r}).",
            'reduction="none": one value for each row.',
            "clients are averaged with the number of their rows as weights, and padding rows must not count.",
            _unreduced(loss),
        )


def _unreduced(loss: _Loss) -> str:
    """The constructor call of a loss of `torch.nn`, with `reduction="none"`."""
    words = []
    parameters = inspect.signature(type(loss)).parameters
    if "reduction" not in parameters:
        return 'loss.reduction = "none"'
    for name, parameter in parameters.items():
        value = vars(loss).get(name, loss._buffers.get(name))
        if isinstance(value, Tensor):
            words.append(f"{name}=torch.tensor({value.tolist()})")
        elif isinstance(value, (int, float, bool)) and value != parameter.default:
            words.append(f"{name}={value!r}")
    words.append('reduction="none"')
    of_torch = type(loss).__module__.startswith("torch.nn.")
    return f"{'nn.' if of_torch else ''}{type(loss).__name__}({', '.join(words)})"


def _refused_values(function: PerExample, each: Any, output: Any, y: Tensor, name: str) -> UsageError:
    """The error for a loss or a metric that does not return one value for each row."""
    rows = len(y)
    answer = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
    if not isinstance(each, Tensor):
        given = f"The {name} of {rows} rows is {'None' if each is None else f'a {type(each).__name__}'}"
    elif each.shape != y.shape[:1]:
        given = f"The {name} of {rows} rows has shape {tuple(each.shape)}"
    elif each.is_complex():
        given = f"The {name} of {rows} rows is complex ({each.dtype})"
    else:
        given = f"The {name} of {rows} rows is on the device {each.device}, the rows are on {y.device}"
    called = getattr(function, "__name__", "")
    functional = called and getattr(F, called, None) is function
    return UsageError(
        f"{given}; the model returned {answer} for targets of shape {tuple(y.shape)}.",
        f"one value a row: shape ({rows},).",
        "clients are averaged with the number of their rows as weights.",
        f'lambda output, y: torch.nn.functional.{called}(output, y, reduction="none")' if functional else "",
    )
