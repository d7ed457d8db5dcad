"""Prompts of three kinds, from the files in texts/: what a user asks, to be put into a chat template."""

from __future__ import annotations

from pathlib import Path

KINDS = ("copying", "code", "chat")
"""Copying and editing a passage; writing and editing code; questions."""
_FOLDER = Path(__file__).parent / "texts"
_BETWEEN = "\n----\n"


def read_prompts(kind: str) -> list[str]:
    """Of one of KINDS."""
    return [text.strip() for text in (_FOLDER / f"{kind}.txt").read_text().split(_BETWEEN)]
