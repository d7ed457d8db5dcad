"""What pool.py and child.py say to each other: msgpack, with its length in 8 bytes before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import msgpack

NO_MEMORY_STATUS: Final = 3
"""The exit status of a process that wanted more memory than it may have."""


def pack(value: Any) -> bytes:
    """A frame. Half of a surrogate pair is for whoever tokenises to refuse.

    Raises:
        TypeError, ValueError, OverflowError: it is not plain data, is nested too deeply, or holds an
            integer of more than 64 bits.
    """
    data: bytes = msgpack.packb(value, unicode_errors="surrogatepass")
    return len(data).to_bytes(8, "little") + data


def receive(recv: Callable[[int], bytes]) -> Any:
    """The value of the next frame; None at the end of the stream.

    Args:
        recv: gives at most so many bytes, and none at the end, as a socket's does.
    """
    size = int.from_bytes(_exactly(recv, 8), "little")
    data = _exactly(recv, size)
    if not size or len(data) < size:
        return None
    return msgpack.unpackb(data, strict_map_key=False, unicode_errors="surrogatepass")


def _exactly(recv: Callable[[int], bytes], size: int) -> bytearray:
    """As many bytes, or fewer at the end of the stream."""
    data = bytearray()
    while len(data) < size and (part := recv(min(size - len(data), 1 << 20))):
        data += part
    return data
