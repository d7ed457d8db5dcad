"""All that is asked of a token over HTTP, of the default model on CPU ranks in fp32, by the openai client."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.integration.conftest import Server
from tests.integration.test_serve import FRANCE, MODEL

pytestmark = pytest.mark.timeout(240)
Start = Callable[..., Server]
PARIS = "The capital of France is Paris."
CHOICES = 2


def everything(tokens: dict[str, int], seed: int) -> dict[str, Any]:
    """A streamed chat that asks for all of it at once.

    Args:
        tokens: the ids that the bias is about.
    """
    return {
        "model": MODEL,
        "messages": FRANCE,
        "n": CHOICES,
        "seed": seed,
        "temperature": 0.9,
        "top_p": 0.95,
        "max_tokens": 10,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.5,
        "logit_bias": {str(tokens["more"]): 2.5, str(tokens["never"]): -100},
        "logprobs": True,
        "top_logprobs": 3,
        "stop": ["\n\n"],
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "extra_body": {
            "min_p": 0.02,
            "repetition_penalty": 1.1,
            "bad_words": ["Lyon"],
            "min_tokens": 2,
            "cache_salt": "a tenant",
            "return_token_ids": True,
        },
    }


@pytest.fixture(scope="module")
def tokenizer(real_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(real_model)


@pytest.fixture
def server(start_server: Start, real_model: Path) -> Iterator[Server]:
    server = start_server(
        "-tp", "2", "--device", "cpu", "--dtype", "float32",
        "--max-num-seqs", "8", "--max-num-batched-tokens", "128", "--max-queue", "100",
    )  # fmt: skip
    yield server
    assert server.stop() == 0, server.stderr


def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@torch.no_grad()
def test_choices_logprobs_and_rules(server: Server, real_model: Path, tokenizer: Any) -> None:
    api = client(server)

    # Seeded choices are reproducible, and differ from one another.
    drawn = [
        api.chat.completions.create(
            model=MODEL, messages=FRANCE, n=2, seed=11, temperature=1.3, max_tokens=12,  # type: ignore[arg-type]
            logprobs=True, top_logprobs=3,
        )
        for _ in range(2)
    ]  # fmt: skip
    first, second = ([choice.message.content for choice in done.choices] for done in drawn)
    assert first == second
    assert first[0] != first[1]
    for choice in drawn[0].choices:
        assert choice.logprobs is not None
        content = choice.logprobs.content or []
        told = b"".join(bytes(one.bytes or []) for one in content).decode(errors="replace")
        assert told.removesuffix("<|im_end|>").startswith((choice.message.content or "").rstrip("\ufffd"))
        for one in content:
            assert len(one.top_logprobs) == 3
            assert [top.logprob for top in one.top_logprobs] == sorted(
                (top.logprob for top in one.top_logprobs), reverse=True
            )

    # As evaluation harnesses ask: nothing but the prompts' own.
    texts = ["The capital of France is Paris, and of Italy", "Ünïcode: 🫨!", "One, two, three, four"]
    model = AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.float32)
    prompts = [tokenizer(text).input_ids for text in texts]
    for _ in range(2):  # again, with their blocks in the prefix cache
        done = api.completions.create(model=MODEL, prompt=prompts, echo=True, logprobs=2, max_tokens=0)
        assert [choice.text for choice in done.choices] == texts
        assert done.usage is not None
        assert (done.usage.completion_tokens, done.usage.prompt_tokens) == (0, sum(map(len, prompts)))
        for ids, choice in zip(prompts, done.choices, strict=True):
            expected = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            own = expected[:-1].gather(1, torch.tensor(ids[1:])[:, None]).flatten()
            assert choice.logprobs is not None
            none, *logprobs = choice.logprobs.token_logprobs or []
            assert none is None
            torch.testing.assert_close(torch.tensor(logprobs), own, atol=1e-4, rtol=0)
            for row, top in zip(expected[:-1], (choice.logprobs.top_logprobs or [])[1:], strict=True):
                assert abs(max(top.values()) - row.max()) < 1e-4

    # A bias draws a token, and another bars what would have come.
    again, paris = (tokenizer(word).input_ids[0] for word in (" again", " Paris"))
    drawn_in = api.chat.completions.create(
        model=MODEL, messages=FRANCE, temperature=0, max_tokens=3, logit_bias={str(again): 100}  # type: ignore[arg-type]
    )  # fmt: skip
    assert drawn_in.choices[0].message.content == " again again again"
    barred = api.chat.completions.create(
        model=MODEL, messages=FRANCE, temperature=0, max_tokens=8, logit_bias={str(paris): -100}  # type: ignore[arg-type]
    )  # fmt: skip
    assert (barred.choices[0].message.content or "").startswith("The capital of France is")
    assert "Paris" not in (barred.choices[0].message.content or "")

    # More choices than can ever be open.
    with pytest.raises(openai.BadRequestError, match="109 choices are more than the 108") as caught:
        api.chat.completions.create(model=MODEL, messages=FRANCE, n=109)  # type: ignore[arg-type]
    assert caught.value.param == "n"
    with pytest.raises(openai.BadRequestError, match="110 choices are more than the 108"):
        api.completions.create(model=MODEL, prompt=texts[:2], n=55)


def test_all_of_it_at_once_beside_plain_requests(server: Server, tokenizer: Any) -> None:
    """Twenty that ask for everything, and greedy ones, whose texts do not depend on their neighbours."""
    tokens = {
        "more": tokenizer("Sure").input_ids[0],
        "never": tokenizer(" Berlin").input_ids[0],
    }

    async def main() -> None:
        api = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=200)

        async def plain() -> str:
            done = await api.chat.completions.create(
                model=MODEL, messages=FRANCE, temperature=0, max_tokens=12  # type: ignore[arg-type]
            )  # fmt: skip
            return done.choices[0].message.content or ""

        async def asked(seed: int) -> list[tuple[str, list[float], list[int]]]:
            found: list[tuple[str, list[float], list[int]]] = [("", [], []) for _ in range(CHOICES)]
            chunks = [chunk async for chunk in await api.chat.completions.create(**everything(tokens, seed))]
            for chunk in chunks[:-1]:
                (choice,) = chunk.choices
                text, logprobs, ids = found[choice.index]
                if choice.logprobs is not None:
                    logprobs += [one.logprob for one in choice.logprobs.content or []]
                ids += (choice.model_extra or {}).get("token_ids") or []
                found[choice.index] = (text + (choice.delta.content or ""), logprobs, ids)
            last = chunks[-1]
            assert last.choices == []
            assert last.usage is not None
            assert last.usage.prompt_tokens == 37
            assert last.usage.completion_tokens == sum(len(ids) for _, _, ids in found)
            assert all(len(logprobs) == len(ids) for _, logprobs, ids in found)
            return found

        alone = await asked(0)
        assert await plain() == PARIS
        answers = await asyncio.gather(*map(asked, range(20)), *(plain() for _ in range(10)))
        assert answers[20:] == [PARIS] * 10
        first: Any = answers[0]
        assert [(text, ids) for text, _, ids in first] == [(text, ids) for text, _, ids in alone]
        for (_, logprobs, _), (_, others, _) in zip(first, alone, strict=True):
            torch.testing.assert_close(torch.tensor(logprobs), torch.tensor(others), atol=1e-4, rtol=0)
        told: Any = answers[:20]
        assert len({text for found in told for text, _, _ in found}) > 10
        assert not any(tokens["never"] in ids for found in told for _, _, ids in found)
        assert not any("Lyon" in text for found in told for text, _, _ in found)

    asyncio.run(main())
