"""What bodies about a conversation have in common: tools, thinking, and what the answer is held to."""

from __future__ import annotations

from pydantic import model_validator

from tpworker.errors import InvalidRequest
from tpworker.server.requests.generation import GenerationRequest
from tpworker.server.requests.reasoning import ThinkingOptions
from tpworker.server.requests.tools import ToolUse


class SpokenRequest(ToolUse, ThinkingOptions, GenerationRequest):
    """What is answered is read: see `tpworker.server.speaking`."""

    @model_validator(mode="after")
    def _calls_or_answers(self) -> SpokenRequest:
        held = self.held
        if held is None or self.choice.mode == "none":
            return self
        if self.choice.mode == "required":
            raise InvalidRequest(
                f"{held.name} says what is answered, and tool_choice asks for a call in its place: give one",
                held.name,
            )
        if held.kind not in ("json", "json_object"):
            raise InvalidRequest(
                f"{held.name}: beside tools the answer may be JSON alone, any or of a schema: give "
                "response_format, or tool_choice none",
                held.name,
            )
        return self
