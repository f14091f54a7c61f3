"""A state as named plain tensors, and back: what a checkpoint holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load, save
from torch import Tensor

from atoll.engine.ranks import Ranks
from atoll.plan import stop as stops
from atoll.plan.in_flight import Air, Flight
from atoll.plan.slots import Broadcast, Shared
from atoll.plan.state import Sent, State
from atoll.task import Model

if TYPE_CHECKING:
    from atoll.training import Rounds

_WHOLE = torch.int64


def pack(state: State) -> dict[str, Tensor]:
    """Everything of a state but what clients keep, which is a store of its own, and its round and seed."""
    model = state.model
    out = {"model/theta": model.theta, "model/buffers": model.buffers}
    out |= _under("counters", model.counters) | _under("fixed", model.fixed)
    out |= _under("optimizer", state.optimizer) | _shared("server", state.server)
    if state.sent is not None:
        out |= {"sent/theta": state.sent.theta, "sent/deltas": torch.tensor(state.sent.deltas, dtype=_WHOLE)}
    for birth, version in state.versions.items():
        out |= _model(f"version/{birth}", version.model) | _shared(f"version/{birth}/shared", version.shared)
    air = state.air
    # Where somebody stops half way nobody flies on: a share need not be saved.
    out["air/flights"] = torch.tensor([f[:-1] for f in air.flights], dtype=_WHOLE).reshape(-1, len(Flight._fields) - 1)
    out["air/counts"] = torch.tensor((air.target, air.started, *air.place), dtype=_WHOLE)
    out["air/idle"] = torch.tensor(air.idle, dtype=_WHOLE)
    out["air/recent"] = torch.tensor(air.recent, dtype=_WHOLE).reshape(-1, 2)
    if air.known is not None:
        out["air/known"] = air.known
    if air.clock is not None:
        out |= _under("clock", air.clock if isinstance(air.clock, Mapping) else air.clock.tensors())
    return out


def unpack(tensors: Mapping[str, Tensor], round: int, training: Rounds) -> State:
    """The state that `pack` was called on, for a training of the same plan and seed."""
    at = training.state
    device = at.model.theta.device
    tensors = {n: t.to(device) if _computed(n, t) else t for n, t in tensors.items()}
    versions = {
        birth: Broadcast(
            birth, _read(tensors, f"version/{birth}"), _parts(tensors, f"version/{birth}/shared", at.server)
        )
        for birth in sorted({int(n.split("/")[1]) for n in tensors if n.startswith("version/")})
    }
    sent = None
    if "sent/theta" in tensors:
        sent = Sent(tensors["sent/theta"], tuple(tensors["sent/deltas"].tolist()))
    return State(
        round,
        at.seed,
        Model(tensors["model/theta"], tensors["model/buffers"], _group(tensors, "counters"), _group(tensors, "fixed")),
        _group(tensors, "optimizer"),
        _parts(tensors, "server", at.server),
        at.memory,
        _air(tensors),
        versions,
        sent,
    )


def _computed(name: str, tensor: Tensor) -> bool:
    """Whether a tensor of a state lies where it is computed with: models, and all that is no single number."""
    group = name.partition("/")[0]
    return group != "air" and (tensor.dim() > 0 or group in ("model", "version", "counters", "fixed"))


def share(training: Rounds, ranks: Ranks) -> None:
    """Where rank 0 stands there all ranks stand: its state, what its clients keep, and what its rules remember."""
    t, tensors = training, {}
    if ranks.first:
        ids = t.memory.touched()
        facts = {n: getattr(t, n) for n in ("watch", "seconds", "bytes_up", "bytes_down")}
        told = {"round": t.state.round, "outcome": t.outcome, "facts": facts}
        tensors = {**_under("state", pack(t.state)), **_under("rows", t.memory.take(ids)), "ids": ids}
        tensors = {n: tensor.cpu().clone(memory_format=torch.contiguous_format) for n, tensor in tensors.items()}
        tensors["told"] = torch.frombuffer(bytearray(json.dumps(told).encode()), dtype=torch.uint8)
    heard = load(ranks.told(save(tensors) if ranks.first else b""))
    if ranks.first:
        return
    told = json.loads(heard["told"].numpy().tobytes())
    t.state = unpack(_group(heard, "state"), told["round"], t)
    t.memory.put(heard["ids"], _group(heard, "rows"))
    t.outcome = None if told["outcome"] is None else stops.Outcome(*told["outcome"])
    for name, value in told["facts"].items():
        setattr(t, name, value)


def _air(tensors: Mapping[str, Tensor]) -> Air:
    target, started, *place = tensors["air/counts"].tolist()
    return Air(
        tuple(Flight(*row) for row in tensors["air/flights"].tolist()),
        target,
        started,
        (place[0], place[1]),
        (),
        tuple(tensors["air/idle"].tolist()),
        tuple((client, birth) for client, birth in tensors["air/recent"].tolist()),
        tensors.get("air/known"),
        _group(tensors, "clock") or None,
    )


def _under(group: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{group}/{n}": t for n, t in tensors.items()}


def _group(tensors: Mapping[str, Tensor], group: str) -> dict[str, Tensor]:
    return {n.removeprefix(f"{group}/"): t for n, t in tensors.items() if n.startswith(f"{group}/")}


def _shared(group: str, shared: Shared) -> dict[str, Tensor]:
    return {name: t for part, tensors in shared.items() for name, t in _under(f"{group}/{part}", tensors).items()}


def _parts(tensors: Mapping[str, Tensor], group: str, like: Shared) -> dict[str, dict[str, Tensor]]:
    return {part: _group(tensors, f"{group}/{part}") for part in like}


def _model(group: str, model: Model) -> dict[str, Tensor]:
    whole = {f"{group}/theta": model.theta, f"{group}/buffers": model.buffers}
    return whole | _under(f"{group}/counters", model.counters) | _under(f"{group}/fixed", model.fixed)


def _read(tensors: Mapping[str, Tensor], group: str) -> Model:
    counters, fixed = _group(tensors, f"{group}/counters"), _group(tensors, f"{group}/fixed")
    return Model(tensors[f"{group}/theta"], tensors[f"{group}/buffers"], counters, fixed)
