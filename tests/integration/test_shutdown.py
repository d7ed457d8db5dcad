"""A server that is told to end, ends in time, whatever its threads are at."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import httpx
import pytest

from tests.integration.embedder import Embedder
from tests.server.fake_runtime import byte_tokenizer

pytestmark = pytest.mark.timeout(240)

SERVE = """
    import tpworker.text.tokenizer
    from tpworker.__main__ import run
    def endless(self, *arguments, **options):
        print("tokenising")
        threading.Event().wait()

    tpworker.text.tokenizer.Tokenizer.encode = endless
    run()
"""


@pytest.mark.parametrize("at", ["the deadline", "the second signal"])
def test_prompts_that_are_being_tokenised_do_not_keep_it(model_folder: Path, at: str) -> None:
    byte_tokenizer()._backend.save(str(model_folder / "tokenizer.json"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    drain = "0.5" if at == "the deadline" else "1000"
    options = f"serve --load-format dummy -tp 1 --device cpu --max-num-seqs 2 --port {port} --model"
    answers: list[httpx.Response] = []

    def ask() -> None:
        url = f"http://127.0.0.1:{port}/v1/completions"
        answers.append(httpx.post(url, json={"prompt": "a long text", "max_tokens": 1}, timeout=200))

    with Embedder(SERVE, *options.split(), str(model_folder), "--shutdown-timeout", drain) as server:
        server.wait_for("tpworker is ready")
        client = threading.Thread(target=ask)
        client.start()
        server.wait_for("tokenising")
        server.process.terminate()
        server.wait_for("SIGTERM: no more requests are taken; 1 request is open")
        if at == "the second signal":
            server.process.terminate()
        client.join(100)
        assert [(answer.status_code, answer.json()["error"]["code"]) for answer in answers] == [
            (503, "unavailable")
        ]
        assert server.wait() == 0, server.output
    assert f"1 request is cut at {'once' if at == 'the second signal' else 'the deadline'}" in server.output
