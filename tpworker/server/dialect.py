"""What is particular to the model that is served: how it calls and thinks, and what its chat template knows.

A template is a program that nobody can ask; what it knows is read off the names in its source.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tpworker.errors import InvalidRequest
from tpworker.parsing import REASONING_FORMATS, TOOL_FORMATS, ReasoningFormat, ToolFormat, formats_of

if TYPE_CHECKING:
    from tpworker.text.tokenizer import Tokenizer

AUTO, NONE = "auto", "none"
"""What the options of parsers are, besides names."""
SWITCHES = ("enable_thinking", "thinking")
"""What templates call whether the model thinks."""
EFFORT = "reasoning_effort"
PLAIN_FORMAT = "hermes"
"""In which tools are told where the template shows none."""
_ID_LENGTH = re.compile(r"\bid *\| *length *!= *(\d{1,2})\b")
"""Mistral's: `tool_call.id | length != 9`, or it raises."""
_ONE_CALL = re.compile(r"\btool_calls *\| *length *== *1\b")
"""Llama 3's: `not message.tool_calls | length == 1`, and it raises."""


@dataclass(frozen=True)
class Dialect:
    """See above; of one model, with the options of its server."""

    tools: ToolFormat | None = None
    """None: tools are not taken (`--tool-call-parser none`), or there is no template."""
    reasoning: ReasoningFormat | None = None
    """None: the model does not think, or its thinking is left in the text."""
    shows_tools: bool = False
    """Whether the template shows the tools that it is given."""
    shows_calls: bool = False
    """Whether it shows the calls of earlier turns, and what came of them."""
    id_length: int | None = None
    """Letters and digits of which the ids of calls consist; None: of whatever they do."""
    takes_one_call: bool = False
    """Whether no turn of the assistant's may have several calls."""
    knows: frozenset[str] = frozenset()
    """Which of SWITCHES and EFFORT it reads."""
    special: frozenset[str] = frozenset()
    """Names of the tokenizer's special tokens."""
    added: Mapping[str, int] = field(default_factory=dict)
    """Of all its added tokens, those included, the ids by name."""

    @classmethod
    def of(
        cls, model_type: str, tokenizer: Tokenizer, tool_parser: str = AUTO, reasoning_parser: str = AUTO
    ) -> Dialect:
        """That of a model.

        Args:
            model_type: config.json's.
            tool_parser, reasoning_parser: a format's name, or `auto`, or `none`.
        """
        template = tokenizer.chat_template
        names = frozenset(re.findall(r"\w+", template or ""))
        tools, reasoning = formats_of(model_type, template)
        if tool_parser != AUTO:
            tools = None if tool_parser == NONE else TOOL_FORMATS[tool_parser]
        if reasoning_parser != AUTO:
            reasoning = None if reasoning_parser == NONE else REASONING_FORMATS[reasoning_parser]
        return cls(
            tools,
            reasoning,
            shows_tools="tools" in names,
            shows_calls="tool_calls" in names,
            id_length=_id_length(template or ""),
            takes_one_call=bool(_ONE_CALL.search(template or "")),
            knows=names & {*SWITCHES, EFFORT},
            special=frozenset(tokenizer.special),
            added=tokenizer.added,
        )

    @property
    def tells_tools(self) -> bool:
        """Whether tools are told in a message, since the template does not show them."""
        return not self.shows_tools and self.tools is not None and self.tools.name == PLAIN_FORMAT

    def check_tools(self) -> ToolFormat:
        """The format of calls.

        Raises:
            InvalidRequest: there is none, or none that the model could be told of.
        """
        if self.tools is None:
            raise InvalidRequest(
                "tools are not taken by this server (--tool-call-parser none): leave them out, or give "
                "tool_choice none",
                "tools",
            )
        if not self.shows_tools and not self.tells_tools:
            raise InvalidRequest(
                f"the model's chat template does not show tools, and the server (--tool-call-parser "
                f"{self.tools.name}) can tell of them in the format {PLAIN_FORMAT} alone: leave them out, or "
                f"start it with --tool-call-parser {PLAIN_FORMAT} or auto",
                "tools",
            )
        return self.tools


def _id_length(template: str) -> int | None:
    found = _ID_LENGTH.search(template)
    return None if found is None else int(found[1]) or None
