"""What is asked of a server: everything that decides what a request says, so that several processes agree."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tpworker.bench.client import CHAT, COMPLETIONS
from tpworker.bench.lengths import Lengths

WORDS = [
    "time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school",
    "state", "family", "student", "group", "country", "problem", "hand", "part", "place", "case", "week",
    "company", "system", "program", "question", "work", "government", "number", "night", "point", "home",
    "water", "room", "mother", "area", "money", "story", "fact", "month", "lot", "right", "study", "book",
    "eye", "job", "word", "business", "issue", "side", "kind", "head", "house", "service", "friend",
    "father", "power", "hour", "game", "line", "end", "member", "law", "car", "city", "community", "name",
    "president", "team", "minute", "idea", "kid", "body", "information", "back", "parent", "face",
    "others", "level", "office", "door", "health", "person", "art", "war", "history", "party", "result",
    "change", "morning", "reason", "research", "girl", "guy", "moment", "air", "teacher", "force",
    "education",
]  # fmt: skip
"""Common ones: with the space before it most tokenizers have each as one token."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What requests say. It goes to other processes as JSON."""

    model: str
    """'': the one that the server has."""
    is_chat: bool
    seed: int
    prompt_len: Lengths
    output_len: Lengths
    shared_prefix: int = 0
    """Tokens that all prompts begin with, before those of their own."""
    turns: int = 1
    """Requests of a conversation, each with all that was said before."""
    ignore_eos: bool = False
    temperature: float = 0.0
    token_ids: tuple[int, int] | None = None
    """Prompts are token ids from the first to below the second; None: they are text."""
    tokens_per_word: float = 1.0
    """Of text, as the server counts them."""
    overhead: float = 0.0
    """Tokens that the server adds to a text."""
    dataset: Sequence[Mapping[str, Any]] = ()
    """What is asked instead, one after the other: `prompt` or `messages`, and perhaps `max_tokens`."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of each body."""

    @property
    def path(self) -> str:
        """Of the endpoint."""
        return CHAT if self.is_chat else COMPLETIONS

    def conversation(self, level: int, number: int) -> Conversation:
        """The one of this number, of a level: always the same, and no two alike."""
        return Conversation(self, level, number)

    def to_json(self) -> dict[str, Any]:
        """For `json.dumps`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Plan:
        """What `to_json` has made."""
        ids = data["token_ids"]
        changed = {
            "prompt_len": Lengths(**data["prompt_len"]),
            "output_len": Lengths(**data["output_len"]),
            "token_ids": None if ids is None else tuple(ids),
            "dataset": tuple(data["dataset"]),
        }
        return cls(**{**data, **changed})


class Conversation:
    """Requests, one after the other; mostly one.

    Args:
        plan: what it is about.
        level, number: which one it is.
    """

    def __init__(self, plan: Plan, level: int, number: int) -> None:
        self._plan = plan
        self._draw = random.Random(f"{plan.seed}/{level}/{number}")
        self._number = number
        self._messages: list[Mapping[str, Any]] = []

    def next(self) -> tuple[bytes, int]:
        """The body of its next request, and how many tokens of output that asks for."""
        plan = self._plan
        wanted = plan.output_len.draw(self._draw)
        said: Mapping[str, Any]
        if plan.dataset:
            item = plan.dataset[self._number % len(plan.dataset)]
            wanted = item.get("max_tokens", wanted)
            said = {name: item[name] for name in ("prompt", "messages") if name in item}
        elif plan.is_chat:
            said = {"messages": self._with_turn()}
        else:
            said = {"prompt": self._prompt()}
        body: dict[str, Any] = {
            **said,
            "max_tokens": wanted,
            "temperature": plan.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({"model": plan.model} if plan.model else {}),
            **({"ignore_eos": True} if plan.ignore_eos else {}),
            **plan.extra,
        }
        return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode(), wanted

    def answered(self, text: str) -> None:
        """What came of the last one, for the next."""
        self._messages.append({"role": "assistant", "content": text})

    def _with_turn(self) -> list[Mapping[str, Any]]:
        plan = self._plan
        length = plan.prompt_len.draw(self._draw)
        if not self._messages:
            if plan.shared_prefix:
                prefix = _words(random.Random(f"{plan.seed}/prefix"), self._num_words(plan.shared_prefix))
                self._messages.append({"role": "system", "content": prefix})
            length -= round(plan.overhead)
        self._messages.append({"role": "user", "content": _words(self._draw, self._num_words(length))})
        return self._messages

    def _prompt(self) -> list[int] | str:
        plan = self._plan
        length, shared = plan.prompt_len.draw(self._draw), random.Random(f"{plan.seed}/prefix")
        if plan.token_ids is not None:
            return _ids(shared, plan.token_ids, plan.shared_prefix) + _ids(self._draw, plan.token_ids, length)
        prefix = _words(shared, self._num_words(plan.shared_prefix)) if plan.shared_prefix else ""
        own = _words(self._draw, self._num_words(length - round(plan.overhead)))
        return f"{prefix} {own}" if prefix else own

    def _num_words(self, num_tokens: int) -> int:
        return max(1, round(num_tokens / self._plan.tokens_per_word))


def _words(draw: random.Random, number: int) -> str:
    return " ".join(draw.choices(WORDS, k=number))


def _ids(draw: random.Random, bounds: tuple[int, int], number: int) -> list[int]:
    return draw.choices(range(*bounds), k=number)
