"""Arrays of integers as bytes: token ids, slots, blocks and requests cross the wire as these."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable

from tpworker.ipc.codec import MessageError


def pack_int32(values: Iterable[int]) -> bytes:
    """Little-endian 32-bit integers, e.g. token ids. Raises OverflowError when one does not fit."""
    packed = array("i", values)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_int32(data: bytes) -> array[int]:
    """The inverse of `pack_int32`, an array that behaves like a list of integers."""
    return _unpack("i", data)


def pack_int64(values: Iterable[int]) -> bytes:
    """Little-endian 64-bit integers, e.g. request ids."""
    packed = array("q", values)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_int64(data: bytes) -> array[int]:
    """The inverse of `pack_int64`."""
    return _unpack("q", data)


def _unpack(typecode: str, data: bytes) -> array[int]:
    unpacked: array[int] = array(typecode)
    if len(data) % unpacked.itemsize:
        raise MessageError(f"{len(data)} bytes are no whole number of {unpacked.itemsize}-byte integers")
    unpacked.frombytes(data)
    if sys.byteorder == "big":
        unpacked.byteswap()
    return unpacked
