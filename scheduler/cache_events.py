"""What changes in the prefix cache, collected for those who are told of it (ipc/kv_events.py)."""

from __future__ import annotations

from collections.abc import Callable

from tpworker.ipc.kv_events import Event, Stored
from tpworker.scheduler.kept_blocks import Node


class CacheEvents:
    """Told by the block pool, as it happens.

    Args:
        publish: given what has happened since the last call, in order.
    """

    def __init__(self, publish: Callable[[list[Event]], None]) -> None:
        self._publish = publish
        self._events: list[Event] = [None]  # whatever was told by others before

    def stored(self, node: int, parent: Node, tokens: bytes) -> None:
        """A content is known, and found from the next plan on."""
        self._events.append(Stored(node, parent if isinstance(parent, int) else parent.salt, tokens))

    def removed(self, node: int) -> None:
        """It is not found any more."""
        self._events.append(node)

    def cleared(self) -> None:
        """Nothing is."""
        self._events = [None]

    def flush(self) -> None:
        """Publishes what has been collected. Costs a microsecond if something has, and else nothing."""
        if self._events:
            self._publish(self._events)
            self._events = []
