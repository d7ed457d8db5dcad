"""A tokenizer of any size, for models of which there is only a config.json.

Its first tokens are the 256 bytes; then come words of syllables, with a space before them and without, as
long and as alike as those of real vocabularies are; the last is the end of a text.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

END = "<|end|>"
_BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
QUOTE = _BYTES.index('"')
"""The token that ends a string of JSON."""
_CONSONANTS = ["b", "c", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "st", "tr", "th", "ch"]
_VOWELS = ["a", "e", "i", "o", "u", "ea", "ou", "io"]


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Writes tokenizer.json, for so many tokens, and generation_config.json, which says what ends a text."""
    symbols = dict.fromkeys(_BYTES)
    draw = random.Random(0)
    while len(symbols) < vocab_size - 1:
        length = draw.choice([1, 2, 2, 3, 3, 4])
        syllables = (draw.choice(_CONSONANTS) + draw.choice(_VOWELS) for _ in range(length))
        word = "".join(syllables) + draw.choice(["", "", "n", "s", "r"])
        symbols[draw.choice(["", "Ġ", "Ġ"]) + (word.title() if draw.random() < 0.2 else word)] = None
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(END, special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": vocab_size - 1}))
