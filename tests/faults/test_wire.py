"""Frames of the network.

They read back equal, every other byte string is refused by one error, and nothing is allocated before a length is
checked.
"""

import contextlib
import inspect
import random
import re
import struct
import tracemalloc
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from net_messages import DOWN, HASH, LEASE, OTHER, PLAN, STEP, STEP_CAP, UP, VERSIONS, WORK, work
from safetensors.numpy import save

from atoll.net import wire
from atoll.net.wire import FrameError, decode_down, decode_up, encode_frame

NUMBERS = sorted({**wire.UP, **wire.DOWN})


EVERY = (decode_up, decode_down)
TABLES = (UP, DOWN)
DECODERS = {name: decode for table, decode in zip(TABLES, EVERY, strict=True) for name in table}
ALL = {**UP, **DOWN}
FRAMES = [encode_frame(m, STEP_CAP) for m in (*ALL.values(), STEP)]
ROOT = Path(__file__).parents[2]


def fault(decode, frame, cap=STEP_CAP):
    with pytest.raises(FrameError) as error:
        decode(frame, cap)
    return error.value.code


def framed(number, body, magic=b"ATOL", protocol=wire.PROTOCOL, flags=0, length=None):
    return struct.pack("<4sBBHI", magic, protocol, number, flags, len(body) if length is None else length) + body


def number_of(message):
    return next(n for n, kind in {**wire.UP, **wire.DOWN}.items() if kind is type(message))


@pytest.mark.parametrize("name", ALL)
def test_a_message_reads_back_equal_and_only_in_its_direction(name):
    frame = encode_frame(ALL[name])
    assert DECODERS[name](frame) == ALL[name]
    assert DECODERS[name](memoryview(bytearray(frame))) == ALL[name]
    for decode in EVERY:
        if decode is not DECODERS[name]:
            assert fault(decode, frame) == "type"


@pytest.mark.parametrize("name", ALL)
def test_every_cut_and_every_further_byte_is_refused(name):
    frame = encode_frame(ALL[name])
    for end in range(len(frame)):
        assert fault(DECODERS[name], frame[:end]) in ("short", "length")
        if end >= 12:
            assert fault(DECODERS[name], framed(number_of(ALL[name]), frame[12:end])) in ("field", "form")
    assert fault(DECODERS[name], frame + b"\0") == "length"
    assert fault(DECODERS[name], framed(number_of(ALL[name]), frame[12:] + b"\xc0")) == "field"


@pytest.mark.parametrize("name", ALL)
def test_a_missing_a_further_and_an_exchanged_field_are_refused(name):
    fields = msgspec.msgpack.decode(msgspec.msgpack.encode(ALL[name]))
    number = number_of(ALL[name])
    assert decode_ok(name, number, fields) == ALL[name]
    for wrong in ([*fields, None], fields[:-1], {}, fields[0]):
        assert fault(DECODERS[name], framed(number, msgspec.msgpack.encode(wrong))) == "field"
    for i in range(len(fields)):
        for other in (
            {},
            -1,
            1 << 63,
            [[[]]],
            "\x1b[2J" * 40_0,
            b"x" * 70_000,
            float("nan"),
            float("inf"),
            True,
            msgspec.Raw(b"\xa1\xff"),
        ):
            body = msgspec.msgpack.encode([*fields[:i], other, *fields[i + 1 :]])
            assert fault(DECODERS[name], framed(number, body)) in ("field", "form", "long")


def decode_ok(name, number, fields):
    return DECODERS[name](framed(number, msgspec.msgpack.encode(fields)))


def test_each_fault_of_a_head_has_its_code():
    body = encode_frame(UP["Leave"])[12:]
    for expected, frame in {
        "short": b"ATOL",
        "magic": framed(7, body, magic=b"HTTP"),
        "protocol": framed(7, body, protocol=wire.PROTOCOL + 1),
        "flags": framed(7, body, flags=1),
        "type": framed(200, body),
        "length": framed(7, body, length=2**32 - 1),
        "long": bytes(wire.MAX_FRAME + 1),
    }.items():
        assert fault(decode_up, frame) == expected


def test_a_longer_form_of_a_number_is_refused():
    body = bytearray(encode_frame(UP["Progress"])[12:])
    assert body[-3:] == b"\xcd\x01\x2c"
    assert fault(decode_up, framed(5, bytes(body[:-3]) + b"\xce\0\0\x01\x2c")) == "form"
    assert fault(decode_up, framed(7, b"\x91\xd9\x07stopped")) == "form"


def test_bounds_hold_at_the_limit_and_fail_one_above():
    for make, good, bad in [
        (lambda n: wire.Ready(HASH, n, 0), wire.MAX_ROWS, wire.MAX_ROWS + 1),
        (lambda n: wire.Ready(HASH, 0, n), 0, -1),
        (lambda n: wire.Update(WORK, LEASE, None, bytes(n)), wire.MAX_INLINE, wire.MAX_INLINE + 1),
        (lambda n: wire.Sent(WORK, LEASE, None, n, HASH), wire.MAX_INLINE + 1, wire.MAX_INLINE),
        (lambda n: wire.Sent(WORK, LEASE, None, n, HASH), wire.MAX_BLOB, wire.MAX_BLOB + 1),
        (lambda n: wire.Progress(bytes(n), 0), 16, 17),
        (lambda n: wire.Progress(bytes(n), 0), 16, 15),
        (lambda n: wire.Settled((WORK,) * n), wire.MAX_WORKS, wire.MAX_WORKS + 1),
        (lambda n: wire.Settled((WORK,) * n), 1, 0),
        (lambda n: work(plan="P" * n), wire.MAX_PLAN, wire.MAX_PLAN + 1),
        (lambda n: work(model=bytes(n), plan="P" * wire.MAX_PLAN), wire.MAX_INLINE, wire.MAX_INLINE + 1),
        (lambda n: wire.Refusal(None, "data", "x" * n), 2000, 2001),
        (lambda n: wire.Bye("done", "", n, None), 1e9, 1.1e9),
        (lambda n: wire.Welcome(n, 0, None, "f", None, None), 2**31 - 1, 2**31),
        (lambda n: wire.Hello(wire.PROTOCOL, VERSIONS, "", ("loop",), "r" * n, None, ()), 64, 65),
    ]:
        assert DECODERS[type(make(good)).__name__](encode_frame(make(good))) == make(good)
        with pytest.raises(FrameError):
            encode_frame(make(bad))


def test_texts_that_act_on_a_terminal_or_leave_a_path_are_refused():
    for text in ("\x1b[31mred", "a\rb", "\x00", "\x9b2J", "\u202egnp"):
        with pytest.raises(FrameError):
            encode_frame(wire.Refusal(None, "data", text))
    for name in ("", "../x", "A", "a\n", "a/b", "ä", "a" * 65):
        with pytest.raises(FrameError):
            encode_frame(wire.Welcome(0, 0, None, name, None, None))
    for version in ("2.0\n", "", "a b", "2" * 65):
        with pytest.raises(FrameError):
            encode_frame(
                wire.Hello(wire.PROTOCOL, wire.Versions("3", "0.1", version, "2"), "", ("loop",), None, None, ())
            )


def test_a_plan_with_a_module_is_refused():
    for plan in ("Plan(os:system())", "Plan(a.b:c())", "Plan(a :b)"):
        with pytest.raises((FrameError, ValueError)):
            encode_frame(work(plan=plan))
        body = msgspec.msgpack.encode(work()).replace(PLAN.encode(), plan.ljust(len(PLAN)).encode())
        assert fault(decode_down, framed(34, body)) == "field"
    assert encode_frame(work(plan="Plan(columns='a:b', names={'x': 1})"))


def test_a_step_needs_a_declared_length():
    whole = len(STEP.body) + STEP.rest
    assert decode_up(encode_frame(STEP, whole), whole) == decode_down(encode_frame(STEP, whole), whole) == STEP
    for cap in (0, len(STEP.body), whole - 1):
        assert fault(decode_up, encode_frame(STEP, whole), cap) == "step"
        with pytest.raises(FrameError):
            encode_frame(STEP, cap)


@pytest.mark.parametrize(
    "body", [b"\xdd\x7f\xff\xff\xff", b"\xdf\x7f\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff"]
)
def test_a_stated_length_allocates_nothing(body):
    frames = [framed(n, prefix + body) for n in NUMBERS for prefix in (b"", b"\x91", b"\x93\xc4\x10" + WORK)]
    frames += [framed(36, b"\x91" + body), framed(1, encode_frame(UP["Hello new"])[12:-1] + body)]
    tracemalloc.start()
    try:
        for frame in frames:
            for decode in EVERY:
                assert fault(decode, frame) in ("field", "type")
        assert tracemalloc.get_traced_memory()[1] < 1_000_000  # each stated length is 2 GiB or more
    finally:
        tracemalloc.stop()


def only_frame_errors(frame):
    for decode in EVERY:
        try:
            message = decode(frame, STEP_CAP)
        except FrameError as error:
            assert str(error).isprintable() or "\n" in str(error)
        else:
            assert encode_frame(message, STEP_CAP) == frame


@settings(max_examples=6 * settings().max_examples)
@given(st.sampled_from(NUMBERS), st.binary(max_size=80))
def test_random_bodies_raise_one_error(number, body):
    only_frame_errors(framed(number, body))


def value(rng, depth=0):
    """A random value of MessagePack; often one that some field takes."""
    match rng.randrange(8 if depth < 4 else 6):
        case 0:
            return rng.choice([None, True, WORK, HASH, "a", "received", 0, 1.0])
        case 1:
            return rng.randint(-(2**63), 2**64 - 1) >> rng.randrange(64)
        case 2:
            return rng.choice([0.5, -0.0, float("nan"), float("inf"), -1e300, 5e-324])
        case 3:
            return rng.randbytes(rng.choice([0, 1, 16, 32, 300]))
        case 4:
            return "".join(chr(rng.choice([97, 65, 0, 27, 228, 0x202E, 0x1F600])) for _ in range(rng.randrange(9)))
        case 5:
            return rng.choice(list(ALL.values()))
        case 6:
            return [value(rng, depth + 1) for _ in range(rng.randrange(6))]
        case _:
            return {str(i): value(rng, depth + 1) for i in range(rng.randrange(3))}


@settings(max_examples=3 * settings().max_examples)
@given(st.integers(0, 2**64))
def test_random_fields_raise_one_error(seed):
    rng = random.Random(seed)
    for message in (*ALL.values(), STEP):
        fields = msgspec.msgpack.decode(msgspec.msgpack.encode(message))
        fields = [value(rng) if rng.random() < 0.3 else field for field in fields]
        only_frame_errors(framed(number_of(message), msgspec.msgpack.encode(fields)))


@settings(max_examples=6 * settings().max_examples)
@given(st.integers(0, 2**64))
def test_mutated_frames_raise_one_error(seed):
    rng = random.Random(seed)
    frame = bytearray(rng.choice(FRAMES))
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(frame))
        match rng.randrange(4):
            case 0:
                frame[at] ^= 1 << rng.randrange(8)
            case 1:
                frame[at : at + rng.randrange(8)] = rng.randbytes(rng.randrange(8))
            case 2:
                del frame[at:]
                frame += rng.choice(FRAMES)[at:]
            case 3:
                frame += rng.randbytes(rng.randrange(8))
        frame = frame or bytearray(b"A")
        if rng.random() < 0.7 and len(frame) >= 12:
            frame[8:12] = (len(frame) - 12).to_bytes(4, "little")
    only_frame_errors(bytes(frame))


def header(text: str, size: int = 8) -> bytes:
    return len(text.encode()).to_bytes(8, "little") + text.encode() + bytes(size)


def test_tensor_tables_agree_with_safetensors():
    tensors = {"theta": np.arange(6.0).reshape(2, 3), "counter/n": np.array(3), "empty": np.empty((0, 4), "float32")}
    data = save(tensors)
    table = wire.tensor_table(data)
    start = len(data) - max(place.end for place in table.values())
    assert table.keys() == tensors.keys()
    for name, place in table.items():
        assert place.shape == tensors[name].shape
        assert data[start + place.begin : start + place.end] == tensors[name].tobytes()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 8,
        header("{", 0),
        header("[]", 0),
        header('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', 7),
        header('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}', 9),
        header('{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}'),
        header('{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}'),
        header('{"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}}'),
        header('{"a":{"dtype":"F99","shape":[2],"data_offsets":[0,8]}}'),
        header('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"x":1}}'),
        header('{"a":{"dtype":"F32","shape":[4294967296,4294967296,4294967296],"data_offsets":[0,8]}}'),
        header('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}'),
        header('{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}'),
        header('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}'),
        header('{"__metadata__":{"a":"b"}}', 0),
        header("[" * 100_000, 0),
        header('{"a":' * 100_000, 0),
        header('{"\ud800":1}'.encode("utf-8", "surrogatepass").decode("latin-1"), 0),
    ],
)  # fmt: skip
def test_wrong_tensor_headers_are_refused(data):
    with pytest.raises(FrameError) as error:
        wire.tensor_table(data)
    assert error.value.code == "tensors"


@settings(max_examples=4 * settings().max_examples)
@given(st.binary(max_size=60), st.booleans())
def test_random_tensor_headers_raise_one_error(data, framed_header):
    with contextlib.suppress(FrameError):
        wire.tensor_table(len(data).to_bytes(8, "little") + data if framed_header else data)


def test_work_ids_differ_if_any_input_differs():
    base = dict(run="a", kind="round", client=1, version=2, repeat=3, plan="Plan()", model=HASH)
    changed = dict(run="b", kind="evaluate", client=2, version=3, repeat=4, plan="Plan(1)", model=WORK + OTHER[::-1])
    ids = {wire.work_id(**base), *(wire.work_id(**{**base, name: value}) for name, value in changed.items())}
    assert len(ids) == 1 + len(changed) and all(len(work) == 16 for work in ids)
    # The end of one text and the begin of the next are part of the name.
    assert wire.work_id(**{**base, "run": "around"}) != wire.work_id(**{**base, "run": "a"})


def test_chain_links_name_the_whole_history():
    first = wire.chain_link(None, WORK, HASH)
    later = wire.chain_link(first, OTHER, HASH)
    others = [
        wire.chain_link(None, OTHER, HASH),
        wire.chain_link(None, WORK, HASH[::-1]),
        wire.chain_link(OTHER, OTHER, HASH),
    ]
    assert len({first, later, *others}) == 5 and len(later) == 16


def test_versions():
    def hello(protocol=wire.PROTOCOL, **versions):
        mine = {"python": "3.11.7", "atoll": "0.1.0", "torch": "2.13.0+cpu", "numpy": "2.4.6", **versions}
        return wire.Hello(protocol, wire.Versions(**mine), "", ("loop",), None, None, ())

    assert wire.version_fault(hello(), VERSIONS, closed=True) is None
    assert wire.version_fault(hello(torch="2.13.9", atoll="0.1.7", numpy="1.0"), VERSIONS, closed=True) is None
    code, reason = wire.version_fault(hello(torch="2.12.0", atoll="0.2.0"), VERSIONS, closed=True)
    assert code == "versions" and 'pip install "atoll==0.1.*" "torch==2.13.*"' in reason
    assert wire.version_fault(hello(torch="2.12.0"), VERSIONS, closed=False) is None
    assert wire.version_fault(hello(protocol=wire.PROTOCOL - 1), VERSIONS, closed=False)[0] == "protocol"
    # A reason must fit into a `Bye`.
    assert encode_frame(wire.Bye(code, reason, None, None))


def test_the_page_lists_every_message_field_and_code():
    page = (ROOT / "docs" / "wire.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*)$", page, re.M))
    structs = [
        *wire.UP.values(),
        *wire.DOWN.values(),
        wire.Versions,
        wire.Blob,
        wire.Lease,
        wire.Seat,
        wire.SumTerms,
        wire.WireKey,
        wire.Leaf,
        wire.Place,
        wire.RelayRules,
        wire.Start,
        wire.Counted,
        wire.Lost,
        wire.PartialHead,
    ]
    for kind in structs:
        fields = re.findall(r"`(\w+)`", rows[kind.__name__].split(" | ")[0])
        assert tuple(fields) == kind.__struct_fields__, kind.__name__
    for codes in (
        wire.RefusalCode,
        wire.LeaveCode,
        wire.ReceiptCode,
        wire.ByeCode,
        wire.FrameFault,
        wire.WorkKind,
    ):
        assert not [code for code in codes.__args__ if f"`{code}`" not in page]
    assert wire.HTTP_STATUS.keys() == set(wire.ReceiptCode.__args__)


def test_every_struct_is_closed_and_bounded():
    for _, kind in inspect.getmembers(wire, lambda v: isinstance(v, type) and issubclass(v, msgspec.Struct)):
        config = kind.__struct_config__
        assert config.frozen and config.forbid_unknown_fields
        for info in msgspec.inspect.type_info(kind).fields if kind.__struct_fields__ else ():
            unbounded(info.type, f"{kind.__name__}.{info.name}")


def unbounded(kind, place):
    """Fail if a value of this type can have any length or size."""
    t = msgspec.inspect
    match kind:
        case t.BytesType():
            assert kind.max_length is not None, place
        case t.StrType():
            assert kind.max_length is not None or re.search(r"\{\d+(,\d+)\}", kind.pattern or ""), place
        case t.IntType():
            assert kind.ge is not None or kind.gt is not None, place
        case t.FloatType():
            assert kind.ge is not None and kind.le is not None, place
        case t.VarTupleType():
            assert kind.max_length is not None, place
            unbounded(kind.item_type, place)
        case t.TupleType():
            [unbounded(item, place) for item in kind.item_types]
        case t.UnionType():
            [unbounded(item, place) for item in kind.types]
        case t.StructType() | t.NoneType() | t.LiteralType():
            pass
        case _:
            raise AssertionError(f"{place}: {kind}")
