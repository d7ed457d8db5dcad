"""The log's line for each request, and what has none."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.server.conftest import MODEL, LiveServer
from tests.server.fake_runtime import FakeRuntime
from tests.server.test_faults import stuck_at
from tpworker.outputs import RequestRecord
from tpworker.sampling_params import SamplingParams
from tpworker.server import request_log
from tpworker.server.journal import Entry

Start = Callable[..., LiveServer]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
BODY = {"prompt": "a"}
HEAD = ("method", "endpoint", "status")


class Log:
    """What has been logged of requests."""

    def __init__(self, caplog: pytest.LogCaptureFixture) -> None:
        self._caplog = caplog

    def all(self, logger: str = "tpworker.requests") -> list[Any]:
        return [record for record in self._caplog.records if record.name == logger]

    def one(self, server: LiveServer, logger: str = "tpworker.requests") -> Any:
        """The one line there is, which is written behind the answer."""
        server.wait_until(lambda: bool(self.all(logger)))
        (record,) = self.all(logger)
        self._caplog.clear()
        return record


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Log:
    monkeypatch.setattr(request_log, "_flood", request_log._Flood())
    caplog.set_level(logging.DEBUG, "tpworker")
    return Log(caplog)


def test_a_request_has_one_line_whatever_its_prompts_and_choices(start: Start, log: Log) -> None:
    server = start()
    body = {"prompt": ["ab", "abcd"], "n": 2, "max_tokens": 16, "stream": True}
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    headers = {"X-Request-Id": "mine", "traceparent": f"00-{trace}-00f067aa0ba902b7-01"}
    assert server.post(COMPLETIONS, json=body, headers=headers).status_code == 200
    line = log.one(server)
    told = {
        "request_id": "mine", "outcome": "ok", "answer_id": "cmpl-mine", "stream": True, "prompts": 2,
        "choices": 4, "prompt_tokens": 6, "cached_tokens": 3, "output_tokens": 62, "draft_tokens": 124,
        "accepted_tokens": 62, "finish_reason": "stop:3,length:1", "restarts": 1, "trace_id": trace,
    }  # fmt: skip
    assert vars(line).items() >= told.items()
    assert 0 < line.queue_s < line.ttft_s < line.total_s
    assert 0 < line.tpot_s < line.total_s
    assert line.client.startswith("127.0.0.1:")
    text = line.getMessage()
    assert text.startswith(f"POST {COMPLETIONS} 200 request_id=mine client=127.0.0.1:")
    assert all(f" {name}={value}" in text for name, value in told.items() if name != "stream")
    assert line.levelno == logging.INFO
    assert {"prompt", "error", "param"}.isdisjoint(vars(line)), "nothing is told of what there is not"
    assert {request_id for _, _, request_id in server.runtime.requests} == {
        "cmpl-mine prompt 0",
        "cmpl-mine prompt 1",
    }, "what the runtime says of them has the same id"


def test_times_of_several_choices() -> None:
    """The longest wait for a slot, the first token of all, and the mean between tokens of a choice."""
    entry = Entry()
    first = RequestRecord(
        "r", 0, "stop", None, 3, 0, 5, 0, 0, 0, 10.0, 11.0, 12.0, 14.0, 18.0, 18.0, SamplingParams(n=3)
    )
    entry.arrived = 9.0
    entry.records += [
        first._replace(index=1, started=13.0, first_token=15.0, last_token=15.0, num_output_tokens=1),
        first,
        first._replace(index=2, first_token=16.0, last_token=18.0, num_output_tokens=2),
    ]
    told = entry.fields()
    assert (told["queue_s"], told["ttft_s"], told["tpot_s"]) == (2.0, 5.0, 6.0 / 5)


@pytest.mark.parametrize(
    ("path", "body", "told"),
    [
        (COMPLETIONS, {**BODY, "temperature": -1}, (400, "invalid", "invalid_request_error", "temperature")),
        (COMPLETIONS, {**BODY, "max_tokens": 999}, (400, "invalid", "context_length_exceeded", "max_tokens")),
        (COMPLETIONS, {**BODY, "model": "x"}, (404, "invalid", "model_not_found", "model")),
        (CHAT, {"messages": [{"role": "x" * 99}]}, (400, "invalid", "invalid_request_error", None)),
        ("/v1/embeddings", {"input": "a"}, (404, "invalid", "unsupported_endpoint", None)),
        ("/generate", {"text": "a"}, (404, "invalid", "not_found", None)),
        ("/v1/completions/a%0Ab%20c/", {}, (404, "invalid", "not_found", None)),
    ],
)  # fmt: skip
def test_one_that_is_refused_says_why(
    server: LiveServer, log: Log, path: str, body: dict[str, Any], told: tuple[Any, ...]
) -> None:
    server.post(path, json=body)
    line = log.one(server)
    status, outcome, error, param = told
    assert (line.status, line.outcome, line.error) == (status, outcome, error)
    if param is not None:
        assert line.param == param
    assert "output_tokens" not in vars(line)
    if "%" in path:
        assert line.getMessage().startswith('POST "/v1/completions/a\\nb c" 404 ')


def test_one_that_cannot_be_served_now(start: Start, log: Log) -> None:
    server = start(FakeRuntime(max_queue=0), api_key="the key")
    assert server.get("/v1/models").status_code == 401
    line = log.one(server)
    assert (line.method, line.status, line.error) == ("GET", 401, "invalid_api_key")
    key = {"Authorization": "Bearer the key"}
    server.post(CHAT, json={"messages": [{"role": "user", "content": "a"}]}, headers=key)
    line = log.one(server)
    assert (line.status, line.outcome, line.error) == (429, "busy", "queue_full")
    server.runtime.state = "draining"
    server.post(COMPLETIONS, json=BODY, headers=key)
    line = log.one(server)
    assert (line.status, line.outcome, line.error) == (503, "unavailable", "unavailable")
    assert "the key" not in line.getMessage()


def test_one_for_whose_connection_there_is_no_room(start: Start, log: Log) -> None:
    server = start(max_open=0)
    assert server.post(COMPLETIONS, json=BODY, headers={"X-Request-Id": "mine"}).status_code == 503
    line = log.one(server)
    assert (line.status, line.error, line.request_id) == (503, "too_many_connections", "mine")


@pytest.mark.parametrize(("stream", "stuck"), [(True, 3), (False, 0)])
def test_a_client_that_leaves(start: Start, log: Log, stream: bool, stuck: int) -> None:
    server = start(FakeRuntime(before=stuck_at(stuck)))
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(server.url + COMPLETIONS, json={**BODY, "stream": stream}, timeout=0.3)
    line = log.one(server)
    assert (line.outcome, line.finish_reason, line.output_tokens) == ("disconnected", "abort", stuck)
    assert line.status == (200 if stream and stuck else None)
    assert ("ttft_s" in vars(line)) == bool(stuck)


@pytest.mark.parametrize("stream", [False, True])
def test_a_runtime_that_fails(start: Start, log: Log, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    monkeypatch.setattr(request_log, "MAX_LINES", 0)  # what had the model work has a line in any flood

    async def before(position: int) -> None:
        if position == 3:
            server.runtime.fail()
            await asyncio.Event().wait()

    server = start(FakeRuntime(before=before))
    server.post(COMPLETIONS, json={**BODY, "stream": stream})
    line = log.one(server)
    assert (line.error, line.finish_reason, line.output_tokens) == ("runtime_failed", "error", 3)
    told = (200, "failed", logging.WARNING) if stream else (503, "unavailable", logging.INFO)
    assert (line.status, line.outcome, line.levelno) == told


def test_a_bug_is_a_warning(start: Start, log: Log) -> None:
    def broken(prompt: str) -> str:
        raise ZeroDivisionError

    server = start(FakeRuntime(reply=broken))
    server.post(COMPLETIONS, json=BODY)
    line = log.one(server)
    assert (line.status, line.outcome, line.error) == (500, "failed", "internal_error")
    assert line.levelno == logging.WARNING


def test_probes_and_pages_are_for_debugging(server: LiveServer, log: Log) -> None:
    for path in ("/health", "/ready", "/metrics", "/v1/models", "/version", "/favicon.ico"):
        server.get(path)
        line = log.one(server, "tpworker.access")
        assert (line.method, line.endpoint, line.levelno) == ("GET", path, logging.DEBUG)
    server.post("/ping")
    assert log.one(server, "tpworker.access").status == 200
    server.post("/tokenize", json=BODY)
    assert log.one(server).outcome == "ok", "but who has something done, has a line"


def test_a_flood_of_what_costs_nothing_is_summed_up(server: LiveServer, log: Log) -> None:
    body = {**BODY, "temperature": -1}
    with httpx.Client(base_url=server.url) as client:
        for _ in range(request_log.MAX_LINES + 7):
            client.post(COMPLETIONS, json=body)
        client.post(COMPLETIONS, json={**BODY, "model": "x"})
        for _ in range(request_log.MAX_LINES + 2):
            assert client.post(COMPLETIONS, json={**BODY, "max_tokens": 1}).status_code == 200
    server.wait_until(lambda: len(log.all()) == 2 * request_log.MAX_LINES + 3)
    lines = [line for line in log.all() if hasattr(line, "endpoint")]
    assert [line.error for line in lines if line.status == 404] == ["model_not_found"], "of another kind"
    assert sum(line.status == 400 for line in lines) == request_log.MAX_LINES
    server.call(request_log.tell_rest)
    *_, told = log.all()
    assert told.getMessage() == "7 more requests within 10 s ended so: 400 invalid_request_error"
    assert (told.status, told.error, told.more_requests) == (400, "invalid_request_error", 7)


def test_how_many_there_were_is_told_when_the_time_is_over(
    server: LiveServer, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_log, "PERIOD_S", 0.2)
    monkeypatch.setattr(request_log, "MAX_LINES", 0)
    for number in (1, 2):
        server.post("/v1/embeddings", json={})
        server.wait_until(lambda number=number: len(log.all()) == number)  # type: ignore[misc]
    assert [line.more_requests for line in log.all()] == [1, 1]


def test_prompts_are_told_only_if_that_is_asked_for(start: Start, log: Log) -> None:
    server = start(log_prompts=12)
    for prompt in ("say\nit", "x" * 99, list(b"in tokens, of which a few are enough")):
        server.post(COMPLETIONS, json={"prompt": prompt})
        line = log.one(server)
        shown = prompt if isinstance(prompt, str) else server.runtime.tokenizer.decode(prompt)
        assert line.prompt == shown[:12]
        assert "\n" not in line.getMessage()
    server.post(CHAT, json={"messages": [{"role": "user", "content": "hi"}]})
    assert log.one(server).prompt == "[user]hi[assistant]"[:12]
    server = start(FakeRuntime(the_tokenizer=None), log_prompts=5)
    server.post(COMPLETIONS, json={"prompt": [1, 2, 3]})
    assert log.one(server).prompt == "[1, 2"


def test_two_requests_may_have_the_same_id_at_once(start: Start, log: Log) -> None:
    go = asyncio.Event()

    async def before(position: int) -> None:
        await go.wait()

    server = start(FakeRuntime(before=before))

    async def both() -> list[str]:
        async with httpx.AsyncClient(base_url=server.url, headers={"X-Request-Id": "same"}) as client:
            asking = [asyncio.create_task(client.post(COMPLETIONS, json=BODY)) for _ in range(2)]
            while server.runtime.num_open < 2:
                await asyncio.sleep(0.005)
            server.call(go.set)
            return [answer.json()["id"] for answer in await asyncio.gather(*asking)]

    ids = asyncio.run(both())
    assert "cmpl-same" in ids
    assert len(set(ids)) == 2
    server.wait_until(lambda: len(log.all()) == 2)
    assert {line.request_id for line in log.all()} == {"same"}
    assert {line.answer_id for line in log.all()} == set(ids)
    assert server.post(COMPLETIONS, json=BODY, headers={"X-Request-Id": "same"}).json()["id"] == "cmpl-same"


def test_what_is_no_trace_is_none(server: LiveServer, log: Log) -> None:
    trace, parent = "a" * 32, "b" * 16
    for sent in (
        "00-0-0-01",
        f"00-{'0' * 32}-{parent}-01",
        f"ff-{trace}-{parent}-01",
        f"00-{trace}-{parent}",
    ):
        server.post(COMPLETIONS, json=BODY, headers={"traceparent": sent})
        assert "trace_id" not in vars(log.one(server))


def test_who_logs_nothing_pays_nothing(
    server: LiveServer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.WARNING, "tpworker")
    asked: list[request_log.Entry] = []
    monkeypatch.setattr(request_log.Entry, "fields", lambda entry: asked.append(entry) or {})
    assert server.openai.completions.create(model=MODEL, prompt="a").choices[0].text
    server.call(lambda: None)
    assert not asked
    assert not [record for record in caplog.records if record.name.startswith("tpworker")]
    assert not logging.getLogger("tpworker").handlers, "which are the program's"
