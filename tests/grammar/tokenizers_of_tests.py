"""Tokenizers with tokens added to the default model's, special ones and others."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from tokenizers import Tokenizer

from tests.grammar.tokenizers import added_tokens
from tpworker.grammar import Compiler

EOS_IDS = (2, 0)


class Extended:
    """The default model's tokenizer with more tokens, compiled for.

    Args:
        folder: of the default model.
        added: names of tokens.
        is_special: whether they are special.
        num_wider: by how much the model's logits are wider.
    """

    def __init__(self, folder: Path, added: tuple[str, ...], is_special: bool, num_wider: int = 0) -> None:
        said = json.loads((folder / "tokenizer.json").read_text())
        first = max(said["model"]["vocab"].values()) + 1
        rest = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        said["added_tokens"] += [
            {"id": first + i, "content": name, "special": is_special, **rest} for i, name in enumerate(added)
        ]
        text = json.dumps(said)
        self.tokenizer = Tokenizer.from_str(text)
        self.vocab_size = self.tokenizer.get_vocab_size() + num_wider
        self.compiler = Compiler(text, self.vocab_size, EOS_IDS)
        self.special_ids = added_tokens(text)

    def ids(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return found


@cache
def extended(folder: Path, added: tuple[str, ...], is_special: bool) -> Extended:
    return Extended(folder, added, is_special)
