"""Grammars compiled for a model's tokenizer, and kept for whoever comes with the same."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from tpworker.grammar.errors import GrammarError, cleaned
from tpworker.grammar.exactness import inexact
from tpworker.grammar.where import place_in_schemas, schemas_in

if TYPE_CHECKING:
    from llguidance import LLMatcher

STACK_BYTES = 128 << 20
"""llguidance goes into schemas, rules and expressions by recursion: 2 to 16 KB for each within another, or to
which another refers. Where the stack ends, the process dies. The largest text that is taken needs less."""
INITIAL_FUEL = 400_000
"""Steps of the lexer up to its first mask, 200 ms of them. 128 tools of 20 parameters take half."""
STEP_FUEL = 200_000
"""Steps of the lexer in any later mask: 20 ms."""
MAX_ITEMS = 8_000
"""Ways in which an output may go on at one place, e.g. four for each property that may be left out. A mask
takes 2 ms for each 1,000 of them."""

MAX_MASK_SECONDS = 0.05
"""Of processor time, for a mask while requests are served. Where a grammar is ambiguous (`s: s s | "a"`) they
take longer the longer the output is, without an end, and everybody waits."""

MAX_COMPILED = 256
MAX_COMPILED_TEXT = 1 << 20
"""Characters of all grammars that are kept, each as often as it is compiled: 200 bytes of memory for each, in
what is compiled of them."""
NUM_TRIES = 3
QUICK_SECONDS = 0.02
"""What takes longer to compile is compiled once."""

_T = TypeVar("_T")
_stack_lock = threading.Lock()


def with_stack(num_bytes: int, work: Callable[[], _T]) -> _T:
    """What `work` returns, done in a thread with so large a stack. Memory is used as far as the stack is."""
    made: list[_T] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            made.append(work())
        except BaseException as error:  # the caller's thread raises it
            raised.append(error)

    with _stack_lock:  # the size is the process's: for whatever thread starts next
        usual = threading.stack_size(num_bytes)
        try:
            thread = threading.Thread(target=run, name="tpworker-grammar")
            thread.start()
        finally:
            threading.stack_size(usual)
    thread.join()
    if raised:
        raise raised[0]
    return made[0]


@dataclass(slots=True)
class _Originals:
    """A grammar, compiled once or more often; what is used are copies."""

    matchers: deque[LLMatcher]
    wants_another: bool = True


class Compiler:
    """Makes matchers of grammars. Every method may be called from several threads at once.

    Args:
        tokenizer_json: the text of the model's tokenizer.json.
        vocab_size: the model's logits; those beyond the tokenizer's tokens are never allowed.
        eos_ids: the tokens that end an output, and are allowed where the grammar is complete.
        num_originals: how often a grammar is compiled at most, if that is quick. Copies of the same original
            share a lock, and gain little from threads that fill their masks side by side.

    Raises:
        GrammarError: llguidance cannot read this tokenizer.
    """

    def __init__(
        self, tokenizer_json: str, vocab_size: int, eos_ids: Sequence[int], num_originals: int = 1
    ) -> None:
        import llguidance

        self.vocab_size = vocab_size
        self._num_originals = num_originals
        self._eos_ids = list(eos_ids)
        try:
            self._tokenizer = llguidance.LLTokenizer(
                tokenizer_json, n_vocab=vocab_size, eos_token=list(eos_ids)
            )
        except Exception as error:  # what it raises is no contract
            raise GrammarError(
                f"llguidance cannot read the model's tokenizer: {cleaned(str(error))}"
            ) from None
        self._limits = llguidance.LLParserLimits(
            initial_lexer_fuel=INITIAL_FUEL,
            step_lexer_fuel=STEP_FUEL,
            max_items_in_row=MAX_ITEMS,
            verbose_errors=False,
        )
        self._compiled: OrderedDict[str, _Originals] = OrderedDict()
        self._num_characters = 0
        self._lock = threading.Lock()

    def matcher(self, grammar: str) -> LLMatcher:
        """A fresh matcher of a grammar's text, compiled if not enough came with it lately.

        Raises:
            GrammarError: it cannot be compiled.
        """
        with self._lock:
            originals = self._compiled.get(grammar)
            if originals is not None and not originals.wants_another:
                self._compiled.move_to_end(grammar)
                originals.matchers.rotate()
                return originals.matchers[0].deep_copy()
        began = time.monotonic()
        original = self._compile(grammar)
        with self._lock:
            self._keep(grammar, original, time.monotonic() - began < QUICK_SECONDS)
            return original.deep_copy()

    def try_out(self, grammar: str, num_tokens: int = 64) -> None:
        """Compiles a grammar, and goes a few steps with it, as an output at random would.

        What is too complex may show only there, and what takes too long, too: it can take minutes, and the
        memory of the machine. So a grammar is tried in a process that can be ended first.

        Raises:
            GrammarError: it cannot be compiled, its masks cannot be made, or they would not hold an output
                to the numbers of a schema.
        """
        import numpy as np
        from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

        self._check_exactness(grammar)
        mask = allocate_token_bitmask(1, self.vocab_size)
        chance = np.random.default_rng(0)
        for _ in range(NUM_TRIES):
            matcher = self.matcher(grammar)
            for _ in range(num_tokens):
                mask.fill(0)
                fill_next_token_bitmask(matcher, mask)
                if matcher.is_error():
                    raise GrammarError(cleaned(matcher.get_error()))
                bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
                if self._eos_ids and matcher.is_accepting() and chance.random() < 0.1:
                    break
                bits[self._eos_ids] = 0
                allowed = np.flatnonzero(bits)
                if not len(allowed) or matcher.is_stopped():
                    break
                if not matcher.consume_token(int(chance.choice(allowed))):
                    raise GrammarError(cleaned(matcher.get_error()))

    @staticmethod
    def _check_exactness(grammar: str) -> None:
        """Before it is compiled: the least 64-bit integer, as a constant, ends the process."""
        try:
            schemas = list(schemas_in(grammar))
        except (
            ValueError,
            TypeError,
            LookupError,
            AttributeError,
        ):  # no JSON of grammars: llguidance says so
            return
        for schema in schemas:
            if wrong := inexact(schema):
                raise GrammarError(wrong)

    def _compile(self, grammar: str) -> LLMatcher:
        matcher = with_stack(STACK_BYTES, lambda: self._new(grammar))
        if not matcher.is_error():
            # The first mask is the slowest, since most of the lexer is made for it. All copies have it then.
            matcher.compute_bitmask()
        if not matcher.is_error():
            return matcher
        what = cleaned(matcher.get_error())
        if "JSON schema" in matcher.get_error() and "too large" not in what:
            where = with_stack(STACK_BYTES, lambda: place_in_schemas(grammar, self._is_refused))
            what = f"{what}, at {where}" if where else what
        raise GrammarError(what)

    def _is_refused(self, grammar: str) -> bool:
        return self._new(grammar).is_error()

    def _new(self, grammar: str) -> LLMatcher:
        from llguidance import LLMatcher

        return LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)

    def _keep(self, grammar: str, original: LLMatcher, is_quick: bool) -> None:
        if grammar not in self._compiled:
            self._compiled[grammar] = _Originals(deque())
        originals = self._compiled[grammar]
        if len(originals.matchers) < self._num_originals:  # else other threads were quicker
            originals.matchers.append(original)
            self._num_characters += len(grammar)
        originals.wants_another = is_quick and len(originals.matchers) < self._num_originals
        self._compiled.move_to_end(grammar)
        while len(self._compiled) > MAX_COMPILED or self._num_characters > MAX_COMPILED_TEXT:
            dropped, compiled = self._compiled.popitem(last=False)
            self._num_characters -= len(dropped) * len(compiled.matchers)
