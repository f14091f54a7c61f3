"""Converts a state to named plain tensors, the content of a checkpoint, and back.

Tests: tests/faults/test_folder.py
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from atoll.base.names import under, without_prefix
from atoll.compute.model_state import Model
from atoll.plan.in_flight import Flight, InFlight
from atoll.plan.protocols import Broadcast, Shared
from atoll.plan.state import SHARED, DownlinkState, State

_WHOLE = torch.int64


def model_to_tensors(model: Model) -> dict[str, Tensor]:
    """Name the tensors of a model as `state_to_tensors` does. They are the model's own tensors."""
    whole = {"model/theta": model.theta, "model/buffers": model.buffers}
    return whole | under("counters/", model.counters) | under("fixed/", model.fixed)


def model_from_tensors(tensors: Mapping[str, Tensor]) -> Model:
    """The inverse of `model_to_tensors`; the tensors may contain others, such as those of a state."""
    counters, fixed = without_prefix(tensors, "counters/"), without_prefix(tensors, "fixed/")
    return Model(tensors["model/theta"], tensors["model/buffers"], counters, fixed)


def state_to_tensors(state: State) -> dict[str, Tensor]:
    """Convert a state to named tensors. They do not include rows of the client memory, the round and the seed.

    The memory with which every client begins is included; one number stands for a tensor of zeros.
    """
    out = model_to_tensors(state.model)
    out |= under("optimizer/", state.optimizer) | _shared("server", state.server)
    out |= under("first/", {n: t if bool(t.any()) else t.new_zeros(()) for n, t in state.memory.first.items()})
    if state.sent is not None:
        out |= {"sent/theta": state.sent.theta, "sent/deltas": torch.tensor(state.sent.deltas, dtype=_WHOLE)}
        joined = bytearray(b"".join(state.sent.messages))
        out["sent/messages"] = (
            torch.frombuffer(joined, dtype=torch.uint8) if joined else torch.empty(0, dtype=torch.uint8)
        )
    for version, broadcast in state.versions.items():
        out |= _model(f"version/{version}", broadcast.model) | _shared(f"version/{version}/shared", broadcast.shared)
    air = state.air
    # The last field, the share of the work, is not saved: paces with partial work keep no client in flight.
    out["air/flights"] = torch.tensor([f[:-1] for f in air.flights], dtype=_WHOLE).reshape(-1, len(Flight._fields) - 1)
    out["air/counts"] = torch.tensor((air.target, air.started, *air.place), dtype=_WHOLE)
    out["air/idle"] = torch.tensor(air.idle, dtype=_WHOLE)
    out["air/recent"] = torch.tensor(air.recent, dtype=_WHOLE).reshape(-1, 2)
    if air.known is not None:
        out["air/known"] = air.known
    if air.clock is not None:
        out |= under("clock/", air.clock if isinstance(air.clock, Mapping) else air.clock.tensors())
    return out


def state_from_tensors(tensors: Mapping[str, Tensor], round: int, at: State) -> State:
    """The inverse of `state_to_tensors`.

    Args:
        tensors: the result of `state_to_tensors`.
        round: the round of the returned state.
        at: any state of the same plan and seed, a template. It supplies the three values that `tensors` does not
            contain: the seed, the rows of the client memory and the device.
    Returns:
        A new state with the values of `tensors`. It shares the client memory with `at`. The memory with which clients
        begin becomes that of `tensors`, since a model of other weights may have given `at` another one.
    """
    first = without_prefix(tensors, "first/")
    at.memory.first.update({n: t.expand_as(at.memory.first[n]).clone() for n, t in first.items()})
    device = at.model.theta.device
    tensors = {n: t.to(device) if _computed(n, t) else t for n, t in tensors.items()}
    versions = {
        version: Broadcast(
            version, _read(tensors, f"version/{version}"), _parts(tensors, f"version/{version}/shared", SHARED)
        )
        for version in sorted({int(n.split("/")[1]) for n in tensors if n.startswith("version/")})
    }
    sent = None
    if "sent/theta" in tensors:
        lengths = tuple(tensors["sent/deltas"].tolist())
        sent = DownlinkState(tensors["sent/theta"], lengths, _messages(tensors["sent/messages"], lengths))
    return State(
        round,
        at.seed,
        model_from_tensors(tensors),
        without_prefix(tensors, "optimizer/"),
        _parts(tensors, "server", at.server),
        at.memory,
        _air(tensors),
        versions,
        sent,
    )


def _messages(joined: Tensor, lengths: Sequence[int]) -> tuple[bytes, ...]:
    """The messages of these lengths in a vector of bytes; empty messages if it has none."""
    if not len(joined):
        return (b"",) * len(lengths)
    return tuple(part.numpy().tobytes() for part in joined.cpu().split(list(lengths)))


def _computed(name: str, tensor: Tensor) -> bool:
    """Whether a tensor of a state is stored on the device of the task: models, and tensors of several numbers."""
    group = name.partition("/")[0]
    return group != "air" and (tensor.dim() > 0 or group in ("model", "version", "counters", "fixed"))


def _air(tensors: Mapping[str, Tensor]) -> InFlight:
    target, started, *place = tensors["air/counts"].tolist()
    return InFlight(
        tuple(Flight(*row) for row in tensors["air/flights"].tolist()),
        target,
        started,
        (place[0], place[1]),
        (),
        tuple(tensors["air/idle"].tolist()),
        tuple((client, version) for client, version in tensors["air/recent"].tolist()),
        tensors.get("air/known"),
        without_prefix(tensors, "clock/") or None,
    )


def _shared(group: str, shared: Shared) -> dict[str, Tensor]:
    return {name: t for part, tensors in shared.items() for name, t in under(f"{group}/{part}/", tensors).items()}


def _parts(tensors: Mapping[str, Tensor], group: str, like: Iterable[str]) -> dict[str, dict[str, Tensor]]:
    return {part: without_prefix(tensors, f"{group}/{part}/") for part in like}


def _model(group: str, model: Model) -> dict[str, Tensor]:
    whole = {f"{group}/theta": model.theta, f"{group}/buffers": model.buffers}
    return whole | under(f"{group}/counters/", model.counters) | under(f"{group}/fixed/", model.fixed)


def _read(tensors: Mapping[str, Tensor], group: str) -> Model:
    counters, fixed = without_prefix(tensors, f"{group}/counters/"), without_prefix(tensors, f"{group}/fixed/")
    return Model(tensors[f"{group}/theta"], tensors[f"{group}/buffers"], counters, fixed)
