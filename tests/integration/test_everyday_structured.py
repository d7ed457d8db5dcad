"""The everyday request that says what its answer is to look like: the default model, its whole vocabulary,
what people send with a schema or with tools. With overlap and without, in fp32: the same answers."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest

from tests.integration.conftest import Server
from tpworker import Runtime, SamplingParams

pytestmark = pytest.mark.timeout(280)

PROMPT = "Ada Lovelace was born in 1815. As JSON:\n"
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 24},
        "born": {"type": "integer", "minimum": 1800, "maximum": 1899},
        "field": {"enum": ["mathematics", "physics", None]},
    },
    "required": ["name", "born", "field"],
    "additionalProperties": False,
}


def is_person(text: str) -> None:
    jsonschema.validate(json.loads(text), PERSON)


def is_object(text: str) -> None:
    assert isinstance(json.loads(text), dict)


def is_date(text: str) -> None:
    assert re.fullmatch(r"\d{4}-\d{2}-\d{2}", text)


def is_sum(text: str) -> None:
    assert re.fullmatch(r"\d+( \+ \d+)*", text)


def is_field(text: str) -> None:
    assert text in ("mathematics", "physics")


KINDS: list[tuple[dict[str, Any], Callable[[str], None]]] = [
    ({"json": PERSON}, is_person),
    ({"json_object": True}, is_object),
    ({"regex": r"\d{4}-\d{2}-\d{2}"}, is_date),
    ({"choice": ["mathematics", "physics"]}, is_field),
    ({"grammar": 'start: NUMBER (" + " NUMBER)*\nNUMBER: /[0-9]+/'}, is_sum),
]
PARAMETERS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.7, "top_p": 0.95},
    {"top_p": 0.9, "top_k": 40, "min_p": 0.05},
    {"n": 2, "logprobs": 3},
    {"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.3},
    {"min_tokens": 12},
    {"stop": ["5", "ph"]},
    {"logit_bias": {28: -5.0}, "prompt_logprobs": 1},
    {"max_tokens": 3},
]

Told = list[tuple[int, list[int], str, str | None, list[int]]]
"""By choice: tokens, text, why it ended, and the likeliest token in each place, if it was asked."""


async def tell(runtime: Runtime, **parameters: Any) -> Told:
    params = SamplingParams(**{"max_tokens": 40, "seed": 5, **parameters})
    told: dict[int, Any] = {index: (index, [], "", None, []) for index in range(params.n)}
    async for output in runtime.generate(PROMPT, params):
        index, tokens, text, _, top = told[output.index]
        tokens += output.token_ids
        top += [row.top[0][0] for row in output.logprobs or ()]
        told[index] = (index, tokens, text + output.text, output.finish_reason, top)
    return list(told.values())


def test_in_a_runtime(real_model: Path) -> None:
    """A schema with every set of parameters, another kind with each, and some held to nothing among them."""
    others = [KINDS[1 + i % (len(KINDS) - 1)] for i in range(len(PARAMETERS))]
    asked = [
        (*kind, parameters)
        for kinds in (itertools.repeat(KINDS[0]), others)
        for kind, parameters in zip(kinds, PARAMETERS, strict=False)
    ]

    async def answers(lookahead: int, num_slots: int) -> list[Told]:
        async with Runtime(
            real_model, tensor_parallel_size=2, device="cpu", dtype="float32", lookahead=lookahead,
            max_model_len=128, max_num_seqs=num_slots, max_num_batched_tokens=64,
        ) as runtime:  # fmt: skip
            works = [tell(runtime, structured_outputs=kind, **parameters) for kind, _, parameters in asked]
            works += [tell(runtime, **parameters) for parameters in PARAMETERS]
            return list(await asyncio.gather(*works))

    together = asyncio.run(answers(2, 16))
    assert asyncio.run(answers(0, 12)) == together
    num_ended = 0
    for (kind, fits, parameters), told in zip(asked, together[: len(asked)], strict=True):
        assert len(told) == parameters.get("n", 1)
        for _, tokens, text, reason, top in told:
            assert len(top) == (len(tokens) if "logprobs" in parameters else 0)
            if reason == "length":
                assert len(tokens) == parameters.get("max_tokens", 40)
            elif "stop" in parameters:
                assert not any(stop in text for stop in parameters["stop"])
            else:
                num_ended += 1
                fits(text)
                if "regex" not in kind and "choice" not in kind:
                    assert len(tokens) > parameters.get("min_tokens", 0)
    assert num_ended > len(asked) // 2


WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "How the weather is",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 16},
                "unit": {"enum": ["celsius", "fahrenheit"]},
            },
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
TIME: dict[str, Any] = {"type": "function", "function": {"name": "time", "parameters": {"type": "object"}}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
WAYS: list[dict[str, Any]] = [
    {"response_format": FORMAT},
    {"response_format": FORMAT, "n": 2, "logprobs": True, "top_logprobs": 2},
    {"response_format": FORMAT, "stop": ["\n"], "presence_penalty": 0.4, "frequency_penalty": 0.2},
    {"response_format": FORMAT, "extra_body": {"min_tokens": 10, "repetition_penalty": 1.1}},
    {"response_format": {"type": "json_object"}},
    {"tools": [WEATHER, TIME], "tool_choice": "required"},
    {"tools": [WEATHER, TIME], "tool_choice": "required", "parallel_tool_calls": False, "n": 2},
    {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "weather"}}},
    {"tools": [WEATHER, TIME]},
    {},
]
MESSAGES: list[Any] = [
    {"role": "user", "content": "What do you know of Ada Lovelace, and of the weather in Paris?"}
]
Answer = list[tuple[str, list[tuple[str, str]], str]]
"""By choice: its text, its calls with their arguments, and why it ended."""


async def whole(api: openai.AsyncOpenAI, **parameters: Any) -> Answer:
    answer = await api.chat.completions.create(messages=MESSAGES, **parameters)
    found: Answer = []
    for choice in answer.choices:
        calls: list[Any] = list(choice.message.tool_calls or ())
        named = [(call.function.name, call.function.arguments) for call in calls]
        found.append((choice.message.content or "", named, choice.finish_reason))
        if parameters.get("logprobs"):
            assert choice.logprobs is not None
            assert choice.logprobs.content
    return found


async def streamed(api: openai.AsyncOpenAI, **parameters: Any) -> Answer:
    num = parameters.get("n", 1)
    texts, reasons = [""] * num, [""] * num
    calls: list[list[tuple[str, str]]] = [[] for _ in range(num)]
    chunks = await api.chat.completions.create(messages=MESSAGES, stream=True, **parameters)
    async for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
            for delta in choice.delta.tool_calls or ():
                mine = calls[choice.index]
                if delta.index == len(mine):
                    mine.append((delta.function.name, ""))
                name, arguments = mine[delta.index]
                mine[delta.index] = name, arguments + (delta.function.arguments or "")
    return list(zip(texts, calls, reasons, strict=True))


def check_answer(way: dict[str, Any], answer: Answer) -> int:
    """Whether each choice is what was asked for. How many of them are complete."""
    for text, calls, reason in answer:
        if reason == "length":
            continue
        if "stop" in way:  # which white space may bring, before it is complete
            assert not any(stop in text for stop in way["stop"])
        elif way.get("response_format") == FORMAT:
            is_person(text)
        elif "response_format" in way:
            is_object(text)
        elif "tool_choice" in way:
            assert (reason, text) == ("tool_calls", "")
            assert len(calls) == 1 if way.get("parallel_tool_calls") is False else calls
        for name, arguments in calls:
            (tool,) = (tool for tool in (WEATHER, TIME) if tool["function"]["name"] == name)
            if "tool_choice" in way:
                jsonschema.validate(json.loads(arguments), tool["function"]["parameters"])
    return sum(reason != "length" for _, _, reason in answer)


def test_over_http(start_server: Callable[..., Server], real_model: Path) -> None:
    """All at once, whole and streamed; the same with overlap and without."""

    async def main(server: Server) -> tuple[list[Answer], list[Answer]]:
        api = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=250)
        model = (await api.models.list()).data[0].id
        common = {"model": model, "temperature": 0.8, "top_p": 0.95, "seed": 11, "max_tokens": 64}
        works = [ask(api, **common, **way) for ask in (whole, streamed) for way in WAYS]
        found = await asyncio.gather(*works)
        return found[: len(WAYS)], found[len(WAYS) :]

    answers = []
    for lookahead in (2, 0):
        server = start_server(
            "--device", "cpu", "--dtype", "float32", "--max-num-seqs", "16", "--max-model-len", "1024",
            *(["--no-enable-overlap-schedule"] if lookahead == 0 else []),
        )  # fmt: skip
        at_once, in_a_stream = asyncio.run(main(server))
        assert server.stop() == 0, server.stderr
        assert at_once == in_a_stream
        answers.append(at_once)
    assert answers[0] == answers[1]
    num_ended = [check_answer(way, answer) for way, answer in zip(WAYS, answers[0], strict=True)]
    assert sum(num_ended[:4]) >= 3, "hardly a record is complete"
    assert sum(num_ended[5:8]) >= 1, "no call is complete"
