"""What clients ask while processes are lost, and what they get: with the `openai` package, as others do."""

from __future__ import annotations

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


def cases(model: str, num_tokens: int, is_text: bool = True) -> list[Case]:
    """All that is asked, over and over.

    Args:
        model: the name that is served.
        num_tokens: of an answer, at most.
        is_text: False: of a model that speaks no language; then no text ends an answer, and nothing is held
            to a schema.
    """
    common: dict[str, Any] = {"model": model, "max_tokens": num_tokens, "extra_body": {"ignore_eos": True}}
    kinds: dict[str, dict[str, Any]] = {
        "greedy": {"temperature": 0},
        "seeded": {"temperature": 0.8, "seed": 5, "top_p": 0.9},
        "choices": {"temperature": 0.9, "seed": 6, "n": 3},
        "penalties": {"temperature": 0.6, "seed": 7, "frequency_penalty": 0.5, "presence_penalty": 0.3},
        "logprobs": {"temperature": 0, "logprobs": 3},
    }
    if is_text:
        kinds["stop"] = {"temperature": 0, "stop": [" the", "\n\n"], "extra_body": {}}
    found = []
    for index, (name, own) in enumerate(kinds.items()):
        for text in (TEXTS[index % len(TEXTS)], TEXTS[(index + 2) % len(TEXTS)]):
            found.append(Case(f"{name} {len(found)}", {**common, "prompt": text, **own}))
    found.append(Case("long", {**common, "prompt": LONG + TEXTS[0], "temperature": 0}))
    if is_text:
        held = {**common["extra_body"], "guided_json": SCHEMA, "ignore_eos": False}
        found.append(Case("schema", {**common, "prompt": "A person: ", "temperature": 0, "extra_body": held}))
    return found


@dataclass
class Answer:
    """What came of a request."""

    texts: dict[int, str] = field(default_factory=dict)  # by choice
    ends: dict[int, str] = field(default_factory=dict)
    usage: tuple[int, int] | None = None  # tokens of the prompt, and of all choices
    logprobs: list[float] = field(default_factory=list)
    chunks: list[float] = field(default_factory=list)  # when they came; time.monotonic()
    error: str = ""

    def differs_from(self, right: Answer) -> str:
        """In what; '': in nothing that matters."""
        if self.error:
            return self.error
        for name in ("ends", "usage", "texts"):
            if getattr(self, name) != getattr(right, name):
                return f"{name}: {getattr(self, name)!r} instead of {getattr(right, name)!r}"
        pairs = zip(self.logprobs, right.logprobs, strict=False)
        if len(self.logprobs) != len(right.logprobs) or any(abs(a - b) > 1e-3 for a, b in pairs):
            return "logprobs"
        return ""


async def ask(client: AsyncOpenAI, case: Case, is_streamed: bool, leaves_after: int | None = None) -> Answer:
    """Asks, and waits for the whole answer; or leaves after so many chunks."""
    answer = Answer()
    answer.chunks.append(time.monotonic())
    try:
        if is_streamed:
            options = {"stream": True, "stream_options": {"include_usage": True}}
            stream = await client.completions.create(**case.body, **options)
            async for chunk in stream:
                _add(answer, chunk)
                if leaves_after is not None and len(answer.chunks) > leaves_after:
                    await stream.close()
                    break
        else:
            _add(answer, await client.completions.create(**case.body))
    except Exception as error:  # whatever it is, it is what a client got
        answer.error = f"{type(error).__name__}: {error}"
    return answer


def _add(answer: Answer, chunk: Any) -> None:
    answer.chunks.append(time.monotonic())
    for choice in chunk.choices:
        answer.texts[choice.index] = answer.texts.get(choice.index, "") + choice.text
        if choice.finish_reason:
            answer.ends[choice.index] = choice.finish_reason
        if choice.logprobs is not None:
            answer.logprobs += choice.logprobs.token_logprobs
    if chunk.usage is not None:
        answer.usage = chunk.usage.prompt_tokens, chunk.usage.completion_tokens


class Client:
    """Asks one thing after the other.

    Args:
        api: to ask with.
        known: all that may be asked, and the right answers.
        draw: what and how it asks.
        leaves: whether it hangs up now and then.
    """

    def __init__(
        self, api: AsyncOpenAI, known: dict[Case, Answer], draw: random.Random, leaves: bool
    ) -> None:
        self.answers: list[tuple[Case, bool, Answer]] = []  # and whether it was streamed
        self.num_left = 0
        self._api, self._known, self._draw, self._leaves = api, known, draw, leaves

    async def run(self, until: float) -> None:
        """Until then, time.monotonic(); what was begun is waited for."""
        names = list(self._known)
        while time.monotonic() < until:
            case = self._draw.choice(names)
            if self._leaves and self._draw.random() < 0.25:
                await ask(self._api, case, True, self._draw.randint(1, 20))
                self.num_left += 1
                continue
            is_streamed = self._draw.random() < 0.8
            self.answers.append((case, is_streamed, await ask(self._api, case, is_streamed)))
