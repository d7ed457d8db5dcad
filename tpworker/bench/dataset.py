"""Prompts out of a file: JSON, a line each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tpworker.errors import ConfigError

_MOST_BYTES = 1 << 30


def read_dataset(file: str, is_chat: bool) -> tuple[Mapping[str, Any], ...]:
    """What is asked, one request a line: a text, or an object with `prompt` or `messages`, and perhaps
    `max_tokens`.

    Args:
        file: its name.
        is_chat: for which endpoint: a prompt becomes a user's message there.

    Raises:
        ConfigError: it cannot be read, or a line is something else.
    """
    path = Path(file)
    try:
        if path.stat().st_size > _MOST_BYTES:
            raise ConfigError(f"--dataset {file} has more than {_MOST_BYTES >> 20} MiB")
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"--dataset {file} cannot be read: {error}") from None
    where = f"--dataset {file}, line"
    items = [_item(line, f"{where} {at}", is_chat) for at, line in enumerate(lines, 1) if line.strip()]
    if not items:
        raise ConfigError(f"--dataset {file} is empty")
    return tuple(items)


def _item(line: str, where: str, is_chat: bool) -> Mapping[str, Any]:
    try:
        said = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is no JSON: {error}") from None
    if isinstance(said, str):
        said = {"prompt": said}
    if not isinstance(said, dict) or ("prompt" in said) == ("messages" in said):
        raise ConfigError(f"{where} must be a text, or an object with either `prompt` or `messages`")
    if "max_tokens" in said and (not isinstance(said["max_tokens"], int) or said["max_tokens"] < 1):
        raise ConfigError(f"{where}: max_tokens must be a number from 1")
    if "messages" in said and not is_chat:
        raise ConfigError(f"{where} is a conversation: --endpoint chat")
    if "prompt" in said and is_chat:
        if not isinstance(said["prompt"], str):
            raise ConfigError(f"{where}: a prompt for --endpoint chat must be a text")
        said["messages"] = [{"role": "user", "content": said.pop("prompt")}]
    return {name: said[name] for name in ("prompt", "messages", "max_tokens") if name in said}
