"""Clients that leave, runtimes that are busy, drain, stop or fail."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from tests.server.conftest import MODEL, LiveServer
from tests.server.fake_runtime import FakeRuntime
from tests.server.test_refusals import error_of
from tpworker.errors import InvalidRequest, RequestFailed
from tpworker.server import answer
from tpworker.server.errors import describe

Start = Callable[..., LiveServer]
COMPLETIONS = "/v1/completions"


@pytest.fixture
def brief_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """After which comments are sent."""
    monkeypatch.setattr(answer, "FIRST_SILENCE_S", 0.02)
    monkeypatch.setattr(answer, "SILENCE_S", 0.01)


async def for_ever(position: int) -> None:
    await asyncio.Event().wait()


def stuck_at(stuck: int) -> Callable[[int], Any]:
    """Waits for ever before this token, and not before."""

    async def before(position: int) -> None:
        if position == stuck:
            await asyncio.Event().wait()

    return before


# ------------------------------------------------------------------- clients that leave


@pytest.mark.parametrize("prompt", ["a", ["a", "b", "c"]], ids=["one", "several"])
@pytest.mark.parametrize(
    ("stream", "stuck"),
    [(True, 0), (True, 2), (False, 0), (False, 2)],
    ids=["stream0", "stream2", "whole0", "whole2"],
)
def test_a_client_that_leaves_aborts_its_request(start: Start, prompt: Any, stream: bool, stuck: int) -> None:
    server = start(FakeRuntime(before=stuck_at(stuck)))
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(server.url + COMPLETIONS, json={"prompt": prompt, "stream": stream}, timeout=0.3)
    server.wait_until(lambda: server.runtime.num_open == 0)
    assert len(server.runtime.aborted) == len(prompt)
    server.wait_until(lambda: True)
    assert server.metric('tpworker_requests_total{outcome="disconnected"}') == 1
    assert server.metric('tpworker_requests_total{outcome="ok"}') == 0


def test_closing_the_openai_clients_stream_aborts_the_request(start: Start) -> None:
    server = start(FakeRuntime(before=stuck_at(3)))
    stream = server.openai.completions.create(model=MODEL, prompt="a", stream=True)
    assert next(iter(stream)).choices[0].text == "Y"
    stream.close()
    server.wait_until(lambda: server.runtime.num_open == 0)
    assert len(server.runtime.aborted) == 1


def test_one_that_leaves_does_not_disturb_the_others(start: Start) -> None:
    go = asyncio.Event()

    async def before(position: int) -> None:
        await go.wait()

    server = start(FakeRuntime(before=before))

    async def run() -> Any:
        async with server.async_openai as client:
            stays = asyncio.create_task(client.completions.create(model=MODEL, prompt="a", max_tokens=50))
            leaves = asyncio.create_task(client.completions.create(model=MODEL, prompt="b", max_tokens=50))
            async with asyncio.timeout(10):
                while server.runtime.num_open < 2:
                    await asyncio.sleep(0.01)
                leaves.cancel()
                while server.runtime.num_open > 1:
                    await asyncio.sleep(0.01)
                server.call(go.set)
                return await stays

    assert asyncio.run(run()).choices[0].text == "You said 'a'."


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        (COMPLETIONS, {"prompt": ["a", "b"]}),
    ],
)
def test_what_nobody_waits_for_is_not_prepared(start: Start, path: str, body: dict[str, Any]) -> None:
    server = start()
    ended: list[str] = []

    async def prepare(*work: Any, **options: Any) -> Any:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("cancelled")

    server.runtime.prepare = prepare  # type: ignore[method-assign]
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(server.url + path, json=body, timeout=0.3)
    server.wait_until(lambda: ended == ["cancelled"])
    server.wait_until(lambda: not server.server.server_state.tasks)
    assert server.metric('tpworker_requests_total{outcome="disconnected"}') == 1


# --------------------------------------------------------------------- when it is not ready


@pytest.mark.parametrize("state", ["stopped", "starting", "draining"])
def test_requests_have_to_wait_until_it_is_ready(start: Start, state: Any) -> None:
    server = start(FakeRuntime(state=state))
    response = server.post(COMPLETIONS, json={"prompt": "a"})
    assert (response.status_code, response.headers["retry-after"]) == (503, "5")
    assert state in error_of(response)["message"]
    ready = server.get("/ready")
    assert (ready.status_code, ready.headers["retry-after"]) == (503, "5")
    assert server.get("/health").status_code == (503 if state == "stopped" else 200)
    assert server.get("/health").json() == {"status": state}


def test_a_full_queue_is_429_with_retry_after(start: Start) -> None:
    server = start(FakeRuntime(before=for_ever, max_queue=0))
    response = server.post(COMPLETIONS, json={"prompt": "a", "stream": True})
    error = error_of(response)
    assert (response.status_code, error["code"], response.headers["retry-after"]) == (429, "queue_full", "1")
    assert "--max-queue" in error["message"]
    with pytest.raises(openai.RateLimitError):
        server.openai.completions.create(model=MODEL, prompt="a")
    assert server.metric('tpworker_requests_total{outcome="busy"}') == 2


def test_some_of_several_prompts_that_find_the_queue_full_end_the_others(start: Start) -> None:
    server = start(FakeRuntime(before=for_ever, max_queue=2))
    assert server.post(COMPLETIONS, json={"prompt": ["a", "b", "c"]}).status_code == 429
    server.wait_until(lambda: server.runtime.num_open == 0)


# ------------------------------------------------------------------------------ recoveries


def test_it_lives_while_it_recovers_but_others_are_quicker(start: Start) -> None:
    server = start()
    server.call(server.runtime.lose)
    health, ready = server.get("/health"), server.get("/ready")
    told = {"status": "recovering", "error": "tpworker-rank1 was killed by SIGKILL at step 7"}
    assert (health.status_code, ready.status_code) == (200, 503)
    assert health.json() == ready.json() == told, "which process, what happened, and no traceback"
    assert ready.headers["retry-after"] == "1"
    assert server.get("/v1/models").status_code == 200
    server.call(server.runtime.recover, 1.5)
    assert server.get("/ready").json() == {"status": "ready"}


@pytest.mark.parametrize("stream", [False, True])
def test_requests_that_come_while_it_recovers_wait(start: Start, stream: bool) -> None:
    server = start()
    server.call(server.runtime.lose)

    async def run() -> httpx.Response:
        async with httpx.AsyncClient(timeout=20) as client:
            body = {"prompt": "a", "stream": stream}
            waiting = asyncio.create_task(client.post(server.url + COMPLETIONS, json=body))
            while server.runtime.num_open == 0 and not waiting.done():
                await asyncio.sleep(0.01)
            server.call(server.runtime.recover, 1.5)
            return await waiting

    response = asyncio.run(run())
    assert response.status_code == 200
    assert response.text.endswith("data: [DONE]\n\n") == stream


def test_streams_are_kept_open_for_as_long_as_it_takes(start: Start, brief_silence: None) -> None:
    async def before(position: int) -> None:
        if position == 3:
            server.runtime.lose()
            await server.runtime._up.wait()

    server = start(FakeRuntime(before=before))
    with httpx.stream("POST", server.url + COMPLETIONS, json={"prompt": "a", "stream": True}) as response:
        text = ""
        for part in response.iter_text():
            text += part
            if text.count("\n:\n\n") >= 3 and server.runtime.state == "recovering":
                server.call(server.runtime.recover, 1.5)
    events = [event for event in text.split("\n\n") if event != ":"]
    said = [json.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in events[:-2]]
    assert "".join(said) == "You said 'a'."
    assert events[-2:] == ["data: [DONE]", ""]


def test_a_stream_begins_before_its_first_output_if_that_takes_long(
    start: Start, brief_silence: None
) -> None:
    server = start()
    server.call(server.runtime.lose)
    with httpx.stream("POST", server.url + COMPLETIONS, json={"prompt": "a", "stream": True}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        parts = response.iter_text()
        assert next(parts).startswith(":\n\n")
        server.call(server.runtime.fail)
        *_, last, end = "".join(parts).split("\n\n")
    assert end == ""
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "runtime_failed"
    assert server.metric('tpworker_requests_total{outcome="failed"}') == 1


def test_what_is_refused_after_a_stream_has_begun_is_in_the_clients_words(
    start: Start, brief_silence: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def generate(*arguments: Any, **options: Any) -> Any:
        await asyncio.sleep(0.2)
        raise InvalidRequest("max_tokens=9: more than fit", "max_tokens")
        yield

    server = start()
    monkeypatch.setattr(server.runtime, "generate", generate)
    body = {"messages": [{"role": "user", "content": "a"}], "max_completion_tokens": 9, "stream": True}
    text = server.post("/v1/chat/completions", json=body).text
    assert text.startswith(":\n\n")
    error = json.loads(text.split("\n\n")[-2].removeprefix("data: "))["error"]
    assert error["param"] == "max_completion_tokens"
    assert error["message"] == "max_completion_tokens=9: more than fit"


def test_clients_skip_comments_before_and_between_outputs(start: Start, brief_silence: None) -> None:
    async def before(position: int) -> None:
        await asyncio.sleep(0.1 if position in (0, 5) else 0)

    server = start(FakeRuntime(before=before))
    stream = server.openai.completions.create(model=MODEL, prompt="a", stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "You said 'a'."
    with server.openai.responses.stream(model=MODEL, input="a") as events:
        assert events.get_final_response().output_text == "You said '[user]a[assistant]'."
    whole = server.post(COMPLETIONS, json={"prompt": "a"})
    assert whole.json()["choices"][0]["text"] == "You said 'a'.", "which is one document"


# ------------------------------------------------------------------------------- failures


def test_a_failure_ends_waiting_requests_with_503(start: Start) -> None:
    server = start(FakeRuntime(before=for_ever))

    async def run() -> httpx.Response:
        async with httpx.AsyncClient(timeout=10) as client:
            waiting = asyncio.create_task(client.post(server.url + COMPLETIONS, json={"prompt": "a"}))
            while server.runtime.num_open == 0:
                await asyncio.sleep(0.01)
            server.call(server.runtime.fail)
            return await waiting

    response = asyncio.run(run())
    error = error_of(response)
    assert (response.status_code, error["code"]) == (503, "runtime_failed")
    assert "tpworker-rank1 was killed" in error["message"]
    assert "secret" not in response.text, "no traceback leaves the server"

    response = server.post(COMPLETIONS, json={"prompt": "a"})
    assert (response.status_code, error_of(response)["code"]) == (503, "runtime_failed")
    assert response.headers["retry-after"] == "5"
    health = server.get("/health")
    assert (health.status_code, health.headers["retry-after"]) == (503, "5")
    assert health.json() == {"status": "failed", "error": "tpworker-rank1 was killed by SIGKILL"}
    assert server.get("/ready").status_code == 503
    assert server.metric('tpworker_requests_total{outcome="unavailable"}') == 2


@pytest.mark.parametrize("chat", [False, True])
def test_a_failure_in_mid_stream_is_an_event_and_the_end(start: Start, chat: bool) -> None:
    server = start(FakeRuntime(before=stuck_at(3)))
    body = {"messages": [{"role": "user", "content": "a"}]} if chat else {"prompt": "a"}
    path = "/v1/chat/completions" if chat else COMPLETIONS
    with httpx.stream("POST", server.url + path, json=body | {"stream": True}, timeout=10) as response:
        assert response.status_code == 200
        text = ""
        for part in response.iter_text():
            if not text:
                server.wait_until(lambda: server.runtime.output_tokens == 3)
                server.call(server.runtime.fail)
            text += part
    *_, last, end = text.split("\n\n")
    assert end == ""
    error = json.loads(last.removeprefix("data: "))["error"]
    assert error["message"] == "tpworker-rank1 was killed by SIGKILL"
    assert "[DONE]" not in text
    assert server.metric('tpworker_requests_total{outcome="failed"}') == 1


def test_the_openai_client_raises_an_error_in_mid_stream(start: Start) -> None:
    server = start(FakeRuntime(before=stuck_at(3)))
    stream = iter(server.openai.completions.create(model=MODEL, prompt="a", stream=True))
    assert next(stream).choices[0].text == "Y"
    server.call(server.runtime.fail)
    with pytest.raises(openai.APIError, match="tpworker-rank1 was killed"):
        list(stream)


def test_a_bug_in_mid_stream_tells_nothing(start: Start) -> None:
    async def broken(position: int) -> None:
        if position == 2:
            raise ZeroDivisionError("the secret of the implementation")

    server = start(FakeRuntime(before=broken))
    response = server.post(COMPLETIONS, json={"prompt": "a", "stream": True})
    assert response.status_code == 200
    assert "secret" not in response.text
    assert '"code": "internal_error"' in response.text


@pytest.mark.parametrize("stream", [False, True])
def test_an_aborted_request_is_no_answer(start: Start, stream: bool) -> None:
    server = start(FakeRuntime(abort_at=0))
    response = server.post(COMPLETIONS, json={"prompt": "a", "stream": stream})
    assert response.status_code == 503
    assert "shutting down" in error_of(response)["message"]


def test_a_request_that_fails_for_its_own_reason_is_not_to_be_tried_again() -> None:
    """Clients try again after a 500, and the same would happen."""
    told = describe(RequestFailed("request 'a' failed: its grammar is too complex"))
    assert told is not None
    assert (told.status, told.code) == (400, "request_failed")
    assert told.message == "request 'a' failed: its grammar is too complex"
