"""What users give as values, in whatever type: as Python's own."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote, urlsplit

from tpworker.errors import ConfigError, shown

MAX_SEED = 2**63 - 1
MAX_RANKS = 64

_AUTHORITY = r"(\[[^\s\[\]]+\]|[^\s\[\]\\:]+)(:\d*)?"
"""A host, IPv6 in brackets, and a port."""


def is_utf8(text: str) -> bool:
    """Whether it can be written: bytes of a command line that are no UTF-8 come as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_address(text: str) -> bool:
    """Whether ranks may join at an address of that name."""
    return re.fullmatch(r"[A-Za-z0-9._-]{1,64}", text) is not None


class ServerUrl(NamedTuple):
    """Where a server is."""

    scheme: str
    """'http' or 'https'."""
    host: str
    port: int
    authority: str
    """As the header Host has it."""
    path: str
    """What stands before /v1; '' mostly."""


def server_url(text: str) -> ServerUrl:
    """A server's URL in any of the ways in which people name one: with /v1 or without.

    Raises:
        ConfigError: it is none.
    """
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:  # brackets that do not match, a port that is none
        parts, port = urlsplit(""), None
    authority = parts.netloc.rpartition("@")[2]
    is_web = parts.scheme in ("http", "https")
    if not is_web or not parts.hostname or port == 0 or not re.fullmatch(_AUTHORITY, authority):
        raise ConfigError(f"{shown(text)} is no URL of a server: as http://127.0.0.1:8000")
    try:  # names and paths in any script, in the letters that travel
        host = parts.hostname.encode("idna").decode()
    except UnicodeError as error:
        raise ConfigError(
            f"{shown(text)} is no URL of a server: its host's name cannot be one ({error})"
        ) from None
    if not authority.isascii():
        authority = host if port is None else f"{host}:{port}"
    path = quote(parts.path.rstrip("/").removesuffix("/v1"), safe="/%:@!$&'()*+,;=~")
    usual = 443 if parts.scheme == "https" else 80
    return ServerUrl(parts.scheme, host, port or usual, authority, path)


def is_server_url(text: str) -> bool:
    """Whether `server_url` takes it."""
    with suppress(ConfigError):
        return bool(server_url(text))
    return False


def plain(value: Any) -> Any:
    """What a scalar of an array library holds (numpy, torch; also an array of no dimensions), as Python's own
    type; anything else as it is."""
    is_scalar = getattr(value, "ndim", None) == 0 and hasattr(value, "item")
    return value.item() if is_scalar else value


def string(value: Any) -> Any:
    """A string of whatever type (numpy's, a member of an enumeration) as a str; anything else as it is."""
    value = plain(value)
    return str.__str__(value) if isinstance(value, str) else value


def dtype_name(value: Any) -> Any:
    """What an array library calls a type of numbers (`torch.bfloat16`, `numpy.float32`); else `string`."""
    if type(value).__name__.startswith(("dtype", "Float")):  # numpy has a class for each: Float32DType
        return str(value).removeprefix("torch.")
    is_numpys = isinstance(value, type) and hasattr(value, "dtype")
    return value.__name__ if is_numpys else string(value)


def number(value: Any, kind: type[int] | type[float]) -> Any:
    """A number of whatever type as an int, or, for `float`, as an int or a float; anything else, a bool above
    all, as it is."""
    value = plain(value)
    if isinstance(value, (bool, str)) or getattr(value, "ndim", None):  # no array is a number
        return value
    try:
        if hasattr(value, "__index__"):
            return operator.index(value)
        if kind is float and hasattr(value, "__float__"):
            return float(value)
    except (TypeError, ValueError, OverflowError):
        pass
    return value


_K = TypeVar("_K")
_V = TypeVar("_V")


class FrozenDict(Mapping[_K, _V]):
    """A mapping that stays as it is and has a hash. Unlike `MappingProxyType` it can be copied."""

    __slots__ = ("_items",)

    def __init__(self, items: Mapping[_K, _V]) -> None:
        self._items = dict(items)

    def __getitem__(self, key: _K) -> _V:
        return self._items[key]

    def __iter__(self) -> Iterator[_K]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(frozenset(self._items.items()))

    def __repr__(self) -> str:
        return repr(self._items)
