"""The terms of a run: the facts that a site needs to build the same task as the server. They travel as one blob.

Tests: tests/faults/test_rehearsal.py
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import replace
from hashlib import sha256
from typing import Annotated, Any, Literal

import msgspec
import torch
from msgspec import Meta

from atoll import models
from atoll.base.errors import UsageError
from atoll.base.grammar import parse
from atoll.base.lines import Line, Part, Write
from atoll.base.random import Key
from atoll.compute.layout import Layout
from atoll.compute.loss import LOSSES, ClassWeighted, PerExample, built_in, loss_of
from atoll.compute.metrics import METRICS, metrics_of
from atoll.compute.task import Task
from atoll.data.input import Input
from atoll.data.schema import Schema
from atoll.engine.check_answers import sum_lengths
from atoll.plan.plan import Plan
from atoll.plan.registry import PARTS

MAX_TERMS = 16 << 20
_DTYPES = {"float32": torch.float32, "float64": torch.float64}
Own = Mapping[str, Callable[..., Any]]


class RefusedError(UsageError):
    """A site does not compute work.

    Args:
        code: the code of the `Refusal`.
        given, required, why, write: the parts of the error.
        public: the reason that the server receives, without values of rows; None: `given` and `required`.
    """

    def __init__(
        self, code: str, given: str, required: str = "", why: str = "", write: Write = "", public: str | None = None
    ) -> None:
        super().__init__(given, required, why, write)
        self.code = code
        reason = "\n".join(filter(None, (given, required and f"Required: {required}")))
        self.public = reason if public is None else public


class Terms(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The terms of a run.

    Args:
        schema: the text of a `Schema`.
        input: the JSON of the `Input`.
        model, loss, metrics: names; a site maps a name that is not atoll's own to its own code.
        dtype, precision: as in `atoll.Settings`.
        held_out: the fraction of its rows that a site holds out.
        min_rows: the least number of train rows of a site.
        seed: the seed of the draw of held-out rows, in decimal digits.
        clients: the clients of a closed run, or the least number of clients of an open run.
        class_weight: the factor of the loss of each class; empty: 1.
        scaled: whether a site scales its rows by the statistics of the input; false while they are gathered.
    """

    schema: str
    input: str
    model: Annotated[str, Meta(max_length=200)]
    loss: Annotated[str, Meta(max_length=200)]
    metrics: Annotated[tuple[Annotated[str, Meta(max_length=200)], ...], Meta(max_length=64)]
    dtype: Literal["float32", "float64"]
    precision: Literal["full", "bf16"]
    held_out: Annotated[float, Meta(ge=0, lt=1)] = 0.2
    min_rows: Annotated[int, Meta(ge=1)] = 2
    seed: Annotated[str, Meta(pattern=r"\A-?[0-9]{1,40}\Z")] = "0"
    clients: Annotated[int, Meta(ge=1)] = 1
    class_weight: Annotated[tuple[Annotated[float, Meta(ge=0)], ...], Meta(max_length=1 << 16)] = ()
    scaled: bool = True

    def encode(self) -> bytes:
        """The terms as JSON. Equal terms have equal bytes."""
        return msgspec.json.encode(self)

    @classmethod
    def decode(cls, data: bytes) -> Terms:
        """The inverse of `encode`.

        Raises:
            RefusedError: the bytes are no terms.
        """
        try:
            return msgspec.json.decode(data, type=Terms)
        except msgspec.MsgspecError:
            raise RefusedError("input", "The terms of the run cannot be read.", "terms of this version.") from None

    @classmethod
    def of(
        cls,
        task: Task,
        schema: Schema,
        model: str | None,
        held_out: float = 0.2,
        min_rows: int = 2,
        seed: int = 0,
        clients: int = 1,
        scaled: bool = True,
    ) -> Terms:
        """The terms of a task.

        Args:
            task: the task of the server.
            schema: the schema of the data.
            model: the name of the model; None: it was built from an object.
            held_out, min_rows, seed, clients, scaled: as in the terms.
        Raises:
            UsageError: the model, the loss or a metric has no name.
        """
        if model is None:
            raise UsageError(
                "The model of a network is an object.",
                "the name of a model.",
                "no code travels: each site builds the model from its name.",
                Line(python='atoll.serve("mlp", data, plan, home="federation")'),
            )
        model = model.rpartition(":")[2]  # a site maps the bare name to its own code
        whole = task.loss if isinstance(task.loss, ClassWeighted) else ClassWeighted(task.loss, ())
        loss, weights = _loss_text(whole.loss), whole.weights
        metrics = tuple(metric.name for metric in task.metrics)
        dtype: Any = str(task.layout.dtype).removeprefix("torch.")
        precision: Any = task.precision
        given = schema.described(dtype).encode().decode()
        share = float(held_out), min_rows, str(seed), clients, weights, scaled
        return cls(schema.text(), given, model, loss, metrics, dtype, precision, *share)

    def task(self, device: torch.device, own: Own, seed: int = 0) -> Task:
        """Build the task at a site.

        Args:
            device: the device of the site.
            own: the site's own code by name.
            seed: of the first weights; with that of the run they are those of the server.
        Raises:
            RefusedError: a name is unknown at this site, or its code does not fit.
        """
        schema, dtype = Schema.read(self.schema), _DTYPES[self.dtype]
        model: Any = own.get(self.model) or (self.model if self.model in models.names() else None)
        if model is None:
            raise _unmapped("model", self.model, "--model-as")
        loss: Any = own.get(self.loss)
        if loss is None:
            try:
                loss = loss_of(self.loss)
            except UsageError:
                raise _unmapped("loss", self.loss, "--part") from None
        if self.class_weight:
            if len(self.class_weight) != len(schema.classes or ()):
                raise RefusedError("input", "The run has weights of other classes.", "a weight for each class.")
            loss = ClassWeighted(loss, self.class_weight)
        metrics: list[Any] = [own.get(name) or (name if name in METRICS else None) for name in self.metrics]
        for name, metric in zip(self.metrics, metrics, strict=True):
            if metric is None:
                raise _unmapped("metric", name, "--part")
        module = models.resolve(model, schema.without_clients(), Key(seed).fold("model"), dtype)
        judged = metrics_of(metrics, loss, Input.decode(self.input.encode(), "The input of the run"))
        task = replace(Task.of(module, loss, judged, dtype), precision=self.precision).on(device)
        if isinstance(model, str) and task.built_in:
            task = replace(task, findings=replace(task.findings, probed=True))
        return replace(task, lengths=sum_lengths(task, schema.synthetic()))


def _loss_text(loss: PerExample) -> str:
    """The text from which a site builds the loss.

    Raises:
        UsageError: the loss has no name.
    """
    for name, known in LOSSES.items():
        if known is loss:
            return name
    text: str = repr(loss) if built_in(loss) else getattr(loss, "__name__", "")
    if built_in(loss) and loss_of(text) != loss:
        text = ""
    if not text:
        raise UsageError(f"The loss {loss!r:.100} has no name.", "a named loss.", "no code travels.", "cross_entropy")
    return text


def layout_hash(layout: Layout) -> bytes:
    """The hash of a layout: both sides read θ by name and shape."""
    return sha256(f"{layout.dtype} {layout.entries!r}".encode()).digest()


def plan_text(plan: Plan) -> str:
    """The text of a plan with bare names. A site maps the names of other parts than atoll's to its own code.

    Raises:
        UsageError: a part is a function, its `repr` is no constructor call, or it has the name of a part of atoll.
    """
    text, classes = repr(plan), _classes(plan)
    taken = [name for name, own in classes.items() if isinstance(PARTS.get(name), type) and PARTS[name] is not own]
    if taken:
        raise UsageError(
            f"{classes[taken[0]].__module__}:{taken[0]} on a network.",
            "a class with another name than the parts of atoll.",
            f"a site reads the plan by its names, and {taken[0]} is atoll's part there.",
        )
    try:
        built = parse(text, {**classes, **PARTS})
    except UsageError as error:
        raise UsageError(
            f"{text:.300} on a network: {error.given}",
            "parts of atoll, or classes to which each site has its own code.",
            "no code travels: each site builds the plan from its text.",
            Part("Train(sgd(0.1), epochs=1, batch=10)", "local") if ":" in repr(plan.local) else "",
        ) from error
    if built != plan:
        raise UsageError(f"The text {text!r:.300} builds another plan.", "parts whose `repr` builds an equal part.")
    return text


def _classes(value: Any) -> dict[str, Callable[..., Any]]:
    """The classes of the dataclasses in a value, by name."""
    if isinstance(value, (tuple, list)):
        return {name: cls for one in value for name, cls in _classes(one).items()}
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return {}
    inner = [getattr(value, field.name) for field in dataclasses.fields(value)]
    return {type(value).__name__: type(value), **_classes(inner)}


def read_plan(text: str, own: Own) -> Plan:
    """The plan of a text at a site.

    Raises:
        RefusedError: a name is unknown at this site.
    """
    try:
        plan = parse(text, {**PARTS, **own})
    except UsageError as error:
        raise RefusedError("part", error.given, error.required, error.why, "--part NAME=module:NAME") from error
    if not isinstance(plan, Plan):
        raise RefusedError("part", f"{text!r:.200} is no plan.", "a plan.")
    return plan


def bind_codecs(plan: Plan, layout: Layout) -> Plan:
    """The plan with codecs that know the layout of the server's vector. A site does not know the population.

    Args:
        plan: the plan.
        layout: the layout of the whole model.
    """
    layout = plan.local.server_layout(layout)
    return replace(plan, codec=plan.codec.bind(layout), downlink=plan.downlink.bind(layout))


def _unmapped(kind: str, name: str, flag: str) -> RefusedError:
    return RefusedError(
        "model" if kind == "model" else "part",
        f"The {kind} {name!r} is not one of atoll's own.",
        "a name of atoll, or a name that this site maps to its own code.",
        "no code travels.",
        f"{flag} {name}=my_site:{name}",
    )
