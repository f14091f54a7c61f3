"""The rules for code of users, and the facts that a probe on real rows finds before the first round.

Each thing that user code brings is carried, reset for each client, or refused with its name. `RULES` lists them; the
page docs/what_runs.md is generated from it. A module, a loss and metrics of the user may draw random numbers, may
relate the rows of a batch to each other, and may change attributes. `Findings` states this for one task. The backends
read it; `atoll.engine.choose_backend` fills it.

Tests: tests/conformance/test_user_code.py, tests/surface/test_what_runs.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import nn

from atoll.base.errors import RunError
from atoll.base.lines import Change

PASSES = ("training", "evaluation")
_ZOO = "tests/conformance/test_user_code.py"
_BUFFERS = "tests/identities/test_buffers.py"
_DRAWS = "tests/identities/test_draws.py"
_SHAPES = "tests/identities/test_shapes.py"
_FIELDS = "tests/data/test_fields.py"
_MEMORY = "tests/identities/test_custom_memory.py"


class Rule(NamedTuple):
    """A rule for one thing that code of users may do.

    Args:
        code: the thing.
        outcome: `"carried"`, `"reset"` for each client, or `"refused"`.
        backend: the backends that train such code; empty if it is refused.
        write: the line to write instead, or a setting; may be empty.
        test: the file that tests the rule.
    """

    code: str
    outcome: Literal["carried", "reset", "refused"]
    backend: str
    write: str
    test: str


ALL, LOOP, LANES = "all", "loop", "lanes, loop"
RULES: tuple[Rule, ...] = (
    Rule("Trained parameters, of any number of axes and of size 0", "carried", ALL, "", _ZOO),
    Rule("Frozen parameters, and buffers of any dtype, also complex ones", "carried", LANES, "", _ZOO),
    Rule("A trained parameter that is complex", "refused", "", "torch.view_as_real(tensor)", _ZOO),
    Rule("A float buffer that no pass changes", "carried", LANES, "", _BUFFERS),
    Rule("A float buffer that passes change: its mean", "carried", LANES, 'buffers={"*": "mean"}', _BUFFERS),
    Rule("A float buffer of norm 1: its mean, of norm 1", "carried", LANES, 'buffers={"*": "unit"}', _BUFFERS),
    Rule("A constant buffer that a client changes later", "refused", "", 'buffers={"NAME": "mean"}', _BUFFERS),
    Rule("A buffer with `persistent=False`", "carried", LANES, "", _BUFFERS),
    Rule("A buffer that a pass replaces by a tensor of the same shape", "carried", LANES, "", _ZOO),
    Rule("A buffer that a pass replaces by a tensor of another shape", "refused", "", "", _ZOO),
    Rule("An integer buffer: the largest value of the clients", "carried", LANES, 'buffers={"*": "keep"}', _ZOO),
    Rule("Extra state (`get_extra_state`)", "carried", ALL, "", _ZOO),
    Rule("Extra state that a pass changes", "refused", "", "self.register_buffer(name, tensor)", _ZOO),
    Rule("Tied weights and shared submodules", "carried", LANES, "", _ZOO),
    Rule("Pruning, and weight or spectral norm by a hook of `torch.nn.utils`", "carried", LOOP, "", _ZOO),
    Rule("Parametrizations of `torch.nn.utils.parametrizations`", "carried", LANES, "", _ZOO),
    Rule("A scripted module", "carried", LOOP, "", _ZOO),
    Rule("Hooks of modules", "carried", LANES, "", _ZOO),
    Rule("A hook on the gradient of a parameter", "carried", LOOP, "", _ZOO),
    Rule("A hook after the accumulation of a gradient", "refused", "", "parameter.register_hook(fn)", _ZOO),
    Rule("A submodule that came in evaluation mode stays there", "carried", LANES, "", _ZOO),
    Rule("A model that came in evaluation mode trains, with a note", "carried", LANES, "", _BUFFERS),
    Rule("A row that is a dict of tensors: `forward` gets each by its keyword", "carried", LANES, "", _FIELDS),
    Rule("A row whose x is a tuple of tensors", "refused", "", '{"a": x[0], "b": x[1]}', _FIELDS),
    Rule("Memory of a client in a loop of your own", "carried", LOOP, "Custom(fn, memory=make)", _MEMORY),
    Rule("An attribute that a pass changes, without effect on the next pass", "reset", LOOP, "", _ZOO),
    Rule(
        "An attribute that a pass changes, with effect on the next pass",
        "refused",
        "",
        "self.register_buffer(name, tensor)",
        _ZOO,
    ),
    Rule(
        "A computed tensor as attribute that no pass computes again",
        "refused",
        "",
        "self.register_buffer(name, tensor)",
        _ZOO,
    ),
    Rule("A random generator as an attribute", "refused", "", "torch.randn_like(x)", _ZOO),
    Rule("Dropout of torch, in training mode", "carried", LANES, "", "tests/identities/test_dropout.py"),
    Rule("Other draws of the module, the loss or a metric, keyed for each call", "carried", LOOP, "", _DRAWS),
    Rule("Draws of a Dataset, keyed for each row and pass", "carried", "fused, lanes, loop", "", _DRAWS),
    Rule("Draws that no call before the first round shows", "refused", "", "draws=True", _DRAWS),
    Rule("A row whose value depends on the other rows of its batch", "carried", LANES, "Loss(fn, couples=True)", _ZOO),
    Rule("A loss with trainable weights", "refused", "", "model.weights = nn.Parameter(weights)", _ZOO),
    Rule("A loss with constant buffers", "carried", LANES, "", _ZOO),
    Rule("A loss or metric whose buffer a call changes", "refused", "", "model.register_buffer(name, tensor)", _ZOO),
    Rule("A loss or metric without a number for each row", "refused", "", 'nn.MSELoss(reduction="none")', _SHAPES),
    Rule("`no_grad`, `inference_mode`, `autocast`, default dtype and device of the caller", "carried", ALL, "", _DRAWS),
)


@dataclass(frozen=True)
class Findings:
    """The facts about the user's code in a task. The defaults are those of code without a finding.

    Args:
        draws: the passes that draw from a global generator: `"training"`, `"evaluation"` or both. Keyed dropout does
            not count. If a pass draws, each call has its own keyed scope, in the loop.
        couples: the causes by which the value of a row depends on other rows of its batch, as short texts. If there is
            one, no row of a batch may be padding, and a batch is one pass.
        couples_in_evaluation: the same for passes in evaluation mode, and for metrics.
        state: the paths of attributes that a pass changes without an effect on the next pass: a cache, or a record.
            They are reset for each client.
        output: the shape of the model's output for one row; None: unknown, or the output is no tensor.
        target: the shape of the target of one row; None: unknown.
        constant: the names of float buffers that no pass of the probe changes.
        probed: whether a probe has run. Built-in models with built-in losses and metrics need none.
        built_in: whether the model, the loss and the metrics are those of atoll.
    Example:
        >>> Findings(draws=("training",)).couples
        ()
    """

    draws: tuple[str, ...] = ()
    couples: tuple[str, ...] = ()
    couples_in_evaluation: tuple[str, ...] = ()
    state: tuple[str, ...] = ()
    output: tuple[int, ...] | None = None
    target: tuple[int, ...] | None = None
    constant: tuple[str, ...] = ()
    probed: bool = False
    built_in: bool = False


def known(module: nn.Module) -> Findings:
    """The findings that follow from torch's own layers, before a probe: batch norm couples the rows of a batch.

    Args:
        module: the model; all its submodules are inspected.
    Example:
        >>> known(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))).couples
        ('BatchNorm1d',)
    """
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    return Findings(couples=tuple(sorted({type(m).__name__ for m in norms})))


def missed_draw(round: int) -> RunError:
    """The error for code that drew in a round, although no call before the first round did."""
    return RunError(
        f"Code of the model, the loss, a metric or the data set drew from a global random generator in round {round}.",
        "draws that a call before the first round shows, or the setting draws.",
        "only known draws are keyed; others depend on the rest of the program, and a resumed run would differ.",
        Change("draws", True),
    )
