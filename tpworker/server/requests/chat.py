"""The body of /v1/chat/completions."""

from __future__ import annotations

from typing import ClassVar

from tpworker.server.requests.conversation import Conversation
from tpworker.server.requests.fields import Integer, bounds
from tpworker.server.requests.generation import GenerationRequest
from tpworker.server.requests.unsupported import CHAT


class ChatRequest(Conversation, GenerationRequest):
    """The body of /v1/chat/completions."""

    unsupported = CHAT
    limit_name: ClassVar[str] = "max_completion_tokens"

    max_completion_tokens: Integer | None = bounds(minimum=1, maximum=2**31 - 1)
    """The newer name of max_tokens."""
