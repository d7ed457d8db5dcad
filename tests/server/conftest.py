"""A server on a real socket, around a runtime that is told what to say."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

import httpx
import openai
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from tests.server.fake_runtime import FakeRuntime
from tpworker.server import FrontOptions, bind, create_app
from tpworker.server.connection import Crowd
from tpworker.server.serve import Server, http_config

T = TypeVar("T")
MODEL = "fake-model"


class LiveServer:
    """uvicorn in a thread; a context manager."""

    def __init__(self, runtime: FakeRuntime, **options: Any) -> None:
        self.runtime = runtime
        self._listener = bind("127.0.0.1", 0)
        self.address = self._listener.getsockname()
        self.url = f"http{'s' if options.get('tls') else ''}://127.0.0.1:{self.address[1]}"
        mount = options.pop("mount", None)
        self.crowd = Crowd(options.pop("max_open", 1000))
        tls = options.pop("tls", None)
        app: Any = create_app(runtime, FrontOptions(**options))  # type: ignore[arg-type]
        if mount is not None:
            app = Starlette(routes=[Mount(mount, app)])
        self.server = Server(http_config(app, self.crowd, tls))
        self.server.config.timeout_graceful_shutdown = 2
        self._thread = threading.Thread(target=self._run)
        self._loop: Future[asyncio.AbstractEventLoop] = Future()

    def _run(self) -> None:
        async def serve() -> None:
            self._loop.set_result(asyncio.get_running_loop())
            await self.server.serve(sockets=[self._listener])

        asyncio.run(serve())

    def __enter__(self) -> LiveServer:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.server.should_exit = True
        self._thread.join()
        if self.runtime.the_tokenizer is not None:
            self.runtime.the_tokenizer.close()

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call a function on the server's event loop."""

        async def called() -> T:
            return function(*arguments)

        return asyncio.run_coroutine_threadsafe(called(), self._loop.result(10)).result(10)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        async def waited() -> None:
            async with asyncio.timeout(10):
                while not condition():
                    await asyncio.sleep(0.005)

        asyncio.run_coroutine_threadsafe(waited(), self._loop.result(10)).result(15)

    @property
    def openai(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="any", max_retries=0)

    @property
    def async_openai(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="any", max_retries=0)

    def post(self, path: str, **arguments: Any) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", timeout=20, **arguments)

    def get(self, path: str, **arguments: Any) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=20, **arguments)

    def metric(self, name: str) -> float:
        """One sample of /metrics, by its name and labels as they are written there."""
        for line in self.get("/metrics").text.splitlines():
            if line.startswith(f"{name} "):
                return float(line.split()[-1])
        return 0.0


@pytest.fixture
def start() -> Iterator[Callable[..., LiveServer]]:
    """Start servers with runtimes of their own, and stop them after the test."""
    servers: list[LiveServer] = []

    def starter(runtime: FakeRuntime | None = None, **options: Any) -> LiveServer:
        servers.append(LiveServer(runtime or FakeRuntime(), **options).__enter__())
        return servers[-1]

    yield starter
    for server in servers:
        server.call(server.runtime._fault.set)  # whoever waits still, must not hold up the end
        server.__exit__()


@pytest.fixture(scope="module")
def server() -> Iterator[LiveServer]:
    """One server for all tests of a module that change nothing about it."""
    with LiveServer(FakeRuntime()) as live:
        yield live
