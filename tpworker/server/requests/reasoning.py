"""Whether the model thinks before it answers, and what becomes of that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from tpworker.errors import InvalidRequest
from tpworker.server.dialect import EFFORT, SWITCHES, Dialect
from tpworker.server.ignored import ignore
from tpworker.server.requests.fields import Body

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]


class ThinkingOptions(Body):
    """Whether, how much, and whether that is told."""

    reasoning_effort: Effort | None = None
    """none: the model does not think. The others count where the chat template knows efforts; elsewhere they
    switch thinking on."""
    enable_thinking: bool | None = None
    """Whether the model thinks, where its chat template can tell it."""
    include_reasoning: bool | None = None
    """False: what the model thinks is not told."""
    separate_reasoning: bool | None = None
    """False: what the model thinks is left in the content, with its marks."""

    def variables(self, dialect: Dialect, given: Mapping[str, Any]) -> dict[str, Any]:
        """Variables for the chat template. What it cannot be told, is told of as ignored.

        Args:
            given: what the client gives as such.

        Raises:
            InvalidRequest: two of them contradict each other.
        """
        variables = dict(given)
        switch = next((name for name in SWITCHES if name in dialect.knows), None)
        for name in SWITCHES:  # under whichever name the template has it
            if name in variables and switch not in (None, name) and switch not in variables:
                variables[str(switch)] = variables.pop(name)
        if self.enable_thinking is not None:
            _set(variables, switch, self.enable_thinking, "enable_thinking", dialect)
        name, effort = self._effort
        if effort is not None:
            thinks = effort != "none"
            if EFFORT in dialect.knows:
                _set(variables, EFFORT, effort, name, dialect)
                if switch is not None and not thinks:
                    _set(variables, switch, False, name, dialect)
            else:
                _set(variables, switch, thinks, name, dialect)
        return variables

    @property
    def _effort(self) -> tuple[str, str | None]:
        """By which parameter an effort is given, and which."""
        return EFFORT, self.reasoning_effort


def _set(variables: dict[str, Any], switch: str | None, value: Any, name: str, dialect: Dialect) -> None:
    """What the parameter `name` says, as the variable `switch`; None: the template has none for it."""
    if switch is None:
        is_so = value is False and dialect.reasoning is None  # a model that does not think
        if not is_so:
            ignore(name)
    elif variables.setdefault(switch, value) != value:
        raise InvalidRequest(
            f"{name} contradicts {switch}={variables[switch]!r}, which is given too: give one", name
        )
