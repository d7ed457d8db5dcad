"""Outputs at random under a grammar's masks, as a model without any sense would write them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from llguidance import LLMatcher
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask
from tokenizers import Tokenizer

from tests.grammar.tokenizers import added_tokens
from tpworker.grammar import Compiler

EOS_IDS = (2, 0)
ENDS_TEXT = '"'
ENDS_OTHERS = "}]"
LEADS_ON = '"@.:-/AAz00'
"""What brings an output nearer to its end: first what ends something, and else any of these."""


def allowed_ids(matcher: LLMatcher, vocab_size: int) -> np.ndarray:
    """The tokens that may come next, int64."""
    mask = allocate_token_bitmask(1, vocab_size)
    mask.fill(0)
    fill_next_token_bitmask(matcher, mask)
    assert not matcher.is_error(), matcher.get_error()
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))


def refused(matcher: LLMatcher, vocab_size: int, ids: Sequence[int]) -> int | None:
    """The index of the first token that the masks do not allow; None: all of them may come in a row."""
    for i, token in enumerate(ids):
        if token not in allowed_ids(matcher, vocab_size):
            return i
        assert matcher.consume_token(token)
    return None


class Sampler:
    """Samples outputs with a tokenizer.

    Args:
        folder: of a model.
    """

    def __init__(self, folder: Path) -> None:
        text = (folder / "tokenizer.json").read_text()
        self.tokenizer = Tokenizer.from_str(text)
        self.vocab_size = self.tokenizer.get_vocab_size()
        self.compiler = Compiler(text, self.vocab_size, EOS_IDS)
        self.special_ids = added_tokens(text)
        self._letter, *_ = self._ids("q")
        self._ends_text, self._ends_others, self._leads_on = map(
            self._ids, (ENDS_TEXT, ENDS_OTHERS, LEADS_ON)
        )

    def sample(self, grammar: str, seed: int, num_free: int = 40, max_tokens: int = 2000) -> list[int]:
        """The tokens of an output that is complete, without the one that ends it.

        Args:
            num_free: after so many tokens those that close something are preferred, the end above all.
        """
        chance = np.random.default_rng(seed)
        matcher = self.compiler.matcher(grammar)
        output: list[int] = []
        while len(output) < max_tokens:
            allowed = allowed_ids(matcher, self.vocab_size)
            assert len(allowed), f"nothing is allowed after {self.text(output)!r}"
            may_end = EOS_IDS[0] in allowed
            others = allowed[~np.isin(allowed, EOS_IDS)]
            if may_end and (not len(others) or len(output) >= num_free or chance.random() < 0.2):
                return output
            if len(output) >= num_free and chance.random() < 0.9:
                others = self._closing(others)
            output.append(int(chance.choice(others)))
            assert matcher.consume_token(output[-1]), matcher.get_error()
        raise AssertionError(f"no end after {max_tokens} tokens: {self.text(output)[-200:]!r}")

    def text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    def _closing(self, allowed: np.ndarray) -> np.ndarray:
        ends = self._ends_text if self._letter in allowed else self._ends_others
        for wanted in (ends, self._leads_on):
            if len(found := wanted[np.isin(wanted, allowed)]):
                return found
        return allowed

    def _ids(self, characters: str) -> np.ndarray:
        return np.array([self.tokenizer.token_to_id(c) for c in characters])


@cache
def sampler_of(folder: Path) -> Sampler:
    """One sampler a folder: it takes a quarter of a second to make."""
    return Sampler(folder)
