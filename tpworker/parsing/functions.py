"""The functions that a model may call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Function:
    """A function that the model may call.

    Args:
        name: as the model writes it.
        parameters: the JSON schema of its arguments, an object's; empty: any object.
        is_strict: the client asks that calls are held to the schema whatever the choice of tools.
    """

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    is_strict: bool = False
