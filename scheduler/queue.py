"""Requests that wait for a slot, in the order of their keys: (priority, arrival), the lowest first.

All operations cost O(log n): with 10,000 waiting, one more, one less and a look at the first are all cheap.
What is removed stays in the heap, unseen, until it comes to its head or half of the heap is such.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from tpworker.scheduler.requests import Key, Request


class Queue:
    """A priority queue from which any request can be removed."""

    def __init__(self) -> None:
        self._heap: list[tuple[Key, Request]] = []  # keys are unique: requests are never compared
        self._num_tokens: dict[Key, int] = {}  # that each had when it came
        self.num_tokens = 0
        """Of all requests in it, as they came: one that was preempted may get some more while it waits."""
        self._removed: set[Key] = set()

    def __len__(self) -> int:
        return len(self._heap) - len(self._removed)

    def __iter__(self) -> Iterator[Request]:
        """In no order."""
        return (request for key, request in self._heap if key not in self._removed)

    def push(self, request: Request) -> None:
        """It waits from now on; it must not be in the queue."""
        heapq.heappush(self._heap, (request.key, request))
        self._num_tokens[request.key] = len(request.tokens)
        self.num_tokens += len(request.tokens)

    def first(self) -> Request:
        """The next request; there must be one."""
        while self._heap[0][0] in self._removed:
            self._removed.remove(heapq.heappop(self._heap)[0])
        return self._heap[0][1]

    def pop(self) -> Request:
        """Takes the next request out; there must be one."""
        request = self.first()
        heapq.heappop(self._heap)
        self.num_tokens -= self._num_tokens.pop(request.key)
        self._forget_removed()
        return request

    def remove(self, request: Request) -> None:
        """Takes out a request that is in the queue, for good: it is never pushed again."""
        self._removed.add(request.key)
        self.num_tokens -= self._num_tokens.pop(request.key)
        self._forget_removed()

    def _forget_removed(self) -> None:
        if len(self._removed) > len(self._heap) // 2:
            self._heap = [entry for entry in self._heap if entry[0] not in self._removed]
            heapq.heapify(self._heap)
            self._removed.clear()
