"""The formats of outputs, by name and by model."""

from __future__ import annotations

from tpworker.parsing.reasoning import ReasoningFormat
from tpworker.parsing.tools import ToolFormat

REASONING_FORMATS: dict[str, ReasoningFormat] = {
    name: ReasoningFormat(name, "<think>", "</think>") for name in ("qwen3", "glm45", "ernie45")
}
TOOL_FORMATS: dict[str, ToolFormat] = {}


def formats_of(model_type: str, template: str | None) -> tuple[ToolFormat | None, ReasoningFormat | None]:
    """How a model writes calls, and how it thinks; None: it does not.

    Args:
        model_type: config.json's.
        template: the text of its chat template; None: it has none.
    """
    thinks = template is not None and "<think>" in template
    return None, REASONING_FORMATS["qwen3"] if thinks else None
