"""Logprobs as the two endpoints write them.

A token is written as the text that it adds; where its bytes are no whole characters, as OpenAI's API does
(`bytes:` and each byte in hexadecimal), with the bytes themselves beside it where there is a place for them.
Without a tokenizer, or if asked for, as `token_id:123`, as vLLM does.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from tpworker.outputs import TokenLogprobs
from tpworker.text.tokenizer import Tokenizer

LEAST_LOGPROB = -9999.0
"""Written for what is less, for minus infinity and for NaN: JSON has neither."""


class LogprobWriter:
    """Of one answer.

    Args:
        tokenizer: None: there is none.
        as_ids: tokens are written as their ids.
        shows_special: special tokens of the output are text.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, as_ids: bool = False, shows_special: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        self._as_ids = as_ids
        self._shows_special = shows_special

    def token(self, token_id: int) -> tuple[str, bytes]:
        """A token's name, and its bytes."""
        if self._tokenizer is None or self._as_ids:
            name = f"token_id:{token_id}"
            return name, name.encode()
        piece = self._tokenizer.piece(token_id) or self._tokenizer.special_name(token_id)
        if isinstance(piece, str):
            return piece, piece.encode()
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece), piece

    def chat(self, tokens: Sequence[TokenLogprobs]) -> dict[str, Any]:
        """`logprobs` of a choice, or of a chunk, of /v1/chat/completions."""
        content = []
        for one in tokens:
            top = [self._entry(token_id, logprob) for token_id, logprob in one.top]
            content.append({**self._entry(one.token_id, one.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}

    def _entry(self, token_id: int, logprob: float) -> dict[str, Any]:
        name, raw = self.token(token_id)
        return {"token": name, "logprob": written(logprob), "bytes": list(raw)}

    def ranked(self, one: TokenLogprobs) -> dict[str, dict[str, Any]]:
        """Of a prompt's token, as vLLM tells it: by id, the likeliest and the token itself. Its rank is null
        where it is not one of the likeliest."""
        told: dict[str, dict[str, Any]] = {}
        places = [(rank, *entry) for rank, entry in enumerate(one.top, start=1)]
        for rank, token_id, logprob in (*places, (None, one.token_id, one.logprob)):
            entry = {"logprob": written(logprob), "rank": rank, "decoded_token": self.token(token_id)[0]}
            told.setdefault(str(token_id), entry)
        return told

    def completion(
        self, tokens: Sequence[Told], offsets: Offsets, has_top: bool, echo: str = "", num_echoed: int = 0
    ) -> dict[str, Any]:
        """`logprobs` of a choice, or of a chunk, of /v1/completions.

        Args:
            tokens: token id, and what is told of it: None for a prompt's first token.
            offsets: where the choice's text stands.
            has_top: False: only the tokens' own were asked for.
            echo: the prompt's text, where the choice's text begins with it.
            num_echoed: so many of the tokens are the prompt's.
        """
        begins = []
        for place, (token_id, _) in enumerate(tokens):
            shown = (
                self._echoed(token_id, echo, offsets.place) if place < num_echoed else self._shown(token_id)
            )
            begins.append(offsets.pass_by(shown))
        return {
            "tokens": [self.token(token_id)[0] for token_id, _ in tokens],
            "token_logprobs": [None if one is None else written(one.logprob) for _, one in tokens],
            "text_offset": begins,
            "top_logprobs": [None if one is None else self._top(one) for _, one in tokens]
            if has_top
            else None,
        }

    def _shown(self, token_id: int) -> bytes:
        """What a token of the output adds to the text."""
        added = self._added(token_id)
        return self._special(token_id) if self._shows_special and not added else added

    def _echoed(self, token_id: int, text: str, place: int) -> bytes:
        """What a token of the prompt is in its text, at this place."""
        added = self._added(token_id)
        if not added:  # a special one: of the text as it was given, or put there by the tokenizer
            special = self._special(token_id)
            return special if text.startswith(special.decode(), place) else b""
        if place == 0 and added.startswith(b" ") and not text.startswith(" "):
            return added[1:]  # tokenizers that write a word with the space before it put one before the first
        return added

    def _special(self, token_id: int) -> bytes:
        return b"" if self._tokenizer is None else self._tokenizer.special_name(token_id).encode()

    def _added(self, token_id: int) -> bytes:
        """What a token adds to a text that has begun; a special one nothing."""
        piece = "" if self._tokenizer is None else self._tokenizer.piece(token_id)
        return piece.encode() if isinstance(piece, str) else piece

    def _top(self, one: TokenLogprobs) -> dict[str, float]:
        """The likeliest by name, and the token itself, which may not be one of them. Of the same names the
        likelier."""
        top: dict[str, float] = {}
        for token_id, logprob in (*one.top, (one.token_id, one.logprob)):
            top.setdefault(self.token(token_id)[0], written(logprob))
        return top


class Offsets:
    """Of one choice: at which character of its text each token begins.

    Args:
        start: characters before the first.
    """

    def __init__(self, start: int = 0) -> None:
        self.place = start
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def pass_by(self, added: bytes) -> int:
        """Where a token that adds these bytes begins: a character counts once its last byte is there."""
        begin = self.place
        self.place += len(self._decoder.decode(added))
        return begin


Told = tuple[int, TokenLogprobs | None]


def written(logprob: float) -> float:
    """As JSON can have it."""
    return logprob if logprob > LEAST_LOGPROB else LEAST_LOGPROB
