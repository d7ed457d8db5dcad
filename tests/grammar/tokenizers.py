"""Tokenizers that are made in a blink."""

from __future__ import annotations

import json
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

END, THINK, TOOL = "</s>", "<think>", "[TOOL]"
END_ID = 256
VOCAB_SIZE = 300


def bytes_alone() -> Any:
    """A token for each byte, then the end of a text, a special token, and an added one that is text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(END, special=True), AddedToken(THINK, special=True)])
    backend.add_tokens([AddedToken(TOOL, special=False)])
    return backend


def added_tokens(tokenizer_json: str) -> dict[str, int]:
    """The ids of the added tokens in the text of a tokenizer.json, special or not, by their names."""
    return {token["content"]: token["id"] for token in json.loads(tokenizer_json).get("added_tokens") or ()}
