"""The bodies of /tokenize and /detokenize."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field, WithJsonSchema, model_validator
from pydantic.config import JsonDict

from tpworker.errors import InvalidRequest
from tpworker.server.requests.conversation import Conversation, Message
from tpworker.server.requests.fields import Body, Integer
from tpworker.server.requests.unsupported import TOKENIZE

_ONE_OF_BOTH: JsonDict = {
    "oneOf": [
        {"required": ["prompt"], "properties": {"prompt": {"type": "string"}}},
        {"required": ["messages"], "properties": {"messages": {"type": "array"}}},
    ]
}


class TokenizeRequest(Conversation):
    """A text, or a conversation."""

    model_config = ConfigDict(json_schema_extra=_ONE_OF_BOTH)
    unsupported = TOKENIZE

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message] | None, Field(min_length=1)] = None  # type: ignore[assignment]
    """Instead of a prompt."""
    add_special_tokens: bool | None = None
    """Whether the tokenizer adds what the model expects around a text; null: to a prompt, not to messages."""
    return_token_strs: bool | None = None
    """Whether the answer has the tokens as strings, too."""

    @model_validator(mode="after")
    def _one_of_both(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            both = "are both given" if self.messages else "are both missing"
            raise InvalidRequest(f"prompt and messages {both}: give one", "prompt")
        return self

    @property
    def num_chars(self) -> int:
        return super().num_chars if self.prompt is None else len(self.prompt)


_ANY_ID = {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}  # also such as the model has not


class DetokenizeRequest(Body):
    """Token ids."""

    model: str | None = None
    tokens: list[Annotated[Integer, WithJsonSchema(_ANY_ID)]]

    @model_validator(mode="after")
    def _can_be_ids(self) -> DetokenizeRequest:
        for place, token_id in enumerate(self.tokens):
            if not 0 <= token_id < 2**31:
                raise InvalidRequest(
                    f"{token_id} is no token id: these are from 0 to 2**31 - 1", f"tokens[{place}]"
                )
        return self
