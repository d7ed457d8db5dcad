"""Where a runtime tells of what its prefix cache holds, in the words of vLLM's --kv-events-config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from tpworker.errors import ConfigError, shown
from tpworker.keywords import Named
from tpworker.values import number, plain, string

_MAX_STEPS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class KvEventsConfig(Named):
    """Changes of the prefix cache, published over ZeroMQ for routers that know prefixes.

    They tell all token ids of all prompts and outputs, to whoever can connect: keep the endpoints within a
    network of your own.
    """

    enable_kv_cache_events: bool = False
    """False: nothing is published, whatever the rest says."""
    publisher: Literal["zmq", "null"] | None = None
    """`null`: nothing is published. None: `zmq`."""
    endpoint: str = "tcp://*:5557"
    """Of the PUB socket: bound where it is tcp://*:PORT, tcp://[::]:PORT, tcp://0.0.0.0:PORT or ipc://PATH;
    connected else."""
    replay_endpoint: str | None = None
    """Of a ROUTER socket, bound, that sends again what a subscriber has missed. None: there is none."""
    buffer_steps: int = 10_000
    """So many batches can be had again."""
    hwm: int = 100_000
    """So many batches wait for a subscriber that is slow; those that come then are lost to it."""
    max_queue_size: int = 100_000
    """So many batches wait to be published; after a loss subscribers are told that all is gone."""
    topic: str = ""
    """What subscribers subscribe to."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            value = number(value, int) if field.type == "int" else string(plain(value))
            object.__setattr__(self, field.name, value)
        self._check(isinstance(self.enable_kv_cache_events, bool), "enable_kv_cache_events", "true or false")
        self._check(self.publisher in ("zmq", "null", None), "publisher", "zmq or null")
        for name in ("endpoint", "replay_endpoint"):
            value = getattr(self, name)
            is_none = value is None and name == "replay_endpoint"
            is_address = (
                isinstance(value, str) and value.startswith(("tcp://", "ipc://")) and len(value) < 256
            )
            self._check(is_none or is_address, name, "tcp://HOST:PORT or ipc://PATH")
        self._check(self.endpoint != self.replay_endpoint, "replay_endpoint", "another one than endpoint")
        for name, most in (("buffer_steps", _MAX_STEPS), ("hwm", 2**30), ("max_queue_size", 2**30)):
            value = getattr(self, name)
            self._check(type(value) is int and 1 <= value <= most, name, f"an integer from 1 to {most}")
        is_topic = isinstance(self.topic, str) and len(self.topic) <= 64
        self._check(is_topic, "topic", "a string of at most 64 characters")

    @property
    def is_on(self) -> bool:
        """Whether anything is published."""
        return self.enable_kv_cache_events and self.publisher != "null"

    def _check(self, ok: bool, name: str, limit: str) -> None:
        if not ok:
            raise ConfigError(f"kv_events_config: {name}={shown(getattr(self, name))}: must be {limit}")


def kv_events_config(value: Any) -> Any:
    """What a caller gives: a mapping of the fields is one too; anything else as it is.

    Raises:
        ConfigError: a field that there is not, or out of range.
    """
    if not isinstance(value, Mapping):
        return value
    try:
        return KvEventsConfig(**{str(name): one for name, one in value.items()})
    except TypeError as error:
        raise ConfigError(f"kv_events_config: {error}") from None
