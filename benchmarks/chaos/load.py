"""What clients ask while processes are lost, and what they get: with the `openai` package, as others do."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, field
from typing import Any

from openai import AsyncOpenAI

TEXTS = (
    "The capital of France is",
    "Once upon a time there was a fox who",
    "def fibonacci(n):\n",
    "Dear Sir or Madam,\n\nI am writing to",
    "1, 1, 2, 3, 5, 8,",
)
LONG = "All work and no play makes Jack a dull boy. " * 40
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer", "maximum": 120}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@dataclass(frozen=True, eq=False)
class Case:
    """A request, which has one right answer."""

    name: str
    body: dict[str, Any]

    @property
    def is_chat(self) -> bool:
        """Whether it is a conversation, and no text to go on with."""
        return "messages" in self.body

    @property
    def is_greedy(self) -> bool:
        return bool(self.body["temperature"] == 0)

    @property
    def has_fixed_length(self) -> bool:
        """Whether nothing that the model says ends it."""
        return bool(self.body["extra_body"].get("ignore_eos"))


def cases(model: str, num_tokens: int, is_text: bool, is_chat: bool, has_logprobs: bool) -> list[Case]:
    """All that is asked, over and over.

    Args:
        model: the name that is served.
        num_tokens: of an answer, at most.
        is_text: False: of a model that speaks no language; then no text ends an answer, and nothing is held
            to a schema.
        is_chat: whether it takes conversations.
        has_logprobs: whether all are asked for with logprobs, to see how near an answer is to another.
    """
    common: dict[str, Any] = {"model": model, "max_tokens": num_tokens, "extra_body": {"ignore_eos": True}}
    ends: dict[str, Any] = {**common, "extra_body": {}}
    kinds: dict[str, dict[str, Any]] = {
        "greedy": {"temperature": 0},
        "seeded": {"temperature": 0.8, "seed": 5, "top_p": 0.9},
        "choices": {"temperature": 0.9, "seed": 6, "n": 3},
        "penalties": {"temperature": 0.6, "seed": 7, "frequency_penalty": 0.5, "presence_penalty": 0.3},
        "logprobs": {"temperature": 0, "logprobs": 3},
    }
    if is_text:
        kinds["stop"] = {**ends, "temperature": 0, "stop": [" the", "\n\n"]}
    if has_logprobs:
        kinds = {name: {"logprobs": 0, **own} for name, own in kinds.items()}
    found = []
    for index, (name, own) in enumerate(kinds.items()):
        for text in (TEXTS[index % len(TEXTS)], TEXTS[(index + 2) % len(TEXTS)]):
            found.append(Case(f"{name} {len(found)}", {**common, "prompt": text, **own}))
    logprobs = {"logprobs": 0} if has_logprobs else {}
    found.append(Case("long", {**common, "prompt": LONG + TEXTS[0], "temperature": 0, **logprobs}))
    if is_text:
        held = {**ends, "extra_body": {"guided_json": SCHEMA}, **logprobs}
        found.append(Case("schema", {**held, "prompt": "A person: ", "temperature": 0}))
    if is_chat:
        found += _conversations(ends, {"logprobs": True} if has_logprobs else {})
    return found


def _conversations(ends: dict[str, Any], logprobs: dict[str, Any]) -> list[Case]:
    asked = {**ends, **logprobs, "messages": [{"role": "user", "content": "Tell me of a person."}]}
    schema = {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}}
    return [
        Case("chat", {**asked, "temperature": 0, "stop": ["."]}),
        Case("chat, choices", {**asked, "temperature": 0.7, "seed": 8, "n": 2}),
        Case("chat, schema", {**asked, "temperature": 0, "response_format": schema}),
    ]


@dataclass
class Answer:
    """What came of a request."""

    texts: dict[int, str] = field(default_factory=dict)  # by choice
    ends: dict[int, str] = field(default_factory=dict)
    usage: tuple[int, int] | None = None  # tokens of the prompt, and of all choices
    tokens: dict[int, list[tuple[str, float]]] = field(default_factory=dict)  # with logprobs, if asked for
    chunks: list[float] = field(default_factory=list)  # when they came; time.monotonic()
    error: str = ""


async def ask(client: AsyncOpenAI, case: Case, is_streamed: bool, leaves_after: int | None = None) -> Answer:
    """Asks, and waits for the whole answer; or leaves after so many chunks."""
    answer = Answer()
    answer.chunks.append(time.monotonic())
    create: Any = client.chat.completions.create if case.is_chat else client.completions.create
    try:
        if is_streamed:
            options = {"stream": True, "stream_options": {"include_usage": True}}
            stream = await create(**case.body, **options)
            async for chunk in stream:
                _add(answer, chunk)
                if leaves_after is not None and len(answer.chunks) > leaves_after:
                    await stream.close()
                    break
        else:
            _add(answer, await create(**case.body))
    except Exception as error:  # whatever it is, it is what a client got
        answer.error = f"{type(error).__name__}: {error}"
    return answer


def _add(answer: Answer, chunk: Any) -> None:
    """A whole answer, or a chunk of one, of either endpoint."""
    answer.chunks.append(time.monotonic())
    for choice in chunk.choices:
        said = getattr(choice, "message", None) or getattr(choice, "delta", None)
        text = choice.text if said is None else said.content
        answer.texts[choice.index] = answer.texts.get(choice.index, "") + (text or "")
        if choice.finish_reason:
            answer.ends[choice.index] = choice.finish_reason
        if choice.logprobs is not None:
            answer.tokens.setdefault(choice.index, []).extend(_tokens(choice.logprobs, said is not None))
    if chunk.usage is not None:
        answer.usage = chunk.usage.prompt_tokens, chunk.usage.completion_tokens


def _tokens(logprobs: Any, is_chat: bool) -> list[tuple[str, float]]:
    if is_chat:
        return [(token.token, token.logprob) for token in logprobs.content or ()]
    return list(zip(logprobs.tokens, logprobs.token_logprobs, strict=True))


class Client:
    """Asks one thing after the other.

    Args:
        api: to ask with.
        asked: all that may be asked.
        draw: what and how it asks.
        leaves: whether it hangs up now and then.
    """

    def __init__(self, api: AsyncOpenAI, asked: list[Case], draw: random.Random, leaves: bool) -> None:
        self.answers: list[tuple[Case, bool, Answer]] = []  # and whether it was streamed
        self.num_left = 0
        self._api, self._asked, self._draw, self._leaves = api, asked, draw, leaves

    async def run(self, until: float) -> None:
        """Until then, time.monotonic(); what was begun is waited for."""
        while time.monotonic() < until:
            case, is_streamed = self._draw.choice(self._asked), self._draw.random() < 0.8
            if self._leaves and self._draw.random() < 0.25:
                await self._leave(case, is_streamed)
            else:
                self.answers.append((case, is_streamed, await ask(self._api, case, is_streamed)))

    async def _leave(self, case: Case, is_streamed: bool) -> None:
        """Asks, and hangs up in the middle: of a stream after some chunks, else after a moment."""
        patience, num_chunks = self._draw.uniform(0.02, 2), self._draw.randint(0, 20)
        try:
            async with asyncio.timeout(None if is_streamed else patience):
                answer = await ask(self._api, case, is_streamed, num_chunks)
        except TimeoutError:
            self.num_left += 1
            return
        if answer.error or not is_streamed:  # it got what others get
            self.answers.append((case, is_streamed, answer))
        else:
            self.num_left += 1
