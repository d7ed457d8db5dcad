"""What a model's output says: thinking, text, and calls of tools, each family in a format of its own."""

from tpworker.parsing.events import CallArguments, CallBegan, Content, Event, Reasoning
from tpworker.parsing.formats import REASONING_FORMATS, TOOL_FORMATS, formats_of
from tpworker.parsing.functions import Function
from tpworker.parsing.parser import OutputParser
from tpworker.parsing.reasoning import ReasoningFormat
from tpworker.parsing.tools import ToolFormat

__all__ = [
    "REASONING_FORMATS",
    "TOOL_FORMATS",
    "CallArguments",
    "CallBegan",
    "Content",
    "Event",
    "Function",
    "OutputParser",
    "Reasoning",
    "ReasoningFormat",
    "ToolFormat",
    "formats_of",
]
