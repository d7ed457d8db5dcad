"""Messages as bytes, in msgpack.

A message is an array: its tag, then its fields in order. A part of another message (an `Admission` in a
`BatchPlan`) is the array of its fields. What comes in is checked, types and bounds, before anybody sees it;
nothing is ever unpickled.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgpack

from tpworker.ipc.codec import MessageError, codec_of
from tpworker.ipc.messages import (
    Abort,
    Allocate,
    BatchPlan,
    Failed,
    Hello,
    Message,
    RankLoaded,
    RankReady,
    ResetPrefixCache,
    SchedulerReady,
    StepOutput,
    StepResult,
    Stop,
    Submit,
    Vocabulary,
)

MAX_MESSAGE_BYTES = 1 << 26

_T = TypeVar("_T")

_BY_TAG: dict[int, type[Any]] = {
    1: Hello,
    2: RankLoaded,
    3: Allocate,
    4: RankReady,
    5: SchedulerReady,
    6: Stop,
    10: Submit,
    11: Abort,
    12: Vocabulary,
    13: ResetPrefixCache,
    20: BatchPlan,
    30: StepResult,
    31: StepOutput,
    32: Failed,
}
_TAG_OF = {cls: tag for tag, cls in _BY_TAG.items()}


for _cls in _BY_TAG.values():
    codec_of(_cls)  # a field that cannot be checked is found on import


def encode(message: Message) -> bytes:
    """A message as bytes. Numbers are not checked here but where they come in."""
    cls = type(message)
    data: bytes = msgpack.packb([_TAG_OF[cls], *codec_of(cls).pack(message)])
    return data


def decode(data: bytes) -> Message:
    """Bytes as a message.

    Raises:
        MessageError: not msgpack, an unknown tag, a wrong number of fields, a wrong type, out of bounds.
    """
    if len(data) > MAX_MESSAGE_BYTES:
        raise MessageError(f"a message of {len(data)} bytes; the limit is {MAX_MESSAGE_BYTES}")
    try:
        values = msgpack.unpackb(data, strict_map_key=True)
    except Exception as error:  # msgpack raises half a dozen kinds, ValueError and its own among them
        raise MessageError(f"not msgpack: {error}") from None
    if type(values) is not list or not values or type(values[0]) is not int:
        raise MessageError("expected an array that begins with a tag")
    cls = _BY_TAG.get(values[0])
    if cls is None:
        raise MessageError(f"unknown tag {values[0]}")
    message: Message = codec_of(cls).unpack(values[1:])
    return message


def expect(message: Message, cls: type[_T]) -> _T:
    """The message, if it is of the class that the protocol calls for at this point."""
    if not isinstance(message, cls):
        raise MessageError(f"expected {cls.__name__}, got {type(message).__name__}")
    return message
