"""Clients that leave before they have their answer, and servers that do."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.types import Receive

from tpworker.errors import RuntimeSleeping, RuntimeStopped
from tpworker.server.gate import OUTCOME

T = TypeVar("T")


CUT = "the server is shutting down before this request has ended: send it again"
"""What clients are told whose requests were taken."""


class ClientLeft(Exception):
    """Nobody waits for the answer any more."""


async def client_left(receive: Receive) -> None:
    """Until the client has left; its body has been read before."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_left(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` gives. A client that leaves cancels it, so that what has not begun is not done.

    Raises:
        ClientLeft: it has left.
        RuntimeStopped: the runtime has, in words for the client.
    """
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(client_left(request.receive))
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            request.scope[OUTCOME] = "disconnected"
            raise ClientLeft
        try:
            return working.result()
        except RuntimeSleeping:
            raise
        except RuntimeStopped as error:
            raise RuntimeStopped(CUT) from error
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
