"""The body of /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import model_validator

from tpworker.errors import InvalidRequest
from tpworker.sampling_params import MAX_LOGPROBS
from tpworker.server.dialect import Dialect
from tpworker.server.requests.conversation import Conversation
from tpworker.server.requests.fields import Integer, bounds
from tpworker.server.requests.spoken import SpokenRequest
from tpworker.server.requests.unsupported import CHAT


class ChatRequest(Conversation, SpokenRequest):
    """The body of /v1/chat/completions."""

    unsupported = CHAT
    prompt_name: ClassVar[str] = "messages"
    limit_name: ClassVar[str] = "max_completion_tokens"

    max_completion_tokens: Integer | None = bounds(minimum=0, maximum=2**31 - 1)
    """The newer name of max_tokens."""
    logprobs: bool | None = None
    """Whether the answer tells the logprobs of its tokens."""
    top_logprobs: Integer | None = bounds(minimum=0, maximum=MAX_LOGPROBS)
    """With logprobs: of so many of the likeliest tokens in each one's place."""

    @property
    def _num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def _own_names(self) -> Mapping[str, str]:
        return {"logprobs": "top_logprobs"}

    def variables_for(self, dialect: Dialect) -> dict[str, Any]:
        return self.variables(dialect, self.chat_template_kwargs or {})

    @model_validator(mode="after")
    def _only_with_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("top_logprobs are told with logprobs=true only: add it", "top_logprobs")
        return self
