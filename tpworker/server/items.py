"""The items of which an answer of /v1/responses is made: what the model thinks, says and calls."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class Item:
    """One of them, in the making."""

    kind: Literal["message", "reasoning", "function_call"]
    id: str
    name: str = ""
    """Of a call: what is called."""
    call_id: str = ""
    """Of a call: for clients to refer to."""
    texts: list[str] = field(default_factory=list)
    status: str = "in_progress"

    @classmethod
    def message(cls) -> Item:
        """What is said."""
        return cls("message", f"msg_{uuid.uuid4().hex}")

    @classmethod
    def reasoning(cls) -> Item:
        """What is thought."""
        return cls("reasoning", f"rs_{uuid.uuid4().hex}")

    @classmethod
    def call(cls, name: str, call_id: str) -> Item:
        """What is called."""
        return cls("function_call", f"fc_{uuid.uuid4().hex}", name, call_id)

    @property
    def text(self) -> str:
        """All of its text; a call's arguments."""
        return "".join(self.texts)

    @property
    def part(self) -> str | None:
        """The type of its one part; None: it has none."""
        return {"message": "output_text", "reasoning": "reasoning_text"}.get(self.kind)

    @property
    def delta(self) -> str:
        """What its events are called, between `response.` and `.delta`."""
        return self.part or "function_call_arguments"

    @property
    def delta_place(self) -> str:
        """Fields of the event of a text, before it."""
        return "" if self.part is None else '"content_index": 0, '

    @property
    def delta_rest(self) -> str:
        """Fields behind it."""
        return ', "logprobs": []' if self.kind == "message" else ""

    def written(self, status: str) -> dict[str, Any]:
        """As JSON has it. One that is in progress has no text yet."""
        text = "" if status == "in_progress" else self.text
        item: dict[str, Any] = {"id": self.id, "type": self.kind, "status": status}
        if self.part is None:
            return item | {"call_id": self.call_id, "name": self.name, "arguments": text}
        content = [] if status == "in_progress" else [self.written_part(text)]
        if self.kind == "reasoning":
            return item | {"summary": [], "content": content}
        return item | {"role": "assistant", "content": content}

    def written_part(self, text: str) -> dict[str, Any]:
        """Its one part, with some text."""
        more: dict[str, Any] = {"annotations": [], "logprobs": []} if self.kind == "message" else {}
        return {"type": self.part, "text": text, **more}
