"""The messages between server and client, and their bytes. The page docs/wire.md describes the protocol.

    frame = b"ATOL" ‖ protocol u8 ‖ type u8 ‖ flags u16 = 0 ‖ length u32 ‖ body        (little-endian)
    body  = the fields of the message in order, as one MessagePack array

`encode_frame` makes a frame. `decode_up` reads a frame of a client, `decode_down` a frame of the server. Each field has
bounds. A frame is accepted only if `encode_frame` of its message gives the same bytes, so each message has exactly one
form. The length of a frame is checked before its body is read, and the length of a field before memory for it is
allocated. `FrameError` is the only exception that leaves a decoder.

A body of more than `MAX_INLINE` bytes travels by HTTP. Its message then contains a `Blob`: its hash and its length.

This module imports no I/O, no clock and no torch.

Tests: tests/faults/test_wire.py, tests/golden/test_wire_bytes.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import lru_cache
from hashlib import sha256
from struct import Struct as Packing
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

import msgspec
from msgspec import Meta

from atoll.base.errors import AtollError

PROTOCOL = 4
MAX_FRAME = 128 << 10
MAX_INLINE = 64 << 10
MAX_PLAN = 32 << 10
MAX_BLOB = 1 << 40
MAX_STEP = 1 << 28
MAX_WORKS = 1024
MAX_DELTAS = 1024
MAX_ROWS = 1 << 28  # the exact sum refuses a larger total weight
MAX_HEADER = 4 << 20
MAX_LEAVES = 1024  # clients of one relay
RELAYS = 1 << 30  # the numbers of relays begin here, and those of the clients of a relay that have none of the run yet

# 1. Fields

_NAME = r"\A[a-z0-9-]{1,64}\Z"  # $ also matches before a final newline
# No control character but a line end, and no character that changes the direction of a line on a terminal.
_PLAIN = r"\A[^\x00-\x09\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]*\Z"
Name: TypeAlias = Annotated[str, Meta(pattern=_NAME)]
Text: TypeAlias = Annotated[str, Meta(max_length=2000, pattern=_PLAIN)]
Version: TypeAlias = Annotated[str, Meta(pattern=r"\A[0-9A-Za-z][0-9A-Za-z.+!_-]{0,63}\Z")]
Digest: TypeAlias = Annotated[bytes, Meta(min_length=32, max_length=32)]
WorkId: TypeAlias = Annotated[bytes, Meta(min_length=16, max_length=16)]
WorkIds: TypeAlias = Annotated[tuple[WorkId, ...], Meta(max_length=MAX_WORKS)]
Inline: TypeAlias = Annotated[bytes, Meta(max_length=MAX_INLINE)]
Count: TypeAlias = Annotated[int, Meta(ge=0, le=(1 << 53) - 1)]
Rows: TypeAlias = Annotated[int, Meta(ge=0, le=MAX_ROWS)]
ClientId: TypeAlias = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]
Seconds: TypeAlias = Annotated[float, Meta(ge=0, le=1e9)]
Numerics: TypeAlias = Literal["compiled", "fused", "lanes", "loop"]
WorkKind: TypeAlias = Literal["round", "evaluate", "moments", "baseline"]
RowsKind: TypeAlias = Literal["train", "held"]

RefusalCode: TypeAlias = Literal[
    # The site cannot compute the work: its code, its data, its machine.
    "model", "layout", "part", "numerics", "input", "rows", "data", "changed", "failed", "memory", "disk",
    "predecessor", "session",
    # A rule of its policy file forbids the work.
    "policy-model", "policy-part", "policy-cohort", "policy-secure", "policy-epsilon", "policy-rounds", "policy-bytes",
    "policy-hours", "policy-values", "policy-rows", "policy-approval", "policy-threshold", "policy-noise",
]  # fmt: skip
LeaveCode: TypeAlias = Literal["stopped", "hours", "bytes", "done"]
DenialCode: TypeAlias = Literal["unknown", "used", "expired", "replaced", "revoked", "tries", "request"]
ReceiptCode: TypeAlias = Literal["received", "conflict", "late", "invalid", "predecessor", "large", "quota"]
ByeCode: TypeAlias = Literal[
    "done", "failed", "refused", "draining", "full", "revoked", "replaced", "protocol", "versions", "input", "rows",
    "behind", "frame", "order", "quota", "silent", "slow", "relay",
]  # fmt: skip

PlaceCode: TypeAlias = Literal["places", "rows"]  # why a client of a relay takes no part

CERTIFICATE = "Atoll-Certificate"  # the header in which a client states its certificate to a server without TLS
HTTP_STATUS: Mapping[ReceiptCode, int] = {
    "received": 200,
    "conflict": 409,
    "late": 410,
    "large": 413,
    "invalid": 422,
    "predecessor": 424,
    "quota": 429,
}


class _Struct(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A closed array of fields: a missing, a further or a wrong field is refused."""


class Versions(_Struct, frozen=True):
    """The versions of a process, which decide whether its bits equal those of the server."""

    python: Version
    atoll: Version
    torch: Version
    numpy: Version


class Blob(_Struct, frozen=True):
    """The SHA-256 and the length of bytes that travel by HTTP."""

    hash: Digest
    length: Annotated[int, Meta(ge=0, le=MAX_BLOB)]


class Lease(_Struct, frozen=True):
    """The number of a lease. Leases are ordered; a client refuses an epoch lower than the highest that it has seen."""

    epoch: Count
    counter: Count


class Seat(_Struct, frozen=True):
    """The split of a data set of which a client holds the part with its own number."""

    split: Annotated[str, Meta(min_length=1, max_length=4096, pattern=_PLAIN)]
    seed: Annotated[str, Meta(pattern=r"\A-?[0-9]{1,40}\Z")]
    clients: Annotated[int, Meta(ge=1, le=(1 << 31) - 1)]


class WireKey(_Struct, frozen=True):
    """A key of random numbers: the seed in decimal digits, and the folded 64-bit words."""

    seed: Annotated[str, Meta(pattern=r"\A-?[0-9]{1,40}\Z")]
    path: Annotated[tuple[Annotated[int, Meta(ge=0)], ...], Meta(max_length=32)]


class SumTerms(_Struct, frozen=True):
    """The numbers from which both sides compute the grid of a secure sum.

    Args:
        clients: the largest number of clients of a round.
        weight: the largest weight of a client.
        rows: the largest number of rows that a client processes in a round.
    """

    clients: Annotated[int, Meta(ge=1, le=(1 << 31) - 1)]
    weight: Annotated[int, Meta(ge=1, le=MAX_ROWS)]
    rows: Count


class Leaf(_Struct, frozen=True):
    """A client of a relay: its name there, and the numbers of its rows; None before they are known."""

    name: Name
    rows: Annotated[int, Meta(ge=1, le=MAX_ROWS)] | None
    held: Rows


class Place(_Struct, frozen=True):
    """The number of a client of a relay in the run.

    Args:
        name: its name at the relay.
        client: its number; `RELAYS` if it has none.
        code: why it takes no part: "places", the run or the relay has no further place; "rows", it has too many rows,
            or other rows than before. Empty if it takes part.
    """

    name: Name
    client: ClientId
    code: Literal[""] | PlaceCode


class RelayRules(_Struct, frozen=True):
    """The rules of the root for the clients of a relay, which are those for its own clients.

    Args:
        lease_s, absent_s, work_s, max_rows: as in `atoll.net.coordinator.Limits`.
        clients: the clients of the run.
        leaves: the most clients of this relay.
    """

    lease_s: Seconds
    absent_s: Seconds | None
    work_s: Seconds
    max_rows: Rows
    clients: Annotated[int, Meta(ge=1, le=(1 << 31) - 1)]
    leaves: Annotated[int, Meta(ge=0, le=MAX_LEAVES)]

    def refusal(self, place: Place) -> str:
        """The reason for the code of a place, for people.

        Args:
            place: a place with a code.
        """
        if place.code == "rows":
            return f"{place.name} needs the rows with which it began the run, and at most {self.max_rows}."
        return f"The run has {self.clients} clients, and at most {self.leaves} of this relay: no place is free."


class Start(_Struct, frozen=True):
    """A client of a relay that shall work, and the number of its earlier starts from the same version."""

    client: ClientId
    repeat: Count


# 2. Messages of a client


class Hello(_Struct, frozen=True):
    """The first message of a client.

    Args:
        protocol: the protocol of the client.
        versions: its libraries.
        processor: the name of its processor.
        numerics: the backends that it has.
        run: the run of its memory and of its prepared work; None if it has neither.
        settled: its last settled work in this run; None if it has none.
        prepared: the works whose messages it stores, in the order of their chain.
    """

    protocol: Annotated[int, Meta(ge=1, le=255)]
    versions: Versions
    processor: Annotated[str, Meta(max_length=200, pattern=r"\A[ -~]*\Z")]
    numerics: Annotated[tuple[Numerics, ...], Meta(min_length=1, max_length=4)]
    run: Name | None
    settled: WorkId | None
    prepared: WorkIds


class Ready(_Struct, frozen=True):
    """The client's data fits the `Input` with this hash; the numbers of its train and held-out rows."""

    input: Digest
    rows: Rows
    held: Rows


class Members(_Struct, frozen=True):
    """The clients of a relay whose data fits this `Input`. A relay sends it in place of `Ready`, and after a change."""

    input: Digest
    leaves: Annotated[tuple[Leaf, ...], Meta(max_length=MAX_LEAVES)]


class Update(_Struct, frozen=True):
    """A contribution of at most `MAX_INLINE` bytes.

    Args:
        work: the work.
        lease: the lease of its last `Work`.
        after: the `chain_link` of the memory that it started from; None for the first memory, or without client memory.
        body: the message.
    """

    work: WorkId
    lease: Lease
    after: WorkId | None
    body: Inline


class Sent(_Struct, frozen=True):
    """The announcement of a contribution that follows by HTTP, with its length and its SHA-256."""

    work: WorkId
    lease: Lease
    after: WorkId | None
    length: Annotated[int, Meta(gt=MAX_INLINE, le=MAX_BLOB)]
    hash: Digest


class Progress(_Struct, frozen=True):
    """The client computes this work and has finished `step` steps. This renews the lease."""

    work: WorkId
    step: Count


class Refusal(_Struct, frozen=True):
    """The client does not compute this work, or, if `work` is None, does not take part in the run."""

    work: WorkId | None
    code: RefusalCode
    reason: Text


class Leave(_Struct, frozen=True):
    """The client closes the channel on purpose."""

    code: LeaveCode


# 3. Messages of the server


class Welcome(_Struct, frozen=True):
    """The answer to `Hello`.

    Args:
        client: the number of this client.
        epoch: the epoch of the server. A client refuses an epoch lower than the highest that it has seen.
        run: the name of the run; None while no run is open.
        federation: the name of the federation.
        input: the hash and the length of the `Input`, a blob; None while no run is open.
        seat: the split, if a client asks for its part of a known data set; None if the sites have their own data.
    """

    client: ClientId
    epoch: Count
    run: Name | None
    federation: Name
    input: Blob | None
    seat: Seat | None


class Work(_Struct, frozen=True):
    """A piece of work, under a lease.

    Args:
        work: `work_id` of the fields below.
        kind: the gather that it belongs to.
        rows: the rows that it reads.
        round: the open round.
        version: the model version that it starts from.
        repeat: the number of earlier starts of this client from this version.
        plan: the text of the plan, with bare names.
        key: the key of the round. It contains the seed of the run.
        numerics: the compute backend.
        layout, input: the hashes of the layout and of the `Input`.
        model: the model version: its safetensors bytes, or its blob.
        deltas: the downlink messages that lead from the client's last version to this one, oldest first. A client that
            does not have that version reads `model`.
        rest: the safetensors bytes of this version without `theta`, if there are deltas.
        fixed: the blob of frozen tensors; None if the model has none.
        attempt: the number of earlier attempts of the round, if its sum is secure.
        sum: the numbers of the secure sum in which the contribution is masked; None: it is not masked.
        lease: the lease.
        deadline: the seconds until the round closes without this contribution; None: no limit.
    """

    work: WorkId
    kind: WorkKind
    rows: RowsKind
    round: Count
    version: Count
    repeat: Count
    plan: Annotated[str, Meta(min_length=1, max_length=MAX_PLAN, pattern=_PLAIN)]
    key: WireKey
    numerics: Numerics
    layout: Digest
    input: Digest
    model: Blob | Inline
    deltas: Annotated[tuple[Blob | Inline, ...], Meta(max_length=MAX_DELTAS)]
    rest: Blob | Inline | None
    fixed: Blob | None
    attempt: Annotated[int, Meta(ge=0, le=(1 << 32) - 1)]
    sum: SumTerms | None
    lease: Lease
    deadline: Seconds | None

    def __post_init__(self) -> None:
        if _MODULE.search(_QUOTED.sub("''", self.plan)):
            raise ValueError("the plan contains a module:name")


class Numbers(_Struct, frozen=True):
    """The answer to `Members`: the numbers of these clients in the run. A relay sends it to a client without a place.

    Args:
        places: the clients.
        memory: 1 if the plan has client memory, else 0.
        rules: the rules for them.
    """

    places: Annotated[tuple[Place, ...], Meta(max_length=MAX_LEAVES)]
    memory: Annotated[int, Meta(ge=0, le=1)]
    rules: RelayRules


class Gather(_Struct, frozen=True):
    """A piece of work for clients of a relay. The relay answers with one contribution, whose head is a `PartialHead`.

    Args:
        work: the work of each client, except for its name and repeat. Its name is `gather_id`.
        starts: the clients, ascending.
    """

    work: Work
    starts: Annotated[tuple[Start, ...], Meta(min_length=1, max_length=MAX_LEAVES)]


class Receipt(_Struct, frozen=True):
    """The answer to a contribution. "received" promises nothing: only `Settled` does."""

    work: WorkId
    code: ReceiptCode


class Settled(_Struct, frozen=True):
    """The transactions with these works are on disk. The client now replaces its memory and deletes the messages."""

    works: Annotated[tuple[WorkId, ...], Meta(min_length=1, max_length=MAX_WORKS)]


class Cancel(_Struct, frozen=True):
    """The server no longer waits for this work."""

    work: WorkId


class Bye(_Struct, frozen=True):
    """The last message of the server on a channel.

    Args:
        code: the reason, as a code; docs/wire.md lists all.
        reason: the reason for people.
        retry_s: the seconds after which the client connects again; None: never.
        final: the final model; None if the run has not ended or the model is not shared.
    """

    code: ByeCode
    reason: Text
    retry_s: Seconds | None
    final: Blob | None


# 4. In both directions


class StepMessage(_Struct, frozen=True):
    """A piece of one step of a protocol inside a work, such as a secure sum. The plan declares the longest body.

    Args:
        work: the work.
        step: the number of the step.
        rest: the bytes of the step that follow in further pieces.
        body: the bytes of this piece.
    """

    work: WorkId
    step: Annotated[int, Meta(ge=0, le=255)]
    rest: Annotated[int, Meta(ge=0, le=MAX_STEP)]
    body: Inline


Up: TypeAlias = Hello | Ready | Update | Sent | Progress | Refusal | Leave | Members | StepMessage
Down: TypeAlias = Welcome | Work | Receipt | Settled | Cancel | Bye | Numbers | Gather | StepMessage
Message: TypeAlias = Up | Down

UP: Mapping[int, type[Up]] = {
    1: Hello, 2: Ready, 3: Update, 4: Sent, 5: Progress, 6: Refusal, 7: Leave, 8: Members, 64: StepMessage,
}  # fmt: skip
DOWN: Mapping[int, type[Down]] = {
    33: Welcome, 34: Work, 35: Receipt, 36: Settled, 37: Cancel, 38: Bye, 39: Numbers, 40: Gather,
    64: StepMessage,
}  # fmt: skip
_TABLES: tuple[Mapping[int, type[Message]], ...] = (UP, DOWN)
_NUMBERS: Mapping[type[Message], int] = {kind: number for table in _TABLES for number, kind in table.items()}
_DECODERS = {kind: msgspec.msgpack.Decoder(kind) for kind in _NUMBERS}
_ENCODER = msgspec.msgpack.Encoder()

_HEAD = Packing("<4sBBHI")
_MAGIC = b"ATOL"
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"")
_MODULE = re.compile(r"[\w.]\s*:\s*\w")


FrameFault: TypeAlias = Literal[
    "long", "short", "magic", "protocol", "flags", "type", "length", "field", "form", "step", "tensors"
]


class FrameError(AtollError):
    """The bytes are no message of this protocol. None of them are used.

    Args:
        code: the fault; docs/wire.md lists all.
        given, required, why: the parts of the error. They contain no bytes of the peer.
    """

    def __init__(self, code: FrameFault, given: str, required: str, why: str = "") -> None:
        super().__init__(given, required, why)
        self.code = code


def encode_frame(message: Message, step_cap: int = 0) -> bytes:
    """The frame of a message.

    Args:
        message: the message.
        step_cap: the longest step that the plan declares, in bytes. 0: no `StepMessage` is allowed.
    Returns:
        At most `MAX_FRAME` bytes, which decode to an equal message.
    Raises:
        FrameError: a field is outside its bounds.
    Example:
        >>> encode_frame(Cancel(bytes(16)))[:12].hex()
        '41544f4c0425000013000000'
    """
    frame = _frame(message)
    table = next(table for table in _TABLES if type(message) in table.values())
    if _read(frame, table, step_cap) != message:
        raise FrameError(
            "form", f"A {type(message).__name__} does not decode to itself.", "fields of their declared types."
        )
    return frame


def decode_up(frame: bytes | bytearray | memoryview, step_cap: int = 0) -> Up:
    """Read a message of a client.

    Args:
        frame: the bytes of one frame.
        step_cap: the longest step that the plan declares, in bytes. 0: no `StepMessage` is allowed.
    Raises:
        FrameError: the bytes are no message of a client; `code` names the fault.
    Example:
        >>> decode_up(encode_frame(Progress(bytes(16), 3))).step
        3
    """
    message: Up = _accept(frame, UP, step_cap)
    return message


def decode_down(frame: bytes | bytearray | memoryview, step_cap: int = 0) -> Down:
    """Read a message of the server; the arguments and errors are those of `decode_up`.

    Example:
        >>> decode_down(encode_frame(Receipt(bytes(16), "late"))).code
        'late'
    """
    message: Down = _accept(frame, DOWN, step_cap)
    return message


def _frame(message: Message) -> bytes:
    """The frame of a message whose fields are not checked."""
    try:
        body = _ENCODER.encode(message)
    except (TypeError, ValueError, OverflowError) as error:
        fault = f"A field of {type(message).__name__} has no MessagePack form: {type(error).__name__}."
        raise FrameError("field", fault, "fields of their declared types.") from None
    return _HEAD.pack(_MAGIC, PROTOCOL, _NUMBERS[type(message)], 0, len(body)) + body


def _accept(frame: bytes | bytearray | memoryview, table: Mapping[int, type], step_cap: int) -> Any:
    message = _read(frame, table, step_cap)
    if _frame(message) != frame:
        raise FrameError("form", "The frame is not in its shortest form.", "the bytes that `encode_frame` returns.")
    return message


def _read(frame: bytes | bytearray | memoryview, table: Mapping[int, type], step_cap: int) -> Any:
    if len(frame) > MAX_FRAME:
        raise FrameError("long", f"A frame of {len(frame)} bytes.", f"at most {MAX_FRAME} bytes.")
    if len(frame) < _HEAD.size:
        raise FrameError("short", f"A frame of {len(frame)} bytes.", f"a head of {_HEAD.size} bytes.")
    magic, protocol, number, flags, length = _HEAD.unpack_from(frame)
    if magic != _MAGIC:
        raise FrameError("magic", "The frame does not begin as a frame of atoll.", "the four bytes ATOL.")
    if protocol != PROTOCOL:
        raise FrameError("protocol", f"A frame of protocol {protocol}.", f"protocol {PROTOCOL}.")
    if flags:
        raise FrameError("flags", f"A frame with flags {flags:#x}.", "no flags.")
    if number not in table:
        known = ", ".join(kind.__name__ for kind in table.values())
        raise FrameError(
            "type", f"A frame of type {number}.", f"one of {known}.", "no other message is sent in this direction."
        )
    if length != len(frame) - _HEAD.size:
        given = f"A frame with {len(frame) - _HEAD.size} bytes after its head, which states {length}."
        raise FrameError("length", given, "the stated length.")
    kind = table[number]
    try:
        message = _DECODERS[kind].decode(memoryview(frame)[_HEAD.size :])
    except (msgspec.MsgspecError, ValueError) as error:
        raise FrameError(
            "field", f"A field of {kind.__name__}: {_fault(error)}.", "the fields that docs/wire.md lists."
        ) from None
    if isinstance(message, StepMessage) and (not step_cap or len(message.body) + message.rest > step_cap):
        given = (
            f"A step of {len(message.body) + message.rest} bytes."
            if step_cap
            else "A step of a plan that declares none."
        )
        raise FrameError("step", given, f"at most {step_cap} bytes." if step_cap else "no message of this type.")
    return message


def _fault(error: Exception) -> str:
    """The fault without text of the peer, which msgspec quotes if a value is unknown."""
    if isinstance(error, UnicodeError):
        return "a text is not UTF-8"
    return "an unknown value" if "Invalid enum value" in str(error) else str(error).replace("`", "")


# 5. The contribution of a relay


class Counted(_Struct, frozen=True):
    """A client of a relay whose message is in the partial: its repeat, its rows and the length of its message."""

    client: ClientId
    repeat: Count
    rows: Rows
    length: Annotated[int, Meta(ge=0, le=MAX_BLOB)]


class Lost(_Struct, frozen=True):
    """A client of a relay without a contribution: its repeat, and the code and the reason of the failure."""

    client: ClientId
    repeat: Count
    code: Annotated[str, Meta(pattern=r"\A[a-z-]{1,32}\Z")]
    reason: Text


class PartialHead(_Struct, frozen=True):
    """The head of a partial: u32 length ‖ this struct ‖ numbers.

    Args:
        arrived, lost: the clients of the `Gather`, each once, ascending.
        places: the lowest place and the number of places of each exact sum, in the order of `docs/wire.md`.
    """

    arrived: Annotated[tuple[Counted, ...], Meta(max_length=MAX_LEAVES)]
    lost: Annotated[tuple[Lost, ...], Meta(max_length=MAX_LEAVES)]
    places: Annotated[
        tuple[tuple[Annotated[int, Meta(ge=-64, le=64)], Annotated[int, Meta(ge=0, le=128)]], ...],
        Meta(max_length=1 << 16),
    ]


_HEADS = msgspec.msgpack.Decoder(PartialHead)


def encode_head(head: PartialHead) -> bytes:
    """The bytes of a head with its length before them.

    Example:
        >>> encode_head(PartialHead((), (), ())).hex()
        '0400000093909090'
    """
    body = _ENCODER.encode(head)
    return len(body).to_bytes(4, "little") + body


def decode_head(data: bytes | bytearray | memoryview) -> tuple[PartialHead, int]:
    """The head of a partial, and the place of the first byte after it.

    Raises:
        FrameError: the bytes begin with no head in its only form.
    Example:
        >>> decode_head(encode_head(PartialHead((), (), ())) + b"numbers")[1]
        8
    """
    end = 4 + int.from_bytes(data[:4], "little")
    if len(data) < 4 or end > min(len(data), MAX_HEADER):
        raise FrameError("length", f"A partial of {len(data)} bytes with a head of {end}.", "the head that it states.")
    try:
        head = _HEADS.decode(memoryview(data)[4:end])
    except (msgspec.MsgspecError, ValueError) as error:
        raise FrameError("field", f"A field of a partial: {_fault(error)}.", "the fields of its head.") from None
    if encode_head(head) != data[:end]:
        raise FrameError("form", "The head of a partial is not in its shortest form.", "the bytes of `encode_head`.")
    return head, end


# 6. Hashes


def digest(data: bytes | bytearray | memoryview) -> bytes:
    """The SHA-256 of bytes, 32 bytes.

    Example:
        >>> digest(b"").hex()[:16]
        'e3b0c44298fc1c14'
    """
    return sha256(data).digest()


def work_id(
    run: str, kind: WorkKind, client: int, version: int, repeat: int, plan: str, model: bytes, attempt: int = 0
) -> bytes:
    """The name of a piece of work; equal work has an equal name after every restart.

    work = SHA-256("atoll/work/v1" ‖ run ‖ kind ‖ client ‖ version ‖ repeat ‖ SHA-256(plan) ‖ SHA-256(model))[:16],
    with the number of the attempt as u32 at the end if it is not 0; a text is preceded by its length as u16, and a
    number is a u64, big-endian.

    Args:
        run: the name of the run.
        kind: the gather that it belongs to.
        client: the number of the client.
        version: the model version.
        repeat: the number of earlier starts of this client from this version.
        plan: the text of the plan.
        model: the SHA-256 of the model version.
        attempt: the number of earlier attempts of a secure sum.
    Returns:
        16 bytes.
    Example:
        >>> work_id("a", "round", 0, 3, 0, "Plan()", digest(b"")).hex()
        'd67a36f2595359e928047bde06cad0df'
    """
    texts = b"".join(len(text.encode()).to_bytes(2, "big") + text.encode() for text in (run, kind))
    numbers = b"".join(number.to_bytes(8, "big") for number in (client, version, repeat))
    last = attempt.to_bytes(4, "big") if attempt else b""
    return sha256(b"atoll/work/v1" + texts + numbers + _plan_digest(plan) + model + last).digest()[:16]


def gather_id(work: bytes, starts: tuple[Start, ...]) -> bytes:
    """The name of a work for several clients of a relay: SHA-256("atoll/gather/v1" ‖ work ‖ starts)[:16].

    A start is its client and its repeat, u64 each, big-endian.

    Args:
        work: the `work_id` of the relay.
        starts: the clients.
    Example:
        >>> gather_id(bytes(16), (Start(0, 0),)).hex()
        '6a446202c33516489ad161178e57f074'
    """
    numbers = b"".join(number.to_bytes(8, "big") for start in starts for number in (start.client, start.repeat))
    return sha256(b"atoll/gather/v1" + work + numbers).digest()[:16]


@lru_cache(maxsize=8)
def _plan_digest(plan: str) -> bytes:
    """The hash of the text of a plan, which is long and the same for all works of a round."""
    return digest(plan.encode())


def chain_link(after: bytes | None, work: bytes, message: bytes) -> bytes:
    """The name of the client memory after a contribution.

    link = SHA-256("atoll/chain/v1" ‖ after ‖ work ‖ SHA-256(message))[:16], with 16 zero bytes if `after` is None.

    It names the whole history of the memory. A contribution that was computed from the memory after other bytes of the
    same work has another link.

    Args:
        after: the link before the contribution; None for the memory with which a client begins.
        work: the work.
        message: the SHA-256 of its message; 32 zero bytes for a masked one, since each attempt draws new masks.
    Example:
        >>> chain_link(None, bytes(16), digest(b"")).hex()
        '47a8968b0ce6fe9f72ba0e3ee3782b01'
    """
    return sha256(b"atoll/chain/v1" + (after or bytes(16)) + work + message).digest()[:16]


# 7. Versions


def version_fault(hello: Hello, server: Versions, closed: bool) -> tuple[ByeCode, str] | None:
    """The reason to refuse a client for its protocol or its versions; None if there is none.

    Args:
        hello: the first message of the client.
        server: the versions of the server.
        closed: whether the run is closed. An open run accepts other versions, since its bits depend on arrivals anyway.
    Returns:
        The code and the reason of a `Bye`.
    Example:
        >>> ours = Versions("3.11.7", "0.1.0", "2.13.0", "2.4.6")
        >>> old = Hello(4, Versions("3.11.7", "0.1.0", "2.12.1", "2.4.6"), "", ("loop",), None, None, ())
        >>> print(version_fault(old, ours, closed=True)[1])
        The client has torch 2.12.1. Required: torch 2.13, as the server. Write: pip install "torch==2.13.*"
        >>> version_fault(old, ours, closed=False)
    """
    install = f'pip install "atoll=={_minor(server.atoll)}.*"'
    if hello.protocol != PROTOCOL:
        required = f"Required: protocol {PROTOCOL}. Write: {install}"
        return "protocol", f"The client has protocol {hello.protocol}. {required}"
    if not closed:
        return None
    pairs = (("atoll", hello.versions.atoll, server.atoll), ("torch", hello.versions.torch, server.torch))
    wrong = [(name, given, _minor(required)) for name, given, required in pairs if _minor(given) != _minor(required)]
    if not wrong:
        return None
    given = " and ".join(f"{name} {version}" for name, version, _ in wrong)
    required = " and ".join(f"{name} {version}" for name, _, version in wrong)
    line = " ".join(f'"{name}=={version}.*"' for name, _, version in wrong)
    return "versions", f"The client has {given}. Required: {required}, as the server. Write: pip install {line}"


def _minor(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


# 8. Tensors


class TensorPlace(NamedTuple):
    """One tensor of a safetensors buffer: its dtype, its shape, and the first and last byte after the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


_ITEM = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_Dim: TypeAlias = Annotated[int, Meta(ge=0, le=MAX_BLOB)]


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    dtype: Literal["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"]
    shape: Annotated[tuple[_Dim, ...], Meta(max_length=16)]
    data_offsets: tuple[_Dim, _Dim]


_TABLE = msgspec.json.Decoder(dict[Annotated[str, Meta(max_length=1024)], _Entry])


def tensor_table(data: bytes | bytearray | memoryview) -> dict[str, TensorPlace]:
    """Check the header of a safetensors buffer and return its tensors; no tensor is allocated.

    Args:
        data: the buffer: the length of the header as u64, the header as JSON, the tensors.
    Returns:
        The place of each tensor by name. Together they cover the bytes after the header exactly, in order.
    Raises:
        FrameError: the buffer is no safetensors buffer of this protocol.
    Example:
        >>> head = b'{"theta":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
        >>> tensor_table(len(head).to_bytes(8, "little") + head + bytes(8))["theta"].shape
        (2,)
    """
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > min(MAX_HEADER, len(data) - 8):
        raise FrameError(
            "tensors", f"{len(data)} bytes with a header of {size}.", f"a header of at most {MAX_HEADER} bytes."
        )
    try:
        table = _TABLE.decode(memoryview(data)[8 : 8 + size])
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise FrameError("tensors", f"The header of the tensors: {_fault(error)}.", "a safetensors header.") from None
    at = 0
    for entry in sorted(table.values(), key=lambda entry: entry.data_offsets):
        begin, end = entry.data_offsets
        if begin != at or end - begin != math.prod(entry.shape) * _ITEM[entry.dtype]:
            required = "tensors one after another, each as long as its shape."
            raise FrameError("tensors", f"A tensor of shape {entry.shape} at {begin}:{end}.", required)
        at = end
    if at != len(data) - 8 - size:
        given = f"{len(data) - 8 - size} bytes of tensors; the header lists {at}."
        raise FrameError("tensors", given, "the bytes that the header lists.")
    return {name: TensorPlace(e.dtype, e.shape, *e.data_offsets) for name, e in table.items()}


def escaped(text: str, most: int = 300) -> str:
    """A text of a peer as printable ASCII, cut after `most` characters.

    Example:
        >>> print(escaped("a\\x1b[31m"))
        a\\x1b[31m
    """
    return text[:most].encode("unicode_escape").decode("ascii") + ("..." if len(text) > most else "")
