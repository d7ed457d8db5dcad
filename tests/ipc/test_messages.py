"""Invariant 8: typed, bounded, versioned; and nothing that comes in can do more than be refused."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpworker.ipc import messages, wire
from tpworker.ipc.arrays import pack_int32, pack_int64, unpack_int32, unpack_int64
from tpworker.ipc.codec import MessageError, Within
from tpworker.ipc.messages import BatchPlan, Hello, Message, StepResult, StepTiming, Stop
from tpworker.ipc.wire import decode, encode, expect

CLASSES: list[Any] = list(get_args(Message))


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Any value that a field of this type may have."""
    if get_origin(hint) is tuple:
        return st.lists(values(get_args(hint)[0]), max_size=3).map(tuple)
    if dataclasses.is_dataclass(hint):
        return instances(hint)
    if get_origin(hint) is Annotated:
        base, bounds = get_args(hint)
        if base is int:
            return st.integers(int(bounds.low), int(bounds.high))
        if base is float:
            return st.floats(bounds.low, bounds.high)
        text = {str: st.text, bytes: st.binary}[base]
        return text(min_size=int(bounds.low), max_size=min(int(bounds.high), 40))
    if hint is bool:
        return st.booleans()
    inner = [arg for arg in get_args(hint) if arg is not type(None)]
    return st.none() | values(inner[0])


def instances(cls: Any) -> st.SearchStrategy[Any]:
    hints = get_type_hints(cls, include_extras=True)
    return st.builds(cls, **{field.name: values(hints[field.name]) for field in dataclasses.fields(cls)})


any_message = st.one_of([instances(cls) for cls in CLASSES])


@given(any_message)
def test_every_message_survives_the_wire(message: Any) -> None:
    assert decode(encode(message)) == message


@pytest.mark.parametrize("cls", CLASSES)
def test_every_message_is_frozen_and_of_bounded_fields(cls: Any) -> None:
    assert cls.__dataclass_params__.frozen
    for name, hint in get_type_hints(cls, include_extras=True).items():
        assert hint not in (int, float, str, bytes), f"{cls.__name__}.{name} has no bounds"


def test_every_message_after_the_handshake_bears_a_generation() -> None:
    for cls in CLASSES:
        assert "generation" in {field.name for field in dataclasses.fields(cls)}, cls


@given(st.binary(max_size=60))
def test_bytes_are_a_message_or_refused(data: bytes) -> None:
    with contextlib.suppress(MessageError):
        decode(data)


@given(any_message, st.data())
def test_a_damaged_message_is_a_message_or_refused(message: Any, data: st.DataObject) -> None:
    damaged = bytearray(encode(message))
    index = data.draw(st.integers(0, len(damaged) - 1))
    damaged[index] = data.draw(st.integers(0, 255))
    with contextlib.suppress(MessageError):
        decode(bytes(damaged))


json_like = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=12,
)


@given(st.sampled_from([*wire._BY_TAG, 0, 99]), st.lists(json_like, max_size=12))
def test_wrong_fields_are_refused_before_anybody_sees_them(tag: int, fields: list[Any]) -> None:
    try:
        message = decode(msgpack.packb([tag, *fields]))
    except MessageError:
        return
    assert encode(decode(encode(message))) == encode(message)


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (b"", "not msgpack"),
        (b"\x93\x01", "not msgpack"),
        (b"\x80\x04N.", "not msgpack"),
        (msgpack.packb({"a": 1}), "an array that begins with a tag"),
        (msgpack.packb([]), "an array that begins with a tag"),
        (msgpack.packb([True, 1]), "an array that begins with a tag"),
        (msgpack.packb([77, 1]), "unknown tag 77"),
        (msgpack.packb([6]), "Stop: expected an array of 1 fields"),
        (msgpack.packb([6, 1, 2]), "Stop: expected an array of 1 fields"),
        (msgpack.packb([6, "1"]), "Stop: expected int, got str"),
        (msgpack.packb([6, True]), "Stop: expected int, got bool"),
        (msgpack.packb([6, 1.0]), "Stop: expected int, got float"),
        (msgpack.packb([6, -1]), "Stop: -1 is not within 0 and"),
        (
            msgpack.packb([30, 0, 0, "tokens", [0, 0, 0], b"", b"", b"", b""]),
            "StepResult: expected bytes, got str",
        ),
        (
            msgpack.packb([30, 0, 0, b"", [0, 0], b"", b"", b"", b""]),
            "StepResult: StepTiming: expected an array of 3 fields",
        ),
        (msgpack.packb([20, 0, 0, [5000], [], [], [], None, 0]), "BatchPlan: 5000 is not within 0 and 4095"),
        (msgpack.packb([20, 0, 0, 5, [], [], [], None, 0]), "BatchPlan: expected an array, got int"),
        (msgpack.packb([20, 0, 0, [], [], [], [[0, 0, 1, 1]], None, 0]), "Chunk: expected bool, got int"),
        (msgpack.packb([20, 0, 0, [], [], [], [[0, 0, 0, True]], None, 0]), "Chunk: 0 is not within 1 and"),
        (msgpack.packb([6, msgpack.ExtType(5, b"x")]), "Stop: expected int, got ExtType"),
    ],
)
def test_what_is_wrong_is_said(data: bytes, complaint: str) -> None:
    with pytest.raises(MessageError, match=re.escape(complaint)):
        decode(data)


def test_nan_is_out_of_bounds() -> None:
    sampling = [float("nan"), 1.0, 0, 0, 1, 0, b"", 0.0, None, -1, -1]
    with pytest.raises(MessageError, match="nan is not within"):
        decode(msgpack.packb([10, 0, 0, b"", 0, sampling, None, 0, "", None, False]))


def test_a_part_that_need_not_be_there_is_checked_where_it_is() -> None:
    rules = [0.0, 0.0, 0.0, b"", b"", None, []]
    sampling = [0.0, 1.0, 0, 0, 1, 0, b"", 0.0, rules, -1, -1]
    with pytest.raises(MessageError, match=r"Sampling: LogitRules: 0\.0 is not within 1e-06"):
        decode(msgpack.packb([10, 0, 0, b"", 0, sampling, None, 0, "", None, False]))


def test_too_large() -> None:
    with pytest.raises(MessageError, match="the limit is"):
        decode(bytes(wire.MAX_MESSAGE_BYTES + 1))


def test_an_unchanged_plan_is_a_few_bytes() -> None:
    assert len(encode(BatchPlan(0, 100_000))) <= 16


@given(st.lists(st.integers(-(2**31), 2**31 - 1)))
def test_int32s(numbers: list[int]) -> None:
    packed = pack_int32(numbers)
    assert len(packed) == 4 * len(numbers)
    assert unpack_int32(packed).tolist() == numbers


@given(st.lists(st.integers(-(2**63), 2**63 - 1)))
def test_int64s(numbers: list[int]) -> None:
    assert unpack_int64(pack_int64(numbers)).tolist() == numbers


def test_integers_that_do_not_fit() -> None:
    with pytest.raises(OverflowError):
        pack_int32([2**31])
    with pytest.raises(MessageError, match="3 bytes are no whole number of 4-byte integers"):
        unpack_int32(b"abc")


def test_expect() -> None:
    result = StepResult(0, 1, b"", StepTiming(0, 0, 0))
    assert expect(result, StepResult) is result
    with pytest.raises(MessageError, match="expected Stop, got StepResult"):
        expect(result, Stop)


def test_nothing_in_the_package_unpickles() -> None:
    root = Path(messages.__file__).resolve().parents[1]
    sources = [path for folder in ("ipc", "scheduler", "tpworker") for path in (root / folder).rglob("*.py")]
    assert len(sources) > 20
    forbidden = re.compile(
        r"\b(pickle|marshal|shelve|multiprocessing|send_pyobj|recv_pyobj|eval|exec)\b *[.(]"
    )
    assert not [path for path in sources if forbidden.search(path.read_text())]


def test_bounds_are_inclusive() -> None:
    assert Within(0, 1) == Within(0, 1)
    assert decode(encode(Stop(0))) == Stop(0)
    assert decode(encode(Stop(2**31))) == Stop(2**31)
    with pytest.raises(MessageError):
        decode(encode(Stop(2**31 + 1)))


def test_a_name_has_a_length() -> None:
    with pytest.raises(MessageError, match="a length of 0 is not within 1 and 64"):
        decode(encode(Hello(1, "", 0)))
