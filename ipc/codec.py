"""Dataclasses as msgpack, and back: what comes in is checked, types and bounds, before anybody sees it.

A dataclass is the array of its fields, in order; one that is a part of another is the array of its own fields
there. The checks are built once, from the type hints: `Annotated[int, Within(0, 63)]`. Nothing is unpickled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import msgpack


class MessageError(Exception):
    """Bytes that are not a message of this protocol, or whose fields are out of bounds."""


@dataclass(frozen=True)
class Within:
    """Bounds of an integer or a float, both ends included; of a string or bytes: of its length."""

    low: float
    high: float


_T = TypeVar("_T")
_Check = Callable[[Any], Any]
_codecs: dict[type[Any], Codec] = {}


class Codec:
    """Packs and unpacks one dataclass; its checks are built once, from the type hints."""

    def __init__(self, cls: type[Any]) -> None:
        _codecs[cls] = self
        self.cls = cls
        self.names = [field.name for field in fields(cls)]
        hints = get_type_hints(cls, include_extras=True)
        getter = attrgetter(*self.names)  # of one name it gives the bare value
        self.values: Callable[[Any], Any] = getter if len(self.names) > 1 else lambda m: (getter(m),)
        self.checks = [_check_for(hints[name]) for name in self.names]
        self.parts = [i for i, name in enumerate(self.names) if _part_of(hints[name]) is not None]

    def pack(self, message: Any) -> list[Any]:
        values = list(self.values(message))
        for i in self.parts:
            value = values[i]
            if isinstance(value, tuple):
                values[i] = [codec_of(type(part)).pack(part) for part in value]
            elif value is not None:
                values[i] = codec_of(type(value)).pack(value)
        return values

    def unpack(self, values: Any) -> Any:
        if type(values) is not list or len(values) != len(self.checks):
            raise MessageError(f"{self.cls.__name__}: expected an array of {len(self.checks)} fields")
        try:
            return self.cls(*[check(value) for check, value in zip(self.checks, values, strict=True)])
        except MessageError as error:
            raise MessageError(f"{self.cls.__name__}: {error}") from None


def _is_part(hint: Any) -> bool:
    return isinstance(hint, type) and hasattr(hint, "__dataclass_fields__")


def _part_of(hint: Any) -> Any:
    """The dataclass that a field holds, directly, in a tuple or else None; None for plain values."""
    if get_origin(hint) is tuple:
        hint = get_args(hint)[0]
    for kind in get_args(hint):
        if _is_part(kind):
            return kind
    return hint if _is_part(hint) else None


def _check_for(hint: Any) -> _Check:
    if get_origin(hint) is tuple:
        return _check_tuple(_check_for(get_args(hint)[0]))
    if _is_part(hint):
        return codec_of(hint).unpack
    if get_origin(hint) is Annotated:
        base, bounds = get_args(hint)
        return _check_sized(base, bounds) if base in (bytes, str) else _check_number(base, bounds)
    if hint is bool:
        return _check_bool
    optional = [arg for arg in get_args(hint) if arg is not type(None)]
    if len(optional) == 1:
        inner = _check_for(optional[0])
        return lambda value: None if value is None else inner(value)
    raise TypeError(f"no check for {hint!r}")  # a mistake in a message, found on import


def _check_tuple(inner: _Check) -> _Check:
    def check(value: Any) -> Any:
        if type(value) is not list:
            raise MessageError(f"expected an array, got {type(value).__name__}")
        return tuple([inner(item) for item in value])

    return check


def _check_number(base: Any, bounds: Within) -> _Check:
    low, high = bounds.low, bounds.high

    def check(value: Any) -> Any:
        if type(value) is not base:
            raise MessageError(f"expected {base.__name__}, got {type(value).__name__}")
        if not low <= value <= high:
            raise MessageError(f"{value} is not within {low} and {high}")
        return value

    return check


def _check_sized(base: Any, bounds: Within) -> _Check:
    low, high = bounds.low, bounds.high

    def check(value: Any) -> Any:
        if type(value) is not base:
            raise MessageError(f"expected {base.__name__}, got {type(value).__name__}")
        if not low <= len(value) <= high:
            raise MessageError(f"a length of {len(value)} is not within {low} and {high}")
        return value

    return check


def _check_bool(value: Any) -> bool:
    if type(value) is not bool:
        raise MessageError(f"expected bool, got {type(value).__name__}")
    return value


def codec_of(cls: type[Any]) -> Codec:
    """The one codec of a dataclass."""
    return _codecs.get(cls) or Codec(cls)


def pack_dataclass(value: Any) -> bytes:
    """A dataclass with annotated fields as bytes."""
    cls = type(value)
    data: bytes = msgpack.packb(codec_of(cls).pack(value))
    return data


def unpack_dataclass(cls: type[_T], data: bytes) -> _T:
    """The inverse of `pack_dataclass`, checked.

    Raises:
        MessageError: not msgpack, a wrong number of fields, a wrong type, out of bounds.
    """
    try:
        values = msgpack.unpackb(data, strict_map_key=True)
    except Exception as error:  # as in decode
        raise MessageError(f"not msgpack: {error}") from None
    value: _T = codec_of(cls).unpack(values)
    return value
