"""Grammars compiled for a model's tokenizer, and kept for whoever comes with the same."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tpworker.grammar.errors import GrammarError, cleaned
from tpworker.grammar.marks import added_tokens

if TYPE_CHECKING:
    from llguidance import LLMatcher

MAX_COMPILED = 256
MAX_COMPILED_TEXT = 1 << 22  # characters of all grammars that are kept


class Compiler:
    """Makes matchers of grammars. Every method may be called from several threads at once.

    Args:
        tokenizer_json: the text of the model's tokenizer.json.
        vocab_size: the model's logits; those beyond the tokenizer's tokens are never allowed.
        eos_ids: the tokens that end an output, and are allowed where the grammar is complete.

    Raises:
        GrammarError: llguidance cannot read this tokenizer.
    """

    def __init__(self, tokenizer_json: str, vocab_size: int, eos_ids: Sequence[int]) -> None:
        import llguidance

        self.vocab_size = vocab_size
        self.special_ids = added_tokens(tokenizer_json)
        """The ids of added tokens by their names, for `grammar_of`."""
        try:
            self._tokenizer = llguidance.LLTokenizer(
                tokenizer_json, n_vocab=vocab_size, eos_token=list(eos_ids)
            )
        except Exception as error:  # what it raises is no contract
            raise GrammarError(
                f"llguidance cannot read the model's tokenizer: {cleaned(str(error))}"
            ) from None
        self._limits = llguidance.LLParserLimits(verbose_errors=False)
        self._compiled: OrderedDict[str, LLMatcher] = OrderedDict()
        self._num_characters = 0
        self._lock = threading.Lock()

    def matcher(self, grammar: str) -> LLMatcher:
        """A fresh matcher of a grammar's text, compiled if nobody came with it lately.

        Raises:
            GrammarError: it cannot be compiled.
        """
        with self._lock:
            compiled = self._compiled.get(grammar)
            if compiled is not None:
                self._compiled.move_to_end(grammar)
                return compiled.deep_copy()
        compiled = self._compile(grammar)
        with self._lock:
            if grammar not in self._compiled:
                self._keep(grammar, compiled)
            return compiled.deep_copy()

    def _compile(self, grammar: str) -> LLMatcher:
        from llguidance import LLMatcher

        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
        if matcher.is_error():
            raise GrammarError(cleaned(matcher.get_error()))
        return matcher

    def _keep(self, grammar: str, compiled: LLMatcher) -> None:
        self._compiled[grammar] = compiled
        self._num_characters += len(grammar)
        while len(self._compiled) > MAX_COMPILED or self._num_characters > MAX_COMPILED_TEXT:
            dropped, _ = self._compiled.popitem(last=False)
            self._num_characters -= len(dropped)
