"""The formats of outputs, by name and by model."""

from __future__ import annotations

from tpworker.parsing.llama import LlamaFormat
from tpworker.parsing.marked import JsonFormat
from tpworker.parsing.mistral import MistralFormat
from tpworker.parsing.reasoning import ReasoningFormat
from tpworker.parsing.tagged import GlmFormat, QwenCoderFormat
from tpworker.parsing.tools import ToolFormat

_HERMES = JsonFormat("hermes")

TOOL_FORMATS: dict[str, ToolFormat] = {
    tools.name: tools
    for tools in (
        _HERMES,
        JsonFormat("ernie45"),
        GlmFormat(),
        QwenCoderFormat(),
        LlamaFormat(),
        MistralFormat(),
    )
}
"""By the names that vLLM's `--tool-call-parser` has for them."""

REASONING_FORMATS: dict[str, ReasoningFormat] = {
    reasoning.name: reasoning
    for reasoning in (
        ReasoningFormat("qwen3"),
        ReasoningFormat("glm45"),
        ReasoningFormat("ernie45", answer=("<response>", "</response>")),
    )
}
"""By the names that vLLM's `--reasoning-parser` has for them."""

_BY_SIGN = {
    "<arg_key>": "glm45",
    "<function=": "qwen3_coder",
    "<tool_call>": "hermes",
    "[TOOL_CALLS]": "mistral",
    "<|python_tag|>": "llama3_json",
    '"parameters":': "llama3_json",
}
"""What a template says of calls, the surest first."""
_BY_FAMILY = {"glm4_moe": "glm45", "ernie4_5": "ernie45", "ernie4_5_moe": "ernie45"}
_REASONING_BY_FAMILY = {"glm4_moe": "glm45", "ernie4_5": "ernie45", "ernie4_5_moe": "ernie45"}


def formats_of(model_type: str, template: str | None) -> tuple[ToolFormat | None, ReasoningFormat | None]:
    """How a model writes calls, and how it thinks; None: it does not.

    The template decides, since models of one architecture are trained on whatever format; the type of the
    model tells apart what templates write alike. A model whose template says nothing of calls gets Hermes'
    format all the same: its calls can be held by a grammar, and it is the format that most models have seen.
    One without a template cannot chat, and gets none.

    Args:
        model_type: config.json's.
        template: the text of its chat template; None: it has none.
    """
    if template is None:
        return None, None
    name = next((name for sign, name in _BY_SIGN.items() if sign in template), "hermes")
    if name == "hermes":
        name = _BY_FAMILY.get(model_type, name)
    thinks = "<think>" in template or "</think>" in template
    reasoning = REASONING_FORMATS[_REASONING_BY_FAMILY.get(model_type, "qwen3")] if thinks else None
    return TOOL_FORMATS[name], reasoning
