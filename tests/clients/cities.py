"""What the programs of client libraries ask for: a city, held to its schema, and tools to be called.

Annotations are no strings here: LlamaIndex reads those of a tool as they are.
"""

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any, Literal

from pydantic import BaseModel

QUESTION = "Which city?"
"""Of structured output."""
HOW_MANY = "How many live in Paris?"
"""Of tools."""
IN_ROME = "How many live in Rome?"
"""The same; the fake model calls it wrong at first."""
Name = Literal["Paris", "Rome"]


class Country(BaseModel):
    code: Literal["FR", "IT"]


class City(BaseModel):
    """A city. All that it may be is short, so that a model of any size comes to its end."""

    name: Name
    is_capital: bool
    country: Country | None


def population(city: Name) -> str:
    """How many live in a city."""
    return f"{city}: two million"


def weather(city: Name) -> str:
    """How the weather is in a city."""
    return f"{city}: rain"


Program = Callable[[str, str], dict[str, Any]]
"""Gets the base URL of a server and the name of its model, and says what came of it."""


def run(programs: Mapping[str, Program]) -> None:
    """Runs the program that the command line names, `NAME URL MODEL`, and prints what it says as JSON."""
    name, url, model = sys.argv[1:]
    print(json.dumps(programs[name](url, model)))
