"""Tools that the model may call, as /v1/chat/completions has them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from tpworker.errors import InvalidRequest, shown
from tpworker.parsing import Function
from tpworker.server.requests.fields import Body, check_depth

MAX_TOOLS = 128
MAX_TOOLS_CHARS = 1 << 18
"""Of all tools together, as JSON."""
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")

_NAMED: dict[str, Any] = {
    "type": "object",
    "properties": {
        "type": {"const": "function"},
        "function": {
            "type": "object",
            "properties": {"name": {"type": "string"}},
            "required": ["name"],
        },
    },
    "required": ["type", "function"],
}
_ALLOWED: dict[str, Any] = {
    "type": "object",
    "properties": {
        "type": {"const": "allowed_tools"},
        "allowed_tools": {
            "type": "object",
            "properties": {
                "mode": {"enum": ["auto", "required"]},
                "tools": {"type": "array", "minItems": 1, "items": _NAMED},
            },
            "required": ["mode", "tools"],
        },
    },
    "required": ["type", "allowed_tools"],
}
_MODES = ("none", "auto", "required")
CHOICE = {
    "title": "Tool choice",
    "anyOf": [{"enum": [*_MODES, None]}, _NAMED, _ALLOWED],
}
"""The JSON schema of `tool_choice`."""


def checked_name(name: str) -> str:
    """A function's name."""
    if not NAME.fullmatch(name):
        raise ValueError("it should be 1 to 64 of the characters A-Z a-z 0-9 _ . -")
    return name


def checked_parameters(parameters: Any) -> Any:
    """A schema that is not nested without end."""
    check_depth(parameters)
    if isinstance(parameters, dict) and parameters.get("type", "object") != "object":
        raise ValueError('it should be the JSON schema of an object, with "type": "object"')
    return parameters


FunctionName = Annotated[
    str, BeforeValidator(lambda n: checked_name(n) if isinstance(n, str) else n),
    WithJsonSchema({"type": "string", "pattern": f"^{NAME.pattern}$"}),
]  # fmt: skip
Parameters = Annotated[dict[str, Any] | None, BeforeValidator(checked_parameters)]


class FunctionTool(Body):
    """A function."""

    place = "tools.function."

    name: FunctionName
    description: str | None = None
    parameters: Parameters = None
    """The JSON schema of its arguments, an object's; left out: it has none."""
    strict: bool | None = None
    """Whether calls of it are held to that schema, whatever `tool_choice` is."""

    def for_template(self) -> dict[str, Any]:
        """As chat templates know it: a tool."""
        told: dict[str, Any] = {"name": self.name}
        if self.description is not None:
            told["description"] = self.description
        told["parameters"] = self.parameters or {"type": "object", "properties": {}}
        return {"type": "function", "function": told}

    def as_function(self) -> Function:
        """As parsers and grammars know it."""
        return Function(self.name, self.parameters or {}, bool(self.strict))


class Tool(Body):
    """A tool that the model may call; there are only functions."""

    place = "tools."
    name_place: ClassVar[str] = "function.name"

    type: Literal["function"]
    function: FunctionTool


class FlatTool(FunctionTool):
    """The same, as /v1/responses has it: the function stands beside the type."""

    place = "tools."
    name_place: ClassVar[str] = "name"

    type: Literal["function"]

    @model_validator(mode="before")
    @classmethod
    def _is_a_function(cls, tool: Any) -> Any:
        if isinstance(tool, dict) and (kind := tool.get("type")) != "function":  # before all that it lacks
            raise InvalidRequest(f"type={shown(kind)}: it should be 'function': there are no others", "type")
        return tool

    @property
    def function(self) -> FunctionTool:
        """What it calls."""
        return self


def _bounded(tools: Any) -> Any:
    if isinstance(tools, list) and len(tools) > MAX_TOOLS:
        raise ValueError(f"{len(tools)} tools are more than the {MAX_TOOLS} that one request may have")
    return tools


Tools = Annotated[list[Tool] | None, BeforeValidator(_bounded)]
FlatTools = Annotated[list[FlatTool] | None, BeforeValidator(_bounded)]


def check_tools(tools: Sequence[Tool | FlatTool]) -> None:
    """Whether they can be told apart, and are not too much.

    Raises:
        InvalidRequest: says which is not.
    """
    seen: set[str] = set()
    num_chars = 0
    for place, tool in enumerate(tools):
        name = tool.function.name
        if name in seen:
            where = f"tools[{place}].{tool.name_place}"
            raise InvalidRequest(
                f"{where}={shown(name)}: another tool has that name: give each its own", where
            )
        seen.add(name)
        num_chars += len(json.dumps(tool.function.for_template()))
        if num_chars > MAX_TOOLS_CHARS:  # at once: a body may have many times as much
            raise InvalidRequest(
                f"the tools have more than {MAX_TOOLS_CHARS} characters as JSON, the limit: describe them in "
                "fewer words, or give fewer of them",
                "tools",
            )


@dataclass(frozen=True)
class Choosing:
    """What `tool_choice` says.

    Args:
        mode: whether calls are looked for at all, and whether there must be one.
        names: of the functions that may be called; None: all.
    """

    mode: Literal["none", "auto", "required"]
    names: tuple[str, ...] | None = None
    is_named: bool = False
    """It names one function, which is called once."""


def choosing(value: Any, flat: bool = False) -> Choosing:
    """Reads a `tool_choice` that is given.

    Args:
        flat: functions are named as /v1/responses does, `name` beside `type`.

    Raises:
        InvalidRequest: it is none.
    """
    if value in _MODES:
        return Choosing(value)
    if isinstance(value, dict):
        if value.get("type") == "function" and (name := _named(value, flat)) is not None:
            return Choosing("required", (name,), is_named=True)
        if value.get("type") == "allowed_tools":
            allowed = value if flat else value.get("allowed_tools")
            if isinstance(allowed, dict) and allowed.get("mode") in ("auto", "required"):
                tools = allowed.get("tools")
                names = [_named(tool, flat) for tool in tools] if isinstance(tools, list) else []
                if names and None not in names:
                    return Choosing(allowed["mode"], tuple(filter(None, names)))
    how = '"name": …' if flat else '"function": {"name": …}'
    raise InvalidRequest(
        f'{shown(value)}: it should be "none", "auto", "required", {{"type": "function", {how}}}, or '
        "allowed_tools with a mode and tools"
    )


def _named(tool: Any, flat: bool) -> str | None:
    """Whom a function of a choice names; None: nobody."""
    if not isinstance(tool, dict) or tool.get("type") != "function":
        return None
    function = tool if flat else tool.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else None


def check_choice(choice: Choosing, tools: Sequence[Tool | FlatTool]) -> None:
    """Whether there is what it names.

    Raises:
        InvalidRequest: there is not.
    """
    if choice.mode == "required" and not tools:
        raise InvalidRequest("tool_choice asks for a call, and there are no tools: give some", "tool_choice")
    known = {tool.function.name for tool in tools}
    for name in choice.names or ():
        if name not in known:
            raise InvalidRequest(
                f"tool_choice names {shown(name)}, which is none of the tools: give it among them",
                "tool_choice",
            )


class ToolUse(Body):
    """Which tools there are, and which of them are to be called."""

    is_flat: ClassVar[bool] = False
    """Functions stand beside their type, as in /v1/responses."""

    tools: Tools = Field(None, json_schema_extra={"maxItems": MAX_TOOLS})
    tool_choice: Annotated[Any, WithJsonSchema(CHOICE)] = None
    """auto: the model calls some, or none; required: one at least; none: calls are text."""
    parallel_tool_calls: bool | None = None
    """False: one call at most."""

    @property
    def choice(self) -> Choosing:
        """What `tool_choice` says; without it auto, if there are tools."""
        if not self.tools:
            return Choosing("none")
        return Choosing("auto") if self.tool_choice is None else choosing(self.tool_choice, self.is_flat)

    @property
    def functions(self) -> list[Function]:
        """Those that may be called, as parsers and grammars know them."""
        names = self.choice.names
        every = [tool.function.as_function() for tool in self.tools or ()]
        return [function for function in every if names is None or function.name in names]

    @model_validator(mode="after")
    def _tools_fit(self) -> ToolUse:
        check_tools(self.tools or ())
        if self.tool_choice is not None:
            try:
                choice = choosing(self.tool_choice, self.is_flat)
            except InvalidRequest as error:
                raise InvalidRequest(f"tool_choice={error}", "tool_choice") from error
            check_choice(choice, self.tools or ())
        return self
