"""From a bound port to a clean end: the HTTP server's life around a runtime's."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Callable, Coroutine, Generator
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import uvicorn
from starlette.types import ASGIApp

from tpworker.errors import ConfigError, RuntimeFailed
from tpworker.server.app import create_app
from tpworker.server.connection import KEEP_ALIVE_S, Connection, Crowd
from tpworker.server.descriptors import max_connections
from tpworker.server.options import FrontOptions, Tls
from tpworker.server.request_log import tell_rest
from tpworker.server.seldom import seldom
from tpworker.server.signals import Signals, watched_signals

if TYPE_CHECKING:
    from tpworker.runtime.runtime import Runtime

logger = logging.getLogger(__name__)

DRAIN_S = 20.0
"""How long open requests may take to end after the first signal."""
_FLUSH_S = 5  # how long clients may take to read the end of their streams
_HASTY_S = 1  # the same, and for the processes to end by themselves, once it has to be quick
_CLOSE = (b"connection", b"close")
_BACKLOG = 2048  # connections that the system holds for us until we come to accept them
_ACCEPTED_AT_ONCE = 16  # of them: so few that it is seen in time when there are too many
_POLL_S = 0.2


def bind(host: str, port: int) -> socket.socket:
    """A listening socket, so that a port in use is found before a model is loaded.

    Raises:
        ConfigError: the port is in use or not allowed, or the host is not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(_BACKLOG)
        except OSError:
            listener.close()
            raise
    except (OSError, UnicodeError) as error:
        raise ConfigError(_why_not_bound(host, port, error)) from error
    return listener


def _why_not_bound(host: str, port: int, error: OSError | UnicodeError) -> str:
    if isinstance(error, UnicodeError):  # from Python's own conversion of names to ASCII
        return f"--host {host!r} is no name of a host: use 127.0.0.1 for this machine alone, or 0.0.0.0"
    if error.errno == errno.EADDRINUSE:
        return (
            f"--port {port} is in use on {host}: choose another one (0 takes any that is free), or end the "
            f"program that has it (`ss -ltnp 'sport = :{port}'` shows which)"
        )
    if error.errno == errno.EACCES:
        return f"--port {port} may not be used by this user: choose one from 1024 on"
    if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
        return (
            f"--host {host} is no address of this machine: use 127.0.0.1 for this machine alone, or 0.0.0.0"
        )
    return f"cannot listen on --host {host} --port {port}: {error}"


async def run_server(
    runtime: Runtime,
    listener: socket.socket,
    options: FrontOptions | None = None,
    *,
    tls: Tls | None = None,
    on_ready: Callable[[], None] = lambda: None,
    drain_timeout: float = DRAIN_S,
) -> None:
    """Start the runtime and serve it until a signal comes, or until it fails. Stops both in the end.

    The server answers while the runtime starts (/ready says when). At the first signal it takes no more
    requests, which are told so, and waits for the open ones; at the second it ends them, and is quick about
    it (see `Signals`, which says of which).

    Args:
        runtime: not started yet.
        listener: from `bind`.
        options: of the front.
        tls: the files for https, which have been checked; None: http.
        on_ready: called when requests are taken.
        drain_timeout: seconds that open requests may take after the first signal.

    Raises:
        RuntimeFailed: the runtime failed; open requests were told.
        ConfigError, ModelError: it could not start.
    """
    crowd = Crowd(max_connections(runtime.config))
    server = Server(http_config(create_app(runtime, options), crowd, tls))
    hurry: Callable[[], Coroutine[Any, Any, object]]  # when it ends, processes that have not yet are killed
    with seldom(), watched_signals() as signals:
        hurry = signals.one
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            if not await _first_of(runtime.start(), signals.one()):
                logger.warning("%s: ended before it was ready", signals.last)
                return
            on_ready()
            if await _first_of(_ended(runtime, serving), signals.one()):
                # Its traceback is in the log already: the runtime wrote it when it failed.
                raise RuntimeFailed(runtime.health().summary or "the HTTP server ended")
            server.close_behind_answers()
            if not await _drain(runtime, drain_timeout, signals):
                hurry = partial(asyncio.sleep, _HASTY_S)
                server.config.timeout_graceful_shutdown = _HASTY_S
        finally:
            # In this order: a stopped runtime ends all streams, and the server waits for those.
            if not await _first_of(runtime.stop(), hurry()):
                logger.warning("the processes did not end at once, and have been killed")
            server.should_exit = True
            await serving
            tell_rest()


async def _ended(runtime: Runtime, serving: asyncio.Task[None]) -> None:
    """Until there is nothing more to serve."""
    while runtime.health().state != "failed" and not serving.done():
        await asyncio.sleep(_POLL_S)


async def _first_of(work: Coroutine[Any, Any, object], other: Coroutine[Any, Any, object]) -> bool:
    """Whether `work` ended, or raised, before `other` did. The later one is cancelled."""
    tasks = [asyncio.create_task(work), asyncio.create_task(other)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        first = tasks[0].done()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    if first:
        tasks[0].result()
    return first


def http_config(app: ASGIApp, crowd: Crowd, tls: Tls | None = None) -> uvicorn.Config:
    """How uvicorn serves an app; `crowd` are the connections. None: without TLS."""
    return uvicorn.Config(
        app,
        http=partial(Connection, crowd=crowd),  # type: ignore[arg-type]  # it is called, and no more
        ws="none",
        proxy_headers=False,  # who asks makes no difference
        log_config=None,
        access_log=False,
        lifespan="off",
        backlog=_ACCEPTED_AT_ONCE,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=_FLUSH_S,
        ssl_certfile=None if tls is None else tls.certfile,
        ssl_keyfile=None if tls is None else tls.keyfile,
    )


class Server(uvicorn.Server):
    """uvicorn's, with `http_config`; signals are not its own."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or ():
            listener.listen(_BACKLOG)  # uvicorn has one number for both, and has set that now

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield  # they are run_server's

    def close_behind_answers(self) -> None:
        """From now on each answer is its connection's last, and says so. Who comes still is answered: a
        refused connection would tell nobody that another server is to be asked."""
        self.config.encoded_headers.append(_CLOSE)  # which every second are made the default once more
        self.server_state.default_headers = [*self.server_state.default_headers, _CLOSE]
        for connection in self.server_state.connections:
            cast("Connection", connection).close_behind_answer()


async def _drain(runtime: Runtime, timeout: float, signals: Signals) -> bool:
    """Waits for the open requests, and says how many were not waited for to their end.

    Returns:
        False: a signal has said not to wait.
    """
    say = logger.warning  # no fault, but whoever reads the log wants to know why it ends there
    num_open = runtime.stats().open
    waits = f"; {_requests(num_open)} open, which may take {timeout:g} s more" if num_open else ""
    say("%s: no more requests are taken%s", signals.last, waits)
    why, is_hasty = f"at the deadline, {timeout:g} s after {signals.last}", False
    with suppress(TimeoutError):
        if await _first_of(runtime.drain(timeout), signals.one()):
            return True
        why, is_hasty = f"at once, at one more signal ({signals.last})", True
    if num_open := runtime.stats().open:
        say("%s cut %s", _requests(num_open), why)
    return not is_hasty


def _requests(number: int) -> str:
    return "1 request is" if number == 1 else f"{number} requests are"
