"""The body of /v1/chat/completions."""

from __future__ import annotations

from typing import ClassVar

from pydantic import model_validator

from tpworker.config import SamplingParams
from tpworker.errors import InvalidRequest
from tpworker.server.requests.conversation import Conversation
from tpworker.server.requests.fields import Integer, bounds
from tpworker.server.requests.generation import GenerationRequest
from tpworker.server.requests.unsupported import CHAT


class ChatRequest(Conversation, GenerationRequest):
    """The body of /v1/chat/completions."""

    unsupported = CHAT
    default_max_tokens: ClassVar[int | None] = None  # as many as fit

    max_completion_tokens: Integer | None = bounds(minimum=1, maximum=2**31 - 1)
    """The newer name of max_tokens."""

    @model_validator(mode="after")
    def _one_limit(self) -> ChatRequest:
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise InvalidRequest(
                f"max_tokens={self.max_tokens} and max_completion_tokens={self.max_completion_tokens} "
                "mean the same: give one",
                parameter="max_completion_tokens",
            )
        return self

    @property
    def num_output_reserved(self) -> int:
        return max(super().num_output_reserved, self.max_completion_tokens or 0)

    def sampling(self, detokenize: bool) -> SamplingParams:
        if self.max_completion_tokens is None:
            return super().sampling(detokenize)
        try:
            return self._sampling(self.max_completion_tokens, detokenize)
        except InvalidRequest as error:
            if error.parameter != "max_tokens":
                raise
            raise InvalidRequest(
                str(error).replace("max_tokens", "max_completion_tokens"), "max_completion_tokens"
            ) from error
