"""Reading the bodies of requests: how long one may be, how long it may take, and how much all may hold."""

from __future__ import annotations

import asyncio

from starlette.types import Receive

from tpworker.server.errors import SOON, ApiError

BODY_BYTES = 1 << 20
BODY_BYTES_PER_TOKEN = 16
"""A body may have BODY_BYTES, and so many for each token of max_model_len: room for a prompt that fits, with
escapes, and for what is around it. Not more, for parsing holds up every other request, by 50 ms a MB of token
ids, and so it would in a thread: it keeps the interpreter lock."""
BODY_S = 120.0
"""From a request's headers to the end of its body: the longest ones are some MB, and a link that does not
carry these in two minutes cannot be waited for."""
PAUSE_S = 20.0
"""Between two parts of a body: a client has it all at hand when it begins, or makes it while it sends."""
HELD_BYTES = 256 << 20
"""Of the bodies of all open requests together, from their first byte until they are answered. What comes of a
body in memory is two to five times as much. That is 16 KB for each of 16,000, or 1 MB for 256 at once."""
FREE_BYTES = 16 << 10
"""Of each body: these do not count, so that a short request finds room whatever the long ones do. The bound
on connections bounds their sum too."""


class Disconnected(Exception):
    """The client has left before its body's end."""


class Refused(Exception):
    """A body that is not taken."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(error.message)
        self.error = error


class Bodies:
    """What the bodies of all open requests hold."""

    def __init__(self) -> None:
        self.num_held = 0
        self._held_bytes = HELD_BYTES

    async def read(self, body: Body, receive: Receive, limit: int) -> bytes:
        """A request's body, in at most BODY_S. It counts until `body` is released.

        What is too long is read to its end, or to eight times the limit, and not kept: a client that cannot
        send its body would not read why.

        Args:
            limit: most bytes of one body.

        Raises:
            Disconnected: by the client.
            Refused: it is too long, comes too slowly, or there is no room for it.
        """
        try:
            async with asyncio.timeout(BODY_S):
                return await self._read(body, receive, limit)
        except TimeoutError:
            message = f"the body did not come to its end within {BODY_S:.0f} s, or paused for {PAUSE_S:.0f} s"
            raise Refused(
                ApiError(408, f"{message}: send it faster", code="timeout", headers=_CLOSE)
            ) from None

    async def _read(self, body: Body, receive: Receive, limit: int) -> bytes:
        parts: list[bytes] = []
        num_read = 0
        refused: Refused | None = None
        while True:
            async with asyncio.timeout(PAUSE_S):
                message = await receive()
            if message["type"] == "http.disconnect":
                raise Disconnected
            part: bytes = message.get("body", b"")
            num_read += len(part)
            if refused is None:
                if num_read > limit:
                    refused = Refused(_too_long(limit))
                elif not body.hold(num_read):
                    refused = Refused(self._no_room())
                else:
                    parts.append(part)
            if refused is not None:
                parts.clear()
                body.release()
            if not message.get("more_body", False) or num_read > 8 * limit:
                if refused is not None:
                    raise refused
                return b"".join(parts)

    def _no_room(self) -> ApiError:
        return ApiError(
            503,
            f"the bodies of the requests that are open hold {self._held_bytes >> 20} MiB already: try again "
            "later, or send shorter prompts",
            "service_unavailable",
            code="bodies_full",
            headers=SOON,
        )

    def take(self, num_bytes: int) -> bool:
        """Whether there is room for so many more bytes; then they count."""
        if num_bytes > 0 and self.num_held + num_bytes > self._held_bytes:
            return False
        self.num_held += num_bytes
        return True


class Body:
    """What one body holds; a context manager."""

    def __init__(self, bodies: Bodies) -> None:
        self._bodies = bodies
        self._num_held = 0

    def hold(self, num_bytes: int) -> bool:
        """Whether there is room for it to have so many bytes in all."""
        num_more = max(0, num_bytes - FREE_BYTES) - self._num_held
        if not self._bodies.take(num_more):
            return False
        self._num_held += num_more
        return True

    def release(self) -> None:
        """It holds nothing any more."""
        self._bodies.take(-self._num_held)
        self._num_held = 0

    def __enter__(self) -> Body:
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()


_CLOSE = {"Connection": "close"}


def _too_long(limit: int) -> ApiError:
    return ApiError(
        413,
        f"the body is longer than {limit} bytes ({BODY_BYTES}, and {BODY_BYTES_PER_TOKEN} for each "
        "token of max_model_len): shorten the prompt, or spread several prompts over several "
        "requests",
        code="body_too_large",
    )
