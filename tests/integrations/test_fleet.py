"""The HTTP front on replicas, as fakes: whichever is lost, clients see nothing of it."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import httpx
import pytest

from tests.integrations.told import DeadOnce, told_by
from tests.server.fake_runtime import FakeRuntime, byte_tokenizer
from tpworker import ConfigError, Listener, QueueFull, RequestRecord, Runtime, RuntimeConfig, SamplingParams
from tpworker.integrations import fleet as module
from tpworker.integrations.fleet import Fleet
from tpworker.integrations.relay import Outputs
from tpworker.integrations.replica import Told
from tpworker.integrations.sums import MOST_MISSED, Sums
from tpworker.server.app import create_app
from tpworker.server.options import FrontOptions

ROOT = Path(__file__).parents[2]
CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 60}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Files of the fake runtime's model, as the front reads them."""
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 257}
    config |= {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config |= {"max_position_embeddings": 512, "rms_norm_eps": 1e-5, "eos_token_id": 256}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokenizer = byte_tokenizer()
    tokenizer._backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": tokenizer.chat_template}))
    return tmp_path


async def fleet_of(replicas: DeadOnce, model: Path, max_open: int = 100) -> Fleet:
    fleet = Fleet(RuntimeConfig(model=str(model), device="cpu"), replicas.open, replicas.call_all, max_open)
    assert fleet.health().state == "starting"
    await fleet.start(told_by(replicas.runtimes[0], "a"))
    return fleet


class Heard(Listener):
    def __init__(self) -> None:
        self.records: list[RequestRecord] = []
        self.num_tokens = 0

    def on_request_end(self, record: RequestRecord) -> None:
        self.records.append(record)

    def on_tokens(self, intervals: Any) -> None:
        self.num_tokens += sum(count for count, _ in intervals)


def test_a_chat_goes_on_when_its_replica_is_lost(model: Path) -> None:
    async def main() -> None:
        for place in (0, 1, 7, 20):
            runtimes = [FakeRuntime(), FakeRuntime()]
            replicas = DeadOnce(runtimes, place)
            fleet = await fleet_of(replicas, model)
            heard = Heard()
            fleet.add_listener(heard)
            app = create_app(cast(Runtime, fleet), FrontOptions(served_model_names=("tiny",)))
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://front") as client:
                whole = (await client.post("/v1/chat/completions", json=CHAT)).json()
                text = whole["choices"][0]["message"]["content"]
                assert text == "You said '[user]Hello[assistant]'."
                assert whole["usage"]["completion_tokens"] == len(text)
                replicas.place = place
                lines = (await client.post("/v1/chat/completions", json=CHAT | {"stream": True})).text
                events = [json.loads(line[6:]) for line in lines.splitlines() if line.startswith("data: {")]
                shown = [event["choices"][0]["delta"].get("content", "") for event in events]
                assert "".join(shown) == text
                assert (await client.get("/v1/models")).json()["data"][0]["id"] == "tiny"
                assert (await client.get("/ready")).status_code == 200
                assert (await client.post("/reset_prefix_cache")).json() == {"success": True}
                top = (await client.get("/top")).json()
                metrics = (await client.get("/metrics")).text
            assert (top["model"], top["runtime"]["state"], top["runtime"]["resumed"]) == ("tiny", "ready", 2)
            assert replicas.called == ["reset_prefix_cache"]
            assert replicas.num_lost == 2
            assert fleet.stats().resumed_requests == 2
            assert "tpworker_resumed_requests_total 2.0" in metrics
            first, second = heard.records
            assert first[:8] == (first.request_id, 0, "stop", None, 22, 11, len(text), 0)
            assert (first.num_resumed, second.num_resumed) == (1, 1)
            assert first.arrived <= first.submitted <= cast(float, first.first_token)
            assert cast(float, first.first_token) <= cast(float, first.last_token) <= first.ended
            assert heard.num_tokens == 2 * len(text) - 2
            fleet.remove_listener(heard)
            fleet.close()

    asyncio.run(asyncio.wait_for(main(), 60))


def test_all_that_the_front_asks_of_a_runtime_a_fleet_has() -> None:
    asked: set[str] = set()
    for room in ("server", "metrics"):
        for path in (ROOT / "tpworker" / room).rglob("*.py"):
            # One starts and stops a runtime, the other is not there before replicas.
            if path.name not in ("serve.py", "sleeping.py"):
                asked |= set(re.findall(r"\b_?runtime\.([a-z_]+)", path.read_text()))
    has = {name for name in asked if hasattr(Runtime, name)} - {"start", "stop", "drain"}
    assert {"collect", "prepare", "reset_prefix_cache", "stats"} <= has
    assert not [name for name in has if not hasattr(Fleet, name)]


def test_a_request_without_a_seed_gets_one_and_keeps_it(model: Path) -> None:
    async def main() -> None:
        replicas = DeadOnce([FakeRuntime(), FakeRuntime()], 3)
        fleet = await fleet_of(replicas, model)
        for _ in range(2):
            outputs = [output async for output in fleet.generate("Hello", SamplingParams(max_tokens=9))]
            assert outputs[-1].finish_reason == "length"
        seeds = [ask.sampling.seed for ask in replicas.asked]
        assert len(seeds) == 3
        assert len(set(seeds)) == 2
        fleet.close()

    asyncio.run(asyncio.wait_for(main(), 60))


def test_what_is_open_is_bounded_and_ends_with_its_consumer(model: Path) -> None:
    async def main() -> None:
        runtime = FakeRuntime(before=lambda i: asyncio.sleep(3600 if i else 0))
        fleet = await fleet_of(DeadOnce([runtime], -1), model, max_open=3)
        heard = Heard()
        fleet.add_listener(heard)
        streams: list[Outputs] = [fleet.generate("a"), fleet.generate([5, 6], SamplingParams(n=2))]
        for stream in streams:
            await anext(stream)
        assert fleet.stats().open == 3
        with pytest.raises(QueueFull, match=r"max_open_requests is 3"):
            await anext(fleet.generate("b"))
        with pytest.raises(QueueFull):
            await fleet.prepare(lambda: 1)
        for stream in streams:
            await stream.aclose()
        assert (fleet.stats().open, runtime.num_open, len(runtime.aborted)) == (0, 0, 2)
        assert [record.finish_reason for record in heard.records] == ["abort"] * 3
        assert await fleet.prepare(lambda: 7) == 7
        fleet.close()

    asyncio.run(asyncio.wait_for(main(), 60))


def test_health_and_sums_are_those_of_the_replicas_there_are(model: Path) -> None:
    async def main() -> None:
        runtimes = [FakeRuntime() for _ in range(2)]
        fleet = await fleet_of(DeadOnce(runtimes, -1), model)
        first, second = (told_by(runtime, name) for runtime, name in zip(runtimes, "ab", strict=True))
        first = replace(first, stats=replace(first.stats, output_tokens=5, running=2, lost=(("rank", 1),)))
        second = replace(second, stats=replace(second.stats, output_tokens=7, running=3, draft_tokens=(4, 1)))
        fleet.hear([first, second])
        stats = fleet.stats()
        assert (stats.output_tokens, stats.running, stats.total_blocks) == (12, 5, 200)
        assert (stats.lost, stats.draft_tokens) == ((("rank", 1),), (4, 1))
        fleet.hear([second])
        stats = fleet.stats()
        assert (stats.output_tokens, stats.running, stats.total_blocks) == (12, 3, 100)
        runtimes[1].lose()
        fleet.hear([told_by(runtimes[1], "b"), first])
        assert fleet.health().state == "ready"
        fleet.hear([told_by(runtimes[1], "b")])
        assert fleet.health().state == "recovering"
        fleet.hear([])
        assert fleet.health().summary == "there is no replica"
        nobody = DeadOnce(runtimes, -1)
        wrong = replace(first, vocab_size=99)
        with pytest.raises(ConfigError, match="has 257 token ids, and the replicas' has 99"):
            await Fleet(RuntimeConfig(model=str(model)), nobody.open, nobody.call_all, 9).start(wrong)
        fleet.close()

    asyncio.run(asyncio.wait_for(main(), 60))


def test_replicas_are_asked_for_ever_whatever_that_raises(
    model: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception that nobody thought of is said once while it lasts, and the next time again."""
    monkeypatch.setattr(module, "HEAR_SECONDS", 0.0)

    async def main() -> None:
        runtime = FakeRuntime()
        fleet = await fleet_of(DeadOnce([runtime], -1), model)
        answers: list[Any] = [ValueError("odd"), OSError("odder"), None, [told_by(runtime, "b")]]
        answers += [KeyError("again"), []]
        asked: list[str] = []
        all_asked = asyncio.Event()

        async def tell_all(front: str) -> list[Told] | None:
            if len(asked) == len(answers):
                all_asked.set()
                await asyncio.sleep(3600)
            asked.append(front)
            answer = answers[len(asked) - 1]
            if isinstance(answer, Exception):
                raise answer
            return cast("list[Told] | None", answer)

        hearing = asyncio.create_task(fleet.keep_hearing(tell_all))
        await all_asked.wait()
        assert not hearing.done()
        hearing.cancel()
        assert asked == [fleet.name] * len(answers)
        assert fleet.health().summary == "there is no replica"
        fleet.close()

    with caplog.at_level(logging.INFO, "tpworker.integrations"):
        asyncio.run(asyncio.wait_for(main(), 60))
    assert [record.levelname for record in caplog.records] == ["ERROR", "INFO"] * 2
    causes = [record.exc_info[1] for record in caplog.records if record.exc_info]
    assert [str(cause) for cause in causes] == ["odd", "'again'"]


def test_replicas_that_are_gone_for_good_are_forgotten_and_their_counts_are_not() -> None:
    """However many there have been: counters never fall, and one that is only late counts once."""
    sums = Sums()
    template = told_by(FakeRuntime(), "stays")
    counts: list[int] = []

    def hear(*names: str) -> None:
        stats = replace(template.stats, output_tokens=10, accepted_tokens=(3, 1), lost=(("rank", 2),))
        sums.hear([replace(template, name=name, stats=stats) for name in names])
        counts.append(sums.stats(0).output_tokens)

    for number in range(20):
        hear("stays", "late", f"replica-{number}")
    for _ in range(MOST_MISSED):
        hear("stays")
    hear("stays", "late")
    for _ in range(MOST_MISSED):
        hear("stays", "late")
    assert set(sums._last) == {"stays", "late"} == set(sums._missed)
    assert counts == sorted(counts)
    stats = sums.stats(0)
    assert (stats.output_tokens, stats.accepted_tokens, stats.lost) == (220, (66, 22), (("rank", 44),))
    assert stats.total_blocks == 2 * template.stats.total_blocks
