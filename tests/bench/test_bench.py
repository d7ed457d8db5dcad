"""`tpworker bench` against servers that are fakes: what is sent when, and what is told of it."""

from __future__ import annotations

import asyncio
import io
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.bench.raw_server import (
    STREAM,
    Answer,
    Asked,
    Piece,
    RawServer,
    delta,
    event,
    plain,
    raw_server,
    stream,
    text,
    usage,
)  # fmt: skip
from tests.bench.test_plan import plan
from tests.server.conftest import LiveServer
from tests.server.fake_runtime import FakeRuntime
from tpworker import cli
from tpworker.bench.connection import Address
from tpworker.bench.load import Level, Measured, run_level
from tpworker.bench.records import Record
from tpworker.bench.report import compare
from tpworker.bench.summary import Goals, Spread, Summary
from tpworker.bench.worker import run_processes
from tpworker.errors import ConfigError


@contextmanager
def serving(answer: Answer) -> Iterator[RawServer]:
    """In a thread."""
    loop, ready, done = asyncio.new_event_loop(), threading.Event(), asyncio.Event()
    found: list[RawServer] = []

    async def main() -> None:
        async with raw_server(answer) as raw:
            found.append(raw)
            ready.set()
            await done.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(main()))
    thread.start()
    assert ready.wait(10)
    try:
        yield found[0]
    finally:
        loop.call_soon_threadsafe(done.set)
        thread.join()
        loop.close()


def openai(asked: Asked, takes_ids: bool = True) -> list[Piece]:
    """A server that yields what is asked for, a token a millisecond, and counts words as two tokens."""
    if asked.path == "/v1/models":
        return [plain({"data": [{"id": "fake"}]})]
    if asked.path == "/version":
        return [plain({"version": "9.9"})]
    if asked.method == "GET":
        return [plain({}, "404 Not Found")]
    prompt, messages = asked.body.get("prompt"), asked.body.get("messages")
    if isinstance(prompt, list):
        if not takes_ids:
            return [plain({"error": {"message": "text, please"}}, "400 Bad Request")]
        num_prompt = len(prompt)
    else:
        said = prompt if messages is None else " ".join(one["content"] for one in messages)
        num_prompt = 3 + 2 * len(said.split())
    if not asked.body.get("stream"):
        return [plain({"usage": {"prompt_tokens": num_prompt}})]
    number = asked.body["max_tokens"]
    pieces = [text("w")] * number if messages is None else [delta(content="w")] * number
    first, *rest = stream(*pieces, usage(num_prompt, number))
    return [first, *(part for one in rest for part in (0.001, one))]


def bench(url: str, *words: str, capsys: pytest.CaptureFixture[str], status: int = 0) -> str:
    assert cli.main(["bench", url, *words]) == status
    told = capsys.readouterr()
    return told.out + told.err


def test_levels_tables_json_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = tmp_path / "out.json", tmp_path / "out.png"
    with serving(openai) as raw:
        told = bench(
            raw.url, "--concurrency", "1", "4", "--rate", "50%", "--num-requests", "8",
            "--prompt-len", "20-30", "--output-len", "6", "--ignore-eos", "--seed", "5", "--warmup", "2",
            "--slo-ttft", "1000", "--slo-tpot", "1000", "--json", str(files[0]), "--plot", str(files[1]),
            capsys=capsys,
        )  # fmt: skip
    streamed = [asked.body for asked in raw.asked if asked.body and asked.body.get("stream")]
    assert len(streamed) == 2 + 3 * 8
    assert {body["model"] for body in streamed} == {"fake"}
    assert all(body["ignore_eos"] and 20 <= len(body["prompt"]) <= 30 for body in streamed)
    assert all(1000 <= token < 20_000 for body in streamed for token in body["prompt"])
    assert len({tuple(body["prompt"]) for body in streamed}) == len(streamed), "a prompt twice"
    assert "fake, completions: 20-30 tokens in (token ids), 6 out; seed 5" in told
    assert "1 at a time: 8 requests in" in told
    for word in ("TTFT", "TPOT", "ITL", "E2E", "goodput", "client: 1 process", "4 at a time", " a second"):
        assert word in told
    written = json.loads(files[0].read_text())
    assert written["target"]["server"] == "9.9"
    first, second, third = written["levels"]
    assert [level["load"] for level in written["levels"]][:2] == ["1 at a time", "4 at a time"]
    assert (first["num_requests"], first["errors"], first["num_output"], first["num_good"]) == (8, {}, 48, 8)
    assert len(first["requests"]) == 8
    assert first["num_prompt"] == sum(one["num_prompt"] for one in first["requests"])
    assert first["ttft"]["count"] == 8
    assert first["itl"]["count"] == 8 * 5
    assert 0 < first["ttft"]["p50"] <= first["ttft"]["p99"] <= first["e2e"]["p99"]
    assert second["requests_per_second"] > 0
    most = max(first["requests_per_second"], second["requests_per_second"])
    assert third["load"] == f"{0.5 * most:.3g} a second"
    assert files[1].read_bytes().startswith(b"\x89PNG")


def test_text_where_ids_are_not_taken(capsys: pytest.CaptureFixture[str]) -> None:
    def answer(asked: Asked) -> list[Piece]:
        return openai(asked, takes_ids=False)

    with serving(answer) as raw:
        words = "--concurrency", "2", "--num-requests", "4", "--prompt-len", "43"
        told = bench(raw.url, *words, capsys=capsys)
    assert "43 tokens in (words of 2.00 tokens)" in told
    assert "on average 43.0 tokens in" in told


def test_conversations(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(openai) as raw:
        bench(
            raw.url, "--endpoint", "chat", "--turns", "3", "--num-requests", "6", "--concurrency", "2",
            "--prompt-len", "13", "--output-len", "2", "--warmup", "0", capsys=capsys,
        )  # fmt: skip
    said = [asked.body["messages"] for asked in raw.asked if asked.body and asked.body.get("stream")]
    assert sorted(len(messages) for messages in said) == [1, 1, 3, 3, 5, 5]
    last = max(said, key=len)
    assert [one["role"] for one in last] == ["user", "assistant"] * 2 + ["user"]
    assert last[1]["content"] == "ww"


def test_errors_are_counted_by_kind(capsys: pytest.CaptureFixture[str]) -> None:
    count = iter(range(1000))

    def answer(asked: Asked) -> list[Piece]:
        if not (asked.body and asked.body.get("stream")):
            return openai(asked)
        number = next(count) % 3
        return [[plain({}, "429 Too Many Requests")], [STREAM, None], openai(asked)][number]  # type: ignore[return-value]

    with serving(answer) as raw:
        words = "--concurrency", "1", "--num-requests", "9", "--warmup", "0", "--output-len", "2"
        told = bench(raw.url, *words, capsys=capsys)
    assert "3 failed: status 429" in told
    assert "3 failed: connection closed" in told
    assert "9 requests" in told


def test_nothing_is_answered(capsys: pytest.CaptureFixture[str]) -> None:
    def answer(asked: Asked) -> list[Piece]:
        return [plain({}, "500 No")] if asked.body and asked.body.get("stream") else openai(asked)

    with serving(answer) as raw:
        told = bench(raw.url, "--concurrency", "1", "--num-requests", "2", capsys=capsys, status=1)
    assert "2 failed: status 500" in told


def test_what_was_measured_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ctrl-C in the second level; and what the server says is shown as it is, markup and all."""
    file = tmp_path / "out.json"
    count = iter(range(1000))

    def answer(asked: Asked) -> list[Piece]:
        if asked.path == "/v1/models":
            return [plain({"data": [{"id": "a[/b]\x1b[2J"}]})]
        if not (asked.body and asked.body.get("stream")):
            return openai(asked)
        if (number := next(count)) == 4:
            signal.raise_signal(signal.SIGINT)
        return list(stream(event(error={"code": "[/x]"}))) if number == 1 else openai(asked)

    words = "--concurrency", "1", "2", "--num-requests", "4", "--warmup", "0", "--json", str(file)
    with serving(answer) as raw:
        told = bench(raw.url, *words, capsys=capsys, status=128 + signal.SIGINT)
        assert "a[/b]?[2J, completions" in told
        assert "1 failed: error in the stream: [/x]" in told
        assert [level["load"] for level in json.loads(file.read_text())["levels"]] == ["1 at a time"]
        file.unlink()
    assert "does not answer" in bench(raw.url, *words, capsys=capsys, status=1)
    assert not file.exists(), "nothing was measured, and a file is there"


def test_a_full_disk(capfd: pytest.CaptureFixture[str]) -> None:
    with serving(openai) as raw:
        words = "--concurrency", "1", "--num-requests", "1", "--warmup", "0", "--json", "/dev/full"
        assert cli.main(["bench", raw.url, *words]) == 2
        assert "--json '/dev/full' cannot be written: No space left" in capfd.readouterr().err
        command = [sys.executable, "-m", "tpworker", "bench", raw.url, *words[:-2]]
        with open("/dev/full", "w") as full:
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (
        1, "tpworker: what it tells cannot be written: No space left on device\n"
    )  # fmt: skip


def test_several_processes_share_a_level(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    with serving(openai) as raw:
        told = bench(
            raw.url, "--processes", "2", "--concurrency", "3", "--num-requests", "7", "--prompt-len", "9",
            "--output-len", "3", "--warmup", "0", "--json", str(file), capsys=capsys,
        )  # fmt: skip
    assert "client: 2 processes" in told
    prompts = [tuple(asked.body["prompt"]) for asked in raw.asked if asked.body and asked.body.get("stream")]
    assert len(set(prompts)) == len(prompts) == 7
    assert json.loads(file.read_text())["levels"][0]["num_output"] == 21


def test_a_process_that_cannot_be_started_leaves_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[asyncio.subprocess.Process] = []
    start = asyncio.create_subprocess_exec

    async def third_fails(*command: Any, **options: Any) -> asyncio.subprocess.Process:
        if len(started) == 2:
            raise BlockingIOError("no more processes")
        started.append(await start(*command, **options))
        return started[-1]

    monkeypatch.setattr(asyncio, "create_subprocess_exec", third_fails)
    level = Level(number=1, concurrency=3, num_requests=3)
    with pytest.raises(BlockingIOError):
        asyncio.run(run_processes(Address.of("http://127.0.0.1:1"), None, plan(), level, 3))
    assert [process.returncode for process in started] == [-signal.SIGKILL] * 2


def test_a_tpworker_server(capsys: pytest.CaptureFixture[str]) -> None:
    """Whose vocabulary is known, and which wants a key."""
    with LiveServer(FakeRuntime(reply=lambda prompt: "hello"), api_key="secret") as server:
        for endpoint in ("completions", "chat"):
            told = bench(
                f"{server.url}/v1", "--api-key", "secret", "--endpoint", endpoint, "--concurrency", "2",
                "--num-requests", "4", "--prompt-len", "50", "--output-len", "9", capsys=capsys,
            )  # fmt: skip
            assert "fake-model" in told
            assert "5.0 out; 4 outputs ended early" in told or "6.0 out; 4 outputs ended early" in told
        assert "wants its API key" in bench(server.url, capsys=capsys, status=2)


def test_who_is_no_server(capsys: pytest.CaptureFixture[str]) -> None:
    with serving(lambda asked: [plain({}, "404 Not Found")]) as raw:
        assert "there is no /v1/models" in bench(raw.url, capsys=capsys, status=2)
    assert "does not answer: no connection" in bench(raw.url, capsys=capsys, status=1)


def test_shares_of_a_level_are_all_of_it() -> None:
    rates = [Level(number=1, rate=10.0).shared(share, 4).rate for share in range(4)]
    assert rates == [2.5] * 4
    concurrencies = [Level(number=1, concurrency=10).shared(share, 4).concurrency for share in range(4)]
    assert concurrencies == [3, 3, 2, 2]


@pytest.mark.parametrize("turns", [1, 4])
def test_arrivals_do_not_wait_for_answers(turns: int) -> None:
    """And come as often as they are to, as chance has it: a conversation of several turns more seldom."""

    async def main() -> Measured:
        all_here, asked_for = asyncio.Event(), []

        def answer(asked: Asked) -> list[Piece]:
            asked_for.append(asked)
            if len(asked_for) == 40:
                all_here.set()
            return [all_here, *openai(asked)]

        async with raw_server(answer) as raw:
            level = Level(number=1, rate=200.0 * turns, num_requests=40 * turns, timeout=10.0)
            asks = plan(is_chat=turns > 1, turns=turns, token_ids=None if turns > 1 else (1, 9))
            return await run_level(Address.of(raw.url), None, asks, level)

    measured = asyncio.run(main())
    assert len(measured.records) == 40 * turns
    due = [
        record.due - measured.began for record in measured.records[:40]
    ]  # none is answered before all came
    assert due == sorted(due)
    gaps = [after - before for before, after in pairwise(due)]
    assert 0.002 < sum(gaps) / len(gaps) < 0.012
    assert max(gaps) > 2 * min(gaps)
    assert not [record.error for record in measured.records if record.error]


def measured(*records: Record, cpu: float = 0.1, lags: tuple[float, ...] = (0.001,)) -> Measured:
    return Measured(list(records), 0.0, 10.0, 10 * cpu, list(lags))


def record(first: float = 1.0, last: float = 3.0, num_output: int = 3, **fields: Any) -> Record:
    given: dict[str, Any] = {
        "due": 0.0, "sent": 0.5, "first": first, "last": last, "ended": last, "num_prompt": 10,
        "num_output": num_output, "num_wanted": 3, "intervals": [0.5, 1.5],
    }  # fmt: skip
    return Record(**{**given, **fields})


def test_figures() -> None:
    level = Level(number=1, concurrency=2, num_requests=4)
    failed = record(error="timeout", num_output=2)
    records = record(), record(first=2.0), record(num_output=1, last=1.0), failed
    seen = Summary.of(level, [measured(*records)], Goals(ttft=1.0, tpot=0.9))
    assert (seen.num_requests, seen.num_failed, seen.num_done, seen.errors) == (4, 1, 3, {"timeout": 1})
    assert (seen.num_output, seen.num_prompt, seen.num_short) == (7, 30, 1)
    assert (seen.requests_per_second, seen.output_per_second, seen.tokens_per_second) == (0.3, 0.7, 3.7)
    assert seen.ttft == Spread(pytest.approx(5 / 6), 0.5, 1.5, 1.5, 3)  # type: ignore[arg-type]
    assert seen.tpot == Spread(0.75, 0.5, 1.0, 1.0, 2)
    assert seen.num_good == 1, "the first has too long a TPOT, the second too long a TTFT"
    assert seen.client.late_p99 == 0.5
    assert Summary.of(level, [measured(record())], Goals()).num_good is None
    nothing = Summary.of(level, [measured()], Goals(ttft=1.0))
    assert (nothing.ttft, nothing.num_good, nothing.requests_per_second) == (None, 0, 0)


@pytest.mark.parametrize(
    ("cpu", "lag", "trouble"),
    [
        (0.3, 0.001, ""),
        (0.9, 0.001, "took 90% of a core: more --processes"),
        (0.3, 0.6, "its event loop by 600.0 ms (p99) at 30%"),
    ],
)
def test_the_client_says_when_it_was_the_bottleneck(cpu: float, lag: float, trouble: str) -> None:
    quiet = measured(record())
    seen = Summary.of(Level(number=1, concurrency=1), [quiet, measured(cpu=cpu, lags=(0.0, lag))], Goals())
    told = seen.client.trouble(seen.tpot)
    assert trouble in told
    assert bool(trouble) == bool(told)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["h"], "'h' is no URL of a server"),
        (["http://h", "--concurrency", "0"], "--concurrency 0: must be from 1"),
        (["http://h", "--rate", "0"], "--rate '0': must be requests a second, above 0"),
        (["http://h", "--rate", "x%"], "--rate 'x%': must be requests a second"),
        (["http://h", "--turns", "2"], "--turns is for conversations"),
        (["http://h", "--num-requests", "3", "--seconds", "3"], "both given"),
        (["http://h", "--dataset", "f", "--prompt-len", "3"], "--prompt-len has no effect with --dataset"),
        (["http://h", "--endpoint", "chat", "--text"], "--text has no effect"),
        (["http://h", "--extra-body", '{"n": 2}'], "n is the benchmark's own"),
        (["http://h", "--json", "/nowhere/x"], "--json '/nowhere/x' cannot be written"),
        (["http://h", "--plot", "/tmp/x.y"], "--plot '/tmp/x.y': its name must end in one of ."),
        (["http://h", "--processes", "65"], "--processes 65: must be from 1 to 64"),
        (["http://h", "--output-len", "x"], "--output-len 'x': must be tokens"),
    ],
)
def test_mistakes(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("value", ["[]", "{", "[" * 100_000, '{"top_p": NaN}'])
def test_a_body_that_is_no_object(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["bench", "http://h", "--extra-body", value])
    assert "argument --extra-body: " in capsys.readouterr().err


def test_without_the_library_that_draws(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["bench", "http://h", "--plot", "x.png"]) == 2
    assert "--plot needs matplotlib, which is not installed" in capsys.readouterr().err


def test_levels_by_default() -> None:
    options: Any = cli.parse(["bench", "http://h"])
    assert (options.concurrency, options.rates, options.shares) == ((1, 16, 64), (), ())
    options = cli.parse(["bench", "http://h", "--rate", "2", "80%", "--concurrency", "8"])
    assert (options.concurrency, options.rates, options.shares) == ((8,), (2.0,), (0.8,))
    options = cli.parse(["bench", "http://h", "--rate", "2"])
    assert options.concurrency == ()
    with pytest.raises(ConfigError):
        cli.parse(["bench", "http://h:0"])


def test_all_levels_stand_in_80_columns() -> None:
    level = Level(number=1, rate=123.4, num_requests=4)
    seen = Summary.of(level, [measured(*[record(first=12.5, last=14.0)] * 100)], Goals(ttft=1.0))
    out = io.StringIO()
    compare([seen, seen], Console(file=out, width=80))
    lines = [line.split() for line in out.getvalue().splitlines() if "a second" in line]
    times = ["12,000.0", "12,000.0", "750.0", "750.0"]
    assert lines == [["123", "a", "second", "10.00", "30", *times, "0", "0.00"]] * 2
