"""What the ids of a tokenizer are as text, one by one."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

from tpworker.text.decoding import Decoding


class Vocabulary:
    """Tokens and pieces of a tokenizer, those of special tokens or without them.

    Args:
        backend: a tokenizer of the tokenizers library.
        decoding: how its decoder makes text of tokens.
        hidden_ids: the tokens that are no text.
    """

    def __init__(self, backend: Any, decoding: Decoding, hidden_ids: Set[int] = frozenset()) -> None:
        self.decoding = decoding
        """How its decoder makes text of tokens."""
        self.pieces: dict[int, str | bytes] = {}
        """Those that were asked for; see `piece`."""
        self._backend = backend
        self._hidden_ids = hidden_ids

    def token(self, token_id: int) -> str | None:
        """A token as its decoder gets it; None for what is no text: hidden tokens, and ids that the model
        has but the tokenizer has not."""
        token: str | None = self._backend.id_to_token(token_id)
        return None if token_id in self._hidden_ids else token

    def piece(self, token_id: int) -> str | bytes:
        """What a token adds to a text that has begun: characters, or bytes that are not whole ones.

        It is empty for hidden tokens, and for ids that the model has but the tokenizer has not.
        """
        piece = self.pieces.get(token_id)
        if piece is None:
            piece = self.pieces[token_id] = self._find_piece(token_id)
        return piece

    def special_name(self, token_id: int) -> str:
        """How a token that is no text is written; empty if the tokenizer does not have it."""
        name: str | None = self._backend.id_to_token(token_id)
        return name or ""

    def _find_piece(self, token_id: int) -> str | bytes:
        token = self.token(token_id)
        return "" if token is None else self.decoding.piece(token)
