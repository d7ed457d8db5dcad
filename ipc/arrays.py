"""Arrays of numbers as bytes: token ids, slots, blocks, requests and logprobs cross the wire as these."""

from __future__ import annotations

import struct
import sys
from array import array
from collections.abc import Iterable, Iterator

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


def pack_float32(values: Iterable[float]) -> bytes:
    """Little-endian float32, e.g. biases."""
    listed = list(values)
    return struct.pack(f"<{len(listed)}f", *listed)


_LOGPROB_ROW = struct.Struct("<21f20i")


def unpack_logprobs(rows: bytes) -> Iterator[tuple[float, list[tuple[int, float]]]]:
    """Of each logprob row (`LOGPROB_ROW_BYTES`) the token's own, and the likeliest as (id, logprob)."""
    for own, *values in _LOGPROB_ROW.iter_unpack(rows):
        top, ids = values[:20], values[20:]
        yield own, [(token, logprob) for token, logprob in zip(ids, top, strict=True) if token >= 0]


def _unpack(typecode: str, data: bytes) -> array[int]:
    unpacked: array[int] = array(typecode)
    if len(data) % unpacked.itemsize:
        raise MessageError(f"{len(data)} bytes are no whole number of {unpacked.itemsize}-byte integers")
    unpacked.frombytes(data)
    if sys.byteorder == "big":
        unpacked.byteswap()
    return unpacked
