"""Clients that cost little: so many streams at a time, of which only the bytes are looked at.

python -m benchmarks.host.http_clients PORT PATH BODY NUM_STREAMS

Asks again on the same connection as soon as an answer has ended, until its stdin is closed. A line on stdin
is answered with the number of events that have come. Answers that are not 200, or connections that end, end
it with an error: nothing is measured then.
"""

from __future__ import annotations

import re
import selectors
import socket
import sys

_LAST_CHUNK = b"\r\n0\r\n\r\n"
_LENGTH = re.compile(rb"\r\ncontent-length: (\d+)\r\n")
_EVENT = b"data: {"


class Client:
    """One connection."""

    num_events = 0
    """Of all clients; one that comes in two parts may not be seen."""

    def __init__(self, port: int, request: bytes) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self._request = request
        self._ask()

    def _ask(self) -> None:
        self._is_new = True
        self._left: int | None = None  # bytes of an answer whose length is told
        self._tail = b""
        self.socket.sendall(self._request)

    def read(self) -> None:
        """What has come; asks again where it was the end of an answer."""
        data = self.socket.recv(1 << 16)
        if not data:
            raise ConnectionError("the server closed a connection")
        if self._is_new:
            if not data.startswith(b"HTTP/1.1 200 "):
                raise ConnectionError(f"the server answered: {data[:500]!r}")
            self._is_new = False
            head, _, body = data.partition(b"\r\n\r\n")
            if length := _LENGTH.search(head + b"\r\n"):
                self._left, data = int(length[1]), body
        if self._left is None:
            Client.num_events += data.count(_EVENT)
            self._tail = (self._tail + data)[-len(_LAST_CHUNK) :]
            is_over = self._tail == _LAST_CHUNK
        else:
            self._left -= len(data)
            is_over = not self._left
        if is_over:
            self._ask()


def main(port: int, path: str, body: str, num_streams: int) -> None:
    """Asks and reads until stdin ends."""
    payload = body.encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(payload)}"
    )
    request = f"{head}\r\n\r\n".encode() + payload
    with selectors.DefaultSelector() as selector:
        selector.register(sys.stdin, selectors.EVENT_READ)
        for _ in range(num_streams):
            client = Client(port, request)
            selector.register(client.socket, selectors.EVENT_READ, client)
        while True:
            for key, _ in selector.select():
                if key.data is not None:
                    key.data.read()
                elif sys.stdin.readline():
                    print(Client.num_events, flush=True)
                else:
                    return


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]))
