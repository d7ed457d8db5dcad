"""/sleep, /wake_up and /is_sleeping, as vLLM has them, and /update_weights_from_disk, as SGLang has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.server.conftest import LiveServer
from tests.server.fake_runtime import FakeRuntime
from tests.server.test_refusals import COMPLETIONS, error_of
from tpworker.errors import ConfigError, ModelError

Start = Callable[..., LiveServer]

BOTH = {"enable_sleep_mode": True, "enable_weight_updates": True}
UPDATE = "/update_weights_from_disk"
ROUTES = [("get", "/is_sleeping"), ("post", "/sleep"), ("post", "/wake_up"), ("post", UPDATE)]


def test_a_server_that_sleeps_says_so_and_is_woken_up(start: Start) -> None:
    server = start(**BOTH)
    assert server.get("/is_sleeping").json() == {"is_sleeping": False}
    assert server.post("/sleep").json() == {"success": True}
    assert server.get("/is_sleeping").json() == {"is_sleeping": True}
    assert server.get("/health").json() == {"status": "sleeping"}
    assert server.get("/ready").status_code == 503
    assert server.get("/v1/models").status_code == 200
    refused = server.post(COMPLETIONS, json={"prompt": "a"})
    error = error_of(refused)
    assert (refused.status_code, error["code"]) == (503, "sleeping")
    assert "/wake_up" in error["message"]
    assert int(refused.headers["Retry-After"]) > 0
    assert server.post("/sleep", params={"level": 2, "mode": "abort"}).status_code == 200
    assert server.post("/wake_up", params={"tags": ["weights", "kv_cache"]}).json() == {"success": True}
    assert server.post("/wake_up").status_code == 200
    assert server.post(COMPLETIONS, json={"prompt": "a"}).status_code == 200
    assert server.runtime.changes == [
        ("sleep", 1, False),
        ("sleep", 2, True),
        ("wake_up", ["weights", "kv_cache"]),
        ("wake_up", None),
    ]


@pytest.mark.parametrize(
    ("asked", "parameter"), [({"level": 3}, "level"), ({"level": "x"}, "level"), ({"mode": "wait"}, "mode")]
)
def test_sleep_that_there_is_not(start: Start, asked: dict[str, Any], parameter: str) -> None:
    server = start(**BOTH)
    refused = server.post("/sleep", params=asked)
    assert (refused.status_code, error_of(refused)["param"]) == (400, parameter)
    assert server.runtime.changes == []


def test_what_cannot_be_woken_up_sleeps_on(start: Start) -> None:
    server = start(FakeRuntime(state="sleeping", change_error=ConfigError("no memory")), **BOTH)
    refused = server.post("/wake_up")
    assert refused.status_code == 503
    assert error_of(refused)["message"] == "the server sleeps on: no memory"


def test_other_weights_are_served(start: Start) -> None:
    server = start(**BOTH)
    answer = server.post(UPDATE, json={"model_path": "/b", "flush_cache": True, "token_step": 7}).json()
    assert (answer["success"], answer["num_paused_requests"]) == (True, 0)
    assert "/b" in answer["message"]
    server.post(UPDATE, json={"model_path": "/c", "abort_all_requests": True})
    assert server.runtime.changes == [("update", "/b", False), ("update", "/c", True)]


def test_requests_wait_while_weights_are_changed(start: Start) -> None:
    server = start(FakeRuntime(), **BOTH)
    server.runtime.state = "updating"
    assert server.post(COMPLETIONS, json={"prompt": "a"}).status_code == 200
    assert server.get("/health").status_code == 200
    assert server.get("/ready").json() == {"status": "updating"}


def test_weights_that_cannot_be_served(start: Start) -> None:
    server = start(FakeRuntime(change_error=ModelError("/b: there is no such folder")), **BOTH)
    bodies: list[dict[str, Any]] = [{"model_path": "/b"}, {}, {"model_path": "/b", "flush_cache": False}]
    told = [error_of(server.post(UPDATE, json=body)) for body in bodies]
    assert [error["param"] for error in told] == ["model_path", "model_path", "flush_cache"]
    assert told[0]["message"] == "/b: there is no such folder"


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_nobody_can_do_it_whom_nobody_has_let(start: Start, method: str, path: str) -> None:
    error = error_of(getattr(start(), method)(path))
    assert error["code"] == "unsupported_endpoint"
    assert "--enable-" in error["message"]
    guarded = start(api_key="secret", **BOTH)
    assert getattr(guarded, method)(path).status_code == 401
    assert guarded.runtime.changes == []


def test_what_is_sent_is_told(start: Start) -> None:
    server = start(**BOTH)
    document = server.get("/openapi.json").json()
    for method, path in ROUTES:
        body = {"json": {"model_path": "/b"}} if path == UPDATE else {}
        status = getattr(server, method)(path, **body).status_code
        assert str(status) in document["paths"][path][method]["responses"]
